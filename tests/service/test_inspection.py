"""What is said of an artifact without a server, and that an altered one is refused in a sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from service.__main__ import main
from tests.service import toy_artifact


def test_an_artifact_is_described_whole(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("toy version 7, made 2026-01-02 03:04 UTC\n")
    assert "labels    5: ant, bee, cat, dog, elk\n" in said
    assert "input     8 x 8 x 3 uint8" in said
    rows = [line.split() for line in said.splitlines()]
    n_bytes = (artifact / "column-3.onnx").stat().st_size
    assert ["3", "12", "0.001", "100", "90.00", f"{n_bytes:,}", "column-3.onnx"] in rows
    assert ["1+2+3", "93.00"] in rows


def test_as_json_it_has_the_same_for_programs(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["version"], said["labels"]) == ("toy", "7", list(toy_artifact.LABELS))
    assert [rung["column"] for rung in said["rungs"]] == list(toy_artifact.COLUMNS)
    assert {"+".join(c["columns"]): c["accuracy"] for c in said["combinations"]} == toy_artifact.ACCURACY
    assert said["bytes"] == sum(path.stat().st_size for path in artifact.glob("*.onnx"))


@pytest.mark.parametrize("arguments", [[], ["--run"]])
def test_an_altered_graph_is_refused(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    with (copy / "column-2.onnx").open("ab") as file:
        file.write(b"x")
    assert main(["inspect", str(copy), *arguments]) == 1
    printed, said = capsys.readouterr()
    assert printed == ""
    assert "SHA-256 differs" in said
    assert len(said.splitlines()) == 1


def test_only_a_run_finds_a_graph_that_gives_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = {column: toy_artifact.graph(column) for column in toy_artifact.COLUMNS}
    model = onnx.load_model_from_string(graphs["2"])
    (white,) = (tensor for tensor in model.graph.initializer if tensor.name == "white")
    white.CopyFrom(numpy_helper.from_array(np.array(np.nan, np.float32), "white"))
    graphs["2"] = model.SerializeToString()
    for column, content in graphs.items():
        (tmp_path / f"column-{column}.onnx").write_bytes(content)
    (tmp_path / "manifest.json").write_text(json.dumps(toy_artifact.manifest(graphs)))
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path), "--run"]) == 1
    assert "Column 2 cannot be run" in capsys.readouterr().err


def test_a_profile_has_every_column_and_batch_size(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["profile", str(artifact), "--batch-sizes", "1,2", "--seconds", "0.01", "--provider", "cpu"]
    assert main([*arguments, "--json"]) == 0
    latency_ms = json.loads(capsys.readouterr().out)
    assert list(latency_ms) == list(toy_artifact.COLUMNS)
    assert all(list(by_size) == ["1", "2"] for by_size in latency_ms.values())
    assert all(
        0 < one["median"] <= one["high"] for by_size in latency_ms.values() for one in by_size.values()
    )
    assert main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows if row[0] in toy_artifact.COLUMNS] == [
        [column, size] for column in toy_artifact.COLUMNS for size in ("1", "2")
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["/nowhere"], 1, "No artifact in /nowhere"),
        (["--batch-sizes", "2"], 2, "must start at 1"),
        (["--seconds", "soon"], 2, "ANYTIME_PROFILE_SECONDS"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments]) == status
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
