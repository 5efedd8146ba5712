"""
Runs the streams and the retriever ahead of the training step, in a process of its own: reading, tokenizing, embedding,
searching and assembling take nothing from the training process' Python, and on a shared CPU they yield to it.
"""
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.pool import RemoteTraceback

import numpy as np
import torch

from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.local_server import NICENESS
from retrieval.retriever import EMBEDDED, LOOKED_UP, REMEMBERED, Retriever


@dataclass
class ReadyBatch:
    """What the model takes, on its device, and the stream's state after it."""
    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -1 where there is none
    documents: torch.Tensor  # (B, L)
    neighbors: torch.Tensor | None  # (B, L, K, R)
    neighbor_mask: torch.Tensor | None  # (B, L, K, R)
    state: dict
    counts: dict  # of its chunks: remembered, looked_up, embedded, searched_again


class Prefetcher:
    """
    An iterator of ReadyBatch over the `streams`, one after another: pairs of SequenceStream's arguments and how many
    batches to take of it (None: without end). The neighbors of several batches, first one, then up to
    retrieval_prefetch_batches, are fetched by one search, since much of a search's cost is the same for few chunks as
    for many; as many are kept ready. Without retrieval they have no neighbors. An exception of the process is raised
    here, from its traceback.
    """

    def __init__(self, settings, streams, device='cpu', address=None, say=print, retrieve=True):
        self.device, self.say = torch.device(device), say
        self.waited = 0.0  # seconds that callers stood waiting in all
        self.size = None  # of the knowledge base, once there was a batch
        context = multiprocessing.get_context('spawn')
        self.ready, ready = context.Pipe(duplex=False)
        self.news, news = context.Pipe(duplex=False)
        self.process = context.Process(target=run, name='prefetch', daemon=True,
                                       args=(settings, streams, str(device), address, retrieve, ready, news))
        self.process.start()
        ready.close()  # the process has its own, and when it ends, however it does, the pipe does
        news.close()

    def __iter__(self):
        return self

    def __next__(self):
        return self.next()

    def next(self, give_up=lambda: False):
        """The next batch. While it waits it asks give_up() now and then, and returns None if that says so."""
        start = time.perf_counter()
        try:
            while True:
                try:
                    if self.ready.poll(0.2):
                        item = pickle.loads(self.ready.recv_bytes())
                        break
                    ended = False
                except (EOFError, OSError):
                    self.process.join()
                    ended = True
                self._pass_on_news()
                if give_up():
                    return None
                if ended:
                    raise RuntimeError(f'the prefetching process ended with code {self.process.exitcode}')
        finally:
            self.waited += time.perf_counter() - start
        self._pass_on_news()
        if item is None:
            raise StopIteration
        if isinstance(item, Failure):
            raise item.error from RemoteTraceback(item.text)
        self.size = item.pop('size')
        return ReadyBatch(**{key: self._to_device(value) if isinstance(value, np.ndarray) else value
                             for key, value in item.items()})

    def _pass_on_news(self):
        try:
            while self.news.poll():
                self.say(self.news.recv())
        except (EOFError, OSError):
            pass  # it has ended

    def _to_device(self, array):
        tensor = torch.from_numpy(array)
        if self.device.type == 'cuda':
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor if tensor.dtype == torch.bool else tensor.long()

    def close(self):
        """End the process. Batches that are ready and not taken are dropped; the stream's state has no part of them."""
        self.ready.close()
        try:
            self.process.join(timeout=2)
        finally:
            if self.process.is_alive():  # in the middle of a search, or waiting; what is on disk is never half written
                self.process.kill()
                self.process.join()
            self.news.close()


@dataclass
class Failure:
    """An exception of the process, and its traceback as text."""
    error: BaseException
    text: str


def run(settings, streams, device, address, retrieve, ready, news):
    """The process: sends the batches, and at the end None, or the Failure that ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; this one's end is the run's affair
    threading.Thread(target=end_with_parent, daemon=True).start()
    waiting, unwanted = queue.Queue(settings['retrieval_prefetch_batches']), threading.Event()
    sender = threading.Thread(target=send, args=(waiting, ready, unwanted), daemon=True)
    sender.start()
    if device == 'cpu':
        torch.set_num_threads(1)
        os.nice(NICENESS)
    retriever = None
    try:
        tokenizer = load_tokenizer(settings['tokenizer'])
        # all are opened before the first is read, so that what is wrong with one is told at once
        streams = [(SequenceStream(tokenizer=tokenizer, **options), count) for options, count in streams]
        if retrieve:
            retriever = Retriever(settings, tokenizer, device, address, news.send)
        for batch in chain(ready_batches(streams, retriever, settings['retrieval_prefetch_batches']), [None]):
            if not put(waiting, batch, unwanted):
                break
    except BaseException as error:  # whatever it is, it belongs to the one that waits for the batch
        put(waiting, Failure(as_picklable(error), traceback.format_exc()), unwanted)
    finally:
        if retriever:
            retriever.close()
        sender.join()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def put(waiting, item, unwanted):
    """Line an item up to be sent. False where nobody wants it any more."""
    while not unwanted.is_set():
        try:
            waiting.put(item, timeout=0.2)
            return True
        except queue.Full:
            pass
    return False


def send(waiting, ready, unwanted):
    """A thread: sends the items through the pipe, up to the last one."""
    try:
        while True:
            item = waiting.get()
            ready.send_bytes(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))
            if item is None or isinstance(item, Failure):
                return
    except OSError:  # the other end is closed
        unwanted.set()


def as_picklable(error):
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')


def ready_batches(streams, retriever, most):
    """The streams' batches with their neighbors, fetched for up to `most` at once, as dicts of ReadyBatch's fields."""
    for stream, count in streams:
        stream, fetched = islice(stream, count), 1
        while batches := list(islice(stream, fetched)):
            yield from with_neighbors(batches, retriever)
            fetched = min(2 * fetched, most)


def with_neighbors(batches, retriever):
    """The batches, whose neighbors are fetched together."""
    if retriever is None:
        for batch in batches:
            yield dict(tokens=batch.tokens, targets=batch.targets, documents=batch.documents, neighbors=None,
                       neighbor_mask=None, state=batch.state, counts={}, size=None)
        return
    ends, documents, chunk_ids, tokens = (np.concatenate([getattr(batch, name) for batch in batches])
                                          for name in ('ends', 'documents', 'chunk_ids', 'tokens'))
    found = retriever.retrieve(tokens.reshape(*ends.shape, -1), documents, ends, chunk_ids)
    start = 0
    for batch in batches:
        own = slice(start, start + len(batch.tokens))
        start = own.stop
        counts = {name: int((found.origin[own] == origin).sum()) for name, origin in
                  (('remembered', REMEMBERED), ('looked_up', LOOKED_UP), ('embedded', EMBEDDED))}
        yield dict(tokens=batch.tokens, targets=batch.targets, documents=batch.documents,
                   neighbors=found.tokens[own], neighbor_mask=found.mask[own], state=batch.state, size=retriever.size,
                   counts=counts | dict(searched_again=int(found.again[own].sum())))
