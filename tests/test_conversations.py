"""Conversations as they are read from files, and as tokens; packing them is in test_conversation_stream.py."""
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError
from data.chunking import document_hash
from data.conversations import Passage, find_template, read_conversations, render
from data.documents import Counts, DatasetConfig
from data.tokenizer import load_tokenizer

ASKED = [dict(role='user', content='What is 2 + 2?'), dict(role='assistant', content='It is 4.')]
TURNS = [dict(role='system', content='Be brief.'), *ASKED, dict(role='user', content='And 3 + 3?'),
         dict(role='assistant', content=' 6 ')]
ROW = dict(id='a', document='math', messages=TURNS, ctxs=[dict(id='7', title='Sums', text='2 + 2 = 4', score=1.5)])


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def read(path, **options):
    return list(read_conversations(DatasetConfig(str(path), **options)))


@pytest.fixture(scope='module')
def tokenizer(prepared):
    return load_tokenizer(str(prepared / 'tokenizer.json'))


def test_all_formats_of_files_give_the_same_conversations(tmp_path):
    import datasets
    rows = [ROW, ROW | dict(id='b', messages=ASKED, ctxs=[])]
    write(tmp_path / 'chats.jsonl', rows)
    (tmp_path / 'chats.json').write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'chats.parquet')
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / 'saved')
    expected = read(tmp_path / 'chats.jsonl')
    assert [c.id for c in expected] == ['a', 'b'] and expected[0].messages == TURNS and not expected[1].passages
    assert expected[0].passages == [Passage('Sums', '2 + 2 = 4')]
    assert {c.doc_id for c in expected} == {document_hash('', 'math')}
    for name in ('chats.json', 'chats.parquet', 'saved'):
        assert read(tmp_path / name) == expected


@pytest.mark.parametrize('row', [
    dict(messages=ASKED),
    dict(messages=[dict(role='user', content=[dict(type='text', text=ASKED[0]['content'])]), ASKED[1]]),
    dict(messages=None, question=ASKED[0]['content'], answer='It is 4.'),
    dict(conversations=[{'from': 'human', 'value': ASKED[0]['content']}, {'from': 'gpt', 'value': 'It is 4.'}]),
    dict(chat=ASKED),
    dict(question='What is 2 + 2?', answers=['It is 4.', 'four']),
    dict(question='What is 2 + 2?', answers=dict(text=['It is 4.'], answer_start=[3])),
    dict(question='What is 2 + 2?', answer='It is 4.'),
    dict(question='What is 2 + 2?', answers=[], answer='It is 4.'),
    dict(text='Question: What is 2 + 2? Answer: It is 4.'),
])
def test_each_form_of_a_row_is_the_same_conversation_and_is_known_by_what_is_said(tmp_path, row):
    path = write(tmp_path / 'x.jsonl', [row])
    found, = read(path, text_field='chat' if 'chat' in row else 'text')
    assert found.messages == ASKED
    plain, = read(write(tmp_path / 'y.jsonl', [dict(messages=ASKED)]))
    assert (found.id, found.doc_id) == (plain.id, plain.doc_id)


def test_lines_of_questions_and_answers_are_a_conversation_each(tmp_path):
    (tmp_path / 'x.txt').write_text('Question: What is 2 + 2? Answer: It is 4.\n\nQuestion: 3? Answer: 3.\n')
    assert [c.messages[1]['content'] for c in read(tmp_path / 'x.txt')] == ['It is 4.', '3.']


def test_halves_of_characters_are_replaced_wherever_they_stand(tmp_path):
    row = dict(question='a \ud83d', answers=['b \ud83d'], ctxs=[dict(title='\ud83d', text='c \ud83d')])
    found, = read(write(tmp_path / 'x.jsonl', [row]))
    assert [m['content'] for m in found.messages] == ['a \ufffd', 'b \ufffd']
    assert (found.passages[0].title, found.passages[0].text) == ('\ufffd', 'c \ufffd')


def test_a_zero_is_an_answer_and_false_is_none_and_empty_passages_are_left_out(tmp_path):
    row = dict(question='What is 2 - 2?', answer=0, ctxs=[dict(title='a', text=' '), dict(title='b', text='2 - 2 = 0')])
    found, = read(write(tmp_path / 'x.jsonl', [row]))
    assert found.messages[1]['content'] == '0' and found.passages == [Passage('b', '2 - 2 = 0')]
    with pytest.raises(UserError, match='the content of message 2 .assistant. is no text'):
        read(write(tmp_path / 'x.jsonl', [row | dict(answer=False)]))


def test_the_context_of_squad_is_a_passage(tmp_path):
    row = dict(id='x', title='Sums', context='2 + 2 = 4', question='2 + 2?', answers=dict(text=['4']))
    found, = read(write(tmp_path / 'x.jsonl', [row]))
    assert found.passages == [Passage('Sums', '2 + 2 = 4')]


@pytest.mark.parametrize('row, said', [
    (dict(messages=ASKED[:1]), 'without an answer'),
    (dict(messages=[]), 'without an answer'),
    (dict(question='What?', answers=[]), 'question without an answer'),
    (dict(messages=[dict(role='tool', content='x'), *ASKED]), "message 1 has the role 'tool', which is not known"),
    (dict(messages=[ASKED[0], dict(role='assistant', content=' ')]), r'message 2 \(assistant\) has no content'),
    (dict(messages=[ASKED[0], dict(role='assistant', content=None)]), r'message 2 \(assistant\) has no content'),
    (dict(messages=[ASKED[0], dict(role='assistant', content=4)]), 'message 2 .* is no text, but the number 4'),
    (dict(messages=[*ASKED, TURNS[0]]), 'message 3 is of the system'),
    (dict(messages=['hello']), 'message 1 is no object with role and content'),
    (dict(messages='hello'), 'a text without Question:'),
    (dict(text='Question: Name it. Answer: The label Answer: is B'), 'do not alternate'),
    (dict(text='Answer: 4'), None),
    (dict(question='What?', answers=['x'], ctxs=[dict(title='x')]), "passage 1 of 'ctxs'"),
    (dict(prompt='x'), 'none of messages, conversations, question, text; its fields are prompt'),
    (['x'], 'no object with fields'),
])
def test_a_row_that_is_no_conversation_is_named_with_its_place_or_left_out(tmp_path, row, said):
    path = write(tmp_path / 'x.jsonl', [dict(messages=ASKED), row])
    counts = Counts()
    assert len(list(read_conversations(DatasetConfig(path, skip_bad=True), counts))) == 1 + (said is None)
    assert counts.bad == (said is not None)
    if said:
        with pytest.raises(UserError, match=f'x.jsonl, line 2: .*{said}.*skip_bad=True'):
            read(path)


def test_a_dataset_without_conversations_or_a_streamed_one_is_refused(tmp_path):
    path = write(tmp_path / 'x.jsonl', [ROW])
    with pytest.raises(UserError, match='no conversations .*1 left out by filter_fn'):
        read(path, filter_fn=lambda row: row['id'] != 'a')
    with pytest.raises(UserError, match='leave streaming out'):
        read(path, streaming=True)


def test_a_held_out_fraction_parts_the_documents_that_conversations_were_made_from(tmp_path):
    path = write(tmp_path / 'x.jsonl', [ROW | dict(id=str(i), document=str(i % 20)) for i in range(100)])
    sides = [{c.doc_id for c in read(path, val_fraction=0.3, held_out=held_out)} for held_out in (False, True)]
    assert len(sides[0] | sides[1]) == 20 and not sides[0] & sides[1] and sides[1]


TEXT = ('System: Be brief.\n\ntitle: Sums, source: 2 + 2 = 4\n\nUser: What is 2 + 2?\n\nAssistant:',
        ' It is 4.\n\nUser:', ' And 3 + 3?\n\nAssistant:', ' 6<|endoftext|>')


def parts_of(tokens, is_answer, tokenizer):
    """The text of each run of tokens that are, or are not, of an answer."""
    changes = [i for i in range(1, len(tokens)) if is_answer[i] != is_answer[i - 1]]
    return tuple(tokenizer.decode(tokens[i:j].tolist()) for i, j in
                 zip([0, *changes], [*changes, len(tokens)], strict=True))


def test_the_loss_is_on_answers_and_on_the_mark_or_end_of_text_that_ends_them(tokenizer):
    found = render(find_template('instructretro'), TURNS, tokenizer, [Passage('Sums', '2 + 2 = 4')])
    assert parts_of(*found, tokenizer) == TEXT
    assert find_template('instructretro').stop == ('\n\nUser:',)
    assert not found[1][0] and found[0][-1] == tokenizer.eot_token


@pytest.mark.parametrize('template', ['instructretro', 'plain', '<s>{system}</s>\n<u>{user}</u>\n<a>{assistant}</a>\n'])
@pytest.mark.parametrize('turns', [TURNS, ASKED])
def test_a_prompt_to_generate_from_is_what_came_before_the_answer_in_training(tokenizer, template, turns):
    template = find_template(template)
    tokens, is_answer = render(template, turns, tokenizer)
    prompt, no_answer = render(template, turns[:-1], tokenizer)
    assert tokens[:len(prompt)].tolist() == prompt.tolist() and not no_answer[-1]
    assert is_answer[len(prompt):].all() and not is_answer[len(prompt) - 1]
    answer = tokenizer.decode(tokens[len(prompt):-1].tolist())
    assert answer.strip().removesuffix('</a>') == turns[-1]['content'].strip()
    if template.name == 'custom':
        assert template.stop == ('</a>',)


def test_a_plain_conversation_begins_with_its_question_and_the_published_system_message_stands_in_for_one(tokenizer):
    tokens, _ = render(find_template('plain'), ASKED, tokenizer)
    assert tokenizer.decode(tokens.tolist()) == 'Question: What is 2 + 2?\n\nAnswer: It is 4.<|endoftext|>'
    tokens, _ = render(find_template('instructretro'), ASKED, tokenizer)
    assert tokenizer.decode(tokens.tolist()).startswith('System: This is a chat between a user and an artificial')


@pytest.mark.parametrize('align', [1, 7, 16])
def test_an_aligned_prompt_ends_where_a_chunk_does(tokenizer, align):
    plain, _ = render(find_template('plain'), TURNS, tokenizer)
    tokens, is_answer = render(find_template('plain'), TURNS, tokenizer, align=align)
    padding = len(tokens) - len(plain)
    assert is_answer.argmax() % align == 0 and padding < align and tokens[padding:].tolist() == plain.tolist()
    assert (tokens[:padding] == tokenizer.eot_token).all()
    prompt, _ = render(find_template('plain'), TURNS[:2], tokenizer, align=align)
    assert tokens[:len(prompt)].tolist() == prompt.tolist()


def test_text_that_looks_like_the_end_of_text_is_text(tokenizer):
    asked = [dict(role='user', content='<|endoftext|>'), ASKED[1]]
    tokens, _ = render(find_template('plain'), asked, tokenizer)
    assert (tokens == tokenizer.eot_token).sum() == 1


@pytest.mark.parametrize('setting, said', [
    ('instructretr', "neither 'instructretro' nor 'plain'.*did you mean 'instructretro'"),
    ('chatml', 'nor a text with the places'),
    ('{user} {assistant}', 'lacks the place {system}'),
    ('{system}: {user}', 'lacks the place {assistant}'),
    ('{user} A: {assistant} {system}', 'order user, assistant, system'),
    ('{system}{user} A: {assistant}{user}', 'once each'),
    ('{system} Q: {user} {assistant}', 'no text between {user} and {assistant}'),
    ('{system}{user} A: {assistant}', 'no text before {user} and none after {assistant}'),
])
def test_a_template_that_cannot_be_used_says_what_it_lacks(setting, said):
    with pytest.raises(UserError, match=said):
        find_template(setting)
