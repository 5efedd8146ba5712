"""
A real Milvus server for benchmarks and tests, from the PyPI package `milvus`, which ships the binary of Milvus 2.3.5.
The binary listens on fixed ports of all addresses. It therefore runs in its own network namespace (Linux only), and a
free port of 127.0.0.1 is forwarded into it.

    with MilvusServer(folder) as server: ... server.uri, server.kill(), server.start() ...
"""
import array
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

PORT = 19530  # inside the namespace
QUIET = 90  # seconds without a change after which a server is done: it looks for segments to merge once a minute
UNSHARE = ['unshare', '--user', '--map-root-user', '--net', '--pid', '--mount-proc', '--fork', '--kill-child']


def why_not():
    """Why the server cannot run on this machine; '' if it can."""
    if find_spec('milvus') is None:
        return 'the package milvus is not installed (requirements-dev.txt)'
    try:
        if subprocess.run([*UNSHARE, 'true'], capture_output=True).returncode:
            return f'this system does not allow {" ".join(UNSHARE)}'
    except FileNotFoundError:
        return 'unshare, which is part of util-linux, is not installed'
    return ''


class MilvusServer:
    """A server with its data in `folder`. After kill(), start() restarts it on the same data and port."""

    def __init__(self, folder):
        self.folder, self.port, self.process = str(folder), 0, None

    @property
    def uri(self):
        return f'http://127.0.0.1:{self.port}'

    def start(self):
        """Start the server and wait until it is ready, about ten seconds. RuntimeError if it fails."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(('127.0.0.1', self.port))
            listener.listen(64)
            self.port = listener.getsockname()[1]
            self.process = subprocess.Popen(
                [*UNSHARE, sys.executable, __file__, str(listener.fileno()), self.folder], text=True,
                pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        line = self.process.stdout.readline()
        if line != 'ready\n':
            raise RuntimeError(f'the Milvus server did not start: {line}{self.process.stdout.read()}')

    def kill(self):
        """Kill the server with SIGKILL."""
        self.process.kill()  # --kill-child takes down the whole namespace
        self.process.stdout.read()  # until EOF, when every process in the namespace has exited
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        if self.process:
            self.kill()


def wait_until_indexed(client, collection, count, quiet=QUIET):
    """
    Wait until all rows are indexed, the index is what answers, and that has been so for `quiet` seconds: the number of
    segments, each with an index of its own. RuntimeError after an hour.
    """
    complete_since, end = None, time.monotonic() + 3600
    while time.monotonic() < end:
        loaded = client.list_loaded_segments(collection)
        # rows are pending, too, while segments that were merged get a new index, which takes the processor
        is_complete = (client.describe_index(collection, 'embedding')['pending_index_rows'] == 0
                       and all(segment.index_name for segment in loaded)
                       and sum(segment.num_rows for segment in loaded) == count)
        complete_since = (complete_since or time.monotonic()) if is_complete else None
        if is_complete and time.monotonic() - complete_since >= quiet:
            return len(loaded)
        time.sleep(0.5)
    raise RuntimeError(f'the index of {collection} is not complete after an hour')


def main():
    """Inside the namespace: run the server and relay connections to it from the inherited listener."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    request = array.array('B', b'lo'.ljust(16, b'\0') + (0x41).to_bytes(2, sys.byteorder) + bytes(22))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS: the namespace starts with its loopback interface down
    from milvus import MilvusServer as Server
    server = Server(data_dir=sys.argv[2])
    server.config.set('proxy_port', PORT)
    server.start()
    print('ready', flush=True)
    listener = socket.socket(fileno=int(sys.argv[1]))
    while True:
        client = listener.accept()[0]
        upstream = socket.create_connection(('127.0.0.1', PORT))
        for source, sink in ((client, upstream), (upstream, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=relay, args=(source, sink), daemon=True).start()


def end_with_parent():
    """End the namespace when stdin is closed: also the process that started it may have been killed."""
    while os.read(0, 1):
        pass
    os._exit(1)


def relay(source, sink):
    """Copy bytes from one socket to the other until either closes, then shut down both."""
    try:
        while data := source.recv(1 << 20):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


if __name__ == '__main__':
    main()
