"""
Trains a RETRO (or, with use_retrieval = False, a GPT) that fetches its neighbors from Milvus on every batch.

    python train.py config/quickstart.py                                      # one process, CPU or GPU
    python train.py config/quickstart.py --batch_size=8 --init_from=resume    # override, go on from the checkpoint
    torchrun --standalone --nproc_per_node=4 train.py config/my_run.py        # 4 GPUs of one node
    python train.py --help                                                    # all settings
"""
import functools
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from enum import Enum

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import UserError, is_secret, load_settings, save_atomically, user_errors_as_one_line
from data.stream import as_dataset_configs
from data.tokenizer import load_tokenizer, token_byte_counts, vocabulary_hash
from evaluation.figures import describe_scores
from evaluation.samples import COLUMNS, write_samples
from model import RETRO, RETROConfig, autocast, keep_freed_memory, load_checkpoint, pick_dtype
from retrieval.embedding import pick_device
from retrieval.local_server import local_server
from retrieval.prefetch import Prefetcher
from retrieval.retriever import Retriever

# The settings, overridden by config files and --key=value (configurator.py).
# output
out_dir = 'out'  # checkpoint, metrics.jsonl and loss.png go here
eval_interval = 2000  # steps between evaluations; each one saves a checkpoint
eval_iters = 200  # batches of an evaluation, the same ones every time
log_interval = 10  # steps between lines of metrics.jsonl
eval_only = False  # evaluate the checkpoint and stop
always_save_checkpoint = True  # False: save only where the val loss is the best so far, and when stopped
init_from = 'scratch'  # 'scratch', or 'resume' from out_dir's checkpoint
wandb_log = False  # log to Weights & Biases too
wandb_project = 'nanoretro'  # its project
wandb_run_name = 'retro'  # its run
multiple_choice_benchmarks = []  # DeepEval's, at each evaluation: names, or (name, {'tasks': ..., 'n_shots': ...})
benchmark_data_dir = ''  # where their data is saved, for machines that don't reach the hub (evaluation/benchmarks.py)
# data
train_datasets = []  # list of DatasetConfig (data/stream.py) or paths: what is trained on, and what populate reads
val_datasets = []  # the same for evaluation
tokenizer = 'gpt2'  # 'gpt2', or the path of a byte-level tokenizer.json
gradient_accumulation_steps = 40  # micro-batches of a step, over all processes
batch_size = 12  # sequences of a micro-batch
block_size = 1024  # tokens of a sequence, a multiple of retrieval_chunk_size
# model
n_layer = 12  # decoder blocks
n_head = 12  # attention heads
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining, 0.1 or more for finetuning
bias = False  # biases in linear layers and layer norms; GPT-2 has them
token_mix = True  # a token's embedding takes up those of the two before it
# retrieval
use_retrieval = True  # False: the GPT of the same decoder
retrieval_layers = []  # blocks with chunked cross-attention, from 1; empty: every third from the 6th, and the last
retrieval_chunk_size = 64  # tokens of a chunk
retrieval_k_neighbors = 2  # neighbors of a chunk
retrieval_rerank = 0  # of so many of the nearest, take those that share most with the chunk; 0: take the nearest
retrieval_encoder_layers = 0  # blocks of the neighbor encoder; the paper's models have 2
retrieval_copy = True  # cross-attention that can copy from its first step on; False: the paper's
retrieval_longest_match = 6  # tokens in a row that are counted for it; 0: none are
retrieval_embedding_model = 'sentence-transformers/all-mpnet-base-v2'  # a SentenceTransformer of the hub, or a folder
retrieval_milvus_uri = 'out/milvus.db'  # a local file ending in .db (Milvus Lite), or a server's http(s) address
retrieval_milvus_token = os.environ.get('MILVUS_TOKEN', '')  # user:password or API key; never printed, logged or saved
retrieval_collection = 'chunks'  # name of the collection
retrieval_index = 'IVF_FLAT'  # FLAT (exact), IVF_FLAT, HNSW (large collections on a server) or AUTOINDEX
retrieval_prefetch_batches = 8  # batches that are kept ready, and at most fetched by one search
retrieval_cache_dir = 'out/neighbors'  # what was fetched is remembered here; on a local disk, shared by all runs
retrieval_cache_gb = 10.0  # its size at most; 0: remember nothing
retrieval_timeout = 600.0  # seconds to wait for a Milvus that is away, before a checkpoint is saved and the run ends
# optimizer
learning_rate = 6e-4  # the highest
max_iters = 600000  # steps
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # largest norm of the gradient; 0.0: any
decay_lr = True  # warm up, then decay by a cosine; False: constant
warmup_iters = 2000  # steps to the highest rate
lr_decay_iters = 600000  # steps to the lowest
min_lr = 6e-5  # the lowest
# system
backend = 'auto'  # of torch.distributed: 'auto' is nccl on GPUs and gloo on CPUs
device = 'auto'  # 'cpu', 'cuda', 'cuda:1'; 'auto' is the first GPU, or else the CPU
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; 'auto' is bfloat16 where the processor has it
compile = True  # torch.compile; it needs a C++ compiler on CPUs
seed = 1337  # of the weights and of the order of documents
# end of settings

INTERLEAVE = 64  # steps between two sequences of the same document
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40': 181e12, 'L4': 121e12, '4090': 165e12,
              '3090': 71e12, 'V100': 125e12, 'T4': 65e12}  # dense half precision, by the vendors' data sheets


def get_lr(it):
    """Linear warmup, then cosine decay to min_lr."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = min(1.0, (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def peak_flops(device_type, precision):
    """The machine's peak FLOP/s: by data sheet for known GPUs, else what a large matrix product reaches."""
    if device_type == 'cuda':
        name = torch.cuda.get_device_name()
        for known, flops in PEAK_FLOPS.items():
            if known in name:
                return flops
    a = torch.randn(2048, 2048, device=device_type, dtype=getattr(torch, precision))
    fastest = float('inf')
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 2048 ** 3 / fastest


def plain(settings):
    """The settings as plain values, without secrets: for checkpoints and logs."""
    def as_plain(value):
        if is_dataclass(value):
            return asdict(value)
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {key: as_plain(v) for key, v in value.items()}
        return [as_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
    return {key: as_plain(value) for key, value in settings.items() if not is_secret(key)}


def summary(metrics_path):
    """What a run came to, as a table, from its metrics.jsonl."""
    with open(metrics_path) as file:
        lines = [json.loads(line) for line in file]
    last = [line for line in lines if 'val_bpb_off' in line][-1]
    steps = [line for line in lines if 'loss' in line]
    rows = [('steps', f'{last["iter"]:,}'), ('tokens', f'{last["tokens"]:,}')]
    if 'val_bpb_on' in last:
        gain = 1 - last['val_bpb_on'] / last['val_bpb_off']
        rows += [('val bpb, retrieval on', f'{last["val_bpb_on"]:.4f}'),
                 ('val bpb, retrieval off', f'{last["val_bpb_off"]:.4f}'), ('on is below off by', f'{gain:.2%}')]
    else:
        rows += [('val bpb', f'{last["val_bpb_off"]:.4f}')]
    if steps:
        rows += [('training rate, tokens/s', f'{sorted(s["tokens_per_s"] for s in steps)[len(steps) // 2]:,.0f}'),
                 ('waited for retrieval, s', f'{sum(s["retrieval_wait_s"] for s in steps):.1f}')]
    return '\n'.join(f'{name:<26} {value:>12}' for name, value in rows)


def check_out_dir():
    """UserError where out_dir can't be written. It is not made yet."""
    there = os.path.abspath(out_dir)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise UserError(f'out_dir {out_dir!r} can not be written ({there} is no folder that you may write to): name '
                        f'another one')


def set_earlier_run_aside():
    """Move what an earlier run left in out_dir into a folder of its own."""
    earlier = [name for name in ('ckpt.pt', 'metrics.jsonl', 'loss.png') if os.path.exists(f'{out_dir}/{name}')]
    if earlier:
        number = next(n for n in itertools.count(1) if not os.path.exists(f'{out_dir}/previous-{n}'))
        os.makedirs(f'{out_dir}/previous-{number}')
        for name in earlier:
            os.replace(f'{out_dir}/{name}', f'{out_dir}/previous-{number}/{name}')
        print(f'the earlier run in {out_dir} is now in {out_dir}/previous-{number}')


def drop_metrics_after(path, it):
    """A resumed run writes the lines after its checkpoint anew."""
    if os.path.exists(path):
        with open(path) as file:
            kept = [line for line in file if line.endswith('}\n') and json.loads(line)['iter'] <= it]

        def save(beside):
            with open(beside, 'w') as file:
                file.writelines(kept)
        save_atomically(save, path)


def plot_metrics(metrics_path, plot_path):
    """The loss curves of a metrics.jsonl, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with open(metrics_path) as file:
        lines = [json.loads(line) for line in file]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    steps = [line for line in lines if 'loss' in line]
    left.plot([line['iter'] for line in steps], [line['loss'] for line in steps], lw=1, color='0.5', label='train loss')
    left.set(xlabel='step', ylabel='nats per token')
    right.margins(y=0.12)
    style = {'off': 'o-', 'on': 'o--'}  # on is drawn over off, and may lie on it
    for key, label, color in (('off', 'retrieval off', 'tab:orange'), ('on', 'retrieval on', 'tab:blue')):
        points = [line for line in lines if f'val_bpb_{key}' in line]
        left.plot([p['iter'] for p in points], [p[f'val_loss_{key}'] for p in points], style[key], ms=3, color=color,
                  label=f'val loss, {label}')
        right.plot([p['iter'] for p in points], [p[f'val_bpb_{key}'] for p in points], style[key], ms=3, color=color,
                   label=f'val, {label}')
        if points:
            right.annotate(f'{points[-1][f"val_bpb_{key}"]:.3f}', (points[-1]['iter'], points[-1][f'val_bpb_{key}']),
                           textcoords='offset points', xytext=(-4, 8 if key == 'off' else -14), ha='right', color=color)
    right.set(xlabel='step', ylabel='bits per byte')
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.25)
    save_atomically(lambda beside: figure.savefig(beside, dpi=130, format='png'), plot_path)
    plt.close(figure)


@torch.no_grad()
def evaluate(model, batches, token_bytes, context, reduce_sum):
    """Val loss (nats a token) and bits per byte over the batches, with retrieval on (where there is any) and off."""
    model.eval()
    arms = ['off'] if batches[0].neighbors is None else ['on', 'off']
    sums = torch.zeros(4, dtype=torch.float64)  # nats on, nats off, targets, bytes
    for batch in batches:
        real = batch.targets[batch.targets >= 0]
        if not len(real):
            continue
        sums[2:] += torch.tensor([len(real), token_bytes[real].sum().item()])
        for arm in arms:
            neighbors = (batch.neighbors, batch.neighbor_mask) if arm == 'on' else (None, None)
            with context:
                _, loss = model(batch.tokens, batch.targets, *neighbors, batch.documents)
            sums[('on', 'off').index(arm)] += loss.item() * len(real)
    model.train()
    on, off, count, size = reduce_sum(sums).tolist()
    nats = {'on': on, 'off': off}
    return ({f'val_loss_{arm}': nats[arm] / count for arm in arms}
            | {f'val_bpb_{arm}': nats[arm] / math.log(2) / size for arm in arms})


def main(cleanup):
    """`cleanup` is an ExitStack, for what has to be ended with the run."""
    settings = load_settings(sys.argv[1:])
    globals().update(settings)
    sys.argv = [a for a in sys.argv if not is_secret(a.partition('=')[0])]  # wandb would log it
    for key in ('eval_interval', 'eval_iters', 'log_interval', 'gradient_accumulation_steps', 'batch_size',
                'block_size', 'n_layer', 'n_head', 'n_embd', 'retrieval_chunk_size', 'retrieval_prefetch_batches'):
        if settings[key] < 1:
            raise UserError(f'{key} must be at least 1, but is {settings[key]}')

    # one process or many
    ddp = int(os.environ.get('RANK', -1)) != -1
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    local = use_retrieval and '://' not in retrieval_milvus_uri
    if local and world_size > int(os.environ.get('LOCAL_WORLD_SIZE', 1)):
        raise UserError(f'retrieval_milvus_uri {retrieval_milvus_uri!r} is a local file, which serves one node: use a '
                        f'Milvus server')
    run_device, control = pick_device(device), None
    if ddp:
        if run_device.startswith('cuda'):
            run_device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(run_device)
        dist.init_process_group(backend if backend != 'auto' else 'nccl' if 'cuda' in run_device else 'gloo')
        cleanup.callback(dist.destroy_process_group)
        # over it the ranks agree to stop, and wait while one evaluates or waits for Milvus
        control = dist.new_group(backend='gloo', timeout=timedelta(days=7))
    # a rank's share of the step: some of its micro-batches, or where there are more ranks than those, a part of one
    ranks_a_batch = max(1, world_size // gradient_accumulation_steps)
    if gradient_accumulation_steps * ranks_a_batch % world_size or batch_size % ranks_a_batch:
        raise UserError(f'gradient_accumulation_steps {gradient_accumulation_steps} x batch_size {batch_size} can not '
                        f'be shared by {world_size} processes: make gradient_accumulation_steps a multiple of '
                        f'{world_size}')
    micro_steps = gradient_accumulation_steps * ranks_a_batch // world_size
    micro_batch = batch_size // ranks_a_batch
    master = rank == 0
    device_type = run_device.split(':')[0]
    try:
        precision = pick_dtype(dtype, run_device)
    except ValueError as error:
        raise UserError(str(error)) from error
    context = autocast(precision, run_device)
    keep_freed_memory()
    torch.manual_seed(seed + rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    bar = None

    def say(message):
        if bar and not bar.disable:
            bar.write(message)
        else:
            print(message, flush=True)

    def reduce_sum(tensor):
        if ddp:
            tensor = tensor.to(run_device) if 'cuda' in run_device else tensor
            dist.all_reduce(tensor)
        return tensor.cpu()

    # the model's shape, and the checkpoint's where there is one: wrong settings are told before anything is loaded
    encoding = load_tokenizer(tokenizer)
    model_args = dict(block_size=block_size, vocab_size=-(-encoding.n_vocab // 64) * 64, n_layer=n_layer, n_head=n_head,
                      n_embd=n_embd, dropout=dropout, bias=bias, use_retrieval=use_retrieval,
                      retrieval_layers=retrieval_layers, retrieval_chunk_size=retrieval_chunk_size,
                      retrieval_k_neighbors=retrieval_k_neighbors, retrieval_encoder_layers=retrieval_encoder_layers,
                      token_mix=token_mix, retrieval_copy=retrieval_copy,
                      retrieval_longest_match=retrieval_longest_match)
    try:
        model_config = RETROConfig(**model_args)
        if block_size % retrieval_chunk_size:  # the data is on the chunk grid without retrieval too
            raise ValueError(f'block_size {block_size} must be a multiple of retrieval_chunk_size '
                             f'{retrieval_chunk_size}')
    except ValueError as error:
        raise UserError(f'{error}: correct the config') from error
    model_args = asdict(model_config)
    if init_from not in ('scratch', 'resume'):
        raise UserError(f"init_from {init_from!r} is neither 'scratch' nor 'resume'")
    checkpoint = None
    if init_from == 'resume' or eval_only:
        try:
            checkpoint = load_checkpoint(os.path.join(out_dir, 'ckpt.pt'), run_device)
        except ValueError as error:
            raise UserError(str(error)) from error
        made_with = checkpoint['model_args'] | {'vocabulary': checkpoint['vocabulary_hash']}
        wanted = model_args | {'vocabulary': vocabulary_hash(encoding)}
        differ = [f'{key} is {made_with.get(key)!r} there and {wanted[key]!r} in the run'
                  for key in wanted if made_with.get(key) != wanted[key]
                  and key not in ('dropout', 'retrieval_k_neighbors')]  # no weight depends on these
        if differ:
            raise UserError(f'the checkpoint in {out_dir!r} is of another architecture ({"; ".join(differ)}): resume '
                            f'with the settings that made it, or start another out_dir')
        if not eval_only and len(checkpoint['ranks']) != world_size:
            raise UserError(f'the checkpoint in {out_dir!r} was made by {len(checkpoint["ranks"])} processes, and '
                            f'there are {world_size}: resume with as many')

    benchmarks = []
    if multiple_choice_benchmarks and master:
        from evaluation.benchmarks import prepare_benchmarks  # imports DeepEval, which takes seconds
        benchmarks = prepare_benchmarks(multiple_choice_benchmarks, benchmark_data_dir)
    if ddp:
        dist.barrier(group=control)  # the others wait for what the master fetches

    # data and retrieval, from a process of its own; the val batches are fetched once
    if master:
        check_out_dir()
    resumed = init_from == 'resume' and not eval_only
    grid = dict(chunk_size=retrieval_chunk_size, block_size=block_size)
    train_stream = dict(configs=as_dataset_configs(train_datasets, 'train_datasets'), interleave=INTERLEAVE, seed=seed,
                        lanes=batch_size * gradient_accumulation_steps, first=rank * micro_steps * micro_batch,
                        count=micro_steps * micro_batch, batch_size=micro_batch, **grid,
                        state=checkpoint['ranks'][rank]['stream'] if resumed else None)
    val_stream = dict(configs=as_dataset_configs(val_datasets, 'val_datasets'), lanes=batch_size * world_size,
                      first=rank * batch_size, count=batch_size, batch_size=batch_size, **grid)
    address = server = None
    if local and master:
        address, server = cleanup.enter_context(local_server(retrieval_milvus_uri, retrieval_collection))
    if local and ddp:
        told = [address]
        dist.broadcast_object_list(told, group=control)
        address, = told
    it = checkpoint['iter_num'] if checkpoint else 0
    val_count = max(1, -(-eval_iters // world_size))
    streams = [(val_stream, val_count), (train_stream, max(0, max_iters - it) * micro_steps)][:1 if eval_only else 2]
    prefetcher = Prefetcher(settings, streams, run_device, address,
                            say=lambda news: say(news if master else f'rank {rank}: {news}'), retrieve=use_retrieval)
    cleanup.callback(prefetcher.close)
    val_batches = list(itertools.islice(prefetcher, val_count))
    if master:
        os.makedirs(out_dir, exist_ok=True)
    if use_retrieval and master:
        print(f'retrieving from {prefetcher.size:,} chunks of {retrieval_collection!r} in {retrieval_milvus_uri}')

    @functools.cache
    def own_retriever():
        """One of this process, for prompts."""
        retriever = Retriever(settings, encoding, run_device, address, say) if use_retrieval else None
        if retriever:
            cleanup.callback(retriever.close)
        return retriever

    token_bytes = torch.tensor(token_byte_counts(encoding), device=run_device)

    # model and optimizer
    torch.manual_seed(seed)  # the same weights in every process, whatever was drawn before
    model = RETRO(model_config)
    if checkpoint:
        model.load_state_dict(checkpoint['model'])
    model.to(run_device)
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
    scaler = torch.amp.GradScaler(device_type, enabled=precision == 'float16')
    best_val_loss = float('inf')
    if checkpoint:
        optimizer.load_state_dict(checkpoint['optimizer'])
        scaler.load_state_dict(checkpoint['scaler'])
        best_val_loss = checkpoint['best_val_loss']
    raw_model = model
    if compile:
        model = torch.compile(model)
    if ddp:
        model = DDP(model, device_ids=[run_device] if 'cuda' in run_device else None)
    peak = peak_flops(device_type, precision) * world_size if master else 0
    torch.manual_seed(seed + rank)
    if resumed:
        set_rng_state(checkpoint['ranks'][rank]['rng'])

    tokens_per_iter = batch_size * gradient_accumulation_steps * block_size
    metrics_path = os.path.join(out_dir, 'metrics.jsonl')
    if master:
        print(f'{"RETRO" if use_retrieval else "GPT"} of {raw_model.num_parameters() / 1e6:.2f} M parameters on '
              f'{world_size} x {run_device}, {precision} | {tokens_per_iter:,} tokens a step, {max_iters:,} steps | '
              f'{raw_model.flops_per_token() / 1e6:.1f} MFLOP a token')
        if resumed:
            drop_metrics_after(metrics_path, it)
        elif not eval_only:
            set_earlier_run_aside()
    wandb_run = None
    if wandb_log and master:
        import wandb
        wandb_run = wandb.init(project=wandb_project, name=wandb_run_name, config=plain(settings))
        cleanup.callback(wandb_run.finish)
    bar = tqdm(total=max_iters, initial=it, unit='step', dynamic_ncols=True,
               disable=not master or not sys.stderr.isatty() or eval_only)
    cleanup.callback(bar.close)

    def log(**values):
        with open(metrics_path, 'a') as file:
            file.write(json.dumps(values) + '\n')
        if wandb_run:
            wandb_run.log(values, step=values['iter'])

    def save_checkpoint():
        own = resume_point | dict(losses=[loss.item() for loss in resume_point['losses']])
        ranks = [own] * world_size
        if ddp:
            dist.all_gather_object(ranks, own, group=control)
        if master:
            state = dict(model=raw_model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         model_args=model_args, vocabulary_hash=vocabulary_hash(encoding), config=plain(settings),
                         iter_num=it, best_val_loss=best_val_loss, ranks=ranks)
            save_atomically(lambda beside: torch.save(state, beside), os.path.join(out_dir, 'ckpt.pt'))
        if ddp:
            dist.barrier(group=control)  # who ends before the file is there has the launcher end all

    def evaluate_further():
        """What the master alone does at an evaluation: the benchmarks, and samples for wandb."""
        rng = get_rng_state()
        arguments = raw_model, encoding, run_device, context, own_retriever()
        scores = {benchmark.name: benchmark.run(*arguments, batch_size, show_progress=not bar.disable)
                  for benchmark in benchmarks}
        for name, own in scores.items():
            say(f'step {it}: {name}, {describe_scores(own)}')
        if scores and not eval_only:
            log(iter=it, tokens=it * tokens_per_iter, benchmarks=scores)
        if wandb_run:
            import wandb
            prompts = val_batches[0].tokens[:4, :2 * retrieval_chunk_size]
            wandb_run.log({'samples': wandb.Table(COLUMNS, write_samples(raw_model, prompts, *arguments[1:]))}, step=it)
        model.train()
        set_rng_state(rng)

    signals = []

    def on_signal(number, frame):
        if signals:
            raise KeyboardInterrupt  # the second time at once
        signals.append(number)
        os.write(2, b'\nstopping with a checkpoint; once more to stop at once\n')

    def next_batch():
        """The next batch."""
        batch = failure = None
        try:
            if not signals:
                batch = prefetcher.next(give_up=lambda: signals or (server and server.poll() is not None))
            if batch is None and not signals:
                raise UserError(f'Milvus Lite, which served {retrieval_milvus_uri}, ended with code {server.poll()}: '
                                f'see that it has memory enough, or use a Milvus server')
        except Exception as error:
            failure = error
        go_on_or_stop(getattr(failure, 'exit_code', 1) if failure else 0 if batch else 128 + signals[0], failure)
        return batch

    def go_on_or_stop(code, failure):
        """Where this rank or another one has a code other than 0, all end here, with a checkpoint."""
        code = torch.tensor(code)
        if ddp:
            dist.all_reduce(code, dist.ReduceOp.MAX, group=control)
        if code == 0:
            return
        for number in (signal.SIGINT, signal.SIGTERM):  # a launcher may send another one to be sure
            signal.signal(number, signal.SIG_IGN)
        if it > first_step:
            save_checkpoint()
            if master:
                say(f'saved a checkpoint at step {it}; go on from it with --init_from=resume')
        elif master:
            say('no step was finished, so there is nothing to save')
        if failure:
            raise failure
        sys.exit(code.item())

    first_step = it
    kept = checkpoint['ranks'][rank].get('losses', []) if resumed else []
    losses = [torch.tensor(loss, device=run_device) for loss in kept]  # since the last line of metrics.jsonl
    resume_point = dict(stream=train_stream['state'], rng=get_rng_state(), losses=list(losses))
    evaluated_at = it if resumed else None  # its checkpoint was made right after
    checkpoint = None  # frees its memory
    seconds, waited, since = 0.0, prefetcher.waited, it  # these are of this run alone
    counts = Counter()
    for batch in val_batches:
        counts.update(batch.counts)
    for number in (signal.SIGINT, signal.SIGTERM):
        cleanup.callback(signal.signal, number, signal.signal(number, on_signal))
    while True:
        if (it % eval_interval == 0 or it == max_iters or eval_only) and it != evaluated_at:
            values = evaluate(model, val_batches, token_bytes, context, reduce_sum)
            if master:
                if not eval_only:
                    log(iter=it, tokens=it * tokens_per_iter, **values)
                say(f'step {it}: ' + ', '.join(f'{key} {value:.4f}' for key, value in values.items()))
            loss_now = values.get('val_loss_on', values['val_loss_off'])
            if not eval_only and it > 0 and (always_save_checkpoint or loss_now < best_val_loss):
                best_val_loss = min(best_val_loss, loss_now)
                save_checkpoint()
            failure = None
            try:
                if benchmarks or wandb_run:
                    evaluate_further()
            except Exception as error:  # also of the network, of wandb, of DeepEval
                failure = error
            go_on_or_stop(getattr(failure, 'exit_code', 1) if failure else 0, failure)
        if it >= max_iters or eval_only:
            break

        start = time.perf_counter()
        lr = get_lr(it)
        for group in optimizer.param_groups:
            group['lr'] = lr
        step_loss = 0.0
        for micro_step in range(micro_steps):
            batch = next_batch()
            if ddp:  # gradients meet in the last micro-step alone
                model.require_backward_grad_sync = micro_step == micro_steps - 1
            with context:
                _, loss = model(batch.tokens, batch.targets, batch.neighbors, batch.neighbor_mask, batch.documents)
                loss = loss / micro_steps
            scaler.scale(loss).backward()
            step_loss += loss.detach()
            counts.update(batch.counts)
        if grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        it += 1
        losses.append(step_loss)
        if it % log_interval == 0 or it == max_iters:
            loss = reduce_sum(torch.stack(losses).mean().cpu().double()).item() / world_size
            seconds += time.perf_counter() - start
            rate = tokens_per_iter * (it - since) / seconds
            fetched = dict(zip(counts, reduce_sum(torch.tensor(list(counts.values()))).tolist(), strict=True))
            if master:
                waiting = prefetcher.waited - waited
                mfu = raw_model.estimate_mfu(rate, peak)
                log(iter=it, tokens=it * tokens_per_iter, loss=loss, lr=lr, tokens_per_s=rate,
                    retrieval_wait_s=waiting, mfu=mfu, **{f'chunks_{name}': n for name, n in fetched.items()})
                if bar.disable:
                    say(f'step {it}: loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} tokens/s, mfu {mfu:.1%}, waited for '
                        f'retrieval {waiting:.2f} s')
                else:
                    bar.set_postfix_str(f'loss {loss:.3f}, {rate:,.0f} tokens/s, waited {waiting:.1f} s')
            seconds, waited, losses, since = 0.0, prefetcher.waited, [], it
            counts.clear()
        else:
            seconds += time.perf_counter() - start
        # a stop in the middle of the next step goes back to here
        resume_point = dict(stream=batch.state, rng=get_rng_state(), losses=list(losses))
        bar.update()
    bar.close()
    if master and not eval_only:
        plot_metrics(metrics_path, os.path.join(out_dir, 'loss.png'))
        print(f'ckpt.pt, metrics.jsonl and loss.png are in {out_dir}\n\n{summary(metrics_path)}')


def get_rng_state():
    """The state of torch's generators, as tensors."""
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)


def set_rng_state(state):
    torch.set_rng_state(state['cpu'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


if __name__ == '__main__':
    with user_errors_as_one_line(), ExitStack() as cleanup:
        main(cleanup)
