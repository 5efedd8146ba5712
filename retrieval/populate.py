"""
Fills a collection with the chunks of the train documents:

    python -m retrieval.populate config/quickstart.py
    python -m retrieval.populate config/quickstart.py --sync=True    # also remove what the documents no longer hold

Reading, embedding and inserting run at the same time, the first two in processes of their own. Chunks that the
collection already has are left as they are, so a second run adds none, and completes one that was interrupted. The
chunks of a document that has changed since, or has become empty, are replaced. Those of documents that are gone stay,
unless --sync=True. A chunk without text of its own, or that the embedding model maps to zero, is no row. At the end the
exact-match index is brought up to date (match_index.py).
"""
import multiprocessing
import queue
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from system import end_with_parent, pick_device

import numpy as np
from tqdm import tqdm

from configurator import UserError, load_settings, named_settings, user_errors_as_one_line
from data.chunk_store import Chunks, open_datasets
from data.documents import as_dataset_configs
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.embedding import Embedder, EmbedderInfo
from retrieval.knowledge_base import MAX_TEXT, open_knowledge_base, take_from_collection, writing
from retrieval.match_index import open_match_index

AHEAD = 4  # Parts that may queue before a stage


@dataclass
class Rows:
    """Rows without their embeddings."""
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


@dataclass
class Part:
    """Some chunks, as the collection is to hold them."""
    rows: Rows
    ends: dict  # {doc_id: how many chunks the document has}
    finished: set  # doc_ids of documents whose last chunk is among them
    textless: np.ndarray  # (m,) ids of the chunks without text, which are no rows
    rowless: np.ndarray  # (k,) doc_ids of documents without any row
    began: float = 0.0  # reading it, by time.monotonic()
    ended: float = 0.0


def read_parts(datasets, tokenizer):
    """Yields the chunks of ChunkedDatasets as Parts; of documents without text only the doc_ids."""
    for dataset in datasets:
        for numbers in dataset.blocks():
            yield as_part(numbers, dataset, tokenizer)
        for doc_ids in dataset.empty_documents():
            nothing = as_part(np.arange(1), dataset, tokenizer)
            yield Part(nothing.rows.take([]), {}, set(doc_ids.tolist()), nothing.textless[:0], doc_ids)


def as_part(numbers, dataset, tokenizer):
    """The Part of the chunks of these numbers, one after another. UserError if a text is too long for a row."""
    count = len(numbers)
    more = dataset.read(np.arange(numbers[0], min(numbers[-1] + 2, dataset.num_chunks)))  # and the continuation
    chunks = Chunks(*(values[:count] for values in vars(more).values()))
    is_last = chunks.is_last_chunk
    following = np.where(is_last[:, None], tokenizer.eot_token, np.roll(more.tokens, -1, axis=0)[:count])
    texts = [tokenizer.decode(tokens[:length]) for tokens, length in
             zip(chunks.tokens.tolist(), (chunks.lengths - is_last).tolist(), strict=True)]  # without the end-of-text
    for text, document, position in zip(texts, chunks.documents, chunks.positions, strict=True):
        if len(text) > MAX_TEXT // 4 and len(text.encode()) > MAX_TEXT:
            document_id, _, where = dataset.describe(document)
            raise UserError(f'chunk {position + 1} of document {document_id!r} ({where}) has a text of '
                            f'{len(text.encode()):,} bytes, and a row holds {MAX_TEXT:,}: use a smaller '
                            f'retrieval_chunk_size, or leave the document out')
    documents, first, inverse, held = np.unique(chunks.documents, return_index=True, return_inverse=True,
                                                return_counts=True)
    ends, doc_ids = dataset.table['count'][documents], chunks.doc_ids[first]
    names = [name[:256] for name in dataset.names(documents)]
    has_text = np.array([bool(text.strip()) for text in texts])
    rows = Rows(chunks.ids, chunks.doc_ids, chunks.positions, [names[i] for i in inverse], texts,
                np.concatenate([chunks.tokens, following], axis=1),
                chunks.lengths + np.where(is_last, 0, np.roll(more.lengths, -1)[:count]))
    return Part(rows.take(np.flatnonzero(has_text)), dict(zip(doc_ids.tolist(), ends.tolist(), strict=True)),
                set(chunks.doc_ids[is_last].tolist()), chunks.ids[~has_text],
                np.setdiff1d(doc_ids[held == ends], chunks.doc_ids[has_text]))


def read_into(parts, settings):
    """
    The reading process: puts news (texts), the (hash, number of chunks) of each dataset, the Parts, and at the end None
    or the exception.
    """
    end_with_parent()
    try:
        tokenizer = load_tokenizer(settings.tokenizer)
        datasets = open_datasets(as_dataset_configs(settings.train_datasets, 'train_datasets'), tokenizer, settings,
                                 parts.put)
        for dataset in datasets:
            parts.put(f'{dataset.config.path}: {dataset.counts.describe()}')
        parts.put([(dataset.hash, dataset.num_chunks) for dataset in datasets])
        reading, part = read_parts(datasets, tokenizer), None
        while True:
            began = time.monotonic()
            part = next(reading, None)
            if part:
                part.began, part.ended = began, time.monotonic()
            parts.put(part)
            if part is None:
                return
    except KeyboardInterrupt:
        pass
    except Exception as error:
        parts.put(error)
    except BaseException as error:  # what a library of Rust raises when it panics
        parts.put(RuntimeError(f'{type(error).__name__}: {error}'))


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


def describe_cut(texts):
    """In the embedding process."""
    return embedder.describe_cut(texts)


def missing_rows(knowledge_base, part):
    """
    The Rows of a Part that the collection lacks or holds with other tokens, and the doc_ids of documents that have
    changed. What it holds of them beyond their chunks, or where these have no text now, is removed.
    """
    rows = part.rows
    found = knowledge_base.rows(np.concatenate([rows.id, part.textless]), ['doc_id', 'tokens'], latest=True)
    missing, changed = [], set()
    for i, (row_id, length) in enumerate(zip(rows.id.tolist(), rows.length.tolist(), strict=True)):
        old = found.get(row_id)
        if old is None or list(old['tokens']) != rows.tokens[i, :length].tolist():
            missing.append(i)
            if old is not None:
                changed.add(int(rows.doc_id[i]))
    had_text = [row_id for row_id in part.textless.tolist() if row_id in found]
    changed |= {found[row_id]['doc_id'] for row_id in had_text}
    knowledge_base.delete(had_text)
    ends = part.ends | dict.fromkeys(part.rowless.tolist(), 0)
    # nothing lies beyond a last chunk that is as it was; of others it has to be asked
    is_missing = np.zeros(len(rows.id), dtype=bool)
    is_missing[missing] = True
    complete = {doc_id for doc_id, position in zip(rows.doc_id[~is_missing].tolist(),
                                                   rows.position[~is_missing].tolist(), strict=True)
                if position == ends[doc_id] - 1}
    known = set(rows.doc_id[~is_missing].tolist()) | set(part.rowless.tolist())
    asked = (known & part.finished) - complete - changed
    changed |= knowledge_base.which_documents({doc_id: ends[doc_id] for doc_id in asked})
    for doc_id in changed:
        knowledge_base.delete_from(doc_id, ends[doc_id])
    return rows.take(missing), changed


def remove_others(knowledge_base, settings, tokenizer, held):
    """
    Remove the rows of documents that the datasets do not hold. Number of documents and of rows. `held` is the
    (hash, number of chunks) of each dataset that was filled in.
    """
    datasets = open_datasets(as_dataset_configs(settings.train_datasets, 'train_datasets'), tokenizer, settings)
    if [(dataset.hash, dataset.num_chunks) for dataset in datasets] != held:
        raise UserError('train_datasets have changed meanwhile, and nothing was removed: start again')
    documents, removed = set(), 0
    for rows in knowledge_base.all_rows(['doc_id']):
        ids, doc_ids = (np.array([row[name] for row in rows], dtype=np.int64) for name in ('id', 'doc_id'))
        is_other = np.all([dataset.find(doc_ids) < 0 for dataset in datasets], axis=0)
        documents.update(doc_ids[is_other].tolist())
        removed += int(is_other.sum())
        knowledge_base.delete(ids[is_other].tolist())
    return len(documents), removed


def populate(settings, show_progress, sync=False, say=print):
    """
    Fill the collection. Returns counts, and seconds by stage of the time that they ran together, beside all that were
    spent on reading. `say` receives what was read.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    as_dataset_configs(settings.train_datasets, 'train_datasets')  # validate before loading a model
    context = multiprocessing.get_context('spawn')
    parts = context.Queue(maxsize=AHEAD)
    reader = context.Process(target=read_into, name='reader', args=(parts, settings), daemon=True)
    reader.start()
    embedders = ProcessPoolExecutor(1, mp_context=context)
    seconds, done, changed = Counter(), Counter(), set()
    progress = tqdm(desc='chunks', unit=' chunks', unit_scale=True, disable=not show_progress)
    knowledge_base = None
    try:
        while isinstance(item := receive(parts, reader), str):  # report what cannot be read before making a collection
            say(item)
        held, part = item, receive(parts, reader)
        progress.total = sum(count for _, count in held)
        info = embedders.submit(load_embedder, settings.retrieval_embedding_model,
                                pick_device(settings.device)).result()
        if cut := embedders.submit(describe_cut, part.rows.text).result():
            say(cut)
        knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), info, create=True)
        done['before'] = knowledge_base.count()
        start, waiting = time.monotonic(), deque()
        progress.reset()  # its rate excludes the start-up
        while part or waiting:
            while part and len(waiting) < AHEAD:
                seconds['reading'] += part.ended - part.began
                seconds['read'] += max(0.0, part.ended - max(part.began, start))
                done['chunks'] += len(part.rows.id)
                done['textless'] += len(part.textless)
                size, rows = len(part.rows.id) + len(part.textless), part.rows
                if done['before']:
                    rows, found = missing_rows(knowledge_base, part)
                    changed |= found
                waiting.append((size, rows, embedders.submit(embed, rows.text)))
                part = receive(parts, reader)
            size, rows, future = waiting.popleft()
            vectors, took = future.result()
            seconds['embed'] += took
            began = time.monotonic()
            has_vector = vectors.any(axis=1)
            if has_vector.any():
                knowledge_base.upsert(rows.take(np.flatnonzero(has_vector)).to_dicts(vectors[has_vector]))
            if done['before'] and not has_vector.all():  # what they had before they changed
                knowledge_base.delete(list(knowledge_base.rows(rows.id[~has_vector], [], latest=True)))
            seconds['insert'] += time.monotonic() - began
            done['added'] += int(has_vector.sum())
            done['without_vector'] += int((~has_vector).sum())
            progress.update(size)
        began = time.monotonic()
        if sync and done['before']:
            done['removed_documents'], done['removed'] = remove_others(knowledge_base, settings, tokenizer, held)
        if knowledge_base.revision() is None or done['added']:  # it changed, now or in a run that was interrupted
            knowledge_base.flush()
        seconds['insert'] += time.monotonic() - began
        seconds['all'] = time.monotonic() - start
        done['changed'], done['after'] = len(changed), knowledge_base.count()
        if settings.retrieval_pointers and done['after']:
            progress.close()
            open_match_index(settings, tokenizer, say, show_progress).follow(knowledge_base)
        return done, seconds
    finally:
        progress.close()
        if knowledge_base:
            knowledge_base.close()
        reader.terminate()
        embedders.shutdown(cancel_futures=True)


def receive(parts, reader):
    """What the reading process put next; its exception is raised."""
    while True:
        try:
            item = parts.get(timeout=5)
        except queue.Empty:
            if reader.is_alive():
                continue
            raise RuntimeError(f'the reading process ended with code {reader.exitcode}') from None
        if isinstance(item, Exception):
            raise item
        return item


def main():
    arguments, sync = sys.argv[1:], False
    if '--help' in arguments or '-h' in arguments:
        print(f'{__doc__}\n  --sync=False\n        remove the rows of documents that train_datasets no longer hold\n')
    for argument in [a for a in arguments if a.partition('=')[0] == '--sync']:
        if argument not in ('--sync', '--sync=True', '--sync=False'):
            raise UserError(f'{argument!r} is none of --sync=True and --sync=False: choose one')
        arguments.remove(argument)
        sync = argument != '--sync=False'
    settings = load_settings(arguments).replace(retrieval_offline=False)  # a run's, which does without a database
    settings = take_from_collection(settings, named_settings(arguments), print)
    name = settings.retrieval_collection
    print(f'filling collection {name!r}', flush=True)
    with writing(settings, shared=True):
        done, seconds = populate(settings, sys.stderr.isatty(), sync)
    print(f'collection {name!r} in {settings.retrieval_milvus_uri}: {done["after"]:,} chunks, {done["added"]:,} of '
          f'them written now, {done["changed"]:,} changed documents')
    if done['textless'] or done['without_vector']:
        print(f'no rows: {done["textless"]:,} chunks without text of their own, {done["without_vector"]:,} that the '
              f'embedding model maps to zero')
    if sync:
        print(f'removed: {done["removed"]:,} chunks of {done["removed_documents"]:,} documents that train_datasets do '
              f'not hold')
    elif done['after'] > (held := done['chunks'] - done['without_vector']):
        print(f'{done["after"] - held:,} chunks are of documents that train_datasets do not hold: --sync=True removes '
              f'them')
    if done['added']:
        rates = {stage: done['added'] / max(seconds[stage], 1e-9) for stage in ('embed', 'insert', 'all')}
        rates['read'] = done['chunks'] / max(seconds['reading'], 1e-9)
        slowest = max(('read', 'embed', 'insert'), key=seconds.get)
        print(f'{rates["all"]:,.0f} chunks/s in {seconds["all"]:.0f} s | while running: read {rates["read"]:,.0f}, '
              f'embed {rates["embed"]:,.0f}, insert {rates["insert"]:,.0f} chunks/s | the slowest, {slowest}, was busy '
              f'{seconds[slowest] / seconds["all"]:.0%} of the time')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
