"""
Does tuning make a model answer, and do passages help it? Tunes a model on questions and answers, with several seeds,
and asks the held-out questions (evaluation.qa): before and after, without passages, with those that are retrieved live
for each question, and with the gold passage of the file. What is retrieved is never of the question's own document.

    python bench/tuning.py config/sft_quickstart.py [--key=value ...] [--seeds=3] [--arms='pretrained|tuned']
        [--retrieval=on] [--quick]

Prints a JSON line an arm and a table, and writes tuning.json into out_dir. What is in out_dir already is neither tuned
nor asked again: for other settings name another --out_dir.
"""
import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.quality import run
from configurator import UserError, user_errors_as_one_line, write_atomically
from data.documents import as_dataset_configs
from data.fingerprint import describe_corpus
from sft import read_settings

# a sequence holds a quarter of the conversations, with passages, and a step as many as without
LIVE = dict(passages='prompt', passages_from='collection', gradient_accumulation_steps=4)
ARMS = {  # what is tuned with, and what is asked with
    'pretrained': (None, 'none'),
    'pretrained, passages retrieved': (None, 'collection'),
    'pretrained, gold passage': (None, 'file'),
    'tuned': ({}, 'none'),
    'tuned with passages, retrieved': (LIVE, 'collection'),
    'tuned with passages, gold': (LIVE, 'file'),
}
FIGURES = {'bpb': 'bpb', 'f1': 'F1', 'exact_match': 'EM', 'rouge_l': 'ROUGE-L'}
EVAL_TOKENS = 5_000  # evaluation.qa measures all of them
FLAGS = ('seeds', 'arms', 'retrieval', 'quick')


def tune(options, seed, arguments, folder, steps):
    """Tune with a seed, unless already done; a run that was interrupted goes on."""
    if os.path.exists(f'{folder}/done'):
        return
    print(f'tuning {folder}', file=sys.stderr)
    options = dict(retrieval_mode='dense') | options | dict(out_dir=folder, seed=seed, max_iters=steps,
                                                            eval_interval=steps, eval_tokens=EVAL_TOKENS)
    if os.path.exists(f'{folder}/checkpoints/latest'):
        options['init_from'] = 'resume'
    run(ROOT / 'sft.py', *arguments, *(f'--{key}={value}' for key, value in options.items()))
    Path(f'{folder}/done').touch()


def ask(folder, passages, settings, results, options):
    """The report of evaluation.qa, unless it is there already."""
    if not os.path.exists(f'{results}/questions.json'):
        print(f'asking {folder}, passages: {passages}', file=sys.stderr)
        val, = as_dataset_configs(settings.val_datasets, 'val_datasets')
        run('-m', 'evaluation.qa', f'--out_dir={folder}', f'--data={val.path}', f'--source={val.source}',
            f'--passages={passages}', *[f'--passages_as={LIVE["passages"]}'] * (passages != 'none'), '--shown=4',
            f'--template={settings.template}', f'--num_passages={settings.num_passages}', f'--results={results}',
            f'--retrieval_mode={settings.retrieval_mode}', f'--retrieval_collection={settings.retrieval_collection}',
            *options)
    with open(f'{results}/questions.json', encoding='utf-8') as file:
        return json.load(file)


def main():
    flags = dict(argument[2:].split('=', 1) if '=' in argument else (argument[2:], 'True')
                 for argument in sys.argv[1:] if argument.partition('=')[0][2:] in FLAGS)
    arguments = [argument for argument in sys.argv[1:] if argument.partition('=')[0][2:] not in FLAGS]
    quick = 'quick' in flags
    settings, _ = read_settings(arguments)
    steps = 4 if quick else settings.max_iters
    seeds = [settings.seed + i for i in range(1 if quick else int(flags.get('seeds', 3)))]
    names = flags.get('arms', '|'.join(ARMS)).split('|')
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise UserError(f'--arms names {unknown[0]!r}, which is none of {" | ".join(ARMS)}')
    out_dir = f'{settings.out_dir}/quick' if quick else settings.out_dir
    options_of_qa = ['--max_questions=20'] * quick + [f'--retrieval={flags["retrieval"]}'] * ('retrieval' in flags)
    lines = []
    for name in names:
        options, passages = ARMS[name]
        reports = []
        for seed in seeds if options is not None else seeds[:1]:
            folder = settings.init_from
            if options is not None:
                folder = f'{out_dir}/{"passages" if options else "plain"}_{seed}'
                more = options and dict(retrieval_mode=settings.retrieval_mode)
                tune(options | more, seed, arguments, folder, steps)
            results = f'{out_dir}/{name.replace(", ", "_").replace(" ", "_")}_{seed}'
            reports.append(ask(folder, passages, settings, results, options_of_qa))
        found = [(key, arm, [report[f'{key}_{arm}'] for report in reports]) for arm in ('on', 'off') for key in FIGURES
                 if f'{key}_{arm}' in reports[0]]
        lines.append(dict(arm=name, questions=reports[0]['questions'], seeds=len(reports), **{
            f'{key}_{arm}': round(statistics.mean(values), 4) for key, arm, values in found}, **{
            f'{key}_{arm}_sd': round(statistics.stdev(values), 4) for key, arm, values in found if len(values) > 1}))
        print(json.dumps(lines[-1]), flush=True)
    corpus = describe_corpus(settings.val_datasets)
    report = dict(corpus=corpus, steps=steps, arms=lines)
    write_atomically(json.dumps(report, indent=1) + '\n', f'{out_dir}/tuning.json')
    print(f'\n{corpus}, {lines[0]["questions"]} questions\n')
    for arm in ('on', 'off'):
        if f'bpb_{arm}' not in lines[0]:
            continue
        print(f'| retrieval {arm} | {" | ".join(FIGURES.values())} |\n| --- |{" --- |" * len(FIGURES)}')
        for line in lines:
            print(f'| {line["arm"]} | ' + ' | '.join(cell(line, key, arm) for key in FIGURES) + ' |')
        print()


def cell(line, key, arm):
    """A figure and its spread over the seeds."""
    value, spread = line[f'{key}_{arm}'], line.get(f'{key}_{arm}_sd')
    style = '{:.3f}' if key == 'bpb' else '{:.1%}'
    return style.format(value) + (' ± ' + style.format(spread) if spread is not None else '')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
