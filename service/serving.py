"""`serve`: prepare everything, say where it listens, serve until told to stop.

Must not know what is asked or answered.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import uvicorn

from service import logs, repository, settings
from service.api import Service
from service.inference import ArtifactError
from service.protocol import FAREWELL_S, Connections, allow_open_files, connection_options, turn_away
from service.repository import Repository
from service.settings import Settings, SettingsError

logger = logging.getLogger("service")

BACKLOG = 2048
"""Connections that wait to be accepted; beyond it the system turns callers away."""

N_LISTENERS = 8
"""How many connections may be accepted in one turn of the event loop: libuv accepts one for each handle that
listens (libuv #3696), and a loop at work has few turns, so that newcomers would wait for a second. Larger: as
many system calls in vain whenever somebody connects, of a microsecond each."""

BROKEN = 70
"""Exit status when no run will succeed any more, so that a supervisor starts the server anew.
Source: sysexits.h, EX_SOFTWARE."""

WRITE_GRACE_S = 1.0
"""For gRPC to hand over answers that have been settled."""

HANDSHAKE_S = 0.1
"""For those whose handshake has begun when nobody new is let in [s]: the way there and back."""


class Server(uvicorn.Server):
    """uvicorn, but it stops without losing a request, and in a time that is set.

    At the first signal it is no longer ready, and every answer ends its connection. After `drain_notice_s`
    nobody new is let in; runs in progress are answered, and whoever waits is turned away. Within
    `drain_timeout_s` everybody has an answer; within `drain_linger_s` every idle connection is told to end.
    At a second signal the process ends at once.

    What listens beside HTTP is started and stopped here, too: in `startup` and `shutdown`.

    Args:
        chosen: All settings.
        app: What is served.

    Raises:
        SettingsError: the files for TLS cannot be used.
    """

    def __init__(self, chosen: Settings, app: Service) -> None:
        self._connections = Connections(chosen)
        super().__init__(_config(app, self._connections))
        self._chosen = chosen
        self._app = app
        self._grpc = app.grpc_server(self._connections.turns)
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
            self._say_where(*dict.fromkeys(listener.getsockname()[1] for listener in sockets))

    def _say_where(self, port: int, own_port: int | None = None) -> None:
        chosen = self._chosen
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        url = f"{'https' if chosen.tls_certificate else 'http'}://{host}:{port}"
        if self.grpc_port:
            logger.info(
                "gRPC at %s:%d: the Open Inference Protocol, also at %s/v2.", host, self.grpc_port, url
            )
        if own_port:
            logger.info("This process alone is at port %d, too.", own_port)
        logger.info("Ready at %s (documentation at %s/docs). Try:", url, url)
        logger.info("  curl -F image=@picture.jpg '%s/predict?budget_ms=%g'", url, chosen.default_budget_ms)

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to stop; asked ten times a second."""
        return await super().on_tick(counter) or bool(self._app.broken)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; the second time, end. Unlike uvicorn's, no signal is raised again afterwards."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        self._announce()

    def _announce(self) -> None:
        """What holds from the very signal on, before the event loop has come round to `shutdown`."""
        self._app.announce_stop()
        self._connections.is_closing = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer every request, then close the connections."""
        self._announce()
        chosen, connections = self._chosen, self._connections
        if chosen.drain_notice_s and not self._app.broken:
            logger.info("Not ready any more; requests are answered for %g s.", chosen.drain_notice_s)
            await asyncio.sleep(chosen.drain_notice_s)
        logger.info("Stopping: no new requests; those in progress are being settled.")
        await _stop_listening(self.servers, sockets or [])
        until_s = asyncio.get_running_loop().time() + chosen.drain_timeout_s
        connections.close_idle(chosen.drain_linger_s)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._app.drain())
            if self._grpc:
                group.create_task(
                    self._grpc.stop(chosen.drain_linger_s, chosen.drain_timeout_s + WRITE_GRACE_S)
                )
        left_s = until_s - asyncio.get_running_loop().time()
        await connections.wait_for_none(max(left_s, chosen.drain_linger_s + FAREWELL_S))
        await self._end_connections()
        await self.lifespan.shutdown()

    async def _end_connections(self) -> None:
        """Turn away whoever has no answer because its body is not here; break off whoever reads none."""
        self._connections.break_off(only_half_answered=True)
        for task in tuple(self.server_state.tasks):
            task.cancel()
        await self._connections.wait_for_none(FAREWELL_S)
        self._connections.break_off(only_half_answered=False)


async def _stop_listening(
    servers: Sequence[asyncio.AbstractServer], listeners: Sequence[socket.socket]
) -> None:
    """Let in who has begun to connect, and nobody else.

    Only to close would reset the connections that the system has already taken in our name.
    """
    for listener in listeners:
        turn_away(listener)
    await asyncio.sleep(HANDSHAKE_S)
    for server in servers:
        server.close()
    for listener in listeners:
        listener.close()


def listen(chosen: Settings) -> list[socket.socket]:
    """Open the listening sockets: all handles of that of `port`, and if there is one that of `own_port`.

    Raises:
        SettingsError: an address cannot be listened on.
    """
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(_listen("port", chosen.port, chosen, shares=chosen.shares_port))
        # Windows' completion ports take a socket once.
        n_listeners = 1 if sys.platform == "win32" else N_LISTENERS
        sockets = [first, *(opened.enter_context(first.dup()) for _ in range(1, n_listeners))]
        if chosen.own_port is not None:
            sockets.append(opened.enter_context(_listen("own_port", chosen.own_port, chosen, shares=False)))
        opened.pop_all()  # all of them or none
        return sockets


def _listen(setting: str, port: int, chosen: Settings, *, shares: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in chosen.host else socket.AF_INET
    try:
        return socket.create_server((chosen.host, port), family=family, backlog=BACKLOG, reuse_port=shares)
    except (OSError, ValueError) as error:  # ValueError: no port can be shared on this system
        said = getattr(error, "strerror", None) or error
        raise SettingsError(
            f"Cannot listen on {chosen.host} port {port} ({said}): "
            f"choose another with ANYTIME_HOST and ANYTIME_{setting.upper()}."
        ) from error


def _config(app: Service, connections: Connections) -> uvicorn.Config:
    """Everything that uvicorn is told."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        **connection_options(connections),
    )


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """As long as nothing is served there is nothing to settle.

    Without this, process 1 of a container ignores the signal: it has no default for those.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        with _ended_by_sigterm():
            return run(chosen, asyncio.run(repository.prepare(chosen)))
    except (SettingsError, ArtifactError) as error:
        if logs.is_json():
            logger.critical("%s", error)
        else:
            print(f"service: {error}", file=sys.stderr)
        return 2


def run(chosen: Settings, models: Repository) -> int:
    """Serve these models until told to stop, or until they are broken; returns the exit status.

    Where a run has not ended or a GPU is lost, the process ends in here: Python would wait for the one, and
    take the other's sessions apart, which aborts it with a status that says nothing.

    Raises:
        SettingsError: the address cannot be listened on, or the files for TLS cannot be used.
    """
    app = Service(chosen, models)
    Server(chosen, app).run(sockets=listen(chosen))
    status = BROKEN if app.broken else 0
    if app.broken:
        logger.critical("Ended with status %d, to be started anew: %s", status, app.broken)
    if app.is_running:
        logger.warning("A run has not ended: it is left behind.")
    if app.broken or app.is_running:
        logging.shutdown()
        os._exit(status)
    return status
