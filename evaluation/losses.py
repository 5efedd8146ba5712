"""
What a model makes of whole documents, token by token, with retrieval on and off: the losses that all figures of the
evaluation are sums of, and bootstrap intervals for them.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError
from data.chunking import chunk_document, chunk_hashes, document_hash
from data.tokenizer import token_byte_counts

RETRIEVED_TOGETHER = 64  # sequences that are retrieved for by one request


@dataclass
class Corpus:
    """Documents, one after another on the chunk grid: N chunks of C tokens, and D documents."""
    names: list  # (D,) source/id
    texts: list  # (D,) what is evaluated of each
    chunks: np.ndarray  # (N, C) int32
    lengths: np.ndarray  # (N,) real tokens of each
    document: np.ndarray  # (N,) which of the documents it is of
    doc_ids: np.ndarray  # (N,) int64
    chunk_ids: np.ndarray  # (N,) int64
    position: np.ndarray  # (N,) its place in its document
    last: np.ndarray  # (N,) bool, its document goes on no further

    @property
    def predicted(self):
        """(N, C) bool: the tokens that have a loss. A document's first token has none, as nothing precedes it."""
        real = np.arange(self.chunks.shape[1]) < self.lengths[:, None]
        real[self.position == 0, 0] = False
        return real


def read_corpus(documents, tokenizer, chunk_size, max_tokens=0):
    """
    The Documents as a Corpus, up to max_tokens, where 0 means all; the last one is cut there, on the grid. UserError
    where there is no text.
    """
    parts, names, texts, count = [], [], [], 0
    for document in documents:
        tokens = document.tokens(tokenizer)
        if not len(tokens):
            continue
        chunks, lengths = chunk_document(tokens, chunk_size, tokenizer.eot_token)
        if max_tokens and count + lengths.sum() > max_tokens:
            kept = max(1, (max_tokens - count) // chunk_size)
            chunks, lengths = chunks[:kept], lengths[:kept]
        n, whole = len(chunks), len(chunks) * chunk_size > len(tokens)
        parts.append((chunks, lengths, np.full(n, len(names)), np.full(n, document_hash(document.source, document.id)),
                      chunk_hashes(document.source, document.id, 0, n), np.arange(n), np.arange(n) == n - 1))
        names.append(f'{document.source}/{document.id}')
        texts.append(document.text if whole else tokenizer.decode(chunks.reshape(-1).tolist()))
        count += int(lengths.sum())
        if max_tokens and count + chunk_size > max_tokens:
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
    read: np.ndarray  # (N,) the chunk before it, whose neighbors it was read with; -1 where that is in no same sequence


def evaluate_corpus(model, corpus, batch_size, device, context, retriever=None, label='evaluating'):
    """
    The nats of each of the corpus' tokens, (N, C), 0 where none is predicted, by arm: 'off', and where there is a
    retriever 'on', with the Retrieved (else None). Sequences are runs of block_size tokens.
    """
    N, C = corpus.chunks.shape
    L = model.config.block_size // C
    S = -(-N // L)

    def in_sequences(values, fill):
        padded = np.full((S * L, *values.shape[1:]), fill, dtype=values.dtype)
        padded[:N] = values
        return padded.reshape(S, L, *values.shape[1:])

    predicted = corpus.predicted.reshape(-1)
    targets = np.full(N * C, -1, dtype=np.int64)  # of each position, the token after it
    targets[:-1] = np.where(predicted[1:], corpus.chunks.reshape(-1)[1:], -1)
    tokens = in_sequences(corpus.chunks.astype(np.int64), 0).reshape(S, L * C)
    targets = in_sequences(targets.reshape(N, C), -1).reshape(S, L * C)
    documents = in_sequences(corpus.doc_ids, 0)
    ends, ids = in_sequences(corpus.last, True), in_sequences(corpus.chunk_ids, 0)
    arms = ['off'] + ['on'] * (retriever is not None)
    nats = {arm: np.zeros((S, L * C), dtype=np.float32) for arm in arms}
    found = []
    model.eval()
    bar = tqdm(total=S, unit='sequence', desc=label, dynamic_ncols=True, disable=None)
    for group in range(0, S, RETRIEVED_TOGETHER):
        of_group = slice(group, group + RETRIEVED_TOGETHER)
        if retriever:
            found.append(retriever.retrieve(tokens[of_group].reshape(-1, L, C), documents[of_group], ends[of_group],
                                            ids[of_group]))
        for start in range(group, min(group + RETRIEVED_TOGETHER, S), batch_size):
            rows = slice(start, min(start + batch_size, group + RETRIEVED_TOGETHER, S))
            place = [torch.from_numpy(a[rows]).to(device) for a in (tokens, targets, documents)]
            for arm in arms:
                neighbors = (None, None)
                if arm == 'on':
                    own = slice(rows.start - group, rows.stop - group)
                    neighbors = (torch.from_numpy(found[-1].tokens[own]).long().to(device),
                                 torch.from_numpy(found[-1].mask[own]).to(device))
                nats[arm][rows] = token_losses(model, *place, *neighbors, context).cpu().numpy()
            bar.update(rows.stop - rows.start)
    bar.close()
    # a position's loss belongs to the token after it
    nats = {arm: np.concatenate([[0], a.reshape(-1)[:N * C - 1]]).astype(np.float32).reshape(N, C)
            for arm, a in nats.items()}
    if not retriever:
        return nats, None
    K, R = found[0].tokens.shape[2:]
    neighbors, mask, hits = (np.concatenate([getattr(f, name) for f in found]) for name in ('tokens', 'mask', 'hits'))
    of_chunks = (neighbors.reshape(-1, K, R)[:N], mask.reshape(-1, K, R)[:N], hits.reshape(-1, K)[:N])
    before = np.arange(N) - 1
    return nats, Retrieved(*of_chunks, np.where((corpus.position > 0) & (np.arange(N) % L > 0), before, -1))


@torch.no_grad()
def token_losses(model, tokens, targets, documents, neighbors, neighbor_mask, context):
    """Nats of each target, (B, T), 0 where there is none."""
    with context:
        logits, _ = model(tokens, None, neighbors, neighbor_mask, documents)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                           reduction='none').view_as(targets)


def chunk_bytes(corpus, tokenizer):
    """UTF-8 bytes of each chunk's predicted tokens, (N,)."""
    return (np.array(token_byte_counts(tokenizer))[corpus.chunks] * corpus.predicted).sum(1)


def bits_per_byte(nats, size):
    """Bits per byte of nats (N,) over `size` (N,) bytes; None where there are none."""
    return float(nats.sum() / math.log(2) / size.sum()) if size.sum() else None


def bootstrap(figure, document, *sums, samples=1000, seed=0):
    """
    95 % interval of a figure under resampling of documents. `sums` are arrays (N,) over chunks, `document` (N,) says
    which document a chunk is of, and `figure` takes the totals of each of the sums, (samples,). None where fewer than
    three documents have a part in it.
    """
    count = int(document.max()) + 1
    if np.count_nonzero(np.bincount(document, sums[-1], count)) < 3:
        return None
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    totals = [weights @ np.bincount(document, values, count) for values in sums]
    with np.errstate(divide='ignore', invalid='ignore'):  # a sample may hold nothing but empty documents
        return [float(bound) for bound in np.nanquantile(figure(*totals), [0.025, 0.975])]
