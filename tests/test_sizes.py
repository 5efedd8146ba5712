"""What a run takes, by arithmetic, against the models themselves and against what torch counts."""
import os
import re

from system import autocast

import pytest
import torch

from configurator import UserError, load_settings
from data.tokenizer import load_tokenizer, vocabulary_size
from model import RETRO, RETROConfig
from tests.conftest import ROOT, run
from training.distributed import Ranks
from training.sizes import activation_bytes, check_memory, count_parameters, memory, print_sizes, shape_of

GPT = dict(use_retrieval=False, token_mix=False, copy_own_context=False)
PAPER = dict(token_mix=False, copy_own_context=False, retrieval_copy=False, retrieval_encoder_layers=2,
             retrieval_pointers=0)
MODELS = {'gpt': GPT, 'paper': PAPER, 'ours': {}, 'pointers': dict(retrieval_k_neighbors=0),
          'copy with an encoder': dict(retrieval_encoder_layers=1, block_size=256, retrieval_k_neighbors=1)}


def make_config(options):
    return RETROConfig(**{**dict(block_size=128, vocab_size=512, n_layer=4, n_head=4, n_embd=128,
                                 retrieval_layers=[2, 4], retrieval_chunk_size=32), **options})


def make_batch(c):
    """Arguments of the model for two sequences."""
    T, C, K = c.block_size, c.retrieval_chunk_size, c.retrieval_k_neighbors
    tokens = torch.randint(c.vocab_size, (2, T))
    given = dict(tokens=tokens, targets=tokens, doc_ids=torch.zeros(2, T // C, dtype=torch.long))
    if c.has_neighbors:
        given['neighbors'] = torch.randint(c.vocab_size, (2, T // C, K, 2 * C))
        given['neighbor_mask'] = torch.ones_like(given['neighbors'], dtype=torch.bool)
    if c.has_pointers:
        given['pointers'] = torch.randint(1, 16, (2, T, c.retrieval_pointers, 3), dtype=torch.int32)
    return given


def as_settings(c, **changes):
    shape = {key: value for key, value in vars(c).items() if key != 'vocab_size'}
    return load_settings([]).replace(**shape, **{**dict(batch_size=2, gradient_accumulation_steps=1), **changes})


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('options', MODELS.values(), ids=MODELS)
def test_activations_are_within_a_tenth_of_what_a_forward_pass_keeps(options, precision):
    c = make_config(options)
    model, kept, a = RETRO(c), {}, 4 if precision == 'float32' else 2
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with autocast(precision, 'cpu'), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**make_batch(c))[1]
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    blocks, again, rest = activation_bytes(c, a, on_gpu=False)
    expected = 2 * c.block_size * (sum(blocks) + rest + 4 * c.vocab_size)
    expected += 4 * c.vocab_size * c.n_embd * c.copy_own_context
    expected += (a == 2) * 2 * sum(p.numel() for p in model.parameters() if p.dim() > 1)  # as autocast has cast them
    assert loss.requires_grad and not any(again)
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize('kept', ['none', 'selective', 'full'])
@pytest.mark.parametrize('name', ['gpt', 'paper', 'ours'])
def test_the_peak_of_a_step_is_within_a_tenth_of_what_torch_counts(name, kept):
    from torch.distributed._tools.mem_tracker import MemTracker
    c = make_config(MODELS[name] | dict(block_size=256, vocab_size=1024, n_embd=256))
    model = RETRO(c)
    if kept != 'none':
        pytest.importorskip('training.parallel').checkpoint_blocks(model, kept)
    optimizer, given = torch.optim.AdamW(model.parameters()), make_batch(c)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):  # the moments are there from the second step on
            tracker.reset_mod_stats()
            with autocast('bfloat16', 'cpu'):
                _, loss = model(**given)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    measured, = tracker.get_tracker_snapshot('peak').values()
    expected = memory(as_settings(c, activation_checkpointing=kept), model, 1, 'ddp', 'bfloat16', on_gpu=False,
                      compiled=False)
    assert sum(expected.values()) == pytest.approx(measured['Total'], rel=0.1)


def test_what_training_keeps_takes_16_bytes_a_weight_and_is_sharded_by_fsdp_alone():
    c = make_config(PAPER)
    model = RETRO(c)
    settings = as_settings(c, gradient_accumulation_steps=8)
    weights = sum(p.numel() for p in model.parameters())
    for parallel, size in (('ddp', 16 * weights), ('fsdp', 2 * weights)):
        parts = memory(settings, model, 8, parallel, 'bfloat16')
        assert sum(parts[part] for part in ('weights', 'gradients', 'optimizer')) == size
    assert memory(settings, model, 3, 'ddp', 'bfloat16') is None  # 8 micro-batches
    model.freeze_decoder()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory(settings, model, 8, 'ddp', 'bfloat16')['optimizer'] == 8 * trained < 8 * weights
    part = shape_of(load_settings(['--freeze_retrieval=True', '--template=plain'], can_dry_run=True))
    assert 0 < sum(p.numel() for p in part.parameters() if p.requires_grad) < sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_a_config_loads_and_its_model_has_the_size_that_its_header_names(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_settings([str(path)])
    if settings.tokenizer != 'gpt2' and not os.path.isfile(settings.tokenizer):
        settings.tokenizer = 'gpt2'  # data/NAME/prepare.py makes it
    counts = count_parameters(shape_of(settings))
    named = re.search(r'Ours counts ([\d.]+) ([MB]) parameters', path.read_text())
    assert bool(named) == path.stem.startswith(('retro_', 'paper_', 'instructretro_'))
    if named:
        assert sum(counts.values()) / dict(M=1e6, B=1e9)[named[2]] == pytest.approx(float(named[1]), abs=0.006)
        assert {'embeddings', 'decoder', 'encoder', 'cross-attention'} == set(counts)


def test_a_dry_run_loads_nothing_and_names_what_the_run_takes(tmp_path):
    said = run(ROOT / 'train.py', ROOT / 'config/retro_2b.py', "--train_datasets=['missing.jsonl']", '--dry_run=True',
               '--retrieval_milvus_uri=http://127.0.0.1:9', '--retrieval_embedding_model=nowhere', folder=tmp_path,
               env=dict(TIKTOKEN_CACHE_DIR=str(tmp_path / 'none'))).stdout
    assert 'RETRO of 1.53 B parameters: 24 blocks, 2,048 wide' in said and 'vocabulary of 50,304' in said
    assert 'step: 1,048,576 tokens, 13,967.6 TFLOP' in said and '80 GB: ddp from 1, fsdp from 2' in said
    assert 'disk: 18.40 GB a checkpoint, 6.13 of it weights' in said and '6,144,000,000 chunks of 64 tokens' in said
    assert os.listdir(tmp_path) == []


def test_a_dry_run_under_torchrun_is_of_its_processes_and_the_first_alone_prints_it(monkeypatch, capsys):
    settings = load_settings(['--dry_run=True'], can_dry_run=True)
    for rank in (0, 1):
        for key, value in (('RANK', rank), ('WORLD_SIZE', 4), ('LOCAL_RANK', rank), ('LOCAL_WORLD_SIZE', 4)):
            monkeypatch.setenv(key, str(value))
        print_sizes(settings)
        said = capsys.readouterr().out
        assert bool(said) == (rank == 0)
        assert not said or (re.search(r'ddp on 4 .*\n +fsdp on 4', said) and 'on 8' not in said)
    for key in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'):
        monkeypatch.setenv(key, '3')
    with pytest.raises(UserError, match=r'cannot be shared by 3 processes'):
        print_sizes(settings)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_loaded(tmp_path):
    answer = run(ROOT / 'train.py', ROOT / 'config/instructretro_48b.py', '--parallel=ddp', '--device=cpu',
                 folder=tmp_path, check=False)
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1 and os.listdir(tmp_path) == []
    assert ("a model of 44.74 B parameters cannot fit: its weights, gradients and AdamW's moments alone take 715.8 GB"
            in answer.stderr)


def test_what_fits_is_not_refused_and_a_batch_that_does_not_is_said(capsys, monkeypatch):
    settings = load_settings(['--n_layer=2', '--n_embd=64', '--n_head=2', '--device=cpu'])
    check_memory(settings, Ranks())
    assert capsys.readouterr().out == ''
    monkeypatch.setattr('training.sizes.machine_memory', lambda: 100_000_000)
    check_memory(settings, Ranks())
    assert re.search(r'is likely to need [\d.]+ GB, and there are 0.1: lower batch_size', capsys.readouterr().out)
    weights = 4 * sum(count_parameters(shape_of(settings)).values())
    monkeypatch.setattr('training.sizes.machine_memory', lambda: weights)
    with pytest.raises(UserError, match='cannot fit'):
        check_memory(settings, Ranks())
    check_memory(settings.replace(eval_only=True), Ranks())  # evaluating needs the weights alone
    check_memory(settings.replace(parallel='fsdp'), Ranks(world_size=8, local_world_size=2))


def test_a_dry_run_of_what_cannot_be_is_an_error():
    for argument, said in (('--n_head=7', 'n_embd 768 must be a multiple of n_head 7'),
                           ('--tokenizer=nowhere.json', "no tokenizer 'nowhere.json'")):
        with pytest.raises(UserError, match=said):
            print_sizes(load_settings([argument, '--dry_run=True'], can_dry_run=True))
    with pytest.raises(UserError, match=r'dry_run is of train.py and of python -m retrieval.populate alone'):
        load_settings(['--dry_run=True'])


def test_the_size_of_a_vocabulary_is_the_tokenizers(prepared):
    path = str(prepared / 'tokenizer.json')
    assert vocabulary_size(path) == load_tokenizer(path).n_vocab
    assert vocabulary_size('gpt2') == 50257
