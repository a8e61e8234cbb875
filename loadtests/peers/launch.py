"""Makes a peer's environment, and starts the peer in it with one column.

Must not know how a peer is asked, nor what comes back.
"""

import contextlib
import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from loadtests import hosting
from loadtests.hosting import Server
from loadtests.peers.adaptors import FOLDER, Peer

ROOT = FOLDER.parents[1]
"""Peers import loadtests.peers.column from here."""

ENVIRONMENTS = Path(".venvs")
"""Where environments are made: beside the project's own, and like it not part of the repository."""

MAKE_LIMIT_S = 1200.0
START_LIMIT_S = 120.0
"""Ray needs 20 to 30 s on two cores; larger waits longer for what will never start."""


def python_of(peer: Peer) -> Path:
    """The interpreter that runs it."""
    return (
        ENVIRONMENTS.absolute() / peer.name / "bin" / "python"
        if peer.has_environment
        else Path(sys.executable)
    )


def is_made(peer: Peer) -> bool:
    """Its environment is there, and holds what its requirements.txt now says."""
    if not peer.has_environment:
        return True
    made = ENVIRONMENTS / peer.name / "made"
    return made.exists() and made.read_text() == _requirements(peer)


def make(peer: Peer) -> None:
    """Make its environment, if it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip failed, and said why on standard error.
    """
    if is_made(peer):
        return
    folder = ENVIRONMENTS / peer.name
    print(f"Making {folder} ...", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    pins = peer.folder / "requirements.txt"
    _run([str(python_of(peer)), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins)])
    (folder / "made").write_text(_requirements(peer))


def version_of(peer: Peer) -> str:
    """Of what it is named for, as pinned."""
    if not peer.has_environment:
        return importlib.metadata.version(peer.distribution)
    for line in _requirements(peer).splitlines():
        name, _, version = line.partition("==")
        if name == peer.distribution:
            return version
    raise ValueError(f"{peer.folder}/requirements.txt pins no {peer.distribution}: add it")


@contextlib.contextmanager
def launched(
    peer: Peer, artifact: Path, column: str, log: Path, knobs: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start the peer with this column, and stop it at the end.

    Raises:
        RuntimeError: it was not ready in time; its log says why.
    """
    with tempfile.TemporaryDirectory(prefix=f"peer-{peer.name}-", ignore_cleanup_errors=True) as work:
        port = hosting.free_port()
        own = {
            "ARTIFACT": str(artifact.absolute()),
            "COLUMN": column,
            "PORT": str(port),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": work,
        }
        fixed = {name: value.format(port=port, work=work) for name, value in peer.fixed.items()}
        with hosting.hosting(
            peer.command(python_of(peer), port),
            port,
            environment={**fixed, **(peer.knobs if knobs is None else knobs), **own},
            log=log,
            is_ready=lambda url: hosting.answers(url + peer.ready),
            limit_s=START_LIMIT_S,
            folder=peer.folder,
        ) as server:
            yield server


def _requirements(peer: Peer) -> str:
    return (peer.folder / "requirements.txt").read_text()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, timeout=MAKE_LIMIT_S)  # noqa: S603 - venv and pip
