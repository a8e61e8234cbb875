"""What NVML says of the GPUs: their memory and how busy they are. Nothing where there is none.

Must not know what runs on them. NVML is asked in a thread that nobody waits for very long: where a driver has
gone, a call may never return.
"""

import asyncio
import contextlib
import importlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

PATIENCE_S = 0.5
"""How long a scrape waits for NVML, which takes milliseconds. Longer: slower scrapes where it hangs."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU at one moment; None stands for what it does not tell.

    Attributes:
        index: NVML's, by PCI address; CUDA_VISIBLE_DEVICES does not change it.
        memory_used_bytes: By all processes.
        memory_size_bytes: Of its memory.
        busy_ratio: Part of the last second or less in which any kernel ran.
    """

    index: int
    memory_used_bytes: int | None
    memory_size_bytes: int | None
    busy_ratio: float | None


class Nvml(Protocol):
    """What is asked of `pynvml`. Each may raise its `NVMLError`."""

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        """Open the library."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        """How many GPUs there are."""

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any:  # noqa: N802 - NVML's name
        """One of them."""

    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any:  # noqa: N802 - NVML's name
        """Has `used` and `total`, in bytes."""

    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any:  # noqa: N802 - NVML's name
        """Has `gpu`, in percent."""


def _pynvml() -> Nvml:
    return cast("Nvml", importlib.import_module("pynvml"))


class Gpus:
    """Every GPU that NVML sees.

    Args:
        load: Gives NVML's functions; whatever it raises, there are no GPUs then.
    """

    def __init__(self, load: Callable[[], Nvml] = _pynvml) -> None:
        self._load = load
        self._nvml: Nvml | None = None
        self._is_hopeless = False
        self._asked: asyncio.Future[tuple[Gpu, ...]] | None = None

    async def sample(self) -> tuple[Gpu, ...]:
        """How they are now; empty if there are none or they do not say. Never raises."""
        if self._is_hopeless:
            return ()
        if self._asked is None or self._asked.done():
            self._asked = self._ask()
        done, _ = await asyncio.wait([self._asked], timeout=PATIENCE_S)
        return self._asked.result() if done else ()

    def _ask(self) -> "asyncio.Future[tuple[Gpu, ...]]":
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[tuple[Gpu, ...]] = loop.create_future()

        def run() -> None:
            gpus = self._sample()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(asked.set_result, gpus)

        threading.Thread(target=run, name="nvml", daemon=True).start()
        return asked

    def _sample(self) -> tuple[Gpu, ...]:
        try:
            if self._nvml is None:
                nvml = self._load()
                nvml.nvmlInit()
                self._nvml = nvml
            return tuple(_gpu(self._nvml, index) for index in range(self._nvml.nvmlDeviceGetCount()))
        except Exception as error:  # noqa: BLE001 - no driver, no library, a driver that has gone: no figures
            if self._nvml is None:
                self._is_hopeless = True
            logger.debug("NVML says nothing: %s", error)
            return ()


def _gpu(nvml: Nvml, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _told(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    busy = _told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    return Gpu(
        index=index,
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_size_bytes=None if memory is None else int(memory.total),
        busy_ratio=None if busy is None else busy.gpu / 100,
    )


def _told(ask: Callable[[], Value]) -> Value | None:
    """One figure; None where this GPU has none, as the use of one that is shared by MIG."""
    try:
        return ask()
    except Exception:  # noqa: BLE001 - NVMLError belongs to a module that may not be there
        return None
