"""
Does retrieval pay? Trains models one after another, from the same seeds on the same batches, and compares the RETRO
with the strongest GPT that the same decoder makes: one that copies from its own context, too; the same for as long as
the RETRO took; the same with 4 and 9 times the parameters; the same mixed after the fact with an n-gram back-off of the
collection (ngram.py). Each run starts with an empty neighbor cache, so its time includes all its searches; the time to
fill the collection and to build its index is reported by populate.

    python bench/quality.py config/quickstart.py [--key=value ...] [--seeds=3] [--arms='GPT,RETRO'] [--quick]
    python bench/quality.py config/quickstart.py --arms='GPT,RETRO' --max_iters=4800   # a longer curve
    python bench/quality.py config/quickstart.py --sweep=retrieval_pointers=8,64       # the RETRO with other settings
    python bench/quality.py config/quickstart.py --arms='GPT,RETRO' --sweep=learning_rate=2e-3,5e-3
    python bench/quality.py config/quickstart.py --jobs=4    # so many runs at a time, where seconds do not matter

The collection must have been filled: python -m retrieval.populate config/quickstart.py. Prints tables and one JSON
line, and writes quality.json and quality.png. A run that is in out_dir already, with as many steps and the same
options, is not trained again: for other settings name another --out_dir.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from bench.ngram import measure as measure_ngram
from configurator import UserError, load_settings, save_atomically, user_errors_as_one_line, write_atomically
from data.fingerprint import describe_corpus
from training.metrics import metrics_path, read_metrics

GPT = dict(use_retrieval=False)
ARMS = {  # options on top of the config
    'GPT without own context': GPT | dict(copy_own_context=False),
    'GPT': GPT,
    'RETRO': {},
    'GPT for as long': GPT,  # as the RETRO took
    'RETRO with neighbors alone': dict(retrieval_pointers=0, retrieval_k_neighbors=2),
    'RETRO with both': dict(retrieval_k_neighbors=2),
    'GPT of 4 times the parameters': GPT | dict(n_embd=256, n_layer=8, n_head=8, learning_rate=2e-3),
    'GPT of 9 times the parameters': GPT | dict(n_embd=384, n_layer=8, n_head=12, learning_rate=1.5e-3),
}
BASELINE, ALL, AS_LONG, MIX = 'GPT', 'RETRO', 'GPT for as long', 'GPT mixed with n-grams'
POINTS = 12  # evaluations of a run
SHORT_RUN = 8  # tokens: chunks that share no longer run with anything in the collection are reported separately
FLAGS = ('seeds', 'arms', 'sweep', 'jobs', 'quick')


def run(*command):
    """Run a command of the project; what it printed. UserError with the end of it if it fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    answer = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)})
    if answer.returncode:
        raise UserError(f'{command[0]} ended with {answer.returncode}: {answer.stdout.strip()[-800:]}')
    return answer.stdout


def train(name, options, arguments, folder, steps):
    """Train an arm unless already done. Returns [(step, seconds, bpb on or None, bpb off)]."""
    if not os.path.exists(f'{folder}/done'):
        options = options | dict(out_dir=folder, max_iters=steps, eval_interval=max(1, steps // POINTS),
                                 retrieval_cache_dir=f'{folder}/neighbors')
        print(f'training {name}, {steps} steps', file=sys.stderr)
        shutil.rmtree(f'{folder}/neighbors', ignore_errors=True)  # of a run that was interrupted
        run(ROOT / 'train.py', *arguments, *(f'--{k}={v}' for k, v in options.items()))
        shutil.rmtree(f'{folder}/neighbors', ignore_errors=True)
        Path(f'{folder}/done').touch()
    points, seconds, tokens = [], 0.0, 0
    for line in read_metrics(metrics_path(folder)):
        if 'loss' in line:
            seconds += (line['tokens'] - tokens) / line['tokens_per_s']
            tokens = line['tokens']
        elif 'val_bpb_off' in line:
            points.append((line['iter'], seconds, line.get('val_bpb_on'), line['val_bpb_off']))
    return points


def evaluate(folder, baseline):
    """bpb of a RETRO and the baseline on chunks that share short runs alone, by python -m evaluation."""
    if not os.path.exists(f'{folder}/evaluation.json'):
        run('-m', 'evaluation', f'--out_dir={folder}', f'--baseline={baseline}', '--passages=0', '--max_tokens=80000')
    with open(f'{folder}/evaluation.json', encoding='utf-8') as file:
        line, = (line for line in json.load(file)['bpb_by_longest_run'] if line['longest_run'] == SHORT_RUN)
    return line


def best(point):
    """bpb with retrieval, if there is any."""
    return point[3] if point[2] is None else point[2]


def seconds_to_reach(points, bpb):
    """Seconds of training until a run is as good, interpolated between its evaluations; None if it never is."""
    for before, after in pairwise(points):
        if best(after) <= bpb:
            share = (best(before) - bpb) / max(1e-9, best(before) - best(after))
            return before[1] + share * (after[1] - before[1])
    return None


def show(values, style='{:.4f}'):
    """Mean and spread over the seeds."""
    if not values:
        return '–'
    spread = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 and style == '{:.4f}' else ''
    return style.format(statistics.mean(values)) + spread


def plot(runs, path):
    """Plot bpb by steps and by training time, a line per run."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout='constrained', sharey=True)
    lowest = min(best(points[-1]) for seed_runs in runs.values() for points in seed_runs)
    for number, (arm, seed_runs) in enumerate(runs.items()):
        for i, points in enumerate(seed_runs):
            style = dict(color=f'C{number % 10}', lw=2 if arm == ALL else 1.2, label=arm if i == 0 else None,
                         ls='--' if arm == AS_LONG else '-')
            left.plot([p[0] for p in points], [best(p) for p in points], **style)
            right.plot([p[1] for p in points], [best(p) for p in points], **style)
            if points[-1][2] is not None:
                left.plot([p[0] for p in points], [p[3] for p in points], color=style['color'], lw=0.8, ls=':',
                          label=f'{arm}, off' if i == 0 else None)
    left.set(xlabel='step', ylabel='val bits per byte', ylim=(lowest - 0.05, lowest + 1.2))
    right.set(xlabel='seconds of training')
    left.legend(frameon=False, loc='upper right')
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.25)
    save_atomically(lambda tmp_path: figure.savefig(tmp_path, dpi=110, format='png'), path)
    plt.close(figure)


def plan(flags, arms):
    """{name: (arm, options)}: the arms, or with --sweep=key=values each of them with each of the values."""
    if 'sweep' not in flags:
        return {arm: (arm, ARMS[arm]) for arm in arms}
    key, _, values = flags['sweep'].partition('=')
    return {f'{arm} {key} {value}': (arm, ARMS[arm] | {key: value}) for arm in arms for value in values.split(',')}


def main():
    flags = {key: value for key, _, value in (a[2:].partition('=') for a in sys.argv[1:] if a.startswith('--'))
             if key in FLAGS}
    arguments = [a for a in sys.argv[1:] if a[2:].partition('=')[0] not in FLAGS]
    settings = load_settings(arguments)
    steps = 30 if 'quick' in flags else settings.max_iters
    jobs = int(flags.get('jobs', 1))
    every = [name for name in ARMS if name != AS_LONG or jobs == 1]
    names = flags['arms'].split(',') if 'arms' in flags else [ALL] if 'sweep' in flags else every
    if unknown := [name for name in names if name not in ARMS]:
        raise UserError(f'--arms holds {unknown[0]!r}; there are {", ".join(ARMS)}')
    if AS_LONG in names and ('sweep' in flags or jobs > 1):
        raise UserError(f'--arms holds {AS_LONG!r}, whose time is measured: leave out --sweep and --jobs, or the arm')
    if AS_LONG in names and not {BASELINE, ALL} <= set(names[:names.index(AS_LONG)]):
        raise UserError(f'--arms holds {AS_LONG!r}, whose time follows from {BASELINE!r} and {ALL!r}: name both '
                        f'before it')
    seeds = [settings.seed + i for i in range(int(flags.get('seeds', 1)))]
    out_dir, runs, folders = f'{settings.out_dir}/quality', {}, {}

    def train_arm(seed, name, arm, options):
        arm_steps = steps
        if arm == AS_LONG:  # by the seconds of both with this seed
            arm_steps = round(steps * runs[ALL, seed][-1][1] / runs[BASELINE, seed][-1][1])
        folders[name, seed] = f'{out_dir}/{name.replace(" ", "_")}_{seed}_{arm_steps}'
        runs[name, seed] = train(f'{name}, seed {seed}', options | dict(seed=seed), arguments, folders[name, seed],
                                 arm_steps)

    arms = plan(flags, names)
    retrieving = [(name, seed) for seed in seeds for name, (_, options) in arms.items()
                  if BASELINE in arms and options.get('use_retrieval', True)]
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(train_arm, seed, name, *arm) for seed in seeds for name, arm in arms.items()]:
            future.result()
        short = [pool.submit(evaluate, folders[key], folders[BASELINE, key[1]]) for key in retrieving]
        short = {key: future.result() for key, future in zip(retrieving, short, strict=True)}
    ngrams = []
    if BASELINE in arms:
        try:
            ngrams = [measure_ngram(settings, folders[BASELINE, seed]) for seed in seeds]
        except UserError as error:  # the runs are there, and their figures wanted
            print(f'no n-grams: {error}', file=sys.stderr)
    by_arm = [{name: [found[name, seed] for seed in seeds if (name, seed) in found] for name in arms}
              for found in (runs, short)]
    report_on(settings, seeds, steps, *by_arm, ngrams, out_dir)


def report_on(settings, seeds, steps, runs, short, ngrams, out_dir):
    """Print the tables and the JSON line, and write the files."""
    report = dict(corpus=describe_corpus(settings.train_datasets), steps=steps, seeds=seeds, tokens=steps
                  * settings.batch_size * settings.block_size * settings.gradient_accumulation_steps)
    base = [best(points[-1]) for points in runs.get(BASELINE, [])]
    print(f'val bits per byte after {steps} steps ({report["tokens"]:,} tokens of {report["corpus"]}), mean and '
          f'standard deviation of {len(seeds)} seeds; how far below the GPT with retrieval, and above it without; the '
          f'same for chunks that share no run of more than {SHORT_RUN} tokens with the collection\n')
    print(f'{"":<34}{"on":>18}{"off":>18}{"below":>9}{"off above":>11}{"seconds":>9}{"short runs: on":>18}'
          f'{"below":>9}')
    for arm, seed_runs in runs.items():
        on = [points[-1][2] for points in seed_runs if points[-1][2] is not None]
        off = [points[-1][3] for points in seed_runs]
        gains = [1 - best(p[-1]) / b for p, b in zip(seed_runs, base, strict=False)]
        above = [p[-1][3] / b - 1 for p, b in zip(seed_runs, base, strict=False)] if on else []
        seconds = [points[-1][1] for points in seed_runs]
        on_short = [line['bpb_on'] for line in short.get(arm, []) if line['bpb_on']]
        gains_short = [1 - line['bpb_on'] / line['bpb_baseline'] for line in short.get(arm, []) if line['bpb_on']]
        report[arm] = dict(steps=seed_runs[0][-1][0], bpb_on=on, bpb_off=off, gain=gains, off_above=above,
                           seconds=seconds, bpb_on_short_runs=on_short, gain_short_runs=gains_short)
        print(f'{arm:<34}{show(on):>18}{show(off):>18}{show(gains, "{:.2%}"):>9}{show(above, "{:.2%}"):>11}'
              f'{show(seconds, "{:.0f}"):>9}{show(on_short):>18}{show(gains_short, "{:.2%}"):>9}')
    if ngrams:
        report[MIX] = ngrams
        for name, key in (('n-grams alone', 'ngram'), (MIX, 'mix')):
            values = [found[key] for found in ngrams]
            gains = [1 - found[key] / found['gpt'] for found in ngrams]
            print(f'{name:<34}{show(values):>18}{"":>18}{show(gains, "{:.2%}"):>9}')
    if base and ALL in runs:
        shares = [seconds_to_reach(points, b) for points, b in zip(runs[ALL], base, strict=True)]
        shares = [share and share / gpt[-1][1] for share, gpt in zip(shares, runs[BASELINE], strict=True)]
        report['share_of_time'] = shares
        if None not in shares:
            print(f'\nthe RETRO is as good as the trained GPT after {np.mean(shares):.0%} of the GPT\'s time')
        print('\nalong the run:\n' + f'{"step":>8}{"GPT":>10}{"on":>10}{"below":>9}{"off":>10}{"above":>9}')
        for gpt, retro in zip(runs[BASELINE][0], runs[ALL][0], strict=True):
            print(f'{gpt[0]:>8}{gpt[3]:>10.4f}{retro[2]:>10.4f}{1 - retro[2] / gpt[3]:>9.2%}{retro[3]:>10.4f}'
                  f'{retro[3] / gpt[3] - 1:>9.2%}')
    plot(runs, f'{out_dir}/quality.png')
    write_atomically(json.dumps(report | dict(runs=runs), indent=1), f'{out_dir}/quality.json')
    print(f'\nquality.json and quality.png are in {out_dir}\n\n{json.dumps(report)}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
