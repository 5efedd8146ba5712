"""lm-evaluation-harness on a checkpoint: its scores are those that it gives the same model exported to transformers."""
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest

from configurator import UserError
from data.conversations import find_template, render
from data.python_source.prepare import __doc__ as SOME_TEXT
from evaluation import qa
from evaluation.report import read_answers
from tests.conftest import CHUNK, ROOT, run
from tests.test_export import MODELS, save_run

CHOICE = '''
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
'''
ROLLING = '''
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
'''
WRITTEN = '''
output_type: generate_until
doc_to_text: "Question: {{question}}\\n\\nAnswer:"
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["\\n\\nQuestion:"], max_gen_toks: 12, do_sample: false}
filter_list: [{name: spaces, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true,
               regexes_to_ignore: ["\\\\b(?:The |the |An |A |a |an )"]}]
'''
TASKS = dict(choice=CHOICE, rolling=ROLLING, written=WRITTEN)


def write_tasks(folder, golds=None):
    """The tasks' YAML files and their data, 12 questions."""
    words = SOME_TEXT.split()
    rows = [dict(question=' '.join(words[5 * i:5 * i + 5]), options=[' '.join(words[i + j:i + j + 1 + j])
                                                                    for j in range(4)], gold=i % 4,
                 text=' '.join(words[i:]) * (1 + i % 2), answers=[(golds or ['none'] * 12)[i] or 'none'])
            for i in range(12)]
    (folder / 'data.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for name, text in TASKS.items():
        (folder / f'{name}.yaml').write_text(f'task: {name}\ndataset_path: json\ntest_split: test\n'
                                             f'dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n{text}')


@pytest.fixture(scope='module')
def adapter():
    pytest.importorskip('lm_eval', reason='lm-eval is not installed (requirements-lm-eval.txt)')
    from evaluation import lm_eval_adapter
    return lm_eval_adapter


def evaluated(model, folder, **options):
    """{task: {metric: score}} by lm_eval, and the written answers."""
    import lm_eval
    found = lm_eval.simple_evaluate(model, tasks=[str(folder / f'{name}.yaml') for name in TASKS], bootstrap_iters=0,
                                    **options)
    return {task: {key: value for key, value in scores.items() if isinstance(value, float) and 'stderr' not in key}
            for task, scores in found['results'].items()}, [
                sample['resps'][0][0] for sample in found['samples']['written']]


@pytest.fixture
def scratch(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('name', ['gpt2', 'retro'])
def test_scores_are_those_of_the_same_model_exported_to_transformers(adapter, prepared, scratch, name):
    """And the scores of written answers, half of which are right, are those of evaluation.qa."""
    from lm_eval.models.huggingface import HFLM
    # a model with neighbors is asked by evaluation.qa on the chunk grid, which lm_eval does not know
    save_run(scratch, prepared, name, block_size=6 * CHUNK, **MODELS[name] | dict(retrieval_k_neighbors=0))
    run(ROOT / 'export.py', f'--out_dir={name}', '--to=export', folder=scratch)
    write_tasks(scratch)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as cleanup:
        patch.setattr(sys, 'argv', ['qa', f'--out_dir={name}', '--data=data.jsonl', '--template=plain',
                                    '--retrieval=off', '--max_new_tokens=12'])
        qa.main(cleanup)
        answers = [line['off']['answer'] for line in read_answers(name, 3)[1]]
        write_tasks(scratch, [f'The {answer.upper()}!' if i % 2 else 'wrong' for i, answer in enumerate(answers)])
        qa.main(cleanup)
    scored = read_answers(name, 3)[0]
    trust = dict(trust_remote_code=True) if name == 'retro' else {}
    exported = HFLM(pretrained='export', device='cpu', dtype='float32', batch_size=1, **trust)
    theirs, their_answers = evaluated(exported, scratch)
    ours, our_answers = evaluated(adapter.RETROForLMEval(name, 'off', batch_size=3), scratch)
    for task in ('choice', 'rolling'):
        assert ours[task] == pytest.approx(theirs[task], rel=1e-4) and len(theirs[task]) > 1
    # transformers shows the bytes of a character that the last token cuts, the engine does not
    whole = [i for i, text in enumerate(their_answers) if not text.endswith('\ufffd')]
    assert [our_answers[i] for i in whole] == [their_answers[i] for i in whole] and len(whole) > 4
    if len(whole) == 12:
        assert ours['written'] == theirs['written']
    assert ours['written']['exact_match,spaces'] == scored['exact_match_off'] > 0.2


def test_a_checkpoint_is_scored_with_retrieval_on_and_off_by_one_command(adapter, settings, workspace, scratch,
                                                                            monkeypatch):
    monkeypatch.chdir(workspace)
    given = {key: getattr(settings, key) for key in ('retrieval_milvus_uri', 'retrieval_embedding_model')}
    save_run(workspace, workspace, 'run', retrieval_encoder_layers=1, retrieval_pointers=8, **given)
    write_tasks(workspace)
    monkeypatch.setattr(sys, 'argv', ['lm', '--out_dir=run', '--tasks=choice.yaml,rolling.yaml,written.yaml'])
    with ExitStack() as cleanup:
        adapter.main(cleanup)
    report = json.loads((workspace / 'run/lm_eval.json').read_text())
    assert report['on']['results'].keys() == report['off']['results'].keys() == TASKS.keys()
    on, off = (report[arm]['results']['rolling']['bits_per_byte,none'] for arm in ('on', 'off'))
    assert on != off and report['on']['questions'] == dict.fromkeys(TASKS, 12)
    alone = adapter.RETROForLMEval('run', 'off')
    assert evaluated(alone, workspace)[0]['rolling']['bits_per_byte,none'] == pytest.approx(off)
    for options, said in ((['--tasks=no_such_task'], "no task 'no_such_task'"), (['--tasks=no.yaml'], "no file 'no.ya"),
                          (['--tasks=choice.yaml', '--apply_chat_template'], 'has no chat template'),
                          (['--tasks=choice.yaml', '--include_path=no'], "'no' is no folder")):
        monkeypatch.setattr(sys, 'argv', ['lm', '--out_dir=run', *options])
        with pytest.raises(UserError, match=said), ExitStack() as cleanup:
            adapter.main(cleanup)


def test_lm_evals_own_command_line_knows_the_model(adapter, prepared, scratch):
    save_run(scratch, prepared, 'gpt', use_retrieval=False, template='plain')
    write_tasks(scratch)
    answer = run('-m', 'evaluation.lm_eval_adapter', 'run', '--model', 'nanoretro', '--model_args', 'out_dir=gpt',
                 '--tasks', 'choice.yaml', '--limit', '4', folder=scratch)
    assert 'choice' in answer.stdout and 'acc_norm' in answer.stdout
    model = adapter.RETROForLMEval('gpt')
    assert model.apply_chat_template([dict(role='user', content='Why?')]) == 'Question: Why?\n\nAnswer: '


def test_a_tuned_model_is_asked_with_the_tokens_of_its_tuning_and_stops_where_its_template_says(adapter, prepared,
                                                                                                scratch):
    save_run(scratch, prepared, 'retro', template='instructretro', block_size=6 * CHUNK)
    model = adapter.RETROForLMEval('retro', 'off')
    asked, encode = [dict(role='user', content='Why?')], model.encoding.encode_ordinary
    prompt = render(find_template('instructretro'), asked, model.encoding, align=CHUNK)[0].tolist()
    text = model.apply_chat_template(asked)
    assert model.align == CHUNK and model.tok_encode(text) == prompt and text.endswith('Why?\n\nAssistant: ')
    short = render(find_template('instructretro'), [dict(role='system', content='Be brief.'), *asked], model.encoding,
                   align=CHUNK)[0].tolist()
    brief = model.apply_chat_template([dict(role='system', content='Be brief.'), *asked])
    assert model._encode_pair(brief, 'So.') == (short, encode(' So.')) and short != encode(brief.rstrip())
    begun = model.apply_chat_template([*asked, dict(role='assistant', content='It is ')], add_generation_prompt=False)
    assert begun == f'{text}It is ' and model.tok_encode(begun) == prompt + encode(' It is')
    assert model._encode_pair(begun, 'so')[1] == encode(' so')

    long = model.apply_chat_template([dict(role='user', content='word ' * 200)])
    context, _ = model._encode_pair(long, 'So.')
    assert len(context) % CHUNK == 0 and context == model.prompts[long][-len(context):] and len(context) >= 4 * CHUNK

    def answer():
        return model.generate_until([SimpleNamespace(args=(brief, dict(until=[], max_gen_toks=12, do_sample=False)))],
                                    True)[0]
    whole = answer()
    mark = whole.strip()[-3:]
    model.template = replace(model.template, tail=mark)
    assert answer() == whole[:whole.index(mark)]
