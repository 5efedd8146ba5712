"""
Milvus Lite in a process of its own, for a run that retrieves from a local file: it never holds the training process's
GIL, and all ranks of a node reach it at its address.

    with local_server('out/milvus.db', 'chunks') as (address, process): ...

`python -m retrieval.local_server out/milvus.db` is that process. It writes its address to stdout, and exits on EOF of
stdin, hence also when its parent is killed.
"""
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version

from configurator import UserError
from retrieval.knowledge_base import cannot_open, check_local_path

WRITTEN_FOR = '3.2.2'  # version of Milvus Lite whose internals lite_collection.py relies on
NICENESS = 19  # of the processes that retrieve: on a shared CPU they take what the training step leaves


def why_slow():
    """Why the fast path of lite_collection.py is not used, or ''."""
    installed = version('milvus-lite')
    return '' if installed == WRITTEN_FOR else (
        f'Milvus Lite is version {installed}, and the fast path of retrieval/lite_collection.py was written for '
        f'{WRITTEN_FOR}: searches of the local file take several times as long')


@contextlib.contextmanager
def local_server(path, collection):
    """
    Serve the database at `path`; yields its http address and the process. UserError if it cannot be opened, or does
    not exist and so does not have the collection.
    """
    check_local_path(path, collection, create=False)
    if why_slow():
        print(why_slow(), file=sys.stderr)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([root, *sys.path]), 'OMP_NUM_THREADS': '1'}
    with tempfile.TemporaryFile('w+') as stderr:
        process = subprocess.Popen([sys.executable, '-m', 'retrieval.local_server', path], env=environment, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
        try:
            address = process.stdout.readline().strip()
            if not address:
                process.wait()
                stderr.seek(0)
                raise cannot_start(path, stderr.read())
            yield address, process
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def cannot_start(path, stderr):
    """The UserError for a server that ended before it served, from its stderr."""
    last_line = (stderr.strip().splitlines() or ['it said nothing'])[-1]
    if 'DataDirLockedError' in last_line:
        return cannot_open(path)
    return UserError(f'Milvus Lite cannot serve {path}: {last_line}; see that it is a database of Milvus Lite, or name '
                     f'another retrieval_milvus_uri')


def main():
    for number in (signal.SIGINT, signal.SIGTERM):  # ignore Ctrl-C: the run needs its database to the end
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    address = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever libraries print must not be taken for the address
    gc.set_threshold(100_000)  # a search makes many small objects and no cycles
    import milvus_lite.db
    from milvus_lite.adapter.grpc.server import start_server_in_thread
    if not why_slow():
        from retrieval.lite_collection import ArrayCollection
        milvus_lite.db.Collection = ArrayCollection
    # one worker: search parameters are stored in the index, where a concurrent search would overwrite them
    server, database, port = start_server_in_thread(sys.argv[1], host='127.0.0.1', port=0, max_workers=1)
    print(f'http://127.0.0.1:{port}', file=address, flush=True)
    for descriptor in (1, 2):  # what libraries log from here on would fill the parent's temporary file
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    sys.stdin.read()
    server.stop(grace=0)
    database.close()


if __name__ == '__main__':
    main()
