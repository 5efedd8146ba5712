"""Samples of a model with retrieval on and off, beside what it retrieved: a table for a log."""
import numpy as np
import torch

from configurator import visible
from data.tokenizer import is_token
from retrieval.knowledge_base import FIELDS
from retrieval.retriever import neighbor_function, pointer_function

COLUMNS = ['prompt', 'on', 'off', 'neighbors']
NEW_TOKENS = 64


def write_samples(model, prompts, tokenizer, device, context, retriever=None, seed=0):
    """
    Rows of COLUMNS, one per prompt (B, T), of whole chunks. Sampling uses a generator of its own.
    """
    hits = []  # for each chunk, (B, K)
    allowed = torch.tensor(is_token(tokenizer), device=device)
    model.eval()
    written = {}
    for arm in ('on', 'off') if retriever else ('off',):
        with context:
            reads = arm == 'on' and retriever
            tokens = model.generate(prompts, NEW_TOKENS, neighbor_function(reads, device, hits),
                                    pointer_function(reads, device), temperature=0.8, top_k=200, allowed=allowed,
                                    generator=torch.Generator(device).manual_seed(seed))
        written[arm] = [tokenizer.decode(line) for line in tokens[:, prompts.shape[1]:].tolist()]
    rows = []
    for number, prompt in enumerate(prompts.tolist()):
        ids = [hit['id'] for chunk in hits[:prompts.shape[1] // model.config.retrieval_chunk_size]
               for hit in chunk[number] if hit['score'] > -1]
        found = retriever.knowledge_base.rows(np.array(ids), FIELDS) if ids else {}
        row = [tokenizer.decode(prompt), written.get('on', [''] * len(prompts))[number], written['off'][number],
               '\n---\n'.join(f'{row["document"]}, chunk {row["position"] + 1}\n{row["text"]}'
                              for row in found.values())]
        rows.append([visible(text) for text in row])
    return rows
