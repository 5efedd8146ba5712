"""
What the prepare.py of every corpus does in the end: documents to train.parquet and val.parquet (columns id, title,
text), a byte-level BPE fitted on the train documents, and the fingerprint. Memory holds some documents at a time.
"""
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from configurator import UserError, save_atomically, sync
from data.chunking import chunk_document, hash64
from data.fingerprint import FILE as FINGERPRINT
from data.fingerprint import fingerprint, write_fingerprint
from data.tokenizer import END_OF_TEXT, load_tokenizer, tokenize

VOCABULARY = 8192
SMALL = 100_000_000  # bytes of train documents up to which it suits
CHUNK_SIZE = 64  # for the table that is printed
VAL_SHARE = 0.02
ROWS, ROWS_BYTES = 256, 64_000_000  # of a row group, whichever comes first
FIT_BYTES = 200_000_000  # of text that a tokenizer is fitted on; more change it little and take longer
LONG = 10_000
LONG_WORD, LONG_SPACE = re.compile(rf'\S{{{LONG}}}'), re.compile(rf'\s{{{LONG},}}')
COLUMNS = pa.schema([(name, pa.string()) for name in ('id', 'title', 'text')])
# letters with a preceding space, underscore or bracket; digits by three; symbols; line ends; indentation
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def is_val(document_id, share=VAL_SHARE):
    """Whether a document is held out: it depends on its id alone, so other documents may come and go."""
    return hash64('split', document_id) % 10_000 < share * 10_000


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


@dataclass
class Written:
    """What a Parquet file holds; its tokens end documents and are chunks on the grid."""
    path: str
    documents: int = 0
    bytes: int = 0  # of text in UTF-8
    tokens: int = 0
    chunks: int = 0

    def batches(self):
        with pq.ParquetFile(self.path, pre_buffer=False) as file:  # which would keep what it has read
            yield from file.iter_batches(ROWS, columns=['id', 'text'])

    def read(self):
        """(id, text) of each document."""
        for batch in self.batches():
            yield from zip(batch['id'].to_pylist(), batch['text'].to_pylist(), strict=True)

    def describe(self):
        return (f'{self.documents:10,} {self.bytes:12,} {self.tokens:12,} {self.chunks:9,} '
                f'{1 - self.tokens / (self.chunks * CHUNK_SIZE):8.1%}')


@contextmanager
def writing(documents, folder, splits):
    """
    Writes documents, (split, id, title, text), to the Parquet file of their split. Yields {split: Written}, to read
    them again; the files take the places of those of before when the `with` ends, or none of them does, if it fails.
    """
    for left in folder.glob('*.parquet.*.tmp'):  # by a process that was killed
        try:
            os.kill(int(left.name.split('.')[-2]), 0)
        except ProcessLookupError:
            left.unlink()
    written = {split: Written(f'{folder}/{split}.parquet.{os.getpid()}.tmp') for split in splits}
    try:
        with ExitStack() as files:
            writers = {split: files.enter_context(pq.ParquetWriter(written[split].path, COLUMNS)) for split in splits}
            rows = {split: [] for split in splits}
            sizes = dict.fromkeys(splits, 0)
            for split, *document in documents:
                size = len(document[-1].encode())
                written[split].documents += 1
                written[split].bytes += size
                rows[split].append(document)
                sizes[split] += size
                if len(rows[split]) == ROWS or sizes[split] > ROWS_BYTES:
                    writers[split].write_table(as_table(rows[split]))
                    rows[split], sizes[split] = [], 0
            for split in splits:
                if rows[split]:
                    writers[split].write_table(as_table(rows[split]))
        yield written
        for split in splits:
            sync(written[split].path)
        (folder / FINGERPRINT).unlink(missing_ok=True)  # it must not name other files than it is of
        for split in splits:
            os.replace(written[split].path, folder / f'{split}.parquet')
    finally:
        for split in splits:
            with suppress(OSError):
                os.unlink(written[split].path)


def as_table(rows):
    return pa.table([pa.array(values, pa.string()) for values in zip(*rows, strict=True)], schema=COLUMNS)


def write_corpus(documents, folder, source, tokenizer=None, advice='ask for more'):
    """
    Write documents, (split, id, title, text), as train.parquet and val.parquet of a folder, with corpus.json, and
    tokenizer.json, fitted on the train documents unless there is a `tokenizer`. Returns {split: Written}. UserError if
    a split has no document, which `source` begins, such as 'the folder gives', and `advice` ends.
    """
    with writing(documents, folder, ('val', 'train')) as written:  # train last: make takes it for all of them
        train, val = written['train'], written['val']
        if not train.documents or not val.documents:
            raise UserError(f'{source} {train.documents} train and {val.documents} val documents: {advice}')
        if not tokenizer:
            vocabulary = VOCABULARY if train.bytes <= SMALL else 4 * VOCABULARY
            print(f'fitting a tokenizer of {vocabulary:,} entries', flush=True)
            fitted = train_tokenizer(some_texts(train), vocabulary)
            save_atomically(fitted.save, str(folder / 'tokenizer.json'))
            tokenizer = load_tokenizer(str(folder / 'tokenizer.json'))
        print(f'{"":6} {"documents":>10} {"bytes":>12} {"tokens":>12} {"chunks":>9} {"padding":>8}')
        for split in ('train', 'val'):
            count_tokens(written[split], tokenizer)
            print(f'{split:6} {written[split].describe()}')
        found = fingerprint({split: written[split].read() for split in written})
    write_fingerprint(found, folder)
    print(f'fingerprint {found["hash"]}')
    return written


def write_splits(documents, folder, splits):
    """Write documents, (split, id, title, text), as write_corpus does, but without a tokenizer of their own."""
    with writing(documents, folder, splits) as written:
        for split in splits:
            if not written[split].documents:
                raise UserError(f'the {split} split has no documents: name another source, or another share')
            print(f'{split:9} {written[split].documents:12,} documents {written[split].bytes:16,} bytes')
        found = fingerprint({split: written[split].read() for split in splits})
    write_fingerprint(found, folder)
    print(f'fingerprint {found["hash"]}')


def some_texts(written):
    """
    The first texts, of FIT_BYTES together. Runs without or of white space are cut, as the fit takes time that is
    quadratic in them.
    """
    size = 0
    for _, text in written.read():
        if size >= FIT_BYTES:
            return
        size += len(text)
        yield LONG_WORD.sub(r'\g<0>\n', LONG_SPACE.sub(lambda match: match[0][:LONG], text))


def count_tokens(written, tokenizer):
    """Fill in the tokens and chunks of a Written."""
    def lengths_of(text):
        return chunk_document(tokenize(text, tokenizer), CHUNK_SIZE, tokenizer.eot_token)[1]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in written.batches():
            for lengths in pool.map(lengths_of, batch['text'].to_pylist()):
                written.tokens += int(lengths.sum())
                written.chunks += len(lengths)
