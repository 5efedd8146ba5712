"""
Documents, read through Hugging Face `datasets` from local files, saved folders or the hub, and put on the chunk grid.

    documents = load_documents(as_dataset_configs(['my/documents.jsonl'], 'train_datasets'))
    chunked = [chunk(document, tokenizer, chunk_size=64) for document in documents]
"""
import os
from dataclasses import asdict, dataclass, fields

import numpy as np

from configurator import UserError
from data.chunking import chunk_document, chunk_hashes, document_hash

os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

LOADERS = {'.parquet': 'parquet', '.jsonl': 'json', '.jsonl.gz': 'json', '.json': 'json', '.csv': 'csv', '.txt': 'text'}


@dataclass
class DatasetConfig:
    """One dataset: a local file, a folder of `datasets.save_to_disk`, or a dataset of the hub."""
    path: str  # FILE.parquet, .jsonl, .jsonl.gz, .json, .csv, .txt (one document), a saved folder, or a hub's name
    name: str = ''  # configuration of a hub's dataset
    split: str = 'train'  # split of a hub's dataset or of a saved folder that has several
    weight: float = 1.0  # share of the documents drawn, relative to the other datasets of the list
    text_field: str = 'text'  # column that holds the document
    id_field: str = 'id'  # column that identifies the document; without it, its file and row number do
    source: str = ''  # what the ids are unique in; default: the file's folder, or the dataset's name

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), 'number' if field.name == 'weight' else 'str'
            if not isinstance(value, dict(number=(int, float), str=str)[kind]):
                raise TypeError(f'{field.name} must be a {kind}, but is {value!r}')
        if not self.source:
            is_file = self.path.endswith(tuple(LOADERS))
            self.source = os.path.basename(os.path.dirname(os.path.abspath(self.path))) if is_file else self.path


@dataclass
class Document:
    source: str
    id: str
    text: str

    @property
    def name(self):
        return f'{self.source}/{self.id}'


@dataclass
class ChunkedDocument:
    """A document's L chunks of C tokens on the grid, as the collection and the training stream both have them."""
    document: Document
    tokens: np.ndarray  # (L, C) int32
    lengths: np.ndarray  # (L,) real tokens of each
    doc_id: int
    chunk_ids: np.ndarray  # (L,) int64

    @property
    def is_last_chunk(self):
        """(L,) bool."""
        return np.arange(len(self.tokens)) == len(self.tokens) - 1


def tokenize(document, tokenizer):
    """Token ids (n,) int32. Text that looks like a special token is text."""
    return tokenizer.encode_to_numpy(document.text, disallowed_special=()).astype(np.int32)


def chunk(document, tokenizer, chunk_size):
    """The Document as a ChunkedDocument; None if it is empty."""
    tokens = tokenize(document, tokenizer)
    if not len(tokens):
        return None
    chunks, lengths = chunk_document(tokens, chunk_size, tokenizer.eot_token)
    return ChunkedDocument(document, chunks, lengths, document_hash(document.source, document.id),
                           chunk_hashes(document.source, document.id, 0, len(chunks)))


def as_dataset_configs(entries, setting):
    """A setting's list of paths, dicts or DatasetConfigs, as DatasetConfigs. UserError if it is anything else."""
    if not entries:
        raise UserError(f'{setting} is empty: list the documents in a config file, e.g. {setting} = '
                        f"[DatasetConfig('my/documents.jsonl')]")
    configs = []
    for entry in entries:
        if isinstance(entry, str):
            entry = dict(path=entry)
        try:
            configs.append(DatasetConfig(**(entry if isinstance(entry, dict) else asdict(entry))))
        except TypeError as error:
            raise UserError(f'{setting} holds {entry!r}, which is no path and no DatasetConfig ({error})') from error
    return configs


def open_dataset(config):
    """The dataset's rows, random access. UserError if it is missing or lacks its text column."""
    import datasets  # takes a second to import
    datasets.disable_progress_bars()
    extension = next((e for e in LOADERS if config.path.endswith(e)), None)
    if extension and not os.path.isfile(config.path):
        raise UserError(f'no corpus at {config.path!r}: make it first, e.g. with python '
                        f'data/python_source/prepare.py, or name another file in the config')
    try:
        if extension:
            options = {'sample_by': 'document'} if extension == '.txt' else {}
            rows = datasets.load_dataset(LOADERS[extension], data_files=config.path, split='train', **options)
        elif os.path.isdir(config.path):
            rows = datasets.load_from_disk(config.path)
            rows = rows[config.split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(config.path, config.name or None, split=config.split)
    except Exception as error:  # the library raises many unrelated classes
        raise UserError(f'dataset {config.path!r} could not be read ({type(error).__name__}: {str(error)[:300]}): name '
                        f'a file, a folder written by save_to_disk, or a dataset that the hub has') from error
    if config.text_field not in rows.column_names:
        raise UserError(f'dataset {config.path!r} has no column {config.text_field!r}: its columns are '
                        f'{", ".join(rows.column_names)}; set text_field')
    if not len(rows):
        raise UserError(f'dataset {config.path!r} has no documents')
    return rows


def read_document(rows, index, config):
    row = rows[int(index)]
    document_id = row.get(config.id_field)
    if document_id is None:  # the same row of two files must not be the same document
        document_id = ':'.join([os.path.basename(config.path), *filter(None, [config.name]), config.split, str(index)])
    return Document(config.source, str(document_id), row[config.text_field] or '')


def load_documents(configs, rng=None):
    """Every document of every dataset once, in order, or all shuffled if `rng` (a NumPy Generator) is given."""
    datasets = [open_dataset(config) for config in configs]
    index = [(dataset, row) for dataset, rows in enumerate(datasets) for row in range(len(rows))]
    for i in rng.permutation(len(index)) if rng else range(len(index)):
        dataset, row = index[i]
        yield read_document(datasets[dataset], row, configs[dataset])
