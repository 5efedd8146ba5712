"""
Shared by the tests: a small corpus of real text (modules of the standard library), a tokenizer and a static embedding
fitted on it, and a populated collection, each made once by the project's own commands. The collection is in Milvus
Lite; a module whose tests run on a real Milvus server, too, has `backend` of its own, with BACKENDS as its parameters.
"""
import atexit
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from bench.milvus_server import MilvusServer, why_not

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
CHUNK = 16  # tokens per chunk, so that small documents have many

if (SHARED / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')  # two workers share two cores
os.environ.pop('MILVUS_TOKEN', None)

TRAIN = ('json/decoder', 'json/encoder', 'json/scanner', 'textwrap', 'string', 'bisect', 'heapq', 'fnmatch', 'glob',
         'shlex', 'queue', 'sched', 'copy', 'keyword', 'stat', 'pprint', 'reprlib', 'types', 'contextlib', 'getopt',
         'calendar', 'csv', 'cmd', 'code', 'codeop', 'colorsys', 'quopri', 'base64', 'hmac', 'secrets')
VAL = ('json/tool', 'tempfile', 'timeit', 'this')


# Commands, and the processes that they spawn, are forks of a process that has imported the libraries once: imports are
# most of a short command's time. They are not nice either, as other tests run beside. Tests that need real processes
# (test_faults, test_local_server) start them themselves.
forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['tests.preloaded'])
multiprocessing.get_context = lambda method=None, original=multiprocessing.get_context: original(
    'forkserver' if method == 'spawn' else method)


def run(*command, folder, check=True, timeout=300, env=None):
    """Run a command of the project as its users do; the result has stdout and stderr as text."""
    command, env = list(map(str, command)), {**os.environ, 'PYTHONPATH': str(ROOT), **(env or {})}
    if command[0] == '-c' or command[:2] == ['-m', 'torch.distributed.run']:
        answer = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True,
                                timeout=timeout, env=env)
    else:
        answer = run_in_a_fork(command, folder, env, timeout)
    if check and answer.returncode:
        raise AssertionError(f'{command} ended with {answer.returncode}\n{answer.stdout}\n{answer.stderr}')
    return answer


def run_ranks(count, *command, folder, timeout=300):
    """Run a command of the project on `count` ranks in the environment that torchrun sets; the master's result."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = found.getsockname()[1]

    def run_rank(rank):
        return run(*command, folder=folder, timeout=timeout, env=dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)))
    with ThreadPoolExecutor(count) as pool:
        master, *_ = pool.map(run_rank, range(count))
    return master


def run_in_a_fork(command, folder, env, timeout):
    with tempfile.TemporaryDirectory() as outputs:
        process = forks.Process(target=become, args=(command, str(folder), env, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f'{command} took more than {timeout} s')
        return subprocess.CompletedProcess(command, process.exitcode,
                                           *((Path(outputs) / name).read_text() for name in ('stdout', 'stderr')))


def become(command, folder, env, outputs):
    """Run a script, or -m and a module, in this process, with its output in two files."""
    for name, descriptor in (('stdout', 1), ('stderr', 2)):
        os.dup2(os.open(f'{outputs}/{name}', os.O_WRONLY | os.O_CREAT), descriptor)
    os.nice = lambda niceness: 0
    import retrieval.local_server
    retrieval.local_server.start_server = start_server_in_a_fork
    sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', buffering=1, closefd=False)
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None  # its own processes are forks of the same one
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    main = sys.modules['__main__'] = sys.modules['__mp_main__'] = types.ModuleType('__main__')
    if command[0] == '-m':
        command = command[1:]
        package = importlib.util.find_spec(command[0]).submodule_search_locations is not None
        main.__spec__ = importlib.util.find_spec(command[0] + '.__main__' * package)
    main.__file__ = main.__spec__.origin if main.__spec__ else command[0]
    sys.argv = [main.__file__, *command[1:]]
    try:
        exec(compile(Path(main.__file__).read_text(), main.__file__, 'exec'), vars(main))
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


def start_server_in_a_fork(path, niceness):
    """As retrieval.local_server.start_server."""
    from retrieval.local_server import cannot_start, forget_server
    forget_server()
    ready, child = multiprocessing.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile('w+') as stderr:
        process = forks.Process(target=become_server, args=(os.path.abspath(path), niceness, child, stderr.name))
        process.start()
        child.close()
        try:
            is_ready = os.read(ready.fileno(), 100) == b'ready\n'
        except OSError:
            is_ready = False
        process.join()
        if not is_ready:
            raise cannot_start(path, stderr.read())


def become_server(path, niceness, ready, stderr):
    os.dup2(ready.fileno(), 1)
    os.dup2(os.open(stderr, os.O_WRONLY), 2)
    sys.argv = ['local_server', path, str(niceness)]
    from retrieval.local_server import main
    main()


PROCESSES = []  # that the running test has started


def spawn(*command, folder, env=None, **options):
    """A process of a test: a script of the project or Python's own arguments. It is killed when the test ends."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, text=True,
                               env={**os.environ, 'PYTHONPATH': str(ROOT), **(env or {})}, **options)
    PROCESSES.append(process)
    return process


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    while PROCESSES:
        process = PROCESSES.pop()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def has_server(path):
    """Whether a server of the database at `path` is alive."""
    from retrieval.local_server import try_lock
    with open(path / '.nanoretro-server', 'a+') as file:
        return not try_lock(file)


def wait_until(condition, seconds=20):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.1)
    assert condition()


def open_all(settings, name='train_datasets'):
    """The ChunkedDatasets of a setting."""
    from data.chunk_store import open_datasets
    from data.documents import as_dataset_configs
    from data.tokenizer import load_tokenizer
    return open_datasets(as_dataset_configs(getattr(settings, name), name), load_tokenizer(settings.tokenizer),
                         settings)


CONFIG = f'''
from data.documents import DatasetConfig

out_dir = 'out'
train_datasets = [DatasetConfig('train.parquet', source='stdlib')]
val_datasets = [DatasetConfig('val.parquet', source='stdlib')]
tokenizer = 'tokenizer.json'
retrieval_embedding_model = 'embedding'
retrieval_milvus_uri = 'milvus.db'
retrieval_chunk_size = {CHUNK}
retrieval_layers = [2]
retrieval_encoder_layers = 1
block_size = {4 * CHUNK}
batch_size = 4
gradient_accumulation_steps = 2
n_layer, n_head, n_embd = 2, 2, 32
eval_interval = 4
eval_tokens = 500
log_interval = 1
max_iters = 8
warmup_iters = 2
learning_rate = 1e-2
device = 'cpu'
dtype = 'float32'
compile = False
'''


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    """A folder with the corpus, its tokenizer, the static embedding, and config.py."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data.prepare import train_tokenizer
    folder = tmp_path_factory.mktemp('prepared')
    library = Path(os.__file__).parent
    for split, names in (('train', TRAIN), ('val', VAL)):
        texts = [(library / f'{name}.py').read_text() for name in names]
        ids = [name.replace('/', '.') for name in names]
        pq.write_table(pa.table({'id': ids, 'text': texts}), folder / f'{split}.parquet')
        if split == 'train':
            train_tokenizer(texts, 1024).save(str(folder / 'tokenizer.json'))
    (folder / 'config.py').write_text(CONFIG)
    run('-m', 'retrieval.static_embedding', 'config.py', folder=folder)
    return folder


@pytest.fixture(scope='session')
def populated(prepared, tmp_path_factory):
    """As `prepared`, with the collection filled."""
    folder = tmp_path_factory.mktemp('populated') / 'run'
    shutil.copytree(prepared, folder)
    run('-m', 'retrieval.populate', 'config.py', folder=folder)
    wait_until(lambda: not has_server(folder / 'milvus.db'))  # it is copied next
    return folder


BACKENDS = ['lite', pytest.param('server', marks=pytest.mark.slow)]


@pytest.fixture
def backend():
    """Where the `workspace` of a test has its collections: 'lite', in a local file, or 'server'."""
    return 'lite'


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    """A real Milvus server, of all tests of a process. Who kills it starts it again."""
    if why_not():
        pytest.skip(f'no real Milvus server: {why_not()}')
    with MilvusServer(tmp_path_factory.mktemp('server')) as started:
        yield started


@pytest.fixture(scope='session')
def populated_on_server(prepared, server, tmp_path_factory):
    """As `populated`, on the server. Its index is exact: others are built in the background, and change answers."""
    folder = tmp_path_factory.mktemp('populated') / 'run'
    shutil.copytree(prepared, folder)
    with open(folder / 'config.py', 'a') as file:
        file.write(f"retrieval_milvus_uri = {server.uri!r}\nretrieval_index = 'FLAT'\n")
    run('-m', 'retrieval.populate', 'config.py', folder=folder)
    return folder


@pytest.fixture
def clean_server(server):
    """The server, which loses the collections that the test makes."""
    from pymilvus import MilvusClient
    with closing(MilvusClient(server.uri)) as client:
        before = client.list_collections()
        yield server
        for name in set(client.list_collections()) - set(before):
            client.drop_collection(name)


@pytest.fixture
def workspace(request, backend, tmp_path):
    """A copy of `populated` that a test may change, as may it the collection."""
    folder = tmp_path / 'run'
    if backend == 'lite':
        shutil.copytree(request.getfixturevalue('populated'), folder)
        yield folder
        return
    whole = request.getfixturevalue('populated_on_server')
    shutil.copytree(whole, folder)
    from pymilvus import MilvusClient
    with closing(MilvusClient(request.getfixturevalue('clean_server').uri)) as client:
        before = client.describe_collection('chunks')['properties']  # its revision among them
        yield folder
        if client.describe_collection('chunks')['properties'] != before:
            run('-m', 'retrieval.populate', 'config.py', '--sync=True', folder=whole)


@pytest.fixture
def settings(workspace, monkeypatch):
    """The settings of the workspace's config, with the workspace as the working folder."""
    from configurator import load_settings
    monkeypatch.chdir(workspace)
    return load_settings(['config.py'])
