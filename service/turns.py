"""How long what is read now has lain in its socket, as far as the turns of the event loop tell.

Must not know of connections or requests. To be used in the event loop's thread.
"""

import asyncio
import sys
import time
from collections.abc import Callable


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

    def read(self, now_s: float) -> tuple[Turn, int]:
        """Note that something is read now; gives the turn, and the place in it.

        Args:
            now_s: Current time [s].

        Cost: 2 us for the first in a turn, and 0.2 us for others.
        """
        if (turn := self._turn) is None:
            n_sleeps = self._n_sleeps()
            has_slept = n_sleeps != self._had_slept or not n_sleeps
            turn = self._turn = Turn(0.0 if has_slept else now_s - self._asked_s)
            self._had_slept, self._asked_s = n_sleeps, now_s
            asyncio.get_running_loop().call_soon(self._end)
        place = turn.n_read
        turn.n_read += 1
        return turn, place

    def _end(self) -> None:
        """All is read. What is to be done now is begun, and then the loop asks again."""
        self._turn = None
        asyncio.get_running_loop().call_soon(self._have_asked)

    def _have_asked(self) -> None:
        self._asked_s = self._clock()


def _sleeps_of_this_thread() -> Callable[[], int]:
    if sys.platform != "linux":
        return lambda: 0
    import resource  # noqa: PLC0415 - Windows has none

    def n_sleeps() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    return n_sleeps
