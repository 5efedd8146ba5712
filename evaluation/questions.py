"""
Questions with gold answers, of the files that question answering sets are published as:

    SQuAD 1.1 and 2.0         data / paragraphs / qas, or the Hub's rows; an empty gold where there is no answer
    Natural Questions, open   question, answer (a list)
    Natural Questions         with document_text (simplified) or document_tokens, or the Hub's rows; without a short
                              answer: left out
    TriviaQA                  Data / Question, Answer with Value and Aliases, or the Hub's rows
    open                      question, answers, ctxs (title, text): what Megatron's evaluation, DPR and FiD read
    conversations             messages: the last answer is gold

from JSON, JSON Lines or Parquet, a folder of them, or the Hub. `document` names the document that a question is about.
"""
import re
from collections import Counter
from dataclasses import dataclass, field

from configurator import UserError, reason_of
from data.chunking import document_hash
from data.conversations import find_answers, find_messages, find_passages
from data.documents import DatasetConfig, as_unicode, find_files, read_all_rows
from data.formats import BadRow, as_id, describe, with_numbers


@dataclass
class Question:
    id: str
    messages: list  # of a conversation; the last one is the question
    golds: list  # texts, of which each is right; of SQuAD 2.0 an empty one, if there is no answer
    passages: list = field(default_factory=list)  # Passages of the file
    document: str = ''  # that it is about
    doc_id: int = 0  # its hash, in the collection; 0 without one

    @property
    def text(self):
        return self.messages[-1]['content']


def read_questions(path, source=''):
    """
    The Questions of a file, folder or dataset of the Hub, and a Counter of those that were left out, by reason.
    `source` is that of the documents. UserError, with the place, for what is no question, or has no gold answer.
    """
    config = DatasetConfig(path, whole_rows=True)
    questions, left_out = [], Counter()
    for name, where, row in read_all_rows(config, find_files(config)):
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow('a text, and no rows with questions: use JSON, JSON Lines or Parquet')
            for question in questions_of(with_numbers(row), left_out):
                question.id = question.id or str(len(questions) + 1)
                for message in question.messages:
                    message['content'] = as_unicode(message['content'])
                question.doc_id = document_hash(source, question.document) if question.document else 0
                questions.append(question)
        except BadRow as error:
            raise UserError(f'{name}, {where}: {error}') from error
        except (AttributeError, KeyError, TypeError) as error:  # of what stands where a list or an object is to be
            published = next((PUBLISHED[key] for key in PUBLISHED if key in row), 'any of the sets that can be read')
            raise UserError(f'{name}, {where}: it is not formed as {published} is published ({reason_of(error)}): '
                            f'correct it, or write question, answers and ctxs') from error
    if not questions:
        reasons = ', '.join(f'{count:,} {reason}' for reason, count in left_out.items())
        raise UserError(f'{path!r} has no questions{f" ({reasons})" if reasons else ""}: name another file')
    return questions, left_out


PUBLISHED = dict(data='SQuAD', Data='TriviaQA', annotations='Natural Questions', search_results='TriviaQA')


def questions_of(row, left_out):
    """The Questions of a row of any of the formats. BadRow if it has none, or one without a gold answer."""
    if isinstance(row.get('data'), list):  # SQuAD's
        for article in row['data']:
            for paragraph in expect(article, 'paragraphs', list):
                for qa in expect(paragraph, 'qas', list):
                    yield make_question(qa | dict(context=paragraph.get('context'), title=article.get('title')))
    elif isinstance(row.get('Data'), list):  # TriviaQA's
        for item in row['Data']:
            yield make_trivia({SNAKE.get(key, key): value for key, value in item.items()})
    elif 'annotations' in row:
        question = make_natural(row)
        if question is None:
            left_out['without a short answer'] += 1
        else:
            yield question
    elif isinstance(row.get('answer'), dict) and 'aliases' in row['answer']:
        yield make_trivia(row)
    else:
        yield make_question(row)


def make_question(row):
    """Of SQuAD, the open formats, and conversations."""
    identity = as_id(row.get('id', row.get('question_id'))) or ''
    document = as_id(row.get('document')) or ''
    messages = None
    if isinstance(row.get('messages'), list):
        messages = find_messages(row, DatasetConfig('messages'))
        while messages[-1]['role'] != 'assistant':
            messages.pop()
        last = messages.pop()['content']
        if not messages or messages[-1]['role'] != 'user':
            raise BadRow(f'{name_of(identity, "")}an answer to no question: the message before it is not of the user')
    elif not isinstance(row.get('question'), str) or not row['question'].strip():
        raise BadRow(f'no question: it has neither a text in question nor messages; its fields are '
                     f'{", ".join(row) or "none"}')
    question = messages[-1]['content'] if messages else row['question']
    messages = messages or [dict(role='user', content=question)]
    golds = find_answers(row)
    if not golds and isinstance(row.get('messages'), list):
        golds = [last]
    given = row.get('answers')
    is_squad = isinstance(given, dict) or 'is_impossible' in row
    if isinstance(given, dict):  # the Hub's form
        given = given.get('text')
    if not golds and is_squad and given is not None and row.get('is_impossible', True):
        golds = ['']
    return checked(Question(identity, messages, golds, find_passages(row), document))


def make_trivia(row):
    answer = row.get('answer')
    answer = {} if not isinstance(answer, dict) else {SNAKE.get(key, key): value for key, value in answer.items()}
    golds = [answer.get('value'), *as_list(answer.get('aliases')), *as_list(answer.get('human_answers'))]
    found = []  # {title, text}
    for key, text in (('search_results', 'description'), ('entity_pages', 'wiki_context')):
        value = row.get(key)
        if isinstance(value, dict):  # the Hub's: columns
            texts = value.get('search_context') if key == 'search_results' else value.get(text)
            value = [{'title': t, text: x} for t, x in
                     zip(as_list(value.get('title')), as_list(texts or value.get(text)), strict=False)]
        for item in as_list(value):
            item = {SNAKE.get(name, name): part for name, part in item.items()}
            if item.get(text):
                found.append(dict(title=item.get('title') or '', text=item[text]))
    question = row.get('question')
    if not isinstance(question, str) or not question.strip():
        raise BadRow(f'no question: its fields are {", ".join(row) or "none"}')
    return checked(Question(as_id(row.get('question_id')) or '', [dict(role='user', content=question)],
                            [gold for gold in golds if gold], find_passages(dict(ctxs=found))))


SNAKE = dict(Question='question', QuestionId='question_id', Answer='answer', Value='value', Aliases='aliases',
             HumanAnswers='human_answers', SearchResults='search_results', EntityPages='entity_pages', Title='title',
             Description='description')


def make_natural(row):
    """Of the original Natural Questions; None if it has no short answer, as the open set has none of those."""
    if isinstance(row['annotations'], dict):
        row = as_published(row)
    question = row.get('question_text')
    tokens = row['document_text'].split(' ') if isinstance(row.get('document_text'), str) else None
    if tokens is None and isinstance(row.get('document_tokens'), list):
        tokens = [token['token'] for token in row['document_tokens']]
    if not isinstance(question, str) or tokens is None or not isinstance(row['annotations'], list):
        raise BadRow(f'it has annotations as Natural Questions has, but not question_text and document_text or '
                     f"document_tokens, or the Hub's question and document; its fields are {', '.join(row)}")

    def text_of(span):
        words = tokens[span['start_token']:span['end_token']]
        return ' '.join(word for word in words if not re.fullmatch(r'<[^<>]+>', word))
    golds = [text_of(span) for note in row['annotations'] for span in note.get('short_answers') or []]
    golds += [note['yes_no_answer'].lower() for note in row['annotations']
              if note.get('yes_no_answer', 'NONE') in ('YES', 'NO')]
    golds = list(dict.fromkeys(gold for gold in golds if gold.strip()))
    if not golds:
        return None
    long = next((note['long_answer'] for note in row['annotations']
                 if (note.get('long_answer') or {}).get('start_token', -1) >= 0), None)
    passages = [dict(title=row.get('document_title'), text=text_of(long))] if long else []
    return Question(as_id(row.get('example_id')) or '', [dict(role='user', content=question)], golds,
                    find_passages(dict(ctxs=passages)))


def as_published(row):
    """A row of the Hub's Natural Questions, whose annotations and tokens are columns, in the form of the files."""
    document, notes = row['document'], row['annotations']
    columns = zip(notes['long_answer'], notes['short_answers'], notes['yes_no_answer'], strict=True)
    return dict(example_id=row.get('id'), question_text=row['question']['text'], document_title=document.get('title'),
                document_tokens=[dict(token=token) for token in document['tokens']['token']],
                annotations=[dict(long_answer=long, yes_no_answer={0: 'NO', 1: 'YES'}.get(yes_no, 'NONE'),
                                  short_answers=[dict(start_token=start, end_token=end) for start, end in zip(
                                      short['start_token'], short['end_token'], strict=True)])
                             for long, short, yes_no in columns])


def checked(question):
    """The Question. BadRow if it has no gold answers, or one that is no text."""
    wrong = [gold for gold in question.golds if not isinstance(gold, str)]
    if wrong:
        raise BadRow(f'{name_of(question.id, question.text)}a gold answer that is no text, but {describe(wrong[0])}')
    if not question.golds:
        raise BadRow(f'{name_of(question.id, question.text)}gold answers are missing: scores need them, in answers (a '
                     f'list of texts), answer, or, of conversations, the last message')
    question.golds = list(dict.fromkeys(question.golds))
    return question


def name_of(identity, text):
    """How an error names a question."""
    return f'question {identity or text[:60]!r}: '


def as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def expect(row, key, kind):
    """row[key]. BadRow unless it is of that type."""
    if not isinstance(row, dict) or not isinstance(row.get(key), kind):
        raise BadRow(f'it has data as SQuAD has, but no {key} in it')
    return row[key]
