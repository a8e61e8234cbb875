"""Stand-ins that obey the contract of the real thing: an event loop in virtual time, a fake processor.

They share no code with what they test.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.inference import Preempted

Result = TypeVar("Result")
Behaviour = Literal["good", "raises", "short", "hangs", "nan"] | Exception

N_CLASSES = 256
PREEMPTION_S = 0.0002
"""How long a run goes on that is told to end [s]."""


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for a time to come, jumps to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("nothing is left that could ever happen: the code under test hangs")
            self.now_s += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while code runs and jumps to the next timer."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def work(self, duration_s: float) -> None:
        """Let time pass while code runs: nothing else happens meanwhile."""
        self._jumping.now_s += duration_s


def run_in_virtual_time(main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine as `asyncio.run` does, in virtual time; raises when it would hang."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def picture(identity: int) -> NDArray[np.uint8]:
    """An image_HWC that the fake processor recognises as this class."""
    return np.full((1, 1, 3), identity, np.uint8)


class FakeProcessor:
    """Recognises `picture(i)` as class i, more surely by deeper columns; takes as long as it is told.

    Args:
        duration_s: By column and number of images.
        behaviours: How the runs behave, one after the other; those after the last are good. An exception is
            what the run raises; `nan` is a run that gives no numbers for the first image.

    A brief run is over on return, also beside another, and the loop has stood still for it; `n_brief` counts
    them.
    """

    def __init__(self, duration_s: Callable[[str, int], float], behaviours: Sequence[Behaviour] = ()) -> None:
        self._duration_s = duration_s
        self._behaviours = list(behaviours)
        self.runs: list[tuple[float, str, tuple[int, ...]]] = []
        self.n_brief = 0
        self.n_preempted = 0
        self.is_running = False
        self.ended_s = 0.0
        self._preempt: Callable[[], None] | None = None

    def start(
        self, column: str, images_HWC: Sequence[NDArray[np.uint8]], *, is_brief: bool = False
    ) -> asyncio.Future[NDArray[np.float32]]:
        return self._begin(column, tuple(int(image[0, 0, 0]) for image in images_HWC), is_brief=is_brief)

    def preempt(self) -> None:
        """End the run in progress soon."""
        self.n_preempted += 1
        assert self.is_running, "the engine must not preempt when nothing runs"
        assert self._preempt, "nor a brief run"
        self._preempt()

    def start_blank(self, column: str) -> asyncio.Future[NDArray[np.float32]]:
        return self._begin(column, ())

    def _begin(
        self, column: str, identities: tuple[int, ...], *, is_brief: bool = False
    ) -> asyncio.Future[NDArray[np.float32]]:
        loop = asyncio.get_running_loop()
        if not is_brief:
            assert not self.is_running, "the engine must not start a run while another is in progress"
            self.is_running = True
        started_s = loop.time()
        self.runs.append((started_s, column, identities))
        duration_s = self._duration_s(column, max(1, len(identities)))
        behaviour = self._behaviours.pop(0) if self._behaviours else "good"
        done: asyncio.Future[NDArray[np.float32]] = loop.create_future()

        def finish() -> None:
            if not is_brief:
                self.is_running = False
                self.ended_s = started_s + duration_s  # the loop may come to hear of it later
            if behaviour == "raises":
                done.set_exception(RuntimeError("this run was told to fail"))
            elif isinstance(behaviour, Exception):
                done.set_exception(behaviour)
            else:
                logits_NK = np.zeros((len(identities), N_CLASSES), np.float32)
                logits_NK[range(len(identities)), identities] = 5.0 + int(column)
                if behaviour == "nan":
                    logits_NK[0] = np.nan
                done.set_result(logits_NK[1:] if behaviour == "short" else logits_NK)

        if behaviour == "hangs" and not is_brief:
            return done
        if is_brief:
            assert isinstance(loop, VirtualLoop)
            self.n_brief += 1
            loop.work(duration_s)
            finish()
        else:
            end = loop.call_later(duration_s, finish)
            self._preempt = partial(self._end_early, end, done)
        return done

    def _end_early(self, end: asyncio.TimerHandle, done: asyncio.Future[NDArray[np.float32]]) -> None:
        def stop() -> None:
            if not done.done():
                end.cancel()
                self.is_running = False
                self.ended_s = asyncio.get_running_loop().time()
                done.set_exception(Preempted())

        asyncio.get_running_loop().call_later(PREEMPTION_S, stop)

    def combine(
        self, columns_run: tuple[str, ...], logits_K: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        assert len(columns_run) == len(logits_K)
        assert list(columns_run) == sorted(columns_run)
        odds_K = np.exp(np.sum(logits_K, axis=0))
        probabilities_K: NDArray[np.float32] = odds_K / odds_K.sum()
        return probabilities_K


ACCURACY: Mapping[tuple[str, ...], float] = {
    ("1",): 0.80,
    ("2",): 0.85,
    ("3",): 0.90,
    ("1", "2"): 0.87,
    ("1", "3"): 0.91,
    ("1", "2", "3"): 0.93,
}
