"""
What live retrieval costs a training run: tokens/s of the same model on the same batches with neighbors that are (a)
frozen, handed over as ready tensors, (b) live, nothing remembered, (c) live, second epoch, and (d) of the GPT of the
same decoder. All read and tokenize their text as a run does. The arms take turns of a few steps; while one runs, the
processes of the others are stopped. A round is as many steps of each as one search fetches. Prints a table and one
JSON line.

    python bench/train.py config/quickstart.py [--key=value ...] [--quick]

The collection must have been filled: python -m retrieval.populate config/quickstart.py
"""
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import load_settings, user_errors_as_one_line
from data.stream import as_dataset_configs
from data.tokenizer import load_tokenizer
from model import RETRO, RETROConfig, autocast, keep_freed_memory, pick_dtype
from retrieval.embedding import pick_device
from retrieval.local_server import local_server
from retrieval.prefetch import Prefetcher

TURN = 4  # steps: short, so that what else the machine does hits all arms alike


def make_step(settings, vocabulary, device, use_retrieval):
    """A training step of a new model, as a function of a batch; and the model."""
    keys = ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'retrieval_layers',
            'retrieval_chunk_size', 'retrieval_k_neighbors', 'retrieval_encoder_layers', 'token_mix',
            'retrieval_copy', 'retrieval_longest_match')
    torch.manual_seed(settings['seed'])
    model = RETRO(RETROConfig(vocab_size=vocabulary, use_retrieval=use_retrieval,
                              **{key: settings[key] for key in keys})).to(device)
    device_type = device.split(':')[0]
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device_type)
    compiled = torch.compile(model) if settings['compile'] else model
    precision = pick_dtype(settings['dtype'], device)

    def step(batch):
        neighbors = (batch.neighbors, batch.neighbor_mask) if use_retrieval else (None, None)
        with autocast(precision, device):
            _, loss = compiled(batch.tokens, batch.targets, *neighbors, batch.documents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, model


@dataclass
class Arm:
    """A training step, batches for it, and the processes that make them, which are stopped while other arms run."""
    step: Callable
    batches: Iterator
    processes: list

    def pause(self, paused):
        for process in self.processes:
            os.kill(process, signal.SIGSTOP if paused else signal.SIGCONT)

    def run(self, steps):
        """Tokens of so many steps, and seconds that they took."""
        self.pause(False)
        start, count = time.perf_counter(), 0
        for batch in itertools.islice(self.batches, steps):
            self.step(batch)
            count += batch.tokens.numel()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.pause(True)
        return np.array([count, seconds])


def main():
    quick = '--quick' in sys.argv
    settings = load_settings([a for a in sys.argv[1:] if a != '--quick'])
    if quick:
        settings['retrieval_prefetch_batches'] = 8
    window = settings['retrieval_prefetch_batches']  # steps that one search serves
    rounds = 1 if quick else max(3, 320 // window)
    device = pick_device(settings['device'])
    vocabulary = -(-load_tokenizer(settings['tokenizer']).n_vocab // 64) * 64
    stream = dict(configs=as_dataset_configs(settings['train_datasets'], 'train_datasets'), interleave=64,
                  chunk_size=settings['retrieval_chunk_size'], block_size=settings['block_size'],
                  batch_size=settings['batch_size'], seed=settings['seed'])
    keep_freed_memory()
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        address, processes = None, []
        if '://' not in settings['retrieval_milvus_uri']:
            address, process = cleanup.enter_context(local_server(settings['retrieval_milvus_uri'],
                                                                      settings['retrieval_collection']))
            processes = [process.pid]

        def prefetch(memory=None):
            own = settings | dict(retrieval_cache_dir=f'{folder}/{memory}')
            made = Prefetcher(own, [(stream, None)], device, address if memory else None, retrieve=bool(memory),
                              say=lambda news: print(news, file=sys.stderr))
            cleanup.callback(made.close)
            return made

        # the search grows to its full size, then come a window that is not counted and those that are
        growing = sum(2**i for i in range(window.bit_length()) if 2**i < window)
        second_epoch = prefetch('second epoch')
        frozen = [(batch.neighbors, batch.neighbor_mask)
                  for batch in itertools.islice(second_epoch, growing + (1 + rounds) * window)]
        second_epoch.close()
        retro_step, retro = make_step(settings, vocabulary, device, use_retrieval=True)
        gpt_step, gpt = make_step(settings, vocabulary, device, use_retrieval=False)
        sources = {'frozen': prefetch(), 'live': prefetch('first epoch'), 'remembered': prefetch('second epoch'),
                   'gpt': prefetch()}
        arms = {}
        for name, source in sources.items():
            batches = source
            if name == 'frozen':
                batches = (replace(batch, neighbors=neighbors, neighbor_mask=mask)
                           for batch, (neighbors, mask) in zip(source, frozen, strict=False))
            list(itertools.islice(batches, growing))
            arms[name] = Arm(gpt_step if name == 'gpt' else retro_step, batches,
                             [source.process.pid, *(processes if name in ('live', 'remembered') else [])])
            arms[name].pause(True)
        rates = {name: [] for name in arms}
        for number in tqdm(range(rounds + 1), desc='rounds', disable=not sys.stderr.isatty()):
            done = {name: np.zeros(2) for name in arms}
            for start in range(0, window, TURN):
                for name, arm in arms.items():
                    done[name] += arm.run(min(TURN, window - start))
            for name, (count, seconds) in done.items():
                if number:
                    rates[name].append(count / seconds)
        for arm in arms.values():
            arm.pause(False)
    report = dict(steps_a_round=window, rounds=rounds)
    print(f'tokens/s in {rounds} rounds of {window} steps of {settings["batch_size"]} x {settings["block_size"]} '
          f'tokens on {device}, {os.cpu_count()} cores\n')
    print(f'{"":<12}{"median":>10}{"lowest":>10}{"highest":>10}{"over frozen":>14}')
    for name in ('frozen', 'live', 'remembered', 'gpt'):
        ratios = [rate / beside for rate, beside in zip(rates[name], rates['frozen'], strict=True)]
        report |= {name: round(statistics.median(rates[name])), f'{name}_spread': [round(min(rates[name])),
                                                                                   round(max(rates[name]))],
                   f'{name}_over_frozen': round(statistics.median(ratios), 3)}
        print(f'{name:<12}{report[name]:>10,}{min(rates[name]):>10,.0f}{max(rates[name]):>10,.0f}'
              f'{report[f"{name}_over_frozen"]:>14.3f}')
    report |= dict(retro_over_gpt=round(1 / report['gpt_over_frozen'], 3),
                   flops_ratio=round(gpt.flops_per_token() / retro.flops_per_token(), 3))
    print(f'\nRETRO over GPT {report["retro_over_gpt"]:.3f}; by the FLOP count alone {report["flops_ratio"]:.3f}')
    print(json.dumps(report))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
