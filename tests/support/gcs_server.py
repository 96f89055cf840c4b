"""A stand-in for Google's storage: objects with generations, written under a condition; for one bucket."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """GET, PUT and DELETE of one object, as the XML API has them."""

    def _answer(self, status, data=b"", generation=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{generation}"')
        self.send_header("Last-Modified", "Sun, 29 Nov 2026 12:00:00 GMT")
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        held = self.server.objects.get(self.path)
        self._answer(404) if held is None else self._answer(200, *held)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = self.headers.get("x-goog-if-generation-match")
        with self.server.lock:
            _, generation = self.server.objects.get(self.path, (b"", 0))
            if wanted is not None and int(wanted) != generation:
                self._answer(412)
                return
            self.server.generation += 1
            self.server.objects[self.path] = data, self.server.generation
            self._answer(200, generation=self.server.generation)

    def do_DELETE(self):
        self._answer(204 if self.server.objects.pop(self.path, None) else 404)

    def log_message(self, *arguments):
        """Prints no line for every request."""


@contextmanager
def gcs_server():
    """host:port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.objects, server.generation, server.lock = {}, 0, threading.Lock()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
