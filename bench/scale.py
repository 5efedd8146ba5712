"""
How retrieval grows with the knowledge base, at 10 thousand, 100 thousand and 1 million chunks: how fast rows go in, how
long the index takes to be complete, a search for a training batch (192 chunks, k = 2), how many of the two nearest it
finds (recall@2, against an exact search), and what memory that takes; of Milvus Lite, of a real Milvus server
(milvus_server.py), and, beside them, of the exact-match index.

    python bench/scale.py config/quickstart.py [--quick]
    python bench/scale.py config/quickstart.py --backends=lite,matches --rows=1_000_000    # a part of it
    python bench/scale.py config/quickstart.py --rows=0                                    # measure nothing

With --folder=DIR databases are kept there, and one that is there is not filled again, e.g. to measure its searches once
the machine is quiet.

The chunks are those of the config's train_datasets, embedded by its model, then copies of them that are disturbed. Each
measurement is a JSON line, which is added to --out=out/scale.jsonl; of the lines there are, the newest values of each
backend and size, it prints a table and the exponents of the growth, and draws out/scale.png.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from glob import glob
from itertools import chain, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import pick_device

import numpy as np

from bench.milvus_server import QUIET, MilvusServer, wait_until_indexed, why_not
from configurator import UserError, load_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.documents import as_dataset_configs
from data.fingerprint import describe_corpus
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.embedding import Embedder
from retrieval.knowledge_base import open_knowledge_base
from retrieval.leaks import SPARE, hits_without_leaks, search_stage
from retrieval.local_server import is_local
from retrieval.match_index import Documents, MatchIndex, Segment, index_documents, plan_merges
from retrieval.populate import Rows, read_parts

SIZES = (10_000, 100_000, 1_000_000)
BATCH, L, K = 192, 4, 2  # chunks of a batch, in sequences of L; neighbors
JUDGED = 3  # batches whose hits are compared with an exact search
BLOCK = 8192  # rows that are made at once
NOISE = 0.5  # length of what is added to a copy's vector of length 1: its cosine with the original is 0.89
OTHERS = 0.1  # share of a copy's tokens that are replaced by other tokens of the corpus
STEP = 0x1E3779B97F4A7C15  # between the ids of a chunk's copies, which lie as evenly as hashes do
BACKENDS = {'lite': 'Milvus Lite', 'server': 'Milvus server', 'matches': 'exact-match index'}
UNITS = {'rows_per_s': 'rows/s', 'index_s': 'index, s', 'search_ms': 'search, ms', 'recall': 'recall@2',
         'memory_mb': 'memory, MB', 'disk_mb': 'disk, MB', 'segments': 'segments'}
FITTED = ('index_s', 'search_ms', 'memory_mb', 'disk_mb')


def read_chunks(settings, tokenizer, most):
    """Up to `most` chunks of train_datasets that have a vector: the Rows, vectors (n, D), and the Embedder."""
    embedder = Embedder(settings.retrieval_embedding_model, pick_device(settings.device))
    parts, vectors, count = [], [], 0
    datasets = open_datasets(as_dataset_configs(settings.train_datasets, 'train_datasets'), tokenizer, settings)
    for part in read_parts(datasets, tokenizer):
        found = embedder.embed(part.rows.text)
        has_vector = np.flatnonzero(found.any(axis=1))[:most - count]
        parts.append(part.rows.take(has_vector))
        vectors.append(found[has_vector])
        count += len(has_vector)
        if count == most:
            break
    joined = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return Rows(**{name: list(chain(*lists)) if isinstance(lists[0], list) else np.concatenate(lists)
                   for name, lists in joined.items()}), np.concatenate(vectors), embedder


def blocks(real, vectors, count, end_of_text):
    """Yields (Rows, vectors) of `count` chunks: the real ones, then disturbed copies, the same at each call."""
    for start in range(0, count, BLOCK):
        copy, place = np.divmod(np.arange(start, min(start + BLOCK, count)), len(real.id))
        rows, near, rng = real.take(place), vectors[place], np.random.default_rng(start)
        rows.id, rows.doc_id = (values + copy * STEP for values in (rows.id, rows.doc_id))
        noise = rng.standard_normal(near.shape, dtype=np.float32)
        noise *= (NOISE * (copy > 0) / np.linalg.norm(noise, axis=1)).astype(np.float32)[:, None]
        near = near + noise
        others = rng.permutation(rows.tokens.ravel()).reshape(rows.tokens.shape)
        is_other = ((copy > 0)[:, None] & (rng.random(others.shape) < OTHERS) & (others != end_of_text)
                    & (rows.tokens != end_of_text))
        rows.tokens = np.where(is_other, others, rows.tokens)
        yield rows, near / np.linalg.norm(near, axis=1, keepdims=True)


def draw_batches(real, count, batches):
    """Numbers (batches, BATCH) of chunks among the first `count`, runs of L of one document each."""
    firsts = np.arange(min(count, len(real.id)) - L)
    firsts = firsts[real.doc_id[firsts] == real.doc_id[firsts + L - 1]]
    drawn = np.random.default_rng(0).choice(firsts, (batches, BATCH // L))
    return (drawn[:, :, None] + np.arange(L)).reshape(batches, BATCH)


def search_exactly(real, vectors, count, numbers, end_of_text):
    """The scores (n, K) of the nearest chunks of other documents to the real ones of these numbers (n,)."""
    best = np.full((len(numbers), K), -np.inf, dtype=np.float32)
    for rows, near in blocks(real, vectors, count, end_of_text):
        scores = np.where(rows.doc_id == real.doc_id[numbers, None], -np.inf, vectors[numbers] @ near.T)
        scores = np.concatenate([best, np.partition(scores, -K, axis=1)[:, -K:]], axis=1)
        best = -np.sort(-scores, axis=1)[:, :K]
    return best


def measure_milvus(settings, tokenizer, chunks, count, batches, folder, server):
    """The measurements of a collection of `count` chunks, whose rows are inserted if they are not there."""
    (real, vectors, embedder), end = chunks, tokenizer.eot_token
    numbers, found = draw_batches(real, count, batches), {}

    def search(batch, stage, excluded=()):
        return search_stage(knowledge_base, vectors[batch], real.doc_id[batch], stage, K + SPARE, excluded)
    with closing(open_knowledge_base(settings, vocabulary_hash(tokenizer), embedder, create=True,
                                     expected=count)) as knowledge_base:
        if knowledge_base.count() != count:
            found |= fill(knowledge_base, blocks(real, vectors, count, end), count, folder)
        quiet = QUIET if count > 20_000 else 0  # few rows are one segment, and nothing is merged
        found['segments'] = wait_for_index(knowledge_base, count, folder, quiet)
        search(numbers[-1], 0)
        times = []
        for batch in numbers:
            start = time.perf_counter()
            search(batch, 0)
            times.append(time.perf_counter() - start)
        found |= dict(search_ms=1e3 * statistics.median(times),
                      search_spread=[round(1e3 * t, 1) for t in (min(times), max(times))],
                      memory_mb=resident(server.process.pid if server else knowledge_base.lease.pid))
        asked = numbers[:JUDGED].ravel()
        each = np.arange(len(asked))
        hits, _ = hits_without_leaks(lambda i, *stage: (search(asked[i], *stage), np.ones(len(i), dtype=bool)), each,
                                     each, real.doc_id[asked, None], K, K + SPARE)
    exact = search_exactly(real, vectors, count, asked, end)
    is_found = hits['score'] >= exact - 1e-4  # rank for rank: equal texts have equal scores
    return found | dict(recall=float(is_found.mean()), disk_mb=size_of(folder), index=knowledge_base.metadata.index)


def fill(knowledge_base, parts, count, folder):
    """Insert the parts, and wait until all rows are indexed: how fast the one is, and how long the other takes."""
    seconds = 0.0
    for rows, near in parts:
        dicts = rows.to_dicts(near)
        start = time.perf_counter()
        knowledge_base.upsert(dicts)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    knowledge_base.flush()
    seconds += time.perf_counter() - start
    wait_for_index(knowledge_base, count, folder)
    assert knowledge_base.count() == count
    return dict(rows_per_s=count / seconds, index_s=time.perf_counter() - start)


def wait_for_index(knowledge_base, count, folder, quiet=0):
    """Wait until all rows are indexed, and the index is what answers: how many segments there are. RuntimeError."""
    if not is_local(knowledge_base.uri):
        return wait_until_indexed(knowledge_base.client, knowledge_base.collection, count, quiet)
    for _ in range(4800):
        parts = glob(f'{folder}/**/data/*.parquet', recursive=True)
        if len(glob(f'{folder}/**/*.idx', recursive=True)) == len(parts) > 0:
            return len(parts)
        time.sleep(0.5)
    raise RuntimeError('the index is not complete after 40 minutes')


def measure_matches(settings, tokenizer, chunks, count, batches):
    """As measure_milvus, of the exact-match index of the same chunks; what is searched for are pointers."""
    (real, vectors, _), end, C = chunks, tokenizer.eot_token, settings.retrieval_chunk_size
    numbers = draw_batches(real, count, batches)
    index = MatchIndex('', end, tokenizer.n_vocab)
    tokens = np.empty((count, C), dtype=index.token_type)
    doc_ids, done = np.empty(count, dtype=np.int64), 0
    for rows, _ in blocks(real, vectors, count, end):
        tokens[done:done + len(rows.id)], doc_ids[done:done + len(rows.id)] = rows.tokens[:, :C], rows.doc_id
        done += len(rows.id)
    firsts = [0, *(np.flatnonzero(np.diff(doc_ids)) + 1), count]
    texts = [np.append(tokens[a:b].ravel(), [end] * 2).astype(index.token_type) for a, b in pairwise(firsts)]
    order = np.argsort(doc_ids[firsts[:-1]])
    documents = Documents(doc_ids[firsts[:-1]][order], np.zeros(len(order), dtype=np.int64), [texts[i] for i in order])
    few = documents.take(np.arange(8))
    index_documents(few, end, index.token_type)  # compiles
    start = time.perf_counter()
    arrays = [index_documents(part, end, index.token_type) for part in plan_merges([], documents)]
    indexed = time.perf_counter() - start
    index.segments = [Segment('', part, []) for part in arrays]
    size = sum(array.nbytes for part in arrays for array in part.values()) / 1e6
    times = []
    for batch in (numbers[0], *numbers):  # the first compiles
        queries = real.tokens[batch, :C].reshape(-1, L * C).astype(np.int64)
        start = time.perf_counter()
        index.find(queries, real.doc_id[batch].reshape(-1, L), settings.retrieval_pointers)
        times.append(time.perf_counter() - start)
    return dict(index_s=indexed, search_ms=1e3 * statistics.median(times[1:]),
                search_spread=[round(1e3 * t, 1) for t in (min(times[1:]), max(times[1:]))], memory_mb=size,
                disk_mb=size)


def resident(pid):
    """MB of memory of a process and of those that it started."""
    answer = subprocess.run(['ps', '-e', '-o', 'pid=,ppid=,rss='], capture_output=True, text=True, check=True)
    lines = [tuple(map(int, line.split())) for line in answer.stdout.splitlines()]
    family, total = {pid}, 0
    for _ in range(8):  # generations
        family |= {process for process, parent, _ in lines if parent in family}
    for process, _, kilobytes in lines:
        total += kilobytes * (process in family)
    return total / 1e3


def size_of(folder):
    """MB of its files."""
    return sum(os.path.getsize(path) for path in glob(f'{folder}/**', recursive=True) if os.path.isfile(path)) / 1e6


def measure(backend, settings, tokenizer, chunks, count, batches, kept):
    """The line of one backend and size. Its database is kept in the folder `kept`, if there is one."""
    with ExitStack() as cleanup:
        folder = f'{kept}/{backend}-{count}' if kept else cleanup.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(folder, exist_ok=True)
        settings = settings.replace(retrieval_milvus_uri=f'{folder}/lite.db', retrieval_collection='scale')
        if backend == 'matches':
            found = measure_matches(settings, tokenizer, chunks, count, batches)
        else:
            server = None
            if backend == 'server':
                server = cleanup.enter_context(MilvusServer(f'{folder}/server'))
                settings = settings.replace(retrieval_milvus_uri=server.uri, retrieval_milvus_token='')
            found = measure_milvus(settings, tokenizer, chunks, count, batches, folder, server)
    real, vectors, _ = chunks
    return dict(backend=backend, rows=count, real=min(count, len(real.id)), dimension=vectors.shape[1],
                chunk_size=settings.retrieval_chunk_size, batch=BATCH, batches=batches,
                corpus=describe_corpus(settings.train_datasets),
                **{key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()})


def exponent(lines, key):
    """p of key ~ rows ** p, by least squares of the logarithms; None of fewer than two sizes."""
    points = [(line['rows'], line[key]) for line in lines if line.get(key)]
    if len(points) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(points, dtype=float)).T, 1)[0])


def describe(lines):
    """A table of the lines, and the exponents of their growth."""
    text = f'{"":<20}{"chunks":>12}' + ''.join(f'{unit:>12}' for unit in UNITS.values()) + '\n'
    for backend, name in BACKENDS.items():
        of_backend = [line for line in lines if line['backend'] == backend]
        for line in of_backend:
            cells = (f'{line[key]:,.3f}' if key == 'recall' else f'{line[key]:,.1f}' if line[key] < 100 and
                     key != 'segments' else f'{line[key]:,.0f}' for key in UNITS if key in line)
            shown = dict(zip((key for key in UNITS if key in line), cells, strict=True))
            text += f'{name:<20}{line["rows"]:>12,}' + ''.join(f'{shown.get(key, ""):>12}' for key in UNITS) + '\n'
        grown = {key: exponent(of_backend, key) for key in FITTED}
        if any(value is not None for value in grown.values()):
            text += f'{"  grows as rows to":<32}' + ''.join(
                f'{"" if grown.get(key) is None else f"{grown[key]:.2f}":>12}' for key in UNITS) + '\n'
    return text


def plot(lines, path):
    """Time to index, search and memory by size, as an image."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(9, 3), layout='constrained')
    titles = {'index_s': 'index complete after the last row (s)', 'search_ms': f'a batch of {BATCH} chunks (ms)',
              'memory_mb': 'memory (MB)'}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for (backend, name), color in zip(BACKENDS.items(), ('#2f7fd6', '#e07b39', '#8a8f98'), strict=True):
            points = [(line['rows'], line[key]) for line in lines if line['backend'] == backend and key in line]
            if points:
                grown = exponent([line for line in lines if line['backend'] == backend], key)
                ax.loglog(*zip(*points, strict=True), 'o-', color=color, markersize=4,
                          label=name if grown is None else f'{name}: $n^{{{grown:.2f}}}$')
        ax.set_title(title, fontsize=9)
        ax.set_xlabel('chunks', fontsize=8)
        ax.tick_params(labelsize=8)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter('{x:,.9g}')
            axis.set_minor_formatter('')
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=7)
    fig.savefig(path, dpi=90)
    plt.close(fig)


def parse_arguments():
    """(settings, backends, sizes, batches, folder to keep databases in or '', path of the lines)"""
    options = dict(backends=','.join(BACKENDS), rows='', folder='', out='out/scale.jsonl')
    rest, is_quick = [], '--quick' in sys.argv
    if '--help' in sys.argv or '-h' in sys.argv:
        print(__doc__)
        sys.exit(0)
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix('--').partition('=')
        if argument.startswith('--') and name in options:
            options[name] = value
        elif argument != '--quick':
            rest.append(argument)
    backends = options['backends'].split(',')
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise UserError(f'--backends names {unknown[0]!r}: choose among {", ".join(BACKENDS)}')
    try:
        sizes = [int(size) for size in options['rows'].split(',')] if options['rows'] else SIZES
    except ValueError:
        raise UserError(f'--rows is {options["rows"]!r}: give numbers of chunks, such as 10_000,100_000') from None
    sizes = [2000, 4000] if is_quick and not options['rows'] else [size for size in sizes if size]
    return load_settings(rest), backends, sizes, 2 if is_quick else 20, options['folder'], options['out']


def main():
    settings, backends, sizes, batches, kept, out = parse_arguments()
    if 'server' in backends and sizes and why_not():
        print(f'no real Milvus server: {why_not()}', file=sys.stderr)
        backends.remove('server')
    if sizes:
        os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
        tokenizer = load_tokenizer(settings.tokenizer)
        chunks = read_chunks(settings, tokenizer, max(sizes))
        for size in sizes:
            for backend in backends:
                line = json.dumps(measure(backend, settings, tokenizer, chunks, size, batches, kept))
                print(line, flush=True)
                with open(out, 'a', encoding='utf-8') as file:
                    file.write(line + '\n')
    try:
        with open(out, encoding='utf-8') as file:
            lines = [json.loads(line) for line in file]
    except FileNotFoundError:
        raise UserError(f'there are no measurements in {out!r}: give --rows') from None
    newest = {}
    for line in lines:
        key = line['backend'], line['rows']
        newest[key] = newest.get(key, {}) | line
    lines = [newest[key] for key in sorted(newest, key=lambda key: key[1])]
    plot(lines, f'{os.path.splitext(out)[0]}.png')
    print(f'\n{describe(lines)}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
