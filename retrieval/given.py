"""
What stands in for a Retriever where the passages come with the conversations (passages = 'neighbors'): each
conversation's chunks read its passages as neighbors, and pointers name what follows its last tokens in them.
"""
from dataclasses import replace

import numpy as np

from retrieval.match_index import index_passages


class GivenPassages:
    """Gives Batches of conversations the passages that their streams have put into Batch.given."""

    size = None  # it searches nothing

    def __init__(self, settings, tokenizer):
        self.k, self.num_pointers = settings.retrieval_k_neighbors, settings.retrieval_pointers
        self.chunk_size, self.tokenizer = settings.retrieval_chunk_size, tokenizer

    def retrieve_for(self, batches):
        """The Batches with neighbors and pointers."""
        return [self._read(batch) for batch in batches]

    def _read(self, batch):
        (B, L), C, R, end = batch.doc_ids.shape, self.chunk_size, 2 * self.chunk_size, self.tokenizer.eot_token
        neighbors = np.full((B, L, self.k, R), end, dtype=np.int32) if self.k else None
        mask = np.zeros((B, L, self.k, R), dtype=bool) if self.k else None
        pointers = np.zeros((B, L * C, self.num_pointers, 3), dtype=np.int32) if self.num_pointers else None
        for b, line in enumerate(batch.given):
            for first, last, passages in line:
                for k, tokens in enumerate(passages[:self.k]):  # the last chunk's would be read by what comes after it
                    neighbors[b, first:last - 1, k, :len(tokens)] = tokens[:R]
                    mask[b, first:last - 1, k, :len(tokens)] = True
                if self.num_pointers and passages:
                    index, place = index_passages(passages, end, self.tokenizer.n_vocab), slice(first * C, last * C)
                    pointers[b, place] = index.find(batch.tokens[b:b + 1, place], np.zeros((1, 1), dtype=np.int64),
                                                    self.num_pointers)[0]
        return replace(batch, neighbors=neighbors, neighbor_mask=mask, pointers=pointers, given=None)

    def close(self):
        pass
