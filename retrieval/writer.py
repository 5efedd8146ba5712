"""
One command at a time changes a collection: a lock that all commands of a user on this machine share.
"""
import fcntl
import os
import tempfile
import time
from contextlib import contextmanager

from configurator import UserError
from data.chunking import hash64
from retrieval.local_server import is_local

LEAVING = 8  # seconds that the processes of a killed command may take to end


@contextmanager
def writing(settings):
    """Keep other commands of this machine from changing the collection meanwhile. UserError if one is doing so."""
    uri, name = settings.retrieval_milvus_uri, settings.retrieval_collection
    place = os.path.realpath(os.path.expanduser(uri)) if is_local(uri) else uri
    path = f'{tempfile.gettempdir()}/nanoretro-writer-{os.getuid()}-{hash64(place, name) & (2**64 - 1):016x}'
    with open(path, 'a+') as file:
        deadline = time.monotonic() + LEAVING
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f'another process is changing collection {name!r} in {uri}: wait for its end, and '
                                    f'start again') from None
                time.sleep(0.1)
        yield
