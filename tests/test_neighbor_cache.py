"""The neighbor cache: a real LMDB environment, used by one process and by several."""
import os
import subprocess
import sys

import pytest

from configurator import UserError
from retrieval.neighbor_cache import NeighborCache
from tests.conftest import ROOT


@pytest.fixture
def cache(tmp_path):
    made = NeighborCache(str(tmp_path / 'cache'), 0.01, 'chunks', ['hits', 'rows'])
    made.use_revision('first')
    yield made
    made.close()


def in_another_process(folder, code, stderr=None):
    """Run code with a NeighborCache `other` of the same folder."""
    made = ('from retrieval.neighbor_cache import NeighborCache\n'
            f'other = NeighborCache({str(folder)!r}, 0.01, "chunks", ["hits", "rows"])\n')
    answer = subprocess.run([sys.executable, '-c', made + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr,
                            text=True, check=True)
    return answer.stdout


def test_kinds_and_collections_are_apart(cache, tmp_path):
    cache.put('hits', [(b'1', b'one'), (b'2', b'two')])
    cache.put('rows', [(b'1', b'row')])
    assert cache.get('hits', [b'1', b'2', b'3']) == {b'1': b'one', b'2': b'two'}
    assert cache.get('rows', [b'1', b'2']) == {b'1': b'row'} and cache.count('hits') == 2
    cache.collection = 'others'
    cache.use_revision('theirs')
    assert cache.get('hits', [b'1']) == {}
    cache.collection = 'chunks'
    cache.use_revision('first')
    assert cache.get('hits', [b'1']) == {b'1': b'one'}


def test_another_revision_drops_the_entries_of_the_first(cache):
    cache.put('hits', [(b'1', b'one')])
    cache.use_revision('second')
    assert cache.get('hits', [b'1']) == {}
    cache.use_revision('first')
    assert cache.get('hits', [b'1']) == {} and cache.count('hits') == 0


def test_without_a_revision_nothing_is_cached(cache):
    cache.put('hits', [(b'1', b'one')])
    cache.use_revision(None)
    cache.put('hits', [(b'2', b'two')])
    assert cache.get('hits', [b'1', b'2']) == {}
    cache.use_revision('first')
    assert cache.get('hits', [b'1', b'2']) == {b'1': b'one'}


def test_processes_share_it_while_both_have_it_open(cache, tmp_path):
    cache.put('hits', [(b'1', b'one')])
    said = in_another_process(tmp_path / 'cache', 'other.use_revision("first"); print(other.get("hits", [b"1"]))\n'
                              'other.put("hits", [(b"2", b"two")])')
    assert said == "{b'1': b'one'}\n"
    assert cache.get('hits', [b'2']) == {b'2': b'two'}


def test_a_process_that_has_not_seen_the_change_reads_nothing_of_either_revision(cache, tmp_path):
    cache.put('hits', [(b'1', b'one')])
    in_another_process(tmp_path / 'cache', 'other.use_revision("second"); other.put("hits", [(b"1", b"changed")])')
    assert cache.get('hits', [b'1']) == {}
    cache.put('hits', [(b'1', b'one')])
    cache.use_revision('second')
    assert cache.get('hits', [b'1']) == {b'1': b'changed'}


def test_it_outlives_a_process_that_is_killed_while_writing(cache, tmp_path):
    cache.put('hits', [(b'1', b'one')])
    code = ('from retrieval.neighbor_cache import NeighborCache\n'
            f'other = NeighborCache({str(tmp_path / "cache")!r}, 0.01, "chunks", ["hits"])\n'
            'other.use_revision("first")\nprint("writing", flush=True)\n'
            'while True: other.put("hits", [(b"2", b"two" * 1000)] * 50)')
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert cache.get('hits', [b'1']) == {b'1': b'one'}
    cache.put('hits', [(b'3', b'three')])
    assert cache.get('hits', [b'3']) == {b'3': b'three'}


def test_a_full_cache_stays_within_its_size_and_evicts_nothing(cache, tmp_path):
    cache.put('hits', [(b'first', b'one')])
    for number in range(40):
        cache.put('hits', [(f'{number} {i}'.encode(), os.urandom(240)) for i in range(1000)])
    assert cache.is_full and 10_000 < cache.count('hits') < 40_000
    assert os.path.getsize(tmp_path / 'cache/data.mdb') <= 0.01 * 2**30
    assert cache.get('hits', [b'first']) == {b'first': b'one'}
    cache.use_revision('second')  # there is room again
    cache.put('hits', [(b'1', b'one')])
    assert not cache.is_full and cache.get('hits', [b'1']) == {b'1': b'one'}


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match="retrieval_cache_dir '.*file/cache' cannot be used.*retrieval_cache_gb to 0"):
        NeighborCache(str(tmp_path / 'file/cache'), 1, 'chunks', ['hits'])


def damage_file(path, how):
    size = os.path.getsize(path)
    if how == 'cut off':
        os.truncate(path, size // 2)
    elif how == 'emptied':
        os.truncate(path, 0)
    else:
        with open(path, 'r+b') as file:
            file.seek({'no database': 0, 'pages overwritten': 2 * 4096}[how])
            file.write(os.urandom(4096) if how == 'no database' else b'\xff' * (size - 2 * 4096))


@pytest.mark.parametrize('how', ['cut off', 'emptied', 'no database', 'pages overwritten'])
def test_a_damaged_file_is_thrown_away_and_that_is_said_once(tmp_path, how):
    """In a process of its own: reading beyond the end of a file that has been cut off would kill this one."""
    folder = tmp_path / 'cache'
    made = NeighborCache(str(folder), 0.01, 'chunks', ['hits', 'rows'])
    made.use_revision('first')
    made.put('hits', [(f'{i}'.encode(), b'one' * 1000) for i in range(500)])
    made.close()
    damage_file(folder / 'data.mdb', how)
    said = in_another_process(folder, '\n'.join([
        'other.use_revision("first")', 'found = other.get("hits", [b"7", b"400"])',
        'other.put("hits", [(b"7", b"new")])', 'other.use_revision("first")', 'other.put("hits", [(b"7", b"new")])',
        'print(found == {}, other.get("hits", [b"7"]))']), stderr=subprocess.STDOUT)
    lines = said.splitlines()
    assert lines[-1] == "True {b'7': b'new'}"
    assert ['was damaged' in line for line in lines] == ([True, False] if how != 'emptied' else [False]), said


def test_a_full_disk_ends_no_run(tmp_path):
    said = in_another_process(tmp_path / 'cache', '\n'.join([
        'import resource, signal', 'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)', 'other.use_revision("first")',
        'other.put("hits", [(b"1", b"one")])', 'resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))',
        'for i in range(50): other.put("hits", [(str(i).encode() * 9, b"x" * 400) for i in range(1000)])',
        'print(other.is_full, other.get("hits", [b"1"]))']))
    assert said == "True {b'1': b'one'}\n"


def test_the_name_of_a_collection_may_be_long_and_holds_any_characters(tmp_path):
    for name in ('/a/long/path' * 100, 'ünï \udcff', ''):
        made = NeighborCache(str(tmp_path / 'cache'), 0.01, name, ['hits'])
        made.use_revision('first')
        made.put('hits', [(b'1', name.encode('utf-8', 'surrogateescape')[:9] or b'-')])
        made.close()
        made = NeighborCache(str(tmp_path / 'cache'), 0.01, name, ['hits'])
        made.use_revision('first')
        assert made.count('hits') == 1
        made.close()
