"""
What live retrieval costs, stage by stage: milliseconds a batch, and chunks/s end to end, from Milvus Lite and from a
real Milvus server (milvus_server.py), with nothing remembered and with all of it. The arms take turns over the same
batches. Prints a table and one JSON line.

    python bench/retrieval.py config/quickstart.py [--quick]
"""
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from milvus_lite.server_manager import server_manager_instance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.milvus_server import MilvusServer, why_not
from configurator import load_settings, user_errors_as_one_line
from data.stream import SequenceStream, as_dataset_configs
from data.tokenizer import load_tokenizer
from retrieval.embedding import pick_device
from retrieval.local_server import local_server
from retrieval.populate import populate
from retrieval.prefetch import with_neighbors
from retrieval.retriever import Retriever

STAGES = ('read', 'recall', 'stored embeddings', 'embed', 'search', 'search again', 'rows', 'remember', 'rest')


def time_stages(retriever):
    """Have the retriever's parts add up their seconds by stage, in the dict that is returned."""
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

    timed(retriever.memory, 'get', lambda *_: 'recall')
    timed(retriever.memory, 'put', lambda *_: 'remember')
    timed(retriever.embedder, 'embed', lambda *_: 'embed')
    timed(retriever.knowledge_base, 'rows', lambda _, fields, *rest: 'rows' if fields == ['tokens'] else
          'stored embeddings')
    timed(retriever.knowledge_base, 'search', lambda _, limit, not_in_documents=(), latest=False:
          'search again' if len(not_in_documents) or limit > retriever.candidates else 'search')
    return seconds


def measure(arm, settings, tokenizer, grid, rounds, ahead):
    """Yields, for round after round of `ahead` batches, milliseconds a batch by stage, and the chunks that asked."""
    retriever = Retriever(settings, tokenizer, pick_device(settings['device']), arm['address'])
    stream = SequenceStream(tokenizer=tokenizer, **grid)
    try:
        if arm['remembered']:
            for _ in range(rounds):
                list(with_neighbors(list(islice(stream, ahead)), retriever))
            stream = SequenceStream(tokenizer=tokenizer, **grid)
        seconds = time_stages(retriever)
        for _ in range(rounds):
            seconds.clear()
            start = time.perf_counter()
            batches = list(islice(stream, ahead))
            seconds['read'] = time.perf_counter() - start
            list(with_neighbors(batches, retriever))
            whole = time.perf_counter() - start
            seconds['rest'] = whole - sum(seconds.values())
            yield ({stage: 1e3 * seconds[stage] / ahead for stage in STAGES} | {'all': 1e3 * whole / ahead},
                   sum(int((~batch.ends).sum()) for batch in batches) / whole)
    finally:
        retriever.close()


def main():
    quick = '--quick' in sys.argv
    settings = load_settings([a for a in sys.argv[1:] if a != '--quick'])
    tokenizer = load_tokenizer(settings['tokenizer'])
    ahead = 8 if quick else settings['retrieval_prefetch_batches']
    rounds = 2 if quick else max(3, 192 // ahead)
    documents = settings['val_datasets' if quick else 'train_datasets']
    grid = dict(configs=as_dataset_configs(documents, 'train_datasets'), chunk_size=settings['retrieval_chunk_size'],
                block_size=settings['block_size'], batch_size=settings['batch_size'], interleave=64)
    arms = {}
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        settings = settings | dict(train_datasets=documents, retrieval_cache_gb=4.0)
        lite = settings | dict(retrieval_milvus_uri=f'{folder}/lite.db')
        populate(lite, show_progress=sys.stderr.isatty())
        server_manager_instance.release_server(lite['retrieval_milvus_uri'])  # a local file serves one process
        address, _ = cleanup.enter_context(local_server(lite['retrieval_milvus_uri'],
                                                            lite['retrieval_collection']))
        places = {'Milvus Lite': (lite, address)}
        if why_not():
            print(f'no real Milvus server: {why_not()}', file=sys.stderr)
        else:
            server = cleanup.enter_context(MilvusServer(f'{folder}/server'))
            real = settings | dict(retrieval_milvus_uri=server.uri, retrieval_milvus_token='')
            populate(real, show_progress=sys.stderr.isatty())
            places['Milvus server'] = (real, None)
        for name, (own, address) in places.items():
            for remembered in (False, True):
                arm = dict(address=address, remembered=remembered)
                own = own | dict(retrieval_cache_dir=f'{folder}/{name} {remembered}')
                arms[f'{name}, {"remembered" if remembered else "first time"}'] = measure(
                    arm, own, tokenizer, grid, rounds, ahead)
        results = {name: [] for name in arms}
        for _ in range(rounds):
            for name, rounds_of_arm in arms.items():
                results[name].append(next(rounds_of_arm))
        for rounds_of_arm in arms.values():
            rounds_of_arm.close()
    report = {}
    print(f'milliseconds a batch of {settings["batch_size"]} x {settings["block_size"]} tokens, {ahead} batches by one '
          f'search; medians of {rounds} rounds\n')
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
