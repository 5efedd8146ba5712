"""The loader process, on a real collection."""
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
from multiprocessing.pool import RemoteTraceback

import pytest

from configurator import UserError
from data.corpus import val_batches
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.loader import Loader, put, send
from retrieval.retriever import Retriever
from tests.conftest import CHUNK, open_all


def stream_of(settings, **options):
    return dict(batch_size=settings.batch_size, **options)


def has_ended(process):
    try:
        with open(f'/proc/{process}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError:
        return True


def test_batches_are_those_of_the_streams_with_the_neighbors_that_the_retriever_gives(settings):
    settings = settings.replace(retrieval_prefetch_batches=3)
    tokenizer = load_tokenizer(settings.tokenizer)
    settings = settings.replace(eval_tokens=900)
    loader = Loader(settings, stream_of(settings, seed=5), 6, {})
    ready = loader.take_val()
    assert len(ready) == 4
    ready += list(loader)
    loader.close()
    assert len(ready) == 10 and loader.waited > 0
    retriever = Retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer)
    plain = [*val_batches(open_all(settings, 'val_datasets'), tokenizer, settings.block_size, 4, 900),
             *itertools.islice(SequenceStream(open_all(settings), settings.block_size, 4, seed=5), 6)]
    for found, batch in zip(ready, plain, strict=True):
        chunks = batch.tokens.reshape(*batch.is_last_chunk.shape, CHUNK)
        neighbors = retriever.retrieve(chunks, batch.doc_ids, batch.is_last_chunk, batch.chunk_ids)
        assert (found.tokens.numpy() == batch.tokens).all() and (found.targets.numpy() == batch.targets).all()
        assert (found.doc_ids.numpy() == batch.doc_ids).all() and found.state == batch.state
        assert (found.neighbors.numpy() == neighbors.tokens).all()
        assert (found.neighbor_mask.numpy() == neighbors.mask).all()
        counted = sum(found.counts[name] for name in ('remembered', 'looked_up', 'embedded'))
        assert counted == (~batch.is_last_chunk).sum()
    assert sum(found.counts['looked_up'] for found in ready) > 0
    retriever.close()


def test_a_second_epoch_neither_embeds_nor_searches(settings):
    """Nor does a run that comes later, nor one of another model size: nothing here knows a model."""
    for epoch in range(2):
        loader = Loader(settings, stream_of(settings), 20)
        counts = [batch.counts for batch in loader]
        loader.close()
        asked = {name: sum(c[name] for c in counts) for name in counts[0]}
        assert asked['remembered'] > 0 if epoch else asked['looked_up'] > asked['remembered']
    assert asked['looked_up'] == asked['embedded'] == asked['searched_again'] == 0


def test_several_workers_give_the_batches_of_one_from_the_middle_of_a_run_too(settings):
    """With neighbors and pointers, of which none are remembered; the val batches come first."""
    settings = settings.replace(retrieval_prefetch_batches=2, retrieval_cache_gb=0.0, eval_tokens=900)

    def load(workers, count, state=None):
        loader = Loader(settings.replace(retrieval_workers=workers), stream_of(settings, seed=5, state=state), count,
                        {})
        batches = loader.take_val() + list(loader)
        loader.close()
        assert all(has_ended(process.pid) for process in loader.processes)
        return batches
    alone, together = load(1, 9), load(3, 9)
    resumed = load(2, 4, together[-5].state)
    for one, several in [*zip(alone, together, strict=True), *zip(alone[-4:], resumed[-4:], strict=True)]:
        for name in ('tokens', 'targets', 'doc_ids', 'neighbors', 'neighbor_mask', 'pointers'):
            assert getattr(one, name).equal(getattr(several, name))
        assert one.state == several.state and one.counts == several.counts
        assert (one.hits['id'] == several.hits['id']).all()
    assert len(alone) == 13 and alone[-1].neighbor_mask.any() and alone[-1].pointers.any()


def test_what_several_workers_say_at_once_is_said_once(settings):
    """Of a collection that was left in the middle of a change, each of them would."""
    retriever = Retriever(settings, load_tokenizer(settings.tokenizer))
    retriever.knowledge_base._announce_change()
    retriever.close()
    said = []
    loader = Loader(settings.replace(retrieval_workers=2, retrieval_pointers=0), stream_of(settings), 8,
                    say=said.append)
    assert len(list(loader)) == 8
    loader.close()
    assert len(said) == 1 and 'no neighbors are cached until' in said[0]


def test_no_more_batches_are_kept_ready_than_asked_for():
    """Each is larger than what the pipe holds, so that one is on its way."""
    waiting, is_closed, made = queue.Queue(3), threading.Event(), []
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def make():
        while put(waiting, bytes(2**20), is_closed):
            made.append(1)
    threads = [threading.Thread(target=send, args=(waiting, sender, is_closed)), threading.Thread(target=make)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert len(made) == 3 + 1
    receiver.close()  # nobody wants them any more, and both threads end
    for thread in threads:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in threads)


def test_without_retrieval_batches_have_no_neighbors(settings):
    loader = Loader(settings, stream_of(settings), 3, retrieve=False)
    assert [batch.neighbors for batch in loader] == [None] * 3
    loader.close()


def test_an_exception_of_the_process_reaches_the_caller_with_its_own_traceback(settings):
    loader = Loader(settings, stream_of(settings, seed='no number'), retrieve=False)
    with pytest.raises(ValueError) as error:
        next(loader)
    assert isinstance(error.value.__cause__, RemoteTraceback)
    assert 'read_sequences' in str(error.value.__cause__) and 'default_rng' in str(error.value.__cause__)
    loader.close()
    assert has_ended(loader.processes[0].pid)


def test_a_user_error_of_the_process_stays_one(settings):
    with pytest.raises(UserError, match="no collection 'other' in milvus.db"):
        next(Loader(settings.replace(retrieval_collection='other'), stream_of(settings), 1))


def test_a_process_that_was_killed_is_named_and_not_waited_for(settings):
    loader = Loader(settings, stream_of(settings), retrieve=False)
    next(loader)
    os.kill(loader.processes[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match='the loader process ended with code -9.*memory'):
        for _ in loader:
            pass
    loader.close()


@pytest.mark.parametrize('killed', [0, 1])
def test_a_worker_of_several_that_was_killed_is_named_and_leaves_none(settings, killed):
    """Whichever it is, and whoever's turn it is: the others end with the first, who deals to them."""
    loader = Loader(settings.replace(retrieval_workers=2), stream_of(settings))
    next(loader)
    os.kill(loader.processes[killed].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=f'loader process {killed + 1} of 2 ended with code -9.*retrieval_workers'):
        for _ in loader:
            pass
    loader.close()
    assert all(has_ended(process.pid) for process in loader.processes)


def test_a_caller_can_give_up_waiting(settings):
    loader = Loader(settings, stream_of(settings), retrieve=False)
    os.kill(loader.processes[0].pid, signal.SIGSTOP)
    assert loader.next(give_up=lambda: True) is None
    os.kill(loader.processes[0].pid, signal.SIGCONT)
    loader.close()
