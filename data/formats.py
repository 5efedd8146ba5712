"""
The rows of one file, whatever its format: JSON Lines, JSON, CSV, TSV, Parquet, or text, compressed or not.

    for where, row in read_rows('docs.jsonl.gz', config):  # 'line 1', (id or None, text)

Only the columns of the text and the id are looked at, and both are strings as they were written. A row that holds no
document is a BadRow in its place: the caller decides whether to go on. A file that cannot be read is a UserError.
"""
import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import sys
import zlib

from configurator import UserError

TEXT, LINES, DELIMITED, TABLE = range(4)
KINDS = {'.parquet': TABLE, '.jsonl': LINES, '.ndjson': LINES, '.json': LINES, '.csv': DELIMITED, '.tsv': DELIMITED,
         '.txt': TEXT, '.text': TEXT, '.md': TEXT, '.markdown': TEXT, '.rst': TEXT}
COMPRESSED = ('.gz', '.zst', '.bz2', '.xz')
KNOWN = f'{", ".join(KINDS)}; all but .parquet also as {", ".join(COMPRESSED)}'
BOM = '\ufeff'
ROWS = 128  # of a table, that are converted together


class BadRow(Exception):
    """What stands in for a row that holds no document; the message says why."""


class Number(str):
    """A number of a JSON file, as it was written."""


def split_ending(path):
    """('.jsonl', '.gz') of a path, in lower case; ('', '') for a kind of file that cannot be read."""
    stem, ending = os.path.splitext(path.lower())
    compression = ending if ending in COMPRESSED else ''
    if compression:
        ending = os.path.splitext(stem)[1]
    is_known = ending in KINDS and not (compression and KINDS[ending] == TABLE)
    return (ending, compression) if is_known else ('', '')


def read_rows(path, config):
    """
    Yields (where, row) of a file with a known ending: a description such as 'line 7', and (id or None, text) by the
    DatasetConfig's text_field and id_field, or a BadRow. UserError if the file cannot be read.
    """
    ending, compression = split_ending(path)
    kind = KINDS[ending]
    try:
        if kind == TABLE:
            yield from read_parquet(path, config)
            return
        with open_decompressed(path, compression) as file:
            if kind == TEXT:
                yield 'as a whole', read_text(file)
            elif kind == LINES:
                yield from read_json(file, config, ending)
            else:
                yield from read_delimited(file, config, '\t' if ending == '.tsv' else ',')
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow's are among them
        reason = getattr(error, 'strerror', None) or f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
        raise UserError(f'{path} cannot be read ({reason}): see whether it is whole, and what its ending says'
                        ) from error


def open_decompressed(path, compression):
    """The file opened for reading bytes, after a look at its first ones."""
    openers = {'': open, '.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zstd}
    file = openers[compression](path, 'rb')
    if not hasattr(file, 'peek'):
        file = io.BufferedReader(file)
    if file.peek(2)[:2] in (b'\xff\xfe', b'\xfe\xff'):
        file.close()
        raise UserError('it is UTF-16, and only UTF-8 can be read: convert it, e.g. with iconv -f UTF-16 -t UTF-8')
    return file


def open_zstd(path, _):
    import pyarrow
    return pyarrow.CompressedInputStream(pyarrow.OSFile(path), 'zstd')


def read_text(file):
    """The whole file is one text."""
    try:
        return None, decode(file.read())
    except BadRow as error:
        return error


def read_json(file, config, ending):
    """JSON Lines; or an array of objects, or one object over several lines, which are read as a whole."""
    if file.peek(4096).removeprefix(BOM.encode()).lstrip()[:1] == b'[':
        rows = parse(file.read())
        if isinstance(rows, BadRow):
            raise UserError(str(rows))
        for number, row in enumerate(rows, 1):
            yield f'object {number}', choose(row, config)
        return
    first = file.readline()
    if ending == '.json' and isinstance(parse(first), BadRow):
        rest = file.read()
        whole = parse(first + rest)
        if not isinstance(whole, BadRow):
            yield 'as a whole', choose(whole, config)
            return
        file = io.BytesIO(rest)
    for number, line in enumerate(itertools.chain([first], file), 1):
        if line.strip():
            yield f'line {number}', choose(parse(line), config)


def parse(data):
    """The value of JSON bytes, or a BadRow. Numbers stay as they are written."""
    try:
        return json.loads(decode(data).removeprefix(BOM), parse_int=Number, parse_float=Number)
    except json.JSONDecodeError as error:
        line = f'line {error.lineno}, ' * (error.lineno > 1)
        return BadRow(f'broken JSON ({error.msg}, {line}column {error.colno})')
    except RecursionError:
        return BadRow('JSON that is nested too deeply')
    except BadRow as error:
        return error


def decode(data):
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b'\n')
        raise BadRow(f'not UTF-8 (byte 0x{data[error.start]:02x}{f" in line {line + 1}" if line else ""})') from error


def read_delimited(file, config, delimiter):
    """CSV or TSV with a header."""
    csv.field_size_limit(sys.maxsize)
    # bytes that are not UTF-8 become lone surrogates, so that the rows after them can be read
    lines = io.TextIOWrapper(file, encoding='utf-8-sig', errors='surrogateescape', newline='')
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    last = 0
    try:
        header = next(reader, [])
        check_columns(dict.fromkeys(header), config)
        last = reader.line_num
        for values in reader:
            where, last = f'line {last + 1}', reader.line_num
            if not values:
                continue
            if len(values) != len(header):
                yield where, BadRow(f'{len(values)} values for {len(header)} columns: a value that holds '
                                    f'{delimiter!r}, double quotes or line ends has to stand in double quotes')
                continue
            row = choose(dict(zip(header, values, strict=True)), config)
            is_bad = not isinstance(row, BadRow) and any(
                '\udc80' <= c <= '\udcff' for value in row if value and not value.isascii() for c in value)
            yield where, BadRow('not UTF-8') if is_bad else row
    except csv.Error as error:
        raise UserError(f'broken CSV in the row that begins in line {last + 1} ({error}): double quotes open and close '
                        f'whole values, and are doubled inside of them') from error


def read_parquet(path, config):
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = check_columns(as_tree(file.schema_arrow), config)
            yield from rows_of_batches(file.iter_batches(ROWS, columns=fields), config)
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error


def rows_of_batches(batches, config):
    """(where, row) of pyarrow's batches or tables."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f'row {number}', choose(row, config)


def as_tree(fields):
    """{name: tree of its children, or None} of a pyarrow schema or struct."""
    import pyarrow
    return {field.name: as_tree(field.type) if pyarrow.types.is_struct(field.type) else None for field in fields}


def check_columns(columns, config):
    """Those of the text and id fields that a tree of columns has. UserError if one is missing that has to be there."""
    found = [name for name in (config.text_field, config.id_field) if pick(columns, name) is not MISSING]
    for name, setting in ((config.text_field, 'text_field'), (config.id_field, 'id_field')):
        if name not in found and (setting == 'text_field' or config.needs_id):
            raise UserError(f'it has no column {name!r}: its columns are {", ".join(columns) or "none"}; set {setting}')
    return found


MISSING = object()


def pick(row, name):
    """A field of a dict by its name, or, inside of other dicts, by a path such as 'doc.text'; MISSING without one."""
    if name in row:
        return row[name]
    first, dot, rest = name.partition('.')
    return pick(row[first], rest) if dot and isinstance(row.get(first), dict) else MISSING


def choose(row, config):
    """(id or None, text) of a row, a dict of values of any type, or a BadRow."""
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        return BadRow(f'no object with fields, but {describe(row)}')
    text, document_id = pick(row, config.text_field), pick(row, config.id_field)
    for value, name, setting in ((text, config.text_field, 'text_field'), (document_id, config.id_field, 'id_field')):
        if value is MISSING and (setting == 'text_field' or config.needs_id):
            return BadRow(f'no field {name!r}; its fields are {", ".join(row)}: set {setting}')
    try:
        return as_id(None if document_id is MISSING else document_id), as_text(text)
    except BadRow as error:
        return error


def as_text(value):
    if isinstance(value, bytes):
        return decode(value)
    if value is None:
        return ''
    if not isinstance(value, str) or isinstance(value, Number):
        raise BadRow(f'no text, but {describe(value)}')
    return value


def as_id(value):
    """An id as a string, None for none."""
    if isinstance(value, bool):
        return str(value).lower()  # as JSON writes it
    if isinstance(value, bytes):
        try:
            return value.decode() or None
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, (dict, list)):
        raise BadRow(f'no id, but {describe(value)}')
    return None if value is None or value != value else str(value) or None  # NaN is what pandas writes for none


def describe(value):
    if isinstance(value, (int, float, Number)):
        return f'{"the" if isinstance(value, bool) else "the number"} {str(value)[:40]}'
    kind = dict(str='a text', list='a list', dict='an object', NoneType='null').get(type(value).__name__)
    return kind or f'a value of type {type(value).__name__}'
