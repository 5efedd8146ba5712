"""
A filled collection as one Parquet file, embeddings included, which `python -m retrieval.kb export` writes and `import`
reads. A row of the collection is a row of the file, and what made the collection stands in the footer, which is
written last: a file that was cut off has none. Pages have checksums, so nothing of a damaged file is imported.
"""
import json
import os
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
from tqdm import tqdm

from configurator import UserError, save_atomically
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.inherit import OF_GRID, take_defaults
from retrieval.knowledge_base import (
    FIELDS,
    VERSION,
    KnowledgeBase,
    Metadata,
    NoCollection,
    describe_difference,
    open_as_made,
)

FORMAT = 1  # of the file
KEY = b'nanoretro.collection'  # of the footer
OF_DATABASE = ('index', 'vectors', 'mode')  # in which a collection may differ from the file's
ROWS = 2048  # in a group, which are held in memory


def schema_of(dimension, vector_type):
    import pyarrow as pa
    return pa.schema([('id', pa.int64()), ('doc_id', pa.int64()), ('position', pa.int64()), ('document', pa.string()),
                      ('text', pa.string()), ('tokens', pa.list_(pa.int32())),
                      ('embedding', pa.list_(pa.from_numpy_dtype(vector_type), dimension))])


def export_rows(knowledge_base, path, show_progress):
    """Write the collection to a file, by ascending ids. Number of rows and bytes. UserError if it changes meanwhile."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    state, expected, count = knowledge_base.state(), knowledge_base.count(), 0
    schema = schema_of(knowledge_base.metadata.dimension, np.float32)
    about = json.dumps(dict(format=FORMAT, revision=state, metadata=asdict(knowledge_base.metadata)))

    def save(tmp_path):
        nonlocal count
        with (pq.ParquetWriter(tmp_path, schema.with_metadata({KEY: about}), compression='zstd',
                               use_dictionary=['document'], write_page_checksum=True) as writer,
              tqdm(total=expected, desc='rows', unit=' rows', unit_scale=True, disable=not show_progress) as bar):
            for rows in knowledge_base.all_rows([name for name in schema.names if name != 'id'], ROWS):
                rows.sort(key=lambda row: row['id'])
                columns = {name: [row[name] for row in rows] for name in schema.names[:-1]}
                vectors = np.array([row['embedding'] for row in rows], dtype=np.float32).reshape(-1)
                columns['embedding'] = pa.FixedSizeListArray.from_arrays(vectors, knowledge_base.metadata.dimension)
                writer.write_table(pa.table(columns, schema=schema))
                count += len(rows)
                bar.update(len(rows))
        if knowledge_base.state() != state:
            raise UserError(f'the collection has changed while it was exported, and {path!r} was not written: start '
                            f'again when it is complete')
        if count != expected:
            raise UserError(f'Milvus counts {expected:,} rows of the collection and gives {count:,}, and {path!r} was '
                            f'not written: see whether the server is well')
    try:
        save_atomically(save, path)
    except FileNotFoundError as error:
        raise UserError(f'{path!r} cannot be written ({error.strerror}): make its folder first') from error
    return count, os.path.getsize(path)


def import_rows(path, settings, named, say, show_progress):
    """
    Bring the rows of a file into the collection that the settings name, which is made if there is none. Rows that it
    has are left as they are, so an import that was killed goes on; documents that it holds otherwise become those of
    the file. Counts, the settings with what the file says where the user has set nothing, and the open KnowledgeBase,
    which the caller ends the change of. UserError if the file is not whole, or of other settings.
    """
    file, metadata = open_file(path)
    settings = take_defaults(settings, [key for key in OF_GRID if key not in named], metadata, path, say)
    run = replace(metadata, tokenizer=settings.tokenizer, chunk_size=settings.retrieval_chunk_size,
                  vocabulary_hash=vocabulary_hash(load_tokenizer(settings.tokenizer)))
    if different := describe_difference(asdict(metadata), 'it has', asdict(run), 'the run'):
        raise UserError(f'{path} is of other settings ({different}): use the settings that made it, or leave them out')
    check_whole(path, file, show_progress)
    try:
        knowledge_base = open_as_made(settings)
    except NoCollection:
        # others may suit another database
        run = replace(run, **{field: getattr(settings, f'retrieval_{field}') for field in OF_DATABASE
                              if f'retrieval_{field}' in named})
        knowledge_base = KnowledgeBase(settings.retrieval_milvus_uri, settings.retrieval_milvus_token,
                                       settings.retrieval_collection, run, create=True,
                                       expected=file.metadata.num_rows)
    try:
        held = replace(knowledge_base.metadata, **{field: getattr(metadata, field) for field in OF_DATABASE})
        if different := describe_difference(asdict(held), 'it has', asdict(metadata), 'the file'):
            raise UserError(f'{path} does not fit collection {settings.retrieval_collection!r} in '
                            f'{settings.retrieval_milvus_uri} ({different}): import it into another '
                            f'retrieval_collection')
        return add_rows(file, knowledge_base, show_progress), settings, knowledge_base
    except BaseException:
        knowledge_base.close()
        raise


def open_file(path):
    """The ParquetFile and the Metadata of its collection."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except OSError as error:
        if os.path.isfile(path):
            raise damaged(path, error) from error
        raise UserError(f'{path} cannot be read ({error.strerror or error}): name a file that python -m retrieval.kb '
                        f'export has written') from error
    except pa.ArrowException as error:
        raise damaged(path, error) from error
    try:
        about = json.loads(file.schema_arrow.metadata[KEY])
        version, metadata = about['format'], Metadata(**about['metadata'])
        fits = file.schema_arrow.equals(schema_of(metadata.dimension, np.float32))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f'{path} is a Parquet file, and no collection: name one that python -m retrieval.kb export has '
                        f'written') from error
    if version != FORMAT or metadata.version != VERSION or not fits:
        raise UserError(f'{path} is of another version of nanoRETRO (format {version} of rows {metadata.version}, and '
                        f'this one reads {FORMAT} of {VERSION}): export it anew')
    return file, metadata


def damaged(path, error):
    return UserError(f'{path} is not whole, and nothing was imported ({" ".join(str(error).split())[:200]}): copy it '
                     f'again')


def check_whole(path, file, show_progress):
    """Read all of it, which compares the checksums."""
    import pyarrow as pa
    try:
        for number in tqdm(range(file.num_row_groups), desc='checking the file', leave=False,
                           disable=not show_progress):
            file.read_row_group(number)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error


def add_rows(file, knowledge_base, show_progress):
    """Counts of the file's rows, of those that were added, and of those that were removed."""
    done, before, ids, owners = Counter(), knowledge_base.count(), [], []
    with tqdm(total=file.metadata.num_rows, desc='rows', unit=' rows', unit_scale=True,
              disable=not show_progress) as bar:
        for batch in file.iter_batches(ROWS):
            table = batch.select(batch.schema.names[:-1]).to_pydict()
            vectors = batch.column('embedding').flatten().to_numpy().reshape(len(batch), -1)
            vectors = vectors.astype(knowledge_base.metadata.vectors)
            rows = [dict(zip(table, values, strict=True)) | dict(embedding=vector)
                    for *values, vector in zip(*table.values(), vectors, strict=True)]
            ids.append(np.array(table['id'], dtype=np.int64))
            owners.append(np.array(table['doc_id'], dtype=np.int64))
            held = knowledge_base.rows(ids[-1], [*FIELDS, 'embedding'], latest=True) if before else {}
            new = [row for row in rows if not is_same(row, held.get(row['id']))]
            knowledge_base.upsert(new)
            done['added'] += len(new)
            done['rows'] += len(rows)
            bar.update(len(rows))
    if before:  # other versions of its documents may have had more chunks
        ids, owners = np.sort(np.concatenate(ids)), np.unique(np.concatenate(owners))
        for rows in knowledge_base.all_rows(['doc_id']):
            others = [row['id'] for row in rows if not contains(ids, row['id']) and contains(owners, row['doc_id'])]
            knowledge_base.delete(others)
            done['removed'] += len(others)
    return done


def contains(values, value):
    """Whether a sorted array has a value."""
    place = np.searchsorted(values, value)
    return place < len(values) and values[place] == value


def is_same(row, held):
    return held is not None and all(
        np.array_equal(row[name], np.asarray(held[name], dtype=getattr(row[name], 'dtype', None))) for name in
        ('embedding', 'tokens')) and all(row[name] == held[name] for name in FIELDS if name != 'tokens')
