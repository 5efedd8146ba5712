"""
Streamed datasets: tokens a second of one reading worker, from local Parquet with the gpt2 encoding, and the memory of
the processes over few and over many small documents. Prints a JSON line for each.

    python bench/stream.py [--quick]
    python bench/stream.py --documents=1000000,10000000
"""
import argparse
import json
import multiprocessing
import os
import random
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq

from configurator import load_settings, user_errors_as_one_line
from data.blocks import open_all_datasets
from data.documents import DatasetConfig
from data.stream import SequenceStream
from data.tokenizer import load_tokenizer

WORDS = ('the', 'of', 'and', 'to', 'in', 'a', 'is', 'that', 'for', 'it', 'as', 'was', 'with', 'be', 'by', 'on', 'not')


def write_source(path, megabytes):
    """Real texts: the Python source of the standard library, over again, each text another document."""
    texts = [file.read_text(errors='replace') for file in sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))]
    size = number = 0
    with pq.ParquetWriter(path, pa.schema([('id', pa.string()), ('text', pa.string())])) as writer:
        while size < megabytes * 1e6:
            writer.write_table(pa.table({'id': [f'{number} {i}' for i in range(len(texts))], 'text': texts}))
            size, number = size + sum(map(len, texts)), number + 1


def write_small(path, count):
    """Documents of about 20 words."""
    dice = random.Random(0)
    with pq.ParquetWriter(path, pa.schema([('id', pa.string()), ('text', pa.string())])) as writer:
        for start in range(0, count, 20_000):
            numbers = range(start, min(count, start + 20_000))
            writer.write_table(pa.table({'id': [str(number) for number in numbers],
                                         'text': [' '.join(dice.choices(WORDS, k=20)) for _ in numbers]}))


def memory(process):
    """Bytes of a process that are its own, without pages of files."""
    with open(f'/proc/{process}/smaps_rollup') as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(('Anonymous:', 'Swap:')))


def stream_all(path, settings, tokenizer):
    """Read a dataset once, by one worker. Tokens after the first block, seconds, peak bytes of the reader and of us."""
    config = DatasetConfig(path, streaming=True, epochs=1)
    stream = SequenceStream(open_all_datasets([config], tokenizer, settings, print), 1024, 8)
    next(stream)  # imports and the first block
    start, tokens, steps, peaks = time.perf_counter(), 0, 0, [0, 0]
    worker = stream.lanes[0].process.pid
    try:
        while True:
            batch, steps = next(stream), steps + 1
            if stream.lanes[0].places[0].position['block']:  # the first was read before
                tokens += int((batch.targets >= 0).sum())
            if steps % 50 == 0:
                peaks = [max(peak, memory(process)) for peak, process in zip(peaks, (worker, os.getpid()), strict=True)]
    except Exception as error:  # the documents are used up
        if 'used up' not in str(error):
            raise
    stream.close()
    return tokens, time.perf_counter() - start, peaks


def measure(kind, amount):
    """In a process of its own, so that no measurement finds the memory of another."""
    with user_errors_as_one_line(), tempfile.TemporaryDirectory() as folder:
        settings = load_settings([]).replace(data_cache_dir=f'{folder}/cache')
        tokenizer = load_tokenizer(settings.tokenizer)
        path = f'{folder}/documents.parquet'
        (write_source if kind == 'source' else write_small)(path, amount)
        tokens, seconds, (worker, own) = stream_all(path, settings, tokenizer)
    print(json.dumps({kind: amount, 'tokens': tokens, 'tokens_per_s': round(tokens / seconds),
                      'seconds': round(seconds, 1), 'worker_mb': round(worker / 1e6), 'own_mb': round(own / 1e6),
                      'cpus': os.cpu_count()}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--megabytes', type=int, default=100, help='of source, for the rate (default: %(default)s)')
    parser.add_argument('--documents', default='200000,2000000', help='small ones, for memory (default: %(default)s)')
    parser.add_argument('--quick', action='store_true', help='little of each')
    arguments = parser.parse_args()
    runs = [('source', arguments.megabytes), *(('documents', int(n)) for n in arguments.documents.split(',') if n)]
    if arguments.quick:
        runs = [('source', 20), ('documents', 20_000), ('documents', 40_000)]
    for run in runs:
        process = multiprocessing.get_context('spawn').Process(target=measure, args=run)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
