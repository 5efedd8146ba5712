import json
import os

import numpy as np
import pytest

from configurator import UserError
from data.tokenizer import load_tokenizer, token_byte_counts, tokenize, tokenizer_json, vocabulary_hash
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
                                  b'{"model": {"vocab": {"\xe4\xb8\xad": 1}, "merges": []}, "added_tokens": [],'
                                  b'"pre_tokenizer": {"type": "ByteLevel"}}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, data):
    (tmp_path / 'file.json').write_bytes(data)
    with pytest.raises(UserError, match='file.json. is not a byte-level BPE in Hugging Face.*: name another'):
        load_tokenizer(str(tmp_path / 'file.json'))


def test_a_missing_tokenizer_is_named_with_what_to_do():
    with pytest.raises(UserError, match=r"no tokenizer 'nowhere.json'.*prepare.py"):
        load_tokenizer('nowhere.json')


def changed(prepared, tmp_path, change):
    """The path of a copy of the tokenizer.json that `change` was done to, a function of its JSON."""
    saved = json.loads((prepared / 'tokenizer.json').read_text())
    change(saved)
    path = tmp_path / 'changed.json'
    path.write_text(json.dumps(saved))
    return str(path)


def swap_ids(saved):
    vocabulary = saved['model']['vocab']
    vocabulary['th'], vocabulary['er'] = vocabulary['er'], vocabulary['th']


SPLIT = {'type': 'Split', 'pattern': {'Regex': r'\\d'}, 'behavior': 'Isolated', 'invert': False}


@pytest.mark.parametrize('change, said', [
    (lambda s: s.update(normalizer={'type': 'Lowercase'}), 'has the normalizer Lowercase'),
    (lambda s: s.update(normalizer={'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, {'type': 'StripAccents'}]}),
     'has the normalizer NFC, StripAccents'),
    (lambda s: s['pre_tokenizer']['pretokenizers'].insert(1, SPLIT), 'has the pre-tokenizer Split, Split, ByteLevel'),
    (lambda s: s['pre_tokenizer']['pretokenizers'][1].update(add_prefix_space=True), 'has add_prefix_space'),
    (lambda s: s['pre_tokenizer']['pretokenizers'][1].update(use_regex=True), 'has use_regex = True beside 1 Split'),
    (lambda s: s['pre_tokenizer']['pretokenizers'][0].update(behavior='Removed'), 'a Split step of behavior Removed'),
    (lambda s: s['pre_tokenizer']['pretokenizers'][0].update(invert=True), 'invert = True'),
    (lambda s: s['pre_tokenizer']['pretokenizers'][0].update(pattern={'String': ' '}), "Split step by the string ' '"),
    (lambda s: s.update(pre_tokenizer=None), 'has the pre-tokenizer null'),
    (lambda s: s.update(pre_tokenizer={'type': 'Metaspace', 'replacement': '_'}), 'has the pre-tokenizer Metaspace'),
    (lambda s: s['model'].update(type='WordPiece'), 'has a model of type WordPiece'),
    (lambda s: s['model'].update(dropout=0.1), 'the option dropout = 0.1'),
    (lambda s: s['model'].update(end_of_word_suffix='</w>'), "the option end_of_word_suffix = '</w>'"),
    (lambda s: s['added_tokens'].append(dict(id=1024, content='    ', special=False)), "special, such as '    '"),
    (swap_ids, 'has ids that are not in the order of its merges'),
    (lambda s: s['model']['merges'].pop(40), 'has tokens that no merge makes, such as'),
    (lambda s: s['pre_tokenizer']['pretokenizers'][0].update(pattern={'Regex': r'\p{L}{1,2}+|\P{L}'}),
     'does something that nanoRETRO does not implement: where it gives'),
    (lambda s: s.update(added_tokens=[]), 'has no <|endoftext|> token'),
    (lambda s: s['model'].update(vocab={'Ġ': 0}, merges=[]), 'has no token for the byte 0x00'),
])
def test_what_the_loader_does_not_implement_is_refused_by_name(prepared, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        load_tokenizer(changed(prepared, tmp_path, change))


def test_what_does_not_change_the_ids_is_accepted(prepared, tmp_path):
    original = load_tokenizer(str(prepared / 'tokenizer.json'))

    def change(saved):
        saved['truncation'] = {'direction': 'Right', 'max_length': 5, 'strategy': 'LongestFirst', 'stride': 0}
        saved['added_tokens'].append({**saved['added_tokens'][0], 'id': 1024, 'content': '<|pad|>'})
    other = load_tokenizer(changed(prepared, tmp_path, change))
    assert other.encode_ordinary(TEXT) == original.encode_ordinary(TEXT) and other.n_vocab == 1025


@pytest.mark.parametrize('name', ['prepared', 'gpt2'])
@pytest.mark.parametrize('run', [' ', '\t', '\u3000', '\n'])
def test_a_million_spaces_in_a_row_have_the_ids_that_a_tokenizer_without_limits_gives_them(prepared, name, run):
    tokenizer = gpt2() if name == 'gpt2' else load_tokenizer(str(prepared / 'tokenizer.json'))
    text = f'x ={run * 1_000_000}1 y' * 2
    ids = tokenize(text, tokenizer)
    assert tokenizer.decode(ids.tolist()) == text and ids.dtype == np.int32
    short = f'x ={run * 150_000}1 y'  # tiktoken can do this one
    assert tokenize(short, tokenizer).tolist() == tokenizer.encode_ordinary(short)


def test_groups_in_a_pattern_do_not_change_what_a_long_run_gives(prepared, tmp_path):
    pattern = r"'(s|t|re)| ?(\p{L}+)|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer = load_tokenizer(changed(prepared, tmp_path, lambda s: s['pre_tokenizer']['pretokenizers'][0].update(
        pattern={'Regex': pattern})))
    text = f"it's{' ' * 1_000_000}more"
    assert tokenizer.decode(tokenize(text, tokenizer).tolist()) == text


def test_what_looks_like_a_special_token_is_text(prepared, tmp_path):
    def change(saved):
        saved['added_tokens'].append({**saved['added_tokens'][0], 'id': 1024, 'content': 'EOS'})
        saved['model']['vocab']['EOS'] = 1024
    tokenizer = load_tokenizer(changed(prepared, tmp_path, change))
    assert 1024 not in tokenize('a EOS bEOS EOS', tokenizer)
