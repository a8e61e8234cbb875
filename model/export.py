"""Checkpoint in, artifact out: one ONNX graph per column and a manifest, or nothing.

    python -m model.export --checkpoint runs/latest/checkpoint.pt --data data --out artifact

BatchNorm is recalibrated and folded into the convolutions, the normalisation of the pixels is part of each
graph, and every graph is compared with PyTorch before the folder appears under its name. Must not know the
server.
"""

import argparse
import copy
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model import data
from model.calibrate import CONFIDENCE_EDGES, Calibration, calibrate, key, measure, recalibrate
from model.fractalnet import ConvUnit, FractalNet, cost
from model.train import Checkpoint, TrainingError, about_this_machine

FORMAT = 1
PARITY_BATCHES = (1, 2, 7, 64)
PARITY_TOLERANCE = {
    "fp32": 1e-4,
    "fp16": 1e-1,
}  # of a logit; fp16 keeps 11 bits, and its accuracy is measured

Precision = Literal["fp32", "fp16"]


class ExportError(Exception):
    """No artifact was written; the message says why."""


class Serving(nn.Module):
    """A network as it is exported: normalises what it is given, and answers in single precision."""

    def __init__(self, network: nn.Module, mean_C: Tensor, std_C: Tensor, precision: Precision) -> None:
        super().__init__()
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.network = network.to(self.dtype)
        self.scale = nn.Buffer((1 / (255 * std_C)).view(-1, 1, 1))
        self.shift = nn.Buffer((mean_C / std_C).view(-1, 1, 1))

    def forward(self, images_NHWC: Tensor) -> Tensor:
        """uint8 [N, H, W, C] -> float32 [N, K]."""
        normalised = images_NHWC.permute(0, 3, 1, 2).float() * self.scale - self.shift
        logits_NK: Tensor = self.network(normalised.to(self.dtype)).float()
        return logits_NK


class _GlobalMean(nn.Module):
    """[N, C, H, W] -> [N, C]: the head's pooling as a single operator of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def fused(column: nn.Sequential) -> nn.Sequential:
    """A copy of a column in evaluation mode, each BatchNorm folded into its convolution, and dropout gone."""
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(column):
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers.pop()
            layers.append(fuse_conv_bn_eval(cast(nn.Conv2d, convolution), layer))
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            layers.append(_GlobalMean())
        elif not isinstance(layer, nn.Dropout | nn.Flatten):
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def fused_joined(net: FractalNet) -> FractalNet:
    """A copy of the joined net in evaluation mode with each BatchNorm folded into its convolution."""
    net = copy.deepcopy(net).eval()
    for unit in (module for module in net.modules() if isinstance(module, ConvUnit)):
        unit.conv = fuse_conv_bn_eval(unit.conv, unit.norm_joined)
        unit.norm_joined = cast(nn.BatchNorm2d, nn.Identity())
    return net


def write_onnx(serving: Serving, size: int, channels: int, path: Path) -> None:
    """Export with a free batch dimension; names as the artifact promises them."""
    example = torch.zeros(2, size, size, channels, dtype=torch.uint8)
    with warnings.catch_warnings():
        # The exporter deprecates its own internals; its result is checked below, by running it.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            serving.eval(),
            (example,),
            dynamo=True,
            input_names=["images_NHWC"],
            output_names=["logits_NK"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    cast(torch.onnx.ONNXProgram, program).save(str(path), external_data=False)


def open_onnx(path: Path, n_threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A graph of an artifact as a function of images_NHWC, on so many CPU threads; 0: one a core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images_NHWC: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits_NK"], {"images_NHWC": images_NHWC.numpy()})[0])

    return run


@torch.no_grad()
def check_parity(reference: nn.Module, path: Path, images_NHWC: Tensor, tolerance: float) -> None:
    """Compare a graph with PyTorch at every batch size of `PARITY_BATCHES`.

    Raises:
        ExportError: if a logit differs by more than the tolerance.
    """
    run = open_onnx(path)
    for n in PARITY_BATCHES:
        difference = float((run(images_NHWC[:n]) - reference(images_NHWC[:n])).abs().max())
        if not difference <= tolerance:
            raise ExportError(
                f"{path.name} differs from PyTorch by {difference:.1e} at batch {n} (> {tolerance:.0e})"
            )


def channels_last(images_NCHW: Tensor) -> Tensor:
    """Channels last, as the artifact takes them."""
    return images_NCHW.permute(0, 2, 3, 1).contiguous()


def logits_of_onnx(path: Path, split: data.Split) -> Tensor:
    """Logits_NK of an exported graph on a split, on all cores."""
    run = open_onnx(path, n_threads=0)
    return torch.cat([run(channels_last(images)) for images in split.images_NCHW.split(64)])


def export(
    kept: Checkpoint,
    dataset: data.Dataset,
    out: Path,
    *,
    name: str,
    version: str,
    precision: Precision = "fp32",
    with_joined: bool = False,
    note: str = "",
) -> dict[str, Any]:
    """Write the artifact of a checkpoint.

    Args:
        kept: The trained network.
        dataset: What it was trained on: recalibration uses its training images, calibration its held-out
            ones; its test images are measured once, for people to read.
        out: The folder to write; one that is there is replaced as a whole.
        name: Of the model.
        version: Of the model.
        precision: Of weights and activations.
        with_joined: Whether the joined net becomes the last rung, "full".
        note: Anything a reader of the manifest should know.

    Returns:
        The manifest.

    Raises:
        ExportError: if a graph differs from PyTorch or the folder cannot be written; `out` is then as it was.
    """
    if with_joined and not kept.recipe.trains_joined:
        raise ExportError("no batch of this recipe trained the joined net: export without --with-joined")
    net = kept.network()
    networks = {n: network for n, network in net.networks().items() if n != "full" or with_joined}
    for network in networks.values():
        recalibrate(network, dataset)
    architecture = net.architecture
    example_NHWC = channels_last(dataset.held_out.images_NCHW[: max(PARITY_BATCHES)])
    if len(example_NHWC) < max(PARITY_BATCHES):
        example_NHWC = example_NHWC.repeat(-(-max(PARITY_BATCHES) // len(example_NHWC)), 1, 1, 1)
    rungs: list[dict[str, Any]] = []
    with _WrittenWhole(out) as folder:
        for column, network in networks.items():
            path = folder / (f"column-{column}.onnx" if column != "full" else "full.onnx")
            reference = Serving(network, kept.mean_C, kept.std_C, "fp32").eval()
            plain = fused(network) if isinstance(network, nn.Sequential) else fused_joined(net)
            write_onnx(
                Serving(plain, kept.mean_C, kept.std_C, precision),
                architecture.size,
                architecture.channels,
                path,
            )
            check_parity(reference, path, example_NHWC, PARITY_TOLERANCE[precision])
            depth = architecture.depth(architecture.n_columns if column == "full" else int(column))
            spent = cost(network, architecture)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            rungs.append(
                {"column": column, "file": path.name, "sha256": sha256, "depth": depth}
                | {"parameters": spent.parameters, "macs": spent.macs}
            )
        files = {rung["column"]: folder / rung["file"] for rung in rungs}
        held_out = {column: logits_of_onnx(path, dataset.held_out) for column, path in files.items()}
        calibration = calibrate(held_out, dataset.held_out.labels_N)
        for rung in rungs:
            rung["accuracy"] = _rounded(calibration.measured[rung["column"]].accuracy)
        test = {column: logits_of_onnx(path, dataset.test) for column, path in files.items()}
        manifest = {
            "format": FORMAT,
            "name": name,
            "version": version,
            "created": datetime.datetime.now(datetime.UTC)
            .isoformat(timespec="seconds")
            .replace("+00:00", "Z"),
            "source": _source(kept, precision, note),
            "labels": list(kept.labels),
            "input": {
                "height": architecture.size,
                "width": architecture.size,
                "channels": architecture.channels,
                "dtype": "uint8",
                "layout": "NHWC",
                "resize": data.RESIZE,
            },
            "rungs": rungs,
            **_calibration(calibration),
            "held_out": {
                "n": calibration.n_held_out,
                "from": "train",
                "seed": kept.split_seed,
                "note": "5-fold cross-fitted",
            },
            "test": _test(calibration, test, dataset.test.labels_N),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        (folder / "README.md").write_text(model_card(manifest))
    return manifest


def model_card(manifest: Mapping[str, Any]) -> str:
    """What a user of the artifact should know of it, in Markdown, from its manifest alone."""
    source, test, size = manifest["source"], manifest["test"], manifest["input"]["height"]
    labels = ", ".join(manifest["labels"][:20]) + (" and so on" if len(manifest["labels"]) > 20 else "")
    facts = {
        "data": f"{source['dataset']}; {manifest['held_out']['n']} training images held out for calibration",
        "recipe": ", ".join(f"{name} {value}" for name, value in source["recipe"].items()),
        "training": f"{source['epochs']} epochs in {source['training_hours']} hours, seed {source['seed']}",
        **({"teacher": source["teacher"]} if "teacher" in source else {}),
        "hardware": source["hardware"],
        "made with": ", ".join(f"{name} {version}" for name, version in source["packages"].items()),
        "code": f"commit {source['commit']}",
        "note": source["note"] or "none",
    }
    results = [
        f"| {name} | {100 * test['accuracy'][name]:.2f} | {test['nll'][name]:.3f} "
        f"| {test['ece'][name]:.3f} | {100 * combination['accuracy']:.2f} |"
        for combination in manifest["combinations"]
        if (name := key(combination["columns"]))
    ]
    facts_table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    results_table = "\n".join(results)
    return f"""# {manifest["name"]}, version {manifest["version"]}

Classifies a picture, brought to {size}x{size} pixels, as one of {len(manifest["labels"])} labels: {labels}.

| | |
|---|---|
{facts_table}

Measured once on {test["n"]} test images, which decided nothing. The last column is the accuracy on the
held-out images, on which the server bases its choices.

| columns run | accuracy, % | NLL | ECE | held-out accuracy, % |
|---|---:|---:|---:|---:|
{results_table}

## Limits

It always answers with one of its labels, whatever the picture shows. Its confidence is calibrated only for
pictures like those of its training data. It has not been examined for bias, nor hardened against pictures
made to fool it.
"""


def _rounded(value: float) -> float:
    return round(value, 6)


def _calibration(calibration: Calibration) -> dict[str, Any]:
    combinations = [
        {
            "columns": list(c.columns),
            "weights": [_rounded(w) for w in c.weights],
            "bias": [_rounded(b) for b in c.bias],
            "temperature": _rounded(c.temperature),
        }
        | {name: _rounded(value) for name, value in dataclasses.asdict(calibration.measured[c.key]).items()}
        for c in calibration.combinations
    ]
    confidence = [
        {
            "columns": list(table.columns),
            "edges": list(CONFIDENCE_EDGES),
            "n": list(table.n),
            "accuracy": {name: [_rounded(a) for a in values] for name, values in table.accuracy.items()},
        }
        for table in calibration.confidence
    ]
    return {"combinations": combinations, "confidence": confidence}


def _test(calibration: Calibration, of: Mapping[str, Tensor], labels_N: Tensor) -> dict[str, Any]:
    by_combination = {
        key(c.columns): measure(c.log_probabilities(of), labels_N) for c in calibration.combinations
    }
    return {"n": len(labels_N)} | {
        what: {name: _rounded(getattr(m, what)) for name, m in by_combination.items()}
        for what in ("accuracy", "nll", "ece")
    }


def _source(kept: Checkpoint, precision: Precision, note: str) -> dict[str, Any]:
    here = about_this_machine() | {"precision": precision}
    here["packages"] |= {n: importlib.metadata.version(n) for n in ("onnx", "onnxscript")}
    here["packages"]["onnxruntime"] = onnxruntime.__version__
    return {
        "dataset": kept.dataset,
        "recipe": dataclasses.asdict(kept.recipe),
        "architecture": dataclasses.asdict(kept.architecture),
        "seed": kept.seed,
        "epochs": kept.epoch,
        "training_hours": round(kept.seconds / 3600, 2),
        "note": note,
        "n_train": kept.n_train,
        **kept.made_with,
        "exported_with": here,
    }


class _WrittenWhole:
    """A folder beside `out` that takes its name only if the block ends well."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.part = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
            self.part.chmod(0o755)
        except OSError as error:
            raise ExportError(f"{self.out.parent} cannot be written to ({error})") from error
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            try:
                self._take_its_place()
            except OSError as failure:
                shutil.rmtree(self.part, ignore_errors=True)
                raise ExportError(f"{self.out} cannot be replaced ({failure})") from failure
            return
        shutil.rmtree(self.part, ignore_errors=True)
        if isinstance(error, OSError):
            raise ExportError(f"the artifact cannot be written ({error}); {self.out} is as it was") from error

    def _take_its_place(self) -> None:
        before = self.part.with_name(self.part.name + "-before")
        if self.out.exists():
            if not (self.out / "manifest.json").exists() and any(self.out.iterdir()):
                raise OSError("it is no artifact, and is not empty")
            self.out.rename(before)
        try:
            self.part.rename(self.out)
        except OSError:
            if before.exists():
                before.rename(self.out)
            raise
        shutil.rmtree(before, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Export as the command line says; the exit code is 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m model.export", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/latest/checkpoint.pt"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="the data it was trained on")
    parser.add_argument("--out", type=Path, default=Path("artifact"), help="folder of the artifact")
    parser.add_argument("--name", help="of the model, as clients will see it; else dataset and depth")
    parser.add_argument("--version", default="1")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--with-joined", action="store_true", help="add the joined net as the last rung")
    parser.add_argument("--note", default="", help="put into the manifest, for example the hardware")
    options = parser.parse_args(argv)
    try:
        kept = Checkpoint.load(options.checkpoint)
        dataset = kept.load_data(options.data)
        depth = kept.architecture.depth(kept.architecture.n_columns)
        manifest = export(
            kept,
            dataset,
            options.out,
            name=options.name or f"{kept.dataset}-fractalnet-{depth}",
            version=options.version,
            precision=options.precision,
            with_joined=options.with_joined,
            note=options.note,
        )
    except (ExportError, TrainingError, data.DataError) as error:
        print(f"model.export: {error}", file=sys.stderr)
        return 1
    for name, value in manifest["test"]["accuracy"].items():
        print(f"{name:>8}  {100 * value:.2f} % of {manifest['test']['n']} test images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
