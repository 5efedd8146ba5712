import gzip
import json

import numpy as np
import pytest

from configurator import UserError
from data.chunking import chunk_document, chunk_hashes, document_hash
from data.documents import DatasetConfig, as_dataset_configs, load_documents, tokenize
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from tests.conftest import CHUNK, SHARED

BLOCK = 4 * CHUNK


@pytest.fixture(scope='module')
def tokenizer(prepared):
    return load_tokenizer(str(prepared / 'tokenizer.json'))


def make_stream(prepared, tokenizer, batch_size=4, **options):
    return SequenceStream([DatasetConfig(str(prepared / 'train.parquet'), source='stdlib')], tokenizer, CHUNK, BLOCK,
                          batch_size, **options)


def test_a_training_chunk_is_the_collections_chunk_of_the_same_document(prepared, tokenizer):
    chunk_of = {}
    for document in load_documents([DatasetConfig(str(prepared / 'train.parquet'), source='stdlib')]):
        chunks, _ = chunk_document(tokenize(document, tokenizer), CHUNK, tokenizer.eot_token)
        ids = chunk_hashes('stdlib', document.id, 0, len(chunks))
        chunk_of |= {i: (document_hash('stdlib', document.id), c.tolist()) for i, c in zip(ids, chunks, strict=True)}
    stream = make_stream(prepared, tokenizer, interleave=3)
    for _ in range(20):
        batch = next(stream)
        for place in np.ndindex(batch.chunk_ids.shape):
            tokens = batch.tokens.reshape(*batch.chunk_ids.shape, CHUNK)[place].tolist()
            assert chunk_of[batch.chunk_ids[place]] == (batch.doc_ids[place], tokens)


def test_targets_are_the_documents_next_tokens_and_padding_is_none(prepared, tokenizer):
    """Put together, a document's tokens and targets are all its tokens, each but the first predicted once."""
    stream = make_stream(prepared, tokenizer, batch_size=1)
    expected = {document_hash('stdlib', d.id): [*tokenize(d, tokenizer).tolist(), tokenizer.eot_token]
                for d in load_documents(stream.configs)}
    seen, targets, complete = {}, {}, 0
    for _ in range(200):
        batch = next(stream)
        for place, (document, end) in enumerate(zip(batch.doc_ids[0], batch.is_last_chunk[0], strict=True)):
            part = slice(place * CHUNK, (place + 1) * CHUNK)
            seen.setdefault(document, []).extend(batch.tokens[0, part])
            targets.setdefault(document, []).extend(batch.targets[0, part])
            if end:
                text = expected[document]
                padding = len(seen[document]) - len(text)
                assert seen.pop(document) == text + [tokenizer.eot_token] * padding
                assert targets.pop(document) == text[1:] + [-1] * (padding + 1)
                complete += 1
    assert complete >= 3


def test_every_document_is_drawn_once_before_any_is_drawn_again(prepared, tokenizer):
    stream = make_stream(prepared, tokenizer, batch_size=1)
    count, order = len(stream.datasets[0]), []
    while len(order) < 2 * count:
        batch = next(stream)
        for document, end in zip(batch.doc_ids[0], batch.is_last_chunk[0], strict=True):
            if end:
                order.append(document)
    assert len(set(order[:count])) == len(set(order[count:2 * count])) == count
    assert order[:count] != order[count:2 * count]


@pytest.mark.parametrize('steps', [1, 7, 40])
def test_a_resumed_stream_gives_the_batches_of_one_that_never_stopped(prepared, tokenizer, steps):
    stream = make_stream(prepared, tokenizer, interleave=3)
    for _ in range(steps):
        batch = next(stream)
    state = json.loads(json.dumps(batch.state))  # plain values
    resumed = make_stream(prepared, tokenizer, interleave=3, state=state)
    for _ in range(25):
        ours, theirs = next(stream), next(resumed)
        assert (ours.tokens == theirs.tokens).all() and (ours.targets == theirs.targets).all()
        assert (ours.chunk_ids == theirs.chunk_ids).all() and ours.state == theirs.state


def test_ranks_and_micro_batches_share_the_sequences_of_one_process(prepared, tokenizer):
    whole = make_stream(prepared, tokenizer, batch_size=4, interleave=2)
    micro = make_stream(prepared, tokenizer, batch_size=2, lanes=4, interleave=2)
    ranks = [make_stream(prepared, tokenizer, batch_size=2, lanes=4, first=first, count=2, interleave=2)
             for first in (0, 2)]
    for _ in range(10):
        expected = next(whole).chunk_ids
        assert (np.concatenate([next(micro).chunk_ids, next(micro).chunk_ids]) == expected).all()
        assert (np.concatenate([next(rank).chunk_ids for rank in ranks]) == expected).all()


def test_a_state_of_another_batch_size_is_refused_by_name(prepared, tokenizer):
    state = make_stream(prepared, tokenizer).state()
    with pytest.raises(UserError, match='keep batch_size'):
        make_stream(prepared, tokenizer, batch_size=3, state=state)


def test_datasets_are_drawn_by_their_weights(prepared, tokenizer):
    configs = [DatasetConfig(str(prepared / f'{name}.parquet'), weight=weight, source=name)
               for name, weight in (('train', 1.0), ('val', 3.0))]
    stream = SequenceStream(configs, tokenizer, CHUNK, BLOCK, 50)
    for _ in range(50):
        next(stream)
    drawn = np.sum([place[1:] for place in stream.positions], axis=0)
    assert drawn[1] / drawn.sum() == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize('name', ['d.jsonl', 'd.jsonl.gz', 'd.csv', 'd.txt', 'd.parquet', 'saved'])
def test_documents_load_from_local_files_of_every_kind(tmp_path, name):
    import datasets
    texts = ['first\ndocument', 'second, "quoted"']
    path = tmp_path / name
    saved = datasets.Dataset.from_dict({'id': ['a', 'b'], 'text': texts})
    if name.endswith('txt'):
        path.write_text(texts[0])
        texts = texts[:1]
    elif 'jsonl' in name:
        opened = gzip.open if name.endswith('gz') else open
        with opened(path, 'wt') as file:
            file.writelines(json.dumps({'id': i, 'text': t}) + '\n' for i, t in zip('ab', texts, strict=True))
    else:
        {'d.csv': saved.to_csv, 'd.parquet': saved.to_parquet, 'saved': saved.save_to_disk}[name](str(path))
    documents = list(load_documents([DatasetConfig(str(path))]))
    assert [d.text for d in documents] == texts
    assert [d.id for d in documents] == (['d.txt:train:0'] if name.endswith('txt') else ['a', 'b'])
    assert documents[0].source == (str(path) if name == 'saved' else tmp_path.name)


def test_the_peps_load_as_they_are():
    if not (SHARED / 'data/peps.jsonl.gz').exists():
        pytest.skip('the PEPs are not here')
    documents = list(load_documents([DatasetConfig(str(SHARED / 'data/peps.jsonl.gz'))]))
    assert len(documents) == 736 and all(d.text for d in documents) and documents[0].source == 'data'


@pytest.mark.parametrize('entry, said', [
    ('missing.parquet', "no corpus at 'missing.parquet'"),
    (dict(path='{prepared}/train.parquet', text_field='body'), "no column 'body'.*id, text"),
    (dict(pth='x'), 'no path and no DatasetConfig'),
    (dict(path=5), 'no path and no DatasetConfig .path must be a str, but is 5'),
    (dict(path='x', weight='abc'), "no path and no DatasetConfig .weight must be a number, but is 'abc'"),
])
def test_a_dataset_that_cannot_be_read_is_named_with_what_to_do(prepared, entry, said):
    if isinstance(entry, dict) and isinstance(entry.get('path'), str):
        entry['path'] = entry['path'].format(prepared=prepared)
    with pytest.raises(UserError, match=said):
        list(load_documents(as_dataset_configs([entry], 'train_datasets')))


def test_a_weight_that_is_not_positive_is_refused(prepared, tokenizer):
    with pytest.raises(UserError, match='weights must be positive'):
        SequenceStream([DatasetConfig(str(prepared / 'train.parquet'), weight=0.0)], tokenizer, CHUNK, BLOCK, 1)


def test_weights_whose_sum_is_more_than_a_float_can_hold_are_weights(prepared, tokenizer):
    config = DatasetConfig(str(prepared / 'train.parquet'), weight=1e308)
    assert SequenceStream([config, config], tokenizer, CHUNK, BLOCK, 1).weights.tolist() == [0.5, 0.5]


def test_documents_without_ids_are_different_documents_in_every_file_and_row(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / f'{name}.txt').write_text(name)
        (tmp_path / f'{name}.jsonl').write_text('{"text": "x"}\n{"text": "y"}\n')
    paths = sorted(str(path) for path in tmp_path.iterdir())
    documents = list(load_documents(as_dataset_configs(paths, 'train_datasets')))
    assert len({document_hash(d.source, d.id) for d in documents}) == len(documents) == 6


def test_a_state_of_other_datasets_is_refused_by_name(prepared, tokenizer):
    state = make_stream(prepared, tokenizer).state()
    with pytest.raises(UserError, match='other train_datasets'):
        SequenceStream([DatasetConfig(str(prepared / 'val.parquet'), source='stdlib')], tokenizer, CHUNK, BLOCK, 4,
                       state=state)


def test_no_datasets_at_all_is_an_error_that_shows_how_to_name_one():
    with pytest.raises(UserError, match='val_datasets is empty.*DatasetConfig'):
        as_dataset_configs([], 'val_datasets')
