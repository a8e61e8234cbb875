"""The benchmark of a GPU: how it searches, what it reads, and all of it once where there is none."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtests import gpu
from loadtests.gpu import Step, best, climb
from tests.service import toy_artifact


def step(rate_hz: float, attainment: float, *, is_valid: bool = True) -> Step:
    latency_ms = {"p50": 1.0, "p95": 2.0, "p99": 3.0, "p99.9": 4.0}
    return Step(rate_hz, attainment, math.nan, latency_ms, 0.0, {"1": 1.0}, {}, is_valid)


def server(capacity_hz: float, *, generator_hz: float = math.inf) -> Callable[[float], Step]:
    """Answers all in time below its capacity, half of them above."""

    def offered(rate_hz: float) -> Step:
        return step(rate_hz, 1.0 if rate_hz <= capacity_hz else 0.5, is_valid=rate_hz <= generator_hz)

    return offered


@pytest.mark.parametrize("capacity_hz", [150.0, 999.0, 12_345.0])
def test_the_largest_load_is_found_within_a_share_of_the_last_rise(capacity_hz: float) -> None:
    steps, why = climb(server(capacity_hz), start_hz=100, factor=2, share=0.99, n_steps=40)
    held = best(steps, 0.99)
    assert held is not None
    assert why == "attainment"
    assert held.rate_hz <= capacity_hz < held.rate_hz * 2 ** (1 / 2**gpu.N_HALVINGS)
    assert len(steps) <= 2 + math.ceil(math.log2(capacity_hz / 100)) + gpu.N_HALVINGS


def test_a_first_load_that_is_too_much_is_lowered() -> None:
    steps, _ = climb(server(30), start_hz=100, factor=2, share=0.99, n_steps=40)
    assert best(steps, 0.99) == steps[2]
    assert [one.rate_hz for one in steps[:3]] == [100, 50, 25]


def test_nothing_is_best_where_nothing_was_in_time() -> None:
    steps, _ = climb(server(0), start_hz=100, factor=2, share=0.99, n_steps=40)
    assert best(steps, 0.99) is None


def test_a_generator_at_its_limit_is_not_taken_for_a_server_at_its() -> None:
    steps, why = climb(server(1e9, generator_hz=500), start_hz=100, factor=2, share=0.99, n_steps=40)
    assert why == "generator"
    held = best(steps, 0.99)
    assert held is not None
    assert 400 <= held.rate_hz <= 500


def test_a_generator_that_was_late_once_is_asked_again() -> None:
    made: list[float] = []

    def offered(rate_hz: float) -> Step:
        made.append(rate_hz)
        return step(rate_hz, 1.0 if rate_hz <= 300 else 0.5, is_valid=len(made) != 2)

    _, why = climb(offered, start_hz=100, factor=2, share=0.99, n_steps=40)
    assert made[:4] == [100, 200, 200, 400]
    assert why == "attainment"


def test_it_ends_after_so_many_steps() -> None:
    steps, why = climb(server(1e9), start_hz=100, factor=2, share=0.99, n_steps=3)
    assert ([one.rate_hz for one in steps], why) == ([100, 200, 400], "steps")


def nvidia_smi(folder: Path, *lines: str) -> None:
    """A program that writes all lines at once, so that whoever reads some of them reads the last one too."""
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in lines) + "\nexec sleep 60\n"
    )
    program.chmod(0o755)


def test_the_busiest_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(
        tmp_path,
        "0, 0, 210, 60.5, 4",
        "1, 80, 1500, [N/A], 900",
        "0, 2, 210, 60.5, 4",
        "1, 60, 1700, [N/A], 900",
        "0, 1",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with gpu.watching() as told:
        while "memory_mib" not in (figures := told()) or figures["busy_percent"] != 70:
            pass
    assert figures.pop("power_w") != figures.get("power_w")  # NaN: not told
    assert figures == {"busy_percent": 70, "clock_mhz": 1600, "memory_mib": 900}


def test_without_nvidia_smi_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu.watching() as told:
        pass
    assert told() == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_of_it_runs_where_there_is_no_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    status = gpu.main(
        [
            *("--provider", "cpu", "--artifact", str(artifact), "--batch-sizes", "1,2"),
            *("--profile-seconds", "0.1", "--seconds", "0.5", "--start-rate", "50", "--steps", "2"),
            *("--budget-ms", "500", "--idle-s", "0.2", "--idle-rounds", "2", "--burst", "3"),
            *("--keep-warm-ms", "20", "--out", str(tmp_path / "results" / "gpu")),
        ]
    )
    printed = capfd.readouterr()
    assert status == 0, printed.err
    page = (tmp_path / "results" / "gpu.md").read_text()
    assert page in printed.out
    for title in ("# toy 7 on cpu", "## One run", "## Answers within 500 ms", "## After 0.2 s of silence"):
        assert title in page
    found = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert found["latency_ms"]["cpu"].keys() == set(toy_artifact.COLUMNS)
    assert 1 <= len(found["load"]["steps"]) <= 2
    assert {one["n"] for one in found["silence"].values()} == {6}
    assert found["command"].startswith("python -m loadtests.gpu --provider cpu")


def test_a_single_question_is_answered_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    status = gpu.main(
        [
            *("--provider", "cpu", "--artifact", str(artifact), "--parts", "latencies", "--batch-sizes", "1"),
            *("--profile-seconds", "0.1", "--out", str(tmp_path / "gpu")),
        ]
    )
    assert status == 0, capfd.readouterr().err
    page = (tmp_path / "gpu.md").read_text()
    assert "## One run" in page
    assert "## Answers within" not in page
    assert "of silence" not in page
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "latencies,noise"])
    assert "no part is called 'noise'" in capfd.readouterr().err


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("needs a machine without a GPU")
    artifact = toy_artifact.write(tmp_path / "toy")
    assert gpu.main(["--provider", "cuda", "--artifact", str(artifact), "--profile-seconds", "0.1"]) == 1
    assert "cannot use CUDAExecutionProvider" in capfd.readouterr().err
