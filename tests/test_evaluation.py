"""python -m evaluation, on a model that the tests have trained; and the figures that it tells."""
import json
import math
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch

from configurator import UserError
from data.corpus import chunk_bytes, read_corpus
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from evaluation.figures import perplexity, summarize
from evaluation.leakage import longest_shared_runs, overlap, shared_tokens
from evaluation.losses import bits_per_byte, bootstrap, evaluate_corpus
from retrieval.retriever import Retriever
from tests.conftest import CHUNK, ROOT, SHARED, open_all, run
from training.checkpoint import load_run


@pytest.fixture(scope='module')
def trained(populated, tmp_path_factory):
    """A folder with a RETRO in `out`, a GPT in `gpt`, and one of another tokenizer in `other`."""
    import shutil

    from data.prepare import train_tokenizer
    folder = tmp_path_factory.mktemp('trained') / 'run'
    shutil.copytree(populated, folder)
    train_tokenizer([path.read_text() for path in sorted((ROOT / 'tests').glob('test_*.py'))], 700).save(
        str(folder / 'other.json'))
    run(ROOT / 'train.py', 'config.py', folder=folder)
    for out_dir, *options in (('gpt',), ('other', '--tokenizer=other.json')):
        run(ROOT / 'train.py', 'config.py', '--use_retrieval=False', '--max_iters=4', f'--out_dir={out_dir}', *options,
            folder=folder)
    return folder


@pytest.fixture(scope='module')
def evaluated(trained):
    """The command's answer and the JSON that it wrote."""
    answer = run('-m', 'evaluation', '--baseline=gpt', '--max_tokens=13000', '--passages=3', folder=trained)
    return answer, json.loads((trained / 'out/evaluation.json').read_text())


def brute_force(chunk, neighbors):
    """The longest run of tokens that a list has in common with any of some lists."""
    longest = 0
    for neighbor in neighbors:
        for i in range(len(chunk)):
            for j in range(len(neighbor)):
                n = 0
                while i + n < len(chunk) and j + n < len(neighbor) and chunk[i + n] == neighbor[j + n]:
                    n += 1
                longest = max(longest, n)
    return longest


def test_the_longest_shared_run_is_that_of_a_brute_force_search_on_random_chunks():
    rng = np.random.default_rng(0)
    chunks, neighbors = rng.integers(0, 4, (60, 12)), rng.integers(0, 4, (60, 2, 24))
    lengths, counts = rng.integers(1, 13, 60), rng.integers(0, 25, (60, 2))
    neighbors[:20, 1, 3:9] = chunks[:20, 2:8]
    mask = np.arange(24) < counts[..., None]
    expected = [brute_force(chunks[i, :lengths[i]].tolist(), [neighbors[i, k, :counts[i, k]].tolist() for k in (0, 1)])
                for i in range(60)]
    assert longest_shared_runs(chunks, lengths, neighbors, mask).tolist() == expected
    assert len(set(expected)) > 4


@pytest.fixture(scope='module')
def losses_of_val(trained):
    """Of the val documents: the corpus, nats, Retrieved, tokenizer and model."""
    import os
    before = os.getcwd()
    os.chdir(trained)
    try:
        settings, tokenizer, model, device = load_run('out')
        corpus = read_corpus(open_all(settings, 'val_datasets'), tokenizer, 6000)
        with closing(Retriever(settings, tokenizer)) as retriever:
            nats, retrieved = evaluate_corpus(model, corpus, 4, device, nullcontext(), retriever)
        return corpus, nats, retrieved, tokenizer, model
    finally:
        os.chdir(before)


def test_the_overlap_is_that_of_a_brute_force_search_on_real_chunks(losses_of_val):
    corpus, _, retrieved, _, _ = losses_of_val
    shares = overlap(corpus, retrieved)

    def neighbors(of):
        return [tokens[mask].tolist() for tokens, mask in zip(retrieved.tokens[of], retrieved.mask[of], strict=True)]
    for i in range(len(corpus.chunks)):
        seen = neighbors(i) + (neighbors(i - 1) if corpus.position[i] > 0 else [])
        length = corpus.lengths[i]
        assert shares[i] == brute_force(corpus.chunks[i, :length].tolist(), seen) / length
    assert shares.max() > 0.3 and shares.min() < 0.2


def test_each_token_of_a_document_has_one_loss_and_its_first_has_none(losses_of_val):
    corpus, nats, _, tokenizer, _ = losses_of_val
    tokens = [document_tokens(text, tokenizer) for text in corpus.texts]
    assert corpus.predicted.sum() == sum(len(t) for t in tokens) - 1  # the last one is cut, and so has no end of text
    for arm in nats:
        assert ((nats[arm] > 0) == corpus.predicted).all()
    size = chunk_bytes(corpus, tokenizer).sum()
    first = sum(len(tokenizer.decode_single_token_bytes(t[0])) for t in tokens)
    assert size == sum(len(text.encode()) for text in corpus.texts) - first


def document_tokens(text, tokenizer):
    return tokenizer.encode_ordinary(text)


def settings_of(folder):
    from configurator import load_settings
    return load_settings([f'{folder}/config.py']).replace(
        retrieval_embedding_model=f'{folder}/embedding', retrieval_milvus_uri=f'{folder}/milvus.db',
        retrieval_cache_gb=0.0, retrieval_matches_dir=f'{folder}/matches')


def test_the_losses_are_those_of_the_training_streams_batches(losses_of_val, trained):
    """Over one document that fills whole sequences alone, cut at the same places."""
    corpus, nats, retrieved, _, model = losses_of_val
    block, L = model.config.block_size, model.config.block_size // CHUNK
    first = corpus.chunks[:L]
    assert (corpus.document[:L] == 0).all() and L < (corpus.document == 0).sum()
    tokens = torch.from_numpy(first.reshape(1, block)).long()
    targets = torch.from_numpy(corpus.chunks.reshape(-1)[1:block + 1].reshape(1, block)).long()
    for arm in ('on', 'off'):
        with closing(Retriever(settings_of(trained), load_tokenizer(f'{trained}/tokenizer.json'))) as retriever:
            pointers = retriever.point(tokens.numpy(), corpus.doc_ids[None, :L])
        read = dict(neighbors=torch.from_numpy(retrieved.tokens[:L])[None].long(),
                    neighbor_mask=torch.from_numpy(retrieved.mask[:L])[None],
                    pointers=torch.from_numpy(pointers)) if arm == 'on' else {}
        with torch.no_grad():
            _, loss = model(tokens, targets, doc_ids=torch.zeros(1, L).long(), **read)
        own = nats[arm].reshape(-1)[1:block + 1]
        assert loss.item() == pytest.approx(own.mean(), rel=1e-5)
    assert (nats['on'][1:L] != nats['off'][1:L]).any()


def test_what_a_chunk_reads_is_what_the_chunk_before_it_retrieved(losses_of_val):
    corpus, _, retrieved, _, model = losses_of_val
    L = model.config.block_size // CHUNK
    for i, before in enumerate(retrieved.read):
        assert before == (i - 1 if corpus.position[i] > 0 and i % L > 0 else -1)


def test_the_longest_run_of_a_chunk_is_that_of_a_brute_force_search_over_all_documents(losses_of_val, trained):
    from configurator import load_settings
    corpus, _, retrieved, tokenizer, _ = losses_of_val
    dataset, = open_all(load_settings([f'{trained}/config.py']).replace(
        train_datasets=[f'{trained}/train.parquet'], tokenizer=f'{trained}/tokenizer.json'))
    documents = [' '.join(map(str, ['', *chunks.tokens.reshape(-1)[:chunks.lengths.sum() - 1].tolist(), '']))
                 for chunks in dataset.documents()]
    for i in range(0, len(corpus.chunks), 5):
        chunk = corpus.chunks[i, :corpus.lengths[i]]
        chunk = chunk[chunk != tokenizer.eot_token].tolist()
        runs = [b - a for a in range(len(chunk)) for b in range(a + 1, len(chunk) + 1)
                if any(f' {" ".join(map(str, chunk[a:b]))} ' in document for document in documents)]
        assert retrieved.longest_runs[i] == max(runs, default=0)


def test_figures_by_longest_run_grow_to_all_chunks(evaluated):
    answer, report = evaluated
    lines = report['bpb_by_longest_run']
    assert [line['longest_run'] for line in lines] == [4, 8, 16]
    assert lines[-1]['bpb_on'] == report['bpb_on'] and lines[-1]['share_of_bytes'] == 1
    assert lines[0]['chunks'] < lines[-1]['chunks'] and f'{lines[1]["bpb_baseline"]:.4f}' in answer.stdout


def test_without_copies_pointers_into_passages_like_the_text_are_left_out(trained):
    """The train documents under another source are not recognized, so that each finds itself."""
    found = {}
    for copies in (0, 20):
        run('-m', 'evaluation', '--data=train.parquet', '--max_tokens=2000', '--passages=0', '--results=copies',
            f'--without_copies={copies}', '--train_datasets=["train.parquet"]', folder=trained)
        found[copies] = json.loads((trained / 'copies/evaluation.json').read_text())
    assert found[0]['bpb_off'] == found[20]['bpb_off'] and found[0]['bpb_on'] < 0.8 * found[20]['bpb_on']
    assert '20 or more tokens' in found[20]['notes'][0]


def test_bits_per_byte_of_all_overlaps_is_the_plain_one_and_shares_grow_with_the_limit(evaluated):
    _, report = evaluated
    lines = report['bpb_by_overlap']
    assert [line['overlap'] for line in lines] == [0.125, 0.25, 0.5, 0.75, 1.0]
    for arm in ('on', 'off', 'baseline'):
        assert lines[-1][f'bpb_{arm}'] == report[f'bpb_{arm}']
    shares = [line['share_of_bytes'] for line in lines]
    assert shares == sorted(shares) and shares[-1] == 1 and shares[0] < 1
    classes = report['by_similarity']
    assert sum(line['chunks'] for line in classes) == report['chunks']
    assert classes[0]['above'] is None


def test_the_command_tells_what_it_writes(evaluated, trained):
    answer, report = evaluated
    assert f'{report["bpb_on"]:.4f}' in answer.stdout and f'{report["bpb_baseline"]:.4f}' in answer.stdout
    low, high = report['bpb_on_interval']
    assert low <= report['bpb_on'] <= high
    assert report['perplexity_on'] == pytest.approx(math.exp(report['loss_on']))
    assert report['bpb_on'] == pytest.approx(report['loss_on'] * report['tokens'] / math.log(2) / report['bytes'])
    assert report['word_perplexity_on'] == pytest.approx(
        math.exp(report['loss_on'] * report['tokens'] / report['words']))
    assert report['gain_over_off'] == pytest.approx(1 - report['bpb_on'] / report['bpb_off'])
    for name in ('leakage.png', 'similarity.png'):
        assert (trained / 'out' / name).read_bytes().startswith(b'\x89PNG')
    assert '<h2>Is it more than copying?</h2>' in (trained / 'out/report.html').read_text()


def test_a_second_evaluation_gives_the_same_figures(evaluated, trained):
    _, first = evaluated
    run('-m', 'evaluation', '--baseline=gpt', '--max_tokens=13000', '--results=again', folder=trained)
    again = json.loads((trained / 'again/evaluation.json').read_text())
    assert {**first, 'seconds': 0} == {**again, 'seconds': 0}


def test_other_text_is_evaluated_and_a_baseline_with_another_tokenizer_compares_in_bytes(trained):
    text = (ROOT / 'README.md').read_text()
    (trained / 'mine.jsonl').write_text(json.dumps(dict(id='readme', text=text[:4000])) + '\n'
                                        + json.dumps(dict(id='wikitext', text=text[4000:8000])) + '\n')
    answer = run('-m', 'evaluation', '--data=mine.jsonl', '--baseline=other', '--results=mine', folder=trained)
    report = json.loads((trained / 'mine/evaluation.json').read_text())
    assert report['documents'] == 2 and report['words'] == len(text[:4000].split()) + len(text[4000:8000].split())
    assert 'another tokenizer or chunk size: bits per byte' in answer.stdout
    assert 0 < report['bpb_baseline'] != report['bpb_off'] and 'loss_baseline' not in report
    assert 'bpb_baseline' not in report['bpb_by_overlap'][0]


def test_a_gpt_is_evaluated_without_a_knowledge_base(trained):
    run('-m', 'evaluation', '--out_dir=gpt', '--max_tokens=3000', '--retrieval_milvus_uri=http://127.0.0.1:9',
        folder=trained)
    report = json.loads((trained / 'gpt/evaluation.json').read_text())
    assert report['bpb_off'] > 0 and 'bpb_on' not in report and 'bpb_by_overlap' not in report


def test_the_bootstrap_resamples_documents_whole():
    document = np.repeat(np.arange(50), 4)
    same = np.tile([1.0, 2, 3, 4], 50)
    assert bootstrap(lambda a, b: a / b, document, same, np.ones(200)) == [2.5, 2.5]  # all documents are alike
    differing = np.repeat(np.random.default_rng(0).normal(2.5, 1, 50), 4)
    low, high = bootstrap(lambda a, b: a / b, document, differing, np.ones(200))
    error = differing[::4].std() / math.sqrt(50)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_a_perplexity_that_no_float_can_hold_has_no_figure():
    assert perplexity(700.0, 10) == pytest.approx(math.exp(70)) and perplexity(8000.0, 10) is None


def test_there_is_no_interval_over_one_or_two_documents():
    assert bootstrap(lambda a, b: a / b, np.array([0, 0, 1]), np.ones(3), np.ones(3)) is None


def test_text_without_words_has_no_perplexity_a_word(trained):
    (trained / 'wide.jsonl').write_text(json.dumps(dict(text='中文' * 3000)) + '\n')
    answer = run('-m', 'evaluation', '--data=wide.jsonl', '--results=wide', folder=trained)
    report = json.loads((trained / 'wide/evaluation.json').read_text())
    assert report['words'] == 1 and report['word_perplexity_on'] is None and report['bpb_on_interval'] is None
    assert 'too few documents' in answer.stdout


def test_a_file_that_the_run_knows_is_not_handed_to_itself(trained):
    run('-m', 'evaluation', '--data=train.parquet', '--max_tokens=4000', '--results=known', folder=trained)
    report = json.loads((trained / 'known/evaluation.json').read_text())
    assert report['bpb_by_overlap'][2]['share_of_bytes'] > 0.8  # else each chunk would be its own neighbor


def test_max_tokens_takes_documents_of_all_datasets(settings):
    datasets = open_all(settings.replace(val_datasets=[dict(path=f'{name}.parquet', source=name)
                                                       for name in ('train', 'val')]), 'val_datasets')
    names = read_corpus(datasets, load_tokenizer('tokenizer.json')).names
    assert len(names) == 34
    assert {name.partition('/')[0] for name in names[:15]} == {'train', 'val'}


def test_chunks_without_bytes_and_corpora_without_overlap_have_no_figure():
    assert bits_per_byte(np.zeros(3), np.zeros(3)) is None
    tokens = np.arange(8)
    assert shared_tokens(tokens, np.array([9, 2, 3, 4, 9]), 3).tolist() == [False] * 2 + [True] * 3 + [False] * 3
    assert not shared_tokens(tokens, tokens[:2], 3).any()


def test_the_last_document_is_cut_on_the_grid_at_max_tokens(settings):
    with open('same.jsonl', 'w') as file:
        file.writelines(json.dumps({'id': i, 'text': 'some words of text ' * 40}) + '\n' for i in range(5))
    datasets = open_all(settings.replace(val_datasets=['same.jsonl']), 'val_datasets')
    tokenizer = load_tokenizer('tokenizer.json')
    whole, cut = (read_corpus(datasets, tokenizer, max_tokens) for max_tokens in (0, 500))
    assert 500 - CHUNK < cut.lengths.sum() <= 500
    assert (cut.chunks == whole.chunks[:len(cut.chunks)]).all() and whole.texts == ['some words of text ' * 40] * 5
    assert whole.texts[0].startswith(cut.texts[-1])


@pytest.mark.parametrize('arguments, said', [
    (['--out_dir=nowhere'], "no checkpoint in 'nowhere'"),
    (['--out_dir=gpt', '--retrieval=on'], "the model in 'gpt' was trained without retrieval"),
    (['--data=empty.jsonl'], "'empty.jsonl' has no documents with text"),
    (['--data=nowhere.jsonl'], "no corpus at 'nowhere.jsonl'"),
    (['--baseline=nowhere'], "no checkpoint in 'nowhere'"),
    (['--max_tokens=-1'], '--max_tokens must be at least 0, but is -1'),
    (['--max_token=1'], "unknown config key 'max_token' in the command line"),
    (['--dtype=bf16'], "dtype 'bf16' is none of"),
    (['--results=config.py'], "--results 'config.py' cannot be written"),
    (['--batch_size=0'], 'batch_size must be at least 1, but is 0'),
    (['--data=short.jsonl'], 'no document is longer than a token'),
    (["--multiple_choice_benchmarks=[5]"], 'which is no name and no (name, arguments)'),
    (['--retrieval_milvus_uri=other.db'], "no collection 'chunks' in other.db"),
    (["--multiple_choice_benchmarks=['Chess']"], "multiple_choice_benchmarks holds 'Chess', which is none of"),
])
def test_what_cannot_be_evaluated_is_one_clear_line_and_exit_code_2(trained, arguments, said):
    (trained / 'empty.jsonl').write_text('{"text": ""}\n')
    (trained / 'short.jsonl').write_text('{"text": "a"}\n')
    answer = run('-m', 'evaluation', *arguments, folder=trained, check=False)
    assert answer.returncode == 2 and said in answer.stderr
    assert answer.stderr.startswith('error: ') and answer.stderr.count('\n') == 1


def test_training_goes_on_alike_whether_it_is_evaluated_or_not(workspace):
    """Batch for batch, with dropout, and with a benchmark and samples in between where they can be had."""
    from tests.test_train import metrics
    long = ['config.py', '--dropout=0.1', '--max_iters=6']
    (workspace / 'data').mkdir()
    more = []
    if (SHARED / 'data/logiqa-eval.txt').exists():
        questions = (SHARED / 'data/logiqa-eval.txt').read_text().strip().split('\n\n')[:6]
        (workspace / 'data/LogiQA.txt').write_text('\n\n' + '\n\n'.join(questions) + '\n')
        more = ["--multiple_choice_benchmarks=['LogiQA']", '--benchmark_data_dir=data']
    answer = run(ROOT / 'train.py', *long, '--eval_interval=2', '--out_dir=often', *more, folder=workspace)
    run(ROOT / 'train.py', *long, '--eval_interval=100', '--out_dir=seldom', folder=workspace)
    often, seldom = metrics(workspace, 'often'), metrics(workspace, 'seldom')
    assert [line['loss'] for line in often if 'loss' in line] == [line['loss'] for line in seldom if 'loss' in line]
    if more:
        scores = [line['benchmarks']['LogiQA'] for line in often if 'benchmarks' in line]
        assert len(scores) == 4 and all(own['questions'] == 6 and own['cut'] == 6 for own in scores)
        assert 'step 2: LogiQA, retrieval on ' in answer.stdout and '(chance 25.0%, 6 questions; ' in answer.stdout


def test_summaries_without_retrieval_have_no_leakage(losses_of_val):
    corpus, nats, _, tokenizer, _ = losses_of_val
    report = summarize(corpus, chunk_bytes(corpus, tokenizer), {'off': nats['off']})
    assert 'bpb_by_overlap' not in report and 'gain_over_off' not in report


def test_a_stream_of_one_document_and_its_corpus_have_the_same_chunks(settings):
    """The evaluation reads the grid that training reads."""
    datasets = open_all(settings, 'val_datasets')
    corpus = read_corpus(datasets, load_tokenizer(settings.tokenizer))
    stream = SequenceStream(datasets, 4 * CHUNK, 2)
    known = dict(zip(corpus.chunk_ids.tolist(), corpus.chunks, strict=True))
    for batch, _ in zip(stream, range(5), strict=False):
        for ids, tokens in zip(batch.chunk_ids, batch.tokens, strict=True):
            for i, chunk in zip(ids.tolist(), tokens.reshape(-1, CHUNK), strict=True):
                assert not i or (known[i] == chunk).all()


def test_data_has_the_columns_and_the_source_of_the_train_set_that_it_is_like():
    from types import SimpleNamespace

    from evaluation.__main__ import configs_of_data

    def sources(data, like=None, train=None):
        settings = SimpleNamespace(template='', val_datasets=['v.jsonl'], train_datasets=train or [
            dict(path='wiki', name='en', source='english'), dict(path='wiki', name='de', source='german'),
            dict(path='docs', text_field='body')])
        return [(config.path, config.source, config.text_field) for config in
                configs_of_data(SimpleNamespace(data=data, like=like), settings)]
    assert sources(None) == [('v.jsonl', '', 'text')] and sources(['./v.jsonl']) == [('v.jsonl', '', 'text')]
    assert sources(['new.csv'], like='de') == sources(['new.csv'], like='german') == [('new.csv', 'german', 'text')]
    assert sources(['new.csv'], like='./docs/') == [('new.csv', '', 'body')]
    assert sources(['new.csv'], train=['a.jsonl', 'b.jsonl']) == [('new.csv', '', 'text')]
    with pytest.raises(UserError, match='--data holds .*path must not be empty'):
        sources([''], like='docs')
    with pytest.raises(UserError, match='several columns, sources or subsets .*wiki de german'):
        sources(['wiki'])
    assert sources(['wiki'], like='german') == [('wiki', 'german', 'text')]
    filtered = [dict(path='a.jsonl', source='a', filter_fn='wanted')]  # as a checkpoint has it
    assert sources(['new.csv'], train=filtered) == [('new.csv', 'a', 'text')]
    with pytest.raises(UserError, match='--data=./a.jsonl is a dataset of the run with a filter_fn.*the config file'):
        sources(['./a.jsonl'], train=filtered)
    for like, said in ((None, 'several columns, sources'), ('wiki', 'several columns, sources'),
                       ('wrong', '--like=wrong is neither path nor name nor source')):
        with pytest.raises(UserError, match=f'{said}.*wiki de german'):
            sources(['new.csv'], like=like)
