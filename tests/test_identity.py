"""A document is its id, or its text, whatever the file is called, where it lies, and what else stands in it."""
import csv
import gzip
import json
import os
import random
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as options
from hypothesis import strategies as st

from configurator import UserError, load_settings
from data.chunk_store import count_known, open_datasets
from data.documents import DatasetConfig, as_dataset_configs, load_documents
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.populate import read_parts
from tests.conftest import CHUNK, open_all


def write(path, documents):
    """Documents [(id or None, text)] in the format that the path's name says; without an id column if none has one."""
    rows = [dict(id=i, text=text) if i is not None else dict(text=text) for i, text in documents]
    names = ['id', 'text'] if any(i is not None for i, _ in documents) else ['text']
    opened = gzip.open if path.endswith('.gz') else open
    if path.endswith('.parquet'):
        pq.write_table(pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}), path)
    elif 'json' in path.lower()[-9:]:
        with opened(path, 'wt', encoding='utf-8', newline='') as file:
            file.writelines(json.dumps(row, ensure_ascii=len(row['text']) % 2 == 0) + '\n' for row in rows)
    else:
        with opened(path, 'wt', encoding='utf-8', newline='') as file:
            writer = csv.DictWriter(file, names, delimiter='\t' if '.tsv' in path else ',')
            writer.writeheader()
            writer.writerows(rows)


def everything(path, tokenizer, folder):
    """All that follows from a path's documents: the rows of the collection, and the start of the training stream."""
    settings = load_settings([]).replace(data_cache_dir=folder, retrieval_chunk_size=CHUNK)
    datasets = open_datasets([DatasetConfig(path)], tokenizer, settings)
    rows = [(r.id.tolist(), r.doc_id.tolist(), r.position.tolist(), r.document, r.text, r.tokens.tolist(),
             r.length.tolist()) for r in (part.rows for part in read_parts(datasets, tokenizer))]
    stream = SequenceStream(datasets, 4 * CHUNK, 2, seed=3)
    batches = [next(stream) for _ in range(6)]
    return rows, [(b.tokens.tolist(), b.targets.tolist(), b.chunk_ids.tolist()) for b in batches], datasets[0].hash


# what CSV, JSON and Parquet all hold: any characters but NUL and lone surrogates
texts = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), min_size=1, max_size=80).filter(
    lambda text: text != '\ufeff')
ids = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), min_size=1, max_size=9)
documents_with_ids = st.dictionaries(ids, texts, min_size=1, max_size=12).map(lambda d: list(d.items()))
documents_without = st.sets(texts, min_size=1, max_size=12).map(lambda s: [(None, text) for text in sorted(s)])
formats = st.sampled_from(['.jsonl', '.JSONL', '.jsonl.gz', '.csv', '.csv.gz', '.tsv', '.parquet', '.ndjson', '.json'])


@given(st.one_of(documents_with_ids, documents_without), st.lists(formats, min_size=1, max_size=4), st.randoms())
@options(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_split_name_place_and_format_of_documents_gives_the_same_rows_and_the_same_training(
        prepared, documents, endings, rng):
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    with tempfile.TemporaryDirectory() as folder:
        write(f'{folder}/one.jsonl', documents)
        expected = everything(f'{folder}/one.jsonl', tokenizer, f'{folder}/cache')
        shuffled = random.Random(rng.random()).sample(documents, len(documents))
        os.makedirs(f'{folder}/deep/er')
        used = []
        for i, ending in enumerate(endings):
            part = shuffled[i::len(endings)]
            if part:
                used.append(f'{folder}/deep/{"er/" * (i % 2)}{rng.random()} [{i}]{ending}')
                write(used[-1], part)
        for path in (f'{folder}/deep', f'{folder}/deep/', f'{folder}/./deep/**', used[0] if len(used) == 1 else None):
            if path:
                assert everything(path, tokenizer, f'{folder}/cache') == expected


def test_ids_are_strings_as_they_are_written_whatever_the_other_rows_hold(tmp_path):
    (tmp_path / 'a.csv').write_text('id,text\n1,doc one\n01,doc zero one\n001,doc zero zero one\n1.0,doc float\n')
    assert [d.id for d in load_documents([DatasetConfig(str(tmp_path / 'a.csv'))])] == ['1', '01', '001', '1.0']
    (tmp_path / 'a.csv').write_text('id,text\n001,one\n002,two\nA7,three\nNA,four\nnull,five\n1e3,six\n')
    assert [d.id for d in load_documents([DatasetConfig(str(tmp_path / 'a.csv'))])] == [
        '001', '002', 'A7', 'NA', 'null', '1e3']
    (tmp_path / 'a.jsonl').write_text('{"id": 12345678901234567890123, "text": "a"}\n{"id": 1.50, "text": "b"}\n'
                                      '{"id": "1.50 ", "text": "c"}\n{"id": true, "text": "d"}\n')
    assert [d.id for d in load_documents([DatasetConfig(str(tmp_path / 'a.jsonl'))])] == [
        '12345678901234567890123', '1.50', '1.50 ', 'true']
    table = pa.table({'id': pa.array([1, 2, None]), 'text': ['a', 'b', 'c']})
    pq.write_table(table, tmp_path / 'a.parquet')
    documents = list(load_documents([DatasetConfig(str(tmp_path / 'a.parquet'))]))
    assert [d.id for d in documents[:2]] == ['1', '2'] and not documents[2].has_id


@pytest.mark.parametrize('row', ['{"id": "", "text": "x"}', '{"id": null, "text": "x"}', '{"text": "x"}',
                                 '{"id": NaN, "text": "x"}'])
def test_an_empty_id_is_none_and_the_text_identifies_the_document(tmp_path, row):
    (tmp_path / 'a.jsonl').write_text(row)
    (tmp_path / 'b.txt').write_text('x')
    documents = list(load_documents(as_dataset_configs([str(tmp_path / 'a.jsonl'), str(tmp_path / 'b.txt')], 'x')))
    assert documents[0].id == documents[1].id and not documents[0].has_id and documents[0].name.endswith(' x')


@pytest.mark.parametrize('paths', [['both.jsonl'], ['one', ], ['a.jsonl', 'b.csv'], ['*.parquet']])
def test_two_different_documents_with_one_identity_are_an_error_that_names_both(settings, paths):
    one, other = [('7', 'the first'), ('8', 'same')], [('8', 'same'), ('7', 'another')]
    os.makedirs('one')
    for path, documents in (('both.jsonl', one + other), ('a.jsonl', one), ('b.csv', other), ('one/a.csv', one),
                            ('one/b.jsonl', other), ('p.parquet', one), ('q.parquet', other)):
        write(path, documents)
    with pytest.raises(UserError) as error:
        open_all(settings.replace(train_datasets=paths if paths[0] != '*.parquet' else ['?.parquet']))
    said = str(error.value)
    assert "two different documents have the id '7'" in said and 'source=' in said
    named = dict(both='both.jsonl, line 1, and both.jsonl, line 4', a='a.jsonl, line 1, and b.csv, line 3',
                 one='one/a.csv, line 2, and one/b.jsonl, line 2')
    assert named.get(paths[0].partition('.')[0], 'p.parquet, row 1, and q.parquet, row 2') in said


def test_a_source_tells_documents_of_one_id_apart(settings):
    write('a.jsonl', [('7', 'the first')])
    write('b.jsonl', [('7', 'another')])
    datasets = open_all(settings.replace(train_datasets=[dict(path='a.jsonl', source='a'),
                                                         dict(path='b.jsonl', source='b')]))
    assert len(set(datasets[0].doc_ids) | set(datasets[1].doc_ids)) == 2
    assert datasets[0].names([0]) == ['a/7']


def test_exact_duplicates_are_counted_and_kept_once_in_a_file_and_over_datasets(settings):
    write('a.jsonl', [('1', 'one'), ('2', 'two'), ('1', 'one'), (None, 'three'), (None, 'three')])
    write('b.csv', [('2', 'two'), ('4', 'four')])
    write('c.csv', [('2', 'two')])
    first, second = open_all(settings.replace(train_datasets=['a.jsonl', 'b.csv']))
    assert (first.counts.documents, first.counts.duplicates) == (3, 2)
    assert (second.counts.documents, second.counts.duplicates, second.num_chunks) == (1, 1, 1)
    assert [second.names(second.read(numbers).documents) for numbers in second.blocks()] == [['4']]
    with pytest.raises(UserError, match="'c.csv' has no documents that no dataset before it holds"):
        open_all(settings.replace(train_datasets=['a.jsonl', 'c.csv']))


def test_val_documents_that_stand_in_the_training_set_are_counted_by_their_text(settings):
    write('a.jsonl', [('1', 'one'), ('2', 'two'), ('3', 'three')])
    write('b.jsonl', [('7', 'two'), ('3', 'three'), ('8', 'other'), ('9', '')])
    train, val = open_all(settings.replace(train_datasets=['a.jsonl'])), open_all(
        settings.replace(train_datasets=['b.jsonl']))
    assert count_known(val, train) == (2, 0) and count_known(train, val) == (2, 0)
    write('c.jsonl', [('1', 'not one'), ('2', 'two'), ('5', 'five')])
    renumbered = open_all(settings.replace(train_datasets=['c.jsonl']))
    assert count_known(renumbered, train) == (1, 1)


@pytest.mark.parametrize('sorted_together', [1 << 20, 7])
def test_documents_are_sorted_by_their_hash_in_whatever_parts_of_memory(settings, monkeypatch, sorted_together):
    for module in ('ingest', 'chunk_store'):
        monkeypatch.setattr(f'data.{module}.SORTED_TOGETHER', sorted_together)
    documents = [(str(i), f'text {i}') for i in range(200)]
    write('a.jsonl', [*documents, *documents[:50], ('empty', '')])
    dataset, = open_all(settings.replace(train_datasets=['a.jsonl']))
    assert len(dataset) == 200 and dataset.counts.duplicates == 50 and dataset.counts.empty == 1
    assert len(dataset.table) == 201 and (np.diff(dataset.doc_ids.astype(object)) > 0).all()
    assert sorted(dataset.names(np.arange(201))) == sorted([*(i for i, _ in documents), 'empty'])
    assert dataset.num_chunks == sum(map(len, dataset.blocks())) == sum(len(d.ids) for d in dataset.documents())
