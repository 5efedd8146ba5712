"""What takes minutes (make test-slow): many kills, torch.compile with Inductor, many processes, all-mpnet-base-v2."""
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from system import why_not_compile

import pytest

from bench.milvus_server import MilvusServer, why_not
from retrieval.knowledge_base import connect
from retrieval.local_server import join_server
from tests.conftest import ROOT, SHARED, has_server, run, run_ranks, spawn, wait_until
from tests.test_blocks import STREAM
from tests.test_faults import LONG, Run
from tests.test_populate import segments
from tests.test_server import START, serve
from tests.test_train import losses, metrics

pytestmark = pytest.mark.slow


SILENT = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_again_and_again(workspace, options, times, after=lambda number: None):
    """A run in `broken`, killed `times` times shortly after a checkpoint, resumed to its end; and an unbroken one."""
    run(ROOT / 'train.py', *options, '--out_dir=whole', folder=workspace)
    dice, latest = random.Random(times), workspace / 'broken/checkpoints/latest'
    for number in range(times):
        before = latest.read_text() if number else ''
        process = spawn(ROOT / 'train.py', *options, '--out_dir=broken', *['--init_from=resume'] * bool(number),
                        folder=workspace, **SILENT)
        wait_until(lambda b=before: latest.exists() and latest.read_text() != b, seconds=100)
        time.sleep(1.5 * dice.random())
        assert process.poll() is None
        process.kill()
        process.wait()
        after(number)
    run(ROOT / 'train.py', *options, '--out_dir=broken', '--init_from=resume', folder=workspace)
    assert losses(workspace, 'broken') == losses(workspace, 'whole')
    assert not list((workspace / 'broken').rglob('*.tmp*'))


def test_a_run_killed_eight_times_has_the_losses_of_an_unbroken_one(workspace):
    kill_again_and_again(workspace, ['config.py', '--max_iters=1500', '--eval_interval=10', '--dropout=0.1'], 8)


def test_a_run_on_a_streamed_mixture_killed_five_times_has_the_losses_of_an_unbroken_one(workspace):
    """Weighted, shuffled, two readers, over epochs; its blocks are left as they are, or lost with the disk."""
    (workspace / 'stream.py').write_text(STREAM.replace('epochs=1', 'epochs=0'))

    def lose_blocks(number):
        if number % 2:
            time.sleep(1)  # its readers end with it
            shutil.rmtree(workspace / 'out/datasets', ignore_errors=True)
    kill_again_and_again(workspace, ['config.py', 'stream.py', '--max_iters=400', '--eval_interval=10',
                                     '--dropout=0.1'], 5, lose_blocks)
    last = [line['shares']['train.parquet'] for line in metrics(workspace, 'broken') if 'shares' in line][-1]
    assert last == pytest.approx(0.75, abs=0.001)


def test_two_ranks_with_a_reader_each_train_on_the_stream_of_one_with_two_and_either_resumes_the_other(workspace):
    (workspace / 'stream.py').write_text(STREAM.replace('epochs=1', 'epochs=0'))
    train, options = ROOT / 'train.py', ['config.py', 'stream.py', '--lr_decay_iters=30']
    run(train, *options, '--max_iters=30', '--out_dir=one', folder=workspace)
    run_ranks(2, train, *options, '--stream_workers=1', '--max_iters=10', '--out_dir=two', folder=workspace)
    answer = run(train, *options, '--max_iters=20', '--init_from=resume', '--out_dir=two', folder=workspace)
    assert 'resuming on 1 processes' in answer.stdout
    answer = run_ranks(2, train, *options, '--max_iters=30', '--init_from=resume', '--out_dir=two', folder=workspace)
    assert 'stream_workers is 2, and the run goes on with the 2 readers that it began with: 1 a' in answer.stdout
    one, two = losses(workspace, 'one')[0], losses(workspace, 'two')[0]
    assert one.keys() == two.keys() and list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)


BUILD = '''
from configurator import load_settings
from data.tokenizer import load_tokenizer
from retrieval.retriever import Retriever
import numpy as np
settings = load_settings(["config.py"])
retriever = Retriever(settings, load_tokenizer(settings.tokenizer))
print("ready", flush=True)
retriever.point(np.ones((1, 16), dtype=np.int64))
retriever.close()
'''


def test_an_index_whose_building_is_killed_twenty_times_is_that_of_one_that_was_not(workspace):
    folder, = (workspace / 'out/matches').iterdir()
    expected = {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    dice, killed = random.Random(2), 0
    for number in range(20):
        if number % 4 == 0:  # the others find what those before them left
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        process = spawn('-c', BUILD, folder=workspace, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        time.sleep(dice.random() * 0.6)
        killed += process.poll() is None
        process.kill()
        process.wait()
    run('-c', BUILD, folder=workspace)
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert found == expected and killed >= 10


def rows_of(folder):
    """{id: tokens} of its collection."""
    uri = str(folder / 'milvus.db')
    with closing(join_server(uri)) as lease:
        client = connect(lease.address, uri, '', 60)
        client.load_collection('chunks')
        return {row['id']: row['tokens'] for row in client.query('chunks', 'position >= 0', ['id', 'tokens'])}


def test_populate_killed_twelve_times_leaves_the_rows_of_one_that_was_not(prepared, populated, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(prepared, folder)
    dice, kills = random.Random(1), 0
    for number in range(12):  # of 4 fillings, each killed 3 times from when its collection is there
        if number % 3 == 0:
            shutil.rmtree(folder / 'milvus.db', ignore_errors=True)
        process = spawn('-m', 'retrieval.populate', 'config.py', folder=folder, **SILENT)
        wait_until(lambda: (folder / 'milvus.db/collections/chunks').exists(), 60)
        time.sleep(2 * dice.random())
        kills += process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda: not has_server(folder / 'milvus.db'), 60)
        if number % 3 == 2:
            run('-m', 'retrieval.populate', 'config.py', folder=folder)
            assert rows_of(folder) == rows_of(populated)
    assert kills >= 8


@pytest.mark.parametrize('filling', range(4))
def test_populate_with_two_ranks_killed_twenty_times_leaves_the_rows_and_the_index_of_one_that_was_not(
        prepared, populated, tmp_path, filling):
    """Of 4 fillings each is killed 5 times, from when the collection is there to when it has its index."""
    folder, dice, kills = tmp_path / 'run', random.Random(filling), 0
    shutil.copytree(prepared, folder)
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'retrieval.populate',
               'config.py']
    for number in range(5):
        process = spawn(*command, folder=folder, start_new_session=True, **SILENT)
        if number:
            time.sleep(3 + 6 * dice.random())
        else:
            wait_until(lambda: (folder / 'milvus.db/collections/chunks').exists(), 60)
            time.sleep(2 * dice.random())
        if process.poll() is None:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not has_server(folder / 'milvus.db'), 60)
    run(*command, folder=folder)
    assert rows_of(folder) == rows_of(populated)
    assert segments(folder) == segments(populated)
    assert kills >= 3


STRICT = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
import grpc
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from milvus_lite.db import MilvusLite
from pymilvus.grpc_gen.milvus_pb2_grpc import add_MilvusServiceServicer_to_server
from retrieval.knowledge_base import connect
os.mkdir('kb.db')
server = grpc.server(ThreadPoolExecutor(2))
add_MilvusServiceServicer_to_server(MilvusServicer(MilvusLite('kb.db')), server)
server.add_insecure_port('unix:socket')
server.start()
client, states = connect('unix:socket', 'kb.db', '', 10), []
client._get_connection()._channel.subscribe(lambda state: states.append(state.name))
time.sleep(170)
assert client.list_collections() == []
print(states, flush=True)
os._exit(0)
"""


def test_a_client_that_embeds_for_minutes_is_not_sent_away_by_a_server_that_counts_pings(tmp_path):
    """As gRPC's servers do by default: pymilvus' client was told too_many_pings after 140 s."""
    answer = run('-c', STRICT, folder=tmp_path, env=dict(GRPC_VERBOSITY='error'))
    assert answer.stdout == "['READY']\n" and 'too_many_pings' not in answer.stderr


def test_a_local_file_is_shared_through_many_kills(workspace):
    """Trainings come and are killed, at any time, also those that started the server; one goes on through all of it."""
    options = [*LONG, '--max_iters=4000', '--eval_interval=4000']
    dice, others = random.Random(2), [Run(*options, '--out_dir=first', folder=workspace, stdout=subprocess.DEVNULL)]
    lasting = Run(*options, '--out_dir=lasting', folder=workspace)
    for number in range(12):
        others.append(Run(*options, f'--out_dir=other{number}', folder=workspace, stdout=subprocess.DEVNULL))
        time.sleep(8 * dice.random())
        if len(others) > 2:
            victim = others.pop(dice.randrange(len(others)))
            assert victim.process.poll() is None
            victim.kill()
    assert lasting.process.poll() is None
    for other in others:
        other.kill()
    assert lasting.end(600) == 0, lasting.said
    run(ROOT / 'train.py', *options, '--out_dir=alone', folder=workspace, timeout=600)
    assert losses(workspace, 'lasting') == losses(workspace, 'alone')
    wait_until(lambda: not has_server(workspace / 'milvus.db'))


def test_training_compiled_by_inductor_has_the_losses_of_a_training_that_is_not_and_resumes_to_its_own(workspace):
    if why_not_compile('cpu'):
        pytest.skip(why_not_compile('cpu'))
    for name, options in (('eager', []), ('compiled', ['--compile=True'])):
        answer = run(ROOT / 'train.py', 'config.py', *options, f'--out_dir={name}', folder=workspace, timeout=600)
        assert 'running without torch.compile' not in answer.stdout
    run(ROOT / 'train.py', 'config.py', '--compile=True', '--max_iters=4', '--lr_decay_iters=8', '--out_dir=parts',
        folder=workspace, timeout=600)
    run(ROOT / 'train.py', 'config.py', '--compile=True', '--init_from=resume', '--out_dir=parts', folder=workspace,
        timeout=600)
    eager, compiled, parts = (losses(workspace, name) for name in ('eager', 'compiled', 'parts'))
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4) and compiled[0] == pytest.approx(parts[0], rel=1e-6)
    for step, values in eager[1].items():
        assert compiled[1][step] == pytest.approx(values, rel=1e-4)


def test_the_gpu_bench_runs_as_a_command(tmp_path):
    run(ROOT / 'bench/gpu.py', '--device=cpu', '--quick', folder=tmp_path, timeout=900)
    assert json.loads((tmp_path / 'gpu.json').read_text())['masks'] == 'no change'


def talk(served, number):
    """Ask for a text, as one of 200 clients: every other one goes away halfway. Status and text, or None."""
    body = dict(prompt=START * (1 + number % 3), max_tokens=48, seed=number % 20, temperature=1,
                retrieval='off' if number % 4 < 2 else 'on', stream=number % 2 == 1)
    connection = http.client.HTTPConnection('127.0.0.1', served.port, timeout=120)
    connection.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
    answer = connection.getresponse()
    if answer.status == 200 and number % 2:
        for _ in range(12):
            answer.readline()
        connection.close()
        return None
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found['choices'][0]['text'] if answer.status == 200 else found['error']['code']


@pytest.mark.skipif(bool(why_not()), reason=f'no real Milvus server: {why_not()}')
def test_200_clients_of_which_half_go_away_get_right_texts_or_errors_while_milvus_dies_and_returns(prepared, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(prepared, folder)
    with MilvusServer(tmp_path / 'milvus') as milvus:
        uri = f'--retrieval_milvus_uri={milvus.uri}'
        run('-m', 'retrieval.populate', 'config.py', uri, folder=folder)
        run(ROOT / 'train.py', 'config.py', uri, '--max_iters=4', folder=folder)
        with serve(folder, uri, '--queue=256') as served:
            expected = {n: talk(served, n) for n in range(0, 60, 2)}
            assert all(status == 200 for status, _ in expected.values())

            def talk_all():
                with ThreadPoolExecutor(200) as pool:
                    return list(enumerate(pool.map(lambda n: talk(served, n), range(200))))
            sizes, away = [], (503, 'knowledge_base_away')
            for _ in range(4):
                killer = threading.Timer(1.5, milvus.kill)
                killer.start()
                answers = [(n, answer) for n, answer in talk_all() if answer]
                killer.join()
                for n, (status, text) in answers:
                    # what reads nothing needs no database
                    assert (status, text) == (expected[n % 60] if status == 200 or n % 4 < 2 else away)
                assert any(status == 503 for _, (status, _) in answers)
                assert talk(served, 2) == away and talk(served, 0) == expected[0]
                milvus.start()
                wait_until(lambda: talk(served, 2) == expected[2], 60)
                # a server that has just started may be away once more
                assert all(answer in (None, away, expected.get(n % 60)) for n, answer in talk_all())
                wait_until(lambda: talk(served, 2) == expected[2], 60)
                wait_until(lambda: served.metric('running_rows') == served.metric('waiting_rows') == 0)
                status = Path(f'/proc/{served.process.pid}/status').read_text()
                sizes.append([int(status.split(f'{name}:')[1].split()[0]) for name in ('VmRSS', 'Threads')]
                             + [len(os.listdir(f'/proc/{served.process.pid}/fd'))])
            (first, threads, files), (last, *others) = sizes[0], sizes[-1]
            assert last - first < 30_000, f'memory, threads and files: {sizes}'
            assert others[0] <= threads + 2 and others[1] <= files + 4, sizes
            assert 'Traceback' not in served.log.read_text()
            assert served.end() == 0


@pytest.mark.skipif('NANORETRO_MPNET' not in os.environ, reason='NANORETRO_MPNET names no folder of all-mpnet-base-v2')
def test_the_default_embedding_model_the_gpt2_encoding_and_the_default_model_size_work_together(tmp_path):
    """The mission's defaults, as a user has them, on two PEPs."""
    import gzip
    with gzip.open(SHARED / 'data/peps.jsonl.gz', 'rt') as file:
        lines = [file.readline() for _ in range(3)]
    (tmp_path / 'mine.jsonl').write_text(''.join(lines[:2]))
    (tmp_path / 'val.jsonl').write_text(lines[2])
    (tmp_path / 'mine.py').write_text(f'''
train_datasets, val_datasets = ['mine.jsonl'], ['val.jsonl']
retrieval_embedding_model = {str(Path(os.environ['NANORETRO_MPNET']).resolve())!r}
batch_size, gradient_accumulation_steps = 1, 1
eval_interval, eval_tokens, max_iters, log_interval, warmup_iters = 2, 1024, 2, 1, 1
compile, device = False, 'cpu'
''')
    run('-m', 'retrieval.populate', 'mine.py', folder=tmp_path, timeout=900)
    answer = run(ROOT / 'train.py', 'mine.py', folder=tmp_path, timeout=900)
    assert 'RETRO of 1' in answer.stdout and set(losses(tmp_path)[0]) == {1, 2}
    assert sum(line.get('chunks_looked_up', 0) for line in metrics(tmp_path)) > 0
    answer = run(ROOT / 'sample.py', '--out_dir=out', '--start=FILE:mine.py', '--max_new_tokens=4', '--show_neighbors',
                 folder=tmp_path, timeout=900)
    assert 'similarity' in answer.stdout
