"""
Training sequences: runs of whole chunks from weighted datasets (chunk_store.py), in an order that is a pure function of
the seed and the documents.

A dataset's chunks, document after document, form a ring. An epoch enters it somewhere, cuts it into sequences, and
takes these in a shuffled order: each chunk once, whatever the number of ranks, micro-batches or workers. So the state
is how many sequences of each dataset are taken, and any sequence can be computed from its number alone.
"""
from dataclasses import dataclass, field, replace

import numpy as np

from configurator import UserError

ROUNDS = 6  # of the Feistel network that shuffles


@dataclass
class Batch:
    """B sequences of L chunks of C tokens, T = L * C: arrays as the stream makes them, tensors after to()."""
    tokens: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64, -1 where there is none
    doc_ids: np.ndarray  # (B, L) int64, of the document that each chunk belongs to
    chunk_ids: np.ndarray  # (B, L) int64
    is_last_chunk: np.ndarray  # (B, L) bool, of its document
    state: dict = field(default_factory=dict, repr=False)  # the stream's, after the last batch of a step
    neighbors: np.ndarray | None = None  # (B, L, K, R) int32
    neighbor_mask: np.ndarray | None = None  # (B, L, K, R) bool, True where there is a token
    pointers: np.ndarray | None = None  # (B, T, P, 3) int32: token, length of the longest match (0: none), share
    hits: np.ndarray | None = None  # (B, L, K) of HIT (retrieval/knowledge_base.py), the neighbors' ids and scores
    counts: dict = field(default_factory=dict)  # of its chunks, by what retrieval did for them
    num_targets: int | None = None  # counted by to()

    @property
    def retrieved(self):
        """What the model reads of the knowledge base: neighbors, their mask, pointers."""
        return self.neighbors, self.neighbor_mask, self.pointers

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
            return tensor if tensor.dtype in (torch.bool, torch.int32) else tensor.long()
        return replace(self, num_targets=int((self.targets >= 0).sum()),
                       **{name: as_tensor(getattr(self, name)) for name in
                          ('tokens', 'targets', 'doc_ids', 'neighbors', 'neighbor_mask', 'pointers')})


class SequenceStream:
    """
    An endless iterator of Batch, of `batch_size` sequences each, from ChunkedDatasets. A training step takes
    `step_size` sequences over all micro-batches of all ranks; this stream serves `count` of them from `first` on.
    """

    def __init__(self, datasets, block_size, batch_size, step_size=None, first=0, count=None, seed=0, state=None):
        self.datasets, self.batch_size, self.seed = datasets, batch_size, seed
        self.chunks = block_size // datasets[0].chunk_size  # L
        self.step_size, self.first = step_size or batch_size, first
        self.count = count or self.step_size
        weights = np.array([dataset.config.weight for dataset in datasets], dtype=float)
        # a weight is a share of documents: as sequences, it grows with their mean length
        shares = weights / weights.max() * [dataset.num_chunks / len(dataset) for dataset in datasets]
        self.shares = shares / shares.sum()
        self.taken = np.zeros(len(datasets), dtype=np.int64)  # sequences of each dataset, by all ranks
        self.served = 0  # of this step's `count`
        if state is not None:
            self.load_state(state)

    def state(self):
        """Plain values that load_state() takes, of whole steps."""
        return dict(taken=self.taken.tolist(), seed=self.seed, datasets=self._describe_datasets())

    def _describe_datasets(self):
        return [[dataset.hash, len(dataset), dataset.config.weight] for dataset in self.datasets]

    def load_state(self, state):
        if 'taken' not in state:
            raise UserError('the checkpoint is of an earlier version of nanoRETRO, which drew documents in another '
                            'order: start a new run from its weights with --init_from=FOLDER')
        if state['datasets'] != self._describe_datasets():
            raise UserError(f'the checkpoint was made with other train_datasets: hash, documents and weight were '
                            f'{state["datasets"]}, and are now {self._describe_datasets()}; resume with the same ones')
        if state['seed'] != self.seed:
            raise UserError(f'the checkpoint was made with seed {state["seed"]}, and the run has {self.seed}: the '
                            f'documents would come in another order; keep the seed when resuming')
        self.taken = np.array(state['taken'], dtype=np.int64)

    def _next_step(self):
        """The dataset of each of the step's sequences, and its number among those that are taken of it."""
        if len(self.datasets) == 1:
            return np.zeros(self.step_size, dtype=np.int64), self.taken[0] + np.arange(self.step_size)
        taken, drawn = self.taken.copy(), np.zeros((2, self.step_size), dtype=np.int64)
        for i in range(self.step_size):  # the one that is furthest behind its share
            dataset = int((self.shares * (taken.sum() + 1) - taken).argmax())
            drawn[:, i] = dataset, taken[dataset]
            taken[dataset] += 1
        return drawn

    def __iter__(self):
        return self

    def __next__(self):
        if self.served == 0:
            self.drawn = self._next_step()
        start = self.first + self.served
        chosen, numbers = (column[start:start + self.batch_size] for column in self.drawn)
        parts = [read_sequences(self.datasets[d], numbers[chosen == d], self.chunks, [self.seed, d])
                 for d in np.unique(chosen)]
        order = np.argsort(np.argsort(chosen, kind='stable'))
        batch = Batch(*(np.concatenate(column)[order] for column in zip(*parts, strict=True)))
        self.served += self.batch_size
        if self.served >= self.count:
            self.taken += np.bincount(self.drawn[0], minlength=len(self.datasets))
            self.served = 0
            batch.state = self.state()
        return batch


def read_sequences(dataset, numbers, L, seed):
    """
    Sequences (n,) of L chunks of a dataset, by their numbers in its endless stream: tokens (n, T), targets (n, T),
    doc_ids (n, L), chunk_ids (n, L), is_last_chunk (n, L). The last of an epoch may end in chunks without targets.
    """
    M, C = dataset.num_chunks, dataset.chunk_size
    per_epoch = -(-M // L)
    epochs, ranks = np.divmod(numbers, per_epoch)
    chunks = np.zeros((len(numbers), L), dtype=np.int64)
    is_chunk = np.zeros((len(numbers), L), dtype=bool)
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        key = [*seed, int(epoch)]
        place = shuffle(ranks[of_epoch], per_epoch, key)[:, None] * L + np.arange(L)
        is_chunk[of_epoch] = place < M
        chunks[of_epoch] = (place + np.random.default_rng(key).integers(M)) % M
    found = dataset.read(chunks.reshape(-1))
    is_chunk = is_chunk.reshape(-1)
    found.tokens[~is_chunk], found.targets[~is_chunk] = dataset.end_of_text, -1
    found.doc_ids[~is_chunk], found.ids[~is_chunk], found.is_last_chunk[~is_chunk] = 0, 0, True
    return (found.tokens.astype(np.int64).reshape(-1, L * C), found.targets.reshape(-1, L * C),
            *(values.reshape(-1, L) for values in (found.doc_ids, found.ids, found.is_last_chunk)))


def shuffle(numbers, size, seed):
    """
    Where a pseudorandom permutation of range(size) puts the numbers (n,): a Feistel network over the next even number
    of bits, repeated until it ends inside of the range. It needs no memory, however large the range.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(2**64, size=ROUNDS, dtype=np.uint64)
    found, is_outside = np.array(numbers, dtype=np.uint64), np.ones(len(numbers), dtype=bool)
    while is_outside.any():
        left, right = found[is_outside] >> half, found[is_outside] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        found[is_outside] = left << half | right
        is_outside = found >= size
    return found.astype(np.int64)


def mix(values):
    """uint64 values, each bit of which depends on all bits of the input: the finalizer of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
    return values ^ (values >> np.uint64(31))
