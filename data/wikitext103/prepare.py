"""
WikiText-103: 28,595 good and featured articles of Wikipedia, 100 million words, on which RETRO's paper reports
perplexities. Writes train.parquet, val.parquet and test.parquet (columns id, title, text; a document is an article,
its id the title) and corpus.json, the fingerprint, beside this file. It is downloaded from the Hugging Face Hub, or
read from a folder: of the files wiki.train.raw, wiki.valid.raw and wiki.test.raw, or a copy of the hub's repository.

    python data/wikitext103/prepare.py [--from=FOLDER]
"""
import argparse
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, reason_of, user_errors_as_one_line
from data.prepare import write_splits

FOLDER = Path(__file__).resolve().parent
HUB, SUBSET = 'Salesforce/wikitext', 'wikitext-103-raw-v1'
SPLITS = dict(train='train', val='validation', test='test')
TITLE = re.compile(r'\s*= ([^=]|[^=].*[^=]) =')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--from', dest='source', default=HUB, help='a folder (default: %(default)s of the hub)')
    arguments = parser.parse_args()
    write_splits(((split, title, title, text) for split, name in SPLITS.items()
                  for title, text in as_articles(read_lines(arguments.source, name))), FOLDER, tuple(SPLITS))


def read_lines(source, split):
    """The lines of a split, each a paragraph, a heading, or empty."""
    path = Path(source, f'wiki.{split.replace("validation", "valid")}.raw')
    if path.is_file():
        with open(path, encoding='utf-8') as file:
            yield from file
        return
    import datasets
    try:
        rows = datasets.load_dataset(source, SUBSET, split=split)
    except Exception as error:  # the library raises many unrelated classes
        raise UserError(f'{source!r} did not provide {SUBSET} ({reason_of(error, 300)}): connect, or name a '
                        f"folder by --from that holds the files wiki.*.raw or a copy of the hub's repository"
                        ) from error
    for row in rows:
        yield row['text']


def as_articles(lines):
    """Yields (title, text) of the articles of which these are the lines. A title follows an empty line."""
    titles = Counter()

    def as_document():
        title = TITLE.fullmatch(article[0]).group(1)
        titles[title] += 1
        return title if titles[title] == 1 else f'{title} ({titles[title]})', '\n'.join(article).strip()

    article, was_empty = [], True
    for line in lines:
        line = line.rstrip()  # the hub and the files end them differently
        if was_empty and TITLE.fullmatch(line):
            if article:
                yield as_document()
            article = [line.strip()]
        elif article:
            article.append(line)
        was_empty = not line
    if article:
        yield as_document()


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
