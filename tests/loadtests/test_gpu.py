"""The benchmark of a GPU: how it searches and judges, what it reads and writes, and all of it without one."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtests import gpu, gpu_page
from loadtests.gpu import Round, Step, best, climb
from loadtests.openloop import Reply
from tests.service import toy_artifact

ROOT = Path(__file__).parents[2]


# ---- how the load is found ----


def step(rate_hz: float, attainment: float, *, is_valid: bool = True) -> Step:
    latency_ms = {"p50": 1.0, "p95": 2.0, "p99": 3.0, "p99.9": 4.0}
    outcomes = {"answered": 1.0, "rejected": 0.0}
    return Step(rate_hz, attainment, math.nan, latency_ms, outcomes, {"1": 1.0}, {}, {}, is_valid)


def server(capacity_hz: float, *, generator_hz: float = math.inf) -> Callable[[float], Step]:
    """Answers all in time below its capacity, half of them above."""

    def offered(rate_hz: float) -> Step:
        return step(rate_hz, 1.0 if rate_hz <= capacity_hz else 0.5, is_valid=rate_hz <= generator_hz)

    return offered


def climbed(
    offered: Callable[[float], Step], *, start_hz: float = 100, n_steps: int = 40
) -> tuple[list[Step], str]:
    *_, last = climb(offered, start_hz=start_hz, factor=2, share=0.99, n_steps=n_steps)
    return last


@pytest.mark.parametrize("capacity_hz", [30.0, 150.0, 999.0, 12_345.0])
@pytest.mark.parametrize("start_hz", [100.0, 8_000.0])
def test_the_largest_load_is_found_from_either_side(capacity_hz: float, start_hz: float) -> None:
    steps, why = climbed(server(capacity_hz), start_hz=start_hz)
    held = best(steps, 0.99)
    assert held is not None
    assert why == "attainment"
    assert held.rate_hz <= capacity_hz < held.rate_hz * 2 ** (1 / 2**gpu.N_HALVINGS)
    assert len(steps) <= 2 + math.ceil(abs(math.log2(capacity_hz / start_hz))) + gpu.N_HALVINGS


def test_a_first_load_that_is_too_much_is_lowered_down_to_the_least() -> None:
    steps, _ = climbed(server(0), start_hz=1000)
    assert [one.rate_hz for one in steps] == [1000, 500, 250, 125, 62.5, 31.25, gpu.LEAST_HZ]
    assert best(steps, 0.99) is None


def test_every_step_is_told_when_it_is_made() -> None:
    told = [len(steps) for steps, _ in climb(server(300), start_hz=100, factor=2, share=0.99, n_steps=5)]
    assert told == [1, 2, 3, 4, 5]


def test_a_generator_at_its_limit_is_not_taken_for_a_server_at_its() -> None:
    steps, why = climbed(server(1e9, generator_hz=500))
    assert why == "generator"
    held = best(steps, 0.99)
    assert held is not None
    assert 400 <= held.rate_hz <= 500


def test_a_generator_that_was_late_once_is_asked_again() -> None:
    made: list[float] = []

    def offered(rate_hz: float) -> Step:
        made.append(rate_hz)
        return step(rate_hz, 1.0 if rate_hz <= 300 else 0.5, is_valid=len(made) != 2)

    _, why = climbed(offered)
    assert made[:4] == [100, 200, 200, 400]
    assert why == "attainment"


def test_it_ends_after_so_many_steps() -> None:
    steps, why = climbed(server(1e9), n_steps=3)
    assert ([one.rate_hz for one in steps], why) == ([100, 200, 400], "steps")


# ---- how answers and silences are judged ----


def reply(*, done_s: float, columns: tuple[str, ...] = ("1",), elapsed_ms: float = 1.5) -> Reply:
    said = {"index": 2, "deadline_met": True, "stopped_by": "budget", "columns_run": columns}
    timing_ms = {"decode": 0.2, "queue": 0.3, "inference": 0.6}
    body = json.dumps(said | {"elapsed_ms": elapsed_ms, "timing_ms": timing_ms}).encode()
    return Reply(image=0, due_s=0.0, sent_s=0.001, done_s=done_s, status=200, body=body)


def test_the_parts_of_the_time_are_all_of_it() -> None:
    lost = Reply(image=0, due_s=0.0, sent_s=0.0, done_s=math.nan, status=0, body=b"")
    split = gpu.split([reply(done_s=0.004), lost])
    medians = {name: part["p50"] for name, part in split.part_ms.items()}
    assert split.n == 1
    assert medians["lag"] == pytest.approx(1.0)
    assert medians["inference"] == pytest.approx(0.6)
    assert medians["outside"] == pytest.approx(1.5)
    assert sum(medians[name] for name in gpu_page.PARTS_OF_TIME) == pytest.approx(4.0)
    assert gpu.split([lost]) == gpu.Split(0, {}, {})


def test_answers_are_told_by_their_deepest_column() -> None:
    split = gpu.split([reply(done_s=0.004, columns=columns) for columns in [("1", "3"), ("3",), ("1",)]])
    assert split.deepest == pytest.approx({"3": 2 / 3, "1": 1 / 3})


def test_silences_of_both_kinds_come_in_turn() -> None:
    warm, alone = gpu.ARMS
    assert gpu.blocks(5, 2) == [(warm, 2), (alone, 2), (warm, 2), (alone, 2), (warm, 1), (alone, 1)]


def test_a_void_silence_is_not_counted() -> None:
    warm, alone = gpu.ARMS
    rounds = [
        Round(warm, [3.0, 1.0, 7.0], is_valid=True),
        Round(alone, [math.nan, 2.0, 2.0], is_valid=True),
        Round(warm, [90.0, 90.0, 90.0], is_valid=False),
        Round(warm, [4.0, 1.0, 1.0], is_valid=True),
    ]
    arms = gpu.judged(rounds, budget_ms=5.0)
    assert arms[warm]["first_ms"] == [3.0, 4.0]
    assert arms[warm]["first"] == {"p50": 3.5, "p100": 4.0}
    assert (arms[warm]["n_rounds"], arms[warm]["n_void"], arms[warm]["n"]) == (2, 1, 6)
    assert arms[warm]["attainment"] == pytest.approx(5 / 6)
    assert arms[warm]["all"].keys() == {"p50", "p99", "p99.9"}
    assert (arms[alone]["first_ms"], arms[alone]["n_unanswered"]) == ([], 1)
    assert arms[alone]["attainment"] == pytest.approx(2 / 3)
    assert gpu.judged(rounds[2:3], budget_ms=5.0)[alone]["n"] == 0


# ---- what nvidia-smi says ----


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


# ---- what is written ----


def head(**more: Any) -> dict[str, Any]:
    about = {"gpus": [], "cores": 2, "processor": "X", "precision": "fp32", "date": "2026", "command": "it"}
    state: dict[str, Any] = {"failed": {}, "unfinished": []}
    measured = {"artifact": "toy", "version": "7", "commit": "abc", "provider": "cpu"}
    return about | measured | state | {"budget_ms": 5, "share": 0.99, "idle_s": 1} | more


def test_a_file_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    out = tmp_path / "there" / "found"
    gpu_page.write(out, head(date="one day"))
    with out.with_suffix(".json").open() as before:
        gpu_page.write(out, head(date=math.nan))
        assert json.load(before)["date"] == "one day"  # what is open is not what is written
    assert json.loads(out.with_suffix(".json").read_text())["date"] is None  # NaN is no JSON
    assert sorted(path.name for path in out.parent.iterdir()) == ["found.json", "found.md"]


def test_the_page_says_what_is_missing() -> None:
    text = gpu_page.page(head(failed={"load": "no more"}, unfinished=["silence"]))
    assert "The part load failed" in text
    assert "no more" in text
    assert "Not finished: silence." in text


def test_the_page_says_which_commit_and_version_were_measured() -> None:
    text = gpu_page.page(head())
    assert "commit abc" in text
    assert "toy, version 7" in text


def test_quick_takes_5_to_6_minutes_and_gives_way(capsys: pytest.CaptureFixture[str]) -> None:
    quick = gpu.read(["--quick"])
    assert 300 <= gpu.expected_s(quick) <= 360
    assert gpu.expected_s(gpu.read([])) > 600
    assert gpu.read(["--quick", "--steps", "3"]).steps == 3
    assert gpu.read(["--quick", "--steps", "3"]).seconds == quick.seconds < gpu.read([]).seconds
    with pytest.raises(SystemExit):
        gpu.read(["--help"])
    assert re.search(r"about 1\d minutes, --quick 5\.\d", capsys.readouterr().out)


# ---- all of it ----


TOY = ("--budget-ms", "500", "--idle-s", "0.2", "--burst", "3", "--keep-warm-ms", "20", "--seconds", "0.5")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_of_it_runs_where_there_is_no_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    status = gpu.main(
        [
            *("--provider", "cpu", "--artifact", str(artifact), "--batch-sizes", "1,2", *TOY),
            *("--profile-seconds", "0.1", "--start-rate", "50", "--steps", "2", "--idle-rounds", "2"),
            *("--block", "1", "--commit", "a copy", "--out", str(tmp_path / "results" / "gpu")),
        ]
    )
    printed = capfd.readouterr()
    assert status == 0, printed.err
    page = (tmp_path / "results" / "gpu.md").read_text()
    assert page in printed.out
    for title in ("# toy, version 7, on cpu", "## One run", "## Answers within 500 ms", "## After 0.2 s"):
        assert title in page
    found = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert (found["commit"], found["version"]) == ("a copy", "7")
    assert (found["failed"], found["unfinished"]) == ({}, [])
    assert found["latency_ms"]["cpu"].keys() == set(toy_artifact.COLUMNS)
    assert 1 <= len(found["load"]["steps"]) <= 2
    assert found["load"]["steps"][0]["splits"]["all"]["n"] > 0
    assert [one["arm"] for one in found["silence"]["rounds"]] == [*gpu.ARMS] * 2
    assert {one["n"] + 3 * one["n_void"] for one in found["silence"]["arms"].values()} == {6}
    assert found["command"].startswith("python -m loadtests.gpu --provider cpu")


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    no_load = ("--start-rate", "0", "--parts", "load,silence", "--idle-rounds", "1", "--batch-sizes", "1")
    out = ("--out", str(tmp_path / "gpu"))
    assert gpu.main(["--provider", "cpu", "--artifact", str(artifact), *TOY, *no_load, *out]) == 1
    assert "Failed: load." in capfd.readouterr().err
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "rate_hz" in found["failed"]["load"]
    assert len(found["silence"]["rounds"]) == 2
    assert "The part load failed" in (tmp_path / "gpu.md").read_text()


def living(mark: str) -> list[int]:
    """The processes that have this in their environment."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_who_is_ended_keeps_what_he_has_and_leaves_no_server(tmp_path: Path) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    arguments = ["--provider", "cpu", "--artifact", str(artifact), *TOY, "--start-rate", "50"]
    arguments += ["--factor", "1.01", "--parts", "load", "--steps", "500", "--batch-sizes", "1"]
    arguments += ["--out", str(tmp_path / "gpu")]
    environ = os.environ | {"TEST_OF_THE_END": str(tmp_path)}
    path = tmp_path / "gpu.json"
    it = subprocess.Popen([sys.executable, "-m", "loadtests.gpu", *arguments], cwd=ROOT, env=environ)
    try:
        until_s = time.monotonic() + 30
        while not (path.exists() and json.loads(path.read_text()).get("load")):
            assert it.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert len(living(f"TEST_OF_THE_END={tmp_path}")) > 1, "it is written while the server still runs"
        it.terminate()
        assert it.wait(30) != 0
        assert living(f"TEST_OF_THE_END={tmp_path}") == []
    finally:
        for pid in living(f"TEST_OF_THE_END={tmp_path}"):
            os.kill(pid, signal.SIGKILL)
        it.wait()
    found = json.loads(path.read_text())
    assert found["load"]["steps"]
    assert found["unfinished"] == ["load"]
    assert "Not finished: load." in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_measures_although_tests_fail_and_ends_as_they_did(tmp_path: Path) -> None:
    for name in ("made", "all", "cuda"):
        (tmp_path / name).touch()
    ran = tmp_path / "ran"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{ran}"\n[ "$2" != "$FAILING" ]\n')
    python.chmod(0o755)

    def make(failing: str) -> int:
        ran.write_text("")
        command = ["make", "gpu", f"VENV={tmp_path}", f"PY={python}", "ARGS=--quick"]
        environ = os.environ | {"FAILING": failing, "MAKEFLAGS": ""}
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False).returncode

    for failing in ("pytest", "loadtests.gpu", "nothing"):
        assert bool(make(failing)) == (failing != "nothing")
        assert ran.read_text().splitlines() == [
            "-m pytest -m gpu",
            "-m loadtests.gpu --out loadtests/results/gpu --quick",
        ]


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
