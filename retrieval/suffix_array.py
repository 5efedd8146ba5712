"""
Exact matches at every position: where the tokens up to it stand in a text, longest match first, and what came next.
Functions over arrays; match_index.py keeps the arrays on disk.

A suffix array of the reversed text: all positions, sorted by their last DEPTH tokens read backwards. Positions that end
alike are neighbors in it. So the longest matches of a query lie around where the query itself would stand, and with the
number of tokens that each entry shares with the one before it, its next token and its document in the same order, they
are read without touching the text. numba compiles at the first call, and caches what it has compiled on disk.
"""
import numba
import numpy as np

DEPTH = 16  # tokens that a match counts at most
PLACES = 256  # of the longest matches, that are counted for a position
STRIDE = 64  # every STRIDE-th entry is also in a small table, which the binary search begins with
TABLE = 1024  # slots of the hash table of distinct tokens: a power of two, at least twice PLACES
NOVELTY = 8.0  # weight of each distinct next token in the back-off to shorter matches
OCTAVE = 8  # a share is given as -OCTAVE * log2(share), rounded
LEAST_SHARE = 127  # the largest such value; smaller shares are clipped to it


def njit(function):
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder to cache it in
        return numba.njit(nogil=True)(function)


def sort_positions(text, end_of_text):
    """
    The positions of text (n,) uint16 or uint32 that hold a token and have one after them, by their last DEPTH tokens
    read backwards, equal ones in the text's order: (m,) uint32. Prefix doubling: each round sorts by twice as many
    tokens. The text starts with end_of_text.
    """
    key, depth = pack_tokens(text), 8 // text.dtype.itemsize  # tokens of the first round
    while True:
        order = np.argsort(key)
        sorted_key = key[order]
        is_new = np.ones(len(key), dtype=bool)
        np.not_equal(sorted_key[1:], sorted_key[:-1], out=is_new[1:])
        if depth == DEPTH:
            break
        rank = np.empty(len(key), dtype=np.uint64)
        rank[order] = np.cumsum(is_new) - 1
        key = rank << np.uint64(32)
        key[depth:] |= rank[:-depth]
        depth *= 2
    order = order.astype(np.uint32)
    sort_ties(order, is_new)
    order = order[text[order] != end_of_text]
    return order[order != len(text) - 1]


def pack_tokens(text):
    """For each position of text (n,), its last 2 or 4 tokens, read backwards, as one number: (n,) uint64."""
    bits, key = 8 * text.dtype.itemsize, np.zeros(len(text), dtype=np.uint64)
    for back in range(64 // bits):
        key[back:] |= text[:len(text) - back].astype(np.uint64) << np.uint64(64 - bits * (back + 1))
    return key


@njit
def sort_ties(order, is_new):
    """Sort the runs of order (n,) that is_new (n,) starts, in place."""
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or is_new[i]:
            if i - start > 1:
                order[start:i].sort()
            start = i


@njit
def count_shared(text, order, end_of_text):
    """How many tokens each entry's position shares with that of the entry before, going back: (m,) uint8."""
    shared = np.zeros(len(order), dtype=np.uint8)
    for i in range(1, len(order)):
        a, b, count = np.int64(order[i - 1]), np.int64(order[i]), 0
        while count < DEPTH and text[a - count] == text[b - count] and text[a - count] != end_of_text:
            count += 1
        shared[i] = count
    return shared


@njit
def find_matches(text, order, following, document, shared, first, top, is_masked, end_of_text, tokens, run, excluded,
                 copied, lengths, next_tokens, places):
    """
    The longest matches of each position of sequences tokens (B, T) in a text, longest first: their lengths (B, T, N), 0
    beyond the last, the next_tokens (B, T, N) after them, and, unless it is empty, the places (B, T, N) of their last
    tokens. A match has at most as many tokens as the run (B, T) of the position's own document that ends there, and
    DEPTH, and is in no document that is_masked (D,), or whose number is in excluded (B, X), -1 for none; nor, unless it
    is 0, in a passage that shares `copied` tokens in a row with the text around the position. first (V + 1,) are the
    entries where each last token begins, top those of pack_tokens for every STRIDE-th entry.
    """
    B, T, N = lengths.shape
    size, bits = len(order), 8 * text.itemsize
    is_hidden = is_masked.copy()
    for b in range(B):
        for x in excluded[b]:
            is_hidden[x] |= x >= 0
        for t in range(T):
            found_lengths, found_tokens = lengths[b, t], next_tokens[b, t]
            found_lengths[0] = 0
            limit = min(run[b, t], DEPTH)
            token = tokens[b, t]
            if limit == 0 or token + 1 >= len(first) or first[token] == first[token + 1]:
                continue
            # the first entry that is not below the query, at first by what fits into one number
            key, known = np.uint64(0), min(limit, 64 // bits)
            for i in range(known):
                key |= np.uint64(tokens[b, t - i]) << np.uint64(64 - bits * (i + 1))
            rest = np.uint64(0) if known * bits == 64 else (np.uint64(1) << np.uint64(64 - bits * known)) - np.uint64(1)
            low = max(first[token], (np.searchsorted(top, key) - 1) * STRIDE)
            high = min(first[token + 1], np.searchsorted(top, key | rest, side='right') * STRIDE)
            while low < high:
                middle = (low + high) >> 1
                place, i = np.int64(order[middle]), 1
                while i < limit and place >= i and text[place - i] == tokens[b, t - i]:
                    i += 1
                if i < limit and (place < i or text[place - i] < tokens[b, t - i]):
                    low = middle + 1
                else:
                    high = middle
            left, right, left_length, right_length = low - 1, low, 0, 0
            if left >= first[token]:
                place = np.int64(order[left])
                while left_length < limit and text[place - left_length] == tokens[b, t - left_length]:
                    left_length += 1
            if right < first[token + 1]:
                place = np.int64(order[right])
                while right_length < limit and text[place - right_length] == tokens[b, t - right_length]:
                    right_length += 1
            # outward from there, the longer of the two sides first
            found = 0
            while found < N and (left_length > 0 or right_length > 0):
                if right_length >= left_length:
                    entry, length, shortest, step = right, right_length, max(1, left_length), 1
                else:
                    entry, length, shortest, step = left, left_length, right_length + 1, -1
                while found < N and length >= shortest:
                    is_excluded = is_hidden[document[entry]]
                    if copied and not is_excluded:
                        place, back, ahead = np.int64(order[entry]), length, 1
                        while back < run[b, t] and text[place - back] == tokens[b, t - back]:
                            back += 1
                        while (t + ahead < T and run[b, t + ahead] == run[b, t] + ahead
                               and text[place + ahead] == tokens[b, t + ahead]):
                            ahead += 1
                        is_excluded = back + ahead - 1 >= copied
                    if not is_excluded:
                        found_lengths[found] = length
                        found_tokens[found] = following[entry]
                        if places.size:
                            places[b, t, found] = order[entry]
                        found += 1
                    if step > 0:
                        entry += 1
                        length = min(length, np.int64(shared[entry])) if entry < size else 0
                    else:
                        length = min(length, np.int64(shared[entry]))
                        entry -= 1
                if step > 0:
                    right, right_length = entry, length
                else:
                    left, left_length = entry, length
            if found < N:
                found_lengths[found] = 0
        for x in excluded[b]:
            is_hidden[x] = is_masked[x]


@njit
def count_tokens(lengths, next_tokens, pointers):
    """
    The distinct tokens with the largest shares among the N longest matches, of those lengths (S, B, T, N) with
    next_tokens (S, B, T, N) of S segments: written into pointers (B, T, P, 3), the largest share first: token, longest
    match, and share in parts of an octave below all.

    A share is the token's probability by back-off (Witten and Bell 1991): of c matches of at least n tokens, c_w go on
    with the token w, and they have d distinct next tokens: p_n(w) = (c_w + NOVELTY d p_(n-1)(w)) / (c + NOVELTY d). p_0
    is 0, so all shares sum to less than one.
    """
    S, B, T, N = lengths.shape
    P = pointers.shape[2]
    best, heaviest = np.zeros(P, np.int64), np.zeros(P)
    table = np.full(TABLE, -1, dtype=np.int64)  # of distinct tokens, to their place in the lists
    slots, distinct, longest = np.zeros(N, np.int64), np.zeros(N, np.int64), np.zeros(N, np.int64)
    share, numbers, sizes = np.zeros(N), np.zeros(N, np.int64), np.zeros(N, np.int64)  # the latter two by match
    seen, new, weight = np.zeros(DEPTH + 1, np.int64), np.zeros(DEPTH + 1, np.int64), np.zeros(DEPTH + 1)
    for b in range(B):
        for t in range(T):
            # of the shortest of the N longest there may be more than fit
            shortest, room = 1, N
            if S > 1:
                seen[:] = 0
                for s in range(S):
                    for i in range(N):
                        if lengths[s, b, t, i] == 0:
                            break
                        seen[lengths[s, b, t, i]] += 1
                shortest = DEPTH
                while shortest > 1 and room > seen[shortest]:
                    room -= seen[shortest]
                    shortest -= 1
            seen[:] = 0
            count, matches = 0, 0
            for s in range(S):
                for i in range(N):
                    length = np.int64(lengths[s, b, t, i])
                    if length < shortest or (length == shortest and room == 0):
                        break
                    if length == shortest:
                        room -= 1
                    token = np.int64(next_tokens[s, b, t, i])
                    slot = (token * 40503) & (TABLE - 1)
                    while table[slot] >= 0 and distinct[table[slot]] != token:
                        slot = (slot + 1) & (TABLE - 1)
                    if table[slot] < 0:
                        table[slot] = count
                        slots[count], distinct[count], longest[count], share[count] = slot, token, length, 0.0
                        count += 1
                    number = table[slot]
                    longest[number] = max(longest[number], length)
                    numbers[matches], sizes[matches] = number, length
                    seen[length] += 1
                    matches += 1
            new[:] = 0
            for i in range(count):
                table[slots[i]] = -1
                new[longest[i]] += 1
            # what a match counts, by its length: for each n up to it 1 / (c + NOVELTY d), times what longer ones leave
            c, d, left = 0, 0, 1.0
            for n in range(DEPTH, 0, -1):
                c, d = c + seen[n], d + new[n]
                weight[n] = left / (c + NOVELTY * d) if c else 0.0
                left *= NOVELTY * d / (c + NOVELTY * d) if c else 1.0
            for n in range(2, DEPTH + 1):
                weight[n] += weight[n - 1]
            for i in range(matches):
                share[numbers[i]] += weight[sizes[i]]
            # the P largest, of equal ones the lowest token
            kept = min(P, count)
            for i in range(count):
                share[i] = np.rint(share[i] * 2.0**40)  # whatever the order in which it was added up
                value, token = share[i], distinct[i]
                if i >= P and (value < heaviest[P - 1] or (value == heaviest[P - 1] and token > distinct[best[P - 1]])):
                    continue
                p = min(i, P - 1)
                while p > 0 and (value > heaviest[p - 1] or (
                        value == heaviest[p - 1] and token < distinct[best[p - 1]])):
                    best[p], heaviest[p] = best[p - 1], heaviest[p - 1]
                    p -= 1
                best[p], heaviest[p] = i, value
            for p in range(kept):
                pointers[b, t, p, 0] = distinct[best[p]]
                pointers[b, t, p, 1] = longest[best[p]]
                octaves = 40.0 - np.log2(max(heaviest[p], 1.0))
                pointers[b, t, p, 2] = min(np.int64(OCTAVE * octaves + 0.5), LEAST_SHARE)
            pointers[b, t, kept:] = 0


@njit
def extend_matches(text, tokens, run, end_of_text, lengths, places, longest):
    """
    Follow the matches that find_matches found, lengths (B, T, N) and places (B, T, N), beyond DEPTH tokens, and raise
    longest (B, T) to the longest of each position.
    """
    B, T, N = lengths.shape
    for b in range(B):
        for t in range(T):
            for i in range(N):
                length = np.int64(lengths[b, t, i])
                if length == 0:
                    break
                if length == DEPTH:
                    place = places[b, t, i]
                    while (length < run[b, t] and text[place - length] == tokens[b, t - length]
                           and text[place - length] != end_of_text):
                        length += 1
                longest[b, t] = max(longest[b, t], length)
