"""A real HTTP server that speaks chat completions and does as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes] | None
"""Status, headers, body; None drops the connection."""


def completion(text, *, logprobs=None, tokens=(100, 7), finish_reason="stop") -> Reply:
    """A well-formed answer; `logprobs` are those of the first token."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
    }
    if logprobs is not None:
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    body = {"object": "chat.completion", "choices": [choice], "usage": usage}
    return 200, {}, json.dumps(body).encode()


def refusal(status, message="no", headers=None) -> Reply:
    return status, headers or {}, json.dumps({"error": {"message": message}}).encode()


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    authorization: str | None
    body: dict[str, Any]
    time: float


@dataclass
class JudgeServer:
    url: str
    seen: list[Seen] = field(default_factory=list)
    at_once: int = 0
    """Most requests that were being answered at the same moment."""

    @property
    def questions(self) -> list[str]:
        """The last message of each request, in order of arrival."""
        return [seen.body["messages"][-1]["content"] for seen in self.seen]


@contextmanager
def judge_server(answer: Callable[[dict[str, Any], int], Reply]):
    """Serves `answer(body, n)` for the n-th request (from 0) on a free port of 127.0.0.1."""
    lock = threading.Lock()
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            nonlocal open_now
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                n = len(server.seen)
                server.seen.append(Seen(self.path, self.headers.get("authorization"), body, time.monotonic()))
                open_now += 1
                server.at_once = max(server.at_once, open_now)
            try:
                reply = answer(body, n)
            finally:
                with lock:
                    open_now -= 1
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            with suppress(BrokenPipeError):  # a client that was killed, or whose deadline is over
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = JudgeServer(url=f"http://127.0.0.1:{httpd.server_address[1]}/v1")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
