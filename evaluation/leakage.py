"""
How much of an evaluated chunk stands word for word in what was retrieved (Borgeaud et al. 2022, section 2.6): what a
model could gain by copying alone.
"""
import numpy as np

TOGETHER = 2048  # pairs of a chunk and a neighbor that are compared at once: 16 MB for chunks of 64 tokens


def longest_shared_runs(chunks, lengths, neighbors, mask):
    """
    For each chunk (N, C), of which `lengths` (N,) tokens are real, the length (N,) of the longest run of tokens that it
    shares with any of its neighbors (N, K, R), of which the tokens in mask (N, K, R) are there.
    """
    N, C = chunks.shape
    K, R = neighbors.shape[1:]
    longest = np.zeros(N, dtype=np.int64)
    chunks = np.where(np.arange(C) < lengths[:, None], chunks, -1)  # nothing equals padding
    neighbors = np.where(mask, neighbors, -2)
    some = max(1, TOGETHER // K)
    for start in range(0, N, some):
        chunk, neighbor = chunks[start:start + some], neighbors[start:start + some].reshape(-1, K * R)
        # runs that end at the chunk's i-th token and each neighbor token: one more than those that ended before both
        runs = np.zeros((len(chunk), K, R + 1), dtype=np.int16)
        best = np.zeros(len(chunk), dtype=np.int16)
        for i in range(C):
            equal = (neighbor == chunk[:, i, None]).reshape(-1, K, R)
            runs[:, :, 1:] = (runs[:, :, :-1] + 1) * equal
            np.maximum(best, runs.max((1, 2)), out=best)
        longest[start:start + some] = best
    return longest


def overlap(corpus, retrieved):
    """
    For each of the corpus' N chunks, the longest run that it shares with the neighbors that it retrieved, as the paper
    has it, or with those that it was read with, which are the chunk's before it: as a share (N,) of its tokens.
    """
    runs = longest_shared_runs(corpus.chunks, corpus.lengths, retrieved.tokens, retrieved.mask)
    later = corpus.position > 0
    before = np.flatnonzero(later) - 1
    runs[later] = np.maximum(runs[later], longest_shared_runs(corpus.chunks[later], corpus.lengths[later],
                                                              retrieved.tokens[before], retrieved.mask[before]))
    return runs / corpus.lengths


def shared_tokens(text, other, shortest):
    """(n,) bool: which tokens of `text` (n,) lie in a run of `shortest` or more that `other` (m,) has too."""
    if len(text) < shortest or len(other) < shortest:
        return np.zeros(len(text), dtype=bool)
    windows, others = (np.lib.stride_tricks.sliding_window_view(a, shortest) for a in (text, other))
    starts = (windows[:, None] == others[None]).all(-1).any(-1)  # (n - shortest + 1,)
    return np.convolve(starts, np.ones(shortest, dtype=int)) > 0
