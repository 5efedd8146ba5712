"""
What a prepared corpus holds, so that figures can say what they were measured on: two corpora compare if and only if
their fingerprints are equal. prepare.py stores it as corpus.json beside the files.
"""
import hashlib
import json
import os

from configurator import write_atomically
from data.documents import as_dataset_configs, names_of

FILE = 'corpus.json'


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


def describe_corpus(datasets):
    """
    One line that names the corpora of a list of datasets: of a prepared one the folder and its hash, of any other the
    path and subset alone, whose figures are not comparable.
    """
    names, configs = [], as_dataset_configs(datasets, 'datasets')
    for config, plain_name in zip(configs, names_of(configs), strict=True):
        folder, name = os.path.split(os.path.abspath(config.path))
        try:
            with open(os.path.join(folder, FILE), encoding='utf-8') as file:
                found = json.load(file)
            is_prepared = isinstance(found, dict) and 'hash' in found and os.path.splitext(name)[0] in found
        except (OSError, ValueError):
            is_prepared = False
        names.append(f'{os.path.basename(folder)} {found["hash"]}' if is_prepared else plain_name)
    return ', '.join(dict.fromkeys(names))
