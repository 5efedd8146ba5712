"""What takes minutes (make test-slow): many kills, torch.compile with Inductor, many processes, all-mpnet-base-v2."""
import json
import os
import random
import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path

from system import why_not_compile

import pytest

from retrieval.knowledge_base import connect
from retrieval.local_server import join_server
from tests.conftest import ROOT, SHARED, has_server, run, spawn, wait_until
from tests.test_faults import LONG, Run
from tests.test_train import losses, metrics

pytestmark = pytest.mark.slow


SILENT = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_run_killed_eight_times_has_the_losses_of_an_unbroken_one(workspace):
    options = ['config.py', '--max_iters=1500', '--eval_interval=10', '--dropout=0.1']
    run(ROOT / 'train.py', *options, '--out_dir=whole', folder=workspace)
    dice, latest = random.Random(0), workspace / 'broken/checkpoints/latest'
    for number in range(8):
        before = latest.read_text() if number else ''
        process = spawn(ROOT / 'train.py', *options, '--out_dir=broken', *['--init_from=resume'] * bool(number),
                        folder=workspace, **SILENT)
        wait_until(lambda b=before: latest.exists() and latest.read_text() != b, seconds=100)
        time.sleep(1.5 * dice.random())
        assert process.poll() is None
        process.kill()
        process.wait()
    run(ROOT / 'train.py', *options, '--out_dir=broken', '--init_from=resume', folder=workspace)
    assert losses(workspace, 'broken') == losses(workspace, 'whole')
    assert not list((workspace / 'broken').rglob('*.tmp*'))


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
