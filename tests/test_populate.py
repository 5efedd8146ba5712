"""The command that fills a collection, run as one."""
import json
import re
import shutil
import socket
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError, load_settings
from data.chunking import chunk_hashes, document_hash
from data.documents import DatasetConfig, load_documents
from data.tokenizer import load_tokenizer, tokenize, vocabulary_hash
from retrieval.embedding import Embedder
from retrieval.knowledge_base import FIELDS, open_knowledge_base
from retrieval.populate import read_parts
from tests.conftest import BACKENDS, CHUNK, open_all, run, run_ranks, spawn


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


ON_LITE = pytest.mark.parametrize('backend', ['lite'], indirect=True)  # what a server lacks is asked in test_faults


def rows_of(settings, tokenizer):
    """{id: row} of the whole collection, read by search."""
    embedder = Embedder(settings.retrieval_embedding_model)
    knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), embedder)
    rows = knowledge_base.client.query(settings.retrieval_collection, filter='', limit=16384,
                                       output_fields=[*FIELDS, 'embedding'], consistency_level='Strong')
    assert len(rows) == knowledge_base.count() < 16384
    knowledge_base.close()
    return {row['id']: row for row in rows}


def test_the_collection_holds_every_chunk_of_every_document_whole(settings):
    tokenizer = load_tokenizer(settings.tokenizer)
    rows, embedder, seen, textless = rows_of(settings, tokenizer), Embedder('embedding'), 0, 0
    for document in load_documents([DatasetConfig('train.parquet', source='stdlib')]):
        tokens = [*tokenize(document.text, tokenizer).tolist(), tokenizer.eot_token]
        chunks = [tokens[start:start + CHUNK] for start in range(0, len(tokens), CHUNK)]
        ids = chunk_hashes('stdlib', document.id, 0, len(chunks)).tolist()
        texts = [tokenizer.decode([t for t in chunk if t != tokenizer.eot_token]) for chunk in chunks]
        vectors = embedder.embed(texts)
        for position, row_id in enumerate(ids):
            if not texts[position].strip():
                assert row_id not in rows
                textless += 1
                continue
            row = rows[row_id]
            assert (row['doc_id'], row['position']) == (document_hash('stdlib', document.id), position)
            assert (row['document'], row['text']) == (f'stdlib/{document.id}', texts[position])
            assert row['tokens'] == tokens[position * CHUNK:(position + 2) * CHUNK]
            assert row['embedding'] == pytest.approx(vectors[position].tolist(), abs=1e-5)
        seen += len(ids)
    assert seen - textless == len(rows) > 1000 and textless > 0


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
    with closing(open_knowledge_base(settings, vocabulary_hash(tokenizer), Embedder('embedding'))) as knowledge_base:
        knowledge_base.client.delete('chunks', filter=f'doc_id == {client_rows[0]["doc_id"]}')
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


def test_parts_are_of_bounded_size_and_together_the_same_whatever_it_is(settings, monkeypatch):
    """A document over many parts has the rows that it has in one, continuations over their borders included."""
    tokenizer, found = load_tokenizer('tokenizer.json'), []
    for size in (2048, 100, 7):
        monkeypatch.setattr('data.chunk_store.BLOCK', size)
        parts = list(read_parts(open_all(settings), tokenizer))
        assert all(len(part.rows.id) + len(part.textless) <= size for part in parts)
        found.append([[x for part in parts for x in getattr(part.rows, name)] for name in ('id', 'text', 'document')]
                     + [[row[:n].tolist() for part in parts for row, n in
                         zip(part.rows.tokens, part.rows.length, strict=True)]])
    assert found[0] == found[1] == found[2] and len(found[0][0]) > 1000


def test_a_changed_document_over_many_parts_keeps_its_unchanged_chunks(workspace, settings, monkeypatch):
    """Of a small BLOCK, in this process."""
    from retrieval.populate import missing_rows
    text = ''.join(f'line {i} of the text\n' for i in range(200))
    spaces = text.replace('line 50 of', ' ' * 400)
    fill(workspace, [('a', spaces), ('b', 'b')])
    monkeypatch.setattr('data.chunk_store.BLOCK', 3)
    tokenizer = load_tokenizer('tokenizer.json')
    own = settings.replace(retrieval_collection='own', train_datasets=['docs.jsonl'])
    knowledge_base = open_knowledge_base(own, vocabulary_hash(tokenizer), Embedder('embedding'))
    before = knowledge_base.count()
    with open('docs.jsonl', 'w') as file:
        file.write(json.dumps(dict(id='a', text=spaces.replace('line 199', 'the last'))) + '\n')
        file.write(json.dumps(dict(id='b', text='b')) + '\n')
    missing = [missing_rows(knowledge_base, part)[0] for part in read_parts(open_all(own), tokenizer)]
    assert 1 <= sum(len(rows.id) for rows in missing) <= 4
    assert knowledge_base.count() >= before - 2
    knowledge_base.close()


@pytest.mark.parametrize('argument, said', [
    ('--train_datasets=["missing.parquet"]', "no corpus at 'missing.parquet'"),
    ('--retrieval_embedding_model=nowhere', "no embedding model 'nowhere'"),
    ('--retrieval_milvus_uri=http://127.0.0.1:9', 'no Milvus answers at http://127.0.0.1:9'),
    ('--retrieval_milvus_uri=http://root:hush@127.0.0.1:9', 'retrieval_milvus_uri holds a user or a password'),
    ('--retrieval_chunk_size=32', 'chunk_size: it has 16, the run 32'),
    ('--val_datasets=[{"path": "./train.parquet", "source": "stdlib", "val_fraction": 0.1}]',
     "in val_datasets as './train.parquet' with val_fraction=0.1"),
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


def fill(folder, documents, *options, path='docs.jsonl'):
    """Fill a collection of its own with documents [(id, text)], and what the command says."""
    with open(folder / path, 'w') as file:
        file.writelines(json.dumps(dict(id=i, text=text)) + '\n' for i, text in documents)
    return run('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=own', f'--train_datasets=["{path}"]',
               *options, folder=folder).stdout


def documents_of(settings):
    """{name: text of its rows} of that collection."""
    found = defaultdict(dict)
    for row in rows_of(settings.replace(retrieval_collection='own'), load_tokenizer('tokenizer.json')).values():
        found[row['document']][row['position']] = row['text']
    return {name: ''.join(text for _, text in sorted(parts.items())) for name, parts in found.items()}


LONG = 'def f(x):\n    return x\n' * 30


def test_the_collection_follows_documents_that_change_become_empty_or_are_gone(workspace, settings):
    fill(workspace, [('a', LONG), ('b', LONG + 'b'), ('c', 'one line'), ('d', LONG + 'd')])
    assert documents_of(settings) == {'a': LONG, 'b': LONG + 'b', 'c': 'one line', 'd': LONG + 'd'}
    # changed, emptied, only spaces, gone
    said = fill(workspace, [('a', LONG[:50]), ('b', ''), ('c', '  \n ')])
    assert '3 changed documents' in said and 'chunks are of documents that train_datasets do not hold: --sync=T' in said
    assert documents_of(settings) == {'a': LONG[:50], 'd': LONG + 'd'}
    said = fill(workspace, [('a', LONG[:50]), ('b', ''), ('e', 'new')], '--sync=True')
    assert re.search(r'removed: \d+ chunks of 1 documents that train_datasets do not hold', said)
    assert documents_of(settings) == {'a': LONG[:50], 'e': 'new'}
    assert ', 0 of them written now, 0 changed' in fill(workspace, [('e', 'new'), ('a', LONG[:50])], '--sync=True')


@pytest.mark.slow
def test_without_ids_a_changed_text_is_another_document(workspace, settings):
    fill(workspace, [(None, 'the first text'), (None, 'the second text')])
    fill(workspace, [(None, 'the first text'), (None, 'the second text, changed')])
    assert sorted(documents_of(settings).values()) == ['the first text', 'the second text', 'the second text, changed']
    fill(workspace, [(None, 'the second text, changed'), (None, 'the first text')], '--sync=True')
    assert sorted(documents_of(settings).values()) == ['the first text', 'the second text, changed']


def test_nothing_is_written_or_removed_when_two_documents_have_one_identity(workspace, settings):
    fill(workspace, [('a', LONG)])
    before = rows_of(settings.replace(retrieval_collection='own'), load_tokenizer('tokenizer.json'))
    with pytest.raises(AssertionError, match="two different documents have the id 'x': docs.jsonl, line 1, and docs.j"):
        fill(workspace, [('x', 'one'), ('y', 'fine'), ('x', 'two')], '--sync=True')
    assert rows_of(settings.replace(retrieval_collection='own'), load_tokenizer('tokenizer.json')) == before


def test_chunks_without_text_or_with_a_zero_vector_are_no_rows_and_counted(workspace, settings):
    tokenizer = load_tokenizer('tokenizer.json')
    known = next(text for text in ('x' * n for n in range(CHUNK, 200)) if len(tokenizer.encode_ordinary(text)) == CHUNK)
    rare = '\x02\x03\x04'  # bytes that the static embedding has not seen
    said = fill(workspace, [('a', known), ('b', rare * 3), ('c', ' \n' * 100), ('d', LONG)])
    textless = 1 + -(-(len(tokenizer.encode_ordinary(' \n' * 100)) + 1) // CHUNK)
    textless += len(tokenizer.encode_ordinary(LONG)) % CHUNK == 0
    assert f'no rows: {textless:,} chunks without text of their own, 1 that the embedding model maps to zero' in said
    assert documents_of(settings) == {'a': known, 'd': LONG}


def test_a_chunk_whose_text_is_longer_than_a_row_names_its_document(workspace, settings):
    saved = json.loads((workspace / 'tokenizer.json').read_text())
    vocabulary, merges = saved['model']['vocab'], saved['model']['merges']
    for power in range(13):  # tokens of up to 8,192 times a rare byte
        merges.append(['Ā' * 2**power] * 2)
        vocabulary['Ā' * 2**(power + 1)] = len(vocabulary)
    saved['added_tokens'][0]['id'] = len(vocabulary)
    (workspace / 'long.json').write_text(json.dumps(saved))
    with pytest.raises(AssertionError) as error:
        fill(workspace, [('fine', LONG), ('long', '\0' * 200_000)], '--tokenizer=long.json')
    assert "of document 'long' (docs.jsonl, line 2) has a text of 131,072 bytes, and a row holds 65,535" in str(
        error.value)


@pytest.mark.slow
def test_a_copy_that_was_renamed_moved_and_written_in_another_format_is_the_same_collection(workspace, settings):
    documents = [('a', LONG), ('b', LONG + 'b')]
    fill(workspace, documents)
    (workspace / 'deep/er').mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(('id', 'text'), zip(*documents[::-1], strict=True), strict=True))),
                   workspace / 'deep/er/renamed.parquet')
    for path in ('deep', 'deep/', './deep/**/*.parquet'):
        said = run('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=own',
                   f'--train_datasets=["{path}"]', '--sync=True', folder=workspace).stdout
        assert ', 0 of them written now, 0 changed' in said and 'removed: 0 chunks' in said


@pytest.mark.parametrize('argument', ['--sync=yes', '--sync=1', '--sync='])
def test_sync_is_true_or_false(workspace, argument):
    answer = run('-m', 'retrieval.populate', 'config.py', argument, folder=workspace, check=False)
    assert answer.returncode == 2 and f"{argument!r} is none of --sync=True and --sync=False" in answer.stderr


@pytest.mark.slow
def test_no_stage_is_busier_than_all_of_the_time(workspace):
    """In real processes: the reader imports its libraries and reads all before the stages run together."""
    (workspace / 'docs.jsonl').write_text(json.dumps(dict(id='a', text=LONG)) + '\n')
    process = spawn('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=own',
                    '--train_datasets=["docs.jsonl"]', folder=workspace, stdout=subprocess.PIPE)
    said, _ = process.communicate(timeout=120)
    assert 0 < int(re.search(r'was busy (\d+)% of the time', said).group(1)) <= 100


@pytest.mark.slow
def test_a_chunk_that_changes_to_one_without_a_vector_is_removed_and_that_is_done_once(workspace, settings):
    fill(workspace, [('a', LONG), ('b', LONG + 'b')])
    assert '1 changed documents' in fill(workspace, [('a', '\x02\x03\x04'), ('b', LONG + 'b')])
    assert documents_of(settings) == {'b': LONG + 'b'}
    said = fill(workspace, [('a', '\x02\x03\x04'), ('b', LONG + 'b')], '--sync=True')
    assert '0 of them written now, 0 changed' in said and 'removed: 0 chunks' in said


@pytest.mark.slow
def test_a_document_that_is_cut_within_a_run_of_spaces_loses_what_stood_beyond(workspace, settings):
    spaces = ' \n' * 100
    fill(workspace, [('a', LONG + spaces + 'the end that is gone'), ('b', 'other')])
    assert documents_of(settings)['a'].endswith('the end that is gone')
    assert '1 changed documents' in fill(workspace, [('a', LONG + spaces), ('b', 'other')])
    assert 'gone' not in documents_of(settings)['a']
    said = fill(workspace, [('a', LONG + spaces), ('b', 'other')])
    assert ', 0 of them written now, 0 changed' in said and '--sync' not in said


def test_several_ranks_leave_the_rows_and_the_index_of_exact_matches_of_one(prepared, populated, tmp_path, monkeypatch):
    folder, alone = tmp_path / 'run', tmp_path / 'alone'
    shutil.copytree(prepared, folder)
    shutil.copytree(populated, alone)
    said = run_ranks(2, '-m', 'retrieval.populate', 'config.py', folder=folder).stdout
    rows = {}
    for place in (folder, alone):
        monkeypatch.chdir(place)
        rows[place] = rows_of(load_settings(['config.py']), load_tokenizer('tokenizer.json'))
    assert f'{len(rows[alone]):,} chunks, {len(rows[alone]):,} of them written now' in said and 'by 2 processes' in said
    assert rows[folder] == rows[alone]
    assert segments(folder) == segments(alone)


def segments(folder):
    """The files of its index of exact matches."""
    return {path.relative_to(folder): path.read_bytes() for path in (folder / 'out/matches').rglob('*.bin')}


def test_a_rank_that_fails_ends_the_others_and_is_the_one_that_says_why(workspace):
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = found.getsockname()[1]

    def run_rank(rank):
        return run('-m', 'retrieval.populate', 'config.py', *['--retrieval_embedding_model=nowhere'] * rank,
                   folder=workspace, check=False, env=dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                                                           MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)))
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(run_rank, range(2)))
    assert [answer.returncode for answer in answers] == [2, 2]
    assert answers[1].stderr.startswith("error: no embedding model 'nowhere'")
    assert answers[0].stderr == ''


def test_a_dry_run_tells_what_a_collection_takes_and_makes_none(prepared, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(prepared, folder)
    said = run('-m', 'retrieval.populate', 'config.py', '--dry_run=True', folder=folder).stdout
    chunks = int(re.search(r'([\d,]+) chunks of 16 tokens', said).group(1).replace(',', ''))
    assert chunks > 1000 and f'vectors: {chunks * 192 * 4 / 1e6:,.1f} MB' in said
    assert 'index: IVF_FLAT nlist=' in said and 'exact-match index: ' in said
    assert re.search(r'time: \d+ s on this machine, by a process that embeds [\d,]+ chunks/s', said)
    assert not (folder / 'milvus.db').exists()


@ON_LITE
@pytest.mark.parametrize('options, said', [
    (['--bulk=True'], '--bulk=True is of no use to Milvus Lite'),
    (['--bulk=yes'], "'--bulk=yes' is none of --bulk=True and --bulk=False"),
    (['--dry_run=True', '--retrieval_index=DISKANN'], "'DISKANN' is none of Milvus Lite, which "),
    (['--dry_run=True', '--sync=True'], '--dry_run=True inserts and removes nothing, in one process'),
    (['--retrieval_index=IVF_RABITQ', '--retrieval_collection=new'], "'IVF_RABITQ' is none of Milvus Lite, which "),
    (['--retrieval_index=DISKANN', '--retrieval_collection=new'], "'DISKANN' is none of Milvus Lite, which "),
    (['--retrieval_vectors=float16', '--retrieval_collection=new'], "'float16' are none of Milvus Lite: use 'float32'"),
    (['--retrieval_vectors=float8'], "retrieval_vectors 'float8' is neither 'float32' nor 'float16'"),
    (['--retrieval_index=HNSW M', '--retrieval_collection=new'], "'M' is no parameter; write it as in 'HNSW M=32"),
])
def test_what_this_database_lacks_is_refused_by_name(workspace, options, said):
    answer = run('-m', 'retrieval.populate', 'config.py', *options, folder=workspace, check=False)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count('\n') == 1


@ON_LITE
def test_the_index_follows_the_size_and_the_parameters_that_are_set(workspace, settings):
    vocabulary, embedder = vocabulary_hash(load_tokenizer('tokenizer.json')), Embedder('embedding')

    def lists(**changes):
        own = settings.replace(**{'retrieval_collection': 'own', **changes})
        knowledge_base = open_knowledge_base(own, vocabulary, embedder)
        knowledge_base.close()
        return knowledge_base.lists, knowledge_base._search_parameters(8, False), knowledge_base.metadata.index
    documents = [('a', LONG)]
    fill(workspace, documents)
    assert lists() == (16, {'nprobe': 16}, 'IVF_FLAT')
    documents += [(f'd{i}', f'{i} ' * 2000) for i in range(25)]
    assert 'making the index anew: ' in fill(workspace, documents)  # from a size that was not expected
    count = open_all(settings.replace(train_datasets=['docs.jsonl']))[0].num_chunks
    found, params, _ = lists(retrieval_search_params={'nprobe': 3})
    assert 32 < found <= count / 39 + 1 and params == {'nprobe': 3}
    (workspace / 'docs.jsonl').write_text(json.dumps(dict(id='a', text=LONG)) + '\n')
    run('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=set', '--train_datasets=["docs.jsonl"]',
        '--retrieval_index=IVF_SQ8 nlist=20', folder=workspace)
    for index, fits in (('auto', True), ('IVF_SQ8', True), ('IVF_SQ8 nlist=20', True), ('IVF_SQ8 nlist=9', False),
                        ('HNSW', False)):
        changes = dict(retrieval_collection='set', retrieval_index=index)
        if fits:
            assert lists(**changes) == (20, {'nprobe': 16}, 'IVF_SQ8 nlist=20')
        else:
            with pytest.raises(UserError, match=f"index: it has 'IVF_SQ8 nlist=20', the run '{index}'"):
                lists(**changes)
