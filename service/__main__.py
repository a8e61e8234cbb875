"""`python -m service`: prepare everything, say where it listens, serve until told to stop.

Exits 2 with one sentence when a setting or the artifact is at fault.
"""

import asyncio
import contextlib
import logging
import socket
import sys

import uvicorn

from service import repository, settings
from service.api import Service
from service.inference import ArtifactError
from service.protocol import allow_open_files, connection_options
from service.settings import Settings, SettingsError

logger = logging.getLogger("service")

BACKLOG = 2048
"""Connections that wait to be accepted; beyond it the system turns callers away."""


class Server(uvicorn.Server):
    """uvicorn, but the service drains first: uvicorn alone would wait for requests that nobody settles."""

    def __init__(self, config: uvicorn.Config, app: Service) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Settle every request, then close the connections."""
        logger.info("Stopping: no new requests; those in progress are being settled.")
        await self._app.drain()
        await super().shutdown(sockets)


def listen(chosen: Settings) -> socket.socket:
    """Open the listening socket.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in chosen.host else socket.AF_INET
    try:
        return socket.create_server((chosen.host, chosen.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {chosen.host} port {chosen.port} ({error.strerror}): "
            "choose another with ANYTIME_HOST and ANYTIME_PORT."
        ) from error


def main(arguments: list[str]) -> int:
    """Serve; returns the exit status."""
    try:
        chosen = settings.load(arguments)
        logging.basicConfig(level=chosen.log_level.upper(), format="%(levelname)-7s %(message)s")
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        allow_open_files(chosen)
        connections = connection_options(chosen)
        app = Service(chosen, asyncio.run(repository.prepare(chosen)))
        listener = listen(chosen)
    except (SettingsError, ArtifactError) as error:
        print(f"service: {error}", file=sys.stderr)
        return 2
    host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
    url = f"{'https' if chosen.tls_certificate else 'http'}://{host}:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(chosen.drain_timeout_s)),
        **connections,
    )
    logger.info("Ready at %s (documentation at %s/docs). Try:", url, url)
    logger.info("  curl -F image=@picture.jpg '%s/predict?budget_ms=%g'", url, chosen.default_budget_ms)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
        Server(config, app).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
