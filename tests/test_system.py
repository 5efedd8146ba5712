"""What the machine has, and what is refused where it has not."""
import os
import subprocess
import sys

from system import pick_device, pick_dtype

import pytest
import torch

from configurator import UserError
from tests.conftest import ROOT, run


@pytest.mark.parametrize('device', ['gpu', 'mps', 'cuda:', 'cuda:x', 'CUDA', '', 'cpu:0'])
def test_an_unknown_device_is_refused_with_the_known_ones(device):
    with pytest.raises(UserError, match="is none of 'auto', 'cpu', 'cuda', 'cuda:1'"):
        pick_device(device)


@pytest.mark.parametrize('device', ['cuda', 'cuda:7'])
def test_a_gpu_that_is_not_here_is_named(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match=f"device '{device}' is not here: torch finds no GPUs"):
        pick_device(device)


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="'float16' takes minutes"):
        pick_dtype('float16', 'cpu')


@pytest.mark.parametrize('arguments, said', [
    (['--device=gpu'], "device 'gpu' is none of"), (['--device=cuda:9'], "device 'cuda:9' is not here"),
    (['--device=mps'], "device 'mps' is none of"), (['--dtype=float16'], "dtype 'float16' takes minutes")])
@pytest.mark.parametrize('command', [[ROOT / 'train.py'], ['-m', 'retrieval.populate']])
def test_commands_refuse_it_in_one_line(workspace, command, arguments, said):
    if 'retrieval.populate' in command and 'dtype' in arguments[0]:
        pytest.skip('populate has no use for a dtype')
    answer = run(*command, 'config.py', *arguments, folder=workspace, check=False)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count('\n') == 1


@pytest.mark.slow
def test_without_a_compiler_a_run_says_so_and_goes_on(workspace, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    code = 'from system import why_not_compile; print(why_not_compile("cpu"))'
    answer = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == 'there is no C++ compiler; install g++, or set CXX\n'
    answer = subprocess.run([sys.executable, str(ROOT / 'train.py'), 'config.py', '--compile=True', '--max_iters=1',
                             '--use_retrieval=False'], cwd=workspace, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert answer.returncode == 0, answer.stderr
    assert 'running without torch.compile: there is no C++ compiler' in answer.stdout


@pytest.mark.parametrize('given, expected', [({}, 'None 10000'), (dict(OMP_WAIT_POLICY='ACTIVE'), 'ACTIVE None'),
                                             (dict(GOMP_SPINCOUNT='5'), 'None 5')])
def test_threads_spin_for_a_bounded_time_unless_the_user_has_said_otherwise(given, expected):
    code = 'import system, os; print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))'
    env = {key: value for key, value in os.environ.items() if key not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    answer = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env=env | given)
    assert answer.stdout.strip() == expected
