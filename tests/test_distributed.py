"""The ranks of a run, from the launcher's environment, and the signals that stop them."""
import os
import signal
from contextlib import ExitStack

import pytest

import training.distributed
from configurator import UserError, load_settings
from tests.conftest import ROOT, run
from training.distributed import LAUNCHER, Stopped, StopSignals, find_ranks, share_of_step

WHOLE = dict(RANK='1', WORLD_SIZE='4', LOCAL_RANK='1', LOCAL_WORLD_SIZE='2')


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    ranks = find_ranks(load_settings(['--device=cpu']))
    assert (ranks.rank, ranks.world_size, ranks.device) == (0, 1, 'cpu') and ranks.is_master
    assert ranks.gather(5) == [5] and ranks.broadcast(6) == 6 and ranks.gather_numbers(7, 8).tolist() == [[7, 8]]


def test_a_launchers_environment_is_read(monkeypatch):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    ranks = find_ranks(load_settings(['--device=cpu']))
    assert (ranks.rank, ranks.world_size, ranks.local_world_size) == (1, 4, 2) and not ranks.is_master


@pytest.mark.parametrize('found', [
    dict(WORLD_SIZE='4'), dict(RANK='0'), dict(LOCAL_RANK='0'), {**WHOLE, 'RANK': '4'}, {**WHOLE, 'RANK': 'one'},
    {**WHOLE, 'RANK': '-1'}, {**WHOLE, 'LOCAL_RANK': '2'}, {**WHOLE, 'LOCAL_WORLD_SIZE': '8'}, {**WHOLE, 'RANK': ''},
    {key: value for key, value in WHOLE.items() if key != 'LOCAL_WORLD_SIZE'}])
def test_an_environment_that_is_half_set_is_refused_with_what_it_holds(monkeypatch, found):
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the launcher's environment is incomplete or contradictory") as error:
        find_ranks(load_settings(['--device=cpu']))
    assert all(f'{name}={value}' in str(error.value) for name, value in found.items())


@pytest.mark.parametrize('env, said', [
    (dict(WORLD_SIZE='4'), "the launcher's environment is incomplete"),
    (WHOLE, "the launcher's environment is incomplete"),  # no master's address
    ({**WHOLE, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': 'abc'}, 'the processes cannot be joined (MASTER_ADDR=127'),
    ({**WHOLE, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '99999'}, 'the processes cannot be joined (MASTER_ADDR=127'),
    ])
def test_it_is_one_line_of_the_command(workspace, env, said):
    answer = run(ROOT / 'train.py', 'config.py', '--use_retrieval=False', '--gradient_accumulation_steps=4',
                 folder=workspace, env=env, check=False)
    assert answer.returncode == 2 and answer.stderr.startswith('error: ') and said in answer.stderr
    assert answer.stderr.count('\n') == 1


def test_an_unknown_backend_is_refused_with_one_process_too():
    with pytest.raises(UserError, match="backend 'foo' is none of 'auto', "):
        find_ranks(load_settings(['--device=cpu', '--backend=foo']))


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(training.distributed, 'pick_device', lambda device: device)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert find_ranks(load_settings(['--device=cuda'])).device == 'cuda:1'
    with pytest.raises(UserError, match="'cuda:3' is one GPU, and each of the 4 processes"):
        find_ranks(load_settings(['--device=cuda:3']))


@pytest.mark.parametrize('world_size, accumulation, batch_size, share', [
    (1, 4, 3, (4, 3)), (2, 4, 3, (2, 3)), (4, 4, 3, (1, 3)), (4, 2, 4, (1, 2)), (8, 2, 4, (1, 1)),
    (3, 4, 3, None), (4, 2, 3, None), (8, 2, 2, None)])
def test_ranks_share_a_step_evenly_or_not_at_all(monkeypatch, world_size, accumulation, batch_size, share):
    settings = load_settings([f'--gradient_accumulation_steps={accumulation}', f'--batch_size={batch_size}'])
    ranks = find_ranks(settings)
    ranks.world_size = world_size
    if share:
        assert share_of_step(settings, ranks) == share
    else:
        with pytest.raises(UserError, match='cannot be shared by'):
            share_of_step(settings, ranks)


def test_any_signal_asks_once_and_only_a_second_ctrl_c_interrupts_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with ExitStack() as cleanup:
        signals = StopSignals(cleanup)
        signals.check()
        os.kill(os.getpid(), signal.SIGINT)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # a launcher, to be sure
            os.kill(os.getpid(), number)
        assert signals.received[0] == signal.SIGINT
        with pytest.raises(Stopped):
            signals.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
