"""
Imports of files by a Milvus server, in place of inserts, for tens of millions of rows: populate --bulk=True writes them
as Parquet into retrieval_bulk_dir, and has the server import each. It is a folder that the server reads, too, or
s3://BUCKET/FOLDER of the server's own storage, MinIO for example:

    s3://a-bucket/nanoretro?endpoint_override=127.0.0.1:9000&scheme=http    # AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY

pymilvus' BulkWriter does the same, row by row, and needs three more packages; pyarrow writes columns.
"""
import os
import time
import uuid

import numpy as np

from configurator import UserError
from retrieval.knowledge_base import UNTOLD
from retrieval.local_server import is_local

FILE = 256 << 20  # bytes of vectors and tokens in a file, about
SINCE = (2, 3, 4)  # version of the first server that imports Parquet
POLL = 0.5  # seconds


class Imports:
    """Files of rows that a server imports into the collection."""

    def __init__(self, knowledge_base, settings, wait):
        """wait(work) is what work() returns, called again while Milvus is away."""
        version = knowledge_base.server_version()
        if version < SINCE:
            raise UserError(f'--bulk=True needs a Milvus server from version 2.3.4 on, which imports Parquet, and '
                            f'{knowledge_base.uri} is version {".".join(map(str, version))}: leave it out, or use a '
                            f'newer server')
        self.system, self.folder = open_folder(settings.retrieval_bulk_dir)
        self.knowledge_base, self.wait, self.prefix = knowledge_base, wait, f'{settings.retrieval_collection}-'
        self.tables, self.size, self.files = [], 0, {}  # {id of a task: path}

    def add(self, rows, vectors, is_new):
        """Rows and their vectors (n, D). Unless the collection is_new, those that it has are replaced."""
        import pyarrow as pa
        if not len(rows.id):
            return
        if not is_new:  # an import does not look for others of the same id
            self.wait(lambda: self.knowledge_base.delete(list(self.knowledge_base.rows(rows.id, [], latest=True))))
        vectors = vectors.astype(self.knowledge_base.metadata.vectors)
        tokens = [line[:length] for line, length in zip(rows.tokens, rows.length.tolist(), strict=True)]
        if vectors.dtype == np.float16:  # its bytes
            embeddings = pa.array(list(vectors.view(np.uint8)), pa.list_(pa.uint8()))
        else:
            embeddings = pa.array(list(vectors), pa.list_(pa.float32()))
        self.tables.append(pa.table({
            'id': rows.id, 'doc_id': rows.doc_id, 'position': rows.position, 'document': rows.document,
            'text': rows.text, 'tokens': pa.array(tokens, pa.list_(pa.int32())), 'embedding': embeddings}))
        self.size += vectors.nbytes + rows.tokens.nbytes
        if self.size >= FILE:
            self.send()

    def send(self):
        """Write the rows that have been added, and have them imported."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        if not self.tables:
            return
        path = f'{self.folder}/{self.prefix}{uuid.uuid4().hex}.parquet'
        try:
            with self.system.open_output_stream(path) as file:
                pq.write_table(pa.concat_tables(self.tables), file, row_group_size=10_000)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        name = path if self.system.type_name == 'local' else path.partition('/')[2]  # within the server's bucket
        # not begun again if the answer is lost: the rows might be imported twice
        self.files[self.knowledge_base.start_import(name)] = path
        self.tables, self.size = [], 0

    def finish(self):
        """Wait until the server has imported all of it. UserError if it cannot."""
        self.send()
        while self.files:
            for task, path in list(self.files.items()):
                state, reason = self.wait(lambda task=task: self.knowledge_base.import_state(task))
                if state == 'failed':
                    raise UserError(f'Milvus cannot import {path} ({reason}): see that retrieval_bulk_dir names a '
                                    f'folder that the server reads under the same path, or its own bucket')
                if state == 'done':
                    self.system.delete_file(path)
                    del self.files[task]
            time.sleep(POLL if self.files else 0)
        self.wait(self.knowledge_base.refresh)

    def remove_earlier(self):
        """Remove the files of a run that was interrupted."""
        from pyarrow.fs import FileSelector
        for entry in self.system.get_file_info(FileSelector(self.folder)):
            if entry.base_name.startswith(self.prefix) and entry.base_name.endswith('.parquet'):
                self.system.delete_file(entry.path)


def wait_for_imports(knowledge_base, wait, say):
    """Wait for imports of a run that was interrupted: what they import is not missing."""
    if is_local(knowledge_base.uri) or not SINCE <= knowledge_base.server_version() < UNTOLD or wait(
            knowledge_base.revision) is not None:
        return
    said = False
    while wait(knowledge_base.is_importing):
        if not said:
            say('waiting for the server to import the files of an earlier run')
        said = True
        time.sleep(POLL)
    wait(knowledge_base.refresh)


def open_folder(folder):
    """The file system and the path of a retrieval_bulk_dir. UserError if it cannot be written to."""
    from pyarrow.fs import FileSystem, LocalFileSystem
    if not folder:
        raise UserError("--bulk=True needs retrieval_bulk_dir: a folder that the server reads under the same path, or "
                        "s3://BUCKET/FOLDER of its own storage")
    try:
        system, path = FileSystem.from_uri(folder) if '://' in folder else (
            LocalFileSystem(), os.path.abspath(os.path.expanduser(folder)))
        system.create_dir(path)
        return system, path
    except (OSError, ValueError) as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder, error):
    return UserError(f'retrieval_bulk_dir {folder!r} cannot be written to ({" ".join(str(error).split())[:200]}): free '
                     f'some space, or name another that the server reads')
