"""Latencies are measured for every column and batch size, remembered per machine, never trusted blindly."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service import profiling, providers
from service.engine import InferenceThread
from service.inference import Inference
from service.latency import LatencyProfile
from service.profiling import measure, recall_or_measure
from service.providers import GpuOptions
from tests.fakes import FakeProcessor, run_in_virtual_time
from tests.service import toy_artifact

SIZES = (1, 3)


@pytest.fixture
def processor(inference: Inference) -> Iterator[InferenceThread]:
    processor = InferenceThread(inference)
    yield processor
    processor.close()


def as_dict(profile: LatencyProfile) -> dict[str, dict[int, tuple[float, float]]]:
    return {
        column: {size: (latency.median_s, latency.high_s) for size, latency in by_size.items()}
        for column, by_size in profile.items()
    }


@dataclass
class Machine:
    """A machine in virtual time, as fast as it is told."""

    inference: Inference
    cache: Path | None
    factors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(toy_artifact.COLUMNS, 1.0))
    n_runs: int = 0
    rest: float = 0.0
    beside: Iterator[float] = field(default_factory=lambda: itertools.repeat(1.0))
    """How much longer each run takes because of what else goes on."""

    def start_up(self, inference: Inference | None = None, n_threads: int = 1) -> LatencyProfile:
        return run_in_virtual_time(lambda: self._start_up(inference or self.inference, n_threads))

    async def _start_up(self, inference: Inference, n_threads: int) -> LatencyProfile:
        processor = FakeProcessor(
            lambda column, n: int(column) * n * 1e-3 * self.factors[column] * next(self.beside)
        )
        profile = await recall_or_measure(
            inference,
            processor,
            batch_sizes=SIZES,
            quantile=0.9,
            seconds=1.0,
            intra_op_threads=n_threads,
            cache=self.cache,
            rest=self.rest,
            clock=asyncio.get_running_loop().time,
        )
        self.n_runs = len(processor.runs)
        return profile


@pytest.fixture
def machine(inference: Inference, tmp_path: Path) -> Machine:
    return Machine(inference, tmp_path / "cache")


def test_every_column_and_size_is_measured(inference: Inference, processor: InferenceThread) -> None:
    profile = asyncio.run(measure(inference, processor, batch_sizes=SIZES, quantile=0.9, seconds=0.001))
    measured = as_dict(profile)
    assert measured.keys() == set(toy_artifact.COLUMNS)
    for by_size in measured.values():
        assert by_size.keys() == set(SIZES)
        assert all(0 < median_s <= high_s for median_s, high_s in by_size.values())


def test_a_second_start_recalls_the_first_after_a_brief_check(machine: Machine) -> None:
    first, n_runs = machine.start_up(), machine.n_runs
    assert first.latency("3", 3).median_s == pytest.approx(0.009)
    machine.factors |= {"2": 1.4, "3": 0.7}
    assert as_dict(machine.start_up()) == as_dict(first)
    assert 0 < machine.n_runs < n_runs / 3


def test_beside_others_the_quickest_runs_count_and_nothing_is_remembered(
    machine: Machine,
) -> None:
    alone, n_runs = machine.start_up(), machine.n_runs
    assert machine.cache is not None
    (path,) = machine.cache.iterdir()
    path.unlink()
    machine.rest, machine.beside = 4.0, itertools.cycle([3.0, 1.0, 5.0, 1.0, 9.0])
    beside = machine.start_up()
    for column, by_size in as_dict(alone).items():
        for size, (median_s, _) in by_size.items():
            assert beside.latency(column, size).median_s == pytest.approx(median_s)
            assert beside.latency(column, size).high_s <= 3 * median_s
    assert machine.n_runs < n_runs / 4
    assert list(machine.cache.iterdir()) == []


@pytest.mark.parametrize("factor", [1.6, 0.6])
@pytest.mark.parametrize("column", toy_artifact.COLUMNS)
def test_what_is_remembered_of_a_machine_that_has_changed_is_measured_anew(
    machine: Machine, column: str, factor: float
) -> None:
    machine.start_up()
    machine.factors[column] = factor
    changed = machine.start_up()
    assert changed.latency(column, 3).median_s == pytest.approx(int(column) * 3e-3 * factor)
    assert as_dict(machine.start_up()) == as_dict(changed)


def test_without_a_folder_nothing_is_kept(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machine.cache = None
    machine.start_up()
    n_runs = machine.n_runs
    machine.start_up()
    assert machine.n_runs == n_runs
    assert list(tmp_path.iterdir()) == []


def test_another_setup_is_measured_anew(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference = machine.inference
    machine.start_up()
    machine.start_up(n_threads=2)
    machine.start_up(Inference(inference.manifest, inference._sessions, provider="cpu", sha256="f" * 64))
    gpu = GpuOptions()
    machine.start_up(
        Inference(inference.manifest, inference._sessions, provider="cuda", sha256="f" * 64, gpu=gpu)
    )
    quota = tmp_path / "cpu.max"
    quota.write_text("150000 100000\n")
    monkeypatch.setattr(profiling, "CPU_QUOTA", quota)
    machine.start_up()
    assert machine.cache is not None
    assert len(list(machine.cache.iterdir())) == 5


@pytest.mark.parametrize("what", ["graphs", "another card", "another choice of cards"])
def test_latencies_of_another_gpu_or_of_other_options_are_not_taken(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(providers, "DRIVER", tmp_path / "driver")

    def start_up(gpu: GpuOptions) -> None:
        manifest, sessions = machine.inference.manifest, machine.inference._sessions
        machine.start_up(Inference(manifest, sessions, provider="cuda", sha256="0" * 64, gpu=gpu))

    def n_remembered() -> int:
        assert machine.cache is not None
        return len(list(machine.cache.iterdir()))

    start_up(GpuOptions())
    start_up(GpuOptions(tensorrt_cache=tmp_path))  # where something is kept changes no latency
    assert n_remembered() == 1
    if what == "another card":
        (tmp_path / "driver/gpus/1").mkdir(parents=True)
        (tmp_path / "driver/gpus/1/information").write_text("Model: NVIDIA L4")
    if what == "another choice of cards":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    start_up(GpuOptions(cuda_graphs=what != "graphs"))
    assert n_remembered() == 2


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="cut short"),
        pytest.param("[]", id="no object"),
        pytest.param('{"key": {}}', id="another key"),
        pytest.param(None, id="negative times"),
    ],
)
def test_a_damaged_memory_is_measured_anew(machine: Machine, content: str | None) -> None:
    first = machine.start_up()
    assert machine.cache is not None
    (path,) = machine.cache.iterdir()
    good = path.read_text()
    if content is None:
        damaged = json.loads(good)
        damaged["latencies_s"]["1"]["1"] = [-1.0, 2.0]
        content = json.dumps(damaged)
    path.write_text(content)
    assert as_dict(machine.start_up()).keys() == as_dict(first).keys()
    assert json.loads(path.read_text())["key"] == json.loads(good)["key"]


def test_a_folder_that_cannot_be_written_does_no_harm(machine: Machine, tmp_path: Path) -> None:
    machine.cache = tmp_path / "file"
    machine.cache.touch()
    assert as_dict(machine.start_up()).keys() == set(toy_artifact.COLUMNS)
