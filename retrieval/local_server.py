"""
Milvus Lite in a process of its own, which all processes of a user on this machine share: whoever comes first starts it,
whoever comes later joins it, and it ends when the last one has left, however that was. It never holds the GIL of a
training process, and training, sampling and filling can use one local file at once.

    lease = join_server('out/milvus.db')    # lease.address is its URI, until lease.close() or the end of the process

It listens on a Unix socket in a folder that only the user can enter. Three files in the database's folder coordinate:
.nanoretro-start is locked by whoever decides that a server starts or ends; .nanoretro-lease is locked, shared, by each
process that uses it; .nanoretro-server is locked by the server, and holds its address and process id. The system drops
the locks of a process that is killed.

`python -m retrieval.local_server out/milvus.db` is that process.
"""
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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


@dataclass
class Lease:
    """The right to use a local database's server, for as long as it is open."""
    address: str
    pid: int  # of the server
    file: IO

    def close(self):
        self.file.close()


def join_server(path, create=False):
    """
    A Lease on the server of the database at `path`, which is started if there is none. With `create` a missing
    database is made, and the server is to write: it gets its share of the CPU. UserError if it cannot be opened.
    """
    if create:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise UserError(f'retrieval_milvus_uri {path!r} cannot be created there ({error.strerror}): name a path '
                            f'in a folder that you may write to') from error
    try:
        lease = open(os.path.join(path, '.nanoretro-lease'), 'a')
        fcntl.flock(lease, fcntl.LOCK_SH)
        with open(os.path.join(path, '.nanoretro-start'), 'a') as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            with open(os.path.join(path, '.nanoretro-server'), 'a+') as server:
                if try_lock(server):
                    fcntl.flock(server, fcntl.LOCK_UN)
                    start_server(path, NICENESS * (not create))
                server.seek(0)
                address, pid = server.read().split()
                return Lease(address, int(pid), lease)
    except OSError as error:
        raise UserError(f'retrieval_milvus_uri {path!r} cannot be used ({error.strerror}): it must be a database of '
                        f'Milvus Lite, in a folder that you may write to') from error


def try_lock(file):
    """Lock an open file exclusively, if no process has it locked. Whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def start_server(path, niceness):
    """Start the server of the database at `path`, and wait until it serves. UserError if it cannot."""
    if why_slow():
        print(why_slow(), file=sys.stderr)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([root, *sys.path]), 'OMP_NUM_THREADS': '1'}
    with tempfile.TemporaryFile('w+') as stderr:
        with subprocess.Popen([sys.executable, '-m', 'retrieval.local_server', path, str(niceness)], env=environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            is_ready = process.stdout.readline() == 'ready\n'
        if not is_ready:
            stderr.seek(0)
            raise cannot_start(path, stderr.read())


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
    ready = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever libraries print must not be taken for the answer
    gc.set_threshold(100_000)  # a search makes many small objects and no cycles
    locked = open(os.path.join(path, '.nanoretro-server'), 'a+')
    fcntl.flock(locked, fcntl.LOCK_EX)
    locked.seek(0)
    old_folder = os.path.dirname(locked.readline().strip().removeprefix('unix:'))
    if os.path.dirname(old_folder) == tempfile.gettempdir() and os.path.basename(old_folder).startswith(PREFIX):
        shutil.rmtree(old_folder, ignore_errors=True)  # of a server that was killed
    import grpc
    import milvus_lite.db
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from pymilvus.grpc_gen.milvus_pb2_grpc import add_MilvusServiceServicer_to_server
    if not why_slow():
        from retrieval.lite_collection import ArrayCollection
        milvus_lite.db.Collection = ArrayCollection
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:  # for the user alone
        database = milvus_lite.db.MilvusLite(path)
        # one worker: search parameters are stored in the index, where a concurrent search would overwrite them
        server = grpc.server(ThreadPoolExecutor(1), options=OPTIONS)
        add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
        server.add_insecure_port(f'unix:{folder}/socket')
        server.start()
        locked.truncate(0)
        locked.write(f'unix:{folder}/socket\n{os.getpid()}\n')
        locked.flush()
        print('ready', file=ready, flush=True)
        ready.close()
        for descriptor in (1, 2):  # what libraries log from here on would fill a file that nobody reads
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        with open(os.path.join(path, '.nanoretro-start'), 'a') as start:
            while True:
                time.sleep(PATIENCE)
                fcntl.flock(start, fcntl.LOCK_EX)
                with open(os.path.join(path, '.nanoretro-lease'), 'a') as lease:
                    if try_lock(lease):  # nobody is left, and who comes now waits until the database is closed
                        server.stop(grace=0)
                        database.close()
                        locked.close()
                        return
                fcntl.flock(start, fcntl.LOCK_UN)


if __name__ == '__main__':
    main()
