import itertools
import json
from collections import Counter

import numpy as np
import pytest

from configurator import UserError
from data.chunking import chunk_document, chunk_hashes, document_hash
from data.documents import load_documents
from data.stream import SequenceStream, shuffle
from data.tokenizer import load_tokenizer, tokenize
from tests.conftest import CHUNK, open_all

BLOCK = 4 * CHUNK


@pytest.fixture
def datasets(settings):
    return open_all(settings)


@pytest.fixture
def tokenizer(settings):
    return load_tokenizer(settings.tokenizer)


def epoch_of(datasets, seed=0, epoch=0, **options):
    """The (chunk id, doc_id, tokens, targets, is_last_chunk) of an epoch of one dataset, in their order."""
    M = datasets[0].num_chunks
    per_epoch = -(-M // 4)
    stream = SequenceStream(datasets, BLOCK, 1, seed=seed, **options)
    found = []
    for batch in itertools.islice(stream, epoch * per_epoch, (epoch + 1) * per_epoch):
        tokens, targets = batch.tokens.reshape(-1, CHUNK), batch.targets.reshape(-1, CHUNK)
        found += zip(batch.chunk_ids[0].tolist(), batch.doc_ids[0].tolist(), tokens.tolist(), targets.tolist(),
                     batch.is_last_chunk[0].tolist(), strict=True)
    return found


@pytest.mark.parametrize('epoch', [0, 1])
def test_an_epoch_holds_each_chunk_of_the_collection_once_with_its_targets(datasets, tokenizer, epoch):
    """Padding is no target, nor is anything after the end-of-text; each other token but the first is predicted once."""
    found = epoch_of(datasets, epoch=epoch)
    chunks = {chunk: rest for chunk, *rest in found if rest[0]}
    padding = [rest for _, *rest in found if not rest[0]]
    assert len(chunks) + len(padding) == len(found) and len(padding) < 4
    assert all(targets == [-1] * CHUNK and is_last for _, _, targets, is_last in padding)
    for document in load_documents([datasets[0].config]):
        tokens = tokenize(document.text, tokenizer)
        expected, _ = chunk_document(tokens, CHUNK, tokenizer.eot_token)
        targets = np.full(expected.size, -1)
        targets[:len(tokens)] = [*tokens[1:], tokenizer.eot_token]
        for i, chunk in enumerate(chunk_hashes('stdlib', document.id, 0, len(expected)).tolist()):
            doc_id, tokens_of_chunk, targets_of_chunk, is_last = chunks.pop(chunk)
            assert doc_id == document_hash('stdlib', document.id) and is_last == (i == len(expected) - 1)
            assert tokens_of_chunk == expected[i].tolist()
            assert targets_of_chunk == targets[i * CHUNK:(i + 1) * CHUNK].tolist()
    assert not chunks


def test_epochs_and_seeds_come_in_other_orders_and_cut_documents_elsewhere(datasets):
    orders = [[chunk for chunk, doc, *_ in epoch_of(datasets, seed, epoch) if doc]
              for seed, epoch in ((0, 0), (0, 1), (5, 0))]
    assert orders[0] == [chunk for chunk, doc, *_ in epoch_of(datasets) if doc]
    for one, other in itertools.combinations(orders, 2):
        assert sorted(one) == sorted(other) and sum(a == b for a, b in zip(one, other, strict=True)) < 0.05 * len(one)
        assert set(one[::4]) != set(other[::4])  # the first chunks of sequences


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 100, 1023, 1025, 2**40])
def test_a_shuffle_is_a_permutation_that_spreads(size):
    numbers = np.arange(min(size, 5000))
    found = shuffle(numbers, size, [1, 2])
    assert len(set(found.tolist())) == len(numbers) and 0 <= found.min() and found.max() < size
    assert (shuffle(numbers[::-1], size, [1, 2]) == found[::-1]).all()
    if size > 100:
        assert abs(np.corrcoef(numbers, found)[0, 1]) < 0.1
        assert (shuffle(numbers, size, [1, 3]) != found).mean() > 0.9


@pytest.mark.parametrize('steps', [1, 7, 40])
def test_a_resumed_stream_gives_the_batches_of_one_that_never_stopped(datasets, steps):
    stream = SequenceStream(datasets, BLOCK, 4)
    for _ in range(steps):
        batch = next(stream)
    state = json.loads(json.dumps(batch.state))  # plain values
    assert len(json.dumps(state)) < 200
    resumed = SequenceStream(datasets, BLOCK, 4, state=state)
    for _ in range(25):
        ours, theirs = next(stream), next(resumed)
        assert (ours.tokens == theirs.tokens).all() and (ours.targets == theirs.targets).all()
        assert (ours.chunk_ids == theirs.chunk_ids).all() and ours.state == theirs.state


def test_ranks_and_micro_batches_share_the_sequences_of_one_process(settings):
    datasets = open_all(settings.replace(train_datasets=[*settings.train_datasets, 'val.parquet']))
    whole = SequenceStream(datasets, BLOCK, 4)
    micro = SequenceStream(datasets, BLOCK, 2, step_size=4)
    ranks = [SequenceStream(datasets, BLOCK, 2, step_size=4, first=first, count=2) for first in (0, 2)]
    for _ in range(30):
        expected = next(whole)
        one, two = next(micro), next(micro)
        assert (np.concatenate([one.chunk_ids, two.chunk_ids]) == expected.chunk_ids).all()
        assert not one.state and two.state == expected.state  # once a step
        parts = [next(rank) for rank in ranks]
        assert (np.concatenate([part.chunk_ids for part in parts]) == expected.chunk_ids).all()
        assert all(part.state == expected.state for part in parts)


def test_a_run_resumed_with_other_ranks_and_batch_sizes_sees_the_very_next_sequences(datasets):
    expected = [batch.chunk_ids[0].tolist() for batch in itertools.islice(SequenceStream(datasets, BLOCK, 1), 40)]
    first = SequenceStream(datasets, BLOCK, 4)
    seen = [row for _ in range(3) for row in next(first).chunk_ids.tolist()]
    ranks = [SequenceStream(datasets, BLOCK, 7, step_size=14, first=7 * rank, count=7, state=first.state())
             for rank in (0, 1)]
    for _ in range(2):
        seen += [row for rank in ranks for row in next(rank).chunk_ids.tolist()]
    assert seen == expected


def test_datasets_are_drawn_by_their_weights_as_shares_of_documents(settings):
    """Documents of one are ten times as long as the others'; each is drawn once before any of its dataset is again."""
    for name, words in (('short', 5), ('long', 400)):
        with open(f'{name}.jsonl', 'w') as file:
            file.writelines(json.dumps({'text': f'{name} {i} ' + 'x = 1\n' * words}) + '\n' for i in range(20))
    datasets = open_all(settings.replace(train_datasets=[dict(path='short.jsonl', weight=3.0),
                                                         dict(path='long.jsonl', weight=1.0)]))
    stream, drawn = SequenceStream(datasets, BLOCK, 10), Counter()
    for _ in range(300):
        batch = next(stream)
        drawn.update(batch.doc_ids[batch.is_last_chunk].tolist())
    counts = [[drawn[doc_id] for doc_id in dataset.doc_ids.tolist()] for dataset in datasets]
    assert sum(counts[0]) / sum(map(sum, counts)) == pytest.approx(0.75, abs=0.02)
    assert all(max(count) - min(count) <= 1 for count in counts)


@pytest.mark.parametrize('change, said', [
    (dict(seed=3), 'made with seed 0, and the run has 3'),
    (dict(train_datasets=['val.parquet']), 'other train_datasets'),
])
def test_a_state_that_cannot_go_on_is_refused_by_name(settings, datasets, change, said):
    state = SequenceStream(datasets, BLOCK, 4).state()
    with pytest.raises(UserError, match=said):
        SequenceStream(open_all(settings.replace(**{'train_datasets': settings.train_datasets, **change})), BLOCK, 4,
                       seed=change.get('seed', 0), state=state)


def test_a_state_of_an_earlier_version_is_refused_with_what_to_do(datasets):
    with pytest.raises(UserError, match='earlier version.*--init_from=FOLDER'):
        SequenceStream(datasets, BLOCK, 4, state=dict(total_lanes=3, positions=[]))


@pytest.mark.parametrize('weight', [0.0, -1.0, float('inf'), float('nan')])
def test_a_weight_that_is_not_positive_and_finite_is_refused(settings, weight):
    with pytest.raises(UserError, match='weight must be positive and finite'):
        open_all(settings.replace(train_datasets=[dict(path='train.parquet', weight=weight)]))


def test_weights_whose_sum_is_more_than_a_float_can_hold_are_weights(settings):
    datasets = open_all(settings.replace(train_datasets=[dict(path=f'{name}.parquet', weight=1e308)
                                                         for name in ('train', 'val')]))
    assert SequenceStream(datasets, BLOCK, 1).shares.sum() == pytest.approx(1.0)
