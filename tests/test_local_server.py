"""The process that serves a local database, and its fast path beside Milvus Lite's own."""
import pytest

from configurator import UserError
from data.tokenizer import load_tokenizer
from retrieval import local_server as module
from retrieval.local_server import local_server
from retrieval.retriever import Retriever, open_retriever
from tests.conftest import release, run
from tests.test_loader import has_ended


def test_the_local_server_gives_its_database_back(settings, workspace):
    with (local_server('milvus.db', 'chunks') as (_, process),
          pytest.raises(UserError, match='another process has it open'), local_server('milvus.db', 'chunks')):
        pass
    assert has_ended(process.pid)
    Retriever(settings, load_tokenizer(settings.tokenizer)).close()
    release(workspace)


def test_why_it_cannot_start_is_shown(settings, workspace, monkeypatch):
    (workspace / 'file.db').write_text('no database')
    with (pytest.raises(UserError, match='cannot serve file.db: .*Error: .*see that it is a database of Milvus Lite'),
          local_server('file.db', 'chunks')):
        pass


def test_with_another_version_of_milvus_lite_its_own_search_answers_and_that_is_said(settings, capfd, monkeypatch):
    """The version is set in the environment of the server's process, too."""
    tokenizer = load_tokenizer(settings.tokenizer)
    with open_retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer) as retriever:
        vectors = retriever.embedder.embed(['import os', 'def f(x):'])
        expected = retriever.knowledge_base.search(vectors, 5)
    assert 'Milvus Lite is version' not in capfd.readouterr().err
    monkeypatch.setattr(module, 'version', lambda _: '9.9')
    assert 'Milvus Lite is version 9.9, and the fast path' in module.why_slow()
    with open_retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer) as retriever:
        assert (retriever.knowledge_base.search(vectors, 5) == expected).all()
    assert 'searches of the local file take several times as long' in capfd.readouterr().err


def test_the_fast_path_finds_and_reads_what_milvus_lite_does(workspace):
    """Over arrays as in its loops; also of rows that were replaced or deleted since, flushed or not."""
    code = """
import milvus_lite.db
import numpy as np
from milvus_lite.engine import collection as engine
from retrieval.lite_collection import ArrayCollection
milvus_lite.db.Collection = ArrayCollection
slow = engine.Collection
planned = []  # calls that Milvus Lite's own methods answer
build_plan = engine.build_projection_plan
engine.build_projection_plan = lambda *given, **rest: planned.append(given) or build_plan(*given, **rest)
collection = milvus_lite.db.MilvusLite('milvus.db').get_collection('chunks')
assert type(collection) is ArrayCollection
collection.load()
size = len(collection.query('position == 0', ['embedding'])[0]['embedding'])
queries = np.random.default_rng(0).normal(size=(50, size))

def check(unwritten=False):
    for limit in (1, 8, 3000):
        for asked in ({}, {'expr': 'position > 2'}):
            options = dict(output_fields=['doc_id', 'id'], search_params={'nprobe': 16}, **asked)
            planned.clear()
            answer = collection.search(queries.tolist(), limit, 'IP', **options)
            assert len(planned) == (unwritten or bool(asked))
            assert answer == slow.search(collection, queries.tolist(), limit, 'IP', **options)
            assert all(len(hits) for hits in answer)
    for fields in (['tokens'], ['id', 'text', 'embedding'], list(some[0]), None):
        planned.clear()
        rows = collection.get(ids, output_fields=fields)
        assert len(planned) == (fields is None or unwritten)
        assert rows == slow.get(collection, ids, output_fields=fields) and len(rows) == collection.num_entities
    return collection.num_entities

some = collection.query('position == 1', list(collection.query('position == 1')[0]))
ids = [7, *(row['id'] for row in collection.query('position >= 0', ['id']))]  # there is no 7
count = check()
for row in some:
    row['embedding'] = (-np.asarray(row['embedding'])).tolist()
collection.insert(some[:20])
collection.delete([row['id'] for row in some[20:30]])
check(unwritten=True)
collection.flush()
assert check() == count - 10
print('the same')
"""
    assert run('-c', code, folder=workspace).stdout.strip() == 'the same'
