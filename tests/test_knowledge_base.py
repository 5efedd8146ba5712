"""Against a real Milvus Lite, and a real Milvus server."""
import dataclasses
import json
import re
import time
from collections import Counter

import grpc
import numpy as np
import pytest
from pymilvus.exceptions import MilvusException

from configurator import UserError
from retrieval.knowledge_base import FIELDS, PROPERTY, KnowledgeBase, Metadata, check_full_text, milvus_errors
from retrieval.local_server import Unreachable
from tests.conftest import BACKENDS

METADATA = Metadata('tokenizer.json', 'abc', 4, 'model', 'def', 8, 'FLAT')


def make_rows(count, documents=3, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [dict(id=i - 5, doc_id=-(i % documents), position=i // documents, document=f'd{i % documents}', text=f't{i}',
                 tokens=list(range(i % 8 + 1)), embedding=vector) for i, vector in enumerate(vectors)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def uri(request, backend, tmp_path):
    return str(tmp_path / 'folder/kb.db') if backend == 'lite' else request.getfixturevalue('clean_server').uri


@pytest.fixture
def knowledge_base(uri):
    made = KnowledgeBase(uri, '', 'rows', METADATA, create=True)
    yield made
    made.close()


def test_a_row_comes_back_whole_and_a_search_finds_the_nearest_first(knowledge_base):
    rows = make_rows(50)
    knowledge_base.upsert(rows)
    knowledge_base.flush()
    vectors = np.array([row['embedding'] for row in rows])
    answer = knowledge_base.search(vectors[:20], 5, latest=True)
    assert answer.shape == (20, 5)
    for i, hits in enumerate(answer):
        best = np.argsort(-(vectors @ vectors[i]))[:5]
        assert hits['id'].tolist() == [rows[b]['id'] for b in best]
        assert hits['doc_id'].tolist() == [rows[b]['doc_id'] for b in best]
        assert hits['score'] == pytest.approx(vectors[best] @ vectors[i], abs=1e-4)
        found = knowledge_base.rows(hits['id'], FIELDS)
        assert [found[row_id] for row_id in hits['id']] == [
            {key: value for key, value in rows[b].items() if key != 'embedding'} for b in best]


def test_a_search_for_more_rows_than_there_are_ends_in_scores_of_minus_infinity(knowledge_base):
    knowledge_base.upsert(make_rows(7))
    hits = knowledge_base.search([make_rows(7)[0]['embedding']], 20, latest=True)
    assert (hits['score'][0] > -np.inf).sum() == 7 and (hits['score'][0, 7:] == -np.inf).all()


def test_upserting_the_same_rows_again_adds_none(knowledge_base):
    for _ in range(3):
        knowledge_base.upsert(make_rows(30))
    assert knowledge_base.count() == 30
    knowledge_base.flush()
    assert knowledge_base.count() == 30


def test_a_search_can_leave_documents_out(knowledge_base):
    rows = make_rows(60)
    knowledge_base.upsert(rows)
    for out in ([-1], [-1, 0], [0, -1, -2]):
        hits = knowledge_base.search([rows[1]['embedding']], 60, excluded=out, latest=True)[0]
        assert set(hits['doc_id'][hits['score'] > -np.inf].tolist()) == {0, -1, -2} - set(out)


def test_rows_are_found_by_id_and_removed_from_a_position_on(knowledge_base):
    knowledge_base.upsert(make_rows(30))
    assert knowledge_base.rows(np.array([-5, 2, 1000]), ['tokens'], latest=True) == {
        -5: dict(id=-5, tokens=[0]), 2: dict(id=2, tokens=list(range(8)))}
    knowledge_base.delete_from(-1, 4)
    assert knowledge_base.count() == 30 - 6
    hits = knowledge_base.search([make_rows(1)[0]['embedding']], 60, excluded=[0, -2], latest=True)
    assert (hits['score'] > -np.inf).sum() == 4


def test_the_revision_changes_with_the_rows_and_is_none_while_they_change(knowledge_base, uri):
    first = knowledge_base.revision()
    assert first and first == knowledge_base.revision()
    knowledge_base.upsert(make_rows(30))
    assert knowledge_base.revision() is None
    again = KnowledgeBase(uri, '', 'rows', METADATA)  # as after populate was interrupted
    assert again.revision() is None
    knowledge_base.flush()
    second = again.revision()
    assert second and second != first
    knowledge_base.delete_from(-1, 4)
    assert again.revision() is None
    knowledge_base.flush()
    assert again.revision() not in (None, first, second)
    again.close()


def test_the_index_is_built_with_our_parameters_also_by_milvus_lite(tmp_path):
    import glob

    import faiss
    uri = str(tmp_path / 'kb.db')
    made = KnowledgeBase(uri, '', 'rows', dataclasses.replace(METADATA, index='IVF_FLAT'), create=True, expected=1100)
    made.upsert(make_rows(1100))
    made.flush()
    deadline = time.time() + 20  # it is built in the background
    while not (indexes := glob.glob(f'{uri}/**/*.idx', recursive=True)) and time.time() < deadline:
        time.sleep(0.1)
    made.close()
    index, = indexes
    assert faiss.read_index(index).nlist == 1100 // 39


def test_what_was_added_is_there_when_it_is_opened_again(uri):
    first = KnowledgeBase(uri, '', 'rows', METADATA, create=True)
    first.upsert(make_rows(20))
    first.close()
    again = KnowledgeBase(uri, '', 'rows', dataclasses.replace(METADATA, tokenizer='renamed.json'))
    assert again.count() == 20
    again.close()


@pytest.mark.parametrize('change, both', [
    (dict(vocabulary_hash='xyz', tokenizer='gpt2'), ['tokenizer', "'tokenizer.json' (abc)", "'gpt2' (xyz)"]),
    (dict(chunk_size=8), ['chunk_size: it has 4, the run 8']),
    (dict(embedding_hash='xyz', embedding_model='other'), ['embedding_model', "'model' (def)", "'other' (xyz)"]),
    (dict(dimension=16), ['dimension: it has 8, the run 16']),
    (dict(index='HNSW'), ["index: it has 'FLAT', the run 'HNSW'"]),
])
def test_opening_with_anything_else_fails_and_names_both_sides(knowledge_base, uri, change, both):
    for create in (False, True):
        with pytest.raises(UserError) as error:
            KnowledgeBase(uri, '', 'rows', dataclasses.replace(METADATA, **change), create=create)
        assert all(part in str(error.value) for part in [*both, 'retrieval.populate'])


def test_a_collection_of_somebody_else_is_left_alone(knowledge_base, uri):
    from pymilvus import MilvusClient
    client = MilvusClient(knowledge_base.lease.address if knowledge_base.lease else uri)
    client.create_collection('theirs', dimension=8)
    with pytest.raises(UserError, match="'theirs'.*was not made by nanoRETRO"):
        KnowledgeBase(uri, '', 'theirs', METADATA, create=True)
    assert client.has_collection('theirs')


def test_without_create_nothing_is_made(uri, tmp_path):
    with pytest.raises(UserError, match='no collection.*retrieval.populate'):
        KnowledgeBase(uri, '', 'rows', METADATA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('uri, said', [
    ('http://127.0.0.1:9', 'no Milvus answers at http://127.0.0.1:9'),
    ('http://[::1', 'correct retrieval_milvus_uri'),
    ('somewhere', "'somewhere' is neither the path of a local file ending in .db nor an address"),
    ('/dev/null/kb.db', 'cannot be created there'),
])
def test_a_uri_that_nothing_answers_is_named_and_the_token_is_not(uri, said):
    with pytest.raises(UserError) as error:
        KnowledgeBase(uri, 'root:hush', 'chunks', METADATA, create=True)
    assert said in str(error.value) and 'hush' not in str(error.value)


def test_an_unknown_index_is_named_with_the_known_ones(uri):
    with pytest.raises(UserError, match="'IVF' is not one of auto, FLAT, IVF_FLAT"):
        KnowledgeBase(uri, '', 'rows', dataclasses.replace(METADATA, index='IVF'), create=True)


@pytest.mark.parametrize('name', ['with-dash', 'with space', '1leading', '', 'ünï', 'a' * 256, 'a.b'])
def test_names_that_a_server_refuses_are_refused_for_a_local_file_too(uri, name, tmp_path):
    with pytest.raises(UserError, match='retrieval_collection .* cannot be the name of one: use letters, digits'):
        KnowledgeBase(uri, '', name, METADATA, create=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('uri, said', [
    ('file:///tmp/kb.db', "'file:///tmp/kb.db' is no address of a Milvus server: write the path alone, '/tmp/kb.db'"),
    ('milvus://host:19530', "is no address of a Milvus server: write it as http://HOST:19530"),
    ('file:milvus.db', "is no address of a Milvus server: write the path alone, 'milvus.db'"),
    ('http:/host:19530/a.db', 'is no address of a Milvus server'), ('http://', 'is no address of a Milvus server'),
    ('.db', "'.db' is neither the path"),
    ('', "'' is neither the path of a local file ending in .db nor an address"),
])
def test_uris_that_are_none_have_a_line_of_their_own(uri, said):
    with pytest.raises(UserError) as error:
        KnowledgeBase(uri, '', 'rows', METADATA, create=True)
    assert said in str(error.value)


def test_rows_are_removed_by_id_and_documents_found_and_all_rows_listed(knowledge_base, monkeypatch):
    rows = make_rows(60)
    knowledge_base.upsert(rows)
    assert knowledge_base.which_documents({0: 0, -2: 0, 77: 0}) == {0, -2} and not knowledge_base.which_documents({})
    assert knowledge_base.which_documents({0: 19, -1: 20, -2: 0, 77: 1}) == {0, -2}
    knowledge_base.delete([-5, -4, 1000])
    monkeypatch.setattr('retrieval.knowledge_base.MOST', 16)  # several requests, and documents with more rows than it
    found = [(row['id'], row['doc_id'], list(row['tokens'])) for part in knowledge_base.all_rows(['doc_id', 'tokens'])
             for row in part]
    assert sorted(found) == sorted((row['id'], row['doc_id'], list(row['tokens'])) for row in rows[2:])
    places = [(row['doc_id'], row['position']) for row in rows[2:5]] + [(99, 0)]
    assert {place: row['id'] for place, row in knowledge_base.rows_at(places, []).items()} == {
        place: row['id'] for place, row in zip(places, rows[2:5], strict=False)}
    assert knowledge_base.which_documents({0: 0, -1: 0, -2: 0, 77: 0}) == {0, -1, -2}
    assert knowledge_base.which_documents({0: 1, -1: 2, -2: 30}) == {0, -1}


def test_an_index_that_is_being_made_anew_is_waited_for_and_made_by_whoever_was_making_it(
        knowledge_base, uri, monkeypatch):
    def stop(*_):
        raise Unreachable('away')
    rows = make_rows(20)
    knowledge_base.upsert(rows)
    knowledge_base.flush()
    monkeypatch.setattr(knowledge_base, '_create_index', stop)
    monkeypatch.setattr('retrieval.knowledge_base.build_parameters', lambda kind, rows: {'nlist': 1})
    with pytest.raises(Unreachable):
        knowledge_base.fit_index(print)
    monkeypatch.undo()
    with pytest.raises(Unreachable, match='is being made anew'):
        KnowledgeBase(uri, '', 'rows', METADATA)
    opened = KnowledgeBase(uri, '', 'rows', METADATA, load=False)
    assert opened.metadata == METADATA and opened.describe_index() == {}
    opened.close()
    knowledge_base.open()  # as a filling that has waited
    assert knowledge_base.describe_index()['index_type'] == 'FLAT' and knowledge_base.count() == 20
    assert knowledge_base.search(np.array([rows[3]['embedding']]), 1)['id'].tolist() == [[-2]]


def test_a_running_process_reads_as_many_lists_as_an_index_has_that_another_made_anew(tmp_path):
    metadata = dataclasses.replace(METADATA, index='IVF_FLAT')
    opened = [KnowledgeBase(str(tmp_path / 'kb.db'), '', 'rows', metadata, create=True, expected=10) for _ in range(2)]
    reader, writer = opened
    writer.upsert(make_rows(2000))
    assert reader.revision() is None and reader.lists == 16 and writer.fit_index(print)
    writer.flush()
    assert reader.revision() and reader.lists == writer.lists == 51
    assert reader._search_parameters(2, True) == {'nprobe': 51}
    for knowledge_base in opened:
        knowledge_base.close()


def test_parameters_of_a_search_are_numbers_and_a_filtered_one_takes_no_less(uri):
    def parameters(**wanted):
        made = KnowledgeBase(uri, '', 'hnsw', dataclasses.replace(METADATA, index='HNSW'), True, search_params=wanted)
        made.close()
        return made._search_parameters(2, False), made._search_parameters(2, True)
    assert parameters(ef=4096) == ({'ef': 4096}, {'ef': 4096}) and parameters(ef=64) == ({'ef': 64}, {'ef': 1024})
    assert parameters(more=True)[1] == {'ef': 1024, 'more': True}
    with pytest.raises(UserError, match="retrieval_search_params: 'ef' is '64', and no number"):
        parameters(ef='64')


@pytest.mark.parametrize('call, said', [
    (lambda kb: kb.client.query(kb.collection, filter='nothing > 3', limit=1), 'refuses: .*nothing'),
    (lambda kb: kb.client.query(kb.collection, filter='id >', limit=1), 'refuses'),
    (lambda kb: kb.client.search(kb.collection, data=[[1.0] * 3], anns_field='embedding', limit=1,
                                 consistency_level='Strong'), 'refuses'),  # a server tells as soon as it has rows
    (lambda kb: kb.client.query('other', filter='id > 3', limit=1), 'refuses.*other'),
])
def test_a_request_that_is_wrong_is_not_waited_for(knowledge_base, call, said):
    knowledge_base.upsert(make_rows(3))
    with pytest.raises(UserError, match=said) as error, knowledge_base._errors():
        call(knowledge_base)
    assert not isinstance(error.value, Unreachable)


@pytest.mark.parametrize('error, passes', [
    (MilvusException(8, 'request is rejected by grpc RateLimiter middleware, please retry later'), True),
    (MilvusException(1, 'service not ready[querynode=1]: Initializing'), True),
    (MilvusException(101, "collection not loaded[collection=5]"), True),
    (MilvusException(1, "Collection is in state 'released', call load() first"), True),
    (MilvusException(1, 'vector index cannot be dropped on loaded collection: 5'), True),
    (MilvusException(65535, 'fail to search on QueryNode 3: node offline[node=3]'), True),
    (MilvusException(503, 'channel not available[channel=by-dev-rootcoord-dml_0]'), True),
    (MilvusException(2200, 'whatever', retriable=True), True),
    (MilvusException(9, 'quota exceeded[reason=memory quota exceeded, please allocate more resources]'), False),
    (MilvusException(1100, 'invalid parameter', is_input_error=True), False),
    (MilvusException(65535, 'cannot parse expression: id >, error: syntax error'), False),
    (MilvusException(100, 'collection not found[collection=x]'), False),
    (MilvusException(1, 'The Input data type is inconsistent with defined schema'), False),
])
def test_what_may_pass_is_waited_for_and_what_will_not_is_an_error(error, passes):
    """As Milvus servers of versions 2.3 to 2.6 word them."""
    with pytest.raises(UserError) as caught, milvus_errors('http://127.0.0.1:9', False):
        raise error
    assert isinstance(caught.value, Unreachable) == passes and error.message in str(caught.value)


@pytest.mark.parametrize('status, text, passes', [
    ('RESOURCE_EXHAUSTED', 'too many requests', True), ('UNAVAILABLE', '', True), ('INVALID_ARGUMENT', 'no', False),
    ('RESOURCE_EXHAUSTED', 'grpc: received message larger than max (5 vs. 4)', False)])
def test_the_status_of_a_broken_call_says_whether_it_may_pass(status, text, passes):
    class Broken(grpc.RpcError):
        message = text

        def code(self):
            return grpc.StatusCode[status]
    with pytest.raises(UserError) as caught, milvus_errors('http://127.0.0.1:9', False):
        raise Broken
    assert isinstance(caught.value, Unreachable) == passes


WORDS = dataclasses.replace(METADATA, mode='hybrid')
TEXTS = ['def read(path): return open(path).read()', 'def write(path, text): open(path, "w").write(text)',
         'import os, sys', 'the path of a file', 'class Reader: pass  # reads a path', '===== ( ) =====',
         'path path path', 'return None', 'import sys\nsys.exit(1)', 'x = y']


@pytest.fixture(scope='module')
def of_words(tmp_path_factory):
    """A function from a retrieval_mode to the knowledge base of TEXTS, in two segments, one row deleted."""
    made = KnowledgeBase(str(tmp_path_factory.mktemp('words') / 'kb.db'), '', 'rows', WORDS, create=True)
    rows = make_rows(len(TEXTS) + 1)
    for row, text in zip(rows, [*TEXTS, 'import path, and it is deleted'], strict=True):
        row['text'] = text
    for part in (rows[:6], rows[6:]):
        made.upsert(part)
        made.flush()
    made.delete([rows[-1]['id']])
    made.flush()

    def searched(mode):
        made.metadata = dataclasses.replace(WORDS, mode=mode)
        return made
    yield searched
    made.close()


def bm25(query, texts, k1=1.2, b=0.75):
    """The BM25 score of each text for a query, word by word."""
    words = [Counter(re.findall(r'\w+', text.lower())) for text in texts]
    mean = sum(sum(counts.values()) for counts in words) / len(texts)
    scores = np.zeros(len(texts))
    for word in re.findall(r'\w+', query.lower()):
        having = sum(word in counts for counts in words)
        rarity = np.log((len(texts) - having + 0.5) / (having + 0.5) + 1)
        scores += [rarity * c[word] * (k1 + 1) / (c[word] + k1 * (1 - b + b * sum(c.values()) / mean)) for c in words]
    return scores


QUERIES = np.array([*TEXTS, 'PATH', '"path" AND NOT sys OR (file:*) ~2 ^3 +x -y', 'path ' * 2000, 'zebra crossing'],
                   dtype=object)


def test_a_search_by_words_ranks_by_bm25_over_all_rows_that_are_there(of_words):
    hits = of_words('bm25').search(None, 20, texts=QUERIES)
    for query, line in zip(QUERIES, hits, strict=True):
        expected = bm25(query, TEXTS)
        found = line[line['score'] > -np.inf]
        assert len(found) == (expected > 0).sum()
        assert found['score'] == pytest.approx(expected[found['id'] + 5], rel=1e-4)
        assert (np.diff(found['score']) <= 1e-3).all()
    assert len(hits[5][hits[5]['score'] > -np.inf]) == len(hits[-1][hits[-1]['score'] > -np.inf]) == 0


def test_a_search_by_words_can_leave_documents_out(of_words):
    for out in ([0], [0, -1], [0, -1, -2]):
        hits = of_words('bm25').search(None, 20, out, texts=QUERIES)
        for query, line in zip(QUERIES, hits, strict=True):
            allowed = [i for i in np.flatnonzero(bm25(query, TEXTS)) if -(i % 3) not in out]
            assert sorted(line['id'][line['score'] > -np.inf].tolist()) == [i - 5 for i in allowed]


def test_rows_that_are_not_flushed_yet_are_found_by_their_words(of_words):
    added = make_rows(1)[0] | dict(id=77, doc_id=77, text='a zebra on the path')
    of_words('bm25').upsert([added])
    assert of_words('bm25').search(None, 3, texts=['zebra'], latest=True)['id'][0, 0] == 77
    of_words('bm25').flush()
    hits = of_words('bm25').search(None, 3, texts=['zebra path'])[0]
    assert hits['id'][0] == 77
    assert hits['score'][0] == pytest.approx(bm25('zebra path', [*TEXTS, added['text']])[-1], 1e-4)
    of_words('bm25').delete([77])
    of_words('bm25').flush()


def test_a_hybrid_search_ranks_by_the_ranks_of_both_and_where_there_is_no_word_by_the_embedding(of_words):
    vectors = np.array([row['embedding'] for row in make_rows(len(QUERIES), seed=1)])
    near, said, both = (of_words(mode).search(vectors, 10, texts=QUERIES) for mode in ('dense', 'bm25', 'hybrid'))
    for i in range(len(QUERIES)):
        scores = Counter()
        for hits in (near[i], said[i]):
            for rank, hit in enumerate(hits[hits['score'] > -np.inf], start=1):
                scores[int(hit['id'])] += 1 / (60 + rank)
        assert {int(hit['id']): hit['score'] for hit in both[i]} == pytest.approx(dict(scores), abs=1e-3)
        assert (np.diff(both[i]['score']) <= 0).all()
        if not said['score'][i].max() > -np.inf:
            assert both['id'][i].tolist() == near['id'][i].tolist()


def test_a_collection_without_words_is_not_searched_by_them_and_one_with_words_is_also_searched_without(tmp_path):
    uri = str(tmp_path / 'kb.db')
    for metadata, name in ((METADATA, 'dense'), (WORDS, 'words')):
        KnowledgeBase(uri, '', name, metadata, create=True).close()
    for mode in ('bm25', 'hybrid'):
        for create in (False, True):
            with pytest.raises(UserError) as error:
                KnowledgeBase(uri, '', 'dense', dataclasses.replace(METADATA, mode=mode), create=create)
            assert f"retrieval_mode: it has 'dense', the run {mode!r}" in str(error.value)
            assert f'with python -m retrieval.populate CONFIG --retrieval_mode={mode}' in str(error.value)
        KnowledgeBase(uri, '', 'words', dataclasses.replace(METADATA, mode=mode), create=True).close()
    KnowledgeBase(uri, '', 'words', METADATA).close()
    with pytest.raises(UserError, match="retrieval_mode 'sparse' is not one of dense, bm25, hybrid"):
        KnowledgeBase(uri, '', 'words', dataclasses.replace(METADATA, mode='sparse'))


def test_a_collection_that_was_made_before_there_were_modes_is_dense(tmp_path):
    made = KnowledgeBase(str(tmp_path / 'kb.db'), '', 'rows', METADATA, create=True)
    old = dataclasses.asdict(METADATA)
    del old['mode']
    made.client.alter_collection_properties('rows', properties={PROPERTY: json.dumps(old)})
    made._check_metadata(made._properties())
    made.metadata = WORDS
    with pytest.raises(UserError, match="retrieval_mode: it has 'dense', the run 'hybrid'"):
        made._check_metadata(made._properties())
    made.close()


@pytest.mark.parametrize('version, is_old', [
    ('v2.3.5-lite', True), ('2.4.23', True), ('v2.5.0', False), ('2.6.1-dev', False), ('v3.0.0', False),
    ('milvus_lite-3.2.2', False), ('', False), ('Zilliz Cloud Vector Database(Compatible with Milvus 2.4)', False)])
def test_versions_before_2_5_are_refused_and_what_names_itself_otherwise_is_asked(version, is_old):
    if is_old:
        with pytest.raises(UserError, match='is version'):
            check_full_text(version, 'http://127.0.0.1:9', 'bm25')
    else:
        check_full_text(version, 'http://127.0.0.1:9', 'bm25')
