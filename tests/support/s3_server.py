"""An S3 server on this machine: moto's, which understands conditional writes and uploads by parts.

python -m tests.support.s3_server        # prints a URI in a new bucket, and serves until its input ends
"""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "not a secret", "AWS_EC2_METADATA_DISABLED": "true"}


class Quiet(MotoRequestHandler):
    """Prints no line for every request."""

    def log_request(self, *arguments):
        pass


class OneAtATime:
    """A server whose conditional writes hold: moto looks whether an object exists, and then writes it."""

    def __init__(self, application):
        self._application, self._lock = application, threading.Lock()
        self.requests: list[tuple[str, str]] = []
        """Method and path, with the query, of every request so far."""

    def __call__(self, environ, start_response):
        with self._lock:
            self.requests.append((environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"))
            return [*self._application(environ, start_response)]


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where it listens. Credentials for it are in this process's environment."""

    address: str
    """host:port"""
    requests: list[tuple[str, str]]

    @property
    def query(self) -> str:
        return f"endpoint_override={self.address}&scheme=http"

    def new_bucket(self) -> str:
        """Makes a bucket; its name."""
        name = f"bucket-{uuid.uuid4().hex}"
        boto3.client("s3", endpoint_url=f"http://{self.address}", region_name="us-east-1").create_bucket(Bucket=name)
        return name

    def new_place(self, path: str = "ws") -> str:
        """A URI in a new bucket."""
        return f"s3://{self.new_bucket()}/{path}?{self.query}"


@contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[S3Server]:
    """
    Args:
        host: the address it listens at.
    """
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server(host, 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with mock.patch.dict(os.environ, KEYS):
            yield S3Server(address=f"{host}:{server.server_port}", requests=application.requests)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    with s3_server() as server:
        print(server.new_place(), flush=True)
        sys.stdin.read()
