"""How likely a model takes texts to be after others, with retrieval or without: what benchmarks compare answers by."""
import contextlib
import math

import numpy as np
import torch
from tqdm import tqdm

from data.tokenizer import is_token

RETRIEVED_TOGETHER = 256  # texts per request to the retriever


@torch.no_grad()
def log_likelihoods(model, tokenizer, options, device, context=None, retriever=None, batch_size=8, label=None,
                    check_stop=lambda: None):
    """
    For each of the options (tokens, start): the log-probability of tokens[start:] after tokens[:start], start >= 1, and
    whether each of them is the likeliest. With a retriever the neighbors of complete chunks and pointers are read.
    Options that differ only in their last token share a row of the model's batch. A label shows progress; check_stop()
    may raise.
    """
    context = context or contextlib.nullcontext()
    allowed = torch.tensor(is_token(tokenizer), device=device)
    rows = {}  # what is read, to the indices of the options that read it
    for i, (tokens, _) in enumerate(options):
        rows.setdefault(tuple(tokens[:-1]), []).append(i)
    inputs = sorted(rows, key=len)
    found = [(0.0, True)] * len(options)
    bar = tqdm(total=len(inputs), unit='prompt', desc=label, disable=None if label else True, leave=False)
    for group in range(0, len(inputs), RETRIEVED_TOGETHER):
        retrieved = inputs[group:group + RETRIEVED_TOGETHER]
        neighbors = retrieve(model, tokenizer, retrieved, device, retriever)
        for start in range(0, len(retrieved), batch_size):
            check_stop()
            batch = slice(start, start + batch_size)
            tokens = pad(retrieved[batch], tokenizer)  # (B, T)
            complete = tokens.shape[1] // model.config.retrieval_chunk_size
            read = [part[batch, :complete] for part in neighbors]
            pointers = None
            if retriever is not None and retriever.matches:
                pointers = torch.from_numpy(retriever.point(tokens)).long().to(device)
            with context:
                hidden = model.hidden(torch.from_numpy(tokens).to(device), *read)
            for number, row in enumerate(retrieved[batch]):
                for i in rows[row]:
                    whole, first = options[i]
                    place = slice(number, number + 1), slice(first - 1, len(whole) - 1)
                    # in float32: in bfloat16 many answers would be equally likely
                    named = None if pointers is None else pointers[place]
                    logits, = model.predict(hidden[place].float(), named)
                    log_p = logits[:, :len(allowed)].masked_fill(~allowed, -math.inf).log_softmax(-1)
                    targets = torch.tensor(whole[first:], device=device)
                    found[i] = (log_p.gather(1, targets[:, None]).sum().item(),
                                bool((log_p.argmax(-1) == targets).all()))
            bar.update(len(tokens))
    bar.close()
    return found


def retrieve(model, tokenizer, rows, device, retriever):
    """Neighbors (n, L, K, R) of the rows' complete chunks and their mask, on the device; () if there are none."""
    if retriever is None or not retriever.k:
        return ()
    C = model.config.retrieval_chunk_size
    tokens = pad(rows, tokenizer)
    L = max(1, tokens.shape[1] // C)
    chunks = np.full((len(rows), L * C), tokenizer.eot_token)
    chunks[:, :tokens.shape[1]] = tokens[:, :L * C]
    complete = np.arange(1, L + 1) * C <= np.array([len(row) for row in rows])[:, None]  # (n, L)
    unknown = np.zeros(complete.shape, dtype=np.int64)  # these chunks are of no document of the collection
    return retriever.retrieve(chunks.reshape(len(rows), L, C), unknown, ~complete, unknown).to(device)


def pad(rows, tokenizer):
    """Rows of tokens as an array (n, T), filled up with end-of-text."""
    tokens = np.full((len(rows), max(map(len, rows))), tokenizer.eot_token)
    for line, row in zip(tokens, rows, strict=True):
        line[:len(row)] = row
    return tokens
