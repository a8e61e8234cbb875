"""What an artifact is worth: accuracy, NLL and ECE per column and combination, and the anytime curve.

    python -m model.evaluate --artifact model/pretrained --data data --out docs/ladder

measures the exported graphs themselves, on the test split, with ONNX Runtime on the CPU, latencies on one
thread; writes a table (`OUT.md`) and a picture (`OUT.svg`). Must not know the server, nor anything that could
be tuned.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from model import data
from model.calibrate import Combination, Measured, key, measure
from model.export import channels_last, logits_of_onnx, open_onnx

matplotlib.use("svg")

N_LATENCY_RUNS = 300
N_LATENCY_WARM_UP = 30

# CIFAR-10 accuracy [%] at cumulative cost [MMACs], read off the anytime figure of the RANet repository to
# +-0.5: # Yang et al., "Resolution Adaptive Networks for Efficient Inference", CVPR 2020,
# https://github.com/yangle15/RANet-pytorch.
PUBLISHED = {
    "cifar10": {
        "MSDNet": ((15.0, 89.5), (25.0, 90.8), (38.0, 91.5), (62.0, 93.0), (122.0, 93.7)),
        "RANet": ((16.0, 91.3), (45.0, 93.1), (95.0, 93.7)),
    }
}


@dataclass(frozen=True)
class Point:
    """A combination of columns on the curve.

    Attributes:
        columns: What has run.
        macs: All of it together.
        latency_s: Medians of the columns added up, one image on one CPU thread [s].
        measured: On the test split.
    """

    columns: tuple[str, ...]
    macs: int
    latency_s: float
    measured: Measured


class Artifact:
    """An exported folder, opened to be measured."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest.

        Raises:
            ValueError: if there is none.
        """
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is no artifact ({error}): export one first") from error
        self.rungs = {rung["column"]: rung for rung in self.manifest["rungs"]}
        self.combinations = [
            Combination(tuple(c["columns"]), tuple(c["weights"]), c["temperature"], tuple(c["bias"]))
            for c in self.manifest["combinations"]
        ]

    def path(self, column: str) -> Path:
        """The graph of a column."""
        return self.folder / str(self.rungs[column]["file"])


def latency(run: Callable[[Tensor], Tensor], image_NHWC: Tensor) -> list[float]:
    """Seconds of each of `N_LATENCY_RUNS` runs, after warming up."""
    for _ in range(N_LATENCY_WARM_UP):
        run(image_NHWC)
    taken = []
    for _ in range(N_LATENCY_RUNS):
        start_s = time.perf_counter()
        run(image_NHWC)
        taken.append(time.perf_counter() - start_s)
    return taken


def evaluate(artifact: Artifact, test: data.Split) -> tuple[list[Point], dict[str, list[float]]]:
    """Measure every combination of an artifact on a split.

    Returns:
        The points, cheapest first, and each column's latencies [s].
    """
    of = {column: logits_of_onnx(artifact.path(column), test) for column in artifact.rungs}
    image_NHWC = channels_last(test.images_NCHW[:1])
    taken = {column: latency(open_onnx(artifact.path(column)), image_NHWC) for column in artifact.rungs}
    points = [
        Point(
            c.columns,
            sum(artifact.rungs[column]["macs"] for column in c.columns),
            sum(median(taken[column]) for column in c.columns),
            measure(c.log_probabilities(of), test.labels_N),
        )
        for c in artifact.combinations
    ]
    return sorted(points, key=lambda point: point.macs), taken


def ladder(points: Sequence[Point]) -> list[Point]:
    """The points that refinement passes when no budget cuts it short: 1, 1+2, 1+2+3 and so on.

    Args:
        points: Cheapest first.
    """
    path: list[Point] = []
    for point in sorted(points, key=lambda point: len(point.columns)):
        if not path or set(point.columns) > set(path[-1].columns):
            path.append(point)
    return path


def table(artifact: Artifact, points: Sequence[Point], taken: dict[str, list[float]], n: int) -> str:
    """The measurements in Markdown."""
    lines = [
        "| columns run | MMACs | latency, ms | accuracy, % | NLL | ECE |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {key(p.columns)} | {p.macs / 1e6:.1f} | {1e3 * p.latency_s:.2f} "
        f"| {100 * p.measured.accuracy:.2f} | {p.measured.nll:.3f} | {p.measured.ece:.3f} |"
        for p in points
    ]
    lines += ["", "| column | depth | parameters, M | p50, ms | p99, ms |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {column} | {rung['depth']} | {rung['parameters'] / 1e6:.2f} "
        f"| {1e3 * median(taken[column]):.2f} | {1e3 * quantiles(taken[column], n=100)[98]:.2f} |"
        for column, rung in artifact.rungs.items()
    ]
    about = (
        f"{n} test images of {artifact.manifest['source']['dataset']}; "
        f"latency of one image on one CPU thread, median of {N_LATENCY_RUNS} runs per column, "
        f"added up over the columns run. One training run."
    )
    return "\n".join([about, "", *lines, ""])


def picture(artifact: Artifact, points: Sequence[Point], path: Path) -> None:
    """Draw the anytime curve: accuracy of the best answer so far against what has been spent."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_macs, by_latency = figure.subplots(1, 2, sharey=True)
    refined = {p.columns for p in ladder(points)}
    percent = {p.columns: 100 * p.measured.accuracy for p in points}
    for axes, spent, unit in (
        (by_macs, {p.columns: p.macs / 1e6 for p in points}, "cumulative MMACs per image"),
        (
            by_latency,
            {p.columns: 1e3 * p.latency_s for p in points},
            "cumulative latency, ms (one CPU thread)",
        ),
    ):
        xs, ys = ([of[columns] for columns in of if columns in refined] for of in (spent, percent))
        axes.step([*xs, 1.15 * xs[-1]], [*ys, ys[-1]], where="post", color="C0", label="refinement, 1 → C")
        axes.plot(list(spent.values()), list(percent.values()), "o", color="C0", ms=5)
        for columns, place in zip(spent, zip(spent.values(), percent.values(), strict=True), strict=True):
            axes.annotate(key(columns), place, textcoords="offset points", xytext=(5, -11), fontsize=8)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    published = PUBLISHED.get(artifact.manifest["source"]["dataset"], {})
    for (name, anchors), style in zip(published.items(), ("s--", "^--"), strict=False):
        by_macs.plot(
            *zip(*anchors, strict=True), style, color="0.45", ms=4, lw=1, label=f"{name} (published figure)"
        )
    by_macs.set_ylabel("test accuracy, %")
    by_macs.legend(loc="lower right", fontsize=8)
    figure.suptitle(artifact.manifest["name"], fontsize=10)
    with matplotlib.rc_context({"svg.hashsalt": "anytime"}):  # the same numbers give the same bytes
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line says; the exit code is 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m model.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, default=Path("artifact"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--out", type=Path, help="path without suffix for the table (.md) and the picture (.svg)"
    )
    options = parser.parse_args(argv)
    try:
        artifact = Artifact(options.artifact)
        source, size = artifact.manifest["source"], artifact.manifest["input"]["height"]
        split_seed = artifact.manifest["held_out"]["seed"]  # of a folder of pictures it decides the test, too
        dataset = data.load(source["dataset"], options.data, size=size, seed=split_seed)
    except (ValueError, data.DataError) as error:
        print(f"model.evaluate: {error}", file=sys.stderr)
        return 1
    if list(dataset.labels) != artifact.manifest["labels"]:
        print(f"model.evaluate: {options.data} has other labels than the artifact", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    points, taken = evaluate(artifact, dataset.test)
    text = table(artifact, points, taken, len(dataset.test))
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text(text)
        picture(artifact, points, options.out.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
