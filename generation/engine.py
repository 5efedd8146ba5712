"""
Generates text fast: what the model has computed for earlier tokens is kept, prompts are read in one pass with one
search for all of their chunks, and then each pass adds a token to every sequence, or several where a draft proves
right. Neighbors are searched for when a chunk is complete; pointers are looked up at every token.

    engine = Engine(model, tokenizer)
    row = engine.add(Request(tokenizer.encode_ordinary('import os'), source=CollectionSource(retriever)))
    for event in engine.run():
        print(event.text, end='')

RETRO.generate does the same slowly, and is what the tests compare with. Rows (sequences) may be added at any time;
each has its own chunk boundaries, settings, random numbers and end.

Shapes: B rows of a pass, n tokens of each, C tokens of a chunk, U chunks, N sets of neighbors that are read, of K
neighbors of R tokens. A row's window begins at its token `start`, from which positions count; its chunk grid begins
`padding` tokens before that.
"""
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data.tokenizer import is_token
from generation.own_context import longest_run, own_pointers_at
from generation.sampling import Sampling, TextStream, choose, log_softmax
from model import LONGEST, OWN_POINTERS, NeighborContext, attend, copy_keys, join_heads

DRAFT = 12  # tokens of a draft at most
SHORTEST_RUN = 2  # tokens that a draft must go on from
DRAFT_ROWS = 8  # rows that are drafted for at a time, at most
SCORED = 128  # tokens of a prompt that are scored at a time: their logits take V * 4 bytes each


@dataclass
class Request:
    """What to generate. `source` (sources.py) gives neighbors and pointers; without one, none are read."""
    tokens: list  # the prompt; one token at least
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 1337
    stop: tuple = ()  # strings that end the text, and are no part of it
    align: str = 'prompt'  # a chunk ends where the prompt does; 'start': one begins where it does, as in training
    source: object = None
    drafts: bool = True
    logprobs: int = -1  # report this many of the likeliest tokens beside each; -1: not even its own probability
    scores_prompt: bool = False  # report those of the prompt's tokens, too


@dataclass
class Event:
    """A new token of a row, and the text that it completes: a character may take several tokens."""
    row: 'Row'
    token: int
    text: str
    logprob: float | None = None
    top: list = field(default_factory=list)  # [(token, logprob)], the likeliest first


class Row:
    """A sequence that is being continued."""

    def __init__(self, request, tokenizer, padding):
        self.request, self.padding = request, padding
        self.prompt_size = self.size = len(request.tokens)
        self.buffer = np.array(request.tokens + [0] * (64 + DRAFT), dtype=np.int64)  # the tokens, and room for more
        self.rng = np.random.default_rng(request.seed)
        self.text = TextStream(tokenizer, request.stop)
        self.start = self.done = 0  # the window's first token; those before `done` are in the cache
        self.neighbors = []  # (tokens (K, R), mask (K, R)) of the window's complete chunks
        self.retrieved = []  # (first token, the one after the last, hits (K,) or None) of all chunks that retrieved
        self.prompt_scores = []  # (logprob, top), as an Event has them, of the prompt's tokens from the second on
        self.finish_reason = None  # 'stop', 'length', 'canceled' or 'error'

    @property
    def tokens(self):
        """All tokens, (size,)."""
        return self.buffer[:self.size]

    @property
    def new_tokens(self):
        return self.buffer[self.prompt_size:self.size].tolist()

    def append(self, token):
        if self.size + DRAFT + 1 >= len(self.buffer):
            self.buffer = np.concatenate([self.buffer, np.zeros_like(self.buffer)])
        self.buffer[self.size] = token
        self.size += 1

    def cancel(self):
        self.finish_reason = self.finish_reason or 'canceled'


class Engine:
    """
    Generates with a model for at most `slots` rows at a time; others wait. `seconds` has what the parts of the work
    took, `counts` passes, drafted and accepted tokens. Autocast is on in all of its steps, or in none.
    """

    def __init__(self, model, tokenizer, slots=8):
        self.model, self.config, self.tokenizer, self.slots = model.eval(), model.config, tokenizer, slots
        c = self.config
        self.device = next(model.parameters()).device
        self.waiting, self.rows = deque(), []
        self.allowed = np.array(is_token(tokenizer))
        self.chunk_size = min(c.retrieval_chunk_size, c.block_size)
        self.longest = min(c.retrieval_longest_match, c.retrieval_chunk_size)
        self.cache = [None] * c.n_layer  # keys and values: (2, slots, heads, block_size + 1, d) each
        self.activations = None  # (slots, block_size + 1, D): an encoder reads those of the chunk that retrieved
        self.context = {}  # what the next tokens of each slot read of their neighbors, by name: (slots, ...)
        self.tables = model.pointer_tables() if c.copy_own_context else None
        self.seconds, self.counts = Counter(), Counter()

    def add(self, request):
        """The Row of a Request, which the next steps will continue. ValueError if it cannot be."""
        tokens = request.tokens
        if not tokens or min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            raise ValueError(f'a prompt needs a token, and tokens are below {self.config.vocab_size}')
        if request.max_new_tokens < 1 or isinstance(request.stop, str):
            raise ValueError('max_new_tokens is at least 1, and stop a tuple of strings')
        reads = self.config.has_neighbors and request.source is not None and request.source.has_neighbors
        padding = -len(request.tokens) % self.chunk_size if reads and request.align == 'prompt' else 0
        self.waiting.append(Row(request, self.tokenizer, padding))
        return self.waiting[-1]

    def run(self):
        """Step until all rows have ended. Yields Events."""
        while self.rows or self.waiting:
            yield from self.step()

    @torch.no_grad()
    def step(self):
        """
        Read the prompts that wait, as far as there are slots, or else add tokens to all rows: a list of Events. If a
        source fails, the step can be repeated. FloatingPointError if a row's logits are NaN; that row has ended.
        """
        self._remove_finished()
        for row in [row for row in self.waiting if row.finish_reason]:
            self.waiting.remove(row)
        new = list(self.waiting)[:self.slots - len(self.rows)]
        if new:
            first = len(self.rows)
            for slot, row in enumerate(new, first):
                if row.request.scores_prompt and not row.prompt_scores:
                    row.prompt_scores = self._score_prompt(slot, row)
                self._fit_window(row)
            self._retrieve(new)
            sizes = [row.size - row.start for row in new]
            x = self._forward(first, new, sizes)
            last = torch.tensor(sizes, device=self.device)[:, None, None] - 1
            events = self._choose(first, new, x.gather(1, last.expand(-1, 1, x.shape[2])), [0] * len(new))
            for _ in new:
                self.rows.append(self.waiting.popleft())
        else:
            events = self._advance() if self.rows else []
        self._remove_finished()
        return events

    def _score_prompt(self, slot, row):
        """What the engine would have predicted for the prompt's tokens, window after window: Row.prompt_scores."""
        scores, size = [], row.size
        part = Row(row.request, self.tokenizer, row.padding)
        part.size = end = min(size, self.config.block_size - row.padding)
        while len(scores) < size - 1:
            self._fit_window(part)
            self._retrieve([part])
            x = self._forward(slot, [part], [end - part.start])
            while len(scores) < min(end, size - 1):
                done = len(scores)
                count = min(SCORED, min(end, size - 1) - done)
                part.size = done + 1
                logits = self._predict([part], x[:, done - part.start:][:, :count], [count - 1])[0]
                scores += [score(line, token, row.request.logprobs) for line, token in
                           zip(logits, row.buffer[done + 1:done + 1 + count].tolist(), strict=True)]
            part.size = end = min(size, end + self.chunk_size)
        return scores

    def _advance(self):
        """A pass over all rows."""
        fresh = [(row.padding + row.size - row.start) % self.chunk_size == 0 for row in self.rows]
        self._retrieve(self.rows)
        for slot, row in enumerate(self.rows):
            self._fit_window(row)
            if row.done < row.size - 1:  # the window has moved: all but the newest token are read anew
                self._forward(slot, [row], [row.size - 1 - row.start])
                row.done = row.size - 1
        start = time.perf_counter()
        drafts = [self._draft(row) for row in self.rows]
        self.seconds['drafts'] += time.perf_counter() - start
        x = self._forward(0, self.rows, [1 + draft for draft in drafts], fresh)
        return self._choose(0, self.rows, x, drafts)

    def _remove_finished(self):
        """Free the slots of rows that have ended. The last row takes the place of one that has."""
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].finish_reason is None:
                continue
            last = len(self.rows) - 1
            if slot != last:
                used = self.rows[last].done - self.rows[last].start
                for cache in self.cache:
                    cache[:, slot, :, :used] = cache[:, last, :, :used]
                if self.activations is not None:
                    self.activations[slot, :used] = self.activations[last, :used]
                for tensor in self.context.values():
                    tensor[slot] = tensor[last]
                self.rows[slot] = self.rows[last]
            self.rows.pop()

    def _fit_window(self, row):
        """Let whole chunks leave the row's window, if its tokens do not fit. What remains has to be read anew."""
        excess = row.padding + row.size - row.start - self.config.block_size
        if excess > 0:
            count = math.ceil(excess / self.chunk_size)
            row.start += count * self.chunk_size - row.padding
            row.done, row.padding, row.neighbors = row.start, 0, row.neighbors[count:]

    def _retrieve(self, rows):
        """Search for the neighbors of complete chunks in the rows' windows that have none yet: once for each source."""
        start, C, K = time.perf_counter(), self.chunk_size, self.config.retrieval_k_neighbors
        asked = {}
        for row in rows:
            source = row.request.source
            if self.config.has_neighbors and source is not None and source.has_neighbors:
                numbers = range(len(row.neighbors), (row.padding + row.size - row.start) // C)
                asked.setdefault(id(source), (source, []))[1].extend((row, number) for number in numbers)
        for source, wanted in asked.values():
            if not wanted:
                continue
            texts = np.full((len(wanted), C), -1, dtype=np.int64)
            for text, (row, number) in zip(texts, wanted, strict=True):
                first = row.start - row.padding + number * C
                text[max(0, row.start - first):] = row.buffer[max(row.start, first):first + C]
            tokens, mask, hits = source.retrieve(texts)
            missing = ((0, 0), (0, K - tokens.shape[1]), (0, 0))  # of a source that gives fewer
            tokens, mask = np.pad(tokens, missing), np.pad(mask, missing)
            for i, (row, number) in enumerate(wanted):
                first = row.start - row.padding + number * C
                row.neighbors.append((tokens[i], mask[i]))
                row.retrieved.append((max(row.start, first), first + C, None if hits is None else hits[i]))
        self.seconds['search'] += time.perf_counter() - start

    def _draft(self, row):
        """
        Write a guess at the next tokens behind the row's newest one, into its buffer: what followed the longest run of
        its last tokens, in itself or in its source. The number of tokens.
        """
        room = row.request.max_new_tokens - (row.size - row.prompt_size) - 1
        grid = row.padding + row.size - row.start
        room = min(DRAFT, room, self.config.block_size - grid)
        if self.config.has_neighbors:  # all tokens of a pass read the same neighbors
            room = min(room, self.chunk_size - 1 - grid % self.chunk_size)
        if not row.request.drafts or room <= 0 or len(self.rows) > DRAFT_ROWS:
            return 0
        window = row.buffer[row.start:row.size]
        run, place = longest_run(window)
        guess = window[place:place + room]
        source = row.request.source
        if source is not None:
            longer, found = source.draft(window[-LONGEST:], room)
            if longer > run:
                run, guess = longer, found
        if run < SHORTEST_RUN:
            return 0
        guess = guess[:run]  # the longer the run, the farther it is to be trusted
        row.buffer[row.size:row.size + len(guess)] = guess
        return len(guess)

    def _forward(self, first, rows, counts, fresh=None):
        """
        Final activations (B, n, D) of the next `counts` tokens (B,) of rows in the slots from `first` on. Without
        `fresh` the rows are read from the start of their windows. Otherwise each reads one set of neighbors, the last
        one of those that are `fresh`.
        """
        start, c, model, B, n = time.perf_counter(), self.config, self.model, len(rows), max(counts)
        offset = np.array([row.done - row.start for row in rows])
        place = offset[:, None] + np.arange(n)  # (B, n), from the start of the window
        ids, documents = np.zeros((B, n + 2), dtype=np.int64), np.zeros((B, n + 2), dtype=np.int64)
        own = np.zeros((B, n, OWN_POINTERS, 3), dtype=np.int64)
        for b, row in enumerate(rows):
            before, end = min(2, offset[b]), row.done + counts[b]
            ids[b, 2 - before:2 + counts[b]] = row.buffer[row.done - before:end]
            documents[b, 2 - before:2 + counts[b]] = 1  # there are tokens for the token mix
            if c.copy_own_context:
                own_pointers_at(row.buffer[row.start:end], offset[b], own[b, :counts[b]])
        x = model.transformer.wte(self._tensor(ids))
        x = model.mix_tokens(x, self._tensor(documents))[:, 2:]
        x = x + model.transformer.wpe(self._tensor(np.minimum(place, c.block_size - 1)))
        own, used = self._tensor(own), min(int(offset.max()) + n, c.block_size + 1)
        is_even = (offset == offset[0]).all() and min(counts) == n
        mask = None if is_even and n == 1 else self._tensor(np.arange(used) <= place[..., None])[:, None]
        # of rows that have fewer tokens, the rest is written to the last place
        where = slice(used - n, used) if is_even else self._tensor(
            np.where(np.arange(n) < np.array(counts)[:, None], place, c.block_size))
        slots = slice(first, first + B)
        reading = None
        if c.has_neighbors:
            reading = (self._read_prompts(slots, rows, counts) if fresh is None else
                       self._read_on(slots, rows, counts, fresh))
        for layer, block in enumerate(model.transformer.h):
            # functions in place of modules, whose calls take as long as a token's arithmetic
            qkv = linear(block.attn.c_attn, norm(block.ln_1, x)).view(B, n, 3, c.n_head, -1).permute(2, 0, 3, 1, 4)
            if self.cache[layer] is None:  # one place more, for what is thrown away
                self.cache[layer] = qkv.new_zeros(2, self.slots, c.n_head, c.block_size + 1, qkv.shape[-1])
            write(self.cache[layer][:, slots], where, qkv[1:])
            keys, values = self.cache[layer][:, slots, :, :used]
            y = attend(qkv[0], keys, values, mask)
            x = x + linear(block.attn.c_proj, join_heads(y))
            if block.own is not None:
                x = x + block.own(x, self.tables, own)
            if block.encoder is not None:
                if self.activations is None:
                    self.activations = x.new_zeros(self.slots, c.block_size + 1, c.n_embd)
                write(self.activations[None, slots, None], where, x[None, :, None])
            if block.cca is not None and reading is not None:
                x = x + self._cross(layer, block, x, reading)
            y = F.gelu(linear(block.mlp.c_fc, norm(block.ln_2, x)), approximate='tanh')
            x = x + linear(block.mlp.c_proj, y)
        self.counts['passes'] += 1
        self.seconds['model'] += time.perf_counter() - start
        return model.transformer.ln_f(x)

    def _tensor(self, array):
        return torch.from_numpy(array).to(self.device)

    def _read_prompts(self, slots, rows, counts):
        """The Reading of all neighbors of rows that are read from the start; None if there are none."""
        C, B, n = self.chunk_size, len(rows), max(counts)
        padding = np.array([row.padding for row in rows])
        complete = [min(len(row.neighbors), (row.padding + count) // C)
                    for row, count in zip(rows, counts, strict=True)]
        U = max(complete)
        if U == 0:
            return None
        K, R = next(row.neighbors[0][0].shape for row in rows if row.neighbors)
        tokens, mask = np.zeros((B, U, K, R), dtype=np.int64), np.zeros((B, U, K, R), dtype=bool)
        grid = np.full((B, self.longest + (U + 1) * C), -1, dtype=np.int64)
        for b, row in enumerate(rows):
            for u, found in enumerate(row.neighbors[:complete[b]]):
                tokens[b, u], mask[b, u] = found
            space = grid[b, self.longest + row.padding:]
            window = row.buffer[row.start:row.start + min(counts[b], len(space))]
            space[:len(window)] = window
        # the neighbors of a chunk are read by its last token and the C - 1 after it
        windows = np.lib.stride_tricks.sliding_window_view(grid, self.longest + C, axis=1)[:, C - 1::C][:, :U].copy()
        tokens, mask, windows = (self._tensor(a.reshape(B * U, *a.shape[2:])) for a in (tokens, mask, windows))
        context = self.model.neighbor_context(tokens, mask)
        if self.config.retrieval_copy:
            context = context._replace(matches=self.model.match_neighbors(windows, tokens, mask))
        readers, chunks = (np.arange(first, first + U * C) - padding[:, None] for first in (C - 1, 0))
        read_by = padding[:, None] + np.arange(n) + 1 - C
        last = self._tensor(np.arange(B) * U + np.maximum(complete, 1) - 1)
        self._keep(slots, last, found=context.found, mask=mask, tokens=tokens, keys=context.keys, values=context.values)
        return Reading(context, slots, last, *map(self._tensor, (
            readers.clip(0, n - 1), read_by.clip(0, U * C - 1), (read_by >= 0) & (read_by < U * C),
            chunks.clip(0, n - 1), chunks >= 0)))

    def _read_on(self, slots, rows, counts, fresh):
        """The Reading of the neighbors of the last complete chunk of each row; None if there are none."""
        new = [b for b, (row, is_fresh) in enumerate(zip(rows, fresh, strict=True)) if is_fresh and row.neighbors]
        reading = Reading(None, slots)
        if new:
            tokens, mask = (self._tensor(np.stack([rows[b].neighbors[-1][part] for b in new])) for part in (0, 1))
            tokens = tokens.long()
            context, C = self.model.neighbor_context(tokens, mask), self.chunk_size
            reading.new = torch.tensor(new, device=self.device) + slots.start
            self._keep(reading.new, slice(None), found=context.found, mask=mask, tokens=tokens, keys=context.keys,
                       values=context.values)
            if self.config.has_encoder:
                chunks = np.array([rows[b].done + 1 - C - rows[b].start for b in new])[:, None] + np.arange(C)
                reading.fresh = context
                reading.chunks, reading.is_chunk = self._tensor(chunks.clip(0)), self._tensor(chunks >= 0)
        reads = np.array([len(row.neighbors) > 0 for row in rows])  # others find what an earlier row has left
        if not reads.any():
            return None
        found, mask, keys, values = (self.context[name][slots] if name in self.context else None
                                     for name in ('found', 'mask', 'keys', 'values'))
        context = NeighborContext(found & self._tensor(reads), mask, None, keys, values, None)
        if self.config.retrieval_copy:
            windows = np.full((len(rows), self.longest + max(counts)), -1, dtype=np.int64)
            for b, row in enumerate(rows):
                before = min(self.longest, row.done - row.start)
                windows[b, self.longest - before:self.longest + counts[b]] = row.buffer[
                    row.done - before:row.done + counts[b]]
            matches = self.model.match_neighbors(self._tensor(windows), self.context['tokens'][slots], context.mask)
            context = context._replace(matches=matches)
        reading.context = context
        return reading

    def _keep(self, slots, chosen, **tensors):
        """Keep tensors (N, ...), those that are `chosen`, for the next tokens in the slots."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if name not in self.context:
                self.context[name] = torch.zeros(self.slots, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
            self.context[name][slots] = tensor[chosen]

    def _cross(self, layer, block, x, reading):
        """What the cross-attention of a block adds to x (B, n, D)."""
        (B, _, D), context, attention = x.shape, reading.context, block.cca.attn
        is_prompt = reading.readers is not None
        queries = block.cca.ln(x)
        if is_prompt:
            queries = gather(queries, reading.readers).view(-1, self.chunk_size, D)  # (N, C, D)
        if block.encoder is not None and is_prompt:
            chunks = gather(x, reading.chunks).view(-1, self.chunk_size, D)
            keys = self._encode(block, context, chunks, reading.is_chunk.view(-1, self.chunk_size))
            self._keep(reading.slots, reading.last, keys=keys)
            reading.context = context = context._replace(keys=keys)
        elif block.encoder is not None:
            if reading.fresh is not None:
                chunks = gather(self.activations[reading.new], reading.chunks)
                self._keep(reading.new, slice(None), keys=self._encode(block, reading.fresh, chunks, reading.is_chunk))
            reading.context = context = context._replace(keys=self.context['keys'][reading.slots])
        if block.cca.copies:
            y = attention(queries, context.keys, context.values, context.matches.to(x.dtype))
        else:
            # projected once a chunk, by each block
            names = f'keys of {layer}', f'values of {layer}'
            if is_prompt:
                k, v = attention.keys_values(context.keys)
                self._keep(reading.slots, reading.last, **dict(zip(names, (k, v), strict=True)))
            else:
                if reading.new is not None:
                    self._keep(reading.new, slice(None), **dict(zip(names, attention.keys_values(
                        self.context['keys'][reading.new]), strict=True)))
                k, v = (self.context[name][reading.slots] for name in names)
            mask = context.mask.flatten(1) | ~context.found[:, None]  # no softmax over nothing
            y = attention.read(queries, k, v, mask[:, None, None])
        y = y * context.found[:, None, None]
        return gather(y.view(B, -1, D), reading.read_by) * reading.is_read[..., None] if is_prompt else y

    @staticmethod
    def _encode(block, context, chunks, is_chunk):
        keys = block.encoder(context.embeddings, context.mask, chunks, is_chunk)
        return copy_keys(keys.to(context.values.dtype), context.mask) if block.cca.copies else keys

    def _choose(self, first, rows, x, drafts):
        """
        Add tokens to rows in the slots from `first` on, by activations x (B, n, D) of their newest token and of
        `drafts` (B,) tokens after it.
        """
        logits = self._predict(rows, x, drafts)
        start, events = time.perf_counter(), []
        bad = np.flatnonzero(np.isnan(logits).any((1, 2)))
        for b in bad:
            rows[b].finish_reason = 'error'
            for cache in self.cache:  # a later row would multiply what is left with zero, which NaN survives
                cache[:, first + b] = 0
        if len(bad):
            raise FloatingPointError('the logits are NaN: the weights or the precision are at fault')
        for b, row in enumerate(rows):
            row.done = row.size
            self.counts['drafted'] += drafts[b]
            for j in range(drafts[b] + 1):
                guess = int(row.buffer[row.size]) if j < drafts[b] else -1
                events.append(self._add(row, logits[b, j]))
                if events[-1].token != guess or row.finish_reason:
                    break
                row.done = row.size  # it is in the cache already
                self.counts['accepted'] += 1
        self.seconds['choose'] += time.perf_counter() - start
        return events

    def _predict(self, rows, x, drafts):
        """Logits (B, n, V) of all ids that are tokens; others have -inf."""
        start, n = time.perf_counter(), max(drafts) + 1
        pointing = {}
        for b, row in enumerate(rows):
            source = row.request.source
            is_pointed = self.config.has_pointers and source is not None and source.has_pointers
            pointing.setdefault(id(source) if is_pointed else None, (source, []))[1].append(b)
        logits = np.empty((len(rows), n, len(self.allowed)), dtype=np.float32)
        for key, (source, members) in pointing.items():
            pointers, some = None, x if len(members) == len(rows) else x[members]
            if key is not None:
                tokens = np.full((len(members), LONGEST - 1 + n), self.tokenizer.eot_token, dtype=np.int64)
                for line, b in zip(tokens, members, strict=True):
                    row = rows[b]
                    first = max(row.start, row.size - LONGEST)
                    known = row.buffer[first:row.size + drafts[b]]
                    line[LONGEST - (row.size - first):][:len(known)] = known
                asked = time.perf_counter()
                pointers = self._tensor(source.point(tokens, last=n)).long()
                self.seconds['pointers'] += time.perf_counter() - asked
                start += time.perf_counter() - asked
            found = self.model.predict(some, pointers)[..., :len(self.allowed)]
            logits[members] = found.float().cpu().numpy()
        logits[..., ~self.allowed] = -math.inf
        self.seconds['model'] += time.perf_counter() - start
        return logits

    def _add(self, row, logits):
        """Choose a token by logits (V,), and add it to the row: an Event."""
        request = row.request
        token = choose(logits, request.sampling, row.tokens, row.rng)
        row.append(token)
        event = Event(row, token, '')
        if request.logprobs >= 0:
            event.logprob, event.top = score(logits, token, request.logprobs)
        if token == self.tokenizer.eot_token:
            row.finish_reason = 'stop'
        else:
            event.text = row.text.add(token)
            if row.text.is_stopped:
                row.finish_reason = 'stop'
            elif row.size - row.prompt_size >= request.max_new_tokens:
                row.finish_reason = 'length'
        if row.finish_reason:
            event.text += row.text.end()
        return event


@dataclass
class Reading:
    """Which neighbors the tokens of a pass read: N sets."""
    context: NeighborContext
    slots: slice
    # of prompts, where a row has a set for each of U chunks: N = B * U
    last: torch.Tensor | None = None  # (B,) the set that the next tokens read
    readers: torch.Tensor | None = None  # (B, U * C) the tokens that read them; of others, each row reads its own set
    read_by: torch.Tensor | None = None  # (B, n) each token's place among these
    is_read: torch.Tensor | None = None  # (B, n) it has one
    chunks: torch.Tensor | None = None  # (B, U * C) the tokens of the chunks, or (F, C) of the new sets
    is_chunk: torch.Tensor | None = None  # the same shape: there is a token
    new: torch.Tensor | None = None  # (F,) slots whose set is new, since a chunk has become complete
    fresh: NeighborContext | None = None  # of these, if an encoder has to read them


def score(logits, token, count):
    """By logits (V,): a token's log-probability, and the `count` likeliest tokens with theirs."""
    log_p = log_softmax(logits)
    likeliest = np.argsort(-log_p, kind='stable')[:count].tolist() if count > 0 else []
    return float(log_p[token]), [(t, float(log_p[t])) for t in likeliest]


def write(cache, where, new):
    """Write new (2, B, heads, n, d) into a cache (2, B, heads, S, d), at places that are a slice or (B, n)."""
    if isinstance(where, slice):
        cache[:, :, :, where] = new
    else:
        rows = torch.arange(cache.shape[1], device=cache.device)[:, None]
        cache.transpose(2, 3)[:, rows, where] = new.transpose(2, 3)


def linear(module, x):
    return F.linear(x, module.weight, module.bias)


def norm(module, x):
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def gather(x, places):
    """x (B, n, D) at places (B, m): (B, m, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
