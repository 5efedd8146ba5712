"""Starting from a trained GPT: GPT-2 as transformers saves it, and retrieval added to it or to a GPT of ours."""
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import UserError, load_settings
from data.tokenizer import is_token, load_tokenizer
from model import RETRO, RETROConfig
from tests.conftest import CONFIG, ROOT, SHARED, run, run_ranks, spawn
from tests.test_train import losses, metrics
from training.checkpoint import load_checkpoint, load_pretrained, load_weights, source_settings
from training.checks import check_settings

B, T, C, K, P, V = 2, 16, 4, 2, 3, 50
PLAIN = dict(token_mix=False, copy_own_context=False)
RETRIEVAL = dict(use_retrieval=True, retrieval_layers=[2, 3], retrieval_chunk_size=C)
COPYING = dict(retrieval_copy=True, retrieval_pointers=P, retrieval_k_neighbors=K)
PARTS = {  # that a GPT gets
    'pointers': dict(retrieval_pointers=P, retrieval_k_neighbors=0),
    'neighbors': dict(retrieval_pointers=0, retrieval_k_neighbors=K),
    'both': COPYING,
    'encoder': COPYING | dict(retrieval_encoder_layers=1),
    'textbook': COPYING | dict(retrieval_copy=False, retrieval_encoder_layers=2),
}
SHAPE = ('n_layer, n_head', 'block_size', 'retrieval_layers', 'retrieval_encoder')  # lines of CONFIG


def make_gpt(**changes):
    torch.manual_seed(0)
    gpt = RETRO(RETROConfig(block_size=T, vocab_size=V, n_layer=3, n_head=2, n_embd=16, use_retrieval=False,
                            retrieval_chunk_size=C, **changes))
    for parameter in gpt.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return gpt


def retrofit(gpt, **changes):
    torch.manual_seed(1)
    model = RETRO(RETROConfig(**{**vars(gpt.config), **RETRIEVAL, **changes}))
    model.start_from(dict(gpt.named_parameters()))
    return model


def make_batch(seed=0):
    """tokens, targets, and what is retrieved: neighbors, mask, document ids and pointers, some without a match."""
    torch.manual_seed(seed)
    tokens, targets = torch.randint(V, (2, B, T))
    pointers = torch.stack([torch.argsort(torch.rand(B, T, V))[..., :P], torch.randint(6, (B, T, P)),
                            torch.randint(40, (B, T, P))], dim=-1)
    mask = torch.rand(B, T // C, K, 2 * C) < 0.9
    return tokens, targets, torch.randint(V, mask.shape), mask, None, pointers


def train_a_step(model, lr=1e-2, seed=0):
    optimizer = model.configure_optimizers(0.1, lr, (0.9, 0.95), 'cpu')
    loss = model(*make_batch(seed))[1]
    loss.backward()
    optimizer.step()
    model.zero_grad()
    return loss.item()


@pytest.mark.parametrize('options', [PLAIN, {}], ids=['plain', 'mix'])
@pytest.mark.parametrize('part', PARTS)
def test_a_gpt_that_gets_retrieval_is_that_gpt_to_the_bit_until_its_first_step(part, options):
    gpt = make_gpt(**options)
    model = retrofit(gpt, **PARTS[part])
    tokens, targets, neighbors, mask, ids, pointers = make_batch()
    logits, nats = gpt(tokens, targets, loss_reduction='none')
    loss = gpt(tokens, targets)[1]
    for is_training in (True, False):
        model.train(is_training)
        for retrieved in ((None, None, None, None), (neighbors, mask, ids, pointers)):
            assert (model(tokens, targets, *retrieved, loss_reduction='none')[1] == nats).all()
            assert model(tokens, targets, *retrieved)[1] == loss
            found = model(tokens, None, *retrieved)[0]
            if model.mixture and retrieved[0] is not None:
                assert (found == logits.log_softmax(-1)).all()
            else:
                assert (found == logits).all()
    train_a_step(model)
    retrieved = (neighbors, mask, ids, pointers)
    assert not torch.allclose(model(tokens, None, *retrieved)[0].log_softmax(-1), model(tokens)[0].log_softmax(-1))


def test_a_token_mix_and_copying_from_the_own_context_are_silent_at_first_too():
    gpt = make_gpt(**PLAIN)
    tokens, *_ = make_batch()
    model = retrofit(gpt, **COPYING, token_mix=True, copy_own_context=True)
    assert (model(tokens)[0] == gpt(tokens)[0]).all()
    train_a_step(model)
    assert model.mix.weight.any() and model.transformer.h[0].own.c_proj.weight.any()


@pytest.mark.parametrize('part', PARTS)
def test_a_frozen_decoder_has_no_gradient_and_no_optimizer_state_and_all_that_was_added_learns(part):
    gpt = make_gpt()
    model = retrofit(gpt, **PARTS[part])
    model.freeze_decoder()
    tokens = make_batch()[0]
    expected, optimizer = gpt(tokens)[0], model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):  # what c_proj reads has a gradient when it is no longer zero
        model(*make_batch(step))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    added = before.keys() - dict(gpt.named_parameters()).keys()
    held = {name for name, p in model.named_parameters() if p in optimizer.state}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert held == added and changed == added and (model(tokens)[0] == expected).all()


def test_pointers_that_are_right_are_followed_within_a_few_steps():
    """A start that a softmax gives no weight in float32, the obvious one, would not learn at all."""
    model, gains = retrofit(make_gpt(), **PARTS['pointers']), []
    model.freeze_decoder()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    for step in range(20):
        tokens, targets, *_ = make_batch(step)
        pointers = torch.stack([targets, torch.full_like(targets, 5), torch.full_like(targets, 8)], dim=-1)[:, :, None]
        loss = model(tokens, targets, pointers=pointers)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gains.append((model(tokens, targets)[1] - loss).item())
    assert gains[0] == pytest.approx(0, abs=1e-6) and gains[1] > 0.5 and gains[19] > gains[1]


@pytest.mark.slow
@pytest.mark.parametrize('is_frozen', [True, False], ids=['frozen', 'all'])
def test_a_compiled_retrofit_takes_the_steps_of_a_plain_one(is_frozen):
    models = []
    for _ in range(2):
        models.append(retrofit(make_gpt(), **COPYING))
        if is_frozen:
            models[-1].freeze_decoder()
    compiled, found = torch.compile(models[1], backend='aot_eager', fullgraph=True), []
    for model, call in ((models[0], models[0]), (models[1], compiled)):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
        for step in range(3):
            loss = call(*make_batch(step))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert found[3:] == pytest.approx(found[:3], rel=1e-5)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope='module')
def trained(populated, tmp_path_factory):
    """A folder with a GPT of 8 steps in `gpt`, and more.py, which says of the decoder nothing at all."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    shutil.copytree(populated, folder)
    run(ROOT / 'train.py', 'config.py', '--use_retrieval=False', '--out_dir=gpt', folder=folder)
    lines = CONFIG.splitlines()
    (folder / 'more.py').write_text('\n'.join(line for line in lines if not line.startswith(SHAPE)))
    return folder


FROM_GPT = ('more.py', '--init_from=gpt', '--retrieval_layers=[2]')


def weights(folder, out_dir):
    return load_file(load_checkpoint(str(folder / out_dir)).folder + '/model.safetensors')


def test_a_frozen_retrofit_of_a_run_keeps_its_gpt_to_the_bit_and_reads_with_it(trained):
    run(ROOT / 'train.py', *FROM_GPT, '--retrofit=True', '--out_dir=frozen', folder=trained)
    gpt = losses(trained, 'gpt')[1][8][1]
    steps, evaluated = losses(trained, 'frozen')
    assert evaluated[0] == (gpt, gpt) and evaluated[4][1] == evaluated[8][1] == gpt
    assert steps[8] < steps[1] - 1  # the first one's is the GPT's
    before, after = weights(trained, 'gpt'), weights(trained, 'frozen')
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    folder = load_checkpoint(str(trained / 'frozen')).folder
    assert torch.load(f'{folder}/optimizer.pt', weights_only=True).keys() == after.keys() - before.keys()
    # an ordinary checkpoint
    answer = run(ROOT / 'train.py', 'more.py', '--eval_only=True', '--out_dir=frozen', folder=trained)
    assert f'val_loss_on {evaluated[8][0]:.4f}, val_loss_off {gpt:.4f}' in answer.stdout
    answer = run(ROOT / 'sample.py', '--out_dir=frozen', '--start=import ', '--max_new_tokens=20', '--show_neighbors',
                 folder=trained)
    assert 'what pointers named' in answer.stdout


@pytest.mark.parametrize('is_frozen', [True, False], ids=['frozen', 'all'])
@pytest.mark.slow
def test_a_retrofit_resumes_to_the_losses_and_weights_of_one_that_never_stopped(trained, is_frozen):
    common = [f'--retrofit={is_frozen}', '--retrieval_encoder_layers=1', '--retrieval_layers=[2]', '--dropout=0.1']
    out_dirs = [f'whole-{is_frozen}', f'parts-{is_frozen}']
    run(ROOT / 'train.py', 'more.py', '--init_from=gpt', *common, f'--out_dir={out_dirs[0]}', folder=trained)
    run(ROOT / 'train.py', 'more.py', '--init_from=gpt', *common, f'--out_dir={out_dirs[1]}', '--max_iters=4',
        '--lr_decay_iters=8', folder=trained)
    run(ROOT / 'train.py', 'more.py', '--init_from=resume', *common, f'--out_dir={out_dirs[1]}', folder=trained)
    assert losses(trained, out_dirs[0]) == losses(trained, out_dirs[1])
    whole, parts = (weights(trained, out_dir) for out_dir in out_dirs)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize('is_frozen', [True, False], ids=['frozen', 'all'])
@pytest.mark.slow
def test_two_ranks_retrofit_to_the_losses_of_one(trained, is_frozen):
    common = [*FROM_GPT, f'--retrofit={is_frozen}', '--max_iters=4', '--grad_clip=0.5']
    run(ROOT / 'train.py', *common, '--out_dir=one', folder=trained)
    run_ranks(2, ROOT / 'train.py', *common, '--out_dir=two', folder=trained)
    one, two = losses(trained, 'one'), losses(trained, 'two')
    assert two[0] == pytest.approx(one[0], rel=1e-5) and two[1][4] == pytest.approx(one[1][4], rel=1e-5)
    assert two[1][0][0] == two[1][0][1]  # silent there, too


def test_a_frozen_retrofit_goes_on_with_all_weights_if_told_so_and_back(trained):
    run(ROOT / 'train.py', *FROM_GPT, '--retrofit=True', '--max_iters=2', '--out_dir=thawed', folder=trained)
    for is_frozen, steps, effect in ((False, 4, 'is trained, too, from here on'), (True, 6, 'stays as it is')):
        before = weights(trained, 'thawed')
        answer = run(ROOT / 'train.py', 'more.py', '--init_from=resume', '--out_dir=thawed', f'--retrofit={is_frozen}',
                     f'--max_iters={steps}', folder=trained)
        assert f'retrofit is {is_frozen}, and was {not is_frozen}: the decoder {effect}' in answer.stdout
        after = weights(trained, 'thawed')
        assert torch.equal(before['transformer.wte.weight'], after['transformer.wte.weight']) == is_frozen
        assert not torch.equal(before['mixture.score.weight'], after['mixture.score.weight'])


def test_what_a_config_does_not_say_of_the_decoder_is_the_sources(trained):
    """Architecture and tokenizer; a block may be cut."""
    run(ROOT / 'train.py', *FROM_GPT, '--out_dir=taken', '--max_iters=1', '--block_size=32', folder=trained)
    gpt, taken = (load_checkpoint(str(trained / name)).model for name in ('gpt', 'taken'))
    assert taken | {key: gpt[key] for key in taken if key.startswith(('use', 'retrieval', 'block'))} == gpt
    assert taken['block_size'] == 32 and taken['use_retrieval']
    text = (trained / 'more.py').read_text().replace("tokenizer = 'tokenizer.json'\n", '')
    (trained / 'less.py').write_text(text)
    run(ROOT / 'train.py', 'less.py', *FROM_GPT[1:], '--out_dir=own', '--max_iters=2', folder=trained)
    (trained / 'gpt').rename(trained / 'elsewhere')  # from here on it is the run's alone
    run(ROOT / 'train.py', 'less.py', '--init_from=resume', '--out_dir=own', '--max_iters=3', folder=trained)
    (trained / 'elsewhere').rename(trained / 'gpt')
    assert load_checkpoint(str(trained / 'own')).step == 3


def test_a_gpt_starts_from_another_and_a_retro_from_another(trained):
    """Without retrofit, and with a part more that a GPT may have."""
    run(ROOT / 'train.py', 'more.py', '--init_from=gpt', '--use_retrieval=False', '--out_dir=gpt2nd', '--max_iters=1',
        folder=trained)
    run(ROOT / 'train.py', 'more.py', '--init_from=gpt2nd', '--out_dir=retro1', '--max_iters=1',
        '--retrieval_pointers=4', '--retrieval_layers=[1]', folder=trained)
    run(ROOT / 'train.py', 'more.py', '--init_from=retro1', '--out_dir=retro2nd', '--max_iters=1', folder=trained)
    assert load_checkpoint(str(trained / 'retro2nd')).model == load_checkpoint(str(trained / 'retro1')).model
    evaluated = [losses(trained, out_dir)[1] for out_dir in ('gpt', 'gpt2nd', 'retro1', 'retro2nd')]
    assert evaluated[1][0][1] == evaluated[0][8][1] and evaluated[2][0] == (evaluated[1][1][1],) * 2
    assert evaluated[3][0] == evaluated[2][1]


@pytest.mark.parametrize('flags, said', [
    (['--init_from=gpt', '--n_layer=3'], 'n_layer is 3 and that of gpt 2'),
    (['--init_from=gpt', '--n_embd=16', '--bias=True'], 'n_embd is 16 and that of gpt 32; bias is True and that'),
    (['--init_from=gpt', '--block_size=128'], 'block_size is 128 and that of gpt 64'),
    (['--init_from=gpt', '--token_mix=False'], 'token_mix is False and that of gpt True'),
    (['--init_from=gpt', '--own_context_layers=[2]'], 'own_context_layers is [2] and that of gpt [1, 2]'),
    (['--init_from=gpt', '--tokenizer=other.json'], "'gpt' was trained with another tokenizer than 'other.json'"),
    (['--init_from=retro', '--retrofit=True'], "a RETRO already: go on with it by --out_dir=retro --init_from=resume"),
    (['--init_from=retro', '--retrieval_layers=[1]'], 'retrieval_layers: it has [2], the run [1]'),
    (['--init_from=gpt', '--retrofit=True', '--use_retrieval=False'], 'and use_retrieval is False'),
    (['--retrofit=True'], "init_from is 'scratch': name the GPT by init_from, e.g. --init_from=gpt2, or an out_dir"),
    (['--init_from=plain', '--retrofit=True', '--token_mix=True'], "token_mix, which init_from 'plain' has not"),
    (['--init_from=gpt2-large'], "'gpt2-large' could not be downloaded: neither"),
    (['--init_from=gpt2-large'], "config.json and model.safetensors of the hub's openai-community/gpt2-large into a"),
    (['--init_from=gpt2-huge'], "'gpt2-huge' is neither 'scratch' nor 'resume' nor a folder nor one of ('gpt2', "),
    (['--init_from=empty'], "no checkpoint in 'empty'"),
])
def test_a_start_that_cannot_be_had_is_one_line(trained, flags, said, monkeypatch):
    """As train.py reads them; it would take seconds more for each."""
    make_sources(trained)
    monkeypatch.chdir(trained)
    with pytest.raises(UserError) as error:
        settings = load_settings(['more.py', *flags])
        if settings.init_from != 'scratch':
            settings = load_settings(['more.py', *flags], given=source_settings(settings))
        settings = check_settings(settings)
        tokenizer = load_tokenizer(settings.tokenizer)
        config = RETROConfig.from_settings(settings, tokenizer.n_vocab)
        load_weights(settings.init_from, config, tokenizer, settings.retrofit)
    assert said in str(error.value) and error.value.exit_code == 2


def make_sources(folder):
    """Beside `gpt`: a RETRO, a GPT without options, another tokenizer, an empty folder."""
    if (folder / 'empty').exists():
        return
    run(ROOT / 'train.py', 'config.py', '--out_dir=retro', '--max_iters=1', folder=folder)
    run(ROOT / 'train.py', 'config.py', '--out_dir=plain', '--max_iters=1', '--use_retrieval=False',
        '--token_mix=False', '--copy_own_context=False', folder=folder)
    text = json.loads((folder / 'tokenizer.json').read_text())
    text['pre_tokenizer'] = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    (folder / 'other.json').write_text(json.dumps(text))
    (folder / 'empty').mkdir()


@pytest.mark.parametrize('command', [
    [ROOT / 'train.py', 'more.py', '--init_from=gpt2'], [ROOT / 'train.py', 'more.py', '--retrofit=True'],
    [ROOT / 'sample.py', '--init_from=gpt2-xl'], [ROOT / 'sample.py', '--init_from=gpt']])
def test_commands_end_with_that_line_and_exit_code_2(trained, command):
    answer = run(*command, folder=trained, check=False)
    assert answer.returncode == 2 and answer.stderr.count('\n') == 1 and answer.stderr.startswith('error: ')


@pytest.fixture
def gpt2(trained):
    """A tiny GPT-2 of the real vocabulary that transformers saved, in the folder `small`, and itself."""
    from transformers import GPT2Config, GPT2LMHeadModel
    if not (SHARED / 'tiktoken').is_dir():
        pytest.skip("the files of tiktoken's gpt2 are not in ../shared")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)).eval()
    model.save_pretrained(trained / 'small')
    return model


def test_a_gpt2_of_transformers_has_its_logits_and_never_samples_its_padding(trained, gpt2, monkeypatch):
    monkeypatch.chdir(trained)
    for flags in ([], ['--block_size=32']):
        settings, tokenizer, model, _ = load_pretrained('small', ['--dtype=float32', '--device=cpu', *flags])
        assert tokenizer.name == 'gpt2' and model.config.vocab_size == 50304 and not settings.use_retrieval
        tokens = torch.randint(50257, (2, model.config.block_size))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[0][..., :50257], gpt2(tokens).logits, rtol=0, atol=1e-4)
            model.lm_head.weight[50257:] = 9 * model.lm_head.weight[tokens[0, -1]]
        text = model.generate(tokens[:1], 40, temperature=1.0, allowed=torch.tensor(is_token(tokenizer)))
        assert text.max() < 50257
    answer = run(ROOT / 'sample.py', '--init_from=small', '--start=Once upon', '--max_new_tokens=80', folder=trained)
    assert answer.stdout.startswith('Once upon')
    answer = run(ROOT / 'sample.py', '--init_from=small', '--n_layer=1', folder=trained, check=False)
    assert answer.returncode == 2 and 'n_layer is 1 and that of small 2' in answer.stderr


def test_gpt2_comes_by_name_from_the_hubs_cache_as_the_hub_stores_it(trained, gpt2, tmp_path):
    """Names without `transformer.`, the masks of earlier versions, no lm_head."""
    snapshot = tmp_path / 'hub/models--gpt2/snapshots/0'
    snapshot.mkdir(parents=True)
    (tmp_path / 'hub/models--gpt2/refs').mkdir()
    (tmp_path / 'hub/models--gpt2/refs/main').write_text('0')
    stored = {name.removeprefix('transformer.'): w.clone() for name, w in gpt2.state_dict().items()
              if 'lm_' not in name}
    save_file(stored | {f'h.{n}.attn.bias': torch.ones(64, 64).tril()[None, None] for n in range(2)},
              snapshot / 'model.safetensors', dict(format='pt'))
    (snapshot / 'config.json').write_text(json.dumps(dict(
        activation_function='gelu_new', architectures=['GPT2LMHeadModel'], layer_norm_epsilon=1e-5, model_type='gpt2',
        n_ctx=64, n_embd=16, n_head=2, n_layer=2, n_positions=64, summary_type='cls_index', vocab_size=50257)))
    arguments = ['--start=Once upon', '--max_new_tokens=20', '--temperature=0', '--dtype=float32']
    expected = run(ROOT / 'sample.py', '--init_from=small', *arguments, folder=trained).stdout
    process = spawn(ROOT / 'sample.py', '--init_from=gpt2', *arguments, folder=trained, stdout=subprocess.PIPE,
                    env=dict(HF_HOME=str(tmp_path)))  # which is read at import
    assert process.communicate(timeout=120)[0] == expected


def test_a_folder_of_transformers_brings_its_own_tokenizer(trained, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel
    monkeypatch.chdir(trained)
    GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained('tiny')
    with pytest.raises(UserError, match='vocab_size is 50304 and that of tiny 1024 .vocab_size is of the tokenizer.'):
        load_pretrained('tiny')
    assert load_pretrained('tiny', ['--tokenizer=tokenizer.json'])[1].n_vocab == 1024
    shutil.copy('tokenizer.json', 'tiny')
    assert load_pretrained('tiny')[1].n_vocab == 1024


@pytest.mark.slow
def test_the_config_retrofits_a_gpt2_with_documents_of_the_users(trained, gpt2):
    """GPT-2's tokenizer in a collection of its own; all that the config says but for the size of a step."""
    (trained / 'mine.py').write_text("""
train_datasets, val_datasets = ['train.parquet'], ['val.parquet']
retrieval_embedding_model, retrieval_milvus_uri = 'embedding', 'gpt2.db'
device, dtype, compile, eval_tokens, log_interval = 'cpu', 'float32', False, 500, 1
""")
    command = ['mine.py', ROOT / 'config/retrofit_gpt2.py', '--retrieval_k_neighbors=0', '--retrieval_chunk_size=16']
    run('-m', 'retrieval.populate', *command, folder=trained)
    run(ROOT / 'train.py', *command, '--init_from=small', '--max_iters=20', '--eval_interval=20', '--eval_tokens=500',
        '--warmup_iters=5', '--batch_size=4', '--gradient_accumulation_steps=1', '--learning_rate=1e-2', folder=trained)
    evaluated = losses(trained, 'out/retrofit_gpt2')[1]
    assert evaluated[0][0] == evaluated[0][1] == evaluated[20][1] > evaluated[20][0] + 0.1
    answer = run(ROOT / 'sample.py', '--out_dir=out/retrofit_gpt2', '--start=import', '--max_new_tokens=20',
                 folder=trained)
    assert answer.stdout.startswith('import')
    first = weights(trained, 'out/retrofit_gpt2')
    assert torch.equal(first['transformer.wte.weight'][:50257], gpt2.transformer.wte.weight)
    assert all('tokens_per_s' in line for line in metrics(trained, 'out/retrofit_gpt2') if 'loss' in line)
