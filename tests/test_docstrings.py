"""Questions from docstrings, of the real standard library."""
import ast
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError
from data.docstrings import prepare
from data.prepare import is_val

MODULES = ('argparse', 'ast', 'base64', 'bisect', 'calendar', 'code', 'codecs', 'colorsys', 'copy', 'csv', 'difflib',
           'dis', 'filecmp', 'ftplib', 'getopt', 'gzip', 'heapq', 'inspect', 'ipaddress', 'locale', 'mimetypes',
           'ntpath', 'os', 'pathlib', 'pickle', 'platform', 'plistlib', 'pprint', 'profile', 'random', 'shelve',
           'shutil', 'site', 'smtplib', 'socket', 'statistics', 'string', 'subprocess', 'tarfile', 'tempfile',
           'textwrap', 'threading', 'trace', 'traceback', 'turtle', 'types', 'typing', 'uuid', 'warnings', 'zipfile')


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    library = Path(os.__file__).parent
    texts = {name: (library / f'{name}.py').read_text() for name in MODULES if (library / f'{name}.py').exists()}
    texts['broken'] = 'def f(:\n'
    for split in ('train', 'val'):
        kept = {name: text for name, text in texts.items() if is_val(name) == (split == 'val')}
        pq.write_table(pa.table({'id': list(kept), 'text': list(kept.values())}), tmp_path / f'{split}.parquet')
    monkeypatch.setattr(prepare, 'CORPUS', tmp_path)
    monkeypatch.setattr(prepare, 'FOLDER', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['prepare.py'])
    return tmp_path, texts


def test_answers_stand_in_the_gold_passage_which_stands_in_its_document_and_modules_are_held_out_whole(corpus, capsys):
    folder, texts = corpus
    prepare.main()
    said = capsys.readouterr().out
    written = {split: (folder / f'{split}.jsonl').read_bytes() for split in ('train', 'val')}
    train, val = ([json.loads(line) for line in data.splitlines()] for data in written.values())
    assert len(train) > 50 and len(val) > 5 and f'{len(train):,} questions' in said
    assert '1 modules that this Python cannot parse' in said
    assert not {q['document'] for q in train} & {q['document'] for q in val}
    assert len({q['id'] for q in train + val}) == len(train + val)
    for q in train + val:
        passage, answer = q['ctxs'][0], q['answers'][0]
        assert passage['title'] == q['document'] and passage['text'] in texts[q['document']]
        assert ' '.join(answer.split()) in ' '.join(passage['text'].split()) or '\\' in passage['text']
        assert q['messages'] == [{'role': 'user', 'content': q['question']}, {'role': 'assistant', 'content': answer}]
        assert q['id'].startswith(q['document']) and q['id'].split('.')[-1] in q['question']
    for name in {q['id'].rpartition('.')[2] for q in train + val}:  # a relative may answer it
        assert len({q['document'] for q in train + val if q['id'].rpartition('.')[2] == name}) > 1
    answers = [q['answers'][0] for q in train + val]
    assert max(map(answers.count, answers)) <= prepare.MOST_ALIKE
    prepare.main()
    assert written == {split: (folder / f'{split}.jsonl').read_bytes() for split in written}


@pytest.mark.parametrize('docstring, sentence', [
    ('Return the sum of two numbers.', 'Return the sum of two numbers.'),
    ('Return a sum of two\n    numbers, e.g. of 1.5 and 2. It is exact.\n\nArgs:',
     'Return a sum of two numbers, e.g. of 1.5 and 2.'),
    ('Whether the file is\nopen?\n', 'Whether the file is open?'),
    ('Return the sum of numbers\n\nMore', 'Return the sum of numbers'),
    ('Return a long line\nthat ends in none', None), ('Close it.', None), ('deprecated since version 3 of it', None),
    ('Deprecated since version 3 of it.', None), ('x: the number that is returned', None), ('', None),
    ('See https://example.org for more of it.', None), ('Args:\n    x: the number', None),
    ('Return what this does::\n\n    f(1)', None), ('Return ' + 'very ' * 40 + 'much.', None),
])
def test_an_answer_is_a_docstrings_first_sentence_or_none(docstring, sentence):
    assert prepare.first_sentence(docstring) == sentence


def test_functions_with_public_names_are_asked_about_and_those_inside_functions_are_not():
    text = '''
@cache
def public(a, b: int = 1, *, c):
    def inside(): pass
def _private(): pass
if x:
    async def hidden(): pass
class Public:
    def method(self): pass
    class Inner:
        def __init__(self): pass
        def deep(self, {}): pass
class _Private:
    def method(self): pass
'''.replace('{}', ', '.join(f'argument_{i}=None' for i in range(20)))
    asked = [prepare.ask('m', *found) for found in prepare.functions_of(ast.parse(text))]
    assert asked[:3] == ['What does def public(a, b: int=1, *, c) of m do?', 'What does def hidden() of m do?',
                         'What does def method(self) of Public do?']
    assert len(asked) == 4 and asked[3].endswith(', ...) of Public.Inner do?') and len(asked[3]) < 200
    assert prepare.passage_of(text, ast.parse(text).body[0]).startswith('@cache\ndef public')


def test_without_the_quickstarts_corpus_it_says_what_to_do(corpus):
    folder, _ = corpus
    (folder / 'val.parquet').unlink()
    with pytest.raises(UserError, match=r'no val.parquet of the quickstart: make it first'):
        prepare.main()
