"""The process that serves a local database, and its fast path beside Milvus Lite's own."""
import fcntl
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
from retrieval.knowledge_base import connect
from retrieval.local_server import PATIENCE, Unreachable, join_server
from retrieval.retriever import Retriever
from tests.conftest import CHUNK, ROOT, has_server, run, spawn, wait_until


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


def hold(database, folder=ROOT, **options):
    """A process that has a lease, and prints its server's id."""
    return spawn('-c', HOLD, database, folder=folder, stdout=subprocess.PIPE, **options)


def test_whoever_comes_later_joins_the_server_and_the_last_one_to_leave_ends_it_also_by_being_killed(workspace):
    database = workspace / 'milvus.db'
    processes = [hold(database) for _ in range(4)]  # they race to start it
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
    precious, file = workspace / 'precious', workspace / 'milvus.db/.nanoretro-server'
    precious.mkdir()
    (precious / 'socket').touch()
    file.write_text(f'unix:{precious}/socket\n1\n{file.stat().st_ino}\n')
    join_server(str(workspace / 'milvus.db')).close()
    assert (precious / 'socket').exists()


def test_the_server_of_a_copied_database_leaves_that_of_the_original_alone(workspace):
    with closing(join_server(str(workspace / 'milvus.db'))) as lease:
        shutil.copytree(workspace / 'milvus.db', workspace / 'copy.db')
        with closing(join_server(str(workspace / 'copy.db'))) as other:
            assert other.pid != lease.pid
        assert os.path.exists(lease.address.removeprefix('unix:'))
        with closing(join_server(str(workspace / 'milvus.db'))) as again:
            assert again.pid == lease.pid


@pytest.mark.parametrize('seconds', [0.2, 0.6, 1.0, 1.5, 2.0])
def test_whoever_is_killed_while_a_server_starts_is_in_nobodys_way(workspace, seconds):
    database = workspace / 'milvus.db'
    starter = hold(database)
    time.sleep(seconds)
    starter.kill()
    others = [hold(database) for _ in range(2)]
    servers = {process.stdout.readline() for process in others}
    assert len(servers) == 1 and '' not in servers
    for process in others:
        process.kill()
    wait_until(lambda: not has_server(database))


def test_a_starter_that_is_stopped_is_waited_for_and_named(workspace, capsys):
    with open(workspace / 'milvus.db/.nanoretro-start', 'a') as start:
        fcntl.flock(start, fcntl.LOCK_EX)  # as of a process that Ctrl-Z stopped
        with pytest.raises(Unreachable, match='another process has been starting or stopping .*: check whether it'):
            join_server(str(workspace / 'milvus.db'), timeout=0.5)
    join_server(str(workspace / 'milvus.db'), timeout=30).close()


def test_all_spellings_of_a_path_are_one_database(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (workspace / 'link.db').symlink_to('milvus.db')
    leases = [join_server(path) for path in ('milvus.db', './milvus.db', 'link.db', str(workspace / 'milvus.db'))]
    assert len({lease.pid for lease in leases}) == 1
    for lease in leases:
        lease.close()


def test_a_long_temporary_folder_and_modules_in_the_working_folder_do_not_matter(workspace):
    folder = workspace / ('long' * 30)
    folder.mkdir()
    for name in ('grpc', 'milvus_lite', 'json'):
        (workspace / f'{name}.py').write_text('raise SystemExit("not this one")')
    code = HOLD.replace('import sys, time', 'import sys; sys.path.remove(""); import time')
    process = spawn('-c', code, 'milvus.db', folder=workspace, stdout=subprocess.PIPE, env=dict(TMPDIR=str(folder)))
    assert int(process.stdout.readline()) > 0


def test_a_socket_that_is_not_here_is_named(workspace):
    """As when a container shares the folder."""
    with closing(join_server(str(workspace / 'milvus.db'))) as lease:
        os.rename(lease.address.removeprefix('unix:'), f'{workspace}/elsewhere')
        with pytest.raises(UserError, match=f'is served by process {lease.pid} of another user, machine or container'):
            join_server(str(workspace / 'milvus.db'))
        os.rename(f'{workspace}/elsewhere', lease.address.removeprefix('unix:'))


FILL = """
import sys
from contextlib import closing
from retrieval.knowledge_base import connect
from retrieval.local_server import join_server
lease = join_server('milvus.db')
client = connect(lease.address, 'milvus.db', '', 60)
client.load_collection('chunks')
row = client.query('chunks', 'position == 1', ['doc_id', 'position', 'document', 'text', 'tokens', 'embedding'])[0]
for start in range(0, 20_000, 2000):
    client.upsert('chunks', [{**row, 'id': number} for number in range(start, start + 2000)])
print(lease.pid, flush=True)
client.flush('chunks')
"""


def test_a_server_writes_nothing_once_another_one_may_start(workspace):
    """Its last client is killed while it writes."""
    process = spawn('-c', FILL, folder=workspace, stdout=subprocess.PIPE)
    pid = int(process.stdout.readline())
    time.sleep(0.2)  # for the request to arrive
    process.kill()
    wait_until(lambda: not has_server(workspace / 'milvus.db'), 60)

    def state():
        return {path: path.stat().st_mtime_ns for path in (workspace / 'milvus.db').rglob('*') if path.is_file()}
    before = state()
    wait_until(lambda: not os.path.exists(f'/proc/{pid}'), 60)
    assert state() == before
    with closing(join_server(str(workspace / 'milvus.db'))) as lease:
        client = connect(lease.address, 'milvus.db', '', 60)
        client.load_collection('chunks')
        assert len(client.query('chunks', 'id >= 0 and id < 20000', ['id'])) == 20_000
        client.close()


def test_what_pymilvus_reads_from_the_environment_names_no_server(workspace):
    """Also where another library has read a .env file since."""
    code = ('import os\nfrom retrieval.knowledge_base import connect\nfrom retrieval.local_server import join_server\n'
            'os.environ.update(MILVUS_URI="foo.db", MILVUS_DEFAULT_CONNECTION="bar")\n'
            'lease = join_server("milvus.db")\n'
            'print(connect(lease.address, "milvus.db", "", 60).list_collections())')
    assert run('-c', code, folder=workspace).stdout == "['chunks']\n"


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
import time
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
            assert unwritten or len(planned) == bool(asked)  # Milvus Lite may write by itself
            assert answer == slow.search(collection, queries.tolist(), limit, 'IP', **options)
            assert all(len(hits) for hits in answer)
    for fields in (['tokens'], ['id', 'text', 'embedding'], list(some[0]), None):
        planned.clear()
        rows = collection.get(ids, output_fields=fields)
        assert unwritten or len(planned) == (fields is None)
        assert rows == slow.get(collection, ids, output_fields=fields) and len(rows) == collection.num_entities
    middle = sorted(ids)[len(ids) // 3]
    for expr in ('id >= 0', 'id < 0', f'id >= {middle} and id < 5', f'id < {middle} or id >= {middle}'):
        for fields, limit in ((['doc_id', 'tokens'], None), (['id'], 30)):
            planned.clear()
            rows = collection.query(expr, fields, limit=limit)
            assert unwritten or len(planned) == (' or ' in expr)
            assert rows == slow.query(collection, expr, fields, limit=limit) and rows
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
for _ in range(300):  # on a busy machine it is a while until what was flushed is read by itself
    planned.clear()
    collection.search(queries[:1].tolist(), 1, 'IP', output_fields=['id'], search_params={'nprobe': 16})
    if not planned:
        break
    time.sleep(0.1)
assert check() == count - 10
print('the same')
"""
    assert run('-c', code, folder=workspace).stdout.strip() == 'the same'
