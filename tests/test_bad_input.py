"""Whatever a user can get wrong in training: one line, exit code 2, and nothing written."""
import pytest

from tests.conftest import CHUNK, ROOT, run


def files(folder):
    made = ('milvus.db', 'out/datasets')  # the server's own files, and what was read
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if not any(m in str(path) for m in made))


@pytest.mark.parametrize('arguments, said', [
    (['--train_datasets=["missing.parquet"]'], "no corpus at 'missing.parquet': make it first"),
    (['--train_datasets=[]'], 'train_datasets is empty'),
    (['--val_datasets=[]'], 'val_datasets is empty'),
    (['--retrieval_collection=other'], "no collection 'other' in milvus.db: fill it with python -m retrieval.populate"),
    (['--retrieval_milvus_uri=other.db'], "no collection 'chunks' in other.db"),
    (['--retrieval_milvus_uri=http://127.0.0.1:9'], 'no Milvus answers at http://127.0.0.1:9'),
    (['--n_layr=3'], "unknown config key 'n_layr' in the command line: did you mean 'n_layer'?"),
    (['--n_layer=x'], "n_layer in the command line must be of type int, such as 2, but is 'x' of type str"),
    (['nowhere.py'], "no config file 'nowhere.py'"),
    ([f'--block_size={4 * CHUNK + 1}'],
     f'block_size {4 * CHUNK + 1} must be a multiple of retrieval_chunk_size {CHUNK}'),
    (['--retrieval_layers=[1, 3]'], 'retrieval_layers [1, 3] must be numbers from 1 to n_layer 2, but [3] are not'),
    (['--retrieval_embedding_model=nowhere'], "no embedding model 'nowhere'"),
    (['--retrieval_index=FLAT'], "index: it has 'IVF_FLAT', the run 'FLAT'"),
    (['--out_dir=config.py/x'], "out_dir 'config.py/x' cannot be written"),
    (['--init_from=resume'], "no checkpoint in 'out'"),
    (['--init_from=gpt3'], "init_from 'gpt3' is neither 'scratch' nor 'resume'"),
    (['--dtype=float8'], "dtype 'float8' is none of"),
    (['--tokenizer=nowhere.json'], "no tokenizer 'nowhere.json'"),
    (['--retrieval_cache_dir=config.py/x'], "retrieval_cache_dir 'config.py/x' cannot be used"),
    (['--keep_checkpoints=-1'], 'keep_checkpoints must be at least 0, but is -1'),
    (['--multiple_choice_benchmarks=[b"LogiQA"]'], 'multiple_choice_benchmarks holds a value that cannot be saved'),
    (['--retrieval_prefetch_batches=0'], 'retrieval_prefetch_batches must be at least 1, but is 0'),
    (['--retrieval_milvus_uri=http://root:hush@127.0.0.1:9'], 'retrieval_milvus_uri holds a user or a password'),
    (['-retrieval_milvus_token=root:hush'], "'-retrieval_milvus_token' is neither a config file nor --key=value"),
])
def test_it_is_one_clear_line_and_exit_code_2_and_nothing_is_written(workspace, arguments, said):
    before = files(workspace)
    answer = run(ROOT / 'train.py', 'config.py', *arguments, '--retrieval_milvus_token=root:hush', folder=workspace,
                 check=False)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.startswith('error: ') and answer.stderr.count('\n') == 1
    assert said in answer.stderr and 'hush' not in answer.stderr + answer.stdout
    assert files(workspace) == before and not (workspace / 'other.db').exists()


def test_a_local_database_is_not_shared_by_several_nodes(workspace):
    answer = run(ROOT / 'train.py', 'config.py', folder=workspace, check=False,
                 env=dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='1', RANK='0', LOCAL_RANK='0'))
    assert answer.returncode == 2
    assert "retrieval_milvus_uri 'milvus.db' is a local file, which serves one node" in answer.stderr


def test_a_checkpoint_of_another_architecture_is_not_resumed_and_not_lost(workspace):
    run(ROOT / 'train.py', 'config.py', '--max_iters=1', '--use_retrieval=False', folder=workspace)
    before = {path: path.read_bytes() for path in (workspace / 'out').rglob('*') if path.is_file()}
    answer = run(ROOT / 'train.py', 'config.py', '--init_from=resume', '--n_embd=64', '--use_retrieval=False',
                 folder=workspace, check=False)
    assert answer.returncode == 2 and 'n_embd: it has 32, the run 64' in answer.stderr
    assert {path: path.read_bytes() for path in (workspace / 'out').rglob('*') if path.is_file()} == before
    run(ROOT / 'train.py', 'config.py', '--init_from=resume', '--max_iters=2', '--use_retrieval=False',
        folder=workspace)
