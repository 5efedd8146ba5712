"""
Machine-dependent helpers: device, precision, threads, allocator, peak FLOP/s, terminal. Import it before torch, whose
thread library reads its environment once, at import (ruff's isort keeps that order).
"""
import os
import sys
import time
from contextlib import nullcontext

# Threads that spin at a barrier burn the time that a descheduled partner needs: beside one busy process, two threads on
# two cores run at a tenth. A bounded spin costs nothing on a quiet machine, where not to spin at all costs 2 to 10 %.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '10000')

import torch
from tqdm import tqdm

from configurator import UserError

PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40': 181e12, 'L4': 121e12, '4090': 165e12,
              '3090': 71e12, 'V100': 125e12, 'T4': 65e12}  # dense half precision, by the vendors' data sheets


def pick_device(device):
    """'auto' is the first GPU, or else the CPU."""
    return device if device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'


def pick_dtype(dtype, device):
    """The precision to compute in; 'auto' is bfloat16 where the processor is fast at it. UserError if unknown."""
    if dtype != 'auto':
        if dtype not in ('float32', 'bfloat16', 'float16'):
            raise UserError(f"dtype {dtype!r} is none of 'auto', 'float32', 'bfloat16', 'float16'")
        return dtype
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
    is_fast = device == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return 'bfloat16' if is_fast else 'float32'


def autocast(precision, device):
    """The context to run the model in. It can be entered again and again."""
    return (torch.amp.autocast(device.split(':')[0], dtype=getattr(torch, precision)) if precision != 'float32'
            else nullcontext())


def keep_freed_memory():
    """
    Have glibc keep large freed blocks. By default it returns them to the system and faults each page in again at the
    next step, which takes a fifth of a small model's time on a CPU.
    """
    try:
        import ctypes
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except OSError:
        pass  # another C library


def peak_flops(device, precision):
    """The device's peak FLOP/s: from data sheets for known GPUs, else measured with a large matrix product."""
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name()
        for known, flops in PEAK_FLOPS.items():
            if known in name:
                return flops
    a = torch.ones(2048, 2048, device=device, dtype=getattr(torch, precision))
    fastest = float('inf')
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 2048 ** 3 / fastest


def get_rng_state():
    """The state of torch's generators, as tensors."""
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)


def set_rng_state(state):
    torch.set_rng_state(state['cpu'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def say(message):
    """Print a line above the progress bar, if there is one."""
    tqdm.write(message)
    sys.stdout.flush()
