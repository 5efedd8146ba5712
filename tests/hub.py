"""
A Hugging Face Hub for tests: serves a folder of files as a dataset, on a free port of this machine, as far as the
libraries ask for it, and can fail in the ways that networks do. Their environment names it by HF_ENDPOINT.
"""
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = '0123456789abcdef' * 2 + '01234567'


class Hub(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        asked = unquote(self.rfile.read(int(self.headers['Content-Length'])).decode())
        self.server.asked.append(self.path)
        paths = json.loads(asked).get('paths', []) if asked.startswith('{') else [
            part.partition('=')[2] for part in asked.split('&') if part.startswith('paths=')]
        self.answer([self.entry(path) for path in paths if (self.server.folder / path).is_file()])

    def do_GET(self):
        self.server.asked.append(f'{self.command} {self.path}')
        parts = unquote(urlsplit(self.path).path).strip('/').split('/')
        if parts[0] == 'api' and 'tree' in parts:
            below = self.server.folder.joinpath(*parts[parts.index('tree') + 2:])
            if not below.is_dir():
                return self.answer(dict(error='EntryNotFound'), 404, {'X-Error-Code': 'EntryNotFound'})
            return self.answer([self.entry(path.relative_to(self.server.folder).as_posix())
                                for path in sorted(below.rglob('*')) if path.is_file()])
        if parts[0] == 'api':
            return self.answer(dict(id='/'.join(parts[2:4]), sha=COMMIT, private=False, gated=False, tags=[], siblings=[
                dict(rfilename=path.relative_to(self.server.folder).as_posix())
                for path in self.server.folder.rglob('*') if path.is_file()]))
        path = self.server.folder.joinpath(*parts[parts.index('resolve') + 2:]) if 'resolve' in parts else None
        if path is None or not path.is_file():
            return self.answer(dict(error='EntryNotFound'), 404, {'X-Error-Code': 'EntryNotFound'})
        data, status, headers = path.read_bytes(), 200, {'ETag': f'"{path.name}"', 'X-Repo-Commit': COMMIT,
                                                         'Accept-Ranges': 'bytes'}
        if 'Range' in self.headers:
            first, last = self.headers['Range'].removeprefix('bytes=').split('-')
            headers['Content-Range'] = f'bytes {first}-{last or len(data) - 1}/{len(data)}'
            data, status = data[int(first):int(last or len(data)) + 1], 206
        if self.command == 'GET' and (failure := self.server.fail(path.name)):
            if failure == 'drop':  # after half of the answer
                self.send_response(status)
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                self.wfile.write(data[:len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                return self.connection.shutdown(2)
            return self.answer(dict(error='away'), failure)
        return self.answer(data, status, headers)

    def entry(self, path):
        return dict(type='file', path=path, size=(self.server.folder / path).stat().st_size, oid=path)

    def answer(self, value, status=200, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {'Content-Type': 'application/json', **(headers or {}), 'Content-Length': len(data)}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serve_hub(folder, fail=lambda name: None):
    """
    The address of a hub whose every dataset holds the files of `folder`. Before a file is answered for, fail(name)
    gives the status to answer with instead, 'drop' to break the connection, or None.
    """
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.folder, server.fail, server.asked = folder, fail, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
