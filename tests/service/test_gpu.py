"""What NVML says arrives; whatever is wrong with it costs a few figures and nothing else."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.gpu import Gpu, Gpus, Nvml

GIB = 1 << 30


class NotSupportedError(Exception):
    """Stands for NVML's own."""


@dataclass
class _Memory:
    used: int
    total: int


@dataclass
class _Utilization:
    gpu: int


@dataclass
class FakeNvml:
    """Two GPUs of 80 GiB; what is named in `broken` raises, what is in `hanging` waits for `released`."""

    broken: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)
    released: threading.Event = field(default_factory=threading.Event)
    n_calls: int = 0

    def _called(self, name: str) -> None:
        self.n_calls += 1
        if name in self.hanging:
            self.released.wait()
        if name in self.broken:
            raise NotSupportedError(name)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        self._called("init")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        self._called("count")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any:  # noqa: N802 - NVML's name
        self._called("handle")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> _Memory:  # noqa: N802 - NVML's name
        self._called("memory")
        return _Memory(used=(handle + 1) * GIB, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> _Utilization:  # noqa: N802 - NVML's name
        self._called("utilization")
        return _Utilization(gpu=25 * (handle + 1))


def loads(nvml: FakeNvml) -> Callable[[], Nvml]:
    return lambda: nvml


def test_memory_and_use_of_every_gpu() -> None:
    assert asyncio.run(Gpus(loads(FakeNvml())).sample()) == (
        Gpu(0, 1 * GIB, 80 * GIB, 0.25),
        Gpu(1, 2 * GIB, 80 * GIB, 0.5),
    )


def test_pynvml_has_what_the_fake_has() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    names = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(names) == 5
    for name in names:
        assert callable(getattr(pynvml, name))
    assert {"used", "total"} <= {name for name, _ in pynvml.c_nvmlMemory_t._fields_}
    assert "gpu" in {name for name, _ in pynvml.c_nvmlUtilization_t._fields_}


def test_a_figure_that_is_not_told_costs_only_itself() -> None:
    """As the use of a GPU that is shared by MIG."""
    gpus = asyncio.run(Gpus(loads(FakeNvml(broken={"utilization"}))).sample())
    assert [gpu.busy_ratio for gpu in gpus] == [None, None]
    assert [gpu.memory_used_bytes for gpu in gpus] == [1 * GIB, 2 * GIB]


@pytest.mark.parametrize("broken", ["init", "count", "handle"])
def test_what_is_broken_is_no_gpu_and_no_error(broken: str) -> None:
    assert asyncio.run(Gpus(loads(FakeNvml(broken={broken}))).sample()) == ()


def test_without_a_driver_nobody_asks_again() -> None:
    nvml = FakeNvml(broken={"init"})

    async def twice() -> None:
        gpus = Gpus(loads(nvml))
        assert await gpus.sample() == await gpus.sample() == ()

    asyncio.run(twice())
    assert nvml.n_calls == 1


def test_without_the_library_there_are_no_gpus() -> None:
    def load() -> Nvml:
        raise ModuleNotFoundError("No module named 'pynvml'")

    assert asyncio.run(Gpus(load).sample()) == ()


def test_a_gpu_that_comes_back_is_seen_again() -> None:
    nvml = FakeNvml(broken={"count"})

    async def twice() -> None:
        gpus = Gpus(loads(nvml))
        assert await gpus.sample() == ()
        nvml.broken.clear()
        assert len(await gpus.sample()) == 2

    asyncio.run(twice())


def test_a_driver_that_hangs_is_asked_once_and_not_waited_for() -> None:
    nvml = FakeNvml(hanging={"memory"})

    async def twice() -> None:
        gpus = Gpus(loads(nvml))
        assert await gpus.sample() == ()
        n_calls = nvml.n_calls
        assert await gpus.sample() == ()
        assert nvml.n_calls == n_calls
        nvml.released.set()
        while not await gpus.sample():
            pass

    asyncio.run(twice())


def test_scrapes_at_the_same_time_share_what_is_told() -> None:
    nvml = FakeNvml()

    async def at_once() -> None:
        gpus = Gpus(loads(nvml))
        one, other = await asyncio.gather(gpus.sample(), gpus.sample())
        assert one is other
        assert len(one) == 2

    asyncio.run(at_once())
