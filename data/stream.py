"""
Training sequences from documents: weighted datasets, read through Hugging Face `datasets`, cut on the chunk grid and
packed into runs of whole chunks.

A sequence comes from a lane. Each lane reads its own documents one after another, so the sequences of a batch come
from different documents, and a lane's place is a few small numbers: the state that makes a resumed run see the same
batches. Which documents a lane reads depends on its index among all lanes of all ranks, so ranks share the data
without talking to each other.
"""
import os
from dataclasses import asdict, dataclass, field
from functools import lru_cache

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
    id_field: str = 'id'  # column that names the document; without it, its file and row number do
    source: str = ''  # what the ids are unique in; default: the file's folder, or the dataset's name

    def __post_init__(self):
        if not self.source:
            local = self.path.endswith(tuple(LOADERS))
            self.source = os.path.basename(os.path.dirname(os.path.abspath(self.path))) if local else self.path


@dataclass
class Document:
    source: str
    id: str
    text: str

    def tokens(self, tokenizer):
        """Token ids (n,). Text that looks like a special token is text."""
        return tokenizer.encode_to_numpy(self.text, disallowed_special=()).astype(np.int32)


@dataclass
class Batch:
    """B sequences of L chunks of C tokens, T = L * C, as arrays."""
    tokens: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64, -1 where there is none
    documents: np.ndarray  # (B, L) int64, hash of the document that each chunk belongs to
    chunk_ids: np.ndarray  # (B, L) int64
    ends: np.ndarray  # (B, L) bool, the chunk is its document's last
    state: dict = field(repr=False)  # the stream's state after this batch


def as_dataset_configs(entries, setting):
    """A setting's list of paths, dicts or DatasetConfigs, as DatasetConfigs. UserError where it is none."""
    if not entries:
        raise UserError(f'{setting} is empty: list the documents, for one {setting} = '
                        f"[DatasetConfig('my/documents.jsonl')] in a config file")
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
    """The dataset's rows, random access. UserError where it is missing or lacks its text column."""
    import datasets  # takes a second to import
    datasets.disable_progress_bars()
    extension = next((e for e in LOADERS if config.path.endswith(e)), None)
    if extension and not os.path.isfile(config.path):
        raise UserError(f'no corpus at {config.path!r}: make it first, for one with python '
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
    name = row.get(config.id_field)
    if name is None:  # the same row of two files must not be the same document
        name = ':'.join([os.path.basename(config.path), *filter(None, [config.name]), config.split, str(index)])
    return Document(config.source, str(name), row[config.text_field] or '')


def load_documents(configs, rng=None):
    """Every document of every dataset once, in order, or all shuffled where `rng` (a NumPy Generator) is given."""
    datasets = [open_dataset(config) for config in configs]
    places = [(dataset, row) for dataset, rows in enumerate(datasets) for row in range(len(rows))]
    for place in rng.permutation(len(places)) if rng else range(len(places)):
        dataset, row = places[place]
        yield read_document(datasets[dataset], row, configs[dataset])


class SequenceStream:
    """
    An endless iterator of Batch, of `batch_size` sequences each. A training step takes `lanes` sequences over all
    micro-batches of all ranks; this stream serves the `count` of them from `first` on. `interleave` sets of lanes
    take turns, step by step, so that the sequences of a long document lie that many steps apart. Documents are drawn
    in a shuffled order, each once before any is drawn again.
    """

    def __init__(self, configs, tokenizer, chunk_size, block_size, batch_size, lanes=None, first=0, count=None,
                 interleave=1, seed=0, state=None):
        self.configs = configs
        self.datasets = [open_dataset(config) for config in configs]
        weights = np.array([config.weight for config in configs], dtype=float)
        if not (weights > 0).all():
            raise UserError(f'dataset weights must be positive, but are {weights.tolist()}')
        self.weights = weights / weights.sum()
        self.tokenizer, self.chunk_size, self.chunks = tokenizer, chunk_size, block_size // chunk_size
        lanes = lanes or batch_size
        interleave = min(interleave, max(1, sum(map(len, self.datasets)) // lanes))  # no more lanes than documents
        self.batch_size, self.seed, self.all_lanes, self.scatter = batch_size, seed, lanes * interleave, interleave > 1
        self.permutation = lru_cache(maxsize=2 * len(configs))(self._permutation)
        self.own = [Lane(self, turn * lanes + first + i) for turn in range(interleave) for i in range(count or lanes)]
        self.places = [lane.place() for lane in self.own]
        self.turn = 0  # the lane that the next batch begins with
        if state is not None:
            self.load_state(state)

    def state(self):
        """Plain numbers that load_state() takes."""
        return dict(all_lanes=self.all_lanes, seed=self.seed, turn=self.turn, places=list(self.places),
                    datasets=self._describe_datasets())

    def _describe_datasets(self):
        return [[config.source, len(rows), config.weight]
                for config, rows in zip(self.configs, self.datasets, strict=True)]

    def load_state(self, state):
        if state['datasets'] != self._describe_datasets():
            raise UserError(f'the checkpoint was made with other train_datasets: source, documents and weight were '
                            f'{state["datasets"]}, and are now {self._describe_datasets()}; resume with the same ones')
        if (state['all_lanes'], state['seed'], len(state['places'])) != (self.all_lanes, self.seed, len(self.own)):
            raise UserError(f'the checkpoint was made with other settings of the data ({state["all_lanes"]} lanes in '
                            f'all, {len(state["places"])} on this rank, seed {state["seed"]}; the run has '
                            f'{self.all_lanes}, {len(self.own)} and {self.seed}): keep batch_size, '
                            f'gradient_accumulation_steps, seed and the number of processes when resuming')
        self.turn, self.places = state['turn'], list(state['places'])
        for lane, place in zip(self.own, self.places, strict=True):
            lane.move_to(place)

    def _permutation(self, dataset, epoch):
        return np.random.default_rng([self.seed, dataset, epoch]).permutation(len(self.datasets[dataset]))

    def pick_dataset(self, lane, draw):
        if len(self.datasets) == 1:
            return 0
        return int(np.random.default_rng([self.seed, lane, draw]).choice(len(self.datasets), p=self.weights))

    def __iter__(self):
        return self

    def __next__(self):
        serving = range(self.turn, self.turn + self.batch_size)
        taken = [self.own[i].take(self.chunks) for i in serving]
        for i in serving:
            self.places[i] = self.own[i].place()
        self.turn = (self.turn + self.batch_size) % len(self.own)
        tokens, targets, documents, chunk_ids, ends = (np.stack(column) for column in zip(*taken, strict=True))
        return Batch(tokens, targets, documents, chunk_ids, ends, self.state())


class Lane:
    """
    Reads its documents one after another. Its place is how many chunks of the current document are taken (0 between
    documents) and how many documents it has drawn from each dataset.
    """

    def __init__(self, stream, index):
        self.stream, self.index = stream, index
        self.drawn = [0] * len(stream.datasets)
        self.offset = 0
        self.current = None  # the current document: tokens (L, C), real tokens a chunk (L,), source, id

    def place(self):
        return [self.offset, *self.drawn]

    def move_to(self, place):
        self.offset, *self.drawn = place
        self.current = None
        if self.offset:  # back to before the document that it is in, which is opened when it is needed
            self.drawn[self.stream.pick_dataset(self.index, sum(self.drawn) - 1)] -= 1

    def open_next_document(self):
        """Draw the next document that is not empty. Where the stream scatters, a lane's first is entered midway."""
        stream, empty = self.stream, 0
        while True:
            draw = sum(self.drawn)
            dataset = stream.pick_dataset(self.index, draw)
            rows = stream.datasets[dataset]
            epoch, place = divmod(self.drawn[dataset] * stream.all_lanes + self.index, len(rows))
            self.drawn[dataset] += 1
            document = read_document(rows, stream.permutation(dataset, epoch)[place], stream.configs[dataset])
            tokens = document.tokens(stream.tokenizer)
            if len(tokens):
                break
            empty += 1
            if empty > len(rows):
                raise UserError(f'dataset {stream.configs[dataset].path!r} has only empty documents')
        chunks, lengths = chunk_document(tokens, stream.chunk_size, stream.tokenizer.eot_token)
        self.current = chunks, lengths, document.source, document.id
        if draw == 0 and stream.scatter and not self.offset:
            self.offset = int(np.random.default_rng([stream.seed, self.index]).integers(len(chunks)))

    def take(self, count):
        """The next `count` chunks: tokens (T,), targets (T,), documents (L,), chunk_ids (L,), ends (L,)."""
        parts = []
        while count:
            if self.current is None:
                self.open_next_document()
            parts.append(cut(*self.current, self.offset, self.offset + count))
            count -= len(parts[-1][-1])
            self.offset += len(parts[-1][-1])
            if self.offset == len(self.current[0]):
                self.current, self.offset = None, 0
        return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def cut(chunks, lengths, source, document_id, start, stop):
    """
    Chunks start:stop of a document (L, C): tokens and targets, flat, and the chunks' doc_id, id, and whether each is
    the last. A token's target is the next token of its document; padding is none, and what follows the end is none.
    """
    stop = min(stop, len(chunks))
    size = chunks.shape[1]
    tokens = chunks[start:stop].reshape(-1).astype(np.int64)
    following = chunks.reshape(-1)[start * size + 1:stop * size + 1]
    last = lengths.sum() - 1  # place of the end-of-text, the last token that is predicted
    targets = np.full(len(tokens), -1, dtype=np.int64)
    targets[:len(following)] = np.where(np.arange(start * size, start * size + len(following)) < last, following, -1)
    return (tokens, targets, np.full(stop - start, document_hash(source, document_id), dtype=np.int64),
            chunk_hashes(source, document_id, start, stop), np.arange(start, stop) == len(chunks) - 1)
