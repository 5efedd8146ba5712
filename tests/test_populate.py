"""The command that fills a collection, run as one."""
import shutil
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.chunking import chunk_document, chunk_hashes, document_hash, with_continuation
from data.documents import DatasetConfig, load_documents, tokenize
from data.tokenizer import load_tokenizer
from retrieval.embedding import Embedder
from retrieval.knowledge_base import FIELDS, open_knowledge_base
from retrieval.local_server import join_server
from retrieval.populate import read_batches
from tests.conftest import CHUNK, run


def rows_of(settings, tokenizer):
    """{id: row} of the whole collection, read by search."""
    from data.tokenizer import vocabulary_hash
    embedder = Embedder(settings.retrieval_embedding_model)
    knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), embedder)
    rows = knowledge_base.client.query(settings.retrieval_collection, filter='', limit=16384,
                                       output_fields=[*FIELDS, 'embedding'])
    assert len(rows) == knowledge_base.count() < 16384
    knowledge_base.close()
    return {row['id']: row for row in rows}


def test_the_collection_holds_every_chunk_of_every_document_whole(settings):
    tokenizer = load_tokenizer(settings.tokenizer)
    rows, embedder, seen = rows_of(settings, tokenizer), Embedder('embedding'), 0
    for document in load_documents([DatasetConfig('train.parquet', source='stdlib')]):
        chunks, lengths = chunk_document(tokenize(document, tokenizer), CHUNK, tokenizer.eot_token)
        together, real = with_continuation(chunks, lengths)
        ids = chunk_hashes('stdlib', document.id, 0, len(chunks)).tolist()
        texts = [tokenizer.decode(c[:n].tolist()) for c, n in zip(chunks, lengths, strict=True)]
        vectors = embedder.embed(texts)
        for position, row_id in enumerate(ids):
            row = rows[row_id]
            assert (row['doc_id'], row['position']) == (document_hash('stdlib', document.id), position)
            assert (row['document'], row['text']) == (f'stdlib/{document.id}', texts[position])
            assert row['tokens'] == together[position, :real[position]].tolist()
            assert row['embedding'] == pytest.approx(vectors[position].tolist(), abs=1e-5)
        seen += len(ids)
    assert seen == len(rows) > 1000


def test_filling_again_adds_no_row_and_changes_none(workspace, settings):
    tokenizer = load_tokenizer('tokenizer.json')
    before = rows_of(settings, tokenizer)
    answer = run('-m', 'retrieval.populate', 'config.py', folder=workspace)
    assert f'{len(before):,} chunks, 0 of them written now' in answer.stdout
    assert rows_of(settings, tokenizer) == before


def test_an_interrupted_filling_is_completed_and_changed_documents_are_replaced(workspace, settings):
    tokenizer = load_tokenizer('tokenizer.json')
    complete = rows_of(settings, tokenizer)
    client_rows = [row for row in complete.values() if row['document'] == 'stdlib/textwrap']
    from pymilvus import MilvusClient
    with closing(join_server('milvus.db')) as lease:
        client = MilvusClient(lease.address)
        client.delete('chunks', filter=f'doc_id == {client_rows[0]["doc_id"]}')
        client.close()
    table = pq.read_table('train.parquet').to_pylist()
    shutil.copy('train.parquet', 'original.parquet')
    for row in table:
        if row['id'] == 'shlex':
            row['text'] = row['text'][:2000] + '# shorter now\n'
    pq.write_table(pa.Table.from_pylist(table), 'train.parquet')
    assert '1 changed documents' in run('-m', 'retrieval.populate', 'config.py', folder=workspace).stdout
    changed = rows_of(settings, tokenizer)
    others = {i: row for i, row in complete.items() if row['document'] != 'stdlib/shlex'}
    assert {i: row for i, row in changed.items() if row['document'] != 'stdlib/shlex'} == others
    now = sorted((row for row in changed.values() if row['document'] == 'stdlib/shlex'), key=lambda r: r['position'])
    assert 0 < len(now) < len(complete) - len(others)
    assert '# shorter now' in ''.join(row['text'] for row in now)
    shutil.copy('original.parquet', 'train.parquet')
    run('-m', 'retrieval.populate', 'config.py', folder=workspace)
    assert rows_of(settings, tokenizer) == complete


def test_batches_hold_whole_documents_in_order(prepared):
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    documents = list(load_documents([DatasetConfig(str(prepared / 'train.parquet'), source='stdlib')]))
    batches = list(read_batches(documents, tokenizer, CHUNK))
    names = [name for rows in batches for name in rows.document]
    assert list(dict.fromkeys(names)) == [f'stdlib/{d.id}' for d in documents]
    for rows in batches:
        assert len(set(rows.id.tolist())) == len(rows.id) == len(rows.text) == len(rows.tokens)
        assert rows.position[0] == 0


@pytest.mark.parametrize('argument, said', [
    ('--train_datasets=["missing.parquet"]', "no corpus at 'missing.parquet'"),
    ('--retrieval_embedding_model=nowhere', "no embedding model 'nowhere'"),
    ('--retrieval_milvus_uri=http://127.0.0.1:9', 'no Milvus answers at http://127.0.0.1:9'),
    ('--retrieval_milvus_uri=http://root:hush@127.0.0.1:9', 'retrieval_milvus_uri holds a user or a password'),
    ('--retrieval_chunk_size=32', 'chunk_size: it has 16, the run 32'),
])
def test_what_cannot_be_filled_is_one_clear_line_and_exit_code_2(workspace, argument, said):
    answer = run('-m', 'retrieval.populate', 'config.py', argument, '--retrieval_milvus_token=hush', folder=workspace,
                 check=False)
    assert answer.returncode == 2 and said in answer.stderr
    assert answer.stderr.startswith('error: ') and answer.stderr.count('\n') == 1
    assert 'hush' not in answer.stdout + answer.stderr


def test_nothing_is_made_where_the_corpus_is_missing(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / 'run')
    (tmp_path / 'run/train.parquet').unlink()
    before = sorted(p.name for p in (tmp_path / 'run').iterdir())
    assert run('-m', 'retrieval.populate', 'config.py', folder=tmp_path / 'run', check=False).returncode == 2
    assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == before
