"""What a model writes after some prompts, with retrieval on and off, beside what it retrieved: a table for a log."""
import numpy as np
import torch

from retrieval.knowledge_base import FIELDS

COLUMNS = ['prompt', 'on', 'off', 'neighbors']
NEW_TOKENS = 64


def neighbors_of(retriever, device, hits):
    """
    The function that RETRO.generate asks for the neighbors of chunks (B, 1, C); None without a retriever. It appends
    each chunk's hits (B, K) to the list `hits`.
    """
    def retrieve(chunks):
        found = retriever.retrieve_for_text(chunks.cpu().numpy())
        hits.append(found.hits[:, 0])
        return torch.from_numpy(found.tokens).long().to(device), torch.from_numpy(found.mask).to(device)
    return retrieve if retriever else None


def write_samples(model, prompts, tokenizer, device, context, retriever=None, seed=0):
    """
    Rows of COLUMNS, one for each of the prompts (B, T), which are whole chunks. It draws from a generator of its own.
    """
    hits = []  # for each chunk, (B, K)
    model.eval()
    written = {}
    for arm in ('on', 'off') if retriever else ('off',):
        with context:
            tokens = model.generate(prompts, NEW_TOKENS, neighbors_of(arm == 'on' and retriever, device, hits),
                                    temperature=0.8, top_k=200, vocabulary=tokenizer.n_vocab,
                                    generator=torch.Generator(device).manual_seed(seed))
        written[arm] = [tokenizer.decode(line) for line in tokens[:, prompts.shape[1]:].tolist()]
    rows = []
    for number, prompt in enumerate(prompts.tolist()):
        ids = [hit['id'] for chunk in hits[:prompts.shape[1] // model.config.retrieval_chunk_size]
               for hit in chunk[number] if hit['score'] > -1]
        found = retriever.knowledge_base.rows(np.array(ids), FIELDS) if ids else {}
        rows.append([tokenizer.decode(prompt), written.get('on', [''] * len(prompts))[number], written['off'][number],
                     '\n---\n'.join(f'{row["document"]}, chunk {row["position"] + 1}\n{row["text"]}'
                                    for row in found.values())])
    return rows
