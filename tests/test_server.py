"""serve.py as a process, on a model that the test has trained: by OpenAI's client, by plain HTTP, and in a browser."""
import asyncio
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT, run, wait_until

START = 'import textwrap\n\ndef wrap(text, width=70):\n    """Wrap a paragraph of text, returning a list of lines."""\n'
CHROMIUM = next((path for path in ('chromium', 'chromium-browser', 'google-chrome') if shutil.which(path)), None)


class Served:
    """A serve.py that listens."""

    def __init__(self, folder, *arguments, env=None):
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        environment.pop('NANORETRO_API_KEY', None)
        self.log = folder / 'serve.log'
        with open(self.log, 'a') as log:
            command = [sys.executable, str(ROOT / 'serve.py'), '--out_dir=out', '--port=0', *arguments]
            self.process = subprocess.Popen(command, cwd=folder, env={**environment, **(env or {})}, text=True,
                                            stdout=subprocess.PIPE, stderr=log)
        line = self.process.stdout.readline()
        assert line.startswith('serving out at http://'), self.log.read_text()
        self.url = line.split()[3]
        self.port = int(self.url.rpartition(':')[2])

    def client(self, key='none'):
        from openai import OpenAI
        return OpenAI(base_url=f'{self.url}/v1', api_key=key, max_retries=0, timeout=60)

    def ask(self, body=None, method='POST', path='/v1/completions', **headers):
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        if isinstance(body, dict):
            body = json.dumps(body)
        headers = {'Content-Type': 'application/json'} | {key.replace('_', '-'): v for key, v in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = answer.headers.get_content_type() == 'application/json'
        return answer.status, answer.headers, json.loads(data) if is_json else data.decode()

    def get(self, path, **headers):
        return self.ask(None, 'GET', path, **headers)[2]

    def metric(self, name, **headers):
        line, = [line for line in self.get('/metrics', **headers).splitlines() if line.startswith(f'nanoretro_{name} ')]
        return float(line.split()[-1])

    def end(self):
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(20)
        self.process.stdout.close()
        return code


@contextmanager
def serve(folder, *arguments, **options):
    served = Served(folder, *arguments, **options)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()
        served.process.stdout.close()


@pytest.fixture(scope='module')
def trained(populated, tmp_path_factory):
    folder = tmp_path_factory.mktemp('served') / 'run'
    shutil.copytree(populated, folder)
    run(ROOT / 'train.py', 'config.py', '--max_iters=4', folder=folder)
    return folder


@pytest.fixture(scope='module')
def served(trained):
    with serve(trained, '--retrieval_timeout=5', '--slots=4', '--max_tokens=600') as server:
        yield server


def create(served, prompt=START, max_tokens=20, seed=1, **options):
    extra = {key: options.pop(key) for key in ('align', 'retrieval', 'neighbors') if key in options}
    return served.client().completions.create(model='out', prompt=prompt, max_tokens=max_tokens, seed=seed,
                                              extra_body=extra, **options)


def text_of(stream):
    return ''.join(choice.text for chunk in stream for choice in chunk.choices)


def test_a_text_goes_on_and_says_what_was_read(served):
    answer = create(served, max_tokens=40)
    choice, = answer.choices
    assert answer.object == 'text_completion' and answer.model == 'out' and answer.id.startswith('cmpl-')
    assert choice.text and choice.finish_reason == 'length' and choice.logprobs is None
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == 40 + answer.usage.prompt_tokens
    chunks = choice.retrieval['chunks']
    size = answer.usage.prompt_tokens
    assert [chunk['end'] for chunk in chunks] == [*range(size % 16 or 16, size, 16), *range(size, size + 40, 16)]
    assert chunks[0]['first'] == 0 and START.startswith(chunks[0]['text'])
    for neighbor in chunks[-1]['neighbors']:
        assert neighbor['document'].startswith('stdlib/') and neighbor['chunk'] >= 1 and neighbor['text']
        assert -1 <= neighbor['similarity'] <= 1.001
    assert len(chunks[-1]['neighbors']) == 2
    for found in choice.retrieval['copied']:
        assert size <= found['first'] < found['end'] <= size + 40 and found['by'] in ('pointer', 'neighbor')
        passage, offset = found['passage'], found['offset']
        assert passage[offset:offset + len(found['text'])] == found['text']
    assert choice.retrieval['copied']


def test_the_engine_writes_the_same_without_a_server(served, trained, monkeypatch):
    from contextlib import closing

    from generation.engine import Engine, Request
    from generation.sampling import Sampling
    from generation.sources import CollectionSource
    from retrieval.retriever import Retriever
    from training.checkpoint import load_run
    monkeypatch.chdir(trained)
    settings, tokenizer, model, _ = load_run('out')
    with closing(Retriever(settings, tokenizer)) as retriever:
        engine = Engine(model, tokenizer, 1)
        engine.add(Request(tokenizer.encode_ordinary(START), 40, Sampling(temperature=0.7, top_k=0, top_p=0.9), seed=5,
                           source=CollectionSource(retriever)))
        expected = ''.join(event.text for event in engine.run())
    assert create(served, max_tokens=40, seed=5, temperature=0.7, top_p=0.9).choices[0].text == expected


def test_a_stream_has_the_text_the_usage_and_the_passages_of_the_whole(served):
    whole = create(served, max_tokens=40)
    chunks = list(create(served, max_tokens=40, stream=True, stream_options={'include_usage': True}))
    assert text_of(chunks) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == 'length' and not any(reasons[:-1])
    found = [choice.retrieval for chunk in chunks for choice in chunk.choices if getattr(choice, 'retrieval', None)]
    assert [chunk for one in found for chunk in one['chunks']] == whole.choices[0].retrieval['chunks']
    assert [run for one in found for run in one['copied']] == whole.choices[0].retrieval['copied']
    positions = [choice.position for chunk in chunks for choice in chunk.choices if getattr(choice, 'position', None)]
    assert positions == list(range(whole.usage.prompt_tokens, whole.usage.total_tokens))


def test_a_stream_is_made_of_events_that_end_with_done(served):
    _, headers, text = served.ask(dict(prompt='import os', max_tokens=3, stream=True))
    assert headers.get_content_type() == 'text/event-stream'
    lines = text.split('\n\n')
    assert lines[-2:] == ['data: [DONE]', ''] and all(line.startswith('data: ') for line in lines[:-1])


def test_a_seed_gives_the_same_text_whatever_else_is_written_and_another_seed_another(served):
    alone = create(served, max_tokens=30, seed=7).choices[0].text
    with ThreadPoolExecutor(6) as pool:
        others = list(pool.map(lambda seed: create(served, max_tokens=30, seed=seed).choices[0].text,
                               [7, 8, 7, 9, -3, 7]))
    assert others[0] == others[2] == others[5] == alone
    assert len({*others}) == 4


def test_texts_without_retrieval_are_the_same_beside_texts_that_read_and_after_them(served):
    alone = [create(served, max_tokens=20, seed=seed, retrieval='off').choices[0].text for seed in range(4)]
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda n: create(served, max_tokens=20, seed=n // 2, retrieval=('off', 'on')[n % 2]
                                                   ).choices[0].text, range(8)))
        assert texts[::2] == alone


def test_lists_of_prompts_token_ids_and_n_give_their_texts_in_order(served, trained):
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(str(trained / 'tokenizer.json'))
    answer = create(served, prompt=[START, 'import os'], n=2, max_tokens=8, echo=True, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(START) for choice in answer.choices] == [True, True, False, False]
    assert all(choice.text.startswith('import os') for choice in answer.choices[2:])
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.completion_tokens == 32
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode_ordinary(text)) for text in (START, 'import os'))
    by_ids = create(served, prompt=tokenizer.encode_ordinary(START), max_tokens=8, seed=3, echo=True)
    assert by_ids.choices[0].text == answer.choices[0].text
    second = create(served, prompt=[tokenizer.encode_ordinary(START)] * 2, max_tokens=8, seed=4, echo=True)
    assert second.choices[1].text == answer.choices[1].text
    streamed = {}
    for chunk in create(served, prompt=[START, 'import os'], n=2, max_tokens=8, echo=True, seed=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, '') + choice.text
    assert streamed == {choice.index: choice.text for choice in answer.choices}


def test_a_text_ends_before_a_stop_string_in_a_stream_too(served):
    whole = create(served, max_tokens=60).choices[0].text
    stop = whole[20:23]
    expected = whole[:whole.index(stop)]
    answer = create(served, max_tokens=60, stop=['never this', stop], logprobs=1)
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == 'stop'
    assert answer.usage.completion_tokens < 60
    assert ''.join(answer.choices[0].logprobs.tokens).startswith(expected)
    assert all(offset < len(expected) for offset in answer.choices[0].logprobs.text_offset)
    assert text_of(create(served, max_tokens=60, stop=stop, stream=True)) == expected


def test_logprobs_are_of_the_tokens_and_of_the_likeliest(served):
    answer = create(served, max_tokens=12, temperature=0, logprobs=3)
    text, logprobs = answer.choices[0].text, answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for token, logprob, top, offset in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs,
                                           logprobs.text_offset, strict=True):
        assert text[offset:].startswith(token) or token.startswith('bytes:')
        assert top[token] == logprob == max(top.values()) <= 0 and len(top) == 3
    chunks = list(create(served, max_tokens=12, temperature=0, logprobs=3, stream=True))
    streamed = [choice.logprobs.tokens[0] for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert streamed == logprobs.tokens
    assert create(served, logprobs=0, max_tokens=2).choices[0].logprobs.top_logprobs[0].keys()


def test_an_echoed_prompt_has_the_logprobs_that_it_would_have_been_written_with(served, trained):
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(str(trained / 'tokenizer.json'))
    written = create(served, max_tokens=40, temperature=0, logprobs=2, align='start').choices[0].logprobs
    ids = tokenizer.encode_ordinary(START) + [tokenizer.encode_single_token(token.encode()) for token in written.tokens]
    for stream in (False, True):
        answer = create(served, prompt=ids, max_tokens=2, logprobs=2, echo=True,
                        align='start', stream=stream)
        logprobs = [choice.logprobs for part in (answer if stream else [answer]) for choice in part.choices
                    if choice.logprobs]
        tokens, token_logprobs, offsets = ([value for part in logprobs for value in getattr(part, name)]
                                           for name in ('tokens', 'token_logprobs', 'text_offset'))
        assert token_logprobs[0] is None and logprobs[0].top_logprobs[0] is None
        assert ''.join(tokens).startswith(START + ''.join(written.tokens))
        assert offsets == list(itertools.accumulate(map(len, tokens[:-1]), initial=0))
        first = len(tokens) - 2 - len(written.tokens)
        assert token_logprobs[first:-2] == pytest.approx(written.token_logprobs, abs=1e-4)


def test_passages_of_ones_own_take_the_place_of_the_collections(served):
    passage = 'def shout(text):\n    return text.upper() + "!"\n'
    answer = create(served, prompt='def shout(text):\n    return', neighbors=[passage], temperature=0)
    for chunk in answer.choices[0].retrieval['chunks']:
        assert [neighbor['document'] for neighbor in chunk['neighbors']] == ['passage 1']
        assert chunk['neighbors'][0]['text'] == passage and chunk['neighbors'][0]['similarity'] is None
    assert all(found['document'] == 'passage 1' for found in answer.choices[0].retrieval['copied'])
    status, _, body = served.ask(dict(prompt='x', neighbors=['one', 'two', 'and three']))
    assert status == 400 and 'and three' in body['error']['message'] and body['error']['param'] == 'neighbors'


def test_retrieval_off_reads_nothing_and_writes_something_else(served):
    on, off = (create(served, max_tokens=40, temperature=0, retrieval=arm).choices[0] for arm in ('on', 'off'))
    assert off.retrieval is None and on.retrieval['chunks'] and on.text != off.text


def test_a_prompt_that_names_the_end_of_text_is_text(served):
    answer = create(served, prompt='<|endoftext|>', max_tokens=4, echo=True)
    assert answer.choices[0].text.startswith('<|endoftext|>') and answer.usage.prompt_tokens > 3


@pytest.mark.parametrize('body, status, said', [
    ('{"prompt": "x"', 400, 'cannot be read as JSON'),
    ('[' * 100_000, 400, 'cannot be read as JSON'),
    ('["x"]', 400, 'has to be a JSON object'),
    (b'{"prompt": "\xff"}', 400, 'cannot be read as JSON'),
    ('{"prompt": "\\ud83d"}', 400, 'half of a surrogate pair'),
    ('{"prompt": "x", "stop": ["\\udead"]}', 400, 'half of a surrogate pair'),
    ('{"prompt": "x", "temperature": NaN}', 400, 'NaN is no number'),
    ('{"prompt": "x", "temperature": 1e999}', 400, 'temperature is inf'),
    ('{"prompt": "x", "seed": ' + '9' * 5000 + '}', 400, 'cannot be read as JSON'),
    ('{"prompt": "x", "seed": ' + '9' * 4000 + '}', 400, 'seed is 999'),
    ({}, 400, 'prompt is missing'),
    ({'prompt': ''}, 400, 'the prompt is empty'),
    ({'prompt': []}, 400, 'prompt has to be a string'),
    ({'prompt': ['x', '']}, 400, 'prompt 2 is empty'),
    ({'prompt': [[1], []]}, 400, 'prompt 2 is empty'),
    ({'prompt': ['x', 1]}, 400, 'prompt has to be a string'),
    ({'prompt': [1, True]}, 400, 'prompt has to be a string'),
    ({'prompt': [99999]}, 400, 'which is no token'),
    ({'prompt': [-1]}, 400, 'which is no token'),
    ({'prompt': 'x ' * 600}, 400, 'both together may be 600'),
    ({'prompt': 'x', 'max_tokens': 600}, 400, 'both together may be 600'),
    ({'prompt': 'x', 'max_tokens': 0}, 400, 'max_tokens is 0'),
    ({'prompt': 'x', 'max_tokens': True}, 400, 'max_tokens is True'),
    ({'prompt': 'x', 'max_tokens': '5'}, 400, "max_tokens is '5'"),
    ({'prompt': 'x', 'temperature': -1}, 400, 'temperature is -1'),
    ({'prompt': 'x', 'temperature': 3}, 400, 'temperature is 3'),
    ({'prompt': 'x', 'top_p': 0}, 400, 'top_p is 0'),
    ({'prompt': 'x', 'min_p': 2}, 400, 'min_p is 2'),
    ({'prompt': 'x', 'repetition_penalty': 0}, 400, 'repetition_penalty is 0'),
    ({'prompt': 'x', 'n': 0}, 400, 'n is 0'),
    ({'prompt': ['x'] * 200, 'n': 100}, 400, '20000 texts are asked for'),
    ({'prompt': 'x', 'logprobs': 99}, 400, 'logprobs is 99'),
    ({'prompt': 'x', 'stop': ''}, 400, 'stop has to be'),
    ({'prompt': 'x', 'stop': 'x' * 1000}, 400, 'stop has to be'),
    ({'prompt': 'x', 'stop': ['a'] * 99}, 400, 'stop has to be'),
    ({'prompt': 'x', 'stream_options': {}}, 400, 'without stream'),
    ({'prompt': 'x', 'neighbours': ['y']}, 400, "did you mean 'neighbors'?"),
    ({'prompt': 'x', 'neighbors': ['y'], 'retrieval': 'off'}, 400, 'leave one out'),
    ({'prompt': 'x', 'neighbors': []}, 400, 'neighbors is empty'),
    ({'prompt': 'x', 'neighbors': ['']}, 400, 'passage 1 is empty'),
    ({'prompt': 'x', 'neighbors': ['y ' * 700]}, 400, 'may have 600 together'),
    ({'prompt': 'x', 'retrieval': 'maybe'}, 400, "retrieval is 'maybe'"),
    ({'prompt': 'x', 'presence_penalty': 1}, 400, 'does not implement'),
    ({'prompt': 'x', 'suffix': 'y'}, 400, 'does not implement'),
    ({'prompt': 'x', 'model': 'gpt-4'}, 404, "no model 'gpt-4'"),
])
def test_what_cannot_be_answered_is_an_error_of_openais_form(served, body, status, said):
    found, _, answer = served.ask(body)
    assert found == status and said in answer['error']['message'], answer
    assert answer['error']['type'] == 'invalid_request_error' and answer['error'].keys() == {'message', 'type', 'param',
                                                                                           'code'}


def test_other_paths_types_and_hosts_are_refused(served):
    assert served.ask(dict(messages=[]), path='/v1/chat/completions')[0] == 404
    assert 'use POST /v1/completions' in served.ask({}, path='/v1/chat/completions')[2]['error']['message']
    assert served.ask(None, 'GET')[0] == 405
    assert served.ask(dict(prompt='x'), Content_Type='text/plain')[0] == 415
    status, _, answer = served.ask(dict(prompt='x'), Host='evil.example:8000')
    assert status == 403 and 'evil.example' in answer['error']['message']
    from openai import NotFoundError
    with pytest.raises(NotFoundError):
        served.client().models.retrieve('gpt-4')
    assert [model.id for model in served.client().models.list()] == ['out']


def test_a_body_of_100_mb_is_refused_and_the_server_goes_on(served):
    status, _, answer = served.ask(json.dumps(dict(prompt='x' * 100_000_000)))
    assert status == 413 and answer['error']['code'] == 'too_large'
    assert create(served, max_tokens=2).choices[0].text


def test_null_stands_for_a_default(served):
    body = dict(prompt='import os', max_tokens=5, seed=1)
    nulls = dict(stop=None, logprobs=None, temperature=None, user=None, suffix=None, best_of=None, neighbors=None)
    first, second = (served.ask(one)[2]['choices'] for one in (body, {**body, **nulls}))
    assert first == second


def test_a_client_that_goes_away_frees_its_place(served):
    before = served.metric('requests_total{code="499"}') if 'code="499"' in served.get('/metrics') else 0
    stream = create(served, max_tokens=500, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    connection = http.client.HTTPConnection('127.0.0.1', served.port)
    connection.request('POST', '/v1/completions', json.dumps(dict(prompt='x', max_tokens=500, n=6, temperature=0)),
                       {'Content-Type': 'application/json'})
    wait_until(lambda: served.metric('running_rows') == 4)
    connection.close()
    wait_until(lambda: served.metric('running_rows') == 0 and served.metric('waiting_rows') == 0, 5)
    wait_until(lambda: served.metric('requests_total{code="499"}') == before + 2, 5)
    assert served.metric('tokens_total{kind="completion"}') < 2000


def test_metrics_count_and_health_says_ok(served):
    create(served, max_tokens=3)
    assert served.metric('requests_total{code="200"}') >= 1 and served.metric('tokens_total{kind="prompt"}') > 0
    assert served.metric('knowledge_base_up') == 1 and served.metric('engine_seconds_total{part="model"}') > 0
    text, buckets = served.get('/metrics'), []
    for line in text.splitlines():
        if line.startswith('nanoretro_time_to_first_token_seconds_bucket'):
            buckets.append(int(line.split()[-1]))
    assert buckets == sorted(buckets) and buckets[-1] == served.metric('time_to_first_token_seconds_count') > 0
    assert served.get('/health') == {'status': 'ok', 'knowledge_base': 'ok'}


def test_a_database_that_hangs_is_503_for_those_who_need_it_alone_and_served_again_when_it_is_back(trained, served):
    pid = int((trained / 'milvus.db/.nanoretro-server').read_text().split()[1])
    stream = iter(create(served, max_tokens=500, temperature=0, stream=True))
    next(stream)
    os.kill(pid, signal.SIGSTOP)
    try:
        from openai import APIError
        with pytest.raises(APIError, match='the knowledge base is away'):
            list(stream)
        started = time.monotonic()
        status, headers, answer = served.ask(dict(prompt=START, max_tokens=4))
        assert status == 503 and answer['error']['code'] == 'knowledge_base_away' and headers['Retry-After']
        assert create(served, max_tokens=40, retrieval='off').choices[0].text
        assert create(served, max_tokens=20, neighbors=['import os']).choices[0].text
        assert time.monotonic() - started < 3
        assert served.get('/health')['knowledge_base'].startswith('away: ') and served.metric('knowledge_base_up') == 0
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: served.metric('knowledge_base_up') == 1)
    assert create(served, max_tokens=40).choices[0].retrieval['chunks']
    log = served.log.read_text()
    assert 'the knowledge base is away' in log and 'the knowledge base is back' in log


def test_a_database_whose_server_is_killed_is_opened_again(trained, served):
    expected = create(served, max_tokens=40).choices[0].text
    os.kill(int((trained / 'milvus.db/.nanoretro-server').read_text().split()[1]), signal.SIGKILL)

    def is_back():
        status, _, answer = served.ask(dict(prompt=START, max_tokens=40, seed=1))
        assert status in (200, 503)
        return status == 200 and answer['choices'][0]['text'] == expected
    wait_until(is_back)


@pytest.fixture(scope='module')
def small(trained):
    with serve(trained, '--slots=1', '--queue=1', '--timeout=2', '--max_tokens=100000',
               env=dict(NANORETRO_API_KEY='sesame & café')) as server:
        yield server


KEY = dict(Authorization='Bearer sesame & café'.encode())


def test_a_key_is_wanted_and_never_logged(small):
    for headers in ({}, dict(Authorization='Bearer open'), dict(Authorization='sesame & café'.encode()),
                    dict(Authorization=b'Bearer \xff\xfe')):
        status, found, answer = small.ask(dict(prompt='x'), **headers)
        assert status == 401 and answer['error']['code'] == 'invalid_api_key' and found['WWW-Authenticate'] == 'Bearer'
        for path in ('/metrics', '/v1/models'):
            assert small.ask(None, 'GET', path, **headers)[0] == 401
    assert small.ask(dict(prompt='x', max_tokens=2), **KEY)[0] == 200
    assert small.ask(dict(prompt='x', max_tokens=2), Host='any.example', **KEY)[0] == 200
    assert small.ask(None, 'GET', '/health')[0] == small.ask(None, 'GET', '/')[0] == 200
    assert 'sesame' not in small.log.read_text()


def test_more_than_the_queue_holds_is_429_and_what_takes_too_long_504(small):
    body = dict(prompt='x', max_tokens=50_000, temperature=0)  # it repeats itself, and never ends
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: small.ask(body, **KEY), range(6)))
    assert sorted(status for status, _, _ in answers) == [429] * 4 + [504] * 2
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[1]['Retry-After']) > 0 and refused[2]['error']['code'] == 'rate_limit_exceeded'
    status, _, text = small.ask({**body, 'stream': True}, **KEY)
    assert status == 200 and json.loads(text.split('\n\n')[-2].removeprefix('data: '))['error']['code'] == 'timeout'
    wait_until(lambda: small.metric('running_rows', **KEY) == 0)
    assert small.ask(dict(prompt='x', max_tokens=2), **KEY)[0] == 200


def test_ctrl_c_ends_the_server_within_two_seconds_and_its_streams_with_an_error(small):
    """The last test of this server."""
    lines = []

    def read():
        lines.extend(small.ask(dict(prompt='x', max_tokens=50_000, temperature=0, stream=True), **KEY)[2].split('\n\n'))
    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: small.metric('running_rows', **KEY) == 1)
    started = time.monotonic()
    assert small.end() == 0
    assert time.monotonic() - started < 2.5
    thread.join()
    assert json.loads(lines[-2].removeprefix('data: '))['error']['code'] == 'ending'
    assert 'Traceback' not in small.log.read_text()


@pytest.mark.parametrize('arguments, said', [
    (['--out_dir=nowhere'], "no checkpoint in 'nowhere'"),
    (['--host=0.0.0.0'], 'lets other machines in, and there is no key'),
    (['--host=nowhere.invalid'], "--host 'nowhere.invalid' is no address of this machine"),
    (['--port=99999'], '--port must be at least 0'),
    (['--slots=0'], '--slots must be at least 1'),
    (['--timeout=nan'], '--timeout must be at least'),
    (['--n_layers=3'], "unknown config key 'n_layers'"),
    (['--retrieval_milvus_uri=other.db'], "no collection 'chunks' in other.db"),
    (['--port=TAKEN'], 'cannot be listened on (Address already in use)'),
])
def test_what_cannot_be_served_is_one_clear_line_and_exit_code_2(trained, arguments, said):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        arguments = [argument.replace('TAKEN', str(taken.getsockname()[1])) for argument in arguments]
        answer = run(ROOT / 'serve.py', '--out_dir=out', '--port=0', *arguments, folder=trained, check=False)
    assert answer.returncode == 2 and said in answer.stderr
    assert answer.stderr.startswith('error: ') and answer.stderr.count('\n') == 1


def test_help_names_the_options(tmp_path):
    answer = run(ROOT / 'serve.py', '--help', folder=tmp_path)
    assert all(f'--{name}' in answer.stdout for name in ('out_dir', 'host', 'port', 'api_key', 'queue', 'timeout'))


class Broken:
    """A source whose pointers fail."""
    has_neighbors, has_pointers = False, True

    def point(self, tokens, last=None):
        raise ZeroDivisionError('of the test')

    def draft(self, tokens, count):
        return 0, tokens[:0]


def test_an_exception_in_the_engine_is_500_for_the_texts_in_it_and_the_next_are_written(trained, monkeypatch, capsys):
    from generation.engine import Engine, Request
    from generation.worker import ApiError, Job, Worker
    from training.checkpoint import load_run
    monkeypatch.chdir(trained)
    _, tokenizer, model, _ = load_run('out')

    async def talk():
        worker, queue = Worker(Engine(model, tokenizer, slots=2), 8), asyncio.Queue()
        worker.start(asyncio.get_running_loop())
        worker.submit([Job(Request([1, 2], 4, source=source), queue) for source in (None, Broken(), None)])
        items = [await asyncio.wait_for(queue.get(), 20) for _ in range(6)]
        worker.close()
        worker.thread.join(5)
        return items, worker
    items, worker = asyncio.run(talk())
    assert [item.status for item in items[:2] if isinstance(item, ApiError)] == [500, 500]
    assert [item[3] for item in items[2:]] == [None, None, None, 'length']
    assert 'ZeroDivisionError: of the test' in capsys.readouterr().err
    assert not worker.jobs and not worker.waiting and not worker.engine.rows and not worker.thread.is_alive()


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed (apt-get install chromium)')
def test_the_page_writes_with_and_without_retrieval_and_shows_what_was_read(served):
    from playwright.sync_api import sync_playwright
    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which(CHROMIUM), args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=390, height=800))
        page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' else None)
        page.on('pageerror', lambda error: wrong.append(str(error)))
        page.on('request', lambda request: wrong.append(request.url) if not request.url.startswith(
            (served.url, 'data:')) else None)
        page.goto(served.url)
        page.locator('#model', has_text='out').wait_for()
        page.get_by_role('textbox', name='Prompt').fill(START + '<b id="injected">&amp;</b>')
        page.locator('#max_tokens').fill('40')
        page.keyboard.press('Tab')
        page.get_by_role('textbox', name='Prompt').press('Control+Enter')
        page.locator('#status', has_text='Done: 80 tokens').wait_for(timeout=30_000)
        assert page.locator('#on_text').inner_text().startswith(START) and page.locator('#injected').count() == 0
        assert page.locator('#on_text').inner_text() != page.locator('#off_text').inner_text()
        chunks = page.locator('#on_text .chunk[role=button]')
        assert chunks.count() == 3 and page.locator('#off_text [role=button]').count() == 0
        chunks.nth(1).focus()
        page.keyboard.press('Enter')
        assert chunks.nth(1).get_attribute('aria-pressed') == 'true'
        shown = page.locator('#passages').inner_text()
        assert 'Chunk 2 of the text' in shown and 'stdlib/' in shown and 'similarity' in shown
        assert page.locator('#on_text .copied').count() > 0
        assert page.evaluate('document.documentElement.scrollWidth') <= 390  # nothing is cut off on a phone
        browser.close()
    assert not wrong
