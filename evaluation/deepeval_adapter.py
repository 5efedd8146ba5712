"""
DeepEval's view of a model: RETROForDeepEval answers its prompts. Where a question has a closed set of answers, the
model's answer is the likeliest of them. Open answers are generated.
"""
import contextlib
import re
from typing import Literal, get_args, get_origin

import numpy as np
from deepeval.models import DeepEvalBaseLLM
from tqdm import tqdm

from data.chunking import hash64
from evaluation.likelihoods import log_likelihoods
from generation.engine import Engine, Request
from generation.sampling import Sampling
from generation.sources import CollectionSource

WRITTEN_TOKENS = 32  # at most, of an answer that is written


class Prompt(str):
    """A prompt and its parts: what precedes the examples, the examples, and the question."""
    parts = ('', (), None)


class RETROForDeepEval(DeepEvalBaseLLM):
    """
    Answers a prompt in the schema of its answer (a pydantic model, or None for text). With a retriever it reads the
    neighbors of each complete chunk of the prompt. It counts the prompts that were too long: `shortened` ones lost
    examples, `cut` ones the beginning of their question, which alone was longer than the block.
    """

    def __init__(self, model, tokenizer, device='cpu', context=None, retriever=None, batch_size=8, label=None,
                 check_stop=lambda: None):
        self.network, self.tokenizer, self.device, self.retriever = model, tokenizer, device, retriever
        self.context = context or contextlib.nullcontext()
        self.batch_size, self.label, self.check_stop = batch_size, label, check_stop  # it raises to end a benchmark
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
        """The answers: instances of the schemas, or text where the schema is None."""
        self.network.eval()
        schemas = schemas or [None] * len(prompts)
        answers = [None] * len(prompts)
        closed = [i for i, schema in enumerate(schemas) if closed_answers(schema)]
        for i, answer in zip(closed, self._choose([(prompts[i], closed_answers(schemas[i])) for i in closed]),
                             strict=True):
            answers[i] = schemas[i](answer=answer)
        is_open = [i for i in range(len(prompts)) if answers[i] is None]
        for i in tqdm(is_open, desc=self.label, disable=None if self.label and is_open else True, leave=False):
            self.check_stop()
            answers[i] = read_answer(self._write(prompts[i]), schemas[i])
        return answers

    def _choose(self, questions):
        """
        The likeliest answer to each of the questions, pairs of a prompt and its answers. Ties are broken by a hash of
        the prompt, so that an uninformed model scores at chance, instead of always choosing one letter.
        """
        options = []  # (tokens, index of the first that is scored)
        for prompt, answers in questions:
            encoded = self._fit(prompt, [answer_separator(prompt) + answer for answer in answers],
                                self.network.config.block_size + 1)  # the last token is not read
            shortest = min(map(len, encoded))
            common = next((i for i, column in enumerate(zip(*encoded, strict=False)) if len(set(column)) > 1), shortest)
            options += [(tokens, min(common, shortest - 1)) for tokens in encoded]
        scored = log_likelihoods(self.network, self.tokenizer, options, self.device, self.context, self.retriever,
                                 self.batch_size, self.label, self.check_stop)
        scores, chosen = iter([score for score, _ in scored]), []
        for prompt, answers in questions:
            likelihoods = np.array([next(scores) for _ in answers])
            likeliest = np.flatnonzero(likelihoods >= likelihoods.max() - 1e-6)
            chosen.append(answers[likeliest[hash64(prompt) % len(likeliest)]])
        return chosen

    def _fit(self, prompt, answers, room):
        """
        The tokens of the prompt with each of the answers. If they are more than `room`, the prompt loses whole examples
        from the front, then what precedes the examples, and at last the beginning of its question.
        """
        before, examples, question = getattr(prompt, 'parts', Prompt.parts)
        shorter = [before + ''.join(examples[i:]) + question for i in range(1, len(examples) + 1)] + [question] \
            if question is not None else []
        for number, text in enumerate([str(prompt), *shorter]):
            encoded = self._encode(text.rstrip(), answers)
            if max(map(len, encoded)) <= room:
                self.shortened += number > 0 and len(examples) > 0
                return encoded
        self.shortened += len(examples) > 0
        self.cut += 1
        spare = max(map(len, encoded)) - room
        return [tokens[spare:] for tokens in encoded]

    def _encode(self, text, answers):
        """
        The tokens of the text with each of the answers. If they differ in number, the answers are tokenized by
        themselves: if ' A' is one token and ' B' two, A would be likelier for that alone.
        """
        encode = self.tokenizer.encode_ordinary
        encoded = [encode(text + answer) for answer in answers]
        if len(set(map(len, encoded))) > 1:
            gap = answers[0][:len(answers[0]) - len(answers[0].lstrip())]
            encoded = [encode(text + gap) + encode(answer[len(gap):]) for answer in answers]
        return encoded

    def _write(self, prompt):
        """What the model writes after the prompt, up to the end of the line."""
        tokens, = self._fit(prompt, [''], self.network.config.block_size - WRITTEN_TOKENS)
        engine = Engine(self.network, self.tokenizer, slots=1)
        source = CollectionSource(self.retriever) if self.retriever else None
        row = engine.add(Request(tokens, WRITTEN_TOKENS, Sampling(temperature=0), align='start', source=source))
        with self.context:
            list(engine.run())
        written = [token for token in row.new_tokens if token != self.tokenizer.eot_token]
        return self.tokenizer.decode(written).strip().partition('\n')[0]


def closed_answers(schema):
    """The answers that a schema allows, or None if it allows any."""
    annotation = schema.model_fields['answer'].annotation if schema and 'answer' in schema.model_fields else None
    return list(get_args(annotation)) if get_origin(annotation) is Literal else None


def answer_separator(prompt):
    """
    What separates the end of a prompt ('Answer:') from its answer in the prompt's own examples; else a space.
    """
    last_line = str(prompt).rstrip().rpartition('\n')[2]
    match = re.search(re.escape(last_line) + r'(\s*)\S', str(prompt).rstrip()[:-1]) if last_line else None
    return match.group(1) if match else ' '


def read_answer(text, schema):
    """Written text as an instance of the schema; numbers are those found in it."""
    if schema is None:
        return text
    annotation = schema.model_fields['answer'].annotation
    numbers = list(dict.fromkeys(int(number) for number in re.findall(r'\d+', text)))  # unique: DeepEval counts each
    if annotation is int:
        return schema(answer=numbers[0] if numbers else 0)
    if get_origin(annotation) is list:
        return schema(answer=numbers if get_args(annotation)[0] is int else [text])
    return schema(answer=text)
