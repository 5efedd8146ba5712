"""
The fast path of Milvus Lite: a Collection that searches, and reads rows by id or by ranges of ids, over arrays.

At every search Milvus Lite finds out in a Python loop over all rows which of them are valid, and it builds every row
that it returns, with all its columns, from Arrow scalars: four fifths of a search's time. This subclass does the same
over arrays, and reads no column that isn't asked for. Whatever is more than a plain search or a read by id goes to
Milvus Lite itself. It relies on internals of the version that local_server.py names, which checks it.

Searches by words are a hundred times as fast so, and one thing is better: how rare a word is, and how long a text, is
told from all rows that are there, where Milvus Lite tells it from the rows of each segment.
"""
import re
from dataclasses import dataclass, field

import numpy as np
from milvus_lite.engine.collection import Collection, _convert_hits_to_milvus_distances
from pyarrow import types

EXCEPT = re.compile(r'doc_id not in \[([-\d, ]+)\]')  # as KnowledgeBase.search asks
POSTING = np.dtype([('term', '<u4'), ('count', '<f4')])  # of a sparse vector, as it is stored
RANGE = re.compile(r'id >= (-?\d+)(?: and id < (-?\d+))?|id < (-?\d+)')  # as KnowledgeBase.all_rows asks
PLAIN = dict(partition_names=None, expr=None, group_by_field=None, group_size=1, strict_group_size=False, radius=None,
             range_filter=None, offset=0, ranker=None, timezone=None)  # options of a search that asks for nothing more


@dataclass
class Snapshot:
    """A collection's segments at one time."""
    segments: list
    deleted: dict  # Milvus Lite's map of tombstones
    ids: list  # for each segment (rows,) int64
    is_valid: list  # for each segment (rows,) bool, its id's newest and not deleted; None where all are
    columns: list  # for each segment {name: function from a row's number to its value}
    words: dict = field(default_factory=dict)  # {field: Words} of those that were searched


class Words:
    """An inverted index of the valid rows' words in a snapshot's segments, whose rows are numbered through."""

    def __init__(self, snapshot, name, k1, b):
        parts, counts = [], []
        for segment in snapshot.segments:
            column = segment.table.column(name).combine_chunks()
            column = column.chunk(0) if hasattr(column, 'num_chunks') else column
            bounds = np.frombuffer(column.buffers()[1], np.int32)[column.offset:column.offset + len(column) + 1]
            parts.append(np.frombuffer(column.buffers()[2] or b'', np.uint8)[bounds[0]:bounds[-1]].view(POSTING))
            counts.append(np.diff(bounds) // POSTING.itemsize)
        postings, counts = np.concatenate(parts), np.concatenate(counts)
        self.firsts = np.cumsum([0, *(segment.num_rows for segment in snapshot.segments)])  # rows of the segments
        self.doc_ids = np.concatenate([segment.table.column('doc_id').to_numpy() for segment in snapshot.segments])
        is_valid = np.concatenate([np.ones(segment.num_rows, dtype=bool) if mask is None else mask
                                   for segment, mask in zip(snapshot.segments, snapshot.is_valid, strict=True)])
        rows = np.repeat(np.arange(len(counts)), counts)
        postings, rows = postings[is_valid[rows]], rows[is_valid[rows]]
        order = np.argsort(postings['term'], kind='stable')
        self.terms, self.starts = np.unique(postings['term'][order], return_index=True)
        self.starts = np.append(self.starts, len(order))
        self.rows, size = rows[order].astype(np.int32), max(1, is_valid.sum())
        lengths = np.bincount(rows, postings['count'], len(counts))
        frequency, rarity = postings['count'][order], np.diff(self.starts)
        rarity = np.log((size - rarity + 0.5) / (rarity + 0.5) + 1)
        norm = k1 * (1 - b + b * lengths / max(lengths.sum() / size, 1e-9))
        self.weights = (np.repeat(rarity, np.diff(self.starts)) * frequency * (k1 + 1)
                        / (frequency + norm[self.rows])).astype(np.float32)

    def search(self, query, top_k, is_allowed):
        """Rows (m,), m <= top_k, that have the largest BM25 scores (m,) for a query {term: count}, best first."""
        scores = np.zeros(self.firsts[-1], dtype=np.float32)
        terms = np.array(list(query), dtype=np.uint32)
        places = np.minimum(np.searchsorted(self.terms, terms), max(0, len(self.terms) - 1))
        for term, place in zip(terms.tolist(), places.tolist(), strict=True):
            if len(self.terms) and self.terms[place] == term:
                part = slice(self.starts[place], self.starts[place + 1])
                scores[self.rows[part]] += self.weights[part] * query[term]
        if is_allowed is not None:
            scores[~is_allowed] = 0
        rows = np.flatnonzero(scores)
        found = scores[rows]
        if len(rows) > top_k:
            is_among = found >= np.partition(found, -top_k)[-top_k]
            rows, found = rows[is_among], found[is_among]
        order = np.argsort(-found, kind='stable')[:top_k]
        return rows[order], found[order]


class ArrayCollection(Collection):
    snapshot = None

    def search(self, query_vectors, top_k=10, metric_type=None, **options):
        """Same result as Collection.search; plain searches use arrays."""
        self._require_loaded()
        output_fields = options.get('output_fields')
        vector_field = self._resolve_anns_field(options.get('anns_field'))
        is_plain = all(options.get(name, default) == default for name, default in PLAIN.items() if name != 'expr')
        excluded = EXCEPT.fullmatch(options.get('expr') or '')
        if vector_field in self._bm25_analyzers:
            can_tell = is_plain and (excluded or not options.get('expr')) and self._is_flushed()
            snapshot = self._take_snapshot() if can_tell else None
            if snapshot and snapshot.segments and can_read(snapshot, output_fields):
                return self._search_words(snapshot, query_vectors, vector_field, top_k, output_fields, excluded)
            return super().search(query_vectors, top_k, metric_type, **options)
        snapshot = self._take_snapshot() if is_plain and not options.get('expr') and self._is_flushed() else None
        indexes = [segment.indexes.get(vector_field) for segment in snapshot.segments] if snapshot else []
        if not indexes or None in indexes or not can_read(snapshot, output_fields):
            return super().search(query_vectors, top_k, metric_type, **options)
        vectors = np.asarray(query_vectors, dtype=np.float32)
        found = [index.search(vectors, top_k, valid_mask=is_valid, params=options.get('search_params'))
                 for index, is_valid in zip(indexes, snapshot.is_valid, strict=True)]
        rows = np.concatenate([rows for rows, _ in found], axis=1)  # (queries, segments x top_k), -1 beyond the last
        distances = np.concatenate([distances for _, distances in found], axis=1)
        segments = np.broadcast_to(np.repeat(np.arange(len(indexes)), top_k), rows.shape)
        order = np.lexsort((rows, segments, distances, rows < 0))[:, :top_k]
        lines = [np.take_along_axis(a, order, axis=1).tolist() for a in (rows, distances, segments)]
        wanted = [name for name in output_fields if name != self._pk_name]
        answer = [[{'id': snapshot.segments[s].pks[row], 'distance': distance,
                    'entity': {name: snapshot.columns[s][name](row) for name in wanted}}
                   for row, distance, s in zip(*line, strict=True) if row >= 0] for line in zip(*lines, strict=True)]
        _convert_hits_to_milvus_distances(answer, self.resolve_search_metric(vector_field, metric_type))
        return answer

    def _search_words(self, snapshot, texts, name, top_k, output_fields, excluded):
        """As Collection.search answers; `excluded` is a match of EXCEPT, or None."""
        if name not in snapshot.words:
            spec = self._index_specs.get(name)
            params = spec.build_params if spec else {}
            snapshot.words[name] = Words(snapshot, name, float(params.get('bm25_k1', 1.5)),
                                         float(params.get('bm25_b', 0.75)))
        words = snapshot.words[name]
        is_allowed = ~np.isin(words.doc_ids, np.array(excluded[1].split(','), dtype=np.int64)) if excluded else None
        wanted = [column for column in output_fields if column != self._pk_name]
        answer = []
        for query in self._prepare_sparse_queries(texts, name):
            rows, scores = words.search(query, top_k, is_allowed)
            segments = np.searchsorted(words.firsts, rows, side='right') - 1
            answer.append([{'id': snapshot.segments[s].pks[row], 'distance': -score,
                            'entity': {column: snapshot.columns[s][column](row) for column in wanted}}
                           for row, score, s in zip((rows - words.firsts[segments]).tolist(), scores.tolist(),
                                                    segments.tolist(), strict=True)])
        return answer

    def get(self, pks, partition_names=None, expr=None, output_fields=None, timezone=None):
        """Same result as Collection.get; reads only the requested columns."""
        self._require_loaded()
        snapshot = self._take_snapshot() if not (partition_names or expr) and self._is_flushed() else None
        if not snapshot or not can_read(snapshot, output_fields):
            return super().get(pks, partition_names, expr, output_fields, timezone)
        wanted = dict.fromkeys([*output_fields, self._pk_name])
        found = []
        for pk in pks:
            for segment, columns, is_valid in zip(snapshot.segments, snapshot.columns, snapshot.is_valid, strict=True):
                row = segment.find_row(pk)
                if row is not None and (is_valid is None or is_valid[row]):
                    found.append({name: columns[name](row) for name in wanted})
        return found

    def query(self, expr=None, output_fields=None, partition_names=None, limit=None, offset=0, timezone=None,
              order_by_pk=False):
        """Same result as Collection.query; ranges of ids use arrays, where it would look at every row."""
        self._require_loaded()
        bounds = RANGE.fullmatch(expr or '')
        is_plain = bounds and not (partition_names or offset or order_by_pk)
        snapshot = self._take_snapshot() if is_plain and self._is_flushed() else None
        if not snapshot or not can_read(snapshot, output_fields):
            return super().query(expr, output_fields, partition_names, limit, offset, timezone, order_by_pk)
        low, high, highest = (bound and int(bound) for bound in bounds.groups())
        high = highest if high is None else high
        wanted = dict.fromkeys([*output_fields, self._pk_name])
        found = []
        for ids, is_valid, columns in zip(snapshot.ids, snapshot.is_valid, snapshot.columns, strict=True):
            is_asked = np.ones(len(ids), dtype=bool) if is_valid is None else is_valid.copy()
            if low is not None:
                is_asked &= ids >= low
            if high is not None:
                is_asked &= ids < high
            for row in np.flatnonzero(is_asked)[:None if limit is None else limit - len(found)].tolist():
                found.append({name: columns[name](row) for name in wanted})
        return found

    def _is_flushed(self):
        return not self._memtable.size() and not self._memtable.delete_index_snapshot()

    def _take_snapshot(self):
        """The current Snapshot, rebuilt only after a change."""
        segments, delta_index = self._read_snapshot()
        segments = [segment for segment in segments if segment.num_rows]
        last = self.snapshot
        if last is None or last.segments != segments or last.deleted != delta_index._map:
            newest = {}
            for segment in segments:
                for pk, seq in zip(segment.pks, segment.seqs.tolist(), strict=True):
                    newest[pk] = max(seq, newest.get(pk, -1))
            masks = [np.array([newest[pk] == seq and not delta_index.is_deleted(pk, seq)
                               for pk, seq in zip(segment.pks, segment.seqs.tolist(), strict=True)])
                     for segment in segments]
            ids = [np.array(segment.pks, dtype=np.int64) for segment in segments]
            self.snapshot = Snapshot(segments, delta_index._map, ids, [None if mask.all() else mask for mask in masks],
                                     [column_readers(segment.table) for segment in segments])
        return self.snapshot


def can_read(snapshot, output_fields):
    """Whether the fields are named, and all segments have them as what we write."""
    return bool(output_fields) and all(columns and columns.keys() >= set(output_fields) for columns in snapshot.columns)


def column_readers(table):
    """{name: function from a row's number to its value} of a segment's table; {} if it has what we never write."""
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
