"""Questions from files as they are published, and what is said of bad ones."""
import json

import pytest

from configurator import UserError
from data.chunking import document_hash
from evaluation.questions import read_questions

SQUAD = {'version': '1.1', 'data': [{'title': 'Super_Bowl_50', 'paragraphs': [{
    'context': 'Denver Broncos defeated Carolina Panthers.', 'qas': [{
        'id': '56be4db0acb8001400a502ec', 'question': 'Which team won?', 'answers': [
            {'answer_start': 0, 'text': 'Denver Broncos'}, {'answer_start': 7, 'text': 'Broncos'},
            {'answer_start': 0, 'text': 'Denver Broncos'}]}]}]}]}
SQUAD_2 = {'version': 'v2.0', 'data': [{'title': 'Normans', 'paragraphs': [{'context': 'Normandy, in France.', 'qas': [
    {'id': 'a', 'question': 'Where is Normandy?', 'is_impossible': False,
     'answers': [{'text': 'France', 'answer_start': 13}]},
    {'id': 'b', 'question': 'Who ruled it?', 'is_impossible': True, 'answers': [],
     'plausible_answers': [{'text': 'Normandy', 'answer_start': 0}]}]}]}]}
TRIVIA = {'Domain': 'Web', 'Version': 1.0, 'Data': [{
    'Question': 'Who was the Man Booker winner of 1990?', 'QuestionId': 'tc_33', 'QuestionSource': 'x',
    'Answer': {'Value': 'A.S. Byatt', 'Aliases': ['Possession', 'A. S. Byatt'], 'NormalizedAliases': ['a s byatt'],
               'HumanAnswers': ['Byatt'], 'Type': 'WikipediaEntity'},
    'EntityPages': [{'Title': 'The Booker', 'Filename': 'Booker.txt'}],
    'SearchResults': [{'Title': 'Prize', 'Description': 'Byatt won.', 'Url': 'http://x', 'Rank': 0}]}]}
NATURAL = {'example_id': -12, 'question_text': 'when was it', 'document_title': 'It', 'document_url': 'u',
           'document_text': 'It <B> was </B> in May 1990 and later', 'long_answer_candidates': [],
           'annotations': [{'yes_no_answer': 'NONE', 'long_answer': {'start_token': 0, 'end_token': 7},
                            'short_answers': [{'start_token': 5, 'end_token': 7}]},
                           {'yes_no_answer': 'YES', 'long_answer': {'start_token': -1, 'end_token': -1},
                            'short_answers': []}]}


def as_tokens(row):
    """The form of the original files, in which tokens are listed."""
    words = row['document_text'].split(' ')
    return {**{k: v for k, v in row.items() if k != 'document_text'}, 'document_tokens': [
        {'token': word, 'html_token': word.startswith('<')} for word in words]}


def write(path, value):
    if path.suffix == '.parquet':
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(value), path)
    elif path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in value))
    else:
        path.write_text(json.dumps(value))
    return str(path)


FORMATS = {
    'squad.json': (SQUAD, 'Which team won?', ['Denver Broncos', 'Broncos'],
                   ('Super_Bowl_50', 'Denver Broncos defeated Carolina Panthers.')),
    'squad.parquet': ([dict(id='1', title='T', context='C d.', question='Who?',
                            answers=dict(text=['C', 'd'], answer_start=[0, 2]))], 'Who?', ['C', 'd'], ('T', 'C d.')),
    'squad2.parquet': ([dict(id='1', title='T', context='C d.', question='Who?', answers=dict(
        text=[], answer_start=[])), dict(id='2', title='T', context='C d.', question='Who?', answers=dict(
            text=['C'], answer_start=[0]))], 'Who?', [''], ('T', 'C d.')),
    'nq-open.jsonl': ([dict(question='when did they play', answer=['2017', 'in 2017'])], 'when did they play',
                      ['2017', 'in 2017'], None),
    'nq-open.parquet': ([dict(question='when', answer=['2017'])], 'when', ['2017'], None),
    'nq.jsonl': ([NATURAL], 'when was it', ['May 1990', 'yes'], ('It', 'It was in May 1990')),
    'nq-dev.jsonl': ([as_tokens(NATURAL)], 'when was it', ['May 1990', 'yes'], ('It', 'It was in May 1990')),
    'nq-hub.parquet': ([dict(
        id='-12', question=dict(text='when was it', tokens=['when', 'was', 'it']),
        document=dict(title='It', tokens=dict(token=NATURAL['document_text'].split(' '), is_html=[False] * 9)),
        annotations=dict(id=['1', '2'], yes_no_answer=[-1, 1],
                         long_answer=[note['long_answer'] for note in NATURAL['annotations']],
                         short_answers=[dict(start_token=[5], end_token=[7], text=['May 1990']),
                                        dict(start_token=[], end_token=[], text=[])]))],
                       'when was it', ['May 1990', 'yes'], ('It', 'It was in May 1990')),
    'trivia.json': (TRIVIA, 'Who was the Man Booker winner of 1990?',
                    ['A.S. Byatt', 'Possession', 'A. S. Byatt', 'Byatt'], ('Prize', 'Byatt won.')),
    'trivia.parquet': ([dict(question='Who?', question_id='tc_1', answer=dict(
        value='Byatt', aliases=['A. S. Byatt'], normalized_aliases=['a s byatt']), search_results=dict(
            title=['S'], description=['D'], search_context=['long']), entity_pages=dict(
                title=['E'], wiki_context=['wiki']))], 'Who?', ['Byatt', 'A. S. Byatt'], ('S', 'long')),
    'open.json': ([dict(question='who is he', answers=['me'], ctxs=[dict(id='1', title='A', text='B', score='0.5'),
                                                                   dict(title='', text='D')])],
                  'who is he', ['me'], ('A', 'B')),
    'target.jsonl': ([dict(question='how many', answers=None, target='me'), dict(question='2', answer=7)],
                     'how many', ['me'], None),
    'columns.jsonl': ([dict(question='how many', answers=[], answer='me')], 'how many', ['me'], None),
    'zero.jsonl': ([dict(question='how many', answer=0)], 'how many', ['0'], None),
    'chat.jsonl': ([dict(messages=[dict(role='system', content='Be brief.'), dict(role='user', content='Why?'),
                                   dict(role='assistant', content='So.')])], 'Why?', ['So.'], None),
}


@pytest.mark.parametrize('name', FORMATS)
def test_a_published_format_gives_its_questions_golds_and_passages(name, tmp_path):
    content, text, golds, passage = FORMATS[name]
    question, *_ = read_questions(write(tmp_path / name, content))[0]
    assert (question.text, question.golds, question.doc_id) == (text, golds, 0)
    assert [(p.title, p.text) for p in question.passages[:1]] == [passage] * (passage is not None)
    assert [m['role'] for m in question.messages] == ['system'] * (name == 'chat.jsonl') + ['user']


def test_no_answer_is_an_empty_gold_and_a_natural_question_without_a_short_one_is_left_out(tmp_path):
    questions, left_out = read_questions(write(tmp_path / 'squad2.json', SQUAD_2))
    assert [(q.id, q.golds) for q in questions] == [('a', ['France']), ('b', [''])] and not left_out
    without = NATURAL | dict(annotations=[NATURAL['annotations'][0] | dict(short_answers=[])])
    questions, left_out = read_questions(write(tmp_path / 'nq.jsonl', [without, NATURAL, without]))
    assert len(questions) == 1 and left_out == {'without a short answer': 2} and questions[0].id == '-12'
    with pytest.raises(UserError, match='no questions .1 without a short answer.'):
        read_questions(write(tmp_path / 'none.jsonl', [without]))


def test_a_question_knows_the_document_that_it_is_about(tmp_path):
    path = write(tmp_path / 'about.jsonl', [dict(question='q', answers=['a'], document='json.decoder', id='x')])
    assert read_questions(path, 'stdlib')[0][0].doc_id == document_hash('stdlib', 'json.decoder')


@pytest.mark.parametrize(('name', 'content', 'said'), [
    ('missing.jsonl', [dict(question='q', answers=['a']), dict(id='no7', question='Who?')],
     "missing.jsonl, line 2: question 'no7': gold answers are missing"),
    ('empty-list.json', [dict(question='Who was it?', answers=[])], "object 1: question 'Who was it.': gold answers"),
    ('test.json', {'data': [{'title': 't', 'paragraphs': [{'context': 'c', 'qas': [{'id': 'i', 'question': 'q'}]}]}]},
     "question 'i': gold answers are missing"),
    ('trivia-test.json', {'Data': [{'Question': 'q', 'QuestionId': 'tc_9'}]}, "question 'tc_9': gold answers"),
    ('number.jsonl', [dict(question='q', answers=[dict(a=1)])], 'a gold answer that is no text, but null'),
    ('none.jsonl', [dict(text='a document')], 'no question: it has neither a text in question nor messages; its '
                                              'fields are text'),
    ('squad.json', {'data': [{'title': 't'}]}, 'no paragraphs in it'),
    ('bool.jsonl', [dict(question='q', answer=False)], 'a gold answer that is no text, but '),
    ('data.json', {'Data': [1]}, 'data.json, .* 1: it is not formed as TriviaQA is published .AttributeError'),
    ('results.json', {'Data': [TRIVIA['Data'][0] | dict(SearchResults=['u'])]}, 'not formed as TriviaQA'),
    ('alias.json', {'Data': [TRIVIA['Data'][0] | dict(Answer=dict(Aliases=[5]))]}, 'is no text, but the number 5'),
    ('qas.json', {'data': [{'title': 't', 'paragraphs': [{'qas': ['x']}]}]}, 'not formed as SQuAD is published'),
    ('notes.jsonl', [NATURAL | dict(annotations=['x'])], 'not formed as Natural Questions is published'),
    ('short.jsonl', [NATURAL | dict(annotations=[dict(short_answers=[{}])])], 'not formed as Natural Questions'),
    ('hub.jsonl', [dict(annotations={}, id='1')], 'not formed as Natural Questions is published .KeyError'),
    ('natural.jsonl', [dict(annotations=[], question_text='q')], 'not question_text and document_text'),
    ('ctxs.jsonl', [dict(question='q', answers=['a'], ctxs='text')], "'ctxs' is no list of passages"),
])
def test_what_is_no_question_is_named_with_its_place(name, content, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read_questions(write(tmp_path / name, content))


def test_a_file_that_is_broken_empty_or_not_there_is_named(tmp_path):
    (tmp_path / 'broken.json').write_text('{"data": [')
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'text.txt').write_text('Who?')
    for name, said in (('broken.json', 'broken JSON'), ('empty.jsonl', 'empty.jsonl'), ('text.txt', 'no rows with'),
                       ('gone.jsonl', 'gone.jsonl')):
        with pytest.raises(UserError, match=said):
            read_questions(str(tmp_path / name))
