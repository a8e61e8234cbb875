"""How long what is read has lain in its socket, on a virtual loop and on the one that serves."""

import asyncio
import socket
import sys
import time

import pytest
import uvloop

from service.turns import Turn, Turns
from tests.fakes import VirtualLoop, run_in_virtual_time

WORK_S = 0.02


class Bench:
    """Turns of the running virtual loop, whose thread has slept when it says so."""

    def __init__(self, n_sleeps: int = 1) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.n_sleeps = n_sleeps
        self._turns = Turns(lambda: self.n_sleeps, loop.time)

    def read(self) -> tuple[Turn, int]:
        self._turns.begin(self.loop.time())
        return self._turns.take_place()

    def mark(self) -> float:
        return self._turns.mark(self.loop.time())

    def waited_s(self) -> float:
        turn, place = self.read()
        return turn.waited_s(place)


def test_who_is_read_after_a_sleep_has_just_come() -> None:
    async def main() -> None:
        bench = Bench()
        bench.read()
        await asyncio.sleep(0.010)
        bench.n_sleeps += 1
        assert bench.waited_s() == 0

    run_in_virtual_time(main)


def test_who_is_read_after_work_came_at_some_time_in_it_in_the_order_of_reading() -> None:
    async def main() -> None:
        bench = Bench()
        bench.read()
        await asyncio.sleep(0)
        bench.loop.work(0.008)
        reads = [bench.read() for _ in range(4)]
        assert [turn.waited_s(place) for turn, place in reads] == pytest.approx([0.007, 0.005, 0.003, 0.001])

    run_in_virtual_time(main)


def test_what_is_read_later_belongs_to_another_turn() -> None:
    async def main() -> None:
        bench = Bench()
        (first, at), (second, after) = bench.read(), bench.read()
        assert (first, at, after) == (second, 0, 1)
        await asyncio.sleep(0)
        third, at = bench.read()
        assert third is not first
        assert at == 0

    run_in_virtual_time(main)


def test_a_loop_that_has_asked_and_found_nobody_begins_a_turn_with_that() -> None:
    async def main() -> None:
        bench = Bench()
        bench.read()
        bench.loop.work(0.004)
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the loop has asked twice
        bench.loop.work(0.001)
        assert bench.waited_s() == pytest.approx(0.0005)

    run_in_virtual_time(main)


def test_a_turn_begins_with_its_first_reading_and_not_when_all_is_read() -> None:
    async def main() -> None:
        bench = Bench()
        bench.read()
        await asyncio.sleep(0)
        bench.read()
        bench.loop.work(0.002)
        await asyncio.sleep(0)
        bench.loop.work(0.005)
        assert bench.waited_s() == pytest.approx(0.0035)

    run_in_virtual_time(main)


def test_what_the_loop_does_beside_reading_begins_a_turn_as_well() -> None:
    async def main() -> None:
        bench = Bench()
        bench.mark()
        bench.loop.work(0.004)
        assert bench.mark() == pytest.approx(0.004)
        bench.loop.work(0.002)
        assert bench.waited_s() == pytest.approx(0.001)
        bench.loop.work(0.001)
        assert bench.mark() == pytest.approx(0.001)  # and what is being read keeps its turn
        bench.loop.work(0.001)
        assert bench.mark() == pytest.approx(0.002)

    run_in_virtual_time(main)


def test_nobody_is_taken_to_have_waited_where_sleeps_are_not_told() -> None:
    async def main() -> None:
        bench = Bench(n_sleeps=0)
        bench.read()
        await asyncio.sleep(0)
        bench.loop.work(0.010)
        assert bench.waited_s() == 0

    run_in_virtual_time(main)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how often a thread has slept")
def test_a_loop_at_work_is_told_from_one_that_sleeps() -> None:
    async def main() -> None:
        loop, turns = asyncio.get_running_loop(), Turns()
        reads: list[tuple[Turn, int]] = []
        is_read = asyncio.Event()

        class Reading(asyncio.Protocol):
            def data_received(self, _: bytes) -> None:
                turns.begin(time.monotonic())
                reads.append(turns.take_place())
                is_read.set()

        pairs = [socket.socketpair() for _ in range(2)]
        for _, served in pairs:
            await loop.connect_accepted_socket(Reading, served)
        for _ in range(2):
            loop.call_later(WORK_S, pairs[0][0].send, b"x")  # the loop sleeps until then
            is_read.clear()
            await is_read.wait()
        began_s = time.monotonic()
        for caller, _ in pairs:
            caller.send(b"x")
        while time.monotonic() < began_s + WORK_S:
            pass
        await asyncio.sleep(WORK_S)
        for caller, _ in pairs:
            caller.close()
        alone, alone_again, first, second = [turn.waited_s(place) for turn, place in reads]
        assert alone == alone_again == 0
        assert first > second > 0
        assert first + second == pytest.approx(reads[-1][0].length_s)
        assert reads[-1][0].length_s >= WORK_S

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
