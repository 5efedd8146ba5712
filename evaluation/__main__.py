"""
Evaluates a trained model on its val documents, or on any text: bits per byte with retrieval on and off and beside a
GPT, what remains of the gain where nothing can be copied, and where in the text retrieval helps.

    python -m evaluation --out_dir=out/quickstart
    python -m evaluation --out_dir=out/quickstart --baseline=out/gpt --max_tokens=1000000
    python -m evaluation --out_dir=out/quickstart --data=my/documents.jsonl --results=out/mine

Writes evaluation.json, leakage.png, similarity.png and report.html into out_dir. The checkpoint holds its settings; any
of them can be overridden, e.g. --retrieval_milvus_uri=... or --multiple_choice_benchmarks="['LogiQA']".
"""
import argparse
import math
import os
import sys
import time
from contextlib import ExitStack, closing

from system import autocast, keep_freed_memory, pick_dtype

from configurator import (
    UserError,
    check_range,
    drop_secrets_from_argv,
    save_atomically,
    to_json,
    user_errors_as_one_line,
    write_atomically,
)
from data.chunk_store import open_datasets
from data.corpus import chunk_bytes, chunk_texts, read_corpus
from data.documents import as_dataset_configs, names_of
from data.fingerprint import describe_corpus
from data.tokenizer import vocabulary_hash
from evaluation.figures import plot_overlap, plot_similarity, summarize, table
from evaluation.losses import evaluate_corpus
from evaluation.report import choose_passages, make_folder, read_answers, write_report
from retrieval.retriever import Retriever
from training.checkpoint import load_checkpoint, load_run
from training.metrics import metrics_path


def parse_arguments():
    parser = argparse.ArgumentParser(prog='python -m evaluation', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', default='out',
                        help='out_dir of the run, or the folder of a checkpoint (default: %(default)s)')
    parser.add_argument('--data', action='append', metavar='FILE',
                        help='text to evaluate on: .jsonl, .parquet, .txt, ...; can be repeated (default: the '
                             'val_datasets of the run)')
    parser.add_argument('--like', metavar='DATASET', help='path, name or source of a train dataset whose columns and '
                        'source --data has, if the run has several')
    parser.add_argument('--baseline', metavar='OUT_DIR', help='a GPT of the same decoder to compare with')
    parser.add_argument('--retrieval', choices=('on', 'off'),
                        help='off: only without neighbors and pointers (default: on and off, if the model has '
                        'retrieval)')
    parser.add_argument('--max_tokens', type=int, default=200_000,
                        help='tokens to evaluate, of shuffled documents; 0: all (default: %(default)s)')
    parser.add_argument('--without_copies', type=int, default=0, metavar='TOKENS',
                        help='leave out pointers into passages that share a run of at least this many tokens with the '
                             'text; 0: none (default: %(default)s)')
    parser.add_argument('--passages', type=int, default=12,
                        help='passages of each kind that the report shows (default: %(default)s)')
    parser.add_argument('--results', metavar='DIR', help='folder for the results (default: out_dir)')
    arguments, overrides = parser.parse_known_args()
    for name in ('max_tokens', 'passages', 'without_copies'):
        check_range(f'--{name}', getattr(arguments, name), 0, math.inf)
    return arguments, overrides


def main(cleanup):
    arguments, overrides = parse_arguments()
    step = load_checkpoint(arguments.out_dir).step
    settings, tokenizer, model, device = load_run(arguments.out_dir, overrides)
    use_retrieval = model.config.use_retrieval and arguments.retrieval != 'off'
    if arguments.retrieval == 'on' and not use_retrieval:
        raise UserError(f'the model in {arguments.out_dir!r} was trained without retrieval: leave out '
                        f'--retrieval=on, or name the out_dir of a RETRO')
    baseline = None
    if arguments.baseline:
        baseline = load_run(arguments.baseline, [o for o in overrides if o.startswith(('--device=', '--dtype='))])
    benchmarks = []
    if settings.multiple_choice_benchmarks:
        from evaluation.benchmarks import prepare_benchmarks  # imports DeepEval, which takes seconds
        benchmarks = prepare_benchmarks(settings.multiple_choice_benchmarks, settings.benchmark_data_dir)
    context = autocast(pick_dtype(settings.dtype, device), device)
    configs = configs_of_data(arguments, settings)
    results = make_folder(arguments.results or arguments.out_dir)
    corpus = read_corpus(open_datasets(configs, tokenizer, settings, head=arguments.max_tokens), tokenizer,
                         arguments.max_tokens)
    retriever = None
    if use_retrieval:
        retriever = cleanup.enter_context(closing(Retriever(
            settings, tokenizer, device, show_progress=sys.stderr.isatty(), copied=arguments.without_copies)))

    keep_freed_memory()
    started = time.perf_counter()
    nats, retrieved = evaluate_corpus(model, corpus, settings.batch_size, device, context, retriever)
    report = dict(out_dir=arguments.out_dir, step=step, data=', '.join(names_of(configs)),
                  corpus=describe_corpus(configs), baseline=arguments.baseline, notes=[])
    if arguments.without_copies and retrieved:
        report['notes'].append(f'pointers into passages that share {arguments.without_copies} or more tokens with the '
                               f'text were left out')
    separate = {}
    if baseline:
        if baseline[2].config.use_retrieval:
            report['notes'].append(f'{arguments.baseline} is a RETRO, and was evaluated without retrieval')
        aligned, separate = evaluate_baseline(baseline, corpus, tokenizer)
        nats |= aligned
    report |= summarize(corpus, chunk_bytes(corpus, tokenizer), nats, retrieved) | separate
    if separate:
        report['notes'].append(f'{arguments.baseline} has another tokenizer or chunk size: bits per byte and '
                               f'perplexity per word compare, losses and perplexities per token do not')
    report['benchmarks'] = {}
    for benchmark in benchmarks:
        report['benchmarks'][benchmark.name] = benchmark.run(model, tokenizer, device, context, retriever,
                                                             settings.batch_size, show_progress=True)
    report['seconds'] = time.perf_counter() - started

    write_atomically(to_json(report, indent=1), f'{results}/evaluation.json')
    written = ['evaluation.json']
    if retrieved:
        plots = (('bpb_by_overlap', 'leakage.png', plot_overlap), ('by_similarity', 'similarity.png', plot_similarity))
        for _, name, plot in [plot for plot in plots if plot[0] in report]:
            save_figure(report, plot, f'{results}/{name}')
            written.append(name)
    passages = choose_passages(corpus, nats, retrieved, arguments.passages) if retrieved else []
    write_report(f'{results}/report.html', report, passages, corpus, nats, retrieved, retriever, tokenizer,
                 metrics_path(arguments.out_dir), read_answers(results, step))
    print(f'{table(report)}\n\n{", ".join(written)} and report.html are in {results}')
    if settings.wandb_log:
        log_to_wandb(settings, report, results, [*written, 'report.html'])


def configs_of_data(arguments, settings):
    """
    The DatasetConfigs of --data, or the run's val datasets. Files that the run does not know have the columns and the
    source of its train datasets, or the leak rule would not recognize their documents in the collection.
    """
    if not arguments.data:
        if settings.template:
            raise UserError(f'the run in {arguments.out_dir!r} was tuned on conversations, and this evaluates '
                            f'documents: name some in --data, or ask questions with python -m evaluation.qa')
        return as_dataset_configs(settings.val_datasets, 'val_datasets')
    filtered = set()

    def without_filter(entry):  # of which a checkpoint keeps the name; columns and source are enough for other files
        if not isinstance(entry, dict) or not isinstance(entry.get('filter_fn'), str):
            return entry
        filtered.add(resolve(entry['path']))
        return {**entry, 'filter_fn': None}
    lists = {name: as_dataset_configs(list(map(without_filter, getattr(settings, name))), name)
             for name in ('train_datasets', 'val_datasets')}
    train = lists['train_datasets']

    def is_like(config):
        return arguments.like in (None, config.source, config.name) or resolve(arguments.like) == resolve(config.path)
    like = [config for config in train if is_like(config)]
    choices = ', '.join(' '.join(filter(None, [config.path, config.name, config.source])) for config in train)
    if not like:
        raise UserError(f'--like={arguments.like} is neither path nor name nor source of one of the train_datasets of '
                        f'the run: {choices}; name one of them')
    several = UserError(f'the train_datasets of the run have several columns, sources or subsets ({choices}): name one '
                        f'that has those of --data by its path, name or source in --like, so that documents are '
                        f'recognized')
    chosen = []
    for path in arguments.data:
        # what stands in both lists is read as val_datasets do
        known = [config for name in ('val_datasets', 'train_datasets') for config in lists[name]
                 if resolve(config.path) == resolve(path)]
        subsets = {(config.name, config.split) for config in known}
        if len(subsets) > 1:
            known = [config for config in known if is_like(config)]
            subsets = {(config.name, config.split) for config in known}
        if len(subsets) > 1 or (not known and len({(c.source, c.text_field, c.id_field) for c in like}) > 1):
            raise several
        if known and resolve(path) in filtered:
            raise UserError(f'--data={path} is a dataset of the run with a filter_fn, of which a checkpoint keeps the '
                            f'name alone: give the config file, too')
        chosen.append(known[0] if known else {'path': path, **{
            name: getattr(like[0], name) for name in ('text_field', 'id_field', 'source', 'skip_bad')}})
    return as_dataset_configs(chosen, '--data')


def resolve(path):
    return os.path.realpath(os.path.expanduser(path))


def evaluate_baseline(run, corpus, tokenizer):
    """
    The nats of another run's model on the corpus, as {'baseline': (N, C)}, and {}. If it has another tokenizer or chunk
    size, {} and its figures on the same documents.
    """
    settings, baseline_tokenizer, model, device = run
    context = autocast(pick_dtype(settings.dtype, device), device)
    is_aligned = (vocabulary_hash(baseline_tokenizer) == vocabulary_hash(tokenizer)
                  and settings.retrieval_chunk_size == corpus.chunks.shape[1])
    if not is_aligned:
        corpus = chunk_texts(corpus.names, corpus.texts, baseline_tokenizer, settings.retrieval_chunk_size)
    nats, _ = evaluate_corpus(model, corpus, settings.batch_size, device, context, label='evaluating the baseline')
    nats = {'baseline': nats['off']}
    if is_aligned:
        return nats, {}
    figures = summarize(corpus, chunk_bytes(corpus, baseline_tokenizer), nats)
    return {}, {key: figures[key] for key in ('bpb_baseline', 'bpb_baseline_interval', 'word_perplexity_baseline')}


def log_to_wandb(settings, report, folder, names):
    """Log the figures, the plots, and all files as an artifact, as a run of its own beside the training's."""
    import wandb
    drop_secrets_from_argv()
    with wandb.init(project=settings.wandb_project, name=f'{settings.wandb_run_name} evaluation',
                    job_type='evaluation', config={key: report[key] for key in ('out_dir', 'data', 'corpus')}) as run:
        figures = {key: value for key, value in report.items() if not isinstance(value, (str, type(None)))}
        pictures = {name[:-len('.png')]: wandb.Image(f'{folder}/{name}') for name in names if name.endswith('.png')}
        run.log(figures | pictures | {'report': wandb.Html(f'{folder}/report.html')})
        artifact = wandb.Artifact('evaluation', type='evaluation')
        for name in names:
            artifact.add_file(f'{folder}/{name}')
        run.log_artifact(artifact)


def save_figure(report, plot, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    plot(report, axes)
    save_atomically(lambda tmp_path: figure.savefig(tmp_path, dpi=130, format='png'), path)
    plt.close(figure)


if __name__ == '__main__':
    with user_errors_as_one_line(), ExitStack() as cleanup:
        main(cleanup)
