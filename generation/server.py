"""
The server's app: OpenAI's completions and, of a tuned model, chat completions; its list of models, health, metrics, and
the page (page.html).

    uvicorn.run(create_app(Service(...)))    # serve.py does that

Beyond OpenAI's parameters a request takes top_k, min_p, repetition_penalty, align, neighbors (passages of the user's
own, in place of the collection's) and retrieval ('off': without). Each choice of an answer has `retrieval`:

    chunks   of the prompt and what follows it: tokens `first` to `end` - 1 found `neighbors`, with which the tokens
             from `end` on were written
    copied   runs of new tokens, `first` to `end` - 1, that stand where a pointer found them, or in a neighbor, from the
             character `offset` of the `passage` on

and of a chat `passages`, which the question was given. Tokens are counted from the prompt's first. A stream has them as
they come, and each token's `position`.
"""
import asyncio
import base64
import codecs
import copy
import difflib
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import time
import traceback
import uuid
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from configurator import UserError, to_json
from data.conversations import Passage as GivenPassage
from data.tokenizer import token_bytes, tokenize
from generation.chat import Chat, Prompt, TooLong
from generation.engine import Request
from generation.origins import copied_runs, named_runs, passage_at
from generation.sampling import Sampling
from generation.sources import PassageSource
from generation.worker import BUCKETS, ApiError, Away, Job, LiveCollection, Passage, Worker

PAGE = os.path.join(os.path.dirname(__file__), 'page.html')
MOST_BYTES = 1 << 21  # of a body
MOST_DRAINED = 1 << 28  # bytes of a larger one that are read before it is refused: a client that writes does not listen
LEAST_TEMPERATURE = 1e-5  # below, the likeliest token is taken
MOST_STOPS, LONGEST_STOP = 16, 256  # strings, characters
PARTIAL = 'bytes:'  # begins the name of a token that is a part of a character
GONE = 499  # status of a request whose client went away


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # there is none


class Asked(BaseModel):
    """The body of a request, without what is null in it."""
    model_config = ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)
    model: str = ''
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] = []
    seed: int | None = Field(None, ge=-2**63, lt=2**64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ''  # is not used
    # of OpenAI's, accepted at values that change nothing
    logit_bias: dict[str, float] = Field({}, max_length=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    # beyond OpenAI's
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    retrieval: Literal['on', 'off'] = 'on'
    neighbors: list[str] | None = None


class AskedText(Asked):
    """A text to continue."""
    prompt: Any
    max_tokens: int = Field(16, ge=1)
    logprobs: int = Field(-1, ge=0, le=20)
    echo: bool = False
    best_of: int = 1  # these two at values that change nothing
    suffix: Literal[''] = ''
    align: Literal['prompt', 'start'] = 'prompt'

    @property
    def likeliest(self):
        """How many of the likeliest tokens to report beside each; -1: nothing."""
        return self.logprobs


class AskedChat(Asked):
    """A conversation to answer."""
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # OpenAI's newer name
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    # of OpenAI's, accepted at values that change nothing
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal['none', 'auto'] = 'none'
    functions: list[Any] = Field([], max_length=0)
    response_format: dict[Literal['type'], Literal['text']] = {}
    modalities: list[Literal['text']] = []
    parallel_tool_calls: bool = True
    store: Literal[False] = False
    metadata: dict[str, str] = {}
    echo: ClassVar[bool] = False
    align: ClassVar[str] = 'start'  # the template aligns it

    @property
    def likeliest(self):
        return self.top_logprobs if self.logprobs else -1


NOT_IMPLEMENTED = ('best_of', 'suffix', 'logit_bias', 'presence_penalty', 'frequency_penalty', 'tools', 'tool_choice',
                   'functions', 'response_format', 'modalities', 'store')
MAX_TOKENS = 256  # of an answer in a chat, if a request does not say
ROLES = dict(system='system', developer='system', user='user', assistant='assistant')


@dataclass
class Service:
    """What the app serves, and how."""
    name: str
    config: object  # RETROConfig
    tokenizer: object
    live: LiveCollection | None  # what a text reads; None: nothing
    worker: Worker
    chat: Chat | None = None  # None: the model was not tuned to answer
    finder: LiveCollection | None = None  # of a PassageFinder; None: a question is given no passages
    api_key: str = ''
    max_tokens: int = 4096  # of a prompt and what follows it
    timeout: float = 120.0  # seconds for a request
    requests: Counter = field(default_factory=Counter)  # by status
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.longest_token = max(len(token or b'') for token in token_bytes(self.tokenizer))

    def away(self):
        """Why the knowledge base cannot be asked now, '' if it can, None if there is none."""
        reasons = [source.away for source in (self.live, self.finder) if source]
        return max(reasons, key=len) if reasons else None


def create_app(service):
    @asynccontextmanager
    async def lifespan(_):
        service.worker.start(asyncio.get_running_loop())
        yield

    async def allow(request: HttpRequest):
        check_host(service, request)

    async def allow_key(request: HttpRequest):
        check_key(service, request)

    app = FastAPI(lifespan=lifespan, openapi_url=None, dependencies=[Depends(allow)],
                  telemetry=dict(tracing=False, metrics=False, logs=False, auto_configure=False))
    page, page_headers = load_page()

    @app.get('/')
    async def show_page():
        return HTMLResponse(page, headers=page_headers)

    @app.get('/health')
    async def health():
        is_alive = service.worker.thread.is_alive()
        reason = service.away()
        return as_json(dict(status='ok' if is_alive else 'the engine has ended',
                            knowledge_base='none' if reason is None else f'away: {reason}' if reason else 'ok'),
                       200 if is_alive else 503)

    @app.get('/metrics', dependencies=[Depends(allow_key)])
    async def metrics():
        return PlainTextResponse(describe_metrics(service), media_type='text/plain; version=0.0.4')

    @app.get('/v1/models', dependencies=[Depends(allow_key)])
    async def models():
        return as_json(dict(object='list', data=[describe_model(service)]))

    @app.get('/v1/models/{name:path}', dependencies=[Depends(allow_key)])
    async def model(name: str):
        check_model(service, name)
        return as_json(describe_model(service))

    @app.post('/v1/completions', dependencies=[Depends(allow_key)])
    async def completions(request: HttpRequest):
        return await answer(request, AskedText)

    @app.post('/v1/chat/completions', dependencies=[Depends(allow_key)])
    async def chat_completions(request: HttpRequest):
        return await answer(request, AskedChat)

    async def answer(request, kind):
        try:
            response = await complete(service, request, kind)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except Exception as error:
            service.requests[getattr(error, 'status', 500)] += 1
            raise
        if not isinstance(response, Stream):  # which counts itself when it ends
            service.requests[response.status_code] += 1
        return response

    @app.exception_handler(ApiError)
    async def refuse(_, error):
        return as_json(describe_error(error), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def refuse_path(request, error):
        reason = f'there is no {request.method} {request.url.path}'
        return as_json(describe_error(ApiError(error.status_code, reason, code='unknown_url')), error.status_code,
                       error.headers)

    @app.exception_handler(Exception)
    async def fail(_, error):
        return as_json(describe_error(ApiError(500, 'the server failed, and its log says why')), 500)

    return app


def load_page():
    """The page, and headers that let a browser run and fetch nothing but what is in it."""
    with open(PAGE, encoding='utf-8') as file:
        page = file.read()
    script, style = (base64.b64encode(hashlib.sha256(
        re.search(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL).group(1).encode()).digest()).decode()
        for tag in ('script', 'style'))
    policy = (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
              f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return page, {'Content-Security-Policy': policy, 'Referrer-Policy': 'no-referrer', 'Cache-Control': 'no-cache',
                  'X-Content-Type-Options': 'nosniff'}


def as_json(value, status=200, headers=None):
    return Response(to_json(value), status, headers, 'application/json')


def describe_error(error):
    kind = 'server_error' if error.status >= 500 else 'invalid_request_error'
    return dict(error=dict(message=error.message, type=kind, param=error.param, code=error.code))


def describe_model(service):
    c = service.config
    return dict(id=service.name, object='model', created=service.created, owned_by='nanoretro',
                max_tokens=service.max_tokens, chunk_size=c.retrieval_chunk_size,
                neighbors=c.retrieval_k_neighbors if c.has_neighbors else 0,
                pointers=c.retrieval_pointers if c.has_pointers else 0,
                template=service.chat.template.name if service.chat else None,
                passages=service.chat.count if service.finder else 0)


def check_host(service, request):
    """
    Without a key only this machine may ask: neither may a page of another site, whose name was made to lead here, nor,
    since bodies have to be of a type that asks first (read_body), one that sends blindly.
    """
    name = request.headers.get('host', 'localhost')
    name = name[1:].partition(']')[0] if name.startswith('[') else name.partition(':')[0]
    if not service.api_key and not is_loopback(name):
        raise ApiError(403, f'without a key the server answers to localhost alone, and was asked as {name!r}: start it '
                       f'with NANORETRO_API_KEY in its environment', code='unknown_host')


def is_loopback(host):
    """Whether a name or an address can only be this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def check_key(service, request):
    scheme, _, key = request.headers.get('authorization', '').partition(' ')
    # headers are read as latin-1, whatever they are
    if service.api_key and not (scheme.lower() == 'bearer' and hmac.compare_digest(
            key.strip().encode('latin-1'), service.api_key.encode())):
        reason = 'the key is wrong' if key else 'a key is wanted: send Authorization: Bearer KEY'
        raise ApiError(401, reason, code='invalid_api_key', headers={'WWW-Authenticate': 'Bearer'})


def check_model(service, name):
    if name != service.name:
        raise ApiError(404, f'there is no model {name!r}: this is {service.name!r}', 'model', 'model_not_found')


async def read_body(request):
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
        raise ApiError(415, f'the body is of type {kind!r}: send Content-Type: application/json', code='content_type')
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= MOST_BYTES:
            parts.append(part)
        elif size > MOST_DRAINED:
            break
    if size > MOST_BYTES:
        raise ApiError(413, f'the body has {size:,} bytes or more: send {MOST_BYTES:,} at most', code='too_large')
    return b''.join(parts)


def parse(data, kind):
    """An AskedText or AskedChat, of the bytes of a body."""
    def refuse(name):
        raise ValueError(f'{name} is no number')
    try:
        body = json.loads(data, parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, 'a string of the body has one half of a surrogate pair, such as \\ud83d without the other: '
                       'send whole characters', code='invalid_json') from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f'the body cannot be read as JSON: {error}', code='invalid_json') from error
    if not isinstance(body, dict):
        raise ApiError(400, f'the body has to be a JSON object, and is {shorten(body)}', code='invalid_json')
    try:
        return kind.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:
        raise describe_invalid(error.errors()[0], kind) from None


def describe_invalid(error, kind):
    """The ApiError for an error of pydantic's."""
    name, value = str(error['loc'][0]), error['input']
    if error['type'] == 'extra_forbidden' and len(error['loc']) == 1:
        nearest = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.5)
        hint = f'did you mean {nearest[0]!r}?' if nearest else f'there are {", ".join(kind.model_fields)}'
        return ApiError(400, f'unknown parameter {shorten(name)}: {hint}', shorten(name))
    if error['type'] == 'missing':
        return ApiError(400, f'{name} is missing', name)
    message = error['msg'][0].lower() + error['msg'][1:]
    if name in NOT_IMPLEMENTED:
        message += '; the server does not implement it: leave it out'
    return ApiError(400, f'{name} is {shorten(value)}: {message}', name)


def shorten(value):
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = 'a number of thousands of digits'
    return text if len(text) <= 60 else text[:60] + '…'


def prepare(service, asked, queue):
    """The Jobs of a request, and each one's Prompt."""
    check_model(service, asked.model or service.name)
    is_chat = isinstance(asked, AskedChat)
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if len(stop) > MOST_STOPS or not all(0 < len(s) <= LONGEST_STOP for s in stop):
        raise ApiError(400, f'stop has to be up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters', 'stop')
    if not is_chat and asked.best_of not in (1, asked.n):
        raise ApiError(400, f'best_of is {asked.best_of}, which the server does not implement: leave it out', 'best_of')
    if asked.stream_options and not asked.stream:
        raise ApiError(400, 'stream_options are given without stream: leave them out', 'stream_options')
    given = [read_messages(service, asked)] if is_chat else split_prompts(asked.prompt)
    count = len(given) * asked.n
    most = service.worker.most_waiting + service.worker.engine.slots
    if count > most:
        raise ApiError(400, f'{count} texts are asked for, and the server has room for {most}: ask for fewer', 'n')
    max_tokens = most_tokens(service, asked) if is_chat else asked.max_tokens
    if is_chat:
        prompts, stop = [ask(service, asked, given[0], max_tokens)], (*stop, *service.chat.template.stop)
    else:
        source = pick_source(service, asked)
        prompts = [Prompt(read_prompt(service, prompt), prompt if isinstance(prompt, str) else None, source)
                   for prompt in given]
    temperature = asked.temperature if asked.temperature >= LEAST_TEMPERATURE else 0
    sampling = Sampling(asked.repetition_penalty, temperature, max(0, asked.top_k), asked.top_p, asked.min_p)
    seed = secrets.randbits(62) if asked.seed is None else asked.seed % 2**64
    jobs = []
    for number, prompt in enumerate(prompts):
        if not prompt.tokens:
            name = 'the prompt' if len(prompts) == 1 else f'prompt {number + 1}'
            raise ApiError(400, f'{name} is empty: give some text to continue', 'prompt')
        if len(prompt.tokens) + max_tokens > service.max_tokens:
            raise ApiError(400, f'the prompt has {len(prompt.tokens):,} tokens, max_tokens is {max_tokens:,}, and both '
                           f'together may be {service.max_tokens:,}: ask for less', 'prompt', 'context_length_exceeded')
        for i in range(asked.n):
            jobs.append(Job(Request(prompt.tokens, max_tokens, sampling, (seed + i) % 2**64, tuple(stop), asked.align,
                                    prompt.source, logprobs=asked.likeliest,
                                    scores_prompt=asked.echo and asked.likeliest >= 0), queue))
    return jobs, [prompt for prompt in prompts for _ in range(asked.n)]


def most_tokens(service, asked):
    """How many tokens an answer may have. Its parameter has two names, and a default."""
    if None not in (asked.max_tokens, asked.max_completion_tokens):
        raise ApiError(400, 'max_tokens and max_completion_tokens are the same: leave one out', 'max_tokens')
    return asked.max_tokens or asked.max_completion_tokens or min(MAX_TOKENS, service.max_tokens // 2)


def read_messages(service, asked):
    """The messages of a request, [{'role', 'content'}]. ApiError if the model cannot answer them."""
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, 'top_logprobs is given without logprobs: set logprobs to true', 'top_logprobs')
    messages = []
    for number, message in enumerate(asked.messages, 1):
        role, content = message.get('role'), message.get('content')
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, f'message {number} has the role {shorten(role)}, which is not known: roles are '
                           f'{", ".join(ROLES)}', 'messages')
        if isinstance(content, list):
            parts = [part.get('text') if isinstance(part, dict) and part.get('type') == 'text' else None
                     for part in content]
            content = ''.join(parts) if parts and all(isinstance(part, str) for part in parts) else None
            if content is None:
                raise ApiError(400, f'message {number} has parts that are no text: the model reads text alone',
                               'messages')
        extra = [key for key, value in message.items() if key not in ('role', 'content', 'name') and value]
        if extra:
            raise ApiError(400, f'message {number} has {shorten(extra[0])}, which the server does not implement: leave '
                           f'it out', 'messages')
        if not isinstance(content, str) or (not content.strip() and ROLES[role] != 'assistant'):
            raise ApiError(400, f'message {number} ({role}) has no content', 'messages')
        if ROLES[role] == 'system' and messages:
            raise ApiError(400, f'message {number} is of the {role}, which speaks first or not at all', 'messages')
        messages.append(dict(role=ROLES[role], content=content))
    size, most = sum(len(message['content']) for message in messages), service.max_tokens * service.longest_token
    if size > most:  # it need not be tokenized, which may take seconds
        raise ApiError(400, f'the messages have {size:,} characters: {service.max_tokens:,} tokens are allowed, and '
                       f'have at most {most:,}', 'messages', 'context_length_exceeded')
    if messages[-1]['role'] != 'user':
        raise ApiError(400, f"the last message is of the {messages[-1]['role']}: the model answers a user's",
                       'messages')
    return messages


def ask(service, asked, messages, max_tokens):
    """The Prompt of a conversation: with the passages that are given, or else with those that the question finds."""
    chat, passages, source = service.chat, [], None
    if asked.neighbors is not None:
        check_neighbors(service, asked)
        passages = [GivenPassage('', text) for text in asked.neighbors]
    elif service.finder and asked.retrieval == 'on':
        passages, = service.finder.ask(lambda: service.finder.retriever.find([messages[-1]['content']]))
    if not (chat.in_place or (passages and not chat.in_prompt)):
        source = pick_live(service, asked)
    try:
        return chat.prompt(messages, max_tokens, passages, source)
    except TooLong as error:
        raise ApiError(400, str(error), 'messages', 'context_length_exceeded') from error
    except UserError as error:
        raise ApiError(400, str(error), 'neighbors') from error


def split_prompts(prompt):
    """A list of prompts, each a string or a list of token ids."""
    def is_ids(value):
        return isinstance(value, list) and all(type(token) is int for token in value)
    if isinstance(prompt, str) or (prompt and is_ids(prompt)):
        return [prompt]
    if isinstance(prompt, list) and prompt and (all(isinstance(one, str) for one in prompt)
                                                or all(is_ids(one) for one in prompt)):
        return prompt
    raise ApiError(400, f'prompt has to be a string, a list of strings, or token ids, and is {shorten(prompt)}',
                   'prompt')


def read_text(service, text, name):
    """The token ids of a text; what looks like a special token is text. ApiError if they can only be too many."""
    most = service.max_tokens * service.longest_token
    if len(text) > most:  # it need not be tokenized, which may take seconds
        raise ApiError(400, f'{name} has {len(text):,} characters: {service.max_tokens:,} tokens are allowed, and have '
                       f'at most {most:,}', name, 'context_length_exceeded')
    return tokenize(text, service.tokenizer).tolist()


def read_prompt(service, prompt):
    """The token ids of a prompt."""
    if isinstance(prompt, str):
        return read_text(service, prompt, 'prompt')
    allowed = service.worker.engine.allowed
    wrong = [token for token in prompt if not 0 <= token < len(allowed) or not allowed[token]]
    if wrong:
        raise ApiError(400, f'the prompt has {shorten(wrong[0])}, which is no token: ids are 0 to {len(allowed) - 1}',
                       'prompt')
    return prompt


def pick_source(service, asked):
    """The source of neighbors and pointers that a request asks for; None if it is to read none."""
    if asked.neighbors is None:
        return pick_live(service, asked)
    check_neighbors(service, asked)
    try:
        return PassageSource(service.config, service.tokenizer, asked.neighbors)
    except UserError as error:
        raise ApiError(400, str(error), 'neighbors') from error


def pick_live(service, asked):
    """The collection, as a source; None if a request or the model reads none."""
    if service.live is None or asked.retrieval == 'off':
        return None
    if service.live.away:
        raise Away(service.live.away)
    return service.live


def check_neighbors(service, asked):
    """ApiError if a request's own passages cannot be read."""
    if asked.retrieval == 'off':
        raise ApiError(400, "neighbors are given, and retrieval is 'off': leave one out", 'neighbors')
    if not asked.neighbors:
        raise ApiError(400, "neighbors is empty: give passages, or retrieval: 'off'", 'neighbors')
    size = sum(len(read_text(service, text, 'neighbors')) for text in asked.neighbors)
    if size > service.max_tokens:
        raise ApiError(400, f'neighbors have {size:,} tokens, and may have {service.max_tokens:,} together: give fewer',
                       'neighbors')


class Answer:
    """What comes of a request, until close()."""

    def __init__(self, service, request, asked, jobs, prompts, queue):
        self.service, self.asked, self.jobs, self.queue = service, asked, jobs, queue
        self.choices = {job: Choice(service, asked, index, job, prompt)
                        for index, (job, prompt) in enumerate(zip(jobs, prompts, strict=True))}
        self.is_chat, self.begun = isinstance(asked, AskedChat), {}  # of each choice, whether its text has begun
        kind, prefix = ('chat.completion' + '.chunk' * asked.stream, 'chatcmpl') if self.is_chat else (
            'text_completion', 'cmpl')
        self.head = dict(id=f'{prefix}-{uuid.uuid4().hex}', object=kind, created=int(time.time()), model=service.name)
        if prompts[0].dropped:
            self.head['dropped_messages'] = prompts[0].dropped
        if prompts[0].cut:
            self.head['cut_passages'] = prompts[0].cut
        service.worker.submit(jobs)
        self.watcher = asyncio.create_task(self._watch(request))
        self.timer = asyncio.get_running_loop().call_later(service.timeout, queue.put_nowait, ApiError(
            504, f'the answer took longer than {service.timeout:.0f} s: ask for fewer tokens', code='timeout'))

    async def _watch(self, request):
        while (await request.receive())['type'] != 'http.disconnect':
            pass
        self.queue.put_nowait(ClientDisconnect())

    async def pieces(self):
        """Lists of pieces of the choices, as they come. ApiError or ClientDisconnect if no more will come."""
        going_on = set(self.jobs)
        while going_on:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            job, events, retrieved, reason = item
            async for some in self.choices[job].pieces(events, retrieved, reason):
                yield some
            if reason:
                going_on.discard(job)

    def as_deltas(self, piece):
        """A piece of a text in the form of a chat's stream: one choice, or two where its message begins."""
        index, text = piece['index'], piece.pop('text')
        if index not in self.begun:
            self.begun[index] = False
            yield dict(index=index, delta=dict(role='assistant', content=''), logprobs=None, finish_reason=None)
        text = text if self.begun[index] else text.lstrip()
        self.begun[index] = self.begun[index] or bool(text)
        yield {**piece, 'delta': dict(content=text) if text else {},
               'logprobs': as_chat_logprobs(piece['logprobs'], self.asked.likeliest)}

    def usage(self):
        prompt = sum(len(job.request.tokens) for job in self.jobs[::self.asked.n])
        new = sum(len(choice.tokens) - len(job.request.tokens) for job, choice in self.choices.items())
        return dict(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)

    def close(self):
        self.service.worker.cancel(self.jobs)
        self.watcher.cancel()
        self.timer.cancel()


class Choice:
    """One text of an answer."""

    def __init__(self, service, asked, index, job, prompt):
        self.service, self.asked, self.index, self.job, self.prompt = service, asked, index, job, prompt
        self.request = job.request
        self.tokens = list(job.request.tokens)
        self.first = len(self.tokens)  # of the tokens whose origins have not been told
        self.passages = []  # that they are written with
        self.decoder, self.offset = codecs.getincrementaldecoder('utf-8')('replace'), 0

    async def pieces(self, events, retrieved, reason):
        """What a step has brought, in lists of pieces of OpenAI's form, each as soon as it is known."""
        source, size, some = self.request.source, len(self.request.tokens), []
        if len(self.tokens) == size and self.asked.echo:
            text = self.service.tokenizer.decode(self.tokens) if self.prompt.text is None else self.prompt.text
            some.append(self._piece(text, self._prompt_logprobs()))
        if len(self.tokens) == size and self.prompt.passages:
            some.append(self._piece(retrieval=dict(chunks=[], copied=[], passages=[
                dict(title=passage.title, text=passage.text) for passage in self.prompt.passages])))
        if retrieved:
            some.append(self._piece(retrieval=dict(chunks=[self._chunk(*chunk) for chunk in retrieved], copied=[])))
        for event in events:
            some.append(self._piece(event.text, self._logprobs(event.token, event.logprob, event.top),
                                    position=len(self.tokens)))
            self.tokens.append(event.token)
            shift = size if self.request.align == 'prompt' else 0
            is_complete = (len(self.tokens) - shift) % self.service.config.retrieval_chunk_size == 0
            if source is not None and (is_complete or (reason and event is events[-1])):
                yield some
                some, retrieval = [], dict(chunks=[])
                try:
                    retrieval['copied'] = await asyncio.to_thread(self._copied, self.first, len(self.tokens))
                except Away as error:
                    retrieval |= dict(copied=[], error=error.message)
                self.first = len(self.tokens)
                if retrieval['copied'] or 'error' in retrieval:
                    some.append(self._piece(retrieval=retrieval))
        if reason:
            some.append(self._piece(finish_reason=reason))
        if some:
            yield some

    def _piece(self, text='', logprobs=None, finish_reason=None, **more):
        return dict(index=self.index, text=text, logprobs=logprobs, finish_reason=finish_reason, **more)

    def _chunk(self, first, end, passages):
        if passages is None:  # those of the user's own
            texts, encode = self.request.source.texts, self.service.tokenizer.encode_ordinary
            passages = [Passage(f'passage {i + 1}', None, None, text, '', encode(text)[:2 * (end - first)])
                        for i, text in enumerate(texts)]
        self.passages = passages
        return dict(first=first, end=end, text=self.service.tokenizer.decode(self.tokens[first:end]), neighbors=[
            dict(document=p.document, chunk=p.chunk, similarity=p.similarity, text=p.text, continuation=p.continuation)
            for p in passages])

    def _copied(self, first, end):
        """The runs of tokens[first:end] that stand elsewhere, and where. Away if the collection does not tell."""
        source, tokens, decode = self.request.source, np.array(self.tokens), self.service.tokenizer.decode
        found = []
        if source.has_pointers:
            if isinstance(source, PassageSource):
                named = []
                for t, count, number, place in named_runs(source, source.index, tokens, first, end):
                    passage, place = passage_at(source.index, number, place, count, self.service.max_tokens)
                    named.append((t, count, f'passage {number}', None, decode(passage), len(decode(passage[:place]))))
            else:
                named = source.named(tokens, first, end)
            found += [('pointer', *run) for run in named]
        for t, count, number, place in copied_runs(self.tokens, first, end, [p.tokens for p in self.passages]):
            p = self.passages[number]
            found.append(('neighbor', t, count, p.document, p.chunk, p.text + p.continuation,
                          len(decode(p.tokens[:place]))))
        return [dict(first=t, end=t + count, text=decode(self.tokens[t:t + count]), by=by, document=document,
                     chunk=chunk, passage=passage, offset=offset)
                for by, t, count, document, chunk, passage, offset in found]

    def _prompt_logprobs(self):
        """OpenAI's form; a prompt's first token has none."""
        if not self.request.scores_prompt:
            return None
        scores = [(None, None), *self.job.row.prompt_scores]
        told = [self._logprobs(token, *score) for token, score in zip(self.tokens, scores, strict=True)]
        return {name: [value for one in told for value in one[name]] for name in told[0]}

    def _logprobs(self, token, logprob, top):
        """OpenAI's form, of a token. Offsets are characters of the choice's text."""
        if self.request.logprobs < 0:
            return None
        name = self._name(token)
        offset = self.offset
        if token != self.service.tokenizer.eot_token:
            data = self.service.tokenizer.decode_single_token_bytes(token)
            self.offset += len(self.decoder.decode(data))
            if not name.startswith(PARTIAL):  # the bytes before it may have become the sign for what is no character
                offset = self.offset - len(name)
        likeliest = None if top is None else {self._name(t): logprob for t, logprob in top} | {name: logprob}
        return dict(tokens=[name], token_logprobs=[logprob], top_logprobs=[likeliest], text_offset=[offset])

    def _name(self, token):
        data = self.service.tokenizer.decode_single_token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:  # as OpenAI writes it
            return PARTIAL + ''.join(f'\\x{byte:02x}' for byte in data)


def merge(choice, piece):
    """Add a piece to a choice."""
    choice['text'] += piece['text']
    choice['finish_reason'] = piece['finish_reason']
    for name in ('logprobs', 'retrieval'):
        if piece.get(name):
            choice[name] = choice.get(name) or {}
            for key, value in piece[name].items():
                choice[name][key] = choice[name].get(key, type(value)()) + value


def drop_stopped(choice, end_of_text, last):
    """Leave out the tokens of a stop string, which is no part of the text."""
    logprobs, size = choice['logprobs'], len(choice['text'])
    if choice['finish_reason'] == 'stop' and last != end_of_text:
        kept = sum(offset < size for offset in logprobs['text_offset'])
        choice['logprobs'] = {name: values[:kept] for name, values in logprobs.items()}


def as_message(choice, count):
    """A choice in the form of a chat, with the `count` likeliest tokens."""
    text = choice.pop('text').lstrip()
    return {**choice, 'message': dict(role='assistant', content=text, refusal=None),
            'logprobs': as_chat_logprobs(choice['logprobs'], count)}


def as_chat_logprobs(logprobs, count):
    """Log-probabilities in the form of a chat."""
    def describe(name, logprob):
        is_partial = re.fullmatch(PARTIAL + r'(\\x[0-9a-f]{2})+', name)
        data = bytes.fromhex(name.removeprefix(PARTIAL).replace('\\x', '')) if is_partial else name.encode()
        return dict(token=name, logprob=logprob, bytes=list(data))
    if logprobs is None:
        return None
    return dict(refusal=None, content=[
        {**describe(name, logprob), 'top_logprobs': [describe(*one) for one in list(top.items())[:count]]}
        for name, logprob, top in zip(*(logprobs[key] for key in ('tokens', 'token_logprobs', 'top_logprobs')),
                                      strict=True)])


async def complete(service, request, kind):
    """The response to a request for completions, AskedText or AskedChat. ApiError if there is none."""
    if kind is AskedChat and not service.chat:
        raise ApiError(404, 'the model continues texts and was not tuned to answer: use POST /v1/completions, or tune '
                       'it with sft.py', code='unknown_url')
    asked, queue = parse(await read_body(request), kind), asyncio.Queue()
    jobs, prompts = await asyncio.to_thread(prepare, service, asked, queue)
    answer = Answer(service, request, asked, jobs, prompts, queue)
    with ExitStack() as opened:
        opened.callback(answer.close)
        pieces = answer.pieces()
        some = await anext(pieces)  # what fails before it has a status of its own
        if asked.stream:
            opened.pop_all()
            return Stream(answer, some, pieces)
        is_read = jobs[0].request.source is not None or prompts[0].passages
        nothing = dict(chunks=[], copied=[]) if is_read else None
        choices = [dict(index=i, text='', logprobs=None, finish_reason=None, retrieval=copy.deepcopy(nothing))
                   for i in range(len(jobs))]
        while some is not None:
            for piece in some:
                merge(choices[piece['index']], piece)
            some = await anext(pieces, None)
        for choice, (job, told) in zip(choices, answer.choices.items(), strict=True):
            if job.request.logprobs >= 0:
                drop_stopped(choice, service.tokenizer.eot_token, told.tokens[-1])
        if answer.is_chat:
            choices = [as_message(choice, asked.likeliest) for choice in choices]
        return as_json({**answer.head, 'choices': choices, 'usage': answer.usage()})


class Stream(StreamingResponse):
    """The pieces of an answer as server-sent events."""

    def __init__(self, answer, some, pieces):
        super().__init__(self._events(some, pieces), media_type='text/event-stream',
                         headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'})
        self.answer, self.status = answer, GONE

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()
            self.answer.service.requests[self.status] += 1

    async def _events(self, some, pieces):
        asked, head = self.answer.asked, self.answer.head
        has_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        usage = dict(usage=None) if has_usage else {}
        try:
            while some is not None:
                shown = [delta for piece in some for delta in self.answer.as_deltas(piece)] \
                    if self.answer.is_chat else some
                yield ''.join(event({**head, 'choices': [piece], **usage}) for piece in shown)
                some = await anext(pieces, None)
            if has_usage:
                yield event({**head, 'choices': [], 'usage': self.answer.usage()})
            yield 'data: [DONE]\n\n'
            self.status = 200
        except ClientDisconnect:
            pass
        except ApiError as error:
            self.status = error.status
            yield event(describe_error(error))
        except Exception:
            self.status = 500
            traceback.print_exc()
            yield event(describe_error(ApiError(500, 'the server failed, and its log says why')))


def event(value):
    return f'data: {to_json(value)}\n\n'


def describe_metrics(service):
    """Prometheus' text format."""
    worker, engine, lines = service.worker, service.worker.engine, []

    def metric(name, kind, meaning, values):
        lines.extend([f'# HELP nanoretro_{name} {meaning}', f'# TYPE nanoretro_{name} {kind}'])
        lines.extend(f'nanoretro_{name}{labels} {value}' for labels, value in values)

    metric('requests_total', 'counter', 'Requests for completions that have ended, by status; 499: the client left.',
           [(f'{{code="{code}"}}', count) for code, count in sorted(service.requests.copy().items())])
    metric('tokens_total', 'counter', 'Tokens that were read and written.',
           [(f'{{kind="{kind}"}}', worker.counts[f'{kind} tokens']) for kind in ('prompt', 'completion')])
    metric('waiting_rows', 'gauge', 'Texts that wait to be written.', [('', len(worker.waiting))])
    metric('running_rows', 'gauge', 'Texts that are being written.', [('', len(worker.jobs))])
    metric('engine_seconds_total', 'counter', 'What the parts of writing took.',
           [(f'{{part="{part}"}}', round(seconds, 6)) for part, seconds in sorted(engine.seconds.copy().items())])
    metric('engine_total', 'counter', 'Passes of the model; tokens that were drafted, and of these accepted.',
           [(f'{{kind="{kind}"}}', engine.counts[kind]) for kind in ('passes', 'drafted', 'accepted')])
    counts, total, values = list(worker.first_tokens), 0, []
    for bound, count in zip([*BUCKETS, '+Inf'], counts, strict=True):
        total += count
        values.append((f'_bucket{{le="{bound}"}}', total))
    values += [('_sum', round(worker.counts['seconds to first tokens'], 6)), ('_count', total)]
    metric('time_to_first_token_seconds', 'histogram', "From a request's arrival to its first token.", values)
    if service.away() is not None:
        metric('knowledge_base_up', 'gauge', 'Whether the knowledge base answers.', [('', int(not service.away()))])
    return '\n'.join(lines) + '\n'
