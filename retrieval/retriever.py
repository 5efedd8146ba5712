"""
Chunks in, neighbors out: finds the embeddings of a batch's chunks, searches the knowledge base, drops what would leak,
and assembles what the model reads. What was found once is remembered (memory.py).
"""
import hashlib
import sys
import time
from dataclasses import dataclass

import numpy as np

from configurator import UserError
from data.tokenizer import vocabulary_hash
from retrieval.embedding import Embedder
from retrieval.knowledge_base import HIT, Unreachable, open_knowledge_base
from retrieval.memory import Memory

# A chunk's hits are often of its own document, which it must not read, so a search asks for more than k. Chunks for
# which that was not enough search again, together, for many more, and in the last stage with their document filtered
# out. A filter is a search for each document, which is why it comes last.
SPARE = 6  # hits beyond k that are asked for at first, and kept of any stage's
LIMITS = (0, 32, 128, 1024)  # rows asked for by stage, or k + SPARE or retrieval_rerank if that is more
FILTERED = len(LIMITS)  # the last stage

NOWHERE, REMEMBERED, LOOKED_UP, EMBEDDED = range(4)  # where a chunk's hits, or the vector that found them, are from
STALE = 10  # seconds for which a server may still answer from before a change
LONGEST_PAUSE = 5  # seconds between two attempts to reach a Milvus that is away


class RetrievalTimeout(UserError):
    """Milvus has been away for longer than retrieval_timeout."""
    exit_code = 3


@dataclass
class Neighbors:
    """Up to K neighbors for each of B x L chunks, the best first, each a chunk and its continuation: R = 2C tokens."""
    tokens: np.ndarray  # (B, L, K, R) int32
    mask: np.ndarray  # (B, L, K, R) bool, True where there is a token
    hits: np.ndarray  # (B, L, K) of HIT: id, doc_id, and score, the cosine; -inf where there is no neighbor
    origin: np.ndarray  # (B, L) NOWHERE for a document's last chunk, else REMEMBERED, LOOKED_UP or EMBEDDED
    again: np.ndarray  # (B, L) bool, searched again since too many of the hits would have leaked


@dataclass
class Chunks:
    """The U different chunks of a request."""
    tokens: np.ndarray  # (U, C)
    documents: np.ndarray  # (U,) their doc_ids
    ids: np.ndarray | None  # (U,) chunk ids, of chunks on the grid
    keys: list  # U byte strings that tell them apart
    vectors: np.ndarray  # (U, D), those that were needed so far
    origin: np.ndarray  # (U,)


class Retriever:
    """
    Finds the neighbors of chunks. The collection must have been made with the same settings (see train.py). `address`
    is where a local database is served, where it is. While Milvus is away retrieve() waits, and tells `say`.
    """

    def __init__(self, settings, tokenizer, device='cpu', address=None, say=None):
        self.tokenizer, self.uri = tokenizer, settings['retrieval_milvus_uri']
        self.timeout, self.say = settings['retrieval_timeout'], say or (lambda text: print(text, file=sys.stderr))
        self.k, self.chunk_size = settings['retrieval_k_neighbors'], settings['retrieval_chunk_size']
        self.kept = self.k + SPARE  # M
        self.reranks = settings['retrieval_rerank'] > 0
        self.candidates = max(self.kept, settings['retrieval_rerank'])
        self.hits_kind = f'hits for {self.k} of {self.candidates} {self.reranks}'
        token_type = np.uint16 if tokenizer.n_vocab <= 2**16 else np.int32
        self.row_type = np.dtype([('length', np.int16), ('tokens', token_type, 2 * self.chunk_size)])
        self.memory = None
        self.state, self.latest_until = '', time.monotonic() + STALE
        self.embedder = Embedder(settings['retrieval_embedding_model'], device)
        self.knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), self.embedder, address=address)
        try:
            self.size = self.knowledge_base.count()
            if not self.size:
                raise UserError(f'collection {settings["retrieval_collection"]!r} in {self.uri} is empty: fill it with '
                                f'python -m retrieval.populate CONFIG')
            if settings['retrieval_cache_gb'] > 0:
                self.memory = Memory(settings['retrieval_cache_dir'], settings['retrieval_cache_gb'],
                                     f'{self.uri} {settings["retrieval_collection"]}', ['rows', self.hits_kind])
        except BaseException:
            self.close()
            raise

    def retrieve(self, chunks, documents, ends, chunk_ids=None):
        """
        Neighbors of chunks (B, L, C). No chunk gets one from any of its sequence's documents (B, L), which are
        doc_ids; chunks that are their document's last, `ends` (B, L), get none. Chunks on the grid have chunk_ids
        (B, L): they use a stored embedding where there is one, and are remembered. RetrievalTimeout where Milvus is
        away for too long.
        """
        away_since, pause = None, 0.5
        while True:
            try:
                if away_since:
                    self.knowledge_base.open(timeout=max(1.0, self.timeout - time.monotonic() + away_since))
                neighbors = self._retrieve(chunks, documents, ends, chunk_ids)
                if away_since:
                    self.say(f'Milvus is back after {time.monotonic() - away_since:.0f} s')
                return neighbors
            except Unreachable as error:
                away_since = away_since or time.monotonic()
                away = time.monotonic() - away_since
                if away >= self.timeout:
                    raise RetrievalTimeout(f'waited {away:.0f} s for Milvus, and retrieval_timeout is '
                                           f'{self.timeout:.0f}: {error}') from error
                self.say(f'waiting for Milvus: {away:.0f} s of at most {self.timeout:.0f} s ({error})')
                time.sleep(min(pause, self.timeout - away))
                pause = min(2 * pause, LONGEST_PAUSE)

    def retrieve_for_text(self, chunks):
        """
        Neighbors of chunks (B, L, C) of a text that is of no document of the collection. A chunk that holds the end of
        a document is its last and gets none.
        """
        nowhere = np.zeros(chunks.shape[:2], dtype=np.int64)
        return self.retrieve(chunks, nowhere, (chunks == self.tokenizer.eot_token).any(-1))

    def _retrieve(self, chunks, documents, ends, chunk_ids):
        if self.memory:
            self._follow_state()
        asking = np.argwhere(~ends)  # (N, 2) row and place
        ids = None if chunk_ids is None else chunk_ids[~ends]
        different, of = self._different(chunks[~ends], documents[~ends], ids)
        own = documents[asking[:, 0]]  # (N, L) the documents of each one's sequence
        best = np.zeros((len(asking), self.k), dtype=HIT)
        again = np.zeros(len(asking), dtype=bool)
        starved = np.arange(len(asking))
        for stage in range(FILTERED + 1):
            if 0 < stage < FILTERED and LIMITS[stage] <= self.candidates:
                continue  # the first has asked for as many
            which, at = np.unique(of[starved], return_inverse=True)
            hits, searched = self._hits(different, which, stage)
            best[starved] = keep(hits[at], ~is_any_of(hits['doc_id'][at], own[starved]), self.k)
            again[starved] |= searched[at] & (stage > 0)
            starved = starved[best['score'][starved, -1] == -np.inf]
            if not len(starved):
                break
        for row in np.unique(asking[starved, 0]):  # its other documents stood in the way
            some = starved[asking[starved, 0] == row]
            hits, searched = self._hits(different, of[some], FILTERED, np.unique(documents[row]))
            best[some], again[some] = hits[:, :self.k], again[some] | searched
        return self._assemble(ends, best, different.origin[of], again)

    def _follow_state(self):
        """Have the memory speak of what the collection holds now."""
        state = self.knowledge_base.state()
        if state != self.state:
            self.state, self.latest_until = state, time.monotonic() + STALE
            self.size = self.knowledge_base.count()  # it tells of changes by others, who leave the state as it is
            if state is None:
                self.say('the collection is being filled, or a filling was broken off: until python -m '
                         'retrieval.populate has ended, no neighbors are remembered')
        self.memory.go_over_to(state and f'{state} {self.size}')

    def _different(self, tokens, documents, ids):
        """The different ones among N chunks, as Chunks, and for each of the N its place among them."""
        table = np.column_stack([tokens, documents, *([] if ids is None else [ids])]).astype(np.int64)
        keys = [hashlib.blake2b(row, digest_size=16).digest() for row in table]
        places = {}
        of = np.array([places.setdefault(key, len(places)) for key in keys], dtype=np.int64)
        first = np.unique(of, return_index=True)[1]
        return Chunks(tokens[first], documents[first], None if ids is None else ids[first], list(places),
                      np.full((len(first), self.embedder.dimension), np.nan, dtype=np.float32),
                      np.full(len(first), REMEMBERED)), of

    def _hits(self, chunks, which, stage, not_in_documents=()):
        """
        Of the chunks `which` (n,): hits (n, M) that are not of their own document, nor of `not_in_documents`, which
        the last stage takes; and which of them were searched for now, (n,).
        """
        suffix = bytes([stage]) + b''.join(int(d).to_bytes(8, 'little', signed=True) for d in not_in_documents)
        suffix = suffix if len(suffix) < 256 else hashlib.blake2b(suffix).digest()  # LMDB's keys are short
        keys = [chunks.keys[i] + suffix for i in which]
        remembered = self.memory.get(self.hits_kind, keys) if self.memory and chunks.ids is not None else {}
        new = np.array([key not in remembered for key in keys], dtype=bool)
        hits = np.zeros((len(which), self.kept), dtype=HIT)
        hits[~new] = np.frombuffer(b''.join(remembered[key] for key in keys if key in remembered),
                                   dtype=HIT).reshape(-1, self.kept)
        if new.any():
            hits[new] = self._search(chunks, which[new], stage, not_in_documents)
            if self.memory and chunks.ids is not None:
                self.memory.put(self.hits_kind, [(keys[i], hits[i].tobytes()) for i in np.flatnonzero(new)])
        return hits, new

    def _search(self, chunks, which, stage, not_in_documents):
        """As _hits, from the knowledge base."""
        vectors, own, latest = self._vectors(chunks, which), chunks.documents[which], self._latest()
        if len(not_in_documents):
            found = self.knowledge_base.search(vectors, self.candidates, not_in_documents, latest)
        elif stage < FILTERED:
            found = self.knowledge_base.search(vectors, max(LIMITS[stage], self.candidates), latest=latest)
            found = keep(found, found['doc_id'] != own[:, None], self.candidates)
        else:
            found = np.zeros((len(which), self.candidates), dtype=HIT)
            for document in np.unique(own):
                found[own == document] = self.knowledge_base.search(vectors[own == document], self.candidates,
                                                                    [document], latest)
        return self._rerank(chunks.tokens[which], found)[:, :self.kept]

    def _rerank(self, tokens, found):
        """Hits (n, M) of chunks (n, C), those first that share most with the chunk, of equal ones the nearer."""
        if not self.reranks:
            return found
        there = found['score'] > -np.inf
        ids, at = np.unique(found['id'][there], return_inverse=True)
        candidates = np.zeros((*found.shape, self.chunk_size), dtype=np.int32)
        candidates[there] = self._rows(ids)['tokens'][at, :self.chunk_size]
        some = range(0, len(tokens), 64)  # for all at once the pairs of tokens would not stay in the processor's cache
        shared = np.concatenate([share_trigrams(tokens[i:i + 64], candidates[i:i + 64]) for i in some])
        shared[~there] = -1
        return np.take_along_axis(found, np.argsort(-shared.round(4), axis=1, kind='stable'), axis=1)

    def _latest(self):
        """Whether a server has to wait for what was written last: only just after a change that may be among it."""
        return time.monotonic() < self.latest_until

    def _vectors(self, chunks, which):
        """The embeddings (n, D) of the chunks `which`: those of the collection's rows, or else computed."""
        need = np.unique(which[np.isnan(chunks.vectors[which, 0])])
        texts = [self.tokenizer.decode(tokens) for tokens in chunks.tokens[need].tolist()]
        stored = {} if chunks.ids is None else self.knowledge_base.rows(chunks.ids[need], ['text', 'embedding'],
                                                                          self._latest())
        unknown = []
        for i, text in zip(need, texts, strict=True):
            row = chunks.ids is not None and stored.get(chunks.ids[i])
            if row and row['text'] == text:  # a document may have changed since the collection was filled
                chunks.vectors[i], chunks.origin[i] = row['embedding'], LOOKED_UP
            else:
                unknown.append((i, text))
        if unknown:
            places = [i for i, _ in unknown]
            chunks.vectors[places], chunks.origin[places] = self.embedder.embed([text for _, text in unknown]), EMBEDDED
        return chunks.vectors[which]

    def _rows(self, ids):
        """Tokens of the collection's rows (n,), as row_type: (n,) lengths and (n, R) tokens, end-of-text beyond."""
        keys = [key.tobytes() for key in ids]
        rows = self.memory.get('rows', keys) if self.memory else {}
        new = np.array([key not in rows for key in keys], dtype=bool)
        if new.any():
            found = self.knowledge_base.rows(ids[new], ['tokens'], self._latest())
            fresh = np.zeros(len(found), dtype=self.row_type)
            fresh['tokens'] = self.tokenizer.eot_token
            for row, tokens in zip(fresh, (row['tokens'] for row in found.values()), strict=True):
                row['length'] = len(tokens)
                row['tokens'][:len(tokens)] = tokens
            items = [(np.int64(i).tobytes(), row.tobytes()) for i, row in zip(found, fresh, strict=True)]
            rows.update(items)
            if self.memory:
                self.memory.put('rows', items)
        gone = np.array((0, [self.tokenizer.eot_token] * 2 * self.chunk_size), dtype=self.row_type).tobytes()
        return np.frombuffer(b''.join(rows.get(key, gone) for key in keys), dtype=self.row_type)

    def _assemble(self, ends, best, origin, again):
        """The Neighbors of chunks (B, L) from those of the N that asked. What is absent is masked end-of-text."""
        there = best['score'] > -np.inf  # (N, K)
        ids, at = np.unique(best['id'][there], return_inverse=True)
        rows = self._rows(ids)
        hits = np.zeros((*ends.shape, self.k), dtype=HIT)
        hits['score'] = -np.inf
        hits[~ends] = best
        there = hits['score'] > -np.inf  # (B, L, K)
        tokens = np.full((*there.shape, 2 * self.chunk_size), self.tokenizer.eot_token, dtype=np.int32)
        lengths = np.zeros(there.shape, dtype=np.int64)
        tokens[there], lengths[there] = rows['tokens'][at], rows['length'][at]
        mask = np.arange(2 * self.chunk_size) < lengths[..., None]
        of = np.full(ends.shape, NOWHERE), np.zeros(ends.shape, dtype=bool)
        of[0][~ends], of[1][~ends] = origin, again
        return Neighbors(tokens, mask, hits, *of)

    def close(self):
        self.knowledge_base.close()
        if self.memory:
            self.memory.close()


def share_trigrams(chunks, candidates):
    """
    How much of each of the chunks (n, C) stands in its candidates (n, M, C), (n, M): the runs of three tokens that do,
    by a weight that grows e-fold from the chunk's first token to its last, since what they go on to is what is asked.
    """
    wanted, there = ((t[..., :-2].astype(np.int64) << 40) | (t[..., 1:-1].astype(np.int64) << 20) | t[..., 2:]
                     for t in (chunks, candidates))
    weight = np.exp(np.linspace(0, 1, wanted.shape[1])).astype(np.float32)
    return (wanted[:, None, :, None] == there[:, :, None, :]).any(-1) @ weight


def is_any_of(documents, own):
    """Which of the documents (n, M) are among own (n, L)."""
    return (documents[:, :, None] == own[:, None, :]).any(-1)


def keep(hits, allowed, count):
    """The first `count` of the hits (n, M) that are `allowed` (n, M), in their order; fewer end in score -inf."""
    allowed = allowed & (hits['score'] > -np.inf)
    order = np.argsort(~allowed, axis=1, kind='stable')[:, :count]
    kept = np.take_along_axis(hits, order, axis=1)
    kept['score'][~np.take_along_axis(allowed, order, axis=1)] = -np.inf
    return kept
