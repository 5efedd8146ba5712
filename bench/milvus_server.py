"""
A real Milvus server for benchmarks and tests: the PyPI package `milvus`, which holds the binary of Milvus 2.3.5. It
listens on all addresses and on fixed ports, so it runs in a network of its own (Linux' unshare), and one free port of
127.0.0.1 leads into it.

    with MilvusServer(folder) as server: ... server.uri, server.kill(), server.start() ...
"""
import array
import fcntl
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec

PORT = 19530  # inside
OUTSIDE = ['unshare', '--user', '--map-root-user', '--net', '--pid', '--mount-proc', '--fork', '--kill-child']


def why_not():
    """Why no real server can run here, or ''."""
    if find_spec('milvus') is None:
        return 'the package milvus is not installed (requirements-dev.txt)'
    try:
        if subprocess.run([*OUTSIDE, 'true'], capture_output=True).returncode:
            return f'this system does not allow {" ".join(OUTSIDE)}'
    except FileNotFoundError:
        return 'there is no unshare, which comes with Linux'
    return ''


class MilvusServer:
    """Its data is in the folder, so that a server that was killed can be started again."""

    def __init__(self, folder):
        self.folder, self.port, self.process = str(folder), 0, None

    @property
    def uri(self):
        return f'http://127.0.0.1:{self.port}'

    def start(self):
        """Start it and wait until it serves, some ten seconds. The port stays the same."""
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(('127.0.0.1', self.port))
            listening.listen(64)
            self.port = listening.getsockname()[1]
            self.process = subprocess.Popen(
                [*OUTSIDE, sys.executable, __file__, str(listening.fileno()), self.folder], text=True,
                pass_fds=[listening.fileno()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = self.process.stdout.readline()
        if said != 'ready\n':
            raise RuntimeError(f'the Milvus server did not start: {said}{self.process.stdout.read()}')

    def kill(self):
        """Kill it without warning."""
        self.process.kill()  # and with it all that runs inside
        self.process.stdout.read()  # to its end, which is theirs
        self.process.wait()
        self.process.stdout.close()
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        if self.process:
            self.kill()


def main():
    """Inside: the server, and a relay from the socket that was made outside."""
    request = array.array('B', b'lo'.ljust(16, b'\0') + (0x41).to_bytes(2, sys.byteorder) + bytes(22))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS: the new network's loopback up
    from milvus import MilvusServer as Server
    server = Server(data_dir=sys.argv[2])
    server.config.set('proxy_port', PORT)
    server.start()
    print('ready', flush=True)
    listening = socket.socket(fileno=int(sys.argv[1]))
    while True:
        outer = listening.accept()[0]
        inner = socket.create_connection(('127.0.0.1', PORT))
        for one, other in ((outer, inner), (inner, outer)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=pump, args=(one, other), daemon=True).start()


def pump(source, sink):
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
