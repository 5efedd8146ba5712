"""sft.py as a command, on a real collection: what it takes from the model, the gate, resuming, and what it refuses."""
import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch

import sft
import train
from configurator import UserError, load_settings
from data.conversation_stream import (
    ConversationSet,
    ConversationStream,
    Writer,
    as_batch,
    question_of,
    val_conversations,
)
from data.documents import DatasetConfig, load_documents
from data.tokenizer import load_tokenizer, tokenizer_json
from generation.engine import Engine, Request
from generation.sampling import Sampling
from generation.sources import CollectionSource
from model import RETRO, RETROConfig
from retrieval import populate, precompute
from retrieval.loader import open_conversations
from retrieval.passages import PassageFinder
from retrieval.retriever import Retriever
from retrieval.static_embedding import fit_embedding
from tests.conftest import ROOT, run, run_ranks
from tests.test_train import losses, metrics
from training.checkpoint import RunState, load_checkpoint, load_run, save_checkpoint
from training.checks import check_settings
from training.distributed import Ranks

TUNE = '''
out_dir = 'tuned'
init_from = 'pretrained'
train_datasets = ['chats.jsonl']
val_datasets = ['held_out.jsonl']
template = 'plain'
block_size = 64
gradient_accumulation_steps = 2
batch_size = 4
eval_interval = 2
keep_checkpoints = 0
log_interval = 1
max_iters = 6
warmup_iters = 2
learning_rate = 1e-2
device, dtype, compile = 'cpu', 'float32', False
'''


def make_run(folder, name, **changes):
    """A run of a model that has been trained for no step, which is what tuning takes from one."""
    settings = load_settings(['config.py']).replace(out_dir=name, **changes)
    tokenizer = load_tokenizer(settings.tokenizer)
    torch.manual_seed(0)
    model = RETRO(RETROConfig.from_settings(settings, tokenizer.n_vocab))
    for name, parameter in model.named_parameters():  # what is silent at first has a say
        if name.endswith('c_proj.weight') or name == 'mixture.score.weight':
            torch.nn.init.normal_(parameter, std=0.1)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    save_checkpoint(settings, Ranks(), tokenizer, tokenizer_json(settings.tokenizer, tokenizer), model, optimizer,
                    torch.amp.GradScaler('cpu', enabled=False), RunState(step=1))


@pytest.fixture(scope='module')
def pretrained(populated, tmp_path_factory):
    """A folder with a RETRO that reads neighbors and pointers, a GPT, and conversations about the collection's text."""
    folder = tmp_path_factory.mktemp('sft') / 'run'
    shutil.copytree(populated, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_run(folder, 'pretrained')
        make_run(folder, 'gpt', use_retrieval=False)
        rows = []
        for document in load_documents([DatasetConfig('train.parquet', source='stdlib')]):
            lines = [line.strip() for line in document.text.splitlines() if len(line.split()) > 3]
            rows += [dict(id=f'{document.id} {i}', document=document.id, messages=[
                dict(role='user', content=f'What does {document.id} say?'), dict(role='assistant', content=lines[i])],
                ctxs=[dict(title=document.id, text='\n'.join(lines[i:i + 3]))]) for i in range(4)]
        for name, part in (('chats', rows[:96]), ('held_out', rows[96:])):
            (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in part))
        (folder / 'tune.py').write_text(TUNE)
    return folder


def tune(folder, *arguments, **options):
    return run(ROOT / 'sft.py', 'tune.py', *arguments, folder=folder, **options)


@pytest.fixture(scope='module')
def tuned(pretrained):
    """The output of a run with all of retrieval; it is in `tuned`."""
    return tune(pretrained)


def load(folder, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return load_run(name)


def test_a_tuned_run_answers_better_says_what_it_trained_on_and_carries_its_template(pretrained, tuned):
    for said in ('chats.jsonl: 96 conversations, ', ' tokens, of which ', 'train_datasets: ', '% of the sequences are '
                 'padding', 'held_out.jsonl: 24 conversations', "retrieving from ", 'val bpb, retrieval on'):
        assert said in tuned.stdout + tuned.stderr
    evaluations = [line for line in metrics(pretrained, 'tuned') if 'val_bpb_on' in line]
    assert [line['iter'] for line in evaluations] == [0, 2, 4, 6]
    assert evaluations[-1]['val_bpb_on'] < evaluations[0]['val_bpb_on'] - 0.1
    settings = load_checkpoint(pretrained / 'tuned').settings
    assert settings['template'] == 'plain' and settings['retrieval_collection'] == 'chunks'
    assert settings['retrieval_embedding_model'] == 'embedding' and settings['n_embd'] == 32
    assert load_checkpoint(pretrained / 'pretrained').step == 1


def test_a_run_that_was_killed_resumes_to_the_losses_of_one_that_never_stopped(pretrained, tuned):
    """It leaves its last checkpoint, and the lines of the steps after it."""
    folder = pretrained / 'broken'
    shutil.copytree(pretrained / 'tuned', folder)
    shutil.rmtree(folder / 'checkpoints/step-6')
    shutil.rmtree(folder / 'checkpoints/step-4')
    (folder / 'checkpoints/latest').write_text('step-2\n')
    lines = [line for line in metrics(pretrained, 'broken') if line['iter'] <= 3]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    run_ranks(1, ROOT / 'sft.py', 'tune.py', '--init_from=resume', '--out_dir=broken', folder=pretrained)
    assert losses(pretrained, 'broken') == losses(pretrained, 'tuned')


def decoder_of(model):
    """The decoder's own weights as a GPT."""
    gpt = RETRO(RETROConfig(**{**vars(model.config), 'use_retrieval': False}))
    weights = dict(model.named_parameters())
    gpt.load_state_dict({name: weights[name] for name, _ in gpt.named_parameters()}, strict=False)
    return gpt.eval()


def assert_gate_is_exact(folder, name):
    """With retrieval off the model is its decoder, run as a GPT: logits and text."""
    _, tokenizer, model, _ = load(folder, name)
    gpt, tokens = decoder_of(model), torch.randint(tokenizer.n_vocab, (3, model.config.block_size))
    ids = torch.tensor([[1, 1, 2, 0]] * 3)
    assert torch.equal(model(tokens)[0], gpt(tokens)[0])
    assert torch.equal(model(tokens, doc_ids=ids)[0], gpt(tokens, doc_ids=ids)[0])
    texts = []
    for each in (model, gpt):
        engine = Engine(each, tokenizer)
        row = engine.add(Request(tokens[0, :9].tolist(), 30, Sampling(temperature=0)))
        for _ in engine.run():
            pass
        texts.append(row.new_tokens)
    assert texts[0] == texts[1]
    return {key: p.detach() for key, p in model.named_parameters()}, {key for key, _ in gpt.named_parameters()}


def test_the_gate_is_exact_after_tuning_with_retrieval(pretrained, tuned):
    before = dict(load(pretrained, 'pretrained')[2].named_parameters())
    after, _ = assert_gate_is_exact(pretrained, 'tuned')
    assert all(not torch.equal(after[name], before[name]) for name in after if 'encoder.wpe' not in name)


@pytest.fixture(scope='module')
def frozen(pretrained):
    """As `tuned`, of the decoder alone, in `frozen`. No database is there to ask."""
    return tune(pretrained, *FROZEN, '--out_dir=frozen')


FROZEN = ['--freeze_retrieval=True', '--retrieval_milvus_uri=http://127.0.0.1:9']


def test_the_gate_is_exact_after_tuning_the_decoder_alone(pretrained, frozen):
    """As InstructRetro does: what retrieval adds keeps its weights to the bit, and the decoder learns."""
    before = dict(load(pretrained, 'pretrained')[2].named_parameters())
    assert 'of which' in frozen.stdout and 'are trained' in frozen.stdout and 'retrieving' not in frozen.stdout
    after, decoder = assert_gate_is_exact(pretrained, 'frozen')
    assert {name for name in after if not torch.equal(after[name], before[name])} == decoder < after.keys()
    assert not any('val_bpb_on' in line for line in metrics(pretrained, 'frozen'))


@pytest.mark.slow
def test_two_ranks_tune_to_the_losses_of_one(pretrained, frozen):
    run_ranks(2, ROOT / 'sft.py', 'tune.py', *FROZEN, '--out_dir=ranks', folder=pretrained)
    one, two = losses(pretrained, 'frozen'), losses(pretrained, 'ranks')
    assert two[0] == pytest.approx(one[0], rel=1e-5) and one[1].keys() == two[1].keys()
    for step, values in one[1].items():
        assert two[1][step][1] == pytest.approx(values[1], rel=1e-5)


def test_a_gpt_is_tuned_as_a_gpt_and_with_retrieval_if_told_so(pretrained, monkeypatch):
    monkeypatch.chdir(pretrained)
    settings, _ = sft.read_settings(['tune.py', '--init_from=gpt'])
    assert not settings.use_retrieval and settings.n_embd == 32 and settings.tokenizer.startswith('gpt/')
    settings, _ = sft.read_settings(['tune.py', '--init_from=gpt', '--use_retrieval=True', '--retrofit=True'])
    assert check_settings(settings).use_retrieval
    settings, _ = sft.read_settings(['tune.py'])
    assert settings.use_retrieval and settings.retrieval_milvus_uri == 'milvus.db'


def test_a_tuned_model_is_tuned_further_with_its_template(pretrained, tuned, monkeypatch):
    monkeypatch.chdir(pretrained)
    (pretrained / 'more.py').write_text(TUNE.replace("template = 'plain'", '').replace("'pretrained'", "'tuned'"))
    assert sft.read_settings(['more.py', '--out_dir=more'])[0].template == 'plain'


def test_a_tuned_run_is_evaluated_by_its_own_checkpoint_whatever_it_started_from(pretrained, tuned):
    assert 'val_bpb_on' in tune(pretrained, '--eval_only=True', '--init_from=resume').stdout
    for flags, said in ((['--init_from=gpt'], "in out_dir 'tuned', and init_from names 'gpt': leave one of them out"),
                        (['--out_dir=pretrained'], "the checkpoint in out_dir 'pretrained' was not tuned")):
        answer = tune(pretrained, '--eval_only=True', *flags, check=False)
        assert answer.returncode == 2 and said in answer.stderr


@pytest.fixture
def chats(pretrained, monkeypatch):
    """The settings of a run and its tokenizer, in the folder."""
    monkeypatch.chdir(pretrained)
    settings, _ = sft.read_settings(['tune.py'])
    return settings, load_tokenizer(settings.tokenizer)


def test_passages_of_the_collection_are_found_for_the_question_and_never_of_its_own_document(chats):
    settings, tokenizer = chats
    settings = settings.replace(passages='prompt', passages_from='collection', block_size=256, num_passages=2)
    chats = [DatasetConfig('chats.jsonl', source='stdlib')]
    with closing(PassageFinder(settings, tokenizer)) as finder:
        dataset = ConversationSet(chats[0], Writer(settings, tokenizer), settings)
        stream, said = ConversationStream([dataset], 256, 4, find_passages=finder.find), []
        for line in stream.pack_step():
            for example in line:
                text = tokenizer.decode(example.tokens.tolist())
                name = text.rpartition('What does ')[2].partition(' say?')[0]
                assert text.count('title: ') == 2 and f'title: {name},' not in text and f'stdlib/{name},' not in text
                assert text.index('source: ') < text.index('Question: ') or text.startswith('<|endoftext|>')
                said.append(name)
        assert len(set(said)) > 3
        state = json.loads(json.dumps(stream.state()))
        resumed = ConversationStream([dataset], 256, 4, state=state, find_passages=finder.find)
        assert (next(resumed).tokens == next(stream).tokens).all()
        batches, _ = val_conversations([dataset], 256, 4, 2000, find_passages=finder.find)
        assert any('title: ' in tokenizer.decode(tokens.tolist()) for tokens in batches[0].tokens)


def test_passages_given_with_the_examples_are_read_in_place_of_what_is_retrieved(pretrained):
    """With the answer in them, they help at once: and no database is asked."""
    answer = tune(pretrained, '--passages=neighbors', '--out_dir=given', '--num_passages=1', '--max_iters=2',
                  '--retrieval_milvus_uri=http://127.0.0.1:9')
    assert 'reading the passages that go with each conversation' in answer.stdout
    evaluations = [line for line in metrics(pretrained, 'given') if 'val_bpb_on' in line]
    assert evaluations[-1]['val_bpb_on'] < evaluations[-1]['val_bpb_off'] - 0.05


def test_a_prompt_that_is_padded_in_front_retrieves_in_training_what_it_does_in_generation(chats):
    settings, tokenizer = chats
    dataset = ConversationSet(DatasetConfig('chats.jsonl', source='stdlib'), Writer(settings, tokenizer), settings)
    example = next(e for e in dataset.examples if e.tokens[0] == tokenizer.eot_token and len(e.chunk_ids) > 1)
    with closing(Retriever(settings, tokenizer)) as retriever:
        C = settings.retrieval_chunk_size
        batch, = retriever.retrieve_for([as_batch([[example]], settings.block_size // C, C, tokenizer.eot_token)])
        source = CollectionSource(retriever, example.doc_id)
        found, mask, hits = source.retrieve(example.tokens[None, :C])
        assert (hits['score'] > 0).all() and (batch.hits[:, 0] == hits).all()
        assert (batch.neighbors[:, 0] == found).all() and (batch.neighbor_mask[:, 0] == mask).all()
        assert not (retriever.retrieve_for_text(np.full((1, 1, C), tokenizer.eot_token)).hits['score'] > 0).any()


def test_held_out_conversations_that_are_trained_on_are_counted(chats):
    settings, tokenizer = chats
    said = []
    open_conversations(settings.replace(val_datasets=['chats.jsonl']), tokenizer, dict(batch_size=4), 1, dict(), None,
                       said.append)
    assert any('96 of 96 held-out conversations stand in train_datasets, too' in line for line in said)


def test_the_question_of_a_dialogue_is_its_last():
    messages = [dict(role=role, content=role + str(i)) for i, role in enumerate(('system', 'user', 'assistant') * 2)]
    assert question_of(messages[:5]) == 'user4' and question_of(messages[:2]) == 'user1'


@pytest.mark.parametrize('flags, said', [
    (['--template='], "template is ''"),
    (['--template=chatml'], "template 'chatml' is neither"),
    (['--template={system}{user}'], 'lacks the place {assistant}'),
    (['--init_from=scratch'], "init_from is 'scratch', and tuning starts from a pretrained model"),
    (['--init_from=nowhere'], "init_from 'nowhere' is neither"),
    (['--out_dir=pretrained'], "out_dir 'pretrained' is the run of init_from"),
    (['--out_dir=pretrained', '--init_from=resume'], "in out_dir 'pretrained' was not tuned"),
    (['--use_retrieval=False'], 'set freeze_retrieval to True instead'),
    (['--init_from=gpt', '--freeze_retrieval=True'], 'and the run is of a GPT, which has none'),
    (['--init_from=gpt', '--passages=neighbors'], 'use_retrieval is False, so nothing reads them'),
    (['--freeze_retrieval=True', '--passages=neighbors'], 'freeze_retrieval is True, so nothing reads them'),
    (['--passages=neighbors', '--num_passages=3'], 'of which the model reads 2'),
    (['--passages=context'], "passages is 'context': choose one of '', 'prompt', 'neighbors'"),
    (['--passages_from=web'], "passages_from is 'web'"),
    (['--passages_from=collection'], "passages is '', which gives none"),
    (['--num_passages=0'], 'num_passages must be at least 1'),
    (['--retrieval_offline=True'], 'nothing is precomputed of conversations'),
    (['--n_layer=3'], 'another architecture'),
])
def test_what_cannot_be_tuned_is_one_line(chats, flags, said):
    with pytest.raises(UserError) as error:
        settings, _ = sft.read_settings(['tune.py', *flags])
        settings = check_settings(settings)
        from training.checkpoint import load_weights
        tokenizer = load_tokenizer(settings.tokenizer)
        load_weights(settings.init_from, RETROConfig.from_settings(settings, tokenizer.n_vocab), tokenizer)
    assert said in str(error.value)


@pytest.mark.parametrize('flags, said', [
    (['--template=plain'], 'the datasets are conversations.*python sft.py tunes'),
    (['--passages=prompt'], "passages is 'prompt', which is of instruction tuning"),
    (['--freeze_retrieval=True'], 'freeze_retrieval is True, which is of instruction tuning'),
])
def test_training_on_documents_refuses_what_is_of_tuning(chats, flags, said):
    with pytest.raises(UserError, match=said):
        check_settings(train.read_settings(['config.py', *flags])[0])


@pytest.mark.parametrize('read', [populate.main, precompute.main, lambda: fit_embedding(load_settings(['tune.py']))])
def test_what_reads_documents_says_that_a_config_is_of_conversations(chats, read, monkeypatch):
    monkeypatch.setattr('sys.argv', ['main', 'tune.py'])
    with pytest.raises(UserError, match='the datasets are conversations, and this reads documents'):
        read()


def test_a_server_that_the_model_alone_names_gets_no_token(chats, monkeypatch):
    monkeypatch.setenv('MILVUS_TOKEN', 'hush')
    checkpoint = load_checkpoint('pretrained').settings | dict(retrieval_milvus_uri='http://127.0.0.1:9')
    monkeypatch.setattr(sft, 'find_source', lambda settings: type('C', (), dict(
        settings=checkpoint, model=load_checkpoint('pretrained').model)))
    assert sft.read_settings(['tune.py'])[0].retrieval_milvus_token == ''
    assert sft.read_settings(['tune.py', '--retrieval_milvus_uri=http://127.0.0.1:9'])[0].retrieval_milvus_token
    with pytest.raises(UserError, match='give --retrieval_milvus_uri, too'):
        sft.read_settings(['tune.py', '--retrieval_milvus_token=hush'])


def test_a_bad_conversation_ends_the_command_with_one_line_and_code_2(pretrained):
    (pretrained / 'bad.jsonl').write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    answer = tune(pretrained, '--train_datasets=["bad.jsonl"]', '--out_dir=bad', check=False)
    assert answer.returncode == 2 and 'bad.jsonl, line 1: a conversation without an answer' in answer.stderr
    assert answer.stderr.count('error: ') == 1 and not (pretrained / 'bad').exists()
