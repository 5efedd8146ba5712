"""The exact-match index: equal to brute force, of the collection's revision alone, without leaks, whole."""
import json
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import UserError
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer
from retrieval import match_index
from retrieval.local_server import Unreachable
from retrieval.match_index import Documents, MatchIndex, Segment, hash_of, index_documents, run_lengths
from retrieval.retriever import Retriever
from retrieval.suffix_array import DEPTH, LEAST_SHARE, NOVELTY, OCTAVE
from retrieval.waiting import RetrievalTimeout
from tests.conftest import CHUNK, open_all, run

END = 0  # end-of-text of the random texts


def make_documents(rng, count, vocabulary, longest=60, first_id=0):
    """Random documents of tokens 1 to vocabulary, some of which share long runs."""
    texts = []
    for _ in range(count):
        text = rng.integers(1, vocabulary + 1, rng.integers(1, longest)).astype(np.uint16)
        if texts and rng.random() < 0.5:  # a run of another one
            other = texts[rng.integers(len(texts))][:-1]
            text = np.concatenate([text, other[rng.integers(len(other)):][:40]])
        texts.append(np.append(text, END).astype(np.uint16))
    doc_ids = np.arange(first_id, first_id + count, dtype=np.int64) * 3 - 20
    return Documents(doc_ids, np.array([hash_of(text) for text in texts]), texts)


class InMemory(MatchIndex):
    """An index of Documents, each list of them a segment, without a collection."""

    def __init__(self, *parts, vocab_size=100, masked=()):
        super().__init__('', END, vocab_size)
        for part in parts:
            segment = Segment.__new__(Segment)
            vars(segment).update(index_documents(part, END, self.token_type), masked=[],
                                 is_masked=np.isin(part.doc_ids, masked))
            self.segments.append(segment)


def brute_force(parts, context, excluded):
    """[(length, next token)] of all places where the last tokens of `context` stand, longest first."""
    found = []
    for part in parts:
        for doc_id, text in zip(part.doc_ids.tolist(), part.texts, strict=True):
            for place in range(len(text) - 1 if doc_id not in excluded else 0):
                n = 0
                while n < min(DEPTH, len(context), place + 1) and text[place - n] == context[-1 - n] != END:
                    n += 1
                if n:
                    found.append((n, int(text[place + 1])))
    return sorted(found, key=lambda match: -match[0])


def back_off(matches):
    """{token: (longest, share)}, by the recursion of Witten and Bell from the shortest matches to the longest."""
    shares = dict.fromkeys((token for _, token in matches), 0.0)
    for n in range(1, DEPTH + 1):
        counts = Counter(token for length, token in matches if length >= n)
        if counts:
            other = NOVELTY * len(counts)
            shares = {token: (counts[token] + other * share) / (counts.total() + other)
                      for token, share in shares.items()}
    return {token: (max(length for length, t in matches if t == token), share) for token, share in shares.items()}


def check_pointers(pointers, matches, count):
    expected, present = back_off(matches), [p for p in pointers.tolist() if p[1]]
    assert len(present) == min(count, len(expected)) == len({token for token, _, _ in present})
    assert sum(share for _, share in expected.values()) < 1 + 1e-9
    shares = [expected[token][1] for token, _, _ in present]
    assert shares == pytest.approx(sorted((share for _, share in expected.values()), reverse=True)[:len(present)])
    for (token, length, told), share in zip(present, shares, strict=True):
        assert length == expected[token][0]
        assert abs(min(LEAST_SHARE, -OCTAVE * np.log2(share)) - told) < 0.501


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 3), st.integers(1, 6))
@hypothesis_settings(max_examples=60, deadline=None)
def test_look_ups_equal_brute_force_on_random_text(seed, vocabulary, segments, count):
    rng, C = np.random.default_rng(seed), 8
    parts = [make_documents(rng, int(rng.integers(1, 8)), vocabulary, first_id=10 * i) for i in range(segments)]
    masked = parts[-1].doc_ids[:1].tolist() if rng.random() < 0.3 else []
    index = InMemory(*parts, masked=masked)
    known = [doc_id for part in parts for doc_id in part.doc_ids]
    doc_ids = np.array([sorted(rng.choice([*known, 999], 2)) for _ in range(2)]).repeat(2, axis=1)  # (2, 4)
    tokens = rng.integers(0, vocabulary + 1, (2, 4 * C))
    tokens[1, :30] = np.resize(parts[0].texts[0], 30)  # long matches
    match_index.PLACES = 4096
    try:
        pointers = index.find(tokens, doc_ids, count)
    finally:
        match_index.PLACES = 256
    for b, t in np.ndindex(*tokens.shape):
        start = max([t // C * C if doc_ids[b, t // C] != doc_ids[b, max(0, t // C - 1)] else 0,
                     2 * C if t >= 2 * C and doc_ids[b, 1] != doc_ids[b, 2] else 0,
                     *(np.flatnonzero(tokens[b, :t] == END) + 1)])
        matches = brute_force(parts, tokens[b, start:t + 1], {*doc_ids[b].tolist(), *masked})
        check_pointers(pointers[b, t], matches, count)


@given(st.integers(0, 2**31), st.integers(1, 3))
@hypothesis_settings(max_examples=20, deadline=None)
def test_where_there_are_more_places_the_longest_are_counted(seed, segments):
    rng = np.random.default_rng(seed)
    parts = [make_documents(rng, 6, 3, first_id=10 * i) for i in range(segments)]
    index, tokens = InMemory(*parts), rng.integers(1, 4, (1, 32))
    match_index.PLACES = 5
    try:
        pointers = index.find(tokens, np.full((1, 4), 999), 3)
    finally:
        match_index.PLACES = 256
    for t in range(32):
        lengths = [length for length, _ in brute_force(parts, tokens[0, :t + 1], {999})[:5]]
        assert pointers[0, t, :, 1].max() == lengths[0]
        assert set(pointers[0, t, :, 1].tolist()) - {0} <= set(lengths)


def test_tokens_above_65536_are_told_apart():
    text = np.array([70_001, 70_002, 70_003, 4_467, END], dtype=np.uint32)  # 70,003 - 65,536 = 4,467
    index = InMemory(Documents(np.array([5]), np.array([1]), [text]), vocab_size=100_000)
    pointers = index.find(np.array([[70_001, 70_002, 4_467, 70_003]]), np.array([[0]]), 2)[0, :, 0]
    assert pointers[:, :2].tolist() == [[70_002, 1], [70_003, 2], [0, 1], [4_467, 1]]


def test_copies_of_the_passage_are_left_out_if_they_are_as_long_as_asked_for():
    rng = np.random.default_rng(0)
    text = rng.integers(1, 50, 60)
    documents = [np.append(np.concatenate([rng.integers(50, 90, 9), text[a:b], rng.integers(50, 90, 9)]), END)
                 for a, b in ((0, 60), (10, 50), (20, 45))]  # copies of 60, 40 and 25 tokens
    index = InMemory(Documents(np.arange(3), np.arange(3), [d.astype(np.uint16) for d in documents]))
    for copied, left in ((61, 60), (60, 40), (41, 40), (40, 25), (25, 0), (0, 60)):
        pointers = index.find(text[None], np.array([[9]]), 60, copied)[0]
        is_named = ((pointers[:-1, :, 0] == text[1:, None]) & (pointers[:-1, :, 1] > 0)).any(-1)
        copies = {60: range(59), 40: range(10, 49), 25: range(20, 44), 0: range(0)}[left]
        assert is_named[copies].all()
        outside = [t for t in range(59) if t not in copies and t - 1 not in copies]
        assert pointers[outside, :, 1].max(initial=0) < 5  # chance alone


def test_nothing_is_named_where_tokens_are_missing_and_chunks_stay_where_they_are(settings, retriever):
    kb, C = retriever.knowledge_base, CHUNK
    vector = retriever.embedder.embed(['x'])[0]
    tokens = list(range(100, 100 + 8 * C))

    def row(number, doc_id, position, continued):
        return dict(id=number, doc_id=doc_id, position=position, document='gaps', text='x', embedding=vector,
                    tokens=tokens[position * C:(position + 1 + continued) * C])
    # chunks 0, 3 and 4 are no rows of the first document, and the last one of the second
    kb.upsert([row(1, 5, 1, True), row(2, 5, 2, True), row(3, 5, 5, True), row(4, 5, 6, False), row(5, 6, 0, False)])
    kb.flush()
    end = retriever.tokenizer.eot_token
    for first, last in ((C, 4 * C), (5 * C, 7 * C), (0, C)):
        query = np.array(tokens[first:last + 1])
        pointers = retriever.point(query[None, :last - first])[0]
        for t in range(DEPTH, last - first - 1):
            assert pointers[t, 0, :2].tolist() == [query[t + 1], DEPTH]
            length, doc_id, place = retriever.index.where(query, np.array([0]), t)
            assert length == DEPTH and place == first + t + 1 and doc_id in (5, 6)
        assert end not in pointers[-1, pointers[-1, :, 1] > 1, 0]


def test_run_lengths_begin_anew_at_each_document_and_after_an_end_of_text():
    tokens = np.array([[1, 1, 1, 1, 1, 1, END, 2]])
    assert run_lengths(tokens, np.array([[7, 7, 8, 8]]), END).tolist() == [[1, 2, 3, 4, 1, 2, 0, 1]]


@pytest.fixture
def tokenizer(settings):
    return load_tokenizer(settings.tokenizer)


@pytest.fixture
def retriever(settings, tokenizer):
    made = Retriever(settings, tokenizer, say=lambda text: None)
    yield made
    made.close()


@pytest.fixture
def batch(settings):
    return next(SequenceStream(open_all(settings), settings.block_size, settings.batch_size))


def is_fresh(pointers, retriever, batch, tmp_path):
    """
    Whether an index that is built from nothing answers the same, but for positions with more matches than are counted.
    """
    index = MatchIndex(str(tmp_path / 'fresh'), retriever.tokenizer.eot_token, retriever.tokenizer.n_vocab,
                       say=lambda text: None)
    index.follow(retriever.knowledge_base)
    run = run_lengths(batch.tokens, batch.doc_ids, retriever.tokenizer.eot_token)
    lengths, _, _ = index.segments[0].places(batch.tokens, batch.doc_ids, run, index.end_of_text)
    is_counted = (lengths == 0).any(-1)
    found = index.find(batch.tokens, batch.doc_ids, retriever.num_pointers)
    shutil.rmtree(tmp_path / 'fresh')
    assert is_counted.mean() > 0.3 and found.any()
    return (found == pointers)[is_counted].all()


def test_look_ups_in_a_collection_equal_brute_force_over_the_documents(settings, retriever, batch):
    dataset, = open_all(settings)
    texts = {int(chunks.doc_ids[0]): chunks.tokens.reshape(-1)[:chunks.lengths.sum()] for chunks in dataset.documents()}
    part = Documents(np.array([*texts]), None, [*texts.values()])
    pointers = retriever.point(batch.tokens, batch.doc_ids)
    start = np.array([[max(u for u in range(t // CHUNK + 1) if u == 0 or line[u] != line[u - 1]) * CHUNK
                       for t in range(batch.tokens.shape[1])] for line in batch.doc_ids])
    checked = 0
    for b, t in np.ndindex(*batch.tokens.shape):
        if t % 5 or batch.tokens[b, t] == retriever.tokenizer.eot_token:
            continue
        context = batch.tokens[b, start[b, t]:t + 1]
        matches = brute_force([part], context, set(batch.doc_ids[b].tolist()))
        if len(matches) < 256:  # else which of equally long ones are counted is not defined by the texts
            check_pointers(pointers[b, t], matches, retriever.num_pointers)
            checked += 1
    assert checked > 20


def test_no_pointer_is_into_a_document_of_its_own_sequence(retriever, settings):
    stream = SequenceStream(open_all(settings), settings.block_size, settings.batch_size)
    retriever.point(np.ones((1, CHUNK), dtype=np.int64))
    found = 0
    for batch in (next(stream) for _ in range(5)):
        for segment in retriever.index.segments:
            run = run_lengths(batch.tokens, batch.doc_ids, retriever.tokenizer.eot_token)
            lengths, _, places = segment.places(batch.tokens, batch.doc_ids, run, retriever.tokenizer.eot_token)
            numbers = np.searchsorted(segment.starts, places, side='right') - 1
            for b in range(len(batch.tokens)):
                is_found = np.cumprod(lengths[b] > 0, axis=-1).astype(bool)
                into = segment.doc_ids[numbers[b][is_found]]
                assert not set(into.tolist()) & set(batch.doc_ids[b].tolist())
                found += len(into)
    assert found > 1000


def test_pointers_depend_on_no_later_token(retriever, batch):
    pointers = retriever.point(batch.tokens, batch.doc_ids)
    other = batch.tokens.copy()
    other[:, 37:] = np.roll(other[:, 37:], 3, axis=1)
    again = retriever.point(other, batch.doc_ids)
    assert (again[:, :37] == pointers[:, :37]).all() and not (again == pointers).all()


def test_pointers_are_remembered_by_chunk(settings, retriever, batch, monkeypatch):
    expected = retriever.point(batch.tokens, batch.doc_ids)
    first, = retriever.retrieve_for([batch])
    monkeypatch.setattr(retriever.matches, 'find', None)  # and is not called again
    second, = retriever.retrieve_for([batch])
    assert (first.pointers == expected).all() and (second.pointers == expected).all()


def test_remembered_pointers_are_those_of_the_same_context_and_the_same_documents(settings, retriever, batch):
    """Another epoch cuts the text elsewhere."""
    dataset, = open_all(settings)
    long = [chunks for chunks in dataset.documents() if len(chunks.tokens) > 7][:2]

    def make_batch(chosen):
        tokens = np.concatenate([chunks.tokens[i] for chunks, i in chosen])[None].astype(np.int64)
        doc_ids = np.array([[chunks.doc_ids[0] for chunks, _ in chosen]])
        return replace(batch, tokens=tokens, targets=tokens, doc_ids=doc_ids, chunk_ids=doc_ids,
                       is_last_chunk=np.zeros(doc_ids.shape, dtype=bool))
    a, b = long
    for number, (line, added) in enumerate((
            ([(a, 0), (a, 1), (a, 2), (a, 3)], 4),
            ([(a, 1), (a, 2), (a, 3), (a, 4)], 2),  # the first one has lost what came before it
            ([(a, 3), (b, 0), (b, 1), (b, 2)], 4),  # among other documents
            ([(b, 0), (b, 1), (b, 2), (a, 3)], 0),  # the same documents, and nothing but these before each chunk
            ([(a, 1), (a, 2), (a, 3), (a, 4)], 0))):
        before = retriever.cache.count(retriever.pointers_kind)
        some = make_batch(line)
        found, = retriever.retrieve_for([some])
        assert (found.pointers == retriever.point(some.tokens, some.doc_ids)).all()
        assert retriever.cache.count(retriever.pointers_kind) - before == added, number


def test_rows_that_are_deleted_or_changed_are_never_pointed_to(retriever, batch, tmp_path):
    before = retriever.point(batch.tokens, batch.doc_ids)
    segment, = retriever.index.segments
    kb, gone = retriever.knowledge_base, int(segment.doc_ids[np.diff(segment.starts).argmax()])
    kb.delete_from(gone, 0)
    kb.flush()
    after = retriever.point(batch.tokens, batch.doc_ids)
    assert [s.doc_ids[s.masked].tolist() for s in retriever.index.segments] in ([[gone]], [[]])  # masked, or left out
    assert is_fresh(after, retriever, batch, tmp_path) and not (after == before).all()
    for tokens in batch.tokens:
        assert retriever.index.where(tokens, np.array([1, 1, 1, 1]), 20)[1] != gone


def test_a_document_that_is_masked_is_left_out_when_a_quarter_of_the_segment_is():
    rng = np.random.default_rng(0)
    part = make_documents(rng, 8, 5)
    segment, = InMemory(part).segments
    for count, is_worn in ((1, False), (7, True)):
        kept, is_new = match_index.keep_segments([segment], part.take(range(count, 8)))
        assert kept == [segment] and segment.masked.tolist() == list(range(count)) and not is_new.any()
        plan, = match_index.plan_merges(kept, part.take([]))
        assert isinstance(plan, Documents) == is_worn
        segment.is_masked[:] = False


def test_an_index_that_followed_many_changes_equals_a_fresh_one_in_few_segments(settings, retriever, batch, tmp_path):
    kb = retriever.knowledge_base
    rows = [row for part in kb.all_rows(['doc_id', 'position', 'document', 'text', 'tokens', 'embedding'])
            for row in part]
    doc_ids = sorted({row['doc_id'] for row in rows})
    for doc_id in doc_ids[2:]:
        kb.delete_from(doc_id, 0)
    kb.flush()
    retriever.point(batch.tokens, batch.doc_ids)
    for number, doc_id in enumerate(doc_ids[2:]):
        kb.upsert([row for row in rows if row['doc_id'] == doc_id])
        if number % 4 == 3:
            kb.delete_from(doc_ids[number - 1], 1)
        kb.flush()
        found = retriever.point(batch.tokens, batch.doc_ids)
        if number % 9 == 0:
            assert is_fresh(found, retriever, batch, tmp_path)
    assert is_fresh(found, retriever, batch, tmp_path)
    assert 1 <= len(retriever.index.segments) <= 6  # log2 of 30
    folders = {path.name for path in Path(retriever.index.folder).glob('segment-*')}
    assert folders == {segment.name for segment in retriever.index.segments}


def test_a_collection_that_changes_is_waited_for_and_never_answered_from_an_old_index(settings, tokenizer, batch):
    news = []
    retriever = Retriever(settings.replace(retrieval_timeout=1.0), tokenizer, say=news.append)
    retriever.point(batch.tokens, batch.doc_ids)
    kb = retriever.knowledge_base
    kb._announce_change()
    with pytest.raises(RetrievalTimeout):
        retriever.point(batch.tokens, batch.doc_ids)
    assert any('being filled, or filling it was interrupted' in text for text in news)
    with pytest.raises(Unreachable, match='python -m retrieval.populate or retrieval.kb finish'):
        retriever.index.follow(kb)
    kb.flush()
    assert retriever.point(batch.tokens, batch.doc_ids).any()
    retriever.close()


def test_the_index_is_built_once_by_populate_and_shared(workspace, settings, tokenizer, batch):
    shutil.rmtree(workspace / 'out' / 'matches')
    answer = run('-m', 'retrieval.populate', 'config.py', folder=workspace)
    assert 'the exact-match index of' in answer.stdout + answer.stderr
    news = []
    retriever = Retriever(settings, tokenizer, say=news.append)
    assert retriever.point(batch.tokens, batch.doc_ids).any() and not news
    retriever.close()


def test_who_comes_second_waits_for_the_index_and_uses_it(settings, tokenizer, batch, workspace):
    shutil.rmtree(workspace / 'out' / 'matches')
    news, found = [], []

    def look_up():
        retriever = Retriever(settings.replace(retrieval_cache_gb=0.0), tokenizer, say=news.append)
        found.append(retriever.point(batch.tokens, batch.doc_ids))
        retriever.close()
    threads = [threading.Thread(target=look_up) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all((pointers == found[0]).all() for pointers in found)
    assert sum('is up to date after' in text for text in news) == 1


@pytest.mark.parametrize('damage', ['cut', 'no manifest', 'half a manifest', 'no segment', 'another version'])
def test_a_damaged_index_is_made_anew(settings, tokenizer, batch, workspace, damage):
    folder, = (workspace / 'out' / 'matches').iterdir()
    segment, = folder.glob('segment-*')
    manifest = folder / 'manifest.json'
    whole = {path.name: path.read_bytes() for path in segment.iterdir()}
    if damage == 'cut':
        (segment / 'order.bin').write_bytes((segment / 'order.bin').read_bytes()[:-100])
    elif damage == 'no manifest':
        manifest.unlink()
    elif damage == 'half a manifest':
        manifest.write_text(manifest.read_text()[:20])
    elif damage == 'another version':
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | dict(version=0)))
    else:
        shutil.rmtree(segment)
    retriever = Retriever(settings, tokenizer, say=lambda text: None)
    assert retriever.point(batch.tokens, batch.doc_ids).any()
    retriever.close()
    segment, = folder.glob('segment-*')
    assert {path.name: path.read_bytes() for path in segment.iterdir()} == whole


def test_a_folder_that_cannot_be_used_is_an_error_that_names_it(settings, tokenizer, workspace):
    (workspace / 'file').write_text('')
    retriever = Retriever(settings.replace(retrieval_matches_dir='file'), tokenizer)
    with pytest.raises(UserError, match=r'retrieval_matches_dir.*file.*name a folder on a local disk'):
        retriever.point(np.ones((1, CHUNK), dtype=np.int64))
    retriever.close()


def test_longest_runs_are_followed_beyond_the_depth_of_the_index(retriever, settings):
    dataset, = open_all(settings)
    chunks = next(chunks for chunks in dataset.documents() if len(chunks.tokens) > 4)
    tokens = chunks.tokens[:3].reshape(1, -1).astype(np.int64)
    runs = retriever.longest_runs(tokens, np.full((1, 3), 999))  # as of another document: it finds itself
    assert runs[0].tolist() == list(range(1, 3 * CHUNK + 1))
    runs = retriever.longest_runs(tokens, np.repeat(chunks.doc_ids[:1], 3)[None])
    assert runs.max() < 3 * CHUNK


def test_where_names_the_document_and_the_place_that_a_pointer_was_found_at(retriever, settings):
    dataset, = open_all(settings)
    chunks = next(chunks for chunks in dataset.documents() if len(chunks.tokens) > 4)
    tokens = chunks.tokens[1:4].reshape(-1).astype(np.int64)
    retriever.point(tokens[None])
    length, doc_id, place = retriever.index.where(tokens, np.array([999, 999, 999]), 30)
    assert (length, doc_id, place) == (DEPTH, int(chunks.doc_ids[0]), CHUNK + 31)
    row, = retriever.knowledge_base.rows_at([(doc_id, place // CHUNK)], ['document', 'tokens']).values()
    assert row['tokens'][place % CHUNK] == tokens[31]
