"""From an artifact folder to verified, warmed-up sessions, and from images to probabilities.

Must not know of requests, deadlines or HTTP. Nothing of an artifact is executed but its ONNX graphs.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from service import providers
from service.ladder import ConfidenceTable, Ladder
from service.providers import (
    GPU_DEFAULTS,
    BoundSession,
    DeviceLost,
    GpuOptions,
    GraphError,
    Provider,
    ProviderError,
)

INPUT_NAME, OUTPUT_NAME = "images_NHWC", "logits_NK"
FATAL = 4
"""onnxruntime's severity above that of an error."""
N_WARM_UP_RUNS = 3
"""The first run of a shape allocates and, on CUDA, chooses algorithms; the second may still grow."""


class ArtifactError(Exception):
    """The artifact, or the provider asked for, cannot be used; one sentence says what to do."""


class ProviderUnavailable(ArtifactError):
    """The artifact cannot be run where it was to be run."""


class InferenceError(Exception):
    """A run gave no usable logits: their shape or their values were wrong."""


class Preempted(Exception):
    """A run was told to end before it had a result."""


class Preemption:
    """Lets another thread end one run before it has a result: on a CPU, between two nodes of its graph.

    Source: onnxruntime's executor looks at `terminate` before each node; once set it stays, so that every run
    needs its own.
    """

    def __init__(self) -> None:
        self.options = onnxruntime.RunOptions()
        self.options.log_severity_level = FATAL  # otherwise each preemption is logged as a failed run

    def demand(self) -> None:
        """Have the run end."""
        self.options.terminate = True

    @property
    def is_demanded(self) -> bool:
        """The run is to end."""
        return bool(self.options.terminate)


def _plain_file_name(name: str) -> str:
    if name in {"", ".", ".."} or any(mark in name for mark in "/\\:\0"):
        raise ValueError("must be the plain name of a file in the artifact's own folder")
    return name


Accuracy = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    """A part of the manifest: no value is converted, none is changed, unknown ones are for newer readers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class InputSpec(_Part):
    """The images that the graphs take."""

    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    channels: Literal[3]
    dtype: Literal["uint8"]
    layout: Literal["NHWC"]
    resize: Literal["area-crop"]


class Rung(_Part):
    """One column's graph with its measured accuracy and cost."""

    column: str = Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")
    file: Annotated[str, AfterValidator(_plain_file_name)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    depth: int = Field(ge=1)
    parameters: int = Field(ge=0)
    macs: int = Field(ge=0)
    accuracy: Accuracy


class Combination(_Part):
    """How the logits of some columns become one answer, and how accurate that is on held-out images."""

    columns: tuple[str, ...] = Field(min_length=1, strict=False)
    weights: tuple[float, ...] = Field(strict=False)
    bias: tuple[float, ...] = Field(strict=False)
    temperature: float = Field(gt=0)
    accuracy: Accuracy


class ConfidenceRows(_Part):
    """Held-out accuracy of combinations, by the confidence of the answer that some of their columns gave."""

    columns: tuple[str, ...] = Field(min_length=1, strict=False)
    edges: tuple[float, ...] = Field(min_length=2, strict=False)
    n: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, strict=False)
    accuracy: dict[str, Annotated[tuple[Accuracy, ...], Field(strict=False)]]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        key = "+".join(self.columns)
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"the confidence table of {key} needs ascending edges")
        if any(len(rows) != len(self.edges) - 1 for rows in (self.n, *self.accuracy.values())):
            raise ValueError(f"the confidence table of {key} needs one row between each two edges")
        return self

    def table(self) -> ConfidenceTable:
        """As the policy wants it."""
        accuracy = {tuple(key.split("+")): rows for key, rows in self.accuracy.items()}
        return ConfidenceTable(self.columns, self.edges, self.n, accuracy)


class Manifest(_Part):
    """manifest.json, as far as serving needs it."""

    format: Literal[1]
    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    created: datetime = Field(strict=False)
    source: dict[str, Any] = {}
    labels: tuple[str, ...] = Field(min_length=2, strict=False)
    input: InputSpec
    rungs: tuple[Rung, ...] = Field(min_length=1, strict=False)
    combinations: tuple[Combination, ...] = Field(strict=False)
    confidence: tuple[ConfidenceRows, ...] = Field((), strict=False)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        columns = [rung.column for rung in self.rungs]
        if len(set(columns)) < len(columns) or len({rung.file for rung in self.rungs}) < len(columns):
            raise ValueError("two rungs share a column or a file")
        for combination in self.combinations:
            places = [columns.index(column) for column in combination.columns if column in columns]
            key = "+".join(combination.columns)
            if len(places) < len(combination.columns) or places != sorted(set(places)):
                raise ValueError(f"combination {key} is no increasing choice of the rungs' columns")
            if len(combination.weights) != len(combination.columns):
                raise ValueError(f"combination {key} needs one weight per column")
            if len(combination.bias) not in {1, len(self.labels)}:
                raise ValueError(f"combination {key} needs one bias per label, or a single one")
        if singles := set(columns) - {c.columns[0] for c in self.combinations if len(c.columns) == 1}:
            raise ValueError(f"column {min(singles)} has no combination of its own")
        return self

    def ladder(self) -> Ladder:
        """What the policy needs to know: columns and the held-out accuracy of each combination."""
        return Ladder(
            [rung.column for rung in self.rungs],
            {c.columns: c.accuracy for c in self.combinations},
            [rows.table() for rows in self.confidence],
        )


class Session(Protocol):
    """The one method of `onnxruntime.InferenceSession` that a run needs."""

    def run(
        self, output_names: list[str], inputs: dict[str, NDArray[np.uint8]], options: Any = None, /
    ) -> Sequence[Any]:
        """Compute the named outputs; options are given on a CPU only."""


class Inference:
    """The columns of one artifact, ready to run.

    On a CPU several threads may do so at once; on a GPU it must be one, which has warmed them up.

    Args:
        manifest: Verified description of the artifact.
        sessions: One session per column of the manifest.
        provider: What the sessions run on.
        sha256: Of manifest.json: names this very artifact, because it holds the hashes of all other files.
        padded_sizes: Batch sizes to pad up to, so that a GPU sees only warmed-up shapes; empty: no padding.
        gpu: What was chosen for a GPU, if they run on one.
    """

    def __init__(
        self,
        manifest: Manifest,
        sessions: Mapping[str, Session],
        *,
        provider: Provider,
        sha256: str,
        padded_sizes: Sequence[int] = (),
        gpu: GpuOptions | None = None,
    ) -> None:
        self.manifest = manifest
        self.provider = provider
        self.sha256 = sha256
        self.gpu = gpu
        self.depth = {rung.column: rung.depth for rung in manifest.rungs}
        self._sessions = sessions
        self._padded_sizes = tuple(padded_sizes)
        self._combinations = {
            c.columns: (
                tuple(np.array(c.weights, dtype=np.float32) / np.float32(c.temperature)),
                np.array(c.bias, dtype=np.float32),
            )
            for c in manifest.combinations
        }

    @property
    def is_preemptible(self) -> bool:
        """Whether a run can be ended early. On a GPU it cannot: what was launched there runs to its end."""
        return self.provider == "cpu"

    def run(
        self, column: str, images_NHWC: NDArray[np.uint8], preemption: Preemption | None = None
    ) -> NDArray[np.float32]:
        """Run one column; returns logits_NK, one row per image in the same order.

        The row of an image for which the column gives no numbers, or infinite ones, is NaN throughout: those
        beside it are as good as ever.

        Raises:
            InferenceError: the logits have another shape than asked for, or no row is finite.
            Preempted: that was demanded, and came before the end.
            DeviceLost: nothing will run any more.
            DeviceInDoubt: perhaps nothing will.
        """
        n = len(images_NHWC)
        padded = next((size for size in self._padded_sizes if size >= n), n)
        if padded > n:
            padding = np.zeros((padded - n, *images_NHWC.shape[1:]), np.uint8)
            images_NHWC = np.concatenate([images_NHWC, padding])
        logits_NK = self._logits(column, images_NHWC, preemption)
        if logits_NK.shape != (padded, len(self.manifest.labels)):
            raise InferenceError(
                f"column {column} gave logits of shape {logits_NK.shape} for {padded} images"
            )
        logits_NK = logits_NK[:n]
        # The sum of squares is finite in a third of the time; where it is not, some may be too large for it.
        if not math.isfinite(np.vdot(logits_NK, logits_NK)) and not np.isfinite(logits_NK).all():
            is_finite_N: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(logits_NK), axis=1)
            if not is_finite_N.any():
                raise InferenceError(f"column {column} gave logits that are not finite")
            logits_NK = np.where(is_finite_N[:, None], logits_NK, np.float32(np.nan))
        return logits_NK

    def _logits(
        self, column: str, images_NHWC: NDArray[np.uint8], preemption: Preemption | None
    ) -> NDArray[np.float32]:
        options = (preemption.options,) if preemption and self.is_preemptible else ()
        try:
            [logits_NK] = self._sessions[column].run([OUTPUT_NAME], {INPUT_NAME: images_NHWC}, *options)
        except Exception as error:  # onnxruntime's own exceptions have no public base class
            if preemption and preemption.is_demanded:
                raise Preempted from error
            raise
        return cast("NDArray[np.float32]", logits_NK)

    def combine(
        self, columns_run: tuple[str, ...], logits_K: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Probabilities of one image from the logits of the columns that ran on it, shallow first.

        Source: geometric ensemble, softmax(sum_j w_j log_softmax(z_j) / T + b), fitted at export; what
        log_softmax takes off all logits of a column alike, the outer softmax takes off anyway. A combination
        that the manifest lacks is answered by its deepest column alone.
        """
        if columns_run not in self._combinations:
            columns_run, logits_K = columns_run[-1:], logits_K[-1:]
        weights, bias = self._combinations[columns_run]
        mixed_K = bias
        for weight, z_K in zip(weights, logits_K, strict=True):  # to stack a few rows takes longer than this
            mixed_K = mixed_K + weight * z_K
        odds_K = np.exp(mixed_K - np.maximum.reduce(mixed_K))
        probabilities_K: NDArray[np.float32] = odds_K / np.add.reduce(odds_K)
        return probabilities_K

    def run_blank(self, column: str, n_images: int = 1) -> NDArray[np.float32]:
        """Run one column on black pictures, for nobody; otherwise as `run`."""
        spec = self.manifest.input
        return self.run(column, np.zeros((n_images, spec.height, spec.width, spec.channels), np.uint8))

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Run every column at every batch size, so that no request pays for a first time.

        To be called in the thread that will serve: CUDA keeps its handles and graphs per thread.

        Raises:
            ArtifactError: a graph cannot be run or gives no usable logits.
            DeviceLost: nothing will run any more.
        """
        for column, size in itertools.product(self._sessions, batch_sizes):
            try:
                with providers.CHANGES:  # the first run on a GPU captures its graph
                    for _ in range(N_WARM_UP_RUNS):
                        self.run_blank(column, size)
            except Exception as error:  # onnxruntime's own exceptions have no public base class
                what = f"Column {column} cannot be run on {size} images ({error})"
                if isinstance(error, DeviceLost):
                    raise DeviceLost(what) from error
                if self.provider != "cpu":
                    raise unavailable(self.provider, what) from error
                raise ArtifactError(f"{what}: export the artifact again.") from error

    def close(self) -> None:
        """Give back what the sessions hold; nothing can be run any more."""
        for session in self._sessions.values():
            if isinstance(session, BoundSession):
                session.close()


def load(
    folder: Path,
    *,
    provider: Provider,
    intra_op_threads: int,
    batch_sizes: Sequence[int],
    gpu: GpuOptions = GPU_DEFAULTS,
) -> Inference:
    """Verify an artifact and open its sessions; `warm_up` then makes them ready.

    Args:
        folder: The artifact: manifest.json and the ONNX files it names.
        provider: Where to run, and nowhere else.
        intra_op_threads: Threads within one run on the CPU.
        batch_sizes: On a GPU every batch is padded to one of them.
        gpu: For a GPU.

    Raises:
        ProviderUnavailable: the provider does not work.
        ArtifactError: a file is missing, altered or not what the manifest says.
        DeviceLost: no run on this GPU will succeed any more.

    Cost: reads and hashes every file and optimises every graph; tenths of a second.
    """
    manifest, sha256, graphs = verify(folder)
    sessions: dict[str, Session] = {}
    graph_ids = itertools.count(1)
    for rung in manifest.rungs:
        ids = dict.fromkeys(batch_sizes, providers.NOT_CAPTURED)
        if provider == "cuda" and gpu.cuda_graphs:
            ids = {size: next(graph_ids) for size in batch_sizes}
        try:
            session = providers.open_graph(
                graphs[rung.column], provider, threads=intra_op_threads, gpu=gpu, batch_sizes=batch_sizes
            )
            _check_graph(session, rung, manifest)
            sessions[rung.column] = session if provider == "cpu" else BoundSession(session, ids)
        except GraphError as error:
            raise ArtifactError(
                f"{rung.file} is no graph that onnxruntime can load ({error}): export it again."
            ) from error
        except ProviderError as error:
            raise unavailable(provider, str(error)) from error
    if provider == "cpu":
        return Inference(manifest, sessions, provider=provider, sha256=sha256)
    return Inference(manifest, sessions, provider=provider, sha256=sha256, padded_sizes=batch_sizes, gpu=gpu)


def unavailable(provider: Provider, why: str) -> ProviderUnavailable:
    """That a provider does not work, with what to do."""
    libraries = "the driver, and the CUDA and cuDNN libraries (the extra `cuda` has them)"
    if provider == "tensorrt":
        libraries += ", and TensorRT's"
    return ProviderUnavailable(
        f"onnxruntime {onnxruntime.__version__} cannot use {providers.NAMES[provider]} ({why}): "
        f"check {libraries}, or set ANYTIME_PROVIDER=cpu."
    )


def verify(folder: Path) -> tuple[Manifest, str, dict[str, bytes]]:
    """Read a whole artifact; returns its manifest, the SHA-256 of that, and each column's graph.

    Raises:
        ArtifactError: a file is missing, altered or not what the manifest says.
    """
    manifest, sha256 = read_manifest(folder)
    return manifest, sha256, {rung.column: _verified_bytes(folder, rung) for rung in manifest.rungs}


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read and check manifest.json; returns it with the SHA-256 of its bytes.

    Raises:
        ArtifactError: it is missing, or some value in it is refused.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"No artifact in {folder} ({error.strerror} for manifest.json): set ANYTIME_ARTIFACT to an "
            f"exported folder."
        ) from error
    try:
        return Manifest.model_validate_json(text), hashlib.sha256(text).hexdigest()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ArtifactError(
            f"{path} is not a usable manifest ({place}: {first['msg']}): export it again."
        ) from error


def _verified_bytes(folder: Path, rung: Rung) -> bytes:
    """The very bytes that were hashed are the ones that run: the file is read once."""
    path = folder / rung.file
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path} of column {rung.column} cannot be read ({error.strerror}): copy the whole artifact "
            f"folder again."
        ) from error
    if hashlib.sha256(graph).hexdigest() != rung.sha256:
        raise ArtifactError(
            f"{path} is not the file its manifest describes (SHA-256 differs): copy or export it again."
        )
    return graph


def _check_graph(session: Any, rung: Rung, manifest: Manifest) -> None:
    spec = manifest.input
    for kind, nodes, name, dtype, shape in (
        (
            "input",
            session.get_inputs(),
            INPUT_NAME,
            "tensor(uint8)",
            [spec.height, spec.width, spec.channels],
        ),
        ("output", session.get_outputs(), OUTPUT_NAME, "tensor(float)", [len(manifest.labels)]),
    ):
        found = [(node.name, node.type, list(node.shape)) for node in nodes]
        is_right = len(found) == 1 and found[0][:2] == (name, dtype) and found[0][2][1:] == shape
        if not is_right or isinstance(found[0][2][0], int):
            raise ArtifactError(
                f"{rung.file} must have the one {kind} {name}, {dtype} [N, {', '.join(map(str, shape))}] "
                f"with N free, "
                f"but has {found}: export it again."
            )
