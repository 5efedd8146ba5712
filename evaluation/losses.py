"""
A model's loss on every token of whole documents, with retrieval on and off, from which all figures of the evaluation
are summed; and bootstrap intervals for them.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError
from data.documents import chunk
from data.stream import Batch
from data.tokenizer import token_byte_counts

RETRIEVED_TOGETHER = 64  # sequences per request to the retriever


@dataclass
class Corpus:
    """Documents, one after another on the chunk grid: N chunks of C tokens, and D documents."""
    names: list  # (D,) source/id
    texts: list  # (D,) what is evaluated of each
    chunks: np.ndarray  # (N, C) int32
    lengths: np.ndarray  # (N,) real tokens of each
    document: np.ndarray  # (N,) index of the document that each is of
    doc_ids: np.ndarray  # (N,) int64
    chunk_ids: np.ndarray  # (N,) int64
    position: np.ndarray  # (N,) its number in its document
    is_last_chunk: np.ndarray  # (N,) bool, the last evaluated chunk of its document

    @property
    def predicted(self):
        """(N, C) bool: the tokens that have a loss. A document's first token has none, as nothing precedes it."""
        is_real = np.arange(self.chunks.shape[1]) < self.lengths[:, None]
        is_real[self.position == 0, 0] = False
        return is_real


def read_corpus(documents, tokenizer, chunk_size, max_tokens=0):
    """
    The Documents as a Corpus, up to max_tokens, where 0 means all; the last one is cut there, on the grid. UserError
    if there is no text.
    """
    parts, names, texts, total = [], [], [], 0
    for document in documents:
        chunked = chunk(document, tokenizer, chunk_size)
        if chunked is None:
            continue
        count = len(chunked.tokens)
        if max_tokens and total + chunked.lengths.sum() > max_tokens:
            count = max(1, (max_tokens - total) // chunk_size)
        tokens, lengths = chunked.tokens[:count], chunked.lengths[:count]
        is_whole = count == len(chunked.tokens)
        parts.append((tokens, lengths, np.full(count, len(names)), np.full(count, chunked.doc_id),
                      chunked.chunk_ids[:count], np.arange(count), np.arange(count) == count - 1))
        names.append(document.name)
        texts.append(document.text if is_whole else tokenizer.decode(tokens.reshape(-1).tolist()))
        total += int(lengths.sum())
        if max_tokens and total + chunk_size > max_tokens:
            break
    if not names:
        raise UserError('there is no text to evaluate: all documents are empty; name others with --data=FILE')
    corpus = Corpus(names, texts, *(np.concatenate(column) for column in zip(*parts, strict=True)))
    if not chunk_bytes(corpus, tokenizer).any():
        raise UserError('there is no text to evaluate: no document is longer than a token; name others with --data')
    return corpus


@dataclass
class Retrieved:
    """The neighbors of a corpus' N chunks."""
    tokens: np.ndarray  # (N, K, R) int32
    mask: np.ndarray  # (N, K, R) bool
    hits: np.ndarray  # (N, K) of HIT
    read: np.ndarray  # (N,) index of the chunk whose neighbors it was read with, the one before; -1 if there is none


def as_batches(corpus, block_size, count):
    """The corpus' chunks as Batches of up to `count` sequences of block_size tokens, the last one padded."""
    N, C = corpus.chunks.shape
    L = block_size // C
    S = -(-N // L)

    def in_sequences(values, fill):
        padded = np.full((S * L, *values.shape[1:]), fill, dtype=values.dtype)
        padded[:N] = values
        return padded.reshape(S, L, *values.shape[1:])

    predicted = corpus.predicted.reshape(-1)
    targets = np.full(N * C, -1, dtype=np.int64)  # of each position, the token after it
    targets[:-1] = np.where(predicted[1:], corpus.chunks.reshape(-1)[1:], -1)
    columns = (in_sequences(corpus.chunks.astype(np.int64), 0).reshape(S, L * C),
               in_sequences(targets.reshape(N, C), -1).reshape(S, L * C), in_sequences(corpus.doc_ids, 0),
               in_sequences(corpus.chunk_ids, 0), in_sequences(corpus.is_last_chunk, True))
    return [Batch(*(column[start:start + count] for column in columns)) for start in range(0, S, count)]


def evaluate_corpus(model, corpus, batch_size, device, context, retriever=None, label='evaluating'):
    """
    The nats of each of the corpus' tokens, (N, C), 0 where none is predicted, by arm: 'off', and with a retriever
    'on'; and the Retrieved, or None.
    """
    N, C = corpus.chunks.shape
    L = model.config.block_size // C
    batches = as_batches(corpus, model.config.block_size, batch_size)
    together = max(1, RETRIEVED_TOGETHER // batch_size)  # batches per request
    nats = {arm: [] for arm in (['off', 'on'] if retriever else ['off'])}  # by arm [(B, T)]
    model.eval()
    bar = tqdm(total=sum(len(batch.tokens) for batch in batches), unit='sequence', desc=label, dynamic_ncols=True,
               disable=None)
    for start in range(0, len(batches), together):
        if retriever:
            batches[start:start + together] = retriever.add_neighbors(batches[start:start + together])
        for batch in batches[start:start + together]:
            on_device = batch.to(torch.device(device))
            for arm, losses in nats.items():
                losses.append(token_losses(model, on_device, arm == 'on', context).cpu().numpy())
            bar.update(len(batch.tokens))
    bar.close()
    # a position's loss is that of the token after it
    nats = {arm: np.concatenate([[0], np.concatenate(losses).reshape(-1)[:N * C - 1]]).astype(np.float32).reshape(N, C)
            for arm, losses in nats.items()}
    if not retriever:
        return nats, None
    neighbors, mask, hits = (np.concatenate([getattr(batch, name).reshape(-1, *getattr(batch, name).shape[2:])
                                             for batch in batches])[:N]
                             for name in ('neighbors', 'neighbor_mask', 'hits'))
    previous = np.arange(N) - 1
    has_previous = (corpus.position > 0) & (np.arange(N) % L > 0)  # in the same document and the same sequence
    return nats, Retrieved(neighbors, mask, hits, np.where(has_previous, previous, -1))


@torch.no_grad()
def token_losses(model, batch, with_neighbors, context):
    """Nats of each target of a Batch on the device, (B, T), 0 where there is none."""
    neighbors = (batch.neighbors, batch.neighbor_mask) if with_neighbors else (None, None)
    with context:
        logits, _ = model(batch.tokens, None, *neighbors, batch.doc_ids)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-1,
                           reduction='none').view_as(batch.targets)


def chunk_bytes(corpus, tokenizer):
    """UTF-8 bytes of each chunk's predicted tokens, (N,)."""
    return (np.array(token_byte_counts(tokenizer))[corpus.chunks] * corpus.predicted).sum(1)


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
