"""
Where the tokens of a text are from: which of them pointers named, and which stand in the passages that they were
written with.
"""
import numpy as np

from retrieval.suffix_array import DEPTH

LEAST = 4  # tokens of a run that counts as copied from a neighbor


def named_runs(source, index, tokens, first, end):
    """
    The runs of two or more of tokens[first:end], of a sequence tokens (T,), that pointers named and that follow each
    other where those were found: [(first token, number of tokens, doc_id, place in that document)].
    """
    low = max(0, first - DEPTH)  # matches are short: it does not matter that the model may have read less before them
    pointers = source.point(tokens[None, low:end])[0]
    runs = []
    for t in range(max(1, first), end):
        named = pointers[t - 1 - low]
        if not ((named[:, 0] == tokens[t]) & (named[:, 1] > 0)).any():
            continue
        _, doc_id, place = index.where(tokens[:end], np.zeros(1, dtype=np.int64), t - 1)
        last = runs[-1] if runs else None
        if last and last[2] == doc_id and t - last[0] == last[1] == place - last[3]:
            last[1] += 1
        else:
            runs.append([t, 1, doc_id, place])
    return [run for run in runs if run[1] > 1]


def passage_at(index, doc_id, place, count, size):
    """
    The tokens of the chunk, of `size`, that holds the place of a document that the MatchIndex knows, up to the last of
    `count` tokens from there on, and where the place is among them. Without a database.
    """
    for segment in index.segments:
        number = int(segment.numbers(np.array([doc_id]))[0])
        if number >= 0 and not segment.is_masked[number]:
            text = segment.text[segment.starts[number]:segment.starts[number + 1]]
            first = place - place % size
            tokens = text[first:max(first + size, place + count)]
            return tokens[tokens != index.end_of_text].tolist(), place - first
    return [], 0  # the document has been removed since


def copied_runs(tokens, first, end, passages):
    """
    The runs of tokens[first:end] that stand in one of the passages, lists of tokens, from left to right the longest:
    [(first token, number of tokens, number of the passage, place in it)].
    """
    runs, t = [], first
    while t < end:
        longest, number, place = 0, 0, 0
        for candidate, passage in enumerate(passages):
            for i in range(len(passage)):
                count = 0
                while t + count < end and i + count < len(passage) and passage[i + count] == tokens[t + count]:
                    count += 1
                if count > longest:
                    longest, number, place = count, candidate, i
        if longest >= LEAST:
            runs.append((t, longest, number, place))
        t += longest if longest >= LEAST else 1
    return runs
