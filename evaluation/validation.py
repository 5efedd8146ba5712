"""What train.py runs at each evaluation: the loss on the val batches, benchmarks, and samples for wandb."""
import math
import sys

from system import get_rng_state, say, set_rng_state

import torch

from evaluation.figures import describe_scores
from evaluation.samples import COLUMNS, write_samples
from training.distributed import Stopped


@torch.no_grad()
def evaluate(model, batches, token_bytes, context, ranks, use_retrieval, signals=None):
    """
    Val loss (nats per token) and bits per byte over the batches of all ranks, with retrieval on and off. Once there are
    StopSignals of any rank it returns early, with figures of a part.
    """
    model.eval()
    arms = ['on', 'off'] if use_retrieval else ['off']
    sums = torch.zeros(4, dtype=torch.float64)  # nats on, nats off, targets, bytes
    for batch in batches:
        if ranks.gather_numbers(bool(signals and signals.received)).any():  # a sharded model needs all ranks
            break
        real = batch.targets[batch.targets >= 0]
        sums[2:] += torch.tensor([len(real), token_bytes[real].sum().item()])
        for arm in arms:
            neighbors, mask, pointers = batch.retrieved if arm == 'on' else (None, None, None)
            with context:
                _, nats = model(batch.tokens, batch.targets, neighbors, mask, batch.doc_ids, pointers,
                                loss_reduction='sum')
            sums[('on', 'off').index(arm)] += nats.item()
    model.train()
    nats_on, nats_off, targets, size = ranks.sum(sums).tolist()
    targets, size = max(1.0, targets), max(1.0, size)
    nats = {'on': nats_on, 'off': nats_off}
    return ({f'val_loss_{arm}': nats[arm] / targets for arm in arms}
            | {f'val_bpb_{arm}': nats[arm] / math.log(2) / size for arm in arms})


def run_benchmarks(settings, benchmarks, metrics, step, prompts, signals, model, tokenizer, device, context,
                   open_retriever):
    """
    What the master alone does at an evaluation: the benchmarks and, for wandb, samples that continue the first chunks
    of the Batch `prompts`. Returns the exception that ended it, or None; the caller raises it on all ranks. Once there
    are StopSignals it returns early.
    """
    if not benchmarks and not metrics.wandb_run:
        return None
    rng = get_rng_state()
    try:
        retriever = open_retriever()
        scores = {benchmark.name: benchmark.run(model, tokenizer, device, context, retriever, settings.batch_size,
                                                show_progress=sys.stderr.isatty(),
                                                check_stop=signals.check) for benchmark in benchmarks}
        for name, score in scores.items():
            say(f'step {step}: {name}, {describe_scores(score)}')
        if scores:
            metrics.log(step, benchmarks=scores)
        if metrics.wandb_run:
            is_text = (prompts.targets >= 0).any(1)  # and no sequence that pads the val text
            prompts = prompts.tokens[is_text][:4, :2 * settings.retrieval_chunk_size]
            rows = write_samples(model, prompts, tokenizer, context, retriever)
            metrics.log_table('samples', COLUMNS, rows, step)
    except Stopped:
        return None  # the ranks agree on it next
    except Exception as error:  # the network's, wandb's, DeepEval's
        return error
    finally:
        model.train()
        set_rng_state(rng)
