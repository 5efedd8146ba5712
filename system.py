"""
Machine-dependent helpers: device, precision, threads, allocator, peak FLOP/s, terminal. Import it before torch, whose
thread library reads its environment once, at import (ruff's isort keeps that order).
"""
import multiprocessing
import os
import re
import select
import shutil
import sys
import sysconfig
import threading
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
    """The torch device for a setting; 'auto' is the first GPU, or else the CPU. UserError if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == 'auto':
        return 'cuda' if count else 'cpu'
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', device)
    if not match:
        raise UserError(f"device {device!r} is none of 'auto', 'cpu', 'cuda', 'cuda:1'")
    if device != 'cpu' and int(match.group(1) or 0) >= count:
        raise UserError(f'device {device!r} is not here: torch finds {count or "no"} GPU{"s" * (count != 1)}; use '
                        f"'auto', which is the first GPU or else the CPU")
    if match.group(1):
        torch.cuda.set_device(device)  # allocator, random state and peak FLOP/s are those of the current device
    return device


def is_device(device):
    """Whether pick_device finds it."""
    try:
        return bool(pick_device(device))
    except UserError:
        return False


def pick_dtype(dtype, device):
    """The precision to compute in; 'auto' is bfloat16 where the processor is fast at it. UserError if unknown."""
    if dtype != 'auto':
        if dtype not in ('float32', 'bfloat16', 'float16'):
            raise UserError(f"dtype {dtype!r} is none of 'auto', 'float32', 'bfloat16', 'float16'")
        if dtype == 'float16' and device == 'cpu':
            raise UserError("dtype 'float16' takes minutes per step on a CPU: use 'bfloat16' or 'float32'")
        return dtype
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    is_fast = device == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return 'bfloat16' if is_fast else 'float32'


def why_not_compile(device):
    """Why torch.compile cannot work here, or ''. Inductor compiles C++ for CPUs; Triton compiles C, too, for GPUs."""
    if device.startswith('cuda'):
        from torch.utils._triton import has_triton
        if not has_triton():
            return 'Triton is not installed, or does not support this GPU'
        if not any(shutil.which(name) for name in (os.environ.get('CC', ''), 'cc', 'gcc', 'clang') if name):
            return 'there is no C compiler; install gcc, or set CC'
    else:
        from torch._inductor import cpp_builder, exc
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return 'there is no C++ compiler; install g++, or set CXX'
        if not shutil.which('openssl'):
            return 'there is no openssl, which torch.compile calls; install it'
    include = sysconfig.get_paths()['include']
    return '' if os.path.isfile(os.path.join(include, 'Python.h')) else f'there is no Python.h in {include}'


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
    size = 4096 if device.startswith('cuda') else 1024
    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    fastest = float('inf')
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size ** 3 / fastest


def quiet_transformers():
    """Without transformers' reports and progress bars of loading; a download's bar is huggingface_hub's."""
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def end_with_parent():
    """End this process, which multiprocessing has started, when the one that started it ends, however that is."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def get_rng_state():
    """The state of torch's generators, as tensors."""
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)


def set_rng_state(state):
    torch.set_rng_state(state['cpu'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def say(message):
    """Print a line above the progress bar, if there is one. That nobody reads it any more is no reason to stop."""
    try:
        tqdm.write(message)
        sys.stdout.flush()
    except OSError:
        drop_lost_output()


def drop_lost_output():
    """If the terminal is gone, or the program that read a pipe, send what is printed from now on nowhere."""
    for descriptor in (1, 2):
        state = select.poll()
        state.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in state.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
