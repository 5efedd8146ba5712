"""
Where should the chunks of a prompt end: on the grid that begins with it, as in training, or where it ends, so that the
first new token already reads what its last tokens retrieve? Bits per byte of the tokens that follow prompts, val
documents cut at random places, both ways.

    python bench/align.py --out_dir=out/neighbors [--prompts=400]

The run must have neighbors: python train.py config/quickstart.py --retrieval_k_neighbors=2 --out_dir=out/neighbors
Prints a line for each stretch of new tokens, and one JSON line.
"""
import argparse
import json
import math
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import keep_freed_memory

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.corpus import read_corpus
from data.documents import as_dataset_configs
from data.tokenizer import token_byte_counts
from retrieval.retriever import Retriever
from training.checkpoint import load_run

STRETCHES = (1, 4, 16, 64)  # of the first new tokens


@torch.no_grad()
def losses(model, retriever, tokens, size, doc_id, padding):
    """Nats of the tokens after a prompt of `size` tokens (n,), of a document, with `padding` before it."""
    C = retriever.chunk_size
    whole = np.concatenate([np.full(padding, -1), tokens])[:-1]
    chunks = whole[:len(whole) // C * C].reshape(1, -1, C)
    neighbors = ()
    if chunks.size:
        found = retriever.retrieve(chunks, np.full(chunks.shape[:2], doc_id), np.zeros(chunks.shape[:2], dtype=bool))
        neighbors = found.to('cpu')
    x = model.hidden(torch.from_numpy(whole).clamp_min(0)[None], *neighbors, padding=padding)[0, padding + size - 1:]
    pointers = None
    if retriever.matches:
        pointers = retriever.point(tokens[None, :-1], np.array([[doc_id]]))[:, size - 1:]
        pointers = torch.from_numpy(pointers).long()
    logits = model.predict(x[None], pointers)[0]
    return F.cross_entropy(logits, torch.from_numpy(tokens[size:]), reduction='none').numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', default='out/neighbors', help='the trained run (default: %(default)s)')
    parser.add_argument('--prompts', type=int, default=400, help='how many (default: %(default)s)')
    arguments, overrides = parser.parse_known_args()
    keep_freed_memory()
    settings, tokenizer, model, _ = load_run(arguments.out_dir, [*overrides, '--retrieval_cache_gb=0', '--device=cpu'])
    model.eval()
    if not model.config.has_neighbors:
        raise UserError(f'the model of {arguments.out_dir} has no neighbors, so nothing depends on the chunks: name a '
                        f'run with retrieval_k_neighbors')
    C, most = settings.retrieval_chunk_size, settings.block_size - settings.retrieval_chunk_size
    corpus = read_corpus(open_datasets(as_dataset_configs(settings.val_datasets, 'val_datasets'), tokenizer, settings),
                         tokenizer)
    texts = [corpus.chunks[corpus.document == d].reshape(-1)[:corpus.lengths[corpus.document == d].sum()]
             for d in range(len(corpus.names))]
    doc_ids = [corpus.doc_ids[corpus.document == d][0] for d in range(len(corpus.names))]
    long = [d for d, text in enumerate(texts) if len(text) > C + STRETCHES[-1]]
    rng, sizes = np.random.default_rng(settings.seed), np.array(token_byte_counts(tokenizer))
    nats, count = {'start': [], 'prompt': []}, []
    with closing(Retriever(settings, tokenizer)) as retriever:
        for _ in range(arguments.prompts):
            d = rng.choice(long)
            # both ways fit into the block: nothing leaves the window
            size = int(rng.integers(16, min(len(texts[d]) - STRETCHES[-1], most - STRETCHES[-1])))
            first = int(rng.integers(0, len(texts[d]) - size - STRETCHES[-1] + 1))
            tokens = texts[d][first:first + size + STRETCHES[-1]].astype(np.int64)
            for align, padding in (('start', 0), ('prompt', -size % C)):
                nats[align].append(losses(model, retriever, tokens, size, doc_ids[d], padding))
            count.append(sizes[tokens[size:]])
    count, report = np.array(count), dict(prompts=arguments.prompts)
    for stretch in STRETCHES:
        bits = {align: float(np.array(found)[:, :stretch].sum() / math.log(2) / count[:, :stretch].sum())
                for align, found in nats.items()}
        difference = (np.array(nats['prompt']) - np.array(nats['start']))[:, :stretch].sum(1)
        error = difference.std() / math.sqrt(len(difference)) * len(difference) / math.log(2) / count[:, :stretch].sum()
        print(f'first {stretch:>3} new tokens: start {bits["start"]:.4f}, prompt {bits["prompt"]:.4f} bits per byte; '
              f'difference {bits["prompt"] - bits["start"]:+.4f} ± {error:.4f}')
        report[stretch] = bits
    print(json.dumps(report))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
