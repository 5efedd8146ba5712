"""
A model's loss on every token of whole documents, with retrieval on and off, from which all figures of the evaluation
are summed; and bootstrap intervals for them.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from data.corpus import as_sequences
from training.checks import NotFinite

RETRIEVED_TOGETHER = 64  # sequences per request to the retriever


@dataclass
class Retrieved:
    """What was retrieved for a corpus' N chunks."""
    tokens: np.ndarray | None  # (N, K, R) int32; None without neighbors
    mask: np.ndarray | None  # (N, K, R) bool
    hits: np.ndarray | None  # (N, K) of HIT
    read: np.ndarray  # (N,) index of the chunk whose neighbors it was read with, the one before; -1 if there is none
    longest_runs: np.ndarray  # (N,) the longest run of its tokens that stands in any other document of the collection
    mode: str = 'dense'  # retrieval_mode, which the scores of the hits are of


def evaluate_corpus(model, corpus, batch_size, device, context, retriever=None, label='evaluating'):
    """
    The nats of each of the corpus' tokens, (N, C), 0 where none is predicted, by arm: 'off', and with a retriever
    'on'; and the Retrieved, or None. NotFinite if a loss is NaN or infinite.
    """
    N, C = corpus.chunks.shape
    L = model.config.block_size // C
    sequences = as_sequences(corpus, model.config.block_size)
    batches = [sequences.rows(slice(start, start + batch_size))
               for start in range(0, len(sequences.tokens), batch_size)]
    together = max(1, RETRIEVED_TOGETHER // batch_size)  # batches per request
    nats = {arm: [] for arm in (['off', 'on'] if retriever else ['off'])}  # by arm [(B, T)]
    runs = []  # [(B, T)]
    model.eval()
    bar = tqdm(total=len(sequences.tokens), unit='sequence', desc=label, dynamic_ncols=True, disable=None)
    for start in range(0, len(batches), together):
        if retriever:
            batches[start:start + together] = retriever.retrieve_for(batches[start:start + together])
            runs += [retriever.longest_runs(batch.tokens, batch.doc_ids) for batch in batches[start:start + together]]
        for batch in batches[start:start + together]:
            on_device = batch.to(torch.device(device))
            for arm, losses in nats.items():
                losses.append(token_losses(model, on_device, arm == 'on', context).cpu().numpy())
            batch.pointers = None  # they are large
            bar.update(len(batch.tokens))
    bar.close()
    # a position's loss is that of the token after it
    nats = {arm: np.concatenate([[0], np.concatenate(losses).reshape(-1)[:N * C - 1]]).astype(np.float32).reshape(N, C)
            for arm, losses in nats.items()}
    for arm, losses in nats.items():
        if not np.isfinite(losses).all():
            raise NotFinite(f'the losses with retrieval {arm} are not finite: evaluate an earlier checkpoint, or pass '
                            f'--dtype=float32')
    if not retriever:
        return nats, None

    def by_chunk(name):
        """(N, ...) of what the batches have for each chunk; None if they do not have it."""
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else np.concatenate([v.reshape(-1, *v.shape[2:]) for v in values])[:N]

    # within the chunk, of which only what is predicted counts as one of its tokens
    runs = np.minimum(np.concatenate(runs).reshape(-1, C)[:N], np.arange(1, C + 1))
    runs = (runs * (np.arange(C) < corpus.lengths[:, None])).max(1)
    previous = np.arange(N) - 1
    has_previous = (corpus.position > 0) & (np.arange(N) % L > 0)  # in the same document and the same sequence
    return nats, Retrieved(by_chunk('neighbors'), by_chunk('neighbor_mask'), by_chunk('hits'),
                           np.where(has_previous, previous, -1), runs, retriever.mode)


@torch.no_grad()
def token_losses(model, batch, with_retrieval, context):
    """Nats of each target of a Batch on the device, (B, T), 0 where there is none."""
    neighbors, mask, pointers = batch.retrieved if with_retrieval else (None, None, None)
    with context:
        return model(batch.tokens, batch.targets, neighbors, mask, batch.doc_ids, pointers, loss_reduction='none')[1]


def bits_per_byte(nats, size):
    """Bits per byte of nats (N,) over `size` (N,) bytes; None if there are no bytes."""
    return float(nats.sum() / math.log(2) / size.sum()) if size.sum() else None


def bootstrap(figure, document, *sums, samples=1000, seed=0):
    """
    95 % interval of a figure when documents are resampled. `sums` are arrays (N,) over chunks, `document` (N,) is the
    index of each chunk's document, and `figure` takes the totals of each of the sums, (samples,). None if fewer than
    three documents contribute.
    """
    count = int(document.max()) + 1
    if np.count_nonzero(np.bincount(document, sums[-1], count)) < 3:
        return None
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    totals = [weights @ np.bincount(document, values, count) for values in sums]
    with np.errstate(divide='ignore', invalid='ignore'):  # a sample may hold nothing but empty documents
        return [float(bound) for bound in np.nanquantile(figure(*totals), [0.025, 0.975])]
