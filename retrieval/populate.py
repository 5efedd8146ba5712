"""
Fills a collection with the chunks of the train documents:

    python -m retrieval.populate config/quickstart.py

Reading, embedding and inserting run at the same time, the first two in processes of their own. Chunks that the
collection already has are left as they are, so a second run adds none, and completes one that was interrupted. The
chunks of a document that has changed since are replaced.
"""
import multiprocessing
import queue
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from system import end_with_parent, pick_device

import numpy as np
from tqdm import tqdm

from configurator import load_settings, user_errors_as_one_line
from data.chunking import with_continuation
from data.documents import as_dataset_configs, chunk, load_documents
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.embedding import Embedder, EmbedderInfo
from retrieval.knowledge_base import open_knowledge_base

BATCH = 2048  # chunks that pass from stage to stage together
AHEAD = 4  # batches that may queue before a stage


@dataclass
class Rows:
    """About BATCH rows, whole documents of them, without their embeddings."""
    id: np.ndarray  # (n,) int64
    doc_id: np.ndarray  # (n,) int64
    position: np.ndarray  # (n,) int64
    document: list  # n names
    text: list  # n texts
    tokens: np.ndarray  # (n, 2C) int32: the chunk and its continuation
    length: np.ndarray  # (n,) how many of the tokens are real

    def take(self, indices):
        """The rows at the indices, as a Rows."""
        return Rows(self.id[indices], self.doc_id[indices], self.position[indices], [self.document[i] for i in indices],
                    [self.text[i] for i in indices], self.tokens[indices], self.length[indices])

    def to_dicts(self, vectors):
        """The collection's rows, with their embeddings (n, D)."""
        columns = zip(self.id.tolist(), self.doc_id.tolist(), self.position.tolist(), self.document, self.text,
                      self.tokens.tolist(), self.length.tolist(), vectors, strict=True)
        return [dict(id=i, doc_id=d, position=p, document=name, text=text, tokens=tokens[:length], embedding=vector)
                for i, d, p, name, text, tokens, length, vector in columns]


def read_batches(documents, tokenizer, chunk_size):
    """Yields Rows of whole documents, batch after batch."""
    parts, size = [], 0
    for document in documents:
        chunked = chunk(document, tokenizer, chunk_size)
        if chunked is None:
            continue
        count = len(chunked.tokens)
        tokens, lengths = with_continuation(chunked.tokens, chunked.lengths)
        texts = [tokenizer.decode(row[:length]) for row, length in
                 zip(chunked.tokens.tolist(), chunked.lengths.tolist(), strict=True)]
        parts.append((chunked.chunk_ids, np.full(count, chunked.doc_id, dtype=np.int64), np.arange(count),
                      [document.name[:256]] * count, texts, tokens, lengths))
        size += count
        if size >= BATCH:
            yield join(parts)
            parts, size = [], 0
    if parts:
        yield join(parts)


def join(parts):
    columns = zip(*parts, strict=True)
    return Rows(*[np.concatenate(c) if isinstance(c[0], np.ndarray) else [x for part in c for x in part]
                  for c in columns])


def read_into(batches, settings):
    """The reading process: puts (Rows, seconds that they took), and at the end None or the exception."""
    end_with_parent()
    try:
        tokenizer = load_tokenizer(settings.tokenizer)
        documents = load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets'))
        reading = read_batches(documents, tokenizer, settings.retrieval_chunk_size)
        while True:
            start = time.perf_counter()
            rows = next(reading, None)
            batches.put(rows and (rows, time.perf_counter() - start))
            if rows is None:
                return
    except KeyboardInterrupt:
        pass
    except Exception as error:
        batches.put(error)


def load_embedder(name, device):
    """In the embedding process: load the model once, into a global."""
    global embedder
    end_with_parent()
    embedder = Embedder(name, device)
    return EmbedderInfo(embedder.name, embedder.fingerprint, embedder.dimension)


def embed(texts):
    """In the embedding process: vectors (n, D), and the seconds that they took."""
    start = time.perf_counter()
    return embedder.embed(texts), time.perf_counter() - start


def missing_rows(knowledge_base, rows):
    """
    The rows that the collection lacks or holds with other tokens, and how many documents have changed. Chunks beyond a
    changed document's new end are removed.
    """
    found = knowledge_base.rows(rows.id, ['tokens'], latest=True)
    missing, changed = [], set()
    for i, (row_id, length) in enumerate(zip(rows.id.tolist(), rows.length.tolist(), strict=True)):
        old = found.get(row_id)
        if old is None or list(old['tokens']) != rows.tokens[i, :length].tolist():
            missing.append(i)
            if old is not None:
                changed.add(int(rows.doc_id[i]))
    for doc_id in changed:
        knowledge_base.delete_from(doc_id, rows.position[rows.doc_id == doc_id].max() + 1)
    return rows.take(missing), len(changed)


def populate(settings, show_progress):
    """Fill the collection. Returns counts (chunks, added, changed, before, after) and seconds by stage."""
    tokenizer = load_tokenizer(settings.tokenizer)
    as_dataset_configs(settings.train_datasets, 'train_datasets')  # validate before loading a model
    context = multiprocessing.get_context('spawn')
    batches = context.Queue(maxsize=AHEAD)
    reader = context.Process(target=read_into, args=(batches, settings), daemon=True)
    reader.start()
    embedders = ProcessPoolExecutor(1, mp_context=context)
    seconds = dict(read=0.0, embed=0.0, insert=0.0)
    done = dict(chunks=0, added=0, changed=0)
    progress = tqdm(desc='chunks', unit=' chunks', unit_scale=True, disable=not show_progress)
    knowledge_base = None
    try:
        first = next_rows(batches, reader)  # report a missing corpus before making a collection
        info = embedders.submit(load_embedder, settings.retrieval_embedding_model,
                                pick_device(settings.device)).result()
        knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), info, create=True)
        done['before'] = knowledge_base.count()
        start, waiting = time.perf_counter(), deque()
        progress.reset()  # its rate excludes the start-up
        rows_and_seconds = first
        while rows_and_seconds or waiting:
            while rows_and_seconds and len(waiting) < AHEAD:
                rows, took = rows_and_seconds
                seconds['read'] += took
                done['chunks'] += len(rows.id)
                if done['before']:
                    rows, changed = missing_rows(knowledge_base, rows)
                    done['changed'] += changed
                waiting.append((rows, embedders.submit(embed, rows.text)))
                rows_and_seconds = next_rows(batches, reader)
            rows, future = waiting.popleft()
            vectors, took = future.result()
            seconds['embed'] += took
            began = time.perf_counter()
            if len(rows.id):
                knowledge_base.upsert(rows.to_dicts(vectors))
            seconds['insert'] += time.perf_counter() - began
            done['added'] += len(rows.id)
            progress.n = done['chunks'] - sum(len(r.id) for r, _ in waiting)
            progress.refresh()
        began = time.perf_counter()
        if done['added'] or knowledge_base.revision() is None:  # the latter: an earlier run was interrupted
            knowledge_base.flush()
        seconds['insert'] += time.perf_counter() - began
        seconds['all'] = time.perf_counter() - start
        done['after'] = knowledge_base.count()
        return done, seconds
    finally:
        progress.close()
        if knowledge_base:
            knowledge_base.close()
        reader.terminate()
        embedders.shutdown(cancel_futures=True)


def next_rows(batches, reader):
    """(Rows, seconds) of the next batch, or None after the last."""
    while True:
        try:
            item = batches.get(timeout=5)
        except queue.Empty:
            if reader.is_alive():
                continue
            raise RuntimeError(f'the reading process ended with code {reader.exitcode}') from None
        if isinstance(item, Exception):
            raise item
        return item


def main():
    settings = load_settings(sys.argv[1:])
    print(f'filling collection {settings.retrieval_collection!r}', flush=True)
    done, seconds = populate(settings, sys.stderr.isatty())
    print(f'collection {settings.retrieval_collection!r} in {settings.retrieval_milvus_uri}: {done["after"]:,} chunks, '
          f'{done["added"]:,} of them written now, {done["changed"]:,} changed documents')
    if done['added']:
        rates = {stage: done['added' if stage != 'read' else 'chunks'] / max(seconds[stage], 1e-9) for stage in seconds}
        slowest = max(('read', 'embed', 'insert'), key=seconds.get)
        print(f'{rates["all"]:,.0f} chunks/s in {seconds["all"]:.0f} s | while running: read {rates["read"]:,.0f}, '
              f'embed {rates["embed"]:,.0f}, insert {rates["insert"]:,.0f} chunks/s | the slowest, {slowest}, was busy '
              f'{seconds[slowest] / seconds["all"]:.0%} of the time')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
