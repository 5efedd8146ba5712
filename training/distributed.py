"""
The ranks of a run: one process, or those that torchrun starts. A single process is a world of size 1, so callers need
no special case.
"""
import os
import signal
from dataclasses import dataclass
from datetime import timedelta

from system import pick_device

import torch
import torch.distributed as dist

from configurator import UserError


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

    def max(self, number):
        """The largest of an integer over all ranks."""
        number = torch.tensor(number)
        if self.world_size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return number.item()

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
    device = pick_device(settings.device)
    if 'RANK' not in os.environ:
        return Ranks(device=device)
    if device.startswith('cuda'):
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    return Ranks(int(os.environ['RANK']), int(os.environ['WORLD_SIZE']), int(os.environ.get('LOCAL_WORLD_SIZE', 1)),
                 device)


def join_ranks(ranks, settings, cleanup):
    """Set up the process group of the Ranks; `cleanup`, an ExitStack, destroys it."""
    if ranks.world_size == 1:
        return
    if ranks.device.startswith('cuda'):
        torch.cuda.set_device(ranks.device)
    auto = 'nccl' if ranks.device.startswith('cuda') else 'gloo'
    dist.init_process_group(settings.backend if settings.backend != 'auto' else auto)
    cleanup.callback(dist.destroy_process_group)
    ranks.control = dist.new_group(backend='gloo', timeout=timedelta(days=7))


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


class StopSignals:
    """Ctrl-C and SIGTERM, remembered until the ranks agree to stop. The second one interrupts at once."""

    def __init__(self, cleanup):
        """`cleanup`, an ExitStack, restores the handlers."""
        self.received = []
        for number in (signal.SIGINT, signal.SIGTERM):
            cleanup.callback(signal.signal, number, signal.signal(number, self._on_signal))

    def _on_signal(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received.append(number)
        os.write(2, b'\nstopping with a checkpoint; send it again to stop immediately\n')

    def ignore(self):
        """Ignore further signals: launchers may repeat theirs."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
