import subprocess
import sys

import numpy as np
import pytest

from data.chunking import chunk_document, chunk_hashes, document_hash, hash64
from tests.conftest import ROOT

END = 99


@pytest.mark.parametrize('count', [1, 3, 4, 7, 8, 9, 100])
def test_the_grid_round_trips_tokens_and_pads_the_last_chunk_alone(count):
    tokens = np.arange(count) % 50
    chunks, lengths = chunk_document(tokens, 4, END)
    assert chunks.shape == (count // 4 + 1, 4)
    assert (chunks.reshape(-1)[:lengths.sum() - 1] == tokens).all()
    assert lengths.sum() == count + 1 and (lengths[:-1] == 4).all() and 1 <= lengths[-1] <= 4
    assert (chunks.reshape(-1)[count:] == END).all()


def test_the_grid_round_trips_text(prepared):
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    text = 'def f(x):\n\treturn "ünïcödé 𝛑 <|endoftext|>"\n' * 9
    chunks, lengths = chunk_document(tokenizer.encode_ordinary(text), 16, tokenizer.eot_token)
    assert tokenizer.decode(chunks.reshape(-1)[:lengths.sum() - 1]) == text


def test_ids_are_the_same_in_another_process_and_differ_by_source_document_and_position():
    ours = [hash64('a', 'b', 0), document_hash('a', 'b'), *chunk_hashes('a', 'b', 0, 3).tolist()]
    code = ('from data.chunking import *; '
            'print([hash64("a", "b", 0), document_hash("a", "b"), *chunk_hashes("a", "b", 0, 3).tolist()])')
    answer = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={'PYTHONHASHSEED': '5'})
    assert answer.stdout.strip() == str(ours)
    assert ours[0] == 4551564639837839792  # what collections out there hold
    others = {hash64('a', 'b', 0), hash64('a', 'b', 1), hash64('a', 'c', 0), hash64('ab', '', 0),
              document_hash('a', 'b')}
    assert len(others) == 5 and all(-2 ** 63 <= h < 2 ** 63 for h in others)
    assert (chunk_hashes('a', 'b', 1, 3) == chunk_hashes('a', 'b', 0, 3)[1:]).all()


def test_no_two_sources_and_ids_have_the_same_hash_by_how_they_are_joined():
    pairs = [('a', 'b\x1fc'), ('a\x1fb', 'c'), ('', 'a\x1fb\x1fc'), ('1\x1fa', 'b'), ('ab', 'c'), ('a', 'bc')]
    assert len({document_hash(*pair) for pair in pairs}) == len(pairs)
    assert len({int(chunk_hashes(*pair, 0, 1)[0]) for pair in pairs}) == len(pairs)
