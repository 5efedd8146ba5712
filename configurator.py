"""
Settings: the globals at the top of train.py, overridden by config files and by --key=value.

    python train.py config/quickstart.py --max_iters=100 --retrieval_layers="[2, 4]"
    python train.py --help

train.py's globals are the only home of the defaults, and the comment beside each is its documentation. Every command
reads them here, so populate, sample and train can't disagree. A config file is a Python program and is run as one:
use only those that you trust.
"""
import ast
import difflib
import os
import re
import sys
from contextlib import contextmanager

TRAIN_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
END_OF_SETTINGS = '# end of settings'


class UserError(Exception):
    """Something that the user can put right. The message says what was wrong, what was found and what to do."""
    exit_code = 2


@contextmanager
def user_errors_as_one_line():
    """Turn a UserError into one line on stderr and its exit code. Any other exception keeps its traceback."""
    try:
        yield
    except UserError as error:
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def save_atomically(save, path):
    """Write beside and rename: the file is the old one or the whole new one, never a part."""
    save(path + '.tmp')
    os.replace(path + '.tmp', path)


def load_settings(arguments, given=None):
    """
    The settings of a run, as a dict: train.py's defaults, then `given` (those of a checkpoint), then each of the
    arguments from left to right, a config file's path or --key=value. UserError where one of them is wrong.
    """
    settings, comments = defaults_and_comments()
    for key, value in (given or {}).items():
        if key in settings:  # a checkpoint of another version may know others
            settings[key] = check_type(key, value, settings[key], 'the checkpoint')
    for argument in arguments:
        if argument in ('-h', '--help'):
            print_help(settings, comments)
            sys.exit(0)
        override = parse_flag(argument, settings) if argument.startswith('-') else run_config(argument, settings)
        settings.update(override)
    return settings


def defaults_and_comments():
    """{key: default} and {key: comment} of the assignments at the top of train.py, which is read and not imported."""
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
    """Run a config file and return what it sets."""
    if not os.path.isfile(path):
        raise UserError(f'no config file {path.partition("=")[0]!r}: give the path of a Python file, such as '
                        f'config/quickstart.py, or --key=value')
    names = {'__file__': os.path.abspath(path), '__name__': 'config'}
    with open(path, encoding='utf-8') as file:
        try:
            code = compile(file.read(), path, 'exec')
        except SyntaxError as error:
            raise UserError(f'config file {path}, line {error.lineno}: {error.msg}') from error
    exec(code, names)
    imported = set(imported_names(code))
    found = {key: value for key, value in names.items() if not key.startswith('_') and key not in imported}
    return {check_key(key, settings, path): check_type(key, value, settings[key], path)
            for key, value in found.items()}


def imported_names(code):
    """The names that a config file binds by import, which are no settings."""
    with open(code.co_filename, encoding='utf-8') as file:
        for node in ast.walk(ast.parse(file.read())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    yield (alias.asname or alias.name).split('.')[0]


def parse_flag(argument, settings):
    """`--key=value` to {key: value}. The value is a Python literal; a setting that is a string takes it as it is."""
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
            pass  # stays a string, and check_type says what was expected
    return {key: check_type(key, value, settings[key], 'the command line')}


def is_secret(key):
    """Settings that are never printed, logged or saved."""
    return key.endswith('_token')


def check_key(key, settings, where):
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0.5)
        hint = f'did you mean {nearest[0]!r}?' if nearest else 'python train.py --help lists all keys'
        raise UserError(f'unknown config key {key!r} in {where}: {hint}')
    return key


def check_type(key, value, default, where):
    """The value, if it is of its default's type. An int is also a float."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        example, shown = ('(hidden)',) * 2 if is_secret(key) else (repr(default), repr(value))
        raise UserError(f'{key} in {where} must be of type {type(default).__name__}, such as {example}, '
                        f'but is {shown} of type {type(value).__name__}')
    return value


def print_help(settings, comments):
    print('usage: [config/FILE.py] [--key=value ...]\n\nA config file is Python that sets some of these keys; '
          'a later argument wins. Keys, values, meaning:\n')
    for key, comment in comments.items():
        shown = '(hidden)' if is_secret(key) and settings[key] else repr(settings[key])
        print(f'  --{key}={shown}\n        {comment}')
