"""Where model and service meet: what the one exports, the other serves, and both see the same picture."""

import asyncio
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import data
from model.calibrate import calibrate, recalibrated
from model.evaluate import Artifact
from model.export import channels_last, export
from service import inference
from service.decoding import Decoder
from tests.model.small import a_checkpoint, a_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = a_dataset()
    out = tmp_path_factory.mktemp("contract") / "artifact"
    manifest = export(a_checkpoint(dataset), dataset, out, name="small", version="1", with_joined=True)
    # An untrained net has no combination worth serving; what counts here is that both sides read one alike.
    ensemble = {"columns": ["1", "2", "full"], "weights": [0.2, 0.5, 0.3], "bias": [0.3, 0.0, -0.1, -0.2]}
    measured = {"temperature": 1.4, "accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    manifest["combinations"].append(ensemble | measured)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_an_exported_net_is_served_with_the_same_probabilities(folder: Path) -> None:
    dataset = a_dataset()
    net = recalibrated(a_checkpoint(dataset).network(), dataset)
    with torch.no_grad():
        of = {name: n(dataset.normalise(dataset.test.images_NCHW)) for name, n in net.networks().items()}
    served = inference.load(folder, provider="cpu", intra_op_threads=1, batch_sizes=(1,))
    images_NHWC = channels_last(dataset.test.images_NCHW).numpy()
    logits = {column: served.run(column, images_NHWC) for column in of}

    for combination in Artifact(folder).combinations:
        expected_NK = combination.log_probabilities(of).exp().numpy()
        for row, expected_K in enumerate(expected_NK):
            got_K = served.combine(combination.columns, [logits[c][row] for c in combination.columns])
            np.testing.assert_allclose(got_K, expected_K, atol=1e-4)


def test_half_precision_is_served_as_it_was_measured(tmp_path: Path) -> None:
    """Its accuracy in the manifest is that of its own graphs."""
    dataset = a_dataset()
    out = tmp_path / "artifact"
    manifest = export(a_checkpoint(dataset), dataset, out, name="n", version="1", precision="fp16")
    served = inference.load(out, provider="cpu", intra_op_threads=1, batch_sizes=(1,))
    assert served.manifest.source["exported_with"]["precision"] == "fp16"
    held_out_NHWC = channels_last(dataset.held_out.images_NCHW).numpy()
    logits = {column: served.run(column, held_out_NHWC) for column in served.depth}
    assert {each.dtype for each in logits.values()} == {np.dtype(np.float32)}
    measured = calibrate(
        {column: torch.from_numpy(each.copy()) for column, each in logits.items()}, dataset.held_out.labels_N
    ).measured
    for combination in manifest["combinations"]:
        again = measured["+".join(combination["columns"])]
        assert combination["accuracy"] == pytest.approx(again.accuracy, abs=1e-3)
        assert combination["nll"] == pytest.approx(again.nll, abs=1e-3)


def test_the_ladder_of_the_server_is_that_of_the_manifest(folder: Path) -> None:
    manifest = Artifact(folder).manifest
    ladder = inference.read_manifest(folder)[0].ladder()

    assert list(ladder.columns) == [rung["column"] for rung in manifest["rungs"]]
    for combination in manifest["combinations"]:
        assert ladder.accuracy(tuple(combination["columns"])) == combination["accuracy"]
    assert manifest["confidence"]
    for table in manifest["confidence"]:
        last = len(table["n"]) - 1
        assert ladder.row(tuple(table["columns"]), table["edges"][-2]) == last
        assert ladder.row(tuple(table["columns"]), table["edges"][-1]) == last
        assert ladder.row(tuple(table["columns"]), 0.0) == 0


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (33, 32), (90, 61), (20, 7), (31, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "I;16"])
def test_training_and_serving_see_the_same_picture(size: tuple[int, int], mode: str) -> None:
    random = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(random.integers(0, 65536, size[::-1], dtype=np.uint16))
    else:
        pixels = random.integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
        picture = Image.fromarray(pixels, "RGBA").convert("RGB" if mode == "P" else "RGBA").convert(mode)
    png = io.BytesIO()
    picture.save(png, "PNG")

    with ThreadPoolExecutor(1) as threads:
        decoder = Decoder(
            height=32, width=32, max_pixels=10**6, max_decoded_pixels=10**6, max_values=1000, threads=threads
        )
        served = asyncio.run(decoder.decode("image/png", png.getvalue()))
    trained_on = data.area_crop(Image.open(png), 32)

    np.testing.assert_array_equal(served, trained_on)
