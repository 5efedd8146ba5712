"""A folder of one's own files to a corpus, a config and a collection, by the two commands that the README names."""
import importlib.util
import json
import os
import pydoc
import shutil
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configurator import load_settings
from tests.conftest import ROOT, run
from tests.test_extract import pdf


@pytest.fixture(scope='module')
def prepare():
    """The script as a module: data.documents is the module beside its folder."""
    spec = importlib.util.spec_from_file_location('prepare_documents', ROOT / 'data/documents/prepare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A copy of the project, which the commands write to."""
    folder = tmp_path_factory.mktemp('project')
    for name in ('configurator.py', 'system.py', 'train.py'):
        shutil.copy(ROOT / name, folder)
    for name in ('data', 'retrieval', 'config'):
        shutil.copytree(ROOT / name, folder / name,
                        ignore=shutil.ignore_patterns('*.parquet', '*.json', '__pycache__'))
    return folder


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    """Real files of every kind, and what is to be left out."""
    folder = tmp_path_factory.mktemp('home') / 'My files'
    library = Path(os.__file__).parent
    for name in ('textwrap', 'calendar', 'shlex', 'heapq', 'csv', 'glob', 'json/decoder', 'json/encoder', 'queue'):
        target = folder / f'code/{name}.py'
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library / f'{name}.py', target)
    for module in (textwrap, json, shutil):
        (folder / f'{module.__name__}.html').write_text(pydoc.html.page(module.__name__, pydoc.html.document(module)))
    for name in ('README.md', 'LICENSE', 'docs/runs.md', 'docs/costs.md'):
        shutil.copy(ROOT / name, folder)
    (folder / 'manual.pdf').write_bytes(pdf(*[shutil.which.__doc__.splitlines(), shutil.move.__doc__.splitlines()]))
    (folder / 'scan.pdf').write_bytes(pdf([]))
    (folder / 'copy.md').write_text(f'\n {(folder / "README.md").read_text()}  \n')
    (folder / 'latin.txt').write_bytes('größer'.encode('cp1252'))
    (folder / 'empty.txt').touch()
    (folder / 'picture.png').write_bytes(b'\x89PNG')
    (folder / '.hidden.txt').write_text('hidden')
    for name in ('.git', 'node_modules', 'env'):
        (folder / name).mkdir()
        (folder / name / 'file.txt').write_text(name)
    (folder / 'env/pyvenv.cfg').touch()
    (folder / 'code/ring').symlink_to('..')
    return folder


def prepare_in(project, *arguments, **options):
    return run('data/documents/prepare.py', *arguments, folder=project, env={'PYTHONPATH': ''}, **options)


def read(project, name):
    return {split: {row['id']: row for row in pq.read_table(
        project / f'data/documents/{name}/{split}.parquet').to_pylist()} for split in ('train', 'val')}


def test_two_commands_lead_from_a_folder_to_a_filled_collection_and_the_folder_may_grow_and_move(
        project, mine, tmp_path, monkeypatch):
    answer = prepare_in(project, mine)
    for said in ('read: 17 files (9 .py, 3 .html, 3 .md, 1 .pdf, 1 no ending)', 'of other kinds: 1 (1 .png)',
                 'duplicates: 1', 'not UTF-8, maybe in another --encoding: 1 (My files/latin.txt)',
                 'PDF without text, such as a scanned one: 1 (My files/scan.pdf)', 'folders: hidden: 1 (My files/.git)',
                 'folders: node_modules: 1', 'folders: a virtual environment: 1 (My files/env)', 'hidden or backups: 1',
                 'config/my_files.py is written', 'python -m retrieval.populate config/my_files.py\n'):
        assert said in answer.stdout
    first = read(project, 'my_files')
    documents = first['train'] | first['val']
    assert len(documents) == 17 and first['val'] and len(first['train']) > len(first['val'])
    assert documents['My files/code/json/decoder.py']['text'] == (mine / 'code/json/decoder.py').read_text()
    assert len({'My files/README.md', 'My files/copy.md'} & documents.keys()) == 1
    assert documents['My files/costs.md']['title'] == 'What retrieval costs'
    assert documents['My files/textwrap.html']['title'] == 'Python: textwrap'
    left_out = json.loads((project / 'data/documents/my_files/left_out.json').read_text())
    assert left_out['without text'] == ['My files/empty.txt']

    answer = run('-m', 'retrieval.populate', 'config/my_files.py', folder=project, env={'PYTHONPATH': str(project)})
    assert "collection 'my_files' in out/my_files.db: " in answer.stdout
    monkeypatch.chdir(project)
    settings = load_settings(['config/my_files.py'])
    assert settings.retrieval_pointers and settings.n_embd == 128 and 100 <= settings.max_iters <= 600

    kept = {path: (project / path).read_bytes() for path in (
        'data/documents/my_files/tokenizer.json', 'config/my_files.py', 'out/my_files_embedding/modules.json')}
    moved = tmp_path / 'My files'
    shutil.copytree(mine, moved, symlinks=True)
    (moved / 'code/queue.py').unlink()
    (moved / 'new.md').write_text('# New\n\nA file that joins the others.\n')
    answer = prepare_in(project, moved, '--encoding=cp1252')
    assert 'config/my_files.py stays as it is' in answer.stdout and '--sync=True' in answer.stdout
    assert {path: (project / path).read_bytes() for path in kept} == kept
    second = read(project, 'my_files')
    assert (second['train'] | second['val']).keys() - documents.keys() == {'My files/new.md', 'My files/latin.txt'}
    assert documents.keys() - (second['train'] | second['val']).keys() == {'My files/code/queue.py'}
    for split in ('train', 'val'):
        assert not [i for i in second[split] if i in documents and i not in first[split]], 'a document changed sides'


def test_bad_input_is_one_clear_line_and_leaves_everything_as_it_was(project, mine, tmp_path):
    empty, one = tmp_path / 'empty', tmp_path / 'one'
    empty.mkdir()
    one.mkdir()
    (one / 'a.txt').write_text('a')
    (one / 'b.png').write_text('b')
    twin = tmp_path / 'x/one'
    shutil.copytree(one, twin)

    def files():
        return {path: path.read_bytes() for path in project.rglob('*') if path.is_file() and '.db' not in str(path)
                and '__pycache__' not in str(path)}
    before = files()
    for arguments, said in (
            ([tmp_path / 'none'], 'none does not exist'), ([one / 'a.txt'], 'is a file: name the folder'),
            ([empty], 'there are no files at all'), ([one, '--kinds=html'], 'of other kinds: 2 (1 .png, 1 .txt)'),
            ([one, '--kinds=word'], "--kinds has 'word': choose from text"),
            ([one], 'this gives 0 train and 1 val documents: name a folder with more'),
            ([one, twin], "would both be the document 'one/a.txt'"),
            ([mine, '--name=a b'], "cannot be called 'a b'"), ([mine, '--name=quickstart'], 'of another corpus'),
            ([mine, '--val_fraction=1'], 'choose a share between 0 and 1'),
            ([mine, '--encoding=klingon'], 'none that Python knows')):
        answer = prepare_in(project, *arguments, check=False)
        assert answer.returncode == 2 and answer.stderr.count('\n') == 1 and said in answer.stderr, answer.stderr
    shutil.rmtree(project / 'data/documents/one', ignore_errors=True)
    assert files() == before


def test_a_full_disk_is_one_line_and_the_corpus_of_before_stays(project, mine):
    """A limit on the size of files, which the system enforces with the same kind of error."""
    folder = project / 'data/documents/full'
    folder.mkdir()
    (folder / 'train.parquet').write_text('as before')
    (folder / f'train.parquet.{2**22 + 1}.tmp').write_text('of a process that was killed')
    code = ("import resource, runpy, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"sys.argv = ['data/documents/prepare.py', {str(mine)!r}, '--name=full']\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    answer = run('-c', code, folder=project, check=False, env={'PYTHONPATH': ''})
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1 and 'free some space' in answer.stderr
    assert [path.name for path in folder.iterdir()] == ['train.parquet']
    assert (folder / 'train.parquet').read_text() == 'as before'


def test_names_that_are_not_utf8_pipes_and_files_that_vanish_are_no_obstacle(prepare, tmp_path):
    folder = tmp_path / 'odd'
    folder.mkdir()
    for name in (b'a\xff.txt', b'a\xfe.txt', b'gone.txt', b'kept.txt'):
        Path(os.fsdecode(os.fsencode(folder) + b'/' + name)).write_text(repr(name))
    os.mkfifo(folder / 'pipe.txt')
    (folder / 'nowhere.txt').symlink_to('/nonexistent')
    files, left_out = prepare.find_files([str(folder)], {'.txt': 'text'})
    (folder / 'gone.txt').unlink()
    found = {document_id: text for _, document_id, _, text in prepare.read_documents(files, left_out, 0.5, '')}
    assert found == {f'odd/{name}': repr(name.encode('latin-1').decode('unicode_escape').encode('latin-1'))
                     for name in ('a\\xff.txt', 'a\\xfe.txt', 'kept.txt')}
    assert left_out.pop('no regular file') == ['odd/pipe.txt']
    assert sorted(left_out.pop('No such file or directory')) == ['odd/gone.txt', 'odd/nowhere.txt'] and not left_out


def test_of_copies_the_one_that_is_held_out_stays_and_one_document_always_is(prepare, tmp_path):
    for number in range(40):
        (tmp_path / f'{number}.txt').write_text('the same' if number % 2 else f'document {number}')
    files, left_out = prepare.find_files([str(tmp_path)], {'.txt': 'text'})
    for share in (0.5, 1e-9):
        documents = list(prepare.read_documents(files, left_out, share, ''))
        val = [document_id for split, document_id, *_ in documents if split == 'val']
        assert len(documents) == 21 and val == [d[1] for d in documents[:len(val)]] and 1 <= len(val) <= 20
    assert len(val) == 1


def test_large_corpora_get_the_shape_of_a_gpu(prepare, tmp_path, monkeypatch):
    from data.prepare import Written
    for tokens, size, said in ((20_000, 90_000, dict(max_iters=100, n_layer=4)),
                               (10**7, 4 * 10**7, dict(max_iters=600, n_layer=4)),
                               (10**9, 4 * 10**9, dict(max_iters=61035, n_layer=12))):
        text = prepare.config_text('x', 'gpt2', Written('', 9, size, tokens, tokens // 64))
        (tmp_path / 'config.py').write_text(text)
        settings = vars(load_settings([str(tmp_path / 'config.py')]))
        assert {key: settings[key] for key in said} == said and settings['retrieval_collection'] == 'x'
        assert max(map(len, text.splitlines())) <= 120


def test_a_package_that_is_missing_is_named_with_what_to_do(prepare, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'selectolax.lexbor', None)
    prepare.check_readers({'text', 'pdf'})
    with pytest.raises(prepare.UserError, match='html files need selectolax .*-r requirements-documents.txt, or leave '
                                                'them out with --kinds=text,source,pdf'):
        prepare.check_readers({'html'})
