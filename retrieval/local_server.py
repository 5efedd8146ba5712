"""
Milvus Lite in a process of its own, which all processes of a user on this machine share: whoever comes first starts it,
whoever comes later joins it, and it ends when the last one has left, however that was. It never holds the GIL of a
training process, and training, sampling and filling can use one local file at once.

    lease = join_server('out/milvus.db')    # lease.address is its URI, until lease.close() or the end of the process

It listens on a Unix socket in a folder that only the user can enter. Three files in the database's folder coordinate:
.nanoretro-start is locked by whoever decides that a server starts or ends; .nanoretro-lease is locked, shared, by each
process that uses it; .nanoretro-server is locked by the server, and holds its address, its process id and the file's
inode, which a copied database does not share. The system drops the locks of a process that is killed.

`python -m retrieval.local_server out/milvus.db` is that process.
"""
import fcntl
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import IO

from configurator import UserError

WRITTEN_FOR = '3.2.2'  # version of Milvus Lite whose internals lite_collection.py relies on
NICENESS = 19  # of the processes that retrieve: on a shared CPU they take what the training step leaves
PREFIX = 'nanoretro-server-'  # of the folder of the socket
OPTIONS = [('grpc.max_receive_message_length', 1 << 28), ('grpc.max_send_message_length', 1 << 28),  # bytes
           ('grpc.http2.max_ping_strikes', 0)]  # clients ping however long they embed between two requests
PATIENCE = 0.5  # seconds between two looks at whether anybody is left


class Unreachable(UserError):
    """No Milvus answers, or it cannot serve yet. It may come back."""


@dataclass
class Lease:
    """The right to use a local database's server, for as long as it is open."""
    address: str
    pid: int  # of the server
    file: IO

    def close(self):
        self.file.close()


def is_local(uri):
    """Whether a retrieval_milvus_uri is a local file."""
    return '://' not in uri


def join_server(path, create=False, timeout=600):
    """
    A Lease on the server of the database at `path`, which is started if there is none. With `create` a missing
    database is made, and a server that starts runs at normal priority, since it will be written to. UserError if it
    cannot be opened; Unreachable if another process takes more than `timeout` seconds to start or stop the server.
    """
    if create:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise UserError(f'retrieval_milvus_uri {path!r} cannot be created there ({error.strerror}): name a path '
                            f'in a folder that you may write to') from error
    try:
        with ExitStack() as opened:
            # 'a+': NFS requires read access for a shared lock, and write access for an exclusive one
            lease = opened.enter_context(open(os.path.join(path, '.nanoretro-lease'), 'a+'))
            with (open(os.path.join(path, '.nanoretro-start'), 'a+') as start,
                  open(os.path.join(path, '.nanoretro-server'), 'a+') as server):
                deadline = time.monotonic() + timeout
                wait_for(lambda: try_lock(start), path, deadline)
                fcntl.flock(lease, fcntl.LOCK_SH)
                address, pid, _ = wait_for(lambda: find_server(server, path, NICENESS * (not create)), path, deadline)
            if not os.path.exists(address.removeprefix('unix:')):
                raise UserError(f'retrieval_milvus_uri {path!r} is served by process {pid} of another user, machine '
                                f'or container, which cannot be reached from here: wait for its end, or use a Milvus '
                                f'server')
            opened.pop_all()
            return Lease(address, int(pid), lease)
    except OSError as error:
        raise UserError(f'retrieval_milvus_uri {path!r} cannot be used ({error.strerror}): it must be a database of '
                        f'Milvus Lite, in a folder that you may write to') from error


def wait_for(condition, path, deadline):
    """What condition() returns, once that is true. Unreachable after the deadline, by time.monotonic()."""
    started, said = time.monotonic(), False
    while not (found := condition()):
        waited = time.monotonic() - started
        if time.monotonic() > deadline:
            raise Unreachable(f'another process has been starting or stopping the server of {path} for {waited:.0f} s: '
                              f'check whether it is suspended')
        if waited > 10 and not said:
            print(f'waiting for another process to start or stop the server of {path}', file=sys.stderr)
            said = True
        time.sleep(0.05)
    return found


def find_server(file, path, niceness):
    """
    Address, process id and inode that the database's server has written to its open file, or None if it has not yet.
    If no process has the file locked, a server is started.
    """
    if try_lock(file):
        fcntl.flock(file, fcntl.LOCK_UN)
        start_server(path, niceness)
    file.seek(0)
    fields = file.read().split()
    return fields if len(fields) == 3 else None


def try_lock(file):
    """Lock an open file exclusively, if no process has it locked. Whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def start_server(path, niceness):
    """Start the server of the database at `path`, and wait until one serves. UserError if it cannot."""
    if why_slow():
        print(why_slow(), file=sys.stderr)
    forget_server()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([root, *sys.path]), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'retrieval.local_server', os.path.abspath(path), str(niceness)]
    with tempfile.TemporaryFile('w+') as stderr:
        # in a folder of ours: Python looks for modules in the working folder first
        with subprocess.Popen(command, env=environment, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=stderr, text=True) as process:
            is_ready = process.stdout.readline() == 'ready\n'
        if not is_ready:
            stderr.seek(0)
            raise cannot_start(path, stderr.read())


def forget_server():
    """
    Remove from the environment what pymilvus reads at import: the setting retrieval_milvus_uri alone names the server.
    Libraries that read .env files may have put it there again.
    """
    os.environ['PYTHON_DOTENV_DISABLED'] = '1'
    for name in ('MILVUS_URI', 'MILVUS_DEFAULT_CONNECTION'):
        os.environ.pop(name, None)


def why_slow():
    """Why the fast path of lite_collection.py is not used, or ''."""
    installed = version('milvus-lite')
    return '' if installed == WRITTEN_FOR else (
        f'Milvus Lite is version {installed}, and the fast path of retrieval/lite_collection.py was written for '
        f'{WRITTEN_FOR}: searches of the local file take several times as long')


def cannot_start(path, stderr):
    """The UserError for a server that ended before it served, from its stderr."""
    last_line = (stderr.strip().splitlines() or ['it said nothing'])[-1]
    if 'DataDirLockedError' in last_line:
        return UserError(f'Milvus Lite cannot open {path}: a process that is not of nanoRETRO, or of another user or '
                         f'machine, has it open; end it, or name another retrieval_milvus_uri')
    return UserError(f'Milvus Lite cannot serve {path}: {last_line}; see that it is a database of Milvus Lite, or name '
                     f'another retrieval_milvus_uri')


def main():
    path, niceness = sys.argv[1:]
    if os.fork():
        os._exit(0)  # the server is nobody's child, and in a session of its own: it outlives whoever started it
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when nobody uses it any more
        signal.signal(number, signal.SIG_IGN)
    os.nice(int(niceness))
    ready = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print must not be taken for the answer
    gc.set_threshold(100_000)  # a search makes many small objects and no cycles
    locked = open(os.path.join(path, '.nanoretro-server'), 'a+')
    if not try_lock(locked):  # by a server whose starter was killed
        tell(ready)
        return
    inode = str(os.fstat(locked.fileno()).st_ino)
    locked.seek(0)
    fields = locked.read().split()
    locked.truncate(0)
    if len(fields) == 3 and fields[2] == inode:  # a server of this file was killed, and not one of the file copied
        remove_socket(fields[0].removeprefix('unix:'))
    import grpc
    import milvus_lite.db
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from pymilvus.grpc_gen.milvus_pb2_grpc import add_MilvusServiceServicer_to_server
    if not why_slow():
        from retrieval.lite_collection import ArrayCollection
        milvus_lite.db.Collection = ArrayCollection
    # one worker: search parameters are stored in the index, where a concurrent search would overwrite them
    database, pool = milvus_lite.db.MilvusLite(path), ThreadPoolExecutor(1)
    server = grpc.server(pool, options=OPTIONS)
    # for the user alone; the path of a Unix socket holds 107 bytes at most
    folder = tempfile.mkdtemp(prefix=PREFIX, dir='/tmp' if len(os.fsencode(tempfile.gettempdir())) > 70 else None)
    address = f'{folder}/socket'
    add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
    server.add_insecure_port(f'unix:{address}')
    server.start()
    locked.write(f'unix:{address}\n{os.getpid()}\n{inode}\n')
    locked.flush()
    tell(ready)
    for descriptor in (1, 2):  # what libraries log from here on would fill a file that nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    with open(os.path.join(path, '.nanoretro-start'), 'a+') as start:
        while True:
            time.sleep(PATIENCE)
            fcntl.flock(start, fcntl.LOCK_EX)
            with open(os.path.join(path, '.nanoretro-lease'), 'a+') as lease:
                if try_lock(lease):  # nobody is left, and who comes now waits until the database is closed
                    locked.truncate(0)
                    server.stop(grace=0).wait()
                    remove_socket(address)
                    pool.shutdown()  # a request whose client is gone may still be writing
                    database.close()
                    return
            fcntl.flock(start, fcntl.LOCK_UN)


def tell(ready):
    """Tell whoever started this process that a server serves, by a line to the file descriptor `ready`."""
    with suppress(BrokenPipeError):  # it was killed
        os.write(ready, b'ready\n')
    os.close(ready)


def remove_socket(address):
    """Remove the socket and its folder."""
    folder = os.path.dirname(address)
    if os.path.basename(folder).startswith(PREFIX):
        with suppress(OSError):
            os.unlink(address)
        with suppress(OSError):
            os.rmdir(folder)


if __name__ == '__main__':
    main()
