"""
Questions and answers that can be made on this machine, to tune the quickstart's model to answer (sft.py) and to measure
it (evaluation.qa): what does a public function do, to the first sentence of its docstring. They are of the quickstart's
corpus (data/python_source/prepare.py), and so is the knowledge base. Writes beside this file train.jsonl, val.jsonl and
corpus.json, the fingerprint.

    python data/docstrings/prepare.py

A line holds `id`, `document` (the module, as the collection names it: retrieval leaves it out), `messages`, and, as
Megatron's evaluation reads them, `question`, `answers` and `ctxs`, the function itself: the gold passage.

It is asked about functions of whose name another module documents one, too: such relatives are what a question can be
answered from when its own module is left out. Modules are held out whole, by a hash of their name: the corpus' own val
modules, which no model has seen, and some of its train modules.
"""
import argparse
import ast
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow.parquet as pq

from configurator import UserError, user_errors_as_one_line, write_atomically
from data.chunking import hash64
from data.fingerprint import fingerprint, write_fingerprint
from data.prepare import is_val

FOLDER = Path(__file__).resolve().parent
CORPUS = FOLDER.parent / 'python_source'
VAL_SHARE = 0.2  # of the modules; those that the corpus holds out are among them
MOST = dict(train=20_000, val=1_000)  # questions
MOST_ALIKE = 3  # questions of one answer: generated code documents hundreds of functions alike
LONGEST_SIGNATURE = 120  # characters of the arguments that a question names
LONGEST_PASSAGE = 1200  # characters of a function
WORDS = range(4, 41)  # of an answer
SENTENCE_END = re.compile(r'(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\betc)[.!?](?=\s|$)')
NO_ANSWER = re.compile(r'deprecated|^(see|todo|alias|example|args|note|part of|adapted from|copied from)\b|https?:|>>>|'
                       r'---|::|:\s*$', re.IGNORECASE)


def functions_of(tree):
    """(class or '', definition) of the functions of a module and of its classes that have public names."""
    def visit(node, owner):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if not child.name.startswith('_'):
                    yield owner, child
            elif isinstance(child, ast.ClassDef):
                if not child.name.startswith('_'):
                    yield from visit(child, f'{owner}.{child.name}'.removeprefix('.'))
            else:  # such as an `if` around them
                yield from visit(child, owner)
    return visit(tree, '')


def first_sentence(docstring):
    """The first sentence of a docstring's first paragraph, or the line that it is; None if it is neither."""
    lines = docstring.strip().partition('\n\n')[0].splitlines()
    paragraph = ' '.join(' '.join(lines).split())
    end = SENTENCE_END.search(paragraph)
    if not end and len(lines) > 1:
        return None
    sentence = paragraph[:end.end()] if end else paragraph
    is_sentence = re.match(r'[A-Z][a-z]', sentence) and len(sentence.split()) in WORDS
    return sentence if is_sentence and not NO_ANSWER.search(sentence) else None


def ask(module, owner, function):
    """What is asked about a function, with its arguments, as they tell those of one name apart."""
    arguments = ast.unparse(function.args)
    if len(arguments) > LONGEST_SIGNATURE:
        arguments = arguments[:LONGEST_SIGNATURE].rpartition(',')[0] + ', ...'
    return f'What does def {function.name}({arguments}) of {owner or module.rpartition(".")[2]} do?'


def passage_of(text, function):
    """The function's text, whole lines of it."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    lines, size = [], 0
    for line in text.splitlines(keepends=True)[first - 1:function.end_lineno]:
        size += len(line)
        if size > LONGEST_PASSAGE:
            break
        lines.append(line)
    return ''.join(lines)


def read_questions(documents):
    """Yields a dict of each question of documents, (module, text); and counts of what was left out, by reason, last."""
    left_out, alike, seen = Counter(), Counter(), set()
    for module, text in documents:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', SyntaxWarning)
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                left_out['modules that this Python cannot parse'] += 1
                continue
        for owner, function in functions_of(tree):
            docstring = ast.get_docstring(function)
            name = f'{module}.{owner}.{function.name}' if owner else f'{module}.{function.name}'
            passage = passage_of(text, function)
            if not docstring or not docstring.strip():
                left_out['without a docstring'] += 1
                continue
            answer = first_sentence(docstring)
            alike[answer] += 1
            reason = ('no sentence of 4 to 40 words' if answer is None else 'defined twice' if name in seen else
                      'answers that others have' if alike[answer] > MOST_ALIKE else None)
            seen.add(name)
            if reason:
                left_out[reason] += 1
                continue
            question = ask(module, owner, function)
            yield dict(id=name, document=module,
                       messages=[dict(role='user', content=question), dict(role='assistant', content=answer)],
                       question=question, answers=[answer], ctxs=[dict(title=module, text=passage)])
    yield left_out


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    documents = []
    for split in ('train', 'val'):
        path = CORPUS / f'{split}.parquet'
        if not path.exists():
            raise UserError(f'no {split}.parquet of the quickstart: make it first, with python '
                            f'data/python_source/prepare.py')
        table = pq.read_table(path, columns=['id', 'text'])
        documents += zip(table['id'].to_pylist(), table['text'].to_pylist(), strict=True)
    documents.sort(key=lambda document: hash64('questions', document[0]))
    *questions, left_out = read_questions(documents)
    modules = {}  # that document a function of a name
    for question in questions:
        modules.setdefault(question['id'].rpartition('.')[2], set()).add(question['document'])
    related = [question for question in questions if len(modules[question['id'].rpartition('.')[2]]) > 1]
    left_out['of a name that no other module documents'] = len(questions) - len(related)
    splits = {split: [question for question in related if is_val(question['document'], VAL_SHARE) == (split == 'val')]
              for split in MOST}
    known = {question['answers'][0] for question in splits['train']}
    found = {}
    for split, of_split in splits.items():
        if not of_split:
            raise UserError(f'the corpus gives {len(related)} questions and none for {split}: make a larger one')
        kept = sorted(of_split, key=lambda question: hash64('question', question['id']))[:MOST[split]]
        lines = [json.dumps(question, ensure_ascii=False) + '\n' for question in kept]
        write_atomically(''.join(lines), FOLDER / f'{split}.jsonl')
        found[split] = [(question['id'], line) for question, line in zip(kept, lines, strict=True)]
        words = sum(len(question['answers'][0].split()) for question in kept) / len(kept)
        print(f'{split:6} {len(kept):7,} questions of {len({question["document"] for question in kept}):5,} modules | '
              f'{words:.1f} words an answer')
    described = fingerprint(found)
    write_fingerprint(described, FOLDER)
    copies = sum(question['answers'][0] in known for question in splits['val'])
    print(f'of the val answers {copies / len(splits["val"]):.1%} are a train answer, too')
    print('left out: ' + ', '.join(f'{count:,} {reason}' for reason, count in left_out.most_common()))
    print(f'fingerprint {described["hash"]}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
