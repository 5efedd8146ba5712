"""
Runs the streams and the retriever ahead of the training step, in a process of its own: reading, tokenizing, embedding,
searching and assembling never hold the training process's GIL, and on a shared CPU they yield to it.
"""
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.pool import RemoteTraceback

from system import end_with_parent

import torch

from data.chunk_store import count_known, open_datasets
from data.corpus import val_batches
from data.documents import as_dataset_configs
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.local_server import NICENESS
from retrieval.retriever import Retriever

END = object()  # of the batches


class Loader:
    """
    An iterator of Batches on `device`, `count` of the training stream (None: without end). `train` is the arguments of
    SequenceStream beside its datasets. With `val`, rank and world_size for val_batches, take_val() has to come first.
    Neighbors are fetched for several batches at once, first one, then up to retrieval_prefetch_batches, as a search
    costs much the same for few chunks as for many; without `retrieve` there are none. As many batches are kept ready,
    or `keep_ready` if that is more. `say` receives news, such as that Milvus is unreachable. An exception of the
    process is raised here, with its traceback.
    """

    def __init__(self, settings, train=None, count=None, val=None, device='cpu', say=print, retrieve=True,
                 keep_ready=1):
        self.device, self.say = torch.device(device), say
        self.waited = 0.0  # seconds that callers waited in all
        self.size = None  # of the knowledge base, once there was a batch
        context = multiprocessing.get_context('spawn')
        self.ready, ready = context.Pipe(duplex=False)
        self.news, news = context.Pipe(duplex=False)
        self.process = context.Process(
            target=run, name='loader', daemon=True,
            args=(settings, train, count, val, str(device), retrieve, keep_ready, ready, news))
        self.process.start()
        ready.close()  # our copy of the child's end, so that we see EOF when the child dies
        news.close()

    def __iter__(self):
        return self

    def __next__(self):
        return self.next()

    def take_val(self):
        """The val Batches, as a list."""
        return [self.next() for _ in range(self._receive(lambda: False))]

    def next(self, give_up=lambda: False):
        """The next batch. While it waits it calls give_up() now and then, and returns None if that is true."""
        item = self._receive(give_up)
        if item is None:
            return None
        if item is END:
            raise StopIteration
        batch, self.size = item
        return batch.to(self.device)

    def _receive(self, give_up):
        """What the process sent next; None if give_up() is true first."""
        start = time.perf_counter()
        try:
            while True:
                try:
                    if self.ready.poll(0.2):
                        item = pickle.loads(self.ready.recv_bytes())
                        break
                    has_ended = False
                except (EOFError, OSError):
                    self.process.join()
                    has_ended = True
                self._pass_on_news()
                if give_up():
                    return None
                if has_ended:
                    raise RuntimeError(f'the loader process ended with code {self.process.exitcode}')
        finally:
            self.waited += time.perf_counter() - start
        self._pass_on_news()
        if isinstance(item, Failure):
            raise item.error from RemoteTraceback(item.text)
        return END if item is None else item

    def _pass_on_news(self):
        try:
            while self.news.poll():
                self.say(self.news.recv())
        except (EOFError, OSError):
            pass  # the process has ended

    def close(self):
        """End the process. Ready batches that were not taken are dropped; the stream's state excludes them."""
        self.ready.close()
        try:
            self.process.join(timeout=2)
        finally:
            if self.process.is_alive():  # searching or waiting; nothing on disk can be half written
                self.process.kill()
                self.process.join()
            self.news.close()


@dataclass
class Failure:
    """An exception of the process, and its traceback as text."""
    error: BaseException
    text: str


def run(settings, train, count, val, device, retrieve, keep_ready, ready, news):
    """
    The process: sends the number of val batches, if any, and each (Batch, size of the knowledge base), and at the end
    None, or the Failure that ended it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore Ctrl-C: the parent shuts us down
    end_with_parent()
    outbox = queue.Queue(max(keep_ready, settings.retrieval_prefetch_batches))
    is_closed = threading.Event()
    sender = threading.Thread(target=send, args=(outbox, ready, is_closed), daemon=True)
    sender.start()
    if device == 'cpu':
        torch.set_num_threads(1)
        os.nice(NICENESS)
    with ExitStack() as cleanup:
        try:
            tokenizer = load_tokenizer(settings.tokenizer)
            # open both streams before searching for either, so that an error in one is reported at once
            streams = open_streams(settings, tokenizer, train, count, val, news.send)
            if val is not None:
                put(outbox, len(streams[0]), is_closed)
            retriever = None
            if retrieve:
                retriever = cleanup.enter_context(closing(Retriever(settings, tokenizer, device, news.send)))
            for item in chain(load(streams, retriever, settings.retrieval_prefetch_batches), [None]):
                if not put(outbox, item, is_closed):
                    break
        except BaseException as error:  # next() raises it in the parent
            put(outbox, Failure(as_picklable(error), traceback.format_exc()), is_closed)
    sender.join()


def open_streams(settings, tokenizer, train, count, val, say):
    """[the val batches, if `val` is given; `count` batches of the training stream, if `train` is]"""
    def open_setting(name):
        found = open_datasets(as_dataset_configs(getattr(settings, name), name), tokenizer, settings, say)
        for dataset in found:
            if is_first and (dataset.counts.bad or dataset.counts.duplicates):
                say(f'{dataset.config.path}: {dataset.counts.describe()}')
        return found
    streams, is_first = [], val is None or not val.get('rank')
    if val is not None:
        val_datasets = open_setting('val_datasets')
        streams.append(val_batches(val_datasets, tokenizer, settings.block_size, settings.batch_size,
                                   settings.eval_tokens, **val))
    if train is not None:
        datasets = open_setting('train_datasets')
        streams.append(islice(SequenceStream(datasets, settings.block_size, **train), count))
        if val is not None and is_first:
            known, renamed = count_known(val_datasets, datasets)
            count = sum(map(len, val_datasets))
            if known:
                say(f'{known:,} of {count:,} val documents stand in train_datasets, too: what they add to the val loss '
                    f'is low; remove them from one of the two')
            if renamed:
                say(f'{renamed:,} of {count:,} val documents have ids of other documents in train_datasets, which are '
                    f'taken for the same and never their neighbors: give the two a source of their own')
    return streams


def load(streams, retriever, most):
    """Yields (Batch, size of the knowledge base) for the streams' batches, fetching neighbors for up to `most`."""
    for stream in streams:
        remaining, together = iter(stream), 1
        while batches := list(islice(remaining, together)):
            for batch in retriever.retrieve_for(batches) if retriever else batches:
                yield batch, retriever and retriever.size
            together = min(2 * together, most)


def put(outbox, item, is_closed):
    """Queue an item to be sent. False if the receiver has closed."""
    while not is_closed.is_set():
        try:
            outbox.put(item, timeout=0.2)
            return True
        except queue.Full:
            pass
    return False


def send(outbox, ready, is_closed):
    """A thread: sends the items through the pipe, up to the last one."""
    try:
        while True:
            item = outbox.get()
            ready.send_bytes(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))
            if item is None or isinstance(item, Failure):
                return
    except OSError:  # the other end is closed
        is_closed.set()


def as_picklable(error):
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')
