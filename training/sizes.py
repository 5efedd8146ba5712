"""
What a run takes, by arithmetic alone: parameters, FLOPs, memory a GPU, how many GPUs, time, disk and database. Nothing
is loaded, downloaded or opened, so a laptop sizes a model of 48 billion parameters.

    python train.py config/retro_2b.py --dry_run=True                                     # how many GPUs it needs
    torchrun --standalone --nproc_per_node=4 train.py config/retro_2b.py --dry_run=True   # what it takes on four
"""
import os
import re
from contextlib import suppress

from system import PEAK_FLOPS, is_device, peak_flops, pick_device, pick_dtype, say

import torch

from configurator import UserError
from data.tokenizer import vocabulary_size
from model import COPY_HEADS, LONGEST, OWN_POINTERS, POINTER_HEADS, RETRO, SHARES, RETROConfig
from retrieval.sizes import describe_collection
from training.distributed import Ranks, find_ranks, share_of_step
from training.metrics import tokens_per_step

GPUS = {'24 GB': 24e9, '40 GB': 40e9, '80 GB': 80e9, '141 GB': 141e9}  # bytes
ROOM = 0.92  # of a GPU's memory that is a run's: the rest is CUDA's, and what fragmentation wastes
MOST = 4096  # GPUs
MFU = 0.35  # of a RETRO of 124 M on an H200, its neighbors at hand (docs/costs.md)
DIMENSIONS = 768  # of the default embedding model, all-mpnet-base-v2
ROW = 850  # bytes of a row beside its vector: tokens, text, ids (docs/scaling.md)
PARTS = {  # names of their parameters, of which the first that matches counts
    'embeddings': r'transformer\.w[tp]e\.|lm_head\.|mix\.',
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
    if settings.freeze_retrieval:
        model.freeze_retrieval()
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
    layers = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
    root = weights // 4 - sum(layers)
    blocks, again, rest = activation_bytes(c, a, on_gpu, settings.activation_checkpointing)
    is_again, tokens = any(again), micro_batch * c.block_size
    fixed = tokens * rest + (4 * V * D if c.copy_own_context else 0)
    gathered = 0
    if parallel == 'fsdp':  # a block and the next in the precision, its gradient in it and in float32; all else whole
        gathered = max(layers) * (3 * a + 4) + root * (12 + 2 * (a == 2))
    elif a == 2:  # weights as autocast has cast them
        fixed += 2 * (root + (max(layers) if is_again else sum(layers)))
    gradients = trained // shards
    grow = world_size == micro_steps == 1  # as the activations go; else they are there from the start
    # The first moment of the backward pass: logits and their gradient; uncompiled beside them log-probabilities and
    # their gradients, in float32
    loss = V * (2 * a if compiled else a + 12)
    moments = [(fixed + tokens * (sum(blocks) + loss), 0 if grow else gradients)]
    # then block by block: what it computes again, and gradients of the residual stream and around GELU
    for i in range(c.n_layer):
        width = 2 * c.retrieval_k_neighbors if c.has_encoder and i == min(c.retrieval_layers) - 1 else 1
        moments.append((fixed + tokens * (sum(blocks[:i + 1]) + again[i] + (4 + 8 * a) * D * width),
                        gradients * (root + sum(layers[i:])) // (weights // 4) if grow else gradients))
    activations, gradients = max(moments, key=sum)
    parts = dict(weights=weights // shards, gradients=gradients, optimizer=2 * trained // shards,
                 activations=activations, gathered=gathered)
    return parts


def print_sizes(settings):
    """Print what a run takes: on as many processes as torchrun has started, else on one, on eight, and on enough."""
    ranks = find_ranks(settings.replace(device='cpu'))
    share_of_step(settings, ranks)  # validates it
    if not ranks.is_master:
        return
    model, on_gpu = shape_of(settings), settings.device != 'cpu'
    c, counts, per_token = model.config, count_parameters(model), model.flops_per_token()
    a_step, (precision, sizes, name, peak) = tokens_per_step(settings), find_target(settings)

    def need(world_size, parallel):
        return memory(settings, model, world_size, parallel, precision, on_gpu, settings.compile)

    def fewest(parallel, room):
        return next((n for n in range(1 if parallel == 'ddp' else 2, MOST + 1)
                     if (parts := need(n, parallel)) and sum(parts.values()) <= ROOM * room), None)
    total = sum(counts.values())
    say(f'{"RETRO" if settings.use_retrieval else "GPT"} of {count(total)} parameters: {c.n_layer} blocks, '
        f'{c.n_embd:,} wide, {c.n_head} heads, {c.block_size:,} tokens, vocabulary of {c.vocab_size:,}')
    for part, number in counts.items():
        say(f'  {part:<16}{count(number):>10}')
    say(f'step: {a_step:,} tokens, {per_token * a_step / 1e12:,.1f} TFLOP ({per_token / 1e6:,.0f} MFLOP a token)\n'
        f'memory a process, in GB, {settings.batch_size} sequences a micro-batch, {precision}, '
        f'{"" if settings.compile else "not "}compiled, activation_checkpointing '
        f'{settings.activation_checkpointing!r}:')
    found = {size: {parallel: fewest(parallel, room) for parallel in ('ddp', 'fsdp')} for size, room in sizes.items()
             if on_gpu}
    enough = found.get('80 GB', {}) or next(iter(found.values()), {})
    numbers = [ranks.world_size] if ranks.world_size > 1 else [1] if not on_gpu else sorted(
        {1, 8, max(8, enough.get('fsdp') or 8)})
    rows = {f'{parallel} on {n:,}': parts for n in numbers for parallel in ('ddp', 'fsdp')
            if (n > 1 or parallel == 'ddp') and (parts := need(n, parallel))}
    say(' ' * 16 + ''.join(f'{part:>13}' for part in [*next(iter(rows.values())), 'in all']))
    for row, parts in rows.items():
        say(f'  {row:<14}' + ''.join(f'{each / 1e9:>13,.2f}' for each in [*parts.values(), sum(parts.values())]))
    for size, least in found.items():
        say(f'  {size}: ' + ', '.join(f'{parallel} from {n:,}' if n else f'not with {parallel}'
                                      for parallel, n in least.items()))
    if not on_gpu:
        say(f'  this machine has {machine_memory() / 1e9:,.1f}')
    used = max(n for n in numbers if need(n, 'ddp'))
    again = 4 / 3 if settings.activation_checkpointing == 'full' else 1
    seconds = per_token * a_step * again / (used * peak * MFU)
    say(f'time: {seconds:,.2f} s a step on {used:,} x {name}, {seconds * settings.max_iters / 86400:,.1f} days for '
        f'{settings.max_iters:,} steps ({count(a_step * settings.max_iters)} tokens), at {MFU:.0%} of '
        f'{peak / 1e12:,.3g} TFLOP/s' + ', and a third more to compute blocks again' * (again > 1))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f'disk: {(4 * total + 8 * trained) / 1e9:,.2f} GB a checkpoint, {4 * total / 1e9:,.2f} of it weights; ' + (
        f'{settings.keep_checkpoints} are kept, beside the one that is written' if settings.keep_checkpoints else
        'all are kept'))
    say(f"to start: each process makes all {4 * total / 1e9:,.2f} GB of weights in its machine's memory first")
    if settings.use_retrieval and not settings.template:  # tuning fills no database
        chunks = a_step * settings.max_iters // settings.retrieval_chunk_size
        say('\n  '.join(['database, if it holds as many tokens as the run reads (python -m retrieval.populate '
                         '--dry_run=True counts yours):',
                         *describe_collection(settings, chunks, DIMENSIONS, ROW, ROW)]))


def find_target(settings):
    """
    The device that a dry run is for, as its precision, {name: bytes of memory}, name and peak FLOP/s: this CPU if
    `device` says so, else the GPU that is here, else GPUs of the sizes that there are.
    """
    device = 'cuda' if settings.device == 'auto' else settings.device
    if not device.startswith('cuda'):
        device = pick_device(device)  # validates it
        precision = pick_dtype(settings.dtype, device)
        return precision, {'this machine': machine_memory()}, 'this CPU', peak_flops(device, precision)
    if is_device(device):
        precision, gpu = pick_dtype(settings.dtype, device), torch.cuda.get_device_properties(device)
        return precision, {gpu.name: gpu.total_memory}, gpu.name, peak_flops(device, precision)
    precision = 'bfloat16' if settings.dtype == 'auto' else pick_dtype(settings.dtype, device)
    return precision, GPUS, 'H100', PEAK_FLOPS['H100']


def check_memory(settings, ranks):
    """
    UserError, before anything is loaded, if the device cannot hold what a model cannot do without: weights, gradients
    and AdamW's moments. Says so if a step is likely to need more than there is.
    """
    model, on_gpu = shape_of(settings), ranks.device.startswith('cuda')
    room = torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else machine_memory()
    sharing = 1 if on_gpu else ranks.local_world_size  # processes that share it
    shards = ranks.world_size if settings.parallel == 'fsdp' else 1
    total = sum(p.numel() for p in model.parameters())
    trained = 0 if settings.eval_only else sum(p.numel() for p in model.parameters() if p.requires_grad)
    least = (4 * total + 12 * trained) * sharing // shards
    if least > room:
        what = "weights, gradients and AdamW's moments" if trained else 'weights'
        raise UserError(f'a model of {count(total)} parameters cannot fit: its {what} alone take {least / 1e9:,.1f} GB '
                        f'on {"this GPU" if on_gpu else "this machine"}, which has {room / 1e9:,.1f} GB; use a smaller '
                        f"one, or more GPUs and parallel='fsdp' (--dry_run=True says how many)")
    made = 4 * total * ranks.local_world_size  # each process makes the whole model in this memory first
    if on_gpu and made > machine_memory():
        raise UserError(f'a model of {count(total)} parameters is made in main memory first, by each of '
                        f'{ranks.local_world_size} processes: {made / 1e9:,.1f} GB, and this machine has '
                        f'{machine_memory() / 1e9:,.1f} GB; use fewer processes on each of more machines')
    precision = pick_dtype(settings.dtype, ranks.device)
    parts = memory(settings, model, ranks.world_size, settings.parallel, precision, on_gpu, settings.compile)
    if trained and ranks.is_master and parts and sum(parts.values()) * sharing > room:
        say(f'a step is likely to need {sum(parts.values()) * sharing / 1e9:,.1f} GB, and there are {room / 1e9:,.1f}: '
            f"lower batch_size, or set activation_checkpointing to 'full' (--dry_run=True says what takes it)")


def machine_memory():
    """Bytes of this machine's memory, swap included."""
    swap = 0
    with suppress(OSError, AttributeError), open('/proc/meminfo', encoding='ascii') as file:
        swap = 1024 * int(re.search(r'SwapTotal:\s+(\d+)', file.read()).group(1))
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') + swap


def count(number):
    return f'{number / 1e9:,.2f} B' if number >= 1e9 else f'{number / 1e6:,.2f} M'
