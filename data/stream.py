"""
Training sequences from documents: weighted datasets, cut on the chunk grid and packed into runs of whole chunks.

A sequence comes from a lane. Each lane reads its own documents one after another, so the sequences of a batch come
from different documents, and a lane's position is a few small numbers: the state that lets a resumed run see the same
batches. Which documents a lane reads depends on its index among all lanes of all ranks, so ranks share the data
without talking to each other.
"""
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from configurator import UserError
from data.documents import DatasetConfig, chunk, open_dataset, read_document

INTERLEAVE = 64  # of training: steps between two sequences of the same document


@dataclass
class Batch:
    """B sequences of L chunks of C tokens, T = L * C: arrays as the stream makes them, tensors after to()."""
    tokens: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64, -1 where there is none
    doc_ids: np.ndarray  # (B, L) int64, of the document that each chunk belongs to
    chunk_ids: np.ndarray  # (B, L) int64
    is_last_chunk: np.ndarray  # (B, L) bool, of its document
    state: dict = field(default_factory=dict, repr=False)  # the stream's state after this batch
    neighbors: np.ndarray | None = None  # (B, L, K, R) int32
    neighbor_mask: np.ndarray | None = None  # (B, L, K, R) bool, True where there is a token
    hits: np.ndarray | None = None  # (B, L, K) of HIT (retrieval/knowledge_base.py), the neighbors' ids and scores
    counts: dict = field(default_factory=dict)  # of its chunks: remembered, looked_up, embedded, searched_again
    num_targets: int | None = None  # counted by to()

    def rows(self, index):
        """The batch of some of its sequences, by a slice; before they have neighbors."""
        return replace(self, **{name: getattr(self, name)[index] for name in
                                ('tokens', 'targets', 'doc_ids', 'chunk_ids', 'is_last_chunk')})

    def to(self, device):
        """The batch with what the model takes as tensors on a torch.device."""
        import torch

        def as_tensor(array):
            if array is None:
                return None
            tensor = torch.from_numpy(array)
            if device.type == 'cuda':
                tensor = tensor.pin_memory().to(device, non_blocking=True)
            return tensor if tensor.dtype == torch.bool else tensor.long()
        return replace(self, num_targets=int((self.targets >= 0).sum()),
                       **{name: as_tensor(getattr(self, name)) for name in
                          ('tokens', 'targets', 'doc_ids', 'neighbors', 'neighbor_mask')})


class SequenceStream:
    """
    An endless iterator of Batch, of `batch_size` sequences each. A training step takes `lanes` sequences over all
    micro-batches of all ranks; this stream serves the `count` of them from `first` on. `interleave` sets of lanes
    take turns, step by step, so that the sequences of a long document lie that many steps apart. Documents are drawn
    in a shuffled order, each once before any is drawn again.
    """

    def __init__(self, configs: list[DatasetConfig], tokenizer, chunk_size, block_size, batch_size, lanes=None, first=0,
                 count=None, interleave=1, seed=0, state=None):
        self.configs = configs
        self.datasets = [open_dataset(config) for config in configs]
        weights = np.array([config.weight for config in configs], dtype=float)
        if not ((weights > 0) & np.isfinite(weights)).all():
            raise UserError(f'dataset weights must be positive and finite, but are {weights.tolist()}')
        weights = weights / weights.max()  # the sum of large ones would overflow
        self.weights = weights / weights.sum()
        self.tokenizer, self.chunk_size, self.chunks = tokenizer, chunk_size, block_size // chunk_size
        lanes = lanes or batch_size
        interleave = min(interleave, max(1, sum(map(len, self.datasets)) // lanes))  # no more lanes than documents
        self.batch_size, self.seed = batch_size, seed
        self.total_lanes, self.scatter = lanes * interleave, interleave > 1
        self.permutation = lru_cache(maxsize=2 * len(configs))(self._permutation)
        self.lanes = [Lane(self, turn * lanes + first + i) for turn in range(interleave) for i in range(count or lanes)]
        self.positions = [lane.position() for lane in self.lanes]
        self.turn = 0  # the lane that the next batch begins with
        if state is not None:
            self.load_state(state)

    def state(self):
        """Plain numbers that load_state() takes."""
        return dict(total_lanes=self.total_lanes, seed=self.seed, turn=self.turn, positions=list(self.positions),
                    datasets=self._describe_datasets())

    def _describe_datasets(self):
        return [[config.source, len(rows), config.weight]
                for config, rows in zip(self.configs, self.datasets, strict=True)]

    def load_state(self, state):
        if state['datasets'] != self._describe_datasets():
            raise UserError(f'the checkpoint was made with other train_datasets: source, documents and weight were '
                            f'{state["datasets"]}, and are now {self._describe_datasets()}; resume with the same ones')
        if (state['total_lanes'], state['seed'], len(state['positions'])) != (self.total_lanes, self.seed,
                                                                              len(self.lanes)):
            raise UserError(f'the checkpoint was made with other settings of the data ({state["total_lanes"]} lanes in '
                            f'all, {len(state["positions"])} on this rank, seed {state["seed"]}; the run has '
                            f'{self.total_lanes}, {len(self.lanes)} and {self.seed}): keep batch_size, '
                            f'gradient_accumulation_steps, seed and the number of processes when resuming')
        self.turn, self.positions = state['turn'], list(state['positions'])
        for lane, position in zip(self.lanes, self.positions, strict=True):
            lane.move_to(position)

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
        sequences = [self.lanes[i].take(self.chunks) for i in serving]
        for i in serving:
            self.positions[i] = self.lanes[i].position()
        self.turn = (self.turn + self.batch_size) % len(self.lanes)
        return Batch(*(np.stack(column) for column in zip(*sequences, strict=True)), self.state())


class Lane:
    """
    Reads its documents one after another. Its position is how many chunks of the current document are taken (0
    between documents) and how many documents it has drawn from each dataset.
    """

    def __init__(self, stream, index):
        self.stream, self.index = stream, index
        self.drawn = [0] * len(stream.datasets)
        self.offset = 0
        self.current = None  # a ChunkedDocument

    def position(self):
        return [self.offset, *self.drawn]

    def move_to(self, position):
        self.offset, *self.drawn = position
        self.current = None
        if self.offset:  # undo the draw of the document that it is in; take() opens it again
            self.drawn[self.stream.pick_dataset(self.index, sum(self.drawn) - 1)] -= 1

    def open_next_document(self):
        """Draw the next document that is not empty. If the stream scatters, a lane's first is entered midway."""
        stream, empty = self.stream, 0
        while True:
            draw = sum(self.drawn)
            dataset = stream.pick_dataset(self.index, draw)
            rows = stream.datasets[dataset]
            epoch, rank = divmod(self.drawn[dataset] * stream.total_lanes + self.index, len(rows))
            self.drawn[dataset] += 1
            document = read_document(rows, stream.permutation(dataset, epoch)[rank], stream.configs[dataset])
            self.current = chunk(document, stream.tokenizer, stream.chunk_size)
            if self.current:
                break
            empty += 1
            if empty > len(rows):
                raise UserError(f'dataset {stream.configs[dataset].path!r} has only empty documents')
        if draw == 0 and stream.scatter and not self.offset:
            chunks = len(self.current.tokens)
            self.offset = int(np.random.default_rng([stream.seed, self.index]).integers(chunks))

    def take(self, count):
        """The next `count` chunks: tokens (T,), targets (T,), doc_ids (L,), chunk_ids (L,), is_last_chunk (L,)."""
        parts = []
        while count:
            if self.current is None:
                self.open_next_document()
            stop = min(self.offset + count, len(self.current.tokens))
            parts.append(cut(self.current, self.offset, stop))
            count -= stop - self.offset
            self.offset = stop
            if stop == len(self.current.tokens):
                self.current, self.offset = None, 0
        return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def cut(chunked, start, stop):
    """
    Chunks start:stop of a ChunkedDocument: tokens and targets, flat, doc_ids, chunk_ids and is_last_chunk. A token's
    target is the next token of its document. Padding is no target, and the end-of-text has none.
    """
    size = chunked.tokens.shape[1]
    tokens = chunked.tokens[start:stop].reshape(-1).astype(np.int64)
    following = chunked.tokens.reshape(-1)[start * size + 1:stop * size + 1]
    end = chunked.lengths.sum() - 1  # position of the end-of-text, the last token that is predicted
    targets = np.full(len(tokens), -1, dtype=np.int64)
    targets[:len(following)] = np.where(np.arange(start * size, start * size + len(following)) < end, following, -1)
    return (tokens, targets, np.full(stop - start, chunked.doc_id, dtype=np.int64), chunked.chunk_ids[start:stop],
            chunked.is_last_chunk[start:stop])
