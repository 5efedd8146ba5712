"""
How fast text is written: tokens/s and milliseconds a token of generation/engine.py, and of RETRO.generate, which
computes the whole window anew for every token; at batch 1 and 8, with retrieval off and live, with drafts and without.
Two models: the trained quickstart's, and one of 12 layers, 256 wide, with a window of 1,024 tokens, untrained, which
copies from the same collection.

    python bench/generate.py --out_dir=out/quickstart [--quick]

`speedup` compares the engine as it is used, live and with drafts, temperature 0.8, with the slow one without retrieval;
`plain_speedup` is without retrieval and drafts on both sides. Of the slow one every 32nd token is timed, and the time
of those between interpolated. Then serve.py serves both to 1,
8 and 32 clients at a time: tokens/s of all together, and seconds to the first token, of texts of 64 tokens. Prints a
table and one JSON line.
"""
import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from system import keep_freed_memory

import numpy as np
import torch

from configurator import UserError, user_errors_as_one_line
from generation.engine import Engine, Request
from generation.sampling import Sampling
from generation.sources import CollectionSource
from model import RETRO, RETROConfig
from retrieval.retriever import Retriever
from training.checkpoint import load_run

STRIDE = 32  # of the tokens of the slow one that are timed
LARGE = dict(n_layer=12, n_head=8, n_embd=256, block_size=1024)
SERVED = 64  # tokens of a text


def write(model, tokenizer, prompt, count, rows=1, source=None, drafts=False, temperature=0.8):
    """Write `count` tokens in each row. Seconds of each step, those of the parts, the engine's counts, tokens."""
    engine = Engine(model, tokenizer, slots=rows)
    engine.allowed[tokenizer.eot_token] = False  # no text ends early
    added = [engine.add(Request(prompt, count, Sampling(temperature=temperature), seed=i, source=source, drafts=drafts))
             for i in range(rows)]
    seconds = []
    while engine.rows or engine.waiting:
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds, engine.seconds, engine.counts, sum(len(row.new_tokens) for row in added)


@torch.no_grad()
def write_slowly(model, prompt, count, rows=1):
    """Seconds that RETRO.generate would take for `count` tokens in each row, without retrieval."""
    tokens = torch.randint(1000, (rows, len(prompt) + count))
    tokens[:, :len(prompt)] = torch.tensor(prompt)
    timed = list(range(0, count, STRIDE))
    seconds = []
    for done in timed:
        start = time.perf_counter()
        model.generate(tokens[:, :len(prompt) + done], 1)
        seconds.append(time.perf_counter() - start)
    return float(np.interp(np.arange(count), timed, seconds).sum())


def measure(model, tokenizer, source, prompt, count):
    """The figures of a model, by name."""
    write(model, tokenizer, prompt, 40, source=source, drafts=True)  # compiles what numba compiles
    found = {}
    for rows in (1, 8):
        fast = sum(write(model, tokenizer, prompt, count, rows)[0])
        slow = write_slowly(model, prompt, count, rows)
        found |= {f'tokens_per_s_b{rows}': rows * count / fast, f'slow_tokens_per_s_b{rows}': rows * count / slow,
                  f'plain_speedup_b{rows}': slow / fast}
        seconds, parts, _, _ = write(model, tokenizer, prompt, count, rows, source)
        share = (parts['search'] + parts['pointers']) / sum(seconds)
        used = sum(write(model, tokenizer, prompt, count, rows, source, drafts=True)[0])
        found |= {f'live_tokens_per_s_b{rows}': rows * count / sum(seconds), f'retrieval_share_b{rows}': share,
                  f'used_tokens_per_s_b{rows}': rows * count / used, f'speedup_b{rows}': slow / used}
        if rows == 1:
            found['retrieval_share'] = share
            for position in (100, 1000):  # of the window
                near = seconds[max(1, position - 20 - len(prompt)):position + 20 - len(prompt)]
                if len(near) >= 20:
                    found[f'ms_per_token_at_{position}'] = 1e3 * statistics.median(near)
    for name, temperature in (('greedy', 0), ('sampled', 0.8)):
        plain, drafted = (write(model, tokenizer, prompt, count, 1, source, drafts, temperature)
                          for drafts in (False, True))
        found |= {f'drafts_speedup_{name}': sum(plain[0]) / sum(drafted[0]),
                  f'tokens_a_pass_{name}': drafted[3] / drafted[2]['passes'],
                  f'accepted_{name}': drafted[2]['accepted'] / max(1, drafted[2]['drafted'])}
    return {key: float(f'{value:.4g}') for key, value in found.items()}


@contextmanager
def served(out_dir, overrides):
    """The port of a server of a run."""
    with socket.create_server(('127.0.0.1', 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, ROOT / 'serve.py', f'--out_dir={out_dir}', f'--port={port}',
                               '--slots=32', *overrides], stdout=subprocess.DEVNULL)
    try:
        while True:
            if server.poll() is not None:
                raise UserError(f'serve.py ended with {server.returncode}')
            try:
                with closing(http.client.HTTPConnection('127.0.0.1', port, timeout=5)) as connection:
                    connection.request('GET', '/health')
                    if connection.getresponse().status == 200:
                        break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait()


def ask(port, prompt, seed):
    """Stream a text from the server. Seconds to its first token."""
    with closing(http.client.HTTPConnection('127.0.0.1', port, timeout=600)) as connection:
        start = time.perf_counter()
        connection.request('POST', '/v1/completions', headers={'Content-Type': 'application/json'}, body=json.dumps(
            dict(prompt=prompt, max_tokens=SERVED, seed=seed, stream=True, temperature=0.8)))
        answer = connection.getresponse()
        if answer.status != 200:
            raise UserError(f'the server answered {answer.status}: {answer.read()[:300]}')
        answer.readline()
        first = time.perf_counter() - start
        answer.read()
    return first


def measure_server(out_dir, overrides, prompt):
    """Tokens/s of 1, 8 and 32 clients, each of which asks for some texts, and medians of seconds to a first token."""
    found = {}
    with served(out_dir, overrides) as port:
        for seed in range(8):  # compiles what numba compiles
            ask(port, prompt, seed)
        for clients in (1, 8, 32):
            with ThreadPoolExecutor(clients) as pool:
                start, count = time.perf_counter(), max(16, clients)
                firsts = list(pool.map(lambda seed: ask(port, prompt, seed), range(count)))
                found[f'server_tokens_per_s_{clients}'] = count * SERVED / (time.perf_counter() - start)
                found[f'server_first_token_s_{clients}'] = statistics.median(firsts)
    return {key: float(f'{value:.4g}') for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', default='out/quickstart', help='the trained run (default: %(default)s)')
    parser.add_argument('--config', default='config/quickstart.py', help='that of the run (default: %(default)s)')
    parser.add_argument('--quick', action='store_true', help='fewer tokens')
    arguments, overrides = parser.parse_known_args()
    keep_freed_memory()
    settings, tokenizer, model, _ = load_run(arguments.out_dir, [*overrides, '--retrieval_cache_gb=0'])
    torch.manual_seed(0)
    large = RETRO(RETROConfig(vocab_size=model.config.vocab_size, retrieval_k_neighbors=settings.retrieval_k_neighbors,
                              **LARGE)).eval()
    report = {}
    with closing(Retriever(settings, tokenizer)) as retriever:
        source = CollectionSource(retriever)
        prompt = tokenizer.encode_ordinary('import argparse\nimport json\n\n\ndef main():\n    parser = ')
        for prefix, network, count in (('', large, 64 if arguments.quick else 512),
                                       ('quickstart_', model, 64 if arguments.quick else 512)):
            report |= {prefix + key: value for key, value in
                       measure(network, tokenizer, source, prompt, count).items()}
        if not arguments.quick:  # as far as the window reaches
            seconds = write(large, tokenizer, prompt, 1000, source=source)[0]
            for position in (100, 1000):
                near = seconds[position - 20 - len(prompt):position + 20 - len(prompt)]
                report[f'ms_per_token_at_{position}'] = float(f'{1e3 * statistics.median(near):.4g}')
    text = tokenizer.decode(prompt)
    report |= {f'quickstart_{key}': value for key, value in
               measure_server(arguments.out_dir, overrides, text).items()}
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as folder:  # a step of training makes a run of it
            subprocess.run([sys.executable, ROOT / 'train.py', arguments.config, f'--out_dir={folder}', '--max_iters=1',
                            '--batch_size=1', '--eval_tokens=2000', *(f'--{k}={v}' for k, v in LARGE.items())],
                           check=True, stdout=subprocess.DEVNULL)
            report |= measure_server(folder, overrides, text)
    names = dict.fromkeys(key.removeprefix('quickstart_') for key in report)
    print(f'{"":<28}{"12 layers":>12}{"quickstart":>12}')
    for name in names:
        print(f'{name:<28}' + ''.join(f'{report[key]:>12,.4g}' if key in report else f'{"":>12}'
                                      for key in (name, f'quickstart_{name}')))
    print(json.dumps(report))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
