"""
The chunk grid: a document's tokens, ended with the end-of-text token and cut from their own start into chunks of
`chunk_size`, the last one padded with end-of-text. Training sequences and collection rows are both made of these
chunks, so a chunk is the same chunk wherever it stands. Pure functions over token arrays.
"""
import hashlib

import numpy as np


def hash64(*parts):
    """A signed 64-bit hash of strings and integers, the same on every machine: Milvus' INT64 keys."""
    digest = hashlib.blake2b('\x1f'.join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little', signed=True)


def chunk_document(tokens, chunk_size, end_of_text):
    """
    tokens (n,) of one document, to its chunks (L, C) and how many tokens of each are real (L,). The end-of-text that
    ends the document is real: the model has to predict it. What follows it is padding.
    """
    count = len(tokens) // chunk_size + 1  # chunks that n tokens and one end-of-text fill
    chunks = np.full(count * chunk_size, end_of_text, dtype=np.int32)
    chunks[:len(tokens)] = tokens
    lengths = np.full(count, chunk_size, dtype=np.int32)
    lengths[-1] = len(tokens) + 1 - (count - 1) * chunk_size
    return chunks.reshape(count, chunk_size), lengths


def document_hash(source, document_id):
    """`doc_id`: the same document has the same on every machine."""
    return hash64(len(source), source, document_id)  # with its length, no two sources and ids are joined alike


def chunk_hashes(source, document_id, start, stop):
    """`id` of a document's chunks start:stop, from their positions, int64."""
    return np.array([hash64(len(source), source, document_id, position) for position in range(start, stop)],
                    dtype=np.int64)
