"""Checkpoints: folders that are whole before a pointer names them, and what sampling and evaluating need of them."""
import itertools
import json
import os
import shutil

from system import autocast

import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import UserError, load_settings
from data.tokenizer import load_tokenizer, tokenizer_json
from model import RETRO, RETROConfig
from tests.conftest import ROOT, run
from tests.test_train import losses
from training.checkpoint import RunState, list_steps, load_checkpoint, load_run, save_checkpoint
from training.distributed import Ranks

START = '--start=import textwrap\n\ndef wrap(text, width=70):\n    return [text]\n'


@pytest.fixture(scope='module')
def trained(populated, tmp_path_factory):
    """A folder with a RETRO of 12 steps in `out`, evaluated and saved every 4."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    shutil.copytree(populated, folder)
    run(ROOT / 'train.py', 'config.py', '--max_iters=12', folder=folder)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of `trained` that a test may change."""
    shutil.copytree(trained, tmp_path / 'run')
    return tmp_path / 'run'


def test_a_checkpoint_is_a_folder_of_documented_files_and_the_newest_two_are_kept(trained):
    assert list_steps(trained / 'out/checkpoints') == [8, 12]
    folder = trained / 'out/checkpoints/step-12'
    assert sorted(path.name for path in folder.iterdir()) == ['meta.json', 'model.safetensors', 'optimizer.pt',
                                                              'rank-0.pt', 'tokenizer.json']
    assert (trained / 'out/checkpoints/latest').read_text() == 'step-12\n'
    assert (folder / 'tokenizer.json').read_bytes() == (trained / 'tokenizer.json').read_bytes()
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['step'] == 12 and meta['model']['n_embd'] == 32 and meta['settings']['learning_rate'] == 1e-2


def test_all_checkpoints_are_kept_if_asked_for(trained):
    run(ROOT / 'train.py', 'config.py', '--out_dir=all', '--keep_checkpoints=0', '--use_retrieval=False',
        '--eval_interval=1', '--max_iters=4', folder=trained)
    assert list_steps(trained / 'all/checkpoints') == [1, 2, 3, 4]


def test_a_copied_checkpoint_samples_and_evaluates_with_the_corpus_gone(trained, copy, tmp_path):
    """The out_dir, and the folder of one checkpoint alone, elsewhere; both give what the original gives."""
    arguments = [START, '--max_new_tokens=20', '--temperature=0']
    expected = run(ROOT / 'sample.py', *arguments, folder=trained).stdout
    (copy / 'mine.jsonl').write_text(json.dumps(dict(text=(ROOT / 'model.py').read_text()[:4000])))
    shutil.copytree(copy / 'out', tmp_path / 'elsewhere/out')
    shutil.copytree(copy / 'out/checkpoints/step-12', tmp_path / 'elsewhere/model')
    shutil.rmtree(copy / 'out')
    for name in ('train.parquet', 'val.parquet', 'tokenizer.json', 'config.py'):
        (copy / name).unlink()
    for out_dir in ('../elsewhere/out', '../elsewhere/model'):
        assert run(ROOT / 'sample.py', f'--out_dir={out_dir}', *arguments, folder=copy).stdout == expected
        run('-m', 'evaluation', f'--out_dir={out_dir}', '--data=mine.jsonl', '--results=results', folder=copy)
        report = json.loads((copy / 'results/evaluation.json').read_text())
        assert report['bpb_on'] > 0 and report['bpb_on'] != report['bpb_off']


def test_a_run_killed_between_writing_a_folder_and_its_pointer_resumes_from_the_one_before(trained, copy):
    for leftover in ('step-12', 'step-9.tmp'):  # whole but not named, and half written
        shutil.copytree(copy / 'out/checkpoints/step-8', copy / 'out/checkpoints' / leftover, dirs_exist_ok=True)
    (copy / 'out/checkpoints/step-9.tmp/meta.json').unlink()
    (copy / 'out/checkpoints/latest').write_text('step-8\n')
    assert load_checkpoint(copy / 'out').step == 8
    run(ROOT / 'train.py', 'config.py', '--max_iters=12', '--init_from=resume', folder=copy)
    assert losses(copy) == losses(trained) and load_checkpoint(copy / 'out').step == 12
    assert list_steps(copy / 'out/checkpoints') == [8, 12] and not (copy / 'out/checkpoints/step-9.tmp').exists()


def test_a_run_resumed_from_an_earlier_step_keeps_its_own_newest_checkpoints(copy):
    """The pointer is moved back by hand; what was saved beyond it neither counts nor is removed."""
    (copy / 'out/checkpoints/latest').write_text('step-8\n')
    run(ROOT / 'train.py', 'config.py', '--max_iters=10', '--init_from=resume', '--keep_checkpoints=1', folder=copy)
    assert list_steps(copy / 'out/checkpoints') == [10, 12] and load_checkpoint(copy / 'out').step == 10


def test_checkpoints_of_an_abandoned_trajectory_are_removed_first(copy):
    """The run is resumed from step 8 and passes step 12, which was saved before the pointer was moved back."""
    (copy / 'out/checkpoints/latest').write_text('step-8\n')
    run(ROOT / 'train.py', 'config.py', '--max_iters=13', '--init_from=resume', '--eval_interval=13', folder=copy)
    assert list_steps(copy / 'out/checkpoints') == [8, 13]


def test_a_run_does_not_resume_within_the_folder_of_a_checkpoint(copy):
    answer = run(ROOT / 'train.py', 'config.py', '--init_from=resume', '--out_dir=out/checkpoints/step-12',
                 folder=copy, check=False)
    assert answer.returncode == 2 and 'is the folder of a checkpoint, and a run resumes in the out_dir' in answer.stderr
    answer = run(ROOT / 'train.py', 'config.py', '--eval_only=True', '--out_dir=out/checkpoints/step-12', folder=copy)
    assert 'val_bpb_on' in answer.stdout


def test_a_pointer_out_of_the_run_is_refused(copy):
    (copy / 'out/checkpoints/latest').write_text('../../elsewhere\n')
    with pytest.raises(UserError, match="names '../../elsewhere', which is no checkpoint"):
        load_checkpoint(copy / 'out')


def test_what_a_user_gives_on_resume_takes_effect(copy):
    """AdamW's hyperparameters are those of the run, and not of the checkpoint."""
    for name, options in (('same', []), ('other', ['--weight_decay=0.9', '--beta1=0.5'])):
        shutil.copytree(copy / 'out', copy / name)
        run(ROOT / 'train.py', 'config.py', '--max_iters=15', '--init_from=resume', f'--out_dir={name}', *options,
            folder=copy)
    (same, _), (other, _) = losses(copy, 'same'), losses(copy, 'other')
    assert same[13] == other[13] and same[15] != other[15]


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(copy):
    shutil.rmtree(copy / 'out/checkpoints')
    (copy / 'out/ckpt.pt').write_bytes(b'old')
    for command in ([ROOT / 'train.py', 'config.py', '--init_from=resume'], [ROOT / 'sample.py']):
        answer = run(*command, folder=copy, check=False)
        assert answer.returncode == 2 and answer.stderr.count('\n') == 1
        assert "'out/ckpt.pt' is a checkpoint of an earlier version of nanoRETRO, which this one" in answer.stderr
    assert (copy / 'out/ckpt.pt').read_bytes() == b'old'


def test_a_new_run_sets_a_checkpoint_of_an_earlier_version_aside(copy):
    (copy / 'out/ckpt.pt').write_bytes(b'old')
    run(ROOT / 'train.py', 'config.py', '--max_iters=1', '--use_retrieval=False', folder=copy)
    assert (copy / 'out/previous-1/ckpt.pt').read_bytes() == b'old' and load_checkpoint(copy / 'out').step == 1


def spoil(path):
    """A weight that is not finite."""
    weights = load_file(path)
    weights['transformer.ln_f.weight'][3] = float('nan')
    save_file(weights, path)


def test_weights_that_are_not_finite_are_neither_resumed_sampled_evaluated_nor_started_from(copy):
    spoil(copy / 'out/checkpoints/step-12/model.safetensors')
    for command in ([ROOT / 'train.py', 'config.py', '--init_from=resume', '--max_iters=13'], [ROOT / 'sample.py'],
                    [ROOT / 'train.py', 'config.py', '--eval_only=True'], ['-m', 'evaluation'],
                    [ROOT / 'train.py', 'config.py', '--init_from=out', '--out_dir=new']):
        answer = run(*command, folder=copy, check=False)
        assert answer.returncode == 4 and answer.stderr.count('\n') == 1, answer.stderr
        assert 'has weights that are not finite (transformer.ln_f.weight)' in answer.stderr


def test_training_starts_from_the_weights_of_another_run(copy):
    """An out_dir or the folder of a checkpoint: weights alone, and a first evaluation like the last one there."""
    _, before = losses(copy)
    for number, folder in enumerate(('out', 'out/checkpoints/step-12')):
        run(ROOT / 'train.py', 'config.py', f'--init_from={folder}', f'--out_dir=new{number}', '--max_iters=2',
            folder=copy)
        _, after = losses(copy, f'new{number}')
        assert after[0] == pytest.approx(before[12], rel=1e-6) and load_checkpoint(copy / f'new{number}').step == 2
    answer = run(ROOT / 'train.py', 'config.py', '--init_from=out', '--out_dir=new', '--n_embd=16', folder=copy,
                 check=False)
    assert answer.returncode == 2 and 'n_embd: it has 32, the run 16' in answer.stderr


def test_a_model_whose_losses_are_not_finite_is_not_evaluated(copy):
    """Its weights are finite, and its activations overflow."""
    path = copy / 'out/checkpoints/step-12/model.safetensors'
    weights = load_file(path)
    save_file({name: weight * 1e30 if name in ('transformer.wte.weight', 'transformer.ln_f.weight') else weight
               for name, weight in weights.items()}, path)
    for command in (['-m', 'evaluation'], [ROOT / 'train.py', 'config.py', '--eval_only=True']):
        answer = run(*command, folder=copy, check=False)
        assert answer.returncode == 4 and answer.stderr.count('\n') == 1, answer.stderr
    assert not (copy / 'out/evaluation.json').exists()


def test_what_eval_only_and_init_from_both_name_is_refused(copy):
    answer = run(ROOT / 'train.py', 'config.py', '--eval_only=True', '--init_from=out', folder=copy, check=False)
    assert answer.returncode == 2 and 'leave one of them out' in answer.stderr and answer.stderr.count('\n') == 1


def spoil_gpt2(name, folder):
    """What a folder of transformers can hold that is no GPT-2 for this run."""
    path = folder / 'model.safetensors'
    weights = load_file(path) if path.exists() else {}
    config = json.loads((folder / 'config.json').read_text())
    metadata = dict(format='pt')
    if name == 'another head':
        save_file(weights | {'lm_head.weight': torch.randn(1024, 32)}, path, metadata)
    elif name == 'missing weights':
        save_file({key: w for key, w in weights.items() if 'c_fc' not in key}, path, metadata)
    elif name == 'another shape':
        save_file(weights | {'transformer.wpe.weight': torch.randn(7, 32)}, path, metadata)
    elif name == 'pickle':
        path.unlink()
        (folder / 'pytorch_model.bin').write_bytes(b'no pickle')
    elif name == 'a list':
        config = []
    elif name == 'a string':
        config['n_head'] = '2'
    elif name == 'quantized':
        config['quantization_config'] = dict(quant_method='bitsandbytes', load_in_4bit=True)
    elif name == 'another tokenizer':
        text = (folder / '../tokenizer.json').read_text()
        (folder / 'tokenizer.json').write_text(text.replace('"import"', '"zzzzzz"'))
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('name', ['another head', 'missing weights', 'another shape', 'pickle', 'a list', 'a string',
                                  'quantized', 'another tokenizer'])
def test_a_folder_of_transformers_that_is_no_such_gpt2_is_one_line(copy, name):
    from transformers import GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        copy / 'gpt2')
    spoil_gpt2(name, copy / 'gpt2')
    answer = run(ROOT / 'train.py', 'config.py', '--init_from=gpt2', '--out_dir=new', '--bias=True',
                 '--token_mix=False', '--use_retrieval=False', '--max_iters=1', folder=copy, check=False)
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1, answer.stderr
    assert "init_from 'gpt2' cannot be used" in answer.stderr and not (copy / 'new').exists()


def test_training_starts_from_a_gpt2_that_transformers_saved(copy):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    shape = dict(vocab_size=1024, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.1)).save_pretrained(copy / 'gpt2')
    common = ['config.py', '--init_from=gpt2', '--out_dir=new', '--bias=True', '--token_mix=False', '--max_iters=1']
    run(ROOT / 'train.py', *common, '--use_retrieval=False', folder=copy)
    expected = losses(copy, 'new')[1][0][1]
    run(ROOT / 'train.py', *common, '--retrieval_encoder_layers=0', '--retrieval_pointers=0',
        folder=copy)  # what copies starts as the GPT
    assert losses(copy, 'new')[1][0] == pytest.approx([expected, expected], rel=1e-5)
    answer = run(ROOT / 'train.py', *common, '--bias=False', folder=copy, check=False)
    assert answer.returncode == 2 and 'bias is False and that of gpt2 True' in answer.stderr
    answer = run(ROOT / 'train.py', 'config.py', '--init_from=embedding', folder=copy, check=False)
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1


def test_a_strangers_checkpoint_gets_no_token_switches_nothing_on_and_names_no_folder(copy, monkeypatch):
    meta_path = copy / 'out/checkpoints/step-12/meta.json'
    meta = json.loads(meta_path.read_text())
    meta['settings'] |= dict(retrieval_milvus_uri='http://stranger:1', wandb_log=True, benchmark_data_dir='theirs',
                             multiple_choice_benchmarks=['LogiQA'], retrieval_cache_dir='/somewhere',
                             retrieval_matches_dir='/somewhere',
                             data_cache_dir='/elsewhere', data_cache_gb=0.0)
    meta_path.write_text(json.dumps(meta))
    monkeypatch.setenv('MILVUS_TOKEN', 'root:hush')
    settings = load_run(str(copy / 'out'))[0]
    assert settings.retrieval_milvus_uri == 'http://stranger:1' and settings.retrieval_milvus_token == ''
    assert not settings.wandb_log and settings.multiple_choice_benchmarks == [] and settings.benchmark_data_dir == ''
    defaults = load_settings([])
    assert settings.retrieval_cache_dir == defaults.retrieval_cache_dir
    assert settings.retrieval_matches_dir == defaults.retrieval_matches_dir
    assert (settings.data_cache_dir, settings.data_cache_gb) == (defaults.data_cache_dir, defaults.data_cache_gb)
    mine = load_run(str(copy / 'out'), ['--retrieval_milvus_uri=http://mine:1', '--wandb_log=True'])[0]
    assert mine.retrieval_milvus_token == 'root:hush' and mine.wandb_log
    with pytest.raises(UserError, match='http://stranger:1 may have it, give --retrieval_milvus_uri, too'):
        load_run(str(copy / 'out'), ['--retrieval_milvus_token=for:them'])
    both = ['--retrieval_milvus_token=for:them', '--retrieval_milvus_uri=http://stranger:1']
    assert load_run(str(copy / 'out'), both)[0].retrieval_milvus_token == 'for:them'
    meta['settings']['retrieval_milvus_token'] = 'theirs'
    meta_path.write_text(json.dumps(meta))
    assert load_run(str(copy / 'out'), both[1:])[0].retrieval_milvus_token == 'root:hush'


def test_float16_skips_steps_that_overflow_and_resumes_with_the_scale_that_it_had(tmp_path, settings):
    """As train.py does it on GPUs without bfloat16, here in float16 on the CPU."""
    tokenizer = load_tokenizer(settings.tokenizer)
    settings.out_dir = str(tmp_path / 'half')
    tokens = torch.randint(1000, (4, 65), generator=torch.Generator().manual_seed(0))

    def start():
        torch.manual_seed(0)
        model = RETRO(RETROConfig.from_settings(settings, tokenizer.n_vocab))
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
        return model, optimizer, torch.amp.GradScaler('cpu', init_scale=2.0 ** 24, growth_interval=3)

    def train(model, optimizer, scaler, state, steps):
        found = []
        for _ in range(steps):
            with autocast('float16', 'cpu'):
                _, loss = model(tokens[:, :-1], tokens[:, 1:])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.finish_step(loss.item(), tokens[:, 1:].numel(), None)
            found.append((loss.item(), scaler.get_scale()))
        return found

    unbroken = train(*start(), RunState(), 16)
    scales = [2.0 ** 24, *(scale for _, scale in unbroken)]
    assert any(a > b for a, b in itertools.pairwise(scales))  # a step that was skipped
    assert any(a < b for a, b in itertools.pairwise(scales)) and unbroken[-1][0] < unbroken[0][0]
    parts, state = start(), RunState()
    first = train(*parts, state, 10)
    save_checkpoint(settings, Ranks(), tokenizer, tokenizer_json(settings.tokenizer, tokenizer), *parts, state)
    parts, checkpoint = start(), load_checkpoint(settings.out_dir, for_resume=True)
    checkpoint.load_model(parts[0])
    checkpoint.load_optimizer(parts[1], parts[2], parts[0])
    assert first + train(*parts, checkpoint.load_state(0), 6) == unbroken


def test_a_folder_that_a_strangers_checkpoint_names_is_left_as_it_is(copy):
    meta_path = copy / 'out/checkpoints/step-12/meta.json'
    meta = json.loads(meta_path.read_text())
    meta['settings']['retrieval_milvus_uri'] = str(copy / 'precious.db')
    meta_path.write_text(json.dumps(meta))
    (copy / 'precious.db').mkdir()
    (copy / 'precious.db/file').write_text('precious')
    answer = run(ROOT / 'sample.py', START, folder=copy, check=False)
    assert answer.returncode == 2 and "no collection 'chunks' in" in answer.stderr
    assert [path.name for path in (copy / 'precious.db').iterdir()] == ['file']


@pytest.mark.slow
def test_a_checkpoint_of_a_gpu_is_used_where_there_is_none(copy):
    meta_path = copy / 'out/checkpoints/step-12/meta.json'
    meta = json.loads(meta_path.read_text())
    meta['settings'] |= dict(device='cuda:1', dtype='float16')
    meta_path.write_text(json.dumps(meta))
    answer = run(ROOT / 'sample.py', START, '--max_new_tokens=3', folder=copy)
    assert 'the run was on cuda:1, which is not here: using cpu' in answer.stderr
    run('-m', 'evaluation', '--max_tokens=500', folder=copy)
    answer = run(ROOT / 'sample.py', START, '--device=cuda:1', folder=copy, check=False)
    assert answer.returncode == 2 and "device 'cuda:1' is not here" in answer.stderr


@pytest.mark.parametrize('out_dir, said', [('', 'out_dir is empty'), (' ', 'out_dir is empty'),
                                           ('dangling', "out_dir 'dangling' cannot be written"),
                                           ('dangling/below', "out_dir 'dangling/below' cannot be written"),
                                           ('x' * 300, 'is not a valid folder name'),
                                           ('locked', 'locked/.lock cannot be opened (Is a directory)')])
def test_an_out_dir_that_is_none_is_one_line(workspace, out_dir, said):
    (workspace / 'dangling').symlink_to('nowhere')
    (workspace / 'locked/.lock').mkdir(parents=True)
    answer = run(ROOT / 'train.py', 'config.py', f'--out_dir={out_dir}', '--use_retrieval=False', folder=workspace,
                 check=False)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count('\n') == 1
    assert not (workspace / 'nowhere').exists()


def test_an_env_file_does_not_name_the_server(copy):
    """pymilvus would read it at import, and refuse it."""
    (copy / '.env').write_text('MILVUS_URI=elsewhere.db\n')
    answer = run(ROOT / 'sample.py', START, '--max_new_tokens=3', '--show_neighbors', folder=copy,
                 env=dict(MILVUS_URI='another.db'))
    assert 'similarity' in answer.stdout


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cast_away(path):
    """A weight of another shape."""
    weights = load_file(path)
    save_file(weights | {'transformer.ln_f.weight': weights['transformer.ln_f.weight'][:-1].contiguous()}, path)


@pytest.mark.parametrize('name, damage, said', [
    ('model.safetensors', truncate, 'cannot be read .*: it is damaged, or of something else'),
    ('model.safetensors', cast_away, 'its weights are not those of its architecture'),
    ('model.safetensors', os.remove, 'cannot be read .*: it is damaged, or of something else'),
    ('meta.json', truncate, 'cannot be read .*: it is damaged, or of something else'),
    ('meta.json', lambda path: path.write_text('{"version": 99}'), 'its layout is of another version'),
    ('tokenizer.json', os.remove, "no tokenizer"), ('tokenizer.json', truncate, 'is not a byte-level BPE'),
    ('meta.json', lambda path: path.write_text(path.read_text().replace('"settings": {', '"settings": "x", "y": {')),
     'cannot be read'),
    ('meta.json', os.remove, "names 'step-12', which is no checkpoint.*there are steps"),
])
def test_a_damaged_checkpoint_is_refused_by_name(copy, name, damage, said):
    damage(copy / 'out/checkpoints/step-12' / name)
    with pytest.raises(UserError, match=said) as error:
        load_run(str(copy / 'out'))
    assert 'step-12' in str(error.value)


def test_a_missing_checkpoint_is_named_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in '.*nowhere': train first"):
        load_checkpoint(str(tmp_path / 'nowhere'))
