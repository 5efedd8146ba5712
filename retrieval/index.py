"""
The index of a collection: its type and parameters, by retrieval_index, database and number of rows (docs/scaling.md).
"""
import ast

from configurator import UserError
from retrieval.local_server import is_local

HNSW = {'M': 16, 'efConstruction': 200}
INDEXES = {  # parameters of the build beside those that follow the size, and the first version of a server that has it
    'FLAT': ({}, None),
    'IVF_FLAT': ({}, None),
    'IVF_SQ8': ({}, None),
    'HNSW': (HNSW, None),
    'AUTOINDEX': ({}, None),
    'HNSW_SQ': (HNSW | {'sq_type': 'SQ8'}, (2, 5)),
    'DISKANN': ({}, (2, 2)),
    'IVF_RABITQ': ({'refine': True, 'refine_type': 'SQ8'}, (2, 6)),
}
IN_LITE = {'FLAT', 'IVF_FLAT', 'IVF_SQ8', 'HNSW', 'HNSW_SQ', 'AUTOINDEX'}  # it takes others and searches row by row
SEGMENT = 100_000  # rows that have an index of their own: of Milvus Lite at most, of a server about as many


def new_index(index, uri):
    """The retrieval_index of a new collection, which 'auto' leaves to the database."""
    return index if index != 'auto' else 'IVF_FLAT' if is_local(uri) else 'HNSW'


def check_new(index, vectors, uri):
    """UserError if index or vectors of a new collection are unknown, or none of a local file."""
    kind, _ = parse_index(new_index(index, uri))
    if vectors not in ('float32', 'float16'):
        raise UserError(f"retrieval_vectors {vectors!r} is neither 'float32' nor 'float16'")
    if is_local(uri) and kind not in IN_LITE:
        raise UserError(f'retrieval_index {kind!r} is none of Milvus Lite, which would look at every row: use '
                        f'{", ".join(sorted(IN_LITE))}, or a Milvus server')
    if is_local(uri) and vectors == 'float16':
        raise UserError("retrieval_vectors 'float16' are none of Milvus Lite: use 'float32', or a Milvus server from "
                        'version 2.4 on')


def parse_index(name):
    """Type and parameters of a retrieval_index such as 'HNSW M=32 efConstruction=400'. UserError if it is none."""
    kind, *rest = name.split() or ['']
    if kind not in INDEXES:
        raise UserError(f'retrieval_index {name!r} is not one of auto, {", ".join(INDEXES)}')
    parameters = {}
    for item in rest:
        key, is_set, value = item.partition('=')
        if not (is_set and key.isidentifier() and value):
            raise UserError(f"retrieval_index {name!r}: {item!r} is no parameter; write it as in 'HNSW M=32 "
                            f"efConstruction=400'")
        try:
            parameters[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[key] = value
    return kind, parameters


def build_parameters(kind, rows):
    """
    Those of an index of a number of rows. A search reads all of an IVF index's list heads and some of the lists: about
    4 sqrt(n) lists for n rows balance that, and k-means needs 39 rows for each. Every segment has an index of its own.
    """
    parameters = dict(INDEXES[kind][0])
    if kind.startswith('IVF'):
        rows = min(rows, SEGMENT)
        parameters['nlist'] = max(16, int(min(4 * rows ** 0.5, rows / 39)))
    return parameters
