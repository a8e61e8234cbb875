"""The artifact run offline answers as the service does; made-up outcomes look like the manifest."""

import json
import pickle
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loadtests.offline import Offline, Outcomes, commit, read_test_images
from service.inference import Inference
from tests.service import toy_artifact
from tests.service.conftest import artifact, inference

__all__ = ["artifact", "inference"]  # fixtures

N = 30
N_MADE_UP = 20_000
CHOICES = [choice for size in (1, 2, 3) for choice in combinations(toy_artifact.COLUMNS, size)]
SHIPPED = json.loads((Path(__file__).parents[2] / "model" / "pretrained" / "manifest.json").read_text())


@pytest.fixture(name="images_NHWC")
def random_images() -> NDArray[np.uint8]:
    shape = (N, toy_artifact.HEIGHT, toy_artifact.WIDTH, 3)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def test_outcomes_are_what_the_service_would_answer(
    artifact: Path, inference: Inference, images_NHWC: NDArray[np.uint8]
) -> None:
    labels = np.random.default_rng(2).integers(0, len(toy_artifact.LABELS), N)
    outcomes = Offline(artifact, images_NHWC).outcomes(labels)
    assert len(outcomes) == N
    assert list(outcomes.confidence) == list(outcomes.is_correct) == CHOICES
    for i in range(N):
        logits = {c: inference.run(c, images_NHWC[i : i + 1])[0] for c in toy_artifact.COLUMNS}
        for choice in CHOICES:
            served_K = inference.combine(choice, [logits[c] for c in choice])
            assert outcomes.confidence[choice][i] == pytest.approx(served_K.max(), abs=1e-4)
            assert outcomes.is_correct[choice][i] == (served_K.argmax() == labels[i])


def test_without_a_rule_the_deepest_column_answers(artifact: Path, images_NHWC: NDArray[np.uint8]) -> None:
    offline = Offline(artifact, images_NHWC)
    labels = offline.predictions(["2", "3"])
    outcomes = offline.outcomes(labels)
    assert outcomes.is_correct["2", "3"].all()
    assert outcomes.is_correct["3",].all()
    assert not outcomes.is_correct["1", "3"].all()


def test_each_image_needs_its_label(artifact: Path, images_NHWC: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="give one for each"):
        Offline(artifact, images_NHWC).outcomes(np.zeros(N - 1, np.int64))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    made_up = Outcomes.made_up(SHIPPED, 100, seed=3)
    made_up.save(tmp_path / "outcomes.npz")
    with np.load(tmp_path / "outcomes.npz") as arrays:
        assert arrays["confidence/1+3"].dtype == np.float32
        assert arrays["is_correct/1+3"].dtype == np.bool_
    loaded = Outcomes.load(tmp_path / "outcomes.npz")
    assert list(loaded.confidence) == list(made_up.confidence)
    for choice, confidence_N in made_up.confidence.items():
        assert np.array_equal(loaded.confidence[choice], confidence_N)
        assert np.array_equal(loaded.is_correct[choice], made_up.is_correct[choice])
    with pytest.raises(ValueError, match="npz"):
        made_up.save(tmp_path / "outcomes")


def test_made_up_outcomes_have_the_manifests_accuracies() -> None:
    made_up = Outcomes.made_up(SHIPPED, N_MADE_UP, seed=0)
    accuracy = {choice: is_correct_N.mean() for choice, is_correct_N in made_up.is_correct.items()}
    for rule in SHIPPED["combinations"]:
        assert accuracy[tuple(rule["columns"])] == pytest.approx(rule["accuracy"], abs=0.005)
    assert accuracy["1",] < accuracy["2",] < accuracy["3",] < accuracy["1", "2", "3"]


def test_made_up_outcomes_have_the_manifests_confidence_tables() -> None:
    made_up = Outcomes.made_up(SHIPPED, N_MADE_UP, seed=0)
    for table in SHIPPED["confidence"]:
        bin_N = np.digitize(made_up.confidence[tuple(table["columns"])], table["edges"][1:-1])
        share = np.bincount(bin_N, minlength=len(table["n"])) / N_MADE_UP
        assert share == pytest.approx(np.array(table["n"]) / sum(table["n"]), abs=0.001)
        for key, accuracy in table["accuracy"].items():
            is_correct_N = made_up.is_correct[tuple(key.split("+"))]
            gaps = [abs(is_correct_N[bin_N == b].mean() - accuracy[b]) for b in range(len(share)) if share[b]]
            assert np.average(gaps, weights=share[share > 0]) < 0.03


def test_the_seed_decides_what_is_made_up() -> None:
    first, again, other = (Outcomes.made_up(SHIPPED, 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.confidence["1",], again.confidence["1",])
    assert not np.array_equal(first.confidence["1",], other.confidence["1",])


def test_a_manifest_without_tables_will_do(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    made_up = Outcomes.made_up(manifest, N_MADE_UP, seed=0)
    assert list(made_up.confidence) == CHOICES
    for key, accuracy in toy_artifact.ACCURACY.items():
        assert made_up.is_correct[tuple(key.split("+"))].mean() == pytest.approx(accuracy, abs=0.005)
    assert np.array_equal(made_up.is_correct["2", "3"], made_up.is_correct["3",])


def test_the_test_images_are_read_in_their_order(tmp_path: Path, images_NHWC: NDArray[np.uint8]) -> None:
    batch = {"data": images_NHWC.transpose(0, 3, 1, 2).reshape(N, -1), "labels": list(range(N))}
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch))
    read_NHWC, labels = read_test_images(tmp_path, N - 1, toy_artifact.HEIGHT, toy_artifact.WIDTH)
    assert np.array_equal(read_NHWC, images_NHWC[:-1])
    assert labels.tolist() == list(range(N - 1))


def test_a_malicious_file_runs_nothing(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match="download it anew"):
        read_test_images(tmp_path, N, toy_artifact.HEIGHT, toy_artifact.WIDTH)
    assert not (tmp_path / "ran").exists()


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_told_where_there_is_one(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    clean = commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"
