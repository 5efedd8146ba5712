"""
A corpus of one's own, from folders of text, Markdown, source code, HTML and PDF:

    python data/documents/prepare.py FOLDER...
    python -m retrieval.populate config/NAME.py

Writes data/documents/NAME/train.parquet and val.parquet (columns id, title, text), their tokenizer, a static embedding
in out/NAME_embedding, and config/NAME.py, sized by the corpus. A document's id is its path from the folder's name on,
and says whether the document is held out: so folders may move, and files come and go. Run it again when they have:
tokenizer, embedding and config stay as they are, and populate --sync=True brings the collection up to date. Documents
whose text is that of another, but for white space, are left out. What is left out, and why, stands in left_out.json.
"""
import argparse
import hashlib
import json
import os
import re
import stat
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pyarrow.parquet as pq
from tqdm import tqdm

from configurator import UserError, load_settings, user_errors_as_one_line, visible, write_atomically
from data.chunking import hash64
from data.extract import ENDINGS, KINDS, TEXT, Skipped, check_readers, extract
from data.prepare import SMALL, is_val, write_corpus
from data.tokenizer import load_tokenizer

VAL_FRACTION = 0.05
MAX_BYTES = 512_000_000  # of a file
EPOCHS = 4
OTHER = 'other kinds: '
NOT_ENTERED = {'node_modules', 'bower_components', '__pycache__', '__MACOSX', 'CVS', 'site-packages'}
CONFIG = """# {count} tokens of documents; data/documents/prepare.py wrote this once, and leaves changes to you.
from data.documents import DatasetConfig

out_dir = 'out/{name}'
train_datasets = [DatasetConfig('data/documents/{name}/train.parquet')]
val_datasets = [DatasetConfig('data/documents/{name}/val.parquet')]
tokenizer = '{tokenizer}'
retrieval_embedding_model = 'out/{name}_embedding'  # fitted on these documents; or any SentenceTransformer
retrieval_milvus_uri = 'out/{name}.db'
retrieval_collection = '{name}'

{shape}
max_iters = {steps}
warmup_iters = {warmup}
eval_interval = {interval}
"""
SMALL_SHAPE = """# the quickstart's shape: two CPU cores, some minutes
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
retrieval_layers = [1, 3]
retrieval_k_neighbors = 0  # pointers alone; with 2 it also reads what the embedding finds
retrieval_prefetch_batches = 16
learning_rate = 3e-3
eval_tokens = 80_000
log_interval = 10
compile = False  # needs a C++ compiler"""
LARGE_SHAPE = """# train.py's own shape, 124 M parameters: wants a GPU
gradient_accumulation_steps = 8
batch_size = 8"""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='FOLDER', help='what is below it is read')
    parser.add_argument('--name', help="of the corpus, its config and its collection (default: the first folder's)")
    parser.add_argument('--tokenizer', choices=('own', 'gpt2'),
                        help='own: a byte-level BPE fitted on the documents; gpt2: needed to start from GPT-2 '
                             '(default: own)')
    parser.add_argument('--kinds', default=','.join(ENDINGS), help='of files that are read (default: %(default)s)')
    parser.add_argument('--endings', default='', metavar='.ENDING,...', help='more endings of files that are text')
    parser.add_argument('--encoding', default='', help='of text that is not UTF-8 and declares no other, such as '
                        'cp1252 (default: such files are left out)')
    parser.add_argument('--val_fraction', type=float, default=VAL_FRACTION,
                        help='share of the documents that is held out (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true',
                        help='make tokenizer, embedding and config anew; what was trained and populated with the old '
                             'ones does not fit them')
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds.split(',')
    if unknown := [kind for kind in arguments.kinds if kind not in ENDINGS]:
        raise UserError(f'--kinds has {unknown[0]!r}: choose from {", ".join(ENDINGS)}')
    if not 0 < arguments.val_fraction < 1:
        raise UserError(f'--val_fraction is {arguments.val_fraction}: choose a share between 0 and 1, such as '
                        f'{VAL_FRACTION}')
    if arguments.encoding:
        try:
            b' '.decode(arguments.encoding, 'replace')
        except LookupError as error:
            raise UserError(f'--encoding={arguments.encoding} is none that Python knows: choose one such as cp1252 or '
                            f'shift_jis') from error
    return arguments


def find_files(folders, kinds):
    """
    {id: (path, kind)} of the files below the folders that may be read, in the order of a hash of their ids, and
    {reason: [ids]} of those that are left out; `kinds` are {ending: kind}. Links are followed, and no folder is
    entered twice.
    """
    found, left_out, entered = {}, defaultdict(list), set()
    for start in folders:
        above, unlisted = os.path.dirname(start), []
        for parent, subfolders, names in os.walk(start, onerror=unlisted.append, followlinks=True):
            if os.path.realpath(parent) in entered:
                subfolders.clear()
                continue
            entered.add(os.path.realpath(parent))
            for name in sorted(subfolders):
                if reason := why_not_enter(os.path.join(parent, name)):
                    left_out[f'folders: {reason}'].append(id_of(os.path.join(parent, name), above))
                    subfolders.remove(name)
            subfolders.sort()
            for name in sorted(names):
                path = os.path.join(parent, name)
                document_id, ending = id_of(path, above), os.path.splitext(name.lower())[1]
                if name.startswith(('.', '~$')) or name.endswith('~'):
                    left_out['hidden or backups'].append(document_id)
                elif ending not in kinds:
                    left_out[f'{OTHER}{ending or "no ending"}'].append(document_id)
                elif document_id in found:
                    raise UserError(f'{found[document_id][0]} and {path} would both be the document {document_id!r}: '
                                    f'name the folder that holds both of theirs, or rename one')
                else:
                    found[document_id] = path, kinds[ending]
        for error in unlisted:
            left_out[f'folders: {error.strerror}'].append(id_of(error.filename, above))
    return dict(sorted(found.items(), key=lambda item: hash64('split', item[0]) % 10_000)), left_out


def id_of(path, above):
    """A path from the folder `above` on; bytes that are not UTF-8 as \\xff, so that no two of them become one."""
    return os.fsencode(os.path.relpath(path, above)).decode('utf-8', 'backslashreplace').replace(os.sep, '/')


def why_not_enter(folder):
    """Why a folder holds nothing that its user wrote, or None."""
    name = os.path.basename(folder)
    if name.startswith('.'):
        return 'hidden'
    if name in NOT_ENTERED or name.endswith('.egg-info'):
        return name
    return 'a virtual environment' if os.path.exists(os.path.join(folder, 'pyvenv.cfg')) else None


def read_documents(files, left_out, share, encoding, held_out=()):
    """
    Yields (split, id, title, text) of each document of find_files' files, and adds to its `left_out`. The ids that are
    `held_out` already stay so; without any, the first one is, as a small corpus might have no other.
    """
    seen = set()
    for document_id, (path, kind) in tqdm(files.items(), desc='reading', unit=' files',
                                          disable=not sys.stderr.isatty()):
        try:
            title, text = extract(os.path.basename(document_id), kind, read_file(path), encoding)
        except (Skipped, OSError) as error:
            left_out[getattr(error, 'strerror', None) or str(error)].append(document_id)
            continue
        digest = hashlib.blake2b(' '.join(text.split()).encode(), digest_size=16).digest()
        if digest in seen:
            left_out['duplicates'].append(document_id)
            continue
        is_held_out = is_val(document_id, share) or document_id in held_out or not (seen or held_out)
        seen.add(digest)
        yield 'val' if is_held_out else 'train', document_id, title, text


def read_file(path):
    """A file's bytes. Skipped if it is none or too large."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:  # opening a pipe would wait for its writer
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Skipped('no regular file')
        if found.st_size > MAX_BYTES:
            raise Skipped(f'over {MAX_BYTES // 1_000_000} MB')
        return file.read()


def describe(files, left_out):
    """Lines on what was read and what was left out: how many of what ending, and why."""
    lost = {name for reason, names in left_out.items() if not reason.startswith(OTHER) for name in names}
    read = Counter(os.path.splitext(name.lower())[1] or 'no ending' for name in files if name not in lost)
    others = Counter({reason.removeprefix(OTHER): len(names) for reason, names in left_out.items()
                      if reason.startswith(OTHER)})
    lines = [f'read: {read.total():,} files ({in_words(read)})'] if read else []
    lines += [f'left out, of other kinds: {others.total():,} ({in_words(others)})'] if others else []
    for reason, names in sorted(left_out.items()):
        if not reason.startswith(OTHER):
            some = ', '.join(names[:3]) + ', ...' * (len(names) > 3)
            lines.append(f'left out, {reason}: {len(names):,} ({some})')
    return [visible(line) for line in lines]


def in_words(counts):
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in most[12:])
    return ', '.join([f'{count:,} {what}' for what, count in most[:12]] + [f'{rest:,} others'] * (rest > 0))


def config_text(name, tokenizer, train):
    """The config of a corpus whose train documents are `train`, a Written."""
    is_small = train.bytes <= SMALL
    tokens = 8 * 256 if is_small else 8 * 8 * 1024  # a step
    steps = EPOCHS * train.tokens // tokens
    steps = min(600, max(100, steps)) if is_small else max(1000, steps)
    return CONFIG.format(name=name, tokenizer=tokenizer, count=f'{train.tokens:,}', shape=(
        SMALL_SHAPE if is_small else LARGE_SHAPE), steps=steps, warmup=steps // 10, interval=steps // 2)


def main():
    arguments = parse_arguments()
    folders = [os.path.abspath(folder) for folder in arguments.folders]
    name = arguments.name or re.sub(r'\W+', '_', os.path.basename(folders[0]).lower(), flags=re.ASCII).strip('_')
    if not re.fullmatch(r'[A-Za-z_]\w{0,99}', name, re.ASCII):
        raise UserError(f'a corpus cannot be called {name!r}, as Milvus takes ASCII letters, digits and underscores: '
                        f'choose a --name')
    for folder in folders:
        if not os.path.isdir(folder):
            what = 'is a file: name the folder that it is in' if os.path.exists(folder) else 'does not exist'
            raise UserError(f'{folder} {what}')
    os.chdir(ROOT)  # the config's paths are relative to it
    corpus, config = Path('data/documents') / name, Path('config') / f'{name}.py'
    tokenizer_name = 'gpt2' if arguments.tokenizer == 'gpt2' else f'{corpus}/tokenizer.json'
    if config.exists():
        if f'{corpus}/train.parquet' not in config.read_text(encoding='utf-8'):
            raise UserError(f'{config} is there and of another corpus: choose another --name')
        if not arguments.overwrite:
            kept = load_settings([str(config)]).tokenizer
            if arguments.tokenizer and kept != tokenizer_name:
                raise UserError(f'{config} has tokenizer = {kept!r}, and --tokenizer={arguments.tokenizer} is another: '
                                f'choose another --name, or replace all that there is of {name} with --overwrite')
            tokenizer_name = kept
    fits = tokenizer_name == 'gpt2' or (os.path.exists(tokenizer_name) and not arguments.overwrite)
    tokenizer = load_tokenizer(tokenizer_name) if fits else None

    kinds = {ending: kind for ending, kind in KINDS.items() if kind in arguments.kinds}
    kinds |= {'': TEXT} if TEXT in arguments.kinds else {}  # README, LICENSE, Makefile
    kinds |= {f'.{ending.strip().lstrip(".").lower()}': TEXT for ending in arguments.endings.split(',') if ending}
    files, left_out = find_files(folders, kinds)
    if not files:
        raise UserError(f'no file that can be read in {", ".join(folders)}; '
                        f'{"; ".join(describe(files, left_out)) or "there are no files at all"}')
    check_readers({kind for _, kind in files.values()})
    try:
        corpus.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise UserError(f'{ROOT / corpus} cannot be made ({error.strerror}): use a copy of the project that is yours'
                        ) from error
    before = corpus / 'val.parquet'
    is_there = before.exists() and not arguments.overwrite
    held_out = files.keys() & pq.read_table(before, columns=['id'])['id'].to_pylist() if is_there else ()
    documents = read_documents(files, left_out, arguments.val_fraction, arguments.encoding, held_out)
    written = write_corpus(documents, corpus, f'{", ".join(folders)}: this gives', tokenizer, 'name a folder with more')
    write_atomically(json.dumps(left_out, indent=1), f'{corpus}/left_out.json')
    print('\n'.join(describe(files, left_out)))
    is_again = config.exists() and not arguments.overwrite
    if is_again:
        print(f'{config} stays as it is')
    else:
        write_atomically(config_text(name, tokenizer_name, written['train']), str(config))
        print(f'{config} is written')
    settings, embedding = load_settings([str(config)]), f'out/{name}_embedding'
    if settings.retrieval_embedding_model == embedding and (arguments.overwrite or not os.path.exists(embedding)):
        from retrieval.static_embedding import fit_embedding  # takes seconds
        fit_embedding(settings)
    print(f'next:\n  python -m retrieval.populate {config}{" --sync=True" * is_again}\n  python train.py {config}\n'
          f'  python sample.py --out_dir=out/{name} --start="..." --show_neighbors')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
