"""The toy artifact, and the whole server behind a real socket."""

import asyncio
import contextlib
import gc
import signal
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from service import serving
from service.api import Service
from service.engine import InferenceThread
from service.inference import Inference, load
from service.latency import Latency, LatencyProfile
from service.models import Model
from service.repository import Repository
from service.settings import Settings
from tests.service import toy_artifact

BATCH_SIZES = (1, 2, 4)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_artifact.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def inference(artifact: Path) -> Inference:
    return load(artifact, provider="cpu", intra_op_threads=1, batch_sizes=BATCH_SIZES)


def profile_of(seconds: float) -> LatencyProfile:
    """Says that every run takes this long, whatever it really takes."""
    latency = Latency(seconds, seconds)
    return LatencyProfile({column: dict.fromkeys(BATCH_SIZES, latency) for column in toy_artifact.COLUMNS})


@contextlib.contextmanager
def nothing_left_of(*kinds: type, n_bytes: int) -> Iterator[None]:
    """Within it, no circle of objects is left that holds something of these kinds, or so many bytes.

    The garbage collector comes round for such circles once in minutes, and bodies stay until then.
    """
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        held = [one for circle in gc.garbage for one in gc.get_referents(circle)]
        found = [
            type(one)
            for one in held
            if isinstance(one, kinds) or (isinstance(one, bytes | bytearray) and len(one) >= n_bytes)
        ]
        assert not found
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@dataclass
class Running:
    """A server in a thread of its own, and a client that keeps its connection."""

    service: Service
    repository: Repository
    loop: asyncio.AbstractEventLoop
    address: tuple[str, int]
    client: httpx.Client
    grpc_port: int | None
    server: "_Server"
    thread: threading.Thread

    def stop(self) -> None:
        """Begin to stop, as at a signal."""
        self.server.handle_exit(signal.SIGTERM, None)

    def wait_until_stopping(self) -> None:
        """Wait until nothing is taken any more; the test's own timeout ends it otherwise."""
        while not self.repository.is_stopping:
            time.sleep(0.001)

    def wait_until_ended(self) -> None:
        self.thread.join()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address)

    def on_loop(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def metric(self, series: str) -> float:
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(series + " "):
                return float(line.rpartition(" ")[2])
        raise KeyError(series)

    def wait_for(self, series: str, value: float) -> None:
        """Ask until a metric has this value; the test's own timeout ends it otherwise."""
        while self.metric(series) != value:
            pass


class _Server(serving.Server):
    """Says when it listens."""

    def __init__(self, chosen: Settings, app: Service) -> None:
        super().__init__(chosen, app)
        self.listening = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.listening.set()


@dataclass
class Launcher:
    """Starts servers and stops them at the end of the test or module."""

    inference: Inference
    stack: contextlib.ExitStack

    def __call__(
        self,
        *,
        inference: Inference | None = None,
        profile: LatencyProfile | None = None,
        model: Model | None = None,
        **settings: Any,
    ) -> Running:
        served = inference or self.inference
        if any(isinstance(session, BlockedSession) for session in served._sessions.values()):
            settings = {"brief_run_ms": 0.0, **settings}  # a brief run would hold the server up, too
        chosen = Settings(_env_file=None, **{"profile_cache": None, "grpc_port": None, **settings})
        model = model or Model(chosen, served, InferenceThread(served), profile or profile_of(1e-5))
        repository = Repository(chosen, model)
        service = Service(chosen, repository)
        listener = socket.create_server(("127.0.0.1", 0))
        server = _Server(chosen, service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(setattr, server, "should_exit", True)
        assert server.listening.wait(30)
        assert server.loop is not None
        address = listener.getsockname()
        client = httpx.Client(base_url=f"http://127.0.0.1:{address[1]}", timeout=30, trust_env=False)
        self.stack.callback(client.close)
        return Running(service, repository, server.loop, address, client, server.grpc_port, server, thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


@pytest.fixture
def launch(inference: Inference) -> Iterator[Launcher]:
    with Launcher(inference, contextlib.ExitStack()) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def server(inference: Inference) -> Iterator[Running]:
    """One ordinary server for all tests of a module that only ask."""
    with Launcher(inference, contextlib.ExitStack()) as launcher:
        yield launcher()


class BlockedSession:
    """An onnxruntime session whose runs last until released, one by one or all, or fail if told so."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.released = threading.Event()
        self.one = threading.Semaphore(0)
        self.n_images: list[int] = []
        self.fails = False

    def run(
        self, _: list[str], inputs: dict[str, NDArray[np.uint8]], options: Any = None, /
    ) -> list[NDArray[np.float32]]:
        n = len(inputs["images_NHWC"])
        self.n_images.append(n)
        self.started.set()
        while not (self.released.is_set() or self.one.acquire(timeout=0.005)):
            pass
        if self.fails:
            raise RuntimeError("CUDA error 700")
        return [np.zeros((n, len(toy_artifact.LABELS)), np.float32)]


@pytest.fixture
def session() -> Iterator[BlockedSession]:
    session = BlockedSession()
    yield session
    session.released.set()


@pytest.fixture
def blocked(launch: Launcher, session: BlockedSession, inference: Inference) -> Running:
    """A server whose every run waits for `session.released`."""
    sessions = dict.fromkeys(toy_artifact.COLUMNS, session)
    waiting = Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64)
    return launch(inference=waiting)
