"""The comparison of answers over HTTP with the artifact run offline: passes right ones, finds a wrong one."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from loadtests.http_accuracy import Answer, judge, main
from loadtests.offline import Offline, read_test_images
from tests.service import toy_artifact
from tests.service.conftest import Launcher, Running, artifact, inference, launch, profile_of, server

__all__ = ["artifact", "inference", "launch", "server"]  # fixtures

N = 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures of the toy's size in the form of CIFAR-10's test batch."""
    rng = np.random.default_rng(6)
    n_values = toy_artifact.HEIGHT * toy_artifact.WIDTH * 3
    batch = {
        "data": rng.integers(0, 256, (N, n_values), np.uint8),
        "labels": rng.integers(0, 5, N).tolist(),
    }
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch))
    return tmp_path


def test_answers_over_http_are_those_of_the_artifact(server: Running, artifact: Path, data: Path) -> None:
    out = data / "result.json"
    status = main(
        [
            *("--data", str(data), "--artifact", str(artifact), "--url", str(server.client.base_url)),
            *("--budgets", "5000", "--n", str(N), "--out", str(out)),
        ]
    )
    assert status == 0
    record = json.loads(out.read_text())
    assert record["processor"]
    assert record["cores"] >= 1
    (result,) = record["results"]
    assert result["mismatches"] == 0
    group = result["by_columns_run"]["1+2+3"]
    assert group["n"] == N
    assert group["online_accuracy"] == group["offline_accuracy_same_images"]


def test_a_wrong_answer_is_found(artifact: Path, data: Path) -> None:
    images_NHWC, labels = read_test_images(data, N, toy_artifact.HEIGHT, toy_artifact.WIDTH)
    offline = Offline(artifact, images_NHWC)
    right = offline.predictions(["1", "3"])
    answers = [
        Answer(
            i, 200, ("1", "3"), int(right[i]) if i else int(right[i] + 1) % 5, is_called_met=True, took_ms=1.0
        )
        for i in range(N)
    ]
    result = judge([*answers, Answer(0, 429, (), -1, is_called_met=False, took_ms=0.5)], 5.0, labels, offline)
    assert result["mismatches"] == 1
    assert result["attainment_by_client"] == N / (N + 1)


def test_a_budget_that_got_no_answer_fails(launch: Launcher, artifact: Path, data: Path) -> None:
    hopeless = launch(profile=profile_of(1.0))
    url = str(hopeless.client.base_url)
    status = main(["--data", str(data), "--artifact", str(artifact), "--url", url, "--budgets", "5"])
    assert status == 1
