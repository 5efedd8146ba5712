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

from configurator import user_errors_as_one_line
from data.documents import as_dataset_configs, load_documents
from data.prepare import write_splits

FOLDER = Path(__file__).resolve().parent
HUB = 'Skylion007/openwebtext'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--from', dest='source', default=HUB,
                        help='a copy, or a dataset of the hub (default: %(default)s)')
    parser.add_argument('--val_fraction', type=float, default=0.0005, help='of the pages (default: %(default)s)')
    arguments = parser.parse_args()
    entry = dict(path=arguments.source, val_fraction=arguments.val_fraction, id_field='')
    write_splits(read(entry), FOLDER, ('train', 'val'))


def read(entry):
    """Yields (split, id, title, text) of the pages, which have no titles."""
    for split in ('train', 'val'):
        documents = load_documents(as_dataset_configs([entry], f'{split}_datasets'))
        for document in tqdm(documents, desc=split, unit=' pages', unit_scale=True, disable=not sys.stderr.isatty()):
            yield split, document.id, '', document.text


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
