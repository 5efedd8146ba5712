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
import errno
import json
import math
import os
import re
import sys
import traceback
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace

TRAIN_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
END_OF_SETTINGS = '# end of settings'
RANGES = {  # of numeric settings: at least, and below
    **dict.fromkeys(('eval_interval', 'log_interval', 'gradient_accumulation_steps', 'batch_size', 'block_size',
                     'n_layer', 'n_head', 'n_embd', 'retrieval_chunk_size', 'retrieval_prefetch_batches',
                     'retrieval_workers', 'stream_workers', 'num_passages'), (1, 2**31)),
    **dict.fromkeys(('keep_checkpoints', 'max_iters', 'warmup_iters', 'lr_decay_iters', 'retrieval_rerank',
                     'retrieval_k_neighbors', 'retrieval_encoder_layers'), (0, 2**31)),
    **dict.fromkeys(('eval_tokens', 'seed'), (0, 2**62)),
    **dict.fromkeys(('learning_rate', 'weight_decay', 'grad_clip', 'retrieval_cache_gb', 'retrieval_timeout',
                     'data_cache_gb', 'stream_timeout'),
                    (0.0, math.inf)),
    **dict.fromkeys(('dropout', 'beta1', 'beta2'), (0.0, 1.0)),
    'min_lr': (-1.0, math.inf),
    'retrieval_longest_match': (0, 128),  # matches are counted in int8
    'retrieval_pointers': (0, 257),  # of as many places (retrieval/suffix_array.py)
}


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class UserError(Exception):
    """An error that the user can correct. The message says what was wrong, what was found and what to do."""
    exit_code = 2


def reason_of(error, most=200):
    """The class of another library's exception and what it says, up to `most` characters, for a UserError's line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())[:most]}'


@contextmanager
def user_errors_as_one_line():
    """
    Print a UserError as one line on stderr and exit with its code. Any other exception keeps its traceback. Characters
    that the terminal's encoding lacks are escaped, instead of ending a command when its work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        yield
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        exit_with(UserError(f'{error.filename or "a file"} cannot be written ({error.strerror}): free some space, or '
                            f'name another folder'))
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def exit_with(error):
    """Print a UserError as one line on stderr and exit with its code."""
    print('error:', visible(' '.join(str(error).split())), file=sys.stderr)
    sys.exit(error.exit_code)


def visible(text):
    """
    Text of documents, models and files for a terminal or a page, which act on some characters: invisible ones, such as
    those that control a terminal or turn the direction of writing, are shown as symbols. Kept are tab, line feed, the
    soft hyphen, the joiners that scripts and emoji need, and the Arabic number signs, which are visible.
    """
    def symbol(c):
        if ord(c) < 32:
            return chr(0x2400 + ord(c))
        is_hidden = unicodedata.category(c) in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp') and unicodedata.bidirectional(c) != 'AN'
        return '\ufffd' if is_hidden or c in '\ufffe\uffff' else c
    return ''.join(c if c in '\t\n\u00ad\u200c\u200d' else symbol(c) for c in text)


def save_atomically(save, path):
    """
    Write to a temporary file and rename it, on disk when this returns: readers see the old or the complete new file,
    whatever happens, and of two writers the later one's. The temporary file is removed if that fails.
    """
    tmp_path = f'{path}.{os.getpid()}.tmp'
    try:
        save(tmp_path)
        sync(tmp_path)
        os.replace(tmp_path, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(tmp_path)
        raise
    with suppress(OSError):  # some file systems sync no folders
        sync(os.path.dirname(path) or '.')


def sync(path):
    """Flush a file or folder to disk: a rename alone survives a crash of the process, but not of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(text, path):
    """As save_atomically, for a string."""
    def save(tmp_path):
        with open(tmp_path, 'w', encoding='utf-8') as file:
            file.write(text)
    save_atomically(save, path)


def to_json(value, **options):
    """json.dumps, with null for what JSON cannot hold: NaN and the infinities."""
    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(finite(value), allow_nan=False, **options)


class Settings(SimpleNamespace):
    """The settings of a run, as attributes."""

    def replace(self, **changes):
        """A copy with some settings changed."""
        return Settings(**{**vars(self), **changes})

    def without_secrets(self):
        """The settings as a dict of plain values, for checkpoints and logs."""
        return {key: as_plain(value) for key, value in vars(self).items() if not is_secret(key)}


def as_plain(value):
    """Convert dataclasses, enums, tuples and functions, of which the name stays, to values that JSON can hold."""
    if is_dataclass(value):
        return as_plain(asdict(value))
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: as_plain(v) for key, v in value.items()}
    if callable(value):
        return getattr(value, '__qualname__', type(value).__name__)
    return [as_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def load_settings(arguments, given=None, can_dry_run=False):
    """
    The Settings of a run: train.py's defaults, then `given` (a checkpoint's, as a dict), then each argument from left
    to right, a config file's path or --key=value. UserError if one of them is wrong, or dry_run for nothing.
    """
    settings, comments = defaults_and_comments()
    if '-h' in arguments or '--help' in arguments:
        print_help(settings, comments)
        sys.exit(0)
    for key, value in (given or {}).items():
        if key in settings and not is_secret(key):  # a checkpoint of another version may have others
            settings[key] = check_value(key, value, settings[key], 'the checkpoint')
    overrides = read_overrides(arguments, settings)
    if not can_dry_run:
        refuse_dry_run(overrides)
    settings.update(overrides)
    return Settings(**settings)


def refuse_dry_run(overrides):
    """UserError if the overrides, a dict, set dry_run, and the command would do its work all the same."""
    if overrides.get('dry_run'):
        raise UserError('dry_run is of train.py and of python -m retrieval.populate alone: leave it out')


def named_settings(arguments):
    """The names of the settings that the arguments set."""
    return set(read_overrides(arguments, defaults_and_comments()[0]))


def read_overrides(arguments, settings):
    """What the arguments set, as a dict; `settings` are those that they override."""
    overrides = {}
    for argument in arguments:
        current = {**settings, **overrides}
        overrides |= parse_flag(argument, current) if argument.startswith('-') else run_config(argument, current)
    return overrides


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
    """Execute a config file and return what it sets, as a dict. UserError, with its line, if it fails."""
    if not os.path.isfile(path):
        raise UserError(f'no config file {path.partition("=")[0]!r}: give the path of a Python file, such as '
                        f'config/quickstart.py, or --key=value')
    names = {'__file__': os.path.abspath(path), '__name__': 'config'}
    try:
        with open(path, 'rb') as file:
            source = file.read()  # bytes: Python itself reads a byte order mark and a declared encoding
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec'), names)
    except UserError:
        raise
    except SyntaxError as error:  # in it, or in a module that it imports
        where = f', {error.filename}' * (error.filename not in (None, path))
        where += f', line {error.lineno}' * bool(error.lineno)
        raise UserError(f'config file {path}{where}: {error.msg}') from error
    except Exception as error:  # whatever the user's code raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f', line {lines[-1]}' if lines else ''
        raise UserError(f'config file {path}{where}: {reason_of(error, 300)}') from error
    assigned, has_star = assigned_names(tree)
    found = {}
    for key, value in names.items():
        is_code = callable(value) or isinstance(value, ModuleType)  # what a config imports or defines to compute with
        if key.startswith('_') or (is_code and not (key in assigned and key in settings)):
            continue
        is_misspelt = has_star and difflib.get_close_matches(key, settings, n=1, cutoff=0.8)
        if key in settings or key in assigned or is_misspelt:
            check_key(key, settings, path)
            found[key] = check_value(key, value, settings[key], path)
    return found


def assigned_names(tree):
    """
    The names that a module assigns, outside its functions and classes and by anything but a loop's head, and whether it
    has an `import *`.
    """
    assigned, has_star, nodes = set(), False, list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        has_star = has_star or (isinstance(node, ast.ImportFrom) and node.names[0].name == '*')
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, (ast.AnnAssign, ast.AugAssign)) else []
        assigned |= {name.id for target in targets for name in ast.walk(target)
                     if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        nodes += [child for child in ast.iter_child_nodes(node)
                  if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case))]
    return assigned, has_star


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
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass  # stays a string, which check_value reports
    return {key: check_value(key, value, settings[key], 'the command line')}


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


def check_value(key, value, default, where):
    """The value, if it has its default's type and is in its range. An int is also a float."""
    if isinstance(default, float) and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not type(default):
        example, shown = ('(hidden)',) * 2 if is_secret(key) else (repr(default), repr(value))
        raise UserError(f'{key} in {where} must be of type {type(default).__name__}, such as {example}, '
                        f'but is {shown} of type {type(value).__name__}')
    if key in RANGES:
        check_range(key, value, *RANGES[key])
    return value


def check_range(key, value, least, below):
    if not least <= value < below:  # also if it is NaN
        bound = f' and below {below}' if below < 2**31 or value >= below else ''  # above that it is a technical one
        bound = ' and finite' if math.isinf(below) and not math.isfinite(value) else bound
        raise UserError(f'{key} must be at least {least}{bound}, but is {value}')


def print_help(settings, comments):
    print('usage: [config/FILE.py] [--key=value ...]\n\nA config file is Python that sets some of these keys. '
          'Later arguments win. Keys, values, meaning:\n')
    for key, comment in comments.items():
        shown = '(hidden)' if is_secret(key) and settings[key] else repr(settings[key])
        print(f'  --{key}={shown}\n        {comment}')
