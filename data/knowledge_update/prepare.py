"""
Documents that the quickstart's model never saw: the modules of a package that it does not have, in two halves. One is
to be added to the knowledge base, the other is held out and measured before and after. Writes added.parquet,
held_out.parquet and corpus.json beside this file; pip downloads the package's wheel, and nothing is installed.

    python data/knowledge_update/prepare.py                  # half of the files are added, the others held out
    python data/knowledge_update/prepare.py --split=lines    # the first half of each file is added, the second held out
    python data/knowledge_update/prepare.py --package=sphinx==8.1.3

A held-out document that is nearly a copy is left out: one that has half of its longer lines in one added document.
"""
import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow.parquet as pq

from configurator import UserError, user_errors_as_one_line
from data.chunking import hash64
from data.prepare import write_splits
from data.python_source.prepare import TESTS, VENDORED, looks_generated

FOLDER = Path(__file__).resolve().parent
SEEN = FOLDER.parent / 'python_source'  # the quickstart's corpus
LONG = 20  # characters of a line that tells documents apart
COPY = 0.5  # share of such lines


def download(package):
    """[(module path, text)] of the Python files in a package's wheel, without tests and vendored or generated code."""
    with tempfile.TemporaryDirectory() as folder:
        pip = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
                              '--no-deps', '--only-binary=:all:', '--dest', folder, package],
                             capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = list(Path(folder).glob('*.whl'))
        if pip.returncode or not wheels:
            reason = [line for line in pip.stderr.splitlines() if line.startswith('ERROR')] or [pip.stderr[-300:]]
            raise UserError(f'pip cannot download a wheel of {package!r} ({reason[-1]}): name another --package, or '
                            f'connect')
        with zipfile.ZipFile(wheels[0]) as wheel:
            files = [(name, wheel.read(name).decode('utf-8', 'replace').replace('\r\n', '\n'))
                     for name in sorted(wheel.namelist())
                     if name.endswith('.py') and not TESTS.search(name) and not VENDORED.search(name)]
    return [(name.removesuffix('.py').replace('/', '.'), text) for name, text in files
            if text.strip() and not looks_generated(text)]


def check_unseen(modules, package):
    """UserError if the quickstart's corpus has modules of the package."""
    packages = {name.partition('.')[0] for name, _ in modules}
    for path in (SEEN / 'train.parquet', SEEN / 'val.parquet'):
        if not path.exists():
            raise UserError(f'no {path.name} of the quickstart: make it first, with python '
                            f'data/python_source/prepare.py')
        seen = [name for name in pq.read_table(path, columns=['id'])['id'].to_pylist()
                if name.partition('.')[0] in packages]
        if seen:
            raise UserError(f'{package} is in the corpus that the model was trained on ({seen[0]}): name a --package '
                            f'that is not installed')


def halves(modules, by_lines):
    """[(half, id, text)] of modules, by file or by line."""
    if not by_lines:
        return [('added' if hash64('half', name) % 2 else 'held_out', name, text) for name, text in modules]
    found = []
    for name, text in modules:
        lines = text.splitlines(keepends=True)
        middle = len(lines) // 2
        found += [('added', f'{name}:1', ''.join(lines[:middle])), ('held_out', f'{name}:2', ''.join(lines[middle:]))]
    return [document for document in found if document[2].strip()]


def without_copies(documents):
    """The documents without those held-out ones that are nearly copies of an added one."""
    def long_lines(text):
        return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG}
    added = [long_lines(text) for half, _, text in documents if half == 'added']
    kept = []
    for half, name, text in documents:
        lines = long_lines(text)
        if half == 'added' or (lines and max(len(lines & others) for others in added) < COPY * len(lines)):
            kept.append((half, name, text))
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--package', default='django==5.2.19', help='what pip downloads (default: %(default)s)')
    parser.add_argument('--split', choices=('files', 'lines'), default='files',
                        help='what is halved: the set of files, or each file (default: %(default)s)')
    arguments = parser.parse_args()
    modules = download(arguments.package)
    check_unseen(modules, arguments.package)
    documents = halves(modules, arguments.split == 'lines')
    if len({half for half, _, _ in documents}) < 2:
        raise UserError(f'{arguments.package} has {len(modules)} modules, too few for two halves: name a larger '
                        f'--package')
    kept = without_copies(documents)
    write_splits(((half, name, name, text) for half, name, text in kept), FOLDER, ('added', 'held_out'))
    print(f'left out: {len(documents) - len(kept)} held-out documents that are nearly copies of added ones or have no '
          f'longer line')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
