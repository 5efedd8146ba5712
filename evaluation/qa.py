"""
Asks a trained model questions, with retrieval on and off, and compares its answers with gold ones: exact match, F1,
ROUGE-L, and the bits that a byte of the gold answer takes.

    python -m evaluation.qa --out_dir=out/sft --data=nq/NQ-open.dev.jsonl
    python -m evaluation.qa --out_dir=out/sft --data=data/docstrings/val.jsonl --passages=collection --max_questions=200
    python -m evaluation.qa --out_dir=out/gpt --data=squad/dev-v2.0.json --passages=file --template=plain

--data is SQuAD, Natural Questions, TriviaQA as they are published, or question, answers and ctxs (evaluation/
questions.py). Writes answers.jsonl, questions.json and questions.html into out_dir. The checkpoint holds its settings,
template and passages among them; any of them can be overridden, e.g. --retrieval_milvus_uri=... or --num_passages=5.
"""
import argparse
import math
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing

from system import autocast, keep_freed_memory, pick_dtype

import numpy as np
from tqdm import tqdm

from configurator import (
    UserError,
    as_plain,
    check_range,
    to_json,
    user_errors_as_one_line,
    visible,
    write_atomically,
)
from data.conversations import cut_passages, find_template, render
from data.tokenizer import token_byte_counts
from evaluation.figures import ARMS, figure, interval
from evaluation.losses import bits_per_byte, bootstrap
from evaluation.questions import read_questions
from evaluation.report import FIGURES, describe_questions, make_folder, write_questions
from evaluation.scores import SCORES, scores
from generation.engine import Engine, Request
from generation.sampling import Sampling
from generation.sources import CollectionSource, PassageSource
from retrieval.passages import PassageFinder
from retrieval.retriever import Retriever
from training.checkpoint import load_checkpoint, load_run


def parse_arguments():
    parser = argparse.ArgumentParser(prog='python -m evaluation.qa', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out_dir', default='out', help='out_dir of the run, or the folder of a checkpoint (default: %(default)s)')
    add('--data', metavar='FILE', required=True, help='the questions: .json, .jsonl, .parquet, or a dataset of the hub')
    add('--passages', choices=('none', 'file', 'collection'), help='what each question is answered with: nothing, the '
        'passages of the file, or those retrieved for it, of which none is of its own document (default: as it was '
        'tuned)')
    add('--passages_as', choices=('prompt', 'neighbors'), help='text before the question, or neighbors of the model, '
        'which it attends to or points into (default: as it was tuned, else prompt)')
    add('--template', help="the conversations': instructretro, plain, or a text with {system}, {user}, {assistant} "
        "(default: the checkpoint's, else plain)")
    add('--source', help='source of the documents that the questions name in the field document (default: that of the '
        "run's datasets)")
    add('--retrieval', choices=('on', 'off'), help='on or off alone (default: both, if the model has retrieval)')
    add('--max_questions', type=int, default=0, help='a random choice of so many, the same every time; 0: all '
        '(default: %(default)s)')
    add('--max_new_tokens', type=int, default=64, help='tokens of an answer (default: %(default)s)')
    add('--temperature', type=float, default=0.0, help='0: the likeliest token (default: %(default)s)')
    add('--stop', action='append', default=[], metavar='TEXT', help="end answers before this text, too, beside the "
        "template's own; can be repeated")
    add('--shown', type=int, default=12, help='questions of each kind that the page shows (default: %(default)s)')
    add('--results', metavar='DIR', help='folder for the results (default: out_dir)')
    arguments, overrides = parser.parse_known_args()
    for name, least in (('max_questions', 0), ('max_new_tokens', 1), ('temperature', 0), ('shown', 0)):
        check_range(f'--{name}', getattr(arguments, name), least, math.inf)
    return arguments, overrides


def main(cleanup):
    arguments, overrides = parse_arguments()
    step = load_checkpoint(arguments.out_dir).step
    settings, tokenizer, model, device = load_run(arguments.out_dir, overrides)
    if arguments.max_new_tokens >= model.config.block_size:
        raise UserError(f'--max_new_tokens is {arguments.max_new_tokens}, and the block has {model.config.block_size} '
                        f'tokens, for the question, too: use less')
    template = find_template(arguments.template or settings.template or 'plain')
    if not (arguments.template or settings.template):
        say('the model was not tuned on conversations: questions are asked in the template plain; --template names '
            'another')
    passages = arguments.passages or (settings.passages_from if settings.passages else 'none')
    passages_as = arguments.passages_as or settings.passages or 'prompt'
    if arguments.passages_as and passages == 'none':
        raise UserError(f'--passages_as={arguments.passages_as} is given, and no passages: leave it out, or give '
                        f'--passages=file or --passages=collection')
    as_neighbors = passages != 'none' and passages_as == 'neighbors'
    arms = choose_arms(arguments, model.config, as_neighbors)
    results = make_folder(arguments.results or arguments.out_dir)
    questions, left_out = read_data(arguments, settings)
    total = len(questions)
    if 0 < arguments.max_questions < total:
        chosen = sorted(random.Random(0).sample(range(total), arguments.max_questions))
        questions = [questions[i] for i in chosen]

    started = time.perf_counter()
    notes = [f'{count:,} {reason} left out' for reason, count in left_out.items()]
    finder = retriever = None
    if passages == 'collection':
        finder = cleanup.enter_context(closing(PassageFinder(settings, tokenizer, say, device)))
    if 'on' in arms and not as_neighbors:
        retriever = cleanup.enter_context(closing(Retriever(
            settings.replace(retrieval_cache_gb=0.0), tokenizer, device, show_progress=sys.stderr.isatty())))
    if finder or retriever:
        notes += describe_own_documents(questions, (finder or retriever).knowledge_base)
    given = choose_passages(questions, passages, settings.num_passages, finder)
    if passages != 'none' and not any(given):
        where = 'the file has none (ctxs, or context)' if passages == 'file' else 'the collection gave none'
        raise UserError(f'--passages={passages}, and {where}: use --passages=none, or another of the choices')

    keep_freed_memory()
    asked, counts = [], Counter()
    for i, question in enumerate(questions):
        prompt, gold, read = ask(question, [] if as_neighbors else given[i], template, tokenizer, model.config,
                                 arguments.max_new_tokens, counts)
        asked.append((prompt, gold))
        given[i] = given[i] if as_neighbors else read
    sources = {'off': [None] * len(questions)}
    if 'on' in arms:
        sources['on'] = make_sources(questions, given, as_neighbors, model.config, tokenizer, retriever, counts)
    notes += describe_cuts(counts, model.config)
    for note in notes:
        say(note)
    answered = {}
    with autocast(pick_dtype(settings.dtype, device), device):
        for arm in arms:
            answered[arm] = answer(model, tokenizer, settings.batch_size, asked, sources[arm], arguments,
                                   template.stop, f'answering, retrieval {arm}')
    byte_counts = token_byte_counts(tokenizer)
    lines = [describe(question, found, prompt, {arm: answered[arm][i] for arm in arms}, byte_counts)
             for i, (question, found, prompt) in enumerate(zip(questions, given, asked, strict=True))]
    report = dict(out_dir=arguments.out_dir, step=step, data=arguments.data, template=template.name, passages=passages,
                  passages_as=passages_as if passages != 'none' else None,
                  num_passages=settings.num_passages if passages != 'none' else 0,
                  max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
                  questions=len(questions), of=total, notes=notes)
    report |= summarize(questions, lines, arms)
    report['seconds'] = time.perf_counter() - started

    write_atomically(''.join(to_json(line) + '\n' for line in lines), f'{results}/answers.jsonl')
    write_atomically(to_json(report, indent=1) + '\n', f'{results}/questions.json')
    write_questions(f'{results}/questions.html', report, lines, arguments.shown)
    print(f'{table(report, arms)}\n\nanswers.jsonl, questions.json and questions.html are in {results}')


def say(text):
    print(visible(text), file=sys.stderr)


def choose_arms(arguments, config, as_neighbors):
    """'on' and 'off', those that are wanted. UserError for what the model cannot do."""
    if not config.use_retrieval:
        if arguments.retrieval == 'on':
            raise UserError(f'the model in {arguments.out_dir!r} was trained without retrieval: leave out '
                            f'--retrieval=on, or name the out_dir of a RETRO')
        if as_neighbors:
            raise UserError('the passages are to be neighbors, and the model is a GPT, which reads none: use '
                            '--passages_as=prompt')
        return ['off']
    return [arguments.retrieval] if arguments.retrieval else ['on', 'off']


def read_data(arguments, settings):
    """The Questions of --data, and what was left out. UserError if nobody says which source their documents have."""
    sources = {entry.get('source', '') if isinstance(entry, dict) else ''
               for entry in as_plain(settings.train_datasets)}
    source = arguments.source if arguments.source is not None else min(sources, default='')
    questions, left_out = read_questions(arguments.data, source)
    if len(sources) > 1 and arguments.source is None and any(question.document for question in questions):
        raise UserError(f'the train_datasets of the run have several sources '
                        f'({", ".join(map(repr, sorted(sources)))}): name that of the documents that the questions are '
                        f'about in --source')
    return questions, left_out


def describe_own_documents(questions, knowledge_base):
    """Notes on the documents that the questions are about: whether the collection knows them."""
    named = {question.doc_id for question in questions if question.doc_id}
    if not named:
        return []
    known = knowledge_base.which_documents(dict.fromkeys(named, 0))
    note = (f'{len(known):,} of the {len(named):,} documents that the questions name stand in the collection; a '
            f'question reads nothing of its own')
    return [note if known else f'{note}; if they do stand there, --source is not theirs']


def choose_passages(questions, passages, most, finder):
    """For each of the questions a list of Passages."""
    if passages == 'none':
        return [[] for _ in questions]
    if passages == 'file':
        return [question.passages[:most] for question in questions]
    return finder.find([question.text for question in questions], [question.doc_id for question in questions])


def ask(question, passages, template, tokenizer, config, max_new_tokens, counts):
    """
    The prompt of a question and the first gold answer after it, two lists of tokens, and the Passages that the prompt
    has. If it leaves no room for an answer in the block, passages are cut and left out from the last on; then the
    question loses its beginning.
    """
    align = config.retrieval_chunk_size if config.has_neighbors else 0
    room = config.block_size - max_new_tokens
    whole = passages
    while True:
        prompt, _ = render(template, question.messages, tokenizer, passages, align)
        excess = len(prompt) - room
        if excess <= 0 or not passages:
            break
        passages = cut_passages(passages, excess, tokenizer)
    counts['cut passages'] += passages is not whole
    if excess > 0:
        counts['cut questions'] += 1
        excess += -excess % (align or 1)
    prompt = prompt.tolist()
    gold = []
    if question.golds[0].strip():
        said = [*question.messages, dict(role='assistant', content=question.golds[0])]
        tokens, _ = render(template, said, tokenizer, passages, align)
        gold = tokens[len(prompt):].tolist()
    return prompt[max(0, excess):], gold, passages


def make_sources(questions, given, as_neighbors, config, tokenizer, retriever, counts):
    """For each question what the model retrieves from: the collection, or the passages as neighbors."""
    if not as_neighbors:
        shared = {}  # questions about one document are looked up together
        return [shared.setdefault(question.doc_id, CollectionSource(retriever, question.doc_id))
                for question in questions]
    most = config.retrieval_k_neighbors if config.has_neighbors else None
    sources = []
    for passages in given:
        counts['passages left out'] += bool(passages[most:] if most else ())
        sources.append(PassageSource(config, tokenizer, [p.text for p in passages[:most]]) if passages else None)
        counts['long passages'] += bool(sources[-1] and sources[-1].cut)
    return sources


def describe_cuts(counts, config):
    """Notes on what did not fit."""
    texts = {'cut questions': f'questions are longer than the block of {config.block_size} tokens leaves room for, and '
                              f'lost their beginning',
             'cut passages': f'questions had passages cut or left out, to fit the block of {config.block_size} tokens',
             'passages left out': f'questions have more passages than the model reads, {config.retrieval_k_neighbors} '
                                  f'(retrieval_k_neighbors)',
             'long passages': f'questions have passages of more than {2 * config.retrieval_chunk_size} tokens, of '
                              f'which the first are read'}
    return [f'{counts[key]:,} {text}' for key, text in texts.items() if counts[key]]


def answer(model, tokenizer, slots, asked, sources, arguments, stop, label):
    """For each of the prompts the answer, and the nats of the gold answer's tokens, (n,), as [(text, nats)]."""
    engine = Engine(model, tokenizer, slots=slots)
    sampling, stop = Sampling(temperature=arguments.temperature), (*stop, *arguments.stop)
    texts, nats, following = [''] * len(asked), [[] for _ in asked], 0
    written, scored = {}, {}  # rows, to the numbers of their questions
    bar = tqdm(total=len(asked), unit='question', desc=label, dynamic_ncols=True, disable=None)
    while following < len(asked) or engine.rows or engine.waiting:
        while following < len(asked) and len(engine.waiting) < slots:  # sources and scores take memory
            prompt, gold = asked[following]
            given = dict(align='start', source=sources[following])
            written[engine.add(Request(prompt, arguments.max_new_tokens, sampling, stop=stop, **given))] = following
            if gold:
                scored[engine.add(Request(prompt + gold, 1, sampling, logprobs=0, scores_prompt=True, **given)
                                  )] = following
            following += 1
        try:
            events = engine.step()
        except FloatingPointError as error:
            raise UserError(f'{error}: ask an earlier checkpoint, or pass --dtype=float32') from error
        for event in events:
            if event.row in written:
                texts[written[event.row]] += event.text
        for row in [row for row in written if row.finish_reason]:
            written.pop(row)
            bar.update()
        for row in [row for row in scored if row.finish_reason]:
            number = scored.pop(row)
            nats[number] = [-logprob for logprob, _ in row.prompt_scores[-len(asked[number][1]):]]
    bar.close()
    return [(text.strip(), values) for text, values in zip(texts, nats, strict=True)]


def describe(question, passages, asked, answered, byte_counts):
    """A line of answers.jsonl. `asked` are the tokens of the prompt and of the gold answer, `answered` as answer()."""
    line = dict(id=question.id, question=question.text, answers=question.golds)
    if question.document:
        line['document'] = question.document
    if passages:
        line['passages'] = [dict(title=passage.title, text=passage.text) for passage in passages]
    line['bytes'] = sum(byte_counts[token] for token in asked[1])
    for arm, (text, nats) in answered.items():
        line[arm] = dict(answer=text) | scores(text, question.golds) | dict(bits=sum(nats) / math.log(2))
    return line


def summarize(questions, lines, arms):
    """
    The mean scores, by arm, and their differences, with 95 % intervals; questions about one document are resampled
    together.
    """
    documents = np.unique([question.document or f'\0{i}' for i, question in enumerate(questions)],
                          return_inverse=True)[1]
    size = np.array([line['bytes'] for line in lines], dtype=np.float64)
    ones = np.ones(len(lines))
    report = dict(bytes=int(size.sum()))
    for name in SCORES:
        values = {arm: np.array([line[arm][name] for line in lines]) for arm in arms}
        if len(arms) == 2:
            values['gain'] = values['on'] - values['off']
        for arm, value in values.items():
            report[f'{name}_{arm}'] = float(value.mean())
            report[f'{name}_{arm}_interval'] = bootstrap(lambda total, count: total / count, documents, value, ones)
    bits = {arm: np.array([line[arm]['bits'] for line in lines]) for arm in arms}
    for arm in arms:
        report[f'bpb_{arm}'] = bits_per_byte(bits[arm] * math.log(2), size)
        report[f'bpb_{arm}_interval'] = bootstrap(lambda total, count: total / count, documents, bits[arm], size)
    if len(arms) == 2 and size.sum():
        report['bpb_gain'] = report['bpb_on'] - report['bpb_off']
        report['bpb_gain_interval'] = bootstrap(lambda on, off, count: (on - off) / count, documents, bits['on'],
                                                bits['off'], size)
    return report


def table(report, arms):
    """The scores as text for the terminal."""
    lines = [describe_questions(report), '', f'{"":<34}' + ''.join(f'{ARMS[arm]:>20}' for arm in arms)
             + f'{"on - off (95% interval)":>34}' * (len(arms) == 2)]
    for name, title in FIGURES.items():
        style = '{:.4f}' if name == 'bpb' else '{:.1%}'
        lines.append(f'{title:<34}' + ''.join(f'{figure(report[f"{name}_{arm}"], style):>20}' for arm in arms) + (
            f'{figure(report.get(f"{name}_gain"), style)} ({interval(report.get(f"{name}_gain_interval"), style)})'
            ).rjust(34) * (len(arms) == 2))
        lines.append(f'{"  95% interval":<34}' + ''.join(
            f'{interval(report[f"{name}_{arm}_interval"], style):>20}' for arm in arms))
    return '\n'.join(lines)


if __name__ == '__main__':
    with user_errors_as_one_line(), ExitStack() as cleanup:
        main(cleanup)
