"""
Reads a dataset onto the chunk grid, into a folder that chunk_store.py opens:

    tokens.bin     (M, C) all chunks, uint16 or int32, in the order in which they were read
    chunk_ids.bin  (M,) int64
    documents.bin  (D,) DOCUMENT
    doc_ids.bin    (D,) int64, ascending
    ends.bin       (D,) int64, how many chunks all documents up to this one have
    names.jsonl    id, name and origin of a document a line
    meta.json      counts, a hash of all documents, sizes

Nothing here grows with the number of documents but these files: the table of documents is sorted in parts, and so it is
found out whether two of them have one identity.
"""
import functools
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain

import numpy as np

from configurator import UserError, sync, write_atomically
from data.chunking import chunk_document, chunk_hashes, document_hash, hash64
from data.tokenizer import tokenize

DOCUMENT = np.dtype([('doc_id', np.int64), ('text_hash', np.int64),
                     ('first', np.int64),  # place of its first chunk in tokens.bin
                     ('count', np.int64),  # chunks; 0 if its text is empty
                     ('length', np.int64),  # tokens, the end-of-text included
                     ('name', np.int64)])  # place in names.jsonl
BATCH_BYTES = 1 << 22  # of text that is read before it is tokenized
SLICE_BYTES = 1 << 16  # of text that one thread tokenizes at a time
SORTED_TOGETHER = 1 << 20  # documents that are sorted in memory


def build(folder, documents, counts, tokenizer, chunk_size, say, path, is_block=False, more=None):
    """
    Read Documents, which are counted in `counts`, into a new folder, complete or not at all. `more`, a dict, goes to
    its meta.json, as it is when all are read. Of two different documents with one identity a block keeps the first.
    """
    tmp = f'{folder}.tmp'
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    try:
        token_type = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.int32)
        read_into(tmp, documents, tokenizer, chunk_size, token_type, say, path)
        digest = sort_documents(tmp, counts, is_block)
        write_atomically(json.dumps(dict(
            counts=asdict(counts), hash=digest, chunk_size=chunk_size, token_type=token_type.str, **(more or {}),
            sizes={name: os.path.getsize(f'{tmp}/{name}') for name in os.listdir(tmp)})), f'{tmp}/meta.json')
        for name in os.listdir(tmp):
            sync(f'{tmp}/{name}')
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(tmp, folder)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def read_into(folder, documents, tokenizer, chunk_size, token_type, say, path):
    """Write tokens, chunk ids, names, and DOCUMENTs in the order in which they are read."""
    placed, named, said = 0, 0, time.monotonic()
    with (open(f'{folder}/tokens.bin', 'wb') as tokens_file, open(f'{folder}/chunk_ids.bin', 'wb') as ids_file,
          open(f'{folder}/read.bin', 'wb') as read_file, open(f'{folder}/names.jsonl', 'wb') as names_file):
        for batch in in_batches(documents, BATCH_BYTES):
            records = np.zeros(len(batch), DOCUMENT)
            encoded = threads().map(lambda some: [tokenize(document.text, tokenizer) for document in some],
                                    in_batches(batch, SLICE_BYTES))
            for record, document, tokens in zip(records, batch, chain.from_iterable(encoded), strict=True):
                chunks, lengths = chunk_document(tokens, chunk_size, tokenizer.eot_token)
                count = len(chunks) if len(tokens) else 0
                ids = chunk_hashes(document.source, document.id, 0, count)
                record['doc_id'] = document_hash(document.source, document.id)
                record['text_hash'] = hash64(document.text)
                record['first'], record['count'], record['length'] = placed, count, lengths.sum()
                record['name'] = named
                tokens_file.write(chunks[:count].astype(token_type).tobytes())
                ids_file.write(ids.tobytes())
                named += names_file.write(json.dumps([document.id, document.name, document.where]).encode() + b'\n')
                placed += count
            records.tofile(read_file)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                say(f'reading {path}: {read_file.tell() // DOCUMENT.itemsize:,} documents, {placed:,} chunks')


@functools.cache
def threads():
    """Those that tokenize, always the same: tiktoken keeps memory for each that it has seen."""
    return ThreadPoolExecutor(os.cpu_count())


def in_batches(documents, most):
    """Yields lists of Documents with about `most` bytes of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 100
        if size > most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def sort_documents(folder, counts, is_block=False):
    """
    Write the documents by doc_id, each once, and count duplicates. A hash of all of them. UserError if two different
    ones have one identity; in a block the later one is a duplicate.
    """
    digest, total = hashlib.blake2b(digest_size=8), 0
    with (open(f'{folder}/documents.bin', 'wb') as documents_file, open(f'{folder}/doc_ids.bin', 'wb') as ids_file,
          open(f'{folder}/ends.bin', 'wb') as ends_file):
        for rows in partitions(folder):
            rows = rows[np.argsort(rows['doc_id'], kind='stable')]
            is_repeated = np.zeros(len(rows), dtype=bool)
            is_repeated[1:] = rows['doc_id'][1:] == rows['doc_id'][:-1]
            differing = np.flatnonzero(is_repeated[1:] & (rows['text_hash'][1:] != rows['text_hash'][:-1]))
            if len(differing) and not is_block:
                with open(f'{folder}/names.jsonl', 'rb') as file:
                    both = []
                    for row in rows[differing[0]:differing[0] + 2]:
                        file.seek(row['name'])
                        both.append(json.loads(file.readline()))
                raise two_documents(*both)
            counts.duplicates += int((rows['count'][is_repeated] > 0).sum())
            counts.documents -= int((rows['count'][is_repeated] > 0).sum())
            rows = rows[~is_repeated]
            ends = total + np.cumsum(rows['count'])
            total = int(ends[-1]) if len(ends) else total
            has_text = rows['count'] > 0
            digest.update(np.stack([rows['doc_id'], rows['text_hash']], axis=1)[has_text].tobytes())
            rows.tofile(documents_file)
            rows['doc_id'].tofile(ids_file)
            ends.tofile(ends_file)
    os.unlink(f'{folder}/read.bin')
    return digest.hexdigest()


def partitions(folder):
    """Yields the DOCUMENTs of read.bin in parts that can be sorted in memory, by ascending ranges of doc_ids."""
    count = os.path.getsize(f'{folder}/read.bin') // DOCUMENT.itemsize
    bits = max(0, int(count // SORTED_TOGETHER).bit_length())
    if not bits:
        yield np.fromfile(f'{folder}/read.bin', DOCUMENT)
        return
    paths = [f'{folder}/part-{part}.bin' for part in range(2**bits)]
    with open(f'{folder}/read.bin', 'rb') as file:
        while len(rows := np.fromfile(file, DOCUMENT, SORTED_TOGETHER)):
            part = (rows['doc_id'] >> (64 - bits)) + 2**(bits - 1)  # doc_ids are signed
            for number in np.unique(part):
                with open(paths[number], 'ab') as part_file:
                    rows[part == number].tofile(part_file)
    for path in paths:
        if os.path.exists(path):
            yield np.fromfile(path, DOCUMENT)
            os.unlink(path)


def two_documents(one, other):
    """The error of two different documents with one identity, each (id, name, where)."""
    what = f'id {one[0]!r}' if one[0] == other[0] else f'hash of the ids {one[0]!r} and {other[0]!r}'
    return UserError(f'two different documents have the {what}: {one[2]}, and {other[2]}; give each an id of its own, '
                     f"name a column that tells them apart in id_field, or tell datasets apart with a source, such as "
                     f"DatasetConfig(..., source='manuals')")
