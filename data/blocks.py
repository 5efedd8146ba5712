"""
Streamed datasets, which are never wholly on disk. Each reading process, a *lane*, takes its share of the documents in
blocks: as many as are shuffled together, tokenized into a folder of data_cache_dir that is a ChunkedDataset like any
other, whose sequences stream.py takes in shuffled order. While one block is used the next is read. Used ones go.

A block is a function of its position, plain values of which the library's state_dict() is one. So a lane's state is the
position of its block and how many sequences of it are taken: after a kill the block is found on disk, or read again.
"""
import json
import math
import multiprocessing
import os
import signal
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from system import end_with_parent

from configurator import Settings, UserError
from data.chunk_store import (
    VERSION,
    ChunkedDataset,
    find_meta,
    locked,
    make_room,
    name_of,
    open_datasets,
    place_of,
    remove,
    state_of,
    usable_cache,
)
from data.documents import Counts, DatasetConfig, Files, as_documents, find_files, look_at, open_with_datasets
from data.ingest import build
from data.row_stream import RowStream, wait_for_network
from data.tokenizer import load_tokenizer, vocabulary_hash

SMALL_BLOCKS = 4  # the first ones of a run, each twice as large as the one before, so that training begins soon
BLOCK_TEXT = 1 << 28  # characters after which a block ends, however few its documents are
SAY_AGAIN = 60  # seconds after which a reader says how many rows it has left out
START = dict(epoch=0, block=0, documents=0, state=None)  # a position; documents: those that its epoch had before


@dataclass
class StreamedDataset:
    """A streamed dataset, of which nothing has been read."""
    config: DatasetConfig
    files: Files
    name: str  # of its blocks: another one when a file changes
    hash: str  # of what it is, wherever it lies
    settings: Settings
    end_of_text: int
    counts: Counts  # of files alone
    num_chunks = None  # is not known

    @property
    def chunk_size(self):
        return self.settings.retrieval_chunk_size

    def parts(self, tokenizer, lane=0, lanes=1, say=print):
        """
        Yields a lane's documents, all of one epoch, as ChunkedDatasets one after another, in the order in which they
        are read, and says at the end what there was.
        """
        reader, position, counts = BlockReader(self, tokenizer, lane, lanes, say=say), START, replace(self.counts)
        reader.may_be_empty = lanes > 1
        while not position['epoch']:
            folder, following = reader.read(position)
            try:
                part = ChunkedDataset(folder, self.config, self.end_of_text)
            except FileNotFoundError:  # removed meanwhile, by another process that fills a collection
                continue
            counts.add(part.counts)
            yield part
            part.close()
            remove(folder)
            position = following
        say(f'{self.config.path}: {counts.describe()}' + f', read by process {lane + 1} of {lanes}' * (lanes > 1))


def open_all_datasets(configs, tokenizer, settings, say):
    """As open_datasets, with StreamedDatasets for those that are streamed; their documents are not compared."""
    on_disk = [config for config in configs if not config.streaming]
    opened = iter(open_datasets(on_disk, tokenizer, settings, say))
    return [describe_stream(config, tokenizer, settings, say) if config.streaming else next(opened)
            for config in configs]


def describe_stream(config, tokenizer, settings, say):
    """The StreamedDataset of a DatasetConfig. UserError if it is not there; StreamTimeout if the hub is not."""
    files = find_files(config)
    if files.hub:  # finds the revision, which all readers then read
        wait_for_network(lambda: open_with_datasets(config, files), config, files, settings.stream_timeout, say)
    what = [VERSION, vocabulary_hash(tokenizer), settings.retrieval_chunk_size]
    # times differ between copies of the files, and numbers of files between machines
    sizes = files.revision or [(os.path.basename(path), look_at(path).st_size) for path in files.paths]
    name = name_of([*what, config.what_is_read(place_of(config, files)), state_of(files)])
    return StreamedDataset(config, files, name, name_of([*what, config.what_is_read(''), sizes]), settings,
                           tokenizer.eot_token, Counts(files=len(files.paths), other_files=files.other))


class BlockReader:
    """Reads the blocks of one lane of a StreamedDataset."""

    def __init__(self, dataset, tokenizer, lane=0, lanes=1, seed=None, say=print):
        self.config, self.settings, self.tokenizer, self.say = dataset.config, dataset.settings, tokenizer, say
        self.base = name_of([dataset.name, lane, lanes, seed])
        file_seed = None if self.config.max_documents else seed  # the first documents are those of the first files
        self.rows = RowStream(self.config, dataset.files, lane, lanes, file_seed, self.settings.stream_timeout, say)
        self.lane, self.lanes, self.may_be_empty = lane, lanes, False
        share = -(-(self.config.max_documents - lane) // lanes)
        self.most = max(0, share) if self.config.max_documents else math.inf

    def read(self, position):
        """The folder of the block at a position, read now unless it is there, and the position after it."""
        with usable_cache(self.settings) as parent:
            folder = f'{parent}/{self.base}-{name_of(json.dumps(position, sort_keys=True))}'
            with locked(f'{parent}/{self.base}.lock',
                        lambda: self.say(f'waiting for another process, which is reading {self.config.path}')):
                meta = find_meta(folder)  # once: another process may be done with the block, and remove it
                if meta is None:
                    counts, more = Counts(), {}
                    say = self.say if not position['block'] else lambda news: None  # later ones are read meanwhile
                    build(folder, self._documents(position, counts, more), counts, self.tokenizer,
                          self.settings.retrieval_chunk_size, say, self.config.path, is_block=True, more=more)
                    make_room(parent, self.settings.data_cache_gb)
                return folder, (meta or more)['following']

    def _documents(self, position, counts, more):
        """Yields the Documents of the block at a position, and writes the position after it to more['following']."""
        size = max(1, self.config.shuffle_buffer_size >> max(0, SMALL_BLOCKS - position['block']))
        most, text, rows = self.most - position['documents'], 0, True
        self.rows.seek(position['epoch'], position['state'])
        while rows and counts.documents < min(size, most) and text < BLOCK_TEXT:
            rows = self.rows.next() if most > 0 else []
            for document in as_documents(rows, self.config, counts, most):
                text += len(document.text)
                yield document
        documents = position['documents'] + counts.documents
        following = dict(position, block=position['block'] + 1, documents=documents, state=self.rows.state)
        if not rows or counts.documents >= most:
            if not documents and not self.may_be_empty:
                raise UserError(f'dataset {self.config.path!r} has no documents with text ({counts.describe()})' + (
                    f' for reader {self.lane + 1} of {self.lanes}: lower stream_workers, as it has too few documents '
                    f'for as many readers, leave streaming out, or name another' if self.lanes > 1 else
                    ': name another'))
            following.update(epoch=position['epoch'] + 1, documents=0, state=None)
        more['following'] = following


@dataclass
class Place:
    """Where a Lane is in a StreamedDataset."""
    position: dict  # of the block
    taken: int = 0  # sequences of it
    block: ChunkedDataset | None = None  # once it is needed
    following: dict | None = None


class Lane:
    """
    A reading process, which reads the blocks of some StreamedDatasets {number: dataset} ahead of their use, and where
    it is in each: `places` are (position, taken sequences) by number, or none, to begin.
    """

    def __init__(self, datasets, chunks, lane, lanes, seed, places=None, say=print):
        self.datasets, self.chunks, self.lane, self.say = datasets, chunks, lane, say
        self.places = {number: Place(*(places or {}).get(str(number), (START, 0))) for number in datasets}
        self.asked, self.answers, self.used = {}, {}, []
        self.counts, self.said = {number: Counts() for number in datasets}, -math.inf
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=read_blocks, args=(datasets, lane, lanes, seed, theirs),
                                       name=f'reader {lane}', daemon=True)
        self.process.start()
        theirs.close()
        for number, place in self.places.items():  # all begin to be read
            if not self._has_ended(number, place.position):
                self._ask(number, place.position)

    def state(self):
        """What `places` takes, for JSON."""
        return {str(number): (place.position, place.taken) for number, place in self.places.items()}

    def next_sequence(self, number):
        """(ChunkedDataset, number of one of its sequences, its part of the seed) of a dataset, or None at its end."""
        place = self.places[number]
        while self.pipe.poll():  # an error in a rarely drawn dataset ends the run now, and not hours later
            self._receive()
        while True:
            if self._has_ended(number, place.position):
                return None
            if place.block is None:
                self._open(number)
            if place.taken < -(-place.block.num_chunks // self.chunks):
                place.taken += 1
                return place.block, place.taken - 1, [number, self.lane, place.position['block']]
            self.used.append(place.block)
            self.places[number] = place = Place(place.following)

    def drop_used(self):
        """Remove the blocks that nothing will be read of any more."""
        for block in self.used:
            block.close()
            remove(block.folder)
        self.used.clear()

    def _has_ended(self, number, position):
        epochs = self.datasets[number].config.epochs
        return 0 < epochs <= position['epoch']

    def _ask(self, number, position):
        self.asked[number] = position
        with suppress(OSError):  # the process has ended, which _receive says
            self.pipe.send((number, position))

    def _open(self, number):
        """Open the next block, and ask for the one after it. The error of the reading process, if there was one."""
        place = self.places[number]
        while place.block is None:
            if self.asked.get(number) != place.position:
                self._ask(number, place.position)
            while number not in self.answers:
                self._receive()
            folder, place.following = self.answers.pop(number)
            del self.asked[number]
            try:
                place.block = ChunkedDataset(folder, self.datasets[number].config, self.datasets[number].end_of_text)
            except OSError:  # removed meanwhile, to make room: read it again
                pass
        self.counts[number].add(place.block.counts)
        if place.block.counts.bad and time.monotonic() - self.said > SAY_AGAIN:
            self.said = time.monotonic()
            self.say(f'{self.datasets[number].config.path}, by reader {self.lane + 1} since it began: '
                     f'{self.counts[number].describe()}')
        if not self._has_ended(number, place.following):
            self._ask(number, place.following)

    def _receive(self):
        try:
            item = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise UserError(f'reader {self.lane + 1} of the streamed datasets was ended, with code '
                            f'{self.process.exitcode}: if memory is short, lower stream_workers or '
                            f'shuffle_buffer_size, and resume') from None
        if isinstance(item, Exception):
            raise item
        if isinstance(item, str):
            self.say(item)
        else:
            self.answers[item[0]] = item[1:]

    def close(self):
        """End the process; blocks that were not used stay, and are found when the run is resumed."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.drop_used()
        for place in self.places.values():
            if place.block:
                place.block.close()


def read_blocks(datasets, lane, lanes, seed, pipe: Connection):
    """The process: answers (number, position) with (number, folder, position after it), news and exceptions between."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's, which ends us
    end_with_parent()
    try:
        tokenizer = load_tokenizer(datasets[min(datasets)].settings.tokenizer)
        readers = {number: BlockReader(dataset, tokenizer, lane, lanes, seed, pipe.send)
                   for number, dataset in datasets.items()}
        while True:
            try:
                number, position = pipe.recv()
            except (EOFError, OSError):
                return  # nobody asks any more
            pipe.send((number, *readers[number].read(position)))
    except BaseException as error:  # whose class others may lack
        with suppress(OSError):
            pipe.send(error if isinstance(error, UserError) else RuntimeError(traceback.format_exc()))
