"""What is read of files, folders and patterns, and what is refused by name."""
import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError, load_settings
from data.documents import Counts, DatasetConfig, as_dataset_configs, check_sides, load_documents, read_documents
from data.fingerprint import describe_corpus
from data.ingest import build
from tests.conftest import ROOT, SHARED, open_all, run


def read(path, **options):
    """[(id, text)] of a path, in order."""
    return [(d.id if d.has_id else None, d.text) for d in load_documents([DatasetConfig(str(path), **options)])]


ROWS = [('a', 'first\ndocument\r\n'), ('b', 'second, "quoted"\t'), ('c', 'ünïcödé 𝛑 \u2028 end')]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_csv(delimiter=','):
    import csv
    out = io.StringIO(newline='')
    csv.writer(out, delimiter=delimiter).writerows([('id', 'text'), *ROWS])
    return out.getvalue().encode()


JSONL = ''.join(json.dumps(dict(id=i, text=t)) + '\n' for i, t in ROWS).encode()


def zstd(data):
    return bytes(pa.Codec('zstd').compress(data[:20])) + bytes(pa.Codec('zstd').compress(data[20:]))  # two frames


BOM = b'\xef\xbb\xbf'


@pytest.mark.parametrize('name, data', [
    ('d.jsonl', JSONL), ('D.JSONL', JSONL), ('d.ndjson', JSONL), ('d.json', JSONL),
    ('d.jsonl', JSONL.replace(b'\n', b'\r\n\n')), ('d.jsonl', BOM + JSONL),
    ('d.json', json.dumps([dict(id=i, text=t) for i, t in ROWS], indent=1).encode()),
    ('d.jsonl.gz', gzip.compress(JSONL[:30]) + gzip.compress(JSONL[30:])), ('d.json.gz', gzip.compress(JSONL)),
    ('d.jsonl.zst', zstd(JSONL)), ('d.jsonl.bz2', bz2.compress(JSONL)), ('d.jsonl.xz', lzma.compress(JSONL)),
    ('d.csv', as_csv()), ('d.csv.gz', gzip.compress(as_csv())), ('d.tsv', as_csv('\t')), ('D.Csv', BOM + as_csv()),
    ('docs[1].jsonl', JSONL), ('~d.jsonl', JSONL), ('d 100%.jsonl', JSONL),
])
def test_documents_are_read_as_they_were_written_in_every_format_and_spelling(folder, name, data):
    Path(name).write_bytes(data)
    assert read(name) == ROWS


def test_parquet_and_saved_datasets_are_read_as_they_were_written(folder):
    import datasets
    ids, texts = zip(*ROWS, strict=True)
    pq.write_table(pa.table({'id': ids, 'text': pa.array(texts).dictionary_encode(), 'x': [1, 2, 3]}), 'd.PARQUET')
    datasets.Dataset.from_dict({'id': ids, 'text': texts, 'x': [[1], [2], [3]]}).save_to_disk('saved')
    datasets.DatasetDict({'test': datasets.Dataset.from_dict({'id': ids, 'text': texts})}).save_to_disk('several')
    assert read('d.PARQUET') == read('saved') == read('saved/') == read('several', split='test') == ROWS
    with pytest.raises(UserError, match="'several' could not be read .*no split 'train', but 'test': set split"):
        read('several')


@pytest.mark.parametrize('name', ['d.txt', 'd.md', 'D.TXT', 'd.txt.gz'])
def test_a_text_file_is_one_document_without_its_byte_order_mark(folder, name):
    data = '\ufeffline\r\n\n  Ünï\n'.encode()
    Path(name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
    assert read(name) == [(None, 'line\r\n\n  Ünï\n')]


def test_only_the_text_and_id_columns_are_looked_at_whatever_else_stands_there(folder):
    rows = [dict(id=i, text=f'text {i}', meta=i if i < 150 else {'a': [i]} if i % 2 else 'x' * 100) for i in range(300)]
    Path('d.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert read('d.jsonl') == [(str(i), f'text {i}') for i in range(300)]
    Path('d.csv').write_text('text,other\n1984,5\nNone,a\nnull,b\nNA,c\nnan,"d,e"\n007,\n')
    assert [text for _, text in read('d.csv')] == ['1984', 'None', 'null', 'NA', 'nan', '007']


def test_a_nested_field_is_a_path(folder):
    rows = [{'doc': {'text': 'one', 'meta': {'key': 5}}}, {'doc': {'text': 'two', 'meta': {'key': 'b'}}}]
    Path('d.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    rows[0]['doc']['meta']['key'] = '5'
    pq.write_table(pa.Table.from_pylist(rows), 'd.parquet')
    pq.write_table(pa.table({'doc.text': ['one', 'two'], 'doc.meta.key': ['5', 'b']}), 'flat.parquet')
    for path in ('d.jsonl', 'd.parquet', 'flat.parquet'):
        assert read(path, text_field='doc.text', id_field='doc.meta.key') == [('5', 'one'), ('b', 'two')]


BAD = [
    ('d.jsonl', '{"text": "fine"}\n{"text": ["a", "list"]}\n', 'd.jsonl, line 2: no text, but a list'),
    ('d.jsonl', '{"text": 1984}\n', 'd.jsonl, line 1: no text, but the number 1984'),
    ('d.jsonl', '{"text": true}\n', 'd.jsonl, line 1: no text, but the True'),
    ('d.jsonl', '{"text": {"a": 1}}\n', 'd.jsonl, line 1: no text, but an object'),
    ('d.jsonl', '{"text": "a", "id": [1]}\n', 'd.jsonl, line 1: no id, but a list'),
    ('d.jsonl', '["text"]\n{"text": "x"}', None),
    ('d.jsonl', '{"text": "fine"}\n"text"\n', 'd.jsonl, line 2: no object with fields, but a text'),
    ('d.jsonl', '{"text": "fine"}\n\n{"text": "br', 'd.jsonl, line 3: broken JSON (Unterminated string'),
    ('d.jsonl', '{"text": "fine"}\n{"body": "x"}\n', "d.jsonl, line 2: no field 'text'; its fields are body: set text"),
    ('d.jsonl', b'{"text": "fine"}\n{"text": "caf\xe9"}\n', 'd.jsonl, line 2: not UTF-8 (byte 0xe9)'),
    ('d.jsonl', '{"text": "fine"}\n' + '[' * 100_000 + '\n', 'd.jsonl, line 2: JSON that is nested too deeply'),
    ('d.csv', 'id,text\n1,fine\n2,hello, world\n', 'd.csv, line 3: 3 values for 2 columns: a value that holds'),
    ('d.csv', b'id,text\n1,fine\n2,caf\xe9\n', 'd.csv, line 3: not UTF-8'),
    ('d.tsv', 'id\ttext\n1\t"a" word\n2\tfine\n', 'd.tsv, line 2: broken quotes'),
    ('d.json', '{\n "text": "a"\n "id": 4}', "d.json, as a whole: broken JSON (Expecting ',' delimiter, line 3, col"),
    ('d.txt', b'one\ncaf\xe9', 'd.txt, as a whole: not UTF-8 (byte 0xe9 in line 2)'),
]


@pytest.mark.parametrize('name, data, said', [bad for bad in BAD if bad[2]])
def test_what_is_no_text_is_an_error_that_names_file_and_row_and_can_be_left_out(folder, name, data, said):
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as error:
        read(name)
    assert said in str(error.value) and 'skip_bad=True' in str(error.value)
    counts = Counts()
    found = list(read_documents(DatasetConfig(name, skip_bad=True), counts))
    assert counts.bad == 1 and [d.text for d in found] == ['fine'] * (b'fine' in Path(name).read_bytes())


@pytest.mark.parametrize('name, data, said', [
    ('d.jsonl', '{"text": "a"}'.encode('utf-16'), 'd.jsonl: it is UTF-16, and only UTF-8 can be read: convert it'),
    ('d.jsonl.gz', gzip.compress(JSONL)[:-20], 'd.jsonl.gz cannot be read (EOFError: Compressed file ended'),
    ('d.jsonl.zst', zstd(os.urandom(5000))[:-20], 'd.jsonl.zst cannot be read'),
    ('d.jsonl.gz', b'plain text', 'd.jsonl.gz cannot be read (BadGzipFile: Not a gzipped file'),
    ('d.parquet', b'no parquet', 'd.parquet cannot be read'),
    ('d.csv', 'id,text\n1,fine\n2,"open\n3,more\n', 'd.csv: broken quotes in the row that begins in line 3'),
    ('d.csv', 'id,body\n1,a\n', "d.csv: it has no column 'text': its columns are id, body; set text_field"),
    ('d.csv', '', "d.csv: it has no column 'text': its columns are none"),
    ('d.json', '[{"text": "a"},', 'd.json: broken JSON'),
    ('d.txt', 'letters'.encode('utf-16-le'), 'd.txt: it is UTF-16, and only UTF-8'),
    ('d.md', 'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'd.md: it is a pointer of Git LFS'),
    ('d.csv', 'id,text,text\n1,a,b\n', "d.csv: it has 2 columns 'text': rename all but one"),
    ('d.doc', 'x', "'d.doc' is a file of no kind that can be read: its name has to end in one of .parquet, .jsonl"),
])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(folder, name, data, said):
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    for skip_bad in (False, True):
        with pytest.raises(UserError) as error:
            read(name, skip_bad=skip_bad)
        assert said in str(error.value)


def test_a_column_that_is_asked_for_and_missing_is_an_error(folder):
    Path('d.csv').write_text('id,text\n1,a\n')
    Path('d.jsonl').write_text('{"id": 1, "text": "a"}\n')
    pq.write_table(pa.table({'text': ['a']}), 'd.parquet')
    for path, said in (('d.csv', "no column 'key'"), ('d.jsonl', "no field 'key'"), ('d.parquet', "no column 'key'")):
        with pytest.raises(UserError, match=f'{said}.*set id_field'):
            read(path, id_field='key')
        with pytest.raises(UserError, match='set text_field'):
            read(path, text_field='body')
    assert read('d.parquet') == [(None, 'a')]  # the default is not asked for


def test_a_path_is_a_path_and_patterns_and_folders_are_one_dataset(folder):
    os.makedirs('docs/sub/.hidden')
    for name in ('docs[1].jsonl', 'docs1.jsonl', 'docs/a.jsonl', 'docs/sub/b.MD', 'docs/c.csv.gz', 'docs/image.png',
                 'docs/.secret.txt', 'docs/sub/.hidden/d.txt'):
        data = f'text\n{name}\n'.encode() if '.csv' in name else name.encode() if 'jsonl' not in name else (
            json.dumps(dict(text=name)).encode())
        Path(name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
    os.symlink('..', 'docs/sub/ring')
    all_of_docs = ['docs/a.jsonl', 'docs/c.csv.gz', 'docs/sub/b.MD']
    assert read('docs[1].jsonl') == [(None, 'docs[1].jsonl')]
    assert [t for _, t in read('docs?.jsonl')] == ['docs1.jsonl']
    assert sorted(t for _, t in read('docs')) == sorted(t for _, t in read('docs/')) == all_of_docs
    assert [t for _, t in read('docs/*.jsonl')] == ['docs/a.jsonl']
    assert sorted(t for _, t in read('docs/**')) == all_of_docs
    assert read(Path('docs/a.jsonl')) == read('./docs/../docs/a.jsonl') == [(None, 'docs/a.jsonl')]
    counts = Counts()
    list(read_documents(DatasetConfig(Path('docs')), counts))
    assert counts.describe() == '3 documents in 3 files (1 .jsonl, 1 .csv, 1 .md), 1 files of other kinds'
    assert [c.path for c in as_dataset_configs([Path('docs')], 'x')] == ['docs']


def test_the_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    Path('d.txt').write_text('x')
    assert read('~/d.txt') == [(None, 'x')]


@pytest.mark.parametrize('path, said', [
    ('missing.parquet', "no corpus at 'missing.parquet'"), ('docs/*.jsonl', "no file matches 'docs/*.jsonl'"),
    ('/no/such/folder', "no corpus at '/no/such/folder'"), ('empty', "'empty' has no file that can be read, and 1 of"),
    ('no/such_dataset', "'no/such_dataset' is no file or folder here, and the hub did not provide it"),
])
def test_a_dataset_that_is_not_there_is_named_with_what_to_do(folder, path, said):
    os.makedirs('empty')
    Path('empty/image.png').write_text('')
    with pytest.raises(UserError) as error:
        read(path)
    assert said in str(error.value)


@pytest.mark.parametrize('entry, said', [
    (dict(pth='x'), 'no path and no DatasetConfig'), (dict(path=5), 'path must be a str, but is 5'),
    (dict(path=''), 'path must not be empty'), (dict(path='x', weight='abc'), "weight must be a number, but is 'abc'"),
    (dict(path='x', weight=True), 'weight must be a number, but is True'),
    (dict(path='x', skip_bad='no'), "skip_bad must be a bool, but is 'no'"), (7, 'no path and no DatasetConfig'),
])
def test_an_entry_that_is_no_dataset_is_named(entry, said):
    with pytest.raises(UserError, match=said):
        as_dataset_configs([entry], 'train_datasets')


def test_no_datasets_at_all_is_an_error_that_shows_how_to_name_one():
    with pytest.raises(UserError, match='val_datasets is empty.*DatasetConfig'):
        as_dataset_configs([], 'val_datasets')


def test_lone_surrogates_are_replaced_and_pairs_joined(folder):
    Path('d.jsonl').write_text('{"id": "\\ud800", "text": "a\\ud83d\\ude00b\\ud800c"}\n')
    assert read('d.jsonl') == [('\ufffd', 'a😀b\ufffdc')]


def test_the_peps_load_as_they_are():
    if not (SHARED / 'data/peps.jsonl.gz').exists():
        pytest.skip('the PEPs are not here')
    documents = list(load_documents([DatasetConfig(str(SHARED / 'data/peps.jsonl.gz'))]))
    assert len(documents) == 736 and all(d.text for d in documents)


def test_paths_in_settings_are_saved_as_text(tmp_path):
    (tmp_path / 'config.py').write_text("from pathlib import Path\ntrain_datasets = [Path('docs')]\n")
    assert load_settings([str(tmp_path / 'config.py')]).without_secrets()['train_datasets'] == ['docs']


@pytest.mark.parametrize('change', ['same time', 'same size and time', 'renamed over'])
def test_a_changed_file_is_read_anew_whatever_its_time_says(settings, change):
    Path('d.jsonl').write_text('{"id": 1, "text": "before"}\n')
    before, = open_all(settings.replace(train_datasets=['d.jsonl']))
    stat = os.stat('d.jsonl')
    text = '{"id": 1, "text": "after!"}\n' if 'size' in change else '{"id": 1, "text": "now longer"}\n'
    Path('new.jsonl' if change == 'renamed over' else 'd.jsonl').write_text(text)
    if change == 'renamed over':
        os.rename('new.jsonl', 'd.jsonl')
    os.utime('d.jsonl', ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after, = open_all(settings.replace(train_datasets=['d.jsonl']))
    assert after.hash != before.hash
    folder = before.folder
    del before
    os.utime('d.jsonl')
    open_all(settings.replace(train_datasets=['d.jsonl']))
    assert not os.path.exists(folder)  # one version is kept, and those that are in use


def test_what_has_not_changed_is_not_read_again_and_the_cache_is_bounded(settings, monkeypatch):
    for name in ('a', 'b', 'c'):
        Path(f'{name}.jsonl').write_text(json.dumps(dict(text=name * 2000)))
    settings = settings.replace(data_cache_gb=1e-5)  # one of them is more
    a, = open_all(settings.replace(train_datasets=['a.jsonl']))
    again, = open_all(settings.replace(train_datasets=['./a.jsonl']))
    assert again.folder == a.folder and os.stat(f'{a.folder}/meta.json').st_ino == os.stat(
        f'{again.folder}/meta.json').st_ino
    folder = a.folder
    b, = open_all(settings.replace(train_datasets=['b.jsonl']))
    assert os.path.exists(folder)  # it is in use
    del a, again
    b, c = open_all(settings.replace(train_datasets=['b.jsonl', 'c.jsonl']))
    assert not os.path.exists(folder) and os.path.exists(b.folder) and os.path.exists(c.folder)


def test_processes_that_need_the_same_dataset_read_it_once(workspace):
    """Four at once, of which all but one wait."""
    from concurrent.futures import ThreadPoolExecutor
    code = ("from tests.conftest import open_all\nfrom configurator import load_settings\n"
            "d, = open_all(load_settings(['config.py']))\nprint(d.hash, d.folder, sum(map(len, d.blocks())))")
    before = [p for p in (workspace / 'out/datasets').iterdir() if p.is_dir()]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: run('-c', code, folder=workspace).stdout, range(4)))
    assert len(set(answers)) == 1
    assert len([p for p in (workspace / 'out/datasets').iterdir() if p.is_dir()]) == len(before) + 1


def test_a_cache_folder_that_cannot_be_used_is_named(settings):
    Path('file').write_text('')
    with pytest.raises(UserError, match="data_cache_dir 'file/x' cannot be used .*name a folder"):
        open_all(settings.replace(data_cache_dir='file/x'))


def test_a_full_disk_is_one_line_and_leaves_nothing(settings, monkeypatch):
    """A limit on the size of files, which the system enforces with the same kind of error."""
    code = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "from tests.conftest import open_all\nfrom configurator import load_settings, user_errors_as_one_line\n"
            "with user_errors_as_one_line():\n    open_all(load_settings(['config.py']))")
    before = sorted(Path('out/datasets').glob('*-*'))
    answer = run('-c', code, folder=os.getcwd(), check=False)
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1
    assert "data_cache_dir 'out/datasets' cannot be used" in answer.stderr and 'free some space' in answer.stderr
    assert sorted(Path('out/datasets').glob('*-*')) == before


def test_a_string_column_with_bytes_that_are_not_utf8_names_the_row_and_a_time_that_python_cannot_hold_is_an_id(folder):
    import datasets
    texts = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b'\0\0\0\0\4\0\0\0\6\0\0\0'),
                                                   pa.py_buffer(b'fine\xff\xfe')])
    table = pa.table({'id': pa.array([2**62, 5], pa.timestamp('us')), 'text': texts})
    pq.write_table(table, 'd.parquet')
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk('saved')
    for path in ('d.parquet', 'saved'):
        with pytest.raises(UserError, match='row 2: not UTF-8'):
            read(path)
        (document_id, text), = read(path, skip_bad=True)
        assert text == 'fine' and document_id


def test_brackets_are_part_of_a_name_and_only_stars_and_question_marks_are_patterns(folder):
    for name in ('c [v2]', 'c v'):
        os.makedirs(name)
        Path(f'{name}/a.txt').write_text(name)
    Path('docs1.jsonl').write_text('{"text": "another"}')
    assert read('c [v2]/*.txt') == [(None, 'c [v2]')]
    with pytest.raises(UserError, match=r"no corpus at 'docs\[1\].jsonl'"):
        read('docs[1].jsonl')


def test_links_that_lead_nowhere_are_named_and_pipes_are_not_waited_for(folder):
    os.makedirs('docs/_delta_log')
    Path('docs/a.txt').write_text('a')
    Path('docs/_delta_log/0.json').write_text('{"commitInfo": {}}')
    os.mkfifo('docs/pipe.txt')
    assert read('docs') == read('docs/*') == [(None, 'a')]
    os.symlink('/nowhere', 'docs/b.txt')
    for path in ('docs', 'docs/*'):
        with pytest.raises(UserError, match='docs/b.txt cannot be read .No such file'):
            read(path)


def test_a_folder_that_holds_a_saved_dataset_among_others_is_refused(folder):
    import datasets
    datasets.Dataset.from_dict({'text': ['a']}).save_to_disk('docs/saved')
    with pytest.raises(UserError, match='docs/saved was written by save_to_disk: name it as a dataset of its own'):
        read('docs')


def test_without_an_id_field_the_text_identifies_documents(folder):
    Path('d.jsonl').write_text('{"id": {"$oid": 5}, "text": "a"}')
    assert read('d.jsonl', id_field='') == [(None, 'a')] and read('d.jsonl', id_field='id.$oid') == [('5', 'a')]
    with pytest.raises(UserError, match='no id, but an object: name a field in it in id_field'):
        read('d.jsonl')


@pytest.mark.parametrize('name', ['tokens.bin', 'ends.bin', 'doc_ids.bin', 'names.jsonl', 'meta.json'])
def test_a_damaged_dataset_is_made_again_and_that_is_said(settings, capsys, name):
    before, = open_all(settings)
    chunks = before.num_chunks
    os.truncate(f'{before.folder}/{name}', os.path.getsize(f'{before.folder}/{name}') // 2)
    after, = open_all(settings)
    assert 'is damaged: reading train.parquet again' in capsys.readouterr().err
    assert (after.hash, after.num_chunks) == (before.hash, chunks)
    assert sum(len(after.read(numbers).ids) for numbers in after.blocks()) == chunks


def test_a_dataset_that_is_open_stays_whole_when_a_newer_version_replaces_it(settings):
    Path('d.jsonl').write_text('{"id": "a", "text": "before"}\n')
    before, = open_all(settings.replace(train_datasets=['d.jsonl']))
    Path('d.jsonl').write_text('{"id": "a", "text": "after"}\n')
    open_all(settings.replace(train_datasets=['d.jsonl']))
    assert before.names([0]) == ['a'] and before.describe(0)[2] == 'd.jsonl, line 1' and len(before.read([0]).ids) == 1


def test_only_datasets_are_removed_to_make_room_and_what_killed_readers_left(settings):
    os.makedirs('cache/photos')
    os.makedirs('cache/0123456789abcdef-0123456789abcdef.tmp')
    Path('cache/photos/a.bin').write_bytes(b'x' * 100_000)
    open_all(settings.replace(data_cache_dir='cache', data_cache_gb=0.0))
    assert Path('cache/photos/a.bin').exists() and not list(Path('cache').glob('*.tmp'))


TABLE = [dict(id=f'd{number}', text=f'text {number}', score=number / 2, lang='en' if number % 3 else 'de')
         for number in range(30)]


@pytest.mark.parametrize('name', ['d.jsonl', 'd.json', 'd.csv', 'd.parquet', 'saved'])
def test_filter_fn_sees_all_columns_of_a_row_in_every_format_and_what_it_leaves_out_is_counted(folder, name):
    import csv

    import datasets
    if name == 'saved':
        datasets.Dataset.from_list(TABLE).save_to_disk(name)
    elif name == 'd.parquet':
        pq.write_table(pa.Table.from_pylist(TABLE), name)
    elif name == 'd.csv':
        with open(name, 'w', newline='') as file:
            writer = csv.DictWriter(file, TABLE[0])
            writer.writeheader()
            writer.writerows(TABLE)
    else:
        lines = [json.dumps(row) for row in TABLE]
        Path(name).write_text('\n'.join(lines) if name == 'd.jsonl' else f'[{",".join(lines)}]')
    counts = Counts()
    config = DatasetConfig(name, filter_fn=lambda row: row['lang'] == 'en' and float(row['score']) >= 5)
    found = [document.id for document in read_documents(config, counts)]
    assert found == [row['id'] for row in TABLE if row['lang'] == 'en' and row['score'] >= 5]
    assert counts.filtered == 30 - len(found) and 'left out by filter_fn' in counts.describe()
    with pytest.raises(UserError, match="filter_fn failed .KeyError: 'stars'. on the row .*'id': 'd0'.*: correct it"):
        read(name, filter_fn=lambda row: row['stars'] > 3)


def test_a_filter_fn_that_changes_reads_anew_and_one_that_does_not_reads_once(settings, monkeypatch):
    read_anew = []
    monkeypatch.setattr('data.chunk_store.build', lambda *a, **k: read_anew.append(1) or build(*a, **k))

    def documents(least):
        return len(open_all(settings.replace(train_datasets=[DatasetConfig(
            'train.parquet', source='stdlib', filter_fn=lambda row: len(row['text']) > least)]))[0])
    assert documents(20_000) < documents(10_000) < documents(100) and len(read_anew) == 3
    assert documents(10_000) > 0 and len(read_anew) == 3  # the value that the function refers to is part of it
    Path('mine.py').write_text(FILTERED)
    loaded = load_settings(['config.py', 'mine.py'])
    passed_on = pickle.loads(pickle.dumps(loaded))  # to another process, which cannot import a config file
    assert len(open_all(passed_on)[0]) == documents(20_000) and len(read_anew) == 4  # another function
    saved, = json.loads(json.dumps(loaded.without_secrets()))['train_datasets']  # in a checkpoint
    assert saved['filter_fn'] == 'wanted'
    shutil.copy('mine.py', 'renamed.py')
    assert len(open_all(load_settings(['config.py', 'renamed.py']))[0]) > 0 and len(read_anew) == 4
    monkeypatch.syspath_prepend('.')
    for count, least in ((5, '100'), (6, '20_001')):  # a function that is imported, whose module changes
        Path('imported.py').write_text(FILTERED.replace('20_000', least))
        module = importlib.reload(importlib.import_module('imported'))
        open_all(settings.replace(train_datasets=module.train_datasets))
        assert len(read_anew) == count


FILTERED = '''
from data.documents import DatasetConfig
_least = 20_000


def wanted(row):
    return len(row['text']) > _least


train_datasets = [DatasetConfig('train.parquet', source='stdlib', filter_fn=wanted)]
'''


def test_val_fraction_shares_a_dataset_by_the_identity_of_its_documents(folder):
    rows = [dict(id=f'd{number}', text=f'text {number}') for number in range(2000)]
    Path('d.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    Path('moved.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[::-1]))

    def ids(setting, path='d.jsonl', **options):
        configs = as_dataset_configs([DatasetConfig(path, val_fraction=0.1, **options)], setting)
        return {document.id for document in load_documents(configs)}
    train, val = ids('train_datasets'), ids('val_datasets')
    assert not train & val and len(train | val) == 2000 and 150 < len(val) < 250
    assert val == ids('val_datasets', 'moved.jsonl') and val != ids('val_datasets', source='other')
    assert ids('val_datasets', streaming=True) == val
    counts = Counts()
    found = list(read_documents(DatasetConfig('d.jsonl', val_fraction=0.1), counts))
    assert len(found) == counts.documents == len(train)
    assert counts.other_side == len(val) and f'{len(val)} on the other side of val_fraction' in counts.describe()


@pytest.mark.parametrize('train, val, said', [
    (dict(val_fraction=0.1), dict(), 'val_fraction=0.1, and in val_datasets with val_fraction=0.0'),
    (dict(), dict(val_fraction=0.1), 'val_fraction=0.0, and in val_datasets with val_fraction=0.1'),
    (dict(val_fraction=0.1), dict(val_fraction=0.1, id_field=''), "id_field='id', and in val_datasets with id_field="),
])
def test_a_dataset_of_both_lists_has_to_be_shared_by_both_alike(train, val, said):
    with pytest.raises(UserError, match=said):
        check_sides([DatasetConfig('d.jsonl', **train)], [DatasetConfig('d.jsonl', **val)])
    check_sides([DatasetConfig('d.jsonl', **train)], [DatasetConfig('d.jsonl', **train), DatasetConfig('e', **val)])


@pytest.mark.parametrize('one, other', [
    (dict(path='d.jsonl'), dict(path='./d.jsonl')), (dict(path='*.jsonl'), dict(path='d.jsonl')),
    (dict(path='some/thing'), dict(path='some/thing', revision='main')),
])
def test_a_dataset_is_known_on_both_sides_whatever_it_is_called_there(folder, one, other):
    Path('d.jsonl').write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match='val_fraction=0.0, and in val_datasets.* with val_fraction=0.1'):
        check_sides([DatasetConfig(**one)], [DatasetConfig(**other, val_fraction=0.1)])
    check_sides([DatasetConfig(**one, val_fraction=0.1)], [DatasetConfig(**other, val_fraction=0.1)])
    check_sides([DatasetConfig(**one)], [DatasetConfig('e.jsonl', val_fraction=0.1)])


def test_max_documents_reads_the_first_with_text(folder):
    rows = [dict(text='x' * (number % 2 * number)) for number in range(40)]
    Path('d.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert [len(text) for _, text in read('d.jsonl', max_documents=3)] == [1, 3, 5]
    assert len(read('d.jsonl', max_documents=100)) == 20


@pytest.mark.parametrize('options, said', [
    (dict(epochs=-1), 'epochs must be at least 0'),
    (dict(val_fraction=1.0), 'val_fraction must be at least 0 and below 1'),
    (dict(shuffle_buffer_size=5), 'shuffle_buffer_size is of streamed datasets, and streaming is False'),
    (dict(shuffle_buffer_size=0, streaming=True), 'shuffle_buffer_size must be at least 1'),
    (dict(filter_fn='wanted'), "filter_fn must be a function, but is 'wanted': a checkpoint keeps its name alone"),
    (dict(filter_fn=bool), r"a dict with a filter_fn, .*: write DatasetConfig\('d.jsonl', filter_fn=...\)"),
    (dict(max_documents=1.5), 'max_documents must be a whole number'), (dict(streaming=1), 'streaming must be a bool'),
])
def test_an_option_that_cannot_be_is_refused_by_name(options, said):
    with pytest.raises(UserError, match=said):
        as_dataset_configs([dict(path='d.jsonl', **options)], 'train_datasets')


@pytest.mark.parametrize('name', ['openwebtext', 'wikitext103'])
def test_prepare_makes_the_splits_of_a_local_copy(tmp_path, name):
    """A copy of the hub's repository, and for WikiText the original files; what is written is read back."""
    script, source = tmp_path / f'data/{name}/prepare.py', tmp_path / 'copy'
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / f'data/{name}/prepare.py', script)
    if name == 'openwebtext':
        source.mkdir()
        pq.write_table(pa.table({'text': [f'page {number}' for number in range(3000)]}), source / 'train-0.parquet')
        options = ['--val_fraction=0.01']
    else:
        lines = ['', ' = One = ', '', ' A first ', '', ' = = Part = = ', '', ' x = y ', '', ' = Two = ', '', ' Next']
        (source / 'wikitext-103-raw-v1').mkdir(parents=True)
        (tmp_path / 'raw').mkdir()
        for split in ('train', 'validation', 'test'):
            pq.write_table(pa.table({'text': [f'{line}\n' if line else '' for line in lines]}),
                           source / f'wikitext-103-raw-v1/{split}-00000-of-00001.parquet')
            file = tmp_path / f'raw/wiki.{split.replace("validation", "valid")}.raw'
            file.write_text(''.join(f'{line or " "}\n' for line in lines))
        (source / 'README.md').write_text(CARD)
        options = []
    answer = run(script, f'--from={source}', *options, folder=tmp_path)
    first, paths = answer.stdout, {path.stem: path for path in script.parent.glob('*.parquet')}
    splits = {split: read(path) for split, path in paths.items()}
    if name == 'openwebtext':
        assert not set(splits['train']) & set(splits['val']) and 10 < len(splits['val']) < 60
        assert sorted(text for split in splits.values() for _, text in split) == sorted(
            f'page {number}' for number in range(3000))
    else:
        expected = [('One', '= One =\n\n A first\n\n = = Part = =\n\n x = y'), ('Two', '= Two =\n\n Next')]
        assert splits == dict(train=expected, val=expected, test=expected)
        assert run(script, f'--from={tmp_path}/raw', folder=tmp_path).stdout == first
    assert describe_corpus([str(paths['train'])]) in f'{name} {first.split()[-1]}' and not list(tmp_path.rglob('*.tmp'))
    (tmp_path / 'none').mkdir()
    if name == 'openwebtext':
        answer = run(script, f'--from={source}', '--val_fraction=0', folder=tmp_path, check=False)
        assert answer.returncode == 2 and '--val_fraction is 0.0: choose a share' in answer.stderr
    answer = run(script, f'--from={tmp_path}/none', folder=tmp_path, check=False)
    assert answer.returncode == 2 and answer.stderr.startswith('error: ') and answer.stderr.count('\n') == 1


CARD = '''---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: train
    path: wikitext-103-raw-v1/train-*
  - split: validation
    path: wikitext-103-raw-v1/validation-*
  - split: test
    path: wikitext-103-raw-v1/test-*
---
'''
