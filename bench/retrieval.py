"""
What live retrieval costs, stage by stage: milliseconds per batch, and chunks/s end to end, from Milvus Lite and from a
real Milvus server (milvus_server.py), with an empty and a full neighbor cache. The arms take turns over the same
batches. Prints a table and one JSON line.

    python bench/retrieval.py config/quickstart.py [--quick]
"""
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import pick_device

import numpy as np

from bench.milvus_server import MilvusServer, why_not
from configurator import load_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.documents import as_dataset_configs
from data.fingerprint import describe_corpus
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.populate import populate
from retrieval.retriever import Retriever

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
    timed(retriever.knowledge_base, 'search', lambda _, limit, excluded=(), latest=False:
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


def main():
    is_quick = '--quick' in sys.argv
    settings = load_settings([a for a in sys.argv[1:] if a != '--quick'])
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
            populate(database, show_progress=sys.stderr.isatty())
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
