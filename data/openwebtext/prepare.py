"""
OpenWebText, an open copy of what GPT-2 was trained on: 8 million web pages, 9 billion tokens. Writes train.parquet and
val.parquet (columns id, title, text) and corpus.json, the fingerprint, beside this file. It is downloaded from the
Hugging Face Hub, once, to the library's cache (some 40 GB), or read from a copy: files, a folder or a pattern, with a
column text.

    python data/openwebtext/prepare.py [--from=FOLDER]
    python train.py config/train_gpt2_openwebtext.py

As in nanoGPT 0.05 % of the pages are val; which ones follows from a hash of their text.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from configurator import UserError, user_errors_as_one_line
from data.chunking import document_hash
from data.documents import DatasetConfig, load_documents
from data.prepare import write_splits

FOLDER = Path(__file__).resolve().parent
HUB = 'Skylion007/openwebtext'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--from', dest='source', default=HUB,
                        help='a copy, or a dataset of the hub (default: %(default)s)')
    parser.add_argument('--val_fraction', type=float, default=0.0005, help='of the pages (default: %(default)s)')
    arguments = parser.parse_args()
    if not 0 < arguments.val_fraction < 1:
        raise UserError(f'--val_fraction is {arguments.val_fraction}: choose a share between 0 and 1, such as 0.0005')
    write_splits(read(arguments.source, arguments.val_fraction), FOLDER, ('train', 'val'))


def read(source, val_fraction):
    """Yields (split, id, title, text) of the pages, which have no titles."""
    held_out = DatasetConfig(source, val_fraction=val_fraction, held_out=True)
    pages = load_documents([DatasetConfig(source, id_field='')])
    for page in tqdm(pages, desc='reading', unit=' pages', unit_scale=True, disable=not sys.stderr.isatty()):
        yield 'val' if held_out.holds(document_hash('', page.id)) else 'train', page.id, '', page.text


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
