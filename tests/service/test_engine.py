"""The engine in virtual time: what a request sees, and the laws over random arrivals and failures."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import Engine, Request, Served
from service.errors import Problem, Rejected, Stopped
from service.scheduling import Ladder, Latency, LatencyProfile
from tests.fakes import ACCURACY, Behaviour, FakeProcessor, picture, run_in_virtual_time

COST_S = {"1": 0.001, "2": 0.003, "3": 0.008}
RESERVE_S = 0.0005
SIZES = (1, 2, 4)


def as_measured(column: str, n_images: int) -> float:
    """A second image in a batch costs a quarter of the first."""
    size = next(size for size in SIZES if size >= n_images)
    return COST_S[column] * (1 + 0.25 * (size - 1))


PROFILE = LatencyProfile(
    {column: {n: Latency(as_measured(column, n), as_measured(column, n)) for n in SIZES} for column in COST_S}
)
ERRATIC = LatencyProfile(
    {
        column: {n: Latency(as_measured(column, n) / 1.5, as_measured(column, n)) for n in SIZES}
        for column in COST_S
    }
)
"""Says that runs usually take less than `as_measured`, which is their high quantile."""

LADDER = Ladder(tuple(COST_S), ACCURACY)


class Bench:
    """An engine on the running virtual loop with a fake processor."""

    def __init__(
        self,
        *,
        duration_s: Callable[[str, int], float] = as_measured,
        behaviours: tuple[Behaviour, ...] = (),
        profile: LatencyProfile = PROFILE,
        max_waiting: int = 100,
        jitter: float = 1.0,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time
        self.processor = FakeProcessor(duration_s, behaviours)
        self.observed: list[tuple[str, int, float]] = []
        self.engine = Engine(
            self.processor,
            profile,
            LADDER,
            clock=loop.time,
            call_at=loop.call_at,
            observe_run=lambda *run: self.observed.append(run),
            reserve_s=RESERVE_S,
            max_waiting=max_waiting,
            jitter=lambda: jitter,
        )

    def submit(self, identity: int, budget_s: float, min_confidence: float | None = None) -> Request:
        return self.engine.submit(
            picture(identity),
            arrived_s=self.now(),
            deadline_s=self.now() + budget_s,
            min_confidence=min_confidence,
        )


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        run_in_virtual_time(test)

    run.__name__ = test.__name__
    return run


@in_virtual_time
async def test_a_generous_budget_gets_every_column() -> None:
    served = await Bench().submit(7, 0.050).settled
    assert (served.outcome, served.columns_run, served.stopped_by) == ("answered", ("1", "2", "3"), "deepest")
    assert served.settled_s == pytest.approx(0.012)
    assert served.inference_s == pytest.approx(0.012)
    assert served.queue_s == 0
    assert served.probabilities_K is not None
    assert served.probabilities_K.argmax() == 7


@in_virtual_time
async def test_a_small_budget_gets_column_1() -> None:
    served = await Bench().submit(7, 0.002).settled
    assert (served.columns_run, served.stopped_by) == (("1",), "budget")


@in_virtual_time
async def test_a_confident_answer_ends_early() -> None:
    served = await Bench().submit(7, 0.050, min_confidence=0.3).settled
    assert (served.columns_run, served.stopped_by) == (("1",), "confidence")


@in_virtual_time
async def test_the_answer_in_hand_goes_out_on_time_while_a_refinement_still_runs() -> None:
    bench = Bench(duration_s=lambda column, n: 0.5 if column == "3" else as_measured(column, n))
    served = await bench.submit(7, 0.020).settled
    assert (served.outcome, served.columns_run, served.stopped_by) == ("answered", ("1", "2"), "budget")
    assert bench.now() == pytest.approx(0.020 - RESERVE_S)
    assert bench.processor.is_running
    assert served.inference_s == pytest.approx(0.020 - RESERVE_S)


@in_virtual_time
async def test_a_first_run_past_the_deadline_is_answered_late() -> None:
    served = await Bench(duration_s=lambda *_: 0.030).submit(7, 0.002).settled
    assert (served.outcome, served.columns_run, served.settled_s) == ("answered", ("1",), 0.030)
    assert served.settled_s > served.deadline_s


@in_virtual_time
async def test_a_request_that_never_ran_expires_on_time_and_costs_nothing() -> None:
    bench = Bench(duration_s=lambda *_: 0.100)
    slow = bench.submit(1, 0.002)
    waiting = bench.submit(2, 0.010)
    served = await waiting.settled
    assert served.outcome == "expired"
    assert bench.now() == pytest.approx(0.010 - RESERVE_S)
    assert served.probabilities_K is None
    await slow.settled
    assert all(2 not in identities for _, _, identities in bench.processor.runs)


@in_virtual_time
async def test_what_cannot_be_had_in_time_is_rejected_with_a_computed_retry_time() -> None:
    bench = Bench(jitter=1.25)
    bench.submit(1, 0.050)
    with pytest.raises(
        Rejected, match=r"2\.50 ms and 2.00 ms are left: grant more or retry later"
    ) as rejected:
        bench.submit(2, 0.002)
    assert rejected.value.retry_after_s == pytest.approx(0.001 * 1.25)


@in_virtual_time
async def test_a_budget_that_is_gone_on_arrival_is_rejected() -> None:
    with pytest.raises(Rejected, match=r"0\.00 ms are left: grant at least 1\.50 ms\.$"):
        Bench().submit(1, 0.0)


@in_virtual_time
async def test_a_full_engine_rejects() -> None:
    bench = Bench(max_waiting=2)
    requests = [bench.submit(i, 1.0) for i in range(2)]
    with pytest.raises(Rejected, match="2 requests"):
        bench.submit(3, 1.0)
    await asyncio.gather(*(request.settled for request in requests))
    assert (await bench.submit(3, 1.0).settled).outcome == "answered"


@in_virtual_time
async def test_a_full_engine_gives_up_refinements_before_answers() -> None:
    bench = Bench(max_waiting=2)
    later, sooner = bench.submit(1, 1.0), bench.submit(2, 0.9)
    await asyncio.sleep(0.0021)
    assert later.columns_run == sooner.columns_run == ("1",)
    newcomer = bench.submit(3, 0.050)
    served = sooner.settled.result()
    assert (served.outcome, served.columns_run, served.stopped_by) == ("answered", ("1",), "load")
    assert (await later.settled).columns_run == (await newcomer.settled).columns_run == ("1", "2", "3")


@in_virtual_time
async def test_requests_that_wait_together_run_together_and_get_their_own_answers() -> None:
    bench = Bench()
    first = bench.submit(1, 0.050)
    others = [bench.submit(identity, 0.050) for identity in (2, 3, 4, 5)]
    for request in (first, *others):
        served = await request.settled
        assert served.probabilities_K is not None
        assert served.probabilities_K.argmax() == request.image_HWC[0, 0, 0]
    assert bench.processor.runs[1][1:] == ("1", (2, 3, 4, 5))
    assert [(column, n) for column, n, _ in bench.observed][:2] == [("1", 1), ("1", 4)]
    assert bench.observed[1][2] == pytest.approx(as_measured("1", 4))


@in_virtual_time
async def test_load_is_blamed_when_others_took_the_time() -> None:
    bench = Bench()
    first = bench.submit(1, 0.005)
    await asyncio.sleep(0.0005)
    second = bench.submit(2, 0.050)
    assert (await first.settled).stopped_by == "load"
    assert (await second.settled).columns_run == ("1", "2", "3")


@in_virtual_time
async def test_one_who_leaves_the_queue_costs_no_inference() -> None:
    bench = Bench()
    first, gone = bench.submit(1, 0.050), bench.submit(2, 0.050)
    bench.engine.leave(gone)
    assert (await gone.settled).outcome == "disconnected"
    assert bench.engine.n_waiting == 0
    await first.settled
    assert all(2 not in identities for _, _, identities in bench.processor.runs)


@in_virtual_time
async def test_one_who_leaves_a_run_harms_no_neighbour_and_is_not_run_again() -> None:
    bench = Bench()
    bench.submit(1, 0.050)
    neighbour, gone = bench.submit(2, 0.050), bench.submit(3, 0.050)
    await asyncio.sleep(0.0011)
    assert bench.processor.runs[-1][2] == (2, 3)
    bench.engine.leave(gone)
    assert (await neighbour.settled).columns_run == ("1", "2", "3")
    assert sum(3 in identities for _, _, identities in bench.processor.runs) == 1


@in_virtual_time
async def test_leaving_twice_or_after_the_answer_is_harmless() -> None:
    bench = Bench()
    request = bench.submit(1, 0.050)
    served = await request.settled
    bench.engine.leave(request)
    assert request.settled.result() is served


@in_virtual_time
async def test_a_waiter_cancelled_from_outside_is_forgotten() -> None:
    bench = Bench()
    bench.submit(1, 0.050)
    request = bench.submit(2, 0.050)
    request.settled.cancel()
    bench.engine.leave(request)
    assert bench.engine.n_waiting == 0


@pytest.mark.parametrize("behaviour", ["raises", "short"])
def test_a_failed_run_fails_its_batch_alone(behaviour: Behaviour) -> None:
    async def test() -> None:
        bench = Bench(behaviours=("good", behaviour))
        first = bench.submit(1, 0.050)
        batch = [bench.submit(2, 0.050), bench.submit(3, 0.050)]
        await asyncio.sleep(0.0015)
        after = bench.submit(4, 0.050)
        assert [(await request.settled).outcome for request in batch] == ["failed", "failed"]
        assert (await first.settled).columns_run == ("1", "2", "3")
        assert (await after.settled).columns_run == ("1", "2", "3")

    run_in_virtual_time(test)


@in_virtual_time
async def test_a_failed_refinement_leaves_the_answer_in_hand() -> None:
    bench = Bench(behaviours=("good", "raises"))
    served = await bench.submit(1, 0.050).settled
    assert (served.outcome, served.columns_run, served.stopped_by) == ("answered", ("1",), "load")


@in_virtual_time
async def test_a_stop_is_named_as_the_reason_only_where_it_is() -> None:
    bench = Bench()
    more_would_fit, nothing_fits = bench.submit(1, 0.050), bench.submit(2, 0.003)
    await asyncio.sleep(0.0015)
    await bench.engine.stop(1.0)
    assert more_would_fit.settled.result().stopped_by == "load"
    assert nothing_fits.settled.result().stopped_by == "budget"


@in_virtual_time
async def test_a_stop_that_lets_go_of_a_refinement_is_the_reason() -> None:
    bench = Bench(duration_s=lambda column, n: 1e6 if column == "2" else as_measured(column, n))
    request = bench.submit(1, 0.013)
    await asyncio.sleep(0.002)
    await bench.engine.stop(0.010)
    served = request.settled.result()
    assert (served.columns_run, served.stopped_by) == (("1",), "load")


@in_virtual_time
async def test_stopping_lets_the_run_answer_and_turns_the_waiting_away() -> None:
    bench = Bench()
    running, waiting = bench.submit(1, 0.050), bench.submit(2, 0.050)
    await bench.engine.stop(1.0)
    assert bench.now() == pytest.approx(0.001)
    assert (running.settled.result().outcome, running.settled.result().columns_run) == ("answered", ("1",))
    assert running.settled.result().stopped_by == "load"  # more would have fitted
    assert waiting.settled.result().outcome == "stopped"
    with pytest.raises(Stopped):
        bench.submit(3, 0.050)


@in_virtual_time
async def test_stopping_does_not_wait_for_a_run_that_hangs() -> None:
    bench = Bench(duration_s=lambda *_: 1e6)
    request = bench.submit(1, 0.050)
    await bench.engine.stop(2.0)
    assert bench.now() == pytest.approx(2.0)
    assert request.settled.result().outcome == "stopped"


@in_virtual_time
async def test_stopping_an_idle_engine_is_immediate() -> None:
    bench = Bench()
    await bench.engine.stop(5.0)
    assert bench.now() == 0


@in_virtual_time
async def test_a_fault_in_the_policy_leaves_nobody_hanging() -> None:
    bench = Bench()
    bench.submit(1, 0.050)
    waiting = bench.submit(2, 0.050)
    waiting.ready_by_s = cast("float", None)  # cannot be compared: makes any policy raise
    assert (await waiting.settled).outcome == "failed"
    assert (await bench.submit(3, 0.050).settled).outcome == "answered"


# ---- laws ----


@dataclass(frozen=True)
class Arrival:
    """One caller: when it comes, what it grants, when it leaves if it does."""

    after_s: float
    budget_s: float
    leaves_after_s: float | None
    min_confidence: float | None


milliseconds = st.integers(0, 400).map(lambda tenths: tenths / 1e4)
arrivals = st.lists(
    st.builds(
        Arrival,
        after_s=st.integers(0, 40).map(lambda tenths: tenths / 1e4),
        budget_s=milliseconds,
        leaves_after_s=st.none() | milliseconds,
        min_confidence=st.none() | st.sampled_from([0.3, 0.9, 1.0]),
    ),
    max_size=25,
)
behaviours = st.lists(st.sampled_from(["good", "good", "good", "raises", "short"]), max_size=30).map(tuple)
slowness = st.lists(st.sampled_from([0.5, 1.0, 1.0, 1.0, 3.0, 20.0]), min_size=1, max_size=10)


@dataclass
class Story:
    """What became of everyone, and when each run started."""

    bench: Bench
    served: dict[int, Served]
    refused: dict[int, Problem]


async def play(
    callers: list[Arrival],
    behaviours: tuple[Behaviour, ...],
    slowness: list[float],
    stop_after_s: float | None,
    profile: LatencyProfile = PROFILE,
) -> Story:
    factors = iter(slowness * 1000)
    bench = Bench(
        profile=profile,
        duration_s=lambda column, n: as_measured(column, n) * next(factors),
        behaviours=behaviours,
        max_waiting=10,
    )
    story = Story(bench, {}, {})

    async def call(identity: int, caller: Arrival) -> None:
        try:
            request = bench.submit(identity, caller.budget_s, caller.min_confidence)
        except Problem as problem:
            story.refused[identity] = problem
            return
        if caller.leaves_after_s is not None:
            asyncio.get_running_loop().call_later(caller.leaves_after_s, bench.engine.leave, request)
        story.served[identity] = await request.settled

    async with asyncio.TaskGroup() as group:
        if stop_after_s is not None:

            async def stop() -> None:
                await asyncio.sleep(stop_after_s)
                await bench.engine.stop(0.010)

            group.create_task(stop())
        for identity, caller in enumerate(callers):
            await asyncio.sleep(caller.after_s)
            group.create_task(call(identity, caller))
    return story


@given(arrivals, behaviours, slowness, st.none() | milliseconds)
def test_laws_hold_whatever_happens(
    callers: list[Arrival],
    behaviours: tuple[Behaviour, ...],
    slowness: list[float],
    stop_after_s: float | None,
) -> None:
    async def test() -> None:
        story = await play(callers, behaviours, slowness, stop_after_s)
        ran = {identity for _, _, identities in story.bench.processor.runs for identity in identities}

        # Everyone is settled exactly once, and nobody is left inside.
        assert story.served.keys() | story.refused.keys() == set(range(len(callers)))
        assert story.bench.engine.n_waiting == 0

        for identity, served in story.served.items():
            # Everyone gets their own answer, and one exactly if they are told so.
            assert (served.probabilities_K is not None) == (served.outcome == "answered")
            assert (served.stopped_by is not None) == (served.outcome == "answered")
            if served.probabilities_K is not None:
                assert served.probabilities_K.argmax() == identity
                runs_s = [start_s for start_s, _, batch in story.bench.processor.runs if identity in batch]
                assert len(runs_s) >= len(served.columns_run) >= 1
            # Nobody is answered late who had an answer in time; nobody expires late.
            if len(served.columns_run) > 1 or served.outcome == "expired":
                assert served.settled_s <= served.deadline_s - RESERVE_S + 1e-9
            if served.outcome == "expired":
                assert identity not in ran
            assert served.queue_s >= 0
            assert served.queue_s + served.inference_s == pytest.approx(served.settled_s - served.arrived_s)

        # A refused request costs no inference.
        assert not ran & story.refused.keys()

    run_in_virtual_time(test)


@given(arrivals, st.sampled_from([PROFILE, ERRATIC]))
def test_law_whoever_is_admitted_is_answered_in_time_when_runs_take_what_was_predicted(
    callers: list[Arrival], profile: LatencyProfile
) -> None:
    """The promise of column 1 holds, even if every run takes its high quantile."""

    async def test() -> None:
        # Odd budgets, so that no run ends at the very moment of a deadline: which of them then comes first
        # is up to rounding.
        staying = [Arrival(c.after_s, c.budget_s + 3e-5, None, c.min_confidence) for c in callers]
        story = await play(staying, (), [1.0], None, profile)
        for served in story.served.values():
            assert served.outcome == "answered"
            assert served.settled_s <= served.deadline_s - RESERVE_S + 1e-9

    run_in_virtual_time(test)


@given(st.integers(15, 300).map(lambda tenths: tenths / 1e4 + 3e-5))
def test_law_an_idle_server_leaves_no_accuracy_on_the_table(budget_s: float) -> None:
    async def test() -> None:
        served = await Bench().submit(1, budget_s).settled
        fitting = [column for column in COST_S if COST_S[column] <= budget_s - RESERVE_S]
        assert LADDER.accuracy(served.columns_run) >= max(ACCURACY[column,] for column in fitting)
        assert served.settled_s <= served.deadline_s - RESERVE_S + 1e-9
        assert served.stopped_by in {"budget", "deepest"}

    run_in_virtual_time(test)


def test_probabilities_of_the_fake_are_probabilities() -> None:
    """The fake obeys the contract that the engine relies on."""
    fake = FakeProcessor(as_measured)
    probabilities_K = fake.combine(("1",), [np.eye(256, dtype=np.float32)[3]])
    assert probabilities_K.sum() == pytest.approx(1)
