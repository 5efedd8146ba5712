"""
How fast text is written: tokens/s and milliseconds a token of generation/engine.py, and of RETRO.generate, which
computes the whole window anew for every token; at batch 1 and 8, with retrieval off and live, with drafts and without.
Two models: the trained quickstart's, and one of 12 layers, 256 wide, with a window of 1,024 tokens, untrained, which
copies from the same collection.

    python bench/generate.py --out_dir=out/quickstart [--quick]

Of the slow one every 32nd token is timed, and the time of those between interpolated. Prints a table and one JSON line.
"""
import argparse
import json
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import keep_freed_memory

import numpy as np
import torch

from configurator import user_errors_as_one_line
from generation.engine import Engine, Request
from generation.sampling import Sampling
from generation.sources import CollectionSource
from model import RETRO, RETROConfig
from retrieval.retriever import Retriever
from training.checkpoint import load_run

STRIDE = 32  # of the tokens of the slow one that are timed


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
                  f'speedup_b{rows}': slow / fast}
        seconds, parts, _, _ = write(model, tokenizer, prompt, count, rows, source)
        share = (parts['search'] + parts['pointers']) / sum(seconds)
        found |= {f'live_tokens_per_s_b{rows}': rows * count / sum(seconds), f'retrieval_share_b{rows}': share}
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', default='out/quickstart', help='the trained run (default: %(default)s)')
    parser.add_argument('--quick', action='store_true', help='fewer tokens')
    arguments, overrides = parser.parse_known_args()
    keep_freed_memory()
    settings, tokenizer, model, _ = load_run(arguments.out_dir, [*overrides, '--retrieval_cache_gb=0'])
    torch.manual_seed(0)
    large = RETRO(RETROConfig(block_size=1024, vocab_size=model.config.vocab_size, n_layer=12, n_head=8, n_embd=256,
                              retrieval_k_neighbors=settings.retrieval_k_neighbors)).eval()
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
    names = [key for key in report if not key.startswith('quickstart_')]
    print(f'{"":<28}{"12 layers":>12}{"quickstart":>12}')
    for name in names:
        print(f'{name:<28}{report[name]:>12,.4g}{report.get("quickstart_" + name, float("nan")):>12,.4g}')
    print(json.dumps(report))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
