"""
Settings: the globals at the top of train.py, overridden by config files and by --key=value.

    python train.py config/quickstart.py --max_iters=100 --retrieval_layers="[2, 4]"
    python train.py --help

train.py's globals are the only home of the defaults, and the comment beside each is its documentation. Every command
reads them here, so populate, sample and train cannot disagree. A config file is Python and is executed: use only those
that you trust.
"""
import ast
import difflib
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from types import SimpleNamespace

TRAIN_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
END_OF_SETTINGS = '# end of settings'


class UserError(Exception):
    """An error that the user can correct. The message says what was wrong, what was found and what to do."""
    exit_code = 2


@contextmanager
def user_errors_as_one_line():
    """Print a UserError as one line on stderr and exit with its code. Any other exception keeps its traceback."""
    try:
        yield
    except UserError as error:
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def save_atomically(save, path):
    """Write to a temporary file and rename it: readers see the old or the complete new file."""
    save(f'{path}.tmp')
    os.replace(f'{path}.tmp', path)


def write_atomically(text, path):
    """As save_atomically, for a string."""
    def save(tmp_path):
        with open(tmp_path, 'w', encoding='utf-8') as file:
            file.write(text)
    save_atomically(save, path)


class Settings(SimpleNamespace):
    """The settings of a run, as attributes."""

    def replace(self, **changes):
        """A copy with some settings changed."""
        return Settings(**{**vars(self), **changes})

    def without_secrets(self):
        """The settings as a dict of plain values, for checkpoints and logs."""
        return {key: as_plain(value) for key, value in vars(self).items() if not is_secret(key)}


def as_plain(value):
    """Convert dataclasses, enums and tuples to values that JSON can hold."""
    if is_dataclass(value):
        return asdict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: as_plain(v) for key, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def load_settings(arguments, given=None):
    """
    The Settings of a run: train.py's defaults, then `given` (a checkpoint's, as a dict), then each argument from left
    to right, a config file's path or --key=value. UserError if one of them is wrong.
    """
    settings, comments = defaults_and_comments()
    for key, value in (given or {}).items():
        if key in settings:  # a checkpoint of another version may have others
            settings[key] = check_type(key, value, settings[key], 'the checkpoint')
    for argument in arguments:
        if argument in ('-h', '--help'):
            print_help(settings, comments)
            sys.exit(0)
        override = parse_flag(argument, settings) if argument.startswith('-') else run_config(argument, settings)
        settings.update(override)
    return Settings(**settings)


def defaults_and_comments():
    """{key: default} and {key: comment} of the assignments at the top of train.py, which is parsed, not imported."""
    with open(TRAIN_SCRIPT, encoding='utf-8') as file:
        source = file.read().split(END_OF_SETTINGS)[0]
    lines = source.splitlines()
    names, comments = {'os': os}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            exec(compile(ast.Module([node], []), TRAIN_SCRIPT, 'exec'), names)
            comments[node.targets[0].id] = lines[node.end_lineno - 1].partition('  # ')[2]
    return {key: names[key] for key in comments}, comments


def run_config(path, settings):
    """Execute a config file and return what it sets, as a dict."""
    if not os.path.isfile(path):
        raise UserError(f'no config file {path.partition("=")[0]!r}: give the path of a Python file, such as '
                        f'config/quickstart.py, or --key=value')
    names = {'__file__': os.path.abspath(path), '__name__': 'config'}
    with open(path, encoding='utf-8') as file:
        source = file.read()
    try:
        tree = ast.parse(source, path)
        code = compile(tree, path, 'exec')
    except SyntaxError as error:
        raise UserError(f'config file {path}, line {error.lineno}: {error.msg}') from error
    exec(code, names)
    imported = {(alias.asname or alias.name).split('.')[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    found = {key: value for key, value in names.items() if not key.startswith('_') and key not in imported}
    return {check_key(key, settings, path): check_type(key, value, settings[key], path)
            for key, value in found.items()}


def parse_flag(argument, settings):
    """`--key=value` to {key: value}. The value is a Python literal; a string setting takes the text as it is."""
    match = re.fullmatch(r'--([A-Za-z_]\w*)=(.*)', argument, re.DOTALL)
    if not match:
        raise UserError(f'argument {argument.partition("=")[0]!r} is neither a config file nor --key=value: write '
                        f'--key=value without spaces around the =')
    key, text = match.groups()
    check_key(key, settings, 'the command line')
    value = text
    if not isinstance(settings[key], str):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pass  # stays a string, which check_type reports
    return {key: check_type(key, value, settings[key], 'the command line')}


def is_secret(key):
    """Settings that are never printed, logged or saved."""
    return key.endswith('_token')


def drop_secrets_from_argv():
    """Remove secrets from sys.argv, which wandb logs."""
    sys.argv = [argument for argument in sys.argv if not is_secret(argument.partition('=')[0])]


def check_key(key, settings, where):
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0.5)
        hint = f'did you mean {nearest[0]!r}?' if nearest else 'python train.py --help lists all keys'
        raise UserError(f'unknown config key {key!r} in {where}: {hint}')
    return key


def check_type(key, value, default, where):
    """The value, if it has its default's type. An int is also a float."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        example, shown = ('(hidden)',) * 2 if is_secret(key) else (repr(default), repr(value))
        raise UserError(f'{key} in {where} must be of type {type(default).__name__}, such as {example}, '
                        f'but is {shown} of type {type(value).__name__}')
    return value


def print_help(settings, comments):
    print('usage: [config/FILE.py] [--key=value ...]\n\nA config file is Python that sets some of these keys. '
          'Later arguments win. Keys, values, meaning:\n')
    for key, comment in comments.items():
        shown = '(hidden)' if is_secret(key) and settings[key] else repr(settings[key])
        print(f'  --{key}={shown}\n        {comment}')
