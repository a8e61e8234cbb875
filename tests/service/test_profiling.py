"""Latencies are measured for every column and batch size, remembered per machine, never trusted blindly."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.engine import InferenceThread
from service.inference import Inference
from service.profiling import measure, recall_or_measure
from service.scheduling import LatencyProfile
from tests.service import toy_artifact

SIZES = (1, 3)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def as_dict(profile: LatencyProfile) -> dict[str, dict[int, tuple[float, float]]]:
    return {
        column: {size: (latency.median_s, latency.high_s) for size, latency in by_size.items()}
        for column, by_size in profile.items()
    }


def recall(
    inference: Inference, thread: ThreadPoolExecutor, cache: Path | None, n_threads: int = 1
) -> LatencyProfile:
    return asyncio.run(
        recall_or_measure(
            inference,
            InferenceThread(inference, thread),
            batch_sizes=SIZES,
            quantile=0.9,
            seconds=0.001,
            intra_op_threads=n_threads,
            cache=cache,
        )
    )


def test_every_column_and_size_is_measured(inference: Inference, thread: ThreadPoolExecutor) -> None:
    processor = InferenceThread(inference, thread)
    profile = asyncio.run(measure(inference, processor, batch_sizes=SIZES, quantile=0.9, seconds=0.001))
    measured = as_dict(profile)
    assert measured.keys() == set(toy_artifact.COLUMNS)
    for by_size in measured.values():
        assert by_size.keys() == set(SIZES)
        assert all(0 < median_s <= high_s for median_s, high_s in by_size.values())


def test_a_second_start_recalls_the_first(
    inference: Inference, thread: ThreadPoolExecutor, tmp_path: Path
) -> None:
    first = recall(inference, thread, tmp_path / "new")
    assert as_dict(recall(inference, thread, tmp_path / "new")) == as_dict(first)


def test_without_a_folder_nothing_is_kept(
    inference: Inference, thread: ThreadPoolExecutor, tmp_path: Path
) -> None:
    recall(inference, thread, None)
    assert list(tmp_path.iterdir()) == []


def test_another_setup_is_measured_anew(
    inference: Inference, thread: ThreadPoolExecutor, tmp_path: Path
) -> None:
    recall(inference, thread, tmp_path)
    recall(inference, thread, tmp_path, n_threads=2)
    other = Inference(inference.manifest, inference._sessions, provider="cpu", sha256="f" * 64)
    recall(other, thread, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="cut short"),
        pytest.param("[]", id="no object"),
        pytest.param('{"key": {}}', id="another key"),
        pytest.param(None, id="negative times"),
    ],
)
def test_a_damaged_memory_is_measured_anew(
    inference: Inference, thread: ThreadPoolExecutor, tmp_path: Path, content: str | None
) -> None:
    recall(inference, thread, tmp_path)
    (path,) = tmp_path.iterdir()
    good = json.loads(path.read_text())
    if content is None:
        damaged = json.loads(path.read_text())
        damaged["latencies_s"]["1"]["1"] = [-1.0, 2.0]
        content = json.dumps(damaged)
    path.write_text(content)
    profile = recall(inference, thread, tmp_path)
    assert all(median_s > 0 for by_size in as_dict(profile).values() for median_s, _ in by_size.values())
    assert json.loads(path.read_text())["key"] == good["key"]


def test_a_folder_that_cannot_be_written_does_no_harm(
    inference: Inference, thread: ThreadPoolExecutor, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert as_dict(recall(inference, thread, tmp_path / "file")).keys() == set(toy_artifact.COLUMNS)
