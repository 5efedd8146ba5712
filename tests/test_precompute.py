"""Precomputed neighbors and pointers, and training from them without a database."""
import json
import os
import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from configurator import UserError, load_settings
from data.documents import DatasetConfig
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.neighbor_cache import USABLE, bytes_of
from retrieval.offline import open_cache, train_set
from retrieval.retriever import OfflineRetriever
from tests.conftest import open_all, run, run_ranks, spawn
from tests.test_train import losses
from tests.test_wandb import OFFLINE
from training.checks import check_settings

TRAIN = Path(__file__).parents[1] / 'train.py'


def precompute(folder, *arguments, check=True):
    return run('-m', 'retrieval.precompute', 'config.py', *arguments, folder=folder, check=check)


def train(folder, *arguments, check=True):
    return run(TRAIN, 'config.py', *arguments, folder=folder, check=check)


def test_an_offline_run_has_the_losses_of_the_live_one_and_needs_no_database(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    command = ['-m', 'retrieval.precompute', 'config.py']
    train(workspace, '--out_dir=live', '--retrieval_cache_dir=elsewhere')
    first = run_ranks(2, *command, '--max_iters=5', folder=workspace).stdout
    assert 'train, rank 0: 80 chunks are in the cache, 80 of them' in first and 'val, rank 0: ' in first
    part = train(workspace, '--retrieval_offline=True', check=False)
    assert part.returncode == 2 and '96 of 256 train chunks are not precomputed' in part.stderr
    again = run_ranks(2, *command, folder=workspace).stdout
    assert 'train, rank 0: 128 chunks are in the cache, 48 of them' in again
    for name in ('milvus.db', 'embedding', 'out/matches'):
        shutil.rmtree(workspace / name)
    run(TRAIN, 'config.py', '--out_dir=offline', '--retrieval_offline=True', '--wandb_log=True', folder=workspace,
        env=OFFLINE | dict(WANDB_DIR=str(workspace)))
    assert losses(workspace, 'offline') == losses(workspace, 'live') and len(losses(workspace, 'live')[0]) == 8
    tables = [json.loads(path.read_text())['data'] for path in workspace.glob('**/media/table/samples*.json')]
    assert tables and all(row[1] == '' != row[2] for table in tables for row in table)  # without retrieval

    settings = load_settings(['config.py'])
    tokenizer = load_tokenizer(settings.tokenizer)
    for change, said in ((dict(retrieval_k_neighbors=1), 'retrieval_k_neighbors: they have 2, the run 1'),
                         (dict(retrieval_pointers=8), 'retrieval_pointers: they have 32, the run 8'),
                         (dict(train_datasets=[DatasetConfig('train.parquet', source='stdlib', epochs=1)]),
                          'epochs: they have \\[0\\], the run \\[1\\]'),
                         (dict(block_size=32), 'block_size: they have 64, the run 32'),
                         (dict(retrieval_collection='other'), 'nothing was precomputed for collection'),
                         (dict(retrieval_cache_gb=0.0), 'retrieval_cache_gb is 0')):
        changed = settings.replace(**change)
        with pytest.raises(UserError, match=said), closing(OfflineRetriever(changed, tokenizer)) as retriever:
            stream = SequenceStream(open_all(changed), changed.block_size, 8, seed=settings.seed)
            retriever.check(train_set(changed, stream), 64)
    # the index is the collection's
    with closing(OfflineRetriever(settings.replace(retrieval_index='IVF_FLAT'), tokenizer)) as retriever:
        stream = SequenceStream(open_all(settings), settings.block_size, 8, seed=settings.seed)
        retriever.check(train_set(settings, stream), 64)
        batch = next(SequenceStream(open_all(settings), settings.block_size, 8, seed=7))  # none of those
        with pytest.raises(UserError, match='chunks have no neighbors in .*run python -m retrieval.precompute'):
            retriever.retrieve_for([batch])


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(workspace):
    process = spawn('-m', 'retrieval.precompute', 'config.py', '--max_iters=2000', folder=workspace,
                    stdout=subprocess.DEVNULL)
    settings = load_settings([str(workspace / 'config.py')]).replace(retrieval_cache_dir=str(
        workspace / 'out/neighbors'))
    deadline, done = time.monotonic() + 60, 0
    while not done and time.monotonic() < deadline:
        time.sleep(0.3)
        if (workspace / 'out/neighbors/data.mdb').exists():
            with closing(open_cache(settings)) as cache:
                done = max((record['done'] for record in cache.records().values()), default=0)
    process.kill()
    process.wait()
    assert 0 < done < 4000
    said = precompute(workspace, f'--max_iters={(done + 300) // 2}').stdout
    steps = int(said.split('train: ')[1].split(' chunks')[0].replace(',', '')) // 16
    assert int(said.split(' of them')[0].split(', ')[-1].replace(',', '')) <= (steps - done) * 16
    train(workspace, f'--max_iters={(done + 300) // 2}', '--retrieval_offline=True', '--eval_interval=1000')


@pytest.mark.slow
def test_what_was_precomputed_outlives_a_change_of_the_collection_until_it_is_precomputed_anew(workspace):
    precompute(workspace, '--max_iters=2')
    (workspace / 'new.txt').write_text('x = 1\n' * 200)
    run('-m', 'retrieval.kb', 'add', 'config.py', 'new.txt', folder=workspace)
    train(workspace, '--max_iters=2', '--out_dir=live')  # with a cache of the new revision
    train(workspace, '--max_iters=2', '--out_dir=offline', '--retrieval_offline=True')
    said = precompute(workspace, '--max_iters=2').stdout
    assert 'the collection has changed since 2 sets were precomputed' in said and '64 of them' in said
    train(workspace, '--max_iters=2', '--retrieval_offline=True')


def test_an_offline_run_does_not_read_a_stream():
    streamed = DatasetConfig('train.parquet', streaming=True)
    settings = load_settings([]).replace(retrieval_offline=True, use_retrieval=True, train_datasets=[streamed])
    with pytest.raises(UserError, match="of 'train.parquet', which is streamed, nothing can be"):
        check_settings(settings)


def test_what_does_not_fit_into_the_cache_is_refused_before_anything_is_computed(workspace):
    wrong = precompute(workspace, '--retrieval_cache_gb=0.001', check=False)
    assert wrong.returncode == 2 and 'retrieval_cache_gb is 0.001: raise it' in wrong.stderr
    wrong = precompute(workspace, '--use_retrieval=False', check=False)
    assert wrong.returncode == 2 and 'nothing to precompute' in wrong.stderr


@pytest.mark.parametrize('key, value, count', [(17, 160, 20_000), (8, 258, 20_000), (16, 8192, 1000)])
def test_the_room_that_entries_take_is_not_underestimated(tmp_path, key, value, count):
    from retrieval.neighbor_cache import NeighborCache
    with closing(NeighborCache(str(tmp_path), 0.1, 'x', ['hits'])) as cache:
        cache.use_revision('r')
        for _ in range(count // 500):
            cache.put('hits', [(os.urandom(key), os.urandom(value)) for _ in range(500)])
        with cache.environment.begin() as reading:
            used = cache._used(reading)
    assert used <= bytes_of(count, key, value) < 2 * used and USABLE < 1
