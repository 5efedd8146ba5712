"""
What a run takes, by arithmetic alone: parameters, FLOPs, memory a GPU, how many GPUs, time, disk and database. Nothing is
loaded, downloaded or opened, so a laptop sizes a model of 48 billion parameters.

    python train.py config/retro_2b.py --dry_run=True                                 # how many GPUs it needs
    torchrun --standalone --nproc_per_node=8 train.py config/retro_2b.py --dry_run=True   # and how it fits 8
"""
import os
import re
from dataclasses import dataclass

from system import PEAK_FLOPS, pick_dtype

import torch

from configurator import UserError
from data.tokenizer import vocabulary_size
from model import COPY_HEADS, LONGEST, OWN_POINTERS, POINTER_HEADS, RETRO, SHARES, RETROConfig
from retrieval.sizes import describe_collection
from training.distributed import Ranks, find_ranks, share_of_step
from training.metrics import tokens_per_step

GPUS = {'24 GB': 24e9, '40 GB': 40e9, '80 GB': 80e9, '141 GB': 141e9}  # bytes
ROOM = 0.92  # of a GPU's memory that is ours: the rest is CUDA's, and what fragmentation wastes
MOST_GPUS = 4096
MFU = 0.35  # of a RETRO of 124 M on an H200, its neighbors at hand (docs/costs.md)
MPNET = 768  # dimensions of the default embedding model
ROW = 850  # bytes of a row beside its vector: tokens, text, ids (docs/scaling.md)
STORED = 520  # of them on disk, compressed
PARTS = {  # parameters' names; the first that matches
    'embeddings': r'transformer\.wt?p?e\.|lm_head\.|mix\.',
    'pointers': r'mixture\.',
    'encoder': r'.*\.encoder\.',
    'cross-attention': r'.*\.cca\.',
    'own context': r'.*\.own\.',
    'decoder': r'',
}


def shape_of(settings):
    """The RETRO of the settings on the meta device, which holds no weights. UserError if there is no such model."""
    try:
        with torch.device('meta'):
            model = RETRO(RETROConfig.from_settings(settings, vocabulary_size(settings.tokenizer)))
    except ValueError as error:
        raise UserError(f'{error}: correct the config') from error
    if settings.retrofit:
        model.freeze_decoder()
    return model


def count_parameters(model):
    """{part: its parameters}; the tied head is the token embedding."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[next(part for part, names in PARTS.items() if re.match(names, name))] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def activation_bytes(config, a, on_gpu=True, kept='none'):
    """
    What the forward pass keeps for the backward pass, in bytes a token: of each block, a list; what is computed again
    of each block in the backward pass, a list; and of all else but the loss. `kept` is activation_checkpointing.

    Counted operation by operation, as in Korthikanti et al. (arXiv 2205.05198, section 4.1), whose 34 D a block for
    float16 is 36 D here, as the residual stream is in float32: a layer norm keeps its input in 4 bytes; a linear layer
    and GELU keep theirs in the `a` bytes of the precision; attention keeps q, k, v and its output. Flash attention
    computes its scores again; attend keeps them on a CPU in bfloat16. Compiled code keeps as much: what the backward
    pass multiplies as a matrix is not computed again. 'selective' keeps the outputs of linear layers and of attention,
    'full' the block's inputs alone (training/parallel.py).
    """
    c = config
    D, T, H, C, K = c.n_embd, c.block_size, c.n_head, c.retrieval_chunk_size, c.retrieval_k_neighbors
    R, drop = 2 * C, 1 if c.dropout else 0  # neighbor tokens; bytes of a dropout mask
    keeps_scores = not on_gpu and a == 2
    mask = a * T if (c.dropout if on_gpu else a == 4) else 0  # attention takes a dense one (RETRO.hidden)

    def attention(heads, keys):
        return heads * (a * keys if keeps_scores else 4)  # the scores, or the sum of their exponentials
    stem = D * (8 + 14 * a + 2 * drop)  # self-attention and MLP
    whole, products = [[each] * c.n_layer for each in (stem + attention(H, T) + mask, 10 * a * D)]
    inputs = [4 * D] * c.n_layer
    rest = D * (4 + a) + c.token_mix * 2 * a * D
    for number in c.own_context_layers if c.copy_own_context else []:
        scores = POINTER_HEADS * (LONGEST + SHARES + 2)
        whole[number - 1] += D * (4 + 2 * a) + 4 * scores + POINTER_HEADS * 28 * OWN_POINTERS
        products[number - 1] += a * D + a * scores
    if c.has_pointers:
        rest += a * D + 4 * (LONGEST + SHARES + 2) + 28 * c.retrieval_pointers
    if c.has_neighbors:
        neighbors, M, first = 2 * K, K * R, min(c.retrieval_layers) - 1  # neighbor tokens: for a token, for a chunk
        for number in c.retrieval_layers:
            whole[number - 1] += D * (4 + 3 * a + drop)
            products[number - 1] += 2 * a * D
            if c.retrieval_copy:  # autocast has the softmax in float32 on a GPU
                whole[number - 1] += COPY_HEADS * M * (6 if on_gpu and a == 2 else a)
            else:
                whole[number - 1] += neighbors * 3 * a * D + attention(H, M)
                products[number - 1] += neighbors * 2 * a * D + a * D
        if c.retrieval_copy:
            rest += neighbors * 2 * a * D + a * M
        if c.has_encoder:
            each = c.retrieval_encoder_layers * (stem + attention(H, R)) + 4 * D + c.token_mix * 2 * a * D
            if c.retrieval_encoder_layers:  # its first block reads the chunk
                each += D * (4 + 3 * a + drop) + attention(H, C)
                whole[first] += D * (4 + 3 * a)
                products[first] += 2 * a * D + neighbors * 3 * a * D
            whole[first] += neighbors * each
            products[first] += neighbors * c.retrieval_encoder_layers * 10 * a * D
            inputs[first] += neighbors * (4 + a) * D  # its embeddings, and what it hands to the blocks after it
    if kept == 'none':
        return whole, [0] * c.n_layer, rest
    blocks = [i + p * (kept == 'selective') for i, p in zip(inputs, products, strict=True)]
    return blocks, [w - b for w, b in zip(whole, blocks, strict=True)], rest


def memory(settings, model, world_size, parallel, precision, on_gpu=True, compiled=True):
    """
    {part: bytes at the peak of a step} on each of so many processes; None if they cannot share a step's batch evenly.
    Weights, gradients and AdamW's two moments are in float32 (16 bytes a weight; ZeRO, arXiv 1910.02054, section 3.1).
    """
    c = model.config
    try:
        micro_steps, micro_batch = share_of_step(settings, Ranks(world_size=world_size))
    except UserError:
        return None
    D, V, a = c.n_embd, c.vocab_size, 4 if precision == 'float32' else 2
    shards = world_size if parallel == 'fsdp' else 1
    weights, trained = (4 * sum(p.numel() for p in model.parameters() if p.requires_grad or not only)
                        for only in (False, True))
    blocks, again, rest = activation_bytes(c, a, on_gpu, settings.activation_checkpointing)
    tokens = micro_batch * c.block_size
    activations = tokens * (sum(blocks) + rest) + (4 * V * D if c.copy_own_context else 0)
    # the loss: logits and their gradient; uncompiled beside them log-probabilities and their gradients, in float32
    is_whole = compiled and parallel == 'ddp'  # sharded blocks are compiled one by one, and the loss is not
    loss = tokens * V * (2 * a if is_whole else a + 12)
    layers = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
    root = weights // 4 - sum(layers)
    gathered = 0
    if parallel == 'fsdp':  # a block and the next in the precision, its gradient in it and in float32; all else whole
        gathered = max(layers) * (3 * a + 4) + root * 12
    elif a == 2:
        activations += 2 * sum(p.numel() for p in model.parameters() if p.dim() > 1)  # as autocast has cast them
    parts = dict(weights=weights // shards, optimizer=2 * trained // shards, activations=activations)
    # sharded gradients are reduced in a step's last micro-batch
    parts['gradients'] = trained // (shards if micro_steps == 1 else 1)
    parts['in flight'] = gathered + max(loss, tokens * max(again))
    if world_size == micro_steps == 1:  # they take the place of the activations
        parts['gradients'] = max(0, parts['gradients'] - parts['activations'] - parts['in flight'])
    return parts
