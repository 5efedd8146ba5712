"""
The Milvus collection that a model retrieves from. A row is whole: a chunk's id, document, position, embedding, text,
and its tokens with those of its continuation. The collection's properties say what made it, and in which state it is.
The only file that talks to Milvus: a local file by Milvus Lite, or any server by its URI.
"""
import json
import logging
import os
import threading
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import numpy as np

from configurator import UserError

VERSION = 1  # of the layout of a row
PROPERTY = 'nanoretro.metadata'
STATE = 'nanoretro.state'  # property that changes with the rows, and is CHANGING while they do
CHANGING = 'changing'
FIELDS = ('id', 'doc_id', 'position', 'document', 'text', 'tokens')
HIT = np.dtype([('id', np.int64), ('doc_id', np.int64), ('score', np.float32)])  # the score is the cosine
INDEXES = {  # setting: parameters of the build, of a search, and of a search with a filter, which has to look further
    'FLAT': ({}, {}, {}),
    'IVF_FLAT': ({'nlist': 1024}, {'nprobe': 16}, {'nprobe': 1024}),
    'HNSW': ({'M': 16, 'efConstruction': 200}, {'ef': 128}, {'ef': 1024}),
    'AUTOINDEX': ({}, {}, {}),
}
REQUEST = 2048  # rows, ids or queries of one request: servers take no message over 64 MB
ANSWER_TIMEOUT = 10  # seconds that a server may take to answer the first call
RETRIES = 1  # of pymilvus, which says nothing while it retries: who trains must hear of it and wait (retriever.py)


@dataclass
class Metadata:
    """What made a collection. Opening it with anything else is an error."""
    tokenizer: str
    vocabulary_hash: str
    chunk_size: int
    embedding_model: str
    embedding_hash: str
    dimension: int
    index: str
    version: int = VERSION


class Unreachable(UserError):
    """No Milvus answers, or it can't serve yet. It may come back."""


def open_knowledge_base(settings, vocabulary_hash, embedder, create=False, address=None):
    """The collection that the settings name, filled or read with their tokenizer, chunk size and embedding model."""
    metadata = Metadata(settings['tokenizer'], vocabulary_hash, settings['retrieval_chunk_size'], embedder.name,
                        embedder.fingerprint, embedder.dimension, settings['retrieval_index'])
    return KnowledgeBase(settings['retrieval_milvus_uri'], settings['retrieval_milvus_token'],
                         settings['retrieval_collection'], metadata, create, address)


class KnowledgeBase:
    """
    One collection. `uri` is a path that ends in .db (Milvus Lite) or a server's http(s) address; the token is used
    and never shown. With `create` a collection that is not there is made, else that is a UserError. A local database
    that a process serves (local_server.py) is reached at its `address`.
    """

    def __init__(self, uri, token, collection, metadata, create=False, address=None):
        if metadata.index not in INDEXES:
            raise UserError(f'retrieval_index {metadata.index!r} is not one of {", ".join(INDEXES)}')
        self.uri, self.token, self.collection, self.metadata, self.address = uri, token, collection, metadata, address
        # Milvus Lite keeps a search's parameters in the index, where another thread's search would change them
        self.searching = nullcontext() if '://' in uri else threading.Lock()
        self.client = None
        self.open(create)

    def open(self, create=False, timeout=None):
        """Connect, also anew after the server has been away; within `timeout` seconds, where that is given."""
        self.close()
        longest = 6 * ANSWER_TIMEOUT if self.address else ANSWER_TIMEOUT  # ours yields to all else
        self.client = connect(self.uri, self.address, self.token, self.collection, create,
                              min(timeout or longest, longest))
        try:
            with self._errors():
                if self.client.has_collection(self.collection, retry_times=RETRIES):
                    self._check_metadata()
                elif create:
                    self._create()
                else:
                    raise no_collection(self.uri, self.collection)
                self.client.load_collection(self.collection, timeout=timeout)
        except BaseException:
            self.close()
            raise

    def _errors(self):
        return milvus_errors(self.uri, bool(self.token))

    def _create(self):
        from pymilvus import DataType, MilvusClient
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field('id', DataType.INT64, is_primary=True)
        schema.add_field('doc_id', DataType.INT64)
        schema.add_field('position', DataType.INT64)
        schema.add_field('document', DataType.VARCHAR, max_length=1024)
        schema.add_field('text', DataType.VARCHAR, max_length=65535)
        schema.add_field('tokens', DataType.ARRAY, element_type=DataType.INT32,
                         max_capacity=2 * self.metadata.chunk_size)
        schema.add_field('embedding', DataType.FLOAT_VECTOR, dim=self.metadata.dimension)
        index = self.client.prepare_index_params()
        index.add_index('embedding', index_type=self.metadata.index, metric_type='IP',
                        params={'params': INDEXES[self.metadata.index][0]})  # nested: Milvus Lite reads only those
        self.client.create_collection(self.collection, schema=schema, index_params=index,
                                      properties={PROPERTY: json.dumps(asdict(self.metadata)), STATE: new_state()})

    def _properties(self):
        return self.client.describe_collection(self.collection, retry_times=RETRIES).get('properties', {})

    def state(self):
        """
        A name of what the collection holds at present, for those who remember its answers; None while it is being
        changed, or where the change was broken off. Only what this class writes changes it.
        """
        with self._errors():
            state = self._properties().get(STATE, CHANGING)
        return None if state == CHANGING else state

    def _set_state(self, state):
        for _ in range(2):  # Milvus 2.3 writes down what was there before the last alteration
            with self._errors():
                self.client.alter_collection_properties(self.collection, properties={STATE: state})

    def _announce_change(self):
        if self.state() is not None:
            self._set_state(CHANGING)

    def _check_metadata(self):
        found = self._properties().get(PROPERTY)
        if not found:
            raise UserError(f'collection {self.collection!r} in {self.uri} was not made by nanoRETRO: choose another '
                            f'name in retrieval_collection')
        found, wanted = json.loads(found), asdict(self.metadata)
        same = {'tokenizer', 'embedding_model'}  # names may differ where the hashes agree
        wrong = [key for key in wanted if key not in same and found.get(key) != wanted[key]]
        if wrong:
            named = {'vocabulary_hash': 'tokenizer', 'embedding_hash': 'embedding_model'}
            both = '; '.join(f'{named.get(key, key)}: it has {describe(found, key)}, the run {describe(wanted, key)}'
                             for key in wrong)
            raise UserError(f'collection {self.collection!r} in {self.uri} was made by something else ({both}): use '
                            f'the settings that made it, or fill another retrieval_collection with python -m '
                            f'retrieval.populate CONFIG')

    def count(self):
        """Number of rows."""
        with self._errors():
            return int(self.client.query(self.collection, filter='', output_fields=['count(*)'],
                                         consistency_level='Strong', retry_times=RETRIES)[0]['count(*)'])

    def rows(self, ids, fields, latest=False):
        """
        {id: row} of those of the ids (n,) that the collection has, each a dict of the fields. With `latest` the
        answer waits for all that was written up to now, else it may be some seconds old.
        """
        options = {'consistency_level': 'Strong'} if latest else {}
        found = {}
        for start in range(0, len(ids), REQUEST):
            with self._errors():
                rows = self.client.get(self.collection, ids=ids[start:start + REQUEST].tolist(),
                                       output_fields=['id', *fields], retry_times=RETRIES, **options)
            found |= {row['id']: row for row in rows}
        return found

    def upsert(self, rows):
        """Add rows, dicts of the collection's fields, in place of those that have the same id. Then flush()."""
        for start in range(0, len(rows), REQUEST):
            self._announce_change()
            with self._errors():
                self.client.upsert(self.collection, rows[start:start + REQUEST])

    def delete_from(self, doc_id, position):
        """Remove a document's rows from a position on. Then flush()."""
        self._announce_change()
        with self._errors():
            self.client.delete(self.collection, filter=f'doc_id == {int(doc_id)} and position >= {int(position)}')

    def flush(self):
        """Write to disk what was changed, and index it. From here on it may be remembered."""
        with self._errors():
            self.client.flush(self.collection)
        self._set_state(new_state())

    def search(self, vectors, limit, not_in_documents=(), latest=False):
        """
        The up to `limit` rows nearest to each of the vectors (n, D): (n, limit) of HIT, nearest first, of equally
        near ones (to 1e-5) the lower id first; a line that is shorter ends in score -inf. None is from a document
        whose doc_id is in `not_in_documents`. `latest` as in rows().
        """
        options = {'consistency_level': 'Strong'} if latest else {}
        filtered = len(not_in_documents) > 0
        expression = f'doc_id not in {sorted(int(d) for d in not_in_documents)}' if filtered else ''
        params = dict(INDEXES[self.metadata.index][1 + filtered])
        if 'ef' in params:
            params['ef'] = max(params['ef'], limit)  # Milvus refuses to return more rows than it looks at
        found = np.zeros((len(vectors), limit), dtype=HIT)
        found['score'] = -np.inf
        for start in range(0, len(vectors), REQUEST):
            data = list(np.asarray(vectors[start:start + REQUEST], dtype=np.float32))
            with self._errors(), self.searching:
                answer = self.client.search(self.collection, data=data, anns_field='embedding', limit=limit,
                                            filter=expression, output_fields=['doc_id'],
                                            search_params={'metric_type': 'IP', 'params': params}, retry_times=RETRIES,
                                            **options)
            for line, hits in zip(found[start:], answer, strict=False):
                line['id'][:len(hits)], line['score'][:len(hits)] = hits.ids, hits.distances
                line['doc_id'][:len(hits)] = [hit['entity']['doc_id'] for hit in hits]
        # equal texts have equal scores but for rounding, and would come in another order from another server or index
        order = np.lexsort((found['id'], -found['score'].round(5)))  # by line: the score, then the id
        return np.take_along_axis(found, order, axis=1)

    def close(self):
        if self.client is not None:
            self.client.close()
            self.client = None


def new_state():
    return uuid.uuid4().hex


def connect(uri, address, token, collection, create, timeout):
    """A client. UserError where nothing answers, where it refuses the token, or where there is no local file yet."""
    local = '://' not in uri
    if '@' in uri.partition('://')[2]:
        raise UserError('retrieval_milvus_uri holds a user or a password: give them as user:password in '
                        'retrieval_milvus_token, or in MILVUS_TOKEN in the environment, where they are kept secret')
    if local:
        check_local_path(uri, collection, create)
    from pymilvus import MilvusClient  # takes a second to import
    for name in ('milvus_lite', 'pymilvus'):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their tracebacks: our error gives the reason
    with milvus_errors(uri, bool(token)):
        if local and not address:
            return MilvusClient(uri)
        client = MilvusClient(address or uri, token=token, timeout=timeout)
        client.list_collections(timeout=timeout)
        return client


def check_local_path(uri, collection, create):
    if not uri.endswith('.db'):
        raise UserError(f'retrieval_milvus_uri {uri!r} is neither the path of a local file ending in .db nor an '
                        f'address such as http://127.0.0.1:19530')
    if not create and not os.path.exists(uri):
        raise no_collection(uri, collection)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(uri)), exist_ok=True)
    except OSError as error:
        raise UserError(f'retrieval_milvus_uri {uri!r} can not be made there ({error.strerror}): name a path in a '
                        f'folder that you may write to') from error


@contextmanager
def milvus_errors(uri, has_token):
    """Turn the errors that a user can put right into UserErrors; let the others through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # grpc's, pymilvus' and the standard library's have no common base
        status = getattr(error.__cause__ or error, 'code', None)
        status = getattr(status() if callable(status) else status, 'name', '')
        if status in ('UNAUTHENTICATED', 'PERMISSION_DENIED'):
            given = 'the token was refused' if has_token else 'no token was given'
            raise UserError(f'Milvus at {uri} asks for authentication and {given}: set retrieval_milvus_token, or '
                            f'MILVUS_TOKEN in the environment, to user:password or an API key') from error
        if (status in ('UNAVAILABLE', 'DEADLINE_EXCEEDED') or 'Fail connecting to server' in str(error)
                or (isinstance(error, ValueError) and 'URL' in str(error))):
            raise Unreachable(f'no Milvus answers at {uri} ({status or type(error).__name__}): start it, for one with '
                              f'docker compose up -d, or correct retrieval_milvus_uri') from error
        if 'Open local milvus failed' in str(error):
            raise can_not_open(uri) from error
        from pymilvus.exceptions import MilvusException, ParamError
        if isinstance(error, MilvusException) and not isinstance(error, ParamError):
            raise Unreachable(f'Milvus at {uri} refuses: {error.message}') from error
        raise


def can_not_open(path):
    return UserError(f'Milvus Lite can not open {path}: another process has it open (a local file serves one run at a '
                     f'time), or it is no Milvus Lite database; wait for that process, or name another '
                     f'retrieval_milvus_uri')


def no_collection(uri, collection):
    return UserError(f'no collection {collection!r} in {uri}: fill it with python -m retrieval.populate CONFIG')


def describe(metadata, key):
    name = {'vocabulary_hash': 'tokenizer', 'embedding_hash': 'embedding_model'}.get(key)
    return f'{metadata.get(name)!r} ({metadata.get(key)})' if name else repr(metadata.get(key))
