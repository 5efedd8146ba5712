"""
The tokenizer, as a tiktoken Encoding: OpenAI's `gpt2`, or a byte-level BPE in Hugging Face's tokenizer.json format.

    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer('data/python_source/tokenizer.json')
"""
import hashlib
import json
import os
import re
import unicodedata

import numpy as np
import tiktoken

from configurator import UserError, reason_of

END_OF_TEXT = '<|endoftext|>'
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONG_RUN = re.compile(r'(?<!\s)\s{100000}')


def load_tokenizer(name):
    """
    A tiktoken Encoding whose `eot_token` ends documents. `name` is 'gpt2' or the path of a tokenizer.json.
    UserError if there is none.
    """
    if name == 'gpt2':
        try:
            return tiktoken.get_encoding('gpt2')
        except Exception as error:  # tiktoken raises whatever its download raised
            raise UserError(f"tokenizer 'gpt2' could not be downloaded ({type(error).__name__}): connect once, or set "
                            f'TIKTOKEN_CACHE_DIR to a folder that holds its two files') from error
    if not os.path.isfile(name):
        raise UserError(f"no tokenizer {name!r}: use 'gpt2', or make the corpus and its tokenizer first, e.g. with "
                        f'python data/python_source/prepare.py')
    try:
        with open(name, encoding='utf-8') as file:
            saved = json.load(file)
        pattern = split_pattern(saved)
        byte_by_char = unicode_to_byte()
        special = {token['content']: token['id'] for token in saved['added_tokens']}
        ranks = {bytes(byte_by_char[c] for c in token): rank for token, rank in saved['model']['vocab'].items()
                 if token not in special}
        lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if lacking:
            raise Unsupported(f'no token for the byte 0x{lacking[0]:02x}')
        if END_OF_TEXT not in special:
            raise UserError(f'tokenizer {name!r} has no {END_OF_TEXT} token: add it as a special token')
        tokenizer = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except Unsupported as error:
        raise UserError(f'tokenizer {name!r} has {error}, which nanoRETRO does not implement: use a byte-level BPE '
                        f'without it') from error
    except UserError:
        raise
    except Exception as error:  # of JSON, of a missing or mistyped part, of tiktoken
        raise UserError(f"tokenizer {name!r} is not a byte-level BPE in Hugging Face's tokenizer.json format "
                        f'({reason_of(error)}): name another') from error
    check_equals_library(name, tokenizer)
    return tokenizer


def vocabulary_size(name):
    """load_tokenizer(name).n_vocab, from the numbers in a tokenizer.json alone, and without downloading GPT-2's."""
    if name == 'gpt2':
        return 50257
    try:
        with open(name, encoding='utf-8') as file:
            saved = json.load(file)
        return 1 + max(*saved['model']['vocab'].values(), *(token['id'] for token in saved['added_tokens']))
    except Exception:
        return load_tokenizer(name).n_vocab  # which says what is wrong with it


class Unsupported(Exception):
    """A part of a tokenizer.json that we would have to ignore."""


def split_pattern(saved):
    """The regular expression that a tokenizer.json splits text with before merging. Unsupported if it does more."""
    model, normalizer, splitter = saved['model'], saved.get('normalizer'), saved.get('pre_tokenizer')
    if model.get('type', 'BPE') != 'BPE':
        raise Unsupported(f'a model of type {model["type"]}')
    for option in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback'):
        if model.get(option):
            raise Unsupported(f'the option {option} = {model[option]!r} of its model')
    merges = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
    ids = [model['vocab'][left + right] for left, right in merges]
    if ids != sorted(ids):
        raise Unsupported('ids that are not in the order of its merges')
    made = {left + right for left, right in merges} | {token['content'] for token in saved['added_tokens']}
    unmade = [token for token in model['vocab'] if len(token) > 1 and token not in made]
    if unmade and not model.get('ignore_merges'):
        raise Unsupported(f'tokens that no merge makes, such as {unmade[0]!r}')
    if normalizer and normalizer.get('normalizers') != []:
        parts = normalizer.get('normalizers', [normalizer])
        raise Unsupported(f'the normalizer {", ".join(part["type"] for part in parts)}')
    always = [token['content'] for token in saved['added_tokens'] if not token.get('special')]
    if always:
        raise Unsupported(f'added tokens that are not special, such as {always[0]!r}')
    parts = splitter.get('pretokenizers', [splitter]) if splitter else []
    types = [part['type'] for part in parts]
    if types not in (['ByteLevel'], ['Split', 'ByteLevel']):
        raise Unsupported(f'the pre-tokenizer {", ".join(types) or "null"}')
    *splits, level = parts
    if level.get('add_prefix_space'):
        raise Unsupported('add_prefix_space')
    if bool(splits) == level.get('use_regex', True):
        raise Unsupported(f'use_regex = {level.get("use_regex", True)} beside {len(splits)} Split steps')
    if not splits:
        return GPT2_PATTERN
    split, = splits
    if split.get('behavior') != 'Isolated' or split.get('invert'):
        raise Unsupported(f'a Split step of behavior {split.get("behavior")}, invert = {split.get("invert")}')
    if 'Regex' not in split['pattern']:
        raise Unsupported(f'a Split step by the string {split["pattern"].get("String")!r}')
    return split['pattern']['Regex']


def check_equals_library(name, tokenizer):
    """
    UserError if a tokenizer.json is read in another way than by Hugging Face's `tokenizers`, or is not lossless, on a
    text with every byte, digits, cases, scripts, emoji, runs of spaces and lines, and each token in ASCII.
    """
    from tokenizers import Tokenizer
    # characters of all lengths in UTF-8; those of new versions of Unicode may differ between two libraries
    characters = map(chr, [*range(1, 0x800), *range(0x800, 0xd800, 0x400), *range(0x10000, 0x110000, 0x8000)])
    assigned = ''.join(c for c in characters if unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c))
    probe = (f"It's 1234567890 or 3.14, isn't it?  We'LL see:   THE End.\n\n\n    def f(x):\n\t\treturn x  # 42 \r\n"
             f'naïve café, Straße ﬁ e\u0301 中文字符，日本語のテキスト 한국어 العربية हिन्दी '
             f'👩\u200d👧 🎉🎉{" " * 40}x{" " * 9}\n \n{assigned}')
    tokens = [token.decode(errors='ignore') for token in token_bytes(tokenizer) if token]
    probe += ' '.join(token for token in tokens if token.isascii() and token not in tokenizer.special_tokens_set)
    theirs = Tokenizer.from_file(name)
    theirs.no_truncation()
    theirs.no_padding()
    expected = theirs.encode(probe, add_special_tokens=False).ids
    ours = tokenizer.encode_ordinary(probe)
    if ours != expected:
        first = next((i for i, pair in enumerate(zip(ours, expected, strict=False)) if pair[0] != pair[1]), 0)
        some = slice(first, first + 4)
        raise UserError(f"tokenizer {name!r} does something that nanoRETRO does not implement: where it gives "
                        f"{expected[some]} in Hugging Face's library, {theirs.decode(expected[some])!r}, it gives "
                        f"{ours[some]} here; use a byte-level BPE whose ids are in the order of its merges")
    if tokenizer.decode(ours) != probe:
        raise UserError(f'tokenizer {name!r} loses text: use a byte-level BPE that has a token for each byte')


def tokenize(text, tokenizer):
    """
    Token ids (n,) int32. Text that looks like a special token is text. Runs of a million spaces would overflow the
    stack of tiktoken's regular expressions: such a text is split by another library, with the same ids.
    """
    if len(text) < 100_000 or not LONG_RUN.search(text):
        return tokenizer.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
    import regex
    pieces = (match.group() for match in regex.finditer(tokenizer._pat_str, text))
    return np.array([i for piece in pieces for i in tokenizer._encode_single_piece(piece)], dtype=np.int32)


def tokenizer_json(name, tokenizer):
    """
    The tokenizer of load_tokenizer(name) as the text of a tokenizer.json, which load_tokenizer and Hugging Face's
    `tokenizers` both read.
    """
    if name != 'gpt2':
        with open(name, encoding='utf-8') as file:
            return file.read()
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    char_by_byte = {byte: char for char, byte in unicode_to_byte().items()}

    def as_text(token):
        return ''.join(char_by_byte[byte] for byte in token)
    ranks = tokenizer._mergeable_ranks
    # tiktoken merges whichever two neighbors make the token of the lowest rank
    merges = [(as_text(token[:i]), as_text(token[i:])) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    converted = Tokenizer(models.BPE({as_text(token): rank for token, rank in ranks.items()}, merges,
                                     ignore_merges=True))
    converted.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tokenizer._pat_str), behavior='isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    converted.decoder = decoders.ByteLevel()
    converted.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return converted.to_str()


def unicode_to_byte():
    """Byte-level BPE files write each byte as a printable character: GPT-2's table, read backwards."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def vocabulary_hash(tokenizer):
    """16 hex digits, equal for two tokenizers if and only if they split text alike, whatever their names."""
    digest = hashlib.blake2b(tokenizer._pat_str.encode(), digest_size=8)
    for token in token_bytes(tokenizer):
        digest.update(b'\0\0' if token is None else token + b'\0')
    return digest.hexdigest()


def token_byte_counts(tokenizer):
    """UTF-8 bytes of each token, as a list by token id; the end of text has none, nor do gaps in the vocabulary."""
    counts = [len(token or b'') for token in token_bytes(tokenizer)]
    counts[tokenizer.eot_token] = 0
    return counts


def is_token(tokenizer):
    """Whether each id is a token, as a list: a vocabulary may have gaps."""
    return [token is not None for token in token_bytes(tokenizer)]


def token_bytes(tokenizer):
    """The bytes of each token, by id; None for a gap in the vocabulary."""
    found = []
    for token_id in range(tokenizer.n_vocab):
        try:
            found.append(tokenizer.decode_single_token_bytes(token_id))
        except KeyError:
            found.append(None)
    return found
