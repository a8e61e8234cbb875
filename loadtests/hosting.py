"""Starts a server of any kind, knows every process that came of it, and leaves none behind.

A server that waits its turn can be frozen, so that its idle work is not done on the cores of the one under
load.
Must not know what a server serves, nor how it is asked.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "LOADTEST_HOST"
"""Environment variable that a server's processes inherit: how they are found, wherever they have gone."""

POLL_S = 0.1
STOP_LIMIT_S = 10.0
"""How long a server may take to stop of its own accord before it is killed [s]."""
LINGER_S = 2.0
"""How long its other processes may live on after the first one [s]."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Its address, without a path.
        process: The one that was started.
        mark: What the environment of it and of all its children says.
    """

    url: str
    process: subprocess.Popen[bytes]
    mark: str

    def pids(self) -> list[int]:
        """Every process that lives; where there is no /proc, the first one."""
        if not Path("/proc/self/environ").exists():
            return [self.process.pid] if self.process.poll() is None else []
        names = (path.name for path in Path("/proc").iterdir())
        return [int(name) for name in names if name.isdigit() and self._is_ours(int(name))]

    def cpu_s(self) -> float:
        """Processor time that its living processes have taken so far, all together [s].

        Source: proc(5), fields 14 and 15 of /proc/PID/stat, counted after the name, which may hold spaces.
        """
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def freeze(self) -> None:
        """Give it no processor time until `thaw`."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)

    def stop(self) -> None:
        """Ask it to stop, and kill what does not."""
        self.thaw()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT_S)
        until_s = time.monotonic() + LINGER_S
        while self.pids() and time.monotonic() < until_s:
            time.sleep(POLL_S)
        while self.pids():  # no process withstands it, but it takes its time to go
            self._send(signal.SIGKILL)
            time.sleep(POLL_S)
        self.process.wait()

    def _is_ours(self, pid: int) -> bool:
        """A zombie has no environment, and so is nobody's."""
        with contextlib.suppress(OSError):
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def _send(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def hosting(
    command: Sequence[str],
    port: int,
    *,
    environment: Mapping[str, str],
    log: Path,
    is_ready: Callable[[str], bool],
    limit_s: float,
    folder: Path | None = None,
    mark: str | None = None,
) -> Iterator[Server]:
    """Start a server on 127.0.0.1, wait until it is ready, and stop it at the end.

    Args:
        command: What starts it.
        port: Where it will listen.
        environment: Variables beside those of this process.
        log: Where it writes.
        is_ready: Whether the server at this address can be asked.
        limit_s: How long it may take to become ready [s].
        folder: Its working directory; this one's if not given.
        mark: That of another one, to be frozen, counted and stopped with it.

    Raises:
        RuntimeError: it was not ready in time; its log says why.
    """
    mark = mark or uuid.uuid4().hex
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - commands of this project
            command,
            env={**os.environ, **environment, MARK: mark},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the server
        )
    server = Server(f"http://127.0.0.1:{port}", process, mark)
    try:
        until_s = time.monotonic() + limit_s
        while not is_ready(server.url):
            if process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the server did not start: see {log}")
            time.sleep(POLL_S)
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listened just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a GET of this address is answered with 200 within a second."""
    try:
        with urllib.request.urlopen(url, timeout=1) as response:  # noqa: S310 - our own
            return bool(response.status == 200)
    except (OSError, ValueError):  # ValueError: somebody answers who speaks no HTTP
        return False
