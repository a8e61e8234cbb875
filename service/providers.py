"""Where a graph runs: onnxruntime's execution providers, and sessions whose memory on a GPU stays in place.

Must not know of artifacts, requests or HTTP. Whoever asks for a GPU gets it or an error: onnxruntime by
itself goes on with the CPU, when a session is opened and when a run fails.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda", "tensorrt"]
ConvAlgorithms = Literal["heuristic", "exhaustive", "default"]

NAMES: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""As onnxruntime calls them."""

NOT_CAPTURED = -1
"""The id of a run that is not captured as a CUDA graph. Source: onnxruntime_run_options_config_keys.h."""

DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia")

ONE_AT_A_TIME = threading.Lock()
"""Held by every run on a GPU, whichever model's. While a CUDA graph is captured, what another thread asks of
the GPU fails and spoils the capture (onnxruntime captures with cudaStreamCaptureModeGlobal), and a model may
be loaded, and so captured, beside serving. Besides, two runs side by side make each other unpredictable."""

CHANGES = threading.RLock()
"""Held while graphs may be captured, and while sessions on a GPU are opened and closed, which ask much of it.
To be taken before the other one; nobody who serves takes it, because opening lasts."""

LOST = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721})
"""cudaError_t after which nothing works any more until the process ends: illegal addresses and instructions,
failed assertions and launches, memory and links that cannot be corrected.
Source: CUDA Runtime API 13, cudaError_t, those that leave "the process in an inconsistent state"."""

CUDA_FAILURE = re.compile(r"\bCUDA (?:failure|error):? ?\(?(\d+)")
"""As onnxruntime words it: `CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; ...`."""

LIBRARY_FAILURE = re.compile(r"\bCU(?:DNN|DNN_FE|BLAS|FFT) failure \d|TensorRT EP execution context enqueue")
"""How onnxruntime words it if CUDA's libraries cannot launch what they want to, as they cannot on a GPU that
an earlier launch has broken: `CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0 ; ...`.
Source: onnxruntime 1.31.1, cuda_call.cc, cudnn_fe_call.cc and the strings of its providers."""


class GraphError(Exception):
    """What was given is no graph that onnxruntime can load."""


class ProviderError(Exception):
    """A graph cannot be run where it was to be run."""


class DeviceLost(Exception):
    """The GPU, or this process's hold of it, is broken: no run will succeed until a new process makes it."""


class DeviceInDoubt(Exception):
    """A run failed by what may be said of a GPU that is lost; another one tells."""


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """What can be chosen for a GPU.

    Attributes:
        cuda_graphs: Replay each column and batch size as one recorded launch. Not with TensorRT: its provider
            keeps one graph for a session, whatever the batch size.
        conv_algorithms: How cuDNN chooses. `exhaustive`, onnxruntime's default, takes 0.3 to 1.3 s for each
            new shape (PaddleX PR #5057).
        use_tf32: Multiply float32 with the precision of 10 bits, on tensor cores.
        prefer_nhwc: Channels last in memory.
        tensorrt_cache: Folder for what TensorRT has built; None: it is built at every start.
    """

    cuda_graphs: bool = True
    conv_algorithms: ConvAlgorithms = "heuristic"
    use_tf32: bool = False
    prefer_nhwc: bool = False
    tensorrt_cache: Path | None = None


GPU_DEFAULTS = GpuOptions()


def candidates(asked: Literal["auto"] | Provider) -> tuple[Provider, ...]:
    """What to try, best first. onnxruntime lists CUDA where it was built in, so `auto` looks for a device."""
    if asked != "auto":
        return (asked,)
    has_device = any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "dxg").exists()
    is_built_in = NAMES["cuda"] in onnxruntime.get_available_providers()
    return ("cuda", "cpu") if has_device and is_built_in else ("cpu",)


def gpus() -> tuple[str, ...]:
    """The names of the GPUs and the version of their driver, as far as the driver says; empty without one."""
    told = [*sorted(DRIVER.glob("gpus/*/information")), DRIVER / "version"]
    found = []
    for path in told:
        with contextlib.suppress(OSError):
            found += re.findall(r"^(?:Model|NVRM version):\s*(.+?)\s*$", path.read_text(), re.MULTILINE)
    return tuple(found)


def open_graph(
    graph: bytes,
    provider: Provider,
    *,
    threads: int = 1,
    gpu: GpuOptions = GPU_DEFAULTS,
    batch_sizes: Sequence[int] = (1,),
) -> Any:
    """An `onnxruntime.InferenceSession` that runs on this provider and never on another.

    Args:
        graph: An ONNX file.
        provider: Where to run.
        threads: Within one run on the CPU.
        gpu: For a GPU.
        batch_sizes: What TensorRT is to build for.

    Raises:
        GraphError: it is no graph that onnxruntime can load.
        ProviderError: the provider cannot be used here.
        DeviceLost: nor anything else on this GPU any more.

    Cost: optimises the graph; tenths of a second. TensorRT builds in the first run of each batch size.
    """
    if provider == "cpu":
        return _open_on_cpu(graph, threads)
    if NAMES[provider] not in onnxruntime.get_available_providers():
        raise ProviderError("this onnxruntime was built without it: install onnxruntime-gpu alone")
    said = _preload_libraries()
    try:
        with CHANGES:
            session = onnxruntime.InferenceSession(
                graph,
                _session_options(threads=1, records_places=True),
                providers=_gpu_providers(graph, provider, gpu, batch_sizes),
                enable_fallback=0,
            )
    except Exception as error:  # onnxruntime's own exceptions have no public base class
        _open_on_cpu(graph, 1)  # raises if it is the graph that is at fault
        raise _unusable(error) from error
    if session.get_providers()[0] != NAMES[provider]:
        raise ProviderError(f"the session would run on {session.get_providers()[0]}{said}")
    _warn_of_others(session, provider)
    return session


def _open_on_cpu(graph: bytes, threads: int) -> Any:
    try:
        return onnxruntime.InferenceSession(
            graph, _session_options(threads), providers=[NAMES["cpu"]], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's own exceptions have no public base class
        raise GraphError(str(error)) from error


def _session_options(threads: int, *, records_places: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads steal the cores that decode and answer requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", f"{records_places:d}")
    options.log_severity_level = 3
    return options


def _unusable(error: Exception) -> ProviderError | DeviceLost:
    """Without the signatures of onnxruntime's functions, of which a failure of CUDA brings two."""
    failure = re.search(r"CUDA failure \d+: [^;]*\w", str(error))
    return (DeviceLost if is_lost(error) else ProviderError)(failure[0] if failure else str(error))


@cache
def _preload_libraries() -> str:
    """Find the CUDA libraries that pip has installed; returns what was missing, to be added to a sentence."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    return "".join(f"; {line.strip()}" for line in said.getvalue().splitlines() if "Failed to load" in line)


def _gpu_providers(
    graph: bytes, provider: Provider, gpu: GpuOptions, batch_sizes: Sequence[int]
) -> list[tuple[str, dict[str, str]]]:
    """With all their options; the CPU is not among them."""
    has_graphs = gpu.cuda_graphs and provider == "cuda"
    cuda = {
        # The default, powers of two, would take up to twice the memory that is needed, and keep it.
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": gpu.conv_algorithms.upper(),
        "enable_cuda_graph": f"{has_graphs:d}",
        "prefer_nhwc": f"{gpu.prefer_nhwc:d}",
        "use_tf32": f"{gpu.use_tf32:d}",
    }
    chain = [(NAMES["cuda"], cuda)]
    if provider == "tensorrt":
        chain.insert(0, (NAMES["tensorrt"], _tensorrt_options(graph, gpu, batch_sizes)))
    return chain


def _tensorrt_options(graph: bytes, gpu: GpuOptions, batch_sizes: Sequence[int]) -> dict[str, str]:
    if not gpu.use_tf32:
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT's provider has no option for it
    session = _open_on_cpu(graph, 1)
    (images,) = session.get_inputs()
    name, shape = images.name, "x".join(map(str, images.shape[1:]))
    options = {
        # One range for all sizes: the provider runs with the first profile only. Built for the largest size,
        # because small ones are dominated by launches, which no tactic makes faster.
        "trt_profile_min_shapes": f"{name}:{min(batch_sizes)}x{shape}",
        "trt_profile_opt_shapes": f"{name}:{max(batch_sizes)}x{shape}",
        "trt_profile_max_shapes": f"{name}:{max(batch_sizes)}x{shape}",
    }
    if gpu.tensorrt_cache:
        # A folder of its own: the name of an engine's file does not depend on the weights that are in it.
        folder = gpu.tensorrt_cache / hashlib.sha256(graph).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        options |= {
            "trt_engine_cache_enable": "True",  # not 1: that is for its C interface
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(folder),
        }
    return options


def _warn_of_others(session: Any, provider: Provider) -> None:
    """Say which operators a provider leaves to others: they cost copies, and rule CUDA graphs out."""
    others: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != NAMES[provider]:
            others.update(f"{node.op_type} on {part.ep_name}" for node in part.get_nodes())
    if others:
        listed = ", ".join(f"{n} {which}" for which, n in sorted(others.items()))
        logger.warning("Not all of a column runs on %s: %s.", NAMES[provider], listed)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the images and logits of one batch size lie on the GPU, and how they are run."""

    images: Any
    logits: Any
    binding: Any
    options: Any


class BoundSession:
    """A session on a GPU with one place in its memory for each batch size, always the same.

    That is what CUDA graphs need: they replay what was recorded, addresses and shapes and all.

    Args:
        session: As from `open_graph`; has one input and one output, whose first dimension is free.
        graph_ids: For each batch size the id of its CUDA graph, or `NOT_CAPTURED`. onnxruntime captures in
            the first run under an id, and replays that in every later one, whatever is bound and however
            large: no two batch sizes may share one.
        device: Where the memory is; `cpu` is for tests.

    Raises:
        ProviderError: there is not enough memory.
        DeviceLost: no run will succeed any more.
    """

    def __init__(
        self, session: Any, graph_ids: Mapping[int, int], device: Literal["cuda", "cpu"] = "cuda"
    ) -> None:
        self._session = session
        try:
            with CHANGES:
                self._places = {size: self._place(size, id_, device) for size, id_ in graph_ids.items()}
        except Exception as error:  # onnxruntime's own exceptions have no public base class
            raise _unusable(error) from error

    def _place(self, size: int, graph_id: int, device: str) -> _Place:
        (images,), (logits,) = self._session.get_inputs(), self._session.get_outputs()
        new = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        place = _Place(
            images=new([size, *images.shape[1:]], np.uint8, device),
            logits=new([size, *logits.shape[1:]], np.float32, device),
            binding=self._session.io_binding(),
            options=onnxruntime.RunOptions(),
        )
        place.binding.bind_ortvalue_input(images.name, place.images)
        place.binding.bind_ortvalue_output(logits.name, place.logits)
        place.options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return place

    def run(
        self, _: Sequence[str], inputs: Mapping[str, NDArray[np.uint8]], options: None = None, /
    ) -> list[NDArray[np.float32]]:
        """Compute logits_NK of images_NHWC; as `onnxruntime.InferenceSession.run`, with options of its own.

        Raises:
            ValueError: no place was made for such a batch.
            DeviceLost: no run will succeed any more.
            DeviceInDoubt: perhaps none will.
        """
        (images_NHWC,) = inputs.values()
        place = self._places.get(len(images_NHWC))
        # onnxruntime compares numbers of elements only, and would write four times the bytes of float32.
        if place is None or images_NHWC.dtype != np.uint8 or list(images_NHWC.shape) != place.images.shape():
            raise ValueError(f"no place was made for {images_NHWC.dtype} of shape {images_NHWC.shape}")
        try:
            with ONE_AT_A_TIME:
                place.images.update_inplace(images_NHWC)
                self._session.run_with_iobinding(place.binding, place.options)
                # Memory of its own: the next run writes where this one wrote.
                return [place.logits.numpy().copy()]
        except Exception as error:  # onnxruntime's own exceptions have no public base class
            if is_lost(error):
                raise DeviceLost(str(error)) from error
            if LIBRARY_FAILURE.search(str(error)):
                raise DeviceInDoubt(str(error)) from error
            raise

    def close(self) -> None:
        """Give the GPU's memory back; nothing can be run any more."""
        with CHANGES:
            self._places.clear()
            self._session = None


def is_lost(error: BaseException) -> bool:
    """Whether this is one of the errors of CUDA that only a new process gets over."""
    return any(int(code) in LOST for code in CUDA_FAILURE.findall(str(error)))
