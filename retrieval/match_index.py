"""
The exact-match index of a collection, on disk: for every position of a text, which tokens came next where the longest
runs of its last tokens stand in the collection (suffix_array.py). It is made of the collection's rows and of nothing
else, belongs to one revision of it, and is made anew when that changes: by populate, or by whoever needs it first. All
processes of a node map the same files.

    index = open_match_index(settings, tokenizer, print)
    index.follow(knowledge_base)                       # build, or bring up to date
    pointers = index.find(tokens, doc_ids, count)      # (B, T, P, 3)

A folder holds segments, each a folder of arrays that never change, and manifest.json, which names those that are valid,
and is replaced as a whole. What was added to the collection becomes a new segment; small segments are merged, so there
are few. Documents that are gone or have changed are masked, until a merge leaves them out.
"""
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from configurator import NO_ROOM, UserError, sync, write_atomically
from data.chunk_store import map_file
from data.tokenizer import vocabulary_hash
from retrieval.local_server import Unreachable
from retrieval.neighbor_cache import short_hash
from retrieval.suffix_array import (
    DEPTH,
    PLACES,
    STRIDE,
    count_shared,
    count_tokens,
    extend_matches,
    find_matches,
    pack_tokens,
    sort_positions,
)

VERSION = 1  # of the files' layout
MANIFEST = 'manifest.json'
MOST = 1 << 26  # tokens of a segment: building one takes 40 bytes of memory for each
MASKED = 0.25  # share of a segment's tokens that are masked before it is made anew
DAMAGE = (OSError, ValueError, KeyError, IndexError, TypeError)  # of a manifest or a segment
NO_PLACES = np.zeros((0, 0, 0), dtype=np.int64)
ROWS = ('doc_id', 'position', 'tokens')
MOST_MISSING = 64  # chunks in a row
READ_AGAIN = 3  # times, while the collection changes


@dataclass
class Documents:
    """D documents' tokens, by doc_id, ascending."""
    doc_ids: np.ndarray  # (D,) int64
    hashes: np.ndarray  # (D,) int64, of the tokens
    texts: list  # D arrays of tokens, which an end-of-text ends; where tokens are missing there are two or more

    def take(self, indices):
        return Documents(self.doc_ids[indices], self.hashes[indices], [self.texts[i] for i in indices])


def open_match_index(settings, tokenizer, say, show_progress=False):
    """The MatchIndex of the collection that the settings name."""
    return MatchIndex(match_index_folder(settings, vocabulary_hash(tokenizer)), tokenizer.eot_token, tokenizer.n_vocab,
                      say, show_progress)


def index_passages(passages, end_of_text, vocab_size):
    """A MatchIndex of passages, arrays of tokens, which are the documents 1, 2, ...; it has no folder."""
    index = MatchIndex('', end_of_text, vocab_size)
    documents = Documents(np.arange(1, 1 + len(passages)), np.zeros(len(passages), dtype=np.int64),
                          [np.append(tokens, end_of_text).astype(index.token_type) for tokens in passages])
    index.segments = [Segment('passages', index_documents(documents, end_of_text, index.token_type), [])]
    return index


def match_index_folder(settings, vocabulary):
    """Where it lies; `vocabulary` is the tokenizer's hash."""
    name = short_hash(f'{settings.retrieval_milvus_uri} {settings.retrieval_collection} {vocabulary}')
    return os.path.join(os.path.expanduser(settings.retrieval_matches_dir), name)


class Segment:
    """The arrays of some documents (index_documents), of which those whose numbers are `masked` do not count."""

    def __init__(self, name, arrays, masked):
        for key, array in arrays.items():
            setattr(self, key, array)
        self.name, self.masked = name, masked
        self.is_masked = np.zeros(len(self.doc_ids), dtype=bool)
        self.is_masked[masked] = True

    def numbers(self, doc_ids):
        """The numbers of documents doc_ids (B, L) here, -1 where there is none."""
        place = np.minimum(np.searchsorted(self.doc_ids, doc_ids), len(self.doc_ids) - 1)
        return np.where(self.doc_ids[place] == doc_ids, place, -1)

    def find(self, tokens, doc_ids, run, end_of_text, copied, lengths, next_tokens, places):
        """The longest matches of sequences tokens (B, T) of documents doc_ids (B, L), as find_matches has them."""
        find_matches(self.text, self.order, self.following, self.document, self.shared, self.first, self.top,
                     self.is_masked, end_of_text, tokens, run, self.numbers(doc_ids), copied, lengths, next_tokens,
                     places)

    def places(self, tokens, doc_ids, run, end_of_text, copied=0):
        """New arrays of lengths, next tokens and places (B, T, PLACES), as find_matches has them; 0 beyond the last."""
        shape = (*tokens.shape, PLACES)
        lengths, next_tokens, places = (np.zeros(shape, dtype) for dtype in (np.uint8, self.text.dtype, np.int64))
        self.find(tokens, doc_ids, run, end_of_text, copied, lengths, next_tokens, places)
        return lengths, next_tokens, places

    def documents(self):
        """Those that are not masked, as Documents."""
        kept = np.flatnonzero(~self.is_masked)
        return Documents(self.doc_ids[kept], self.hashes[kept],
                         [self.text[self.starts[i]:self.starts[i + 1]] for i in kept])

    @property
    def live(self):
        """Tokens that are not masked."""
        return int(np.diff(self.starts)[~self.is_masked].sum())


class MatchIndex:
    """The index of a collection, in a folder. `say` receives news."""

    def __init__(self, folder, end_of_text, vocab_size, say=None, show_progress=False):
        self.folder = folder
        self.end_of_text, self.token_type = end_of_text, np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.say = say or (lambda text: print(text, file=sys.stderr))
        self.show_progress = show_progress
        self.revision, self.segments = None, []

    def follow(self, knowledge_base, revision=None):
        """
        Answer for the collection's revision from now on; build the index if there is none for it. Unreachable, if the
        collection is being changed. UserError if the folder cannot be used.
        """
        revision = revision or knowledge_base.state()
        if revision == self.revision:
            return
        self.revision, self.segments = None, []
        try:
            os.makedirs(self.folder, exist_ok=True)
            if not self._open(revision):
                with self._locked():  # another process may have built it meanwhile
                    if not self._open(revision) and not self._open(self._build(knowledge_base)):
                        raise Unreachable(f'the exact-match index in {self.folder} was removed as soon as it was built')
        except OSError as error:
            hint = 'free some space, or name' if error.errno in NO_ROOM else 'name'
            raise UserError(f'retrieval_matches_dir: {self.folder!r} cannot be used ({error.filename or ""} '
                            f'{error.strerror or error}): {hint} a folder on a local disk that you may write to'
                            ) from error

    def _open(self, revision):
        """Map the segments, if they are of this revision. Whether they are."""
        for _ in range(READ_AGAIN):  # another process may replace the manifest and remove what it named
            manifest = self._read_manifest()
            if manifest.get('revision') != revision:
                return False
            with suppress(*DAMAGE):
                self.segments = self._open_segments(manifest)
                self.revision = revision
                return True
        return False

    def _open_segments(self, manifest):
        return [Segment(s['name'], map_arrays(f'{self.folder}/{s["name"]}'), s['masked'])
                for s in manifest.get('segments', [])]

    def _read_manifest(self):
        try:
            with open(f'{self.folder}/{MANIFEST}', encoding='utf-8') as file:
                manifest = json.load(file)
            return manifest if manifest['version'] == VERSION else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    @contextmanager
    def _locked(self):
        with open(f'{self.folder}/lock', 'a') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say('waiting for another process, which is building the exact-match index')
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _build(self, knowledge_base):
        """Bring the segments up to the collection's revision, which is returned."""
        start = time.perf_counter()
        self.say(f'building the exact-match index of {knowledge_base.count():,} chunks, or bringing it up to date, in '
                 f'{self.folder}')
        for name in os.listdir(self.folder):
            if name.endswith('.tmp'):  # of a process that was killed
                remove(f'{self.folder}/{name}')
        for _ in range(READ_AGAIN):
            revision = knowledge_base.state()
            documents = read_documents(knowledge_base, f'{self.folder}/rows.tmp', self.token_type, self.end_of_text,
                                       self.say, self.show_progress)
            if knowledge_base.state() == revision:
                break
        else:
            raise Unreachable('the collection changes again and again while its exact-match index is built')
        try:
            old = self._open_segments(self._read_manifest())
        except DAMAGE:
            old = []
        kept, is_new = keep_segments(old, documents)
        plan = plan_merges(kept, documents.take(np.flatnonzero(is_new)))
        with tqdm(total=sum(len(text) for part in plan if isinstance(part, Documents) for text in part.texts),
                  desc='exact matches', unit=' tokens', unit_scale=True, leave=False,
                  disable=not self.show_progress) as bar:
            segments = [self._write(part, bar) if isinstance(part, Documents) else (part.name, part.masked)
                        for part in plan]
        manifest = dict(version=VERSION, revision=revision, segments=[
            dict(name=name, masked=[int(i) for i in masked]) for name, masked in segments])
        write_atomically(json.dumps(manifest), f'{self.folder}/{MANIFEST}')
        names = {name for name, _ in segments}
        for name in os.listdir(self.folder):
            if name.startswith('segment-') and name not in names:
                remove(f'{self.folder}/{name}')
        count = sum(len(text) for text in documents.texts)
        self.say(f'the exact-match index of {count:,} tokens is up to date after {time.perf_counter() - start:.1f} s: '
                 f'{int(is_new.sum()):,} documents were added')
        return revision

    def _write(self, documents, bar):
        """A new segment's folder, complete or not at all: its name, and that no document is masked."""
        name = f'segment-{hash_of(documents.doc_ids, documents.hashes) & (2**64 - 1):016x}'
        tmp = f'{self.folder}/{name}.tmp'
        arrays = index_documents(documents, self.end_of_text, self.token_type)
        try:
            os.makedirs(tmp, exist_ok=True)
            for key, array in arrays.items():
                with open(f'{tmp}/{key}.bin', 'wb') as file:
                    file.write(array.tobytes())
                sync(f'{tmp}/{key}.bin')
            write_atomically(json.dumps(dict(token_type=self.token_type.str, sizes={
                key: array.nbytes for key, array in arrays.items()})), f'{tmp}/meta.json')
            remove(f'{self.folder}/{name}')  # a damaged one
            os.replace(tmp, f'{self.folder}/{name}')
        except BaseException:
            remove(tmp)
            raise
        bar.update(len(arrays['text']))
        return name, []

    def find(self, tokens, doc_ids, count, copied=0, last=None):
        """
        Pointers (B, T, P, 3) int32, P = count, of sequences tokens (B, T) on the chunk grid, whose chunks belong to the
        documents doc_ids (B, L): for each position the distinct tokens that came next after the longest matches, those
        with the largest share first: token, longest match (0: there is none), and share in parts of an octave below
        all. A match ends at the position, stays in its document, and stands in none of the sequence's documents; nor,
        unless it is 0, in a passage that shares `copied` tokens in a row with the text, also with what follows. Of the
        `last` positions alone, if it is given: (B, last, P, 3).
        """
        (B, T), last = tokens.shape, last or tokens.shape[1]
        pointers = np.zeros((B, last, count, 3), dtype=np.int32)
        if not self.segments:
            return pointers
        run = run_lengths(tokens, doc_ids, self.end_of_text)
        run[:, :T - last] = 0  # which matches nothing
        lengths = np.empty((len(self.segments), B, T, PLACES), dtype=np.uint8)
        next_tokens = np.empty(lengths.shape, dtype=self.token_type)
        for i, segment in enumerate(self.segments):
            segment.find(tokens, doc_ids, run, self.end_of_text, copied, lengths[i], next_tokens[i], NO_PLACES)
        count_tokens(lengths[:, :, T - last:], next_tokens[:, :, T - last:], pointers)
        return pointers

    def longest_runs(self, tokens, doc_ids):
        """
        For each position of sequences tokens (B, T) the longest run of tokens of its chunk's document that ends at it
        and stands anywhere else in the collection: (B, T) int64. Of more than PLACES places that share DEPTH tokens,
        the rest are not followed further.
        """
        run = run_lengths(tokens, doc_ids, self.end_of_text)
        longest = np.zeros(tokens.shape, dtype=np.int64)
        for segment in self.segments:
            lengths, _, places = segment.places(tokens, doc_ids, run, self.end_of_text)
            extend_matches(segment.text, tokens, run, self.end_of_text, lengths, places, longest)
        return longest

    def where(self, tokens, doc_ids, position, copied=0):
        """
        Where the pointer at a position of the sequence tokens (T,), of documents doc_ids (L,), to the next token was
        found: (length of the match, doc_id, and the place of that token in the document), of the longest match.
        `copied` as in find().
        """
        tokens, doc_ids = tokens[None], doc_ids[None]
        run = run_lengths(tokens, doc_ids, self.end_of_text)
        if not copied:  # no more than a match matters
            part = slice(max(0, position - DEPTH + 1), position + 1)
            run = np.minimum(run[:, part], np.arange(1, part.stop - part.start + 1))
            tokens, following, position = tokens[:, part], tokens[0, position + 1], part.stop - part.start - 1
        else:
            following = tokens[0, position + 1]
        best = (0, 0, 0)
        for segment in self.segments:
            lengths, next_tokens, places = (a[0, position] for a in segment.places(tokens, doc_ids, run,
                                                                                   self.end_of_text, copied))
            for i in np.flatnonzero((next_tokens == following) & (lengths > best[0]))[:1]:
                number = int(np.searchsorted(segment.starts, places[i], side='right')) - 1
                best = (int(lengths[i]), int(segment.doc_ids[number]), int(places[i] + 1 - segment.starts[number]))
        return best

    def continue_run(self, tokens, count):
        """
        How the longest run of the last of tokens (T,) goes on: its length, and up to `count` tokens (m,) of the place
        whose next token most places of as long a run share. A document's end ends it.
        """
        run = run_lengths(tokens[None], np.zeros((1, 1), dtype=np.int64), self.end_of_text)
        run[:, :-1] = 0  # only the last position is looked up
        longest, following = 0, tokens[:0]
        for segment in self.segments:
            lengths, next_tokens, places = (a[0, -1] for a in segment.places(
                tokens[None], np.zeros((1, 1), dtype=np.int64), run, self.end_of_text))
            if lengths[0] > longest:
                longest, is_longest = int(lengths[0]), lengths == lengths[0]
                _, first, votes = np.unique(next_tokens[is_longest], return_index=True, return_counts=True)
                place = places[is_longest][first[votes.argmax()]] + 1
                following = segment.text[place:place + count].astype(np.int64)
        ends = np.flatnonzero(following == self.end_of_text)
        return longest, following[:ends[0]] if len(ends) else following


def map_arrays(folder):
    """The arrays of a segment, mapped from its folder. ValueError if it is damaged."""
    with open(f'{folder}/meta.json', encoding='utf-8') as file:
        meta = json.load(file)
    sizes = {name: os.path.getsize(f'{folder}/{name}.bin') for name in meta['sizes']}
    if sizes != meta['sizes']:
        raise ValueError(f'{folder}: files have {sizes} bytes, and should have {meta["sizes"]}')
    token_type = np.dtype(meta['token_type'])
    types = dict(text=token_type, order=np.uint32, shared=np.uint8, following=token_type, document=np.uint32,
                 first=np.int64, top=np.uint64, starts=np.int64, doc_ids=np.int64, hashes=np.int64)
    return {name: np.asarray(map_file(f'{folder}/{name}.bin', dtype)) for name, dtype in types.items()}


def read_documents(knowledge_base, path, token_type, end_of_text, say, show_progress):
    """
    All rows of the collection as Documents. A row's own chunk follows the one before it; where the next row is missing
    the continuation stands for it, and then come two or more end-of-texts, so that chunks are where they were. The rows
    lie in a file at `path` meanwhile, which is removed.
    """
    C, size = knowledge_base.metadata.chunk_size, knowledge_base.count()
    row_type = np.dtype([('doc_id', np.int64), ('position', np.int64), ('length', np.int32),
                         ('tokens', token_type, 2 * C)])
    bar = tqdm(total=size, desc='reading the collection', unit=' chunks', unit_scale=True, leave=False,
               disable=not show_progress)
    try:
        with open(path, 'wb') as file, bar:
            for rows in knowledge_base.all_rows(ROWS):
                packed = np.zeros(len(rows), dtype=row_type)
                for line, row in zip(packed, rows, strict=True):
                    tokens = row['tokens']
                    line['doc_id'], line['position'], line['length'] = row['doc_id'], row['position'], len(tokens)
                    line['tokens'][:len(tokens)] = tokens
                file.write(packed.tobytes())
                bar.update(len(rows))
        rows = map_file(path, row_type)
        if len(rows) != size:
            say(f'Milvus counts {size:,} rows of the collection and gives {len(rows):,}: pointers are into these')
        order = np.lexsort((rows['position'], rows['doc_id']))
        doc_ids, positions = rows['doc_id'][order], rows['position'][order]
        is_followed = np.zeros(len(order), dtype=bool)  # by the next chunk's row
        is_followed[:-1] = (doc_ids[1:] == doc_ids[:-1]) & (positions[1:] == positions[:-1] + 1)
        firsts = np.flatnonzero(np.diff(doc_ids, prepend=0) != 0) if len(order) else np.zeros(0, dtype=np.int64)
        if len(order) and not (len(firsts) and firsts[0] == 0):
            firsts = np.concatenate([[0], firsts])  # a doc_id of 0
        texts = []
        for start, stop in itertools.pairwise([*firsts, len(order)]):
            parts, length = [], 0
            for i in range(start, stop):
                row, place = rows[order[i]], min(int(positions[i]) * C, length + MOST_MISSING * C)
                if place > length:  # chunks that are no rows
                    parts.append(np.full(max(2, place - length), end_of_text, dtype=token_type))
                parts.append(row['tokens'][:min(row['length'], C) if is_followed[i] else row['length']])
                length = place + len(parts[-1])
            if parts[-1][-1] != end_of_text:  # the rest is no row
                parts.append(np.full(2, end_of_text, dtype=token_type))
            texts.append(np.concatenate(parts))
        return Documents(doc_ids[firsts], np.array([hash_of(text) for text in texts], dtype=np.int64), texts)
    finally:
        remove(path)


def keep_segments(segments, documents):
    """
    The segments with the documents masked that are gone or have changed, without those that hold no other; and which of
    the Documents none of them holds (D,).
    """
    is_new = np.ones(len(documents.doc_ids), dtype=bool)
    kept = []
    for segment in segments:
        place = np.minimum(np.searchsorted(documents.doc_ids, segment.doc_ids), max(0, len(documents.doc_ids) - 1))
        is_same = np.zeros(len(place), dtype=bool)
        if len(documents.doc_ids):
            is_same = ((documents.doc_ids[place] == segment.doc_ids) & (documents.hashes[place] == segment.hashes)
                       & is_new[place] & ~segment.is_masked)
        is_new[place[is_same]] = False
        if is_same.any():
            segment.is_masked = ~is_same
            segment.masked = np.flatnonzero(~is_same)
            kept.append(segment)
    return kept, is_new


def plan_merges(segments, added):
    """
    What the index is to consist of: Segments that stay, and Documents that become new ones. Those that are at most
    twice as large as all smaller ones together are merged with them, so n tokens make at most about log n segments, and
    a document is written again as often.
    """
    parts = [(segment.live, segment) for segment in segments]
    for start, stop in batches_of([len(text) for text in added.texts], MOST):
        part = added.take(range(start, stop))
        parts.append((sum(map(len, part.texts)), part))
    parts.sort(key=lambda part: part[0])
    merged, total, plan = [], 0, []
    for size, part in parts:
        is_worn = isinstance(part, Segment) and len(part.masked) and size < (1 - MASKED) * len(part.text)
        if total + size <= MOST and (not merged or size <= 2 * total):
            merged.append(part)
            total += size
        else:
            plan.append(part.documents() if is_worn else part)
    if len(merged) == 1 and not (isinstance(merged[0], Segment) and len(merged[0].masked)
                                 and total < (1 - MASKED) * len(merged[0].text)):
        return merged + plan
    return ([join_documents([part.documents() if isinstance(part, Segment) else part for part in merged])]
            if merged else []) + plan


def join_documents(parts):
    doc_ids, hashes = (np.concatenate([getattr(part, name) for part in parts]) for name in ('doc_ids', 'hashes'))
    joined = Documents(doc_ids, hashes, [text for part in parts for text in part.texts])
    return joined.take(np.argsort(doc_ids))


def batches_of(sizes, most):
    """Yields (start, stop) of runs of sizes that sum to at most `most`, or are a single one."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield start, i
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def index_documents(documents, end_of_text, token_type):
    """The arrays of a Segment."""
    text = np.concatenate([np.array([end_of_text], dtype=token_type), *documents.texts], dtype=token_type)
    starts = 1 + np.cumsum([0, *map(len, documents.texts)])
    is_end = np.append(text == end_of_text, [False, False])
    is_end[starts[1:-1]] = False  # of the next document
    order = sort_positions(text, end_of_text)
    order = order[~(is_end[order.astype(np.int64) + 1] & is_end[order.astype(np.int64) + 2])]  # what follows is missing
    largest = int(text.max())
    return dict(text=text, order=order, shared=count_shared(text, order, end_of_text),
                following=text[order.astype(np.int64) + 1],
                document=(np.searchsorted(starts, order, side='right') - 1).astype(np.uint32),
                first=np.searchsorted(text[order], np.arange(largest + 2)).astype(np.int64),
                top=pack_tokens(text)[order[::STRIDE]], starts=starts.astype(np.int64), doc_ids=documents.doc_ids,
                hashes=documents.hashes)


def run_lengths(tokens, doc_ids, end_of_text):
    """
    How many tokens of the same document end at each position of sequences tokens (B, T), whose chunks belong to doc_ids
    (B, L): (B, T) int64; 0 at an end-of-text.
    """
    (B, T), L = tokens.shape, doc_ids.shape[1]
    is_start = np.zeros((B, T), dtype=bool)
    is_start[:, ::T // L] = np.concatenate([np.ones((B, 1), dtype=bool), doc_ids[:, 1:] != doc_ids[:, :-1]], axis=1)
    is_end = tokens == end_of_text
    is_start[:, 1:] |= is_end[:, :-1]
    start = np.maximum.accumulate(np.where(is_start, np.arange(T), 0), axis=1)
    return np.where(is_end, 0, np.arange(T) - start + 1)


def hash_of(*arrays):
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), 'little', signed=True)


def remove(path):
    """Remove a file or a folder, if it is there. Who has it mapped keeps it."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        os.unlink(path)
