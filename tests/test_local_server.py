"""The process that serves a local database, and its fast path beside Milvus Lite's own."""
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from data.tokenizer import load_tokenizer
from retrieval import local_server as module
from retrieval.local_server import PATIENCE, join_server, try_lock
from retrieval.retriever import Retriever
from tests.conftest import CHUNK, ROOT, run


@pytest.fixture
def tokenizer_of():
    return lambda settings: load_tokenizer(settings.tokenizer)


def test_why_it_cannot_start_is_shown(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (workspace / 'file.db').write_text('no database')
    with pytest.raises(UserError, match="'file.db' cannot be used .Not a directory.: it must be a database of Milvus"):
        join_server('file.db')
    (workspace / 'broken.db').mkdir()
    (workspace / 'broken.db/collections').write_text('no folder')
    with pytest.raises(UserError, match='cannot serve broken.db: .*Error: .*see that it is a database of Milvus Lite'):
        join_server('broken.db')


def test_a_database_that_others_have_open_is_named(settings, workspace):
    """Others: Milvus Lite itself, in a program that is not ours."""
    code = "from milvus_lite.db import MilvusLite; MilvusLite('milvus.db'); print('open', flush=True); input()"
    process = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'open\n'
    with pytest.raises(UserError, match='cannot open milvus.db: a process that is not of nanoRETRO.*has it open'):
        join_server('milvus.db')
    process.communicate('\n')
    join_server('milvus.db').close()


def has_server(path):
    """Whether a server of the database at `path` is alive."""
    with open(path / '.nanoretro-server', 'a') as file:
        return not try_lock(file)


def wait_until(condition, seconds=20):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.1)
    assert condition()


def test_a_client_that_is_idle_for_long_is_not_sent_away(workspace):
    """As pymilvus' is while its process embeds: it pings all the time. Here it pings faster, to be quick."""
    import grpc
    states = []
    with closing(join_server(str(workspace / 'milvus.db'))) as lease:
        options = dict(keepalive_time_ms=1000, keepalive_permit_without_calls=1)
        with grpc.insecure_channel(lease.address, [*((f'grpc.{key}', value) for key, value in options.items()),
                                                   ('grpc.http2.max_pings_without_data', 0)]) as channel:
            channel.subscribe(lambda state: states.append(state.name), try_to_connect=True)
            time.sleep(7)
    assert states[-1] == 'READY'


HOLD = """
import sys, time
from retrieval.local_server import join_server
lease = join_server(sys.argv[1])
print(lease.pid, flush=True)
time.sleep(100)
"""


def test_whoever_comes_later_joins_the_server_and_the_last_one_to_leave_ends_it_also_by_being_killed(workspace):
    database = workspace / 'milvus.db'
    processes = [subprocess.Popen([sys.executable, '-c', HOLD, str(database)], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE) for _ in range(4)]  # they race to start it
    servers = {process.stdout.readline() for process in processes}
    assert len(servers) == 1 and '' not in servers
    for process in processes[:3]:  # the one that started it among them, or not
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(3 * PATIENCE)
    assert has_server(database)
    lease = join_server(str(database))
    assert f'{lease.pid}\n' in servers
    processes[3].send_signal(signal.SIGKILL)
    processes[3].wait()
    time.sleep(3 * PATIENCE)
    assert has_server(database)
    lease.close()
    wait_until(lambda: not has_server(database))


def test_it_can_be_reached_by_its_user_alone(workspace):
    with closing(join_server(str(workspace / 'milvus.db'))) as lease:
        folder = os.path.dirname(lease.address.removeprefix('unix:'))
        assert os.stat(folder).st_mode & 0o777 == 0o700 and os.stat(folder).st_uid == os.getuid()
        listening = subprocess.run(['ss', '-ltnp'], capture_output=True, text=True) if shutil.which('ss') else None
        assert listening is None or f'pid={lease.pid},' not in listening.stdout


def test_a_server_that_was_killed_is_replaced_while_it_is_in_use(settings, tokenizer_of, capsys):
    with closing(Retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer_of(settings))) as retriever:
        chunks = np.arange(2 * CHUNK).reshape(1, 2, CHUNK)
        before = retriever.retrieve_for_text(chunks)
        pid = retriever.knowledge_base.lease.pid
        folder = os.path.dirname(retriever.knowledge_base.lease.address.removeprefix('unix:'))
        os.kill(pid, signal.SIGKILL)
        after = retriever.retrieve_for_text(chunks)
        assert (before.tokens == after.tokens).all() and retriever.knowledge_base.lease.pid != pid
        assert not os.path.exists(folder)  # nothing is left of the first
    assert 'waiting for Milvus' in capsys.readouterr().err


def test_a_damaged_server_file_removes_nothing(workspace):
    """What it names is removed only if a server of ours has made it."""
    precious = workspace / 'precious'
    precious.mkdir()
    (workspace / 'milvus.db/.nanoretro-server').write_text(f'unix:{precious}/socket\n1\n')
    join_server(str(workspace / 'milvus.db')).close()
    assert precious.is_dir()


def test_with_another_version_of_milvus_lite_its_own_search_answers_and_that_is_said(settings, tokenizer_of, capfd,
                                                                                    monkeypatch, tmp_path):
    """The version is another one in this process and, by a sitecustomize, in the server's."""
    settings = settings.replace(retrieval_cache_gb=0.0)
    with closing(Retriever(settings, tokenizer_of(settings))) as retriever:
        vectors = retriever.embedder.embed(['import os', 'def f(x):'])
        expected = retriever.knowledge_base.search(vectors, 5)
    wait_until(lambda: not has_server(Path('milvus.db')))
    assert 'Milvus Lite is version' not in capfd.readouterr().err
    (tmp_path / 'sitecustomize.py').write_text('import importlib.metadata as m\nm.version = lambda _: "9.9"')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, 'version', lambda _: '9.9')
    with closing(Retriever(settings, tokenizer_of(settings))) as retriever:
        assert (retriever.knowledge_base.search(vectors, 5) == expected).all()
    assert 'Milvus Lite is version 9.9, and the fast path' in capfd.readouterr().err


def test_the_fast_path_finds_and_reads_what_milvus_lite_does(workspace):
    """Over arrays as in its loops; also of rows that were replaced or deleted since, flushed or not."""
    code = """
import milvus_lite.db
import numpy as np
from milvus_lite.engine import collection as engine
from retrieval.lite_collection import ArrayCollection
milvus_lite.db.Collection = ArrayCollection
slow = engine.Collection
planned = []  # calls that Milvus Lite's own methods answer
build_plan = engine.build_projection_plan
engine.build_projection_plan = lambda *given, **rest: planned.append(given) or build_plan(*given, **rest)
collection = milvus_lite.db.MilvusLite('milvus.db').get_collection('chunks')
assert type(collection) is ArrayCollection
collection.load()
size = len(collection.query('position == 0', ['embedding'])[0]['embedding'])
queries = np.random.default_rng(0).normal(size=(50, size))

def check(unwritten=False):
    for limit in (1, 8, 3000):
        for asked in ({}, {'expr': 'position > 2'}):
            options = dict(output_fields=['doc_id', 'id'], search_params={'nprobe': 16}, **asked)
            planned.clear()
            answer = collection.search(queries.tolist(), limit, 'IP', **options)
            assert len(planned) == (unwritten or bool(asked))
            assert answer == slow.search(collection, queries.tolist(), limit, 'IP', **options)
            assert all(len(hits) for hits in answer)
    for fields in (['tokens'], ['id', 'text', 'embedding'], list(some[0]), None):
        planned.clear()
        rows = collection.get(ids, output_fields=fields)
        assert len(planned) == (fields is None or unwritten)
        assert rows == slow.get(collection, ids, output_fields=fields) and len(rows) == collection.num_entities
    return collection.num_entities

some = collection.query('position == 1', list(collection.query('position == 1')[0]))
ids = [7, *(row['id'] for row in collection.query('position >= 0', ['id']))]  # there is no 7
count = check()
for row in some:
    row['embedding'] = (-np.asarray(row['embedding'])).tolist()
collection.insert(some[:20])
collection.delete([row['id'] for row in some[20:30]])
check(unwritten=True)
collection.flush()
assert check() == count - 10
print('the same')
"""
    assert run('-c', code, folder=workspace).stdout.strip() == 'the same'
