"""The memory of neighbors: a real LMDB environment, of one process and of several."""
import os
import subprocess
import sys

import pytest

from configurator import UserError
from retrieval.memory import Memory
from tests.conftest import ROOT


@pytest.fixture
def memory(tmp_path):
    made = Memory(str(tmp_path / 'memory'), 0.01, 'chunks', ['hits', 'rows'])
    made.go_over_to('first')
    yield made
    made.close()


def in_another_process(folder, code):
    """Run code with a Memory `other` of the same folder."""
    made = f'from retrieval.memory import Memory\nother = Memory({str(folder)!r}, 0.01, "chunks", ["hits", "rows"])\n'
    answer = subprocess.run([sys.executable, '-c', made + code], cwd=ROOT, capture_output=True, text=True, check=True)
    return answer.stdout


def test_kinds_and_collections_are_apart(memory, tmp_path):
    memory.put('hits', [(b'1', b'one'), (b'2', b'two')])
    memory.put('rows', [(b'1', b'row')])
    assert memory.get('hits', [b'1', b'2', b'3']) == {b'1': b'one', b'2': b'two'}
    assert memory.get('rows', [b'1', b'2']) == {b'1': b'row'} and memory.count('hits') == 2
    memory.collection = 'others'
    memory.go_over_to('theirs')
    assert memory.get('hits', [b'1']) == {}
    memory.collection = 'chunks'
    memory.go_over_to('first')
    assert memory.get('hits', [b'1']) == {b'1': b'one'}


def test_another_state_of_the_collection_drops_what_was_remembered_of_the_first(memory):
    memory.put('hits', [(b'1', b'one')])
    memory.go_over_to('second')
    assert memory.get('hits', [b'1']) == {}
    memory.go_over_to('first')
    assert memory.get('hits', [b'1']) == {} and memory.count('hits') == 0


def test_without_a_state_nothing_is_remembered(memory):
    memory.put('hits', [(b'1', b'one')])
    memory.go_over_to(None)
    memory.put('hits', [(b'2', b'two')])
    assert memory.get('hits', [b'1', b'2']) == {}
    memory.go_over_to('first')
    assert memory.get('hits', [b'1', b'2']) == {b'1': b'one'}


def test_processes_share_it_while_both_have_it_open(memory, tmp_path):
    memory.put('hits', [(b'1', b'one')])
    said = in_another_process(tmp_path / 'memory', 'other.go_over_to("first"); print(other.get("hits", [b"1"]))\n'
                              'other.put("hits", [(b"2", b"two")])')
    assert said == "{b'1': b'one'}\n"
    assert memory.get('hits', [b'2']) == {b'2': b'two'}


def test_a_process_that_has_not_seen_the_change_reads_nothing_of_either_state(memory, tmp_path):
    memory.put('hits', [(b'1', b'one')])
    in_another_process(tmp_path / 'memory', 'other.go_over_to("second"); other.put("hits", [(b"1", b"changed")])')
    assert memory.get('hits', [b'1']) == {}
    memory.put('hits', [(b'1', b'one')])
    memory.go_over_to('second')
    assert memory.get('hits', [b'1']) == {b'1': b'changed'}


def test_it_outlives_a_process_that_is_killed_while_writing(memory, tmp_path):
    memory.put('hits', [(b'1', b'one')])
    code = ('from retrieval.memory import Memory\n'
            f'other = Memory({str(tmp_path / "memory")!r}, 0.01, "chunks", ["hits"])\n'
            'other.go_over_to("first")\nprint("writing", flush=True)\n'
            'while True: other.put("hits", [(b"2", b"two" * 1000)] * 50)')
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert memory.get('hits', [b'1']) == {b'1': b'one'}
    memory.put('hits', [(b'3', b'three')])
    assert memory.get('hits', [b'3']) == {b'3': b'three'}


def test_it_stays_within_its_size_and_keeps_what_it_has(memory, tmp_path):
    memory.put('hits', [(b'first', b'one')])
    for number in range(40):
        memory.put('hits', [(f'{number} {i}'.encode(), os.urandom(240)) for i in range(1000)])
    assert memory.full and 10_000 < memory.count('hits') < 40_000
    assert os.path.getsize(tmp_path / 'memory/data.mdb') <= 0.01 * 2**30
    assert memory.get('hits', [b'first']) == {b'first': b'one'}
    memory.go_over_to('second')  # there is room again
    memory.put('hits', [(b'1', b'one')])
    assert not memory.full and memory.get('hits', [b'1']) == {b'1': b'one'}


def test_a_folder_that_can_not_be_used_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match="retrieval_cache_dir '.*file/memory' can not be used.*retrieval_cache_gb to 0"):
        Memory(str(tmp_path / 'file/memory'), 1, 'chunks', ['hits'])
