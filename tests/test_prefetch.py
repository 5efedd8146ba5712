"""The prefetching process, on a real collection."""
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
from multiprocessing.pool import RemoteTraceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError
from data.stream import SequenceStream, as_dataset_configs
from data.tokenizer import load_tokenizer
from retrieval.local_server import local_server
from retrieval.prefetch import Prefetcher, put, send
from retrieval.retriever import Retriever
from tests.conftest import CHUNK, release, run


@pytest.fixture
def served(settings, workspace):
    """The address of a server of the workspace's database."""
    with local_server('milvus.db', 'chunks') as (address, _):
        yield address


def stream_of(settings, **options):
    return dict(configs=as_dataset_configs(settings['train_datasets'], 'train_datasets'), chunk_size=CHUNK,
                block_size=settings['block_size'], batch_size=settings['batch_size'], interleave=5, **options)


def has_ended(process):
    try:
        with open(f'/proc/{process}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError:
        return True


def test_batches_are_those_of_the_streams_with_the_neighbors_that_the_retriever_gives(settings, served):
    settings = settings | dict(retrieval_prefetch_batches=3)
    tokenizer = load_tokenizer(settings['tokenizer'])
    streams = [(stream_of(settings, seed=5), 2), (stream_of(settings), 6)]
    prefetcher = Prefetcher(settings, streams, address=served)
    ready = list(prefetcher)
    prefetcher.close()
    assert len(ready) == 8 and prefetcher.waited > 0
    retriever = Retriever(settings | dict(retrieval_cache_gb=0.0), tokenizer, address=served)
    plain = [batch for options, count in streams
             for batch in itertools.islice(SequenceStream(tokenizer=tokenizer, **options), count)]
    for found, batch in zip(ready, plain, strict=True):
        chunks = batch.tokens.reshape(*batch.ends.shape, CHUNK)
        neighbors = retriever.retrieve(chunks, batch.documents, batch.ends, batch.chunk_ids)
        assert (found.tokens.numpy() == batch.tokens).all() and (found.targets.numpy() == batch.targets).all()
        assert (found.documents.numpy() == batch.documents).all() and found.state == batch.state
        assert (found.neighbors.numpy() == neighbors.tokens).all()
        assert (found.neighbor_mask.numpy() == neighbors.mask).all()
        assert sum(found.counts[name] for name in ('remembered', 'looked_up', 'embedded')) == (~batch.ends).sum()
    assert sum(found.counts['looked_up'] for found in ready) > 0
    retriever.close()


def test_a_second_epoch_neither_embeds_nor_searches(settings, served):
    """Nor does a run that comes later, nor one of another model size: nothing here knows a model."""
    for epoch in range(2):
        prefetcher = Prefetcher(settings, [(stream_of(settings), 20)], address=served)
        counts = [batch.counts for batch in prefetcher]
        prefetcher.close()
        asked = {name: sum(c[name] for c in counts) for name in counts[0]}
        assert asked['remembered'] > 0 if epoch else asked['looked_up'] > asked['remembered']
    assert asked['looked_up'] == asked['embedded'] == asked['searched_again'] == 0


def test_no_more_batches_are_kept_ready_than_asked_for():
    """Each is larger than what the pipe holds, so that one is on its way."""
    waiting, unwanted, made = queue.Queue(3), threading.Event(), []
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def make():
        while put(waiting, bytes(2**20), unwanted):
            made.append(1)
    threads = [threading.Thread(target=send, args=(waiting, sender, unwanted)), threading.Thread(target=make)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert len(made) == 3 + 1
    receiver.close()  # nobody wants them any more, and both threads end
    for thread in threads:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in threads)


def test_without_retrieval_batches_have_no_neighbors(settings):
    prefetcher = Prefetcher(settings, [(stream_of(settings), 3)], retrieve=False)
    assert [batch.neighbors for batch in prefetcher] == [None] * 3
    prefetcher.close()


def test_an_exception_of_the_process_reaches_the_caller_with_its_own_traceback(settings, workspace):
    pq.write_table(pa.table({'id': ['a'], 'text': [3]}), workspace / 'numbers.parquet')
    wrong = stream_of(settings | dict(train_datasets=['numbers.parquet']))
    prefetcher = Prefetcher(settings, [(wrong, None)], retrieve=False)
    with pytest.raises(TypeError) as error:
        next(prefetcher)
    assert isinstance(error.value.__cause__, RemoteTraceback)
    assert 'open_next_document' in str(error.value.__cause__) and 'document.tokens' in str(error.value.__cause__)
    prefetcher.close()
    assert has_ended(prefetcher.process.pid)


def test_a_user_error_of_the_process_stays_one(settings, served):
    with pytest.raises(UserError, match="no collection 'other' in milvus.db"):
        next(Prefetcher(settings | dict(retrieval_collection='other'), [(stream_of(settings), 1)], address=served))


def test_a_process_that_was_killed_is_told_and_not_waited_for(settings):
    prefetcher = Prefetcher(settings, [(stream_of(settings), None)], retrieve=False)
    next(prefetcher)
    os.kill(prefetcher.process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match='the prefetching process ended with code -9'):
        for _ in prefetcher:
            pass
    prefetcher.close()


def test_a_caller_can_give_up_waiting(settings):
    prefetcher = Prefetcher(settings, [(stream_of(settings), None)], retrieve=False)
    os.kill(prefetcher.process.pid, signal.SIGSTOP)
    assert prefetcher.next(give_up=lambda: True) is None
    os.kill(prefetcher.process.pid, signal.SIGCONT)
    prefetcher.close()


def test_the_local_server_gives_its_database_back(settings, workspace):
    with (local_server('milvus.db', 'chunks') as (_, process),
          pytest.raises(UserError, match='another process has it open'), local_server('milvus.db', 'chunks')):
        pass
    assert has_ended(process.pid)
    Retriever(settings, load_tokenizer(settings['tokenizer'])).close()
    release(workspace)


def test_the_local_server_finds_and_reads_what_milvus_lite_does(workspace):
    """Over arrays as in its loops; also of rows that were replaced or deleted since, written down or not."""
    code = """
import numpy as np
from milvus_lite.db import MilvusLite
from retrieval.local_server import work_on_arrays
slow_search, slow_get = work_on_arrays()
from milvus_lite.engine import collection as engine
fast_search = engine.execute_search_with_index

def both(**asked):
    answer = fast_search(**asked)
    assert answer == slow_search(**asked)
    return answer

engine.execute_search_with_index = both
planned = []
build_plan = engine.build_projection_plan
engine.build_projection_plan = lambda *given, **rest: planned.append(given) or build_plan(*given, **rest)
collection = MilvusLite('milvus.db').get_collection('chunks')
collection.load()
size = len(collection.query('position == 0', ['embedding'])[0]['embedding'])
queries = np.random.default_rng(0).normal(size=(50, size))

def check(unwritten=False):
    for limit in (1, 8, 3000):
        for asked in ({}, {'expr': 'position > 2'}):
            answer = collection.search(queries.tolist(), limit, 'IP', output_fields=['doc_id', 'id'], **asked)
            assert all(len(hits) for hits in answer)
    for fields in (['tokens'], ['id', 'text', 'embedding'], list(some[0]), None):
        planned.clear()
        rows = collection.get(ids, output_fields=fields)
        assert len(planned) == (fields is None or unwritten)  # Milvus Lite's own is not what answered
        assert rows == slow_get(collection, ids, output_fields=fields) and len(rows) == collection.num_entities
    return collection.num_entities

some = collection.query('position == 1', list(collection.query('position == 1')[0]))
ids = [7, *(row['id'] for row in collection.query('position >= 0', ['id']))]  # there is no 7
count = check()
for row in some:
    row['embedding'] = (-np.asarray(row['embedding'])).tolist()
collection.insert(some[:20])
collection.delete([row['id'] for row in some[20:30]])
check(unwritten=True)
collection.flush()
assert check() == count - 10
print('the same')
"""
    assert run('-c', code, folder=workspace).stdout.strip() == 'the same'
