"""
Where an engine's rows get neighbors and pointers from: the collection, through a retriever, or passages of one's own.
A source has has_neighbors and has_pointers, retrieve(), point() and draft().
"""
import numpy as np

PATIENCE = 1.0  # seconds for which the exact-match index is taken to be up to date


class CollectionSource:
    """The collection that a Retriever searches."""

    def __init__(self, retriever):
        self.retriever = retriever
        self.has_neighbors, self.has_pointers = retriever.k > 0, retriever.matches is not None

    def retrieve(self, chunks):
        """Neighbors (N, K, R) of chunks (N, C), -1 where one has no token, their mask, and hits (N, K)."""
        found = self.retriever.retrieve_for_text(chunks[:, None])
        return found.tokens[:, 0].astype(np.int64), found.mask[:, 0], found.hits[:, 0]

    def point(self, tokens):
        """Pointers (B, n, P, 3) of tokens (B, n)."""
        return self.retriever.point(tokens, patience=PATIENCE)

    def draft(self, tokens, count):
        """What followed the longest run of the last of tokens (n,): its length, and up to `count` tokens (m,)."""
        if not self.has_pointers:
            return 0, tokens[:0]
        return self.retriever.matches.continue_run(tokens, count)
