"""
DeepEval's multiple-choice benchmarks on a model, with retrieval on and off. Where a question has a closed set of
answers, the likeliest of them is the model's answer; to others it writes one.

    multiple_choice_benchmarks = ['LogiQA', ('MMLU', dict(tasks=['ANATOMY'], n_shots=2))]     # in a config file
    python -m evaluation.benchmarks data/benchmarks LogiQA MMLU      # fetch their data, for machines without the hub

Where benchmark_data_dir has a benchmark's data, it is read from there: DIR/LogiQA.jsonl, or LogiQA.txt as its authors
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
from itertools import pairwise
from typing import Literal, get_args, get_origin

os.environ.setdefault('DEEPEVAL_TELEMETRY_OPT_OUT', '1')
os.environ.setdefault('DEEPEVAL_DISABLE_DOTENV', '1')

import deepeval.benchmarks
import numpy as np
import torch
import torch.nn.functional as F
from deepeval.models import DeepEvalBaseLLM
from tqdm import tqdm

from configurator import UserError, user_errors_as_one_line
from data.chunking import hash64
from evaluation.samples import neighbors_of

BENCHMARKS = ('ARC', 'BBQ', 'BoolQ', 'HellaSwag', 'LogiQA', 'MMLU', 'MathQA', 'TruthfulQA', 'Winogrande')
WRITTEN = 32  # tokens at most of an answer that is written
RETRIEVED_TOGETHER = 256  # prompts that are retrieved for by one request


class Prompt(str):
    """A prompt that knows its parts: what stands before the examples, the examples, and the question."""
    parts = ('', (), None)


class RETROForDeepEval(DeepEvalBaseLLM):
    """
    A model as DeepEval asks it: a prompt and the schema of its answer (a pydantic model, or None for text). With a
    retriever it reads the neighbors of each complete chunk of the prompt. It counts the prompts that were too long:
    `shortened` ones lost examples, `cut` ones the beginning of their question, which alone was longer than the block.
    """

    def __init__(self, model, tokenizer, device='cpu', context=None, retriever=None, batch_size=8, label=None):
        self.network, self.tokenizer, self.device, self.retriever = model, tokenizer, device, retriever
        self.context = context or contextlib.nullcontext()
        self.batch_size, self.label = batch_size, label
        self.shortened = self.cut = 0
        super().__init__('nanoRETRO')

    def load_model(self):
        return self.network

    def get_model_name(self):
        return 'nanoRETRO'

    async def a_generate(self, prompt, schema=None):
        return self.generate(prompt, schema)

    def generate(self, prompt, schema=None):
        return self.batch_generate([prompt], [schema])[0]

    def batch_generate(self, prompts, schemas=None):
        """The answers: instances of the schemas, or text where there is none."""
        self.network.eval()
        schemas = schemas or [None] * len(prompts)
        answers = [None] * len(prompts)
        closed = [i for i, schema in enumerate(schemas) if closed_answers(schema)]
        for i, answer in zip(closed, self._choose([(prompts[i], closed_answers(schemas[i])) for i in closed]),
                             strict=True):
            answers[i] = schemas[i](answer=answer)
        others = [i for i in range(len(prompts)) if answers[i] is None]
        for i in tqdm(others, desc=self.label, disable=None if self.label and others else True, leave=False):
            answers[i] = read_answer(self._write(prompts[i]), schemas[i])
        return answers

    def _choose(self, questions):
        """
        The likeliest of each question's answers, questions being pairs of a prompt and its answers. Which of equally
        likely ones depends on the prompt, so that a model that knows nothing scores by chance, not by one letter.
        """
        options = []  # (tokens, from where on they are scored)
        for prompt, answers in questions:
            encoded = self._fit(prompt, [answer_separator(prompt) + answer for answer in answers],
                                self.network.config.block_size + 1)  # the last token is not read
            shortest = min(map(len, encoded))
            same = next((i for i, column in enumerate(zip(*encoded, strict=False)) if len(set(column)) > 1), shortest)
            options += [(tokens, min(same, shortest - 1)) for tokens in encoded]
        scores, chosen = iter(self._log_likelihoods(options)), []
        for prompt, answers in questions:
            of_answers = np.array([next(scores) for _ in answers])
            likeliest = np.flatnonzero(of_answers >= of_answers.max() - 1e-6)
            chosen.append(answers[likeliest[hash64(prompt) % len(likeliest)]])
        return chosen

    def _fit(self, prompt, answers, room):
        """
        The tokens of the prompt with each of the answers. Where they are more than room, the prompt loses whole
        examples from the front, and what stands before the examples last; where its question alone is still too long,
        the beginning of that.
        """
        before, examples, question = getattr(prompt, 'parts', Prompt.parts)
        shorter = [before + ''.join(examples[i:]) + question for i in range(1, len(examples) + 1)] + [question] \
            if question is not None else []
        for number, text in enumerate([str(prompt), *shorter]):
            encoded = self._encode(text.rstrip(), answers)
            if max(map(len, encoded)) <= room:
                self.shortened += number > 0
                return encoded
        self.shortened += bool(shorter)
        self.cut += 1
        spare = max(map(len, encoded)) - room
        return [tokens[spare:] for tokens in encoded]

    def _encode(self, text, answers):
        """
        The tokens of the text with each of the answers. Where ' A' is one token and ' B' two, A would be the likelier
        for that alone, so the answers are tokens of their own then.
        """
        encode = self.tokenizer.encode_ordinary
        encoded = [encode(text + answer) for answer in answers]
        if len(set(map(len, encoded))) > 1:
            gap = answers[0][:len(answers[0]) - len(answers[0].lstrip())]
            encoded = [encode(text + gap) + encode(answer[len(gap):]) for answer in answers]
        return encoded

    @torch.no_grad()
    def _log_likelihoods(self, options):
        """
        Log-probability of tokens[start:] after tokens[:start], for each of the options (tokens, start). Options that
        differ in their last token alone are one row of the model's batch.
        """
        rows = {}  # what is read, to the options that read it
        for i, (tokens, _) in enumerate(options):
            rows.setdefault(tuple(tokens[:-1]), []).append(i)
        inputs = sorted(rows, key=len)
        scores = [0.0] * len(options)
        bar = tqdm(total=len(inputs), unit='prompt', desc=self.label, disable=None if self.label else True, leave=False)
        for group in range(0, len(inputs), RETRIEVED_TOGETHER):
            some = inputs[group:group + RETRIEVED_TOGETHER]
            neighbors, mask = self._retrieve(some)
            for start in range(0, len(some), self.batch_size):
                own = slice(start, start + self.batch_size)
                tokens = self._padded(some[own])  # (B, T)
                complete = tokens.shape[1] // self.network.config.retrieval_chunk_size
                read = (None, None)
                if neighbors is not None:
                    read = (torch.from_numpy(neighbors[own, :complete]).long().to(self.device),
                            torch.from_numpy(mask[own, :complete]).to(self.device))
                with self.context:
                    hidden = self.network.hidden(torch.from_numpy(tokens).to(self.device), *read)
                for x, of_row in zip(hidden, some[own], strict=True):
                    for i in rows[of_row]:
                        whole, first = options[i]  # in float32: in bfloat16 many answers would be equally likely
                        logits = F.linear(x[first - 1:len(whole) - 1].float(), self.network.lm_head.weight.float())
                        likely = logits[:, :self.tokenizer.n_vocab].log_softmax(-1)  # (n, V)
                        targets = torch.tensor(whole[first:], device=self.device)
                        scores[i] = likely.gather(1, targets[:, None]).sum().item()
                bar.update(len(tokens))
        bar.close()
        return scores

    def _padded(self, rows):
        tokens = np.full((len(rows), max(map(len, rows))), self.tokenizer.eot_token)
        for line, row in zip(tokens, rows, strict=True):
            line[:len(row)] = row
        return tokens

    def _retrieve(self, rows):
        """Neighbors (n, L, K, R) of the complete chunks of the rows, and their mask; or twice None."""
        if self.retriever is None:
            return None, None
        C = self.network.config.retrieval_chunk_size
        tokens = self._padded(rows)
        L = max(1, tokens.shape[1] // C)
        chunks = np.full((len(rows), L * C), self.tokenizer.eot_token)
        chunks[:, :tokens.shape[1]] = tokens[:, :L * C]
        complete = np.arange(1, L + 1) * C <= np.array([len(row) for row in rows])[:, None]  # (n, L)
        nowhere = np.zeros(complete.shape, dtype=np.int64)  # these chunks are of no document of the collection
        found = self.retriever.retrieve(chunks.reshape(len(rows), L, C), nowhere, ~complete, nowhere)
        return found.tokens, found.mask

    def _write(self, prompt):
        """What the model writes after the prompt, to the end of the line."""
        tokens, = self._fit(prompt, [''], self.network.config.block_size - WRITTEN)
        with self.context:
            whole = self.network.generate(torch.tensor([tokens], device=self.device), WRITTEN,
                                          neighbors_of(self.retriever, self.device, []), temperature=0,
                                          end_of_text=self.tokenizer.eot_token, vocabulary=self.tokenizer.n_vocab)
        written = [token for token in whole[0, len(tokens):].tolist() if token != self.tokenizer.eot_token]
        return self.tokenizer.decode(written).strip().partition('\n')[0]


def closed_answers(schema):
    """The answers that a schema allows, or None where it allows any."""
    annotation = schema.model_fields['answer'].annotation if schema and 'answer' in schema.model_fields else None
    return list(get_args(annotation)) if get_origin(annotation) is Literal else None


def answer_separator(prompt):
    """
    What stands between the end of a prompt ('Answer:') and its answer: what does so in the prompt's own examples, or a
    space.
    """
    last = str(prompt).rstrip().rpartition('\n')[2]
    found = re.search(re.escape(last) + r'(\s*)\S', str(prompt).rstrip()[:-1]) if last else None
    return found.group(1) if found else ' '


def read_answer(text, schema):
    """Written text as an instance of the schema; numbers are those that stand in it."""
    if schema is None:
        return text
    annotation = schema.model_fields['answer'].annotation
    numbers = list(dict.fromkeys(int(number) for number in re.findall(r'\d+', text)))  # DeepEval counts each
    if annotation is int:
        return schema(answer=numbers[0] if numbers else 0)
    if get_origin(annotation) is list:
        return schema(answer=numbers if get_args(annotation)[0] is int else [text])
    return schema(answer=text)


class Exam(DeepEvalBaseLLM):
    """Stands for the model while a benchmark runs: writes down what is asked, and gives the answers that there are."""

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
    """A benchmark whose data is here, and what it asks."""
    name: str
    benchmark: object  # DeepEval's
    exam: Exam
    data_dir: str

    def run(self, model, tokenizer, device, context, retriever, batch_size, show_progress=False):
        """Its scores, 0 to 1, and their standard errors: 'off', and with a retriever 'on'."""
        scores = dict(questions=0, chance=self.chance())
        for arm in ('on', 'off') if retriever else ('off',):
            examinee = RETROForDeepEval(model, tokenizer, device, context, retriever if arm == 'on' else None,
                                        batch_size, f'{self.name}, retrieval {arm}' if show_progress else None)
            answers = examinee.batch_generate(list(self.exam.asked.values()), [schema for _, schema in self.exam.asked])
            self.exam.answers = dict(zip(self.exam.asked, answers, strict=True))
            correct = self.ask()
            scores |= {arm: float(correct.mean()), f'{arm}_error': float(correct.std() / math.sqrt(len(correct))),
                       'questions': len(correct), 'shortened': examinee.shortened, 'cut': examinee.cut}
        return scores

    def ask(self):
        """Let DeepEval run it, and give what it made of each answer, (n,), 1 for a right one."""
        with benchmark_data(self.data_dir), examples_told_apart(self.benchmark), quiet():
            self.benchmark.evaluate(self.exam)
        correct = self.benchmark.predictions['Correct'].to_numpy(dtype=float)
        return correct / 100 if self.benchmark.predictions['Correct'].max() > 1 else correct  # TruthfulQA's MC2

    def chance(self):
        """The score of guessing; None where what can be guessed isn't known."""
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
    The setting multiple_choice_benchmarks as Benchmarks, by their names. UserError where one is unknown, its arguments
    are wrong, or its data can't be had.
    """
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
            raise UserError(f'the data of benchmark {name} can not be had ({type(error).__name__}: '
                            f'{str(error)[:200]}): on a machine that reaches the hub, python -m evaluation.benchmarks '
                            f'DIR {name} fetches it; copy DIR here and set benchmark_data_dir to it (it is '
                            f'{data_dir!r})') from error
        prepared.append(made)
    return prepared


def make_benchmark(name, arguments, data_dir):
    """DeepEval's object. Tasks and modes may be named by their enum's names or values."""
    cls = getattr(deepeval.benchmarks, name)
    takes = inspect.signature(cls.__init__).parameters
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
            arguments['tasks'] = [as_member(value) for value in arguments['tasks']]
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
        raise UserError(f'benchmark {name} does not take {arguments} ({error}): it takes '
                        f'{", ".join(key for key in takes if key not in ("self", "kwargs"))}') from error


def local_logiqa(data_dir, tasks):
    """Arguments for DeepEval's LogiQA where data_dir has its data, which DeepEval does not take from `datasets`."""
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
def examples_told_apart(benchmark):
    """Have a benchmark's prompts be Prompts: its template is asked for one example more at a time."""
    module = sys.modules[type(benchmark).__module__]
    template, = (value for name, value in vars(module).items() if name.endswith('Template'))
    original = template.generate_output

    def generate_output(input, **given):
        whole = Prompt(original(input=input, **given))
        if 'n_shots' in given:
            prefixes = [original(input=input, **given | dict(n_shots=n)) for n in range(given['n_shots'] + 1)]
        else:  # examples that are always there, with an empty line after each
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
    """DeepEval prints its scores and draws bars of its own."""
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
