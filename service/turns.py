"""How long what is read now has lain in its socket, as far as the turns of the event loop tell.

Must not know of connections or requests. To be used in the event loop's thread.
"""

import asyncio
import sys
import time
from collections.abc import Callable

LEAST_WAIT_S = 1e-4
"""Who lay in the socket for less than that met nobody's run [s]: a caller that comes again as soon as it has
its answer finds the loop putting things away."""


def has_waited(waited_s: float) -> bool:
    """Whether who lay in the socket for so long [s] found the event loop at work for others."""
    return waited_s > LEAST_WAIT_S


class Turn:
    """What is read in one turn of the event loop.

    Args:
        length_s: Since the loop had last asked who is there [s]; 0 if it has slept since: what is read then
            has just come.
    """

    __slots__ = ("length_s", "n_read")

    def __init__(self, length_s: float) -> None:
        self.length_s = length_s
        self.n_read = 0

    def waited_s(self, place: int) -> float:
        """How long what was read at this place has likely lain in its socket [s]; known when all is read.

        The system tells of sockets in the order in which something came, and that is as likely at one moment
        of the turn before as at another.
        """
        return self.length_s * (1 - (place + 0.5) / self.n_read)


class Turns:
    """The turns of the running event loop.

    A loop that is at work does not see who comes. It asks the system again and again; only if nobody is there
    and nothing is to be done, it sleeps until somebody comes. So who is found after a turn without sleep came
    at some time while the loop was at work.

    Args:
        n_sleeps: How often this thread has slept since it began; 0 where that is not known, and then nobody
            is taken to have waited. Linux tells, of the thread that asks.
        clock: Monotonic time [s].
    """

    def __init__(
        self,
        n_sleeps: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._n_sleeps = n_sleeps or _sleeps_of_this_thread()
        self._clock = clock
        self._turn: Turn | None = None
        self._asked_s = 0.0
        self._had_slept = 0

    def begin(self, now_s: float) -> None:
        """Note that something is read, before it is looked at.

        Args:
            now_s: Current time [s].

        Cost: 2 us for the first in a turn, and 0.1 us for others.
        """
        if self._turn is None:
            self._turn = Turn(self.mark(now_s))
            asyncio.get_running_loop().call_soon(self._end)

    def take_place(self) -> tuple[Turn, int]:
        """The turn that has begun, and the next place in it."""
        turn = self._turn
        assert turn is not None  # noqa: S101 - for the type checker: only what is read takes a place
        place = turn.n_read
        turn.n_read += 1
        return turn, place

    def mark(self, now_s: float) -> float:
        """Note that the loop does something now; gives how long it has been at work without asking [s].

        Args:
            now_s: Current time [s].
        """
        n_sleeps = self._n_sleeps()
        has_slept = n_sleeps != self._had_slept or not n_sleeps
        length_s = 0.0 if has_slept else now_s - self._asked_s
        if self._turn is None:
            self._had_slept, self._asked_s = n_sleeps, now_s
        return length_s

    def _end(self) -> None:
        """All is read. What is to be done now is begun, and then the loop asks again."""
        self._turn = None
        asyncio.get_running_loop().call_soon(self._have_asked)

    def _have_asked(self) -> None:
        if self._turn is None:  # else somebody was there, and reading them took its time
            self._asked_s = self._clock()


def _sleeps_of_this_thread() -> Callable[[], int]:
    if sys.platform != "linux":
        return lambda: 0
    import resource  # noqa: PLC0415 - Windows has none

    def n_sleeps() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    return n_sleeps
