"""
The engine: what it computes with caches is what RETRO.generate computes anew for every token. Tiny models with large
random weights, so that whatever should reach a logit does.
"""
import itertools
from contextlib import closing

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError, load_settings
from data.tokenizer import load_tokenizer
from generation.engine import Engine, Request
from generation.own_context import longest_run, own_pointers_at
from generation.sampling import Sampling, TextStream, choose
from generation.sources import CollectionSource, PassageSource
from model import RETRO, RETROConfig, own_pointers
from retrieval.retriever import Retriever

V, C, K, P, BLOCK = 257, 16, 2, 4, 64
GREEDY = Sampling(temperature=0)
OPTIONS = [dict(), dict(retrieval_pointers=0), dict(use_retrieval=False), dict(retrieval_k_neighbors=0),
           dict(token_mix=False), dict(copy_own_context=False), dict(retrieval_copy=False, retrieval_encoder_layers=1),
           dict(retrieval_encoder_layers=1), dict(bias=True, retrieval_longest_match=0),
           dict(retrieval_copy=False, retrieval_encoder_layers=2, token_mix=False, copy_own_context=False)]
LENGTHS = [1, 2, C - 1, C, C + 1, 50, BLOCK - 1, BLOCK + 1, 150]


BYTES = tiktoken.Encoding('bytes', pat_str='.|\\n', mergeable_ranks={bytes([i]): i for i in range(256)},
                          special_tokens={'<|endoftext|>': 256})


class Source:
    """Neighbors and pointers that depend on all of a chunk's tokens, or on a token and the one before it."""

    def __init__(self, config, has_neighbors=True):
        self.has_neighbors, self.has_pointers = config.has_neighbors and has_neighbors, config.has_pointers
        self.searches = 0

    def retrieve(self, chunks):
        self.searches += 1
        tokens, mask = np.zeros((2, len(chunks), K, 2 * C), dtype=np.int64)
        for chunk, found, is_token in zip(chunks, tokens, mask, strict=True):
            rng = np.random.default_rng(chunk.astype(np.uint64))
            found[:] = rng.integers(V - 1, size=found.shape)
            real = chunk[chunk >= 0]
            found[:, :len(real)] = real
            for k in range(rng.integers(K + 1)):  # none, one or two
                is_token[k, :rng.integers(C, 2 * C + 1)] = 1
        return tokens, mask.astype(bool), [None] * len(chunks)

    def point(self, tokens, last=None):
        previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))[..., None]
        previous = np.where(previous == V - 1, 0, previous)  # what precedes a text is another document
        named = (tokens[..., None] * 7 + np.arange(P) * 3 + 1) % V
        pointers = np.stack([named, (named + previous) % 17, (named * previous) % 120], axis=-1)
        return pointers if last is None else pointers[:, -last:]

    def draft(self, tokens, count):
        return 0, tokens[:0]


def make(seed=1, **options):
    torch.manual_seed(seed)
    shape = dict(block_size=BLOCK, vocab_size=V, n_layer=3, n_head=2, n_embd=32, retrieval_layers=[2, 3],
                 retrieval_chunk_size=C, retrieval_k_neighbors=K, retrieval_pointers=P)
    model = RETRO(RETROConfig(**shape | options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def prompt(length, seed=5):
    return np.random.default_rng((seed, length)).integers(30, size=length).tolist()  # with repetitions


def generate_slowly(model, tokens, count, align, monkeypatch):
    """RETRO.generate: the new tokens, and their log-probabilities (n, V)."""
    config, source, found = model.config, Source(model.config), []
    padding = -len(tokens) % C if align == 'prompt' and config.has_neighbors else 0
    predict = model.predict
    monkeypatch.setattr(model, 'predict', lambda *given: found.append(predict(*given)) or found[-1])

    def retrieve(chunks):
        return tuple(torch.from_numpy(a)[:, None] for a in source.retrieve(chunks[:, 0].numpy())[:2])

    new = model.generate(torch.tensor([[0] * padding + tokens]), count, retrieve if config.has_neighbors else None,
                         (lambda t: torch.from_numpy(source.point(t.numpy()))) if config.has_pointers else None,
                         temperature=0, end_of_text=V - 1, padding=padding)[0, padding + len(tokens):]
    monkeypatch.undo()
    return new.tolist(), torch.cat(found)[:, 0].log_softmax(-1).detach().numpy()


def run(engine, rows):
    """By row, its Events."""
    events = {id(row): [] for row in rows}
    for event in engine.run():
        events[id(event.row)].append(event)
    return [events[id(row)] for row in rows]


def by_token(event):
    """Log-probabilities (V,) of an event that reports all of them."""
    found = np.empty(V)
    for token, log_p in event.top:
        found[token] = log_p
    return found


@pytest.mark.parametrize('align', ['start', 'prompt'])
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_cached_logits_are_those_of_the_full_forward_at_every_position(options, align, monkeypatch):
    """Prompts of all lengths in batches of three that change as rows end, past the end of the window."""
    model = make(**options)
    engine, source = Engine(model, BYTES, slots=3), Source(model.config)
    rows = [engine.add(Request(prompt(n), BLOCK // 2, GREEDY, align=align, source=source, logprobs=V))
            for n in LENGTHS]
    for row, events in zip(rows, run(engine, rows), strict=True):
        tokens, logits = generate_slowly(model, row.request.tokens, BLOCK // 2, align, monkeypatch)
        assert row.new_tokens == tokens
        np.testing.assert_allclose([by_token(event) for event in events], logits, atol=1e-4)


@pytest.mark.parametrize('align', ['start', 'prompt'])
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_a_prompts_scores_are_what_its_tokens_would_have_been_written_with(options, align):
    """Prompts in one window and in several, of which some tokens were written before."""
    model = make(**options)
    engine, source = Engine(model, BYTES, slots=2), Source(model.config)
    engine.allowed[BYTES.eot_token] = False  # no text ends early
    written = [engine.add(Request(prompt(n), BLOCK, GREEDY, align=align, source=source, logprobs=0))
               for n in (C, 2 * C)]
    logprobs = [[event.logprob for event in events] for events in run(engine, written)]
    scored = [engine.add(Request(row.tokens[:C * (row.size // C)].tolist(), 1, GREEDY, align=align, source=source,
                                 logprobs=0, scores_prompt=True)) for row in written]
    run(engine, scored)
    for row, before, expected in zip(scored, written, logprobs, strict=True):
        scores = [logprob for logprob, _ in row.prompt_scores]
        assert len(scores) == row.prompt_size - 1 and row.prompt_size > BLOCK
        count = row.prompt_size - before.prompt_size
        np.testing.assert_allclose(scores[-count:], expected[:count], atol=1e-4)


@pytest.mark.parametrize('sampling', [GREEDY, Sampling(temperature=1.0, top_k=0), Sampling(1.3, 0.7, 20, 0.9, 0.01)],
                         ids=['greedy', 'all', 'filtered'])
@pytest.mark.parametrize('options', [dict(), dict(retrieval_k_neighbors=0), dict(use_retrieval=False)], ids=str)
def test_drafts_change_no_token_and_save_passes(options, sampling):
    """Drafts that are right, wrong and right in part; also of sampled text, so its distribution is kept."""
    model = make(**options)

    class Drafts(Source):
        def draft(self, tokens, count):
            return 9, np.array(expected[0][drawn[0]:][:count // 2] + [3] * (count - count // 2))

    def new_tokens(source, drafts):
        engine, drawn[0] = Engine(model, BYTES, slots=2), 0
        rows = [engine.add(Request(prompt(n), 150, sampling, source=source, drafts=drafts)) for n in (20, 31)]
        for event in engine.run():
            drawn[0] += event.row is rows[0]
        return [row.new_tokens for row in rows], engine.counts

    drawn, expected = [0], [[]]
    expected, _ = new_tokens(Source(model.config), False)
    found, counts = new_tokens(Drafts(model.config), True)
    assert found == expected and len(found[0]) > 5
    assert counts['accepted'] > 0 and counts['drafted'] > counts['accepted']


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch():
    model = make()
    source = Source(model.config)

    def text(others, slots):
        engine = Engine(model, BYTES, slots=slots)
        for n in others:
            engine.add(Request(prompt(n, 8), n, Sampling(), seed=n, source=source if n % 2 else None))
        row = engine.add(Request(prompt(20), 100, Sampling(temperature=1.0), seed=3, source=source))
        list(engine.run())
        return row.new_tokens

    assert text([], 1) == text([5, 40, 41, 90], 3) == text([33], 8)


def test_a_prompt_is_read_in_one_pass_with_one_search_and_then_a_token_at_a_time(monkeypatch):
    """Whatever attends: no matrix is applied to more than one position of a later pass."""
    model = make()
    source, seen = Source(model.config), []
    engine = Engine(model, BYTES, slots=2)
    linear = torch.nn.functional.linear
    monkeypatch.setattr('torch.nn.functional.linear', lambda x, *rest: seen.append(x.shape[1]) or linear(x, *rest))
    for n in (40, 50):
        engine.add(Request(prompt(n), 12, GREEDY, align='start', source=source, drafts=False))
    engine.step()
    assert source.searches == 1 and engine.counts['passes'] == 1 and max(seen) >= 40
    seen.clear()
    for _ in range(5):
        engine.step()
    assert engine.counts['passes'] == 6 and max(seen) == 3  # of the token mix, which reads the two tokens before


def test_rows_that_end_or_are_canceled_free_their_slots_and_leave_the_others_as_they_were():
    model = make()
    source = Source(model.config)
    engine = Engine(model, BYTES, slots=4)
    alone = engine.add(Request(prompt(33), 60, GREEDY, source=source))
    third = engine.add(Request(prompt(50), 60, GREEDY, source=source))
    list(engine.run())
    rows = [engine.add(Request(prompt(n), 60, GREEDY, source=source)) for n in (5, 33, 50, 12)]
    for _ in range(10):
        engine.step()
    rows[0].cancel()
    rows[3].cancel()
    engine.step()
    assert engine.rows == [rows[2], rows[1]] or engine.rows == [rows[1], rows[2]]
    list(engine.run())
    assert rows[1].new_tokens == alone.new_tokens and rows[0].finish_reason == 'canceled'
    assert rows[2].new_tokens == third.new_tokens


def test_a_source_that_fails_leaves_the_rows_as_they_were():
    model = make()

    class Fails(Source):
        calls = 0

        def retrieve(self, chunks):
            self.calls += 1
            if self.calls % 2:
                raise ConnectionError('away')
            return super().retrieve(chunks)

        def point(self, tokens, last=None):
            self.calls += 1
            if self.calls % 3 == 0:
                raise ConnectionError('away')
            return super().point(tokens, last)

    engine = Engine(model, BYTES)
    engine.allowed[V - 1] = False  # none ends early
    expected = [engine.add(Request(prompt(n), 60, GREEDY, source=Source(model.config))) for n in (20, 31)]
    list(engine.run())
    rows = [engine.add(Request(prompt(20), 60, GREEDY, source=Fails(model.config))),
            engine.add(Request(prompt(31), 60, GREEDY, source=Source(model.config)))]
    failures = 0
    while engine.rows or engine.waiting:
        try:
            engine.step()
        except ConnectionError:
            failures += 1
    assert failures > 10 and [row.new_tokens for row in rows] == [row.new_tokens for row in expected]
    assert [len(row.retrieved) for row in rows] == [len(row.retrieved) for row in expected]


def test_a_row_reads_nothing_of_what_an_earlier_one_in_its_slot_has_left(monkeypatch):
    """Neither without a source, nor before its first chunk is complete."""
    model = make()
    source = Source(model.config)
    engine = Engine(model, BYTES, slots=2)
    engine.allowed[V - 1] = False
    for _ in range(2):
        engine.add(Request(prompt(40), 5, GREEDY, source=source))
    list(engine.run())
    kept = engine.add(Request(prompt(40), 30, GREEDY, source=source))
    rows = [engine.add(Request(prompt(n), 10, GREEDY, align='start', source=s, logprobs=V))
            for n, s in ((20, None), (5, source))]
    events = run(engine, [kept, *rows])[1:]
    for row, found in zip(rows, events, strict=True):
        alone = Engine(model, BYTES, slots=1)
        alone.allowed[V - 1] = False
        expected = alone.add(Request(row.request.tokens, 10, GREEDY, align='start', source=row.request.source,
                                     logprobs=V))
        for ours, theirs in zip(found, run(alone, [expected])[0], strict=True):
            np.testing.assert_allclose(by_token(ours)[:V - 1], by_token(theirs)[:V - 1], atol=1e-4)


@pytest.mark.parametrize('block, chunk, options', [(16, 16, {}), (24, 64, dict(use_retrieval=False))])
def test_a_window_of_one_chunk_or_less_slides(block, chunk, options, monkeypatch):
    model = make(block_size=block, retrieval_chunk_size=chunk, **options)
    monkeypatch.setattr('tests.test_engine.C', chunk)
    engine = Engine(model, BYTES)
    row = engine.add(Request(prompt(20), 40, GREEDY, align='start', source=Source(model.config), logprobs=V))
    events, = run(engine, [row])
    tokens, logits = generate_slowly(model, row.request.tokens, 40, 'start', monkeypatch)
    assert row.new_tokens == tokens
    np.testing.assert_allclose([by_token(event) for event in events], logits, atol=1e-4)


def test_a_source_may_give_fewer_neighbors_than_the_model_reads():
    model = make()

    class One(Source):
        def retrieve(self, chunks):
            tokens, mask, hits = super().retrieve(chunks)
            mask[:, 1] = False
            return tokens[:, :self.K], mask[:, :self.K], hits

    new = []
    for count in (1, 2):
        engine, source = Engine(model, BYTES), One(model.config)
        source.K = count
        row = engine.add(Request(prompt(40), 30, GREEDY, source=source))
        list(engine.run())
        new.append(row.new_tokens)
    assert new[0] == new[1]


def test_logits_that_are_nan_end_their_row_alone_and_leave_nothing_in_its_slot():
    model = make()
    source = Source(model.config)
    engine = Engine(model, BYTES, slots=2)
    engine.allowed[V - 1] = False
    rows = [engine.add(Request(prompt(n), 20, GREEDY, source=source)) for n in (20, 21)]
    engine.step()
    engine.cache[1][:, 1] = torch.nan
    with pytest.raises(FloatingPointError, match='the logits are NaN'):
        engine.step()
    assert rows[1].finish_reason == 'error'
    late = engine.add(Request(prompt(21), 20, GREEDY, source=source))
    list(engine.run())
    assert len(rows[0].new_tokens) == len(late.new_tokens) == 20 and late.new_tokens[0] == rows[1].new_tokens[0]


@pytest.mark.parametrize('given', [dict(tokens=[]), dict(tokens=[V]), dict(tokens=[-1]), dict(max_new_tokens=0),
                                   dict(stop='END')], ids=str)
def test_a_request_that_cannot_be_met_is_refused_and_keeps_no_other_from_it(given):
    engine = Engine(make(), BYTES)
    with pytest.raises(ValueError):
        engine.add(Request(**{'tokens': [1], **given}))
    engine.add(Request([1], 3))
    assert 1 <= len(list(engine.run())) <= 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 59))
def test_own_pointers_of_one_position_are_those_of_all_positions(tokens, first):
    first = min(first, len(tokens) - 1)
    found = np.zeros((len(tokens) - first, 8, 3), dtype=np.int64)
    own_pointers_at(np.array(tokens), first, found)
    expected = own_pointers(torch.tensor([tokens]))[0, first:].numpy()
    for ours, theirs in zip(found, expected, strict=True):  # in any order
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=50))
def test_the_longest_run_is_that_of_a_brute_force_search(tokens):
    longest, place = longest_run(np.array(tokens))
    runs = {j: next(n for n in itertools.count() if n > j or tokens[j - n] != tokens[len(tokens) - 1 - n])
            for j in range(len(tokens) - 1)}
    assert longest == max(runs.values(), default=0)
    if longest:
        assert place == max(j for j, n in runs.items() if n == longest) + 1


def test_characters_come_whole_and_text_that_may_be_a_stop_string_is_held_back():
    stream = TextStream(BYTES, stop=['END', '---'])
    shown = [stream.add(byte) for byte in 'ä€🙂 EN.--E'.encode()]
    assert shown[:3] == ['', 'ä', ''] and ''.join(shown) == 'ä€🙂 EN.--' and stream.held == 'E'
    assert ''.join(stream.add(byte) for byte in b'ND!') == '' and stream.is_stopped and stream.end() == ''
    stream = TextStream(BYTES, stop=['END'])
    assert stream.add(ord('E')) == '' and stream.end() == 'E'
    assert TextStream(BYTES).add(0xff) == '\ufffd'  # no UTF-8 at all


def test_sampling_filters_keep_what_they_say():
    logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], dtype=np.float32))
    def kept(sampling, seen=()):
        rng = np.random.default_rng(0)
        return {choose(logits, sampling, np.array(seen, dtype=np.int64), rng) for _ in range(400)}
    plain = dict(temperature=1.0, top_k=0)
    assert kept(Sampling(**plain)) == {0, 1, 2, 3, 4}
    assert kept(Sampling(temperature=1.0, top_k=2)) == {0, 1}
    assert kept(Sampling(**plain, top_p=0.6)) == {0, 1} and kept(Sampling(**plain, top_p=0.5)) == {0}
    assert kept(Sampling(**plain, min_p=0.25)) == {0, 1, 2}
    assert kept(Sampling(temperature=1e-6)) == kept(GREEDY) == {0}
    assert kept(Sampling(repetition_penalty=9.0, temperature=0), seen=[0, 0]) == {1}
    penalized = Sampling(repetition_penalty=9.0, temperature=0)  # of log-probabilities and of logits alike
    for shift in (-9, 0, 9):
        assert choose(logits + np.float32(shift), penalized, np.array([0]), None) == 1
    rng = np.random.default_rng(1)
    counts = np.bincount([choose(logits, Sampling(**plain), np.array([]), rng) for _ in range(20000)]) / 20000
    np.testing.assert_allclose(counts, np.exp(logits), atol=0.015)


def test_passages_of_ones_own_are_read_in_place_of_the_collections():
    """As neighbors of every chunk, and as what pointers and drafts are found in."""
    config = make().config
    source = PassageSource(config, BYTES, ['the cat sat on the mat', 'xyz' * 30])
    tokens, mask, hits = source.retrieve(np.zeros((3, C), dtype=np.int64))
    assert tokens.shape == mask.shape == (3, K, 2 * C) and hits == [None] * 3
    assert bytes(tokens[2, 0][mask[2, 0]].tolist()) == b'the cat sat on the mat' and mask[0, 1].all()
    assert source.cut == [1]
    pointers = source.point(np.array([list(b'he sat on')]))[0, -1]
    assert pointers[0, 0] == ord(' ') and pointers[0, 1] == 7  # ' sat on', with the longest run
    length, following = source.draft(np.array(list(b'a cat s')), 5)
    assert length == 6 and bytes(following.tolist()) == b'at on'
    assert bytes(source.draft(np.array(list(b'the m')), 9)[1].tolist()) == b'at'
    with pytest.raises(UserError, match="3 passages are given, and the model reads 2 .*leave out 'third'"):
        PassageSource(config, BYTES, ['a', 'b', 'third'])
    with pytest.raises(UserError, match='passage 2 is empty'):
        PassageSource(config, BYTES, ['a', ''])
    with pytest.raises(UserError, match='is a GPT, which reads none'):
        PassageSource(make(use_retrieval=False).config, BYTES, ['a'])


def test_with_a_real_collection_the_text_is_that_of_the_slow_reference(populated, monkeypatch):
    monkeypatch.chdir(populated)
    run_settings = load_settings(['config.py'])
    tokenizer = load_tokenizer('tokenizer.json')
    torch.manual_seed(0)
    model = RETRO(RETROConfig.from_settings(run_settings, tokenizer.n_vocab)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    start = tokenizer.encode_ordinary('import textwrap\n\ndef wrap(text):\n    return textwrap.fill(text)\n')
    with closing(Retriever(run_settings, tokenizer)) as retriever:
        engine = Engine(model, tokenizer, slots=1)
        row = engine.add(Request(start, 80, GREEDY, align='start', source=CollectionSource(retriever)))
        list(engine.run())

        def retrieve(chunks):
            return retriever.retrieve_for_text(chunks.numpy()).to('cpu')

        expected = model.generate(torch.tensor([start]), 80, retrieve,
                                  lambda tokens: torch.from_numpy(retriever.point(tokens.numpy())).long(), 0,
                                  end_of_text=tokenizer.eot_token, allowed=torch.from_numpy(engine.allowed))
        assert row.new_tokens == expected[0, len(start):].tolist()
        first, last, hits = row.retrieved[0]
        passages = row.request.source.passages(hits)
        assert (first, last) == (0, 16) and passages
        assert all('chunk' in name and -1 <= similarity < 1.001 and text for name, similarity, text, _ in passages)
