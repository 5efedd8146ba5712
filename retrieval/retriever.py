"""
Chunks in, neighbors out: embeds the chunks of a batch, searches the knowledge base, drops what would leak, and
assembles the tensors that the model reads.
"""
from dataclasses import dataclass

import numpy as np
import torch

from configurator import UserError
from data.tokenizer import vocabulary_hash
from retrieval.embedding import Embedder
from retrieval.knowledge_base import open_knowledge_base

OVERFETCH = 16  # hits asked for beyond k, so that k are mostly left when the leaks are dropped


@dataclass
class Neighbors:
    """Up to K neighbors for each of B x L chunks, nearest first, each a chunk and its continuation: R = 2C tokens."""
    tokens: torch.Tensor  # (B, L, K, R) int64
    mask: torch.Tensor  # (B, L, K, R) bool, True where there is a token
    rows: list  # B lists of L lists of up to K rows of the collection, dicts with their `score`


class Retriever:
    """Finds the neighbors of chunks. The collection must have been made with the same settings (see train.py)."""

    def __init__(self, settings, tokenizer, device='cpu'):
        self.tokenizer, self.uri = tokenizer, settings['retrieval_milvus_uri']
        self.k, self.chunk_size = settings['retrieval_k_neighbors'], settings['retrieval_chunk_size']
        self.embedder = Embedder(settings['retrieval_embedding_model'], device)
        self.knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), self.embedder)
        self.size = self.knowledge_base.count()
        if not self.size:
            self.close()
            raise UserError(f'collection {settings["retrieval_collection"]!r} in {self.uri} is empty: fill it with '
                            f'python -m retrieval.populate CONFIG')

    def retrieve(self, chunks, documents, ends, fields=('doc_id', 'tokens')):
        """
        Neighbors of chunks (B, L, C). No chunk gets one from any of its sequence's documents (B, L), which are
        doc_ids; chunks that are their document's last, `ends` (B, L), get none. `fields` are those of the rows.
        """
        asking = np.argwhere(~ends)  # (N, 2) batch row and place of each chunk that retrieves
        texts = [self.tokenizer.decode(chunk) for chunk in chunks[~ends].tolist()]
        vectors = self.embedder.embed(texts)
        own = [sorted(set(row.tolist())) for row in documents]  # B lists of doc_ids
        hits = self.knowledge_base.search(vectors, self.k + OVERFETCH, fields=fields)
        kept = [[hit for hit in found if hit['doc_id'] not in own[b]][:self.k]
                for found, (b, _) in zip(hits, asking, strict=True)]
        starved = np.array([len(rows) < self.k for rows in kept], dtype=bool)
        for b in np.unique(asking[starved, 0]):
            again = np.flatnonzero(starved & (asking[:, 0] == b))
            found = self.knowledge_base.search(vectors[again], self.k, not_in_documents=own[b], fields=fields)
            for i, rows in zip(again, found, strict=True):
                kept[i] = rows
        rows = [[[] for _ in row] for row in ends]
        for (b, place), found in zip(asking, kept, strict=True):
            rows[b][place] = found
        return self.assemble(rows)

    def assemble(self, rows):
        """Rows (B, L, up to K) of the collection to Neighbors. What is absent is masked, and end-of-text beneath."""
        shape = (len(rows), len(rows[0]), self.k, 2 * self.chunk_size)
        tokens = np.full(shape, self.tokenizer.eot_token, dtype=np.int64)
        lengths = np.zeros(shape[:3], dtype=np.int64)
        for b, sequence in enumerate(rows):
            for place, found in enumerate(sequence):
                for k, row in enumerate(found):
                    lengths[b, place, k] = len(row['tokens'])
                    tokens[b, place, k, :len(row['tokens'])] = row['tokens']
        mask = np.arange(shape[3]) < lengths[..., None]
        return Neighbors(torch.from_numpy(tokens), torch.from_numpy(mask), rows)

    def close(self):
        self.knowledge_base.close()
