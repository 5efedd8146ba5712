"""
Serves a trained model: OpenAI's completions API, with chat completions if sft.py has tuned it to answer, and a page to
write with and to see what was read.

    python serve.py --out_dir=out/quickstart    # then open http://127.0.0.1:8000

    from openai import OpenAI
    client = OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')
    client.completions.create(model='quickstart', prompt='import os', max_tokens=64).choices[0].text
    client.chat.completions.create(model='sft', messages=[dict(role='user', content='What does os.walk do?')])

It needs the packages of requirements-serve.txt. On other hosts than this machine's own it asks for a key, which
NANORETRO_API_KEY in the environment sets. To reach the knowledge base elsewhere, give --retrieval_milvus_uri=..., and
MILVUS_TOKEN in the environment.
"""
import argparse
import math
import os
import signal
import socket
import sys

import numpy as np

from configurator import UserError, check_range, user_errors_as_one_line, visible
from generation.chat import Chat
from generation.engine import Engine, Request
from generation.origins import named_runs
from generation.sources import CollectionSource, PassageSource
from retrieval.passages import PassageFinder
from retrieval.retriever import Retriever
from training.checkpoint import load_run

try:
    import uvicorn

    from generation.server import Service, create_app, is_loopback
    from generation.worker import LiveCollection, Worker
except ModuleNotFoundError as error:
    with user_errors_as_one_line():
        raise UserError(f'the package {error.name} is not installed: pip install -r requirements-serve.txt') from error

PATIENCE = 5.0  # seconds that a request waits for a knowledge base that is away: retrieval_timeout, if none is given
ENDING = 1  # seconds for requests to end after Ctrl-C


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--out_dir', default='out',
                        help='out_dir of the run, or the folder of a checkpoint (default: %(default)s)')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: %(default)s)')
    parser.add_argument('--port', type=int, default=8000, help='0: any that is free (default: %(default)s)')
    parser.add_argument('--api_key', default=os.environ.get('NANORETRO_API_KEY', ''), metavar='KEY',
                        help='key that clients have to send (default: NANORETRO_API_KEY of the environment, which, '
                        'other than this, no other user of the machine sees)')
    parser.add_argument('--slots', type=int, default=8, help='texts written at a time (default: %(default)s)')
    parser.add_argument('--queue', type=int, default=256, help='texts that may wait to be (default: %(default)s)')
    parser.add_argument('--max_tokens', type=int, default=4096,
                        help='tokens of a prompt and what follows it, at most (default: %(default)s)')
    parser.add_argument('--timeout', type=float, default=120.0, help='seconds for a request (default: %(default)s)')
    arguments, overrides = parser.parse_known_args()
    for name, least, below in (('port', 0, 2**16), ('slots', 1, 2**10), ('queue', 0, 2**20), ('max_tokens', 2, 2**24),
                               ('timeout', 0.001, math.inf)):
        check_range(f'--{name}', getattr(arguments, name), least, below)
    return arguments, overrides


def listen(host, port, has_key):
    """A socket that listens. UserError if it cannot, or if others could reach it without a key."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f'--host {host!r} is no address of this machine: give one, such as 127.0.0.1, or 0.0.0.0 for '
                        f'all') from error
    if not has_key and not is_loopback(address[0]):
        raise UserError(f'--host {host} lets other machines in, and there is no key: set NANORETRO_API_KEY in the '
                        f'environment, or leave out --host')
    try:
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise UserError(f'{host}:{port} cannot be listened on ({os.strerror(error.errno)}): end what listens there, or '
                        f'give another --port') from error


def say(text):
    """What the retriever reports, but for its waiting: LiveCollection says what matters of that."""
    if not text.startswith(('waiting for Milvus', 'Milvus is back')):
        print(visible(text), file=sys.stderr, flush=True)


def warm_up(engine, retriever, finder):
    """Write some tokens: the exact-match index may have to be built, and numba compiles what it has not cached."""
    tokens = engine.tokenizer.encode_ordinary('\n\n')
    sources = [None]
    if retriever:
        sources = [CollectionSource(retriever), PassageSource(engine.config, engine.tokenizer, ['\n\n'])]
    for source in sources:
        engine.add(Request(tokens * 2, 2, source=source))
        for _ in engine.run():
            pass
        if source and source.has_pointers:
            named_runs(source, source.index, np.array(tokens * 2), 1, 2)
    if finder:
        finder.find(['What?'])
    engine.seconds.clear()
    engine.counts.clear()


def main():
    arguments, overrides = parse_arguments()
    listener = listen(arguments.host, arguments.port, bool(arguments.api_key))
    settings, tokenizer, model, _ = load_run(arguments.out_dir, overrides)
    settings = settings.replace(retrieval_cache_gb=0.0)  # prompts are not repeated
    if not any(override.startswith('--retrieval_timeout=') for override in overrides):
        settings.retrieval_timeout = PATIENCE
    chat = Chat(settings, model.config, tokenizer) if settings.template else None
    retriever = Retriever(settings, tokenizer, say=say) if model.config.use_retrieval else None
    finder = PassageFinder(settings.replace(num_passages=chat.count), tokenizer, say=say) \
        if chat and chat.count else None
    engine = Engine(model, tokenizer, arguments.slots)
    warm_up(engine, retriever, finder)
    live, found = (LiveCollection(source) if source else None for source in (retriever, finder))
    worker = Worker(engine, arguments.queue)
    name = os.path.basename(os.path.abspath(arguments.out_dir))
    app = create_app(Service(name, model.config, tokenizer, live, worker, chat, found, arguments.api_key,
                             arguments.max_tokens, arguments.timeout))

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            worker.close()  # or streams would go on until they are complete
            await super().shutdown(sockets)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends like Ctrl-C
    host, port = listener.getsockname()[:2]
    host = f'[{host}]' if ':' in host else host
    print(f'serving {visible(name)} at http://{host}:{port} (Ctrl-C ends it)', flush=True)
    try:
        Server(uvicorn.Config(app, log_level='warning', ws='none', server_header=False,
                              timeout_graceful_shutdown=ENDING)).run([listener])
    except KeyboardInterrupt:
        pass
    worker.thread.join(ENDING)
    for source in (live, found):
        if source and not source.away:
            source.retriever.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread may still wait for the knowledge base; and Python takes a second to take torch apart


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
