"""
The Dockerfile, .dockerignore and the compose files, read as Docker does: nothing here needs Docker. An image is not
built.
"""
import http.server
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import yaml

from configurator import load_settings
from tests.conftest import ROOT, run

MILVUS = {'etcd', 'minio', 'milvus'}
SECRET = re.compile('KEY|TOKEN|PASSWORD|SECRET')
DOCS = ROOT / 'docs' / 'scaling.md'


def instructions():
    """[(instruction, its text)] of the Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / 'Dockerfile').read_text().splitlines() if not line.startswith('#')]
    joined = '\n'.join(lines).replace('\\\n', '')
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]


def instruction(name):
    """The text of the instruction that counts, the last one."""
    return [text for kind, text in instructions() if kind == name][-1]


def health_check():
    return json.loads(instruction('HEALTHCHECK').split(' CMD ')[1])


def compose(*names, **environment):
    """The compose files, the later ones merged into the first, with the variables' values or defaults."""
    merged = {}
    for name in names or ('docker-compose.yml',):
        text = re.sub(r'\$\{(\w+):-([^}]*)\}', lambda found: environment.get(found[1], found[2]),
                      (ROOT / name).read_text())
        assert '$' not in text, f'{name} has a variable without a default, which stops or warns every profile'
        merge(merged, yaml.safe_load(text))
    return merged


def merge(into, other):
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def is_in_image(path):
    """Whether .dockerignore leaves a file in the build's context: the last pattern of it or its folder counts."""
    found = True
    for line in (ROOT / '.dockerignore').read_text().splitlines():
        if line and not line.startswith('#'):
            pattern = re.escape(line.lstrip('!').rstrip('/')).replace(r'\*\*/', '(.*/)?').replace(r'\*', '[^/]*')
            if any(re.fullmatch(pattern, part) for part in parents(path)):
                found = line.startswith('!')
    return found


def parents(path):
    parts = path.split('/')
    return ['/'.join(parts[:end]) for end in range(1, len(parts) + 1)]


def commands():
    """The commands of the project that the image, the compose file and docs/scaling.md run, as lists of arguments."""
    text = DOCS.read_text().split('## In containers')[1].split('\n## ')[0].replace('\\\n', ' ').replace('`', '\n')
    found = [['python', *shlex.split(line.split('python ', 1)[1], comments=True)]
             for line in re.sub(r'(?<!\\)\n(--\w)', r' \1', text).splitlines() if re.match(r'docker .*\bpython ', line)]
    return [json.loads(instruction('CMD')), *found,
            *(service['command'] for service in compose()['services'].values() if 'profiles' in service
              and 'command' in service)]


@contextmanager
def answering(status):
    """The port of an HTTP server that gives this answer to GET /health alone."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == '/health' else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_every_file_that_the_image_copies_exists_and_is_in_its_context():
    sources = [name for kind, text in instructions() if kind == 'COPY' for name in text.split()[:-1]]
    assert sources[-1] == '.' and 'requirements.txt' in sources
    for name in sources[:-1]:
        assert is_in_image(name)
        assert (ROOT / name).is_file(), name


def test_image_holds_all_code_and_neither_data_nor_secrets():
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('this is no git repository')
    code = [name for name in listed.stdout.split('\n') if name.endswith(('.py', '.html')) and name[:6] != 'tests/']
    assert 'retrieval/populate.py' in code and [name for name in code if not is_in_image(name)] == []
    for name in ('.env', '.git/config', '.venv/lib/x.py', 'out/my_run/x.py', 'my/documents.jsonl', 'tests/conftest.py',
                 'data/python_source/train.parquet', 'data/python_source/tokenizer.json', 'data/x/y/z.jsonl',
                 'retrieval/__pycache__/a.pyc', 'wandb/run/x.py'):
        assert not is_in_image(name), name


def test_image_installs_every_requirements_file_but_those_of_the_tests_and_of_the_harness():
    installed = set(re.findall(r'-r (\S+)', ' '.join(text for kind, text in instructions() if kind == 'RUN')))
    for name in list(installed):
        installed |= set(re.findall(r'^-r (\S+)', (ROOT / name).read_text(), re.MULTILINE))
    assert installed == {path.name for path in ROOT.glob('requirements*.txt')} - {
        'requirements-dev.txt', 'requirements-lm-eval.txt'}


def test_torch_alone_comes_from_an_index_of_its_own_and_by_the_pin():
    step = next(text for kind, text in instructions() if kind == 'RUN' and 'pip install' in text)
    installs = re.findall(r'pip install .*?(?=&&|$)', step)
    assert '--no-deps' in installs[0] and '--index-url' in installs[0] and 'index' not in installs[1]
    found = subprocess.run(['sh', '-c', re.search(r'\$\((.*?)\)', installs[0])[1]], cwd=ROOT, capture_output=True)
    assert re.fullmatch(rb'torch==[\d.]+\n', found.stdout)


def test_image_runs_as_no_root_and_its_command_gets_signals():
    assert int(instruction('USER')) > 0
    assert [kind for kind, _ in instructions()].index('USER') > [text for _, text in instructions()].index('. .')
    assert json.loads(instruction('ENTRYPOINT')) == ['tini', '--']
    assert json.loads(instruction('CMD'))[0] == 'python'  # no shell, which would keep signals to itself


def test_caches_are_in_the_folder_that_any_user_may_write():
    variables = dict(re.findall(r'(\w+)=(\S+)', instruction('ENV')))
    caches = {name: path for name, path in variables.items() if name == 'HOME' or name.endswith('CACHE_DIR')}
    assert {'HOME', 'NUMBA_CACHE_DIR', 'TIKTOKEN_CACHE_DIR'} <= caches.keys()
    assert all(path.startswith('/cache') for path in caches.values())
    assert any('--mode=1777 /cache' in text for kind, text in instructions() if kind == 'RUN')


@pytest.mark.parametrize('status', [200, 503])
def test_health_check_passes_if_and_only_if_the_server_is_well_and_asks_no_proxy(status):
    with answering(status) as port, socket.socket() as nobody:
        nobody.bind(('127.0.0.1', 0))
        proxy = f'http://127.0.0.1:{nobody.getsockname()[1]}'
        for where, expected in ((port, 0 if status == 200 else 1), (nobody.getsockname()[1], 1)):
            command = [word.replace('8000', str(where)) for word in health_check()]
            answer = subprocess.run([sys.executable, *command[1:]], capture_output=True, timeout=20,
                                    env=dict(os.environ, http_proxy=proxy, HTTP_PROXY=proxy))
            assert answer.returncode == expected


def test_health_check_and_ports_are_the_servers_own():
    text = (ROOT / 'serve.py').read_text()
    port = re.search(r"'--port', type=int, default=(\d+)", text)[1]
    assert instruction('EXPOSE') == port and f', {port},' in health_check()[2]
    assert compose()['services']['serve']['ports'] == [f'127.0.0.1:{port}:{port}']
    assert "'/health'" in (ROOT / 'generation' / 'server.py').read_text()


def test_compose_runs_milvus_alone_without_a_profile():
    services = compose()['services']
    assert {name for name, service in services.items() if 'profiles' not in service} == MILVUS
    assert {name: service['profiles'] for name, service in services.items() if name not in MILVUS} == {
        'train': ['train'], 'serve': ['serve'], 'attu': ['attu']}


def test_compose_profiles_wait_until_milvus_is_healthy():
    services = compose()['services']
    assert 'healthcheck' in services['milvus']
    assert all(services[name]['depends_on']['milvus']['condition'] == 'service_healthy' for name in services.keys()
               - MILVUS)


def test_compose_listens_on_localhost_alone():
    ports = [port for service in compose()['services'].values() for port in service.get('ports', [])]
    assert len(ports) == 4 and all(re.fullmatch(r'127\.0\.0\.1:\d+:\d+', port) for port in ports)
    assert not any('network_mode' in service for service in compose()['services'].values())


def test_compose_has_no_secret_but_minios_default_which_no_port_leads_to():
    text = (ROOT / 'docker-compose.yml').read_text() + (ROOT / 'docker-compose.gpu.yml').read_text()
    literal = re.findall(r'^ *(\w*(?:KEY|TOKEN|PASSWORD|SECRET)\w*): *([^$\s].*)', text, re.MULTILINE)
    assert literal == [('MINIO_ROOT_PASSWORD', 'minioadmin')]
    assert 'ports' not in compose()['services']['minio']
    key = compose(NANORETRO_API_KEY='k')['services']['serve']['environment']
    assert key == {'NANORETRO_API_KEY': 'k'}
    assert not any(SECRET.search(name) for kind, name in instructions() if kind == 'ARG')
    assert '.env' in (ROOT / '.gitignore').read_text().split()


def test_compose_pins_every_image_that_it_does_not_build():
    for name, service in compose()['services'].items():
        assert service['image'] == 'nanoretro' if 'build' in service else re.search(r':[^:]*\d', service['image']), name


def test_compose_mounts_folders_at_the_same_paths_and_makes_none_as_root():
    services = compose(NANORETRO_CORPUS='data/python_source')['services']
    for name in ('train', 'serve'):
        for mount in services[name]['volumes']:
            if mount['type'] == 'bind':
                assert mount['target'] == '/app/' + mount['source'].removeprefix('./')
                assert mount['bind'] == {'create_host_path': False}
            else:
                assert (mount['source'], mount['target']) == ('cache', '/cache')
    read_only = {mount['source'] for mount in services['train']['volumes'] if mount.get('read_only')}
    assert read_only == {'./config', './data/python_source'}


def test_gpus_are_an_override_that_changes_the_image_and_the_devices_alone():
    before, after = (compose(*names)['services'] for names in (('docker-compose.yml',),
                                                               ('docker-compose.yml', 'docker-compose.gpu.yml')))
    assert before.keys() == after.keys()
    for name in ('train', 'serve'):
        assert after[name].pop('deploy')['resources']['reservations']['devices'] == [
            dict(driver='nvidia', count='all', capabilities=['gpu'])]
        assert after[name].pop('image') != before[name].pop('image')  # or the one without CUDA would be used
        assert after[name].pop('build')['args'].keys() == {instruction('ARG').split('=')[0]}
        before[name].pop('build')
    assert before == after


def test_commands_in_containers_are_the_projects_and_their_options_exist():
    settings = {f'--{name}' for name in vars(load_settings([]))}
    seen = set()
    for command in commands():
        assert command[0] == 'python'
        if command[1] == '-m':
            script, arguments = command[2].replace('.', '/') + '.py', command[3:]
        else:
            script, arguments = command[1], command[2:]
        if script == 'serve.py' and not (ROOT / script).exists():
            continue
        seen.add(script)
        assert (ROOT / script).is_file(), script
        options = settings
        if script == 'serve.py':
            options = settings | set(re.findall(r'--\w+', run(ROOT / script, '--help', folder=ROOT).stdout))
        for argument in arguments:
            assert argument.split('=')[0] in options if argument[0] == '-' else argument == 'config/my_run.py', argument
    assert seen >= {'train.py', 'retrieval/populate.py'}
    assert 'serve.py' in seen


def test_serve_profile_serves_the_run_that_is_named_and_wants_a_key():
    command = compose(NANORETRO_RUN='out/other')['services']['serve']['command']
    assert {'--out_dir=out/other', '--host=0.0.0.0'} <= set(command)
    for arguments in (command[2:], json.loads(instruction('CMD'))[2:]):
        answer = run(ROOT / 'serve.py', *arguments, folder=ROOT, check=False, env=dict(NANORETRO_API_KEY=''))
        assert answer.returncode == 2 and 'NANORETRO_API_KEY' in answer.stderr
