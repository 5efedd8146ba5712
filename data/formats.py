"""
The rows of one file, whatever its format: JSON Lines, JSON, CSV, TSV, Parquet, or text, compressed or not.

    for where, row in read_rows('docs.jsonl.gz', config):  # 'line 1', (id or None, text)

Only the columns of the text and the id are looked at, but by the config's filter_fn, and both are strings as they were
written. A row that holds no document is a BadRow in its place: the caller decides whether to go on. One that filter_fn
rejects is LEFT_OUT. A file that cannot be read is a UserError.
"""
import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib

from configurator import UserError, reason_of

TEXT, LINES, DELIMITED, TABLE = range(4)
KINDS = {'.parquet': TABLE, '.jsonl': LINES, '.ndjson': LINES, '.json': LINES, '.csv': DELIMITED, '.tsv': DELIMITED,
         '.txt': TEXT, '.text': TEXT, '.md': TEXT, '.markdown': TEXT, '.rst': TEXT}
COMPRESSED = ('.gz', '.zst', '.bz2', '.xz')
KNOWN = f'{", ".join(KINDS)}; all but .parquet also as {", ".join(COMPRESSED)}'
QUOTES = 'double quotes open and close whole values, and are doubled inside of them'
BOM = '\ufeff'
ESCAPED = re.compile('[\udc80-\udcff]')  # bytes that are not UTF-8, in text that was decoded with surrogateescape
ROWS = 128  # of a table, that are converted together


class BadRow(Exception):
    """What stands in for a row that holds no document; the message says why."""


class Number(str):
    """A number of a JSON file, as it was written."""

    @property
    def value(self):
        return float(self) if set('.eE') & set(self) else int(self)


LEFT_OUT = object()  # stands in for a row that filter_fn rejects


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
                yield 'as a whole', read_text(file, config)
            elif kind == LINES:
                yield from read_json(file, config, ending)
            else:
                yield from read_delimited(file, config, '\t' if ending == '.tsv' else ',')
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow's are among them
        reason = getattr(error, 'strerror', None) or reason_of(error, 300)
        raise UserError(f'{path} cannot be read ({reason}): see whether it is whole, and what its ending says'
                        ) from error


def open_decompressed(path, compression):
    """The file opened for reading bytes, after a look at its first ones."""
    openers = {'': open, '.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zstd}
    file = openers[compression](path, 'rb')
    if not hasattr(file, 'peek'):
        file = io.BufferedReader(file)
    start = file.peek(64)[:64]
    zeros = max(start[0::2].count(0), start[1::2].count(0))  # of letters in UTF-16
    if start[:2] in (b'\xff\xfe', b'\xfe\xff') or zeros > 0.4 * len(start) > 3:
        file.close()
        raise UserError('it is UTF-16, and only UTF-8 can be read: convert it, e.g. with iconv -f UTF-16 -t UTF-8')
    if start.startswith(b'version https://git-lfs.github.com/spec'):
        file.close()
        raise UserError('it is a pointer of Git LFS, and no document: fetch the file with git lfs pull')
    return file


def open_zstd(path, _):
    import pyarrow
    return pyarrow.CompressedInputStream(pyarrow.OSFile(path), 'zstd')


def read_text(file, config):
    """The whole file is one text."""
    try:
        text = decode(file.read())
        if not is_wanted(dict(text=text), config):
            return LEFT_OUT
        return text if config.whole_rows else (None, text)
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
    first = file.readline().removeprefix(BOM.encode())
    if ending == '.json' and isinstance(parse(first), BadRow):
        rest = file.read()
        whole = parse(first + rest)
        if not isinstance(whole, BadRow) or first.strip() == b'{':
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
        header = next(filter(None, reader), [])  # blank lines may come first
        check_unique(header, config)
        check_columns(dict.fromkeys(header), config)
        last = reader.line_num
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                if 'end of data' in str(error):  # the rest of the file is in an open quote
                    raise
                values = error
            where, last = f'line {last + 1}', reader.line_num
            if values is None:
                return
            if isinstance(values, csv.Error):
                yield where, BadRow(f'broken quotes ({values}): {QUOTES}')
                continue
            if not values:
                continue
            if len(values) != len(header):
                yield where, BadRow(f'{len(values)} values for {len(header)} columns: a value that holds '
                                    f'{delimiter!r}, double quotes or line ends has to stand in double quotes')
                continue
            row = choose(dict(zip(header, values, strict=True)), config)
            values = row.values() if isinstance(row, dict) else row if isinstance(row, tuple) else ()
            is_bad = any(value and ESCAPED.search(value) for value in values)
            yield where, BadRow('not UTF-8') if is_bad else row
    except csv.Error as error:
        raise UserError(f'broken quotes in the row that begins in line {last + 1} ({error}): {QUOTES}') from error


def read_parquet(path, config):
    import pyarrow.parquet
    try:
        # a prefetched part of a file would stay in memory until its end
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            fields = check_schema(file.schema_arrow, config)
            columns = None if config.filter_fn or config.whole_rows else fields  # they look at all
            yield from rows_of_batches(file.iter_batches(ROWS, columns=columns), config, fields)
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error


def rows_of_batches(batches, config, fields):
    """(where, row) of pyarrow's batches or tables, which have the fields."""
    number = 0
    for batch in batches:
        if config.whole_rows:
            for row in batch.to_pylist():
                number += 1
                yield f'row {number}', choose(row, config)
            continue
        texts = values_of(batch, config.text_field)
        ids = values_of(batch, config.id_field) if config.id_field in fields else [None] * len(texts)
        for i, (document_id, text) in enumerate(zip(ids, texts, strict=True)):
            number += 1
            row = convert(document_id, text)
            if config.filter_fn and not isinstance(row, BadRow):
                row = row if is_wanted(batch.slice(i, 1).to_pylist()[0], config) else LEFT_OUT
            yield f'row {number}', row


def values_of(table, name):
    """The values of a column, or of a field in one of structs; of strings the bytes, which may not be UTF-8."""
    import pyarrow
    import pyarrow.compute
    parts = [name] if name in table.schema.names else name.split('.')
    column = table.column(parts[0])
    for part in parts[1:]:
        column = pyarrow.compute.struct_field(column, part)
    kind = pyarrow.types
    if kind.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    for is_kind, as_bytes in ((kind.is_string, pyarrow.binary()), (kind.is_large_string, pyarrow.large_binary()),
                              (kind.is_string_view, pyarrow.binary_view())):
        if is_kind(column.type):
            column = column.cast(as_bytes)
    try:
        return column.to_pylist()
    except (OverflowError, ValueError):  # such as a time that Python cannot hold
        try:
            return column.cast(pyarrow.string()).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f'column {name!r}: {error}') from error


def check_schema(schema, config):
    """As check_columns, of a pyarrow schema."""
    check_unique(schema.names, config)
    return check_columns(as_tree(schema), config)


def check_unique(names, config):
    for name in (config.text_field, config.id_field):
        if names.count(name) > 1:
            raise UserError(f'it has {names.count(name)} columns {name!r}: rename all but one')


def as_tree(fields):
    """{name: tree of its children, or None} of a pyarrow schema or struct."""
    import pyarrow
    return {field.name: as_tree(field.type) if pyarrow.types.is_struct(field.type) else None for field in fields}


def check_columns(columns, config):
    """Those of the text and id fields that a tree of columns has. UserError if one is missing that has to be there."""
    if config.whole_rows:
        return list(columns)
    found = [name for name in (config.text_field, config.id_field) if name and pick(columns, name) is not MISSING]
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
    """(id or None, text) of a row, a dict of values of any type, or all of it (config.whole_rows); or a BadRow."""
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        return BadRow(f'no object with fields, but {describe(row)}')
    if not is_wanted(row, config):
        return LEFT_OUT
    if config.whole_rows:
        return row
    text = pick(row, config.text_field)
    document_id = pick(row, config.id_field) if config.id_field else MISSING
    for value, name, setting in ((text, config.text_field, 'text_field'), (document_id, config.id_field, 'id_field')):
        if value is MISSING and (setting == 'text_field' or config.needs_id):
            return BadRow(f'no field {name!r}; its fields are {", ".join(row)}: set {setting}')
    return convert(None if document_id is MISSING else document_id, text)


def is_wanted(row, config):
    """Whether filter_fn, if there is one, keeps a row, a dict. UserError if it fails."""
    if not config.filter_fn:
        return True
    try:
        return bool(config.filter_fn(with_numbers(row)))
    except Exception as error:  # whatever the user's code raises
        raise UserError(f'filter_fn failed ({reason_of(error)}) on the row '
                        f'{str(row)[:200]}: correct it') from error


def with_numbers(value):
    """A value of a JSON file with numbers for Numbers."""
    if isinstance(value, dict):
        return {key: with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    return value.value if isinstance(value, Number) else value


def convert(document_id, text):
    """(id or None, text) of values of any type, or a BadRow."""
    try:
        return as_id(document_id), as_text(text)
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
        raise BadRow(f'no id, but {describe(value)}: name a field in it in id_field, such as id.key, or none')
    return None if value is None or value != value else str(value) or None  # NaN is what pandas writes for none


def describe(value):
    if isinstance(value, (int, float, Number)):
        return f'{"the" if isinstance(value, bool) else "the number"} {str(value)[:40]}'
    kind = dict(str='a text', list='a list', dict='an object', NoneType='null').get(type(value).__name__)
    return kind or f'a value of type {type(value).__name__}'
