"""
From logits to tokens, and from tokens to text as it comes. Random numbers are drawn for each row by a generator of its
own, one a token, so that a seed gives the same text whatever else is in the batch.
"""
import codecs
from dataclasses import dataclass

import numpy as np


@dataclass
class Sampling:
    """How tokens are chosen. Filters apply in the order of the fields."""
    repetition_penalty: float = 1.0  # of tokens that have occurred: divides logits, or multiplies those below the mean
    temperature: float = 0.8  # 0: the likeliest token
    top_k: int = 200  # of the k likeliest; 0: of all
    top_p: float = 1.0  # of the likeliest that together have this probability
    min_p: float = 0.0  # of those at least this times as likely as the likeliest


def choose(logits, sampling, seen, rng):
    """A token from logits (V,), -inf where none is allowed. `seen` are the ids of the tokens so far (n,)."""
    if sampling.repetition_penalty != 1:  # around their mean: log-probabilities are all negative
        logits, seen = logits - logits[np.isfinite(logits)].mean(), np.unique(seen)
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
    logits = logits[ids].astype(np.float64)
    with np.errstate(over='ignore'):  # the temperature may be tiny
        p = np.exp((logits - logits.max()) / sampling.temperature)
    if sampling.top_p < 1:
        order = np.argsort(-p, kind='stable')
        total = np.cumsum(p[order])
        p[order[1:][total[:-1] >= sampling.top_p * total[-1]]] = 0
    if sampling.min_p > 0:
        p[p < sampling.min_p] = 0  # the likeliest has 1
    total = np.cumsum(p)
    return int(ids[np.searchsorted(total, rng.random() * total[-1], side='right')])


def log_softmax(logits):
    logits = logits.astype(np.float64) - logits.max()
    return logits - np.log(np.exp(logits).sum())


class TextStream:
    """
    Turns tokens into text as they come. Holds back bytes of a character that is not complete, and text that may be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.decoder, self.held, self.is_stopped = codecs.getincrementaldecoder('utf-8')('replace'), '', False

    def add(self, token):
        """The text that can be shown after another token. is_stopped is set when a stop string is complete."""
        return self._show(self.decoder.decode(self.tokenizer.decode_single_token_bytes(token)))

    def end(self):
        """What was held back, when no more tokens come. Bytes of an incomplete character are dropped."""
        text, self.held = self.held, ''
        return text

    def _show(self, text):
        if self.is_stopped:
            return ''
        self.held += text
        ends = [i for i in (self.held.find(s) for s in self.stop) if i >= 0]
        if ends:
            self.is_stopped = True
            text, self.held = self.held[:min(ends)], ''
            return text
        kept = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        shown = len(self.held) - kept
        text, self.held = self.held[:shown], self.held[shown:]
        return text
