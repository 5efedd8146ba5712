"""
Metrics from token losses: bits per byte, perplexities, the gain of retrieval, and the gain without chunks that could be
copied from their neighbors (Borgeaud et al. 2022, section 2.6). As a dict, as a table for the terminal, and as plots.
"""
import math
from itertools import pairwise

import numpy as np

from evaluation.leakage import overlap
from evaluation.losses import bits_per_byte, bootstrap

OVERLAPS = (0.125, 0.25, 0.5, 0.75, 1.0)  # as in the paper's figure
RUNS = (4, 8, 16, 32)  # tokens
SIMILARITIES = (-1.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # bin edges
ARMS = {'on': 'retrieval on', 'off': 'retrieval off', 'baseline': 'GPT'}
COLORS = {'on': '#2f7fd6', 'off': '#e07b39', 'baseline': '#8a8f98'}


def summarize(corpus, size, nats, retrieved=None):
    """
    Metrics of one evaluation of a Corpus, as the dict for evaluation.json. `size` (N,) is the bytes of each chunk.
    `nats` maps arms, which are keys of ARMS, to token losses (N, C). With `retrieved`, a Retrieved, it must have the
    arms 'on' and 'off', and the metrics by longest run, and with neighbors by overlap and, if their scores are one,
    by similarity, are added.
    """
    arms = [arm for arm in ARMS if arm in nats]
    sums = {arm: nats[arm].sum(1, dtype=np.float64) for arm in arms}  # (N,)
    count = corpus.predicted.sum()
    words = sum(len(text.split()) for text in corpus.texts)
    report = dict(documents=len(corpus.names), chunks=len(corpus.chunks), tokens=int(count), bytes=int(size.sum()),
                  words=words)
    for arm in arms:
        total = sums[arm].sum()
        report |= {f'bpb_{arm}': bits_per_byte(sums[arm], size),
                   f'bpb_{arm}_interval': bootstrap(per_byte, corpus.document, sums[arm], size),
                   f'loss_{arm}': total / count, f'perplexity_{arm}': perplexity(total, count),
                   f'word_perplexity_{arm}': perplexity(total, words)}
    for other in ('off', 'baseline'):
        if 'on' in arms and other in arms:
            report |= {f'gain_over_{other}': 1 - sums['on'].sum() / sums[other].sum(),
                       f'gain_over_{other}_interval': bootstrap(gain, corpus.document, sums['on'], sums[other])}
    if retrieved is None:
        return report

    def subset_metrics(subset):
        """Metrics of the chunks in `subset` (N,) bool."""
        metrics = {f'bpb_{arm}': bits_per_byte(sums[arm][subset], size[subset]) for arm in arms}
        if metrics['bpb_on']:
            metrics |= dict(gain=1 - metrics['bpb_on'] / metrics['bpb_off'],
                            gain_interval=bootstrap(gain, corpus.document, sums['on'] * subset, sums['off'] * subset))
        return dict(chunks=int(subset.sum()), share_of_bytes=float(size[subset].sum() / size.sum())) | metrics

    runs = retrieved.longest_runs  # (N,)
    limits = [limit for limit in RUNS if limit < corpus.chunks.shape[1]] + [corpus.chunks.shape[1]]
    report['bpb_by_longest_run'] = [dict(longest_run=limit, **subset_metrics(runs <= limit)) for limit in limits]
    if retrieved.hits is None:
        return report
    overlaps = overlap(corpus, retrieved)  # (N,)
    score = np.where(retrieved.read >= 0, retrieved.hits['score'][retrieved.read].max(1), -np.inf)  # (N,)
    report |= dict(
        share_with_neighbors=float((retrieved.hits['score'][:, 0] > -np.inf).mean()),
        share_read_with_neighbors=float((score > -np.inf).mean()),
        bpb_by_overlap=[dict(overlap=limit, **subset_metrics(overlaps <= limit)) for limit in OVERLAPS])
    if retrieved.mode == 'dense':  # other scores have no scale of their own
        bins = np.digitize(score, SIMILARITIES[1:-1])
        report['by_similarity'] = [dict(below=None, above=None, **subset_metrics(score == -np.inf))]
        report['by_similarity'] += [
            dict(above=above, below=below, **subset_metrics((bins == i) & (score > -np.inf)))
            for i, (above, below) in enumerate(pairwise(SIMILARITIES))]
    return report


def perplexity(nats, count):
    """None where it exceeds what a float can hold."""
    return math.exp(nats / count) if nats < 700 * count else None


def per_byte(nats, size):
    return nats / math.log(2) / size


def gain(on, off):
    return 1 - on / off


def source(report):
    """What was evaluated, with the fingerprint of a prepared corpus."""
    return report['data'] if report['corpus'] == report['data'] else f'{report["data"]} (corpus {report["corpus"]})'


def table(report):
    """The metrics as text for the terminal."""
    arms = [arm for arm in ARMS if f'bpb_{arm}' in report]
    lines = [f'{source(report)}: {report["documents"]:,} documents, {report["tokens"]:,} tokens, {report["bytes"]:,} '
             f'bytes, {report["words"]:,} words', '']

    def row(name, *cells):
        lines.append(f'{name:<24}' + ''.join(f'{cell:>20}' for cell in cells))

    row('', *(ARMS[arm] for arm in arms))
    row('bits per byte', *(f'{report[f"bpb_{arm}"]:.4f}' for arm in arms))
    row('  95% interval', *(interval(report[f'bpb_{arm}_interval'], '{:.4f}') for arm in arms))
    row('loss, nats per token', *(f'{report[f"loss_{arm}"]:.4f}' if f'loss_{arm}' in report else '–' for arm in arms))
    row('perplexity per token', *(figure(report.get(f'perplexity_{arm}'), '{:,.2f}') for arm in arms))
    row('perplexity per word', *(figure(report[f'word_perplexity_{arm}'], '{:,.4g}') for arm in arms))
    lines.append('')
    for other in ('off', 'baseline'):
        if f'gain_over_{other}' in report:
            bounds = report[f'gain_over_{other}_interval']
            significance = ', not statistically significant' if holds_zero(bounds) else ''
            lines.append(f'gain over {"retrieval off" if other == "off" else "the GPT"}: '
                         f'{report[f"gain_over_{other}"]:.2%} (95% interval: {interval(bounds, "{:.2%}")})'
                         f'{significance}')
    lines += report['notes']
    lines.append('intervals are bootstrapped over documents; the variance between training runs is larger')
    compared = [f'bpb_{arm}' for arm in arms if f'bpb_{arm}' in report.get('bpb_by_longest_run', [{}])[0]]
    header = ('share of bytes', *(ARMS[key[4:]] for key in compared), f'{"gain over off (95% interval)":>30}')
    if 'bpb_by_longest_run' in report:
        lines += ['', 'bits per byte by the longest run of tokens that a chunk shares with anything in the collection:']
        row('longest run at most', *header)
        for line in report['bpb_by_longest_run']:
            row(f'{line["longest_run"]} tokens', f'{line["share_of_bytes"]:.1%}', *metric_cells(line, compared))
        lines.append('')
    if 'bpb_by_overlap' in report:
        lines += [f'{report["share_with_neighbors"]:.1%} of the chunks have neighbors, '
                  f'{report["share_read_with_neighbors"]:.1%} are predicted with neighbors', '',
                  'bits per byte by maximum overlap, the longest run of tokens shared with a neighbor:']
        row('overlap at most', *header)
        for line in report['bpb_by_overlap']:
            row(f'{line["overlap"]:.1%}', f'{line["share_of_bytes"]:.1%}', *metric_cells(line, compared))
    if 'by_similarity' in report:
        lines += ['', 'bits per byte by similarity of the nearest neighbor that the chunk was predicted with:']
        row('similarity', *header)
        for line in report['by_similarity']:
            if line['chunks']:
                row('none' if line['above'] is None else f'{line["above"]:.1f} to {line["below"]:.1f}',
                    f'{line["share_of_bytes"]:.1%}', *metric_cells(line, compared))
    for name, scores in report.get('benchmarks', {}).items():
        lines += ['', f'{name}: ' + describe_scores(scores)]
    return '\n'.join(lines)


def metric_cells(line, keys):
    cells = [f'{line[key]:.4f}' if line[key] is not None else '–' for key in keys]
    gain_cell = f'{line["gain"]:>7.2%}  ({interval(line["gain_interval"], "{:.2%}")})' if 'gain' in line else '–'
    return [*cells, f'{gain_cell:>30}']


def figure(value, style):
    """A value, or a dash for None, as text."""
    return '–' if value is None else style.format(value)


def interval(bounds, style):
    """The bounds of a bootstrap interval, or None, as text."""
    return 'too few documents' if bounds is None else ' to '.join(style.format(bound) for bound in bounds)


def holds_zero(bounds):
    """Whether an interval includes zero. False if there is no interval."""
    return bounds is not None and bounds[0] <= 0 <= bounds[1]


def describe_scores(scores):
    """The scores of a benchmark as one line."""
    line = ', '.join(f'retrieval {arm} {scores[arm]:.1%} ± {scores[f"{arm}_error"]:.1%}'
                     for arm in ('on', 'off') if arm in scores)
    chance = 'unknown' if scores['chance'] is None else f'{scores["chance"]:.1%}'
    line += f' (chance {chance}, {scores["questions"]:,} questions'
    if scores['shortened']:
        line += f'; {scores["shortened"]:,} prompts with examples dropped to fit the context'
    if scores['cut']:
        line += f'; {scores["cut"]:,} questions longer than the context, truncated at the start'
    return line + ')'


def plot_overlap(report, axes):
    """Bits per byte by maximum overlap with the neighbors, as in the paper's figure."""
    lines = [line for line in report['bpb_by_overlap'] if line['bpb_on'] is not None]
    limits = [100 * line['overlap'] for line in lines]
    for arm, name in ARMS.items():
        if lines and f'bpb_{arm}' in lines[0]:
            axes.plot(limits, [line[f'bpb_{arm}'] for line in lines], {'on': 'o--'}.get(arm, 'o-'), ms=4,
                      color=COLORS[arm], label=name, zorder=3 if arm == 'on' else 2)
    axes.set(xlabel='maximum overlap with the neighbors (%)', ylabel='bits per byte')
    axes.set_xticks([100 * limit for limit in OVERLAPS], [f'{100 * limit:g}' for limit in OVERLAPS])
    finish(axes)


def plot_similarity(report, axes):
    """Gain of retrieval by similarity of the nearest neighbor."""
    lines = [line for line in report['by_similarity'] if line['above'] is not None and 'gain' in line]
    positions = range(len(lines))
    gains = [100 * line['gain'] for line in lines]
    bounds = [line['gain_interval'] or (line['gain'], line['gain']) for line in lines]
    errors = [[abs(100 * bound[side] - value) for value, bound in zip(gains, bounds, strict=True)] for side in (0, 1)]
    axes.bar(positions, gains, color=COLORS['on'], alpha=0.75)
    axes.errorbar(positions, gains, errors, fmt='none', color='#8a8f98', lw=1, capsize=3)
    axes.axhline(0, color='#8a8f98', lw=1)
    axes.set_xticks(positions, [f'{line["above"]:.1f}–{line["below"]:.1f}\n{line["share_of_bytes"]:.0%}'
                                for line in lines])
    axes.set(xlabel='similarity of the nearest neighbor, share of bytes', ylabel='gain over retrieval off (%)')
    finish(axes, legend=False)


def finish(axes, legend=True):
    """Apply the common style of the plots."""
    if legend:
        axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
