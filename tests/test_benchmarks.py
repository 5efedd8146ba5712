"""DeepEval's own benchmark classes, through the wrapper, on a real LogiQA and on small data of each one's format."""
import json
import math
import re

import pytest
import torch
from deepeval.benchmarks.schema import ListOfNumbersSchema, MultipleChoiceSchema, NumberSchema, StringSchema

from configurator import UserError
from data.tokenizer import load_tokenizer
from evaluation.benchmarks import BENCHMARKS, prepare_benchmarks
from evaluation.deepeval_adapter import Prompt, RETROForDeepEval, answer_separator, read_answer
from evaluation.likelihoods import log_likelihoods
from model import RETRO, RETROConfig
from retrieval.retriever import Retriever
from tests.conftest import CHUNK, SHARED, run

LOGIQA = SHARED / 'data/logiqa-eval.txt'


@pytest.fixture(scope='module')
def tokenizer(prepared):
    return load_tokenizer(str(prepared / 'tokenizer.json'))


def make_model(tokenizer, block_size=64 * CHUNK, seed=0, cls=RETRO, **changes):
    torch.manual_seed(seed)
    return cls(RETROConfig(**{**dict(block_size=block_size, vocab_size=-(-tokenizer.n_vocab // 64) * 64, n_layer=2,
                                     n_head=2, n_embd=32, use_retrieval=False, retrieval_chunk_size=CHUNK),
                              **changes})).eval()


class Oracle(RETRO):
    """Makes the right letter the likeliest at the end of each question that it knows."""
    answers = None  # of the last 40 tokens of a question, the token of its answer

    def hidden(self, tokens, *_, **__):
        x = torch.zeros(*tokens.shape, self.config.n_embd)
        for b, row in enumerate(tokens.tolist()):
            for t in range(len(row)):
                answer = self.answers.get(tuple(row[max(0, t - 39):t + 1]))
                if answer is not None:
                    x[b, t] = 100 * self.lm_head.weight[answer] / self.lm_head.weight[answer].norm()
        return x


@pytest.fixture(scope='module')
def logiqa(tmp_path_factory):
    if not LOGIQA.exists():
        pytest.skip('the LogiQA file is not here')
    folder = tmp_path_factory.mktemp('benchmarks')
    (folder / 'LogiQA.txt').write_text(LOGIQA.read_text())
    return str(folder)


def scored(benchmark, model, tokenizer, **options):
    return benchmark.run(model, tokenizer, 'cpu', None, None, 32, **options)


def one_by_one(benchmark, examinee):
    """The accuracy that DeepEval itself comes to, asking the wrapper for one answer after another."""
    return benchmark.benchmark.evaluate(examinee).overall_accuracy


def test_an_oracle_scores_all_and_a_uniform_model_by_chance_batched_and_one_by_one(logiqa, tokenizer):
    benchmark, = prepare_benchmarks([('LogiQA', dict(n_shots=0))], logiqa)
    assert len(benchmark.exam.asked) == 651 and benchmark.chance() == 0.25
    oracle = make_model(tokenizer, cls=Oracle, n_embd=2048)
    with torch.no_grad():
        oracle.lm_head.weight.normal_()
    oracle.answers = {}
    golden = {golden.input: golden.expected_output for task in benchmark.benchmark.tasks
              for golden in benchmark.benchmark.load_benchmark_dataset(task)}
    for prompt in benchmark.exam.asked.values():
        *tokens, answer = tokenizer.encode_ordinary(prompt.rstrip() + ' ') + tokenizer.encode_ordinary(golden[prompt])
        oracle.answers[tuple(tokens[-40:])] = answer
    scores = scored(benchmark, oracle, tokenizer)
    assert scores['off'] == 1.0 and scores['off_error'] == 0.0 and scores['questions'] == 651
    assert one_by_one(benchmark, RETROForDeepEval(oracle, tokenizer)) == 1.0

    uniform = make_model(tokenizer, n_embd=8)
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    scores = scored(benchmark, uniform, tokenizer)
    assert abs(scores['off'] - 0.25) < 2 * scores['off_error'] and scores['off_error'] == pytest.approx(0.017, abs=1e-3)
    assert one_by_one(benchmark, RETROForDeepEval(uniform, tokenizer)) == scores['off']
    assert {answer.answer for answer in benchmark.exam.answers.values()} == set('ABCD')


def test_batches_give_the_answers_of_one_by_one_with_retrieval_on_and_off(logiqa, settings, workspace):
    tokenizer = load_tokenizer(settings.tokenizer)
    model = make_model(tokenizer, use_retrieval=True, retrieval_layers=[2], retrieval_encoder_layers=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    benchmark, = prepare_benchmarks([('LogiQA', dict(n_shots=1, n_problems_per_task=24))], logiqa)
    retriever = Retriever(settings, tokenizer)
    scores = benchmark.run(model, tokenizer, 'cpu', None, retriever, 5)
    assert scores['questions'] == 24 and set(scores) >= {'on', 'off', 'on_error', 'off_error'}
    written = {}
    for arm in ('on', 'off'):
        single = RETROForDeepEval(model, tokenizer, retriever=retriever if arm == 'on' else None)
        batched = RETROForDeepEval(model, tokenizer, retriever=single.retriever, batch_size=5)
        prompts = list(benchmark.exam.asked.values())
        schemas = [schema for _, schema in benchmark.exam.asked]
        answers = batched.batch_generate(prompts, schemas)
        assert answers == [single.generate(*pair) for pair in zip(prompts, schemas, strict=True)]
        options = [(tokenizer.encode_ordinary(prompt), 2) for prompt in prompts[:3]]
        written[arm] = [likelihood for likelihood, _ in log_likelihoods(
            model, tokenizer, options, 'cpu', None, single.retriever, batch_size=5)]
        assert written[arm] == pytest.approx([log_likelihoods(
            model, tokenizer, [option], 'cpu', None, single.retriever)[0][0] for option in options], rel=1e-4)
    assert written['on'] != written['off']  # it reads what it retrieves
    retriever.close()


def test_the_likelihood_of_an_answer_is_that_of_its_tokens_one_after_another(tokenizer):
    model = make_model(tokenizer)
    tokens = tokenizer.encode_ordinary('def f(x): return x + 1')
    with torch.no_grad():
        logits, _ = model(torch.tensor([tokens]))
    likely = logits[0, :, :tokenizer.n_vocab].log_softmax(-1)
    expected = sum(likely[t - 1, tokens[t]].item() for t in range(3, len(tokens)))
    longer = tokenizer.encode_ordinary('import os, sys, re, json, math, time, string, types')
    greedy = [*tokens[:3], int(likely[2].argmax())]
    (_, _), (found, _), (_, is_likeliest) = log_likelihoods(
        model, tokenizer, [(longer, 1), (tokens, 3), (greedy, 3)], 'cpu')
    assert found == pytest.approx(expected, rel=1e-4) and is_likeliest


def test_a_prompt_that_is_too_long_loses_whole_examples_from_the_front_and_never_its_question(logiqa, tokenizer):
    benchmark, = prepare_benchmarks([('LogiQA', dict(n_shots=5, n_problems_per_task=3))], logiqa)
    for prompt in benchmark.exam.asked.values():
        before, examples, question = prompt.parts
        assert len(examples) == 5 and before + ''.join(examples) + question == prompt
        assert question.startswith('Write a multi-choice question')
        length = len(tokenizer.encode_ordinary(prompt))
        for kept in range(5, -1, -1):
            text = ''.join(examples[5 - kept:]) + question
            room = len(tokenizer.encode_ordinary(text.rstrip() + answer_separator(prompt) + 'A'))
            wrapper = RETROForDeepEval(make_model(tokenizer), tokenizer)
            tokens, = wrapper._fit(prompt, [answer_separator(prompt) + 'A'], room)
            assert tokenizer.decode(tokens) == text.rstrip() + answer_separator(prompt) + 'A'
            assert (wrapper.shortened, wrapper.cut) == (int(kept < 5), 0) and len(tokens) <= length + 2
        tokens, = wrapper._fit(prompt, [' A'], 20)
        assert len(tokens) == 20 and tokenizer.decode(tokens).endswith('Answer: A') and wrapper.cut == 1


def test_an_answer_is_set_off_as_in_the_prompts_examples():
    assert answer_separator('Q: one?\nAnswer:\nB\n\nQ: two?\nAnswer: ') == '\n'
    assert answer_separator('Q: one?\nAnswer:B\n\nQ: two?\nAnswer:') == ''
    assert answer_separator('Q: one?\nA:  Yes\nQ: two?\nA: ') == '  '
    assert answer_separator('Q: one?\nAnswer:') == ' '


def test_free_answers_are_written_and_read(tokenizer):
    assert read_answer('about 12 or 3', NumberSchema).answer == 12 and read_answer('none', NumberSchema).answer == 0
    assert read_answer('[1, 3, 1]', ListOfNumbersSchema).answer == [1, 3]
    wrapper = RETROForDeepEval(make_model(tokenizer, block_size=8 * CHUNK), tokenizer)
    texts = wrapper.batch_generate(['def f(x):', 'import'], [StringSchema, None])
    assert isinstance(texts[0], StringSchema) and isinstance(texts[1], str) and '\n' not in texts[1]
    long = Prompt('question ' * 200)
    assert isinstance(wrapper.generate(long, MultipleChoiceSchema).answer, str) and wrapper.cut == 1


def small_datasets():
    """Rows of each benchmark's format: {folder under benchmark_data_dir: {split: rows}}."""
    texts = ['first thing', 'second thing', 'third thing', 'fourth thing']
    hellaswag = [dict(ctx=f'A man {i}', endings=texts, label=str(i % 4), activity_label='Applying sunscreen')
                 for i in range(16)]
    mmlu = [dict(question=f'What is {i}?', choices=texts, answer=i % 4) for i in range(8)]
    arc = [dict(question=f'Which is {i}?', choices=dict(text=texts, label=list('ABCD')), answerKey='ABCD'[i % 4])
           for i in range(8)]
    winogrande = [dict(sentence=f'{i} gave _ to him', option1='one', option2='two', answer=str(i % 2 + 1))
                  for i in range(8)]
    maths = [dict(Problem=f'{i} + 1 ?', options='a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5', correct='abcde'[i % 5],
                  category='gain') for i in range(10)]
    boolq = [dict(question=f'is {i} even', passage='Numbers are even or odd.', answer=i % 2 == 0) for i in range(8)]
    bbq = [dict(context=f'Two people {i}.', question='Who forgot?', ans0='the old one', ans1='the young one',
                ans2='not known', choices=texts[:3], label=i % 3, answer_info='') for i in range(9)]
    truth = [dict(question=f'What about {i}?', mc1_targets=dict(choices=texts, labels=[1, 0, 0, 0]),
                  mc2_targets=dict(choices=texts, labels=[1, 1, 0, 0])) for i in range(6)]
    kinds = [dict(question=row['question'], category='Language') for row in truth]
    return {'Rowan/hellaswag': dict(train=hellaswag, validation=hellaswag),
            'cais/mmlu/anatomy': dict(dev=mmlu, test=mmlu), 'ai2_arc/ARC-Challenge': dict(train=arc),
            'allenai/winogrande/winogrande_xs': dict(validation=winogrande), 'regisss/math_qa': dict(test=maths),
            'boolq/default': dict(validation=boolq),
            'heegyu/bbq/Age': dict(test=bbq), 'truthful_qa/generation': dict(validation=kinds),
            'truthful_qa/multiple_choice': dict(validation=truth)}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """benchmark_data_dir with small datasets of every benchmark."""
    from datasets import Dataset, DatasetDict
    folder = tmp_path_factory.mktemp('saved')
    for path, splits in small_datasets().items():
        DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}).save_to_disk(folder / path)
    questions = [dict(text='A passage.', question='Which?', options=['one', 'two', 'three', 'four'], answer=i % 4,
                      type={'Categorical Reasoning': True}) for i in range(8)]
    (folder / 'LogiQA.jsonl').write_text('\n'.join(map(json.dumps, questions)) + '\n')
    return str(folder)


EVERY = [('HellaSwag', dict(tasks=['APPLYING_SUNSCREEN'], n_shots=1), 16, 1 / 4),
         ('MMLU', dict(tasks=['anatomy'], n_shots=2), 8, 1 / 4),
         ('ARC', dict(mode='CHALLENGE', n_shots=1, n_problems_per_task=6), 6, 1 / 4),
         ('Winogrande', dict(n_problems_per_task=8), 8, 1 / 2),
         ('LogiQA', dict(tasks=['CATEGORICAL_REASONING']), 8, 1 / 4),
         ('MathQA', dict(tasks=['GAIN'], n_shots=1), 10, 1 / 5), ('BoolQ', dict(n_problems_per_task=8), 8, 1 / 2),
         ('TruthfulQA', dict(tasks=['Language']), 6, 1 / 4),
         ('TruthfulQA', dict(tasks=['Language'], mode='MC2'), 6, None),
         ('BBQ', dict(tasks=['AGE']), 9, 1 / 3)]


@pytest.mark.parametrize('name, arguments, count, chance', EVERY)
def test_every_multiple_choice_benchmark_is_asked_and_scored(saved, tokenizer, name, arguments, count, chance):
    benchmark, = prepare_benchmarks([(name, arguments)], saved)
    scores = scored(benchmark, make_model(tokenizer), tokenizer)
    assert scores['questions'] == count and scores['chance'] == pytest.approx(chance)
    assert 0 <= scores['off'] <= 1 and scores['cut'] == 0
    if chance:
        p = scores['off']
        assert scores['off_error'] == pytest.approx(math.sqrt(p * (1 - p) / count))
    assert scored(benchmark, make_model(tokenizer), tokenizer) == scores


def test_a_benchmark_that_is_asked_twice_has_two_names(saved):
    modes = [('ARC', dict(mode='CHALLENGE', n_problems_per_task=2))] * 2
    assert [benchmark.name for benchmark in prepare_benchmarks(modes, saved)] == ['ARC', 'ARC 2']


def test_deepevals_defaults_may_be_given_and_a_task_that_is_named_twice_counts_once(saved):
    benchmark, = prepare_benchmarks([('BBQ', dict(tasks=['AGE', 'AGE'], n_problems_per_task=None))], saved)
    plain, = prepare_benchmarks([('BBQ', dict(tasks=['AGE']))], saved)
    assert len(benchmark.exam.asked) == len(plain.exam.asked) and len(benchmark.benchmark.tasks) == 1


def test_deepevals_telemetry_is_off(prepared):
    code = ('import os\nos.environ.pop("DEEPEVAL_TELEMETRY_OPT_OUT")\nimport evaluation.benchmarks\n'
            'from deepeval.telemetry.client import get_settings\n'
            'print(get_settings().DEEPEVAL_TELEMETRY_OPT_OUT)')
    assert run('-c', code, folder=prepared).stdout.strip() == 'True'


def test_all_known_benchmarks_are_tested():
    assert {name for name, *_ in EVERY} == set(BENCHMARKS)


@pytest.mark.parametrize('entry, said', [
    ('Chess', "multiple_choice_benchmarks holds 'Chess', which is none of DeepEval's multiple-choice benchmarks: A"),
    (5, 'multiple_choice_benchmarks holds 5, which is no name'),
    (('MMLU', dict(tasks=['ALCHEMY'])), "benchmark MMLU has no 'ALCHEMY'; it has "),
    (('LogiQA', dict(n_shot=1)), 'benchmark LogiQA does not take'),
    (('LogiQA', dict(n_shots=9)), 'LogiQA only supports n_shots <= 5'),
    (('LogiQA', dict(n_shots=-1)), 'n_shots must be an integer of at least 0, but is -1'),
    (('LogiQA', dict(n_shots=1.5)), 'n_shots must be an integer of at least 0, but is 1.5'),
    (('LogiQA', dict(n_problems_per_task=0)), 'n_problems_per_task must be an integer of at least 1, but is 0'),
    (('LogiQA', dict(n_problems_per_task=-1)), 'n_problems_per_task must be an integer of at least 1, but is -1'),
    (('MMLU', dict(tasks=[])), 'tasks is empty'),
    (('MMLU', dict(tasks='ANATOMY')), "tasks must be a list, such as ['ANATOMY']"),
    (('LogiQA', dict(dataset=5)), 'dataset must be a list, but is 5'),
    (('MMLU', dict(tasks=['astronomy'])), 'the data of benchmark MMLU is unavailable'),
])
def test_what_cannot_be_asked_is_said(saved, entry, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        prepare_benchmarks([entry], saved)
    assert len(str(error.value)) < 1500


def test_without_examples_none_are_lost(logiqa, tokenizer):
    benchmark, = prepare_benchmarks([('LogiQA', dict(n_shots=0, n_problems_per_task=3))], logiqa)
    scores = benchmark.run(make_model(tokenizer, block_size=2 * CHUNK), tokenizer, 'cpu', None, None, 3)
    assert scores['shortened'] == 0 and scores['cut'] == 3


def test_without_benchmarks_deepeval_is_not_imported(prepared):
    code = 'import sys, train, evaluation.__main__\nprint([n for n in sys.modules if n.startswith("deepeval")])'
    assert run('-c', code, folder=prepared).stdout.strip() == '[]'
