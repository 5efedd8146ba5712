"""
The Milvus collection that a model retrieves from. A row is whole: a chunk's id, document, position, embedding, text,
and its tokens with those of its continuation, so that one search answers everything. The collection's properties say
what made it. The only file that talks to Milvus: a local file by Milvus Lite, or any server by its URI.
"""
import json
import logging
import os
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import numpy as np

from configurator import UserError

VERSION = 1  # of the layout of a row
PROPERTY = 'nanoretro.metadata'
FIELDS = ('id', 'doc_id', 'position', 'document', 'text', 'tokens')
INDEXES = {  # setting: parameters of the build, of a search, and of a search with a filter, which has to look further
    'FLAT': ({}, {}, {}),
    'IVF_FLAT': ({'nlist': 1024}, {'nprobe': 32}, {'nprobe': 1024}),
    'HNSW': ({'M': 16, 'efConstruction': 200}, {'ef': 128}, {'ef': 1024}),
    'AUTOINDEX': ({}, {}, {}),
}
REQUEST = 2048  # rows or ids of one request: servers take no message over 64 MB
ANSWER_TIMEOUT = 10  # seconds that a server may take to answer the first call


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


def open_knowledge_base(settings, vocabulary_hash, embedder, create=False):
    """The collection that the settings name, filled or read with their tokenizer, chunk size and embedding model."""
    metadata = Metadata(settings['tokenizer'], vocabulary_hash, settings['retrieval_chunk_size'], embedder.name,
                        embedder.fingerprint, embedder.dimension, settings['retrieval_index'])
    return KnowledgeBase(settings['retrieval_milvus_uri'], settings['retrieval_milvus_token'],
                         settings['retrieval_collection'], metadata, create)


class KnowledgeBase:
    """
    One collection. `uri` is a path that ends in .db (Milvus Lite) or a server's http(s) address; the token is used
    and never shown. With `create` a collection that is not there is made, else that is a UserError.
    """

    def __init__(self, uri, token, collection, metadata, create=False):
        if metadata.index not in INDEXES:
            raise UserError(f'retrieval_index {metadata.index!r} is not one of {", ".join(INDEXES)}')
        self.uri, self.collection, self.metadata, self.has_token = uri, collection, metadata, bool(token)
        self.client = connect(uri, token, collection, create)
        # Milvus Lite keeps a search's parameters in the index, where another thread's search would change them
        self.searching = nullcontext() if '://' in uri else threading.Lock()
        try:
            with milvus_errors(uri, self.has_token):
                if self.client.has_collection(collection):
                    self._check_metadata()
                elif create:
                    self._create()
                else:
                    raise no_collection(uri, collection)
                self.client.load_collection(collection)
        except BaseException:
            self.close()
            raise

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
                        params=INDEXES[self.metadata.index][0])
        self.client.create_collection(self.collection, schema=schema, index_params=index,
                                      properties={PROPERTY: json.dumps(asdict(self.metadata))})

    def _check_metadata(self):
        found = self.client.describe_collection(self.collection).get('properties', {}).get(PROPERTY)
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
        with milvus_errors(self.uri, self.has_token):
            return int(self.client.query(self.collection, filter='', output_fields=['count(*)'],
                                         consistency_level='Strong')[0]['count(*)'])

    def tokens_by_id(self, ids):
        """{id: tokens} of those of the ids (n,) that the collection has."""
        found = {}
        for start in range(0, len(ids), REQUEST):
            some = [int(i) for i in ids[start:start + REQUEST]]
            with milvus_errors(self.uri, self.has_token):
                rows = self.client.query(self.collection, filter=f'id in {some}', output_fields=['id', 'tokens'],
                                         consistency_level='Strong')
            found |= {row['id']: row['tokens'] for row in rows}
        return found

    def upsert(self, rows):
        """Add rows, dicts of the collection's fields, in place of those that have the same id."""
        for start in range(0, len(rows), REQUEST):
            with milvus_errors(self.uri, self.has_token):
                self.client.upsert(self.collection, rows[start:start + REQUEST])

    def delete_from(self, doc_id, position):
        """Remove a document's rows from a position on."""
        with milvus_errors(self.uri, self.has_token):
            self.client.delete(self.collection, filter=f'doc_id == {int(doc_id)} and position >= {int(position)}')

    def flush(self):
        """Write to disk what was added, and index it."""
        with milvus_errors(self.uri, self.has_token):
            self.client.flush(self.collection)

    def search(self, vectors, limit, not_in_documents=(), fields=FIELDS):
        """
        For each of the vectors (n, D) at most `limit` rows, nearest first: dicts of the fields and `score`, the
        cosine. None is from a document whose doc_id is in `not_in_documents`.
        """
        if not len(vectors):
            return []
        filtered = len(not_in_documents) > 0
        expression = f'doc_id not in {sorted(int(d) for d in not_in_documents)}' if filtered else ''
        with milvus_errors(self.uri, self.has_token), self.searching:
            answer = self.client.search(self.collection, data=list(np.asarray(vectors, dtype=np.float32)),
                                        anns_field='embedding', limit=limit, filter=expression,
                                        output_fields=[name for name in fields if name != 'id'],
                                        search_params={'metric_type': 'IP',
                                                       'params': INDEXES[self.metadata.index][1 + filtered]})
        return [[{'id': hit['id'], 'score': hit['distance'], **hit['entity']} for hit in hits] for hits in answer]

    def close(self):
        self.client.close()


def connect(uri, token, collection, create):
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
        if local:
            return MilvusClient(uri)
        client = MilvusClient(uri, token=token, timeout=ANSWER_TIMEOUT)
        client.list_collections(timeout=ANSWER_TIMEOUT)
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
        if status in ('UNAVAILABLE', 'DEADLINE_EXCEEDED') or (isinstance(error, ValueError) and 'URL' in str(error)):
            raise UserError(f'no Milvus answers at {uri} ({status or error}): start it, for one with docker compose '
                            f'up -d, or correct retrieval_milvus_uri') from error
        if 'Open local milvus failed' in str(error):
            raise UserError(f'Milvus Lite can not open {uri}: another process has it open (a local file serves one at '
                            f'a time), or it is no Milvus Lite database; wait for that process, or name another '
                            f'retrieval_milvus_uri') from error
        raise


def no_collection(uri, collection):
    return UserError(f'no collection {collection!r} in {uri}: fill it with python -m retrieval.populate CONFIG')


def describe(metadata, key):
    name = {'vocabulary_hash': 'tokenizer', 'embedding_hash': 'embedding_model'}.get(key)
    return f'{metadata.get(name)!r} ({metadata.get(key)})' if name else repr(metadata.get(key))
