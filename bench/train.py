"""
What live retrieval costs a training run: tokens/s of the same model on the same batches with neighbors and pointers
that are (a) frozen, handed over as ready tensors, (b) live, with an empty cache, (c) live, second epoch, (d) live
beside a process that keeps a core busy, and (e) of the GPT of the same decoder. All read and tokenize their text as a
run does. The arms take turns of a few steps; while one runs, the processes of the others are stopped. A round is as
many steps of each as one search serves. Prints a table and one JSON line.

    python bench/train.py config/quickstart.py [--key=value ...] [--quick]

The collection must have been filled: python -m retrieval.populate config/quickstart.py
"""
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import autocast, keep_freed_memory, pick_device, pick_dtype

import numpy as np
import torch
from tqdm import tqdm

from configurator import load_settings, user_errors_as_one_line
from data.fingerprint import describe_corpus
from data.tokenizer import load_tokenizer
from model import RETRO, RETROConfig
from retrieval.loader import Loader
from retrieval.local_server import is_local, join_server

TURN = 4  # steps: short, so that whatever else the machine does affects all arms alike
BUSY = 'while True: sum(range(100_000))'  # the process that keeps a core busy


def make_step(settings, vocab_size, device):
    """A training step of a new model, as a function of a batch; and the model."""
    torch.manual_seed(settings.seed)
    model = RETRO(RETROConfig.from_settings(settings, vocab_size)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.split(':')[0])
    compiled = torch.compile(model) if settings.compile else model
    precision = pick_dtype(settings.dtype, device)

    def step(batch):
        neighbors, mask, pointers = batch.retrieved if settings.use_retrieval else (None, None, None)
        with autocast(precision, device):
            _, loss = compiled(batch.tokens, batch.targets, neighbors, mask, batch.doc_ids, pointers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, model


@dataclass
class Arm:
    """A training step, batches for it, and the processes beside it, which are stopped while other arms run."""
    step: Callable
    loader: Loader
    batches: Iterator
    processes: list
    rounds: list = field(default_factory=list)  # of each (3,): tokens, seconds, seconds waited for batches
    memory: int = 0  # peak bytes on the GPU, the other arms' weights included

    def pause(self, paused):
        for process in self.processes:
            os.kill(process, signal.SIGSTOP if paused else signal.SIGCONT)

    def run(self, steps):
        """Tokens of this many steps, the seconds that they took, and those waited for batches."""
        self.pause(False)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start, count, waited = time.perf_counter(), 0, self.loader.waited
        for batch in itertools.islice(self.batches, steps):
            self.step(batch)
            count += batch.tokens.numel()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.memory = max(self.memory, torch.cuda.max_memory_allocated())
        seconds = time.perf_counter() - start
        self.pause(True)
        return np.array([count, seconds, self.loader.waited - waited])


def measure(settings, window, rounds, device, cleanup, vocab_size=None):
    """The Arms by name after the measured rounds, the RETRO, the GPT. vocab_size is the tokenizer's, unless given."""
    stream = dict(batch_size=settings.batch_size, seed=settings.seed)
    folder = cleanup.enter_context(tempfile.TemporaryDirectory())
    server = []
    if is_local(settings.retrieval_milvus_uri):
        lease = cleanup.enter_context(closing(join_server(settings.retrieval_milvus_uri)))
        server = [lease.pid]

    def load(cache=None):
        loader = Loader(settings.replace(retrieval_cache_dir=f'{folder}/{cache}'), stream, device=device,
                        retrieve=cache is not None, say=lambda news: print(news, file=sys.stderr))
        cleanup.callback(loader.close)
        return loader

    # batches until searches reach their full size; then come a warm-up round and the measured rounds
    growing = sum(2**i for i in range(window.bit_length()) if 2**i < window)
    second_epoch = load('second epoch')
    frozen = [batch.retrieved
              for batch in itertools.islice(second_epoch, growing + (1 + rounds) * window)]
    second_epoch.close()
    busy = subprocess.Popen([sys.executable, '-c', BUSY])
    cleanup.callback(busy.kill)
    busy.send_signal(signal.SIGSTOP)
    vocab_size = vocab_size or load_tokenizer(settings.tokenizer).n_vocab
    retro_step, retro = make_step(settings.replace(use_retrieval=True), vocab_size, device)
    gpt_step, gpt = make_step(settings.replace(use_retrieval=False), vocab_size, device)
    loaders = {'frozen': load(), 'live': load('first epoch'), 'remembered': load('second epoch'),
               'busy': load('busy epoch'), 'gpt': load()}
    beside = {'live': server, 'remembered': server, 'busy': [*server, busy.pid]}
    arms = {}
    for name, loader in loaders.items():
        batches = loader
        if name == 'frozen':
            batches = (replace(batch, neighbors=neighbors, neighbor_mask=mask, pointers=pointers)
                       for batch, (neighbors, mask, pointers) in zip(loader, frozen, strict=False))
        arms[name] = Arm(gpt_step if name == 'gpt' else retro_step, loader, batches,
                         [*(p.pid for p in loader.processes), *beside.get(name, [])])
    for arm in arms.values():  # all are connected before the server is stopped
        list(itertools.islice(arm.batches, growing))
    for arm in arms.values():
        arm.pause(True)
    for number in tqdm(range(rounds + 1), desc='rounds', disable=not sys.stderr.isatty()):
        done = {name: np.zeros(3) for name in arms}
        for start in range(0, window, TURN):
            for name, arm in arms.items():
                done[name] += arm.run(min(TURN, window - start))
        for name, arm in arms.items():
            arm.rounds += [done[name]] if number else []
    for arm in arms.values():
        arm.pause(False)
    return arms, retro, gpt


def summarize(arms):
    """By arm: the median tokens/s over the rounds, the lowest and highest, the ratio to frozen, the share waited."""
    rates = {name: [tokens / seconds for tokens, seconds, _ in arm.rounds] for name, arm in arms.items()}
    return {name: dict(tokens_per_s=round(statistics.median(rates[name])),
                       spread=[round(min(rates[name])), round(max(rates[name]))],
                       over_frozen=round(statistics.median(rate / frozen for rate, frozen in zip(
                           rates[name], rates['frozen'], strict=True)), 3),
                       waited=round(sum(waited for *_, waited in arm.rounds)
                                    / sum(seconds for _, seconds, _ in arm.rounds), 4))
            for name, arm in arms.items()}


def main():
    is_quick = '--quick' in sys.argv
    settings = load_settings([a for a in sys.argv[1:] if a != '--quick'])
    if is_quick:
        settings.retrieval_prefetch_batches = 8
    window = settings.retrieval_prefetch_batches  # steps that one search serves
    rounds = 1 if is_quick else max(3, 320 // window)
    device = pick_device(settings.device)
    keep_freed_memory()
    with ExitStack() as cleanup:
        arms, retro, gpt = measure(settings, window, rounds, device, cleanup)
    corpus = describe_corpus(settings.train_datasets)
    report = dict(corpus=corpus, precision=pick_dtype(settings.dtype, device), steps_a_round=window, rounds=rounds)
    print(f'tokens/s in {rounds} rounds of {window} steps of {settings.batch_size} x {settings.block_size} tokens of '
          f'{corpus} on {device}, {report["precision"]}, {os.cpu_count()} cores\n')
    print(f'{"":<12}{"median":>10}{"lowest":>10}{"highest":>10}{"over frozen":>14}{"waited":>10}')
    for name, found in summarize(arms).items():
        report |= {name: found['tokens_per_s']} | {f'{name}_{key}': found[key]
                                                   for key in ('spread', 'over_frozen', 'waited')}
        print(f'{name:<12}{found["tokens_per_s"]:>10,}{found["spread"][0]:>10,}{found["spread"][1]:>10,}'
              f'{found["over_frozen"]:>14.3f}{found["waited"]:>10.1%}')
    report |= dict(retro_over_gpt=round(1 / report['gpt_over_frozen'], 3),
                   flops_ratio=round(gpt.flops_per_token() / retro.flops_per_token(), 3))
    print(f'\nRETRO over GPT {report["retro_over_gpt"]:.3f}; by the FLOP count alone {report["flops_ratio"]:.3f}')
    print(json.dumps(report))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
