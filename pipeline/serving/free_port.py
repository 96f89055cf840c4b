"""Whether a service can listen where it is told to."""

from __future__ import annotations

import socket

from pipeline.errors import ResourceError


def require_free_port(host: str, port: int, *, remedy: str) -> None:
    """Checks that this process can listen on the port.

    Args:
        remedy: what to choose instead, for the error message.

    Raises:
        ResourceError: it cannot.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(f"port {port} on {host} cannot be had ({error.strerror}). Choose {remedy}.") from error
