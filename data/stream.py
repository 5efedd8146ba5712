"""
Training sequences: runs of whole chunks from weighted datasets (chunk_store.py), in an order that is a pure function of
the seed and the documents.

A dataset's chunks, document after document, form a ring. An epoch enters it somewhere, cuts it into sequences, and
takes these in a shuffled order: each chunk once, whatever the number of ranks, micro-batches or workers. So the state
is how many sequences of each dataset are taken, and any sequence can be computed from its number alone.

With a streamed dataset (blocks.py) the sequences of a step are shared by lanes, of which each rank has as many: each
draws from the datasets and reads its own part of them. Their number stays, so that a run can go on with other ranks.
"""
from dataclasses import dataclass, field, replace

import numpy as np

from configurator import UserError
from data.blocks import Lane, StreamedDataset

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
    given: list | None = None  # of conversations: B lists of (first chunk, the one after the last, their passages)
    num_targets: int | None = None  # counted by to()

    @property
    def retrieved(self):
        """What the model reads of the knowledge base: neighbors, their mask, pointers."""
        return self.neighbors, self.neighbor_mask, self.pointers

    def rows(self, index):
        """The batch of some of its sequences, by a slice; before they have neighbors."""
        return replace(self, given=self.given and self.given[index], **{name: getattr(self, name)[index] for name in (
            'tokens', 'targets', 'doc_ids', 'chunk_ids', 'is_last_chunk')})

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
    An endless iterator of Batch, of `batch_size` sequences each, from ChunkedDatasets and StreamedDatasets. A training
    step takes `step_size` sequences over all micro-batches of all ranks; this stream serves `count` of them from
    `first` on. `say` receives news of streamed ones. UserError when all datasets have been read as often as their
    epochs say.
    """

    def __init__(self, datasets, block_size, batch_size, step_size=None, first=0, count=None, seed=0, state=None,
                 say=print):
        self.datasets, self.batch_size, self.seed, self.say = datasets, batch_size, seed, say
        self.step_size, self.first = step_size or batch_size, first
        self.count = count or self.step_size
        self.streamed = {number: d for number, d in enumerate(datasets) if isinstance(d, StreamedDataset)}
        self.chunks = block_size // datasets[0].chunk_size  # L
        weights = np.array([dataset.config.weight for dataset in datasets], dtype=float)
        shares = weights / weights.max()
        if not self.streamed:  # a weight is a share of documents: as sequences, it grows with their mean length
            shares *= [dataset.num_chunks / len(dataset) for dataset in datasets]
        self.shares = shares / shares.sum()
        self.served = 0  # of this step's `count`
        self.load_state(state)

    def state(self):
        """Plain values that load_state() takes, of whole steps; with streamed datasets of this rank's lanes."""
        state = dict(taken=sum(self.taken).tolist(), seed=self.seed, datasets=self._describe_datasets())
        if self.streamed:
            state |= dict(num_lanes=self.num_lanes, lanes={
                str(number): dict(taken=taken.tolist(), places=lane.state())
                for number, taken, lane in zip(self.numbers, self.taken, self.lanes, strict=True)})
        return state

    def _describe_datasets(self):
        return [[dataset.hash, dataset.counts.documents, dataset.config.weight] for dataset in self.datasets]

    def load_state(self, state):
        """Go on from a state, or begin, if it is None."""
        if state is not None:
            self._check_state(state)
        if not self.streamed:
            self.numbers, self.width, self.num_lanes, self.lanes = range(1), self.step_size, 1, [None]
            self.taken = [np.array(state['taken'] if state else [0] * len(self.datasets), dtype=np.int64)]
            return
        ranks, wanted = self.step_size // self.count, min(self.streamed.items())[1].settings.stream_workers
        self.num_lanes = state['num_lanes'] if state else ranks * wanted
        if self.num_lanes % ranks or self.count % (per_rank := self.num_lanes // ranks):
            raise UserError(f'{self.num_lanes} readers of streamed datasets cannot be shared by {ranks} processes with '
                            f'{self.count} sequences a step each: ' + (
                                'resume with a number of processes that divides both' if state else
                                f'make gradient_accumulation_steps a multiple of {self.num_lanes}, or lower '
                                f'stream_workers'))
        if per_rank != wanted:
            self.say(f'stream_workers is {wanted}, and the run goes on with the {self.num_lanes} readers that it began '
                     f'with: {per_rank} a process')
        self.width = self.step_size // self.num_lanes  # sequences of a step from each lane
        self.numbers = range(self.first // self.width, (self.first + self.count) // self.width)
        saved = [state['lanes'][str(number)] if state else dict(taken=[0] * len(self.datasets), places=None)
                 for number in self.numbers]
        self.taken = [np.array(lane['taken'], dtype=np.int64) for lane in saved]
        self.lanes = [Lane(self.streamed, self.chunks, number, self.num_lanes, self.seed, lane['places'],
                           self.say) for number, lane in zip(self.numbers, saved, strict=True)]

    def _check_state(self, state):
        if 'taken' not in state:
            raise UserError('the checkpoint is of an earlier version of nanoRETRO, which drew documents in another '
                            'order: start a new run from its weights with --init_from=FOLDER')
        if state['datasets'] != self._describe_datasets():
            raise UserError(f'the checkpoint was made with other train_datasets: hash, documents and weight were '
                            f'{state["datasets"]}, and are now {self._describe_datasets()}; resume with the same ones')
        if state['seed'] != self.seed:
            raise UserError(f'the checkpoint was made with seed {state["seed"]}, and the run has {self.seed}: the '
                            f'documents would come in another order; keep the seed when resuming')

    def _draw(self, lane):
        """The next sequence of one of the lanes: its ChunkedDataset, its number there, and its part of the seed."""
        taken, has_ended = self.taken[lane], np.zeros(len(self.datasets), dtype=bool)
        while not has_ended.all():
            # the one that is furthest behind its share, whatever the shares of those that have ended
            number = int(np.where(has_ended, np.inf, (taken + 0.5) / self.shares).argmin())
            dataset = self.datasets[number]
            if number in self.streamed:
                found = self.lanes[lane].next_sequence(number)
            else:
                place = int(taken[number]) * self.num_lanes + self.numbers[lane]
                most = dataset.config.epochs * -(-dataset.num_chunks // self.chunks)
                found = (dataset, place, [number]) if place < most or not most else None
            if found:
                taken[number] += 1
                return found
            has_ended[number] = True
        raise UserError(f'train_datasets are used up, after {taken.sum() * self.num_lanes:,} sequences: all have been '
                        f'read as often as their epochs say; raise these, leave them at 0, or lower max_iters')

    def __iter__(self):
        return self

    def __next__(self):
        if self.served == 0:
            drawn = [self._draw(lane) for lane in range(len(self.lanes)) for _ in range(self.width)]
            self.drawn = drawn[self.first:self.first + self.count] if not self.streamed else drawn
        together = {}  # sequences of the same dataset or block
        for row, (dataset, number, key) in enumerate(self.drawn[self.served:self.served + self.batch_size]):
            together.setdefault(tuple(key), []).append((row, number, dataset))
        parts = [read_sequences(found[0][2], np.array([number for _, number, _ in found]), self.chunks,
                                [self.seed, *key]) for key, found in together.items()]
        order = np.argsort([row for found in together.values() for row, _, _ in found])
        batch = Batch(*(np.concatenate(column)[order] for column in zip(*parts, strict=True)))
        self.served += self.batch_size
        if self.served >= self.count:
            self.served = 0
            batch.state = self.state()
            for lane in self.lanes if self.streamed else []:
                lane.drop_used()
        return batch

    def close(self):
        """End the reading processes."""
        for lane in self.lanes if self.streamed else []:
            lane.close()


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
