"""What can go wrong in the middle of a run: Milvus goes away, for a while or for good; Ctrl-C; a killed process."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from bench.milvus_server import MilvusServer, why_not
from tests.conftest import ROOT, run
from tests.test_train import losses
from training.checkpoint import load_checkpoint

# many small steps with few batches ready, so that what happens at one of them happens before the last is fetched
LONG = ['config.py', '--max_iters=40', '--lr_decay_iters=40', '--eval_interval=20', '--dropout=0.1',
        '--gradient_accumulation_steps=1', '--retrieval_prefetch_batches=2', '--retrieval_cache_gb=0']


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """A real Milvus server."""
    if why_not():
        pytest.skip(f'no real Milvus server: {why_not()}')
    with MilvusServer(tmp_path_factory.mktemp('server')) as started:
        yield started


@pytest.fixture(scope='module')
def undisturbed(server, prepared, tmp_path_factory):
    """A folder with an undisturbed run of LONG from the server in `whole`."""
    import shutil
    folder = tmp_path_factory.mktemp('faults') / 'run'
    shutil.copytree(prepared, folder)
    for command in (['-m', 'retrieval.populate', 'config.py'], [ROOT / 'train.py', *LONG, '--out_dir=whole']):
        run(*command, *at(server), folder=folder)
    return folder


def at(server):
    """Settings for it. The index is exact: another one is built in the background, and the answers change then."""
    return [f'--retrieval_milvus_uri={server.uri}', '--retrieval_index=FLAT', '--train_datasets=["val.parquet"]']


class Run:
    """train.py as a command, whose output can be waited for. It has a session of its own, as under a terminal."""

    def __init__(self, *arguments, folder):
        self.process = subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *map(str, arguments)], cwd=folder,
                                        env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        self.said = ''
        self.watchdog = threading.Timer(200, self.process.kill)  # a run that hangs fails, and doesn't hang the tests
        self.watchdog.start()

    def until(self, text):
        """Read its output up to the line that holds the text."""
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        raise AssertionError(f'{text!r} was not said:\n{self.said}')

    def end(self):
        """Its exit code."""
        self.said += self.process.communicate(timeout=120)[0]
        self.watchdog.cancel()
        return self.process.returncode

    def processes(self):
        """The processes of its session that are alive."""
        answer = subprocess.run(['ps', '-s', str(self.process.pid), '-o', 'pid=,stat='], capture_output=True, text=True)
        return [line for line in answer.stdout.splitlines() if not line.split()[1].startswith('Z')]


def test_training_waits_for_a_server_that_was_killed_and_goes_on_as_if_nothing_had_been(server, undisturbed):
    disturbed = Run(*LONG, *at(server), '--out_dir=disturbed', folder=undisturbed)
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
    assert f'saved a checkpoint at step {saved} in broken; resume from it with --init_from=resume' in broken.said
    assert not broken.processes()
    run(ROOT / 'train.py', *LONG, *at(server), '--out_dir=broken', '--init_from=resume', folder=undisturbed)
    assert losses(undisturbed, 'broken') == losses(undisturbed, 'whole')


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_leaves_no_process(workspace):
    stopped = Run(*LONG, '--out_dir=stopped', folder=workspace)
    stopped.until('step 10:')
    commands = subprocess.run(['ps', '-ww', '-s', str(stopped.process.pid), '-o', 'args='], capture_output=True,
                              text=True)
    assert 'retrieval.local_server' in commands.stdout and 'spawn_main' in commands.stdout
    os.killpg(stopped.process.pid, signal.SIGINT)  # as a terminal does
    assert stopped.end() == 130, stopped.said
    assert 'Traceback' not in stopped.said and 'stopping with a checkpoint' in stopped.said
    assert 10 <= load_checkpoint(workspace / 'stopped').step < 40
    assert not stopped.processes()
    run(ROOT / 'train.py', *LONG, '--out_dir=whole', folder=workspace)
    run(ROOT / 'train.py', *LONG, '--out_dir=stopped', '--init_from=resume', folder=workspace)
    assert losses(workspace, 'stopped') == losses(workspace, 'whole')


def test_a_killed_run_leaves_no_process(workspace):
    killed = Run(*LONG, folder=workspace)
    killed.until('step 10:')
    killed.process.kill()
    killed.process.wait()
    killed.watchdog.cancel()
    deadline = time.time() + 20
    while killed.processes() and time.time() < deadline:
        time.sleep(0.1)
    assert not killed.processes()
    killed.process.stdout.close()


def test_one_rank_that_stops_stops_all_with_a_checkpoint(workspace):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               str(ROOT / 'train.py'), *LONG, '--gradient_accumulation_steps=2']
    process = subprocess.Popen(command, cwd=workspace, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
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
    assert f'saved a checkpoint at step {saved.step}' in said
