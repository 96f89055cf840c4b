"""A stand-in for the Hugging Face hub on 127.0.0.1: the requests of a push."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What the stand-in was told."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Repository -> whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> file -> content, after the last commit."""


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            if self.headers["authorization"] != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid credentials"})
            elif self.path == "/api/repos/create":
                self.create(json.loads(body))
            elif self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif self.path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                self.answer(
                    200, {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
                )
            else:
                self.commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), body)

        def do_GET(self) -> None:
            repo = self.path.removeprefix("/api/models/").partition("/revision/")[0]
            if self.headers["authorization"] != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid credentials"})
            elif repo not in hub.private:
                self.answer(404, {"error": "Not found"})
            else:
                self.answer(200, {"id": repo, "private": hub.private[repo], "tags": [], "siblings": []})

        def create(self, wanted: dict[str, Any]) -> None:
            repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            exists = repo in hub.private
            hub.private.setdefault(repo, wanted["visibility"] == "private")
            self.answer(409 if exists else 200, {"url": f"{hub.url}/{repo}", "id": repo})

        def commit(self, repo: str, body: bytes) -> None:
            lines = [json.loads(line) for line in body.splitlines()]
            hub.files[repo] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None})

        def answer(self, status: int, value: dict[str, Any]) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
