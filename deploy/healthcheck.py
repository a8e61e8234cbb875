"""End with status 0 if the server in this container takes requests: what HEALTHCHECK runs.

A bare socket, because this runs every few seconds beside the server: importing an HTTP client takes longer
than all the rest. Where clients need a certificate there is none to show, and a port that is listened on has
to do.
"""

import os
import socket
import sys

TIMEOUT_S = 2.0
REQUEST = b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def is_ready() -> bool:
    """Ask where the settings in the environment say that it listens."""
    host = os.environ.get("ANYTIME_HOST", "127.0.0.1")
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not listened on
    port = int(os.environ.get("ANYTIME_PORT", "8000"))
    try:
        with socket.create_connection((address, port), TIMEOUT_S) as connection:
            if os.environ.get("ANYTIME_TLS_CLIENT_CA"):
                return True
            if os.environ.get("ANYTIME_TLS_CERTIFICATE"):
                return _answers(_secured(connection))
            return _answers(connection)
    except OSError:
        return False


def _answers(connection: socket.socket) -> bool:
    connection.sendall(REQUEST)
    with connection.makefile("rb") as response:
        return response.readline().startswith(b"HTTP/1.1 200 ")


def _secured(connection: socket.socket) -> socket.socket:
    import ssl  # noqa: PLC0415 - takes as long as everything else here

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is this container that answers, whatever its certificate says
    return context.wrap_socket(connection)


if __name__ == "__main__":
    sys.exit(not is_ready())
