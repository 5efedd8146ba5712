"""
The ranks of a command that torchrun has started, without a process group: they tell each other little, through
torchrun's store, and end together. A single process is a world of one.

    with Ranks() as ranks: ... ranks.gather('rows', 5), ranks.check() ...
"""
import json
import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

from configurator import UserError

LAUNCHER = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
POLL = 0.1  # seconds between two looks at the store
LOST = 'the first process of the run has ended, or cannot be reached: start the command again'


class Ranks:
    """This process among them. Leaving the context by an exception ends the others, too; the first one says why."""

    def __init__(self):
        found = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
        self.rank, self.world_size, self.local_rank, self.store = 0, 1, 0, None
        self.local_world_size = 1  # processes on this node
        try:
            if 'RANK' in found or 'WORLD_SIZE' in found:
                self.rank, self.world_size, self.local_rank = (int(found[name]) for name in LAUNCHER[:3])
                self.local_world_size = int(found.get('LOCAL_WORLD_SIZE', self.world_size))
            if self.world_size > 1:
                from torch.distributed import rendezvous
                self.store, _, _ = next(rendezvous('env://', timeout=timedelta(minutes=10)))
        except (KeyError, ValueError, RuntimeError) as error:
            as_text = ', '.join(f'{name}={value}' for name, value in found.items())
            raise UserError(f'the processes cannot be joined ({as_text}; {" ".join(str(error).split())[:200]}): start '
                            f'with torchrun, or unset these') from error

    @property
    def is_master(self):
        return self.rank == 0

    def device(self, setting):
        """Of this rank, by the setting `device`: a GPU of its own. UserError if all are to have the same."""
        if self.world_size == 1 or setting == 'cpu':
            return setting
        if ':' in setting:
            raise UserError(f"device {setting!r} is one GPU, and each of the {self.world_size} processes has its own: "
                            f"use 'cuda'")
        import torch
        return f'cuda:{self.local_rank}' if setting == 'cuda' or torch.cuda.is_available() else 'cpu'

    def gather(self, name, value):
        """All ranks' values, by rank; they have to be what JSON holds. Each name can be used once."""
        if not self.store:
            return [value]
        with lost_store():
            self.store.set(f'{name} {self.rank}', json.dumps(value))
        keys = [f'{name} {rank}' for rank in range(self.world_size)]
        self.wait_for(keys)
        with lost_store():
            return [json.loads(self.store.get(key)) for key in keys]

    def add(self, name, number):
        """The sum of what all ranks have added up to now."""
        with lost_store():
            return self.store.add(name, number)

    def wait_for(self, keys):
        while not self.has(keys):
            self.check()
            time.sleep(POLL)

    def has(self, keys):
        with lost_store():
            return self.store.check(keys)

    def check(self):
        """End in silence, with its exit code, if another rank has failed."""
        if self.store and self.has(['failed']):
            with lost_store():
                sys.exit(int(self.store.get('failed')))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if not self.store:
            return
        is_told, code = False, getattr(error, 'exit_code', 1)
        try:
            if kind and kind is not SystemExit:
                is_told = self.store.add('failures', 1) > 1  # by another rank
                self.store.set('failed', str(code))
            # the first rank may hold the store: it leaves last
            self.store.set(f'left {self.rank}', '')
            deadline = time.monotonic() + 30
            while self.is_master and time.monotonic() < deadline and not self.store.check(
                    [f'left {rank}' for rank in range(self.world_size)]):
                time.sleep(POLL)
        except (RuntimeError, OSError):
            pass  # it is gone
        if is_told:
            sys.exit(code)


@contextmanager
def lost_store():
    """Raise a UserError in place of torch's, when the store is gone."""
    try:
        yield
    except RuntimeError as error:  # DistNetworkError is one
        raise UserError(LOST) from error
