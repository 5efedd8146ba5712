"""Sharded training (FSDP2), activation checkpointing and runs on two nodes: the losses of one process, its files."""
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import make_batch, make_model, make_pointers
from configurator import UserError, load_settings
from tests.conftest import ROOT, run, run_ranks, spawn, wait_until
from tests.test_train import losses, metrics
from training.checkpoint import list_steps, load_checkpoint, load_run
from training.checks import check_settings
from training.distributed import Ranks
from training.parallel import check_parallel, checkpoint_blocks

TRAIN, SHARDED = ROOT / 'train.py', '--parallel=fsdp'
LONG = ['config.py', '--max_iters=20', '--eval_interval=10', '--keep_checkpoints=0', '--batch_size=2',
        '--gradient_accumulation_steps=4', '--retrieval_cache_gb=0']  # neighbors, pointers and an encoder


@pytest.fixture(scope='module')
def whole(populated, tmp_path_factory):
    """A folder with the same 20 steps by one process in `one`, and by two that share the model in `sharded`."""
    folder = tmp_path_factory.mktemp('parallel') / 'run'
    shutil.copytree(populated, folder)
    run(TRAIN, *LONG, '--out_dir=one', folder=folder)
    run_ranks(2, TRAIN, *LONG, SHARDED, '--out_dir=sharded', folder=folder)
    return folder


def resume(folder, ranks, source, out_dir, *options):
    """Go on from step 10 of a run; what it said."""
    shutil.copytree(folder / source, folder / out_dir)
    (folder / out_dir / 'checkpoints/latest').write_text('step-10\n')
    return run_ranks(ranks, TRAIN, *LONG, *options, '--init_from=resume', f'--out_dir={out_dir}', folder=folder).stdout


def assert_equal(folder, one, other):
    (steps, evaluations), (theirs, their_evaluations) = losses(folder, one), losses(folder, other)
    assert len(steps) == 20 and theirs == pytest.approx(steps, rel=1e-4)
    assert len(evaluations) == 3 and their_evaluations.keys() == evaluations.keys()
    for step, values in evaluations.items():
        assert their_evaluations[step] == pytest.approx(values, rel=1e-4)


def test_sharded_training_has_the_losses_and_weights_of_one_process_over_20_steps(whole):
    assert_equal(whole, 'one', 'sharded')
    ours, theirs = (load_file(whole / name / 'checkpoints/step-20/model.safetensors') for name in ('one', 'sharded'))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)
    folder = whole / 'sharded/checkpoints/step-20'
    assert sorted(path.name for path in folder.iterdir()) == [
        'meta.json', 'model.safetensors', 'optimizer', 'rank-0.pt', 'rank-1.pt', 'tokenizer.json']
    sizes = [path.stat().st_size for path in (folder / 'optimizer').glob('*.distcp')]
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_on_one_process_and_that_of_one_process_in_shards(whole):
    said = resume(whole, 1, 'sharded', 'to_one')
    assert 'step-10/optimizer is read through pickle, which can run code: resume only from folders that you' in said
    assert_equal(whole, 'one', 'to_one')
    assert 'pickle' not in resume(whole, 2, 'one', 'to_two', SHARDED)
    assert_equal(whole, 'one', 'to_two')


@pytest.mark.slow
def test_sharded_runs_become_copies_and_more_shards_and_copies_become_shards(whole):
    run_ranks(2, TRAIN, *LONG, '--out_dir=copies', folder=whole)
    assert_equal(whole, 'copies', 'sharded')
    resume(whole, 2, 'sharded', 'to_copies')
    resume(whole, 2, 'copies', 'to_shards', SHARDED)
    resume(whole, 4, 'sharded', 'to_four', SHARDED)
    for name in ('to_copies', 'to_shards', 'to_four'):
        assert_equal(whole, 'one', name)


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    ['--retrieval_pointers=0', '--retrieval_copy=False', '--token_mix=False', '--copy_own_context=False',
     '--bias=True'],
    ['--use_retrieval=False'], ['--init_from=gpt', '--retrofit=True', '--retrieval_k_neighbors=0'],
    ['--init_from=gpt', '--retrofit=True', '--activation_checkpointing=selective'], ['--dtype=bfloat16']])
def test_every_kind_of_model_trains_in_shards_as_it_does_whole(workspace, options):
    common = ['config.py', '--max_iters=6', *options]
    if '--init_from=gpt' in options:
        run(TRAIN, 'config.py', '--use_retrieval=False', '--max_iters=2', '--out_dir=gpt', folder=workspace)
    run(TRAIN, *common, '--out_dir=one', folder=workspace)
    run_ranks(2, TRAIN, *common, SHARDED, '--out_dir=two', folder=workspace)
    tolerance = 1e-3 if '--dtype=bfloat16' in options else 1e-5
    assert losses(workspace, 'two')[0] == pytest.approx(losses(workspace, 'one')[0], rel=tolerance)


@pytest.mark.slow
def test_sharded_training_that_is_compiled_has_the_losses_of_training_that_is_not(workspace):
    common = ['config.py', '--max_iters=3', '--activation_checkpointing=selective', '--dropout=0.1', SHARDED]
    for name in ('False', 'True'):
        said = run_ranks(2, TRAIN, *common, f'--compile={name}', f'--out_dir={name}', folder=workspace, timeout=1200)
        assert 'running without torch.compile' not in said.stdout
    ours, theirs = (losses(workspace, name)[0][1] for name in ('False', 'True'))  # other random numbers after that
    assert theirs == pytest.approx(ours, rel=0.1)


@pytest.mark.slow
def test_a_sharded_run_samples_for_wandb_from_a_copy_and_goes_on_as_if_it_had_not(workspace, monkeypatch):
    from tests.test_wandb import OFFLINE, history, records
    for name, value in (OFFLINE | dict(WANDB_DIR=str(workspace))).items():
        monkeypatch.setenv(name, value)
    common = ['config.py', '--dropout=0.1', SHARDED]
    run_ranks(2, TRAIN, *common, '--out_dir=plain', folder=workspace)
    run_ranks(2, TRAIN, *common, '--wandb_log=True', '--out_dir=logged', folder=workspace)
    assert losses(workspace, 'logged') == losses(workspace, 'plain')
    found, = records(workspace).values()
    assert any('samples' in key for line in history(found) for key in line)


@pytest.mark.parametrize('which', ['full', 'selective'])
def test_checkpointed_blocks_keep_less_and_have_the_losses_and_gradients_of_others_with_dropout(which):
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            count[func.overloadpacket] += 1
            return func(*args, **(kwargs or {}))

    found = {}
    for arm in ('none', which):
        count, kept = Counter(), []
        model = make_model('cpu', dict(dropout=0.1, retrieval_encoder_layers=1))
        if arm != 'none':
            checkpoint_blocks(model, arm)
        tokens, neighbors, mask, doc_ids = make_batch('cpu')
        torch.manual_seed(3)
        keep = functools.partial(lambda kept, x: kept.append(x.nbytes) or x, kept)
        with Products(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _, loss = model(tokens, tokens, neighbors, mask, doc_ids, make_pointers(tokens))
            loss.backward()
        found[arm] = loss, [p.grad for p in model.parameters()], sum(kept), count[torch.ops.aten.mm]
    (loss, gradients, kept, products), (our_loss, ours, we_kept, our_products) = found['none'], found[which]
    assert our_loss == loss and all(torch.equal(a, b) for a, b in zip(ours, gradients, strict=True))
    assert we_kept < 0.7 * kept  # 'selective' keeps products beside
    assert our_products == products if which == 'selective' else our_products > products


def test_settings_that_fit_no_run_are_refused_by_name():
    def check(*arguments, world_size=2, precision='bfloat16'):
        check_parallel(check_settings(load_settings(list(arguments))), Ranks(world_size=world_size), precision)
    check(SHARDED, '--activation_checkpointing=selective')
    for said, arguments, options in (
            ("parallel 'fsdp' shards the model over processes, and this is one", [SHARDED], dict(world_size=1)),
            ("and dtype is 'float16'", [SHARDED], dict(precision='float16')),
            ("parallel 'zero' is none of 'ddp', 'fsdp'", ['--parallel=zero'], {}),
            ("activation_checkpointing 'all' is none of", ['--activation_checkpointing=all'], {}),
            ('retrofit of pointers alone keeps no activations', [
                '--retrofit=True', '--init_from=gpt', '--retrieval_k_neighbors=0',
                '--activation_checkpointing=full'], {})):
        with pytest.raises(UserError, match=said):
            check(*arguments, **options)


def test_pickle_of_another_user_is_refused_and_whoever_uses_the_model_alone_reads_none(whole, monkeypatch):
    monkeypatch.chdir(whole)
    monkeypatch.setattr(os, 'geteuid', lambda: os.getuid() + 1)
    with pytest.raises(UserError, match=r'belongs to user \d+, and resuming reads it through pickle, which can'):
        load_checkpoint('sharded', for_resume=True)
    load_checkpoint('one', for_resume=True)
    monkeypatch.undo()
    monkeypatch.chdir(whole)
    for path in (whole / 'sharded/checkpoints/step-20/optimizer').iterdir():  # no business of sampling
        path.write_bytes(b'damaged')
    _, _, model, _ = load_run('sharded')
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    with pytest.raises(UserError, match="checkpoint 'sharded/checkpoints/step-20' cannot be read"):
        load_checkpoint('sharded', for_resume=True).load_optimizer(optimizer, None, model)


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_and_leaves_the_last_checkpoint_whole(workspace):
    """By a limit on the size of the second one's files, which fails writes as a full disk does."""
    common = ['config.py', '--use_retrieval=False', SHARDED]
    run_ranks(2, TRAIN, *common, '--max_iters=4', folder=workspace)
    limited = ('import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
               'sys.argv = sys.argv[1:]; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); '
               'runpy.run_path(sys.argv[0], run_name="__main__")')
    common += ['--max_iters=6', '--init_from=resume']
    ranks = [spawn(*start, TRAIN, *common, folder=workspace, env=environment, stderr=subprocess.PIPE)
             for start, environment in zip(([], ['-c', limited]), both_ranks(), strict=True)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert 'the checkpoint of step 6 could not be written' in said[0] and said[1] == ''
    assert list_steps(workspace / 'out/checkpoints') == [4] and load_checkpoint(workspace / 'out').step == 4
    assert not list((workspace / 'out/checkpoints').glob('*.tmp'))


def both_ranks():
    port = free_port()
    return [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                 MASTER_PORT=str(port)) for rank in range(2)]


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def start_nodes(folders, *command):
    """A torchrun for each folder, as on two nodes, with a process each."""
    port = free_port()
    return [spawn('-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=1', '--max-restarts=0',
                  '--rdzv-backend=c10d', '--rdzv-id=1', f'--rdzv-endpoint=127.0.0.1:{port}', *command, folder=folder,
                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for folder in folders]


def ends(processes):
    said = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['server'])
def test_two_nodes_train_in_shards_with_the_losses_of_one_process_and_end_together(workspace, tmp_path):
    common = ['config.py', '--retrieval_cache_gb=0', '--max_iters=8']
    codes, said = ends(start_nodes([workspace, workspace], TRAIN, *common, SHARDED, '--out_dir=nodes'))
    assert codes == [0, 0], said
    run(TRAIN, *common, '--out_dir=one', folder=workspace)
    assert losses(workspace, 'nodes')[0] == pytest.approx(losses(workspace, 'one')[0], rel=1e-4)
    assert len(metrics(workspace, 'nodes')) == 11

    shutil.copytree(workspace, tmp_path / 'other')  # a node with a disk of its own
    codes, said = ends(start_nodes([workspace, tmp_path / 'other'], TRAIN, *common, SHARDED, '--out_dir=apart'))
    assert 0 not in codes and all("out_dir 'apart' is not the same folder on all nodes" in text for text in said)

    nodes = start_nodes([workspace, workspace], TRAIN, 'config.py', '--max_iters=100000', '--eval_interval=4', SHARDED,
                        '--out_dir=lost')
    wait_until(lambda: (workspace / 'lost/checkpoints/latest').exists(), 240)
    worker, *_ = subprocess.run(['ps', '--ppid', str(nodes[1].pid), '-o', 'pid='], capture_output=True,
                                text=True).stdout.split()
    os.kill(int(worker), signal.SIGKILL)
    codes, said = ends(nodes)
    assert 0 not in codes and any('has lost another process, which has ended or cannot be reached' in text
                                  for text in said), said
    assert any('resume from it with --init_from=resume' in text for text in said)


@pytest.mark.slow
def test_the_bench_of_sharding_measures_the_bytes_that_it_predicts(tmp_path):
    answer = subprocess.run([sys.executable, ROOT / 'bench/sharding.py', '--quick'], cwd=tmp_path, check=True,
                            capture_output=True, text=True)
    report = json.loads(answer.stdout.splitlines()[-1])
    for arm in report['arms'].values():
        for part, size in arm['predicted'].items():
            assert arm['measured'][part] == pytest.approx(size, rel=0.02)
    halves = SimpleNamespace(**{name: sum(arm['measured'].values()) for name, arm in report['arms'].items()})
    assert halves.fsdp_none == pytest.approx(halves.ddp_none / 2, rel=0.02)
