"""
The neighbor cache: what retrieval has fetched, on disk: chunks' hits and rows' tokens, in an LMDB environment. Several
processes of a node may read and write it at once, and a crash leaves it whole. A second epoch, a resumed run, or a run
of another model over the same data finds its neighbors here, and neither embeds nor searches.

Entries belong to one revision of one collection: when the collection changes, all of them are dropped, but for those
that were precomputed, which answer for their own revision alone (offline.py). A full cache adds nothing more and evicts
nothing: an epoch larger than the cache would evict each entry just before it is needed.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys

import lmdb

from configurator import UserError

VERSION = 1  # of how neighbors are found and stored; what another version stored is dropped
DATA = 'data.mdb'
DAMAGE = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.VersionMismatchError,
          lmdb.BadValsizeError, lmdb.CursorFullError, lmdb.PageFullError)
PAGE = 4096  # bytes
USABLE = 0.75  # of the file: LMDB writes a page anew before it frees the old one, even to drop entries


def cache_name(settings):
    """The name of the collection of the settings in the cache."""
    return f'{settings.retrieval_milvus_uri} {settings.retrieval_collection}'


class NeighborCache:
    """
    Byte strings by key, in a file of up to `gigabytes` in the folder, for a collection named by the string
    `collection`. Entries of different `kinds`, strings, are separate. A damaged file is thrown away, which `say`
    reports. UserError if the folder cannot be used.
    """

    def __init__(self, folder, gigabytes, collection, kinds, say=None):
        self.folder, self.size, self.kinds, self.is_full = folder, int(gigabytes * 2**30), kinds, False
        self.collection = collection
        self.say = say or (lambda text: print(text, file=sys.stderr))
        self.revision, self.inode, self.is_broken = None, None, False
        try:
            os.makedirs(folder, exist_ok=True)
            self._open()
        except (OSError, lmdb.Error) as error:
            raise UserError(f'retrieval_cache_dir {folder!r} cannot be used ({error}): name a folder on a local disk '
                            f'that you may write to, or set retrieval_cache_gb to 0') from error

    def _open(self):
        self.environment, self.databases = None, {}
        try:
            self._open_file()
        except DAMAGE as error:
            self._throw_away(error)
            self._open_file()

    def _open_file(self):
        path = os.path.join(self.folder, DATA)
        self.inode = os.stat(path).st_ino if os.path.exists(path) else None
        self.environment = lmdb.open(self.folder, map_size=self.size, max_dbs=256, max_readers=1024)
        self.inode = os.stat(path).st_ino
        self.environment.reader_check()  # killed readers would keep old pages from being reused
        pages = self.environment.info()['last_pgno'] + 1
        if pages * self.environment.stat()['psize'] > os.path.getsize(path):
            raise lmdb.CorruptedError('it has been cut off')  # reading beyond its end would kill the process

    def _throw_away(self, error):
        """Remove the damaged file, unless another process has. Who has it open keeps what it has."""
        if self.environment is not None:
            self.environment.close()
        with open(os.path.join(self.folder, '.throw-away'), 'a') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(os.path.join(self.folder, DATA)).st_ino != self.inode:
                    return
                for name in (DATA, 'lock.mdb'):
                    os.unlink(os.path.join(self.folder, name))
        self.say(f'the neighbor cache in {self.folder} was damaged ({error}), and is thrown away: neighbors are '
                 f'searched for anew')

    def use_revision(self, revision):
        """Read and write entries of this revision, a string, and drop those of others. None: neither read nor write."""
        if self.environment is None:  # it could not be opened again
            return
        if revision == self.revision and (self.databases or self.is_broken or revision is None):
            return
        self.revision, self.databases, self.is_full = revision, {}, False
        if revision is None:
            return
        prefix = f'{short_hash(self.collection)} | '  # LMDB's keys are short
        current = f'{prefix}{VERSION} {revision} '
        kept = {record['revision'] for record in self.records().values()}
        kept = (current.encode(), self._records_name(), *(f'{prefix}{VERSION} {name} '.encode() for name in kept))
        names = []
        with self._tolerating_others(), self.environment.begin() as reading:
            names = [bytes(key) for key, _ in reading.cursor()]
        for name in names:
            is_readable = re.match(rb'[0-9a-f]{16} \| ', name)  # earlier versions had other names
            if not is_readable or (name.startswith(prefix.encode()) and not name.startswith(kept)):
                with self._tolerating_others(), self.environment.begin(write=True) as writing:
                    writing.drop(self.environment.open_db(name, writing))
        with self._tolerating_others():
            self.databases = {kind: self.environment.open_db(f'{current}{kind}'.encode()) for kind in self.kinds}

    def get(self, kind, keys):
        """{key: value} of those of the keys that are cached."""
        if kind in self.databases:
            with self._tolerating_others(), self.environment.begin(self.databases[kind]) as reading:
                return dict(reading.cursor().getmulti(keys))
        return {}

    def put(self, kind, items):
        """Add (key, value) pairs, all of them, or none if there is no room."""
        if kind not in self.databases or not items or self.is_broken:
            return
        with self._tolerating_others(), self.environment.begin(self.databases[kind], write=True) as writing:
            self.is_full = self._used(writing) > USABLE * self.size
            if not self.is_full:
                writing.cursor().putmulti(items)

    def records(self):
        """{key: value} of what put_record has stored for the collection, whatever its revision."""
        found = {}
        if self.environment is None:
            return found
        with self._tolerating_others(), contextlib.suppress(lmdb.NotFoundError):
            database = self.environment.open_db(self._records_name(), create=False)
            with self.environment.begin(database) as reading:
                found = {bytes(key).decode(): json.loads(bytes(value)) for key, value in reading.cursor()}
        return found

    def put_record(self, key, value):
        """
        Store a dict by a string, whose 'revision' names the entries that are kept from now on. Whether there is room.
        """
        with self._tolerating_others():
            database = self.environment.open_db(self._records_name())
            with self.environment.begin(database, write=True) as writing:
                self.is_full = self._used(writing) > USABLE * self.size
                if not self.is_full:
                    writing.put(key.encode(), json.dumps(value).encode())
        return not self.is_full

    def drop_records(self, but=''):
        """Remove the records of other revisions than `but`; what they kept is dropped by use_revision. Their number."""
        others = [key for key, record in self.records().items() if record['revision'] != but]
        if others:
            with self._tolerating_others():
                database = self.environment.open_db(self._records_name())
                with self.environment.begin(database, write=True) as writing:
                    for key in others:
                        writing.delete(key.encode())
        return len(others)

    def _records_name(self):
        return f'{short_hash(self.collection)} | precomputed'.encode()

    def _used(self, transaction):
        """Bytes that all entries take, other collections' included."""
        names = [bytes(key) for key, _ in transaction.cursor(self.environment.open_db(None, transaction))]
        stats = [transaction.stat(self.environment.open_db(name, transaction)) for name in names]
        return sum(s['psize'] * (s['branch_pages'] + s['leaf_pages'] + s['overflow_pages']) for s in stats)

    @contextlib.contextmanager
    def _tolerating_others(self):
        """
        Tolerate that other runs fill, resize or drop what is shared, and a full disk: lookups miss, additions are
        skipped. A damaged file is replaced by an empty one.
        """
        try:
            yield
        except (lmdb.MapFullError, lmdb.ReadersFullError):
            self.is_full = True
        except lmdb.MapResizedError:  # another run has made it larger than this one may fill
            self.environment.set_mapsize(0)
        except lmdb.BadDbiError:  # another run saw the collection change first, and dropped these entries
            self.databases = {}
        except DAMAGE as error:
            try:
                self._throw_away(error)
                self._open()
            except (lmdb.Error, OSError) as another:
                self.databases = {}
                self._stop_writing(another)
        except lmdb.Error as error:  # of the system, such as a full disk
            self._stop_writing(error)

    def _stop_writing(self, error):
        self.is_full = self.is_broken = True
        self.say(f'the neighbor cache in {self.folder} cannot be written any more ({error}): see whether there is '
                 f'room; what it lacks is searched for')

    def count(self, kind):
        """Number of entries of a kind."""
        if kind not in self.databases:
            return 0
        with self.environment.begin() as reading:
            return reading.stat(self.databases[kind])['entries']

    def drop(self):
        """Remove all entries of the collection."""
        self.drop_records()
        self.use_revision('')

    def close(self):
        if self.environment is not None:
            self.environment.close()


def bytes_of(count, key, value):
    """About how many bytes so many entries take at most, of keys and values of these sizes: pages are half full."""
    if key + value < PAGE // 2:
        return 2 * count * (key + value + 10)
    return count * (-(-(value + 16) // PAGE) * PAGE + 2 * (key + 18))  # a large value has pages of its own


def short_hash(text):
    return hashlib.blake2b(text.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()
