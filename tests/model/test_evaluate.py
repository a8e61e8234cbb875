"""The measurement of an artifact: table, picture, and the curve between."""

from pathlib import Path

import pytest
import torch

from model import evaluate
from model import export as exporting
from model.calibrate import Combination, Measured, measure, recalibrated
from model.data import load
from model.evaluate import Artifact, Point
from model.export import export
from model.recipe import Recipe
from model.train import Run, train
from tests.model.small import a_checkpoint, a_dataset, a_network


def a_point(*columns: str, accuracy: float = 0.5) -> Point:
    return Point(columns, 10 * len(columns), 0.001, Measured(accuracy, 1.0, 0.0))


def test_accuracy_of_the_artifact_is_that_of_the_network(tmp_path: Path) -> None:
    dataset = a_dataset()
    export(a_checkpoint(dataset), dataset, tmp_path / "a", name="n", version="1")
    artifact = Artifact(tmp_path / "a")
    if all(c.columns != ("1", "2") for c in artifact.combinations):
        artifact.combinations.append(Combination(("1", "2"), (0.5, 0.5), 1.0, (0.0,) * 4))

    points, taken = evaluate.evaluate(artifact, dataset.test)

    assert set(taken) == {"1", "2"}
    by_columns = {point.columns: point for point in points}
    said = artifact.manifest["test"]["accuracy"]
    for name, accuracy in said.items():
        assert round(by_columns[tuple(name.split("+"))].measured.accuracy, 6) == accuracy
    with torch.no_grad():
        net = recalibrated(a_network(0), dataset)
        of = {str(k): net.column(k)(dataset.normalise(dataset.test.images_NCHW)) for k in (1, 2)}
    for combination in artifact.combinations:
        expected = measure(combination.log_probabilities(of), dataset.test.labels_N)
        assert abs(by_columns[combination.columns].measured.nll - expected.nll) < 1e-4
    assert by_columns["1",].macs == artifact.rungs["1"]["macs"]
    assert by_columns["1", "2"].macs == artifact.rungs["1"]["macs"] + artifact.rungs["2"]["macs"]


def test_refinement_adds_a_column_at_a_time_and_skips_what_does_not_pay() -> None:
    everything = [("1",), ("2",), ("1", "2"), ("3",), ("1", "3"), ("2", "3"), ("1", "2", "3")]
    path = evaluate.ladder([a_point(*columns) for columns in everything])

    assert [p.columns for p in path] == [("1",), ("1", "2"), ("1", "2", "3")]
    points = [a_point("1"), a_point("2"), a_point("3"), a_point("2", "3"), a_point("1", "3")]
    assert [p.columns for p in evaluate.ladder(points)] == [("1",), ("1", "3")]


def test_table_and_picture_are_written_and_repeatable(tmp_path: Path) -> None:
    dataset = a_dataset()
    export(a_checkpoint(dataset), dataset, tmp_path / "a", name="n", version="1")
    artifact = Artifact(tmp_path / "a")
    points, taken = evaluate.evaluate(artifact, dataset.test)

    text = evaluate.table(artifact, points, taken, len(dataset.test))
    for name in ("one.svg", "two.svg"):
        evaluate.picture(artifact, points, tmp_path / name)

    rows = [line[2:].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1 : 1 + len(points)]] == ["+".join(p.columns) for p in points]
    said = [row[3] for row in rows[1 : 1 + len(points)]]
    assert said == [f"{100 * p.measured.accuracy:.2f}" for p in points]
    assert "40 test images of small" in text
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_folder_without_a_manifest_is_no_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--artifact", str(tmp_path)]) == 1
    assert "is no artifact" in capsys.readouterr().err


def test_the_command_measures_a_folder_of_pictures(
    finished_run: Path, pictures: Path, tmp_path: Path
) -> None:
    artifact, curve = str(tmp_path / "artifact"), tmp_path / "curve"
    of_pictures = ["--data", str(pictures)]
    checkpoint = str(finished_run / "checkpoint.pt")
    exporting.main(["--checkpoint", checkpoint, *of_pictures, "--out", artifact, "--name", "n"])

    code = evaluate.main(["--artifact", artifact, *of_pictures, "--out", str(curve)])

    assert code == 0
    assert curve.with_suffix(".md").read_text().startswith("12 test images of folder")
    assert curve.with_suffix(".svg").read_text().startswith("<?xml")


def test_the_split_is_the_runs_whatever_its_seed(pictures: Path, tmp_path: Path) -> None:
    dataset = load("folder", pictures, seed=5)  # of such a folder that seed chooses the test pictures, too
    recipe = Recipe("cifar-deep-2", 1, 8, 0.01, "triangle")
    run = Run(recipe, dataset, tmp_path / "run", seed=2, bf16=False, device="cpu")
    train(run)
    places = ["--data", str(pictures), "--out"]
    exporting.main(["--checkpoint", str(run.checkpoint), *places, str(tmp_path / "artifact"), "--name", "n"])

    assert evaluate.main(["--artifact", str(tmp_path / "artifact"), *places, str(tmp_path / "curve")]) == 0

    nll = Artifact(tmp_path / "artifact").manifest["test"]["nll"]["1"]
    assert f"| {nll:.3f} |" in (tmp_path / "curve.md").read_text()
