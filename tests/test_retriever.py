"""Leaks, masks and tensors, against a real collection of real text, in Milvus Lite and on a Milvus server."""
import numpy as np
import pytest

from configurator import UserError
from data.chunking import chunk_document, document_hash
from data.documents import as_dataset_configs, load_documents
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer, tokenize, vocabulary_hash
from retrieval.knowledge_base import FIELDS, open_knowledge_base
from retrieval.leaks import LIMITS
from retrieval.retriever import EMBEDDED, LOOKED_UP, NONE, REMEMBERED, Retriever, share_trigrams
from tests.conftest import BACKENDS, CHUNK, open_all, run
from training.checks import check_found_themselves


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def tokenizer(settings):
    return load_tokenizer(settings.tokenizer)


@pytest.fixture
def retriever(settings, tokenizer):
    made = Retriever(settings, tokenizer)
    yield made
    made.close()


re_ranked = pytest.mark.parametrize('rerank', [0, 20], ids=['nearest', 're-ranked'])


def make_stream(settings, tokenizer, **options):
    return SequenceStream(open_all(settings), settings.block_size, settings.batch_size, **options)


def retrieve(retriever, batch):
    chunks = batch.tokens.reshape(*batch.is_last_chunk.shape, CHUNK)
    return retriever.retrieve(chunks, batch.doc_ids, batch.is_last_chunk, batch.chunk_ids)


def existing(hits):
    """The hits of one chunk (K,) without the missing ones."""
    return hits[hits['score'] > -np.inf]


@re_ranked
def test_no_neighbor_is_of_a_document_of_its_own_sequence(settings, tokenizer, rerank):
    retriever = Retriever(settings.replace(retrieval_rerank=rerank), tokenizer)
    stream, found, sequences = make_stream(settings, tokenizer), 0, 0
    for _ in range(15):
        batch = next(stream)
        neighbors = retrieve(retriever, batch)
        for b in range(len(batch.tokens)):
            own = set(batch.doc_ids[b].tolist())
            sequences += len(own) > 1
            for place, hits in enumerate(neighbors.hits[b]):
                hits = existing(hits)
                assert not own & set(hits['doc_id'].tolist())
                assert len(hits) == (0 if batch.is_last_chunk[b, place] else settings.retrieval_k_neighbors)
                found += len(hits)
    retriever.close()
    assert found > 200 and sequences > 0


def test_neighbors_are_those_of_an_exhaustive_search_over_other_documents(settings, tokenizer, workspace):
    """Computed here from the texts, with no database; the collection has the exact index."""
    run('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=exact', '--retrieval_index=FLAT',
        folder=workspace)
    retriever = Retriever(settings.replace(retrieval_collection='exact', retrieval_index='FLAT'), tokenizer)
    documents = list(load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets')))
    texts, owners = [], []
    for document in documents:
        chunks, _ = chunk_document(tokenize(document.text, tokenizer), CHUNK, tokenizer.eot_token)
        texts += [tokenizer.decode([t for t in row if t != tokenizer.eot_token]) for row in chunks.tolist()]
        owners += [document_hash(document.source, document.id)] * len(chunks)
    vectors, owners = retriever.embedder.embed(texts), np.array(owners)
    batch = next(make_stream(settings, tokenizer))
    neighbors = retrieve(retriever, batch)
    checked = 0
    for b, place in np.argwhere(~batch.is_last_chunk):
        query = retriever.embedder.embed([tokenizer.decode(batch.tokens[b].reshape(-1, CHUNK)[place].tolist())])[0]
        scores = np.where(np.isin(owners, batch.doc_ids[b]), -9, vectors @ query)
        best = np.sort(scores)[::-1][:settings.retrieval_k_neighbors]
        np.testing.assert_allclose(neighbors.hits['score'][b, place], best, atol=1e-3)
        checked += 1
    retriever.close()
    assert checked > 10


@re_ranked
@pytest.mark.parametrize('crowd', [limit + 20 for limit in LIMITS])
def test_a_document_that_fills_the_hits_of_a_search_leaks_nothing_and_hides_nothing(settings, tokenizer, crowd, rerank):
    """Its chunks are all alike, and the two that may be found are less alike than any of them."""
    settings = settings.replace(retrieval_collection='crowded', retrieval_rerank=rerank)
    first = Retriever(settings.replace(retrieval_collection='chunks'), tokenizer)
    knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), first.embedder, create=True)
    text = tokenizer.encode_ordinary('def read_the_file(path): return open(path).read()  # again and again' * 2)[:CHUNK]
    near = first.embedder.embed([tokenizer.decode(text)])[0]
    far = first.embedder.embed(['import sys\nsys.exit(1)', 'class Calendar: months'])
    rows = [dict(id=i, doc_id=1, position=i, document='own', text='', tokens=text, embedding=near)
            for i in range(crowd)]
    rows += [dict(id=10_000 + i, doc_id=2 + i, position=0, document='other', text='', tokens=[i, i + 1], embedding=v)
             for i, v in enumerate(far)]
    knowledge_base.upsert(rows)
    knowledge_base.flush()
    knowledge_base.close()
    first.close()
    retriever = Retriever(settings, tokenizer)
    neighbors = retriever.retrieve(np.array([[text]]), np.array([[1]]), np.array([[False]]))
    of_two = retriever.retrieve(np.array([[text, text]]), np.array([[1, 2]]), np.array([[False, True]]))
    retriever.close()
    assert set(existing(neighbors.hits[0, 0])['doc_id']) == {2, 3} and neighbors.searched_again[0, 0]
    assert neighbors.mask[0, 0].sum(-1).tolist() == [2, 2]
    assert existing(of_two.hits[0, 0])['doc_id'].tolist() == [3] and not of_two.mask[0, 0, 1].any()


def test_fewer_than_k_neighbors_are_masked_and_hold_no_text(settings, tokenizer):
    settings = settings.replace(retrieval_k_neighbors=60)
    retriever = Retriever(settings, tokenizer)
    only = document_hash('stdlib', 'json.decoder')
    batch = next(make_stream(settings, tokenizer))
    everything = {document_hash('stdlib', d.id) for d in
                  load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets'))}
    documents = np.array([sorted(everything - {document_hash('stdlib', 'keyword')})])
    chunk = batch.tokens[:1].reshape(1, -1, CHUNK)[:, :1].repeat(documents.shape[1], axis=1)
    neighbors = retriever.retrieve(chunk, documents, np.arange(documents.shape[1])[None] > 0)
    retriever.close()
    hits = existing(neighbors.hits[0, 0])
    assert 0 < len(hits) < 60 and only not in hits['doc_id']
    assert not neighbors.mask[0, 0, len(hits):].any() and not neighbors.mask[0, 1:].any()
    assert (neighbors.tokens[~neighbors.mask] == tokenizer.eot_token).all()


def test_arrays_hold_each_neighbor_and_its_continuation(settings, tokenizer, retriever):
    batch = next(make_stream(settings, tokenizer))
    neighbors = retrieve(retriever, batch)
    L, K = settings.block_size // CHUNK, settings.retrieval_k_neighbors
    assert neighbors.tokens.shape == neighbors.mask.shape == (settings.batch_size, L, K, 2 * CHUNK)
    texts = {document_hash(d.source, d.id): d.text for d in
             load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets'))}
    for b, place in np.argwhere(~batch.is_last_chunk):
        hits = neighbors.hits[b, place]
        rows = retriever.knowledge_base.rows(hits['id'], FIELDS)
        for k, hit in enumerate(hits):
            row = rows[hit['id']]
            tokens = neighbors.tokens[b, place, k][neighbors.mask[b, place, k]].tolist()
            assert tokens == row['tokens'] and row['doc_id'] == hit['doc_id']
            whole = tokenizer.decode([t for t in tokens if t != tokenizer.eot_token])
            assert whole in texts[row['doc_id']] or '�' in whole
            assert whole.startswith(row['text'].replace('<|endoftext|>', '')) or '�' in whole
        assert (np.diff(hits['score']) <= 1e-5).all()


@re_ranked
def test_cached_neighbors_are_those_of_a_fresh_search_to_the_bit(settings, tokenizer, rerank):
    """In sequences of other documents than those that they were remembered from, and of other batches."""
    settings = settings.replace(retrieval_rerank=rerank)
    first, other = make_stream(settings, tokenizer), make_stream(settings, tokenizer, seed=7)
    batches = [next(first) for _ in range(30)]
    shuffled = [next(other) for _ in range(30)]
    assert {tuple(sorted(set(row))) for b in batches for row in b.doc_ids.tolist()} != {
        tuple(sorted(set(row))) for b in shuffled for row in b.doc_ids.tolist()}
    without = Retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer)
    fresh = [retrieve(without, batch) for batch in (*batches, *shuffled)]
    without.close()
    assert sum(n.searched_again.sum() for n in fresh) > 0
    remembered = 0
    for attempt in range(2):
        retriever = Retriever(settings, tokenizer)
        for batch, expected in zip((*batches, *shuffled), fresh, strict=True):
            neighbors = retrieve(retriever, batch)
            for name in ('tokens', 'mask'):
                assert (getattr(neighbors, name) == getattr(expected, name)).all()
            seen = expected.hits['score'] > -np.inf
            assert neighbors.hits[seen].tobytes() == expected.hits[seen].tobytes()
            remembered += (neighbors.origin == REMEMBERED).sum()
            if attempt:
                assert ((neighbors.origin == REMEMBERED) == ~batch.is_last_chunk).all()
        retriever.close()
    assert remembered > 200


def slow_share(chunk, candidate):
    """Token by token; as many more of a chunk's later trigrams as share_trigrams says."""
    trigrams = [tuple(candidate[i:i + 3]) for i in range(len(candidate) - 2)]
    return sum(np.exp(i / (len(chunk) - 3)) for i in range(len(chunk) - 2) if tuple(chunk[i:i + 3]) in trigrams)


def test_shared_trigrams_are_those_found_one_by_one_and_the_later_count_more():
    rng = np.random.default_rng(0)
    chunks, candidates = rng.integers(0, 3, (5, 12)), rng.integers(0, 3, (5, 7, 12))
    expected = [[slow_share(chunks[i].tolist(), candidates[i, m].tolist()) for m in range(7)] for i in range(5)]
    np.testing.assert_allclose(share_trigrams(chunks, candidates), expected, rtol=1e-5)
    large = np.arange(6)[None] + 2**20 - 6  # ids of the largest vocabularies stay apart
    parts = np.zeros((1, 2, 6), dtype=np.int64)
    parts[0, 0, :3], parts[0, 1, 3:] = large[0, :3], large[0, 3:]
    np.testing.assert_allclose(share_trigrams(large, parts)[0], [1, np.e], rtol=1e-5)


def test_reranked_neighbors_are_those_of_the_nearest_that_share_most(settings, tokenizer):
    dense = Retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer)
    retriever = Retriever(settings.replace(retrieval_rerank=20), tokenizer)
    batch = next(make_stream(settings, tokenizer))
    chunks = batch.tokens.reshape(-1, 1, CHUNK)
    documents, ends, ids = (a.reshape(-1, 1) for a in (batch.doc_ids, batch.is_last_chunk, batch.chunk_ids))
    nearest = dense.retrieve(chunks, documents, ends, ids)
    best = [retriever.retrieve(chunks, documents, ends, ids) for _ in range(2)]  # the second from the cache
    moved = 0
    for i in np.flatnonzero(~ends[:, 0]):
        vector = retriever.embedder.embed([tokenizer.decode(chunks[i, 0].tolist())])
        found = retriever.knowledge_base.search(vector, 20)[0]
        found = found[(found['score'] > -np.inf) & (found['doc_id'] != documents[i, 0])]
        rows = retriever.knowledge_base.rows(found['id'], ['tokens'])
        shared = [slow_share(chunks[i, 0].tolist(), rows[hit['id']]['tokens'][:CHUNK]) for hit in found]
        if len(found) < settings.retrieval_k_neighbors:  # its own document crowds them
            continue
        expected = found['id'][np.argsort(-np.round(shared, 4), kind='stable')][:settings.retrieval_k_neighbors]
        for neighbors in best:
            assert neighbors.hits['id'][i, 0].tolist() == expected.tolist()
            assert neighbors.tokens[i, 0, 0][neighbors.mask[i, 0, 0]].tolist() == rows[expected[0]]['tokens']
        moved += (expected != nearest.hits['id'][i, 0]).any()
    assert moved > 5 and (best[1].origin[~ends] == REMEMBERED).all()
    dense.close()
    retriever.close()


@pytest.mark.parametrize('backend', ['lite'])
def test_by_words_and_by_both_nothing_leaks_and_the_cache_answers_for_one_mode_alone(settings, tokenizer, workspace):
    run('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=words', '--retrieval_mode=hybrid',
        folder=workspace)
    settings = settings.replace(retrieval_collection='words')
    batches = [next(make_stream(settings, tokenizer, seed=seed)) for seed in range(4)]
    found = {}
    for mode in ('dense', 'bm25', 'hybrid'):
        model = 'nowhere' if mode == 'bm25' else settings.retrieval_embedding_model  # words need none
        own = settings.replace(retrieval_mode=mode, retrieval_embedding_model=model)
        first = Retriever(own, tokenizer)
        fresh = [retrieve(first, batch) for batch in batches]
        again = [retrieve(first, batch) for batch in batches]
        first.close()
        for batch, one, other in zip(batches, fresh, again, strict=True):
            retrieves = ~batch.is_last_chunk
            assert (one.origin[retrieves] != REMEMBERED).any() and (other.origin[retrieves] == REMEMBERED).all()
            assert (one.tokens == other.tokens).all()
            for b, own_documents in enumerate(batch.doc_ids):
                assert not np.isin(existing(one.hits[b].ravel())['doc_id'], own_documents).any()
            hits = one.hits[retrieves]
            assert (hits['score'] > -np.inf).mean() > 0.9 and (np.diff(hits['score'], axis=1) <= 1e-3).all()
        found[mode] = np.concatenate([neighbors.hits['id'][~batch.is_last_chunk] for neighbors, batch in
                                      zip(fresh, batches, strict=True)])
    of_dense, of_words, of_both = (found[mode] for mode in found)
    assert (of_dense != of_words).mean() > 0.3
    # the best of both is among the best of one of the two
    assert ((of_both[:, :1] == of_dense) | (of_both[:, :1] == of_words)).any(1).mean() > 0.9


def test_it_reports_where_each_chunks_neighbors_come_from(settings, tokenizer, retriever):
    batch = next(make_stream(settings, tokenizer))
    first, second = retrieve(retriever, batch), retrieve(retriever, batch)
    assert (first.origin == np.where(batch.is_last_chunk, NONE, LOOKED_UP)).all()
    assert (second.origin == np.where(batch.is_last_chunk, NONE, REMEMBERED)).all()
    assert not second.searched_again.any()
    batch.chunk_ids += 1  # chunks that the collection has not
    assert (retrieve(retriever, batch).origin == np.where(batch.is_last_chunk, NONE, EMBEDDED)).all()


def test_a_stored_embedding_is_not_used_for_a_chunk_that_has_changed(settings, tokenizer, retriever):
    batch = next(make_stream(settings, tokenizer))
    before = retrieve(retriever, batch)
    row, place = np.argwhere(~batch.is_last_chunk)[0]
    chunks = batch.tokens.reshape(*batch.is_last_chunk.shape, CHUNK)
    chunks[row, place] = chunks[row, place][::-1]
    after = retriever.retrieve(chunks, batch.doc_ids, batch.is_last_chunk, batch.chunk_ids)
    changed = np.zeros_like(batch.is_last_chunk)
    changed[row, place] = True
    assert (after.origin == np.where(batch.is_last_chunk, NONE, np.where(changed, EMBEDDED, REMEMBERED))).all()
    anonymous = retriever.retrieve(chunks, batch.doc_ids, batch.is_last_chunk)
    assert (after.hits['id'][row, place] == anonymous.hits['id'][row, place]).all()
    assert (after.tokens[~changed] == before.tokens[~changed]).all()


def test_duplicate_chunks_of_a_batch_are_asked_once(settings, tokenizer, retriever, monkeypatch):
    batch = next(make_stream(settings, tokenizer))
    once = retrieve(retriever, batch)
    twice = type(batch)(*[np.concatenate([getattr(batch, name)] * 2) for name in
                          ('tokens', 'targets', 'doc_ids', 'chunk_ids', 'is_last_chunk')])
    asked = []
    search = retriever.knowledge_base.search
    monkeypatch.setattr(retriever.knowledge_base, 'search', lambda vectors, *rest, **options: (
        asked.append(len(vectors)), search(vectors, *rest, **options))[1])
    retriever.cache.use_revision('another revision')
    monkeypatch.setattr(retriever.knowledge_base, 'revision', lambda: 'another revision')
    neighbors = retrieve(retriever, twice)
    assert asked[0] == (~batch.is_last_chunk).sum()
    assert (neighbors.tokens == np.concatenate([once.tokens] * 2)).all()


def test_a_changed_collection_is_never_answered_from_the_cache(settings, tokenizer, workspace):
    """A copy of a chunk's text is put into the collection, under another document: it is its neighbor from then on."""
    stream = make_stream(settings, tokenizer)
    batch = next(stream)
    row, place = np.argwhere(~batch.is_last_chunk)[0]
    chunk = batch.tokens[row].reshape(-1, CHUNK)[place]
    retriever = Retriever(settings, tokenizer)
    before = retrieve(retriever, batch)
    assert retriever.cache.count('rows') > 0
    added = dict(id=7, doc_id=7, position=0, document='new', text='', tokens=chunk.tolist(),
                 embedding=retriever.embedder.embed([tokenizer.decode(chunk.tolist())])[0])
    retriever.knowledge_base.upsert([added])  # as another process would, while this one is running
    during = retrieve(retriever, batch)
    assert (during.origin != REMEMBERED).all()
    retriever.knowledge_base.flush()
    after, again = retrieve(retriever, batch), retrieve(retriever, batch)
    assert 7 not in before.hits['id'][row, place] and 7 in after.hits['id'][row, place]
    assert (after.origin != REMEMBERED).all() and (again.origin[~batch.is_last_chunk] == REMEMBERED).all()
    assert (again.hits['id'] == after.hits['id']).all()
    with retriever.cache.environment.begin() as reading:
        names = [bytes(key) for key, _ in reading.cursor()]
    assert len(names) == 3 and all(retriever.knowledge_base.revision().encode() in name for name in names)
    retriever.close()


def test_an_empty_collection_is_an_error_with_what_to_do(settings, tokenizer):
    full = Retriever(settings, tokenizer)
    settings = settings.replace(retrieval_collection='empty')
    open_knowledge_base(settings, vocabulary_hash(tokenizer), full.embedder, create=True).close()
    with pytest.raises(UserError, match="'empty'.*is empty: fill it with python -m retrieval.populate"):
        Retriever(settings, tokenizer)
    full.close()


def test_chunks_that_are_handed_themselves_with_their_continuation_are_counted(settings, tokenizer):
    """The documents of a collection, asked for under another source: the leak rule cannot know them."""
    retriever = Retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer)
    renamed = settings.replace(train_datasets=[dict(path='train.parquet', source='elsewhere')])
    same, other = (next(SequenceStream(open_all(s), s.block_size, 16)) for s in (settings, renamed))
    same, other = retriever.retrieve_for([same])[0].counts, retriever.retrieve_for([other])[0].counts
    retriever.close()
    assert same['continued'] > 20 and same['found_themselves'] < 0.1 * same['continued']
    assert other['found_themselves'] > 0.8 * other['continued'] > 20


@pytest.mark.parametrize('found, stops, warns', [(0, False, False), (9, False, False), (20, False, True),
                                                 (50, False, True), (51, True, False)])
def test_many_chunks_that_found_themselves_are_warned_of_and_most_end_the_run(found, stops, warns):
    said = []
    error = check_found_themselves(dict(continued=100, found_themselves=found), said.append)
    assert bool(error) == stops and bool(said) == warns
    for text in [str(error)] * stops + said:
        assert 'retrieval.populate CONFIG --sync=True' in text and 'same id_field and source' in text
    few = dict(continued=20, found_themselves=20)
    assert check_found_themselves(few, said.append) is None and few  # too few to tell
    assert check_found_themselves({}, said.append) is None  # a GPT
