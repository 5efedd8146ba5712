"""
Datasets on the chunk grid, on disk: what populate, training and evaluation read. A dataset is read and tokenized once,
by whichever process comes first, into a folder of data_cache_dir, and again when one of its files has changed. All
processes map the same files, so memory holds no documents, however many there are.

    train = open_datasets(configs, tokenizer, settings)

Documents stand in the order of their doc_id, which is a hash: as good as shuffled, and the same whatever the files are
called, how many there are, and in which order they hold what. ingest.py makes a folder and says what is in it.
"""
import fcntl
import json
import mmap
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from configurator import NO_ROOM, UserError
from data.chunking import hash64
from data.documents import Counts, as_documents, find_files, look_at, open_with_datasets, read_documents
from data.ingest import DOCUMENT, SORTED_TOGETHER, build, two_documents
from data.row_stream import RowStream, wait_for_network
from data.tokenizer import tokenize, vocabulary_hash

VERSION = 1  # of a folder's layout, and of how documents are read
BLOCK = 2048  # chunks that are read together
TICK = 0.05  # seconds within which two changes of a file may have the same time


@dataclass
class Chunks:
    """N chunks of C tokens, as they stand in a dataset."""
    tokens: np.ndarray  # (N, C) int32
    lengths: np.ndarray  # (N,) real tokens of each
    targets: np.ndarray  # (N, C) int64: the next token of its document, -1 where there is none
    doc_ids: np.ndarray  # (N,) int64
    ids: np.ndarray  # (N,) int64
    positions: np.ndarray  # (N,) in their documents
    is_last_chunk: np.ndarray  # (N,) bool, of its document
    documents: np.ndarray  # (N,) numbers of their documents


class ChunkedDataset:
    """An opened folder: M chunks of D different documents, without those that drop_documents_of has left out."""

    def __init__(self, folder, config, end_of_text):
        meta = read_meta(folder)
        self.folder, self.config, self.end_of_text = folder, config, end_of_text
        self.hash, self.counts = meta['hash'], Counts(**meta['counts'])
        self.chunk_size = meta['chunk_size']
        self.tokens = map_file(f'{folder}/tokens.bin', np.dtype(meta['token_type'])).reshape(-1, self.chunk_size)
        self.chunk_ids = map_file(f'{folder}/chunk_ids.bin', np.int64)
        self.table = map_file(f'{folder}/documents.bin', DOCUMENT)
        self.doc_ids = map_file(f'{folder}/doc_ids.bin', np.int64)
        self.ends = map_file(f'{folder}/ends.bin', np.int64)
        self.names_file = open(f'{folder}/names.jsonl', 'rb')
        fcntl.flock(self.names_file, fcntl.LOCK_SH)  # as long as it is open, nobody removes the folder
        self.kept = None  # numbers of the documents that are not left out, if any are

    def close(self):
        """Let go of the folder, which may be removed then; nothing can be read any more."""
        self.names_file.close()

    def __len__(self):
        """Documents with text."""
        return self.counts.documents

    @property
    def num_chunks(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, numbers):
        """The Chunks of these numbers (N,), from 0 to num_chunks."""
        order = np.searchsorted(self.ends, numbers, side='right')
        documents = order if self.kept is None else self.kept[order]
        rows = self.table[documents]
        positions = numbers - (self.ends[order] - rows['count'])
        is_last = positions == rows['count'] - 1
        places = rows['first'] + positions
        tokens = np.asarray(self.tokens[places], dtype=np.int32)
        C = tokens.shape[1]
        lengths = np.minimum(C, rows['length'] - positions * C)
        targets = np.full(tokens.shape, -1, dtype=np.int64)
        targets[:, :-1] = np.where(np.arange(1, C) < lengths[:, None], tokens[:, 1:], -1)
        targets[~is_last, -1] = self.tokens[places[~is_last] + 1, 0]
        # the end-of-text is what a document's last token predicts, and predicts nothing itself
        return Chunks(tokens, lengths, targets, rows['doc_id'], np.asarray(self.chunk_ids[places]), positions, is_last,
                      documents)

    def blocks(self):
        """Yields numbers of chunks, BLOCK after BLOCK, and forgets in between what of the files was read."""
        for start in range(0, self.num_chunks, BLOCK):
            yield np.arange(start, min(start + BLOCK, self.num_chunks))
            for array in (self.tokens, self.chunk_ids, self.table):
                release(array)

    def documents(self, most=2**62):
        """Yields the Chunks of each document with text, up to `most` of them."""
        start = 0
        while start < self.num_chunks:
            end = int(self.ends[np.searchsorted(self.ends, start, side='right')])
            yield self.read(np.arange(start, min(end, start + most)))
            start = end

    def empty_documents(self):
        """Yields arrays of the doc_ids of documents without text."""
        for start in range(0, len(self.table), BLOCK):
            rows = self.table[start:start + BLOCK]
            yield rows['doc_id'][rows['count'] == 0]

    def describe(self, document):
        """(id, name, where it was read) of a document, by its number."""
        self.names_file.seek(self.table['name'][document])
        return json.loads(self.names_file.readline())

    def names(self, documents):
        """The names of documents (n,), by their numbers."""
        return [self.describe(document)[1] for document in documents]

    def find(self, doc_ids):
        """The numbers (n,) of the documents of these doc_ids (n,), -1 where there is none, dropped ones included."""
        place = np.searchsorted(self.doc_ids, doc_ids)
        place[place == len(self.doc_ids)] = 0
        return np.where(self.doc_ids[place] == doc_ids, place, -1) if len(self.doc_ids) else np.full(len(doc_ids), -1)

    def drop_documents_of(self, other):
        """
        Leave out the documents that another dataset holds, too. UserError if two of them have one identity and
        different texts.
        """
        is_dropped = np.zeros(len(self.table), dtype=bool)
        for start in range(0, len(self.table), SORTED_TOGETHER):
            rows = self.table[start:start + SORTED_TOGETHER]
            found = other.find(rows['doc_id'])
            same = np.flatnonzero(found >= 0)
            differing = same[other.table['text_hash'][found[same]] != rows['text_hash'][same]]
            if len(differing):
                raise two_documents(other.describe(found[differing[0]]), self.describe(start + differing[0]))
            is_dropped[start + same] = True
        if is_dropped.any():
            before = np.arange(len(self.table)) if self.kept is None else self.kept
            self.kept = before[~is_dropped[before]]
            dropped = before[is_dropped[before]]
            count = self.table['count']
            self.ends = np.cumsum(count[self.kept])
            self.counts.duplicates += int((count[dropped] > 0).sum())
            self.counts.documents -= int((count[dropped] > 0).sum())


def read_meta(folder):
    """The meta.json of a folder. ValueError if a file is not as long as it says, or it is damaged itself."""
    with open(f'{folder}/meta.json', encoding='utf-8') as file:
        meta = json.load(file)
    sizes = {name: os.path.getsize(f'{folder}/{name}') for name in meta['sizes']}
    if sizes != meta['sizes']:
        raise ValueError(f'files have {sizes} bytes, and should have {meta["sizes"]}')
    return meta


def find_meta(folder):
    """As read_meta, or None if the folder is missing or damaged."""
    try:
        return read_meta(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def map_file(path, dtype):
    """A file as a read-only array; an empty one cannot be mapped."""
    return np.memmap(path, dtype, mode='r') if os.path.getsize(path) else np.zeros(0, dtype)


def release(array):
    """Let the system forget the pages of a mapped file that were read: they would count as this process' memory."""
    base = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base
    if base is not None:
        base.madvise(mmap.MADV_DONTNEED)


def open_datasets(configs, tokenizer, settings, say=None, head=None):
    """
    The ChunkedDatasets of DatasetConfigs, read now if they have not been; of those that are streamed the documents up
    to `head` tokens. A document that several of them hold is left to the first. `say` receives news of a reading that
    takes long. UserError if something cannot be read, if there is no document, or if two different documents have one
    identity.
    """
    say = say or (lambda text: print(text, file=sys.stderr))
    found = [find_files(config) for config in configs]  # all of them, before the first is read
    for config in configs:
        if config.streaming and not head:
            raise UserError(f'{config.path!r} is streamed, and all of it is wanted here: ' + (
                'leave streaming out' if head is None else 'say how many tokens, by eval_tokens or --max_tokens'))
    opened = []
    for config, files in zip(configs, found, strict=True):
        dataset = open_dataset(config, files, tokenizer, settings, say, head if config.streaming else None)
        for other in opened:
            dataset.drop_documents_of(other)
        if not dataset.num_chunks:
            raise UserError(f'dataset {config.path!r} has no documents ' + (
                f'with text ({dataset.counts.describe()}): name another' if dataset.kept is None else
                'that no dataset before it holds: leave it out'))
        opened.append(dataset)
    return opened


def open_dataset(config, files, tokenizer, settings, say, head=None):
    """One ChunkedDataset, with its Files. If it has to be read, others are removed to make room for it."""
    C = settings.retrieval_chunk_size
    what = [VERSION, vocabulary_hash(tokenizer), C, config.what_is_read(place_of(config, files)), head]
    with usable_cache(settings) as parent:
        base = os.path.join(parent, name_of(what))
        with locked(f'{base}.lock', lambda: say(f'waiting for another process, which is reading {config.path}')):
            wait_for_tick(files)
            if files.hub:
                files.rows = open_with_datasets(config, files) if not config.streaming else wait_for_network(
                    lambda: open_with_datasets(config, files), config, files, settings.stream_timeout, say)
            state = state_of(files)
            folder = f'{base}-{name_of(state)}'
            was_whole = find_meta(folder) is not None
            if not was_whole:
                if os.path.isdir(folder):
                    say(f'{folder} is damaged: reading {config.path} again')
                remove_versions(base)
                counts = Counts()
                documents = read_documents(config, counts, files) if head is None else read_head(
                    config, counts, files, settings, say, tokenizer, head)
                build(folder, documents, counts, tokenizer, C, say, config.path, is_block=head is not None)
                if state_of(files) != state:
                    shutil.rmtree(folder)
                    raise UserError(f'{config.path!r} has changed while it was read: start again when it is complete')
            with suppress(OSError):
                os.utime(folder)  # when it was last used
            dataset = ChunkedDataset(folder, config, tokenizer.eot_token)
            if not was_whole:
                make_room(parent, settings.data_cache_gb)
            return dataset


def read_head(config, counts, files, settings, say, tokenizer, tokens):
    """Yields the first Documents of a streamed dataset, of about as many tokens, rather more."""
    rows, length = RowStream(config, files, timeout=settings.stream_timeout, say=say), 0
    while length < tokens and (some := rows.next()):
        for document in as_documents(some, config, counts, config.most_documents):
            length += len(tokenize(document.text[:8 * tokens], tokenizer)) + 1
            yield document
            if length >= tokens:
                return
        if counts.documents >= config.most_documents:
            return


def place_of(config, files):
    return config.path if files.hub else os.path.abspath(os.path.expanduser(config.path))


def name_of(what):
    """16 hex digits, of which there are others for another value."""
    return f'{hash64(what) & (2**64 - 1):016x}'


@contextmanager
def usable_cache(settings):
    """data_cache_dir, made if it is not there. UserError if it cannot be used."""
    parent = os.path.expanduser(settings.data_cache_dir)
    try:
        os.makedirs(parent, exist_ok=True)
        yield parent
    except OSError as error:
        hint = 'free some space, or name' if error.errno in NO_ROOM else 'name'
        raise UserError(f'data_cache_dir {parent!r} cannot be used ({error.filename or ""} {error.strerror or error}): '
                        f'{hint} a folder that you may write to') from error


def state_of(files):
    """A hash of the files' names, sizes and times; ctime is the one that nobody can set back."""
    if files.hub:
        return hash64(files.revision or files.rows._fingerprint)
    return hash64([(os.path.basename(path), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
                   for path, s in zip(files.paths, map(look_at, files.paths), strict=True)])


def wait_for_tick(files):
    """Let the clock of the file system go on after the last change, so that a change from now on has another time."""
    newest = max((look_at(path).st_ctime for path in files.paths), default=0)
    if 0 <= time.time() - newest < TICK:
        time.sleep(TICK)


@contextmanager
def locked(path, say_waiting):
    with open(path, 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_versions(base):
    """Remove what was made of earlier versions of the files, or was left by a process that was killed."""
    parent, name = os.path.split(base)
    for entry in os.listdir(parent):
        if entry.startswith(f'{name}-'):
            remove(os.path.join(parent, entry))


def remove(folder):
    """Remove a dataset, unless a process has it open, which may be on another machine."""
    with suppress(OSError):
        if os.path.exists(names := f'{folder}/names.jsonl') and not folder.endswith('.tmp'):
            with open(names, 'r+b') as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        else:
            shutil.rmtree(folder)


def make_room(parent, gigabytes):
    """Remove the datasets that were not used for longest, beyond a total size, and what killed processes left."""
    sizes = {}
    for entry in os.scandir(parent):
        if re.fullmatch('[0-9a-f]{16}-[0-9a-f]{16}(.tmp)?', entry.name):  # anything else is not ours
            with suppress(OSError):  # another process may be removing it
                size = sum(file.stat().st_size for file in os.scandir(entry.path))
                sizes[entry.path] = (entry.stat().st_mtime, size)
    total = sum(size for _, size in sizes.values())
    for folder in sorted(sizes, key=sizes.get):
        is_leftover = folder.endswith('.tmp')
        if is_leftover or total > gigabytes * 2**30:
            with suppress(OSError), open(f'{folder.rpartition("-")[0]}.lock', 'a') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or it is being made or opened
                remove(folder)
                total -= sizes[folder][1] if not os.path.exists(folder) else 0


def count_known(datasets, others):
    """
    How many documents of ChunkedDatasets stand in others: with the same text, under whatever id; and with the same id,
    but another text.
    """
    rows = np.concatenate([dataset.table if dataset.kept is None else dataset.table[dataset.kept]
                           for dataset in datasets])
    rows = rows[rows['count'] > 0]
    wanted = np.unique(rows['text_hash'])
    has_text, has_id = np.zeros(len(wanted), dtype=bool), np.zeros(len(rows), dtype=bool)
    for other in others:
        for start in range(0, len(other.table), SORTED_TOGETHER):
            there = other.table['text_hash'][start:start + SORTED_TOGETHER]
            place = np.minimum(np.searchsorted(wanted, there), len(wanted) - 1)
            has_text[place[wanted[place] == there]] = True
        has_id |= other.find(rows['doc_id']) >= 0
    is_same = np.isin(rows['text_hash'], wanted[has_text])
    return int(is_same.sum()), int((has_id & ~is_same).sum())
