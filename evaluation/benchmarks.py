"""
DeepEval's multiple-choice benchmarks on a model, with retrieval on and off (deepeval_adapter.py answers).

    multiple_choice_benchmarks = ['LogiQA', ('MMLU', dict(tasks=['ANATOMY'], n_shots=2))]     # in a config file
    python -m evaluation.benchmarks data/benchmarks LogiQA MMLU      # fetch their data, for machines without the hub

A benchmark's data is read from benchmark_data_dir if it is there: DIR/LogiQA.jsonl, or LogiQA.txt as its authors
publish it, and for the others the folders that `datasets` saves, DIR/cais/mmlu/anatomy and the like.
"""
import contextlib
import functools
import inspect
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from itertools import pairwise
from typing import get_origin

import deepeval.benchmarks
import numpy as np
from deepeval.models import DeepEvalBaseLLM

from configurator import UserError, reason_of, user_errors_as_one_line
from evaluation.deepeval_adapter import Prompt, RETROForDeepEval, closed_answers, read_answer

BENCHMARKS = ('ARC', 'BBQ', 'BoolQ', 'HellaSwag', 'LogiQA', 'MMLU', 'MathQA', 'TruthfulQA', 'Winogrande')
WRITTEN_FOR = '4.3.1'  # version of DeepEval whose internals separate_examples and benchmark_data rely on


class Exam(DeepEvalBaseLLM):
    """Stands in for the model while a benchmark runs: records what is asked, and returns known answers."""

    def __init__(self):
        self.asked, self.answers = {}, {}  # (prompt, schema) to the prompt; to its answer
        super().__init__('nanoRETRO')

    def load_model(self):
        return None

    def get_model_name(self):
        return 'nanoRETRO'

    async def a_generate(self, prompt, schema=None):
        return self.generate(prompt, schema)

    def generate(self, prompt, schema=None):
        self.asked.setdefault((str(prompt), schema), prompt)
        if (str(prompt), schema) in self.answers:
            return self.answers[str(prompt), schema]
        closed = closed_answers(schema)
        return schema(answer=closed[0]) if closed else read_answer('', schema)

    def batch_generate(self, prompts, schemas=None):
        return [self.generate(*pair) for pair in zip(prompts, schemas or [None] * len(prompts), strict=True)]


@dataclass
class Benchmark:
    """A benchmark with its data, and what it asks."""
    name: str
    benchmark: object  # DeepEval's
    exam: Exam
    data_dir: str

    def run(self, model, tokenizer, device, context, retriever, batch_size, show_progress=False,
            check_stop=lambda: None):
        """
        Its scores, 0 to 1, and their standard errors: 'off', and with a retriever 'on'. check_stop() may raise.
        """
        scores = dict(questions=0, chance=self.chance())
        for arm in ('on', 'off') if retriever else ('off',):
            examinee = RETROForDeepEval(model, tokenizer, device, context, retriever if arm == 'on' else None,
                                        batch_size, f'{self.name}, retrieval {arm}' if show_progress else None,
                                        check_stop)
            answers = examinee.batch_generate(list(self.exam.asked.values()), [schema for _, schema in self.exam.asked])
            self.exam.answers = dict(zip(self.exam.asked, answers, strict=True))
            correct = self.ask()
            scores |= {arm: float(correct.mean()), f'{arm}_error': float(correct.std() / math.sqrt(len(correct))),
                       'questions': len(correct), 'shortened': examinee.shortened, 'cut': examinee.cut}
        return scores

    def ask(self):
        """Let DeepEval run it; its verdict on each answer, (n,), 1 for a correct one."""
        with benchmark_data(self.data_dir), separate_examples(self.benchmark), quiet():
            self.benchmark.evaluate(self.exam)
        correct = self.benchmark.predictions['Correct'].to_numpy(dtype=float)
        return correct / 100 if self.benchmark.predictions['Correct'].max() > 1 else correct  # TruthfulQA's MC2

    def chance(self):
        """The score of guessing; None if the number of possible answers is unknown."""
        shares = []
        for (_, schema), prompt in self.exam.asked.items():
            answers = closed_answers(schema)
            question = getattr(prompt, 'parts', Prompt.parts)[2] or prompt
            count = len(answers) if answers else len(re.findall(r'^\d+\. ', question, re.MULTILINE))
            if not count or (schema and get_origin(schema.model_fields['answer'].annotation) is list):
                return None
            shares.append(1 / count)
        return float(np.mean(shares))


def prepare_benchmarks(entries, data_dir=''):
    """
    The setting multiple_choice_benchmarks as Benchmarks. UserError if one is unknown, its arguments are wrong, or its
    data is unavailable.
    """
    if entries and version('deepeval') != WRITTEN_FOR:
        print(f'DeepEval is version {version("deepeval")}, and evaluation/benchmarks.py was written for {WRITTEN_FOR}: '
              f'prompts that are too long lose their beginning, not whole examples, and benchmark_data_dir is read for '
              f'LogiQA alone', file=sys.stderr)
    prepared = []
    for entry in entries:
        try:
            name, arguments = (entry, {}) if isinstance(entry, str) else (*entry, {})[:2]
            arguments = dict(arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"multiple_choice_benchmarks holds {entry!r}, which is no name and no (name, arguments), "
                            f"such as ('MMLU', {{'n_shots': 2}})") from error
        if name not in BENCHMARKS:
            raise UserError(f'multiple_choice_benchmarks holds {name!r}, which is none of DeepEval\'s multiple-choice '
                            f'benchmarks: {", ".join(BENCHMARKS)}')
        benchmark = make_benchmark(name, arguments, data_dir)
        times = sum(made.name.split(' ')[0] == name for made in prepared)
        made = Benchmark(f'{name} {times + 1}' if times else name, benchmark, Exam(), data_dir)
        try:
            made.ask()
        except Exception as error:  # whatever the network, the hub or the files raise
            raise UserError(f'the data of benchmark {name} is unavailable ({reason_of(error)}): on a machine '
                            f'that reaches the hub, python -m evaluation.benchmarks DIR {name} fetches it; copy DIR '
                            f'here and set benchmark_data_dir to it (it is {data_dir!r})') from error
        prepared.append(made)
    return prepared


def make_benchmark(name, arguments, data_dir):
    """DeepEval's object. Tasks and modes may be given as their enum's names or values."""
    cls = getattr(deepeval.benchmarks, name)
    takes, given = inspect.signature(cls.__init__).parameters, dict(arguments)
    # None is DeepEval's default: all tasks, all problems
    arguments = {key: value for key, value in arguments.items() if value is not None}
    for key, least in (('n_shots', 0), ('n_problems_per_task', 1), ('n_problems', 1)):
        value = arguments.get(key, least)
        if type(value) is not int or value < least:
            raise UserError(f'benchmark {name}: {key} must be an integer of at least {least}, but is {value!r}')
    if not isinstance(arguments.get('tasks', []), (list, tuple)):
        raise UserError(f'benchmark {name}: tasks must be a list, such as [{arguments["tasks"]!r}]')
    if not arguments.get('tasks', True):
        raise UserError(f'benchmark {name}: tasks is empty; leave it out to run all of them')
    if not isinstance(arguments.get('dataset', []), list):
        raise UserError(f'benchmark {name}: dataset must be a list, but is {arguments["dataset"]!r}')
    if 'n_problems_per_task' in arguments and 'n_problems_per_task' not in takes:
        arguments['n_problems'] = arguments.pop('n_problems_per_task')  # it has no tasks
    enums = [value for value in vars(sys.modules[cls.__module__]).values()
             if isinstance(value, type) and issubclass(value, Enum)]

    def as_member(value):
        for enum in enums:
            for member in enum:
                if value in (member, member.name, member.value):
                    return member
        known = ', '.join(member.name for enum in enums for member in enum)
        raise UserError(f'benchmark {name} has no {value!r}; it has {known or "neither tasks nor modes"}')

    try:
        if 'tasks' in arguments:
            arguments['tasks'] = list(dict.fromkeys(as_member(value) for value in arguments['tasks']))
        if 'mode' in arguments:
            arguments['mode'] = as_member(arguments['mode'])
        if name == 'LogiQA':
            try:
                arguments |= local_logiqa(data_dir, arguments.get('tasks') or list(enums[0]))
            except ValueError as error:
                raise UserError(f'{data_dir}/LogiQA.txt or .jsonl is not LogiQA as its authors or DeepEval publish it '
                                f'({error}): fetch it anew with python -m evaluation.benchmarks {data_dir} LogiQA'
                                ) from error
        return cls(**arguments)
    except (TypeError, AssertionError) as error:
        raise UserError(f'benchmark {name} does not take {given} ({error}): it takes '
                        f'{", ".join(key for key in takes if key not in ("self", "kwargs"))}') from error


def local_logiqa(data_dir, tasks):
    """Arguments for DeepEval's LogiQA if data_dir has its data, which DeepEval does not load through `datasets`."""
    if not data_dir:
        return {}
    if os.path.isfile(f'{data_dir}/LogiQA.jsonl'):
        with open(f'{data_dir}/LogiQA.jsonl', encoding='utf-8') as file:
            return dict(dataset=[json.loads(line) for line in file])
    if not os.path.isfile(f'{data_dir}/LogiQA.txt'):
        return {}
    with open(f'{data_dir}/LogiQA.txt', encoding='utf-8') as file:
        blocks = [block.split('\n') for block in file.read().strip().split('\n\n')]
    # the authors' text does not say what kind of reasoning a question takes, so all are asked as of one kind
    return dict(tasks=tasks[:1], dataset=[
        dict(answer='abcd'.index(answer.strip().lower()), text=text, question=question, type={tasks[0].value: True},
             options=[re.sub(r'^[A-D]\.\s*', '', option) for option in options])
        for answer, text, question, *options in blocks])


@functools.cache
def load_once(load, name, config, options):
    return load(name, config, **dict(options))


@contextlib.contextmanager
def benchmark_data(data_dir, save=False):
    """Have `datasets` read from data_dir what is saved there, or save there what it loads."""
    if version('deepeval') != WRITTEN_FOR and not save:
        yield
        return
    import datasets
    original = datasets.load_dataset

    def load_dataset(name, config=None, **options):
        folder = os.path.join(data_dir, name, *filter(None, [config]))
        if data_dir and os.path.isdir(folder):
            return datasets.load_from_disk(folder)
        loaded = load_once(original, name, config, tuple(options.items()))
        if save:
            loaded.save_to_disk(folder)
        return loaded
    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


@contextlib.contextmanager
def separate_examples(benchmark):
    """Have a benchmark's prompts be Prompts, by asking its template for one more example at a time."""
    if version('deepeval') != WRITTEN_FOR:
        yield
        return
    module = sys.modules[type(benchmark).__module__]
    template, = (value for name, value in vars(module).items() if name.endswith('Template'))
    original = template.generate_output

    def generate_output(input, **given):
        whole = Prompt(original(input=input, **given))
        if 'n_shots' in given:
            prefixes = [original(input=input, **given | dict(n_shots=n)) for n in range(given['n_shots'] + 1)]
        else:  # a fixed number of examples, with an empty line after each
            prefixes = [whole[:end.end()] + input for end in re.finditer(r'\n\s*\n', whole[:-len(input)])]
        if prefixes and all(prefix.endswith(input) for prefix in prefixes):
            ends = [len(prefix) - len(input) for prefix in prefixes]
            whole.parts = whole[:ends[0]], [whole[a:b] for a, b in pairwise(ends)], whole[ends[-1]:]
        return whole
    template.generate_output = staticmethod(generate_output)
    try:
        yield
    finally:
        template.generate_output = staticmethod(original)


@contextlib.contextmanager
def quiet():
    """Silence DeepEval, which prints scores and draws progress bars of its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def fetch(data_dir, names):
    """Load the benchmarks' data from where DeepEval has it, and save it where benchmark_data_dir finds it."""
    for name in names:
        with benchmark_data(data_dir, save=True):
            prepared, = prepare_benchmarks([name])
        if name == 'LogiQA':
            os.makedirs(data_dir, exist_ok=True)
            prepared.benchmark.dataset.to_json(f'{data_dir}/LogiQA.jsonl')
        print(f'{name}: {len(prepared.exam.asked):,} questions are in {data_dir}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        if len(sys.argv) < 3 or sys.argv[1].startswith('-'):
            print(__doc__)
            sys.exit(0 if '--help' in sys.argv or '-h' in sys.argv else 2)
        fetch(sys.argv[1], sys.argv[2:])
