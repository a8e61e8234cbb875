"""The artifact: parity, completeness, and nothing half-written."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from model import export as exporting
from model.calibrate import recalibrated
from model.export import ExportError, Serving, export
from model.fractalnet import Architecture, Stem
from model.train import TrainingError
from tests.model.small import LABELS, a_checkpoint, a_dataset, a_network

DATASET = a_dataset()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "artifact"
    export(
        a_checkpoint(DATASET), DATASET, out, name="small-net", version="7", with_joined=True, note="a test"
    )
    return out


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((artifact / "manifest.json").read_text())
    return content


def test_a_joined_net_that_was_never_trained_is_not_exported(tmp_path: Path) -> None:
    kept = a_checkpoint(DATASET)
    columns_only = dataclasses.replace(kept.recipe, passes="columns", local_share=0.0)
    kept = dataclasses.replace(kept, recipe=columns_only)

    with pytest.raises(ExportError, match="without --with-joined"):
        export(kept, DATASET, tmp_path / "artifact", name="small-net", version="7", with_joined=True)
    assert not (tmp_path / "artifact").exists()


def test_fields_of_the_manifest(manifest: dict[str, Any]) -> None:
    assert list(manifest) == [
        "format",
        "name",
        "version",
        "created",
        "source",
        "labels",
        "input",
        "rungs",
        "combinations",
        "confidence",
        "held_out",
        "test",
    ]
    assert (manifest["format"], manifest["name"], manifest["version"]) == (1, "small-net", "7")
    assert manifest["labels"] == list(LABELS)
    assert manifest["input"] == {
        "height": 8,
        "width": 8,
        "channels": 3,
        "dtype": "uint8",
        "layout": "NHWC",
        "resize": "area-crop",
    }
    rung = ["column", "file", "sha256", "depth", "parameters", "macs", "accuracy"]
    assert [list(each) for each in manifest["rungs"]] == [rung] * 3
    combination = ["columns", "weights", "bias", "temperature", "accuracy", "nll", "ece"]
    assert all(list(each) == combination for each in manifest["combinations"])
    assert all(list(each) == ["columns", "edges", "n", "accuracy"] for each in manifest["confidence"])
    assert set(manifest["source"]) >= {"dataset", "recipe", "seed", "epochs", "commit", "packages", "note"}


def test_the_split_is_told_by_its_own_seed(manifest: dict[str, Any]) -> None:
    assert (manifest["held_out"]["seed"], manifest["source"]["seed"]) == (3, 0)


def test_rungs_are_shallow_first_and_name_their_files(artifact: Path, manifest: dict[str, Any]) -> None:
    rungs = manifest["rungs"]
    assert [rung["column"] for rung in rungs] == ["1", "2", "full"]
    assert [rung["file"] for rung in rungs] == ["column-1.onnx", "column-2.onnx", "full.onnx"]
    assert [rung["depth"] for rung in rungs] == [2, 4, 4]
    assert [rung["macs"] for rung in rungs] == sorted(rung["macs"] for rung in rungs)
    for rung in rungs:
        assert hashlib.sha256((artifact / rung["file"]).read_bytes()).hexdigest() == rung["sha256"]
    assert {path.name for path in artifact.iterdir()} == {
        "manifest.json",
        "README.md",
        *(rung["file"] for rung in rungs),
    }


@pytest.mark.parametrize("file", ["column-1.onnx", "full.onnx"])
def test_graphs_take_bytes_and_any_batch(artifact: Path, file: str) -> None:
    graph = onnx.load(artifact / file).graph
    (images,), (logits,) = graph.input, graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (images, logits)]

    assert (images.name, logits.name) == ("images_NHWC", "logits_NK")
    assert shapes == [["N", 8, 8, 3], ["N", 4]]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    assert not {"Shape", "Range", "Gather", "If", "Loop"} & set(kinds)


def test_the_model_card_says_what_was_measured(artifact: Path, manifest: dict[str, Any]) -> None:
    card = (artifact / "README.md").read_text()

    assert card.startswith("# small-net, version 7\n")
    for name, accuracy in manifest["test"]["accuracy"].items():
        assert f"| {name} | {100 * accuracy:.2f} |" in card
    assert "| note | a test |" in card
    assert "## Limits" in card


@pytest.mark.parametrize("column", ["1", "2", "full"])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_law_7_exported_columns_equal_those_in_pytorch(artifact: Path, column: str, n: int) -> None:
    kept = a_checkpoint(DATASET)
    net = recalibrated(kept.network(), DATASET)
    network = net if column == "full" else net.column(int(column))
    images = exporting.channels_last(DATASET.held_out.images_NCHW[:n])

    got = exporting.open_onnx(artifact / ("full.onnx" if column == "full" else f"column-{column}.onnx"))(
        images
    )
    with torch.no_grad():
        expected = network.eval()(DATASET.normalise(images.permute(0, 3, 1, 2)))

    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_graph_that_differs_is_refused(tmp_path: Path) -> None:
    net = a_network(seed=0)
    path = tmp_path / "column-1.onnx"
    serving = Serving(exporting.fused(net.column(1)), DATASET.mean_C, DATASET.std_C, "fp32")
    exporting.write_onnx(serving, 8, 3, path)
    images = exporting.channels_last(DATASET.held_out.images_NCHW[:64])
    exporting.check_parity(serving, path, images, 1e-4)

    with torch.no_grad():
        linear = serving.network[-1]  # type: ignore[index]
        assert isinstance(linear, nn.Linear)
        linear.bias.add_(1e-3)

    with pytest.raises(ExportError, match="differs from PyTorch"):
        exporting.check_parity(serving, path, images, 1e-4)


def test_folding_leaves_the_network_as_it_was() -> None:
    column = a_network(seed=0).column(2)
    before = {name: value.clone() for name, value in column.state_dict().items()}
    x = torch.randn(3, 3, 8, 8)

    folded = exporting.fused(column)

    torch.testing.assert_close(folded(x), column(x), atol=1e-5, rtol=1e-4)
    assert not any(isinstance(layer, nn.BatchNorm2d | nn.Dropout) for layer in folded)
    folded.half()
    for name, value in column.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_remains_of_an_export_that_fails(tmp_path: Path) -> None:
    out = tmp_path / "artifact"

    def write_half() -> None:
        with exporting._WrittenWhole(out) as folder:
            (folder / "column-1.onnx").write_bytes(b"half")
            raise OSError("No space left")

    with pytest.raises(ExportError, match="No space left"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_is_there_stays_if_the_next_export_fails(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    with exporting._WrittenWhole(out) as folder:
        (folder / "manifest.json").write_text("good")

    def write_half() -> None:
        with exporting._WrittenWhole(out) as folder:
            (folder / "manifest.json").write_text("bad")
            raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        write_half()

    assert (out / "manifest.json").read_text() == "good"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.jpg").write_bytes(b"dear")

    with pytest.raises(ExportError, match="no artifact"), exporting._WrittenWhole(out) as folder:
        (folder / "manifest.json").write_text("new")

    assert (out / "photo.jpg").read_bytes() == b"dear"
    assert list(tmp_path.iterdir()) == [out]


def test_exporting_again_replaces_the_artifact_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    for content in ("old", "new"):
        with exporting._WrittenWhole(out) as folder:
            (folder / "manifest.json").write_text(content)
            (folder / f"only-{content}").touch()

    assert {path.name for path in out.iterdir()} == {"manifest.json", "only-new"}


def test_the_old_artifact_comes_back_if_the_second_rename_fails(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    with exporting._WrittenWhole(out) as folder:
        (folder / "manifest.json").write_text("good")

    with pytest.raises(ExportError, match="cannot be replaced"), exporting._WrittenWhole(out) as folder:
        folder.rmdir()

    assert (out / "manifest.json").read_text() == "good"
    assert list(tmp_path.iterdir()) == [out]


def test_other_pictures_than_those_it_was_trained_on_are_refused() -> None:
    kept = a_checkpoint(DATASET)
    kept.check(DATASET)

    with pytest.raises(TrainingError, match="not the data"):
        kept.check(dataclasses.replace(DATASET, mean_C=DATASET.mean_C + 1e-3))
    with pytest.raises(TrainingError, match="not the data"):
        kept.check(dataclasses.replace(DATASET, labels=LABELS[::-1]))


def test_half_precision_keeps_its_promises(tmp_path: Path) -> None:
    out = tmp_path / "artifact"

    manifest = export(a_checkpoint(DATASET), DATASET, out, name="n", version="1", precision="fp16")

    graph = onnx.load(out / "column-2.onnx").graph
    assert {t.data_type for t in graph.initializer if len(t.dims) == 4} == {onnx.TensorProto.FLOAT16}
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert manifest["source"]["exported_with"]["precision"] == "fp16"
    graph_says = exporting.logits_of_onnx(out / "column-2.onnx", DATASET.test)
    assert torch.isfinite(graph_says).all()


def test_stems_and_dropout_export(tmp_path: Path) -> None:
    stem = Stem("conv", 4, kernel=7, stride=2, pool=2)
    architecture = Architecture((4,), 2, n_classes=4, size=8, dropout=(0.3,), stem=stem)

    manifest = export(
        a_checkpoint(DATASET, architecture), DATASET, tmp_path / "artifact", name="n", version="1"
    )

    assert [rung["depth"] for rung in manifest["rungs"]] == [2, 3]


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.pt"

    code = exporting.main(["--checkpoint", str(missing), "--out", str(tmp_path / "a"), "--name", "n"])

    assert code == 1
    assert f"there is no checkpoint {missing}" in capsys.readouterr().err


def test_the_command_exports_a_folder_of_pictures(finished_run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"

    code = exporting.main(
        [
            *("--checkpoint", str(finished_run / "checkpoint.pt"), "--data", str(pictures)),
            *("--out", str(out), "--name", "mine"),
        ]
    )

    assert code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["labels"] == ["blue", "green", "red"]
    assert manifest["input"]["height"] == 32
