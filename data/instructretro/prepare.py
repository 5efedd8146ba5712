"""
The open sets of InstructRetro's instruction tuning, as conversations: writes NAME.jsonl of each beside this file, which
config/sft_instructretro.py blends. They come from the Hugging Face Hub, to the library's cache, or from copies.

    python data/instructretro/prepare.py [--sets=dolly,oasst] [--from=FOLDER] [--most=100000]

--from names a folder with a copy of each: FOLDER/soda.parquet, FOLDER/dolly.jsonl, FOLDER/oasst/..., with the Hub's
columns. Of a set with more conversations than --most those with the lowest hashes are taken.

The published blend is one file on a drive; which rows of the sets it took is not said. These differ:

    eli5               Reddit has withdrawn it; what remains of it on the Hub are copies by others
    self_instruct      short and long are told apart by words of the answer; where the published ones part is not said
    oasst              a conversation is a path from a tree's prompt to an answer that nobody replied to, in any of its
                       35 languages (field `lang`); one with a fenced block in it is of oasst_code
    soda               a dialogue's first speaker is the user; its second is the assistant
"""
import argparse
import glob
import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from configurator import UserError, check_range, user_errors_as_one_line, write_atomically
from data.chunking import hash64
from data.documents import DatasetConfig, as_unicode, find_files, read_all_rows
from data.formats import BadRow

FOLDER = Path(__file__).resolve().parent
LONG_ANSWER = 40  # words, from which on self_instruct's are long


def turns(*contents, **more):
    """A conversation of contents by turns, the user's first. None if one of them is empty."""
    contents = [as_unicode(content or '').strip() for content in contents]
    if len(contents) < 2 or not all(contents):
        return None
    return dict(messages=[dict(role=('user', 'assistant')[i % 2], content=content)
                          for i, content in enumerate(contents)], **more)


def soda(rows):
    for row in rows:
        speakers, said = row['speakers'], row['dialogue']
        by_turns = len(set(speakers)) == 2 and all(a != b for a, b in pairwise(speakers))
        yield 'soda', turns(*said[:len(said) // 2 * 2]) if by_turns else None


def eli5(rows, name='eli5'):
    for row in rows:
        if 'question' in row:
            yield name, turns(row['question'], row['answer'])
            continue
        answers = row['answers']
        best = max(range(len(answers['text'])), key=lambda i: answers['score'][i], default=None)
        question = f'{row["title"]}\n\n{row.get("selftext") or ""}'
        yield name, None if best is None else turns(question, answers['text'][best])


def self_instruct(rows):
    for row in rows:
        answer = row['completion'].replace('<|endoftext|>', '')
        is_long = len(answer.split()) >= LONG_ANSWER
        yield f'self_instruct_{"long" if is_long else "short"}', turns(row['prompt'].strip().removesuffix('Output:'),
                                                                       answer)


def unnatural_instructions(rows):
    for row in rows:
        for instance in row['instances']:
            yield 'unnatural_instructions', turns(instance['instruction_with_input'], instance['output'])


def flan_cot(rows):
    for row in rows:
        yield 'flan_cot', turns(row['inputs'], row['targets'])


def dolly(rows):
    for row in rows:
        yield 'dolly', turns(f'{row["instruction"]}\n\n{row["context"] or ""}', row['response'])


def oasst(rows):
    """Paths through trees of messages. They share a tree's beginning, so the tree is their `document`."""
    messages = {row['message_id']: row for row in rows if not row.get('deleted')}
    replied = {row['parent_id'] for row in messages.values() if row['role'] == 'assistant'}  # prompts with an answer
    goes_on = {row['parent_id'] for row in messages.values() if row['message_id'] in replied}  # answers, further on
    for key, row in messages.items():
        if row['role'] != 'assistant' or key in goes_on:
            continue
        path = [row]
        while path[0]['parent_id'] in messages:
            path.insert(0, messages[path[0]['parent_id']])
        texts = [message['text'] for message in path]
        name = 'oasst_code' if any('```' in text for text in texts) else 'oasst'
        yield name, turns(*texts, id=key, document=row['message_tree_id'], lang=row['lang']) \
            if path[0]['role'] == 'prompter' and path[0]['parent_id'] is None else None


SETS = {  # name: what it is on the Hub, what reads its rows, and what files it gives
    'soda': (DatasetConfig('allenai/soda'), soda, ['soda']),
    'eli5': (DatasetConfig('sentence-transformers/eli5', name='pair'), eli5, ['eli5']),
    'askscience': (DatasetConfig('Pavithree/askScience'), lambda rows: eli5(rows, 'askscience'), ['askscience']),
    'askhistorians': (DatasetConfig('Pavithree/askHistorians'), lambda rows: eli5(rows, 'askhistorians'),
                      ['askhistorians']),
    'self_instruct': (DatasetConfig('HuggingFaceH4/self_instruct'), self_instruct,
                      ['self_instruct_short', 'self_instruct_long']),
    'unnatural_instructions': (DatasetConfig('mrm8488/unnatural-instructions-core'), unnatural_instructions,
                               ['unnatural_instructions']),
    'flan_cot': (DatasetConfig('DataProvenanceInitiative/cot_submix_original'), flan_cot, ['flan_cot']),
    'dolly': (DatasetConfig('databricks/databricks-dolly-15k'), dolly, ['dolly']),
    'oasst': (DatasetConfig('OpenAssistant/oasst1'), oasst, ['oasst', 'oasst_code']),
}


def find_set(name, folder):
    """The DatasetConfig of a set, of a folder's copy if there is a folder. UserError if it has none, or several."""
    config = SETS[name][0]
    if folder:
        found = [path for path in glob.glob(os.path.join(glob.escape(folder), f'{name}*'))
                 if os.path.basename(path).partition('.')[0] == name]
        if len(found) != 1:
            raise UserError(f'--from={folder} has {len(found)} files or folders that are called {name}: give one, or '
                            f'leave {name} out of --sets')
        config = DatasetConfig(found[0], split=config.split)
    config.whole_rows = True
    return config


def read_rows(config):
    """Yields the rows of a dataset, as dicts."""
    for path, where, row in read_all_rows(config, find_files(config)):
        if isinstance(row, BadRow):
            raise UserError(f'{path}, {where}: {row}')
        yield row


def convert(name, folder, most):
    """Write the files of a set. UserError if it cannot be read, or has other columns than the Hub's."""
    config = find_set(name, folder)
    rows = tqdm(read_rows(config), desc=name, unit=' rows', unit_scale=True, disable=not sys.stderr.isatty())
    kept, count, left_out = {file: {} for file in SETS[name][2]}, 0, 0
    try:
        for file, conversation in SETS[name][1](rows):
            if conversation is None:
                left_out += 1
                continue
            conversation.setdefault('id', f'{hash64(json.dumps(conversation["messages"])) & (2**64 - 1):016x}')
            kept[file][hash64(name, conversation['id'])] = conversation  # one of each
            count += 1
            if len(kept[file]) > 2 * most:
                kept[file] = dict(sorted(kept[file].items())[:most])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f'{config.path!r} has other columns than {name} on the Hub ({type(error).__name__}: {error}): '
                        f'give a copy with those, or leave {name} out of --sets') from error
    for file, conversations in kept.items():
        chosen = [conversations[key] for key in sorted(conversations)[:most]]
        if not chosen:
            raise UserError(f'{config.path!r} has no conversation of {file}: leave {name} out of --sets')
        lines = [json.dumps(one, ensure_ascii=False) + '\n' for one in chosen]
        write_atomically(''.join(lines), FOLDER / f'{file}.jsonl')
        words = sum(len(m['content'].split()) for one in chosen for m in one['messages'] if m['role'] == 'assistant')
        print(f'{file:24} {len(chosen):8,} conversations, {words / len(chosen):6.1f} words of answers each', flush=True)
    print(f'{"":24} of {count:,} of {name}; {left_out:,} without two sides that speak by turns left out', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sets', default=','.join(SETS), help='which, with commas between them (default: all)')
    parser.add_argument('--from', dest='folder', default='', help='a folder of copies (default: the Hub)')
    parser.add_argument('--most', type=int, default=100_000, help='conversations of a file (default: %(default)s)')
    arguments = parser.parse_args()
    check_range('--most', arguments.most, 1, math.inf)
    names = arguments.sets.split(',')
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise UserError(f'--sets names {unknown[0]!r}, which is none of {", ".join(SETS)}')
    missing = {}
    for name in names:
        try:
            convert(name, arguments.folder, arguments.most)
        except UserError as error:
            missing[name] = str(error)
            print(f'{name}: {error}', file=sys.stderr, flush=True)
    if missing:
        raise UserError(f'{", ".join(missing)} could not be read, as said above: give copies of them by --from, or '
                        f'take them out of config/sft_instructretro.py')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
