"""
The Milvus collection that a model retrieves from. A row is whole: a chunk's id, document, position, embedding, text,
and its tokens with those of its continuation. The collection's properties say what made it, and name its revision.
The only file that talks to Milvus: to a local file through Milvus Lite, or to any server by its URI.
"""
import glob
import itertools
import json
import logging
import math
import os
import re
import uuid
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from configurator import UserError
from retrieval.index import INDEXES, SEGMENT, build_parameters, check_new, new_index, parse_index
from retrieval.local_server import Unreachable, forget_server, is_local, join_server

os.environ.setdefault('GRPC_VERBOSITY', 'NONE')  # its errors come as exceptions, too

VERSION = 2  # of a row: its layout, its ids, and what its text is
PROPERTY = 'nanoretro.metadata'
REVISION = 'nanoretro.state'  # property, named so in existing collections: a new value at each change of the rows
CHANGING = 'changing'  # its value while they change
FIELDS = ('id', 'doc_id', 'position', 'document', 'text', 'tokens')
HIT = np.dtype([('id', np.int64), ('doc_id', np.int64), ('score', np.float32)])  # the score is that of SCORES
SCORES = {'dense': 'similarity', 'bm25': 'BM25 score', 'hybrid': 'RRF score'}  # by retrieval_mode; more is nearer
DIGITS = {'dense': 5, 'bm25': 3, 'hybrid': 7}  # to which the scores of equally near rows are equal
BM25 = {'bm25_k1': 1.2, 'bm25_b': 0.75}  # Milvus' defaults; Milvus Lite has another k1
RRF = 60  # reciprocal rank fusion: a row's score is the sum of 1 / (RRF + rank) over the two searches
UNTOLD = (99,)  # version of a service that does not tell it
FULL_TEXT = (2, 5)  # version of Milvus from which on servers search by words
FLOAT16 = (2, 4)  # version of the first server that has such vectors
OUTGROWN = 2  # times as many lists as it has suit a collection now: its index is made anew
MAX_TEXT = 65535  # bytes of a row's text, Milvus' limit
MOST = 16384  # rows that Milvus returns for a query
REQUEST = 2048  # rows, ids or queries per request: servers accept no message over 64 MB
RATE_LIMIT = 8  # code of Milvus' answer
PASSING = ('not (yet )?(ready|available|loaded|fully loaded|serving|healthy|shard leader)|unavailable|offline|'
           'rate limit|too many requests|time ?out|timed out|deadline|connection|recovering|initializing|'
           'no available|node not (found|match)|index not found|no vector index|'
           'state .released|dropped on loaded')  # in the text of an answer
ANSWER_TIMEOUT = 10  # seconds that a server may take to answer the first call
IMPORT_STATES = {'Completed': 'done', 'Failed': 'failed', 'Failed and cleaned': 'failed'}  # the others are running
GRPC = {  # pymilvus pings every 10 s, also between two requests, for which gRPC's servers and proxies hang up
    'grpc.keepalive_permit_without_calls': 0, 'grpc.keepalive_time_ms': 60_000, 'grpc.keepalive_timeout_ms': 20_000}
OF_INDEX = {'index_type', 'metric_type', 'field_name', 'index_name', 'params', 'total_rows', 'indexed_rows',
            'pending_index_rows', 'state'}  # in what is said of an index, beside its parameters
RETRIES = 1  # by pymilvus, which retries in silence; we wait ourselves, and say so (waiting.py)


@dataclass
class Metadata:
    """What made a collection. Opening it with anything else is an error; None where it does not matter."""
    tokenizer: str
    vocabulary_hash: str
    chunk_size: int
    embedding_model: str
    embedding_hash: str
    dimension: int
    index: str | None  # its type, and the parameters that were set
    version: int = VERSION
    vectors: str | None = 'float32'
    mode: str = 'dense'  # unless it is that, the rows hold the words of their text, too: all modes can search them


NAMES = {'vocabulary_hash': 'tokenizer', 'embedding_hash': 'embedding_model'}  # of what the hashes are of
SETTINGS = dict(vocabulary_hash='tokenizer', chunk_size='retrieval_chunk_size', vectors='retrieval_vectors',
                embedding_hash='retrieval_embedding_model', index='retrieval_index', mode='retrieval_mode')  # of fields


class NoCollection(UserError):
    """There is no collection of this name."""


def open_knowledge_base(settings, vocabulary_hash, embedder, create=False, expected=SEGMENT):
    """
    The collection that the settings name, filled or read with their tokenizer, chunk size and embedding model. One that
    is made gets an index for the `expected` number of rows.
    """
    metadata = Metadata(settings.tokenizer, vocabulary_hash, settings.retrieval_chunk_size, embedder.name,
                        embedder.fingerprint, embedder.dimension, settings.retrieval_index,
                        vectors=settings.retrieval_vectors, mode=settings.retrieval_mode)
    return KnowledgeBase(settings.retrieval_milvus_uri, settings.retrieval_milvus_token, settings.retrieval_collection,
                         metadata, create, expected, settings.retrieval_search_params)


def open_as_made(settings, load=True):
    """The collection that the settings name, whatever made it: its `metadata` says. NoCollection if there is none."""
    return KnowledgeBase(settings.retrieval_milvus_uri, settings.retrieval_milvus_token, settings.retrieval_collection,
                         load=load)


def describe_score(mode, score):
    """The score of a hit that was found by this retrieval_mode, for people."""
    return f'{SCORES[mode]} {score:.{4 if mode == "hybrid" else 2}f}'


class KnowledgeBase:
    """
    One collection. `uri` is a path that ends in .db (Milvus Lite) or a server's http(s) address; the token is used
    and never shown. Without `metadata` it is opened whatever made it. `create` makes a missing collection, which is a
    UserError otherwise, with an index for the `expected` number of rows. `search_params` override those of the index.
    Rows are there from load() on, which is part of opening unless `load` is False. A local database is served by a
    process that all share (local_server.py).
    """

    def __init__(self, uri, token, collection, metadata=None, create=False, expected=SEGMENT, search_params=None,
                 load=True):
        check_uri(uri)
        if not re.fullmatch('[A-Za-z_][A-Za-z0-9_]{0,254}', collection):  # Milvus Lite takes others, a server does not
            raise UserError(f'retrieval_collection {collection!r} cannot be the name of one: use letters, digits and '
                            f'underscores, 255 at most, and no digit at the beginning')
        self.expected, self.search_params = expected, search_params or {}
        if metadata:
            if metadata.vectors not in ('float32', 'float16'):
                raise UserError(f"retrieval_vectors {metadata.vectors!r} is neither 'float32' nor 'float16'")
            if metadata.mode not in SCORES:
                raise UserError(f'retrieval_mode {metadata.mode!r} is not one of {", ".join(SCORES)}')
            self.new_index = new_index(metadata.index, uri)
            parse_index(self.new_index)
            if metadata.index == 'auto':
                metadata = replace(metadata, index=None)
        for name, value in self.search_params.items():
            if not isinstance(value, (int, float)):
                raise UserError(f'retrieval_search_params: {name!r} is {value!r}, and no number: write it as in '
                                f"{{'ef': 256}}")
        self.loads, self.makes_index = load, False  # whether a missing index is ours to make
        self.lists, self.seen = 0, None  # of an IVF index, as of the revision seen last
        uri = os.path.expanduser(uri) if is_local(uri) else uri
        self.uri, self.token, self.collection, self.metadata = uri, token, collection, metadata
        self.client = self.lease = None
        self.open(create)

    def open(self, create=False, timeout=None):
        """Connect, or reconnect after the server was unreachable; within `timeout` seconds, if that is given."""
        self.close()
        longest = ANSWER_TIMEOUT
        try:
            if is_local(self.uri):
                check_local_path(self.uri, self.collection, create)
                self.lease = join_server(self.uri, create, timeout or 600)
                longest *= 60  # it is alive, at low priority, and may be indexing for another process
            address = self.lease.address if self.lease else self.uri
            self.client = connect(address, self.uri, self.token, min(timeout or longest, longest))
            with self._errors():
                if self.metadata and self.metadata.mode != 'dense':
                    check_full_text(self.client.get_server_version(), self.uri, self.metadata.mode)
                if not self.client.has_collection(self.collection, retry_times=RETRIES):
                    if not create:
                        raise no_collection(self.uri, self.collection)
                    self._create()
                self._check_metadata(self._properties())  # one just made, too, may be somebody else's
                if (create or self.makes_index) and not self.has_index():  # it was interrupted
                    self._create_index(self.metadata.index, self.expected)
            if self.loads:
                self.load(timeout)
        except BaseException:
            self.close()
            raise

    def load(self, timeout=None):
        """Have the database read the rows. Unreachable while there is no index, which it would do without."""
        if not self.has_index():
            raise Unreachable(f'the index of collection {self.collection!r} in {self.uri} is being made anew, or that '
                              f'was interrupted: if nothing makes it, run python -m retrieval.populate CONFIG')
        with self._errors():
            self.client.load_collection(self.collection, timeout=timeout)
        self._look_at_index()

    def has_index(self):
        """Whether there is an index of the embeddings."""
        with self._errors():
            return 'embedding' in self.client.list_indexes(self.collection)

    def _errors(self):
        return milvus_errors(self.uri, bool(self.token), self.collection)

    def _create(self):
        from pymilvus import DataType, Function, FunctionType, MilvusClient
        self._check_version()
        metadata = replace(self.metadata, index=self.new_index)
        has_words = metadata.mode != 'dense'
        analyzed = dict(enable_analyzer=True) if has_words else {}
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field('id', DataType.INT64, is_primary=True)
        schema.add_field('doc_id', DataType.INT64)
        schema.add_field('position', DataType.INT64)
        schema.add_field('document', DataType.VARCHAR, max_length=1024)
        schema.add_field('text', DataType.VARCHAR, max_length=MAX_TEXT, **analyzed)
        schema.add_field('tokens', DataType.ARRAY, element_type=DataType.INT32,
                         max_capacity=2 * self.metadata.chunk_size)
        schema.add_field('embedding', DataType.FLOAT16_VECTOR if metadata.vectors == 'float16' else
                         DataType.FLOAT_VECTOR, dim=metadata.dimension)
        if has_words:
            schema.add_field('words', DataType.SPARSE_FLOAT_VECTOR)
            schema.add_function(Function('bm25', FunctionType.BM25, ['text'], ['words']))
        properties = {PROPERTY: json.dumps(asdict(metadata)), REVISION: new_revision()}
        self.client.create_collection(self.collection, schema=schema, properties=properties)
        self._create_index(metadata.index, self.expected)

    def _create_index(self, name, rows):
        """Make the index of that type and parameters, for a number of rows. It is built when there are as many."""
        kind, parameters = parse_index(name)
        index = self.client.prepare_index_params()
        index.add_index('embedding', index_type=kind, metric_type='IP', params={
            'params': build_parameters(kind, rows) | parameters})  # Milvus Lite reads only nested ones
        if self.metadata.mode != 'dense' and 'words' not in self.client.list_indexes(self.collection):
            index.add_index('words', index_type='SPARSE_INVERTED_INDEX', metric_type='BM25', params={'params': BM25})
        self.client.create_index(self.collection, index)

    def _look_at_index(self):
        """Find out how many lists an IVF index has, which says how many of them a search has to read."""
        self.lists = int(self.describe_index().get('params', {}).get('nlist', 0))

    def fit_index(self, say):
        """Make the index anew if the collection has outgrown it. Whether it had. Until then searches are refused."""
        kind, parameters = parse_index(self.metadata.index)
        rows = self.count()
        wanted = build_parameters(kind, rows).get('nlist', 0)
        if 'nlist' in parameters or wanted <= OUTGROWN * self.lists:
            return False
        say(f'making the index anew: {wanted:,} lists suit the rows that there are now, and it has {self.lists:,}')
        self.makes_index, self.expected = True, rows  # also if it is interrupted, and opened again
        with self._errors():
            self.client.release_collection(self.collection)
            self.client.drop_index(self.collection, 'embedding')
            self._create_index(self.metadata.index, rows)
        self.load()
        self.makes_index = False
        return True

    def _check_version(self):
        """UserError if the server lacks what the new collection needs. Milvus Lite would take it, and do without."""
        check_new(self.new_index, self.metadata.vectors, self.uri)
        kind, version = self.new_index.split()[0], self.server_version()
        since, old = INDEXES[kind][1], f'and {self.uri} is version {".".join(map(str, version))}'
        if since and not is_local(self.uri) and version < since:
            raise UserError(f'retrieval_index {kind!r} needs a Milvus server from version {since[0]}.{since[1]} on, '
                            f'{old}: use HNSW or IVF_SQ8, or a newer server')
        if self.metadata.vectors == 'float16' and version < FLOAT16:
            raise UserError(f"retrieval_vectors 'float16' need a Milvus server from version 2.4 on, {old}: use "
                            f"'float32', or a newer server")

    def server_version(self):
        """As a tuple of numbers."""
        return parse_version(self.client.get_server_version())

    def _properties(self):
        return self.client.describe_collection(self.collection, retry_times=RETRIES).get('properties', {})

    def revision(self):
        """
        Identifier of the collection's current contents, the key of caches; None while they are changing, or if a
        change was interrupted. Only what this class writes changes it.
        """
        with self._errors():
            properties = self._properties()
        if properties.get(PROPERTY) != self.made_by:  # it was dropped, and made anew
            self._check_metadata(properties)
        revision = properties.get(REVISION, CHANGING)
        if revision != self.seen:  # its index may have been made anew, by another process
            self._look_at_index()
            self.seen = revision
        return None if revision == CHANGING else revision

    def state(self):
        """
        What is derived from the rows is of this revision and number of rows, which other programs may change; a string.
        Unreachable while they change.
        """
        revision = self.revision()
        if revision is None:
            raise Unreachable(f'collection {self.collection!r} is being filled, or filling it was interrupted: let '
                              f'python -m retrieval.populate or retrieval.kb finish')
        return state_of(revision, self.count())

    def _set_revision(self, revision):
        for _ in range(2):  # Milvus 2.3 stores the value of the alteration before the last
            with self._errors():
                self.client.alter_collection_properties(self.collection, properties={REVISION: revision})

    def _announce_change(self):
        if self.revision() is not None:
            self._set_revision(CHANGING)

    def _check_metadata(self, properties):
        found = self.made_by = properties.get(PROPERTY)
        if not found:
            raise UserError(f'collection {self.collection!r} in {self.uri} was not made by nanoRETRO: choose another '
                            f'name in retrieval_collection')
        found = {'vectors': 'float32', 'mode': 'dense', **json.loads(found)}
        if self.metadata is None:
            self.metadata = Metadata(**{field.name: found.get(field.name) for field in fields(Metadata)})
        wanted = asdict(self.metadata)
        if wanted['index'] in (None, found['index'].split()[0]):  # no parameters of its own
            wanted['index'] = found['index']
        if wanted['mode'] == 'dense' or found['mode'] != 'dense':
            wanted['mode'] = None  # it can be searched so
        if both := describe_difference(found, 'it has', wanted, 'the run'):
            lacks_words = wanted['mode'] is not None
            raise UserError(f'collection {self.collection!r} in {self.uri} was made by something else ({both}): use '
                            f'the settings that made it, or fill another retrieval_collection with python -m '
                            f'retrieval.populate CONFIG' + lacks_words * f' --retrieval_mode={wanted["mode"]}')
        self.metadata = replace(self.metadata, index=found['index'], vectors=found['vectors'])

    def count(self):
        """Number of rows."""
        with self._errors():
            return int(self.client.query(self.collection, filter='', output_fields=['count(*)'],
                                         consistency_level='Strong', retry_times=RETRIES)[0]['count(*)'])

    def rows(self, ids, fields, latest=False):
        """
        {id: row} of those of the ids (n,) that the collection has, each a dict of the fields. With `latest` the
        answer includes all that was written up to now, else it may be some seconds old.
        """
        options = {'consistency_level': 'Strong'} if latest else {}
        found = {}
        for start in range(0, len(ids), REQUEST):
            with self._errors():
                rows = self.client.get(self.collection, ids=ids[start:start + REQUEST].tolist(),
                                       output_fields=['id', *fields], retry_times=RETRIES, **options)
            found |= {row['id']: row for row in self._with_vectors(rows, fields)}
        return found

    def _with_vectors(self, rows, fields):
        """Rows as the client gives them, with float16 vectors as arrays."""
        if self.metadata.vectors == 'float16' and 'embedding' in fields:
            return [{**row, 'embedding': np.frombuffer(b''.join(row['embedding']), dtype=np.float16)} for row in rows]
        return rows

    def upsert(self, rows):
        """Add rows, dicts of the collection's fields; rows with the same id are replaced. Call flush() at the end."""
        if self.metadata.vectors == 'float16':
            rows = [row | {'embedding': row['embedding'].astype(np.float16)} for row in rows]
        for start in range(0, len(rows), REQUEST):
            self._announce_change()
            with self._errors():
                self.client.upsert(self.collection, rows[start:start + REQUEST])

    def delete_from(self, doc_id, position):
        """Remove a document's rows from a position on. Call flush() at the end."""
        self._announce_change()
        with self._errors():
            self.client.delete(self.collection, filter=f'doc_id == {int(doc_id)} and position >= {int(position)}')

    def delete(self, ids):
        """Remove rows by their ids, a list. Call flush() at the end."""
        for start in range(0, len(ids), REQUEST):
            self._announce_change()
            with self._errors():
                self.client.delete(self.collection, ids=ids[start:start + REQUEST])

    def which_documents(self, ends):
        """Those of the documents {doc_id: position} that have rows from that position on, as a set of doc_ids."""
        whole = sorted(doc_id for doc_id, end in ends.items() if end == 0)
        parts = [f'(doc_id == {doc_id} and position >= {end})' for doc_id, end in ends.items() if end]
        conditions = [f'doc_id in {whole[start:start + 1024]}' for start in range(0, len(whole), 1024)]
        conditions += [' or '.join(parts[start:start + 64]) for start in range(0, len(parts), 64)]
        return set().union(*map(self._documents, conditions))

    def documents_named(self, name):
        """The doc_ids of the documents whose rows have this name."""
        return self._documents(f'document == {json.dumps(name, ensure_ascii=False)}')

    def _documents(self, condition):
        found, is_more = set(), True
        while is_more:
            others = f' and doc_id not in {sorted(found)}' if found else ''
            with self._errors():
                rows = self.client.query(self.collection, filter=f'({condition}){others}', limit=MOST,
                                         output_fields=['doc_id'], consistency_level='Strong', retry_times=RETRIES)
            found |= {row['doc_id'] for row in rows}
            is_more = len(rows) == MOST  # of documents with many rows
        return found

    def rows_at(self, places, fields):
        """{(doc_id, position): row} of those of the places, pairs of a document and the number of its chunk."""
        found = {}
        for start in range(0, len(places), 64):
            condition = ' or '.join(f'(doc_id == {doc_id} and position == {position})'
                                    for doc_id, position in places[start:start + 64])
            with self._errors():
                rows = self.client.query(self.collection, filter=condition, limit=MOST,
                                         output_fields=['doc_id', 'position', *fields], retry_times=RETRIES)
            found |= {(row['doc_id'], row['position']): row for row in rows}
        return found

    def all_rows(self, fields, most=None):
        """
        Yields lists of rows, dicts of the fields and the id, by ascending ranges of ids, which are hashes: equal ranges
        hold about as many. `most` rows at a time; less than MOST where vectors are asked for.
        """
        most = most or MOST
        parts = self.count() // (most // 4) + 1
        borders = [i * 2**64 // parts - 2**63 for i in range(1, parts)]
        ranges = list(itertools.pairwise([None, *borders, None]))[::-1]
        while ranges:
            low, high = ranges.pop()  # servers cannot read the least 64-bit number
            conditions = [f'id >= {low}'] * (low is not None) + [f'id < {high}'] * (high is not None)
            with self._errors():
                rows = self.client.query(self.collection, filter=' and '.join(conditions or ['id < 0 or id >= 0']),
                                         limit=most, output_fields=['id', *fields], consistency_level='Strong',
                                         retry_times=RETRIES)
            if len(rows) == most:  # there may be more
                middle = ((-2**63 if low is None else low) + (2**63 if high is None else high)) // 2
                ranges += [(middle, high), (low, middle)]
                continue
            yield list(self._with_vectors(rows, fields))

    def flush(self):
        """Write the changes to disk, index them, and begin a new revision, which may be cached."""
        with self._errors():
            self.client.flush(self.collection)
        self._set_revision(new_revision())

    def start_import(self, path):
        """Have the server import a file of rows. The id of its task."""
        self._announce_change()
        with self._errors():
            return self.client._get_connection().do_bulk_insert(self.collection, '', [path])

    def import_state(self, task):
        """'running', 'done' or 'failed', and why."""
        with self._errors():
            found = self.client._get_connection().get_bulk_insert_state(task)
        return IMPORT_STATES.get(found.state_name, 'running'), found.infos.get('failed_reason', '')

    def is_importing(self):
        """Whether the server is importing a file into the collection."""
        with self._errors():
            tasks = self.client._get_connection().list_bulk_insert_tasks(0, self.collection)
        return any(IMPORT_STATES.get(task.state_name, 'running') == 'running' for task in tasks)

    def refresh(self):
        """Load what was imported."""
        with self._errors():
            self.client.refresh_load(self.collection)

    def describe_index(self):
        """What the database says of the index of the embeddings, as a dict: type, parameters, rows that are indexed."""
        if not self.has_index():
            return {}
        with self._errors():
            found = self.client.describe_index(self.collection, 'embedding', retry_times=RETRIES) or {}
        state = {key: found[key] for key in ('index_type', 'metric_type', 'indexed_rows', 'state') if key in found}
        # older servers give parameters as JSON, or among the rest
        params = found.get('params') or {key: value for key, value in found.items() if key not in OF_INDEX}
        return state | dict(params=json.loads(params) if isinstance(params, str) else params)

    def size_on_disk(self):
        """Bytes of a local collection; None of a server's, which does not tell."""
        if not is_local(self.uri):
            return None
        files = glob.glob(f'{glob.escape(self.uri)}/collections/{self.collection}/**', recursive=True)
        return sum(os.path.getsize(path) for path in files if os.path.isfile(path))

    def drop(self):
        """Remove the collection. Whoever uses it gets a UserError."""
        with self._errors():
            self.client.drop_collection(self.collection)

    def search(self, vectors, limit, excluded=(), latest=False, texts=None):
        """
        Up to `limit` rows nearest to each of n queries: (n, limit) of HIT, nearest first, of equally near ones the
        lower id first; missing ones have score -inf. None is of a document whose doc_id is in `excluded`. `latest` as
        in rows(). By retrieval_mode, nearest are those of the largest cosine with the vectors (n, D); those whose words
        have the largest BM25 score with the texts (n,); or, 'hybrid', those that both searches rank highest. What the
        mode does not read may be None.
        """
        mode = self.metadata.mode
        found = np.zeros((len(vectors if mode == 'dense' else texts), limit), dtype=HIT)
        found['score'] = -np.inf
        asked = np.arange(len(found))
        if mode != 'dense':  # of a text without a word there is nothing to ask
            has_words = np.array([bool(re.search(r'\w', text)) for text in texts], dtype=bool)
            asked = np.flatnonzero(has_words)
            if mode == 'hybrid' and not has_words.all():
                self._search('dense', vectors, texts, np.flatnonzero(~has_words), found, excluded, latest)
                ranks = np.arange(1, limit + 1)
                found['score'] = np.where(found['score'] > -np.inf, 1 / (RRF + ranks), -np.inf)
        self._search(mode, vectors, texts, asked, found, excluded, latest)
        # the order of rows with equal scores depends on the server and the index, as does how scores are rounded
        order = np.lexsort((found['id'], -found['score'].round(DIGITS[mode])))  # by score, then by id
        return np.take_along_axis(found, order, axis=1)

    def _search(self, mode, vectors, texts, queries, found, excluded, latest):
        """Put the hits of the queries of these numbers into their lines of `found` (n, limit)."""
        from pymilvus import AnnSearchRequest, RRFRanker
        limit, is_filtered = found.shape[1], len(excluded) > 0
        expression = f'doc_id not in {sorted(int(d) for d in excluded)}' if is_filtered else ''
        dense = {'metric_type': 'IP', 'params': self._search_parameters(limit, is_filtered)}
        words = {'metric_type': 'BM25', 'params': {}}
        options = dict(output_fields=['doc_id'], limit=limit, retry_times=RETRIES,
                       **{'consistency_level': 'Strong'} if latest else {})
        for start in range(0, len(queries), REQUEST):
            part = queries[start:start + REQUEST]
            near = None if mode == 'bm25' else list(np.asarray(vectors, dtype=self.metadata.vectors)[part])
            said = None if mode == 'dense' else [texts[i] for i in part]
            with self._errors():
                if mode == 'hybrid':
                    asked = [AnnSearchRequest(data, field, param, limit, expression) for data, field, param in
                             ((near, 'embedding', dense), (said, 'words', words))]
                    answer = self.client.hybrid_search(self.collection, asked, RRFRanker(RRF), **options)
                else:
                    data, field, param = (near, 'embedding', dense) if mode == 'dense' else (said, 'words', words)
                    answer = self.client.search(self.collection, data=data, anns_field=field, filter=expression,
                                                search_params=param, **options)
            for line, hits in zip(part, answer, strict=True):
                scores = np.abs(hits.distances) if mode == 'bm25' else hits.distances  # Milvus Lite's are negative
                found['id'][line, :len(hits)], found['score'][line, :len(hits)] = hits.ids, scores
                found['doc_id'][line, :len(hits)] = [hit['entity']['doc_id'] for hit in hits]

    def _search_parameters(self, limit, is_filtered):
        """Of a search for `limit` rows. A filtered one has to look further."""
        kind, _ = parse_index(self.metadata.index)
        if kind.startswith('IVF'):  # of the lists, as many as find 97 % of the two nearest (docs/scaling.md)
            lists = max(1, self.lists)
            params = {'nprobe': lists if is_filtered else min(lists, max(16, math.ceil(lists ** 0.5)))}
            params |= {'refine_k': 4} if kind == 'IVF_RABITQ' else {}
        elif kind.startswith('HNSW'):
            params = {'ef': 1024 if is_filtered else 128}
        else:
            params = {'search_list': 1024 if is_filtered else 128} if kind == 'DISKANN' else {}
        for name, value in self.search_params.items():
            params[name] = max(value, params.get(name, value)) if is_filtered else value
        for name in {'ef', 'search_list'} & params.keys():
            params[name] = max(params[name], limit)  # Milvus refuses a limit above them
        return params

    def close(self):
        if self.client is not None:
            self.client.close()
        if self.lease is not None:
            self.lease.close()
        self.client = self.lease = None


def state_of(revision, rows):
    return f'{revision} {rows}'


def new_revision():
    return uuid.uuid4().hex


def connect(address, uri, token, timeout):
    """A client. UserError if nothing answers at the address, or if the token is refused; `uri` is what it names."""
    if '@' in uri.partition('://')[2]:
        raise UserError('retrieval_milvus_uri holds a user or a password: give them as user:password in '
                        'retrieval_milvus_token, or as MILVUS_TOKEN in the environment, where they are kept secret')
    forget_server()
    from pymilvus import MilvusClient  # takes a second to import
    logging.getLogger('pymilvus').setLevel(logging.CRITICAL)  # no tracebacks: our error gives the reason
    with milvus_errors(uri, bool(token)):
        client = MilvusClient(address, token=token, timeout=timeout, grpc_options=GRPC)
        client.list_collections(timeout=timeout)
        return client


def check_uri(uri):
    """UserError if it is neither a local path nor a server's address."""
    scheme, has_scheme, rest = uri.partition(':')
    is_address = '://' in uri
    if has_scheme and re.fullmatch(r'[A-Za-z][\w+.-]*', scheme) and not (
            is_address and scheme.lower() in ('http', 'https', 'tcp') and rest.strip('/')):
        hint = f'write the path alone, {re.sub("^//(?=/)", "", rest)!r}' if scheme.lower() == 'file' else (
            'write it as http://HOST:19530')
        raise UserError(f'retrieval_milvus_uri {uri!r} is no address of a Milvus server: {hint}')
    if not is_address and (not uri.endswith('.db') or os.path.basename(uri) == '.db'):
        raise UserError(f'retrieval_milvus_uri {uri!r} is neither the path of a local file ending in .db nor an '
                        f'address such as http://127.0.0.1:19530')


def parse_version(name):
    """'v2.3.5-lite' as (2, 3, 5). Milvus Lite and clouds name theirs otherwise: that is above all."""
    found = re.match(r'v?(\d+)\.(\d+)(?:\.(\d+))?', name)
    return tuple(int(number or 0) for number in found.groups()) if found else UNTOLD


def check_full_text(version, uri, mode):
    """UserError if a server of this version, such as 'v2.3.5-lite', cannot search by words."""
    if parse_version(version) < FULL_TEXT:
        raise UserError(f'Milvus at {uri} is version {version}, and retrieval_mode {mode!r} searches by words, which '
                        f'servers do from {".".join(map(str, FULL_TEXT))} on: use a newer server or a local file, or '
                        f"retrieval_mode 'dense'")


def check_local_path(uri, collection, create):
    if not create and not os.path.isfile(os.path.join(uri, 'LOCK')):  # of Milvus Lite; nothing is written elsewhere
        raise no_collection(uri, collection)


@contextmanager
def milvus_errors(uri, has_token, collection=None):
    """Turn the errors that a user can correct into UserErrors; let the others through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # grpc's, pymilvus' and the standard library's have no common base
        status = getattr(error.__cause__ or error, 'code', None)
        status = getattr(status() if callable(status) else status, 'name', '')
        if status in ('UNAUTHENTICATED', 'PERMISSION_DENIED'):
            reason = 'the token was refused' if has_token else 'no token was given'
            # a server that a checkpoint alone names gets no token (training/checkpoint.py)
            hint = '' if has_token else f', and, if a checkpoint names the server, --retrieval_milvus_uri={uri}, too'
            raise UserError(f'Milvus at {uri} asks for authentication and {reason}: set retrieval_milvus_token, or '
                            f'MILVUS_TOKEN in the environment, to user:password or an API key{hint}') from error
        from pymilvus.exceptions import MilvusException
        text = getattr(error, 'message', '') or str(error)
        if (status in ('UNAVAILABLE', 'DEADLINE_EXCEEDED') or 'Fail connecting to server' in str(error)
                or (isinstance(error, ValueError) and 'URL' in str(error))):
            raise Unreachable(f'no Milvus answers at {uri} ({status or type(error).__name__}): start it, e.g. with '
                              f'docker compose up -d, or correct retrieval_milvus_uri') from error
        if collection and is_gone(collection, text):
            raise NoCollection(f'collection {collection!r} in {uri} is gone, it was dropped while it was used: fill it '
                               f'again with python -m retrieval.populate CONFIG') from error
        if 'No space left' in text:
            raise UserError(f'Milvus at {uri} has no space left on its disk: free some, and start again; what is there '
                            f'stays') from error
        if isinstance(error, MilvusException) or status:
            reason = f'Milvus at {uri} refuses: {" ".join(text.split())[:500] or status}'
            if may_pass(error, status, text):
                raise Unreachable(reason) from error
            raise UserError(f'{reason}; waiting would not help, see what the message names') from error
        raise


def is_gone(collection, text):
    """Whether an answer says that there is no such collection, by its name or by its number."""
    says_so = re.search("collection.* (not (found|exist)|does not exist)|(can't|cannot) find collection", text,
                        re.IGNORECASE)
    return bool(says_so and (collection in text or re.search(r'collection(ID)?=\d+', text)))


def may_pass(error, status, text):
    """
    Whether a refused request may be granted later: the server is starting, moving data, or has too much to do; and not
    if the request itself is wrong or a quota is used up. Servers up to 2.3 say so in the text alone.
    """
    if getattr(error, 'is_input_error', False) or re.search('quota|force ?deny|larger than max', text, re.IGNORECASE):
        return False
    return bool(getattr(error, 'retriable', False) or status in ('RESOURCE_EXHAUSTED', 'ABORTED', 'CANCELLED')
                or getattr(error, 'code', None) == RATE_LIMIT or re.search(PASSING, text, re.IGNORECASE))


def no_collection(uri, collection):
    return NoCollection(f'no collection {collection!r} in {uri}: fill it with python -m retrieval.populate CONFIG')


def describe_difference(found, it_has, wanted, the_run):
    """
    What of a Metadata, as a dict, is not as in another one, and not None there: one line that names both sides, or ''.
    """
    names = {'tokenizer', 'embedding_model'}  # they may differ where the hashes agree
    wrong = [key for key in wanted if key not in names and wanted[key] not in (None, found.get(key))]
    return '; '.join(f'{SETTINGS.get(key, key)}: {it_has} {describe(found, key)}, {the_run} {describe(wanted, key)}'
                     for key in wrong)


def describe(metadata, key):
    name = NAMES.get(key)
    return f'{metadata.get(name)!r} ({metadata.get(key)})' if name else repr(metadata.get(key))
