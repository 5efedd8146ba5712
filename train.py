"""
Trains a RETRO (or, with use_retrieval = False, a GPT) that fetches its neighbors from Milvus on every batch.

    python train.py config/quickstart.py                                      # one process, CPU or GPU
    python train.py config/quickstart.py --batch_size=8 --init_from=resume    # override; resume from the checkpoint
    torchrun --standalone --nproc_per_node=4 train.py config/my_run.py        # 4 GPUs of one node
    python train.py --help                                                    # all settings
"""
import functools
import math
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing

from system import (
    autocast,
    get_rng_state,
    keep_freed_memory,
    pick_dtype,
    say,
    set_rng_state,
    why_not_compile,
)

import torch
from tqdm import tqdm

from configurator import UserError, drop_secrets_from_argv, load_settings, named_settings, user_errors_as_one_line
from data.conversations import check_documents
from data.fingerprint import describe_corpus
from data.tokenizer import load_tokenizer, token_byte_counts, tokenizer_json
from evaluation.validation import evaluate, run_benchmarks
from model import RETRO, RETROConfig
from retrieval.inherit import take_from_collection
from retrieval.loader import Loader
from retrieval.local_server import is_local
from retrieval.retriever import Retriever
from training.checkpoint import (
    RunState,
    check_fits,
    describe_resume,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    source_settings,
)
from training.checks import (
    OF_TRAINING,
    NotFinite,
    check_found_themselves,
    check_settings,
    check_step,
    describe_schedule,
    not_finite,
)
from training.distributed import StopSignals, find_ranks, join_ranks, share_of_step
from training.metrics import Interval, Metrics, plot_metrics, summary, tokens_per_step
from training.out_dir import check_shared, check_writable, lock_run
from training.parallel import check_parallel, clip_gradients, parallelize, reduce_gradients, whole_model
from training.sizes import check_memory, print_sizes

# The settings, overridden by config files and --key=value (configurator.py).
# output
out_dir = 'out'  # where checkpoints, metrics.jsonl and loss.png go
eval_interval = 2000  # steps between evaluations; each one saves a checkpoint
eval_tokens = 2_000_000  # tokens of the val documents that are evaluated, the same every time; 0: all
log_interval = 10  # steps between lines of metrics.jsonl
eval_only = False  # evaluate the checkpoint and stop
dry_run = False  # print what the run takes, and stop: parameters, memory, GPUs, time; populate: the collection
always_save_checkpoint = True  # False: save only if the val loss is the best so far, and when stopped
keep_checkpoints = 2  # newest checkpoints to keep; 0 keeps all
init_from = 'scratch'  # 'scratch', 'resume' from out_dir, 'gpt2' (-medium, -large, -xl), or a folder of weights
retrofit = False  # train only what retrieval adds to the GPT of init_from
wandb_log = False  # log to Weights & Biases, too
wandb_project = 'nanoretro'  # W&B project
wandb_run_name = 'retro'  # W&B run name
multiple_choice_benchmarks = []  # DeepEval's, run at each evaluation: names, or (name, {'tasks': ..., 'n_shots': ...})
benchmark_data_dir = ''  # their data, for machines that cannot reach the hub (evaluation/benchmarks.py)
# data
train_datasets = []  # list of DatasetConfig (data/documents.py) or paths, for training and for populate
val_datasets = []  # the same, for evaluation
data_cache_dir = 'out/datasets'  # the datasets as tokens, made when they are first read and when their files change
data_cache_gb = 100.0  # its maximum size, beyond which the datasets that no run has used for longest are removed
stream_workers = 1  # processes of each rank that read streamed datasets
stream_timeout = 600.0  # seconds to wait for one that cannot be reached before saving a checkpoint and ending the run
tokenizer = 'gpt2'  # 'gpt2', or the path of a byte-level tokenizer.json
gradient_accumulation_steps = 40  # micro-batches per step, over all processes
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence, a multiple of retrieval_chunk_size
# model
n_layer = 12  # decoder blocks
n_head = 12  # attention heads
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining, 0.1 or more for finetuning
bias = False  # biases in linear layers and layer norms; GPT-2 has them
token_mix = True  # add a linear mix of the two tokens before to each token's embedding
copy_own_context = True  # attend to what followed the last tokens where they stand earlier in the sequence
own_context_layers = []  # blocks that do so, from 1; empty: the first and the middle one
# retrieval
use_retrieval = True  # False: train the same decoder as a GPT
retrieval_pointers = 32  # tokens that came next at the longest matches in the collection, for each token; 0 disables
retrieval_layers = []  # blocks with chunked cross-attention, from 1; empty: every third from the 6th, and the last
retrieval_chunk_size = 64  # tokens per chunk
retrieval_k_neighbors = 2  # neighbors per chunk; 0 disables
retrieval_mode = 'dense'  # neighbors by embeddings; 'bm25': by words; 'hybrid': by both (docs/scaling.md)
retrieval_rerank = 0  # re-rank this many nearest by the text they share with the chunk; 0 disables
retrieval_encoder_layers = 0  # blocks of the neighbor encoder; 2 in the paper
retrieval_copy = True  # cross-attention that can copy from its first step on; False: the paper's
retrieval_longest_match = 6  # longest run of matching tokens that copying counts; 0 disables, 127 at most
retrieval_embedding_model = 'sentence-transformers/all-mpnet-base-v2'  # SentenceTransformer: hub name or folder
retrieval_milvus_uri = 'out/milvus.db'  # a local file ending in .db (Milvus Lite), or a server's http(s) address
retrieval_milvus_token = os.environ.get('MILVUS_TOKEN', '')  # user:password or API key; never printed, logged or saved
retrieval_collection = 'chunks'  # name of the collection
retrieval_index = 'auto'  # such as 'FLAT' (exact) or 'HNSW M=32' (docs/scaling.md); 'auto' by database and size
retrieval_search_params = {}  # of the index, in place of its defaults, such as {'nprobe': 64} or {'ef': 256}
retrieval_vectors = 'float32'  # or 'float16', which takes half the memory, on servers from version 2.4 on
retrieval_bulk_dir = ''  # for populate --bulk=True: a folder that the server reads, too, or s3://BUCKET/FOLDER
retrieval_workers = 1  # processes per rank that retrieve ahead of the step; beside a GPU a quarter of the rank's cores
retrieval_prefetch_batches = 8  # batches that each of them keeps ready, and the most that one search serves
retrieval_cache_dir = 'out/neighbors'  # cache of fetched neighbors, shared by all runs; on a local disk
retrieval_cache_gb = 10.0  # its maximum size; 0 disables
retrieval_matches_dir = 'out/matches'  # exact-match index of the collection, shared by all runs; on a local disk
retrieval_offline = False  # train without a database, from what python -m retrieval.precompute has stored in the cache
retrieval_timeout = 600.0  # seconds to wait for an unreachable Milvus before saving a checkpoint and ending the run
# instruction tuning (sft.py)
template = ''  # of conversations: 'instructretro', 'plain', or a text with {system}, {user}, {assistant}; '': documents
passages = ''  # that go with a question: '' none, 'prompt' as text before it, 'neighbors' read or pointed into
passages_from = 'file'  # 'file': the example's own ctxs; 'collection': retrieved for it, its own document left out
num_passages = 2  # of each question, at most
freeze_retrieval = False  # tune the decoder alone, as InstructRetro does: retrieval is silent, and stays as it is
# optimizer
learning_rate = 6e-4  # peak learning rate
max_iters = 600000  # steps
weight_decay = 1e-1  # for matrices and embeddings
beta1 = 0.9  # AdamW's first beta
beta2 = 0.95  # AdamW's second beta
grad_clip = 1.0  # clip gradients to this norm; 0.0 disables
decay_lr = True  # linear warmup, then cosine decay; False: constant
warmup_iters = 2000  # steps to the peak learning rate
lr_decay_iters = 0  # steps to the final learning rate; 0: max_iters
min_lr = -1.0  # final learning rate; -1.0: learning_rate / 10
# system
backend = 'auto'  # torch.distributed backend; 'auto' is nccl on GPUs and gloo on CPUs
device = 'auto'  # 'cpu', 'cuda', 'cuda:1'; 'auto' is the first GPU, or else the CPU
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; 'auto' is bfloat16 where the processor has it
parallel = 'ddp'  # of several processes: 'ddp', or 'fsdp', which shards weights, gradients and AdamW's state over them
activation_checkpointing = 'none'  # 'full' recomputes each block in the backward pass, 'selective' what is cheap of it
compile = True  # torch.compile; needs a C++ compiler on CPUs, and is left out without one
seed = 1337  # for the weights and the order of documents
# end of settings


def read_settings(arguments):
    """The settings of a run, and what is another model's where the arguments say nothing: its architecture."""
    settings, given = load_settings(arguments, can_dry_run=True), {}
    if settings.dry_run:
        os.environ['HF_HUB_OFFLINE'] = '1'  # nothing is downloaded
    if settings.init_from != 'scratch' or settings.eval_only:
        given = source_settings(settings)
        settings = load_settings(arguments, given=given, can_dry_run=True)
    check_documents(settings)
    return settings, given


def main(cleanup, read_settings=read_settings):
    """`cleanup` is an ExitStack, for what has to end with the run. sft.py has a read_settings of its own."""
    arguments = sys.argv[1:]
    settings, given = read_settings(arguments)
    drop_secrets_from_argv()
    if settings.dry_run:
        return print_sizes(check_settings(settings))
    ranks = find_ranks(settings)
    check_memory(settings, ranks)
    settings = check_settings(take_from_collection(settings, named_settings(arguments) | given.keys(),
                                                   say if ranks.is_master else lambda news: None))
    micro_steps, micro_batch = share_of_step(settings, ranks)
    if (settings.use_retrieval and is_local(settings.retrieval_milvus_uri) and not settings.retrieval_offline
            and ranks.world_size > ranks.local_world_size):
        raise UserError(f'retrieval_milvus_uri {settings.retrieval_milvus_uri!r} is a local file, which serves one '
                        f'node: use a Milvus server')
    precision = pick_dtype(settings.dtype, ranks.device)
    check_parallel(settings, ranks, precision)
    context = autocast(precision, ranks.device)
    join_ranks(ranks, settings, cleanup)
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # validate the rest before loading anything expensive
    tokenizer = load_tokenizer(settings.tokenizer)
    try:
        config = RETROConfig.from_settings(settings, tokenizer.n_vocab)
    except ValueError as error:
        raise UserError(f'{error}: correct the config') from error
    is_resumed, checkpoint = settings.init_from == 'resume' and not settings.eval_only, None
    if is_resumed or settings.eval_only:
        checkpoint = load_checkpoint(settings.out_dir, for_resume=is_resumed)
        check_fits(checkpoint, config, tokenizer)
    benchmarks = []
    if settings.multiple_choice_benchmarks and ranks.is_master:
        from evaluation.benchmarks import prepare_benchmarks  # imports DeepEval, which takes seconds
        benchmarks = prepare_benchmarks(settings.multiple_choice_benchmarks, settings.benchmark_data_dir)
    ranks.barrier()  # the others wait for what the master downloads
    if ranks.is_master and not settings.eval_only:
        check_writable(settings.out_dir)
    no_compile = why_not_compile(ranks.device) if settings.compile else ''
    if no_compile and ranks.is_master:
        say(f'running without torch.compile: {no_compile}')
    if describe_schedule(settings) and ranks.is_master and not settings.eval_only:
        say(describe_schedule(settings))
    state = checkpoint.load_state(ranks.rank if is_resumed else None) if checkpoint else RunState()
    if is_resumed and ranks.is_master and (changes := describe_resume(checkpoint, settings, ranks.world_size)):
        say(changes)
    if is_resumed and state.step >= settings.max_iters and ranks.is_master:
        say(f'nothing is left to train: the checkpoint is of step {state.step}, and max_iters is {settings.max_iters}')

    torch.manual_seed(settings.seed)  # the same weights in every process
    if checkpoint or settings.init_from == 'scratch':
        model = RETRO(config)
        if checkpoint:
            checkpoint.load_model(model)
    else:
        model = load_weights(settings.init_from, config, tokenizer, settings.retrofit)
    if settings.retrofit:
        model.freeze_decoder()
    if settings.freeze_retrieval:
        model.freeze_retrieval()
    retrieves = settings.use_retrieval and not settings.freeze_retrieval

    # the loader; out_dir is untouched until its first batches arrive
    loader = Loader(settings, *make_streams(settings, ranks, micro_steps, micro_batch, state), ranks.device,
                    retrieve=retrieves, keep_ready=micro_steps,
                    say=lambda news: say(news if ranks.is_master else f'rank {ranks.rank}: {news}'))
    cleanup.callback(loader.close)
    val_batches = loader.take_val()

    # model and optimizer
    device_type = ranks.device.split(':')[0]
    wrapped = parallelize(model, settings, ranks, precision, settings.compile and not no_compile)
    optimizer = model.configure_optimizers(settings.weight_decay, settings.learning_rate,
                                           (settings.beta1, settings.beta2), device_type)
    scaler = torch.amp.GradScaler(device_type, enabled=precision == 'float16')
    if is_resumed:
        checkpoint.load_optimizer(optimizer, scaler, model)
    token_bytes = torch.tensor(token_byte_counts(tokenizer), device=ranks.device)
    tokenizer_text = '' if settings.eval_only or not ranks.is_master else tokenizer_json(settings.tokenizer, tokenizer)
    save = functools.partial(save_checkpoint, settings, ranks, tokenizer, tokenizer_text, model, optimizer, scaler)
    torch.manual_seed(settings.seed + ranks.rank)
    if is_resumed and state.rng:
        set_rng_state(state.rng)
    state.rng = get_rng_state()

    # output
    if ranks.is_master and not settings.eval_only:
        lock_run(settings.out_dir, cleanup)
    if settings.parallel == 'fsdp' and not settings.eval_only:  # each rank writes its shard there
        check_shared(settings.out_dir, ranks)
    if ranks.is_master:
        if retrieves and loader.size:
            print(f'retrieving from {loader.size:,} chunks of {settings.retrieval_collection!r} in '
                  f'{settings.retrieval_milvus_uri}')
        elif retrieves:
            print('reading the passages that go with each conversation')
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        is_partly_frozen = settings.retrofit or settings.freeze_retrieval
        print(f'{"RETRO" if settings.use_retrieval else "GPT"} of {model.num_parameters() / 1e6:.2f} M parameters'
              f'{f", of which {trained:.2f} M are trained," if is_partly_frozen else ""} on '
              f'{ranks.world_size} x {ranks.device}, {precision} | {tokens_per_step(settings):,} tokens per step, '
              f'{settings.max_iters:,} steps | {model.flops_per_token() / 1e6:.1f} MFLOP per token')
    bar = tqdm(total=settings.max_iters, initial=state.step, unit='step', dynamic_ncols=True,
               disable=not ranks.is_master or not sys.stderr.isatty() or settings.eval_only)
    cleanup.callback(bar.close)
    metrics = Metrics(settings, ranks, model, precision, bar, cleanup, state)

    signals = StopSignals(cleanup)

    def say_or_stop(news):  # of a retriever that waits for Milvus
        signals.check()
        say(news)

    warn_once = functools.cache(lambda text: say(text) if ranks.is_master else None)
    # prompts have not been precomputed: an offline run writes its samples without retrieval
    prompt_retriever = functools.cache(lambda: cleanup.enter_context(closing(
        Retriever(settings, tokenizer, ranks.device, say_or_stop)))
        if retrieves and settings.passages != 'neighbors' and not settings.retrieval_offline else None)
    interval, found_themselves = Interval(state.step, loader.waited), Counter()
    for batch in val_batches:  # of what is trained on alone it is said whether it found itself
        interval.counts.update({**batch.counts, **dict.fromkeys(batch.counts.keys() & OF_TRAINING, 0)})
    failure = None
    cleanup.push(lambda _, error, __: end_early(settings, ranks, state, save, error))
    while True:
        # fetch the step's micro-batches; the ranks agree to go on
        is_done, batches = state.step >= settings.max_iters or settings.eval_only, []
        if not is_done and failure is None:
            batches, failure = fetch(loader, micro_steps, signals)
        targets = agree_to_go_on(settings, ranks, signals, failure, state, save, batches)

        # evaluate and save
        if (is_done or state.step % settings.eval_interval == 0) and state.evaluated_at != state.step:
            start, state.evaluated_at = time.perf_counter(), state.step
            if state.step and settings.always_save_checkpoint:
                save(state)
            values = evaluate(wrapped, val_batches, token_bytes, context, ranks, retrieves, signals)
            agree_to_go_on(settings, ranks, signals, not_finite(state.step, **values), state, save)
            metrics.log_evaluation(state.step, values)
            val_loss = values.get('val_loss_on', values['val_loss_off'])
            if state.step and val_loss < state.best_val_loss:
                state.best_val_loss = val_loss
                save(state)  # nothing, if it was saved above
            whole = whole_model(model, ranks) if settings.multiple_choice_benchmarks or settings.wandb_log else None
            failure = run_benchmarks(settings, benchmarks, metrics, state.step, val_batches[0], signals, whole,
                                     tokenizer, ranks.device, context, prompt_retriever)
            agree_to_go_on(settings, ranks, signals, failure, state, save)
            interval.paused += time.perf_counter() - start
        if is_done:
            break

        # forward and backward; the loss is the mean over the step's targets on all ranks
        nats = 0.0
        for micro_step, batch in enumerate(batches):
            reduce_gradients(wrapped, micro_step == micro_steps - 1)  # which divides them by world_size
            with context:
                _, loss = wrapped(batch.tokens, batch.targets, batch.neighbors, batch.neighbor_mask, batch.doc_ids,
                                  batch.pointers, loss_reduction='sum')
            scaler.scale(loss * (ranks.world_size / max(1, targets))).backward()
            nats += loss.detach()
            interval.counts.update(batch.counts)

        # clip and step
        lr = get_lr(state.step, settings)
        for group in optimizer.param_groups:
            group['lr'] = lr
        scaler.unscale_(optimizer)
        norm = clip_gradients(wrapped, settings.grad_clip or math.inf)
        nats, norm = ranks.sum(nats.double()).item(), norm.item()
        failure = check_step(state.step, nats, norm, scaler)
        if failure is None:
            state.is_stepping = True
            scaler.step(optimizer)
            scaler.update()
            state.finish_step(nats, targets, batches[-1].state)
            bar.update()
        optimizer.zero_grad(set_to_none=True)

        # log
        if failure is None and (state.step % settings.log_interval == 0 or state.step == settings.max_iters):
            found_themselves.update(metrics.log_steps(state, interval, lr, loader.waited))
            failure = check_found_themselves(found_themselves, warn_once)
            interval = Interval(state.step, loader.waited)
            state.losses, state.targets = [], 0

    bar.close()
    if ranks.is_master and not settings.eval_only:
        plot_metrics(metrics.path, os.path.join(settings.out_dir, 'loss.png'))
        print(f'checkpoints, metrics.jsonl and loss.png are in {settings.out_dir}\n\n'
              f'{summary(metrics.path, describe_corpus(settings.train_datasets))}')


def make_streams(settings, ranks, micro_steps, micro_batch, state):
    """This rank's share of the data, for the Loader: of the training stream, how many batches, and of the val text."""
    count = micro_steps * micro_batch  # sequences of a step
    train = dict(batch_size=micro_batch, step_size=settings.batch_size * settings.gradient_accumulation_steps,
                 first=ranks.rank * count, count=count, seed=settings.seed, state=state.stream)
    return (None if settings.eval_only else train, max(0, settings.max_iters - state.step) * micro_steps,
            dict(rank=ranks.rank, world_size=ranks.world_size))


def get_lr(step, settings):
    """Linear warmup, then cosine decay to min_lr."""
    if not settings.decay_lr:
        return settings.learning_rate
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / (settings.warmup_iters + 1)
    decay_steps = max(1, settings.lr_decay_iters - settings.warmup_iters)
    ratio = min(1.0, (step - settings.warmup_iters) / decay_steps)
    return settings.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (settings.learning_rate - settings.min_lr)


def fetch(loader, count, signals):
    """The next `count` batches and None, or the batches so far and the exception. Returns early on a signal."""
    batches = []
    try:
        while len(batches) < count and not signals.received:
            batch = loader.next(give_up=lambda: signals.received)
            batches += [batch] if batch is not None else []
        return batches, None
    except Exception as error:  # the ranks have to agree to stop first
        return batches, error


def agree_to_go_on(settings, ranks, signals, failure, state, save, batches=()):
    """
    The number of targets in all ranks' batches. If any rank has a failure (an exception) or got a signal, save a
    checkpoint and exit on all ranks instead.
    """
    code = getattr(failure, 'exit_code', 1) if failure else 128 + signals.received[0] if signals.received else 0
    codes, targets = ranks.gather_numbers(code, sum(batch.num_targets for batch in batches)).T
    if not codes.any():
        return targets.sum().item()
    signals.ignore()
    if not (codes == NotFinite.exit_code).any():
        save_last_step(settings, state, save)
    if failure:
        raise failure
    sys.exit(codes.max().item())


def save_last_step(settings, state, save):
    """Save the last finished step, if there is one and the weights are still its."""
    if state.step and not state.is_stepping and not settings.eval_only:
        save(state)


def end_early(settings, ranks, state, save, error):
    """
    When an exception ends the loop, say where the newest checkpoint is; first save the last finished step if it is one
    that the ranks have not agreed on, e.g. out of memory. Several ranks cannot: the others wait for this one's
    gradients, until the launcher ends them.
    """
    if error is None or settings.eval_only:
        return
    try:
        # UserErrors are agreed on, and saved, or of saving itself
        if ranks.world_size == 1 and isinstance(error, Exception) and not isinstance(error, UserError):
            save_last_step(settings, state, save)
    finally:
        if ranks.is_master or not isinstance(error, (SystemExit, UserError)):
            say(f'the newest checkpoint is {settings.out_dir}/checkpoints/step-{state.saved_steps[-1]}; resume from it '
                f'with --init_from=resume' if state.saved_steps else 'no checkpoint has been saved')


if __name__ == '__main__':
    with user_errors_as_one_line(), ExitStack() as cleanup:
        main(cleanup)
