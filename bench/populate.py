"""
How well populate overlaps its stages: reading, embedding and inserting each alone over the same documents, then the
command itself; and whether it keeps its rate and its memory over many small documents. Prints tables and JSON lines.

    python bench/populate.py config/quickstart.py [--quick]
    python bench/populate.py config/quickstart.py --documents=1000000    # small ones, in place of the config's
    python bench/populate.py config/my_run.py --embedding    # its embedding model in float32 and as it is used here
"""
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import pick_device

import numpy as np

from configurator import load_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.documents import as_dataset_configs, load_documents
from data.fingerprint import describe_corpus
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.embedding import Embedder
from retrieval.knowledge_base import KnowledgeBase, open_knowledge_base
from retrieval.populate import populate, read_parts, sample_rows

CHARACTERS = 160  # of a small document


def stages_alone(settings):
    """Seconds of each stage over all documents, one after another, and the number of rows."""
    tokenizer = load_tokenizer(settings.tokenizer)
    embedder = Embedder(settings.retrieval_embedding_model, pick_device(settings.device))
    embedder.embed(['warm up'])
    start = time.perf_counter()
    datasets = open_datasets(as_dataset_configs(settings.train_datasets, 'train_datasets'), tokenizer, settings)
    parts = list(read_parts(datasets, tokenizer))
    read = time.perf_counter()
    vectors = [embedder.embed(part.rows.text) for part in parts]
    embedded = time.perf_counter()
    knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), embedder, create=True,
                                         expected=sum(len(part.rows.id) for part in parts))
    opened = time.perf_counter()
    for part, embeddings in zip(parts, vectors, strict=True):
        if len(part.rows.id):
            knowledge_base.upsert(part.rows.to_dicts(embeddings))
    knowledge_base.flush()
    inserted = time.perf_counter()
    knowledge_base.close()
    return (dict(read=read - start, embed=embedded - read, insert=inserted - opened),
            sum(len(part.rows.id) for part in parts))


def compare_stages(settings):
    with tempfile.TemporaryDirectory() as folder:
        settings = settings.replace(data_cache_dir=f'{folder}/datasets')
        alone, chunks = stages_alone(settings.replace(retrieval_milvus_uri=f'{folder}/alone.db'))
        done, seconds = populate(settings.replace(retrieval_milvus_uri=f'{folder}/together.db',
                                                  data_cache_dir=f'{folder}/again'), show_progress=False)
    assert done['added'] == chunks
    rates = {stage: chunks / alone[stage] for stage in alone} | dict(all=chunks / seconds['all'])
    slowest = min(alone, key=lambda stage: rates[stage])
    corpus = describe_corpus(settings.train_datasets)
    print(f'{chunks:,} chunks of {corpus}\n')
    for stage in ('read', 'embed', 'insert'):
        print(f'{stage + " alone":<24} {rates[stage]:>10,.0f} chunks/s')
    print(f'{"all, overlapped":<24} {rates["all"]:>10,.0f} chunks/s, {rates["all"] / rates[slowest]:.0%} of {slowest}')
    print(json.dumps(dict(corpus=corpus, chunks=chunks, **{k: round(v) for k, v in rates.items()}, slowest=slowest,
                          all_over_slowest=round(rates['all'] / rates[slowest], 3))))


def write_small_documents(settings, count, path):
    """A JSONL file of `count` different documents of CHARACTERS characters of the config's val text."""
    text = '\n'.join(document.text for document in load_documents(
        as_dataset_configs(settings.val_datasets, 'val_datasets')))
    starts = np.random.default_rng(0).integers(len(text) - CHARACTERS, size=count)
    with open(path, 'w', encoding='utf-8') as file:
        for number, start in enumerate(starts.tolist()):
            file.write(json.dumps(dict(id=number, text=f'{number} {text[start:start + CHARACTERS]}', meta=[number])))
            file.write('\n')


def memory(pid):
    """MB of a process' own memory; pages of files, which the system may drop, are not counted."""
    try:
        with open(f'/proc/{pid}/status') as file:
            return int(next(line for line in file if line.startswith('RssAnon')).split()[1]) / 1e3
    except (FileNotFoundError, StopIteration):
        return 0.0


def watch(samples, is_over, written):
    """A thread: adds (seconds, rows, {process: MB}) to the samples now and then."""
    start = time.monotonic()
    while not is_over.wait(0.5):
        processes = {process.name.replace('SpawnProcess-2', 'embedder'): process.pid
                     for process in multiprocessing.active_children()}
        samples.append((time.monotonic() - start, sum(written),
                        {name: memory(pid) for name, pid in {**processes, 'main': 'self'}.items()}))


def measure_small_documents(settings, count):
    """Rows/s and MB of each process, of populate but for the database, over tenths of its documents."""
    written, samples, is_over = [], [], threading.Event()
    upsert = KnowledgeBase.upsert
    KnowledgeBase.upsert = lambda self, rows: (upsert(self, rows), written.append(len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        write_small_documents(settings, count, f'{folder}/small.jsonl')
        settings = settings.replace(train_datasets=[f'{folder}/small.jsonl'], data_cache_dir=f'{folder}/datasets',
                                    retrieval_milvus_uri=f'{folder}/small.db')
        thread = threading.Thread(target=watch, args=(samples, is_over, written))
        thread.start()
        try:
            done, seconds = populate(settings, sys.stderr.isatty())
        finally:
            is_over.set()
            thread.join()
    began = max(0, next(i for i, (_, rows, _) in enumerate(samples) if rows) - 1)
    reading = max(sum(processes.values()) for _, _, processes in samples[:began + 1])
    print(f'{count:,} documents, {done["added"]:,} rows; reading and loading took {samples[began][0]:.0f} s and '
          f'{reading:,.0f} MB at most\n\n{"rows":>12} {"rows/s":>8} {"MB, all":>9}  of each process')
    tenths = []
    for tenth in range(1, 11):
        low, high = (done['added'] * share / 10 for share in (tenth - 1, tenth))
        before = [sample for sample in samples[began:] if sample[1] <= low][-1:]
        part = before + [sample for sample in samples[began:] if low < sample[1] <= high]
        if len(part) > 1:
            rate = (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0])
            each = {name: max(processes.get(name, 0) for _, _, processes in part) for name in part[-1][2]}
            tenths.append((rate, sum(each.values())))
            print(f'{part[-1][1]:>12,} {rate:>8,.0f} {sum(each.values()):>9,.0f}  '
                  + ', '.join(f'{name} {size:,.0f}' for name, size in each.items()))
    print(json.dumps(dict(documents=count, rows=done['added'], rows_per_s=round(done['added'] / seconds['all']),
                          rates_of_tenths=[round(rate) for rate, _ in tenths], reading_mb=round(reading),
                          first_mb=round(tenths[0][1]), last_mb=round(tenths[-1][1]))))


def compare_precisions(settings, count=512):
    """Chunks/s of the embedding model on chunks of the val text, and the lowest cosine to its vectors in float32."""
    tokenizer = load_tokenizer(settings.tokenizer)
    rows = sample_rows(open_datasets(as_dataset_configs(settings.val_datasets, 'val_datasets'), tokenizer, settings),
                       tokenizer)
    texts, report, exact = rows.text[:count], dict(model=settings.retrieval_embedding_model), None
    for name in ('float32', 'auto'):
        embedder = Embedder(settings.retrieval_embedding_model, pick_device(settings.device), name)
        embedder.embed(texts[:64])
        start = time.perf_counter()
        vectors = embedder.embed(texts)
        exact = vectors if exact is None else exact
        report[name] = dict(dtype=str(next(embedder.model.parameters()).dtype).removeprefix('torch.'),
                            chunks_per_s=round(len(texts) / (time.perf_counter() - start), 1),
                            lowest_cosine=round(float((vectors * exact).sum(1).min()), 5))
        print(name, report[name], flush=True)
    print(json.dumps(report | dict(chunks=len(texts))))


def main():
    own = [a for a in sys.argv[1:] if a in ('--quick', '--embedding') or a.startswith('--documents=')]
    settings = load_settings([a for a in sys.argv[1:] if a not in own])
    counts = [int(a.partition('=')[2].replace('_', '')) for a in own if '=' in a]
    if '--embedding' in own:
        compare_precisions(settings)
        return
    if counts:
        measure_small_documents(settings, counts[0])
        return
    if '--quick' in own:
        settings = settings.replace(train_datasets=settings.val_datasets)
    compare_stages(settings)


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
