"""The folder of a run: that it can be written, that one run at a time writes it, and what an earlier run left in it."""
import fcntl
import itertools
import os

from configurator import UserError

LOCK = '.lock'
EARLIER_RUN = ('checkpoints', 'ckpt.pt', 'metrics.jsonl', 'loss.png')  # what a new run in the same out_dir sets aside


def check_writable(out_dir):
    """UserError if out_dir cannot be written, or if another run is writing there. It is not created yet."""
    if not out_dir.strip():
        raise UserError("out_dir is empty: name a folder, such as 'out'")
    existing = os.path.abspath(out_dir)
    while not os.path.lexists(existing):  # a dangling link exists
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise UserError(f'out_dir {out_dir!r} cannot be written ({existing} is not a writable folder): name another')
    if os.path.isfile(os.path.join(out_dir, LOCK)):
        with open(os.path.join(out_dir, LOCK), 'a+') as file:
            take_lock(file, out_dir)


def lock_run(out_dir, cleanup):
    """Create out_dir and lock it until `cleanup`, an ExitStack, is closed. UserError if another run has locked it."""
    os.makedirs(out_dir, exist_ok=True)
    file = cleanup.enter_context(open(os.path.join(out_dir, LOCK), 'a+'))
    take_lock(file, out_dir)
    file.truncate(0)
    file.write(f'{os.getpid()}\n')
    file.flush()


def take_lock(file, out_dir):
    """Lock an open file for as long as it is open. UserError if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f'another run (process {file.read().strip()}) is writing to out_dir {out_dir!r}: wait for it, '
                        f'or name another out_dir') from None
    except OSError:
        pass  # a file system without locks


def set_earlier_run_aside(out_dir):
    """Move what an earlier run left in out_dir into a folder of its own. Returns that folder, or None."""
    earlier = [name for name in EARLIER_RUN if os.path.exists(os.path.join(out_dir, name))]
    if not earlier:
        return None
    folder = next(name for name in (f'{out_dir}/previous-{n}' for n in itertools.count(1)) if not os.path.exists(name))
    os.makedirs(folder)
    for name in earlier:
        os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder
