"""
Training throughput of the paper's model: forward, loss and backward of our RETRO, of the GPT with the same decoder, and
of the package retro-pytorch at the same shape. Precisions are float32 and bfloat16 autocast. Uses the GPU if there is
one. Prints a table and one JSON line.

    python -m venv .venv-retro-pytorch
    .venv-retro-pytorch/bin/pip install -r bench/requirements-retro-pytorch.txt
    python bench/model.py [--quick] [--shapes=small,medium] [--retro-pytorch=.venv-retro-pytorch/bin/python]

Each side is a worker process in its own environment that builds its models once and runs rounds on request. The arms
alternate round by round (A B C D A B C D ...), and only one runs at a time, so that load from other processes affects
all of them equally. A step is zero_grad, forward with the loss, and backward; there is no optimizer.

The architectures match as far as retro-pytorch's options allow: width, number and width of heads, MLP, decoder and
encoder layers, cross-attention layers, chunk size, neighbors, no dropout. Remaining differences:
- ours: a document mask in the decoder, biases in all linear layers, learned positions in the encoder, LayerNorm.
- theirs: rotary positions in every attention, a null key and value in the decoder's cross-attention, a D x D linear
  layer after the encoder, a bias on the logits, RMSNorm, exact GELU. There is no document mask, and neighbors are
  masked by a padding token. The number of heads is always 8, so all arms have 8 heads in the shapes 'small' and
  'medium', and retro-pytorch is left out of the other shapes.
'retro-pytorch with our loss' computes our loss from retro-pytorch's logits. Its own loss works on transposed logits,
which is slow on a CPU; this arm shows how much of the difference that accounts for.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import UserError, user_errors_as_one_line

C, K, R = 64, 2, 128
SHAPES = {
    'quickstart': dict(n_embd=128, n_head=4, n_layer=4, block_size=256, batch=8, cross=[3], encoder=1, vocab=8192),
    'small': dict(n_embd=256, n_head=8, n_layer=4, block_size=256, batch=8, cross=[2, 4], encoder=2, vocab=8192),
    'medium': dict(n_embd=512, n_head=8, n_layer=6, block_size=512, batch=4, cross=[3, 6], encoder=2, vocab=8192),
    '124M': dict(n_embd=768, n_head=12, n_layer=12, block_size=1024, batch=1, cross=[6, 9, 12], encoder=2,
                 vocab=50304),
}
ARMS = {'RETRO': 'ours', 'GPT': 'ours', 'retro-pytorch': 'theirs', 'retro-pytorch with our loss': 'theirs',
        'RETRO compiled': 'ours'}  # not among the defaults: compiling takes minutes on a CPU


def make_batch(shape, device):
    """
    Random tokens (B, T + 1), neighbors (B, L, K, R), their mask (B, L, K, R) and doc_ids (B, L). Each sequence has two
    documents, and the last chunk of the first has no neighbors. Every fourth neighbor has no continuation. Token 0 is
    padding only.
    """
    import torch
    B, T = shape['batch'], shape['block_size']
    L = T // C
    torch.manual_seed(0)
    tokens = torch.randint(1, shape['vocab'], (B, T + 1), device=device)
    neighbors = torch.randint(1, shape['vocab'], (B, L, K, R), device=device)
    mask = torch.ones(B, L, K, R, dtype=torch.bool, device=device)
    mask[:, L // 2 - 1] = False
    mask.view(-1, R)[::4, C:] = False
    doc_ids = (torch.arange(L, device=device) >= L // 2).long().expand(B, L)
    return tokens, neighbors.masked_fill(~mask, 0), mask, doc_ids


def make_step(arm, shape, device):
    """A function that runs one forward and backward of an arm, and the FLOPs per token; None for retro-pytorch."""
    import torch
    from torch.nn import functional as F
    tokens, neighbors, mask, doc_ids = make_batch(shape, device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if ARMS[arm] == 'ours':
        from model import RETRO, RETROConfig
        model = RETRO(RETROConfig(block_size=shape['block_size'], vocab_size=shape['vocab'], n_layer=shape['n_layer'],
                                  n_head=shape['n_head'], n_embd=shape['n_embd'], bias=True, token_mix=False,
                                  use_retrieval=arm != 'GPT', retrieval_layers=shape['cross'], retrieval_chunk_size=C,
                                  retrieval_k_neighbors=K, retrieval_encoder_layers=shape['encoder'],
                                  retrieval_copy=False))
        neighbor_inputs = (neighbors, mask) if arm != 'GPT' else (None, None)
        flops = model.flops_per_token()
        if arm == 'RETRO compiled':
            model.compile()

        def loss():
            return model(inputs, targets, *neighbor_inputs, doc_ids)[1]
    else:
        from retro_pytorch import RETRO
        D = shape['n_embd']
        model = RETRO(num_tokens=shape['vocab'], max_seq_len=shape['block_size'], enc_dim=D, dec_dim=D,
                      enc_depth=shape['encoder'], enc_cross_attn_layers=(1,), dec_depth=shape['n_layer'],
                      dec_cross_attn_layers=tuple(shape['cross']), dim_head=D // 8, chunk_size=C)  # 8 heads
        flops = None

        def loss():
            if arm == 'retro-pytorch':
                return model(tokens, neighbors, return_loss=True)
            return F.cross_entropy(model(inputs, neighbors).flatten(0, 1), targets.flatten())
    model.to(device).train()

    def step(context):
        model.zero_grad(set_to_none=True)
        with context:
            value = loss()
        value.backward()
        if device == 'cuda':
            torch.cuda.synchronize()
    return step, flops


def serve():
    """The worker: for each request (arm, shape, precision, steps), one JSON per line, answer with the seconds taken."""
    import torch
    answers, sys.stdout = sys.stdout, sys.stderr  # keep output of packages out of the answers
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cuda.matmul.allow_tf32 = True
    steps = {}
    for line in sys.stdin:
        request = json.loads(line)
        if 'about' in request:
            name = torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
            print(json.dumps(dict(torch=torch.__version__, device=name)), file=answers, flush=True)
            continue
        key = request['arm'], request['shape']
        if key not in steps:
            steps[key] = make_step(request['arm'], SHAPES[request['shape']], device)
        step, flops = steps[key]
        context = torch.autocast(device, torch.bfloat16) if request['precision'] == 'bfloat16' else nullcontext()
        start = time.perf_counter()
        for _ in range(request['steps']):
            step(context)
        seconds = time.perf_counter() - start
        print(json.dumps(dict(seconds=seconds, flops=flops)), file=answers, flush=True)


class Worker:
    """Runs serve() of this file in a process of the given python."""

    def __init__(self, python):
        # the same allocator and thread settings for all arms: those of train.py (system.py)
        settings = dict(MALLOC_MMAP_THRESHOLD_=str(1 << 30), MALLOC_TRIM_THRESHOLD_=str(1 << 30),
                        GOMP_SPINCOUNT='10000')
        self.process = subprocess.Popen([python, __file__, '--serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | settings)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(f'the worker of {request.get("arm")!r} exited with code {self.process.wait()}: see its '
                            f'output above')
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def show(shape, precision, results):
    """Print the table of a shape and precision. Returns its rows, as dicts."""
    s, ours = SHAPES[shape], results.get('RETRO')
    print(f'\n{shape}: n_embd {s["n_embd"]}, {s["n_head"]} heads, {s["n_layer"]} layers, {s["batch"]} x '
          f'{s["block_size"]} tokens, cross-attention in layers {s["cross"]}, {s["encoder"]} encoder layers, '
          f'{precision}')
    rows = []
    for arm, r in results.items():
        row = dict(shape=shape, precision=precision, arm=arm, tokens_per_s=round(r['median']),
                   lowest=round(r['lowest']), highest=round(r['highest']))
        line = f'  {arm:<28}{r["median"]:>9,.0f} tokens/s   {r["lowest"]:>9,.0f} to {r["highest"]:,.0f}'
        if ours and arm != 'RETRO':
            row['retro_over_this'] = round(ours['median'] / r['median'], 3)
            line += f'   RETRO runs at {ours["median"] / r["median"]:.2f} times this rate'
            if r['flops'] and r['flops'] != ours['flops']:
                row['by_flops'] = round(r['flops'] / ours['flops'], 3)
                line += f', {row["by_flops"]:.2f} expected from FLOPs'
        rows.append(row)
        print(line, flush=True)
    return rows


def measure(workers, arms, shape, precision, rounds, seconds_per_round):
    """{arm: dict(median, lowest, highest, flops)}, in tokens/s and FLOPs per token. The arms alternate."""
    tokens = SHAPES[shape]['batch'] * SHAPES[shape]['block_size']
    steps, rates, flops = {}, {arm: [] for arm in arms}, {}
    for arm in arms:
        elapsed = 0
        for _ in range(6):  # warm up the allocator
            answer = workers[ARMS[arm]].ask(arm=arm, shape=shape, precision=precision, steps=1)
            elapsed += answer['seconds']
            if elapsed > 10:
                break
        steps[arm], flops[arm] = max(1, round(seconds_per_round / answer['seconds'])), answer['flops']
    for _ in range(rounds):
        for arm in arms:
            seconds = workers[ARMS[arm]].ask(arm=arm, shape=shape, precision=precision, steps=steps[arm])['seconds']
            rates[arm].append(steps[arm] * tokens / seconds)
    return {arm: dict(median=statistics.median(rates[arm]), lowest=min(rates[arm]), highest=max(rates[arm]),
                      flops=flops[arm]) for arm in arms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='3 rounds of the small shape only')
    parser.add_argument('--shapes', help=f'comma-separated, from {", ".join(SHAPES)} (default: small,medium)')
    parser.add_argument('--arms', default=','.join(list(ARMS)[:-1]),
                        help=f'comma-separated, from {", ".join(ARMS)} (default: all but the last)')
    parser.add_argument('--precisions', default='float32,bfloat16')
    parser.add_argument('--rounds', type=int, help='rounds per arm (default: 7, or 3 with --quick)')
    parser.add_argument('--retro-pytorch', default=str(ROOT / '.venv-retro-pytorch/bin/python'), metavar='PYTHON',
                        help='python of the environment with retro-pytorch (default: %(default)s)')
    arguments = parser.parse_args()
    arms, precisions = arguments.arms.split(','), arguments.precisions.split(',')
    shapes = (arguments.shapes or ('small' if arguments.quick else 'small,medium')).split(',')
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    for names, known in ((arms, ARMS), (shapes, SHAPES), (precisions, ('float32', 'bfloat16'))):
        for name in names:
            if name not in known:
                raise UserError(f'{name!r} is not one of {", ".join(known)}')
    pythons = {'ours': sys.executable, 'theirs': arguments.retro_pytorch}
    sides = {ARMS[arm] for arm in arms}
    if 'theirs' in sides and not os.path.exists(arguments.retro_pytorch):
        raise UserError(f'no python at {arguments.retro_pytorch}: create the environment with "python -m venv '
                        f'.venv-retro-pytorch" and ".venv-retro-pytorch/bin/pip install -r '
                        f'bench/requirements-retro-pytorch.txt", or leave retro-pytorch out with --arms=RETRO,GPT')
    workers = {side: Worker(pythons[side]) for side in sides}
    rows = []
    for shape in shapes:
        for precision in precisions:
            # retro-pytorch always has 8 heads
            supported = [arm for arm in arms if ARMS[arm] == 'ours' or SHAPES[shape]['n_head'] == 8]
            results = measure(workers, supported, shape, precision, rounds, 0.5 if arguments.quick else 2.0)
            rows += show(shape, precision, results)
    environments = {side: worker.ask(about=True) for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    print(json.dumps(dict(results=rows, rounds=rounds, **environments)))


if __name__ == '__main__':
    with user_errors_as_one_line():
        serve() if sys.argv[1:] == ['--serve'] else main()
