"""What can go wrong in the middle of a run: Milvus goes away, for a while or for good; Ctrl-C; a killed process."""
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest

from configurator import UserError, load_settings
from data.tokenizer import load_tokenizer
from retrieval.knowledge_base import KnowledgeBase, Metadata, connect
from retrieval.loader import Loader
from tests.conftest import ROOT, has_server, run, spawn, wait_until
from tests.test_populate import rows_of
from tests.test_train import losses, metrics
from training.checkpoint import load_checkpoint

# many small steps with few batches ready, so that what happens at one of them happens before the last is fetched
LONG = ['config.py', '--max_iters=40', '--eval_interval=20', '--dropout=0.1',
        '--gradient_accumulation_steps=1', '--retrieval_prefetch_batches=2', '--retrieval_cache_gb=0']


@pytest.fixture(scope='module')
def undisturbed(server, prepared, tmp_path_factory):
    """A folder with an undisturbed run of LONG from the server in `whole`."""
    folder = tmp_path_factory.mktemp('faults') / 'run'
    shutil.copytree(prepared, folder)
    for command in (['-m', 'retrieval.populate', 'config.py'], [ROOT / 'train.py', *LONG, '--out_dir=whole']):
        run(*command, *at(server), folder=folder)
    return folder


def at(server):
    """Settings for it. The index is exact: another one is built in the background, and the answers change then."""
    return [f'--retrieval_milvus_uri={server.uri}', '--retrieval_index=FLAT', '--train_datasets=["val.parquet"]',
            '--retrieval_collection=faults']


class Run:
    """train.py as a command, whose output can be waited for. It has a session of its own, as under a terminal."""

    def __init__(self, *arguments, folder, **options):
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) | options
        self.process = spawn(ROOT / 'train.py', *arguments, folder=folder, **options)
        self.said = ''

    def until(self, text):
        """Read its output up to the line that holds the text. A run that hangs fails, and doesn't hang the tests."""
        watchdog = threading.Timer(200, self.process.kill)
        watchdog.start()
        for line in self.process.stdout:
            self.said += line
            if text in line:
                watchdog.cancel()
                return
        raise AssertionError(f'{text!r} was not said:\n{self.said}')

    def end(self, timeout=120):
        """Its exit code."""
        self.said += self.process.communicate(timeout=timeout)[0] or ''
        return self.process.returncode

    def kill(self):
        self.process.kill()
        self.process.wait()

    def processes(self):
        return alive(self.process.pid)


def alive(session):
    """The processes of a session that are alive."""
    answer = subprocess.run(['ps', '-s', str(session), '-o', 'pid=,stat='], capture_output=True, text=True)
    return [line for line in answer.stdout.splitlines() if not line.split()[1].startswith('Z')]


@pytest.mark.slow
def test_training_waits_for_a_server_that_was_killed_and_goes_on_as_if_nothing_had_been(server, undisturbed):
    disturbed = Run(*LONG, *at(server), '--out_dir=disturbed', '--retrieval_workers=2', folder=undisturbed)
    disturbed.until('step 10:')
    server.kill()
    try:
        disturbed.until('waiting for Milvus: ')
        time.sleep(3)
    finally:
        server.start()
    assert disturbed.end() == 0, disturbed.said
    assert 's of at most 600 s' in disturbed.said and 'Milvus is back after ' in disturbed.said
    assert losses(undisturbed, 'disturbed') == losses(undisturbed, 'whole')


class Together:
    """Relays connections to a server, and holds its answers to searches back until two connections have sent one."""

    def __init__(self, port):
        self.port, self.both = port, threading.Barrier(2, timeout=30)
        self.listener = socket.create_server(('127.0.0.1', 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):  # the test is over
            while True:
                client, has_searched = self.listener.accept()[0], threading.Event()
                server = socket.create_connection(('127.0.0.1', self.port))
                threading.Thread(target=self.ask, args=(client, server, has_searched), daemon=True).start()
                threading.Thread(target=self.answer, args=(server, client, has_searched), daemon=True).start()

    def ask(self, client, server, has_searched):
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if len(data) > 6000:  # vectors: no other request is as long
                    has_searched.set()
                server.sendall(data)

    def answer(self, server, client, has_searched):
        is_first = True
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                if has_searched.is_set() and is_first:
                    is_first = False
                    with contextlib.suppress(threading.BrokenBarrierError):  # the test sees it
                        self.both.wait()
                client.sendall(data)


@pytest.mark.slow
@pytest.mark.parametrize('ranks, workers', [(2, 1), (1, 2)])
def test_searches_of_several_ranks_and_workers_are_in_flight_together_on_a_server(server, undisturbed, monkeypatch,
                                                                                   ranks, workers):
    monkeypatch.chdir(undisturbed)
    relay = Together(server.port)
    settings = load_settings(['config.py', *at(server), f'--retrieval_milvus_uri=http://127.0.0.1:'
                              f'{relay.listener.getsockname()[1]}', f'--retrieval_workers={workers}',
                              '--retrieval_pointers=0', '--retrieval_cache_gb=0', '--batch_size=16',
                              '--retrieval_prefetch_batches=1'])
    loaders = [Loader(settings, dict(batch_size=16, step_size=16 * ranks, first=16 * rank, count=16), 2)
               for rank in range(ranks)]
    found = [batch for loader in loaders for batch in loader]
    for loader in loaders:
        loader.close()
    relay.listener.close()
    assert not relay.both.broken and len(found) == 2 * ranks and all(b.neighbor_mask.any() for b in found)


@pytest.mark.slow
def test_a_server_that_stays_dead_ends_the_run_with_a_checkpoint_to_resume_from(server, undisturbed):
    broken = Run(*LONG, *at(server), '--out_dir=broken', '--retrieval_timeout=3', folder=undisturbed)
    broken.until('step 10:')
    server.kill()
    code = broken.end()
    server.start()
    assert code == 3, broken.said
    assert 'error: waited ' in broken.said and 'retrieval_timeout is 3: no Milvus answers at' in broken.said
    saved = load_checkpoint(undisturbed / 'broken').step
    assert 10 <= saved < 40
    newest = f'the newest checkpoint is broken/checkpoints/step-{saved}; resume from it with --init_from=resume'
    assert newest in broken.said
    assert not broken.processes()
    run(ROOT / 'train.py', *LONG, *at(server), '--out_dir=broken', '--init_from=resume', folder=undisturbed)
    assert losses(undisturbed, 'broken') == losses(undisturbed, 'whole')


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_leaves_no_process(workspace):
    stopped = Run(*LONG, '--out_dir=stopped', '--retrieval_workers=2', folder=workspace)
    stopped.until('step 10:')
    commands = subprocess.run(['ps', '-ww', '-s', str(stopped.process.pid), '-o', 'args='], capture_output=True,
                              text=True)
    assert 'spawn_main' in commands.stdout and has_server(workspace / 'milvus.db')
    os.killpg(stopped.process.pid, signal.SIGINT)  # as a terminal does
    assert stopped.end() == 130, stopped.said
    assert 'Traceback' not in stopped.said and 'stopping with a checkpoint' in stopped.said
    assert 10 <= load_checkpoint(workspace / 'stopped').step < 40
    wait_until(lambda: not stopped.processes())
    wait_until(lambda: not has_server(workspace / 'milvus.db'))
    run(ROOT / 'train.py', *LONG, '--out_dir=whole', folder=workspace)
    run(ROOT / 'train.py', *LONG, '--out_dir=stopped', '--init_from=resume', folder=workspace)
    assert losses(workspace, 'stopped') == losses(workspace, 'whole')


@pytest.mark.slow
def test_a_killed_run_leaves_no_process(workspace):
    killed = Run(*LONG, '--retrieval_workers=2', folder=workspace)
    killed.until('step 10:')
    killed.kill()
    wait_until(lambda: not killed.processes())
    wait_until(lambda: not has_server(workspace / 'milvus.db'))


@pytest.mark.slow
def test_a_filling_that_is_killed_leaves_no_process(prepared, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(prepared, folder)
    process = spawn('-m', 'retrieval.populate', 'config.py', folder=folder, start_new_session=True)
    wait_until(lambda: (folder / 'milvus.db/collections/chunks').exists(), 60)
    process.kill()
    process.wait()
    wait_until(lambda: not alive(process.pid))
    wait_until(lambda: not has_server(folder / 'milvus.db'))


def test_one_rank_that_stops_stops_all_with_a_checkpoint(workspace):
    process = spawn('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'train.py', *LONG,
                    '--gradient_accumulation_steps=2', folder=workspace, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT)
    said = ''
    for line in process.stdout:
        said += line
        if 'step 10:' in line:
            break
    ranks = subprocess.run(['ps', '--ppid', str(process.pid), '-o', 'pid='], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[0]), signal.SIGINT)
    said += process.communicate(timeout=120)[0]
    saved = load_checkpoint(workspace / 'out')
    assert 10 <= saved.step < 40 and saved.world_size == 2
    assert f'the newest checkpoint is out/checkpoints/step-{saved.step}' in said


@pytest.mark.slow
def test_a_stop_during_an_evaluation_loses_nothing_and_the_evaluation_is_made_up_for(workspace):
    """It is of many sequences, one at a time."""
    options = ['config.py', '--max_iters=12', '--eval_interval=6', '--batch_size=1', '--dropout=0.1',
               '--eval_tokens=20000', '--val_datasets=["train.parquet"]', '--gradient_accumulation_steps=2',
               '--use_retrieval=False']
    stopped = Run(*options, '--out_dir=stopped', folder=workspace)
    stopped.until('step 6: loss')
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.end() == 128 + signal.SIGTERM, stopped.said
    assert load_checkpoint(workspace / 'stopped').step == 6
    assert [line['iter'] for line in metrics(workspace, 'stopped') if 'val_loss_off' in line] == [0]
    run(ROOT / 'train.py', *options, '--out_dir=stopped', '--init_from=resume', folder=workspace)
    run(ROOT / 'train.py', *options, '--out_dir=whole', folder=workspace)
    assert losses(workspace, 'stopped') == losses(workspace, 'whole')


SHORT = ['config.py', '--use_retrieval=False', '--eval_interval=1000000', '--max_iters=1000000']


def test_a_terminal_that_is_closed_ends_a_run_with_a_checkpoint(workspace):
    """A real one: the system sends SIGHUP, and all output fails from then on."""
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))

    def take_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    closed = Run(*SHORT, folder=workspace, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=False,
                 preexec_fn=take_terminal, pass_fds=[terminal])
    os.close(terminal)
    said = b''
    while not re.search(rb'[1-9]\d+/1000000', said):  # the progress bar
        said += os.read(master, 1000)
    os.close(master)
    assert closed.end() == 128 + signal.SIGHUP
    assert load_checkpoint(workspace / 'out').step >= 10


def test_nohup_is_heeded_and_a_closed_pipe_loses_nothing(workspace):
    going = Run(*SHORT, folder=workspace, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    going.until('step 5:')
    going.process.send_signal(signal.SIGHUP)
    going.until('step 10:')
    going.process.stdout.close()  # as Ctrl-C ends tee, too
    time.sleep(1)
    going.process.send_signal(signal.SIGINT)
    assert going.process.wait(60) == 130
    assert load_checkpoint(workspace / 'out').step >= 10


def test_two_runs_do_not_share_an_out_dir(workspace):
    endless = [*LONG, '--max_iters=1000000', '--use_retrieval=False']
    first = Run(*endless, folder=workspace)
    first.until('step 22:')  # there is a checkpoint
    for options in ([], ['--init_from=resume']):
        answer = run(ROOT / 'train.py', *endless, *options, folder=workspace, check=False)
        assert answer.returncode == 2 and answer.stderr.count('\n') == 1
        assert f"another run (process {first.process.pid}) is writing to out_dir 'out'" in answer.stderr
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 130, first.said
    steps = [line['iter'] for line in metrics(workspace) if 'loss' in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 22
    assert not (workspace / 'out/previous-1').exists()


def test_training_sampling_evaluating_filling_and_a_second_training_use_one_local_file_at_once(workspace):
    run(ROOT / 'train.py', 'config.py', '--out_dir=before', '--max_iters=2', folder=workspace)
    first = Run(*LONG, '--max_iters=1000000', '--eval_interval=1000000', folder=workspace)
    first.until('step 2:')
    second = Run(*LONG, '--out_dir=second', folder=workspace)
    sampled = run(ROOT / 'sample.py', '--out_dir=before', f'--start={"import os, sys" * 20}', '--show_neighbors',
                  '--max_new_tokens=4', folder=workspace)
    assert 'similarity' in sampled.stdout
    run('-m', 'evaluation', '--out_dir=before', '--max_tokens=500', folder=workspace)
    run('-m', 'retrieval.populate', 'config.py', folder=workspace)
    assert second.end() == 0, second.said
    assert first.process.poll() is None, first.said  # all of it beside the first
    first.kill()  # who started the server, maybe
    wait_until(lambda: not has_server(workspace / 'milvus.db'))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(workspace):
    common = ['config.py', '--use_retrieval=False', '--grad_clip=0.0', '--eval_interval=2', '--warmup_iters=0']
    run(ROOT / 'train.py', *common, '--max_iters=4', folder=workspace)
    good = (workspace / 'out/checkpoints/step-4/model.safetensors').read_bytes()
    answer = run(ROOT / 'train.py', *common, '--max_iters=40', '--learning_rate=1e20', '--decay_lr=False',
                 '--init_from=resume', folder=workspace, check=False)
    assert answer.returncode == 4 and answer.stderr.count('\n') == 1, answer.stderr
    assert 'error: loss is nan' in answer.stderr and 'lower learning_rate' in answer.stderr
    assert (workspace / 'out/checkpoints/step-4/model.safetensors').read_bytes() == good
    assert 'the newest checkpoint is out/checkpoints/step-' in answer.stdout
    for line in (workspace / 'out/metrics.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    run(ROOT / 'train.py', *common, '--max_iters=6', '--init_from=resume', folder=workspace)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_and_no_partial_one(workspace):
    """By a limit on the size of files, which fails writes as a full disk does."""
    common = ['config.py', '--use_retrieval=False', '--eval_interval=4']
    run(ROOT / 'train.py', *common, '--max_iters=4', folder=workspace)
    command = ' '.join(map(str, ['ulimit -f 200;', sys.executable, ROOT / 'train.py', *common, '--max_iters=8',
                                 '--init_from=resume']))
    answer = subprocess.run(['bash', '-c', command], cwd=workspace, capture_output=True, text=True)
    assert answer.returncode == 2, answer.stderr
    error, = [line for line in answer.stderr.splitlines() if line.startswith('error: ')]
    assert 'the checkpoint of step 8 could not be written to out/checkpoints (' in error and 'make room there' in error
    assert 'Traceback' not in answer.stderr and 'the newest checkpoint is of step 4' in error
    assert sorted(path.name for path in (workspace / 'out/checkpoints').iterdir()) == ['latest', 'step-4']
    run(ROOT / 'train.py', *common, '--max_iters=8', '--init_from=resume', folder=workspace)


@pytest.mark.slow
def test_an_exception_in_a_step_still_saves_the_last_finished_one(workspace, tmp_path):
    """Out of memory at step 6, by a model that raises it."""
    (tmp_path / 'sitecustomize.py').write_text('''
calls = 0
def failing(self, *args, **kwargs):
    global calls
    calls += self.training
    if calls > 10:
        raise RuntimeError('out of memory')
    return forward(self, *args, **kwargs)
try:
    import model
    forward, model.RETRO.forward = model.RETRO.forward, failing
except ImportError:
    pass  # a helper process of Python's
''')
    options = ['config.py', '--use_retrieval=False', '--eval_interval=100', '--dropout=0.1', '--max_iters=9']
    answer = subprocess.run([sys.executable, str(ROOT / 'train.py'), *options], cwd=workspace, capture_output=True,
                            text=True, env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{ROOT}'})
    assert answer.returncode == 1 and 'RuntimeError: out of memory' in answer.stderr
    assert 'the newest checkpoint is out/checkpoints/step-5' in answer.stdout
    run(ROOT / 'train.py', *options, '--init_from=resume', folder=workspace)
    run(ROOT / 'train.py', *options, '--out_dir=whole', folder=workspace)
    assert losses(workspace) == losses(workspace, 'whole')


@pytest.mark.slow
def test_filling_follows_changed_emptied_and_removed_documents_on_a_server_too(server, prepared, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(prepared, folder)

    def fill(*rows):
        (folder / 'docs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        return run('-m', 'retrieval.populate', 'config.py', f'--retrieval_milvus_uri={server.uri}', '--sync=True',
                   '--retrieval_index=FLAT', '--retrieval_collection=follows', '--train_datasets=["docs.jsonl"]',
                   folder=folder).stdout
    text = 'def f(x):\n    return x\n' * 30
    fill(*(dict(id=name, text=text + name) for name in 'abcd'))
    said = fill(dict(id='a', text=text + 'a'), dict(id='b', text='short'), dict(id='c', text=''),
                dict(id='e', text='new'))
    assert '2 of them written now, 2 changed documents' in said and 'chunks of 1 documents that train_dat' in said
    said = fill(dict(id='e', text='new'), dict(id='b', text='short'), dict(id='a', text=text + 'a'))
    assert ', 0 of them written now, 0 changed' in said and 'removed: 0 chunks' in said


@pytest.mark.slow
def test_a_server_imports_the_rows_that_a_local_file_holds_and_is_not_asked_for_what_its_version_lacks(
        server, workspace, settings):
    for change, said in ((dict(index='IVF_RABITQ'), "'IVF_RABITQ' needs a Milvus server from version 2.6 on, and"),
                         (dict(vectors='float16'), "'float16' need a Milvus server from version 2.4 on, and")):
        metadata = Metadata(**dict(tokenizer='t', vocabulary_hash='v', chunk_size=4, embedding_model='m',
                                   embedding_hash='e', dimension=8, index='auto') | change)
        with pytest.raises(UserError, match=said):
            KnowledgeBase(server.uri, '', 'new', metadata, create=True)
    fill = ['-m', 'retrieval.populate', 'config.py', f'--retrieval_milvus_uri={server.uri}', '--bulk=True',
            '--retrieval_collection=imported']
    answer = run(*fill, folder=workspace, check=False)
    assert answer.returncode == 2 and '--bulk=True needs retrieval_bulk_dir: a folder that' in answer.stderr
    fill.append(f'--retrieval_bulk_dir={workspace}/bulk')
    tokenizer = load_tokenizer(settings.tokenizer)
    expected = rows_of(settings, tokenizer)
    assert f'{len(expected):,} chunks, {len(expected):,} of them' in run(*fill, folder=workspace).stdout
    assert not list((workspace / 'bulk').iterdir())
    assert f'{len(expected):,} chunks, 0 of them' in run(*fill, folder=workspace).stdout
    found = rows_of(settings.replace(retrieval_milvus_uri=server.uri, retrieval_collection='imported'), tokenizer)
    vectors = [np.array([rows[row_id].pop('embedding') for row_id in sorted(rows)]) for rows in (expected, found)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    for row in [*expected.values(), *found.values()]:
        row['tokens'] = list(row['tokens'])
    assert found == expected


@pytest.mark.slow
def test_a_collection_that_is_dropped_while_it_is_filled_is_one_clear_line(server, prepared, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(prepared, folder)
    process = spawn('-m', 'retrieval.populate', 'config.py', f'--retrieval_milvus_uri={server.uri}',
                    '--retrieval_collection=dropped', folder=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    client = connect(server.uri, server.uri, '', 60)
    wait_until(lambda: client.has_collection('dropped'), 60)
    client.drop_collection('dropped')
    _, said = process.communicate(timeout=60)
    client.close()
    assert process.returncode == 2 and said.startswith('error: ') and said.count('\n') == 1
    assert "collection 'dropped'" in said and 'was dropped' in said
def test_a_server_that_cannot_search_by_words_is_refused_by_its_version(server, prepared):
    options = ['config.py', f'--retrieval_milvus_uri={server.uri}', '--retrieval_mode=bm25']
    for command in (['-m', 'retrieval.populate'], [ROOT / 'train.py']):
        answer = run(*command, *options, folder=prepared, check=False)
        assert answer.returncode == 2 and answer.stderr.count('\n') == 1, answer.stderr
        assert "is version v2.3.5-lite, and retrieval_mode 'bm25' searches by words, which" in answer.stderr
        assert 'servers do from 2.5 on: use a newer server or a local file' in answer.stderr
