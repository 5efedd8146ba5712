"""bench/scale.py: what it measures is of the chunks that it says, and it says how that grows."""
import json

import numpy as np
import pytest

from bench.scale import blocks, describe, draw_batches, exponent, read_chunks, search_exactly
from data.tokenizer import load_tokenizer
from tests.conftest import ROOT, run


@pytest.mark.slow
def test_each_backend_and_size_is_a_line_and_a_later_call_adds_to_them(workspace):
    common = [ROOT / 'bench/scale.py', 'config.py', '--quick', '--out=scale/lines.jsonl']
    run(*common, '--backends=server,matches', folder=workspace)
    said = run(*common, '--backends=lite', folder=workspace).stdout
    lines = [json.loads(line) for line in (workspace / 'scale/lines.jsonl').read_text().splitlines()]
    assert {(line['backend'], line['rows']) for line in lines} >= {
        (backend, rows) for backend in ('lite', 'matches') for rows in (2000, 4000)}
    for line in lines:
        assert line['search_ms'] > 0 and line['memory_mb'] > 0 and line['disk_mb'] > 0 and line['index_s'] > 0
        assert line['backend'] == 'matches' or (line['rows_per_s'] > 100 and 0.5 < line['recall'] <= 1
                                                and line['segments'] >= 1)
    assert (workspace / 'scale/lines.png').read_bytes().startswith(b'\x89PNG')
    assert 'grows as rows to' in said and said.count('Milvus Lite') == 2 and said.count('exact-match index') == 2
    again = run(*common, '--rows=0', folder=workspace).stdout
    assert again.strip() == said[said.index('  '):].strip() or again.strip() in said
    answer = run(*common, '--backends=lite,pinecone', folder=workspace, check=False)
    assert answer.returncode == 2 and "--backends names 'pinecone': choose among lite, server, matches" in answer.stderr


def test_chunks_are_the_real_ones_then_disturbed_copies_and_the_exact_search_is_one(settings):
    tokenizer = load_tokenizer(settings.tokenizer)
    real, vectors, _ = read_chunks(settings, tokenizer, 500)
    assert len(real.id) == len(vectors) == 500
    made = list(blocks(real, vectors, 1200, tokenizer.eot_token))
    ids, doc_ids = (np.concatenate([getattr(rows, name) for rows, _ in made]) for name in ('id', 'doc_id'))
    near = np.concatenate([vector for _, vector in made])
    assert len(set(ids.tolist())) == 1200 and (ids[:500] == real.id).all()
    np.testing.assert_allclose(near[:500], vectors, atol=1e-6)
    cosine = (near[500:1000] * vectors).sum(1)
    assert 0.85 < cosine.mean() < 0.93 and (made[0][0].tokens[500:1000] != real.tokens).mean() > 0.02
    numbers = draw_batches(real, 500, 1)[0]
    assert (real.doc_id[numbers].reshape(-1, 4) == real.doc_id[numbers[::4], None]).all()
    scores = np.where(doc_ids == real.doc_id[numbers, None], -9, vectors[numbers] @ near.T)
    expected = -np.sort(-scores, axis=1)[:, :2]
    np.testing.assert_allclose(search_exactly(real, vectors, 1200, numbers, tokenizer.eot_token), expected, atol=1e-5)


def test_the_exponent_is_that_of_the_growth():
    lines = [dict(backend='lite', rows=rows, search_ms=3 * rows**0.5, index_s=2e-4 * rows, memory_mb=7.0)
             for rows in (10_000, 100_000, 1_000_000)]
    assert exponent(lines, 'search_ms') == pytest.approx(0.5) and exponent(lines, 'memory_mb') == pytest.approx(0)
    assert exponent(lines[:1], 'search_ms') is None
    assert '1.00        0.50' in describe(lines)
