"""`serve`: prepare everything, say where it listens, serve until told to stop.

Must not know what is asked or answered.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Sequence

import uvicorn

from service import logs, repository, settings
from service.api import Service
from service.inference import ArtifactError
from service.protocol import allow_open_files, connection_options
from service.repository import Repository
from service.settings import Settings, SettingsError

logger = logging.getLogger("service")

BACKLOG = 2048
"""Connections that wait to be accepted; beyond it the system turns callers away."""

BROKEN = 70
"""Exit status when no run will succeed any more, so that a supervisor starts the server anew.
Source: sysexits.h, EX_SOFTWARE."""

WRITE_GRACE_S = 1.0
"""For gRPC to hand over answers that have been settled."""


class Server(uvicorn.Server):
    """uvicorn, but the service drains first: uvicorn alone would wait for requests that nobody settles.

    What listens beside HTTP is started and stopped here, too: in `startup` and `shutdown`.
    """

    def __init__(self, chosen: Settings, app: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._chosen = chosen
        self._app = app
        self._grpc = app.grpc_server()
        self.grpc_port: int | None = None
        """Where gRPC is listened for, as long as it is."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen: for gRPC first, so that nothing has begun if that is refused.

        Raises:
            SettingsError: it is.
        """
        if self._grpc:
            self.grpc_port = await self._grpc.start()
        await super().startup(sockets)
        if sockets and self.started:
            self._say_where(sockets[0].getsockname()[1])

    def _say_where(self, port: int) -> None:
        chosen = self._chosen
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        url = f"{'https' if chosen.tls_certificate else 'http'}://{host}:{port}"
        if self.grpc_port:
            logger.info(
                "gRPC at %s:%d: the Open Inference Protocol, also at %s/v2.", host, self.grpc_port, url
            )
        logger.info("Ready at %s (documentation at %s/docs). Try:", url, url)
        logger.info("  curl -F image=@picture.jpg '%s/predict?budget_ms=%g'", url, chosen.default_budget_ms)

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to stop; asked ten times a second."""
        return await super().on_tick(counter) or bool(self._app.broken)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Settle every request, then close the connections."""
        logger.info("Stopping: no new requests; those in progress are being settled.")
        await self._app.drain()
        if self._grpc:
            await self._grpc.stop(WRITE_GRACE_S)
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


def http_config(chosen: Settings, app: Service) -> uvicorn.Config:
    """Everything that uvicorn is told.

    Raises:
        SettingsError: the files for TLS cannot be used.
    """
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(chosen.drain_timeout_s)),
        **connection_options(chosen),
    )


def serve(arguments: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit status.

    Args:
        arguments: Settings as options, which win over the environment.

    Raises:
        SystemExit: `--help` was asked for, or an option is unknown (status 2).
    """
    try:
        chosen = settings.load(arguments)
        logs.configure(chosen)
        # Read when that is imported: gRPC's core writes of every odd connection, past all loggers.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        allow_open_files(chosen)
        return run(chosen, asyncio.run(repository.prepare(chosen)))
    except (SettingsError, ArtifactError) as error:
        if logs.is_json():
            logger.critical("%s", error)
        else:
            print(f"service: {error}", file=sys.stderr)
        return 2


def run(chosen: Settings, models: Repository) -> int:
    """Serve these models until told to stop, or until they are broken; returns the exit status.

    Where a GPU is lost the process ends in here: Python would take its sessions apart, which aborts it with a
    status that says nothing.

    Raises:
        SettingsError: the address cannot be listened on, or the files for TLS cannot be used.
    """
    app = Service(chosen, models)
    server = Server(chosen, app, http_config(chosen, app))
    listener = listen(chosen)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
        server.run(sockets=[listener])
    if app.broken:
        logger.critical("Ended with status %d, to be started anew: %s", BROKEN, app.broken)
        logging.shutdown()
        os._exit(BROKEN)
    return 0
