"""
What a user could have without any RETRO: an n-gram back-off over the collection, alone, and mixed after the fact with a
trained GPT by a gate. Both are fitted on val documents that are not evaluated.

    python bench/ngram.py config/quickstart.py --gpt=out/gpt

Prints the bits per byte of the GPT, the n-gram and the mix as one JSON line. The collection must have been filled:
python -m retrieval.populate config/quickstart.py
"""
import json
import math
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import autocast, keep_freed_memory, pick_device, pick_dtype

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError, load_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.corpus import val_batches
from data.documents import as_dataset_configs
from data.tokenizer import load_tokenizer, token_byte_counts
from retrieval.match_index import run_lengths
from retrieval.retriever import Retriever
from retrieval.suffix_array import DEPTH
from training.checkpoint import load_run

BUCKETS = 9  # of the number of places, in octaves
STEPS = 300  # of fitting


def count_places(index, batch, end_of_text):
    """
    For each target of a Batch and n = 1 to DEPTH: at how many of the longest matches of at least n tokens the target
    comes next, and how many there are, (targets, DEPTH) each.
    """
    run = run_lengths(batch.tokens, batch.doc_ids, end_of_text)
    hits, places = 0, 0
    for segment in index.segments:
        lengths, next_tokens, _ = segment.places(batch.tokens, batch.doc_ids, run, end_of_text)
        is_place = np.cumprod(lengths > 0, axis=-1).astype(bool)
        is_hit = is_place & (next_tokens == batch.targets[..., None])
        at_least = [is_place & (lengths >= n) for n in range(1, DEPTH + 1)]
        places = places + np.stack([a.sum(-1) for a in at_least], axis=-1)
        hits = hits + np.stack([(a & is_hit).sum(-1) for a in at_least], axis=-1)
    is_target = batch.targets >= 0
    return hits[is_target], places[is_target]


def look_at(batches, gpt, retriever, tokenizer, token_bytes, device, context):
    """Of the batches' N targets: hits and places (N, DEPTH), the GPT's log-probability and entropy (N,), bytes (N,)."""
    parts = []
    retriever.point(batches[0].tokens, batches[0].doc_ids)  # brings the index up to date
    for batch in batches:
        on_device = batch.to(torch.device(device))
        is_target = on_device.targets >= 0
        with torch.no_grad(), context:
            logits = gpt(on_device.tokens, None, doc_ids=on_device.doc_ids)[0][is_target].float()
        log_p = logits.log_softmax(-1)
        targets = on_device.targets[is_target]
        hits, places = count_places(retriever.index, batch, tokenizer.eot_token)
        parts.append((torch.from_numpy(hits), torch.from_numpy(places), log_p.gather(1, targets[:, None])[:, 0].cpu(),
                      -(log_p.exp() * log_p).sum(-1).cpu(), token_bytes[targets.cpu()]))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


class NGram(torch.nn.Module):
    """
    Interpolated back-off: the n-token estimate is the share of the target among the places, mixed with the estimate of
    n - 1 tokens by a weight for n and the number of places. Without a place the vocabulary is equally likely. The gate
    between it and a GPT is linear in how far the longest match goes, how sure both are.
    """

    def __init__(self, vocab_size):
        super().__init__()
        self.uniform = 1 / vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(DEPTH, BUCKETS))
        self.gate = torch.nn.Linear(DEPTH + 1 + BUCKETS + 2, 1)
        torch.nn.init.zeros_(self.gate.weight)

    def forward(self, hits, places):
        """The probability of each target (N,)."""
        p = torch.full((len(hits),), self.uniform)
        for n in range(DEPTH):
            weight = self.weight[n][buckets(places[:, n])].sigmoid() * (places[:, n] > 0)
            p = (1 - weight) * p + weight * hits[:, n] / places[:, n].clamp_min(1)
        return p

    def mix(self, hits, places, gpt_log_p, entropy):
        """The probability of each target (N,) under the gated mix."""
        longest = (places > 0).sum(1)
        at_longest = places.gather(1, (longest - 1).clamp_min(0)[:, None])[:, 0]
        features = torch.cat([F.one_hot(longest, DEPTH + 1), F.one_hot(buckets(at_longest), BUCKETS), entropy[:, None],
                              entropy[:, None] * longest[:, None] / DEPTH], dim=1)
        gate = self.gate(features.float())[:, 0].sigmoid()
        return gate * self(hits, places) + (1 - gate) * gpt_log_p.exp()


def buckets(counts):
    return counts.clamp_min(1).log2().long().clamp_max(BUCKETS - 1)


def measure(settings, gpt_dir):
    """Bits per byte on the run's val batches: dict(gpt=..., ngram=..., mix=...)."""
    tokenizer, device = load_tokenizer(settings.tokenizer), pick_device(settings.device)
    context = autocast(pick_dtype(settings.dtype, device), device)
    _, _, gpt, _ = load_run(gpt_dir, [])
    gpt.eval()
    datasets = open_datasets(as_dataset_configs(settings.val_datasets, 'val_datasets'), tokenizer, settings)
    batches = val_batches(datasets, tokenizer, settings.block_size, settings.batch_size, settings.eval_tokens)
    # the next documents, as many again, are fitted on
    both = val_batches(datasets, tokenizer, settings.block_size, settings.batch_size, 2 * settings.eval_tokens)
    known = {doc_id for batch in batches for doc_id in batch.doc_ids.ravel().tolist()}
    held_out = [batch for batch in both if not known & set(batch.doc_ids.ravel().tolist())]
    if not held_out:
        raise UserError('the val documents are too few to fit a gate on: lower eval_tokens')
    token_bytes = torch.tensor(token_byte_counts(tokenizer))
    with closing(Retriever(settings.replace(retrieval_pointers=1), tokenizer)) as retriever:
        fitted, evaluated = (look_at(part, gpt, retriever, tokenizer, token_bytes, device, context)
                             for part in (held_out, batches))
    ngram, bits = NGram(tokenizer.n_vocab), evaluated[4].sum() * math.log(2)
    hits, places, gpt_log_p, entropy, _ = evaluated
    found = dict(gpt=(-gpt_log_p.sum() / bits).item())
    fit(ngram, lambda: -ngram(*fitted[:2]).log().mean())
    with torch.no_grad():
        found['ngram'] = (-ngram(hits, places).log().sum() / bits).item()
    fit(ngram, lambda: -ngram.mix(*fitted[:4]).log().mean())
    with torch.no_grad():
        found['mix'] = (-ngram.mix(hits, places, gpt_log_p, entropy).log().sum() / bits).item()
    return found


def fit(model, loss):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def main():
    folders = [a.partition('=')[2] for a in sys.argv[1:] if a.startswith('--gpt=')]
    if len(folders) != 1:
        raise UserError('name the out_dir of a trained GPT: --gpt=out/gpt')
    keep_freed_memory()
    print(json.dumps(measure(load_settings([a for a in sys.argv[1:] if not a.startswith('--gpt=')]), folders[0])))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
