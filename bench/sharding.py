"""
What a rank holds of a model that two processes share as copies (ddp) or as shards (fsdp), with and without activation
checkpointing: bytes of parameters, gradients and optimizer, predicted and measured after a step, and the peak memory of
the process over two steps. Gloo on this machine's CPUs, random batches with neighbors and pointers.

    python bench/sharding.py [--quick] [--ranks=2]

Predicted are 4, 4 and 8 bytes a parameter, over all ranks with fsdp; and what fsdp saves of the peak, which is where
the backward pass begins: ddp's gradients have their memory then, too, fsdp has shards of weights and optimizer, no
gradient yet, and in whole the weights of the embedding's unit and of two blocks. Prints a table and one JSON line.
"""
import argparse
import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from configurator import user_errors_as_one_line
from model import RETRO, RETROConfig
from training.distributed import Ranks
from training.parallel import clip_gradients, local, own_parameters, parallelize

ARMS = [('ddp', 'none'), ('fsdp', 'none'), ('ddp', 'selective'), ('ddp', 'full'), ('fsdp', 'full')]
SHAPE = dict(n_layer=12, n_head=8, n_embd=512, vocab_size=8192, block_size=256)
QUICK = dict(n_layer=3, n_head=2, n_embd=64, vocab_size=512, block_size=128)
CONSTANT = dict(retrieval_chunk_size=64, retrieval_pointers=8)
BYTES = dict(parameters=4, gradients=4, optimizer=8)


def make_batch(config, size, seed):
    """Random tokens (B, T), targets, neighbors, their mask, doc_ids and pointers."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (size, config.block_size), generator=draw)
    L, K, R = config.block_size // config.retrieval_chunk_size, 2, 2 * config.retrieval_chunk_size
    neighbors = torch.randint(config.vocab_size, (size, L, K, R), generator=draw)
    pointers = torch.stack([torch.randint(config.vocab_size, (*tokens.shape, 8), generator=draw),
                            torch.randint(1, 9, (*tokens.shape, 8), generator=draw),
                            torch.full((*tokens.shape, 8), 24)], dim=-1)
    return (tokens, tokens.roll(-1, 1), neighbors, torch.ones_like(neighbors, dtype=torch.bool),
            torch.zeros(size, L, dtype=torch.int64), pointers)


def memory(name):
    """A line of this process' /proc/self/status, in bytes."""
    text = Path('/proc/self/status').read_text()
    return int(text.split(f'{name}:')[1].split()[0]) * 1024


def work(rank, ranks, port, shape, arm, size, queue):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    ctypes.CDLL('libc.so.6').mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed leaves the process at once
    dist.init_process_group('gloo')
    settings = SimpleNamespace(parallel=arm[0], activation_checkpointing=arm[1])
    torch.manual_seed(0)
    before = memory('VmRSS')
    config = RETROConfig(**shape, **CONSTANT)
    model = RETRO(config)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model, *model.transformer.h)]
    wrapped = parallelize(model, settings, Ranks(rank, ranks, ranks, 'cpu'), 'float32', is_compiled=False)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu')
    held = dict(parameters=sum(local(p).nbytes for p in own_parameters(model).values()))
    Path('/proc/self/clear_refs').write_text('5')  # start the peak anew
    for step in range(2):
        _, loss = wrapped(*make_batch(config, size, seed=step * ranks + rank))
        loss.backward()
        clip_gradients(wrapped, 1.0)
        optimizer.step()
        held['gradients'] = sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad(set_to_none=True)
    held['optimizer'] = sum(local(value).nbytes for state in optimizer.state.values() for value in state.values())
    if rank == 0:
        queue.put((sizes, held, memory('VmHWM') - before))
    dist.destroy_process_group()


def measure(ranks, shape, arm, size):
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = found.getsockname()[1]
    queue = multiprocessing.get_context('spawn').SimpleQueue()
    multiprocessing.spawn(work, (ranks, port, shape, arm, size, queue), nprocs=ranks)
    return queue.get()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='a small model')
    parser.add_argument('--ranks', type=int, default=2, help='processes (default: %(default)s)')
    arguments = parser.parse_args()
    shape, size = (QUICK, 2) if arguments.quick else (SHAPE, 4)
    report = dict(ranks=arguments.ranks, **shape, batch_size=size, arms={})
    print(f'{"":<16}' + ''.join(f'{name:>26}' for name in (*BYTES, 'peak')))
    for arm in ARMS:
        (whole, *blocks), held, peak = measure(arguments.ranks, shape, arm, size)
        among = arguments.ranks if arm[0] == 'fsdp' else 1
        predicted = {name: count * whole // among for name, count in BYTES.items()}
        name = '_'.join(arm)
        report['arms'][name] = dict(predicted=predicted, measured=held, peak=peak)
        shown = [f'{held[part] / 1e6:,.1f} ({predicted[part] / 1e6:,.1f} predicted)' for part in BYTES]
        print(f'{name:<16}' + ''.join(f'{text:>26}' for text in (*shown, f'{peak / 1e6:,.1f} MB')), flush=True)
    at_once = whole - sum(blocks) + 2 * max(blocks)
    report['predicted_saving'] = 16 * whole - 12 * whole // arguments.ranks - 4 * at_once
    report['measured_saving'] = report['arms']['ddp_none']['peak'] - report['arms']['fsdp_none']['peak']
    saved = ' MB, measured '.join(f'{report[f"{how}_saving"] / 1e6:,.1f}' for how in ('predicted', 'measured'))
    print(f'{whole / 1e6:.1f} M parameters; what fsdp saves of the peak, without checkpointing: predicted {saved} MB')
    print(json.dumps(report))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
