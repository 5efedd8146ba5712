import subprocess
import sys

import pytest

import train
from configurator import UserError, defaults_and_comments, load_settings
from tests.conftest import ROOT


def config(tmp_path, text):
    path = tmp_path / 'c.py'
    path.write_text(text)
    return str(path)


def test_defaults_are_the_globals_of_train_py_and_every_one_is_documented():
    settings, comments = defaults_and_comments()
    assert settings == {key: getattr(train, key) for key in settings}
    assert len(settings) > 40 and not [key for key in settings if not comments[key]]


def test_a_later_argument_wins_and_integers_are_floats_too(tmp_path):
    path = config(tmp_path, 'n_layer = 3\nbatch_size = 2 * n_layer\nimport math\n_scratch = 1\n')
    settings = load_settings([path, '--n_layer=5', '--learning_rate=1', '--out_dir=7', '--retrieval_layers=[1, 2]'])
    assert (settings.n_layer, settings.batch_size, settings.out_dir) == (5, 6, '7')
    assert settings.learning_rate == 1.0 and isinstance(settings.learning_rate, float)
    assert settings.retrieval_layers == [1, 2]
    assert load_settings(['--n_layer=5', path]).n_layer == 3


def test_a_checkpoints_settings_lie_between_the_defaults_and_the_arguments():
    settings = load_settings(['--n_head=3'], given=dict(n_layer=7, n_head=7, from_another_version=1))
    assert (settings.n_layer, settings.n_head) == (7, 3)
    assert not hasattr(settings, 'from_another_version')


@pytest.mark.parametrize('arguments, said', [
    (['--n_layers=3'], "unknown config key 'n_layers' in the command line: did you mean 'n_layer'?"),
    (['--n_layer=three'], "n_layer in the command line must be of type int, such as 12, but is 'three'"),
    (['--n_layer=3.0'], 'must be of type int'),
    (['--compile=1'], 'must be of type bool'),
    (['--n_layer', '3'], "'--n_layer' is neither a config file nor --key=value"),
    (['missing.py'], "no config file 'missing.py'"),
])
def test_a_wrong_argument_is_named_with_what_to_do(arguments, said):
    with pytest.raises(UserError) as error:
        load_settings(arguments)
    assert said in str(error.value)


@pytest.mark.parametrize('text, said', [
    ('n_layr = 3', "did you mean 'n_layer'?"),
    ('n_layer = "3"', "must be of type int, such as 12, but is '3' of type str"),
    ('n_layer = ', 'line 1: invalid syntax'),
])
def test_a_wrong_config_file_is_named_with_what_to_do(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        load_settings([config(tmp_path, text)])
    assert said in str(error.value) and 'c.py' in str(error.value)


def test_a_token_of_the_wrong_type_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv('MILVUS_TOKEN', 'hush')
    with pytest.raises(UserError) as error:
        load_settings([config(tmp_path, 'retrieval_milvus_token = 7654321')])
    assert '7654321' not in str(error.value) and 'hush' not in str(error.value)


def test_help_lists_every_setting_with_its_comment_and_hides_the_token():
    answer = subprocess.run([sys.executable, 'train.py', '--retrieval_milvus_token=hush', '--help'], cwd=ROOT,
                            capture_output=True, text=True)
    assert answer.returncode == 0
    for key, comment in defaults_and_comments()[1].items():
        assert f'--{key}=' in answer.stdout and comment in answer.stdout
    assert 'hush' not in answer.stdout
