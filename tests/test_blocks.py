"""Streamed datasets: read in blocks, in several processes, and resumed exactly."""
import itertools
import json
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError
from data.blocks import open_all_datasets
from data.chunk_store import open_datasets
from data.documents import Counts, DatasetConfig, Files, as_documents, find_files
from data.row_stream import RowStream
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval.populate import read_parts
from tests.conftest import CHUNK, ROOT, run
from tests.hub import COMMIT, serve_hub
from tests.test_train import metrics
from training.metrics import summary

BLOCK = 4 * CHUNK
STREAMED = dict(source='stdlib', streaming=True, shuffle_buffer_size=4)


@pytest.fixture
def tokenizer(settings):
    return load_tokenizer(settings.tokenizer)


@pytest.fixture
def open_stream(settings, tokenizer):
    """Opens a SequenceStream of DatasetConfigs for a rank; all are closed at the end."""
    opened = []

    def open_stream(*configs, ranks=1, rank=0, workers=2, **options):
        datasets = open_all_datasets(configs, tokenizer, settings.replace(stream_workers=workers), print)
        share = 8 // ranks
        opened.append(SequenceStream(datasets, BLOCK, 4, step_size=8, first=rank * share, count=share, **options))
        return opened[-1]
    yield open_stream
    for stream in opened:
        stream.close()


def step(stream):
    """The chunk ids and targets of a step's sequences, and the state after it, which went through JSON."""
    batches = [next(stream) for _ in range(stream.count // stream.batch_size)]
    return (np.concatenate([batch.chunk_ids for batch in batches]).tolist(),
            np.concatenate([batch.targets for batch in batches]).tolist(), json.loads(json.dumps(batches[-1].state)))


def split_file(path, count):
    """Write a Parquet file's rows to the files of a folder; its name."""
    rows = pq.read_table(path)
    os.makedirs(f'{path}.{count}')
    for number in range(count):
        pq.write_table(rows.take(list(range(number, len(rows), count))), f'{path}.{count}/{number}.parquet')
    return f'{path}.{count}'


@pytest.mark.parametrize('files', [1, 4])
def test_an_epoch_of_two_readers_holds_each_chunk_of_the_dataset_on_disk_once(settings, tokenizer, open_stream, files):
    """Whether the files can be dealt out to them or each has to leave out the rows of the other."""
    path = split_file('train.parquet', files)
    stream = open_stream(DatasetConfig(path, epochs=1, **STREAMED))
    expected, = open_datasets([DatasetConfig('train.parquet', source='stdlib')], tokenizer, settings)
    chunks = expected.read(np.arange(expected.num_chunks))
    seen, targets = Counter(), {}
    with pytest.raises(UserError, match='train_datasets are used up'):
        while True:
            batch = next(stream)
            seen.update(batch.chunk_ids[batch.doc_ids != 0].tolist())
            targets |= zip(batch.chunk_ids.reshape(-1).tolist(), batch.targets.reshape(-1, CHUNK).tolist(), strict=True)
    # the readers end at different times, and the last step is not whole
    assert max(seen.values()) == 1 and seen.keys() <= set(chunks.ids.tolist())
    assert len(seen) > 0.7 * len(chunks.ids)
    for chunk, expected_targets in zip(chunks.ids.tolist(), chunks.targets.tolist(), strict=True):
        assert targets.get(chunk, expected_targets) == expected_targets


def test_a_killed_mixture_goes_on_with_its_next_sequences_on_two_ranks_with_two_readers_each(open_stream, settings):
    """Shuffled, over epochs; with blocks that are still there, and without; and on one rank, which has four readers."""
    mixture = [DatasetConfig('train.parquet', weight=3.0, **STREAMED), DatasetConfig('val.parquet', source='stdlib'),
               DatasetConfig(split_file('val.parquet', 4), streaming=True)]
    ranks = [open_stream(*mixture, ranks=2, rank=rank) for rank in (0, 1)]
    steps = [[step(rank) for rank in ranks] for _ in range(60)]
    assert max(place[0]['epoch'] for _, _, state in steps[-1] for lane in state['lanes'].values()
               for place in lane['places'].values()) >= 1
    for rank in ranks:
        rank.close()
    for number, is_empty in ((0, False), (13, True), (41, True), (55, False)):
        if is_empty:
            shutil.rmtree(settings.data_cache_dir)
        resumed = [open_stream(*mixture, ranks=2, rank=rank, state=steps[number][rank][2]) for rank in (0, 1)]
        for expected in steps[number + 1:number + 5]:
            assert [step(rank) for rank in resumed] == expected
        for rank in resumed:
            rank.close()
    states = [state for _, _, state in steps[20]]
    alone = open_stream(*mixture, state=dict(states[0], lanes=states[0]['lanes'] | states[1]['lanes']))
    for expected in steps[21:25]:
        assert step(alone)[0] == [row for chunk_ids, _, _ in expected for row in chunk_ids]
    with pytest.raises(UserError, match='4 readers of streamed datasets cannot be shared by 8 processes'):
        open_stream(*mixture, ranks=8, state=states[0])


def test_blocks_are_shuffled_by_the_seed_and_used_ones_are_removed(open_stream, settings):
    config = DatasetConfig('train.parquet', **STREAMED)
    orders, others = [], set(os.listdir(settings.data_cache_dir))
    for number, seed in enumerate((0, 1), 1):
        stream = open_stream(config, seed=seed, workers=1)
        orders.append([row for _ in range(100) for row in step(stream)[0]])
        left = [name for name in set(os.listdir(settings.data_cache_dir)) - others if not name.endswith('.lock')]
        assert len(left) <= 3 * number  # of each stream the block in use, the next one, and the one that is made
    documents = [chunk for row in orders[0] for chunk in row], [chunk for row in orders[1] for chunk in row]
    assert documents[0] != documents[1] and len(set(documents[0]) & set(documents[1])) > 100


def test_a_dataset_that_runs_out_leaves_the_others_their_proportions(open_stream, tokenizer, settings):
    with open('short.jsonl', 'w') as file:
        file.write(json.dumps(dict(text='word ' * 400)) + '\n')
    parts = [DatasetConfig('short.jsonl', weight=2.0, epochs=2), DatasetConfig('train.parquet', weight=3.0, **STREAMED),
             DatasetConfig('val.parquet', weight=1.0, source='stdlib')]
    stream = open_stream(*parts, workers=1)
    states = [step(stream)[2]['taken'] for _ in range(50)]
    short, = open_datasets(parts[:1], tokenizer, settings)
    assert states[-1][0] == 2 * -(-short.num_chunks // 4) and sum(states[-1]) == 400
    assert states[-1][1] / sum(states[-1][1:]) == pytest.approx(0.75, abs=0.01)
    with pytest.raises(UserError, match=r'used up, after \d+ sequences'):
        only = open_stream(parts[0])
        while True:
            step(only)


def test_populate_reads_the_rows_of_a_stream_that_it_reads_on_disk(settings, tokenizer):
    config = DatasetConfig('train.parquet', source='stdlib', id_field='id')
    streamed = DatasetConfig('train.parquet', **STREAMED)

    def rows_of(datasets):
        return {row_id: rest for part in read_parts(datasets, tokenizer)
                for row_id, *rest in zip(part.rows.id.tolist(), part.rows.document, part.rows.text,
                                         part.rows.tokens.tolist(), part.rows.length.tolist(), strict=True)}
    rows = rows_of(open_all_datasets([streamed], tokenizer, settings, print))
    assert rows == rows_of(open_datasets([config], tokenizer, settings)) and len(rows) > 1000


def test_ranks_that_fill_a_collection_share_a_stream_and_wait_for_no_other(settings, tokenizer):
    """Also two that read the same blocks at once, and one without documents; each says what it has read."""
    with open('few.jsonl', 'w') as file:
        file.write('{"id": "1", "text": "alone"}\n{"id": "2", "text": ""}\n')
    streamed = [DatasetConfig('train.parquet', **STREAMED),
                DatasetConfig('few.jsonl', streaming=True, shuffle_buffer_size=1)]

    def read(rank, ranks):
        datasets, news = open_all_datasets(streamed, tokenizer, settings, print), []
        found = list(read_parts(datasets, tokenizer, rank, ranks, news.append))
        return ([number for part in found for number in part.rows.id.tolist()],
                [number for part in found for number in part.rowless.tolist()], news)
    with ThreadPoolExecutor() as pool:
        alone, again, *shared = pool.map(read, (0, 0, 0, 1, 2), (1, 1, 3, 3, 3))
    assert alone[0] == again[0] and len(alone[1]) == 1
    for part in (0, 1):
        assert sorted(alone[part]) == sorted(number for found in shared for number in found[part])
    assert [len(news) for *_, news in shared] == [2, 2, 2] and alone[2][-1] == 'few.jsonl: 1 documents, 1 empty'
    assert all(f'documents, read by process {n} of 3' in news[0] for n, (*_, news) in enumerate(shared, 1))


def test_max_documents_of_a_stream_are_the_first_ones_in_every_epoch(settings, tokenizer, open_stream):
    config = DatasetConfig(split_file('train.parquet', 4), max_documents=5, **STREAMED)
    stream = open_stream(config, workers=1, seed=3)
    batches = [next(stream) for _ in range(400)]
    assert batches[-1].state['lanes']['0']['places']['0'][0]['epoch'] >= 2
    filled = {number for part in read_parts(open_all_datasets([config], tokenizer, settings, print), tokenizer)
              for number in part.rows.doc_id.tolist()}
    assert set(np.unique([batch.doc_ids for batch in batches if batch.doc_ids.size])) - {0} == filled
    assert len(filled) == 5


def test_a_reader_that_the_system_kills_is_a_line_with_what_to_lower(open_stream):
    stream = open_stream(DatasetConfig('train.parquet', **STREAMED), workers=1)
    next(stream)
    stream.lanes[0].process.kill()
    with pytest.raises(UserError, match='reader 1 of the streamed datasets was ended, with code -9.*lower stream_work'):
        while True:
            next(stream)


def test_val_text_of_a_stream_is_its_first_tokens(settings, tokenizer):
    head, = open_datasets([DatasetConfig('train.parquet', **STREAMED)], tokenizer, settings, head=5000)
    whole, = open_datasets([DatasetConfig('train.parquet', source='stdlib')], tokenizer, settings)
    assert 5000 <= head.num_chunks * CHUNK < whole.num_chunks * CHUNK
    assert (whole.find(np.array(head.doc_ids)) >= 0).all()
    with pytest.raises(UserError, match='is streamed.*eval_tokens'):
        open_datasets([DatasetConfig('train.parquet', **STREAMED)], tokenizer, settings, head=0)
    with pytest.raises(UserError, match='leave streaming out'):
        open_datasets([DatasetConfig('train.parquet', **STREAMED)], tokenizer, settings)


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', 'saved', 'hub'])
def test_rows_go_on_from_any_state_of_the_library_in_every_kind_of_source(tmp_path, kind):
    """A dataset of the hub is a folder here, which the library reads as it reads one of the hub."""
    import datasets
    rows = [dict(id=f'{number}', text=f'text {number}') for number in range(300)]
    folder = tmp_path / 'data'
    folder.mkdir()
    if kind == 'saved':
        datasets.Dataset.from_list(rows).save_to_disk(str(folder), num_shards=3)
    else:
        for part in range(3):
            some = rows[part::3]
            if kind == 'jsonl':
                (folder / f'{part}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in some))
            else:
                pq.write_table(pa.Table.from_pylist(some), folder / f'{part}.parquet', row_group_size=7)
    config = DatasetConfig(str(folder), streaming=True, shuffle_buffer_size=32)
    files = Files(hub=str(folder)) if kind == 'hub' else find_files(config)

    def read(lane, lanes, state=None, epoch=0, seed=5):
        stream, found = RowStream(config, files, lane, lanes, seed), []
        stream.seek(epoch, state)
        while some := stream.next():
            documents = as_documents(some, config, Counts())
            found.append(([(d.id, d.text) for d in documents], json.loads(json.dumps(stream.state))))
        return found
    for lanes in (1, 2, 3):
        together = []
        for lane in range(lanes):
            whole = read(lane, lanes)
            together += [document for some, _ in whole for document in some]
            for number, (_, state) in itertools.islice(enumerate(whole), 0, None, 2):
                assert [some for some, _ in read(lane, lanes, state)] == [some for some, _ in whole[number + 1:]]
        assert sorted(together) == sorted((row['id'], row['text']) for row in rows)
    orders = {tuple(d for some, _ in read(0, 1, epoch=epoch, seed=seed) for d in some)
              for epoch, seed in ((0, 5), (1, 5), (2, 5), (3, 5), (0, 6), (0, 7))}
    assert len(orders) > 1  # of the files


def test_a_dataset_with_fewer_documents_than_readers_ends_the_run_at_once_however_rarely_it_is_drawn(open_stream):
    with open('one.jsonl', 'w') as file:
        file.write('{"text": "alone"}\n')
    stream = open_stream(DatasetConfig('train.parquet', **STREAMED, weight=1e6),
                         DatasetConfig('one.jsonl', streaming=True, source='alone'))
    with pytest.raises(UserError, match="'one.jsonl' has no documents with text .* for reader 2 of 2: lower "
                                        'stream_workers'):
        for _ in range(1000):
            next(stream)
            time.sleep(0.01)


def test_bad_rows_of_a_stream_are_left_out_and_said(open_stream):
    with open('bad.jsonl', 'w') as file:
        file.write('{"text": "some words"}\n{"text": 5}\n' * 20)
    news = []
    next(open_stream(DatasetConfig('bad.jsonl', streaming=True, skip_bad=True), workers=1, say=news.append))
    said, = [line for line in news if 'bad rows' in line]
    assert said == 'bad.jsonl, by reader 1 since it began: 1 documents, 19 duplicates, 20 bad rows left out'


def test_a_stream_whose_files_are_others_is_not_resumed(open_stream):
    config = DatasetConfig('train.parquet', **STREAMED)
    stream = open_stream(config, workers=1)
    state = step(stream)[2]
    shutil.copy('val.parquet', 'train.parquet')
    with pytest.raises(UserError, match='made with other train_datasets'):
        open_stream(config, workers=1, state=state)


def test_a_block_that_was_removed_to_make_room_is_read_again(open_stream, settings):
    stream = open_stream(DatasetConfig('train.parquet', **STREAMED), workers=1)
    expected = [step(stream)[0] for _ in range(30)]
    again = open_stream(DatasetConfig('train.parquet', **STREAMED), workers=1)
    found = []
    for _ in range(30):
        for entry in os.scandir(settings.data_cache_dir):
            if entry.is_dir() and not entry.name.endswith('.tmp'):
                shutil.rmtree(entry, ignore_errors=True)
        found.append(step(again)[0])
    assert found == expected


OPEN = '''
from configurator import load_settings, user_errors_as_one_line
from data.blocks import open_all_datasets
from data.documents import DatasetConfig
with user_errors_as_one_line():
    open_all_datasets([DatasetConfig("someone/things", streaming=True)], None, load_settings(["--stream_timeout=1"]),
                      print)
'''
READ = '''
import datasets, json, sys
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0.01
from configurator import user_errors_as_one_line
from data.documents import DatasetConfig, find_files
from data.row_stream import RowStream
config = DatasetConfig("someone/things", streaming=True)
with user_errors_as_one_line():
    rows, stream = [], RowStream(config, find_files(config), timeout=float(sys.argv[1]),
                                 say=lambda news: print(news, file=sys.stderr))
    while some := stream.next():
        rows += [row for _, _, row in some]
    print(json.dumps([rows, stream.files.revision]))
'''


@pytest.mark.slow
def test_a_stream_of_the_hub_goes_on_where_the_network_broke_and_gives_up_in_one_line(tmp_path):
    """The libraries' own clients, of a hub that breaks its connections for a while, then for good."""
    rows = [dict(id=f'{number}', text=f'text {number}') for number in range(1000)]
    for part in range(2):
        (tmp_path / 'files').mkdir(exist_ok=True)
        some = rows[500 * part:500 * part + 500]
        pq.write_table(pa.Table.from_pylist(some), tmp_path / f'files/train-{part}.parquet')
    asked, broken = Counter(), range(0)

    def fail(name):
        asked[name] += 1
        return 'drop' if name == 'train-1.parquet' and asked[name] in broken else None
    with serve_hub(tmp_path / 'files', fail) as hub:
        env = dict(HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}', HF_HOME=str(tmp_path), HF_HUB_OFFLINE='0')
        broken = range(1, 8)
        answer = run('-c', READ, '60', folder=tmp_path, env=env)
        assert json.loads(answer.stdout) == [[[row['id'], row['text']] for row in rows], COMMIT]
        assert answer.stderr.startswith('waiting for the dataset someone/things: 0 s of at most 60 s (')
        assert answer.stderr.endswith('someone/things can be read again\n')
        broken = range(10**6)
        answer = run('-c', READ, '2', folder=tmp_path, env=env, check=False)
        assert answer.returncode == 3 and "for the dataset 'someone/things', and stream_timeout is 2 (" in answer.stderr
        assert answer.stderr.splitlines()[-1].startswith('error: waited 2 s')
    answer = run('-c', OPEN, folder=tmp_path, env=env, check=False)  # the hub is away when the run begins
    assert answer.returncode == 3 and 'waiting for the dataset someone/things: ' in answer.stdout
    assert answer.stderr.startswith('error: waited ') and 'stream_timeout is 1 (' in answer.stderr
    answer = run('-c', OPEN, folder=tmp_path, env=env | dict(HF_HUB_OFFLINE='1'), check=False)
    assert answer.returncode == 2 and 'the hub did not provide it' in answer.stderr


@pytest.mark.slow
def test_a_run_on_a_streamed_mixture_says_the_shares_and_ends_with_a_checkpoint_when_it_is_used_up(workspace):
    """One command: two readers, a filter of the config file, a share held out for val."""
    (workspace / 'stream.py').write_text(STREAM)
    answer = run(ROOT / 'train.py', 'config.py', 'stream.py', folder=workspace, check=False)
    assert answer.returncode == 2, answer.stderr
    assert 'error: train_datasets are used up, after' in answer.stderr and 'newest checkpoint is out/' in answer.stdout
    lines = [line for line in metrics(workspace) if 'shares' in line]
    assert lines[0]['shares'].keys() == {'train.parquet', 'val.parquet'}
    assert lines[3]['shares']['train.parquet'] == pytest.approx(0.75, abs=0.04)
    assert (workspace / f'out/checkpoints/step-{lines[-1]["iter"]}').is_dir()
    *_, name, share = summary(workspace / 'out/metrics.jsonl', 'a corpus').split()
    assert (name, share) == ('val.parquet', f'{lines[-1]["shares"]["val.parquet"]:.2%}')


STREAM = '''
from data.documents import DatasetConfig

_least = 2000


def long_enough(row):
    return len(row['text']) > _least


train_datasets = [
    DatasetConfig('train.parquet', source='stdlib', weight=3.0, val_fraction=0.2, streaming=True,
                  shuffle_buffer_size=4, filter_fn=long_enough, max_documents=12, epochs=1),
    DatasetConfig('val.parquet', source='stdlib', epochs=1)]
val_datasets = [DatasetConfig('train.parquet', source='stdlib', val_fraction=0.2, streaming=True)]
stream_workers = 2
max_iters = 10000
eval_interval = 5000
lr_decay_iters = 100
'''
