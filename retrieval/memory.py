"""
What retrieval has fetched, on disk: chunks' hits and rows' tokens, in an LMDB environment. Several processes of a node
may read and write it at once, and a crash leaves it whole. A second epoch, a resumed run, or a run of another model
over the same data finds its neighbors here, and neither embeds nor searches.

What is kept belongs to one state of one collection: when the collection has changed, all of it is dropped. When the
memory is full nothing more is added, and nothing is thrown out for it: an epoch that is larger than the memory would
throw out each entry just before it is asked for.
"""
import contextlib
import os

import lmdb

from configurator import UserError

VERSION = 1  # of the way that neighbors are found and stored; what another one stored is dropped
USABLE = 0.75  # of the file; LMDB writes each page anew before it frees the old one, also to drop entries


class Memory:
    """
    Byte strings by key, in a file of up to `gigabytes` in the folder. `collection` says whose they are. Entries of
    different `kinds`, strings, are apart. UserError where the folder can't be used.
    """

    def __init__(self, folder, gigabytes, collection, kinds):
        self.size, self.collection, self.kinds, self.full = int(gigabytes * 2**30), collection, kinds, False
        self.state, self.databases = None, {}
        try:
            os.makedirs(folder, exist_ok=True)
            self.environment = lmdb.open(folder, map_size=self.size, max_dbs=256, max_readers=1024)
            self.environment.reader_check()  # those that were killed would keep old pages from being used again
        except (OSError, lmdb.Error) as error:
            raise UserError(f'retrieval_cache_dir {folder!r} can not be used ({error}): name a folder on a local disk '
                            f'that you may write to, or set retrieval_cache_gb to 0') from error

    def go_over_to(self, state):
        """From now on it is this state of the collection, a string, that is remembered; None remembers nothing."""
        if state == self.state and (self.databases or state is None):
            return
        self.state, self.databases, self.full = state, {}, False
        if state is None:
            return
        mine = f'{self.collection} | '
        present = f'{mine}{VERSION} {state} '
        names = []
        with self._full_or_dropped(), self.environment.begin() as reading:
            names = [bytes(key) for key, _ in reading.cursor()]
        for name in names:
            if name.startswith(mine.encode()) and not name.startswith(present.encode()):
                with self._full_or_dropped(), self.environment.begin(write=True) as writing:
                    writing.drop(self.environment.open_db(name, writing))
        with self._full_or_dropped():
            self.databases = {kind: self.environment.open_db(f'{present}{kind}'.encode()) for kind in self.kinds}

    def get(self, kind, keys):
        """{key: value} of those of the keys that are remembered."""
        if kind in self.databases:
            with self._full_or_dropped(), self.environment.begin(self.databases[kind]) as reading:
                return dict(reading.cursor().getmulti(keys))
        return {}

    def put(self, kind, items):
        """Remember (key, value) pairs, all of them, or none where there is no room."""
        if kind not in self.databases or not items:
            return
        with self._full_or_dropped(), self.environment.begin(self.databases[kind], write=True) as writing:
            self.full = self._used(writing) > USABLE * self.size
            if not self.full:
                writing.cursor().putmulti(items)

    def _used(self, transaction):
        """Bytes that all entries take, also those of other collections."""
        names = [bytes(key) for key, _ in transaction.cursor(self.environment.open_db(None, transaction))]
        stats = [transaction.stat(self.environment.open_db(name, transaction)) for name in names]
        return sum(s['psize'] * (s['branch_pages'] + s['leaf_pages'] + s['overflow_pages']) for s in stats)

    @contextlib.contextmanager
    def _full_or_dropped(self):
        try:
            yield
        except lmdb.MapFullError:
            self.full = True
        except lmdb.MapResizedError:  # another run has it larger, which is larger than this one may fill
            self.environment.set_mapsize(0)
        except lmdb.BadDbiError:  # another run has seen the collection change first, and dropped these
            self.databases = {}

    def count(self, kind):
        """Number of entries of a kind."""
        with self.environment.begin() as reading:
            return reading.stat(self.databases[kind])['entries'] if kind in self.databases else 0

    def close(self):
        self.environment.close()
