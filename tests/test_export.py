"""export.py: what transformers loads, in a process that has no nanoRETRO, and what training starts from."""
import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from configurator import UserError, load_settings
from data.tokenizer import load_tokenizer, tokenizer_json
from model import RETRO, RETROConfig
from tests.conftest import CHUNK, ROOT, run
from tests.test_tokenizer import TEXT, gpt2
from training.checkpoint import RunState, load_weights, save_checkpoint
from training.distributed import Ranks

PLAIN = dict(use_retrieval=False, token_mix=False, copy_own_context=False)
MODELS = {
    'gpt2': PLAIN | dict(bias=True),
    'gpt2-no-bias': PLAIN | dict(bias=False),
    'gpt': dict(use_retrieval=False),
    'retro': dict(retrieval_encoder_layers=0, retrieval_pointers=8),
    'paper': dict(bias=True, token_mix=False, copy_own_context=False, retrieval_pointers=0, retrieval_copy=False,
                  retrieval_encoder_layers=2),
}
ELSEWHERE = '''
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
for name in sys.argv[1:]:
    given = torch.load(f'{name}.given')
    trust = {} if name.startswith('gpt2') else dict(trust_remote_code=True)
    model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **trust)
    assert not any(report.values()) and not model.training, report
    assert isinstance(model, GPT2LMHeadModel) == name.startswith('gpt2'), type(model)
    ids, retrieved = given['input_ids'], given['retrieved']
    with torch.no_grad():
        answer = dict(logits=model(ids, **retrieved).logits, alone=model(ids).logits)
        answer['with_labels'], answer['loss'] = (model(ids, labels=given['labels'], **retrieved)[key] for key in (
            'logits', 'loss'))
    prompt = {key: value[:, :len(value[0]) // 2] for key, value in retrieved.items()}
    start = ids[:, :len(ids[0]) // 2]
    answer['generated'] = model.generate(start, max_new_tokens=given['new'], do_sample=False, **prompt)
    with torch.no_grad():
        padded, mask = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
        answer['padded'] = model(padded, attention_mask=mask).logits[:, :len(ids[0])]
        half = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, **trust)(ids, **retrieved).logits
        answer['half'] = half.float()
    if name == 'gpt':  # it reads nothing
        for wrong in (dict(attention_mask=mask.flip(1)), dict(neighbors=ids), dict(pointers=ids)):
            try:
                model(padded, **wrong)
            except ValueError as error:
                answer.setdefault('errors', []).append(str(error))
    tokenizer = AutoTokenizer.from_pretrained(name)
    answer['ids'], answer['end'] = tokenizer(given['text'])['input_ids'], tokenizer.eos_token_id
    answer['text'] = tokenizer.decode(answer['ids'])
    model.save_pretrained(f'{name}-saved')
    tokenizer.save_pretrained(f'{name}-saved')
    torch.save(answer, f'{name}.answer')
'''


def save_run(folder, prepared, name, tokenizer=None, **changes):
    """Save a checkpoint of a model with large random weights in folder/name, as a run does; its config and model."""
    tokenizer = tokenizer or str(prepared / 'tokenizer.json')
    settings = load_settings([], given=dict(
        out_dir=f'{folder}/{name}', tokenizer=tokenizer, block_size=4 * CHUNK, n_layer=2, n_head=2, n_embd=32,
        retrieval_chunk_size=CHUNK, retrieval_layers=[1, 2], device='cpu', dtype='float32') | changes)
    encoding = load_tokenizer(tokenizer)
    torch.manual_seed(1)
    model = RETRO(RETROConfig.from_settings(settings, encoding.n_vocab)).eval()
    for key, parameter in model.named_parameters():
        if 'c_score' not in key and not (key.endswith('bias') and parameter.dim() > 1):
            torch.nn.init.normal_(parameter, 1.0 if 'ln' in key and key.endswith('weight') else 0.0, std=0.2)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    save_checkpoint(settings, Ranks(), encoding, tokenizer_json(tokenizer, encoding), model, optimizer,
                    torch.amp.GradScaler('cpu', enabled=False), RunState(step=3))
    return model


def make_input(model):
    """Tokens, labels and what the model can read, all random: (2, T)."""
    c, T, generator = model.config, 3 * CHUNK + 5, torch.Generator().manual_seed(2)

    def draw(*shape, below=1000):
        return torch.randint(below, shape, generator=generator)
    tokens, retrieved = draw(2, T), {}
    if c.has_neighbors:
        shape = (2, 3, c.retrieval_k_neighbors, 2 * CHUNK)
        retrieved |= dict(neighbors=draw(*shape), neighbor_mask=draw(*shape, below=4) > 0)
        retrieved['neighbors'][:, :, 0, 3:9] = tokens[:, None, CHUNK:CHUNK + 6]  # matches
    if c.has_pointers:
        order = torch.stack([torch.randperm(1000, generator=generator)[:8] for _ in range(2 * T)]).view(2, T, 8)
        retrieved |= dict(pointers=torch.stack([order, draw(2, T, 8, below=17), draw(2, T, 8, below=60)], dim=-1))
    labels = tokens.clone()
    labels[:, 7:11] = -100
    new = T if c.token_mix or c.has_neighbors else T // 2  # a plain GPT-2 ends with its block
    return dict(input_ids=tokens, labels=labels, retrieved=retrieved, new=new, text=TEXT.replace('<|endoftext|>', ''))


@pytest.fixture(scope='module')
def exported(prepared, tmp_path_factory):
    """A folder with runs/NAME, exports/NAME and what transformers answered of each, in a process without nanoRETRO."""
    folder = tmp_path_factory.mktemp('exported')
    models, answers = {}, {}
    for name, changes in MODELS.items():
        models[name] = save_run(folder / 'runs', prepared, name, **changes)
        run(ROOT / 'export.py', f'--out_dir=runs/{name}', f'--to=exports/{name}', folder=folder)
        torch.save(make_input(models[name]), folder / f'exports/{name}.given')
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    answer = subprocess.run([sys.executable, '-c', ELSEWHERE, *MODELS], cwd=folder / 'exports', text=True,
                            capture_output=True, stdin=subprocess.DEVNULL,
                            env={**environment, 'HF_HOME': str(folder / 'home'), 'HF_HUB_OFFLINE': '1'})
    assert answer.returncode == 0, answer.stderr
    for name in MODELS:
        answers[name] = torch.load(folder / f'exports/{name}.answer')
    return SimpleNamespace(folder=folder, models=models, answers=answers)


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the folder that a test may change."""
    for part in ('runs', 'exports'):
        shutil.copytree(exported.folder / part, tmp_path / part)
    return tmp_path


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_transformers_gives_our_logits_with_and_without_what_was_retrieved(exported, name):
    model, answer, given = exported.models[name], exported.answers[name], make_input(exported.models[name])
    tokens, retrieved = given['input_ids'], given['retrieved']
    on, off = model(tokens, **retrieved)[0], model(tokens)[0]
    torch.testing.assert_close(answer['logits'], on, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer['alone'], off, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer['with_labels'], on, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer['padded'], off, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer['half'], on, rtol=0.05, atol=0.2 * on.std().item())
    assert on.std() > 0.1 and bool(retrieved) == bool((on - off).abs().max() > 0.1)


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_the_loss_is_of_the_next_token_and_leaves_out_what_is_masked(exported, name):
    model, given = exported.models[name], make_input(exported.models[name])
    targets = torch.cat([given['labels'][:, 1:], torch.full((2, 1), -100)], dim=1).clamp_min(-1)
    expected = model(given['input_ids'], targets, **given['retrieved'])[1]
    torch.testing.assert_close(exported.answers[name]['loss'], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_generate_of_transformers_takes_the_tokens_that_ours_takes_beyond_the_block_too(exported, name):
    """The prompt's neighbors and pointers are given, new tokens have none."""
    model, given = exported.models[name], make_input(exported.models[name])
    tokens, retrieved = given['input_ids'], given['retrieved']
    n, chunks = len(tokens[0]) // 2, iter(range(100))
    prompt = {key: value[:, :len(value[0]) // 2] for key, value in retrieved.items()}

    def retrieve(chunk):
        u = next(chunks)
        neighbors, mask = prompt['neighbors'], prompt['neighbor_mask']
        if u < neighbors.shape[1]:
            return neighbors[:, u:u + 1], mask[:, u:u + 1]
        return neighbors[:, :1], torch.zeros_like(mask[:, :1])

    def point(recent):  # of the sequence's n-th tokens only the first are known
        known = prompt['pointers'][:, -1:] if point.calls == 0 else torch.zeros_like(prompt['pointers'][:, -1:])
        point.calls += 1
        return known
    point.calls = 0
    ours = model.generate(tokens[:, :n], given['new'], retrieve if model.config.has_neighbors else None,
                          point if model.config.has_pointers else None, temperature=0,
                          allowed=torch.ones(1024, dtype=torch.bool))
    assert (ours.shape[1] > model.config.block_size) == (not name.startswith('gpt2'))
    assert torch.equal(exported.answers[name]['generated'], ours)


@pytest.mark.parametrize('name', MODELS)
def test_auto_tokenizer_gives_the_same_ids_without_running_code(exported, prepared, name):
    answer, tokenizer = exported.answers[name], load_tokenizer(str(prepared / 'tokenizer.json'))
    text = make_input(exported.models[name])['text']
    assert answer['ids'] == tokenizer.encode_ordinary(text) and answer['text'] == text
    assert answer['end'] == tokenizer.eot_token


def test_what_a_model_cannot_read_is_refused(exported):
    left_padding, neighbors, pointers = exported.answers['gpt']['errors']
    assert 'attention_mask has padding before a token' in left_padding
    assert 'neighbors are given, and this model reads none' in neighbors
    assert 'pointers are given, and this model reads none' in pointers


def load_here(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def test_auto_tokenizer_gives_gpt2s_ids_and_rows_that_pad_the_embedding_are_never_generated(prepared, tmp_path):
    tokenizer = gpt2()
    save_run(tmp_path, prepared, 'run', tokenizer='gpt2', **MODELS['gpt2'])
    run(ROOT / 'export.py', f'--out_dir={tmp_path}/run', f'--to={tmp_path}/export', folder=tmp_path)
    theirs = load_here(tmp_path / 'export')
    text = TEXT.replace('<|endoftext|>', '') * 3 + (ROOT / 'README.md').read_text() + ''.join(map(chr, range(1, 3000)))
    assert theirs(text)['input_ids'] == tokenizer.encode_ordinary(text)
    assert theirs.decode(theirs(text)['input_ids']) == text and theirs.eos_token_id == 50256
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(tmp_path / 'export')
    with torch.no_grad():
        model.transformer.wte.weight[50257:] *= 30  # they would be the likeliest
    model.transformer.ln_f.bias.data += model.transformer.wte.weight[50300].detach()
    ids = torch.tensor([tokenizer.encode('import os')])
    assert model(ids).logits[0, -1].argmax() >= 50257
    assert model.generate(ids, max_new_tokens=5, do_sample=False).max() < 50257


def test_what_our_loader_ignores_in_a_tokenizer_json_does_not_change_the_ids_in_transformers_either(prepared, tmp_path):
    saved = json.loads((prepared / 'tokenizer.json').read_text())
    saved['truncation'] = dict(direction='Right', max_length=5, strategy='LongestFirst', stride=0)
    saved['padding'] = dict(strategy=dict(Fixed=40), direction='Left', pad_to_multiple_of=None, pad_id=1023,
                            pad_type_id=0, pad_token='<|endoftext|>')
    end = dict(SpecialToken=dict(id='<|endoftext|>', type_id=0))
    saved['post_processor'] = dict(
        type='TemplateProcessing', single=[end, dict(Sequence=dict(id='A', type_id=0))],
        pair=[end, dict(Sequence=dict(id='A', type_id=0)), dict(Sequence=dict(id='B', type_id=1))],
        special_tokens={'<|endoftext|>': dict(id='<|endoftext|>', ids=[1023], tokens=['<|endoftext|>'])})
    saved['decoder'] = None
    (tmp_path / 'tokenizer.json').write_text(json.dumps(saved))
    save_run(tmp_path, prepared, 'run', tokenizer=f'{tmp_path}/tokenizer.json', **MODELS['gpt'])
    run(ROOT / 'export.py', '--out_dir=run', '--to=export', folder=tmp_path)
    tokenizer, theirs = load_tokenizer(str(tmp_path / 'tokenizer.json')), load_here(tmp_path / 'export')
    text = TEXT.replace('<|endoftext|>', '')
    assert theirs(text)['input_ids'] == tokenizer.encode_ordinary(text) and len(theirs(text)['input_ids']) > 5
    assert theirs.decode(theirs(text)['input_ids']) == text


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('suffix', ['', '-saved'], ids=['export', 'save_pretrained'])
def test_training_starts_from_an_export_with_weights_that_are_equal_to_the_bit(exported, prepared, name, suffix):
    """And from what transformers has saved of it, but for a model whose biases were never there."""
    model, tokenizer = exported.models[name], load_tokenizer(str(prepared / 'tokenizer.json'))
    loaded = load_weights(str(exported.folder / f'exports/{name}{suffix}'), model.config, tokenizer)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_that_starts_from_an_export_begins_as_one_that_starts_from_the_checkpoint(copy, prepared):
    from tests.test_train import losses
    for file in ('train.parquet', 'val.parquet', 'tokenizer.json', 'config.py'):
        shutil.copy(prepared / file, copy)
    for out_dir, source in (('a', 'runs/gpt'), ('b', 'exports/gpt')):
        run(ROOT / 'train.py', 'config.py', '--use_retrieval=False', '--max_iters=2', f'--init_from={source}',
            '--retrieval_layers=[1, 2]', '--retrieval_encoder_layers=0', f'--out_dir={out_dir}', folder=copy)
    assert losses(copy, 'a') == losses(copy, 'b')
    answer = run(ROOT / 'train.py', 'config.py', '--use_retrieval=False', '--init_from=exports/gpt', '--n_embd=16',
                 '--retrieval_layers=[1, 2]', '--retrieval_encoder_layers=0', folder=copy, check=False)
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1
    assert "'exports/gpt' does not fit: n_embd is 16 and that of exports/gpt 32" in answer.stderr


@pytest.mark.parametrize('name, changes, said', [
    ('retro', dict(n_layer=3), 'n_layer: it has 2, the run 3'),
    ('retro', dict(retrieval_layers=[2]), r'retrieval_layers: it has \[1, 2\], the run \[2\]'),
    ('paper', dict(token_mix=True), 'token_mix: it has False, the run True'),
    ('gpt2', dict(n_layer=3), 'n_layer is 3 and that of .* 2'),
    ('gpt2', dict(bias=False), 'bias is False and that of .* True'),
    ('gpt2-no-bias', dict(bias=True), 'bias is True and that of .* False'),
])
def test_an_export_of_another_architecture_is_an_error_that_names_both_sides(exported, prepared, name, changes, said):
    from dataclasses import asdict
    config = RETROConfig(**asdict(exported.models[name].config) | changes)
    with pytest.raises(UserError, match=said):
        load_weights(str(exported.folder / f'exports/{name}'), config, load_tokenizer(str(prepared / 'tokenizer.json')))


def other_weights(folder):
    weights = load_file(folder / 'model.safetensors')
    weights = {key: value for key, value in weights.items() if 'c_fc' not in key}
    save_file(weights, folder / 'model.safetensors', metadata=dict(format='pt'))


def other_tokenizer(folder):
    from data.prepare import train_tokenizer
    train_tokenizer([(ROOT / 'README.md').read_text()], 1024).save(str(folder / 'tokenizer.json'))


def with_biases(folder):
    weights = load_file(folder / 'model.safetensors')
    weights['transformer.ln_f.bias'] += 1
    save_file(weights, folder / 'model.safetensors', metadata=dict(format='pt'))


@pytest.mark.parametrize('name, damage, said', [
    ('gpt', other_weights, 'its weights are not those of its architecture'),
    ('gpt2', other_weights, 'are not those of its config'),
    ('gpt', other_tokenizer, 'was trained with another tokenizer'),
    ('gpt2', other_tokenizer, 'is not the tokenizer of this run'),
    ('gpt2-no-bias', with_biases, 'says that it has no biases, but some are not zero'),
    ('gpt', lambda folder: (folder / 'tokenizer.json').unlink(), 'no tokenizer'),
    ('gpt', lambda folder: (folder / 'model.safetensors').unlink(), 'cannot be read'),
    ('gpt', lambda folder: (folder / 'config.json').write_text('{"model_type": "nanoretro", "n_head": "2"}'),
     'cannot be read'),
])
def test_a_damaged_export_is_refused_by_name(exported, copy, prepared, name, damage, said):
    folder = copy / 'exports' / name
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        load_weights(str(folder), exported.models[name].config, load_tokenizer(str(prepared / 'tokenizer.json')))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize('name', ['gpt2', 'gpt'])
def test_training_runs_no_code_of_a_folder_and_reads_no_pickle(exported, copy, prepared, tmp_path, monkeypatch, name):
    folder, ran = copy / 'exports' / name, tmp_path / 'ran'
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path / 'modules'))
    config = json.loads((folder / 'config.json').read_text())
    config['auto_map'] = dict(AutoConfig='modeling_nanoretro.NanoRetroConfig',
                              AutoModelForCausalLM='modeling_nanoretro.NanoRetroForCausalLM',
                              AutoTokenizer=['modeling_nanoretro.T', 'modeling_nanoretro.T'])
    (folder / 'config.json').write_text(json.dumps(config))
    for file in ('model.py', 'modeling_nanoretro.py', '__init__.py'):
        (folder / file).write_text(f'open({str(ran)!r}, "w")\n')
    model, tokenizer = exported.models[name], load_tokenizer(str(prepared / 'tokenizer.json'))
    loaded = load_weights(str(folder), model.config, tokenizer)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    torch.save(load_file(folder / 'model.safetensors'), folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(UserError):
        load_weights(str(folder), model.config, tokenizer)
    assert not ran.exists() and not (tmp_path / 'modules').exists()


REPORT = dict(out_dir='/home/me/run', step=3, data='/home/me/held_out.jsonl', corpus='python_source 7a456ec544e7b798',
              baseline='/home/me/gpt', notes=['/home/me/gpt has another tokenizer'], tokens=79976, bpb_on=1.13254,
              bpb_off=1.53647, bpb_baseline=1.53291)


@pytest.mark.parametrize('report, told', [
    (REPORT, ['| retrieval on | 1.1325 |', '| retrieval off | 1.5365 |', '| a GPT of the same decoder | 1.5329 |',
              '79,976 tokens of the corpus `python_source 7a456ec544e7b798`', 'the baseline has another tokenizer']),
    ({**REPORT, 'corpus': '/home/me/held_out.jsonl'}, ['of the corpus `held_out.jsonl`', '1.1325']),
    (dict(corpus='mine', notes=[], tokens=5, bpb_off=1.5), ['| this model | 1.5000 |']),
    ({**REPORT, 'step': 2}, ['has not been evaluated', 'python -m evaluation --out_dir=OUT_DIR']),
    (None, ['has not been evaluated', 'python -m evaluation --out_dir=OUT_DIR']),
])
def test_the_card_has_the_evaluations_figures_or_says_that_there_are_none_and_no_paths(copy, report, told):
    if report:
        (copy / 'runs/retro/evaluation.json').write_text(json.dumps(report))
    answer = run(ROOT / 'export.py', '--out_dir=runs/retro', '--to=exports/retro', folder=copy)
    card = (copy / 'exports/retro/README.md').read_text()
    assert all(text in card for text in told) and '/home/me' not in card
    assert ('1.1325' in card) == ('1.1325' in ''.join(told))
    assert ('has not been evaluated' in answer.stdout) == ('has not been evaluated' in card)
    assert 'AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)' in card
    assert '`pointers` (B, T, P, 3)' in card


def test_the_card_of_a_real_evaluation_has_its_figures(copy, prepared):
    for file in ('train.parquet', 'val.parquet', 'tokenizer.json', 'config.py'):
        shutil.copy(prepared / file, copy)
    run('-m', 'evaluation', '--out_dir=runs/gpt2', "--val_datasets=['val.parquet']", '--max_tokens=500', folder=copy)
    report = json.loads((copy / 'runs/gpt2/evaluation.json').read_text())
    run(ROOT / 'export.py', '--out_dir=runs/gpt2', '--to=exports/gpt2', folder=copy)
    card = (copy / 'exports/gpt2/README.md').read_text()
    assert report['step'] == 3 and f'| this model | {report["bpb_off"]:.4f} |' in card and 'trust_remote' not in card


def test_a_folder_of_an_earlier_export_is_replaced_as_a_whole(copy):
    run(ROOT / 'export.py', '--out_dir=runs/gpt2', '--to=exports/retro', folder=copy)
    assert sorted(os.listdir(copy / 'exports/retro')) == sorted(os.listdir(copy / 'exports/gpt2'))
    (copy / 'empty').mkdir()
    run(ROOT / 'export.py', '--out_dir=runs/gpt2/checkpoints/step-3', '--to=empty', folder=copy)
    for name in os.listdir(copy / 'empty'):
        is_card = name == 'README.md'  # it has the folder's name
        assert is_card or (copy / 'empty' / name).read_bytes() == (copy / 'exports/gpt2' / name).read_bytes()
        assert (copy / 'empty' / name).stat().st_mode == (copy / 'empty/config.json').stat().st_mode
    assert sorted(path.name for path in copy.iterdir()) == ['empty', 'exports', 'runs']


@pytest.mark.parametrize('arguments, said', [
    (['--to=runs'], "--to 'runs' is not empty, and not as an export left it ('gpt' is not of export.py)"),
    (['--to=mine'], "--to 'mine' is not empty, and not as an export left it ('notes.txt' is not of export.py)"),
    (['--to=theirs'], "--to 'theirs' is not empty, and not as an export left it ('config.json' is not of export.py)"),
    (['--to=exports/gpt-saved'], "--to 'exports/gpt-saved' is not empty"),
    (['--to=file'], "--to 'file' is a file"), (['--to='], '--to is empty'),
    (['--to=file/below'], 'file/below could not be written'),
    (['--to=new', '--out_dir=nowhere'], "no checkpoint in 'nowhere'"),
    (['--to=new', '--out_dir=spoilt'], "'spoilt/evaluation.json' cannot be read"),
    (['--to=new', '--private'], '--private is of a repository'),
    (['--to=new', '--push_to_hub=a b'], "--push_to_hub 'a b' is no name of a repository"),
])
def test_what_cannot_be_exported_is_one_clear_line_and_nothing_is_touched(copy, arguments, said):
    (copy / 'file').write_text('file')
    shutil.copytree(copy / 'exports/gpt2', copy / 'mine')
    (copy / 'mine/notes.txt').write_text('mine')
    (copy / 'theirs').mkdir()
    (copy / 'theirs/config.json').write_text('{"model_type": "gpt2"}')
    shutil.copytree(copy / 'runs/gpt', copy / 'spoilt')
    (copy / 'spoilt/evaluation.json').write_text('{"corpus": 1')
    before = {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
    answer = run(ROOT / 'export.py', '--out_dir=runs/gpt', *arguments, folder=copy, check=False)
    assert answer.returncode == 2 and said in answer.stderr
    assert answer.stderr.startswith('error: ') and answer.stderr.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in copy.rglob('*')} == before


def test_a_full_disk_is_one_line_and_leaves_the_earlier_export_alone(copy):
    """By a limit on the size of files, which fails writes as a full disk does."""
    before = {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}
    command = ' '.join(map(str, ['ulimit -f 100;', sys.executable, ROOT / 'export.py', '--out_dir=runs/retro',
                                 '--to=exports/gpt']))
    answer = subprocess.run(['bash', '-c', command], cwd=copy, capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1, answer.stderr
    assert 'exports/gpt could not be written' in answer.stderr and 'make room there' in answer.stderr
    assert {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()} == before
    assert not [path for path in copy.rglob('*') if path.name.endswith(('.tmp', '.old'))]


@pytest.mark.parametrize('error', [KeyboardInterrupt, UserError('no')])
def test_an_export_that_is_interrupted_leaves_the_earlier_one_alone(tmp_path, error):
    (tmp_path / 'to').mkdir()
    (tmp_path / 'to/file').write_text('old')

    def write(folder):
        with open(f'{folder}/file', 'w') as file:
            file.write('new')
        raise error
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        export.replace_folder(str(tmp_path / 'to'), write)
    assert [path.name for path in tmp_path.iterdir()] == ['to'] and (tmp_path / 'to/file').read_text() == 'old'


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that an upload uses, with one token, one public repository and one of others."""
    received = {}
    TOKEN = 'hf_secret'

    def answer(self, code, **body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body, address = self.rfile.read(int(self.headers['Content-Length'])), f'http://{self.headers["Host"]}'
        if self.headers['Authorization'] != f'Bearer {self.TOKEN}':
            return self.answer(401, error='Invalid credentials in Authorization header')
        if self.path == '/api/repos/create':
            given = json.loads(body)
            name = f'{given.get("organization") or "me"}/{given["name"]}'
            if name.startswith('others/'):
                return self.answer(403, error='You have no rights to create a model under the namespace "others"')
            if name == 'me/public':
                return self.answer(409, error='You already created this model repo', url=f'{address}/{name}')
            self.received[name] = dict(private=given.get('visibility') == 'private', files={})
            return self.answer(200, url=f'{address}/{name}', name=name)
        if self.path == '/api/validate-yaml':
            return self.answer(200, errors=[], warnings=[])
        name = '/'.join(self.path.split('/')[3:5])
        if '/preupload/' in self.path:
            return self.answer(200, files=[dict(path=file['path'], uploadMode='regular', shouldIgnore=False)
                                           for file in json.loads(body)['files']])
        for line in map(json.loads, body.decode().splitlines()):
            if line['key'] == 'file':
                self.received[name]['files'][line['value']['path']] = base64.b64decode(line['value']['content'])
        return self.answer(200, commitUrl=f'{address}/{name}/commit/{"1" * 40}', commitOid='1' * 40, success=True)

    def do_GET(self):
        name = '/'.join(self.path.split('/')[3:5])
        if name not in (*self.received, 'me/public'):
            return self.answer(404, error='Repository not found')
        private = self.received.get(name, {}).get('private', False)
        return self.answer(200, id=name, modelId=name, private=private, sha='1' * 40, siblings=[], tags=[], downloads=0)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that answers as the Hub does, and a user who is logged in."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Hub.received.clear()
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.HF_TOKEN_PATH', str(tmp_path / 'token'))
    monkeypatch.setenv('HF_TOKEN', Hub.TOKEN)

    def stop():
        server.shutdown()
        server.server_close()
        thread.join()
    yield SimpleNamespace(received=Hub.received, stop=stop)
    stop()


def upload(copy, name, *arguments):
    sys.argv = ['export.py', f'--out_dir={copy}/runs/retro', f'--to={copy}/exports/retro', f'--push_to_hub={name}',
                *arguments]
    export.main()


def test_a_folder_is_uploaded_as_it_is_to_a_repository_that_is_private_if_asked_for(hub, copy, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])
    for name, *arguments in (('me/open',), ('me/hidden', '--private')):
        upload(copy, name, *arguments)
        written = {path.name: path.read_bytes() for path in (copy / 'exports/retro').iterdir()}
        assert hub.received[name]['files'] == written and f'# {name}'.encode() in written['README.md']
        assert hub.received[name]['private'] == bool(arguments)
    said = capsys.readouterr()
    assert '/me/hidden' in said.out and Hub.TOKEN not in said.out + said.err


def test_what_cannot_be_uploaded_is_one_line_that_names_it_and_never_the_token(hub, copy, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])

    def refused(name, *arguments):
        with pytest.raises(UserError) as error:
            upload(copy, name, *arguments)
        assert Hub.TOKEN not in str(error.value) and 'hf_other' not in str(error.value)
        return str(error.value)
    assert 'is complete, but was not uploaded to others/model (' in (said := refused('others/model'))
    assert '403' in said and 'no rights' in said and 'the rights of the token' in said
    assert 'me/public is there already, and public' in refused('me/public', '--private')
    monkeypatch.setenv('HF_TOKEN', 'hf_other')
    assert '401' in refused('me/model')
    monkeypatch.setenv('HF_TOKEN', Hub.TOKEN)
    hub.stop()
    assert 'ConnectError' in refused('me/model')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert 'Offline' in refused('me/model')
    monkeypatch.delenv('HF_TOKEN')
    assert 'there is no token of the Hugging Face Hub: run hf auth login' in refused('me/model')
    assert not hub.received and Hub.TOKEN not in ''.join(capsys.readouterr())
