"""
Runs the streams and the retriever ahead of the training step, in processes of their own: reading, tokenizing,
embedding, searching and assembling never hold the training process's GIL, and on a shared CPU they yield to it.

With several workers, settings.retrieval_workers, the first one reads and deals: runs of batches go to the workers in
turn, and the training process takes them in the same turn. So the searches of several runs are in flight at once, and
which batches there are, what they are searched together with, and their order do not depend on the number of workers.
"""
import gc
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import chain, islice, repeat
from multiprocessing.pool import RemoteTraceback

from system import end_with_parent

import torch

from configurator import UserError
from data.blocks import open_all_datasets
from data.chunk_store import count_known, open_datasets
from data.conversation_stream import ConversationSet, ConversationStream, Writer, val_conversations
from data.corpus import val_batches
from data.documents import as_dataset_configs
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.given import GivenPassages
from retrieval.local_server import NICENESS
from retrieval.offline import train_set, val_set
from retrieval.passages import PassageFinder
from retrieval.retriever import open_retriever

END = object()  # of the batches
REPEATED = 10  # seconds for which no worker repeats what another has said


class Loader:
    """
    An iterator of Batches on `device`, `count` of the training stream (None: without end). `train` is the arguments of
    SequenceStream beside its datasets. With `val`, rank and world_size for val_batches, take_val() has to come first.
    Neighbors are fetched for several batches at once, first one, then up to retrieval_prefetch_batches, as a search
    costs much the same for few chunks as for many; without `retrieve` there are none, and one worker. Each worker keeps
    as many batches ready, or all of them `keep_ready` if that is more. `say` receives news, such as that Milvus is
    unreachable. An exception of a worker is raised here, with its traceback.
    """

    def __init__(self, settings, train=None, count=None, val=None, device='cpu', say=print, retrieve=True,
                 keep_ready=1):
        self.device, self.say = torch.device(device), say
        self.waited = 0.0  # seconds that callers waited in all
        self.size = None  # of the knowledge base, once there was a batch
        self.processes, self.ready, self.news = [], [], []  # by worker
        self.turn = 0  # the worker whose batches are next
        self.said = {}  # by text of the news: when, and by which worker
        context = multiprocessing.get_context('spawn')
        workers = settings.retrieval_workers if retrieve else 1
        deals = [context.Pipe(duplex=False) for _ in range(workers - 1)]
        for number in range(workers):
            (ready, sends_ready), (news, sends_news) = context.Pipe(duplex=False), context.Pipe(duplex=False)
            part = (train, count, val, [sender for _, sender in deals]) if number == 0 else deals[number - 1][0]
            process = context.Process(
                target=run, name=f'loader {number}', daemon=True,
                args=(settings, part, str(device), retrieve, -(-keep_ready // workers), sends_ready, sends_news))
            process.start()
            sends_ready.close()  # our copy of the child's end, so that we see EOF when the child dies
            sends_news.close()
            self.processes.append(process)
            self.ready.append(ready)
            self.news.append(news)
        for end in chain(*deals):
            end.close()

    def __iter__(self):
        return self

    def __next__(self):
        return self.next()

    def take_val(self):
        """The val Batches, as a list."""
        return list(self.val())

    def val(self):
        """Yields the val Batches."""
        for _ in range(self._receive(lambda: False)):
            yield self.next()

    def next(self, give_up=lambda: False):
        """The next batch. While it waits it calls give_up() now and then, and returns None if that is true."""
        item = self._receive(give_up)
        if item is None:
            return None
        if item is END:
            raise StopIteration
        batch, self.size, is_last = item
        self.turn = (self.turn + is_last) % len(self.processes)
        return batch.to(self.device)

    def _receive(self, give_up):
        """What the worker sent next whose turn it is; None if give_up() is true first."""
        start, ready = time.perf_counter(), self.ready[self.turn]
        try:
            while True:
                try:
                    if ready.poll(0.2):
                        item = pickle.loads(ready.recv_bytes())
                        break
                    has_ended = False
                except (EOFError, OSError):
                    self.processes[self.turn].join()
                    has_ended = True
                self._pass_on_news()
                if give_up():
                    return None
                if has_ended:
                    raise self._death()
        finally:
            self.waited += time.perf_counter() - start
        self._pass_on_news()
        if isinstance(item, Failure):
            raise item.error from RemoteTraceback(item.text)
        return END if item is None else item

    def _death(self):
        """The UserError for the process that ended. Others have ended with code 1 if it is the first."""
        self.processes[0].join(timeout=0.5)  # if it ends, too: pipes close before its code is known
        number, code = next(((n, p.exitcode) for n, p in enumerate(self.processes, 1) if p.exitcode),
                            (self.turn + 1, self.processes[self.turn].exitcode))
        name = f'loader process {number} of {len(self.processes)}' if len(self.processes) > 1 else 'the loader process'
        reason = (': the system may have killed it as memory ran out; see its log, and set a smaller retrieval_workers '
                  'or retrieval_prefetch_batches' if code == -signal.SIGKILL else '')
        return UserError(f'{name} ended with code {code}{reason}')

    def _pass_on_news(self):
        """What several workers say at about the same time is said once."""
        for worker, news in enumerate(self.news):
            try:
                while news.poll():
                    text, now = news.recv(), time.monotonic()
                    when, who = self.said.get(text, (-REPEATED, worker))
                    if who == worker or now - when >= REPEATED:
                        self.said[text] = now, worker
                        self.say(text)
            except (EOFError, OSError):
                pass  # the process has ended

    def close(self):
        """End the processes. Ready batches that were not taken are dropped; the stream's state excludes them."""
        for ready in self.ready:
            ready.close()
        deadline = time.monotonic() + 2
        try:
            for process in self.processes:
                process.join(timeout=max(0, deadline - time.monotonic()))
        finally:
            for process in self.processes:
                if process.is_alive():  # searching or waiting; nothing on disk can be half written
                    process.kill()
                    process.join()
            for news in self.news:
                news.close()


@dataclass
class Failure:
    """An exception of the process, and its traceback as text."""
    error: BaseException
    text: str


def run(settings, part, device, retrieve, keep_ready, ready, news):
    """
    A worker: sends the number of val batches, if any, and each (Batch, size of the knowledge base, whether it is the
    last of its run), and at the end None, or the Failure that ended it. `part` is what the first worker reads, and the
    pipes to the others; for these the pipe from it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore Ctrl-C: the parent shuts us down
    end_with_parent()
    multiprocessing.current_process()._config['daemon'] = False  # we may have children, which end when we do
    outbox, inbox = queue.Queue(max(keep_ready, settings.retrieval_prefetch_batches)), queue.Queue(1)
    is_closed = threading.Event()
    sender = threading.Thread(target=send, args=(outbox, ready, is_closed), daemon=True)
    sender.start()
    if device == 'cpu':
        torch.set_num_threads(1)
        os.nice(NICENESS)
    with ExitStack() as cleanup:
        try:
            tokenizer = load_tokenizer(settings.tokenizer)
            if isinstance(part, tuple):
                train, count, val, others = part
                # open both streams before searching for either, so that an error in one is reported at once
                if settings.template:
                    find_passages = None
                    if settings.passages and settings.passages_from == 'collection':
                        find_passages = cleanup.enter_context(closing(
                            PassageFinder(settings, tokenizer, news.send, device))).find
                    streams, sets = open_conversations(settings, tokenizer, train, count, val, find_passages,
                                                       news.send), []
                else:
                    streams, sets = open_streams(settings, tokenizer, train, count, val, news.send)
                if val is not None:
                    put(outbox, len(streams[0]), is_closed)
                feed = threading.Thread(target=deal, daemon=True, args=(
                    streams, settings.retrieval_prefetch_batches, inbox, others))
            else:
                sets = []
                feed = threading.Thread(target=receive, args=(part, inbox), daemon=True)
            feed.start()
            retriever = None
            if retrieve and settings.passages == 'neighbors':
                retriever = GivenPassages(settings, tokenizer)
            elif retrieve:
                retriever = cleanup.enter_context(closing(open_retriever(settings, tokenizer, device, news.send)))
                if settings.retrieval_offline:
                    for sequences_of, wanted in sets:
                        retriever.check(sequences_of, wanted)
            gc.freeze()
            gc.set_threshold(100_000)  # the answer to a search is many small objects and no cycles
            for item in chain(load(inbox, retriever), [None]):
                if not put(outbox, item, is_closed):
                    break
            else:
                feed.join()  # the others have their last, too
        except BaseException as error:  # next() raises it in the parent
            put(outbox, as_failure(error), is_closed)
    sender.join()


def open_streams(settings, tokenizer, train, count, val, say):
    """
    [the val batches, if `val` is given; `count` batches of the training stream, if `train` is], and for each of them
    what identifies its sequences (offline.py), and how many of these are taken, from the first one on.
    """
    def say_counts(datasets):
        for dataset in datasets:
            if is_first and (dataset.counts.bad or dataset.counts.duplicates):
                say(f'{dataset.config.path}: {dataset.counts.describe()}')

    streams, sets, is_first = [], [], val is None or not val.get('rank')
    if val is not None:
        val_datasets = open_datasets(as_dataset_configs(settings.val_datasets, 'val_datasets'), tokenizer, settings,
                                     say, head=settings.eval_tokens)
        say_counts(val_datasets)
        streams.append(val_batches(val_datasets, tokenizer, settings.block_size, settings.batch_size,
                                   settings.eval_tokens, **val))
        own = sum(int((batch.targets >= 0).any(1).sum()) for batch in streams[0])  # others fill up the batches
        sets.append((val_set(settings, val_datasets), own))
    if train is not None:
        datasets = open_all_datasets(as_dataset_configs(settings.train_datasets, 'train_datasets'), tokenizer, settings,
                                     say)
        say_counts(datasets)
        stream = SequenceStream(datasets, settings.block_size, **train, say=say)
        streams.append(islice(stream, count))
        steps = math.inf if count is None else -(-count * stream.batch_size // stream.count)
        sets.append((train_set(settings, stream), sum(stream.state()['taken']) + steps * stream.step_size))
        on_disk = [dataset for dataset in datasets if not dataset.config.streaming]
        if val is not None and is_first and on_disk:
            known, renamed = count_known(val_datasets, on_disk)
            count = sum(map(len, val_datasets))
            if known:
                say(f'{known:,} of {count:,} val documents stand in train_datasets, too: what they add to the val loss '
                    f'is low; remove them from one of the two')
            if renamed:
                say(f'{renamed:,} of {count:,} val documents have ids of other documents in train_datasets, which are '
                    f'taken for the same and never their neighbors: give the two a source of their own')
    return streams, sets


def open_conversations(settings, tokenizer, train, count, val, find_passages, say):
    """As open_streams, of conversations; find_passages is that of a PassageFinder, if passages are retrieved."""
    def open_sets(name):
        sets = [ConversationSet(config, writer, settings, say_once) for config in
                as_dataset_configs(getattr(settings, name), name)]
        for line in chain(*(opened.describe() for opened in sets)):
            say_once(line)
        return sets

    def say_once(news):  # for all ranks
        if not (val or {}).get('rank'):
            say(news)

    writer, streams = Writer(settings, tokenizer), []
    val_sets = open_sets('val_datasets') if val is not None else []
    train_sets = open_sets('train_datasets') if train is not None else []
    if val is not None:
        batches, padding = val_conversations(val_sets, settings.block_size, settings.batch_size, settings.eval_tokens,
                                             find_passages=find_passages, **val)
        streams.append(batches)
        say_once(f'val_datasets: {padding:.0%} of the sequences are padding')
    if train is not None:
        stream = ConversationStream(train_sets, settings.block_size, **train, find_passages=find_passages)
        streams.append(islice(stream, count))
        padding = stream.estimate_padding()
        if padding is not None:
            say_once(f'train_datasets: {padding:.0%} of the sequences are padding')
        known = len(set().union(*(s.contents for s in val_sets)) & set().union(*(s.contents for s in train_sets)))
        if known:
            say_once(f'{known:,} of {sum(map(len, val_sets)):,} held-out conversations stand in train_datasets, too: '
                     f'what they add to the val loss is low; remove them from one of the two')
    return streams


def deal(streams, most, inbox, others):
    """
    A thread: reads the streams' batches and hands out lists of them, up to `most` together, in turn to its own process
    and to the others. At the end, or after the Failure that ended it, each gets None.
    """
    with suppress(OSError):  # one of them has ended
        for turn, batches in enumerate(chain(read(streams, most), repeat(None, 1 + len(others)))):
            turn %= 1 + len(others)
            if turn:
                others[turn - 1].send(batches)
            else:
                inbox.put(batches)


def read(streams, most):
    """Yields lists of batches: of each stream one at first, then two, up to `most`; a Failure if reading fails."""
    try:
        for stream in streams:
            remaining, together = iter(stream), 1
            while batches := list(islice(remaining, together)):
                yield batches
                together = min(2 * together, most)
    except Exception as error:
        yield as_failure(error)


def receive(dealt, inbox):
    """A thread: passes on what is dealt to its process, up to the last None."""
    batches = True
    while batches:
        try:
            batches = dealt.recv()
        except (EOFError, OSError):
            os._exit(1)  # the first worker has died: the parent says so, and must not take this for the end
        inbox.put(batches)


def load(inbox, retriever):
    """Yields (Batch, size of the knowledge base, whether it is the last that was dealt together); or a Failure."""
    while batches := inbox.get():
        if isinstance(batches, Failure):
            yield batches
            return
        batches = retriever.retrieve_for(batches) if retriever else batches
        for i, batch in enumerate(batches, 1):
            yield batch, retriever and retriever.size, i == len(batches)


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


def as_failure(error):
    """The Failure of an exception that is being handled."""
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f'{type(error).__name__}: {error}')
    return Failure(error, text)
