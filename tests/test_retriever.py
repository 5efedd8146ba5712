"""Leaks, masks and tensors, against a real Milvus Lite collection of real text."""
import numpy as np
import pytest
import torch

from configurator import UserError
from data.chunking import chunk_document, document_hash
from data.stream import SequenceStream, as_dataset_configs, load_documents
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.knowledge_base import FIELDS, open_knowledge_base
from retrieval.prefetch import Prefetcher
from retrieval.retriever import OVERFETCH, Retriever
from tests.conftest import CHUNK, run


@pytest.fixture
def tokenizer(settings):
    return load_tokenizer(settings['tokenizer'])


@pytest.fixture
def retriever(settings, tokenizer):
    made = Retriever(settings, tokenizer)
    yield made
    made.close()


def make_stream(settings, tokenizer, **options):
    return SequenceStream(as_dataset_configs(settings['train_datasets'], 'train_datasets'), tokenizer, CHUNK,
                          settings['block_size'], settings['batch_size'], interleave=5, **options)


def retrieve(retriever, batch, **options):
    return retriever.retrieve(batch.tokens.reshape(*batch.ends.shape, CHUNK), batch.documents, batch.ends, **options)


def test_no_neighbor_is_of_a_document_of_its_own_sequence(settings, tokenizer, retriever):
    stream, found, sequences = make_stream(settings, tokenizer), 0, 0
    for _ in range(15):
        batch = next(stream)
        neighbors = retrieve(retriever, batch)
        for b in range(len(batch.tokens)):
            own = set(batch.documents[b].tolist())
            sequences += len(own) > 1
            for place, rows in enumerate(neighbors.rows[b]):
                assert not own & {row['doc_id'] for row in rows}
                assert len(rows) == (0 if batch.ends[b, place] else settings['retrieval_k_neighbors'])
                found += len(rows)
    assert found > 200 and sequences > 0


def test_neighbors_are_those_of_an_exhaustive_search_over_other_documents(settings, tokenizer, workspace):
    """Computed here from the texts, with no database; the collection has the exact index."""
    run('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=exact', '--retrieval_index=FLAT',
        folder=workspace)
    retriever = Retriever(settings | dict(retrieval_collection='exact', retrieval_index='FLAT'), tokenizer)
    documents = list(load_documents(as_dataset_configs(settings['train_datasets'], 'train_datasets')))
    texts, owners = [], []
    for document in documents:
        chunks, _ = chunk_document(document.tokens(tokenizer), CHUNK, tokenizer.eot_token)
        texts += [tokenizer.decode([t for t in row if t != tokenizer.eot_token]) for row in chunks.tolist()]
        owners += [document_hash(document.source, document.id)] * len(chunks)
    vectors, owners = retriever.embedder.embed(texts), np.array(owners)
    batch = next(make_stream(settings, tokenizer))
    neighbors = retrieve(retriever, batch)
    checked = 0
    for b, place in np.argwhere(~batch.ends):
        query = retriever.embedder.embed([tokenizer.decode(batch.tokens[b].reshape(-1, CHUNK)[place].tolist())])[0]
        scores = np.where(np.isin(owners, batch.documents[b]), -9, vectors @ query)
        best = np.sort(scores)[::-1][:settings['retrieval_k_neighbors']]
        got = [row['score'] for row in neighbors.rows[b][place]]
        np.testing.assert_allclose(got, best, atol=1e-3)
        checked += 1
    retriever.close()
    assert checked > 10


def test_a_document_that_fills_the_first_hundred_hits_leaks_nothing_and_hides_nothing(settings, tokenizer):
    """Its chunks are all alike, and the two that may be found are less alike than any of them."""
    settings = settings | dict(retrieval_collection='crowded')
    first = Retriever(settings | dict(retrieval_collection='chunks'), tokenizer)
    knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), first.embedder, create=True)
    text = tokenizer.encode_ordinary('def read_the_file(path): return open(path).read()  # again and again' * 2)[:CHUNK]
    near = first.embedder.embed([tokenizer.decode(text)])[0]
    far = first.embedder.embed(['import sys\nsys.exit(1)', 'class Calendar: months'])
    rows = [dict(id=i, doc_id=1, position=i, document='own', text='', tokens=text, embedding=near) for i in range(200)]
    rows += [dict(id=1000 + i, doc_id=2 + i, position=0, document='other', text='', tokens=[i, i + 1], embedding=v)
             for i, v in enumerate(far)]
    knowledge_base.upsert(rows)
    knowledge_base.flush()
    knowledge_base.close()
    first.close()
    assert OVERFETCH < 100
    retriever = Retriever(settings, tokenizer)
    neighbors = retriever.retrieve(np.array([[text]]), np.array([[1]]), np.array([[False]]))
    retriever.close()
    assert {row['doc_id'] for row in neighbors.rows[0][0]} == {2, 3}
    assert neighbors.mask[0, 0].sum(-1).tolist() == [2, 2]


def test_fewer_than_k_neighbors_are_masked_and_hold_no_text(settings, tokenizer):
    settings = settings | dict(retrieval_k_neighbors=60)
    retriever = Retriever(settings, tokenizer)
    only = document_hash('stdlib', 'json.decoder')
    batch = next(make_stream(settings, tokenizer))
    everything = {document_hash('stdlib', d.id) for d in
                  load_documents(as_dataset_configs(settings['train_datasets'], 'train_datasets'))}
    documents = np.array([sorted(everything - {document_hash('stdlib', 'keyword')})])
    chunk = batch.tokens[:1].reshape(1, -1, CHUNK)[:, :1].repeat(documents.shape[1], axis=1)
    neighbors = retriever.retrieve(chunk, documents, np.arange(documents.shape[1])[None] > 0)
    retriever.close()
    rows = neighbors.rows[0][0]
    assert 0 < len(rows) < 60 and only not in {row['doc_id'] for row in rows}
    assert not neighbors.mask[0, 0, len(rows):].any() and not neighbors.mask[0, 1:].any()
    assert (neighbors.tokens[~neighbors.mask] == tokenizer.eot_token).all()


def test_tensors_hold_each_neighbor_and_its_continuation(settings, tokenizer, retriever):
    batch = next(make_stream(settings, tokenizer))
    neighbors = retrieve(retriever, batch, fields=FIELDS)
    L, K = settings['block_size'] // CHUNK, settings['retrieval_k_neighbors']
    assert neighbors.tokens.shape == neighbors.mask.shape == (settings['batch_size'], L, K, 2 * CHUNK)
    assert neighbors.tokens.dtype == torch.int64 and neighbors.mask.dtype == torch.bool
    texts = {document_hash(d.source, d.id): d.text for d in
             load_documents(as_dataset_configs(settings['train_datasets'], 'train_datasets'))}
    for b, place in np.argwhere(~batch.ends):
        for k, row in enumerate(neighbors.rows[b][place]):
            tokens = neighbors.tokens[b, place, k][neighbors.mask[b, place, k]].tolist()
            assert tokens == row['tokens']
            whole = tokenizer.decode([t for t in tokens if t != tokenizer.eot_token])
            assert whole in texts[row['doc_id']] or '�' in whole
            assert whole.startswith(row['text'].replace('<|endoftext|>', '')) or '�' in whole
        scores = [row['score'] for row in neighbors.rows[b][place]]
        assert scores == sorted(scores, reverse=True)


def test_an_empty_collection_is_an_error_with_what_to_do(settings, tokenizer):
    full = Retriever(settings, tokenizer)
    settings = settings | dict(retrieval_collection='empty')
    open_knowledge_base(settings, vocabulary_hash(tokenizer), full.embedder, create=True).close()
    with pytest.raises(UserError, match="'empty'.*is empty: fill it with python -m retrieval.populate"):
        Retriever(settings, tokenizer)
    full.close()


def test_a_prefetched_batch_is_what_the_retriever_gives_and_its_state_resumes_after_it(settings, tokenizer, retriever):
    prefetcher = Prefetcher(make_stream(settings, tokenizer), retriever, 'cpu', ahead=2)
    plain = make_stream(settings, tokenizer)
    for _ in range(4):
        ready, batch = next(prefetcher), next(plain)
        neighbors = retrieve(retriever, batch)
        assert (ready.tokens.numpy() == batch.tokens).all() and (ready.targets.numpy() == batch.targets).all()
        assert (ready.documents.numpy() == batch.documents).all() and ready.state == batch.state
        assert (ready.neighbors == neighbors.tokens).all() and (ready.neighbor_mask == neighbors.mask).all()
    prefetcher.close()
    assert not prefetcher.thread.is_alive() and prefetcher.waited > 0


def test_an_exception_of_the_prefetching_thread_reaches_the_caller_with_its_traceback(settings, tokenizer, retriever):
    stream = make_stream(settings, tokenizer)
    stream.tokenizer = None
    prefetcher = Prefetcher(stream, retriever, 'cpu')
    with pytest.raises(AttributeError) as error:
        next(prefetcher)
    assert any('open_next_document' in str(entry) for entry in error.traceback)
    prefetcher.close()
