"""
The quickstart's corpus: the Python source that is already on this machine, the standard library and the installed
packages. Writes beside this file train.parquet and val.parquet (columns id, text), tokenizer.json, a byte-level BPE
fitted on the train documents, and corpus.json, the fingerprint. Another machine or other versions of the packages give
another corpus, so figures compare only between equal fingerprints.

    python data/python_source/prepare.py [--max_mb=40]
"""
import argparse
import hashlib
import os
import re
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from configurator import UserError, save_atomically, user_errors_as_one_line
from data.chunking import chunk_document, hash64
from data.fingerprint import FILE as FINGERPRINT
from data.fingerprint import fingerprint, write_fingerprint
from data.tokenizer import END_OF_TEXT, load_tokenizer

FOLDER = Path(__file__).resolve().parent
VOCABULARY = 8192
CHUNK_SIZE = 64  # for the table that is printed
VAL_SHARE = 0.02
# letters with a preceding space, underscore or bracket; digits by three; symbols; line ends; indentation
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TESTS = re.compile(r'(^|/)(tests?|testing|idle_test|conftest\.py|test_[^/]*\.py|[^/]*_tests?\.py)(/|$)')
VENDORED = re.compile(r'(^|/)(_?vendor(ed)?|_?extern(al|als)?|third_party|thirdparty|site-packages|dist-packages)(/|$)')
GENERATED = re.compile(r'auto(matically)?[ -]?generated|generated (by|from|with)|do not edit', re.IGNORECASE)
GENERATED_NAME = re.compile(r'(_pb2|_pb2_grpc|_parsetab|lextab|yacctab)\.py$')


def source_files():
    """(module path, file) of every Python file that is neither a test nor vendored, sorted."""
    paths = sysconfig.get_paths()
    found = {}
    for root in (paths['stdlib'], paths['purelib'], paths['platlib']):
        for folder, subfolders, names in os.walk(root):
            relative = Path(folder).relative_to(root).as_posix()
            subfolders[:] = sorted(s for s in subfolders if s not in ('__pycache__', 'site-packages', 'dist-packages'))
            for name in names:
                path = f'{relative}/{name}'.removeprefix('./')
                if name.endswith('.py') and not (TESTS.search(path) or VENDORED.search(path)
                                                 or GENERATED_NAME.search(path)):
                    found[path.removesuffix('.py').replace('/', '.')] = os.path.join(folder, name)
    return sorted(found.items())


def looks_generated(text):
    """Whether a header says so, or the lines are so long that the file is a table."""
    return bool(GENERATED.search(text[:1000])) or len(text) > 100 * (text.count('\n') + 1)


def read_documents(max_bytes):
    """Documents [(id, text)] up to max_bytes, in an order that mixes the packages; and counts of what was left out."""
    documents, seen, size = [], set(), 0
    left_out = dict(undecodable=0, generated=0, duplicate=0, empty=0)
    files = sorted(source_files(), key=lambda item: hash64('order', item[0]))
    for name, path in tqdm(files, desc='reading', unit=' files', disable=not sys.stderr.isatty()):
        if size >= max_bytes:
            break
        try:
            text = Path(path).read_bytes().decode('utf-8').replace('\r\n', '\n')
        except (UnicodeDecodeError, OSError):
            left_out['undecodable'] += 1
            continue
        digest = hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
        reason = ('empty' if not text.strip() else 'generated' if looks_generated(text) else
                  'duplicate' if digest in seen else None)
        if reason:
            left_out[reason] += 1
            continue
        seen.add(digest)
        documents.append((name, text))
        size += len(text.encode())
    return documents, left_out


def is_val(name):
    return hash64('split', name) % 10_000 < VAL_SHARE * 10_000


def train_tokenizer(texts, vocabulary=VOCABULARY):
    """A byte-level BPE with `vocabulary` entries, the last of which is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior='isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, show_progress=sys.stderr.isatty(),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--max_mb', type=float, default=40, help='stop after this many MB of source (default: 40)')
    arguments = parser.parse_args()
    start = time.time()
    documents, left_out = read_documents(arguments.max_mb * 1e6)
    write_corpus(documents, FOLDER, f'--max_mb={arguments.max_mb:g} gives')
    print('left out: ' + ', '.join(f'{count:,} {reason}' for reason, count in left_out.items())
          + f' | {time.time() - start:.0f} s')


def write_corpus(documents, folder, source):
    """Write documents [(id, text)] as train.parquet and val.parquet, with their tokenizer.json and corpus.json."""
    split = {'train': [d for d in documents if not is_val(d[0])], 'val': [d for d in documents if is_val(d[0])]}
    if not split['train'] or not split['val']:
        raise UserError(f'{source} {len(split["train"])} train and {len(split["val"])} val documents: ask for more')
    print(f'fitting a tokenizer of {VOCABULARY:,} entries', flush=True)
    fitted = train_tokenizer(text for _, text in split['train'])
    save_atomically(fitted.save, str(folder / 'tokenizer.json'))
    tokenizer = load_tokenizer(str(folder / 'tokenizer.json'))

    print(f'{"":6} {"documents":>10} {"bytes":>12} {"tokens":>12} {"chunks":>9} {"padding":>8}')
    (folder / FINGERPRINT).unlink(missing_ok=True)  # it must not name other files than it is of
    for name, rows in sorted(split.items(), reverse=True):  # train last: make takes it for all of them
        ids, texts = zip(*rows, strict=True)
        save_atomically(lambda path, i=ids, t=texts: pq.write_table(
            pa.table({'id': list(i), 'text': list(t)}), path, row_group_size=256), str(folder / f'{name}.parquet'))
        encoded = tokenizer.encode_ordinary_batch(list(texts), num_threads=os.cpu_count())
        lengths = [chunk_document(np.asarray(e), CHUNK_SIZE, tokenizer.eot_token)[1] for e in encoded]
        tokens, chunks = sum(int(n.sum()) for n in lengths), sum(len(n) for n in lengths)
        print(f'{name:6} {len(rows):10,} {sum(len(t.encode()) for t in texts):12,} {tokens:12,} {chunks:9,} '
              f'{1 - tokens / (chunks * CHUNK_SIZE):8.1%}')
    found = fingerprint(split)
    write_fingerprint(found, folder)
    print(f'fingerprint {found["hash"]}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
