"""What an artifact answers without a server: its ONNX files run here, by code of its own.

`Outcomes` keeps, for every choice of columns, how sure the answer to each image is and whether it is right:
load tests and simulations look there instead of running a network. Must not know HTTP, servers or latencies.
"""

import contextlib
import json
import pickle
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

OFFLINE_BATCH = 50

DIFFICULTY_SHARE = 0.95
"""Correlation of a made-up image's difficulty with how sure any one combination is of it.

Source, as of LUCK_SHARE: a grid of both, n = 20,000, against the outcomes of model/pretrained on its 5,000
held-out images. These two give the confidence tables to 1.1 points on average, columns 1 and 3 both right on
85.1 % (there 84.8 %), and column 1 right but 1+2+3 wrong on 1.6 % (there 1.4 %).
"""

LUCK_SHARE = 0.9
"""Correlation of a made-up image's luck with whether any one combination, however sure, is right."""

ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""All that a pickled array of bytes needs, written by an old numpy or a new one."""


@dataclass(frozen=True)
class Outcomes:
    """What every combination of columns answers for every picture: confidence and whether it is right.

    Attributes:
        confidence: Probability of the class answered, [N], by columns_run, shallow first.
        is_correct: Whether that class is the label, [N], by the same keys.
    """

    confidence: Mapping[tuple[str, ...], NDArray[np.float32]]
    is_correct: Mapping[tuple[str, ...], NDArray[np.bool_]]

    def __len__(self) -> int:
        """How many images."""
        return len(next(iter(self.confidence.values())))

    def save(self, path: Path) -> None:
        """Write one compressed .npz with arrays such as "confidence/1+3" and "is_correct/1+3".

        Raises:
            ValueError: the path does not end in .npz; numpy would write to another one.
        """
        if path.suffix != ".npz":
            raise ValueError(f"{path} does not end in .npz: give it that ending")
        arrays: dict[str, NDArray[Any]] = {}
        for columns_run, confidence_N in self.confidence.items():
            arrays[f"confidence/{'+'.join(columns_run)}"] = confidence_N
            arrays[f"is_correct/{'+'.join(columns_run)}"] = self.is_correct[columns_run]
        np.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            OSError: there is no such file, or it is no .npz.
        """
        parts: dict[str, dict[tuple[str, ...], NDArray[Any]]] = {"confidence": {}, "is_correct": {}}
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                kind, _, columns_run = name.partition("/")
                parts[kind][tuple(columns_run.split("+"))] = arrays[name]
        return cls(**parts)

    @classmethod
    def made_up(cls, manifest: Mapping[str, Any], n: int, seed: int) -> Self:
        """Draw outcomes that look like the manifest's, for a machine without the data set.

        Each image has a difficulty and a luck. Its difficulty, with some noise of each combination's own,
        ranks it among the n; that rank is turned into a confidence by the counts in the combination's
        confidence table, evenly inside a bin. Its luck, again with noise, is compared with the table's
        accuracy in that bin. So each combination's confidences, its accuracy in each bin and its overall
        accuracy are the manifest's; how the combinations hang together is approximated by two constants. A
        combination without a table gets one of a single bin: its confidence then says nothing.

        Args:
            manifest: Of an artifact.
            n: How many images.
            seed: Of all that is drawn.

        Cost: O(n log n) for each combination.
        """
        rng = np.random.default_rng(seed)
        difficulty_N, luck_N = rng.normal(size=(2, n))
        tables = {tuple(table["columns"]): table for table in manifest["confidence"]}
        confidence: dict[tuple[str, ...], NDArray[np.float32]] = {}
        is_correct: dict[tuple[str, ...], NDArray[np.bool_]] = {}
        for rule in manifest["combinations"]:
            columns_run = tuple(rule["columns"])
            single = {"edges": [0.0, 1.0], "n": [1], "accuracy": {"+".join(columns_run): [rule["accuracy"]]}}
            table = tables.get(columns_run, single)
            below = np.concatenate([[0.0], np.cumsum(table["n"])]) / np.sum(table["n"])
            ease_N = _ranks(-difficulty_N, DIFFICULTY_SHARE, rng)
            bin_N = np.searchsorted(below, ease_N, "right") - 1
            accuracy_N = np.array(table["accuracy"]["+".join(columns_run)])[bin_N]
            confidence[columns_run] = np.interp(ease_N, below, table["edges"]).astype(np.float32)
            is_correct[columns_run] = _ranks(luck_N, LUCK_SHARE, rng) < accuracy_N
        answered_by = {columns_run: _rule(manifest, columns_run) for columns_run in _choices(manifest)}
        return cls(
            {columns_run: confidence[tuple(rule["columns"])] for columns_run, rule in answered_by.items()},
            {columns_run: is_correct[tuple(rule["columns"])] for columns_run, rule in answered_by.items()},
        )


def _ranks(shared_N: NDArray[np.float64], share: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Order the images by what they share and noise of their own: evenly spread between 0 and 1."""
    n = len(shared_N)
    order = np.argsort(share * shared_N + (1 - share**2) ** 0.5 * rng.normal(size=n))
    ranks_N = np.empty(n)
    ranks_N[order] = (np.arange(n) + 0.5) / n
    return ranks_N


def _choices(manifest: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every choice of columns that can have run, shallow first."""
    columns = [rung["column"] for rung in manifest["rungs"]]
    for size in range(1, len(columns) + 1):
        yield from combinations(columns, size)


def _rule(manifest: Mapping[str, Any], columns_run: Sequence[str]) -> dict[str, Any]:
    """The manifest's combination that answers for these columns: their own, or the last column's alone."""
    by_columns = {tuple(rule["columns"]): rule for rule in manifest["combinations"]}
    rule: dict[str, Any] = by_columns.get(tuple(columns_run)) or by_columns[tuple(columns_run[-1:])]
    return rule


class Offline:
    """The artifact, run here on the same images.

    Args:
        folder: The artifact.
        images_NHWC: Of the size that the artifact takes.

    Cost: each column runs once, when it is first asked for.
    """

    def __init__(self, folder: Path, images_NHWC: NDArray[np.uint8]) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self._folder = folder
        self._images_NHWC = images_NHWC
        self._logits_NK = cache(self._run)

    def probabilities(self, columns_run: Sequence[str]) -> NDArray[np.float64]:
        """Of every image and class, [N, K], by these columns as the manifest says.

        Source: geometric ensemble, softmax(sum_j w_j log_softmax(z_j) / T + b). Without a rule for these
        columns the last decides.
        """
        rule = _rule(self.manifest, columns_run)
        score_NK: NDArray[np.float64] = np.zeros(len(self.manifest["labels"]))
        for column, weight in zip(rule["columns"], rule["weights"], strict=True):
            score_NK = score_NK + weight * _log_softmax(self._logits_NK(column).astype(np.float64))
        return np.exp(_log_softmax(score_NK / rule["temperature"] + np.array(rule["bias"])))

    def predictions(self, columns_run: Sequence[str]) -> NDArray[np.int64]:
        """Class of every image by these columns, as the manifest says; without a rule the last decides."""
        classes_N: NDArray[np.int64] = np.argmax(self.probabilities(columns_run), axis=1)
        return classes_N

    def outcomes(self, labels: NDArray[np.int64]) -> Outcomes:
        """Judge the answers of every choice of columns.

        Args:
            labels: The images' classes, [N].

        Raises:
            ValueError: as many labels as images are needed.
        """
        if len(labels) != len(self._images_NHWC):
            raise ValueError(f"{len(labels)} labels for {len(self._images_NHWC)} images: give one for each")
        answers = {columns_run: self.probabilities(columns_run) for columns_run in _choices(self.manifest)}
        return Outcomes(
            {columns_run: p_NK.max(axis=1).astype(np.float32) for columns_run, p_NK in answers.items()},
            {columns_run: p_NK.argmax(axis=1) == labels for columns_run, p_NK in answers.items()},
        )

    def _run(self, column: str) -> NDArray[np.float32]:
        file = next(rung["file"] for rung in self.manifest["rungs"] if rung["column"] == column)
        session = onnxruntime.InferenceSession(self._folder / file, providers=["CPUExecutionProvider"])
        batches = range(0, len(self._images_NHWC), OFFLINE_BATCH)
        return np.concatenate(
            [
                session.run(["logits_NK"], {"images_NHWC": self._images_NHWC[i : i + OFFLINE_BATCH]})[0]
                for i in batches
            ]
        )


def _log_softmax(logits_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    log_p_NK: NDArray[np.float64] = shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))
    return log_p_NK


class _ArraysOnly(pickle.Unpickler):
    """Reads the data set's official form, a pickle, without running what a forged file might hold."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f"{module}.{name} has no place in a file of images: download it anew"
            )
        return super().find_class(module, name)


def read_test_images(
    data: Path, n: int, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first n test images_NHWC and their labels from CIFAR-10's official file.

    Raises:
        FileNotFoundError: there is no such file; get it from https://www.cs.toronto.edu/~kriz/cifar.html.
        pickle.UnpicklingError: the file holds something else than arrays; download it anew.
    """
    with (data / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        batch = _ArraysOnly(file, encoding="latin1").load()
    images_NHWC = np.asarray(batch["data"][:n], np.uint8).reshape(-1, 3, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images_NHWC), np.asarray(batch["labels"][:n], np.int64)


def commit(folder: Path = Path(__file__).parent) -> str:
    """Which commit the folder is at, and `-dirty` if it is not just that; "unknown" where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # there is no git, or it hangs
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603 - fixed
        return done.stdout.strip() or "unknown"
    return "unknown"


def processor_name() -> str:
    """The processor of this machine, as it calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
