"""sample.py as a command, on a model that the test has trained."""
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
    assert 'chunk 1: import textwrap⏎' in shown and 'chunk 2: ' in shown
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


@pytest.mark.parametrize('arguments, said', [
    (['--out_dir=nowhere'], "no checkpoint in 'nowhere'"),
    (['--start=FILE:nowhere.txt'], "prompt file 'nowhere.txt' cannot be read (No such file or directory)"),
    (['--start=FILE:empty.txt'], "prompt file 'empty.txt' is empty"),
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
