"""Loading refuses what is not the artifact it claims to be; running gives checked logits."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.inference import (
    ArtifactError,
    Inference,
    InferenceError,
    Manifest,
    Preempted,
    Preemption,
    ProviderUnavailable,
    load,
)
from tests.service import toy_artifact
from tests.service.conftest import BATCH_SIZES

IMAGES_NHWC = np.random.default_rng(2).integers(
    0, 256, (7, toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8
)


def load_cpu(folder: Path, provider: Any = "cpu") -> Inference:
    return load(folder, provider=provider, intra_op_threads=1, batch_sizes=BATCH_SIZES)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_each_column_gives_one_row_per_image_in_order(inference: Inference, n: int) -> None:
    for column in toy_artifact.COLUMNS:
        logits_NK = inference.run(column, IMAGES_NHWC[:n])
        by_hand_NK = IMAGES_NHWC[:n].reshape(n, -1) / 255.0 @ toy_artifact.projection(column)
        np.testing.assert_allclose(logits_NK, by_hand_NK, rtol=1e-4, atol=1e-4)


def test_the_answer_is_the_geometric_ensemble_of_the_columns_that_ran(inference: Inference) -> None:
    rows = [inference.run(column, IMAGES_NHWC[:1])[0] for column in ("1", "3")]
    log_p = [row - np.log(np.exp(row.astype(np.float64)).sum()) for row in rows]
    odds = np.exp((0.5 * log_p[0] + 0.5 * log_p[1]) / 2.0)
    np.testing.assert_allclose(inference.combine(("1", "3"), rows), odds / odds.sum(), rtol=1e-4)


def test_the_bias_is_added_after_the_temperature(artifact: Path) -> None:
    described = json.loads((artifact / "manifest.json").read_text())
    described["combinations"][0]["bias"] = [0.0, 0.0, 3.0, 0.0, 0.0]
    manifest = Manifest.model_validate_json(json.dumps(described))
    inference = Inference(manifest, {}, provider="cpu", sha256="0" * 64)
    odds = np.exp([0.0, 0.0, 3.0, 0.0, 0.0])
    np.testing.assert_allclose(
        inference.combine(("1",), [np.zeros(5, np.float32)]), odds / odds.sum(), rtol=1e-5
    )


def test_a_combination_that_was_not_measured_is_answered_by_its_deepest_column(inference: Inference) -> None:
    rows = [inference.run(column, IMAGES_NHWC[:1])[0] for column in ("2", "3")]
    np.testing.assert_array_equal(inference.combine(("2", "3"), rows), inference.combine(("3",), rows[1:]))


def test_huge_logits_still_give_probabilities(inference: Inference) -> None:
    probabilities_K = inference.combine(("1",), [np.array([1e30, -1e30, 0, 0, 0], np.float32)])
    assert probabilities_K.tolist() == [1, 0, 0, 0, 0]


class ScriptedSession:
    """Gives what it is told, and remembers what it was asked."""

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self._answer = answer
        self.n_images: list[int] = []

    def run(self, _: list[str], inputs: dict[str, NDArray[np.uint8]], options: Any = None, /) -> list[Any]:
        self.n_images.append(len(inputs["images_NHWC"]))
        return [self._answer(len(inputs["images_NHWC"]))]


def scripted(inference: Inference, session: ScriptedSession, **options: Any) -> Inference:
    return Inference(inference.manifest, {"1": session}, provider="cpu", sha256="0" * 64, **options)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        pytest.param(lambda n: np.zeros((n - 1, 5), np.float32), "shape", id="a row short"),
        pytest.param(lambda n: np.zeros((n, 4), np.float32), "shape", id="a label short"),
        pytest.param(lambda n: np.full((n, 5), np.nan, np.float32), "finite", id="not a number"),
        pytest.param(lambda n: np.full((n, 5), np.inf, np.float32), "finite", id="infinite"),
    ],
)
def test_unusable_logits_are_an_error(
    inference: Inference, answer: Callable[[int], NDArray[np.float32]], says: str
) -> None:
    with pytest.raises(InferenceError, match=says):
        scripted(inference, ScriptedSession(answer)).run("1", IMAGES_NHWC[:2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_image_without_numbers_leaves_those_beside_it_theirs(inference: Inference, bad: float) -> None:
    logits_NK = np.arange(15, dtype=np.float32).reshape(3, 5)
    logits_NK[1, 2] = bad
    found_NK = scripted(inference, ScriptedSession(lambda _: logits_NK)).run("1", IMAGES_NHWC[:3])
    np.testing.assert_array_equal(found_NK[[0, 2]], logits_NK[[0, 2]])
    assert np.isnan(found_NK[1]).all()


def test_a_run_that_is_to_end_ends_without_a_result(inference: Inference) -> None:
    preemption = Preemption()
    logits_NK = inference.run("3", IMAGES_NHWC[:2], preemption)
    np.testing.assert_array_equal(logits_NK, inference.run("3", IMAGES_NHWC[:2]))
    preemption.demand()
    with pytest.raises(Preempted):
        inference.run("3", IMAGES_NHWC[:2], preemption)
    np.testing.assert_array_equal(logits_NK, inference.run("3", IMAGES_NHWC[:2]))  # the session is as ever


def test_a_run_that_fails_is_no_preempted_one(inference: Inference) -> None:
    with pytest.raises(Exception, match="data type") as caught:
        inference.run("3", IMAGES_NHWC[:2].astype(np.float32), Preemption())
    assert not isinstance(caught.value, Preempted)


def test_on_a_gpu_no_run_is_told_to_end(inference: Inference) -> None:
    """Its sessions take no options."""
    told: list[tuple[Any, ...]] = []

    class Watching:
        def run(self, *given: Any) -> list[NDArray[np.float32]]:
            told.append(given)
            return [np.zeros((1, 5), np.float32)]

    on_gpu = Inference(inference.manifest, {"1": Watching()}, provider="cuda", sha256="0" * 64)
    assert not on_gpu.is_preemptible
    on_gpu.run("1", IMAGES_NHWC[:1], Preemption())
    assert len(told[0]) == 2


def test_padding_reaches_the_next_size_and_never_the_caller(inference: Inference) -> None:
    session = ScriptedSession(lambda n: np.arange(n * 5, dtype=np.float32).reshape(n, 5))
    padded = scripted(inference, session, padded_sizes=(1, 4))
    assert len(padded.run("1", IMAGES_NHWC[:3])) == 3
    assert len(padded.run("1", IMAGES_NHWC[:1])) == 1
    assert session.n_images == [4, 1]


def test_a_graph_that_gives_nonsense_is_found_when_warming_up(inference: Inference) -> None:
    with pytest.raises(ArtifactError, match="Column 1 cannot be run on 1 images"):
        scripted(inference, ScriptedSession(lambda n: np.full((n, 5), np.nan, np.float32))).warm_up((1, 2))


# ---- refusals ----


def test_the_session_runs_on_what_was_asked_for(artifact: Path) -> None:
    assert load_cpu(artifact).provider == "cpu"


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="needs a machine without a GPU")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_is_never_silently_replaced(
    artifact: Path, provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProviderUnavailable, match="ANYTIME_PROVIDER=cpu"):
        load_cpu(artifact, provider)


def test_a_missing_artifact_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="ANYTIME_ARTIFACT"):
        load_cpu(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "manifest.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return folder


def put(*keys: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(described: dict[str, Any]) -> None:
        place: Any = described
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("format", value=2), "format"),
        (put("labels", value=["one"]), "labels"),
        (put("input", "dtype", value="float32"), "input.dtype"),
        (put("input", "height", value="8"), "input.height"),
        (put("rungs", value=[]), "rungs"),
        (put("rungs", 0, "sha256", value="abc"), "rungs.0.sha256"),
        (put("rungs", 0, "accuracy", value=80.0), "rungs.0.accuracy"),
        (put("rungs", 0, "file", value="../column-1.onnx"), "plain name"),
        (put("rungs", 0, "file", value="/etc/passwd"), "plain name"),
        (put("rungs", 0, "file", value=".."), "plain name"),
        (put("rungs", 1, "column", value="1"), "share a column"),
        (put("combinations", 3, "columns", value=["2", "1"]), "increasing"),
        (put("combinations", 3, "columns", value=["1", "9"]), "increasing"),
        (put("combinations", 3, "weights", value=[1.0]), "one weight per column"),
        (put("combinations", 0, "bias", value=[0.0, 0.0]), "one bias per label"),
        (put("combinations", 0, "temperature", value=0.0), "temperature"),
        (put("combinations", value=[]), "no combination of its own"),
        (put("confidence", 0, "edges", value=[0.0, 1.0]), "one row between each two edges"),
        (put("confidence", 0, "n", value=[100]), "one row between each two edges"),
        (put("confidence", 0, "accuracy", "1+2", value=[0.8, 0.9, 0.9]), "one row between each two edges"),
        (put("confidence", 0, "edges", value=[1.0, 0.5, 0.0]), "ascending edges"),
        (put("confidence", 0, "edges", value=[0.0, 0.0, 1.0]), "ascending edges"),
        (put("confidence", 0, "n", value=[60, -1]), "confidence.0.n"),
        (put("confidence", 0, "accuracy", "1", value=[0.7, 95.0]), "confidence.0.accuracy"),
        (put("confidence", 0, "columns", value=[]), "confidence.0.columns"),
    ],
)
def test_a_wrong_manifest_is_refused_by_the_place(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    with pytest.raises(ArtifactError, match=says):
        load_cpu(rewrite(toy_artifact.write(tmp_path), change))


def test_confidence_tables_reach_the_ladder(artifact: Path) -> None:
    ladder = load_cpu(artifact).manifest.ladder()
    unsure, sure = ladder.row(("1",), 0.3), ladder.row(("1",), 0.6)
    assert (unsure, sure) == (0, 1)
    gains = [
        {way.added: way.gain for way in ladder.improvements(("1",), row)}["2",] for row in (unsure, sure)
    ]
    # Sixty pictures gained 0.10 and forty 0.02, each with twenty more that gained the average, 0.07.
    assert gains == pytest.approx([(60 * 0.10 + 20 * 0.07) / 80, (40 * 0.02 + 20 * 0.07) / 60])


def test_a_manifest_without_confidence_tables_will_do(tmp_path: Path) -> None:
    folder = rewrite(toy_artifact.write(tmp_path), lambda described: described.pop("confidence"))
    assert load_cpu(folder).manifest.ladder().row(("1",), 0.9) == 0


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a usable manifest"):
        load_cpu(tmp_path)


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    toy_artifact.write(tmp_path)
    path = tmp_path / "column-2.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"column-2\.onnx is not the file its manifest describes"):
        load_cpu(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    toy_artifact.write(tmp_path)
    (tmp_path / "column-2.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"column-2\.onnx of column 2 cannot be read"):
        load_cpu(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"no graph", "no graph that onnxruntime can load", id="no graph"),
        pytest.param(toy_artifact.graph("1", output="scores"), "the one output logits_NK", id="other output"),
        pytest.param(toy_artifact.graph("1", height=9), "the one input images_NHWC", id="other shape"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    tmp_path: Path, content: bytes, says: str
) -> None:
    toy_artifact.write(tmp_path)
    (tmp_path / "column-1.onnx").write_bytes(content)
    rewrite(tmp_path, put("rungs", 0, "sha256", value=hashlib.sha256(content).hexdigest()))
    with pytest.raises(ArtifactError, match=says):
        load_cpu(tmp_path)


def test_fields_of_a_newer_writer_are_ignored(tmp_path: Path) -> None:
    rewrite(toy_artifact.write(tmp_path), put("colour", value="blue"))
    assert load_cpu(tmp_path).manifest.name == "toy"
