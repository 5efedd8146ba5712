"""
The ranks of a run: one process, or those that torchrun starts. A single process is a world of size 1, so callers need
no special case.
"""
import functools
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from system import drop_lost_output, pick_device

import torch
import torch.distributed as dist

from configurator import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LAUNCHER = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')  # what torchrun sets


@dataclass
class Ranks:
    """This process among the processes of the run."""
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # processes on this node
    device: str = 'cpu'
    control: object = None  # a gloo group with a long timeout: ranks wait here while one evaluates or waits for Milvus

    @property
    def is_master(self):
        return self.rank == 0

    def sum(self, tensor):
        """The sum of a tensor over all ranks, on the CPU."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor.cpu()

    def gather_numbers(self, *numbers):
        """All ranks' integers (world_size, n), on the CPU; it waits for no GPU."""
        table = torch.zeros(self.world_size, len(numbers), dtype=torch.int64)
        table[self.rank] = torch.tensor(numbers)
        if self.world_size > 1:
            dist.all_reduce(table, group=self.control)
        return table

    def broadcast(self, value):
        """The master's value."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def gather(self, value):
        """All ranks' values, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self):
        if self.world_size > 1:
            dist.barrier(group=self.control)


def find_ranks(settings):
    """The Ranks of this run by torchrun's environment, not joined yet."""
    known = ('auto', *(name for name in dist.Backend.backend_list if name not in ('undefined', 'fake')))
    if any(part.rpartition(':')[2] not in known for part in settings.backend.split(',')):  # cpu:gloo,cuda:nccl
        raise UserError(f'backend {settings.backend!r} is none of {str(known)[1:-1]}')
    found = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    if not found:
        return Ranks(device=pick_device(settings.device))
    as_text = ', '.join(f'{name}={value}' for name, value in found.items())
    try:
        rank, world_size, local_rank, local_world_size = (int(found[name]) for name in LAUNCHER)
        if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
            raise ValueError
    except (KeyError, ValueError):
        raise half_set_error(as_text) from None
    device = pick_device(settings.device)
    if world_size > 1 and ':' in device:
        raise UserError(f"device {device!r} is one GPU, and each of the {world_size} processes has its own: use 'cuda'")
    if device == 'cuda':
        device = pick_device(f'cuda:{local_rank}')
    return Ranks(rank, world_size, local_world_size, device)


def half_set_error(found):
    return UserError(f"the launcher's environment is incomplete or contradictory ({found}): start with torchrun, which "
                     f'sets {", ".join(LAUNCHER)}, MASTER_ADDR and MASTER_PORT, or unset all of them')


def join_ranks(ranks, settings, cleanup):
    """Set up the process group of the Ranks; `cleanup`, an ExitStack, destroys it."""
    if ranks.world_size == 1:
        return
    if not {'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys():
        raise half_set_error('no MASTER_ADDR or MASTER_PORT')
    auto = 'nccl' if ranks.device.startswith('cuda') else 'gloo'
    try:
        dist.init_process_group(settings.backend if settings.backend != 'auto' else auto)
    except (ValueError, RuntimeError) as error:  # torch's own errors of networks are RuntimeErrors
        found = ', '.join(f'{name}={os.environ[name]}' for name in ('MASTER_ADDR', 'MASTER_PORT'))
        raise UserError(f'the processes cannot be joined ({found}, backend {settings.backend}): '
                        f'{" ".join(str(error).split())[:300]}') from error
    cleanup.push(functools.partial(leave_ranks, ranks))
    ranks.control = dist.new_group(backend='gloo', timeout=timedelta(days=7))


def has_lost_a_peer(error):
    """Whether an exception is what a collective raises if another process has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and '/gloo/' in str(error))


class PeerLost(UserError):
    """Another process of the run has ended without a word to this one."""
    exit_code = 1


def leave_ranks(ranks, _, error, __):
    """End the process group. What a collective raises if another process has ended becomes a PeerLost."""
    dist.destroy_process_group()
    if has_lost_a_peer(error):
        raise PeerLost(f'rank {ranks.rank} has lost another process, which has ended or cannot be reached '
                       f'({" ".join(str(error).split())[:200]}): the output of that process, or its node, says '
                       f'why') from error


def share_of_step(settings, ranks):
    """
    This rank's micro-batches per step, and the sequences of each. If there are more ranks than micro-batches, several
    ranks share one. UserError if the shares are not equal.
    """
    ranks_per_batch = max(1, ranks.world_size // settings.gradient_accumulation_steps)
    total = settings.gradient_accumulation_steps * ranks_per_batch
    if total % ranks.world_size or settings.batch_size % ranks_per_batch:
        raise UserError(f'gradient_accumulation_steps {settings.gradient_accumulation_steps} x batch_size '
                        f'{settings.batch_size} cannot be shared by {ranks.world_size} processes: make '
                        f'gradient_accumulation_steps a multiple of {ranks.world_size}')
    return total // ranks.world_size, settings.batch_size // ranks_per_batch


class Stopped(Exception):
    """A StopSignals asks to stop."""


class StopSignals:
    """
    The signals that ask a run to stop, remembered until the ranks agree to. A second Ctrl-C interrupts at once; any
    other signal after the first one is a launcher's, to be sure, and asks for the same stop.
    """

    def __init__(self, cleanup):
        """`cleanup`, an ExitStack, restores the handlers."""
        self.received = []
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                cleanup.callback(signal.signal, number, signal.signal(number, self._on_signal))

    def _on_signal(self, number, frame):
        if number == signal.SIGINT in self.received:
            raise KeyboardInterrupt
        self.received.append(number)
        drop_lost_output()  # a hangup, or Ctrl-C that ended a program behind a pipe, too
        if len(self.received) == 1:
            with suppress(OSError):
                os.write(2, b'\nstopping with a checkpoint; Ctrl-C again to stop immediately\n')

    def check(self):
        """Raise Stopped if there is one."""
        if self.received:
            raise Stopped

    def ignore(self):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
