"""
What live retrieval costs, stage by stage: milliseconds per batch, and chunks/s end to end, from Milvus Lite and from a
real Milvus server (milvus_server.py), with an empty and a full neighbor cache. The arms take turns over the same
batches. Prints a table and one JSON line.

    python bench/retrieval.py config/quickstart.py [--quick]
    python bench/retrieval.py config/quickstart.py --workers=1,2,4 --dimensions=192,384,768 [--keep=FOLDER] [--quick]

With --workers: chunks/s of the loader that a run has, by the number of its processes (retrieval_workers), for pointers
alone, both, and neighbors alone by the dimension of the vectors; and the processor's milliseconds per batch of these
processes and of the database, which say how many cores keep which GPU fed. More dimensions are the static embedding's,
turned into a larger space: same cosines, same neighbors, so the cost of the dimension alone. Nothing is remembered.
FOLDER keeps the filled databases for another call.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import pick_device

import numpy as np

from bench.milvus_server import MilvusServer, wait_until_indexed, why_not
from configurator import UserError, load_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.documents import as_dataset_configs
from data.fingerprint import describe_corpus
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer, tokenizer_json
from retrieval.embedding import Embedder
from retrieval.loader import Loader
from retrieval.local_server import is_local, join_server
from retrieval.populate import populate
from retrieval.retriever import STALE, Retriever
from retrieval.static_embedding import is_static_embedding, save

STAGES = ('read', 'recall', 'stored embeddings', 'embed', 'search', 'search again', 'rows', 'pointers', 'remember',
          'rest')


def time_stages(retriever):
    """Have the retriever's parts add up their seconds by stage; returns the dict that holds them."""
    seconds = defaultdict(float)

    def timed(owner, name, stage):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[stage(*args, **kwargs)] += time.perf_counter() - start
        setattr(owner, name, call)

    timed(retriever.cache, 'get', lambda *_: 'recall')
    timed(retriever.cache, 'put', lambda *_: 'remember')
    if retriever.k:
        timed(retriever.embedder, 'embed', lambda *_: 'embed')
    if retriever.matches:
        timed(retriever.matches, 'find', lambda *_: 'pointers')
    timed(retriever.knowledge_base, 'rows', lambda _, fields, *rest: 'rows' if fields == ['tokens'] else
          'stored embeddings')
    timed(retriever.knowledge_base, 'search', lambda _, limit, excluded=(), latest=False, texts=None:
          'search again' if len(excluded) or limit > retriever.candidates else 'search')
    return seconds


def measure(settings, is_remembered, tokenizer, datasets, rounds, together):
    """Yields, for each round of `together` batches, milliseconds per batch by stage, and retrieving chunks/s."""
    with closing(Retriever(settings, tokenizer, pick_device(settings.device))) as retriever:
        stream = SequenceStream(datasets, settings.block_size, settings.batch_size)
        if is_remembered:
            for _ in range(rounds):
                retriever.retrieve_for(list(islice(stream, together)))
            stream = SequenceStream(datasets, settings.block_size, settings.batch_size)
        if retriever.matches:  # builds the index
            retriever.point(np.zeros((1, settings.block_size), dtype=np.int64))
        seconds = time_stages(retriever)
        for _ in range(rounds):
            seconds.clear()
            start = time.perf_counter()
            batches = list(islice(stream, together))
            seconds['read'] = time.perf_counter() - start
            retriever.retrieve_for(batches)
            whole = time.perf_counter() - start
            seconds['rest'] = whole - sum(seconds.values())
            yield ({stage: 1e3 * seconds[stage] / together for stage in STAGES} | {'all': 1e3 * whole / together},
                   sum(int((~batch.is_last_chunk).sum()) for batch in batches) / whole)


def cpu_seconds(root, name=''):
    """The processor's seconds of process `root` and all below it whose names begin with `name`."""
    children, seconds = defaultdict(list), {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has ended
            head, _, tail = path.read_text().rpartition(')')
            fields = tail.split()
            children[int(fields[1])].append(int(path.parent.name))
            used = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
            seconds[int(path.parent.name)] = used if head.partition('(')[2].startswith(name) else 0.0
    found, total = [root], 0.0
    for process in found:
        total += seconds.get(process, 0.0)
        found += children[process]
    return total


def token_vectors(settings):
    """The vectors (V, D) of the config's static embedding."""
    if not is_static_embedding(settings.retrieval_embedding_model):
        raise UserError(f'--workers needs a static embedding, and retrieval_embedding_model is '
                        f'{settings.retrieval_embedding_model!r}: use config/quickstart.py')
    return Embedder(settings.retrieval_embedding_model).model[0].embedding.weight.detach().numpy()


def widen(settings, vectors, dimension, folder):
    """The settings with a static embedding of token vectors (V, D) that are turned into `dimension` dimensions."""
    if dimension < vectors.shape[1]:
        raise UserError(f'--dimensions: the static embedding has {vectors.shape[1]}, and {dimension} is less')
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(dimension, vectors.shape[1])))[0].T
    path = f'{folder}/embedding-{dimension}'
    save((vectors @ turn).astype(np.float32), tokenizer_json(settings.tokenizer, load_tokenizer(settings.tokenizer)),
         path)
    return settings.replace(retrieval_embedding_model=path, retrieval_collection=f'chunks_{dimension}')


def measure_loader(settings, server_cpu, runs, together):
    """A dict of rates and milliseconds per batch, of a loader with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        settings = settings.replace(retrieval_cache_dir=cache, retrieval_prefetch_batches=together)
        loader = Loader(settings, dict(batch_size=settings.batch_size, seed=settings.seed))
        with closing(loader):
            def workers_cpu():
                return sum(cpu_seconds(process.pid) for process in loader.processes)
            list(islice(loader, 2 * together - 1 + settings.retrieval_workers * together))  # all have begun
            if not is_local(settings.retrieval_milvus_uri):
                time.sleep(STALE)  # a server's answers take longer at first
                list(islice(loader, 3 * settings.retrieval_workers * together))  # what is ready by then
            start, cpu, chunks = time.perf_counter(), (workers_cpu(), server_cpu()), 0
            for batch in islice(loader, runs * together):
                chunks += int((~batch.is_last_chunk).sum())
            seconds, batches = time.perf_counter() - start, runs * together
            workers, server = (1e3 * (after - before) / batches for before, after in
                               zip(cpu, (workers_cpu(), server_cpu()), strict=True))
    return dict(chunks_per_s=round(chunks / seconds),
                tokens_per_s=round(batches * settings.batch_size * settings.block_size / seconds),
                ms=round(1e3 * seconds / batches, 2), workers_cpu_ms=round(workers, 2),
                database_cpu_ms=round(server, 2))


def compare_workers(settings, workers, dimensions, folder, is_quick):
    """Prints the table and the JSON line of --workers."""
    together, runs = (4, 8) if is_quick else (settings.retrieval_prefetch_batches, 4 * max(workers))
    settings = settings.replace(retrieval_matches_dir=f'{folder}/matches', retrieval_cache_gb=4.0)
    vectors = token_vectors(settings)
    report = dict(corpus=describe_corpus(settings.train_datasets), cores=os.cpu_count(), arms=[])
    print(f'{"":<40}{"workers":>8}{"chunks/s":>10}{"tokens/s":>10}{"ms":>8}   processor ms: workers, database')
    with ExitStack() as cleanup:
        local = settings.replace(retrieval_milvus_uri=f'{folder}/lite.db')
        databases = {'Milvus Lite': local}
        if why_not():
            print(f'no real Milvus server: {why_not()}', file=sys.stderr)
        else:
            server = cleanup.enter_context(MilvusServer(f'{folder}/server'))
            databases['Milvus server'] = settings.replace(retrieval_milvus_uri=server.uri, retrieval_milvus_token='')
        for dimension in dimensions:
            for name, database in databases.items():
                database = widen(database, vectors, dimension, folder)
                kinds = {'neighbors': dict(retrieval_k_neighbors=settings.retrieval_k_neighbors or 2,
                                           retrieval_pointers=0)}
                if dimension == vectors.shape[1] and name == 'Milvus Lite':
                    kinds = {'pointers': dict(retrieval_k_neighbors=0), **kinds,
                             'both': dict(kinds['neighbors'], retrieval_pointers=settings.retrieval_pointers)}
                fill(database.replace(**kinds.get('both', kinds['neighbors'])), is_quick)
                with ExitStack() as arms:
                    if name == 'Milvus Lite':
                        lease = arms.enter_context(closing(join_server(database.retrieval_milvus_uri)))
                    for kind, changes in kinds.items():
                        for count in workers:
                            found = measure_loader(
                                database.replace(**changes, retrieval_workers=count),
                                lambda: cpu_seconds(lease.pid) if name == 'Milvus Lite' else  # noqa: B023, at once
                                cpu_seconds(server.process.pid, 'milvus'), runs, together)
                            arm = f'{kind}, {name}, {dimension} dimensions' if kind != 'pointers' else kind
                            report['arms'].append(dict(arm=arm, workers=count, **found))
                            print(f'{arm:<40}{count:>8}{found["chunks_per_s"]:>10,}{found["tokens_per_s"]:>10,}'
                                  f'{found["ms"]:>8.1f}{found["workers_cpu_ms"]:>17.1f}'
                                  f'{found["database_cpu_ms"]:>10.1f}', flush=True)
    print(f'\n{json.dumps(report)}')


def fill(settings, is_quick):
    """Fill a database. A server indexes and merges afterwards, which takes the processor: wait until it has done so."""
    from pymilvus import MilvusClient
    populate(settings, show_progress=sys.stderr.isatty())
    if not is_local(settings.retrieval_milvus_uri) and not is_quick:
        with closing(MilvusClient(settings.retrieval_milvus_uri)) as client:
            name = settings.retrieval_collection
            count = client.query(name, filter='', output_fields=['count(*)'], consistency_level='Strong')
            wait_until_indexed(client, name, count[0]['count(*)'])


def numbers(text):
    try:
        return [int(number) for number in text.split(',')]
    except ValueError:
        raise UserError(f'{text!r} is no list of numbers such as 1,2,4') from None


def main():
    own, given = {}, []
    for argument in sys.argv[1:]:
        key, _, value = argument.partition('=')
        if key in ('--quick', '--workers', '--dimensions', '--keep'):
            own[key] = value
        else:
            given.append(argument)
    is_quick, settings = '--quick' in own, load_settings(given)
    if '--workers' in own:
        with tempfile.TemporaryDirectory() as folder:
            if is_quick:
                settings.train_datasets = settings.val_datasets
            compare_workers(settings, numbers(own['--workers']), numbers(own.get('--dimensions', '192,384,768')),
                            own.get('--keep') or folder, is_quick)
        return
    if len(own) > is_quick:
        raise UserError('--dimensions and --keep belong to --workers: give that, too')
    tokenizer = load_tokenizer(settings.tokenizer)
    together = 8 if is_quick else settings.retrieval_prefetch_batches
    rounds = 2 if is_quick else max(3, 192 // together)
    if is_quick:
        settings.train_datasets = settings.val_datasets
    datasets = open_datasets(as_dataset_configs(settings.train_datasets, 'train_datasets'), tokenizer, settings)
    arms = {}
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        settings = settings.replace(retrieval_cache_gb=4.0, retrieval_matches_dir=f'{folder}/matches')
        databases = {'Milvus Lite': settings.replace(retrieval_milvus_uri=f'{folder}/lite.db')}
        if why_not():
            print(f'no real Milvus server: {why_not()}', file=sys.stderr)
        else:
            server = cleanup.enter_context(MilvusServer(f'{folder}/server'))
            databases['Milvus server'] = settings.replace(retrieval_milvus_uri=server.uri, retrieval_milvus_token='')
        for database in databases.values():
            fill(database, is_quick)
        for name, database in databases.items():
            for is_remembered, arm in ((False, 'first time'), (True, 'remembered')):
                database = database.replace(retrieval_cache_dir=f'{folder}/{name} {arm}')
                measured = measure(database, is_remembered, tokenizer, datasets, rounds, together)
                arms[f'{name}, {arm}'] = cleanup.enter_context(closing(measured))
        results = {name: [] for name in arms}
        for _ in range(rounds):
            for name, measured in arms.items():
                results[name].append(next(measured))
    report = dict(corpus=describe_corpus(settings.train_datasets))
    print(f'milliseconds per batch of {settings.batch_size} x {settings.block_size} tokens of {report["corpus"]}, '
          f'{together} batches per search; medians of {rounds} rounds\n')
    print(f'{"":<20}' + ''.join(f'{name:>28}' for name in results))
    for stage in (*STAGES, 'all'):
        medians = {name: statistics.median(times[stage] for times, _ in measured) for name, measured in results.items()}
        print(f'{stage:<20}' + ''.join(f'{value:>28.2f}' for value in medians.values()))
        for name, value in medians.items():
            report.setdefault(name, {})[stage] = round(value, 3)
    line = f'{"chunks/s":<20}'
    for name, measured in results.items():
        rates = sorted(rate for _, rate in measured)
        report[name] |= dict(chunks_per_s=round(statistics.median(rates)), spread=[round(rates[0]), round(rates[-1])])
        shown = f'{report[name]["chunks_per_s"]:,} ({rates[0]:,.0f} to {rates[-1]:,.0f})'
        line += f'{shown:>28}'
    print(f'{line}\n\n{json.dumps(report)}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
