import os

import pytest

from configurator import UserError
from data.tokenizer import load_tokenizer, token_byte_counts, tokenizer_json, vocabulary_hash
from tests.conftest import ROOT

TEXT = 'class Ünï:\n    def f(self):\n\t\treturn "𝛑" * 1234567  # <|endoftext|>\n\n'


def gpt2():
    if not os.environ.get('TIKTOKEN_CACHE_DIR'):
        pytest.skip("gpt2's files are not here: set TIKTOKEN_CACHE_DIR")
    return load_tokenizer('gpt2')


def test_a_tokenizer_json_loads_as_an_encoding_that_cuts_text_as_its_own_library_does(prepared):
    from tokenizers import Tokenizer
    path = str(prepared / 'tokenizer.json')
    ours, theirs = load_tokenizer(path), Tokenizer.from_file(path)
    assert ours.n_vocab == theirs.get_vocab_size() == 1024
    assert ours.eot_token == theirs.token_to_id('<|endoftext|>') == 1023
    for text in (TEXT.replace('<|endoftext|>', ''), (prepared / 'config.py').read_text()):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode_ordinary(TEXT)) == TEXT


def test_gpt2_is_openais():
    assert gpt2().encode_ordinary('Hello world') == [15496, 995] and gpt2().eot_token == 50256


def test_gpt2_written_as_a_tokenizer_json_is_the_same_tokenizer_to_us_and_to_its_own_library(tmp_path):
    from tokenizers import Tokenizer
    original = gpt2()
    path = tmp_path / 'tokenizer.json'
    path.write_text(tokenizer_json('gpt2', original))
    ours, theirs = load_tokenizer(str(path)), Tokenizer.from_file(str(path))
    assert vocabulary_hash(ours) == vocabulary_hash(original) and ours.eot_token == original.eot_token
    text = TEXT.replace('<|endoftext|>', '') * 3 + (ROOT / 'README.md').read_text() + ''.join(map(chr, range(1, 3000)))
    assert ours.encode_ordinary(text) == original.encode_ordinary(text) == theirs.encode(text).ids


def test_bytes_of_tokens_add_up_to_the_utf8_bytes_of_the_text(prepared):
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    counts = token_byte_counts(tokenizer)
    assert sum(counts[t] for t in tokenizer.encode_ordinary(TEXT)) == len(TEXT.encode())
    assert counts[tokenizer.eot_token] == 0


def test_the_vocabulary_hash_knows_tokenizers_by_what_they_do_and_not_by_their_name(prepared, tmp_path):
    path = prepared / 'tokenizer.json'
    (tmp_path / 'copy.json').write_text(path.read_text())
    (tmp_path / 'other.json').write_text(path.read_text().replace(r'\\p{N}{1,3}', r'\\p{N}'))
    hashes = [vocabulary_hash(load_tokenizer(str(p))) for p in (path, tmp_path / 'copy.json', tmp_path / 'other.json')]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize('data', [b'# nanoRETRO', b'{}', b'[]', b'\xff\xfe\x00', b'',
                                  b'{"model": {"vocab": {"a": "b"}}}',
                                  b'{"model": {"vocab": {"\xe4\xb8\xad": 1}}, "added_tokens": []}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, data):
    (tmp_path / 'file.json').write_bytes(data)
    with pytest.raises(UserError, match='file.json. is not a byte-level BPE in Hugging Face.*: name another'):
        load_tokenizer(str(tmp_path / 'file.json'))


def test_a_missing_tokenizer_is_named_with_what_to_do():
    with pytest.raises(UserError, match=r"no tokenizer 'nowhere.json'.*prepare.py"):
        load_tokenizer('nowhere.json')
