"""A server whose GPU is broken says so, answers everybody, and ends with a status of its own."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service.access import new_key
from service.serving import BROKEN
from tests.service import toy_artifact

ROOT = Path(__file__).resolve().parents[2]
PIXELS = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)
RAW = {"content-type": "application/octet-stream"}


class Process:
    """A server in a process of its own."""

    def __init__(self, way: str, artifact: Path, *settings: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.service.failing_server", way),
                *("--artifact", str(artifact), "--port", "0", "--profile-seconds", "0.01"),
                *settings,
            ],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("ANYTIME_")},
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

    def ask(self, budget_ms: float = 5000) -> int:
        """The status of an answer; 0 if nobody listens any more."""
        try:
            return self.client.post(
                f"/predict?budget_ms={budget_ms}", content=PIXELS, headers=RAW
            ).status_code
        except httpx.TransportError:
            return 0

    def is_ready(self) -> bool:
        try:
            return self.client.get("/healthz/ready").status_code == 200
        except httpx.TransportError:
            return False

    def fail(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    def ended(self) -> int:
        """Wait for the end; the exit status."""
        _, said = self.process.communicate(timeout=30)
        self.said += said
        return self.process.returncode

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def start(artifact: Path) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(way: str, *settings: str) -> Process:
        processes.append(Process(way, artifact, *settings))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def test_a_server_whose_gpu_is_lost_answers_500_and_then_ends(start: Callable[..., Process]) -> None:
    server = start("lost", "--keep-warm-ms", "0")
    assert server.is_ready() is True
    assert server.ask() == 200
    server.fail()
    assert server.ask() == 500
    assert server.is_ready() is False
    assert server.ended() == BROKEN == 70
    assert "This process cannot go on: the GPU is lost: CUDA failure 700" in server.said
    assert "Ended with status 70, to be started anew" in server.said
    again = start("lost")
    assert again.ask() == 200


def test_everybody_who_is_inside_then_has_an_answer(start: Callable[..., Process]) -> None:
    server = start("lost", "--keep-warm-ms", "0")
    seen: list[int] = []

    def call() -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=30, trust_env=False) as client:
            while True:
                try:
                    response = client.post("/predict?budget_ms=5000", content=PIXELS, headers=RAW)
                except httpx.ConnectError:
                    return
                seen.append(response.status_code)

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    while len(seen) < 20:
        pass
    server.fail()
    for caller in callers:
        caller.join()
    assert server.ended() == BROKEN
    assert {200} < set(seen) <= {200, 500, 503}


def test_a_gpu_that_is_lost_while_nobody_asks_is_noticed(start: Callable[..., Process]) -> None:
    server = start("lost", "--keep-warm-ms", "20")
    server.fail()
    assert server.ended() == BROKEN


def test_a_gpu_that_is_lost_while_a_version_is_loaded_ends_the_server(
    start: Callable[..., Process], artifact: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path / "toy" / "7")
    key, hash_ = new_key()
    server = start(
        *("lost", "--keep-warm-ms", "0", "--batch-sizes", "1,2"),
        *("--model-repository", str(tmp_path), "--admin-keys", hash_),
    )
    server.fail()
    refused = server.client.post("/v2/repository/models/toy/load", headers={"authorization": f"Bearer {key}"})
    assert "The GPU is lost, and this server ends" in refused.text
    assert server.is_ready() is False
    assert server.ended() == BROKEN
    assert server.said.count("This process cannot go on: the GPU is lost") == 1


def test_a_gpu_that_may_be_lost_is_tried_after_the_first_failure(start: Callable[..., Process]) -> None:
    server = start("doubtful", "--keep-warm-ms", "0")
    server.fail()
    assert server.ask() == 500
    assert server.ended() == BROKEN
    assert "column 1 failed 2 times in a row, at last on a blank picture: CUDNN failure 5000" in server.said


def test_a_gpu_that_fails_again_and_again_is_broken(start: Callable[..., Process]) -> None:
    server = start("failing", "--keep-warm-ms", "0", "--failed-runs-until-restart", "4")
    server.fail()
    assert [server.ask() for _ in range(4)] == [500] * 4
    assert server.ended() == BROKEN
    assert "column 1 failed 5 times in a row, at last on a blank picture: CUDA failure 2" in server.said


def test_a_run_that_hangs_is_left_behind(start: Callable[..., Process]) -> None:
    server = start("hanging", "--keep-warm-ms", "0", "--run-timeout-s", "0.5", "--drain-timeout-s", "0.5")
    server.fail()
    assert server.ask(budget_ms=9000) == 503
    assert server.ended() == BROKEN
    assert "has not ended for 0.5 s" in server.said
