"""onnxruntime as it behaves where there is a GPU, on a machine without one: it computes on the CPU.

Obeys what serving relies on: a session runs on the providers it was given, in their order, and goes on with
the CPU in silence where a GPU cannot be had; memory is bound once and copied into; what was captured as a
CUDA graph under an id is replayed in every later run under it, with the addresses and shapes of then,
whatever is bound now.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

REAL_SESSION = onnxruntime.InferenceSession
REAL_VALUE = onnxruntime.OrtValue.ortvalue_from_shape_and_type
GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


@dataclass
class FakeCuda:
    """Every session on the GPU, and how the GPU is.

    Attributes:
        absent: Providers that fail to load, in silence.
        open_error: What opening a session on the GPU raises.
        run_error: What each run of it raises.
        left_to_cpu: Operators that the provider leaves to the CPU.
    """

    absent: tuple[str, ...] = ()
    open_error: str = ""
    run_error: str = ""
    left_to_cpu: tuple[str, ...] = ()
    sessions: list["FakeSession"] = field(default_factory=list)
    n_values: int = 0
    n_running: int = 0
    most_running: int = 0
    during_run: Callable[[], object] = lambda: None

    def open(self, graph: bytes, options: Any, *, providers: Sequence[Any], enable_fallback: int) -> Any:
        chain = [(one, {}) if isinstance(one, str) else one for one in providers]
        if chain[0][0] not in GPU_PROVIDERS:
            return REAL_SESSION(graph, options, providers=providers, enable_fallback=enable_fallback)
        if self.open_error:
            raise RuntimeError(self.open_error)
        session = FakeSession(self, graph, chain, enable_fallback=bool(enable_fallback))
        self.sessions.append(session)
        return session

    def value(self, shape: Sequence[int], dtype: Any, device: str = "cpu") -> Any:
        assert device == "cuda"
        self.n_values += 1
        return REAL_VALUE(shape, dtype, "cpu")


class FakeSession:
    """A session on the GPU, and what was asked of it."""

    def __init__(
        self, cuda: FakeCuda, graph: bytes, chain: list[tuple[str, Any]], *, enable_fallback: bool
    ) -> None:
        self.graph = graph
        self.chain = chain
        self.enable_fallback = enable_fallback
        self.ids: list[int] = []
        self.images: list[Any] = []
        self._cuda = cuda
        self._captured: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._session = REAL_SESSION(graph, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.chain if name not in self._cuda.absent] + ["CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def part(name: str, kinds: Sequence[str]) -> Any:
            return SimpleNamespace(
                ep_name=name, get_nodes=lambda: [SimpleNamespace(op_type=k) for k in kinds]
            )

        parts = [part(self.chain[0][0], ("Conv", "Relu"))]
        return parts + (
            [part("CPUExecutionProvider", self._cuda.left_to_cpu)] if self._cuda.left_to_cpu else []
        )

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        with self._lock:
            self._cuda.n_running += 1
            self._cuda.most_running = max(self._cuda.most_running, self._cuda.n_running)
        try:
            self._cuda.during_run()
            if self._cuda.run_error:
                raise RuntimeError(self._cuda.run_error)
            graph_id = int(options.get_run_config_entry("gpu_graph_id"))
            self.ids.append(graph_id)
            has_graphs = dict(self.chain)["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"
            if has_graphs and graph_id >= 0:
                binding = self._captured.setdefault(graph_id, binding)
            (images,) = binding._bound_inputs.values()
            self.images.append(images.numpy().copy())
            self._session.run_with_iobinding(binding)
        finally:
            with self._lock:
                self._cuda.n_running -= 1


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    """Have onnxruntime behave like this until the test is over."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", cuda.open)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", cuda.value)
    available = [*GPU_PROVIDERS, "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    return cuda
