"""
Runs the stream and the retriever ahead of the training step, in a background thread: while the model computes some
batches, the next ones' neighbors are fetched.
"""
import itertools
import queue
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class ReadyBatch:
    """What the model takes, on its device, and the stream's state after it."""
    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -1 where there is none
    documents: torch.Tensor  # (B, L)
    neighbors: torch.Tensor | None  # (B, L, K, R)
    neighbor_mask: torch.Tensor | None  # (B, L, K, R)
    state: dict


class Prefetcher:
    """
    An endless iterator of ReadyBatch. The neighbors of `ahead` batches are fetched by one search, since much of a
    search's cost is the same for few chunks as for many, and as many batches are kept ready. Without a retriever they
    have no neighbors. An exception of the thread is raised by the next call. `waited` is the seconds that callers
    stood waiting in all.
    """

    def __init__(self, stream, retriever, device, ahead=1):
        self.stream, self.retriever, self.device, self.ahead = stream, retriever, torch.device(device), ahead
        self.ready = queue.Queue(maxsize=ahead)
        self.stopping = threading.Event()
        self.waited = 0.0
        self.thread = threading.Thread(target=self._run, name='prefetch', daemon=True)
        self.thread.start()

    def _run(self):
        try:
            while not self.stopping.is_set():
                for ready in self._fetch(list(itertools.islice(self.stream, self.ahead))):
                    self._put(ready)
        except BaseException as error:  # whatever it is, it belongs to the thread that waits for the batch
            self._put(error)

    def _put(self, item):
        while not self.stopping.is_set():
            try:
                return self.ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def _fetch(self, batches):
        """The batches with their neighbors, as ReadyBatches."""
        neighbors = [(None, None)] * len(batches)
        if self.retriever is not None:
            ends = np.concatenate([batch.ends for batch in batches])
            chunks = np.concatenate([batch.tokens for batch in batches]).reshape(*ends.shape, -1)
            found = self.retriever.retrieve(chunks, np.concatenate([batch.documents for batch in batches]), ends)
            neighbors = zip(found.tokens.split(len(batches[0].ends)), found.mask.split(len(batches[0].ends)),
                            strict=True)
        for batch, found in zip(batches, neighbors, strict=True):
            tensors = [torch.from_numpy(array) for array in (batch.tokens, batch.targets, batch.documents)]
            yield ReadyBatch(*[self._to_device(tensor) for tensor in (*tensors, *found)], batch.state)

    def _to_device(self, tensor):
        if tensor is not None and self.device.type == 'cuda':
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor if tensor is None else tensor.to(self.device)

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        item = self.ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self):
        """Stop the thread. Batches that are ready and not taken are dropped; the stream's state has no part of them."""
        self.stopping.set()
        self.thread.join()
