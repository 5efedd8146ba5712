"""
Fills a collection with the chunks of the train documents:

    python -m retrieval.populate config/quickstart.py
    python -m retrieval.populate config/quickstart.py --sync=True       # also remove what the documents no longer hold
    python -m retrieval.populate config/quickstart.py --dry_run=True    # how much that would be, and how long it takes
    torchrun --standalone --nproc_per_node=4 -m retrieval.populate config/my_run.py    # a GPU for each process

Reading, embedding and inserting run at the same time, the first two in processes of their own. Chunks that the
collection already has are left as they are, so a second run adds none, and completes one that was interrupted. The
chunks of a document that has changed since, or has become empty, are replaced. Those of documents that are gone stay,
unless --sync=True. A chunk without text of its own, or that the embedding model maps to zero, is no row. At the end the
exact-match index is brought up to date (match_index.py). While Milvus cannot be reached it waits.

Several processes deal the chunks among themselves. With --bulk=True, for tens of millions of chunks, a server imports
files of the rows in place of inserting them (bulk.py).
"""
import multiprocessing
import queue
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count

from system import end_with_parent, pick_device

import numpy as np
from tqdm import tqdm

from configurator import UserError, load_settings, named_settings, user_errors_as_one_line
from data.blocks import open_all_datasets
from data.chunk_store import Chunks, open_datasets
from data.conversations import check_documents
from data.documents import as_dataset_configs, check_sides
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.bulk import Imports, open_folder, wait_for_imports
from retrieval.embedding import Embedder, EmbedderInfo
from retrieval.index import SEGMENT, check_new
from retrieval.inherit import take_from_collection
from retrieval.knowledge_base import MAX_TEXT, open_knowledge_base
from retrieval.local_server import is_local
from retrieval.match_index import open_match_index
from retrieval.ranks import Ranks
from retrieval.sizes import describe_sizes
from retrieval.waiting import wait_for_milvus
from retrieval.writer import writing

AHEAD = 4  # Parts that may queue before a stage
SAMPLE = 10  # seconds of embedding, to estimate all of it
OPTIONS = {
    'sync': 'remove the rows of documents that train_datasets no longer hold',
    'bulk': 'have a server import files of the rows, in retrieval_bulk_dir, in place of inserting them',
}


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


def read_parts(datasets, tokenizer, rank=0, world_size=1, say=print):
    """
    Yields the chunks of ChunkedDatasets, or streamed ones, as Parts; of documents without text only the doc_ids.
    Of several ranks' each gets its own: dealt in turn, or, of a streamed dataset, what it alone reads.
    """
    turn = count()
    parts = chain.from_iterable(dataset.parts(tokenizer, rank, world_size, say) if dataset.config.streaming else
                                [dataset] for dataset in datasets)
    for dataset in parts:
        is_own = dataset.config.streaming
        for numbers in dataset.blocks():
            if is_own or next(turn) % world_size == rank:
                yield as_part(numbers, dataset, tokenizer)
        for doc_ids in dataset.empty_documents():
            if not is_own and next(turn) % world_size != rank:
                continue
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
    has_text = np.array([bool(text.strip()) for text in texts], dtype=bool)
    rows = Rows(chunks.ids, chunks.doc_ids, chunks.positions, [names[i] for i in inverse], texts,
                np.concatenate([chunks.tokens, following], axis=1),
                chunks.lengths + np.where(is_last, 0, np.roll(more.lengths, -1)[:count]))
    return Part(rows.take(np.flatnonzero(has_text)), dict(zip(doc_ids.tolist(), ends.tolist(), strict=True)),
                set(chunks.doc_ids[is_last].tolist()), chunks.ids[~has_text],
                np.setdiff1d(doc_ids[held == ends], chunks.doc_ids[has_text]))


def read_into(parts, settings, rank, world_size):
    """
    The reading process: puts news (texts), the (hash, number of chunks) of each dataset, the Parts, and at the end None
    or the exception.
    """
    end_with_parent()
    try:
        tokenizer = load_tokenizer(settings.tokenizer)
        datasets = open_all_datasets(as_dataset_configs(settings.train_datasets, 'train_datasets'), tokenizer, settings,
                                     parts.put)
        for dataset in datasets:
            parts.put(f'{dataset.config.path}: ' + (
                'streamed' if dataset.config.streaming else dataset.counts.describe()))
        parts.put([(dataset.hash, dataset.num_chunks) for dataset in datasets])
        reading, part = read_parts(datasets, tokenizer, rank, world_size, parts.put), None
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


def populate(settings, show_progress, sync=False, say=print, ranks=None, bulk=False):
    """
    Fill the collection, with the other Ranks, if there are any. Returns counts, of all of them, and seconds by stage of
    the time that they ran together, beside all that were spent on reading; of a rank that is not the first, of its own.
    `say` receives what was read.
    """
    ranks = ranks or Ranks()
    say, show_progress = say if ranks.is_master else lambda text: None, show_progress and ranks.is_master
    tokenizer = load_tokenizer(settings.tokenizer)
    configs = as_dataset_configs(settings.train_datasets, 'train_datasets')  # validate before loading a model
    if sync and (streamed := [config.path for config in configs if config.streaming]):
        raise UserError(f'--sync=True has to know all documents, and {streamed[0]!r} is streamed: leave out --sync, or '
                        f'fill another retrieval_collection')
    if settings.val_datasets:
        check_sides(configs, as_dataset_configs(settings.val_datasets, 'val_datasets'))
    context = multiprocessing.get_context('spawn')
    parts = context.Queue(maxsize=AHEAD)
    reader = context.Process(target=read_into, name='reader', daemon=True,
                             args=(parts, settings, ranks.rank, ranks.world_size))
    reader.start()
    embedders = ProcessPoolExecutor(1, mp_context=context)
    seconds, done, changed = Counter(), Counter(), set()
    progress = tqdm(desc='chunks', unit=' chunks', unit_scale=True, disable=not show_progress)
    knowledge_base = imports = None

    def wait(work):
        return wait_for_milvus(work, knowledge_base.open, settings.retrieval_timeout, say)
    try:
        # report what cannot be read before making a collection
        held, part = receive(parts, reader, say), receive(parts, reader, say)
        check_same(ranks, held)
        progress.total = None if None in (counts := [size for _, size in held]) else sum(counts)
        info = embedders.submit(load_embedder, settings.retrieval_embedding_model,
                                pick_device(ranks.device(settings.device))).result()
        if part and (cut := embedders.submit(describe_cut, part.rows.text).result()):
            say(cut)

        def open_it(create):
            return open_knowledge_base(settings, vocabulary_hash(tokenizer), info, create,
                                       expected=progress.total or SEGMENT)
        if ranks.is_master:  # the others wait until there is a collection
            knowledge_base = open_it(create=True)
            imports = Imports(knowledge_base, settings, wait) if bulk else None
            wait_for_imports(knowledge_base, wait, say)
            if imports:
                imports.remove_earlier()
            done['before'] = knowledge_base.count()
        done['before'] = ranks.gather('before', done['before'])[0]
        if not ranks.is_master:
            knowledge_base = open_it(create=False)
            imports = Imports(knowledge_base, settings, wait) if bulk else None
        start, waiting = time.monotonic(), deque()
        progress.reset()  # its rate excludes the start-up
        while part or waiting:
            ranks.check()
            while part and len(waiting) < AHEAD:
                seconds['reading'] += part.ended - part.began
                seconds['read'] += max(0.0, part.ended - max(part.began, start))
                done['chunks'] += len(part.rows.id)
                done['textless'] += len(part.textless)
                size, rows = len(part.rows.id) + len(part.textless), part.rows
                if done['before']:
                    rows, found = wait(lambda part=part: missing_rows(knowledge_base, part))
                    changed |= found
                waiting.append((size, rows, embedders.submit(embed, rows.text)))
                part = receive(parts, reader, say)
            size, rows, future = waiting.popleft()
            vectors, took = future.result()
            seconds['embed'] += took
            began = time.monotonic()
            has_vector = vectors.any(axis=1)
            if imports:
                imports.add(rows.take(np.flatnonzero(has_vector)), vectors[has_vector], is_new=not done['before'])
            elif has_vector.any():
                chosen = rows.take(np.flatnonzero(has_vector)).to_dicts(vectors[has_vector])
                wait(lambda chosen=chosen: knowledge_base.upsert(chosen))
            if done['before'] and not has_vector.all():  # what they had before they changed
                without = rows.id[~has_vector]
                wait(lambda without=without: knowledge_base.delete(list(knowledge_base.rows(without, [], latest=True))))
            seconds['insert'] += time.monotonic() - began
            done['added'] += int(has_vector.sum())
            done['without_vector'] += int((~has_vector).sum())
            progress.update(ranks.add('progress', size) - progress.n if ranks.world_size > 1 else size)
        began = time.monotonic()
        if imports:
            imports.finish()
        totals = ranks.gather('done', [dict(done), [str(doc_id) for doc_id in changed]])
        if not ranks.is_master:
            return done, seconds
        for other, _ in totals[1:]:
            done.update({key: value for key, value in other.items() if key != 'before'})
        done['changed'] = len(set().union(*(names for _, names in totals)))
        if sync and done['before']:
            done['removed_documents'], done['removed'] = wait(
                lambda: remove_others(knowledge_base, settings, tokenizer, held))
        # it changed, now or in a run that was interrupted
        has_changed = wait(lambda: knowledge_base.revision() is None or done['added'])
        if has_changed:
            wait(lambda: knowledge_base.fit_index(say))
            wait(knowledge_base.flush)
        seconds['insert'] += time.monotonic() - began
        seconds['all'] = time.monotonic() - start
        done['after'] = wait(knowledge_base.count)
        if settings.retrieval_pointers and done['after']:
            progress.close()
            index = open_match_index(settings, tokenizer, say, show_progress)
            wait(lambda: index.follow(knowledge_base))
        return done, seconds
    finally:
        progress.close()
        if knowledge_base:
            knowledge_base.close()
        reader.terminate()
        embedders.shutdown(cancel_futures=True)


def check_same(ranks, held):
    """UserError if ranks on several nodes read different datasets."""
    if len(set(map(str, ranks.gather('held', held)))) > 1:
        raise UserError('the processes read different train_datasets: give all nodes the same files')


def receive(parts, reader, say):
    """What the reading process put next, but for news, which are said; its exception is raised."""
    while True:
        try:
            item = parts.get(timeout=5)
        except queue.Empty:
            if reader.is_alive():
                continue
            raise UserError(f'the reading process was ended, with code {reader.exitcode}: if memory is short, lower '
                            f'shuffle_buffer_size of streamed datasets, and start again, which completes the '
                            f'collection') from None
        if isinstance(item, Exception):
            raise item
        if not isinstance(item, str):
            return item
        say(item)


def dry_run(settings):
    """Print what populate would do to an empty collection, what it takes, and how long, by embedding some chunks."""
    check_new(settings.retrieval_index, settings.retrieval_vectors, settings.retrieval_milvus_uri)
    tokenizer = load_tokenizer(settings.tokenizer)
    configs = as_dataset_configs(settings.train_datasets, 'train_datasets')
    if any(config.streaming for config in configs):
        raise UserError('--dry_run=True counts chunks, and nobody knows how many a streamed dataset has: set '
                        'streaming=False')
    datasets = open_datasets(configs, tokenizer, settings)
    embedder = Embedder(settings.retrieval_embedding_model, pick_device(settings.device))
    chunks = sum(dataset.num_chunks for dataset in datasets)
    rows = sample_rows(datasets, tokenizer)
    if not rows.text:
        raise UserError('none of the chunks that were looked at has a text: nothing can be said of the others')
    embedder.embed(rows.text[:64])  # what is allocated and compiled once
    start, embedded, vectors = time.perf_counter(), 0, []
    while embedded < len(rows.text) and time.perf_counter() - start < SAMPLE:
        vectors.append(embedder.embed(rows.text[embedded:embedded + 256]))
        embedded += len(vectors[-1])
    rate = embedded / (time.perf_counter() - start)
    for dataset in datasets:
        print(f'{dataset.config.path}: {dataset.num_chunks:,} chunks of {dataset.counts.describe()}')
    print(describe_sizes(settings, rows.take(range(embedded)), np.concatenate(vectors), chunks, rate))


def sample_rows(datasets, tokenizer, blocks=8):
    """Rows of some blocks of the datasets, in a random order, and of no more than that."""
    dice, found = np.random.default_rng(0), []
    sizes = np.array([dataset.num_chunks for dataset in datasets], dtype=float)
    for number in dice.choice(len(datasets), size=blocks, p=sizes / sizes.sum()):
        start = int(dice.integers(datasets[number].num_chunks))
        chosen = np.arange(start, min(start + 512, datasets[number].num_chunks))
        found.append(as_part(chosen, datasets[number], tokenizer).rows)
    joined = Rows(*(np.concatenate([getattr(rows, name) for rows in found]) if isinstance(value, np.ndarray) else
                    [item for rows in found for item in getattr(rows, name)]
                    for name, value in vars(found[0]).items()))
    return joined.take(dice.permutation(len(joined.id)))


def read_options(arguments):
    """{option: whether it is on} of populate's own, and the other arguments. UserError if a value is none."""
    options, others = dict.fromkeys(OPTIONS, False), []
    for argument in arguments:
        name, has_value, value = argument.removeprefix('--').partition('=')
        if name not in OPTIONS or not argument.startswith('--'):
            others.append(argument)
        elif has_value and value not in ('True', 'False'):
            raise UserError(f'{argument!r} is none of --{name}=True and --{name}=False: choose one')
        else:
            options[name] = value != 'False'
    return options, others


def main():
    options, arguments = read_options(sys.argv[1:])
    if '--help' in arguments or '-h' in arguments:
        print(__doc__, *(f'  --{name}=False\n        {text}' for name, text in OPTIONS.items()), '', sep='\n')
    settings = load_settings(arguments, can_dry_run=True)
    settings.retrieval_offline = False  # that is for runs: filling needs the database
    check_documents(settings)
    if options['bulk'] and is_local(settings.retrieval_milvus_uri):
        raise UserError('--bulk=True is of no use to Milvus Lite, which imports no files: leave it out, or name a '
                        'server in retrieval_milvus_uri')
    if options['bulk']:
        open_folder(settings.retrieval_bulk_dir)
    with Ranks() as ranks:
        settings = take_from_collection(settings, named_settings(arguments),
                                        print if ranks.is_master else lambda news: None, settings.dry_run)
        if settings.dry_run:
            if ranks.world_size > 1 or options['sync'] or options['bulk']:
                raise UserError('--dry_run=True inserts and removes nothing, in one process: start it without '
                                'torchrun, --sync and --bulk')
            dry_run(settings)
            return
        if ranks.is_master:
            print(f'filling collection {settings.retrieval_collection!r}', flush=True)
        with writing(settings) if ranks.is_master else nullcontext():  # for all ranks
            done, seconds = populate(settings, sys.stderr.isatty(), options['sync'], print, ranks, options['bulk'])
        if ranks.is_master:
            report(settings, done, seconds, options['sync'], ranks.world_size)


def report(settings, done, seconds, sync, world_size):
    """Print what was done."""
    name = settings.retrieval_collection
    print(f'collection {name!r} in {settings.retrieval_milvus_uri}: {done["after"]:,} chunks, {done["added"]:,} of '
          f'them written now, {done["changed"]:,} changed documents')
    if done['textless'] or done['without_vector']:
        print(f'no rows: {done["textless"]:,} chunks without text of their own, {done["without_vector"]:,} that the '
              f'embedding model maps to zero')
    if sync:
        print(f'removed: {done["removed"]:,} chunks of {done["removed_documents"]:,} documents that train_datasets do '
              f'not hold')
    elif done['after'] > (held := done['chunks'] - done['without_vector']):
        streams = any(config.streaming for config in as_dataset_configs(settings.train_datasets, 'train_datasets'))
        print(f'{done["after"] - held:,} chunks are of documents that train_datasets do not hold'
              + ('' if streams else ': --sync=True removes them'))
    if done['added']:
        rates = {stage: done['added'] / max(seconds[stage], 1e-9) for stage in ('embed', 'insert', 'all')}
        rates['read'] = done['chunks'] / max(seconds['reading'], 1e-9)
        slowest = max(('read', 'embed', 'insert'), key=seconds.get)
        if world_size > 1:
            print(f'{rates["all"]:,.0f} chunks/s in {seconds["all"]:.0f} s, by {world_size} processes')
            return
        print(f'{rates["all"]:,.0f} chunks/s in {seconds["all"]:.0f} s | while running: read {rates["read"]:,.0f}, '
              f'embed {rates["embed"]:,.0f}, insert {rates["insert"]:,.0f} chunks/s | the slowest, {slowest}, was busy '
              f'{seconds[slowest] / seconds["all"]:.0%} of the time')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
