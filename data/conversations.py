"""
Conversations to tune a model on: what was said, by whom, and the passages that go with it.

    for conversation in read_conversations(DatasetConfig('chats.jsonl')):
        tokens, is_answer = render(find_template('plain'), conversation.messages, tokenizer)

A row of any file or dataset that documents.py reads is a conversation in one of four forms: `messages` of the Hub's
chat format (role, content), `conversations` (from, value), a `question` with its `answers`, or a text with
`Question: ... Answer: ...`. `ctxs` are its passages, `document` names the document that it was made from.
"""
import difflib
import json
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from configurator import UserError
from data.chunking import document_hash
from data.documents import Counts, as_unicode, find_files, read_all_rows, text_hash
from data.formats import LEFT_OUT, MISSING, BadRow, as_id, describe, pick, with_numbers
from data.tokenizer import tokenize

ROLES = dict(system='system', developer='system', user='user', human='user', prompter='user', assistant='assistant',
             gpt='assistant')
PLACES = ('system', 'user', 'assistant')
TEMPLATES = {
    'instructretro': 'System: {system}\n\nUser: {user}\n\nAssistant: {assistant}',
    'plain': '{system}\n\nQuestion: {user}\n\nAnswer: {assistant}',
}
CHAT = ("This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions")
SYSTEM = {'instructretro': (  # messages as published, without passages and with them
    f'{CHAT}.',
    f'{CHAT} based on the context. The assistant should also indicate when the answer cannot be found in the context.')}


@dataclass
class Passage:
    title: str
    text: str


@dataclass
class Conversation:
    id: str
    messages: list  # of {'role': 'system', 'user' or 'assistant', 'content': str}
    passages: list = field(default_factory=list)  # of Passage
    doc_id: int = 0  # of the document that it was made from, or its own


@dataclass
class Template:
    """
    How a conversation is written: head + system message, before each user's turn `separator`, before each answer
    `answer`, after it `tail`. Spaces that end `separator` and `answer` go to what follows, as in the tokens of a text.
    """
    name: str
    head: str
    separator: str
    answer: str
    tail: str

    @property
    def stop(self):
        """Strings that end an answer where it is not the end-of-text that does."""
        end = self.tail if self.tail.strip() else self.tail + self.separator
        return (end.rstrip(),) if end.strip() else ()


def find_template(setting):
    """The Template of a setting: a known name, or a text with the places. UserError if it is neither."""
    text = TEMPLATES.get(setting, setting)
    parts = re.split(r'\{(system|user|assistant)\}', text)
    if len(parts) == 1:
        nearest = difflib.get_close_matches(setting, TEMPLATES, n=1)
        raise UserError(f'template {setting!r} is neither {" nor ".join(map(repr, TEMPLATES))} nor a text with the '
                        f'places {{system}}, {{user}}, {{assistant}}' + (
                            f': did you mean {nearest[0]!r}?' if nearest else ': correct it'))
    found = parts[1::2]
    missing = [f'{{{name}}}' for name in PLACES if name not in found]
    if missing:
        raise UserError(f'template {setting!r} lacks the place {" and ".join(missing)}: a template has {{system}}, '
                        f'{{user}} and {{assistant}}, once each')
    if found != list(PLACES):
        raise UserError(f'template {setting!r} has its places in the order {", ".join(found)}: write {{system}}, '
                        f'{{user}} and {{assistant}} once each, in this order')
    if not parts[2].strip() and not parts[6].strip():
        raise UserError(f'template {setting!r} has no text before {{user}} and none after {{assistant}}, by which the '
                        f'model could learn where an answer ends: add a mark, such as Question:')
    if not parts[4].strip():
        raise UserError(f'template {setting!r} has no text between {{user}} and {{assistant}}, by which the model '
                        f'could tell that it is to answer: add a mark, such as Answer:')
    return Template(setting if setting in TEMPLATES else 'custom', parts[0], parts[2], parts[4], parts[6])


def render(template, messages, tokenizer, passages=(), align=0):
    """
    The tokens (n,) int64 of a conversation, and which of them an answer's writer has to produce, (n,) bool: the answer,
    and the mark or end-of-text after it. If the last message is no answer, they end where one is to begin. Passages
    stand before the first user's turn. With `align` the tokens are padded in front with end-of-text, so that the first
    answer begins after a multiple of it.
    """
    pieces = []  # (text, is_answer), each tokenized by itself: a prompt has the same tokens with its answer and without
    messages = list(messages)
    system = SYSTEM.get(template.name)
    if system and (not messages or messages[0]['role'] != 'system'):
        messages.insert(0, dict(role='system', content=system[bool(passages)]))
    context = ''.join(f'\n\ntitle: {p.title}, source: {p.text}'.rstrip() for p in passages)
    answered = False  # whether the last piece is an answer, whose writer also writes the mark that follows
    for message in messages:
        content = message['content'].strip()
        if message['role'] == 'system':
            pieces.append((template.head + content, False))
            continue
        if context:
            pieces.append((context if pieces else context.lstrip('\n'), False))
            context = ''
        if message['role'] == 'user':
            mark = template.separator if pieces else template.separator.lstrip()
            stem = mark.rstrip(' ')
            pieces += [(stem, answered), (mark[len(stem):] + content, False)] if answered else [(mark + content, False)]
        else:
            stem = template.answer.rstrip(' ')
            pieces += [(stem, answered), (template.answer[len(stem):] + content + template.tail, True)]
        answered = message['role'] == 'assistant'
    if not answered:
        pieces.append((template.answer.rstrip(' '), False))
    parts = [(tokenize(as_unicode(text), tokenizer), is_answer) for text, is_answer in pieces if text]
    if answered:
        parts.append((np.array([tokenizer.eot_token]), True))
    tokens = np.concatenate([part for part, _ in parts]).astype(np.int64)
    is_answer = np.concatenate([np.full(len(part), is_answer) for part, is_answer in parts])
    if align:
        prompt = int(is_answer.argmax()) if is_answer.any() else len(tokens)
        padding = -prompt % align
        tokens = np.pad(tokens, (padding, 0), constant_values=tokenizer.eot_token)
        is_answer = np.pad(is_answer, (padding, 0))
    return tokens, is_answer


def cut_passages(passages, excess, tokenizer):
    """The Passages, of which the last has `excess` tokens less at its end, or is left out if it has no more."""
    *others, last = passages
    text = tokenizer.decode(tokenize(last.text, tokenizer)[:-excess].tolist()).rstrip('\ufffd').rstrip()
    return [*others, Passage(last.title, text)] if text else others


def check_documents(settings):
    """UserError if the datasets of a run are conversations, where documents are read."""
    if settings.template:
        raise UserError(f'template is {settings.template!r}, so the datasets are conversations, and this reads '
                        f'documents: name the config of the pretraining; python sft.py tunes')


def read_conversations(config, counts=None):
    """
    Yields the Conversations of a DatasetConfig, in the order of its files, and counts them in `counts`, a Counts, as
    documents. UserError, with the file and the row, if one of them is none, or if there are none at all.
    """
    counts = Counts() if counts is None else counts
    if config.streaming:
        raise UserError(f'{config.path!r} is streamed, and conversations are read as a whole: leave streaming out')
    files = find_files(config)
    counts.files, counts.other_files = len(files.paths), files.other
    for path, where, row in read_all_rows(replace(config, whole_rows=True), files):
        if row is LEFT_OUT:
            counts.filtered += 1
            continue
        found = [(where, row)]
        if isinstance(row, str):  # a file of text: a conversation a line
            found = [(f'line {number}', dict(text=line)) for number, line in enumerate(row.split('\n'), 1)
                     if line.strip()]
        for place, fields in found:
            try:
                if isinstance(fields, BadRow):
                    raise fields
                conversation = as_conversation(fields, config)
            except BadRow as error:
                if not config.skip_bad:
                    raise UserError(f'{path}, {place}: {error}; correct it, or leave such rows out with DatasetConfig('
                                    f'{config.path!r}, skip_bad=True)') from error
                counts.bad += 1
                continue
            if config.val_fraction and not config.holds(conversation.doc_id):
                counts.other_side += 1
                continue
            counts.documents += 1
            yield conversation
            if counts.documents >= config.most_documents:
                return
    if not counts.documents:
        raise UserError(f'dataset {config.path!r} has no conversations ({counts.describe()}): name another')


def as_conversation(row, config):
    """The Conversation of a row, a dict. BadRow if it is none."""
    row = with_numbers(row)
    messages = find_messages(row, config)
    document_id = pick(row, config.id_field) if config.id_field else MISSING
    if document_id is MISSING and config.needs_id:
        raise BadRow(f'no field {config.id_field!r}; its fields are {", ".join(row)}: set id_field')
    document_id = None if document_id is MISSING else as_id(document_id)
    document_id = document_id or text_hash(as_unicode(json.dumps(messages)))
    document = as_id(row.get('document')) or document_id
    passages = [Passage(as_unicode(p.title), as_unicode(p.text)) for p in find_passages(row)]
    return Conversation(document_id, messages, passages, document_hash(config.source, document))


def find_messages(row, config):
    """The messages of a row, in whichever form it has them. BadRow if they are no conversation that can be learned."""
    names = ['messages', 'conversations', 'question', config.text_field]
    if config.text_field != 'text':
        names = [config.text_field]
    name = next((name for name in names if pick(row, name) not in (MISSING, None)), None)
    if name is None:
        raise BadRow(f'no conversation: it has none of {", ".join(names)}; its fields are {", ".join(row) or "none"}: '
                     f'set text_field to the one that holds the messages')
    value = pick(row, name)
    if name == 'question':
        said = [('user', value), ('assistant', find_answer(row))]
    elif isinstance(value, str):
        said = parse_text(value)
    elif isinstance(value, list):
        said = [as_turn(turn, number) for number, turn in enumerate(value, 1)]
    else:
        raise BadRow(f'{name!r} is no list of messages, but {describe(value)}')
    messages = []
    for number, (role, content) in enumerate(said, 1):
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f'message {number} has the role {role!r}, which is not known: roles are {", ".join(ROLES)}')
        if isinstance(content, list):  # parts, of which some may be pictures
            parts = [part.get('text') if isinstance(part, dict) and part.get('type', 'text') == 'text' else None
                     for part in content]
            content = ''.join(parts) if all(isinstance(part, str) for part in parts) else content
        if content is not None and not isinstance(content, str):
            raise BadRow(f'the content of message {number} ({role}) is no text, but {describe(content)}')
        if not (content or '').strip():
            raise BadRow(f'message {number} ({role}) has no content' + ': a question without an answer' * (
                name == 'question' and role == 'assistant'))
        if ROLES[role] == 'system' and messages:
            raise BadRow(f'message {number} is of the system, which speaks first or not at all')
        messages.append(dict(role=ROLES[role], content=as_unicode(content)))
    if not any(message['role'] == 'assistant' for message in messages):
        raise BadRow(f'a conversation without an answer: none of its {len(messages)} messages is of the assistant')
    return messages


def as_turn(turn, number):
    """(role, content) of a message of `messages` or `conversations`."""
    for role, content in (('role', 'content'), ('from', 'value')):
        if isinstance(turn, dict) and role in turn and content in turn:
            return turn[role], turn[content]
    raise BadRow(f'message {number} is no object with role and content, or from and value, but '
                 + (f'one with {", ".join(turn) or "nothing"}' if isinstance(turn, dict) else describe(turn)))


def find_answer(row):
    """The first answer to a row's question, or None."""
    return next(iter(find_answers(row)), None)


def find_answers(row):
    """The answers to a row's question, a list: of `answers`, `answer` and `target` the first that says something."""
    found = []
    for name in ('answers', 'answer', 'target'):
        given = row.get(name)
        if isinstance(given, dict):  # SQuAD's
            given = given.get('text')
        given = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
        answers = [answer.get('text') if isinstance(answer, dict) else answer for answer in given]
        found.append([str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
                      for answer in answers])
    return next((answers for answers in found if any(answer not in (None, '') for answer in answers)),
                next(filter(None, found), []))


def parse_text(text):
    """[(role, content)] of a text with Question: and Answer:."""
    parts = re.split(r'(?:^|\s)(Question|Answer):', text)
    if len(parts) < 3 or parts[0].strip():
        raise BadRow('a text without Question: at its beginning')
    marks = parts[1::2]
    if any(a == b for a, b in pairwise(marks)):
        raise BadRow('a text in which Question: and Answer: do not alternate: give messages, if one is a part of what '
                     'is said')
    return [('user' if mark == 'Question' else 'assistant', content.strip())
            for mark, content in zip(marks, parts[2::2], strict=True)]


def find_passages(row):
    """The Passages of a row's ctxs, or of SQuAD's context, but for empty ones."""
    contexts = row.get('ctxs')
    if contexts is None and isinstance(row.get('context'), str):
        contexts = [dict(title=row.get('title'), text=row['context'])]
    if contexts is not None and not isinstance(contexts, list):
        raise BadRow(f"'ctxs' is no list of passages, but {describe(contexts)}")
    for number, passage in enumerate(contexts or [], 1):
        if not isinstance(passage, dict) or not isinstance(passage.get('text'), str):
            raise BadRow(f"passage {number} of 'ctxs' is no object with title and text")
    return [Passage(str(passage.get('title') or ''), passage['text']) for passage in contexts or []
            if passage['text'].strip()]
