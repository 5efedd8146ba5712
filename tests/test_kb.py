"""The commands of python -m retrieval.kb, on a copy of the populated Milvus Lite."""
import dataclasses
import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench.milvus_server import MilvusServer, why_not
from configurator import UserError, load_settings, user_errors_as_one_line
from data.documents import DatasetConfig
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from generation.worker import LiveCollection
from retrieval.inherit import take_from_collection
from retrieval.kb import dataset_of, main, open_collection
from retrieval.knowledge_base import KnowledgeBase
from retrieval.retriever import Retriever
from retrieval.suffix_array import DEPTH
from retrieval.writer import writing
from tests.conftest import CONFIG, open_all, run, spawn, wait_until

WHOLE = ('doc_id', 'position', 'document', 'text', 'tokens', 'embedding')


class Commands:
    """Runs commands in this process. The collection stays open meanwhile, so one server serves them all."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, command, *arguments, config='config.py', code=0):
        """What the command printed, if it ends with the code."""
        self.monkeypatch.setattr(sys, 'argv', ['kb', command, config, *map(str, arguments)])
        self.capsys.readouterr()
        try:
            with user_errors_as_one_line():
                main()
            found = 0
        except SystemExit as end:
            found = end.code
        said = ''.join(self.capsys.readouterr()[::-1])
        assert found == code, said
        return said

    def json(self, *arguments, **options):
        return json.loads(self(*arguments, '--json', **options).splitlines()[-1])


@pytest.fixture
def kb(settings, monkeypatch, capsys):
    with closing(open_collection(settings)):
        yield Commands(monkeypatch, capsys)


def whole_rows(settings, **changes):
    """{id: row} of all of a collection, comparable."""
    with closing(open_collection(settings.replace(**changes))) as knowledge_base:
        return {row['id']: {**row, 'tokens': list(row['tokens']), 'embedding': np.float32(row['embedding']).tobytes()}
                for rows in knowledge_base.all_rows(WHOLE) for row in rows}


def test_info_stats_and_search_tell_what_is_in_the_collection(settings, workspace, kb):
    rows = list(whole_rows(settings).values())
    found = kb.json('info')
    assert found['rows'] == len(rows) and found['chunk_size'] == 16 and found['tokenizer'] == 'tokenizer.json'
    assert found['matches']['state'] == 'up to date' and found['revision'] and found['bytes_on_disk'] > 10_000
    stats = kb.json('stats')
    documents = {row['doc_id'] for row in rows}
    assert stats['documents'] == len(documents) == found['matches']['documents'] and stats['rows'] == len(rows)
    assert stats['chunks_per_document']['most'] == stats['longest'][0]['chunks'] and stats['longest'][0]['document']
    row = next(row for row in rows if row['position'] == 3 and len(row['text']) > 40)
    best = kb.json('search', row['text'], '-k', '1')['neighbors'][0]
    assert best['text'] == row['text'] and best['score'] > 0.999 and best['continuation']
    shown = kb('search', row['text'], '-k', '1')
    assert best['document'] in shown and f'chunk {best["chunk"]}, similarity ' in shown
    assert kb.json('search', 'see setup.py', '-k', '1')['text'] == 'see setup.py'
    wrong = kb('search', 'text', '--retrieval_collection=typo', '--retrieval_embedding_model=nowhere', code=2)
    assert "no collection 'typo' in milvus.db" in wrong


def test_a_file_is_read_as_the_entry_that_holds_it_reads_it_and_whole(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{}')
    (tmp_path / 'link.jsonl').symlink_to(tmp_path / 'a.jsonl')
    entry = DatasetConfig(f'{tmp_path}/*.jsonl', source='m', val_fraction=0.5, max_documents=3)
    settings = load_settings([]).replace(train_datasets=[entry, DatasetConfig('nowhere.jsonl')])
    given = SimpleNamespace(source=None, text_field=None, id_field='key')
    for name in ('a.jsonl', 'link.jsonl'):
        found = dataset_of(str(tmp_path / name), settings, given)
        assert (found.source, found.val_fraction, found.max_documents, found.id_field) == ('m', 0.5, 0, 'key')
    assert dataset_of(str(tmp_path / 'b.jsonl'), settings, given).source == ''


def test_added_documents_give_the_rows_that_populate_gives_and_removed_ones_take_theirs_with_them(
        settings, workspace, tmp_path, kb):
    before = whole_rows(settings)
    (workspace / 'new.jsonl').write_text(''.join(json.dumps(dict(id=f'new {i}', text=f'def f{i}(x): return {i}\n' * 40))
                                                 + '\n' for i in range(3)))
    (workspace / 'note.txt').write_text('A note of its own, without an id. ' * 20)
    other = tmp_path / 'other'
    shutil.copytree(workspace, other)
    said = kb('add', 'new.jsonl', 'note.txt', '--source=more')
    assert 'new.jsonl: 3 documents' in said and 'note.txt: 1 documents' in said
    added = whole_rows(settings)
    (other / 'more.py').write_text(CONFIG + "\ntrain_datasets += [DatasetConfig(path, source='more') for path in "
                                            "('new.jsonl', 'note.txt')]\n")
    run('-m', 'retrieval.populate', 'more.py', folder=other)
    assert added == whole_rows(settings, retrieval_milvus_uri=str(other / 'milvus.db'))
    state = kb.json('info')
    assert state['matches'] | dict(bytes=0) == dict(state='up to date', documents=34, bytes=0)
    again = kb('add', 'new.jsonl', '--source=more')
    assert ': 0 of' in again and kb.json('info')['revision'] == state['revision']
    assert "no document 'more/new 7'" in kb('remove', '--doc', 'more/new 0', 'more/new 7', code=2)
    assert whole_rows(settings) == added
    note = next(row['doc_id'] for row in added.values() if 'A note' in row['document'])
    kb('remove', '--doc', 'more/new 0', 'more/new 1', 'more/new 2', str(note))
    assert whole_rows(settings) == before
    state = kb.json('info')
    assert state['matches'] | dict(bytes=0) == dict(state='up to date', documents=30, bytes=0)


def test_an_exported_collection_is_imported_row_for_row_also_after_a_part_of_it(settings, workspace, kb):
    kb('export', 'kb.parquet')
    wanted, other = whole_rows(settings), ['--retrieval_milvus_uri=other.db', '--retrieval_index=FLAT']
    there = dict(retrieval_milvus_uri='other.db')
    # without settings of its own, it takes those of the file
    (workspace / 'bare.py').write_text("data_cache_dir = 'out/datasets'\n")
    said = kb('import', 'kb.parquet', *other, config='bare.py')
    assert whole_rows(settings, **there) == wanted
    assert "taken from kb.parquet: tokenizer 'tokenizer.json'" in said
    assert kb.json('validate', '-k', '2', '--chunks=100', *other)['recall_at_k'] == 1  # as it is exact
    first = kb.json('info', *other)
    assert first['index'] == 'FLAT' and first['matches']['state'] == 'up to date'
    assert f'0 of the {len(wanted):,} rows' in kb('import', 'kb.parquet', *other)
    assert kb.json('info', *other)['revision'] == first['revision']
    with closing(open_collection(settings.replace(**there))) as knowledge_base:  # as a killed import and other text
        rows = [dict(row, id=row_id) for row_id, row in wanted.items()]
        knowledge_base.delete([row['id'] for row in rows[:40]])
        changed = dict(rows[50], text='else', embedding=np.frombuffer(rows[50]['embedding'], np.float32))
        longer = dict(changed, id=7, doc_id=rows[60]['doc_id'], position=10_000)
        knowledge_base.upsert([changed, longer])
    assert '41 of the' in kb('import', 'kb.parquet', *other)
    assert whole_rows(settings, **there) == wanted


def test_vectors_that_the_database_lacks_are_imported_as_others_and_the_index_follows_the_size(
        settings, workspace, kb, monkeypatch):
    kb('export', 'kb.parquet')
    table = pq.read_table('kb.parquet')
    about = json.loads(table.schema.metadata[b'nanoretro.collection'])
    about['metadata']['vectors'] = 'float16'  # as if a server had written it
    pq.write_table(table.replace_schema_metadata({'nanoretro.collection': json.dumps(about)}), 'half.parquet',
                   write_page_checksum=True)
    other = ['--retrieval_collection=other']
    assert "use 'float32'" in kb('import', 'half.parquet', *other, code=2)
    with closing(open_collection(settings)) as knowledge_base:
        made = KnowledgeBase('milvus.db', '', 'other', knowledge_base.metadata, create=True, expected=10)
    assert made.lists == 16
    made.close()
    monkeypatch.setattr('retrieval.knowledge_base.OUTGROWN', 1)
    kb('import', 'half.parquet', '--retrieval_vectors=float32', *other)
    assert whole_rows(settings, retrieval_collection='other') == whole_rows(settings)
    assert int(kb.json('info', *other)['index_state']['params']['nlist']) > 16


def test_a_file_that_is_damaged_or_of_other_settings_is_not_imported(settings, workspace, kb):
    kb('export', 'kb.parquet')
    whole = (workspace / 'kb.parquet').read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for data, said in ((whole[:-1000], 'cut.parquet is not whole'), (bytes(damaged), 'cut.parquet is not whole'),
                       (b'PAR1', 'cut.parquet is not whole')):
        (workspace / 'cut.parquet').write_bytes(data)
        assert said in kb('import', 'cut.parquet', '--retrieval_collection=other', code=2)
    assert 'is a Parquet file, and no collection' in kb('import', 'train.parquet', code=2)
    assert 'chunk_size: it has 16, the run 32' in kb('import', 'kb.parquet', '--retrieval_chunk_size=32', code=2)
    assert kb.json('info')['revision']
    with pytest.raises(UserError, match="no collection 'other'"):
        open_collection(settings.replace(retrieval_collection='other'))


def test_validate_measures_recall_and_ends_with_1_below_the_bound(workspace, kb):
    found = kb.json('validate', '-k', '2', '--chunks=200', '--least=0.5')
    assert 0.5 < found['recall_at_k'] < 1 and found['chunks'] == 200 and found['fewer_than_k'] == 0
    assert found['without_embedding'] == 0 and found['rows'] > 1000 and found['is_good']
    assert 'recall is below 1.1' in kb('validate', '--chunks=50', '--least=1.1', code=1)


def test_drop_asks_and_takes_what_is_derived_with_it(settings, workspace, kb):
    assert 'give --yes' in kb('drop', code=2) and whole_rows(settings)
    kb('drop', '--yes')
    assert list((workspace / 'out/matches').iterdir()) == []
    assert "no collection 'chunks'" in kb('info', code=2)


@pytest.mark.slow
def test_commands_that_change_a_collection_wait_for_no_other_but_say_so(settings, workspace, kb):
    with writing(settings):
        assert 'another process is changing collection' in kb('drop', '--yes', code=2)
        said = run('-m', 'retrieval.populate', 'config.py', folder=workspace, check=False)
        assert said.returncode == 2 and 'another process is changing collection' in said.stderr


def test_a_gpt_needs_no_database_and_says_what_it_goes_by():
    said, settings = [], load_settings([]).replace(retrieval_milvus_uri='http://127.0.0.1:9', use_retrieval=False)
    assert take_from_collection(settings, set(), said.append) is settings
    assert 'tokenizer and retrieval_chunk_size are the defaults' in said[0]
    with pytest.raises(UserError, match='or set retrieval_chunk_size'):
        take_from_collection(settings.replace(use_retrieval=True), {'tokenizer'}, said.append)


def test_a_run_takes_from_the_collection_what_it_does_not_set_and_says_so(workspace, kb):
    names = ('tokenizer', 'retrieval_embedding_model', 'retrieval_chunk_size')
    bare = ''.join(f'{line}\n' for line in CONFIG.splitlines() if not line.startswith(names))
    (workspace / 'bare.py').write_text(bare.replace('max_iters = 8', 'max_iters = 1'))
    said = run(Path(__file__).parents[1] / 'train.py', 'bare.py', folder=workspace).stdout
    assert ("taken from collection 'chunks' in milvus.db: tokenizer 'tokenizer.json', retrieval_chunk_size 16, "
            "retrieval_embedding_model 'embedding'") in said
    (workspace / 'tokenizer.json').rename(workspace / 'elsewhere.json')
    lost = kb('search', 'text', config='bare.py', code=2)
    assert "made with tokenizer 'tokenizer.json', and nothing is there" in lost
    assert 'elsewhere' not in kb('search', 'text', '--tokenizer=elsewhere.json', config='bare.py')


# ---- a collection that changes while it is used

@pytest.fixture
def retriever(settings):
    with closing(Retriever(settings, load_tokenizer('tokenizer.json'), say=lambda news: None)) as made:
        yield made


@pytest.fixture
def batch(settings):
    return next(SequenceStream(open_all(settings), 64, 2))


def whole_answer(batch):
    return [batch.neighbors.tobytes(), batch.neighbor_mask.tobytes(), batch.pointers.tobytes()]


def change(settings, retriever):
    """Remove every other row of the collection, and begin a new revision."""
    with closing(open_collection(settings)) as knowledge_base:
        ids = sorted(row['id'] for rows in knowledge_base.all_rows([]) for row in rows)
        knowledge_base.delete(ids[::2])
        knowledge_base.flush()


@pytest.mark.parametrize('where', ['search', 'rows', 'add_pointers'])
def test_a_batch_is_of_one_revision_though_the_collection_changes_in_the_middle_of_it(
        settings, retriever, batch, where, monkeypatch):
    old, = retriever.retrieve_for([batch])
    monkeypatch.setattr(retriever, 'cache', None)  # or nothing is asked for
    owner, name = (retriever, '_follow_matches') if where == 'add_pointers' else (retriever.knowledge_base, where)
    original, changes = getattr(owner, name), []

    def then_change(*arguments, **options):
        answer = original(*arguments, **options)
        if not changes:
            changes.append(change(settings, retriever))
        return answer
    monkeypatch.setattr(owner, name, then_change)
    during, = retriever.retrieve_for([batch])
    new, = retriever.retrieve_for([batch])
    assert changes and whole_answer(old) != whole_answer(new)
    assert whole_answer(during) in ([whole_answer(new)] if where != 'add_pointers' else
                                    [whole_answer(old), whole_answer(new)])


def test_pointers_follow_at_once_when_neighbors_have_seen_a_new_revision(settings, retriever, batch):
    """As the engine asks: neighbors at each chunk, and pointers with patience."""
    retriever.point(batch.tokens, patience=1e9)
    change(settings, retriever)
    retriever.retrieve_for_text(batch.tokens.reshape(-1, 4, 16)[:1])
    retriever.point(batch.tokens, patience=1e9)
    assert retriever.matches.revision.split()[0] == retriever.revision


@pytest.mark.slow
def test_a_trainer_goes_on_with_the_new_revision_while_documents_are_added(workspace, settings, kb):
    (workspace / 'new.txt').write_text('def another_function(x): return x + 1\n' * 300)
    with open(workspace / 'log', 'w') as log:
        train = spawn(Path(__file__).parents[1] / 'train.py', 'config.py', '--max_iters=400', '--eval_interval=1000',
                      '--retrieval_prefetch_batches=1', folder=workspace, stdout=log, stderr=log)
    metrics = workspace / 'out/metrics.jsonl'
    wait_until(lambda: metrics.exists() and metrics.read_text().count('\n') > 5, 60)
    assert train.poll() is None
    kb('add', 'new.txt')
    assert train.wait(120) == 0, (workspace / 'log').read_text()
    now = kb.json('info')['rows']
    assert f'the collection has changed: {now:,} chunks from now on' in (workspace / 'log').read_text()


@pytest.mark.slow
def test_a_run_whose_collection_is_dropped_says_so_and_saves_a_checkpoint(workspace, kb):
    with open(workspace / 'log', 'w') as log:
        train = spawn(Path(__file__).parents[1] / 'train.py', 'config.py', '--max_iters=400', '--eval_interval=1000',
                      '--retrieval_prefetch_batches=1', folder=workspace, stdout=log, stderr=log)
    metrics = workspace / 'out/metrics.jsonl'
    wait_until(lambda: metrics.exists() and metrics.read_text().count('\n') > 5, 60)
    kb('drop', '--yes')
    assert train.wait(60) == 2
    said = (workspace / 'log').read_text()
    assert "collection 'chunks' in milvus.db is gone" in said and 'resume from it with --init_from=resume' in said


def test_a_collection_that_was_dropped_and_made_anew_of_something_else_is_not_read_on(settings, retriever, batch):
    with closing(open_collection(settings)) as knowledge_base:
        other = dataclasses.replace(knowledge_base.metadata, dimension=8, embedding_hash='other')
        knowledge_base.drop()
        KnowledgeBase(settings.retrieval_milvus_uri, '', settings.retrieval_collection, other, create=True).close()
    retriever.cache.use_revision(None)
    with pytest.raises(UserError, match='was made by something else.*dimension: it has 8, the run'):
        retriever.retrieve_for([batch])


def test_a_server_reads_what_was_added_from_the_next_request_on_neighbors_and_pointers_alike(
        settings, workspace, kb, retriever):
    live, text = LiveCollection(retriever), 'def quite_unheard_of(zebra, quagga): return zebra - quagga\n' * 8
    (workspace / 'new.txt').write_text(text)
    tokens = np.array(retriever.tokenizer.encode_ordinary(text)[:64])

    def ask():
        passages, pointers = live.retrieve(tokens[None, :16])[2][0], live.point(tokens[None])
        assert retriever.matches.revision.split()[0] == retriever.revision
        is_pointed_to = (pointers[0, DEPTH:, :, 1].max(1) == DEPTH).all()
        return any(passage.document.startswith('new/') for passage in passages), bool(is_pointed_to)
    assert ask() == (False, False)
    kb('add', 'new.txt', '--source=new')
    assert ask() == (True, True)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_file_goes_from_milvus_lite_to_a_server_and_back_row_for_row(settings, workspace, kb, tmp_path):
    wanted = whole_rows(settings)
    with MilvusServer(tmp_path / 'server') as server:
        there = f'--retrieval_milvus_uri={server.uri}'
        kb('export', 'lite.parquet')
        kb('import', 'lite.parquet', there)
        assert whole_rows(settings, retrieval_milvus_uri=server.uri) == wanted
        assert kb.json('info', there)['bytes_on_disk'] is None and kb.json('stats', there) == kb.json('stats')
        assert kb.json('validate', there, '--chunks=100', '--least=0')['rows'] == len(wanted)
        assert f'0 of the {len(wanted):,} rows' in kb('import', 'lite.parquet', there)
        document = kb.json('search', there, 'def decode(self)', '-k', '1')['neighbors'][0]['document']
        kb('remove', there, '--doc', document)
        kb('import', 'lite.parquet', there)
        kb('export', 'server.parquet', there)
        kb('drop', there, '--yes')
    kb('import', 'server.parquet', '--retrieval_collection=back')
    assert whole_rows(settings, retrieval_collection='back') == wanted
    assert pq.read_table(workspace / 'lite.parquet').equals(pq.read_table(workspace / 'server.parquet'))


@pytest.mark.slow
def test_an_import_that_is_killed_again_and_again_ends_with_the_same_rows(settings, workspace, kb):
    kb('export', 'kb.parquet')
    wanted, kills = whole_rows(settings), 0
    for attempt in range(60):
        process = spawn('-m', 'retrieval.kb', 'import', 'config.py', 'kb.parquet', '--retrieval_collection=copy',
                        folder=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(2 + 0.25 * attempt)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0 and kills
    assert whole_rows(settings, retrieval_collection='copy') == wanted
    assert kb.json('info', '--retrieval_collection=copy')['matches']['state'] == 'up to date'
