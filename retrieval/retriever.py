"""
Sequences in, neighbors and pointers out. Finds the embeddings of a batch's chunks, searches the knowledge base without
leaks (leaks.py) and assembles the neighbors that the model reads; what was found once is cached (neighbor_cache.py).
Looks up where the last tokens of each position stand in the knowledge base (match_index.py).

    with closing(Retriever(settings, tokenizer)) as retriever:
        batch, = retriever.retrieve_for([batch])
"""
import hashlib
import itertools
import math
import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from configurator import UserError
from data.tokenizer import vocabulary_hash
from retrieval.embedding import Embedder, EmbedderInfo
from retrieval.knowledge_base import HIT, open_knowledge_base, state_of
from retrieval.leaks import SPARE, hits_without_leaks, search_stage
from retrieval.local_server import Unreachable
from retrieval.match_index import open_match_index, run_lengths
from retrieval.neighbor_cache import NeighborCache, cache_name
from retrieval.offline import COMMAND, check_covered, label_of, open_cache, read_records
from retrieval.suffix_array import DEPTH
from retrieval.waiting import wait_for_milvus

NONE, REMEMBERED, LOOKED_UP, EMBEDDED = range(4)  # where a chunk's hits, or the vector that found them, come from
READ_AGAIN = 3  # times, if the collection changes while it is searched
STALE = 10  # seconds for which a server may still answer from before a change


@dataclass
class Neighbors:
    """Up to K neighbors for each of B x L chunks, the best first, each a chunk and its continuation: R = 2C tokens."""
    tokens: np.ndarray  # (B, L, K, R) int32
    mask: np.ndarray  # (B, L, K, R) bool, True where there is a token
    hits: np.ndarray  # (B, L, K) of HIT: id, doc_id, and score; -inf where there is no neighbor
    origin: np.ndarray  # (B, L) NONE for a document's last chunk, else REMEMBERED, LOOKED_UP or EMBEDDED
    searched_again: np.ndarray  # (B, L) bool, since too many of the first hits would have leaked

    def to(self, device):
        """Tokens and mask as the model takes them, tensors on the device."""
        import torch
        return torch.from_numpy(self.tokens).long().to(device), torch.from_numpy(self.mask).to(device)


@dataclass
class UniqueChunks:
    """The U unique chunks of a request."""
    tokens: np.ndarray  # (U, C)
    doc_ids: np.ndarray  # (U,)
    ids: np.ndarray | None  # (U,) chunk ids, of chunks on the grid
    keys: list  # U byte strings that identify them
    vectors: np.ndarray  # (U, D), NaN until they are needed
    origin: np.ndarray  # (U,)


class Retriever:
    """
    Finds the neighbors of chunks and the pointers of tokens in the collection that the settings name, until close().
    While Milvus is unreachable it waits, and tells `say`. Pointers leave out passages that share `copied` tokens in a
    row with the text, unless it is 0. UserError if the collection does not fit the settings.
    """

    def __init__(self, settings, tokenizer, device='cpu', say=None, show_progress=False, copied=0):
        self._describe(settings, tokenizer, say, copied)
        self.index = open_match_index(settings, tokenizer, self.say, show_progress)
        self.matches = self.index if self.num_pointers else None
        # pointers and words need no embedding model
        self.embedder = (Embedder(settings.retrieval_embedding_model, device) if self.k and self.mode != 'bm25' else
                         EmbedderInfo(settings.retrieval_embedding_model, None, None))
        self.knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), self.embedder)
        try:
            self.size = self.knowledge_base.count()
            if not self.size:
                raise UserError(f'collection {settings.retrieval_collection!r} in {self.uri} is empty: fill it with '
                                f'python -m retrieval.populate CONFIG')
            if settings.retrieval_cache_gb > 0:
                self.cache = NeighborCache(settings.retrieval_cache_dir, settings.retrieval_cache_gb,
                                           cache_name(settings), self.kinds, self.say)
        except BaseException:
            self.close()
            raise

    def _describe(self, settings, tokenizer, say, copied=0):
        """What follows from the settings."""
        self.tokenizer, self.uri = tokenizer, settings.retrieval_milvus_uri
        self.timeout, self.say = settings.retrieval_timeout, say or (lambda text: print(text, file=sys.stderr))
        self.k, self.chunk_size = settings.retrieval_k_neighbors, settings.retrieval_chunk_size
        self.kept = self.k + SPARE  # M, cached: the leak rule drops different hits in different sequences
        self.reranks = settings.retrieval_rerank > 0
        self.candidates = max(self.kept, settings.retrieval_rerank)
        self.mode = settings.retrieval_mode
        self.hits_kind = (f'hits for {self.k} of {self.candidates} {self.reranks} {self.mode} '
                          f'{sorted(settings.retrieval_search_params.items())}')
        token_type = np.uint16 if tokenizer.n_vocab <= 2**16 else np.int32
        self.row_type = np.dtype([('length', np.int16), ('tokens', token_type, 2 * self.chunk_size)])
        self.cache, self.has_asked = None, False  # whether the database was asked just now
        self.revision, self.stale_until = '', time.monotonic() + STALE
        self.followed_at = -math.inf  # when the exact-match index was last seen to be up to date
        self.num_pointers, self.copied = settings.retrieval_pointers, copied
        self.pointers_kind = f'{self.num_pointers} pointers'
        self.pointer_type = np.dtype([('token', token_type), ('length', np.uint8), ('share', np.uint8)])
        self.kinds = ['rows', self.hits_kind, self.pointers_kind]

    def retrieve(self, chunks, doc_ids, is_last_chunk, chunk_ids=None):
        """
        The Neighbors of chunks (B, L, C). No chunk gets one from any of its sequence's documents doc_ids (B, L).
        Chunks that are their document's last, is_last_chunk (B, L), get none. Chunks on the grid have chunk_ids
        (B, L): they use a stored embedding if there is one, and are cached. RetrievalTimeout if Milvus is unreachable
        for too long.
        """
        return self._wait(lambda: self._retrieve(chunks, doc_ids, is_last_chunk, chunk_ids))

    def _wait(self, work):
        return wait_for_milvus(work, self.knowledge_base.open, self.timeout, self.say)

    def retrieve_for_text(self, chunks, doc_id=0):
        """
        The Neighbors of chunks (B, L, C), -1 where there is no token, of a text that is no document of the collection,
        or of one about its document `doc_id`, of which there is none then. A chunk that holds the end of a document is
        its last and gets none; end-of-text that pads a conversation in front ends nothing.
        """
        doc_ids, is_end = np.full(chunks.shape[:2], doc_id, dtype=np.int64), chunks == self.tokenizer.eot_token
        is_padding = np.logical_and.accumulate(is_end | (chunks < 0), axis=-1)
        return self.retrieve(chunks, doc_ids, (is_end & ~is_padding).any(-1) | is_padding.all(-1))

    def point(self, tokens, doc_ids=None, patience=0.0, last=None):
        """
        The pointers (B, T, P, 3) of sequences tokens (B, T) into the documents that are none of theirs, doc_ids (B, L);
        as RETRO.forward has them; those of the `last` positions, if it is given. Without doc_ids the tokens are of no
        document of the collection. Milvus is asked for changes unless it was less than `patience` seconds ago.
        """
        if doc_ids is None:
            doc_ids = np.zeros((len(tokens), 1), dtype=np.int64)

        def find():
            if time.monotonic() >= self.followed_at + patience:
                self._follow_matches()
                self.followed_at = time.monotonic()
            return self.matches.find(tokens, doc_ids, self.num_pointers, self.copied, last)
        return self._wait(find)

    def longest_runs(self, tokens, doc_ids):
        """
        For each position of sequences tokens (B, T) the longest run of tokens that ends at it and stands in a document
        of the collection that is none of the sequence's, doc_ids (B, L): (B, T). Builds an index if pointers need none.
        """
        def find():
            self.index.follow(self.knowledge_base, self._follow_revision())
            return self.index.longest_runs(tokens, doc_ids)
        return self._wait(find)

    def retrieve_for(self, batches):
        """The Batches with neighbors, pointers, hits and counts, all of one revision of the collection."""
        while True:
            found = self._add_neighbors(batches) if self.k else batches
            if not self.num_pointers:
                return found
            revision = self.revision

            def add_pointers(found=found, revision=revision):
                self._follow_matches()
                return self._add_pointers(found) if self.revision == revision or not self.k else None
            complete = self._wait(add_pointers)
            if complete is not None:
                return complete

    def _add_pointers(self, batches):
        """Pointers are remembered by chunk. A sequence of which one is missing is looked up as a whole."""
        cache = None if self.copied else self.cache  # what is left out depends on what follows, too
        keys = [pointer_keys(batch.tokens, batch.doc_ids, self.tokenizer.eot_token) for batch in batches]
        every = [key for lines in keys for line in lines for key in line]
        cached = cache.get(self.pointers_kind, every) if cache else {}
        complete, found = [], []  # a commit of the cache takes a millisecond: one for all batches
        for batch, lines in zip(batches, keys, strict=True):
            (B, L), C, P = batch.doc_ids.shape, self.chunk_size, self.num_pointers
            packed = np.zeros((B, L, C, P), dtype=self.pointer_type)
            new = []
            for b, line in enumerate(lines):
                if not (batch.targets[b] >= 0).any():  # it only fills up the batch
                    continue
                if all(key in cached for key in line):
                    packed[b] = np.frombuffer(b''.join(cached[key] for key in line), packed.dtype).reshape(L, C, P)
                else:
                    new.append(b)
            if new:
                self._ask(len(new) * L, 'chunks have no pointers')
                looked_up = self.matches.find(batch.tokens[new], batch.doc_ids[new], P, self.copied)
                looked_up = looked_up.reshape(len(new), L, C, P, 3)
                for part, name in enumerate(packed.dtype.names):
                    packed[name][new] = looked_up[..., part]
                found += [(key, chunk.tobytes()) for b in new for key, chunk in zip(lines[b], packed[b], strict=True)]
            pointers = np.empty((B, L * C, P, 3), dtype=np.int32)
            for part, name in enumerate(packed.dtype.names):
                pointers[..., part] = packed[name].reshape(B, L * C, P)
            counts = batch.counts if self.k else count_pointed_to_themselves(batch, pointers)
            complete.append(replace(batch, pointers=pointers, counts=counts))
        if cache:
            cache.put(self.pointers_kind, found)
        return complete

    def _add_neighbors(self, batches):
        """By one request, whose cost hardly depends on the number of Batches."""
        chunk_shape = (*batches[0].is_last_chunk.shape[1:], self.chunk_size)
        found = self.retrieve(np.concatenate([batch.tokens.reshape(-1, *chunk_shape) for batch in batches]),
                              *(np.concatenate([getattr(batch, name) for batch in batches])
                                for name in ('doc_ids', 'is_last_chunk', 'chunk_ids')))
        start, complete = 0, []
        for batch in batches:
            rows = slice(start, start + len(batch.tokens))
            start = rows.stop
            counts = {name: int((found.origin[rows] == origin).sum()) for name, origin in
                      (('remembered', REMEMBERED), ('looked_up', LOOKED_UP), ('embedded', EMBEDDED))}
            counts['searched_again'] = int(found.searched_again[rows].sum())
            counts |= count_found_themselves(batch, found.tokens[rows], found.hits[rows])
            complete.append(replace(batch, neighbors=found.tokens[rows], neighbor_mask=found.mask[rows],
                                    hits=found.hits[rows], counts=counts))
        return complete

    def _retrieve(self, chunks, doc_ids, is_last_chunk, chunk_ids):
        retrieves = ~is_last_chunk
        for _ in range(READ_AGAIN):
            self._follow_revision()
            self.has_asked = False
            unique, inverse = self._unique(chunks[retrieves], doc_ids[retrieves],
                                           None if chunk_ids is None else chunk_ids[retrieves])
            hits, searched_again = hits_without_leaks(lambda *asked, of=unique: self._hits(of, *asked), inverse,
                                                      np.nonzero(retrieves)[0], doc_ids, self.k, self.candidates)
            found = self._assemble(retrieves, hits, unique.origin[inverse], searched_again)
            # the cache answers for one revision; of several requests the last may see another than the first
            if not self.has_asked or self.knowledge_base.revision() == self.revision:
                return found
        raise Unreachable('the collection changes again and again while it is searched')

    def _follow_revision(self):
        """Switch the cache to the collection's current revision, which is returned; None while it changes."""
        revision = self.knowledge_base.revision()
        if revision != self.revision:
            is_first = self.revision == ''
            self.revision, self.stale_until = revision, time.monotonic() + STALE
            self.followed_at = -math.inf  # pointers of before do not go with neighbors of now
            self.size = self.knowledge_base.count()  # detects changes by other programs, which keep the revision
            if revision and not self.size:
                raise UserError(f'collection {self.knowledge_base.collection!r} in {self.uri} has been emptied: fill '
                                f'it with python -m retrieval.populate CONFIG')
            if revision and not is_first:
                self.say(f'the collection has changed: {self.size:,} chunks from now on')
            if revision is None and self.cache:
                self.say('the collection is being filled, or filling it was interrupted: no neighbors are cached until '
                         'python -m retrieval.populate has finished')
        revision = revision and state_of(revision, self.size)
        if self.cache:
            self.cache.use_revision(revision)
        return revision

    def _follow_matches(self):
        """Bring the exact-match index up to date, and the cache to what it is of."""
        revision = self._follow_revision()
        self.matches.follow(self.knowledge_base, revision)
        if self.matches.revision != revision:  # another program has changed the number of rows
            self.size = self.knowledge_base.count()
            self._follow_revision()

    def _unique(self, tokens, doc_ids, ids):
        """Deduplicate N chunks: the UniqueChunks and inverse (N,), each one's index among them."""
        table = np.column_stack([tokens, doc_ids, *([] if ids is None else [ids])]).astype(np.int64)
        keys = [hashlib.blake2b(row, digest_size=16).digest() for row in table]
        numbers = {}
        inverse = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        first = np.unique(inverse, return_index=True)[1]
        return UniqueChunks(tokens[first], doc_ids[first], None if ids is None else ids[first], list(numbers),
                            np.full((len(first), self.embedder.dimension or 0), np.nan, dtype=np.float32),
                            np.full(len(first), REMEMBERED)), inverse

    def _hits(self, chunks, wanted, stage, excluded=()):
        """
        For the unique chunks `wanted` (n,): hits (n, M) of a search stage (leaks.py), from the cache or a search, and
        which were searched just now (n,).
        """
        suffix = bytes([stage]) + b''.join(int(d).to_bytes(8, 'little', signed=True) for d in excluded)
        suffix = suffix if len(suffix) < 256 else hashlib.blake2b(suffix).digest()  # LMDB's keys are short
        keys = [chunks.keys[i] + suffix for i in wanted]
        is_cacheable = self.cache and chunks.ids is not None
        cached = self.cache.get(self.hits_kind, keys) if is_cacheable else {}
        is_new = np.array([key not in cached for key in keys], dtype=bool)
        hits = np.zeros((len(wanted), self.kept), dtype=HIT)
        hits[~is_new] = np.frombuffer(b''.join(cached[key] for key in keys if key in cached),
                                      dtype=HIT).reshape(-1, self.kept)
        if is_new.any():
            new = wanted[is_new]
            self._ask(len(new), 'chunks have no neighbors')
            vectors = None if self.mode == 'bm25' else self._vectors(chunks, new)
            texts = None if self.mode == 'dense' else np.array(self._texts(chunks, new), dtype=object)
            found = search_stage(self.knowledge_base, vectors, chunks.doc_ids[new], stage, self.candidates, excluded,
                                 self._is_stale(), texts)
            if self.mode == 'bm25':
                chunks.origin[new] = LOOKED_UP
            hits[is_new] = (self._rerank(chunks.tokens[new], found) if self.reranks else found)[:, :self.kept]
            if is_cacheable:
                self.cache.put(self.hits_kind, [(keys[i], hits[i].tobytes()) for i in np.flatnonzero(is_new)])
        return hits, is_new

    def _ask(self, count, what):
        """Called before the database or the index is asked, for what the cache has not."""
        self.has_asked = True

    def _rerank(self, tokens, hits):
        """Hits (n, M) of chunks (n, C), ordered by how much they share with the chunk, equal ones by nearness."""
        is_hit = hits['score'] > -np.inf
        ids, inverse = np.unique(hits['id'][is_hit], return_inverse=True)
        candidates = np.zeros((*hits.shape, self.chunk_size), dtype=np.int32)
        candidates[is_hit] = self._rows(ids)['tokens'][inverse, :self.chunk_size]
        steps = range(0, len(tokens), 64)  # of all at once, the pairs of tokens would not fit the processor's cache
        shared = np.concatenate([share_trigrams(tokens[i:i + 64], candidates[i:i + 64]) for i in steps])
        shared[~is_hit] = -1
        return np.take_along_axis(hits, np.argsort(-shared.round(4), axis=1, kind='stable'), axis=1)

    def _is_stale(self):
        """Whether a server has to be asked for its latest rows: only just after a change."""
        return time.monotonic() < self.stale_until

    def _vectors(self, chunks, wanted):
        """The embeddings (n, D) of the unique chunks `wanted` (n,): those of the collection's rows, or computed."""
        missing = np.unique(wanted[np.isnan(chunks.vectors[wanted, 0])])
        texts = self._texts(chunks, missing)
        rows = {} if chunks.ids is None else self.knowledge_base.rows(chunks.ids[missing], ['text', 'embedding'],
                                                                      self._is_stale())
        unknown = []
        for i, text in zip(missing, texts, strict=True):
            row = chunks.ids is not None and rows.get(chunks.ids[i])
            if row and row['text'] == text:  # the document may have changed since the collection was filled
                chunks.vectors[i], chunks.origin[i] = row['embedding'], LOOKED_UP
            else:
                unknown.append((i, text))
        if unknown:
            indices = [i for i, _ in unknown]
            chunks.vectors[indices] = self.embedder.embed([text for _, text in unknown])
            chunks.origin[indices] = EMBEDDED
        return chunks.vectors[wanted]

    def _texts(self, chunks, wanted):
        """The texts of the unique chunks `wanted` (n,), as a list, without what pads a conversation in front."""
        end = self.tokenizer.eot_token
        return [self.tokenizer.decode(list(itertools.dropwhile(lambda t: t in (-1, end), tokens)))
                for tokens in chunks.tokens[wanted].tolist()]

    def _rows(self, ids):
        """Tokens of the collection's rows (n,), as row_type: (n,) lengths and (n, R) tokens, end-of-text beyond."""
        keys = [key.tobytes() for key in ids]
        rows = self.cache.get('rows', keys) if self.cache else {}
        is_new = np.array([key not in rows for key in keys], dtype=bool)
        if is_new.any():
            self._ask(is_new.sum(), 'neighbors have no text')
            found = self.knowledge_base.rows(ids[is_new], ['tokens'], self._is_stale())
            fresh = np.zeros(len(found), dtype=self.row_type)
            fresh['tokens'] = self.tokenizer.eot_token
            for row, tokens in zip(fresh, (row['tokens'] for row in found.values()), strict=True):
                row['length'] = len(tokens)
                row['tokens'][:len(tokens)] = tokens
            items = [(np.int64(i).tobytes(), row.tobytes()) for i, row in zip(found, fresh, strict=True)]
            rows.update(items)
            if self.cache:
                self.cache.put('rows', items)
        removed = np.array((0, [self.tokenizer.eot_token] * 2 * self.chunk_size), dtype=self.row_type).tobytes()
        return np.frombuffer(b''.join(rows.get(key, removed) for key in keys), dtype=self.row_type)

    def _assemble(self, retrieves, found, origins, searched_again):
        """The Neighbors of B x L chunks, of which `retrieves` (B, L) have hits `found` (N, K). The rest is masked."""
        K, R = self.k, 2 * self.chunk_size
        hits = np.zeros((*retrieves.shape, K), dtype=HIT)
        hits['score'] = -np.inf
        hits[retrieves] = found
        is_hit = hits['score'] > -np.inf  # (B, L, K)
        ids, inverse = np.unique(hits['id'][is_hit], return_inverse=True)
        rows = self._rows(ids)
        tokens = np.full((*is_hit.shape, R), self.tokenizer.eot_token, dtype=np.int32)
        lengths = np.zeros(is_hit.shape, dtype=np.int64)
        tokens[is_hit], lengths[is_hit] = rows['tokens'][inverse], rows['length'][inverse]
        mask = np.arange(R) < lengths[..., None]
        origin, again = np.full(retrieves.shape, NONE), np.zeros(retrieves.shape, dtype=bool)
        origin[retrieves], again[retrieves] = origins, searched_again
        return Neighbors(tokens, mask, hits, origin, again)

    def close(self):
        if self.knowledge_base:
            self.knowledge_base.close()
        if self.cache:
            self.cache.close()


class OfflineRetriever(Retriever):
    """
    A Retriever of what `python -m retrieval.precompute` has stored in the cache, and of nothing else: without a
    database, an embedding model or an exact-match index. UserError where something is missing.
    """

    def __init__(self, settings, tokenizer, say=None):
        self._describe(settings, tokenizer, say)
        self.settings, self.knowledge_base, self.matches = settings, None, None
        self.embedder = EmbedderInfo(settings.retrieval_embedding_model, None, 1)
        self.cache = open_cache(settings, self.kinds)
        try:
            self.records = read_records(self.cache, settings)
            self.label = label_of(settings, vocabulary_hash(tokenizer))
            self.revision, self.size = self.records[0]['revision'], self.records[0]['rows']
            self.cache.use_revision(self.revision)
        except BaseException:
            self.close()
            raise

    def check(self, sequences_of, wanted):
        """UserError unless the first `wanted` sequences of a set (offline.py) are in the cache."""
        check_covered(self.records, self.label, sequences_of, wanted, self.settings)

    def _wait(self, work):
        return work()

    def _follow_revision(self):
        return self.revision

    def _follow_matches(self):
        pass

    def _ask(self, count, what):
        raise UserError(f'{count:,} {what} in {self.settings.retrieval_cache_dir!r}, which retrieval_offline reads '
                        f'alone: run {COMMAND}')


def open_retriever(settings, tokenizer, device='cpu', say=None):
    """The Retriever of a run."""
    if settings.retrieval_offline:
        return OfflineRetriever(settings, tokenizer, say)
    return Retriever(settings, tokenizer, device, say)


def count_found_themselves(batch, tokens, hits):
    """
    Of the chunks of a Batch that have a continuation and neighbors, tokens (B, L, K, R): how many there are, and how
    many have one that is the chunk itself with its continuation, of which a sequence's last chunk knows one token.
    Copies of a text do that, and so does a document that the collection knows by another id, which the leak rule cannot
    tell.
    """
    B, L, _, R = tokens.shape
    chunks, targets = batch.tokens.reshape(B, L, 1, R // 2), batch.targets.reshape(B, L, 1, R // 2)
    is_hit = hits['score'] > -np.inf
    goes_on = ~batch.is_last_chunk & is_hit.any(-1)
    is_same = (tokens[..., :R // 2] == chunks).all(-1) & (tokens[..., R // 2] == targets[..., -1]) & is_hit
    is_same[:, :-1] &= (tokens[:, :-1, :, R // 2:] == chunks[:, 1:]).all(-1)
    return dict(continued=int(goes_on.sum()), found_themselves=int((is_same.any(-1) & goes_on).sum()))


def pointer_keys(tokens, doc_ids, end_of_text):
    """
    For each chunk of sequences tokens (B, T), of the documents doc_ids (B, L), a byte string of all that its pointers
    depend on: its tokens, those before it that a match may hold, and the sequence's documents. B lists of L.
    """
    (B, T), L = tokens.shape, doc_ids.shape[1]
    C = T // L
    run = run_lengths(tokens, doc_ids, end_of_text)[:, ::C] - 1  # tokens of the same document before each chunk
    before = np.where(np.arange(DEPTH - 1, 0, -1) <= run[..., None], np.lib.stride_tricks.sliding_window_view(
        np.pad(tokens, ((0, 0), (DEPTH - 1, 0))), DEPTH - 1, axis=1)[:, :T:C], -1)  # (B, L, DEPTH - 1)
    documents = [np.unique(line).tobytes() for line in doc_ids]
    table = np.concatenate([before, tokens.reshape(B, L, C)], axis=2)
    return [[hashlib.blake2b(chunk.tobytes() + own, digest_size=16).digest() for chunk in line]
            for line, own in zip(table, documents, strict=True)]


def count_pointed_to_themselves(batch, pointers):
    """
    As count_found_themselves, by pointers (B, T, P, 3): of the chunks of a Batch that are not their document's last,
    those that stand elsewhere as a whole, up to the token after them, as far as matches are followed.
    """
    shape = (*batch.is_last_chunk.shape, -1)
    is_named = ((pointers[..., 0] == batch.targets[..., None]) & (pointers[..., 1] == DEPTH)).any(-1).reshape(shape)
    goes_on = ~batch.is_last_chunk
    is_same = is_named[..., DEPTH - 1:].all(-1) if is_named.shape[2] >= DEPTH else np.zeros_like(goes_on)
    return dict(continued=int(goes_on.sum()), found_themselves=int((is_same & goes_on).sum()))


def share_trigrams(chunks, candidates):
    """
    How much each of the chunks (n, C) shares with its candidates (n, M, C), (n, M): its runs of three tokens that stand
    in them, by a weight that grows e-fold from the chunk's first token to its last, since what follows it is wanted.
    """
    wanted, offered = ((t[..., :-2].astype(np.int64) << 40) | (t[..., 1:-1].astype(np.int64) << 20) | t[..., 2:]
                       for t in (chunks, candidates))
    weight = np.exp(np.linspace(0, 1, wanted.shape[1])).astype(np.float32)
    return (wanted[:, None, :, None] == offered[:, :, None, :]).any(-1) @ weight
