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


def in_another_process(folder, code):
    """Run code with a NeighborCache `other` of the same folder."""
    made = ('from retrieval.neighbor_cache import NeighborCache\n'
            f'other = NeighborCache({str(folder)!r}, 0.01, "chunks", ["hits", "rows"])\n')
    answer = subprocess.run([sys.executable, '-c', made + code], cwd=ROOT, capture_output=True, text=True, check=True)
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
