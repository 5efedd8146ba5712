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

import numpy as np

from retrieval.knowledge_base import can_not_open, check_local_path

READERS = 'nanoretro readers'
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


def work_on_arrays():
    """
    Milvus Lite finds which rows are valid in a Python loop over all rows at every search, and makes every row that it
    returns, with all its columns, from Arrow scalars: four fifths of a search's time. Have it do the same over arrays,
    for searches without a filter, and read no column that isn't asked for. Gives the functions that were replaced.
    """
    from milvus_lite.engine import collection
    slow_search, slow_get = collection.execute_search_with_index, collection.Collection.get
    valid = ValidRows()

    def search(query_vectors, segments, memtable, delta_index, top_k, metric_type, pk_field, vector_field,
               partition_names=None, compiled_filter=None, output_fields=None, search_params=None, **rest):
        segments = [segment for segment in segments if segment.num_rows]
        indexes = [segment.indexes.get(vector_field) for segment in segments]
        columns = [readers(segment) for segment in segments]
        unwritten = memtable.to_search_snapshot(vector_field)[0] or memtable.delete_index_snapshot()
        if (unwritten or partition_names or compiled_filter or output_fields is None or None in indexes
                or not all(columns) or any(name not in own for own in columns for name in output_fields)):
            return slow_search(query_vectors, segments, memtable, delta_index, top_k, metric_type, pk_field,
                               vector_field, partition_names, compiled_filter, output_fields,
                               search_params=search_params, **rest)
        found = [index.search(query_vectors, top_k, valid_mask=mask, params=search_params)
                 for index, mask in zip(indexes, valid.masks(segments, delta_index), strict=True)]
        rows = np.concatenate([rows for rows, _ in found], axis=1)  # (queries, segments x top_k), -1 where none is left
        distances = np.concatenate([distances for _, distances in found], axis=1)
        of = np.broadcast_to(np.repeat(np.arange(len(segments)), top_k), rows.shape)
        order = np.lexsort((rows, of, distances, rows < 0))[:, :top_k]
        lines = [np.take_along_axis(a, order, axis=1).tolist() for a in (rows, distances, of)]
        return [[{'id': segments[s].pks[row], 'distance': distance,
                  'entity': {name: columns[s][name](row) for name in output_fields if name != pk_field}}
                 for row, distance, s in zip(*line, strict=True) if row >= 0] for line in zip(*lines, strict=True)]

    def get(self, pks, partition_names=None, expr=None, output_fields=None, timezone=None):
        self._require_loaded()
        segments, delta_index = self._read_snapshot()
        segments = [segment for segment in segments if segment.num_rows]
        columns = [readers(segment) for segment in segments]
        if (self._memtable.size() or partition_names or expr or not output_fields or not all(columns)
                or any(name not in own for own in columns for name in output_fields)):
            return slow_get(self, pks, partition_names, expr, output_fields, timezone)
        masks = valid.masks(segments, delta_index)
        wanted = dict.fromkeys([*output_fields, self._pk_name])
        found = []
        for pk in pks:
            for segment, own, mask in zip(segments, columns, masks, strict=True):
                row = segment.find_row(pk)
                if row is not None and (mask is None or mask[row]):
                    found.append({name: own[name](row) for name in wanted})
        return found

    collection.execute_search_with_index, collection.Collection.get = search, get
    return slow_search, slow_get


class ValidRows:
    """Which rows of a collection's segments are their id's newest and not deleted; found out once a change."""

    def __init__(self):
        self.of = None

    def masks(self, segments, delta_index):
        """For each of the segments a mask (rows,), or None where all rows are valid."""
        of = segments, delta_index._map
        if of != self.of:
            newest = {}
            for segment in segments:
                for pk, seq in zip(segment.pks, segment.seqs.tolist(), strict=True):
                    newest[pk] = max(seq, newest.get(pk, -1))
            masks = [np.array([newest[pk] == seq and not delta_index.is_deleted(pk, seq)
                               for pk, seq in zip(segment.pks, segment.seqs.tolist(), strict=True)])
                     for segment in segments]
            self.of, self.kept = of, [None if mask.all() else mask for mask in masks]
        return self.kept


def readers(segment):
    """{name: function from a row's number to its value} for a segment's columns; {} if it has what we never write."""
    kept = segment._vector_data_by_field  # a dict that lives as long as the segment
    if READERS not in kept:
        kept[READERS] = column_readers(segment.table)
    return kept[READERS]


def column_readers(table):
    from pyarrow import types
    columns = {}
    for name in table.schema.names:
        column = table.column(name).combine_chunks()
        column = column.chunk(0) if hasattr(column, 'num_chunks') else column
        if column.null_count or name == '$meta':
            return {}
        if name == '_seq':
            continue
        if types.is_integer(column.type):
            columns[name] = column.to_numpy().item
        elif types.is_list(column.type):
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            columns[name] = lambda row, o=offsets, v=values: v[o[row]:o[row + 1]].tolist()
        elif types.is_fixed_size_list(column.type):
            vectors = column.flatten().to_numpy().reshape(len(column), -1)
            columns[name] = lambda row, v=vectors: v[row].tolist()
        else:
            columns[name] = lambda row, c=column: c[row].as_py()
    return columns


def main():
    for stop in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is for the run, which needs its database to the end
        signal.signal(stop, signal.SIG_IGN)
    os.nice(NICENESS)
    address = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever else is printed must not fill the pipe, nor be taken for the address
    gc.set_threshold(100_000)  # a search makes many small objects and no cycles
    work_on_arrays()
    from milvus_lite.adapter.grpc.server import start_server_in_thread
    # one worker: a search's parameters lie in the index, where another's would change them
    server, database, port = start_server_in_thread(sys.argv[1], host='127.0.0.1', port=0, max_workers=1)
    print(f'http://127.0.0.1:{port}', file=address, flush=True)
    sys.stdin.read()
    server.stop(grace=0)
    database.close()


if __name__ == '__main__':
    main()
