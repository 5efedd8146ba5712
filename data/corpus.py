"""
A fixed text on the chunk grid: whole documents, one after another, as sequences of block_size tokens. What validation
while training and `python -m evaluation` both evaluate; it depends on neither the batch size nor the number of ranks.
"""
import heapq
from dataclasses import dataclass

import numpy as np

from configurator import UserError
from data.chunking import chunk_document
from data.stream import Batch
from data.tokenizer import token_byte_counts, tokenize


@dataclass
class Corpus:
    """Documents, one after another on the chunk grid: N chunks of C tokens, and D documents."""
    names: list  # (D,) what the documents are called
    texts: list  # (D,) what is evaluated of each
    chunks: np.ndarray  # (N, C) int32
    lengths: np.ndarray  # (N,) real tokens of each
    document: np.ndarray  # (N,) index of the document that each is of
    doc_ids: np.ndarray  # (N,) int64
    chunk_ids: np.ndarray  # (N,) int64
    position: np.ndarray  # (N,) its number in its document
    is_last_chunk: np.ndarray  # (N,) bool, the last evaluated chunk of its document

    @property
    def predicted(self):
        """(N, C) bool: the tokens that have a loss. A document's first token has none, as nothing precedes it."""
        is_real = np.arange(self.chunks.shape[1]) < self.lengths[:, None]
        is_real[self.position == 0, 0] = False
        return is_real


def read_corpus(datasets, tokenizer, max_tokens=0):
    """
    The documents of ChunkedDatasets as a Corpus, in the order of their doc_ids, up to max_tokens, where 0 means all.
    The last one is cut there, on the grid. UserError if there is no text.
    """
    def documents_of(dataset):
        for chunks in dataset.documents(max_tokens // dataset.chunk_size + 1 if max_tokens else 2**62):
            name, = dataset.names(chunks.documents[:1])
            yield int(chunks.doc_ids[0]), name, chunks.tokens, chunks.lengths, chunks.ids
    return join_documents(heapq.merge(*map(documents_of, datasets), key=lambda document: document[0]), tokenizer,
                          max_tokens)


def chunk_texts(names, texts, tokenizer, chunk_size):
    """Texts (D,) as a Corpus of another tokenizer or chunk size, without ids."""
    parts = ((0, name, *chunk_document(tokenize(text, tokenizer), chunk_size, tokenizer.eot_token), None)
             for name, text in zip(names, texts, strict=True))
    return join_documents(parts, tokenizer, 0)


def join_documents(documents, tokenizer, max_tokens):
    """A Corpus of (doc_id, name, tokens (L, C), lengths (L,), chunk ids (L,) or None) up to max_tokens."""
    parts, names, texts, total = [], [], [], 0
    for doc_id, name, tokens, lengths, ids in documents:
        count = len(tokens)
        if max_tokens and total + lengths.sum() > max_tokens:
            count = max(1, (max_tokens - total) // tokens.shape[1])
        tokens, lengths = tokens[:count], lengths[:count]
        ids = np.zeros(count, dtype=np.int64) if ids is None else ids[:count]
        parts.append((tokens, lengths, np.full(count, len(names)), np.full(count, doc_id), ids, np.arange(count),
                      np.arange(count) == count - 1))
        real = tokens.reshape(-1)[:lengths.sum()]
        names.append(name)
        texts.append(tokenizer.decode(real[real != tokenizer.eot_token].tolist()))
        total += int(lengths.sum())
        if max_tokens and total + tokens.shape[1] > max_tokens:
            break
    corpus = Corpus(names, texts, *(np.concatenate(column) for column in zip(*parts, strict=True)))
    if not chunk_bytes(corpus, tokenizer).any():
        raise UserError('there is no text to evaluate: no document is longer than a token; name others')
    return corpus


def as_sequences(corpus, block_size, multiple=1):
    """
    The corpus' chunks as one Batch of sequences of block_size tokens. Their number is padded to a multiple of
    `multiple`, by sequences without targets.
    """
    N, C = corpus.chunks.shape
    L = block_size // C
    S = -(-N // (L * multiple)) * multiple

    def in_sequences(values, fill):
        padded = np.full((S * L, *values.shape[1:]), fill, dtype=values.dtype)
        padded[:N] = values
        return padded.reshape(S, L, *values.shape[1:])

    predicted = corpus.predicted.reshape(-1)
    targets = np.full(N * C, -1, dtype=np.int64)  # of each position, the token after it
    targets[:-1] = np.where(predicted[1:], corpus.chunks.reshape(-1)[1:], -1)
    return Batch(in_sequences(corpus.chunks.astype(np.int64), 0).reshape(S, L * C),
                 in_sequences(targets.reshape(N, C), -1).reshape(S, L * C), in_sequences(corpus.doc_ids, 0),
                 in_sequences(corpus.chunk_ids, 0), in_sequences(corpus.is_last_chunk, True))


def chunk_bytes(corpus, tokenizer):
    """UTF-8 bytes of each chunk's predicted tokens, (N,)."""
    return (np.array(token_byte_counts(tokenizer))[corpus.chunks] * corpus.predicted).sum(1)


def val_batches(datasets, tokenizer, block_size, batch_size, max_tokens, rank=0, world_size=1):
    """
    This rank's Batches of the val text, of ChunkedDatasets, up to max_tokens. All ranks have as many, of batch_size
    sequences each.
    """
    corpus = read_corpus(datasets, tokenizer, max_tokens)
    sequences = as_sequences(corpus, block_size, multiple=batch_size * world_size).rows(slice(rank, None, world_size))
    return [sequences.rows(slice(start, start + batch_size)) for start in range(0, len(sequences.tokens), batch_size)]
