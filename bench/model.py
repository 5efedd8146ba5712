"""
How fast the model trains: forward, loss and backward of our RETRO, of the GPT that is its decoder, and of the package
retro-pytorch at the same shape, in float32 and in bfloat16 autocast, on the GPU where there is one. Prints a table and
one JSON line.

    python -m venv .venv-retro-pytorch
    .venv-retro-pytorch/bin/pip install -r bench/requirements-retro-pytorch.txt
    python bench/model.py [--quick] [--shapes=small,medium] [--retro-pytorch=.venv-retro-pytorch/bin/python]

Each side is a process in its own environment that builds its models once and then waits to be asked for a round. The
arms take turns, round by round (A B C D A B C D ...), and one alone runs at a time, so that whatever else the machine
does falls on all of them alike. A step is zero_grad, forward with the loss, and backward; there is no optimizer.

The architectures are equal as far as retro-pytorch's options go: width, heads and their width, MLP, layers of decoder
and encoder, where they cross-attend, chunk, neighbors, no dropout. What differs all the same, per side:
- ours: a documents mask in the decoder, biases in all linear layers, learned positions in the encoder, LayerNorm.
- theirs: rotary positions in every attention, a null key and value in the decoder's cross-attention, a linear layer of
  D x D after the encoder, a bias on the logits, RMSNorm, exact GELU. It has no documents mask, and masks neighbors by
  a padding token. It holds 8 heads whatever it is asked for, so 8 is what all arms have in the shapes 'small' and
  'medium', and it has no part in the other shapes.
'retro-pytorch with our loss' takes its logits and computes the loss as we do: on a CPU its own loss, over transposed
logits, is slow, and this arm tells how much of the difference that is.
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
        'RETRO compiled': 'ours'}  # the last one only where it is asked for: compiling takes minutes on a CPU


def make_batch(shape, device):
    """
    Tokens (B, T + 1), neighbors (B, L, K, R), their mask and documents (B, L). Two documents a sequence: the first
    one's last chunk has no neighbors. Every fourth neighbor has no continuation. Absent tokens are 0, and no other is.
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
    documents = (torch.arange(L, device=device) >= L // 2).long().expand(B, L)
    return tokens, neighbors.masked_fill(~mask, 0), mask, documents


def make_step(arm, shape, device):
    """The function that does one forward and backward of an arm, and the FLOPs that a token takes, where known."""
    import torch
    from torch.nn import functional as F
    tokens, neighbors, mask, documents = make_batch(shape, device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if ARMS[arm] == 'ours':
        from model import RETRO, RETROConfig
        model = RETRO(RETROConfig(block_size=shape['block_size'], vocab_size=shape['vocab'], n_layer=shape['n_layer'],
                                  n_head=shape['n_head'], n_embd=shape['n_embd'], use_retrieval=arm != 'GPT',
                                  retrieval_layers=shape['cross'], retrieval_chunk_size=C, retrieval_k_neighbors=K,
                                  retrieval_encoder_layers=shape['encoder']))
        given = (neighbors, mask) if arm != 'GPT' else (None, None)
        flops = model.flops_per_token()
        if arm == 'RETRO compiled':
            model.compile()

        def loss():
            return model(inputs, targets, *given, documents)[1]
    else:
        from retro_pytorch import RETRO
        D = shape['n_embd']
        model = RETRO(num_tokens=shape['vocab'], max_seq_len=shape['block_size'], enc_dim=D, dec_dim=D,
                      enc_depth=shape['encoder'], enc_cross_attn_layers=(1,), dec_depth=shape['n_layer'],
                      dec_cross_attn_layers=tuple(shape['cross']), dim_head=D // 8, chunk_size=C)  # of its 8 heads
        flops = None

        def loss():
            if arm == 'retro-pytorch':
                return model(tokens, neighbors, return_loss=True)
            return F.cross_entropy(model(inputs, neighbors).flatten(0, 1), targets.flatten())
    model.to(device).train()

    def step(context):
        model.zero_grad(set_to_none=True)
        with context:
            forward = loss()
        forward.backward()
        if device == 'cuda':
            torch.cuda.synchronize()
    return step, flops


def serve():
    """A worker: reads one request a line (arm, shape, precision, steps) and answers with the seconds that they took."""
    import torch
    answers, sys.stdout = sys.stdout, sys.stderr  # a package that prints must not answer
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
    """This file as a process of another environment's python."""

    def __init__(self, python):
        # train.py tells glibc to keep freed memory (keep_freed_memory): the same for every arm
        keep = dict(MALLOC_MMAP_THRESHOLD_=str(1 << 30), MALLOC_TRIM_THRESHOLD_=str(1 << 30))
        self.process = subprocess.Popen([python, __file__, '--serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | keep)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(f'the worker of {request.get("arm")!r} ended with exit code {self.process.wait()}; what it '
                            f'said is above')
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def show(shape, precision, results):
    """Print the table of a shape and precision, and return its rows."""
    s, ours = SHAPES[shape], results.get('RETRO')
    print(f'\n{shape}: {s["n_embd"]} wide, {s["n_head"]} heads, {s["n_layer"]} layers, {s["block_size"]} tokens, batch '
          f'{s["batch"]}, cross-attention in {s["cross"]}, encoder {s["encoder"]}, {precision}')
    rows = []
    for arm, r in results.items():
        row = dict(shape=shape, precision=precision, arm=arm, tokens_per_s=round(r['median']),
                   lowest=round(r['lowest']), highest=round(r['highest']))
        line = f'  {arm:<28}{r["median"]:>9,.0f} tokens/s   {r["lowest"]:>9,.0f} to {r["highest"]:,.0f}'
        if ours and arm != 'RETRO':
            row['retro_over_this'] = round(ours['median'] / r['median'], 3)
            line += f'   RETRO is {ours["median"] / r["median"]:.2f} times that'
            if r['flops'] and r['flops'] != ours['flops']:
                row['by_flops'] = round(r['flops'] / ours['flops'], 3)
                line += f', by FLOPs {row["by_flops"]:.2f}'
        rows.append(row)
        print(line, flush=True)
    return rows


def measure(workers, arms, shape, precision, rounds, seconds_a_round):
    """{arm: dict(median, lowest, highest) of tokens/s, with flops}, the arms in turn."""
    tokens = SHAPES[shape]['batch'] * SHAPES[shape]['block_size']
    steps, rates, flops = {}, {arm: [] for arm in arms}, {}
    for arm in arms:
        ask = dict(arm=arm, shape=shape, precision=precision)
        warm = 0
        for _ in range(6):  # until the memory that a step needs is there
            one = workers[ARMS[arm]].ask(**ask, steps=1)
            warm += one['seconds']
            if warm > 10:
                break
        steps[arm], flops[arm] = max(1, round(seconds_a_round / one['seconds'])), one['flops']
    for _ in range(rounds):
        for arm in arms:
            seconds = workers[ARMS[arm]].ask(arm=arm, shape=shape, precision=precision, steps=steps[arm])['seconds']
            rates[arm].append(steps[arm] * tokens / seconds)
    return {arm: dict(median=statistics.median(rates[arm]), lowest=min(rates[arm]), highest=max(rates[arm]),
                      flops=flops[arm]) for arm in arms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='3 rounds of the small shape alone')
    parser.add_argument('--shapes', help=f'of {", ".join(SHAPES)}; default: small,medium')
    parser.add_argument('--arms', default=','.join(list(ARMS)[:-1]),
                        help=f'of {", ".join(ARMS)}; default: all but the last')
    parser.add_argument('--precisions', default='float32,bfloat16')
    parser.add_argument('--rounds', type=int, help='default: 7, with --quick 3')
    parser.add_argument('--retro-pytorch', default=str(ROOT / '.venv-retro-pytorch/bin/python'), metavar='PYTHON',
                        help='the python of the environment that has retro-pytorch')
    arguments = parser.parse_args()
    arms, precisions = arguments.arms.split(','), arguments.precisions.split(',')
    shapes = (arguments.shapes or ('small' if arguments.quick else 'small,medium')).split(',')
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    for given, known in ((arms, ARMS), (shapes, SHAPES), (precisions, ('float32', 'bfloat16'))):
        for name in given:
            if name not in known:
                raise UserError(f'{name!r} is none of {", ".join(known)}')
    pythons = {'ours': sys.executable, 'theirs': arguments.retro_pytorch}
    sides = {ARMS[arm] for arm in arms}
    if 'theirs' in sides and not os.path.exists(arguments.retro_pytorch):
        raise UserError(f'no python at {arguments.retro_pytorch}: make the environment with "python -m venv '
                        f'.venv-retro-pytorch" and ".venv-retro-pytorch/bin/pip install -r '
                        f'bench/requirements-retro-pytorch.txt", or measure without it by --arms=RETRO,GPT')
    workers = {side: Worker(pythons[side]) for side in sides}
    found = []
    for shape in shapes:
        for precision in precisions:
            # retro-pytorch can hold 8 heads alone
            able = [arm for arm in arms if ARMS[arm] == 'ours' or SHAPES[shape]['n_head'] == 8]
            results = measure(workers, able, shape, precision, rounds, 0.5 if arguments.quick else 2.0)
            found += show(shape, precision, results)
    about = {side: worker.ask(about=True) for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    print(json.dumps(dict(results=found, rounds=rounds, **about)))


if __name__ == '__main__':
    with user_errors_as_one_line():
        serve() if sys.argv[1:] == ['--serve'] else main()
