"""sample.py as a command, on a model that the test has trained."""
import json
import sys

import pytest

from tests.conftest import ROOT, run


@pytest.fixture(scope='module')
def trained(populated, tmp_path_factory):
    import shutil
    folder = tmp_path_factory.mktemp('trained') / 'run'
    shutil.copytree(populated, folder)
    run(ROOT / 'train.py', 'config.py', '--max_iters=4', folder=folder)
    return folder


def sample(folder, *arguments, **options):
    return run(ROOT / 'sample.py', '--out_dir=out', *arguments, folder=folder, **options)


START = 'import textwrap\n\ndef wrap(text, width=70):\n    """Wrap a paragraph of text, returning a list of lines."""\n'


def test_a_sample_goes_on_from_its_prompt_and_shows_what_it_retrieved(trained):
    answer = sample(trained, f'--start={START}', '--max_new_tokens=40', '--show_neighbors')
    text, _, shown = answer.stdout.partition('--- what was retrieved')
    assert text.startswith(START) and len(text) > len(START) + 20
    assert 'chunk 1: import textw' in shown and 'chunk 2: ' in shown
    assert 'stdlib/' in shown and 'similarity 0.' in shown and 'then: ' in shown


def test_the_same_seed_gives_the_same_samples_and_they_differ_from_each_other(trained):
    arguments = [f'--start={START}', '--max_new_tokens=20', '--num_samples=2']
    first, again = (sample(trained, *arguments, '--seed=1').stdout for _ in range(2))
    assert first == again
    one, two = first.split('=== sample 2\n')
    assert one.removeprefix('=== sample 1\n') != two


def test_retrieval_off_needs_no_database(trained):
    arguments = [f'--start={START}', '--max_new_tokens=60', '--temperature=0']
    off = sample(trained, *arguments, '--retrieval=off', '--retrieval_milvus_uri=http://127.0.0.1:9',
                 '--show_neighbors')
    assert off.stdout.startswith(START) and 'nothing: no chunk' in off.stdout


@pytest.mark.parametrize('start', ['\n', 'a', 'ab cd', 'import os'])
@pytest.mark.parametrize('retrieval', ['on', 'off'])
def test_the_shortest_prompts_are_continued(trained, start, retrieval):
    """The default one is a single token."""
    arguments = [] if start == '\n' else [f'--start={start}']
    answer = sample(trained, *arguments, f'--retrieval={retrieval}', '--max_new_tokens=20', '--temperature=0')
    assert answer.stdout.startswith(start) and len(answer.stdout) > len(start) + 1


def test_a_prompt_comes_from_a_file_and_may_be_longer_than_the_block(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text(START * 10)
    answer = sample(trained, f'--start=FILE:{tmp_path}/prompt.txt', '--max_new_tokens=5')
    assert answer.stdout.startswith(START * 10)


def test_several_prompts_come_from_a_file_and_json_has_all_of_a_sample(trained, tmp_path):
    """A prompt that begins with FILE: is text there, and so is the end-of-text's own string."""
    prompts = [START, 'FILE:nowhere.txt', 'a<|endoftext|>b', ' ', 'x\ud800y']
    (tmp_path / 'prompts.jsonl').write_text('\n'.join(json.dumps({'prompt': prompt}) for prompt in prompts) + '\n\n')
    answer = sample(trained, f'--prompts={tmp_path}/prompts.jsonl', '--json', '--num_samples=2', '--max_new_tokens=20',
                    '--show_neighbors')
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [f['prompt'] for f in found] == [p.replace('\ud800', '?') for p in prompts for _ in range(2)]
    assert [f['seed'] for f in found[:2]] == [1337, 1338] and all(f['tokens'] <= 20 for f in found)
    passage = found[0]['neighbors'][0]['passages'][0]
    assert passage.keys() == {'document', 'similarity', 'text', 'continuation'} and 'stdlib/' in passage['document']
    plain = sample(trained, f'--prompts={tmp_path}/prompts.jsonl', '--max_new_tokens=20').stdout
    assert plain.startswith(f'=== prompt 1\n{START}') and '=== prompt 5\nx?y' in plain


def test_passages_of_ones_own_take_the_place_of_the_collections_and_need_no_database(trained, tmp_path):
    (tmp_path / 'passage.txt').write_text('zebra quagga okapi zebra quagga okapi\n' * 40)
    arguments = ['--start=zebra quagga', '--max_new_tokens=12', '--temperature=0', '--show_neighbors',
                 '--retrieval_milvus_uri=http://127.0.0.1:9', f'--neighbors=FILE:{tmp_path}/passage.txt']
    answer = sample(trained, *arguments, '--neighbors=another one')
    assert 'okapi' in answer.stdout.split('---')[0]  # which pointers name
    assert '1. passage 1, similarity 1.00' in answer.stdout and '2. passage 2' in answer.stdout
    assert 'passage 1 is long: its first 32 tokens are read' in answer.stderr


def test_prompts_are_read_from_the_terminal_until_its_end(trained):
    from subprocess import run as run_process
    answer = run_process([sys.executable, ROOT / 'sample.py', '--out_dir=out', '--interactive', '--max_new_tokens=5',
                          '--retrieval=off', '--stop=\n'], cwd=trained, input='import os\n\ndef f(\n', text=True,
                         capture_output=True, timeout=120)
    first, second = answer.stdout.splitlines()
    assert first.startswith('import os') and second.startswith('def f(') and answer.returncode == 0
    assert not answer.stderr, answer.stderr  # nor any noise of the libraries


@pytest.mark.parametrize('arguments, said', [
    (['--prompts=empty.txt'], "--prompts: 'empty.txt' is empty"),
    (['--prompts=out/checkpoints/latest'], "--prompts: 'out/checkpoints/latest' cannot be read"),
    (['--prompts=x.jsonl', '--interactive'], '--start, --prompts, --interactive and --chat exclude each other'),
    (['--top_p=0'], '--top_p is 0.0: give a probability above 0, up to 1'),
    (['--min_p=2'], '--min_p is 2.0: give a share from 0 to 1'),
    (['--repetition_penalty=0'], '--repetition_penalty is 0.0: give a number above 0'),
    (['--neighbors=a', '--retrieval=off'], '--neighbors are given, and --retrieval=off reads none'),
    (['--neighbors=a', '--neighbors=b', '--neighbors=third'], "reads 2 (retrieval_k_neighbors): leave out 'third'"),
    (['--out_dir=nowhere'], "no checkpoint in 'nowhere'"),
    (['--start=FILE:nowhere.txt'], "--start: file 'nowhere.txt' cannot be read (No such file or directory)"),
    (['--start=FILE:empty.txt'], "--start: file 'empty.txt' is empty"),
    (['--start='], '--start is empty'),
    (['--num_samples=0'], '--num_samples must be at least 1, but is 0'),
    (['--temperature=nan'], '--temperature must be at least 0 and finite, but is nan'),
    (['--temperature=inf'], '--temperature must be at least 0 and finite, but is inf'),
    (['--seed=-1'], '--seed must be at least 0, but is -1'),
    (['--seed=99999999999999999999'], '--seed must be at least 0 and below 4611686018427387904'),
    (['--dtype=float8'], "dtype 'float8' is none of"),
    (['--retrieval_milvus_uri=other.db'], "no collection 'chunks' in other.db"),
    (['--n_layer=3'], 'n_layer cannot be changed after training'),
    (['--n_layers=3'], "unknown config key 'n_layers'"),
    (['--tokenizer=nowhere.json'], 'tokenizer cannot be changed after training'),
])
def test_what_cannot_be_sampled_is_one_clear_line_and_exit_code_2(trained, arguments, said):
    (trained / 'empty.txt').write_text(' \n')
    answer = sample(trained, *arguments, check=False)
    assert answer.returncode == 2 and said in answer.stderr
    assert answer.stderr.startswith('error: ') and answer.stderr.count('\n') == 1
    assert not (trained / 'other.db').exists()
