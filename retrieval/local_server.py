"""
Milvus Lite in a process of its own, for a run that retrieves from a local file: it takes nothing from the training
process' Python, and all ranks of a node find it at its address.

    with local_server('out/milvus.db', 'chunks') as (address, process): ...

`python -m retrieval.local_server out/milvus.db` is that process. It writes its address to stdout, and ends when its
stdin does, so also when whoever started it was killed.
"""
import contextlib
import gc
import os
import signal
import subprocess
import sys

from retrieval.knowledge_base import can_not_open, check_local_path

READERS = 'nanoretro column readers'
NICENESS = 19  # of the processes that retrieve: on a shared CPU they take what the training step leaves


@contextlib.contextmanager
def local_server(path, collection):
    """
    Serve the database at path; gives its http address and the process. UserError where it can't be opened, or isn't
    there and so doesn't have the collection.
    """
    check_local_path(path, collection, create=False)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([root, *sys.path]), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-m', 'retrieval.local_server', path], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise can_not_open(path)
        yield address, process
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def read_rows_from_arrays():
    """
    Milvus Lite makes every row that a search finds from one Arrow scalar a column, which is nearly half of the search's
    time. Have it make the same rows from arrays.
    """
    from milvus_lite.storage.segment import Segment
    slow = Segment.row_to_dict

    def row_to_dict(segment, row):
        kept = segment._vector_data_by_field  # a dict that lives as long as the segment
        if READERS not in kept:
            kept[READERS] = column_readers(segment.table)
        return {name: read(row) for name, read in kept[READERS]} if kept[READERS] else slow(segment, row)
    Segment.row_to_dict = row_to_dict
    return slow


def column_readers(table):
    """[(name, function from a row's number to its value)] of an Arrow table; None if it has what we never write."""
    from pyarrow import types
    readers = []
    for name in table.schema.names:
        column = table.column(name).combine_chunks()
        column = column.chunk(0) if hasattr(column, 'num_chunks') else column
        if column.null_count or name == '$meta':
            return None
        if name == '_seq':
            continue
        if types.is_integer(column.type):
            readers.append((name, column.to_numpy().item))
        elif types.is_list(column.type):
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            readers.append((name, lambda row, o=offsets, v=values: v[o[row]:o[row + 1]].tolist()))
        elif types.is_fixed_size_list(column.type):
            vectors = column.flatten().to_numpy().reshape(len(column), -1)
            readers.append((name, lambda row, v=vectors: v[row].tolist()))
        else:
            readers.append((name, lambda row, c=column: c[row].as_py()))
    return readers


def main():
    for stop in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is for the run, which needs its database to the end
        signal.signal(stop, signal.SIG_IGN)
    os.nice(NICENESS)
    address = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever else is printed must not fill the pipe, nor be taken for the address
    gc.set_threshold(100_000)  # a search makes many small objects and no cycles
    read_rows_from_arrays()
    from milvus_lite.adapter.grpc.server import start_server_in_thread
    # one worker: a search's parameters lie in the index, where another's would change them
    server, database, port = start_server_in_thread(sys.argv[1], host='127.0.0.1', port=0, max_workers=1)
    print(f'http://127.0.0.1:{port}', file=address, flush=True)
    sys.stdin.read()
    server.stop(grace=0)
    database.close()


if __name__ == '__main__':
    main()
