"""
Documents as they were written: those of a file, a folder, a pattern such as docs/*.jsonl, a folder of
`datasets.save_to_disk`, or a dataset of the hub.

    for document in load_documents(as_dataset_configs(['my/documents.jsonl'], 'train_datasets')):
        print(document.id, document.text)

A document is its id, or, without one, a hash of its text, and the source that the user gave: never where it lies, how
its file is called, or what else stands there.
"""
import glob
import hashlib
import itertools
import logging
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from types import FunctionType

from configurator import UserError, reason_of
from data.chunking import document_hash, hash64
from data.formats import BOM, KNOWN, LEFT_OUT, ROWS, BadRow, check_schema, read_rows, rows_of_batches, split_ending

LEFTOVERS = ('_temporary', '_delta_log', '_spark_metadata')  # folders of programs that write tables

os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')


@dataclass
class DatasetConfig:
    """One dataset, of one weight, whatever the number of its files."""
    path: str  # a file, a folder of files or of `datasets.save_to_disk`, a pattern such as docs/*.jsonl, a hub's name
    name: str = ''  # configuration (subset) of a hub's dataset
    split: str = 'train'  # split of a hub's dataset or of a saved folder that has several
    revision: str = ''  # commit, branch or tag of a hub's dataset
    weight: float = 1.0  # share of the documents drawn, relative to the list's others; of tokens, if one is streamed
    epochs: int = 0  # how often training may read it; after that the others go on without it; 0: without end
    text_field: str = 'text'  # column that holds the text; a path such as 'doc.text' if it is nested
    id_field: str = 'id'  # column that identifies the document; without it, or with '', a hash of its text does
    source: str = ''  # tells documents of the same id apart, of datasets that number theirs alike
    skip_bad: bool = False  # leave out and count rows without a text, instead of ending with an error
    filter_fn: Callable | None = None  # of a row, a dict of all its columns; rows are left out where it is false
    max_documents: int = 0  # read the first ones only; 0: all
    val_fraction: float = 0.0  # share of the documents that an entry of val_datasets reads, and train_datasets do not
    streaming: bool = False  # read it while training, instead of once to data_cache_dir
    shuffle_buffer_size: int = 10_000  # documents of a streamed dataset that are shuffled together
    held_out: bool = False  # read the val_fraction, not the rest: set by as_dataset_configs, by the list it stands in
    whole_rows: bool = False  # read rows with all their columns: set by read_conversations

    def __post_init__(self):
        if isinstance(self.path, os.PathLike):
            self.path = os.fspath(self.path)
        for item in fields(self):
            value, kind = getattr(self, item.name), item.type
            is_kind = isinstance(value, (int, float) if kind is float else kind)
            if not is_kind or (isinstance(value, bool) and kind is not bool):
                name = {float: 'number', int: 'whole number', Callable | None: 'function'}.get(kind) or kind.__name__
                raise TypeError(f'{item.name} must be a {name}, but is {value!r}' + (
                    ': a checkpoint keeps its name alone, so give the config file, too' if item.name == 'filter_fn'
                    and isinstance(value, str) else ''))
        if not self.path:
            raise TypeError('path must not be empty')
        if not 0 < self.weight < math.inf:
            raise TypeError(f'weight must be positive and finite, but is {self.weight}')
        if not 0 <= self.val_fraction < 1:
            raise TypeError(f'val_fraction must be at least 0 and below 1, but is {self.val_fraction}')
        for name, least in (('epochs', 0), ('max_documents', 0), ('shuffle_buffer_size', 1)):
            if getattr(self, name) < least:
                raise TypeError(f'{name} must be at least {least}, but is {getattr(self, name)}')
        if self.shuffle_buffer_size != DatasetConfig.shuffle_buffer_size and not self.streaming:
            raise TypeError('shuffle_buffer_size is of streamed datasets, and streaming is False: others are shuffled '
                            'as a whole; leave it out')

    def __getstate__(self):  # a function of a config file cannot be imported by the processes that read
        import dill
        return {**vars(self), 'filter_fn': self.filter_fn and dill.dumps(self.filter_fn, recurse=True)}

    def __setstate__(self, state):
        import dill
        vars(self).update(state, filter_fn=state['filter_fn'] and dill.loads(state['filter_fn']))

    def what_is_read(self, place):
        """Plain values that decide which documents are read of the files at `place`, the code of filter_fn included."""
        read = {name: value for name, value in asdict(self).items() if name not in ('weight', 'epochs', 'whole_rows')}
        if self.filter_fn:
            from datasets.fingerprint import Hasher
            wanted = self.filter_fn
            if isinstance(wanted, FunctionType):  # a copy, as of an imported one the library hashes the name alone
                wanted = FunctionType(wanted.__code__.replace(co_filename=''), wanted.__globals__, wanted.__name__,
                                      wanted.__defaults__, wanted.__closure__)
                wanted.__kwdefaults__ = self.filter_fn.__kwdefaults__
            read['filter_fn'] = Hasher.hash(wanted)
        return {**read, 'path': place}

    def holds(self, doc_id):
        """Whether a document is on this side of val_fraction."""
        is_held_out = hash64('held out', doc_id) % 2**32 < self.val_fraction * 2**32
        return is_held_out == self.held_out

    @property
    def most_documents(self):
        return self.max_documents or 2**62

    @property
    def needs_id(self):
        """Whether each row must have the id column: it was asked for."""
        return self.id_field not in ('id', '')


@dataclass
class Document:
    source: str
    id: str  # its id column, or a hash of its text
    text: str
    has_id: bool = True
    where: str = ''  # it was read, for error messages

    @property
    def name(self):
        """What it is called where it is shown: its source and id, or the beginning of a text without an id."""
        name = self.id if self.has_id else f'{self.id[:8]} {" ".join(self.text[:200].split())[:60]}'
        return f'{self.source}/{name}' if self.source else name


@dataclass
class Counts:
    """What was found in a dataset."""
    files: int = 0
    other_files: int = 0  # of a folder, whose kind cannot be read
    documents: int = 0  # different ones, with text
    duplicates: int = 0  # of the same id and text
    empty: int = 0  # without text
    bad: int = 0  # rows that were left out
    filtered: int = 0  # rows that filter_fn has left out
    other_side: int = 0  # documents on the other side of val_fraction
    kinds: dict = field(default_factory=dict)  # {ending: number of files}

    def add(self, other):
        """Count what was found in another part of the same files."""
        for name in ('documents', 'duplicates', 'empty', 'bad', 'filtered', 'other_side'):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def describe(self):
        """One line, of what there is."""
        kinds = ', '.join(f'{count:,} {kind}' for kind, count in self.kinds.items())
        parts = [f'{self.documents:,} documents' + f' in {self.files:,} files' * (self.files > 1)
                 + f' ({kinds})' * (len(self.kinds) > 1)]
        parts += [f'{count:,} {what}' for count, what in (
            (self.duplicates, 'duplicates'), (self.empty, 'empty'), (self.bad, 'bad rows left out'),
            (self.filtered, 'left out by filter_fn'), (self.other_side, 'on the other side of val_fraction'),
            (self.other_files, 'files of other kinds')) if count]
        return ', '.join(parts)


@dataclass
class Files:
    """Where a dataset lies."""
    paths: list = field(default_factory=list)  # of files with known endings
    other: int = 0  # files with unknown ones, which a folder may hold
    saved: str = ''  # the folder of a saved dataset, whose files `paths` are
    hub: str = ''  # its name on the hub
    rows: object = None  # of a dataset of the hub, once it is there
    revision: str = ''  # of a streamed one: the commit that is read


def find_files(config):
    """The Files of a DatasetConfig. UserError if there is nothing."""
    path = os.path.expanduser(config.path)
    if os.path.isfile(path):
        if not split_ending(path)[0]:
            raise UserError(f'{config.path!r} is a file of no kind that can be read: its name has to end in one of '
                            f'{KNOWN}')
        return Files([path])
    if os.path.isdir(path):
        found = files_of_folder(path)
    elif set('*?') & set(path):
        pattern = path.replace('[', '[[]')  # brackets are part of names
        matches = [files_of_folder(match) if os.path.isdir(match) else Files([match]) if split_ending(match)[0]
                   and is_regular(match) else Files(other=1) for match in sorted(glob.glob(pattern, recursive=True))
                   if not set(LEFTOVERS) & set(match.split(os.sep))]
        if not matches:
            raise UserError(f'no file matches {config.path!r}: correct the pattern, or make the files first')
        if any(match.saved for match in matches):
            raise UserError(f'{config.path!r} matches a folder of save_to_disk: name each of them as a dataset')
        by_place = {os.path.realpath(p): p for match in matches[::-1] for p in match.paths[::-1]}  # links lead to some
        found = Files(list(by_place.values())[::-1], sum(match.other for match in matches))
    elif not split_ending(path)[0] and re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', config.path):
        return Files(hub=config.path)
    else:
        raise UserError(f'no corpus at {config.path!r}: make it first, e.g. with python data/python_source/prepare.py, '
                        f'or name another file in the config')
    if not found.paths:
        raise UserError(f'{config.path!r} has no file that can be read, and {found.other:,} of other kinds: their '
                        f'names have to end in one of {KNOWN}')
    return found


def files_of_folder(folder):
    """The Files below a folder, without hidden ones, links followed."""
    if is_saved(folder):
        paths = glob.glob(f'{glob.escape(folder)}/**', recursive=True)
        return Files(sorted(path for path in paths if os.path.isfile(path)), saved=folder)

    def cannot_list(error):
        raise UserError(f'{error.filename} cannot be read ({error.strerror}): make it readable, or move it elsewhere')

    found, seen = Files(), set()
    for parent, folders, names in os.walk(folder, onerror=cannot_list, followlinks=True):
        if is_saved(parent):
            raise UserError(f'{parent} was written by save_to_disk: name it as a dataset of its own')
        folders[:] = sorted(name for name in folders if not name.startswith('.') and name not in LEFTOVERS
                            and os.path.realpath(os.path.join(parent, name)) not in seen)
        seen.update(os.path.realpath(os.path.join(parent, name)) for name in ['.', *folders])  # links may form a ring
        for name in sorted(names):
            path = os.path.join(parent, name)
            if split_ending(name)[0] and not name.startswith(('.', '~$')) and is_regular(path):
                found.paths.append(path)
            else:
                found.other += not name.startswith(('.', '~$'))
    return found


def is_saved(folder):
    """Whether a folder was written by `datasets.save_to_disk`."""
    return all(os.path.isfile(f'{folder}/{name}') for name in ('dataset_info.json', 'state.json')) or os.path.isfile(
        f'{folder}/dataset_dict.json')


def is_regular(path):
    """Whether a path is a file, and no pipe, which would have to be waited for. UserError if it leads nowhere."""
    return stat.S_ISREG(look_at(path).st_mode)


def look_at(path):
    """os.stat, with an error of its own: a link may lead nowhere, and a file go while others are read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): restore it, or remove its name') from error


def read_documents(config, counts, files=None):
    """
    Yields every Document of a DatasetConfig, in the order of its files, duplicates and empty ones with an id included,
    and counts what it finds in `counts`, but for duplicates. UserError if something cannot be read.
    """
    files = files or find_files(config)
    counts.files, counts.other_files = len(files.paths), files.other
    if not files.saved:
        counts.kinds = dict(Counter(split_ending(path)[0] for path in files.paths).most_common())
    return as_documents(read_all_rows(config, files), config, counts, config.most_documents)


def as_documents(rows, config, counts, most=2**62):
    """Yields the Documents of (path, where, row), up to `most` with text in all that `counts` counts."""
    for path, where, row in rows:
        if isinstance(row, BadRow):
            if not config.skip_bad:
                raise UserError(f'{path}, {where}: {row}; correct it, or leave such rows out with '
                                f'DatasetConfig({config.path!r}, skip_bad=True)')
            counts.bad += 1
            continue
        if row is LEFT_OUT:
            counts.filtered += 1
            continue
        document_id, text = row
        text = as_unicode(text).removeprefix(BOM)
        has_id = document_id is not None
        if not text and not has_id:
            counts.empty += 1
            continue
        document_id = as_unicode(document_id) if has_id else text_hash(text)
        if config.val_fraction and not config.holds(document_hash(config.source, document_id)):
            counts.other_side += 1
            continue
        counts.documents += bool(text)
        counts.empty += not text
        yield Document(config.source, document_id, text, has_id, f'{path}, {where}')
        if counts.documents >= most:
            return


def read_all_rows(config, files):
    """(path, where, row) of all files, or of a saved dataset or one of the hub."""
    if files.saved or files.hub:
        rows = files.rows or open_with_datasets(config, files)
        try:
            names = check_schema(rows.features.arrow_schema, config)
            if not config.filter_fn and not config.whole_rows:  # which look at all columns
                rows = rows.select_columns(sorted({name if name in rows.column_names else name.partition('.')[0]
                                                   for name in names}))
            for where, row in rows_of_batches(rows.with_format('arrow').iter(ROWS), config, names):
                yield config.path, where, row
        except (UserError, OSError, ValueError, ArithmeticError) as error:
            raise UserError(f'dataset {config.path!r}: {error}') from error
        return
    for path in files.paths:
        for where, row in read_rows(path, config):
            yield path, where, row


def open_with_datasets(config, files):
    """
    The rows of a saved dataset, which stay where they lie, or of one of the hub: an IterableDataset, if it is streamed,
    and all of the files.revision that is found first.
    """
    import datasets  # takes a second to import
    datasets.disable_progress_bars()
    try:
        if files.hub:
            logging.getLogger('huggingface_hub').setLevel(logging.CRITICAL)  # the error below says what happened
            what = dict(path=config.path, name=config.name or None, revision=files.revision or config.revision or None)
            if not config.streaming:
                return datasets.load_dataset(**what, split=config.split)
            builder = datasets.load_dataset_builder(**what)
            files.revision = files.revision or builder.hash
            return builder.as_streaming_dataset(split=config.split)
        rows = datasets.load_from_disk(files.saved)
        if isinstance(rows, dict) and config.split not in rows:
            raise ValueError(f'no split {config.split!r}, but {", ".join(map(repr, rows))}: set split')
        return rows[config.split] if isinstance(rows, dict) else rows
    except Exception as error:  # the library raises many unrelated classes
        what = f'{config.path!r} is no file or folder here, and the hub did not provide it as a dataset' if files.hub \
            else f'the saved dataset {config.path!r} could not be read'
        raise UserError(f'{what} ({reason_of(error, 300)}): name a file, a folder, a pattern such as docs/*.jsonl, '
                        f'or another dataset') from error


def as_unicode(text):
    """The text with U+FFFD for lone surrogates, which are no characters; tiktoken does the same."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def text_hash(text):
    """What identifies a document without an id, 32 hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load_documents(configs):
    """Every Document with text of the DatasetConfigs, as they were written, duplicates included."""
    for config in configs:
        for document in read_documents(config, Counts()):
            if document.text:
                yield document


def as_dataset_configs(entries, setting):
    """A setting's list of paths, dicts or DatasetConfigs, as DatasetConfigs. UserError if it is anything else."""
    if not entries:
        raise UserError(f'{setting} is empty: list the documents in a config file, e.g. {setting} = '
                        f"[DatasetConfig('my/documents.jsonl')]")
    configs = []
    for entry in entries:
        if isinstance(entry, (str, os.PathLike)):
            entry = dict(path=entry)
        if isinstance(entry, dict) and callable(entry.get('filter_fn')):
            raise UserError(f'{setting} holds a dict with a filter_fn, which other processes cannot be given: write '
                            f'DatasetConfig({entry.get("path")!r}, filter_fn=...) in its place')
        try:
            config = DatasetConfig(**(entry if isinstance(entry, dict) else asdict(entry)))
        except TypeError as error:
            raise UserError(f'{setting} holds {entry!r}, which is no path and no DatasetConfig ({error})') from error
        if setting in ('train_datasets', 'val_datasets'):
            config.held_out = setting == 'val_datasets' and config.val_fraction > 0
        configs.append(config)
    return configs


def check_sides(train, val):
    """UserError if a dataset stands in both lists of DatasetConfigs, and they do not share it by its val_fraction."""
    sides = ('val_fraction', 'text_field', 'id_field', 'source')
    for one, other in itertools.product(train, val):
        differing = [name for name in sides if getattr(one, name) != getattr(other, name)]
        if differing and (one.val_fraction or other.val_fraction) and is_same(one, other):
            name, as_path = differing[0], '' if one.path == other.path else f' as {other.path!r}'
            raise UserError(f'{one.path!r} stands in train_datasets with {name}={getattr(one, name)!r}, and in '
                            f'val_datasets{as_path} with {name}={getattr(other, name)!r}: the two share its documents '
                            f'if these are equal')


def is_same(one, other):
    """Whether two DatasetConfigs read the same files, or a dataset of the hub, whatever they call them."""
    if (one.path, one.name, one.split) == (other.path, other.name, other.split):
        return True
    try:
        paths = [set(map(os.path.realpath, find_files(config).paths)) for config in (one, other)]
    except UserError:  # that one of them is not there is said where it is read
        return False
    return bool(paths[0] & paths[1])


def names_of(configs):
    """What DatasetConfigs are called in a run's reports, each with a name of its own."""
    names = [' '.join(filter(None, [config.path, config.name])) for config in configs]
    return [name if names.count(name) == 1 else f'{name} ({number})' for number, name in enumerate(names, 1)]
