"""
The two threads behind the server (server.py): one steps the engine for all requests, and one asks the collection, so
that a database that is away, or hangs, holds up the others for no longer than retrieval_timeout, and once.
"""
import itertools
import queue
import sys
import threading
import time
import traceback
from collections import Counter, deque
from concurrent import futures
from dataclasses import dataclass, field

import numpy as np

from configurator import UserError
from generation.engine import Request, Row
from generation.origins import named_runs, passage_at
from generation.sources import CollectionSource

URGENT, LATER = range(2)  # what the engine waits for, and what only an answer shows
LONGEST_WAIT = 10  # seconds for the latter
PAUSE = 1.0  # seconds between two attempts to reach a collection that is away
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds, of the histogram


class ApiError(Exception):
    """What a client gets instead of an answer, in OpenAI's form. `param` names the parameter that is wrong."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers


class Away(ApiError):
    """The collection cannot be asked now."""

    def __init__(self, reason):
        super().__init__(503, f'the knowledge base is away, and nothing is written without it: {reason}',
                         code='knowledge_base_away', headers={'Retry-After': '5'})


@dataclass
class Passage:
    """A passage that a chunk retrieved."""
    document: str
    chunk: int | None  # its number in the document, from 1
    similarity: float | None  # None: it was not found by its embedding alone
    text: str
    continuation: str
    tokens: list  # of both


class LiveCollection:
    """
    A source for the engine (sources.py), which asks a Retriever in a thread of its own and waits for retrieval_timeout
    seconds at most. After that, and after any UserError of the retriever, everybody who asks gets Away at once, until
    the thread has found that the collection answers again. In place of hits, retrieve() gives a list of Passages.
    """

    def __init__(self, retriever):
        self.retriever, self.source, self.timeout = retriever, CollectionSource(retriever), retriever.timeout
        self.has_neighbors, self.has_pointers = self.source.has_neighbors, self.source.has_pointers
        self.away, self.lock = '', threading.Lock()  # why it cannot be asked now
        self.names = {}  # of documents, by doc_id
        self.asked, self.numbers = queue.PriorityQueue(), itertools.count()  # (urgency, number, call, answer)
        threading.Thread(target=self._run, daemon=True, name='collection').start()

    def retrieve(self, chunks):
        return self.ask(lambda: self._retrieve(chunks))

    def point(self, tokens, last=None):
        return self.ask(lambda: self.source.point(tokens, last))

    def draft(self, tokens, count):
        return self.source.draft(tokens, count)  # asks no database

    def named(self, tokens, first, end):
        """
        Of named_runs (origins.py): [(first token, number of tokens, document, number of its chunk, that chunk's text
        up to the end of the run at least, where the run begins in it, in characters)].
        """
        return self.ask(lambda: self._named(tokens, first, end), LATER)

    def ask(self, call, urgency=URGENT):
        """What call() returns in the collection's thread. Away if that takes too long."""
        if self.away:
            raise Away(self.away)
        answer = futures.Future()
        self.asked.put((urgency, next(self.numbers), call, answer))
        try:
            return answer.result(self.timeout if urgency == URGENT else LONGEST_WAIT)
        except futures.TimeoutError:
            if urgency == URGENT:
                self._lose(f'it has not answered for {self.timeout:.0f} s')
            raise Away(self.away or 'it is busy') from None

    def _run(self):
        while True:
            _, _, call, answer = self.asked.get()
            try:
                answer.set_result(call())
            except UserError as error:
                self._lose(' '.join(str(error).split()))
                answer.set_exception(Away(self.away))
            except BaseException as error:  # it is raised where the answer is waited for
                if self.retriever.knowledge_base.client is None:
                    self._lose(f'{type(error).__name__}: {error}')
                answer.set_exception(error)

    def _lose(self, reason):
        """The collection is away from now on: nobody goes on waiting for it, and its thread tries to reach it."""
        with self.lock:
            was_away, self.away = self.away, reason
            if was_away:
                return
        print(f'the knowledge base is away: {reason}', file=sys.stderr, flush=True)
        while not self.asked.empty():
            self.asked.get()[-1].set_exception(Away(reason))
        self.asked.put((URGENT, next(self.numbers), self._reach, futures.Future()))

    def _reach(self):
        lost = time.monotonic()
        while True:
            try:
                self.retriever.knowledge_base.open(timeout=max(1.0, self.timeout))
                if self.has_pointers:
                    self.source.point(np.zeros((1, 1), dtype=np.int64))
                else:
                    self.retriever.knowledge_base.count()
                break
            except Exception as error:  # whatever a server raises that is starting
                self.away = ' '.join(str(error).split()) or type(error).__name__
            time.sleep(PAUSE)
        print(f'the knowledge base is back after {time.monotonic() - lost:.0f} s', file=sys.stderr, flush=True)
        self.away = ''

    def _retrieve(self, chunks):
        tokens, mask, hits = self.source.retrieve(chunks)
        is_hit = hits['score'] > -np.inf
        rows = self.retriever.knowledge_base.rows(np.unique(hits['id'][is_hit]), ['document', 'position'])
        return tokens, mask, [[self._passage(rows.get(hit['id']), hit, read[is_token].tolist())
                               for hit, read, is_token in zip(*(a[found] for a in line), strict=True)]
                              for *line, found in zip(hits, tokens, mask, is_hit, strict=True)]

    def _named(self, tokens, first, end):
        index, C, decode = self.retriever.index, self.retriever.chunk_size, self.retriever.tokenizer.decode
        runs = named_runs(self.source, index, tokens, first, end)
        unknown = {doc_id: place // C for _, _, doc_id, place in runs if doc_id not in self.names}
        if unknown:  # a search by anything but ids takes long, and a document's name never changes
            rows = self.retriever.knowledge_base.rows_at(sorted(unknown.items()), ['document'])
            self.names |= {doc_id: row['document'] for (doc_id, _), row in rows.items()}
        found = []
        for t, count, doc_id, place in runs:
            passage, offset = passage_at(index, doc_id, place, count, C)
            found.append((t, count, self.names.get(doc_id, 'a deleted document'), place // C + 1, decode(passage),
                          len(decode(passage[:offset]))))
        return found

    def _passage(self, row, hit, tokens):
        """What was read, tokens (n,); its row may have been changed or removed since."""
        end, C, decode = self.retriever.tokenizer.eot_token, self.retriever.chunk_size, self.retriever.tokenizer.decode
        chunk, continuation = ([t for t in part if t != end] for part in (tokens[:C], tokens[C:]))
        similarity = float(hit['score']) if self.retriever.mode == 'dense' else None
        return Passage(row['document'] if row else 'a deleted document', row['position'] + 1 if row else None,
                       similarity, decode(chunk), decode(continuation), chunk + continuation)


@dataclass(eq=False)
class Job:
    """
    One text that is to be written. What comes of it is put into the queue of its request, in the event loop: (job,
    Events, Passages of the chunks that have retrieved since, reason to finish or None), or an ApiError that ends it.
    """
    request: Request
    queue: object
    started: float = field(default_factory=time.monotonic)
    row: Row | None = None
    told: int = 0  # the end of the last chunk of row.retrieved that was put there
    is_canceled: bool = False


class Worker:
    """
    Steps the engine in a thread, for at most `slots` jobs at a time; up to `most_waiting` others wait. Only this thread
    touches the engine. An exception in it ends the jobs that were in the engine, and no others.
    """

    def __init__(self, engine, most_waiting):
        self.engine, self.most_waiting = engine, most_waiting
        self.changed = threading.Condition()  # guards what follows
        self.waiting, self.jobs, self.is_closed = deque(), {}, False  # jobs: those in the engine, by row
        self.counts, self.first_tokens = Counter(), [0] * (len(BUCKETS) + 1)
        self.loop, self.thread = None, threading.Thread(target=self._run, daemon=True, name='engine')

    def start(self, loop):
        self.loop = loop
        self.thread.start()

    def submit(self, jobs):
        """Add the jobs of a request, all or none. ApiError if too many wait, or if the server is ending."""
        with self.changed:
            if self.is_closed:
                raise ending()
            free = self.engine.slots - len(self.jobs)
            if len(self.waiting) + len(jobs) > self.most_waiting + free:
                raise ApiError(429, f'{len(self.waiting)} texts wait to be written, and at most {self.most_waiting} '
                               f'may: try again later', code='rate_limit_exceeded', headers={'Retry-After': '2'})
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs):
        with self.changed:
            for job in jobs:
                job.is_canceled = True
            self.waiting = deque(job for job in self.waiting if not job.is_canceled)

    def close(self):
        """End all jobs and the thread."""
        with self.changed:
            self.is_closed = True
            for job in (*self.waiting, *self.jobs.values()):
                job.queue.put_nowait(ending())
            self.waiting.clear()
            self.changed.notify()

    def _run(self):
        while self._take():
            try:
                events = self.engine.step()
            except Away as error:
                self._fail([job for job in self.jobs.values() if isinstance(job.request.source, LiveCollection)], error)
            except Exception:
                traceback.print_exc()
                self._fail(self.jobs.values(), ApiError(500, 'the engine failed, and its log says why', code='engine'))
                self.engine.rows.clear()
                self.engine.waiting.clear()
            else:
                self._deliver(events)

    def _take(self):
        """Wait until there is work, and give what there is room for to the engine. Whether the server goes on."""
        engine = self.engine
        with self.changed:
            while not (self.waiting or engine.rows or engine.waiting or self.is_closed):
                self.changed.wait()
            for row, job in list(self.jobs.items()):
                if job.is_canceled:
                    row.cancel()
                    del self.jobs[row]
            while self.waiting and len(self.jobs) < engine.slots:
                job = self.waiting.popleft()
                job.row = engine.add(job.request)
                self.jobs[job.row] = job
                self.counts['prompt tokens'] += len(job.request.tokens)
            return not self.is_closed

    def _deliver(self, events):
        by_row = {}
        for event in events:
            by_row.setdefault(event.row, []).append(event)
        items, now = [], time.monotonic()
        for row, some in by_row.items():
            job = self.jobs[row]
            if row.size - row.prompt_size == len(some):
                took = now - job.started
                self.first_tokens[sum(took > bound for bound in BUCKETS)] += 1
                self.counts['seconds to first tokens'] += took
            # a step that failed for others may have been repeated
            retrieved = {end: (first, end, passages) for first, end, passages in row.retrieved if end > job.told}
            job.told = max(retrieved, default=job.told)
            items.append((job, some, list(retrieved.values()), row.finish_reason))
        self.counts['completion tokens'] += len(events)
        with self.changed:
            for row in by_row:
                if row.finish_reason:
                    del self.jobs[row]
        self._put(items)

    def _fail(self, jobs, error):
        jobs = list(jobs)
        with self.changed:
            for job in jobs:
                job.row.cancel()
                del self.jobs[job.row]
        self._put([(job, error) for job in jobs])

    def _put(self, items):
        def put():
            for item in items:
                item[0].queue.put_nowait(item[1] if isinstance(item[1], ApiError) else item)
        try:
            self.loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop has ended
            pass


def ending():
    return ApiError(503, 'the server is ending', code='ending')
