"""
Runs tasks of lm-evaluation-harness on a trained model, with retrieval on and off (requirements-lm-eval.txt).

    python -m evaluation.lm_eval_adapter --out_dir=out/quickstart --tasks=logiqa,my/task.yaml --limit=100
    python -m evaluation.lm_eval_adapter run --model nanoretro --model_args out_dir=out/quickstart,retrieval=off \\
        --tasks logiqa                                                     # lm_eval's own command line

The first form writes lm_eval.json into out_dir: the scores by arm, as lm_eval tells them. The checkpoint holds its
settings; any of them can be overridden, e.g. --retrieval_milvus_uri=... A task whose data lies on this machine needs no
network: docs/evaluating.md shows one.
"""
import argparse
import logging
import math
import os
import sys
import warnings
from contextlib import ExitStack, closing

from system import autocast, is_device, pick_dtype

from configurator import UserError, check_range, reason_of, to_json, user_errors_as_one_line, visible, write_atomically
from data.conversations import find_template, render
from data.documents import as_unicode
from data.tokenizer import tokenize
from evaluation.likelihoods import log_likelihoods
from evaluation.report import make_folder
from generation.engine import Engine, Request
from generation.sampling import Sampling
from generation.sources import CollectionSource
from retrieval.retriever import Retriever
from training.checkpoint import load_checkpoint, load_run

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    with user_errors_as_one_line():
        raise UserError(f'lm-evaluation-harness cannot be imported ({reason_of(error)}): pip install -r '
                        f'requirements-lm-eval.txt') from error

MOST_TOKENS = 256  # of a generated text, where the task does not say


@register_model('nanoretro')
class RETROForLMEval(TemplateLM):
    """
    A checkpoint as lm_eval sees it. `out_dir`, `retrieval` ('on' or 'off') and settings of ours come from --model_args;
    without `retrieval` it is on if the model has it. `run` is what load_run gives, if that is loaded already.
    """

    def __init__(self, out_dir='out', retrieval=None, batch_size=None, device=None, max_batch_size=None, run=None,
                 retriever=None, **settings):
        super().__init__()
        if device and is_device(device):  # lm_eval names a GPU where there is none
            settings['device'] = device
        self.settings, self.encoding, self.network, self._device = run or load_run(
            out_dir, [f'--{key}={value}' for key, value in settings.items()])
        if retrieval not in (None, 'on', 'off'):
            raise UserError(f"retrieval is {retrieval!r}: give 'on' or 'off'")
        if retrieval == 'on' and not self.network.config.use_retrieval:
            raise UserError(f'the model in {out_dir!r} was trained without retrieval: leave out retrieval=on')
        self.retriever = retriever
        if retriever is None and self.network.config.use_retrieval and retrieval != 'off':
            self.retriever = Retriever(self.settings, self.encoding, self._device)
        self.batch_size = int(batch_size or self.settings.batch_size)
        self.max_length = self.network.config.block_size
        self.template = find_template(self.settings.template) if self.settings.template else None
        config = self.network.config
        self.align = config.retrieval_chunk_size if config.has_neighbors else 0
        self.prompts = {}  # conversations as texts, to their tokens as in the tuning, but for spaces that end them
        self.label = f'retrieval {"on" if self.retriever else "off"}'

    def context(self):
        return autocast(pick_dtype(self.settings.dtype, self._device), self._device)

    @property
    def eot_token_id(self):
        return self.encoding.eot_token

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.prompts.get(string) or self.encoding.encode_ordinary(string)

    def _encode_pair(self, context, continuation):
        if context not in self.prompts:
            return super()._encode_pair(context, continuation)
        spaces = context[len(context.rstrip(' ')):] if not continuation[:1].isspace() else ''
        answer = self.encoding.encode_ordinary(spaces + continuation)
        return self.fit(self.prompts[context], self.max_length + 1 - len(answer)), answer

    def fit(self, prompt, room):
        """The end of a conversation's tokens that has room, begun where a chunk does if the model has neighbors."""
        excess = max(0, len(prompt) - room)
        return prompt[excess + -excess % (self.align or 1):]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        options = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(f'the task has an answer of {len(continuation):,} tokens, and the block has '
                                f'{self.max_length}: use a model with a larger block_size')
            tokens = (context + continuation)[-(self.max_length + 1):]  # the last one is not read
            options.append((tokens, max(1, len(tokens) - len(continuation))))
        found = log_likelihoods(self.network, self.encoding, options, self._device, self.context(), self.retriever,
                                self.batch_size, None if disable_tqdm else self.label)
        for (request, *_), answer in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial('loglikelihood', request, answer)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        windows = []  # (number of the request, (None, context, continuation))
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows += [(number, (None, *make_disjoint_window(window))) for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1)]
        found = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        for (number, _), (log_likelihood, _) in zip(windows, scored, strict=True):
            found[number] += log_likelihood
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial('loglikelihood_rolling', request.args, answer)
        return found

    def generate_until(self, requests, disable_tqdm=False):
        engine = Engine(self.network, self.encoding, slots=self.batch_size)
        source = CollectionSource(self.retriever) if self.retriever else None
        rows, texts = [], {}
        for request in requests:
            prompt, given = request.args
            given = normalize_gen_kwargs(given, min(MOST_TOKENS, self.max_length // 2))
            until, most = given.get('until') or [], given['max_gen_toks']
            if most >= self.max_length:
                raise UserError(f'the task asks for {most} new tokens, and the block has {self.max_length}, for its '
                                f'prompts, too: set max_gen_toks in its generation_kwargs')
            stop, room = [until] if isinstance(until, str) else list(until), self.max_length - most
            if prompt in self.prompts:
                tokens, stop = self.fit(self.prompts[prompt], room), [*stop, *self.template.stop]
            else:
                tokens = self.tok_encode(prompt)[-room:]
            sampling = Sampling(temperature=given['temperature'], top_k=given.get('top_k', 0),
                                top_p=given.get('top_p', 1.0))
            rows.append(engine.add(Request(tokens or [self.prefix_token_id], most, sampling, stop=tuple(stop),
                                           align='start', source=source)))
            texts[id(rows[-1])] = ''
        with self.context():
            for event in engine.run():
                texts[id(event.row)] += event.text
        answers = [texts[id(row)] for row in rows]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial('generate_until', request.args, answer)
        return answers

    @property
    def tokenizer_name(self):
        """Another each time, as requests that lm_eval caches under it have texts, and not the tokens of `prompts`."""
        return f'nanoretro-{os.urandom(8).hex()}'

    def chat_template(self, chat_template=False):
        """What the results name."""
        return self.settings.template

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """
        The conversation as a text, in the template that the model was tuned with; `prompts` has its tokens. Without
        add_generation_prompt its last message is the beginning of the answer.
        """
        if not self.template:
            raise UserError('the model was not tuned on conversations, so it has no chat template: leave out '
                            '--apply_chat_template')
        messages = list(chat_history)
        begun = '' if add_generation_prompt else messages.pop()['content'].lstrip()
        tokens = render(self.template, messages, self.encoding, align=self.align)[0].tolist()
        answer = self.template.answer
        text = as_unicode(answer[len(answer.rstrip(' ')):] + begun)
        stem = text.rstrip(' ')  # spaces that end it go to what follows
        tokens += tokenize(stem, self.encoding).tolist()
        text = self.encoding.decode([t for t in tokens if t != self.encoding.eot_token]) + text[len(stem):]
        self.prompts[text] = tokens
        return text

    def close(self):
        if self.retriever:
            self.retriever.close()


def parse_arguments():
    parser = argparse.ArgumentParser(prog='python -m evaluation.lm_eval_adapter', description=__doc__,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out_dir', default='out', help='out_dir of the run, or the folder of a checkpoint (default: %(default)s)')
    add('--tasks', required=True, help='names of tasks, or paths of YAML files that describe them, separated by commas')
    add('--include_path', metavar='DIR', help='a folder with more tasks')
    add('--retrieval', choices=('on', 'off'), help='on or off alone (default: both, if the model has retrieval)')
    add('--num_fewshot', type=int, help="examples before each question (default: the task's)")
    add('--limit', type=int, help='the first questions of each task alone')
    add('--apply_chat_template', action='store_true', help='ask in the template that the model was tuned with')
    add('--results', metavar='DIR', help='folder for the results (default: out_dir)')
    arguments, overrides = parser.parse_known_args()
    for name, least in (('num_fewshot', 0), ('limit', 1)):
        if getattr(arguments, name) is not None:
            check_range(f'--{name}', getattr(arguments, name), least, math.inf)
    return arguments, overrides


def main(cleanup):
    arguments, overrides = parse_arguments()
    step = load_checkpoint(arguments.out_dir).step
    run = settings, tokenizer, model, device = load_run(arguments.out_dir, overrides)
    if arguments.retrieval == 'on' and not model.config.use_retrieval:
        raise UserError(f'the model in {arguments.out_dir!r} was trained without retrieval: leave out --retrieval=on, '
                        f'or name the out_dir of a RETRO')
    if arguments.apply_chat_template and not settings.template:
        raise UserError('the model was not tuned on conversations, so it has no chat template: leave out '
                        '--apply_chat_template')
    arms = ([arguments.retrieval] if arguments.retrieval else ['on', 'off']) if model.config.use_retrieval else ['off']
    tasks, manager = find_tasks(arguments)
    results = make_folder(arguments.results or arguments.out_dir)
    retriever = None
    if 'on' in arms:
        retriever = cleanup.enter_context(closing(Retriever(settings, tokenizer, device,
                                                            show_progress=sys.stderr.isatty())))
    report = dict(out_dir=arguments.out_dir, step=step, lm_eval=lm_eval.__version__)
    for arm in arms:
        examinee = RETROForLMEval(arguments.out_dir, arm, run=run, retriever=retriever if arm == 'on' else None)
        try:
            found = lm_eval.simple_evaluate(
                examinee, tasks=tasks, task_manager=manager, num_fewshot=arguments.num_fewshot, limit=arguments.limit,
                apply_chat_template=arguments.apply_chat_template, log_samples=False)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # of tasks, their data, and the hub: many unrelated classes
            raise UserError(f'lm_eval cannot run {arguments.tasks} ({reason_of(error, 300)}): see whether the data of '
                            f'the task can be reached, and what its YAML file says') from error
        report[arm] = dict(results=found['results'], n_shot=found['n-shot'],
                           questions={task: n['effective'] for task, n in found['n-samples'].items()},
                           versions=found['versions'])
    write_atomically(to_json(report, indent=1, default=str) + '\n', f'{results}/lm_eval.json')
    print(f'{visible(table(report, arms))}\n\nlm_eval.json is in {results}')


def table(report, arms):
    """The scores as text for the terminal."""
    lines = [f'{"":<44}' + ''.join(f'{f"retrieval {arm}":>22}' for arm in arms)]
    for task, scores in report[arms[0]]['results'].items():
        for key in scores:
            metric, comma, kept = key.partition(',')  # the filter that an answer went through
            if not comma or metric.endswith('_stderr'):
                continue
            name = f'{task}, {metric}' + f' ({kept})' * (kept != 'none')
            cells = []
            for arm in arms:
                value, error = (report[arm]['results'][task].get(k) for k in (key, f'{metric}_stderr,{kept}'))
                cells.append(f'{value:.4f}' + (f' ± {error:.4f}' if isinstance(error, float) else ''))
            lines.append(f'{name:<44}' + ''.join(f'{cell:>22}' for cell in cells))
    return '\n'.join(lines)


def find_tasks(arguments):
    """The names of the tasks, or the paths of their YAML files, and the TaskManager that knows them."""
    names = [name.strip() for name in arguments.tasks.split(',') if name.strip()]
    if arguments.include_path and not os.path.isdir(arguments.include_path):
        raise UserError(f'--include_path {arguments.include_path!r} is no folder: name the one with the YAML files')
    manager = TaskManager(include_path=arguments.include_path)
    for name in names:
        if name.endswith(('.yaml', '.yml')) and not os.path.isfile(name):
            raise UserError(f'no file {name!r}: give the path of a YAML file that describes a task, or the name of a '
                            f'task')
        if not name.endswith(('.yaml', '.yml')) and not manager.match_tasks([name]):
            raise UserError(f'lm_eval has no task {name!r}: python -m evaluation.lm_eval_adapter ls tasks lists them; '
                            f'--include_path names a folder with others')
    if not names:
        raise UserError('--tasks is empty: name some')
    return [os.path.abspath(name) if os.path.isfile(name) else name for name in names], manager


if __name__ == '__main__':
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='lm_eval')
    with user_errors_as_one_line(), ExitStack() as cleanup:
        if sys.argv[1:2] in (['run'], ['ls'], ['validate']):
            from lm_eval.__main__ import cli_evaluate
            cli_evaluate()
        else:
            main(cleanup)
