"""
What the token losses come to: bits per byte, perplexities, what retrieval gains, and how much of that is left where
chunks that stand in their neighbors word for word are left out. As numbers, as a table, as plots.
"""
import math
from itertools import pairwise

import numpy as np

from evaluation.leakage import overlap
from evaluation.losses import bits_per_byte, bootstrap

OVERLAPS = (0.125, 0.25, 0.5, 0.75, 1.0)  # the paper's figure has these
SIMILARITIES = (-1.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # bounds of the classes of neighbors
ARMS = {'on': 'retrieval on', 'off': 'retrieval off', 'baseline': 'GPT'}
COLORS = {'on': '#2f7fd6', 'off': '#e07b39', 'baseline': '#8a8f98'}


def summarize(corpus, size, nats, retrieved=None):
    """
    The figures of one evaluation, for evaluation.json. `size` (N,) bytes of the chunks; nats is by arm: 'off', and
    where there are 'on' and 'baseline', each (N, C).
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
                   f'loss_{arm}': total / count, f'perplexity_{arm}': math.exp(total / count),
                   f'word_perplexity_{arm}': math.exp(total / words) if total < 700 * words else None}
    for other in ('off', 'baseline'):
        if 'on' in arms and other in arms:
            report |= {f'gain_over_{other}': 1 - sums['on'].sum() / sums[other].sum(),
                       f'gain_over_{other}_interval': bootstrap(gain, corpus.document, sums['on'], sums[other])}
    if retrieved is None:
        return report

    def of(chosen):
        """The figures of the chosen chunks (N,) bool."""
        figures = {f'bpb_{arm}': bits_per_byte(sums[arm][chosen], size[chosen]) for arm in arms}
        if figures['bpb_on']:
            figures |= dict(gain=1 - figures['bpb_on'] / figures['bpb_off'],
                            gain_interval=bootstrap(gain, corpus.document, sums['on'] * chosen, sums['off'] * chosen))
        return dict(chunks=int(chosen.sum()), share_of_bytes=float(size[chosen].sum() / size.sum())) | figures

    shares = overlap(corpus, retrieved)
    best = np.where(retrieved.read >= 0, retrieved.hits['score'][retrieved.read].max(1), -np.inf)  # (N,)
    classes = np.digitize(best, SIMILARITIES[1:-1])
    report |= dict(
        share_with_neighbors=float((retrieved.hits['score'][:, 0] > -np.inf).mean()),
        share_read_with_neighbors=float((best > -np.inf).mean()),
        bpb_by_overlap=[dict(overlap=limit, **of(shares <= limit)) for limit in OVERLAPS],
        by_similarity=[dict(below=None, above=None, **of(best == -np.inf))]
        + [dict(above=above, below=below, **of((classes == c) & (best > -np.inf)))
           for c, (above, below) in enumerate(pairwise(SIMILARITIES))])
    return report


def per_byte(nats, size):
    return nats / math.log(2) / size


def gain(on, off):
    return 1 - on / off


def table(report):
    """The figures for the terminal."""
    arms = [arm for arm in ARMS if f'bpb_{arm}' in report]
    lines = [f'{report["data"]}: {report["documents"]:,} documents, {report["tokens"]:,} tokens, {report["bytes"]:,} '
             f'bytes, {report["words"]:,} words', '']

    def row(name, *cells):
        lines.append(f'{name:<24}' + ''.join(f'{cell:>20}' for cell in cells))

    row('', *(ARMS[arm] for arm in arms))
    row('bits per byte', *(f'{report[f"bpb_{arm}"]:.4f}' for arm in arms))
    row('  95 % interval', *(interval(report[f'bpb_{arm}_interval'], '{:.4f}') for arm in arms))
    row('loss, nats a token', *(f'{report[f"loss_{arm}"]:.4f}' if f'loss_{arm}' in report else '–' for arm in arms))
    row('perplexity a token', *(f'{report[f"perplexity_{arm}"]:,.2f}' if f'loss_{arm}' in report else '–'
                                for arm in arms))
    row('perplexity a word', *(figure(report[f'word_perplexity_{arm}'], '{:,.4g}') for arm in arms))
    lines.append('')
    for other in ('off', 'baseline'):
        if f'gain_over_{other}' in report:
            bounds = report[f'gain_over_{other}_interval']
            told = 'no difference that can be told apart from chance' if holds_zero(bounds) else ''
            lines.append(f'on is below {"off" if other == "off" else "the GPT"} by {report[f"gain_over_{other}"]:.2%} '
                         f'(95 %: {interval(bounds, "{:.2%}")}) {told}'.rstrip())
    lines += report['notes']
    lines.append('intervals are over documents; another training run would differ by more')
    if 'bpb_by_overlap' in report:
        lines += [f'{report["share_with_neighbors"]:.1%} of the chunks have neighbors, '
                  f'{report["share_read_with_neighbors"]:.1%} are read with some', '',
                  'bits per byte of chunks that share at most so much, in one run, with their neighbors:']
        compared = [f'bpb_{arm}' for arm in arms if f'bpb_{arm}' in report['bpb_by_overlap'][0]]
        row('at most', 'share of bytes', *(ARMS[key[4:]] for key in compared), f'{"on below off by, 95 %":>30}')
        for line in report['bpb_by_overlap']:
            row(f'{line["overlap"]:.1%}', f'{line["share_of_bytes"]:.1%}', *figures_of(line, compared))
        lines += ['', 'and by the similarity of the nearest neighbor that they were read with:']
        row('', 'share of bytes', *(ARMS[key[4:]] for key in compared), f'{"on below off by, 95 %":>30}')
        for line in report['by_similarity']:
            if line['chunks']:
                row('none' if line['above'] is None else f'{line["above"]:.1f} to {line["below"]:.1f}',
                    f'{line["share_of_bytes"]:.1%}', *figures_of(line, compared))
    for name, scores in report.get('benchmarks', {}).items():
        lines += ['', f'{name}: ' + describe_scores(scores)]
    return '\n'.join(lines)


def figures_of(line, keys):
    told = [f'{line[key]:.4f}' if line[key] is not None else '–' for key in keys]
    gained = f'{line["gain"]:>7.2%}  ({interval(line["gain_interval"], "{:.2%}")})' if 'gain' in line else '–'
    return [*told, f'{gained:>30}']


def figure(value, style):
    return '–' if value is None else style.format(value)


def interval(bounds, style):
    return 'too few documents' if bounds is None else ' to '.join(style.format(bound) for bound in bounds)


def holds_zero(bounds):
    return bounds is not None and bounds[0] <= 0 <= bounds[1]


def describe_scores(scores):
    """One line for a benchmark's scores."""
    told = ', '.join(f'retrieval {arm} {scores[arm]:.1%} ± {scores[f"{arm}_error"]:.1%}'
                     for arm in ('on', 'off') if arm in scores)
    chance = 'unknown' if scores['chance'] is None else f'{scores["chance"]:.1%}'
    told += f' (chance {chance}, {scores["questions"]:,} questions'
    if scores['shortened']:
        told += f'; {scores["shortened"]:,} prompts lost examples to fit'
    if scores['cut']:
        told += f'; {scores["cut"]:,} questions were longer than the model can read, which lost their beginning'
    return told + ')'


def plot_overlap(report, axes):
    """The paper's figure: bits per byte of the chunks that share at most so much with their neighbors."""
    lines = [line for line in report['bpb_by_overlap'] if line['bpb_on'] is not None]
    at = [100 * line['overlap'] for line in lines]
    for arm, name in ARMS.items():
        if lines and f'bpb_{arm}' in lines[0]:
            axes.plot(at, [line[f'bpb_{arm}'] for line in lines], {'on': 'o--'}.get(arm, 'o-'), ms=4, color=COLORS[arm],
                      label=name, zorder=3 if arm == 'on' else 2)
    axes.set(xlabel='chunks that share at most so much with their neighbors, %', ylabel='bits per byte')
    axes.set_xticks([100 * limit for limit in OVERLAPS], [f'{100 * limit:g}' for limit in OVERLAPS])
    finish(axes)


def plot_similarity(report, axes):
    """What retrieval gains by how near the nearest neighbor is."""
    lines = [line for line in report['by_similarity'] if line['above'] is not None and 'gain' in line]
    at = range(len(lines))
    gains = [100 * line['gain'] for line in lines]
    bounds = [line['gain_interval'] or (line['gain'], line['gain']) for line in lines]
    spread = [[abs(100 * bound[side] - own) for own, bound in zip(gains, bounds, strict=True)] for side in (0, 1)]
    axes.bar(at, gains, color=COLORS['on'], alpha=0.75)
    axes.errorbar(at, gains, spread, fmt='none', color='#8a8f98', lw=1, capsize=3)
    axes.axhline(0, color='#8a8f98', lw=1)
    axes.set_xticks(at, [f'{line["above"]:.1f}–{line["below"]:.1f}\n{line["share_of_bytes"]:.0%}' for line in lines])
    axes.set(xlabel='similarity of the nearest neighbor, and share of the bytes', ylabel='on below off by, %')
    finish(axes, legend=False)


def finish(axes, legend=True):
    if legend:
        axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
