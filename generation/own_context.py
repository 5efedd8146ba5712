"""
A sequence's own context, one position at a time: what own_pointers of model.py finds for all positions by sorting, and
the longest earlier run to go on from. numba compiles at the first call, and caches what it has compiled on disk.
"""
import math

import numpy as np

from model import GROWTH, OCTAVE, OWN_LENGTHS, OWN_PLACES
from retrieval.suffix_array import njit

LENGTHS = np.array(OWN_LENGTHS)
WEIGHTS = np.rint(64 * np.diff(np.exp(GROWTH * LENGTHS.astype(np.float32)), prepend=np.float32(0))).astype(np.int64)


def own_pointers_at(tokens, first, pointers):
    """
    The own_pointers of model.py of the positions from `first` on of a sequence tokens (T,), written into pointers
    (T - first, OWN_POINTERS, 3).
    """
    count_own_places(tokens, first, pointers, LENGTHS, WEIGHTS, OWN_PLACES, OCTAVE)


@njit
def count_own_places(tokens, first, pointers, lengths, weights, places_of_each, octave):
    """What own_pointers_at does. What numba keeps compiled may not depend on another module's constants."""
    places = np.empty(len(lengths) * places_of_each, dtype=np.int64)
    count = np.empty(len(lengths), dtype=np.int64)
    found, longest = np.empty(len(places), dtype=np.int64), np.empty(len(places), dtype=np.int64)
    share = np.empty(len(places), dtype=np.int64)
    for t in range(first, len(tokens)):
        count[:] = 0
        for j in range(t - 1, -1, -1):  # the most recent first
            if count[-1] == places_of_each:
                break
            run = 0
            while run < lengths[-1] and run <= j and tokens[j - run] == tokens[t - run]:
                run += 1
            for n in range(len(lengths)):
                if run < lengths[n]:
                    break
                if count[n] < places_of_each:
                    places[n * places_of_each + count[n]] = j
                    count[n] += 1
        distinct, total = 0, 0
        for n in range(len(lengths)):
            for i in range(count[n]):
                token = tokens[places[n * places_of_each + i] + 1]
                number = 0
                while number < distinct and found[number] != token:
                    number += 1
                if number == distinct:
                    found[number], longest[number], share[number] = token, 0, 0
                    distinct += 1
                longest[number] = lengths[n]
                share[number] += weights[n]
                total += weights[n]
        pointers[t - first] = 0
        for p in range(min(distinct, pointers.shape[1])):
            best = 0
            for number in range(1, distinct):
                if share[number] > share[best]:  # of equal shares the first
                    best = number
            pointers[t - first, p, 0], pointers[t - first, p, 1] = found[best], longest[best]
            pointers[t - first, p, 2] = np.rint(-octave * math.log2(share[best] / total))
            share[best] = -1


@njit
def longest_run(tokens):
    """
    Where the longest run of the last of tokens (T,), up to 32, stands earlier in them, the most recent: its number of
    tokens, and the place of the token after it; 0 and T if there is none.
    """
    T, longest, place = len(tokens), 0, len(tokens)
    for j in range(T - 2, -1, -1):
        run = 0
        while run < 32 and run <= j and tokens[j - run] == tokens[T - 1 - run]:
            run += 1
        if run > longest:
            longest, place = run, j + 1
    return longest, place
