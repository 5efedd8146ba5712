"""
The tokenizer, as a tiktoken Encoding: OpenAI's `gpt2`, or a byte-level BPE in Hugging Face's tokenizer.json format.

    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer('data/python_source/tokenizer.json')
"""
import hashlib
import json
import os

import tiktoken

from configurator import UserError

END_OF_TEXT = '<|endoftext|>'
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


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
        byte_by_char = unicode_to_byte()
        ranks = {bytes(byte_by_char[c] for c in token): rank for token, rank in saved['model']['vocab'].items()
                 if token != END_OF_TEXT}
        special = {token['content']: token['id'] for token in saved['added_tokens']}
        if END_OF_TEXT not in special:
            raise UserError(f'tokenizer {name!r} has no {END_OF_TEXT} token: add it as a special token')
        return tiktoken.Encoding(name, pat_str=split_pattern(saved['pre_tokenizer']), mergeable_ranks=ranks,
                                 special_tokens=special)
    except UserError:
        raise
    except Exception as error:  # of JSON, of a missing or mistyped part, of tiktoken
        raise UserError(f"tokenizer {name!r} is not a byte-level BPE in Hugging Face's tokenizer.json format "
                        f'({type(error).__name__}: {str(error)[:200]}): name another') from error


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


def split_pattern(pre_tokenizer):
    """The regular expression that a tokenizer.json splits text with before merging."""
    for part in pre_tokenizer.get('pretokenizers', [pre_tokenizer]):
        if part['type'] == 'Split':
            return part['pattern']['Regex']
    return GPT2_PATTERN


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
