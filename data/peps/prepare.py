"""
A second small corpus, of English prose: the Python Enhancement Proposals, from a file with a document {"id", "text"}
per line. Writes train.parquet, val.parquet, tokenizer.json and corpus.json beside this file.

    python data/peps/prepare.py peps.jsonl.gz
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, user_errors_as_one_line
from data.documents import DatasetConfig, load_documents
from data.prepare import write_corpus
from data.python_source.prepare import split

FOLDER = Path(__file__).resolve().parent


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        raise UserError('give the path of the file: python data/peps/prepare.py peps.jsonl.gz')
    documents = [(document.id, document.text) for document in load_documents([DatasetConfig(sys.argv[1])])]
    write_corpus(split(documents), FOLDER, f'{sys.argv[1]} gives')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
