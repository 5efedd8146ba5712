"""
The evaluation as one self-contained HTML page: metrics, curves, the leakage plots, and passages in which each token is
tinted by the gain of retrieval, beside the neighbors that the passage was predicted with.
"""
import html
import io
import json
import os

import numpy as np

from configurator import UserError, visible, write_atomically
from evaluation.figures import (
    ARMS,
    COLORS,
    describe_scores,
    figure,
    finish,
    holds_zero,
    interval,
    plot_overlap,
    plot_similarity,
    source,
)
from evaluation.leakage import shared_tokens
from retrieval.knowledge_base import FIELDS, describe_score
from training.metrics import read_curves

SHORTEST_SHARED = 4  # tokens in the shortest run marked as shared
FIGURES = dict(exact_match='exact match', f1='F1', rouge_l='ROUGE-L', bpb='bits per byte of the gold answer')


def choose_passages(corpus, nats, retrieved, count):
    """
    Passages for the report, as [(kind, chunk index)]: up to `count` chunks each that retrieval helped most, hurt most,
    and that are evenly spaced between. Only chunks predicted with neighbors are considered. `nats` has the arms 'on'
    and 'off', each (N, C).
    """
    gains = (nats['off'] - nats['on']).sum(1)  # (N,)
    is_read = retrieved.read >= 0
    if retrieved.hits is not None:
        is_read &= retrieved.hits['score'][retrieved.read, 0] > -np.inf
    candidates = np.flatnonzero(is_read)
    order = candidates[np.argsort(-gains[candidates], kind='stable')]
    count = min(count, len(order) // 3)
    helped, hurt = order[:count], order[::-1][:count]
    between = order[np.linspace(count, len(order) - count - 1, count).astype(int)] if count else []
    return ([('helped', int(i)) for i in helped if gains[i] > 0] + [('hurt', int(i)) for i in hurt if gains[i] < 0]
            + [('between', int(i)) for i in between])


def write_report(path, report, passages, corpus, nats, retrieved, retriever, tokenizer, metrics_path, questions=None):
    """
    Write the page to `path`. `report` is the dict of evaluation.json, `passages` comes from choose_passages,
    metrics_path is the metrics.jsonl of the training run, which may be missing, and `questions`, if there are any, what
    read_answers gives.
    """
    parts = [heading(report), metrics_table(report), curves(metrics_path)]
    if 'bpb_by_longest_run' in report:
        parts += [leakage(report)]
    if report['benchmarks']:
        parts += [benchmark_scores(report['benchmarks'])]
    if questions:
        parts += questions_parts(*questions)
    if passages:
        rows = neighbor_rows(passages, retrieved, retriever)
        sources = pointer_sources(passages, corpus, retrieved, retriever)
        indices = [i for _, i in passages]
        strongest = max(0.01, float(f'{np.quantile(abs(nats["off"] - nats["on"])[indices], 0.99):.1g}'))
        parts += [passages_heading(strongest),
                  *(passage(kind, i, corpus, nats, retrieved, rows, sources, tokenizer, strongest)
                    for kind, i in passages), '</section>']
    write_page(path, title(report), parts)


def write_page(path, name, parts):
    """A page of these parts, HTML."""
    page = (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{name}</title>\n'
            f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
            + '\n'.join(parts) + f'\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n')
    write_atomically(page, path)


def make_folder(path):
    """Create the folder of --results, which is returned. UserError if it cannot be written."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f'--results {path!r} cannot be written ({error.strerror}): name another folder') from error
    if not os.access(path, os.W_OK):
        raise UserError(f'--results {path!r} cannot be written: name another folder')
    return path


def escape(text):
    """Text of documents and names for the page: neither markup nor control characters."""
    return html.escape(visible(text))


def title(report):
    return f'nanoRETRO: {escape(report["out_dir"])} on {escape(report["data"])}'


def heading(report):
    return (f'<h1>{escape(report["out_dir"])}</h1>\n<p class="about">Evaluated on {escape(source(report))}: '
            f'{report["documents"]:,} documents, {report["tokens"]:,} tokens, {report["bytes"]:,} bytes.</p>')


def metrics_table(report):
    """The main metrics by arm, and the gains of retrieval."""
    arms = [arm for arm in ARMS if f'bpb_{arm}' in report]
    rows = [('bits per byte', 'bpb', '{:.4f}'), ('loss, nats per token', 'loss', '{:.4f}'),
            ('perplexity per token', 'perplexity', '{:,.2f}'), ('perplexity per word', 'word_perplexity', '{:,.4g}')]
    lines = []
    for name, key, style in rows:
        cells = []
        for arm in arms:
            cell = figure(report.get(f'{key}_{arm}'), style)
            if key == 'bpb':
                cell += f'<small>{interval(report[f"bpb_{arm}_interval"], style)}</small>'
            cells.append(f'<td>{cell}</td>')
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    head = ''.join(f'<th scope="col"><i style="background:{COLORS[arm]}"></i>{ARMS[arm]}</th>' for arm in arms)
    gains = []
    for other, name in (('off', 'without retrieval'), ('baseline', 'the GPT')):
        if f'gain_over_{other}' in report:
            gain = report[f'gain_over_{other}']
            bounds = report[f'gain_over_{other}_interval']
            significance = ', not statistically significant' if holds_zero(bounds) else ''
            gains.append(f'<p>With retrieval the model needs <b>{abs(gain):.2%} {"fewer" if gain >= 0 else "more"}</b> '
                         f'bits than {name} (95% interval of the gain: {interval(bounds, "{:.2%}")}{significance}).'
                         f'</p>')
    if gains:
        gains += [f'<p>{escape(note)}.</p>' for note in report['notes']]
        gains.append('<p class="about">Intervals are bootstrapped over documents; the variance between training runs '
                     'is larger.</p>')
    return (f'<section class="card">\n<table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
            f'</table>\n{"".join(gains)}\n</section>')


def curves(metrics_path):
    """Train loss and val bits per byte of the training run; empty if metrics_path does not exist."""
    if not os.path.exists(metrics_path):
        return ''
    steps, evaluations = read_curves(metrics_path)

    def plot(axes):
        twin = axes.twinx()
        twin.plot([line['iter'] for line in steps], [line['loss'] for line in steps], lw=0.8, color=COLORS['baseline'],
                  alpha=0.6)
        twin.set_ylabel('train loss, nats per token')
        twin.spines[['top']].set_visible(False)
        for arm, style in (('off', 'o-'), ('on', 'o--')):
            points = evaluations[arm]
            if points:
                axes.plot([p['iter'] for p in points], [p[f'val_bpb_{arm}'] for p in points], style, ms=3,
                          color=COLORS[arm], label=f'val, {ARMS[arm]}')
        axes.set(xlabel='step', ylabel='bits per byte')
        finish(axes, legend=any(evaluations.values()))
    return f'<section class="card">\n<h2>Training</h2>\n{svg(plot)}\n</section>'


def leakage(report):
    """Bits per byte by longest run and by overlap, as plots and tables, and the plot of the gain by similarity."""
    runs = subset_table(report['bpb_by_longest_run'], 'longest run at most',
                        lambda line: f'{line["longest_run"]} tokens')
    page = ('<section class="card">\n<h2>Is it more than copying?</h2>\n<p>Chunks are grouped by the longest run of '
            f'tokens that they share with anything in the collection, their own documents excluded.</p>\n{runs}')
    if 'bpb_by_overlap' in report:
        plots = svg(lambda axes: plot_overlap(report, axes))
        if 'by_similarity' in report:
            plots += svg(lambda axes: plot_similarity(report, axes))
        overlaps = subset_table(report['bpb_by_overlap'], 'overlap at most', lambda line: f'{line["overlap"]:.1%}')
        page += (f'<p>The same by overlap: the longest run of tokens shared with a neighbor, as a fraction of the '
                 f'chunk length.</p>\n<div class="plots">{plots}</div>\n{overlaps}\n'
                 f'<p>{report["share_with_neighbors"]:.1%} of the chunks have neighbors; '
                 f'{report["share_read_with_neighbors"]:.1%} are predicted with neighbors.</p>')
    return page + '\n</section>'


def subset_table(subsets, name, describe):
    """The metrics of subsets of the chunks as a table; describe() names the subset of a line."""
    arms = [arm for arm in ARMS if f'bpb_{arm}' in subsets[0]]
    lines = []
    for line in subsets:
        cells = ''.join(f'<td>{line[f"bpb_{arm}"]:.4f}</td>' if line[f'bpb_{arm}'] is not None else '<td>–</td>'
                        for arm in arms)
        gain = '–'
        if 'gain' in line:
            gain = f'{line["gain"]:.2%}<small>{interval(line["gain_interval"], "{:.2%}")}</small>'
        lines.append(f'<tr><th scope="row">{describe(line)}</th><td>{line["share_of_bytes"]:.1%}</td>{cells}'
                     f'<td>{gain}</td></tr>')
    head = ''.join(f'<th scope="col">{ARMS[arm]}</th>' for arm in arms)
    return (f'<div class="scroll"><table><thead><tr><th scope="col">{name}</th>'
            f'<th scope="col">share of bytes</th>{head}<th scope="col">gain over off</th></tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


def benchmark_scores(benchmarks):
    lines = ''.join(f'<li><b>{escape(name)}</b>: {escape(describe_scores(scores))}</li>'
                    for name, scores in benchmarks.items())
    return f'<section class="card">\n<h2>Benchmarks</h2>\n<ul>{lines}</ul>\n</section>'


def write_questions(path, report, lines, count):
    """Write the page of python -m evaluation.qa: its report, and `count` of the answered questions of each kind."""
    name = f'nanoRETRO: {escape(report["out_dir"])} answers {escape(report["data"])}'
    write_page(path, name, [f'<h1>{escape(report["out_dir"])}</h1>', *questions_parts(report, lines, count)])


def read_answers(folder, step):
    """What python -m evaluation.qa has written there, (report, lines), or None if it is of another step, or nothing."""
    try:
        with open(f'{folder}/questions.json', encoding='utf-8') as file:
            report = json.load(file)
        with open(f'{folder}/answers.jsonl', encoding='utf-8') as file:
            lines = [json.loads(line) for line in file]
    except (OSError, ValueError):
        return None
    return (report, lines) if report.get('step') == step else None


def describe_questions(report):
    """What was asked and how, as one line."""
    chosen = f'{report["questions"]:,}' + f' of {report["of"]:,}' * (report['questions'] < report['of'])
    given = {'none': 'without passages', 'file': 'with the passages of the file',
             'collection': 'with passages retrieved for them'}[report['passages']]
    as_what = {'prompt': ' in the prompt', 'neighbors': ' as neighbors', None: ''}[report['passages_as']]
    return f'{report["data"]}: {chosen} questions, {given}{as_what}, in the template {report["template"]}'


def questions_parts(report, lines, count=12):
    """Parts of a page: the scores, and questions side by side with their passages, the answers, and the gold ones."""
    arms = [arm for arm in ARMS if f'f1_{arm}' in report]
    rows = []
    for name, label in FIGURES.items():
        style = '{:.4f}' if name == 'bpb' else '{:.1%}'
        cells = [f'<td>{figure(report[f"{name}_{arm}"], style)}'
                 f'<small>{interval(report[f"{name}_{arm}_interval"], style)}</small></td>' for arm in arms]
        if len(arms) == 2 and f'{name}_gain' in report:
            bounds = report[f'{name}_gain_interval']
            significance = ', not statistically significant' if holds_zero(bounds) else ''
            cells.append(f'<td>{figure(report[f"{name}_gain"], style)}<small>{interval(bounds, style)}{significance}'
                         f'</small></td>')
        rows.append(f'<tr><th scope="row">{label}</th>{"".join(cells)}</tr>')
    head = ''.join(f'<th scope="col"><i style="background:{COLORS[arm]}"></i>{ARMS[arm]}</th>' for arm in arms)
    head += '<th scope="col">on − off</th>' * (len(arms) == 2)
    notes = ''.join(f'<p>{escape(note)}.</p>' for note in report['notes'])
    return [f'<section class="card">\n<h2>Questions</h2>\n<p class="about">{escape(describe_questions(report))}.</p>\n'
            f'<table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>\n{notes}'
            f'<p class="about">Intervals are bootstrapped over documents, or over questions that name none.</p>'
            f'\n</section>', *(question_card(line, arms) for line in choose_questions(lines, arms, count))]


def choose_questions(lines, arms, count):
    """Up to `count` each of the questions that retrieval helped and hurt most, by F1, and of others, evenly spaced."""
    gains = np.array([line['on']['f1'] - line['off']['f1'] if len(arms) == 2 else 0.0 for line in lines])
    order = np.argsort(-gains, kind='stable')
    others = [i for i in order if gains[i] == 0]
    some = [others[i] for i in np.unique(np.linspace(0, len(others) - 1, min(count, len(others))).astype(int))]
    return [lines[i] for i in [*[i for i in order if gains[i] > 0][:count], *some,
                               *[i for i in order[::-1] if gains[i] < 0][:count]]]


def question_card(line, arms):
    """A question and its passages beside the answers and the gold ones."""
    passages = ''.join(f'<div class="neighbor"><h4>{escape(passage["title"])}</h4><pre>{escape(passage["text"])}</pre>'
                       f'</div>' for passage in line.get('passages', []))
    answers = ''.join(
        f'<h4><span><i style="background:{COLORS[arm]}"></i>{ARMS[arm]}</span>'
        f'<span>F1 {line[arm]["f1"]:.0%}</span></h4>'
        f'<pre>{escape(line[arm]["answer"]) or "∅"}</pre>' for arm in arms)
    golds = '\n'.join(escape(gold) or '∅ (no answer)' for gold in line['answers'])
    return (f'<article class="card question">\n<h3>{escape(line["question"])}<span>{escape(line["id"])}</span></h3>\n'
            f'<div class="columns"><div>{answers}<h4>gold</h4><pre>{golds}</pre></div><div>{passages}</div></div>\n'
            f'</article>')


def svg(plot):
    """An inline SVG of what `plot` draws on the axes. Its fonts are those of the page."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    ink = '#7b8088'  # readable on light and on dark backgrounds
    style = {'svg.fonttype': 'none', 'text.color': ink, 'axes.labelcolor': ink, 'axes.edgecolor': ink,
             'xtick.color': ink, 'ytick.color': ink, 'svg.hashsalt': 'nanoRETRO'}
    with plt.rc_context(style):
        fig, axes = plt.subplots(figsize=(6.4, 4), layout='constrained')
        plot(axes)
        buffer = io.StringIO()
        fig.savefig(buffer, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
        plt.close(fig)
    return '<figure>' + buffer.getvalue()[buffer.getvalue().index('<svg'):] + '</figure>'


def neighbor_rows(passages, retrieved, retriever):
    """{id: row} of the neighbors that the passages were predicted with."""
    if retrieved.hits is None:
        return {}
    hits = retrieved.hits[retrieved.read[[i for _, i in passages]]].ravel()
    ids = np.unique(hits['id'][hits['score'] > -np.inf])
    return retriever.knowledge_base.rows(ids, FIELDS)


def pointer_sources(passages, corpus, retrieved, retriever):
    """
    {(chunk, index in it): where the pointer to this token was found, as text} of the tokens of the passages that had
    one.
    """
    if not retriever.matches:
        return {}
    C = corpus.chunks.shape[1]
    found = {}
    for _, i in passages:
        first = i
        while retrieved.read[first] >= 0:
            first -= 1  # of its document in its sequence
        tokens, doc_ids = corpus.chunks[first:i + 1].reshape(-1).astype(np.int64), corpus.doc_ids[first:i + 1]
        pointers = retriever.point(tokens[None], doc_ids[None])[0]
        for j in range(corpus.lengths[i]):
            place = (i - first) * C + j - 1  # a passage has a chunk before it
            rank = np.flatnonzero((pointers[place, :, 0] == tokens[place + 1]) & (pointers[place, :, 1] > 0))
            length, doc_id, token = (retriever.index.where(tokens, doc_ids, place, retriever.copied) if len(rank)
                                     else (0, 0, 0))
            if length:
                found[i, j] = (int(rank[0]) + 1, length, doc_id, token // C)
    rows = retriever.knowledge_base.rows_at(sorted({source[2:] for source in found.values()}), ['document'])
    return {key: f'pointer {rank}: after {length} equal token{"s" * (length > 1)} in '
                 f'{rows.get((doc_id, position), {}).get("document", "a deleted row")}, chunk {position + 1}'
            for key, (rank, length, doc_id, position) in found.items()}


def passage(kind, i, corpus, nats, retrieved, rows, sources, tokenizer, strongest):
    """One passage: the query chunk, the chunk i after it, tinted, and beside them the neighbors."""
    query = retrieved.read[i]
    gains = nats['off'] - nats['on']  # (N, C)
    chunk = corpus.chunks[i][:corpus.lengths[i]]
    is_hit = retrieved.hits[query]['score'] > -np.inf if retrieved.hits is not None else np.zeros(0, dtype=bool)
    neighbors = [retrieved.tokens[query, k][retrieved.mask[query, k]] for k in np.flatnonzero(is_hit)]
    marked = np.zeros(len(chunk), dtype=bool)
    neighbor_parts = []
    for k, tokens in zip(np.flatnonzero(is_hit), neighbors, strict=True):
        hit = retrieved.hits[query][k]
        row = rows.get(int(hit['id']), dict(document='deleted row', position=0))
        marked |= shared_tokens(chunk, tokens, SHORTEST_SHARED)
        shared = shared_tokens(tokens, chunk, SHORTEST_SHARED)
        C = corpus.chunks.shape[1]
        text = (tokens_as_html(tokens[:C], tokenizer, marked=shared[:C])
                + '<span class="turn" title="start of the neighbor\'s continuation"></span>'
                + tokens_as_html(tokens[C:], tokenizer, marked=shared[C:]))
        score = describe_score(retrieved.mode, hit['score'])
        neighbor_parts.append(f'<div class="neighbor"><h4>{escape(row["document"])}, chunk {row["position"] + 1}'
                              f'<span>{score}</span></h4><pre>{text}</pre></div>')
    notes = [sources.get((i, j), '') for j in range(len(chunk))]
    total = float(gains[i].sum())
    location = f'{escape(corpus.names[corpus.document[i]])}, chunk {corpus.position[i] + 1}'
    return (f'<article class="card passage" data-kind="{kind}" data-gain="{total:.4f}">\n<h3>{location}'
            f'<span>{"helped" if total >= 0 else "hurt"} by {abs(total):.1f} nats</span></h3>\n<div class="columns">'
            f'<div><pre class="text"><span class="before">{tokens_as_html(corpus.chunks[query], tokenizer)}</span>'
            f'{tokens_as_html(chunk, tokenizer, gains[i][:len(chunk)], marked, strongest, notes)}</pre></div>'
            f'<div>{"".join(neighbor_parts)}</div></div>\n</article>')


def tokens_as_html(tokens, tokenizer, gains=None, marked=None, strongest=1.0, notes=None):
    """
    Tokens (n,) as HTML spans. `gains` (n,) in nats tint them, green where retrieval helped and red where it hurt; the
    tint saturates at `strongest` nats. `marked` (n,) bool underlines them. `notes`, n texts, say where a pointer to
    them was found, which has a dot under them.
    """
    spans = []
    for i, text in enumerate(token_texts(tokens, tokenizer)):
        gain = 0.0 if gains is None else float(gains[i])
        strength = min(1.0, abs(gain) / strongest)
        classes = ' '.join(name for name, applies in (('up', gain > 0), ('down', gain < 0),
                                                      ('shared', marked is not None and marked[i]),
                                                      ('pointed', bool(notes and notes[i]))) if applies)
        attributes = f' class="{classes}"' if classes else ''
        if gains is not None:
            note = f', {escape(notes[i])}' if notes and notes[i] else ''
            attributes += f' style="--s:{strength:.2f}" data-gain="{gain:.3f}" title="{gain:+.2f} nats{note}"'
        spans.append(f'<span{attributes}>{escape(text)}</span>' if attributes else escape(text))
    return ''.join(spans)


def token_texts(tokens, tokenizer):
    """
    The text of each of the tokens (n,), which joined are their decoded text. A character split across tokens belongs
    to the first of them.
    """
    texts, pending, start = [''] * len(tokens), b'', 0
    for i, token in enumerate(tokens):
        if token == tokenizer.eot_token:
            texts[i] = '∎'
            continue
        if not pending:
            start = i
        pending += tokenizer.decode_single_token_bytes(int(token))
        try:
            texts[start] = pending.decode()
        except UnicodeDecodeError:
            if len(pending) < 8:
                continue
            texts[start] = pending.decode(errors='replace')
        pending = b''
    if pending:
        texts[start] = pending.decode(errors='replace')
    return texts


def passages_heading(strongest):
    return f'''<section>
<h2>Where retrieval helps</h2>
<p>The faint text is the query chunk; the text after it was predicted with the neighbors retrieved for that chunk. Each
of its tokens is tinted by its loss without retrieval minus its loss with retrieval. Runs of {SHORTEST_SHARED} or more
tokens shared with a neighbor are underlined. Tokens that a pointer named are dotted: hover over them to see where it
was found. ┊ marks the start of a neighbor's continuation, ∎ the end of a
document.</p>
<p class="legend" data-strongest="{strongest:g}"><span class="down" style="--s:1">hurt by {strongest:g} nats or
more</span><span class="down" style="--s:.4"></span><span></span><span class="up" style="--s:.4"></span><span class="up"
style="--s:1">helped by {strongest:g} nats or more</span></p>
<p class="filter" role="group" aria-label="passages">
<button type="button" data-show="all" aria-pressed="true">all</button>
<button type="button" data-show="helped" aria-pressed="false">most helped</button>
<button type="button" data-show="hurt" aria-pressed="false">most hurt</button>
<button type="button" data-show="between" aria-pressed="false">in between</button></p>'''

STYLE = '''
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1d2127;--faint:#6a7079;--line:#dfe3e8;
--up:46,160,67;--down:218,54,51;--accent:#2f7fd6}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--card:#181c22;--ink:#e4e8ed;--faint:#99a1ab;--line:#2c323a;
--up:63,185,80;--down:248,81,73}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0 0 4px}h2{font-size:1.2rem;margin:0 0 8px}section>h2{margin-top:8px}
h3,h4{margin:0 0 8px;font-size:.95rem;display:flex;flex-wrap:wrap;gap:4px 12px;justify-content:space-between;
overflow-wrap:anywhere}
h3 span,h4 span,.about,small{color:var(--faint);font-weight:400}
h4{font-size:.85rem}small{display:block;font-size:.75rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:16px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th[scope=row]{text-align:left;font-weight:400}thead th{font-weight:600}
th i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}
figure{margin:0;min-width:0}figure svg{width:100%;height:auto;max-width:640px}
figure text{font-family:inherit!important}
.plots,.columns{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:16px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.55 ui-monospace,Menlo,Consolas,monospace}
.before,.neighbor pre{color:var(--faint)}
.neighbor+.neighbor{margin-top:12px;padding-top:12px;border-top:1px solid var(--line)}
.up{background:rgba(var(--up),calc(var(--s)*.75))}.down{background:rgba(var(--down),calc(var(--s)*.75))}
.shared{text-decoration:underline;text-decoration-thickness:2px;text-decoration-color:var(--accent);
text-underline-offset:3px}
.question h4{margin:12px 0 4px}.question h4:first-child{margin-top:0}
.question i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}
.pointed{border-bottom:2px dotted var(--accent)}
.neighbor .shared{color:var(--ink)}
.turn{border-left:2px dotted var(--accent);margin:0 2px}
.legend{display:flex;font-size:.8rem}.legend span{padding:2px 10px;min-width:2.5em}
.filter button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:999px;
padding:4px 14px;margin:0 4px 4px 0;cursor:pointer}
.filter button[aria-pressed=true]{background:var(--accent);border-color:var(--accent);color:#fff}
[hidden]{display:none}
@media(max-width:760px){.plots,.columns{grid-template-columns:minmax(0,1fr)}th,td{padding:5px 6px;font-size:.85rem}}
'''

SCRIPT = '''
for (const button of document.querySelectorAll('.filter button')) button.onclick = () => {
  for (const other of document.querySelectorAll('.filter button')) other.setAttribute('aria-pressed', other === button);
  for (const passage of document.querySelectorAll('.passage'))
    passage.hidden = button.dataset.show !== 'all' && passage.dataset.kind !== button.dataset.show;
};
'''
