"""onnxruntime's own CUDA provider and the whole server, on a CUDA runtime that has no GPU.

What is asked of CUDA is real, and so are the rules of recording graphs; what is computed is nothing.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import onnxruntime
import pytest

from service.serving import BROKEN
from tests.service import toy_artifact

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("fake_cuda_runtime.c")
EMPTY = ("libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcuda.so.1")
"""What the provider also asks for; everything that it wants of them is in the one above."""

SIZES = (1, 2, 4)
N_GRAPHS = len(SIZES) * len(toy_artifact.COLUMNS)
PIXELS = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)
RAW = {"content-type": "application/octet-stream"}

BEGIN = """
import sys, threading
from pathlib import Path
import numpy as np
from service.inference import load
from service.providers import GpuOptions
artifact, log = map(Path, sys.argv[1:])
images_NHWC = np.ones((3, 8, 8, 3), np.uint8)
def opened(**gpu):
    return load(artifact, provider="cuda", intra_op_threads=1, batch_sizes=(1, 2, 4), gpu=GpuOptions(**gpu))
def happened():
    said = log.read_text().split() if log.exists() else []
    log.write_text("")
    return said
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CUDA runtime for this onnxruntime."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "empty.c").touch()
    for name in ("libcudart.so.13", *EMPTY):
        source = folder / "empty.c" if name in EMPTY else SOURCE
        options = ["-w", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([compiler, *options, str(source)], check=True)
    return folder


@dataclass
class Machine:
    """A machine with that runtime, and what it was asked."""

    libraries: Path
    folder: Path
    artifact: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ANYTIME_")}
        return kept | {
            "LD_LIBRARY_PATH": str(self.libraries),
            "FAKE_CUDA_LOG": str(self.log),
            "FAKE_CUDA_LOST": str(self.folder / "lost"),
        }

    def run(self, script: str) -> str:
        command = [sys.executable, "-c", BEGIN + script, str(self.artifact), str(self.log)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environ, capture_output=True, text=True, check=False, timeout=50
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def happened(self) -> Counter[str]:
        return Counter(self.log.read_text().splitlines())

    def lose(self) -> None:
        (self.folder / "lost").touch()


@pytest.fixture
def machine(libraries: Path, tmp_path: Path, artifact: Path) -> Machine:
    return Machine(libraries, tmp_path, artifact)


def test_each_column_and_batch_size_is_recorded_once_and_then_replayed(machine: Machine) -> None:
    machine.run(
        """
loaded = opened()
loaded.warm_up((1, 2, 4))
assert happened().count("recorded") == 9
for n in (1, 2, 3, 3, 1):
    for column in "123":
        assert loaded.run(column, images_NHWC[:n]).shape == (n, 5)
        assert happened() == ["replayed"]
"""
    )


def test_without_graphs_operators_are_launched(machine: Machine) -> None:
    machine.run(
        """
loaded = opened(cuda_graphs=False)
loaded.warm_up((1, 2, 4))
happened()
loaded.run("3", images_NHWC)
assert set(happened()) == {"launched"}
"""
    )


def test_another_thread_records_anew(machine: Machine) -> None:
    """Why the thread that serves has to be the one that warms up."""
    machine.run(
        """
loaded = opened()
loaded.warm_up((1, 2, 4))
happened()
thread = threading.Thread(target=loaded.run, args=("1", images_NHWC))
thread.start()
thread.join()
assert "recorded" in happened()
"""
    )


def test_one_model_is_recorded_beside_another_that_runs(machine: Machine) -> None:
    machine.run(
        """
serving = opened()
serving.warm_up((1, 2, 4))
is_over = threading.Event()
def serve():
    serving.warm_up((1, 2, 4))
    while not is_over.is_set():
        serving.run("1", images_NHWC)
thread = threading.Thread(target=serve)
thread.start()
for _ in range(5):
    opened().warm_up((1, 2, 4))
is_over.set()
thread.join()
assert not any("spoilt" in word for word in happened())
"""
    )


def test_models_are_opened_and_closed_beside_others_that_are_recorded(machine: Machine) -> None:
    machine.run(
        """
passing = [opened() for _ in range(4)]
recorded = [opened() for _ in range(6)]
def record():
    for loaded in recorded:
        loaded.warm_up((1, 2, 4))
thread = threading.Thread(target=record)
thread.start()
while passing:
    one = passing.pop()
    one.close()
    del one
while thread.is_alive():
    opened()
thread.join()
said = happened()
assert said.count("recorded") == 6 * 9
assert not any("spoilt" in word for word in said)
"""
    )


# ---- the whole server ----


class Server:
    """`python -m service serve` on that machine."""

    def __init__(self, machine: Machine, *settings: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "service", "serve", "--provider", "cuda"),
                *("--artifact", str(machine.artifact), "--batch-sizes", "1,2,4"),
                *("--port", "0", "--grpc-port", "", "--profile-seconds", "0.05", "--profile-cache", ""),
                *settings,
            ],
            cwd=ROOT,
            env=machine.environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said = ""
        while not (found := re.search(r"Ready at (http://\S+)", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.client = httpx.Client(base_url=found[1], timeout=30, trust_env=False)

    def ask(self) -> httpx.Response:
        return self.client.post("/predict?budget_ms=5000", content=PIXELS, headers=RAW)

    def ended(self) -> int:
        _, said = self.process.communicate(timeout=30)
        self.said += said
        return self.process.returncode

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def server(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(machine, *getattr(request, "param", ("--keep-warm-ms", "0")))
    yield server
    server.close()


def test_a_server_records_before_it_is_ready_and_never_again(server: Server, machine: Machine) -> None:
    before = machine.happened()
    assert before["recorded"] == N_GRAPHS
    for _ in range(20):
        answer = server.ask().json()
        assert (answer["columns_run"], answer["deadline_met"]) == (["1", "2", "3"], True)
    assert machine.happened() - before == Counter(replayed=3 * 20)
    assert server.client.get("/model").json()["provider"] == "cuda"
    info = [line for line in server.client.get("/metrics").text.splitlines() if "model_info{" in line]
    assert 'provider="cuda"' in info[0]
    assert "running on cuda" in server.said


def test_a_server_whose_gpu_is_lost_ends(server: Server, machine: Machine) -> None:
    assert server.ask().status_code == 200
    machine.lose()
    assert server.ask().status_code == 500
    assert server.ended() == BROKEN
    assert "the GPU is lost: " in server.said
    assert "CUDA failure 700: an illegal memory access was encountered" in server.said


@pytest.mark.parametrize("server", [("--keep-warm-ms", "5")], indirect=True)
def test_a_gpu_at_rest_is_kept_warm_and_its_loss_noticed(server: Server, machine: Machine) -> None:
    before = machine.happened()["replayed"]
    while machine.happened()["replayed"] < before + 10:
        pass
    machine.lose()
    assert server.ended() == BROKEN


def test_a_version_is_recorded_beside_serving(machine: Machine, tmp_path: Path) -> None:
    for version in ("7", "8"):
        toy_artifact.write(tmp_path / "models" / "toy" / version, version)
    key = subprocess.run(
        [sys.executable, "-m", "service", "hash-key"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    secret, hash_ = re.findall(r"(?:key|hash) +(\S+)", key.stdout)
    server = Server(machine, "--model-repository", str(tmp_path / "models"), "--admin-keys", hash_)
    try:
        statuses: list[int] = []
        is_over = threading.Event()

        def call() -> None:
            while not is_over.is_set():
                statuses.append(server.ask().status_code)

        caller = threading.Thread(target=call)
        caller.start()
        with httpx.Client(base_url=server.client.base_url, timeout=50, trust_env=False) as administrator:
            for version in ("8", "7", "8"):
                parameters = {"parameters": {"version": version}}
                loaded = administrator.post(
                    "/v2/repository/models/toy/load",
                    content=json.dumps(parameters),
                    headers={"X-API-Key": secret, "content-type": "application/json"},
                )
                assert loaded.status_code == 200, loaded.text
        is_over.set()
        caller.join()
        assert set(statuses) == {200}
        while (happened := machine.happened())["closed"] < 3 * N_GRAPHS:  # those that were replaced
            pass
        assert happened["recorded"] == 4 * N_GRAPHS
        assert not any("spoilt" in word for word in happened)
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() in {0, -signal.SIGTERM}
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_benchmark_runs_as_on_a_gpu(machine: Machine, tmp_path: Path) -> None:
    arguments = [
        *("--provider", "cuda", "--artifact", str(machine.artifact), "--batch-sizes", "1,2,4"),
        *("--profile-seconds", "0.1", "--seconds", "0.5", "--start-rate", "50", "--steps", "1"),
        *("--budget-ms", "500", "--idle-s", "0.2", "--idle-rounds", "1", "--burst", "2"),
        *("--out", str(tmp_path / "found")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.gpu", *arguments],
        cwd=ROOT,
        env=machine.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["latency_ms"].keys() == {"CUDA graphs", "no graphs"}
    assert (found["provider"], found["load"]["ended_by"]) == ("cuda", "steps")
