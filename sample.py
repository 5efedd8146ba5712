"""
Prompts a trained model, which retrieves live while it writes, and shows what it retrieved.

    python sample.py --out_dir=out/quickstart --start="import numpy" --show_neighbors    # and the pointers' sources
    python sample.py --out_dir=out/quickstart --start=FILE:prompt.txt --num_samples=3 --max_new_tokens=200
    python sample.py --out_dir=out/quickstart --interactive
    python sample.py --out_dir=out/quickstart --prompts=prompts.jsonl --json > texts.jsonl
    python sample.py --out_dir=out/quickstart --start="The rule is" --neighbors="a passage" --neighbors=FILE:another.txt
    python sample.py --out_dir=out/sft --chat                                   # with a model that sft.py has tuned

A tuned model is asked: a prompt is a user's turn, in the checkpoint's template, and what is printed is the answer.
--template= (with nothing behind it) lets it continue the text as it stands.
The checkpoint holds its settings. To reach its knowledge base elsewhere, give --retrieval_milvus_uri=..., and
MILVUS_TOKEN in the environment.
"""
import argparse
import contextlib
import json
import math
import sys

from configurator import RANGES, UserError, check_range, user_errors_as_one_line, visible
from data.conversations import Passage
from generation.chat import Chat, Prompt, TooLong
from generation.engine import Engine, Request
from generation.origins import named_runs
from generation.sampling import Sampling
from generation.sources import CollectionSource, PassageSource
from retrieval.knowledge_base import SCORES, describe_score
from retrieval.passages import PassageFinder
from retrieval.retriever import Retriever
from training.checkpoint import load_pretrained, load_run

BATCH = 8  # samples that are written together


def read_text(text, option):
    """The text itself, or that of FILE:path."""
    if text.startswith('FILE:'):
        path = text[len('FILE:'):]
        try:
            with open(path, encoding='utf-8') as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{option}: file {path!r} cannot be read ({getattr(error, "strerror", None) or error}): '
                            f'give {option}=FILE: and the path of a text file') from error
        if not text.strip():
            raise UserError(f'{option}: file {path!r} is empty: write some text into it')
    if not text:
        raise UserError(f'{option} is empty: give some text, or FILE: and the path of a text file')
    return text.encode('utf-8', 'replace').decode()  # lone surrogates, of bytes that are no UTF-8


def read_prompts(path):
    """The prompts of a JSONL file, an object with "prompt" in each line."""
    prompts = []
    try:
        with open(path, encoding='utf-8') as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    entry = json.loads(line)
                    if not isinstance(entry, dict) or not isinstance(entry.get('prompt'), str) or not entry['prompt']:
                        raise ValueError(f'line {number} has no text in "prompt"')
                    prompts.append(entry['prompt'].encode('utf-8', 'replace').decode())
    except (OSError, ValueError) as error:
        raise UserError(f'--prompts: {path!r} cannot be read ({getattr(error, "strerror", None) or error}): name a '
                        f'file with {{"prompt": "text"}} in each line') from error
    if not prompts:
        raise UserError(f'--prompts: {path!r} is empty: write {{"prompt": "text"}} into its lines')
    return prompts


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add('--out_dir', default='out', help='out_dir of the run, or the folder of a checkpoint (default: %(default)s)')
    add('--init_from', default='', help='instead of an out_dir a GPT-2: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a '
        'folder that transformers saved')
    add('--start', help='the prompt, or FILE: and the path of one (default: a line end)')
    add('--prompts', metavar='FILE', help='several prompts: a file with {"prompt": "text"} in each line')
    add('--interactive', action='store_true', help='read prompts from the terminal, a line each, until Ctrl-D')
    add('--chat', action='store_true', help='talk with a tuned model, which remembers what was said; /new begins anew')
    add('--system', metavar='TEXT', help="the system message for a tuned model, or FILE: and its path (default: the "
        "template's)")
    add('--num_samples', type=int, default=1, help='samples of each prompt (default: %(default)s)')
    add('--max_new_tokens', type=int, default=256, help='tokens per sample (default: %(default)s)')
    add('--temperature', type=float, default=0.8, help='0: the likeliest token (default: %(default)s)')
    add('--top_k', type=int, default=200, help='of the k likeliest; 0: of all (default: %(default)s)')
    add('--top_p', type=float, default=1.0, help='of the likeliest that have this probability (default: %(default)s)')
    add('--min_p', type=float, default=0.0,
        help='of those that are at least this times as likely as the likeliest (default: %(default)s)')
    add('--repetition_penalty', type=float, default=1.0,
        help='makes tokens that have occurred less likely; 1: no penalty (default: %(default)s)')
    add('--stop', action='append', default=[], metavar='TEXT', help='end before this text; can be repeated')
    add('--seed', type=int, default=1337, help='random seed (default: %(default)s)')
    add('--retrieval', choices=('on', 'off'), default='on', help='off: without neighbors and pointers (default: on)')
    add('--neighbors', action='append', default=[], metavar='TEXT',
        help="a passage to read in place of the collection's, or FILE: and its path; can be repeated")
    add('--align', choices=('prompt', 'start'), help='prompt: chunks, which retrieve, end where the prompt does; '
        'start: they begin there, as in training (default: prompt; a tuned model is asked as it was tuned)')
    add('--drafts', choices=('on', 'off'), default='on', help='check several tokens at a time that the index proposes: '
        'the same text, sooner (default: on)')
    add('--show_neighbors', action='store_true', help='print what each chunk retrieved, and where the tokens that '
        'pointers named were found')
    add('--json', action='store_true', help='print a JSON object per sample')
    arguments, overrides = parser.parse_known_args()
    for name, least, below in (('num_samples', 1, math.inf), ('max_new_tokens', 1, math.inf),
                               ('temperature', 0, math.inf), ('top_k', 0, math.inf), ('seed', *RANGES['seed'])):
        check_range(f'--{name}', getattr(arguments, name), least, below)
    if not 0 < arguments.top_p <= 1:
        raise UserError(f'--top_p is {arguments.top_p}: give a probability above 0, up to 1')
    if not 0 <= arguments.min_p <= 1:
        raise UserError(f'--min_p is {arguments.min_p}: give a share from 0 to 1')
    if not 0 < arguments.repetition_penalty < math.inf:
        raise UserError(f'--repetition_penalty is {arguments.repetition_penalty}: give a number above 0, such as 1.2')
    if sum([arguments.start is not None, arguments.prompts is not None, arguments.interactive, arguments.chat]) > 1:
        raise UserError('--start, --prompts, --interactive and --chat exclude each other: give one of them')
    if arguments.chat and arguments.num_samples > 1:
        raise UserError(f'--num_samples is {arguments.num_samples}, and --chat goes on from one answer: leave it out')
    if arguments.neighbors and arguments.retrieval == 'off':
        raise UserError('--neighbors are given, and --retrieval=off reads none: leave out one of the two')
    return arguments, overrides


def main():
    arguments, overrides = parse_arguments()
    own = [read_text(text, '--neighbors') for text in arguments.neighbors]
    system = [] if arguments.system is None else [dict(role='system', content=read_text(arguments.system, '--system'))]
    reads_lines = arguments.interactive or arguments.chat
    prompts = read_prompts(arguments.prompts) if arguments.prompts else []
    if arguments.start is not None:
        prompts = [read_text(arguments.start, '--start')]
    settings, tokenizer, model, _ = (load_pretrained(arguments.init_from, overrides) if arguments.init_from else
                                     load_run(arguments.out_dir, overrides))
    settings = settings.replace(retrieval_cache_gb=0.0)  # prompts are not repeated
    chat = Chat(settings, model.config, tokenizer) if settings.template or arguments.chat or system else None
    if chat and arguments.align:
        raise UserError('--align is given, and a tuned model is asked as it was tuned: leave it out, or give '
                        '--template= to let it continue the text')
    if chat and not prompts and not reads_lines:
        raise UserError('nothing is asked: give --start, --prompts, --interactive or --chat, or --template= to let the '
                        'model continue a text')
    with contextlib.ExitStack() as cleanup:
        is_on, finder, source = arguments.retrieval == 'on', None, None
        is_read = own and not (chat and chat.in_prompt)  # in place of the collection
        if is_read:
            source = PassageSource(model.config, tokenizer, own)
            for i in source.cut:
                print(f'passage {i + 1} is long: its first {2 * settings.retrieval_chunk_size} tokens are read',
                      file=sys.stderr)
        elif model.config.use_retrieval and is_on and not (chat and chat.in_place):
            source = CollectionSource(cleanup.enter_context(contextlib.closing(Retriever(settings, tokenizer))))
        if chat and chat.count and is_on and not own:
            finder = cleanup.enter_context(contextlib.closing(PassageFinder(
                settings.replace(num_passages=chat.count), tokenizer)))
        if not prompts and not reads_lines:
            print('no --start is given: starting from a line end', file=sys.stderr)
            prompts = ['\n']
        engine = Engine(model, tokenizer, slots=min(BATCH, arguments.num_samples))

        def ask(messages):
            question = messages[-1]['content']
            if not chat:
                return Prompt(tokenizer.encode_ordinary(question), question, source)
            passages = [Passage('', text) for text in own] or (finder.find([question])[0] if finder else [])
            prompt = chat.prompt(messages, arguments.max_new_tokens, passages, source)
            for count, what in ((prompt.cut, 'passages are cut or left out'),
                                (prompt.dropped, 'messages, the oldest, are left out')):
                if count:
                    print(f'the window has no room for all: {count} {what}', file=sys.stderr)
            return prompt
        for number, prompt in enumerate(prompts):
            label = f'prompt {number + 1}, ' if len(prompts) > 1 else ''
            write(engine, ask([*system, dict(role='user', content=prompt)]), arguments, prompt, label, chat)
        messages = list(system)
        while reads_lines:
            try:
                line = input('> ' if sys.stdin.isatty() else '').encode('utf-8', 'replace').decode()
            except EOFError:
                break
            if arguments.interactive or line == '/new':
                messages = list(system)
            if not line or (arguments.chat and line == '/new'):
                continue
            messages.append(dict(role='user', content=line))
            try:
                prompt = ask(messages)
            except TooLong as error:
                print(visible(str(error)), file=sys.stderr)
                messages.pop()
                continue
            answer = write(engine, prompt, arguments, line, '', chat)
            messages.append(dict(role='assistant', content=answer))


def write(engine, prompt, arguments, text, label, chat):
    """Print samples of a Prompt, made of `text`: one alone as it comes, several one after another. The first one."""
    sampling = Sampling(arguments.repetition_penalty, arguments.temperature, arguments.top_k, arguments.top_p,
                        arguments.min_p)
    stop = (*arguments.stop, *(chat.template.stop if chat else ()))
    align = 'start' if chat else arguments.align or 'prompt'
    rows = [engine.add(Request(prompt.tokens, arguments.max_new_tokens, sampling, arguments.seed + number, stop, align,
                               prompt.source, arguments.drafts == 'on')) for number in range(arguments.num_samples)]
    is_streamed, texts = len(rows) == 1 and not arguments.json, {id(row): '' for row in rows}
    shown = '' if chat and not label else text + '\n\n' * bool(chat)  # who asks one thing knows what it was
    if is_streamed:
        if label:
            print(f'=== {label.removesuffix(", ")}')
        print(visible(shown), end='', flush=True)
    for event in events_of(engine):
        new = event.text if texts[id(event.row)] or not chat else event.text.lstrip()
        texts[id(event.row)] += new
        if is_streamed:
            print(visible(new), end='', flush=True)
    for number, row in enumerate(rows, start=1):
        if arguments.json:
            print(json.dumps(describe(text, texts[id(row)], row, prompt, arguments)), flush=True)
            continue
        if len(rows) > 1:
            print(f'=== {label}sample {number}')
            print(visible(shown + texts[id(row)]))
        else:
            print()
        if arguments.show_neighbors:
            if prompt.passages:
                print('\n--- passages that the question was given')
                for rank, passage in enumerate(prompt.passages, start=1):
                    print(f'  {rank}. {visible(passage.title or "of your own")}\n     {one_line(passage.text)}')
            show_neighbors(row, prompt.source, engine)
            if prompt.source and prompt.source.has_pointers:
                show_pointers(row, prompt.source, engine.tokenizer)
    return texts[id(rows[0])]


def events_of(engine):
    try:
        yield from engine.run()
    except FloatingPointError as error:
        raise UserError(f'{error}: prompt an earlier checkpoint') from error


def describe(text, written, row, prompt, arguments):
    """A sample as JSON has it."""
    source = prompt.source
    found = dict(prompt=text, text=written, tokens=len(row.new_tokens), finish_reason=row.finish_reason,
                 seed=row.request.seed)
    if arguments.show_neighbors:
        found['neighbors'] = [dict(first_token=first, last_token=last - 1, passages=[
            {'document': name, SCORES[source.mode]: round(score, 4), 'text': passage, 'continuation': continuation}
            for name, score, passage, continuation in source.passages(hits)])
            for first, last, hits in row.retrieved]
        if prompt.passages:
            found['passages'] = [dict(title=passage.title, text=passage.text) for passage in prompt.passages]
    return found


def show_neighbors(row, source, engine):
    """Print each complete chunk, and below it the neighbors that the text after it was written with."""
    if not engine.config.has_neighbors:
        return
    print('\n--- what was retrieved')
    if not row.retrieved:
        print(f'nothing: no chunk of {engine.chunk_size} tokens was completed, or retrieval is off')
    for number, (first, last, hits) in enumerate(row.retrieved, start=1):
        print(f'\nchunk {number}: {one_line(engine.tokenizer.decode(row.tokens[first:last].tolist()))}')
        for rank, (name, score, text, continuation) in enumerate(source.passages(hits), start=1):
            print(f'  {rank}. {visible(name)}, {describe_score(source.mode, score)}\n     {one_line(text)}')
            if continuation:
                print(f'     then: {one_line(continuation)}')


def show_pointers(row, source, tokenizer):
    """Print where the new tokens stand that a pointer named: runs that follow each other there as they do here."""
    tokens = row.tokens[:-1] if row.tokens[-1] == tokenizer.eot_token else row.tokens
    runs = named_runs(source, source.index, tokens, row.prompt_size, len(tokens))
    named = sum(count for _, count, _, _ in runs)
    print(f'\n--- what pointers named, in runs of two or more: {named} of {len(tokens) - row.prompt_size} new tokens')
    names = source.names([(document, place) for _, _, document, place in runs])
    for t, count, document, place in runs:
        print(f'  {one_line(tokenizer.decode(tokens[t:t + count].tolist()))!r}: {visible(names[document, place])}')


def one_line(text, width=400):
    text = visible(text).replace('\n', '⏎')
    return text if len(text) <= width else text[:width] + ' …'


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
