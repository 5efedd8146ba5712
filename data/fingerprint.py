"""
What a prepared corpus holds, so that figures can say what they were measured on: two corpora compare if and only if
their fingerprints are equal. prepare.py stores it as corpus.json beside the files.
"""
import hashlib
import json
import os
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configurator import UserError, write_atomically
from data.documents import as_dataset_configs

FILE = 'corpus.json'
ROWS = 1000  # of a file, that are written together


def fingerprint(splits):
    """
    {split: (id, text) of each document} to a dict of its hash, 16 hex digits, and each split's number of documents and
    UTF-8 bytes. The hash depends on every id and text and on their order.
    """
    digest, described = hashlib.blake2b(digest_size=8), {}
    for split, documents in sorted(splits.items()):
        count = size = 0
        for document_id, text in documents:
            data = text.encode()
            digest.update(f'{split}\0{document_id}\0{len(data)}\0'.encode() + data)
            count += 1
            size += len(data)
        described[split] = dict(documents=count, bytes=size)
    return dict(hash=digest.hexdigest(), **described)


def write_fingerprint(found, folder):
    write_atomically(json.dumps(found, indent=1) + '\n', os.path.join(folder, FILE))


def write_splits(splits, folder):
    """
    Write {split: iterable of (id, text)} as Parquet files, and their corpus.json, in the memory that a part of them
    takes. UserError if a split has no documents.
    """
    (folder / FILE).unlink(missing_ok=True)  # it must not name other files than it is of
    paths = {split: folder / f'{split}.parquet' for split in splits}
    try:
        found = fingerprint({split: write_rows(documents, f'{paths[split]}.tmp')
                             for split, documents in splits.items()})
        for split, path in paths.items():
            if not found[split]['documents']:
                raise UserError(f'the {split} split has no documents: name another source, or another share')
            os.replace(f'{path}.tmp', path)
    finally:
        for path in paths.values():
            Path(f'{path}.tmp').unlink(missing_ok=True)
    write_fingerprint(found, folder)
    for split in splits:
        print(f'{split:6} {found[split]["documents"]:12,} documents {found[split]["bytes"]:16,} bytes')
    print(f'fingerprint {found["hash"]}')


def write_rows(documents, path):
    """Yields the (id, text) of documents, which are then in a Parquet file."""
    schema = pa.schema([('id', pa.string()), ('text', pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        while rows := list(islice(documents, ROWS)):
            writer.write_table(pa.table([pa.array(column) for column in zip(*rows, strict=True)], schema=schema))
            yield from rows


def describe_corpus(datasets):
    """
    One line that names the corpora of a list of datasets: of a prepared one the folder and its hash, of any other the
    path alone, whose figures are not comparable.
    """
    names = []
    for config in as_dataset_configs(datasets, 'datasets'):
        folder, name = os.path.split(os.path.abspath(config.path))
        try:
            with open(os.path.join(folder, FILE), encoding='utf-8') as file:
                found = json.load(file)
            is_prepared = isinstance(found, dict) and 'hash' in found and name.removesuffix('.parquet') in found
        except (OSError, ValueError):
            is_prepared = False
        names.append(f'{os.path.basename(folder)} {found["hash"]}' if is_prepared else config.path)
    return ', '.join(dict.fromkeys(names))
