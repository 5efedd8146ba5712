"""The folder of a run: that it can be written, that one run at a time writes it, and what an earlier run left in it."""
import fcntl
import itertools
import os
import tempfile
from contextlib import nullcontext

from system import say

from configurator import UserError

LOCK = '.lock'
EARLIER_RUN = ('checkpoints', 'ckpt.pt', 'metrics.jsonl', 'loss.png')  # what a new run in the same out_dir sets aside


def check_writable(out_dir):
    """UserError if out_dir cannot be written, or if another run is writing there. It is not created yet."""
    if not out_dir.strip():
        raise UserError("out_dir is empty: name a folder, such as 'out'")
    if '\0' in out_dir or any(len(os.fsencode(name)) > 255 for name in out_dir.split(os.sep)):
        raise UserError(f'out_dir {out_dir[:300]!r} is not a valid folder name: name another')
    existing = os.path.abspath(out_dir)
    while not os.path.lexists(existing):  # a dangling link exists
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise UserError(f'out_dir {out_dir!r} cannot be written ({existing} is not a writable folder): name another')
    if os.path.lexists(os.path.join(out_dir, LOCK)):
        open_lock(out_dir).close()


def lock_run(out_dir, cleanup):
    """Create out_dir and lock it until `cleanup`, an ExitStack, is closed. UserError if another run has locked it."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        file = cleanup.enter_context(open_lock(out_dir))
        file.truncate(0)
        file.write(f'{os.getpid()}\n')
        file.flush()
    except OSError as error:
        raise UserError(f'out_dir {out_dir!r} cannot be written ({error.strerror}): name another') from error


def check_shared(out_dir, ranks):
    """UserError on all ranks if out_dir, which the master has created, is not the same folder to all of them."""
    with tempfile.TemporaryDirectory(dir=out_dir) if ranks.is_master else nullcontext() as probe:
        name = ranks.broadcast(os.path.basename(probe) if ranks.is_master else None)
        found = ranks.gather_numbers(os.path.isdir(os.path.join(out_dir, name)))
    if not found.all():
        raise UserError(f"out_dir {out_dir!r} is not the same folder on all nodes (rank {found.argmin().item()} does "
                        f"not find rank 0's), and each process of parallel 'fsdp' writes its shard there: name a "
                        f'folder on a file system that they share')


def open_lock(out_dir):
    """out_dir's lock file, locked for as long as it is open. UserError if another process has locked it."""
    path = os.path.join(out_dir, LOCK)
    try:
        file = open(path, 'a+')
    except OSError as error:
        raise UserError(f'{path} cannot be opened ({error.strerror}): remove it, or name another out_dir') from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        with file:
            raise UserError(f'another run (process {file.read().strip()}) is writing to out_dir {out_dir!r}: wait for '
                            f'it, or name another out_dir') from None
    except OSError:
        say(f'the file system of out_dir {out_dir!r} has no locks: see that no other run writes there')
    return file


def set_earlier_run_aside(out_dir):
    """Move what an earlier run left in out_dir into a folder of its own. Returns that folder, or None."""
    earlier = [name for name in EARLIER_RUN if os.path.lexists(os.path.join(out_dir, name))]
    if not earlier:
        return None
    folder = next(name for name in (f'{out_dir}/previous-{n}' for n in itertools.count(1)) if not os.path.exists(name))
    os.makedirs(folder)
    for name in earlier:
        os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder
