"""
The quickstart's corpus, made from this machine's Python source in a copy of the project's folder, and the halves of a
package that it lacks.
"""
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.documents import DatasetConfig
from data.fingerprint import describe_corpus, fingerprint
from data.prepare import is_val, write_corpus
from data.python_source import prepare
from tests.conftest import ROOT, run


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('copy')
    shutil.copy(ROOT / 'configurator.py', folder)
    shutil.copytree(ROOT / 'data', folder / 'data', ignore=shutil.ignore_patterns('*.parquet', '*.json'))
    return folder


def prepare_in(copy, *arguments, **options):
    return run('data/python_source/prepare.py', *arguments, folder=copy, env={'PYTHONPATH': ''}, **options)


def test_documents_are_split_by_their_id_and_hold_no_tests_or_copies(copy):
    answer = prepare_in(copy, '--max_mb=3')
    folder = copy / 'data/python_source'
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        'corpus.json', 'prepare.py', 'tokenizer.json', 'train.parquet', 'val.parquet']
    train, val = (pq.read_table(folder / f'{name}.parquet').to_pylist() for name in ('train', 'val'))
    ids, texts = zip(*[(row['id'], row['text']) for row in train + val], strict=True)
    assert len(set(ids)) == len(ids) > 50 and len(set(texts)) == len(texts)
    assert not [i for i in ids if {'test', 'tests', '_vendor'} & set(i.split('.'))]
    assert all(is_val(row['id']) for row in val) and not any(is_val(row['id']) for row in train)
    size = sum(len(text.encode()) for text in texts)
    assert 3e6 <= size < 3.6e6
    for said in ('documents', 'bytes', 'tokens', 'chunks', 'padding', f'{len(train):,}', 'undecodable', 'duplicate'):
        assert said in answer.stdout
    found = json.loads((folder / 'corpus.json').read_text())
    assert found['train']['documents'] == len(train) and found['val']['documents'] == len(val)
    assert found['train']['bytes'] + found['val']['bytes'] == size and f'fingerprint {found["hash"]}' in answer.stdout
    assert describe_corpus([DatasetConfig(str(folder / 'train.parquet'))]) == f'python_source {found["hash"]}'


def test_the_fingerprint_depends_on_every_text_every_id_and_their_order_and_on_nothing_else():
    documents = [('a', 'one'), ('b', 'two')]
    changed = [[('a', 'one'), ('b', 'twp')], [('a', 'one'), ('c', 'two')], documents[::-1], documents[:1],
               [('a', 'onetwo'), ('b', '')], [*documents, ('c', '')]]
    hashes = [fingerprint(dict(train=split, val=[]))['hash'] for split in (documents, *changed)]
    assert len(set(hashes)) == len(hashes) and hashes[0] == fingerprint(dict(val=[], train=list(documents)))['hash']
    assert fingerprint(dict(train=[], val=documents))['hash'] not in hashes


def test_a_file_without_a_fingerprint_is_named_by_its_path():
    assert describe_corpus([DatasetConfig('my/a.jsonl'), DatasetConfig('my/b.jsonl')]) == 'my/a.jsonl, my/b.jsonl'


def test_too_little_to_split_is_one_clear_line_and_leaves_what_was_there(copy):
    before = {path.name: path.read_bytes() for path in (copy / 'data/python_source').glob('*.*')}
    answer = prepare_in(copy, '--max_mb=0', check=False)
    assert answer.returncode == 2 and '0 train and 0 val documents: ask for more' in answer.stderr
    assert {path.name: path.read_bytes() for path in (copy / 'data/python_source').glob('*.*')} == before


def test_what_is_left_out_is_counted_by_reason(tmp_path, monkeypatch):
    contents = dict(good=b'x = 1\n', copy=b'\nx = 1\n', latin=b'# caf\xe9\n', empty=b'\n', table=b'1, ' * 999,
                    made=b'# This file was automatically generated from y\nz = 2\n', other='é = 2\r\n'.encode())
    files = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        files.append((name, str(tmp_path / name)))
    monkeypatch.setattr(prepare, 'source_files', lambda: files)
    documents, left_out = prepare.read_documents(1e9)
    assert left_out == dict(undecodable=1, generated=2, duplicate=1, empty=1)
    texts = dict(documents)
    assert texts.pop('other') == 'é = 2\n' and list(texts.values()) in (['x = 1\n'], ['\nx = 1\n'])


@pytest.mark.parametrize('path, left_out', [
    ('numpy/tests/test_x.py', True), ('test/support.py', True), ('a/test_b.py', True), ('a/b_test.py', True),
    ('a/conftest.py', True), ('pip/_vendor/rich/a.py', True), ('setuptools/_vendor/b.py', True), ('a_pb2.py', True),
    ('a/contest.py', False), ('unittest/case.py', False), ('a/latest/b.py', False), ('vendors.py', False)])
def test_tests_vendored_and_generated_files_are_known_by_their_path(path, left_out):
    patterns = (prepare.TESTS, prepare.VENDORED, prepare.GENERATED_NAME)
    assert any(pattern.search(path) for pattern in patterns) == left_out


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A package as a wheel, of real modules: pip takes a file where it takes a name."""
    path = tmp_path_factory.mktemp('wheels') / 'unseen-1.0-py3-none-any.whl'
    library = Path(os.__file__).parent
    with zipfile.ZipFile(path, 'w') as file:
        for name in ('argparse', 'ast', 'bdb', 'cgi', 'configparser', 'copy', 'csv', 'datetime', 'difflib', 'dis',
                     'doctest', 'enum', 'filecmp', 'fractions', 'ftplib'):
            if (library / f'{name}.py').exists():
                file.write(library / f'{name}.py', f'unseen/{name}.py')
        file.writestr('unseen/tests/test_it.py', 'import unseen')
        text = (library / 'csv.py').read_text()
        for number in range(8):  # copies, in both halves
            file.writestr(f'unseen/csv_{number}.py', f'{text}\nnumber = {number}\n')
        file.writestr('unseen-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: unseen\nVersion: 1.0\n')
        file.writestr('unseen-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        file.writestr('unseen-1.0.dist-info/RECORD', '')
    return path


@pytest.mark.parametrize('split', ['files', 'lines'])
def test_halves_of_an_unseen_package_share_no_document_and_no_near_copy(copy, wheel, split):
    folder = copy / 'data/knowledge_update'
    for name in ('train', 'val'):
        pq.write_table(pa.table({'id': ['json'], 'text': ['x']}), copy / f'data/python_source/{name}.parquet')
    answer = run('data/knowledge_update/prepare.py', f'--package={wheel}', f'--split={split}', folder=copy,
                 env={'PYTHONPATH': ''})
    added, held_out = ({row['id']: row['text'] for row in pq.read_table(folder / f'{name}.parquet').to_pylist()}
                       for name in ('added', 'held_out'))
    assert added and held_out and not added.keys() & held_out.keys() and 'nearly copies' in answer.stdout
    assert not [i for i in [*added, *held_out] if '.tests' in i]
    if split == 'lines':
        assert added['unseen.bdb:1'] + held_out['unseen.bdb:2'] == (Path(os.__file__).parent / 'bdb.py').read_text()
    for text in held_out.values():
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= 20}
        assert all(len(lines & {line.strip() for line in other.splitlines()}) < 0.5 * len(lines)
                   for other in added.values())
    assert describe_corpus([str(folder / 'held_out.parquet')]).startswith('knowledge_update ')


def test_a_package_that_the_model_has_seen_or_that_pip_cannot_find_is_refused(copy, wheel, tmp_path):
    pq.write_table(pa.table({'id': ['unseen.csv'], 'text': ['x']}), copy / 'data/python_source/train.parquet')
    pq.write_table(pa.table({'id': ['json'], 'text': ['x']}), copy / 'data/python_source/val.parquet')
    for package, said in ((wheel, 'is in the corpus that the model was trained on (unseen.csv)'),
                          (tmp_path / 'none.whl', 'pip cannot download a wheel of')):
        answer = run('data/knowledge_update/prepare.py', f'--package={package}', folder=copy, check=False,
                     env={'PYTHONPATH': ''})
        assert answer.returncode == 2 and answer.stderr.count('\n') == 1 and said in answer.stderr


def test_a_tokenizer_is_fitted_on_runs_of_any_length_in_no_time(tmp_path):
    """The library's time grows with the square of a run's length."""
    texts = [('val', 'a'), ('train', f'a{" " * 300_000}b\n'), ('train', 'c' * 300_000), ('train', 'some words ' * 99)]
    start = time.perf_counter()
    written = write_corpus([(split, str(i), '', text) for i, (split, text) in enumerate(texts)], tmp_path, 'this gives')
    assert written['train'].bytes == sum(len(text) for split, text in texts if split == 'train')
    assert time.perf_counter() - start < 30
