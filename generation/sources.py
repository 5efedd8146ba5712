"""
Where an engine's rows get neighbors and pointers from: the collection, through a retriever, or passages of one's own.
A source says whether it has_neighbors and has_pointers; retrieve() and point() give them, draft() guesses what comes
next, and name() says where a pointer was found.
"""
import numpy as np

from configurator import UserError
from retrieval.knowledge_base import FIELDS
from retrieval.match_index import index_passages

PATIENCE = 1.0  # seconds for which the exact-match index is taken to be up to date


class CollectionSource:
    """The collection that a Retriever searches, but for the document `doc_id`, which the text is of or about."""

    def __init__(self, retriever, doc_id=0):
        self.retriever, self.index, self.doc_id = retriever, retriever.index, doc_id
        self.has_neighbors, self.has_pointers = retriever.k > 0, retriever.matches is not None
        self.mode = retriever.mode  # what scores are of

    def retrieve(self, chunks):
        """Neighbors (N, K, R) of chunks (N, C), -1 where one has no token, their mask, and hits (N, K)."""
        found = self.retriever.retrieve_for_text(chunks[:, None], self.doc_id)
        return found.tokens[:, 0].astype(np.int64), found.mask[:, 0], found.hits[:, 0]

    def point(self, tokens, last=None):
        """Pointers (B, n, P, 3) of tokens (B, n), or of the `last` of them."""
        doc_ids = np.full((len(tokens), 1), self.doc_id, dtype=np.int64)
        return self.retriever.point(tokens, doc_ids, PATIENCE, last)

    def draft(self, tokens, count):
        """What followed the longest run of the last of tokens (n,): its length, and up to `count` tokens (m,)."""
        return self.index.continue_run(tokens, count) if self.has_pointers else (0, tokens[:0])

    def passages(self, hits):
        """[(name, score, text, continuation)] of hits (K,)."""
        hits = hits[hits['score'] > -np.inf]
        rows, decode = self.retriever.knowledge_base.rows(hits['id'], FIELDS), self.retriever.tokenizer.decode
        found = []
        for hit in hits[[hit['id'] in rows for hit in hits]]:  # others have been deleted since
            row = rows[hit['id']]
            continuation = [t for t in row['tokens'][self.retriever.chunk_size:]
                            if t != self.retriever.tokenizer.eot_token]
            found.append((f'{row["document"]}, chunk {row["position"] + 1}', float(hit['score']),
                          row['text'].replace('<|endoftext|>', ''), decode(continuation)))
        return found

    def names(self, places):
        """{(doc_id, place): name} of places in documents, as MatchIndex.where gives them."""
        chunk_of = {(doc_id, place): (doc_id, place // self.retriever.chunk_size) for doc_id, place in places}
        rows = self.retriever.knowledge_base.rows_at(sorted(set(chunk_of.values())), ['document'])
        return {place: f'{rows.get(chunk, {}).get("document", "a deleted row")}, chunk {chunk[1] + 1}'
                for place, chunk in chunk_of.items()}


class PassageSource:
    """
    Passages of the user's own, the same for every chunk: read as neighbors if the model has them, and pointed into if
    it has pointers. UserError if there are more than it takes.
    """

    mode = 'dense'

    def __init__(self, config, tokenizer, passages):
        self.texts, self.tokenizer = passages, tokenizer
        self.has_neighbors, self.has_pointers = config.has_neighbors, config.has_pointers
        self.count, K, R = config.retrieval_pointers, config.retrieval_k_neighbors, 2 * config.retrieval_chunk_size
        if not self.has_neighbors and not self.has_pointers:
            raise UserError('passages are given, and the model is a GPT, which reads none: leave them out')
        tokens = [np.array(tokenizer.encode_ordinary(passage), dtype=np.int64) for passage in passages]
        if any(len(t) == 0 for t in tokens):
            number = 1 + [len(t) for t in tokens].index(0)
            raise UserError(f'passage {number} is empty: give some text, or leave it out')
        if self.has_neighbors and len(tokens) > K:
            extra = '; '.join(repr(passage[:40]) for passage in passages[K:])
            raise UserError(f'{len(tokens)} passages are given, and the model reads {K} (retrieval_k_neighbors): leave '
                            f'out {extra}')
        self.cut = [i for i, t in enumerate(tokens) if self.has_neighbors and len(t) > R]  # read up to R tokens
        if self.has_neighbors:
            self.neighbors, self.mask = np.zeros((K, R), dtype=np.int64), np.zeros((K, R), dtype=bool)
            for i, t in enumerate(tokens):
                self.neighbors[i, :len(t)], self.mask[i, :len(t)] = t[:R], True
        self.index = index_passages(tokens, tokenizer.eot_token, tokenizer.n_vocab)

    def retrieve(self, chunks):
        N = len(chunks)
        return np.repeat(self.neighbors[None], N, 0), np.repeat(self.mask[None], N, 0), [None] * N

    def point(self, tokens, last=None):
        return self.index.find(tokens, np.zeros((len(tokens), 1), dtype=np.int64), self.count, last=last)

    def draft(self, tokens, count):
        return self.index.continue_run(tokens, count)

    def passages(self, hits):
        return [(f'passage {i + 1}', 1.0, text, '') for i, text in enumerate(self.texts)]

    def names(self, places):
        return {(doc_id, place): f'passage {doc_id}' for doc_id, place in places}
