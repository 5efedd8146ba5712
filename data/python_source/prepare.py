"""
The quickstart's corpus: the Python source that is already on this machine, the standard library and the installed
packages. Writes beside this file train.parquet and val.parquet (columns id, title, text), tokenizer.json, a byte-level
BPE fitted on the train documents, and corpus.json, the fingerprint. Another machine or other versions of the packages
give another corpus, so figures compare only between equal fingerprints.

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

from tqdm import tqdm

from configurator import user_errors_as_one_line
from data.chunking import hash64
from data.prepare import is_val, write_corpus

FOLDER = Path(__file__).resolve().parent

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


def split(documents):
    """[(id, text)] as write_corpus takes them."""
    for name, text in documents:
        yield 'val' if is_val(name) else 'train', name, name, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--max_mb', type=float, default=40, help='stop after this many MB of source (default: 40)')
    arguments = parser.parse_args()
    start = time.time()
    documents, left_out = read_documents(arguments.max_mb * 1e6)
    write_corpus(split(documents), FOLDER, f'--max_mb={arguments.max_mb:g} gives')
    print('left out: ' + ', '.join(f'{count:,} {reason}' for reason, count in left_out.items())
          + f' | {time.time() - start:.0f} s')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
