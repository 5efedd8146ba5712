import json
import math
import os
import subprocess
import sys

import pytest

import train
from configurator import (
    RANGES,
    UserError,
    check_range,
    defaults_and_comments,
    load_settings,
    save_atomically,
    to_json,
    visible,
    write_atomically,
)
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


@pytest.mark.parametrize('flag', [
    '--learning_rate=-1', '--learning_rate=1e999', '--grad_clip=-1.0', '--dropout=1.5', '--dropout=1.0',
    '--max_iters=-5',
    '--warmup_iters=-5', '--beta1=1.5', '--beta2=-0.1', '--seed=-1', '--retrieval_chunk_size=0', '--batch_size=0',
    '--n_embd=-8', '--weight_decay=-0.1', '--retrieval_timeout=-1', '--retrieval_cache_gb=-1', '--eval_tokens=-1',
    '--log_interval=0', '--keep_checkpoints=-1', '--retrieval_longest_match=128', '--min_lr=-2',
    '--max_iters=100000000000', '--seed=99999999999999999999', f'--learning_rate={10**400}'])
def test_a_number_out_of_its_range_is_refused_with_its_bounds(flag):
    key = flag[2:].partition('=')[0]
    with pytest.raises(UserError, match=f'{key} must be at least [-0-9.]+( and below [0-9.]+| and finite)?, but is '):
        load_settings([flag])


def test_nan_is_in_no_range():
    for key, (least, below) in RANGES.items():
        with pytest.raises(UserError, match='but is nan'):
            check_range(key, math.nan, least, below)


def test_every_numeric_setting_has_a_range_that_holds_its_default():
    settings, _ = defaults_and_comments()
    numeric = {key for key, value in settings.items() if type(value) in (int, float)}
    assert numeric == RANGES.keys()
    for key in numeric:
        check_range(key, settings[key], *RANGES[key])


CONFIGS = {
    'a byte order mark': b'\xef\xbb\xbfn_layer = 3\n',
    'an encoding': '# -*- coding: latin-1 -*-\nout_dir = "caf\xe9"\nn_layer = 3\n'.encode('latin-1'),
    'CRLF': b'n_layer = 2\r\nn_layer = 3\r\n',
    'functions': b'def layers(n):\n    wide = 5\n    return n\nn_layer = layers(3)\nclass Width:\n    n_embd = 7\n',
    'loops': b'n_layer = 0\nfor i in range(3):\n    n_layer += 1\n',
    'branches': b'if True:\n    n_layer = 3\nelse:\n    n_layr = 3\n',
    'with and try': b'try:\n    with open("no") as file:\n        pass\nexcept OSError as error:\n    n_layer = 3\n',
    'comprehensions': b'_sizes = [size for size in range(4)]\nn_layer = _sizes[-1]\n',
    'annotations': b'n_layer: int = 3\n',
    'star imports': b'from math import *\nfrom base_config import *\n',
    'match': b'match 1:\n    case 1:\n        n_layer = 3\n',
    'an imported value that is changed': b'from base_config import n_layer\nn_layer = n_layer * 1\n',
    'a setting as the variable of a loop': b'for n_layer in (1, 2, 3):\n    pass\n',
    'imported modules': b'import os, math as _m\nfrom json import dumps\nn_layer = 3\n',
}


@pytest.mark.parametrize('text', CONFIGS.values(), ids=CONFIGS)
def test_a_config_file_may_be_any_python_that_sets_settings(tmp_path, monkeypatch, text):
    (tmp_path / 'base_config.py').write_text('n_layer = 3\nhelper = 5\n')
    (tmp_path / 'c.py').write_bytes(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = load_settings([str(tmp_path / 'c.py')])
    assert settings.n_layer == 3 and settings.n_embd == 768
    assert settings.out_dir == ('café' if b'caf' in text else 'out')


@pytest.mark.parametrize('text, said', [
    ('n_layer = 3\nn_embd = 1 / 0\n', 'line 2: ZeroDivisionError: division by zero'),
    ('import nowhere_at_all\n', "line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ('def width():\n    return [][0]\n\nn_embd = width()\n', 'line 2: IndexError'),
    ('return 3\n', "line 1: 'return' outside function"),
    ('n_layer = 3\nfor layers in []: pass\nn_layr = 4\n', "did you mean 'n_layer'?"),
    ('if True:\n    n_layr = 4\n', "did you mean 'n_layer'?"),
    ('match 1:\n    case 1:\n        n_layr = 4\n', "did you mean 'n_layer'?"),
    ('from misspelt import *\n', "unknown config key 'learnin_rate'"),
    ('from mistyped import *\n', 'learning_rate in'),
    ('for dropout in ("a", "b"): pass\n', 'dropout in'),
    ('n_layer = 3\nimport broken\n', 'broken.py, line 4: '),
    ('\x00', 'null byte'),
])
def test_an_error_in_a_config_file_is_named_with_its_line(tmp_path, monkeypatch, text, said):
    (tmp_path / 'misspelt.py').write_text('learnin_rate = 3.0\n')
    (tmp_path / 'mistyped.py').write_text('learning_rate = "high"\n')
    (tmp_path / 'broken.py').write_text('\n\n\n1 +\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as error:
        load_settings([config(tmp_path, text)])
    assert said in str(error.value) and 'c.py' in str(error.value)


def test_output_that_the_terminals_encoding_lacks_is_escaped():
    code = ('from configurator import *\nwith user_errors_as_one_line():\n    print("caf\u00e9 \u4e2d")\n'
            '    raise UserError("\u4e2d")')
    answer = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'})
    assert answer.returncode == 2 and answer.stdout == 'caf\\xe9 \\u4e2d\n' and answer.stderr == 'error: \\u4e2d\n'


def test_characters_that_a_terminal_or_a_page_acts_on_are_shown_as_symbols():
    assert visible('a\x00b\x1b[31mc\td\n\x7f\u202eevil\u2066') == 'a\u2400b\u241b[31mc\td\n\ufffd\ufffdevil\ufffd'
    assert visible('a\u200bb\u2028c\u2060\u180e\u206f\U000e0041') == 'a\ufffdb\ufffdc' + 4 * '\ufffd'
    for text in ('ünïcödé 𝛑 中文 🙂',
                 'नमस्ते क्\u200dष', '👩\u200d💻', 'می\u200cخواهم', 'soft\u00adhyphen', '\u0600\u06f1'):
        assert visible(text) == text


def test_an_error_acts_on_no_terminal():
    code = 'from configurator import *\nwith user_errors_as_one_line():\n    raise UserError("a\\x1b[2Jb\\u202ec")'
    answer = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
    assert answer.returncode == 2 and answer.stderr == 'error: a\u241b[2Jb\ufffdc\n'


def test_a_file_that_cannot_be_written_whole_is_removed_and_the_old_one_stays(tmp_path):
    write_atomically('old', str(tmp_path / 'file'))
    with pytest.raises(ValueError):
        save_atomically(lambda path: [open(path, 'w').close(), int('x')], str(tmp_path / 'file'))
    assert [path.name for path in tmp_path.iterdir()] == ['file'] and (tmp_path / 'file').read_text() == 'old'


def test_a_full_disk_is_one_line_in_every_command():
    code = ('import errno\nfrom configurator import *\nwith user_errors_as_one_line():\n'
            '    raise OSError(errno.ENOSPC, "No space left on device", "out/file")')
    answer = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stderr == ('error: out/file cannot be written (No space left on device): free some space, or name '
                             'another folder\n')


def test_json_has_null_for_what_is_not_finite():
    assert json.loads(to_json(dict(a=math.nan, b=[math.inf, 1.5], c=-math.inf))) == dict(a=None, b=[None, 1.5], c=None)


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
