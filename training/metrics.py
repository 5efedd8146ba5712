"""
What a run reports: metrics.jsonl, Weights & Biases, the plot of the loss curves, and the table at the end.
"""
import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field

from system import peak_flops, say

import torch

from configurator import UserError, save_atomically, to_json, write_atomically
from data.documents import as_dataset_configs, names_of
from training.out_dir import set_earlier_run_aside


@dataclass
class Interval:
    """What happened since the last line of metrics.jsonl."""
    first_step: int
    waited_before: float  # seconds that the loader was waited for until then
    started: float = field(default_factory=time.perf_counter)
    paused: float = 0.0  # seconds for evaluations
    counts: Counter = field(default_factory=Counter)  # of chunks, by how their neighbors were found


class Metrics:
    """
    Reports a run on the terminal, in metrics.jsonl, and to wandb if wandb_log is set. All ranks call it and the master
    reports. A resumed run goes on in the same file, from its step, and in the same wandb run. `cleanup`, an ExitStack,
    finishes the latter.
    """

    def __init__(self, settings, ranks, model, precision, bar, cleanup, state):
        self.settings, self.ranks, self.model, self.bar = settings, ranks, model, bar
        self.path, self.wandb_run = metrics_path(settings.out_dir), None
        if ranks.is_master:
            self.peak_flops = peak_flops(ranks.device, precision) * ranks.world_size
        if ranks.is_master and settings.wandb_log:
            self.wandb_run = start_wandb(settings, state)
            cleanup.callback(self.wandb_run.finish)
        self.is_new = not state.step and not settings.eval_only  # the first line sets an earlier run aside
        if state.step and not settings.eval_only:
            if ranks.is_master:
                drop_metrics_after(self.path, state.step)
            evaluations = ranks.broadcast([(line['iter'], line.get('val_loss_on', line['val_loss_off']))
                                           for line in read_metrics(self.path) if is_evaluation(line)]
                                          if ranks.is_master else None)
            state.evaluated_at = max((step for step, _ in evaluations), default=None)
            state.best_val_loss = min([state.best_val_loss, *(loss for _, loss in evaluations)])

    def log(self, step, **values):
        """Append a line to metrics.jsonl, and log it to wandb. Writes nothing with eval_only."""
        if self.settings.eval_only:
            return
        if self.is_new and (folder := set_earlier_run_aside(self.settings.out_dir)):
            say(f'the earlier run in {self.settings.out_dir} is now in {folder}')
        self.is_new = False
        line = dict(iter=step, tokens=step * tokens_per_step(self.settings), **values)
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(to_json(line) + '\n')
        if self.wandb_run:
            self.wandb_run.log(line, step=step)

    def log_evaluation(self, step, values):
        if self.ranks.is_master:
            say(f'step {step}: ' + ', '.join(f'{key} {value:.4f}' for key, value in values.items()))
            self.log(step, **values)

    def log_steps(self, state, interval, lr, waited):
        """The steps of the Interval; `waited` is the loader's total. The counts of all ranks, by name."""
        seconds = time.perf_counter() - interval.started - interval.paused
        counts = self.ranks.sum(torch.tensor(list(interval.counts.values()))).tolist()
        counts = dict(zip(interval.counts, counts, strict=True))
        taken = self.ranks.sum(torch.tensor(state.stream['taken']))  # sequences so far, by dataset
        if not self.ranks.is_master:
            return counts
        shares = {}
        if len(names := names_of(as_dataset_configs(self.settings.train_datasets, 'train_datasets'))) > 1:
            shares = dict(shares=dict(zip(names, (taken / taken.sum()).tolist(), strict=True)))
        loss = math.fsum(state.losses) / state.targets if state.targets else math.nan
        rate = tokens_per_step(self.settings) * (state.step - interval.first_step) / seconds
        waited, mfu = waited - interval.waited_before, self.model.flops_per_token() * rate / self.peak_flops
        self.log(state.step, loss=loss, lr=lr, tokens_per_s=rate, retrieval_wait_s=waited, mfu=mfu,
                 **{f'chunks_{name}': count for name, count in counts.items()}, **shares)
        self.bar.set_postfix_str(f'loss {loss:.3f}, {rate:,.0f} tokens/s, waited {waited:.1f} s')
        if self.bar.disable:
            say(f'step {state.step}: loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} tokens/s, mfu {mfu:.1%}, waited for '
                f'retrieval {waited:.2f} s')
        return counts

    def log_table(self, name, columns, rows, step):
        """Log a table to wandb only."""
        import wandb
        self.wandb_run.log({name: wandb.Table(columns, rows)}, step=step)


def start_wandb(settings, state):
    """The wandb run, the one that the RunState names if it is resumed. UserError if wandb refuses."""
    import wandb  # takes a second to import
    try:
        run = wandb.init(project=settings.wandb_project, name=settings.wandb_run_name, id=state.wandb_run_id,
                         resume='allow' if state.wandb_run_id else None, config=settings.without_secrets())
    except wandb.errors.Error as error:  # e.g. no API key
        raise UserError(f'wandb_log: Weights & Biases refuses ({" ".join(str(error).split())[:200]}): log in with '
                        f'wandb login, set WANDB_MODE=offline, or leave wandb_log off') from error
    state.wandb_run_id = run.id
    return run


def tokens_per_step(settings):
    return settings.batch_size * settings.gradient_accumulation_steps * settings.block_size


def metrics_path(out_dir):
    return os.path.join(out_dir, 'metrics.jsonl')


def read_metrics(path):
    """
    The lines of a metrics.jsonl, as dicts; none if it is missing. Damaged lines are left out: a run may be writing the
    last one, or was killed while it did.
    """
    lines = []
    if os.path.isfile(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(line, dict) and {type(line.get('iter')), type(line.get('tokens'))} == {int}:
                    lines.append(line)
    return lines


def is_evaluation(line):
    """Whether a line of metrics.jsonl is that of an evaluation, with all of its figures."""
    arms = [arm for arm in ('on', 'off') if arm == 'off' or f'val_bpb_{arm}' in line]
    return all(is_number(line.get(f'val_{figure}_{arm}')) for figure in ('loss', 'bpb') for arm in arms)


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_curves(path):
    """The lines of a metrics.jsonl with a train loss, and by arm those with val figures."""
    lines = read_metrics(path)
    evaluations = [line for line in lines if is_evaluation(line)]
    return ([line for line in lines if is_number(line.get('loss'))],
            {arm: [line for line in evaluations if f'val_bpb_{arm}' in line] for arm in ('off', 'on')})


def drop_metrics_after(path, step):
    """Remove the lines after a step, which a resumed run writes anew."""
    kept = [line for line in read_metrics(path) if line['iter'] <= step]
    write_atomically(''.join(to_json(line) + '\n' for line in kept), path)


def summary(path, corpus):
    """The final results of a run as a table, from its metrics.jsonl; `corpus` names what it was trained on."""
    lines = read_metrics(path)
    last = next((line for line in lines[::-1] if is_evaluation(line)), {})
    steps = [line for line in lines if is_number(line.get('tokens_per_s')) and is_number(line.get('retrieval_wait_s'))]
    rows = [('corpus', corpus)]
    if lines:
        rows += [('steps', f'{lines[-1]["iter"]:,}'), ('tokens', f'{lines[-1]["tokens"]:,}')]
    if 'val_bpb_on' in last:
        gain = 1 - last['val_bpb_on'] / last['val_bpb_off']
        rows += [('val bpb, retrieval on', f'{last["val_bpb_on"]:.4f}'),
                 ('val bpb, retrieval off', f'{last["val_bpb_off"]:.4f}'), ('on is below off by', f'{gain:.2%}')]
    elif last:
        rows += [('val bpb', f'{last["val_bpb_off"]:.4f}')]
    if steps:
        rows += [('training rate, tokens/s', f'{sorted(s["tokens_per_s"] for s in steps)[len(steps) // 2]:,.0f}'),
                 ('waited for retrieval, s', f'{sum(s["retrieval_wait_s"] for s in steps):.1f}')]
        rows += [(f'share of {name}', f'{share:.2%}') for name, share in steps[-1].get('shares', {}).items()]
    return '\n'.join(f'{name:<26} {value:>12}' for name, value in rows)


def plot_metrics(path, plot_path):
    """Plot the loss curves of a metrics.jsonl as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    steps, evaluations = read_curves(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    left.plot([line['iter'] for line in steps], [line['loss'] for line in steps], lw=1, color='0.5', label='train loss')
    left.set(xlabel='step', ylabel='nats per token')
    right.margins(y=0.12)
    style = {'off': 'o-', 'on': 'o--'}  # on is drawn over off, and may coincide with it
    for key, label, color in (('off', 'retrieval off', 'tab:orange'), ('on', 'retrieval on', 'tab:blue')):
        points = evaluations[key]
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
    save_atomically(lambda tmp_path: figure.savefig(tmp_path, dpi=130, format='png'), plot_path)
    plt.close(figure)
