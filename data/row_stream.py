"""
The rows of a streamed dataset, by the `datasets` library: of the hub, a folder of save_to_disk, or local files, which
formats.py reads. One of several readers reads a share of the rows that no other one does, from any position that the
library's state_dict() names, and tries again when the network fails.
"""
import itertools
import logging
import time

import fsspec
import numpy as np

from configurator import NO_ROOM, UserError, reason_of
from data.documents import open_with_datasets
from data.formats import ROWS, check_schema, read_rows, rows_of_batches

NETWORK = {'aiohttp', 'fsspec', 'http', 'httpcore', 'httpx', 'huggingface_hub', 'requests', 'urllib3'}
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
LONGEST_PAUSE = 60  # seconds between two attempts


class StreamTimeout(UserError):
    """A streamed dataset could not be reached for longer than stream_timeout."""
    exit_code = 3


class RowStream:
    """
    Rows (path, where, row) of a DatasetConfig with its Files, as reader number `lane` of `lanes`. With a seed the files
    come in another order in each epoch. `say` receives news.
    """

    def __init__(self, config, files, lane=0, lanes=1, seed=None, timeout=0.0, say=print):
        self.config, self.files, self.lane, self.lanes, self.seed = config, files, lane, lanes, seed
        self.timeout, self.say = timeout, say
        self.size = min(ROWS, config.shuffle_buffer_size)  # rows that next() reads
        self.dataset = self.batches = None
        self.epoch, self.state = 0, None

    def seek(self, epoch, state):
        """Go on with an epoch from a state, or from its beginning, if that is None."""
        if (epoch, state) != (self.epoch, self.state):
            self.epoch, self.state, self.batches = epoch, state, None

    def next(self):
        """The next rows, as a list, empty at the end; self.state is then that after them. StreamTimeout; UserError."""
        def read():
            try:
                if self.batches is None:
                    self.batches = self._open()
                rows = next(self.batches, [])
                self.state = self.rows.state_dict()
                return rows
            except Exception:
                self.batches = None  # begin again after the last rows that were read
                raise
        return wait_for_network(read, self.config, self.files, self.timeout, self.say)

    def _open(self):
        """An iterator of lists of rows from self.state on."""
        from datasets.distributed import split_dataset_by_node
        if self.dataset is None:
            self.dataset = open_rows(self.config, self.files)
        self.rows = split_dataset_by_node(self.dataset, self.lane, self.lanes)
        if self.seed is not None:  # the library shuffles the files, and nothing else, by the epoch
            self.rows.set_epoch(int(np.random.default_rng([self.seed, self.epoch]).integers(1, 2**31)))
        if self.state is not None:
            self.rows.load_state_dict(self.state)
        return self._of_files() if self.files.paths and not self.files.saved else self._of_tables()

    def _of_files(self):
        rows = iter(self.rows)
        while some := [example['row'] for example in itertools.islice(rows, self.size)]:
            yield some

    def _of_tables(self):
        for table in self.rows.iter(self.size):
            try:
                rows = rows_of_batches([table], self.config, check_schema(table.schema, self.config))
                yield [(self.config.path, 'in the stream', row) for _, row in rows]
            except (UserError, ArithmeticError) as error:
                raise UserError(f'dataset {self.config.path!r}: {error}') from error


def wait_for_network(work, config, files, timeout, say):
    """
    What work() returns, tried again, with growing pauses, while the hub or the network fails. StreamTimeout after
    `timeout` seconds of that; UserError if the dataset of the hub cannot be read at all.
    """
    failed_since, pause = None, 1.0
    while True:
        try:
            found = work()
            if failed_since:
                say(f'{config.path} can be read again')
            return found
        except Exception as error:  # of many libraries, or a UserError of one, when the dataset is opened
            reason = error.__cause__ or error if isinstance(error, UserError) else error
            if not files.hub or not is_of_network(reason):
                if isinstance(error, UserError) or not files.hub:
                    raise
                raise UserError(f'the dataset {config.path!r} cannot be read ({reason_of(reason)}): name another, or a '
                                f'revision of it that can') from error
            failed_since = failed_since or time.monotonic()
            waited = time.monotonic() - failed_since
            if waited >= timeout:
                raise StreamTimeout(f'waited {waited:.0f} s for the dataset {config.path!r}, and stream_timeout is '
                                    f'{timeout:.0f} ({reason_of(reason)})') from error
            say(f'waiting for the dataset {config.path}: {waited:.0f} s of at most {timeout:.0f} s '
                f'({reason_of(reason)})')
            time.sleep(min(pause, timeout - waited))
            pause = min(2 * pause, LONGEST_PAUSE)


def open_rows(config, files):
    """An IterableDataset, with a shard a file: examples with a 'row' if it is of local files, else Arrow tables."""
    import datasets
    datasets.logging.set_verbosity_error()  # wait_for_network() says what happens
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 3  # and tries for longer
    logging.getLogger('huggingface_hub').setLevel(logging.CRITICAL)
    if 'zstd' not in fsspec.available_compressions():  # which needs one more package, where pyarrow does
        fsspec.compression.register_compression('zstd', open_zstd, 'zst')
    if files.paths and not files.saved:
        return datasets.IterableDataset.from_generator(rows_of_files, gen_kwargs=dict(paths=files.paths, config=config))
    rows = open_with_datasets(config, files)
    if not isinstance(rows, datasets.IterableDataset):  # of a saved dataset, which has a shard a file
        rows = rows.to_iterable_dataset(num_shards=min(len(rows.cache_files), len(rows)) or 1)
    return rows.with_format('arrow')


def rows_of_files(paths, config):
    """Yields examples of an IterableDataset."""
    for path in paths:
        for where, row in read_rows(path, config):
            yield dict(row=(path, where, row))


def open_zstd(file, **_):
    """A file of fsspec, decompressed."""
    import pyarrow
    return pyarrow.CompressedInputStream(file, 'zstd')


def is_of_network(error):
    """Whether an exception may pass: a connection that failed, a server that does not answer, or not now."""
    from huggingface_hub import is_offline_mode
    if is_offline_mode():  # by HF_HUB_OFFLINE, which the user has set
        return False
    status = getattr(getattr(error, 'response', None), 'status_code', getattr(error, 'status', None))
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return False
    if isinstance(error, (UserError, *PERMANENT)) or getattr(error, 'errno', None) in NO_ROOM:
        return False
    if isinstance(error, RuntimeError) and 'client has been closed' in str(error):  # by the hub's own retry
        return True
    roots = {kind.__module__.partition('.')[0] for kind in type(error).__mro__}
    return isinstance(error, (OSError, TimeoutError)) or type(error).__name__ == 'TimeoutError' or bool(roots & NETWORK)
