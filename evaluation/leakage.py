"""
How much of an evaluated chunk stands word for word in its neighbors (Borgeaud et al. 2022, section 2.6): what a model
could gain by copying alone.
"""
import numpy as np

PAIRS = 2048  # of a chunk and a neighbor, compared at once: 16 MB for chunks of 64 tokens


def longest_shared_runs(chunks, lengths, neighbors, mask):
    """
    For each chunk (N, C), of which `lengths` (N,) tokens are real, the length (N,) of the longest run of tokens that it
    shares with any of its neighbors (N, K, R), whose real tokens are those in mask (N, K, R).
    """
    N, C = chunks.shape
    K, R = neighbors.shape[1:]
    longest = np.zeros(N, dtype=np.int64)
    chunks = np.where(np.arange(C) < lengths[:, None], chunks, -1)  # nothing equals padding
    neighbors = np.where(mask, neighbors, -2)
    step = max(1, PAIRS // K)
    for start in range(0, N, step):
        chunk, neighbor = chunks[start:start + step], neighbors[start:start + step].reshape(-1, K * R)
        # length of the run that ends at the chunk's i-th token and each neighbor token
        runs = np.zeros((len(chunk), K, R + 1), dtype=np.int16)
        best = np.zeros(len(chunk), dtype=np.int16)
        for i in range(C):
            equal = (neighbor == chunk[:, i, None]).reshape(-1, K, R)
            runs[:, :, 1:] = (runs[:, :, :-1] + 1) * equal
            np.maximum(best, runs.max((1, 2)), out=best)
        longest[start:start + step] = best
    return longest


def overlap(corpus, retrieved):
    """
    For each of the corpus' N chunks, the longest run that it shares with the neighbors that it retrieved (the paper's
    measure) or that it was read with, which are those of the chunk before it: as a share (N,) of its tokens.
    """
    runs = longest_shared_runs(corpus.chunks, corpus.lengths, retrieved.tokens, retrieved.mask)
    has_previous = corpus.position > 0
    previous = np.flatnonzero(has_previous) - 1
    read_runs = longest_shared_runs(corpus.chunks[has_previous], corpus.lengths[has_previous],
                                    retrieved.tokens[previous], retrieved.mask[previous])
    runs[has_previous] = np.maximum(runs[has_previous], read_runs)
    return runs / corpus.lengths


def shared_tokens(text, other, shortest):
    """(n,) bool: which tokens of `text` (n,) are in a run of at least `shortest` that `other` (m,) also has."""
    if len(text) < shortest or len(other) < shortest:
        return np.zeros(len(text), dtype=bool)
    windows, others = (np.lib.stride_tricks.sliding_window_view(a, shortest) for a in (text, other))
    starts = (windows[:, None] == others[None]).all(-1).any(-1)  # (n - shortest + 1,)
    return np.convolve(starts, np.ones(shortest, dtype=int)) > 0
