"""
Does retrieval pay? Trains models one after another, from the same seeds on the same batches: GPTs, the textbook RETRO,
what makes RETRO copy, each part alone and all together, and a GPT for as long as the RETRO took. Prints a table of bits
per byte and one JSON line, and writes quality.json and quality.png, bpb by steps and by training time. Each run starts
with an empty neighbor cache, so its time includes all its searches.

    python bench/quality.py config/quickstart.py [--key=value ...] [--seeds=3] [--arms='GPT,RETRO'] [--quick]

The collection must have been filled: python -m retrieval.populate config/quickstart.py. An arm that was trained in
out_dir before, for as many steps, is not trained again: for other settings name another --out_dir.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import UserError, load_settings, save_atomically, user_errors_as_one_line, write_atomically
from data.fingerprint import describe_corpus
from training.metrics import metrics_path, read_metrics

TEXTBOOK = dict(retrieval_copy=False, token_mix=False, retrieval_layers=[3], retrieval_encoder_layers=1)
ARMS = {
    'GPT': dict(use_retrieval=False, token_mix=False),
    'GPT with token mix': dict(use_retrieval=False, token_mix=True),
    'textbook RETRO': TEXTBOOK,
    'textbook RETRO with token mix': TEXTBOOK | dict(token_mix=True),
    'copying alone': dict(retrieval_longest_match=0, token_mix=False),
    'copying with match bias': dict(token_mix=False),
    'RETRO': {},
    'RETRO re-ranked': dict(retrieval_rerank=40),
    'GPT for as long': dict(use_retrieval=False, token_mix=True),  # as the RETRO took
}
BASELINE, ALL, AS_LONG = 'GPT with token mix', 'RETRO', 'GPT for as long'
LITTLE_OVERLAP = 0.25  # chunks up to this overlap are reported separately


def train(arm, seed, arguments, out_dir, steps):
    """Train an arm unless already done. Returns its folder, and [(step, seconds, bpb on or None, bpb off)]."""
    folder = f'{out_dir}/{arm.replace(" ", "_")}_{seed}_{steps}'
    if not os.path.exists(f'{folder}/done'):
        options = ARMS[arm] | dict(seed=seed, out_dir=folder, max_iters=steps,
                                   eval_interval=max(1, steps // 6), retrieval_cache_dir=f'{folder}/neighbors')
        print(f'training {arm}, seed {seed}, {steps} steps', file=sys.stderr)
        shutil.rmtree(f'{folder}/neighbors', ignore_errors=True)  # of a run that was interrupted
        subprocess.run([sys.executable, ROOT / 'train.py', *arguments, *(f'--{k}={v}' for k, v in options.items())],
                       check=True, stdout=subprocess.DEVNULL)
        Path(f'{folder}/done').touch()
    points, seconds, tokens = [], 0.0, 0
    for line in read_metrics(metrics_path(folder)):
        if 'loss' in line:
            seconds += (line['tokens'] - tokens) / line['tokens_per_s']
            tokens = line['tokens']
        elif 'val_bpb_off' in line:
            points.append((line['iter'], seconds, line.get('val_bpb_on'), line['val_bpb_off']))
    return folder, points


def evaluate(folder, baseline):
    """bpb at little overlap of a RETRO and the baseline, by python -m evaluation."""
    if not os.path.exists(f'{folder}/evaluation.json'):
        subprocess.run([sys.executable, '-m', 'evaluation', f'--out_dir={folder}', f'--baseline={baseline}',
                        '--passages=0'], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, 'PYTHONPATH': str(ROOT)})
    with open(f'{folder}/evaluation.json', encoding='utf-8') as file:
        line, = (line for line in json.load(file)['bpb_by_overlap'] if line['overlap'] == LITTLE_OVERLAP)
    return line


def final(point):
    """bpb with retrieval, if there is any."""
    return point[3] if point[2] is None else point[2]


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
    lowest = min(final(points[-1]) for seed_runs in runs.values() for points in seed_runs)
    for number, (arm, seed_runs) in enumerate(runs.items()):
        for i, points in enumerate(seed_runs):
            style = dict(color=f'C{number}', lw=2 if arm == ALL else 1.2, label=arm if i == 0 else None,
                         ls='--' if arm == AS_LONG else '-')
            left.plot([p[0] for p in points], [final(p) for p in points], **style)
            right.plot([p[1] for p in points], [final(p) for p in points], **style)
    left.set(xlabel='step', ylabel='val bits per byte', ylim=(lowest - 0.05, lowest + 0.7))
    right.set(xlabel='seconds of training')
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.25)
    save_atomically(lambda tmp_path: figure.savefig(tmp_path, dpi=110, format='png'), path)
    plt.close(figure)


def main():
    flags = {key: value for key, _, value in (a[2:].partition('=') for a in sys.argv[1:] if a.startswith('--'))
             if key in ('seeds', 'arms', 'quick')}
    arguments = [a for a in sys.argv[1:] if a[2:].partition('=')[0] not in ('seeds', 'arms', 'quick')]
    settings = load_settings(arguments)
    steps = 30 if 'quick' in flags else settings.max_iters
    chosen = flags['arms'].split(',') if 'arms' in flags else list(ARMS)
    unknown = [arm for arm in chosen if arm not in ARMS]
    if unknown:
        raise UserError(f'--arms holds {unknown[0]!r}; there are {", ".join(ARMS)}')
    if AS_LONG in chosen and not {BASELINE, ALL} <= set(chosen[:chosen.index(AS_LONG)]):
        raise UserError(f'--arms holds {AS_LONG!r}, whose time follows from {BASELINE!r} and {ALL!r}: name both '
                        f'before it')
    seeds = [settings.seed + i for i in range(int(flags.get('seeds', 1)))]
    out_dir = f'{settings.out_dir}/quality'
    runs, little = {}, {}
    for seed in seeds:
        folders = {}
        for arm in chosen:
            arm_steps = steps
            if arm == AS_LONG:  # by the seconds of both with this seed
                arm_steps = round(steps * runs[ALL][-1][-1][1] / runs[BASELINE][-1][-1][1])
            folders[arm], points = train(arm, seed, arguments, out_dir, arm_steps)
            runs.setdefault(arm, []).append(points)
        for arm, folder in folders.items():
            if BASELINE in folders and runs[arm][-1][-1][2] is not None:
                little.setdefault(arm, []).append(evaluate(folder, folders[BASELINE]))
    report = dict(corpus=describe_corpus(settings.train_datasets), steps=steps,
                  seeds=seeds, tokens=steps * settings.batch_size * settings.block_size
                  * settings.gradient_accumulation_steps)
    base = [final(points[-1]) for points in runs.get(BASELINE, [])]
    print(f'val bits per byte after {steps} steps ({report["tokens"]:,} tokens of {report["corpus"]}), mean and '
          f'standard deviation of {len(seeds)} seeds; gain over the GPT with token mix; the same for the chunks that '
          f'share at most {LITTLE_OVERLAP:.0%} with their neighbors\n')
    print(f'{"":<32}{"on":>18}{"off":>18}{"gain":>9}{"seconds":>9}{"at little overlap":>20}{"gain":>9}')
    for arm, seed_runs in runs.items():
        on = [points[-1][2] for points in seed_runs if points[-1][2] is not None]
        off = [points[-1][3] for points in seed_runs]
        gains = [1 - final(p[-1]) / b for p, b in zip(seed_runs, base, strict=False)]
        seconds = [points[-1][1] for points in seed_runs]
        on_little = [line['bpb_on'] for line in little.get(arm, [])]
        gains_little = [1 - line['bpb_on'] / line['bpb_baseline'] for line in little.get(arm, [])]
        report[arm] = dict(steps=seed_runs[0][-1][0], bpb_on=on, bpb_off=off, gain=gains, seconds=seconds,
                           bpb_on_at_little_overlap=on_little, gain_at_little_overlap=gains_little)
        print(f'{arm:<32}{show(on):>18}{show(off):>18}{show(gains, "{:.2%}"):>9}{show(seconds, "{:.0f}"):>9}'
              f'{show(on_little):>20}{show(gains_little, "{:.2%}"):>9}')
    plot(runs, f'{out_dir}/quality.png')
    write_atomically(json.dumps(report | dict(runs=runs), indent=1), f'{out_dir}/quality.json')
    print(f'\nquality.json and quality.png are in {out_dir}\n\n{json.dumps(report)}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
