"""Samples of a model with retrieval on and off, beside what it retrieved: a table for a log."""
from configurator import visible
from generation.engine import Engine, Request
from generation.sources import CollectionSource

COLUMNS = ['prompt', 'on', 'off', 'neighbors']
NEW_TOKENS = 64


def write_samples(model, prompts, tokenizer, context, retriever=None, seed=0):
    """Rows of COLUMNS, one per prompt (B, T), of whole chunks. Random numbers are the engine's own."""
    source = CollectionSource(retriever) if retriever else None
    written = {}
    for arm in ('on', 'off') if retriever else ('off',):
        engine = Engine(model, tokenizer, slots=len(prompts))
        reads = source if arm == 'on' else None
        rows = [engine.add(Request(prompt, NEW_TOKENS, seed=seed, align='start', source=reads))
                for prompt in prompts.tolist()]
        with context:
            texts = {id(row): '' for row in rows}
            for event in engine.run():
                texts[id(event.row)] += event.text
        written[arm] = [(row, texts[id(row)]) for row in rows]
    lines = []
    for number, prompt in enumerate(prompts.tolist()):
        row, text = written.get('on', [(None, '')] * len(prompts))[number]
        passages = {name: passage for first, last, hits in (row.retrieved if row else []) if last <= len(prompt)
                    for name, _, passage, _ in source.passages(hits)}
        line = [tokenizer.decode(prompt), text, written['off'][number][1],
                '\n---\n'.join(f'{name}\n{passage}' for name, passage in passages.items())]
        lines.append([visible(text) for text in line])
    return lines
