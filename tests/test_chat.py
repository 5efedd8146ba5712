"""
Conversations with a model that has a template: sample.py as a command, and serve.py's chat completions by OpenAI's own
client. The model is hardly trained, so what is tested is what it is asked and given, not what it answers.
"""
import json
import shutil
import subprocess
import sys

import pytest

from configurator import Settings, UserError
from data.conversations import Passage, find_template, render
from data.tokenizer import load_tokenizer
from generation.chat import Chat, TooLong
from model import RETROConfig
from tests.conftest import ROOT, run
from tests.test_server import CHROMIUM, serve

QUESTION = 'What does textwrap.dedent do?'
TEMPLATE = '--template=plain'


@pytest.fixture(scope='module')
def trained(populated, tmp_path_factory):
    folder = tmp_path_factory.mktemp('chat') / 'run'
    shutil.copytree(populated, folder)
    run(ROOT / 'train.py', 'config.py', '--max_iters=4', '--block_size=128', folder=folder)
    return folder


@pytest.fixture(scope='module')
def served(trained):
    with serve(trained, TEMPLATE, '--passages=prompt', '--num_passages=1', '--max_tokens=600') as server:
        yield server


def make_chat(trained, **settings):
    defaults = dict(template='plain', passages='', num_passages=2)
    shape = dict(block_size=128, retrieval_chunk_size=16, vocab_size=1024, n_layer=2, n_head=2, n_embd=32,
                 retrieval_layers=[2], retrieval_k_neighbors=2)
    config = RETROConfig(**shape | {key: settings.pop(key) for key in list(settings) if key in shape})
    return Chat(Settings(**defaults | settings), config, load_tokenizer(str(trained / 'tokenizer.json')))


def said(*contents):
    """A conversation that a user begins."""
    return [dict(role=('user', 'assistant')[i % 2], content=content) for i, content in enumerate(contents)]


def test_a_prompt_is_what_the_template_renders_and_its_chunks_end_where_the_first_prompt_does(trained):
    chat = make_chat(trained)
    tokens = chat.prompt(said('one', 'two', 'three'), 8).tokens
    expected, _ = render(find_template('plain'), said('one', 'two', 'three'), chat.tokenizer, (), 16)
    assert tokens == expected.tolist()
    assert len(chat.prompt(said('one'), 8).tokens) % 16 == 0  # what it retrieves is read from the answer on
    without = make_chat(trained, retrieval_k_neighbors=0).prompt(said('one'), 8).tokens
    assert chat.tokenizer.decode(without) == 'Question: one\n\nAnswer:'


def test_what_is_longer_than_the_window_loses_the_end_of_its_passages_and_then_its_oldest_turns(trained):
    chat = make_chat(trained, passages='prompt', retrieval_k_neighbors=0)
    system, short, long = dict(role='system', content='be brief'), Passage('first', 'alpha beta'), Passage(
        'long', 'word ' * 500)
    asked = chat.prompt([system, *said('one', 'two', 'three')], 64, [short, long])
    first, second = asked.passages
    assert first.text == 'alpha beta' and long.text.startswith(second.text) and len(second.text) > 20
    assert (asked.dropped, asked.cut) == (0, 1) and 96 - 8 <= len(asked.tokens) <= 96
    history = said(*(f'message {i}' for i in range(41)))
    asked = chat.prompt([system, *history], 64, [short])
    text = chat.tokenizer.decode(asked.tokens)
    assert len(asked.tokens) <= 96 and text.endswith('Question: message 40\n\nAnswer:') and asked.dropped % 2 == 0
    assert text.startswith('be brief\n\nQuestion: ') and 'message 2\n' not in text and asked.cut == 1
    assert text.count('Question: ') == (41 - asked.dropped + 1) // 2 > 1
    assert chat.prompt([system, *history[asked.dropped - 2:]], 64, []).dropped == 2  # no more than needed
    with pytest.raises(TooLong, match="the question has .* of the model's window of 128 are free for it: shorten it"):
        chat.prompt(said('word ' * 500), 64, [long])


def test_passages_are_text_before_the_question_or_are_read_in_place_of_the_collection(trained):
    passages = [Passage('a', 'alpha'), Passage('b', 'beta')]
    source = object()
    in_prompt = make_chat(trained, passages='prompt').prompt(said(QUESTION), 8, passages, source)
    in_place = make_chat(trained, passages='neighbors').prompt(said(QUESTION), 8, passages, source)
    decode = make_chat(trained).tokenizer.decode
    assert 'title: a, source: alpha\n\ntitle: b, source: beta\n\nQuestion: ' in decode(in_prompt.tokens)
    assert in_prompt.source is source
    assert 'alpha' not in decode(in_place.tokens) and in_place.source.texts == ['alpha', 'beta']
    assert make_chat(trained, passages='neighbors', num_passages=5).count == 2  # as many as it reads
    with pytest.raises(UserError, match='was not tuned to answer: tune it with sft.py'):
        make_chat(trained, template='')


def sample(folder, *arguments, **options):
    return run(ROOT / 'sample.py', '--out_dir=out', *arguments, folder=folder, **options)


def test_sample_prints_the_answer_to_a_question_with_what_was_retrieved_for_it(trained):
    answer = sample(trained, TEMPLATE, '--passages=prompt', f'--start={QUESTION}', '--max_new_tokens=12',
                    '--show_neighbors')
    shown, _, passages = answer.stdout.partition('--- passages that the question was given')
    assert QUESTION not in shown and len(shown.strip()) > 5 and '  1. ' in passages
    own = sample(trained, TEMPLATE, '--passages=neighbors', f'--start={QUESTION}', '--max_new_tokens=12', '--json',
                 '--show_neighbors', '--neighbors=alpha beta', '--retrieval_milvus_uri=http://127.0.0.1:9')
    found = json.loads(own.stdout)
    assert found['prompt'] == QUESTION and found['passages'] == [{'title': '', 'text': 'alpha beta'}]
    assert found['neighbors'][0]['passages'][0]['document'] == 'passage 1' and not found['text'].startswith(' ')
    plain = sample(trained, TEMPLATE, '--template=', f'--start={QUESTION}', '--max_new_tokens=12').stdout
    assert plain.startswith(QUESTION)


def test_a_chat_goes_on_from_what_was_said_until_it_begins_anew(trained):
    arguments = [TEMPLATE, '--chat', '--retrieval=off', '--max_new_tokens=6', '--temperature=0', '--stop=\n', '--json']
    lines = [QUESTION, '', '/new', QUESTION, 'And then?', 'word ' * 400, 'word ' * 40]
    answer = subprocess.run([sys.executable, ROOT / 'sample.py', '--out_dir=out', *arguments], cwd=trained, text=True,
                            input='\n'.join(lines), capture_output=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [line['prompt'].strip() for line in lines[:3]] == [QUESTION, QUESTION, 'And then?'] and len(lines) == 4
    assert lines[0]['text'] == lines[1]['text']
    assert 'messages, the oldest, are left out' in answer.stderr and 'are free for it: shorten it' in answer.stderr


@pytest.mark.parametrize('arguments, said', [
    (['--chat'], 'the model continues texts and was not tuned to answer: tune it with sft.py, or give a --template'),
    (['--system=Be brief.', '--start=x'], 'the model continues texts and was not tuned to answer'),
    ([TEMPLATE], 'nothing is asked: give --start, --prompts, --interactive or --chat'),
    ([TEMPLATE, '--start=x', '--align=start'], '--align is given, and a tuned model is asked as it was tuned'),
    ([TEMPLATE, '--chat', '--start=x'], '--start, --prompts, --interactive and --chat exclude each other'),
    ([TEMPLATE, '--chat', '--num_samples=2'], '--num_samples is 2, and --chat goes on from one answer'),
    ([TEMPLATE, '--start=' + 'word ' * 400, '--retrieval=off'], "of the model's window of 128 are free for it"),
    (['--template=instructretor', '--start=x'], "did you mean 'instructretro'?"),
])
def test_what_cannot_be_asked_is_one_clear_line_and_exit_code_2(trained, arguments, said):
    answer = sample(trained, *arguments, check=False)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count('\n') == 1


def create(served, messages=None, seed=1, max_tokens=20, **options):
    extra = {key: options.pop(key) for key in ('retrieval', 'neighbors', 'top_k') if key in options}
    return served.client().chat.completions.create(model='out', messages=messages or said(QUESTION), seed=seed,
                                                   max_tokens=max_tokens, extra_body=extra, **options)


def test_a_question_is_answered_as_the_prompt_of_the_template_is_continued(served, trained):
    answer = create(served, retrieval='off', temperature=0)
    choice, = answer.choices
    assert answer.object == 'chat.completion' and answer.id.startswith('chatcmpl-') and answer.model == 'out'
    assert choice.message.role == 'assistant' and choice.finish_reason in ('stop', 'length')
    assert choice.message.content == choice.message.content.lstrip() and choice.retrieval is None
    tokenizer = load_tokenizer(str(trained / 'tokenizer.json'))
    prompt = render(find_template('plain'), said(QUESTION), tokenizer, (), 16)[0].tolist()
    text = served.client().completions.create(model='out', prompt=prompt, max_tokens=20, temperature=0, extra_body=dict(
        retrieval='off', align='start'), stop='\n\nQuestion:').choices[0].text
    assert choice.message.content == text.lstrip() and answer.usage.prompt_tokens == len(prompt)
    assert served.client().models.retrieve('out').template == 'plain'


def test_a_question_is_given_what_is_retrieved_for_it_or_what_the_request_has(served):
    live = create(served).choices[0].retrieval['passages']
    assert len(live) == 1 and live[0]['title'] and live[0]['text']
    own = create(served, neighbors=['alpha beta'])
    assert own.choices[0].retrieval['passages'] == [{'title': '', 'text': 'alpha beta'}]
    off = create(served, retrieval='off')
    assert off.choices[0].retrieval is None and off.usage.prompt_tokens < own.usage.prompt_tokens


def test_a_stream_has_the_message_the_usage_the_passages_and_the_logprobs_of_the_whole(served):
    options = dict(logprobs=True, top_logprobs=2, n=2)
    whole = create(served, **options)
    chunks = list(create(served, stream=True, stream_options={'include_usage': True}, **options))
    assert all(chunk.object == 'chat.completion.chunk' for chunk in chunks)
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].delta.role == 'assistant' and not any(part.delta.role for part in parts[1:])
        assert ''.join(part.delta.content or '' for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        scored = [token for part in parts if part.logprobs for token in part.logprobs.content]
        assert scored[:len(choice.logprobs.content)] == choice.logprobs.content
        for token in choice.logprobs.content:
            assert bytes(token.bytes).decode(errors='replace') == token.token or token.token.startswith('bytes:')
            assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.logprob
        found = [part.retrieval for part in parts if getattr(part, 'retrieval', None)]
        assert [p for one in found for p in one.get('passages', [])] == choice.retrieval['passages']
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_an_answer_ends_at_a_stop_string_and_a_long_history_says_what_it_lost(served):
    whole = create(served, temperature=0).choices[0].message.content
    stop = whole[6:9]
    answer = create(served, temperature=0, stop=stop)
    assert answer.choices[0].message.content == whole[:whole.index(stop)] and answer.choices[0].finish_reason == 'stop'
    messages = said(*['words of it ' * 3] * 41)
    answer = create(served, messages=messages, max_tokens=2)
    assert answer.dropped_messages > 30 and answer.usage.prompt_tokens <= 128
    again = [*said(QUESTION), create(served).choices[0].message, dict(role='user', content=[
        dict(type='text', text='And then?')])]  # as clients send it back
    assert create(served, messages=again).choices[0].message.content
    developer = [dict(role='developer', content='Be brief.'), *said(QUESTION)]
    assert create(served, messages=developer, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize('body, status, told', [
    ({}, 400, 'messages is missing'), ({'messages': []}, 400, 'messages is []'),
    ({'messages': 'x'}, 400, "messages is 'x'"), ({'messages': ['x']}, 400, "messages is 'x'"),
    ({'messages': [{'content': 'x'}]}, 400, 'message 1 has the role None, which is not known'),
    ({'messages': [{'role': 'tool', 'content': 'x'}]}, 400, "roles are system, developer, user, assistant"),
    ({'messages': [{'role': 'user'}]}, 400, 'message 1 (user) has no content'),
    ({'messages': [{'role': 'user', 'content': ' '}]}, 400, 'message 1 (user) has no content'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 400, 'the model reads text alone'),
    ({'messages': [*said('x', 'y'), {'role': 'system', 'content': 'z'}]}, 400, 'message 3 is of the system'),
    ({'messages': said('x', 'y')}, 400, 'the last message is of the assistant'),
    ({'messages': [{'role': 'assistant', 'content': 'x', 'tool_calls': [{}]}]}, 400, "'tool_calls', which the server"),
    ({'messages': said('word ' * 400)}, 400, "of the model's window of 128 are free for it"),
    ({'messages': said('x'), 'tools': [{}]}, 400, 'the server does not implement it'),
    ({'messages': said('x'), 'response_format': {'type': 'json_object'}}, 400, 'the server does not implement it'),
    ({'messages': said('x'), 'top_logprobs': 2}, 400, 'top_logprobs is given without logprobs'),
    ({'messages': said('x'), 'max_tokens': 2, 'max_completion_tokens': 2}, 400, 'are the same: leave one out'),
    ({'messages': said('x'), 'prompt': 'x'}, 400, "unknown parameter 'prompt'"),
    ({'messages': said('x'), 'neighbors': ['y'], 'retrieval': 'off'}, 400, 'leave one out'),
    ({'messages': said('x'), 'model': 'gpt-4'}, 404, "no model 'gpt-4'"),
])
def test_what_cannot_be_answered_is_an_error_of_openais_form(served, body, status, told):
    found, _, answer = served.ask(body, path='/v1/chat/completions')
    assert found == status and told in answer['error']['message'], answer
    assert answer['error'].keys() == {'message', 'type', 'param', 'code'}


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed (apt-get install chromium)')
def test_the_page_asks_a_tuned_model_shows_its_passages_and_goes_on_from_its_answer(served):
    from playwright.sync_api import sync_playwright
    wrong, bodies = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which(CHROMIUM), args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=390, height=800))
        page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' else None)
        page.on('pageerror', lambda error: wrong.append(str(error)))
        page.on('request', lambda request: bodies.append(request.post_data_json) if request.method == 'POST' else None)
        page.goto(served.url)
        page.get_by_label('Message', exact=True).fill(QUESTION + '<b id="injected">')
        page.get_by_label('Longest answer').fill('8')
        for number in (1, 2):
            page.get_by_label('Message', exact=True).press('Control+Enter')
            page.locator('#chat_status', has_text='Done: ').wait_for(timeout=30_000)
            page.wait_for_function(f"document.querySelectorAll('.turn.assistant').length === {number}")
            page.get_by_label('Message', exact=True).fill('And then?')
        answer = page.locator('.turn.assistant .text').first.inner_text()
        assert answer and page.locator('#injected').count() == 0
        page.locator('.turn.assistant summary').first.click()
        assert page.locator('.turn.assistant .passage .source').first.inner_text()
        assert [message['role'] for message in bodies[1]['messages']] == ['user', 'assistant', 'user']
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        page.get_by_role('button', name='New conversation').click()
        assert page.locator('.turn').count() == 0
        page.get_by_role('button', name='Continue a text').click()
        assert page.get_by_role('textbox', name='Prompt').is_visible() and not page.locator('#chat').is_visible()
        browser.close()
    assert not wrong
