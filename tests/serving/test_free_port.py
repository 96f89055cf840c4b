import socket

import pytest

from pipeline.errors import ResourceError
from pipeline.serving.free_port import require_free_port


def test_a_taken_port_is_refused_with_the_remedy_of_whoever_asks():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(
            ResourceError, match=rf"port {port} on 127\.0\.0\.1 cannot be had .*Choose another --port\."
        ):
            require_free_port("127.0.0.1", port, remedy="another --port")
