"""The engine in virtual time: what a request sees, and the laws over random arrivals and failures."""

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.engine import IN_HAND, LEAST_DOUBT_S, Engine, InferenceThread, Request, Served
from service.errors import Problem, Rejected, Stopped
from service.health import Health
from service.inference import Inference, Preemption
from service.ladder import Ladder
from service.latency import Latency, LatencyProfile, LiveProfile, Reserve
from service.policies import POLICY_NAMES, PolicyName, named
from service.providers import DeviceInDoubt, DeviceLost
from service.scheduling import HOPE, Admission, Anytime, Plan, Policy
from service.waiting import NO_TRAFFIC, Queue, TicketT, Traffic
from tests.fakes import (
    ACCURACY,
    PREEMPTION_S,
    Behaviour,
    FakeProcessor,
    VirtualLoop,
    picture,
    run_in_virtual_time,
)
from tests.service import toy_artifact
from tests.service.conftest import BlockedSession

COST_S = {"1": 0.001, "2": 0.003, "3": 0.008}
RESERVE_S = 0.0005
SIZES = (1, 2, 4)
N_FAILURES = 3
RUN_TIMEOUT_S = 10.0


def as_measured(column: str, n_images: int) -> float:
    """A second image in a batch costs a quarter of the first."""
    size = next(size for size in SIZES if size >= n_images)
    return COST_S[column] * (1 + 0.25 * (size - 1))


PROFILE = LatencyProfile(
    {column: {n: Latency(as_measured(column, n), as_measured(column, n)) for n in SIZES} for column in COST_S}
)
LADDER = Ladder(tuple(COST_S), ACCURACY)


class Still(LiveProfile):
    """Learns nothing: for what is claimed only as long as predictions stay as they are."""

    SHARED_STEP = OWN_STEP = TAIL_STEP = 0.0


class Watched(Anytime):
    """Counts how often it is asked, and fails when it is told to.

    Args:
        faults: Whether to fail, one plan after the other; those after the last succeed.
    """

    def __init__(self, faults: Sequence[bool] = ()) -> None:
        super().__init__()
        self._faults = list(faults)
        self.n_admissions = 0

    def plan(
        self,
        waiting: Queue[TicketT],
        now_s: float,
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic = NO_TRAFFIC,
    ) -> Plan[TicketT]:
        if self._faults and self._faults.pop(0):
            raise ArithmeticError("this policy was told to fail")
        return super().plan(waiting, now_s, profile, ladder, traffic)

    def admit(
        self,
        ready_by_s: float,
        now_s: float,
        busy_until_s: float,
        waiting: Queue[TicketT],
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic = NO_TRAFFIC,
    ) -> Admission:
        self.n_admissions += 1
        return super().admit(ready_by_s, now_s, busy_until_s, waiting, profile, ladder, traffic)


class Bench:
    """An engine on the running virtual loop with a fake processor."""

    def __init__(
        self,
        *,
        duration_s: Callable[[str, int], float] = as_measured,
        behaviours: tuple[Behaviour, ...] = (),
        profile: LiveProfile | None = None,
        policy: Policy | None = None,
        brief_s: float = 0.0,
        keep_warm_s: float = 0.0,
        max_waiting: int = 100,
        jitter: float = 1.0,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time
        self.processor = FakeProcessor(duration_s, behaviours)
        self.profile = profile or LiveProfile(PROFILE, quantile=0.95)
        self.observed: list[tuple[str, int, float, float]] = []
        self.failed_runs: list[str] = []
        self.preempted_runs: list[str] = []
        self.saved_s: list[float] = []
        self.broken: list[str] = []
        self.engine = Engine(
            self.processor,
            policy or Anytime(),
            self.profile,
            LADDER,
            clock=loop.time,
            call_at=loop.call_at,
            call_soon=loop.call_soon,
            call_now=lambda callback: callback(),
            observe_run=lambda *run: self.observed.append(run),
            observe_failed_run=self.failed_runs.append,
            observe_preempted_run=self.preempted_runs.append,
            observe_saved=self.saved_s.append,
            observe_broken=self.broken.append,
            health=Health(N_FAILURES),
            reserve=Reserve(RESERVE_S, least_s=1e-4, most_s=5e-3),
            brief_s=brief_s,
            keep_warm_s=keep_warm_s,
            run_timeout_s=RUN_TIMEOUT_S,
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

    async def begin(self, identity: int, budget_s: float) -> Request:
        """Submit a request to an idle engine and let its run begin."""
        request = self.submit(identity, budget_s)
        await asyncio.sleep(0)
        assert self.processor.is_running
        return request


def preemptible() -> Bench:
    return Bench(profile=Still(PROFILE, 0.95, preemption_s=PREEMPTION_S))


async def refining() -> tuple[Bench, Request]:
    """A run could be preempted: that of one who has column 1, and waits for a deeper one."""
    bench = preemptible()
    request = bench.submit(1, 0.050)
    await asyncio.sleep(0.002)
    assert bench.processor.runs[-1][1] != "1"
    return bench, request


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
    assert served.accuracy == ACCURACY["1", "2", "3"]
    assert served.probabilities_K is not None
    assert served.probabilities_K.argmax() == 7


@in_virtual_time
async def test_a_refinement_makes_way_for_a_first_answer_that_cannot_wait_for_its_end() -> None:
    bench, patient = await refining()
    urgent = bench.submit(2, 0.002)
    served = await urgent.settled
    assert (served.outcome, served.columns_run) == ("answered", ("1",))
    assert served.queue_s == pytest.approx(PREEMPTION_S)
    assert served.settled_s <= served.deadline_s - RESERVE_S
    [preempted] = bench.preempted_runs
    assert bench.processor.n_preempted == 1
    refined = await patient.settled
    assert (refined.columns_run, refined.stopped_by) == (("1", "2", "3"), "deepest")
    assert [run.column for run in refined.runs].count(preempted) == 2  # what was lost is run again
    assert not bench.failed_runs
    assert bench.engine.n_waiting == 0


@in_virtual_time
async def test_whoever_can_wait_for_a_refinement_lets_it_end() -> None:
    bench, _ = await refining()
    await bench.submit(2, 0.030).settled
    assert not bench.preempted_runs
    assert bench.processor.n_preempted == 0


@in_virtual_time
async def test_two_who_cannot_wait_preempt_once() -> None:
    bench, _ = await refining()
    first, second = bench.submit(2, 0.0019), bench.submit(3, 0.003)
    assert {(await one.settled).outcome for one in (first, second)} == {"answered"}
    assert bench.processor.n_preempted == 1


@in_virtual_time
async def test_no_first_answer_makes_way_for_another() -> None:
    bench = preemptible()
    await bench.begin(1, 0.050)
    with pytest.raises(Rejected):
        bench.submit(2, 0.0018)
    assert bench.processor.n_preempted == 0


@in_virtual_time
async def test_a_run_that_nobody_waits_for_any_more_is_ended() -> None:
    bench = preemptible()
    request = await bench.begin(1, 0.050)
    bench.engine.leave(request)
    await asyncio.sleep(PREEMPTION_S * 1.5)
    assert not bench.engine.is_running
    assert bench.preempted_runs == ["1"]
    assert (await bench.submit(2, 0.002).settled).outcome == "answered"


@in_virtual_time
async def test_where_a_run_cannot_be_ended_it_is_not_told_to() -> None:
    bench = Bench(profile=Still(PROFILE, 0.95))
    patient = bench.submit(1, 0.050)
    await asyncio.sleep(0.002)
    with pytest.raises(Rejected):
        bench.submit(2, 0.002)
    bench.engine.leave(patient)  # the run is in vain now
    assert bench.processor.n_preempted == 0


@in_virtual_time
async def test_a_result_that_was_there_when_the_run_was_to_end_is_used() -> None:
    bench = Bench(
        duration_s=lambda column, n: as_measured(column, n) if column == "1" else 0.0021,
        profile=Still(PROFILE, 0.95, preemption_s=PREEMPTION_S),
    )
    patient = bench.submit(1, 0.050)
    await asyncio.sleep(0.00305)  # 0.05 ms before the end of the refinement
    await bench.submit(2, 0.002).settled
    assert bench.processor.n_preempted == 1
    assert not bench.preempted_runs
    assert [run.column for run in (await patient.settled).runs] == ["1", "2", "3"]


@in_virtual_time
async def test_a_column_that_never_ends_in_time_is_learnt_from_though_it_is_ended() -> None:
    def slow(column: str, n_images: int) -> float:
        return as_measured(column, n_images) * (4 if column == "3" else 1)

    bench = Bench(duration_s=slow, profile=LiveProfile(PROFILE, 0.95, preemption_s=PREEMPTION_S))
    before_s = bench.profile.latency("3", 1).median_s
    for identity in range(20):
        await bench.submit(identity, 0.016).settled
        await asyncio.sleep(0.005)
    assert bench.preempted_runs.count("3") > 0
    assert bench.profile.latency("3", 1).median_s > 1.2 * before_s


@in_virtual_time
async def test_a_run_ends_when_the_task_that_waits_for_it_is_cancelled() -> None:
    bench = preemptible()
    request = await bench.begin(1, 0.050)
    request.settled.cancel()
    bench.engine.leave(request)
    assert bench.processor.n_preempted == 1


@in_virtual_time
async def test_one_who_comes_after_another_with_the_same_deadline_is_judged_as_well() -> None:
    policy = Watched()
    bench = Bench(policy=policy)
    bench.engine.check_admission(0.0, 0.050)
    bench.submit(1, 0.050)
    assert policy.n_admissions == 1
    bench.submit(2, 0.050)
    assert policy.n_admissions == 2


@in_virtual_time
async def test_how_long_a_run_goes_on_that_is_told_to_end_is_learnt() -> None:
    bench = Bench(profile=LiveProfile(PROFILE, quantile=0.95, preemption_s=10 * PREEMPTION_S))
    bench.engine.leave(await bench.begin(1, 0.050))
    await asyncio.sleep(0.01)
    assert bench.profile.preemption_s < 10 * PREEMPTION_S


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
    assert bench.now() == pytest.approx(0.020 - IN_HAND * RESERVE_S)
    assert bench.processor.is_running
    assert served.inference_s == pytest.approx(0.020 - IN_HAND * RESERVE_S)


@in_virtual_time
async def test_a_first_run_past_the_deadline_is_answered_late() -> None:
    served = await Bench(duration_s=lambda *_: 0.030).submit(7, 0.002).settled
    assert (served.outcome, served.columns_run, served.settled_s) == ("answered", ("1",), 0.030)
    assert served.settled_s > served.deadline_s


@in_virtual_time
async def test_a_request_that_never_ran_expires_on_time_and_costs_nothing() -> None:
    bench = Bench(duration_s=lambda *_: 0.100)
    slow = await bench.begin(1, 0.002)
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
    await bench.begin(1, 0.050)
    with pytest.raises(
        Rejected, match=r"2\.50 ms and 2.00 ms are left: grant more or retry later"
    ) as rejected:
        bench.submit(2, 0.002)
    assert rejected.value.retry_after_s == pytest.approx(0.001 * 1.25)
    assert rejected.value.reason == "load"


@in_virtual_time
async def test_a_budget_that_is_gone_on_arrival_is_rejected() -> None:
    with pytest.raises(Rejected, match=r"0\.00 ms are left: grant at least 1\.50 ms\.$") as rejected:
        Bench().submit(1, 0.0)
    assert rejected.value.reason == "budget"


@in_virtual_time
async def test_a_full_engine_rejects() -> None:
    bench = Bench(max_waiting=2)
    requests = [bench.submit(i, 1.0) for i in range(2)]
    with pytest.raises(Rejected, match="2 requests") as rejected:
        bench.submit(3, 1.0)
    assert rejected.value.reason == "load"
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
async def test_a_full_engine_gives_up_refinements_that_wait_for_their_turn() -> None:
    bench = Bench(max_waiting=3)
    later, sooner = bench.submit(1, 1.0), bench.submit(2, 0.9)
    await asyncio.sleep(0.0010)
    third = bench.submit(3, 1.0)
    await asyncio.sleep(0.0005)
    assert bench.processor.runs[-1][1:] == ("1", (3,))
    assert bench.engine.n_waiting == 2
    newcomer = bench.submit(4, 1.0)
    assert sooner.settled.result().stopped_by == "load"
    for request in (later, third, newcomer):
        assert (await request.settled).columns_run == ("1", "2", "3")


@in_virtual_time
async def test_requests_that_wait_together_run_together_and_get_their_own_answers() -> None:
    bench = Bench()
    first = await bench.begin(1, 0.050)
    others = [bench.submit(identity, 0.050) for identity in (2, 3, 4, 5)]
    for request in (first, *others):
        served = await request.settled
        assert served.probabilities_K is not None
        assert served.probabilities_K.argmax() == request.image_HWC[0, 0, 0]
    assert bench.processor.runs[1][1:] == ("1", (2, 3, 4, 5))
    assert [(column, n) for column, n, *_ in bench.observed][:2] == [("1", 1), ("1", 4)]
    assert bench.observed[1][2] == pytest.approx(as_measured("1", 4))


@in_virtual_time
async def test_those_who_come_in_the_same_turn_of_the_loop_share_the_first_run() -> None:
    bench = Bench()
    requests = [bench.submit(identity, 0.050) for identity in (1, 2)]
    assert bench.processor.runs == []
    for request in requests:
        assert (await request.settled).columns_run == ("1", "2", "3")
    assert bench.processor.runs[0][1:] == ("1", (1, 2))


@in_virtual_time
async def test_one_who_came_in_the_very_turn_of_the_stop_is_turned_away() -> None:
    bench = Bench()
    request = bench.submit(1, 0.050)
    await bench.engine.stop(1.0)
    assert (await request.settled).outcome == "stopped"
    assert bench.processor.runs == []


def busy(bench: Bench) -> float:
    return bench.engine._traffic.traffic(bench.now()).busy


@in_virtual_time
async def test_who_found_the_loop_at_work_is_counted_as_such_also_when_refused() -> None:
    bench = Bench(max_waiting=2)
    now_s = bench.now()
    bench.engine.submit(picture(1), arrived_s=now_s, deadline_s=now_s + 0.05)
    assert busy(bench) == 0
    bench.engine.submit(picture(2), arrived_s=now_s, deadline_s=now_s + 0.05, has_waited=True)
    assert busy(bench) == pytest.approx(1 / 2)
    with pytest.raises(Rejected, match="wait for their first answer"):
        bench.engine.submit(picture(3), arrived_s=now_s, deadline_s=now_s + 0.05, has_waited=True)
    assert busy(bench) == pytest.approx(2 / 3)
    with pytest.raises(Rejected):
        bench.engine.check_admission(now_s, now_s + 0.0001, has_waited=True)
    assert busy(bench) == pytest.approx(3 / 4)


@in_virtual_time
async def test_load_is_blamed_when_others_took_the_time() -> None:
    bench = Bench(policy=Anytime(answer_worth=1.0))
    first = bench.submit(1, 0.005)
    await asyncio.sleep(0.0005)
    second = bench.submit(2, 0.050)
    assert (await first.settled).stopped_by == "load"
    assert (await second.settled).columns_run == ("1", "2", "3")


@in_virtual_time
async def test_one_who_leaves_the_queue_costs_no_inference() -> None:
    bench = Bench()
    first, gone = await bench.begin(1, 0.050), bench.submit(2, 0.050)
    bench.engine.leave(gone)
    assert (await gone.settled).outcome == "disconnected"
    assert bench.engine.n_waiting == 0
    await first.settled
    assert all(2 not in identities for _, _, identities in bench.processor.runs)


@in_virtual_time
async def test_one_who_leaves_a_run_harms_no_neighbour_and_is_not_run_again() -> None:
    bench = Bench()
    await bench.begin(1, 0.050)
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
    await bench.begin(1, 0.050)
    request = bench.submit(2, 0.050)
    request.settled.cancel()
    bench.engine.leave(request)
    assert bench.engine.n_waiting == 0


@pytest.mark.parametrize("behaviour", ["raises", "short"])
def test_a_failed_run_fails_its_batch_alone(behaviour: Behaviour) -> None:
    async def test() -> None:
        bench = Bench(behaviours=("good", behaviour))
        first = await bench.begin(1, 0.050)
        batch = [bench.submit(2, 0.050), bench.submit(3, 0.050)]
        await asyncio.sleep(0.0015)
        after = bench.submit(4, 0.050)
        assert [(await request.settled).outcome for request in batch] == ["failed", "failed"]
        assert (await first.settled).columns_run == ("1", "2", "3")
        assert (await after.settled).columns_run == ("1", "2", "3")
        assert bench.failed_runs == ["1"]

    run_in_virtual_time(test)


@in_virtual_time
async def test_a_failed_refinement_leaves_the_answer_in_hand() -> None:
    bench = Bench(behaviours=("good", "raises"))
    served = await bench.submit(1, 0.050).settled
    assert (served.outcome, served.columns_run, served.stopped_by) == ("answered", ("1",), "load")
    assert bench.failed_runs == [bench.processor.runs[-1][1]]


@in_virtual_time
async def test_a_picture_for_which_a_column_has_no_numbers_fails_alone() -> None:
    bench = Bench(behaviours=("nan", "nan"))
    poisoned, other = bench.submit(1, 0.004), bench.submit(2, 0.004)
    assert (await poisoned.settled).outcome == "failed"
    served = await other.settled
    assert served.probabilities_K is not None
    assert (served.outcome, int(np.argmax(served.probabilities_K))) == ("answered", 2)
    assert bench.processor.runs[0][2] == (1, 2)
    assert bench.failed_runs == []


@in_virtual_time
async def test_a_refinement_without_numbers_leaves_the_answer_in_hand() -> None:
    bench = Bench(behaviours=("good", "nan"))
    served = await bench.submit(1, 0.050).settled
    assert (served.outcome, served.columns_run, served.stopped_by) == ("answered", ("1",), "load")
    assert served.probabilities_K is not None
    assert np.isfinite(served.probabilities_K).all()


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
    request = bench.submit(1, 0.0135)
    await asyncio.sleep(0.002)
    await bench.engine.stop(0.010)
    served = request.settled.result()
    assert (served.columns_run, served.stopped_by) == (("1",), "load")


@in_virtual_time
async def test_stopping_lets_the_run_answer_and_turns_the_waiting_away() -> None:
    bench = Bench()
    running, waiting = await bench.begin(1, 0.050), bench.submit(2, 0.050)
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
    request = await bench.begin(1, 0.050)
    await bench.engine.stop(2.0)
    assert bench.now() == pytest.approx(2.0)
    assert request.settled.result().outcome == "stopped"
    await bench.engine.stop(2.0)
    assert bench.now() == pytest.approx(2.0), "nor the second time"
    assert bench.engine.is_running


@in_virtual_time
async def test_stopping_ends_a_run_that_hangs_where_it_can_be_ended() -> None:
    bench = Bench(duration_s=lambda *_: 1e6, profile=Still(PROFILE, 0.95, preemption_s=PREEMPTION_S))
    request = await bench.begin(1, 0.050)
    await bench.engine.stop(2.0)
    assert request.settled.result().outcome == "stopped"
    assert bench.now() == pytest.approx(2.0 + PREEMPTION_S)
    assert not bench.engine.is_running


@in_virtual_time
async def test_stopping_an_idle_engine_is_immediate() -> None:
    bench = Bench()
    await bench.engine.stop(5.0)
    assert bench.now() == 0


@in_virtual_time
async def test_a_fault_in_the_policy_leaves_nobody_hanging() -> None:
    bench = Bench(policy=Watched(faults=[False, True]))
    running, waiting = await bench.begin(1, 0.050), bench.submit(2, 0.050)
    assert (await waiting.settled).outcome == "failed"
    assert (await running.settled).columns_run == ("1",)
    assert bench.engine.n_waiting == 0
    assert (await bench.submit(3, 0.050).settled).outcome == "answered"


# ---- what it learns ----


@in_virtual_time
async def test_a_server_that_is_idle_between_requests_leaves_no_accuracy_on_the_table() -> None:
    """Whoever asks is no traffic to themselves: long budgets after short ones are used to the full."""
    bench = Bench(profile=Still(PROFILE, 0.95))
    for _ in range(20):
        short = await bench.submit(1, 0.0016).settled
        await asyncio.sleep(3.0)
        long = await bench.submit(2, 0.050).settled
        await asyncio.sleep(3.0)
        assert (short.columns_run, long.columns_run) == (("1",), ("1", "2", "3"))


@in_virtual_time
async def test_it_learns_that_the_machine_has_become_slower() -> None:
    bench = Bench(duration_s=lambda column, n: 3 * as_measured(column, n))
    requests: list[tuple[int, Request]] = []
    for identity in range(150):
        with contextlib.suppress(Rejected):
            requests.append((identity, bench.submit(identity, 0.004 + 0.001 * (identity % 23))))
        await asyncio.sleep(0.0067)
    served = {identity: await request.settled for identity, request in requests}
    assert any(one.settled_s > one.deadline_s for one in served.values())
    later = [one for identity, one in served.items() if identity >= 50]
    assert len(later) > 60
    assert all(one.outcome == "answered" and one.settled_s <= one.deadline_s for one in later)
    assert bench.profile.slowdown == pytest.approx(3, rel=0.25)


@in_virtual_time
async def test_a_run_that_stalls_now_and_then_spoils_nothing_for_those_who_come_later() -> None:
    n_runs, free_again_s = 0, 0.0
    bench: Bench

    def stalling(column: str, n: int) -> float:
        nonlocal n_runs, free_again_s
        n_runs += 1
        factor = 50 if n_runs % 29 == 0 else 1
        free_again_s = bench.now() + factor * as_measured(column, n)
        return factor * as_measured(column, n)

    bench = Bench(duration_s=stalling)
    undisturbed = []
    n_disturbed = 0
    for identity in range(250):
        came_s = bench.now()
        is_free = came_s >= free_again_s
        request = bench.submit(identity, 0.030)
        await asyncio.sleep(0.031)
        assert request.settled.done() or bench.processor.is_running
        is_stalled = free_again_s > came_s + 0.030
        if is_free and not is_stalled:
            undisturbed.append(request.settled.result())
        else:
            n_disturbed += 1
    assert n_disturbed > 20
    assert len(undisturbed) > 100
    assert {served.columns_run for served in undisturbed} == {("1", "2", "3")}
    assert all(served.settled_s <= served.deadline_s for served in undisturbed)
    await bench.engine.stop(1.0)
    assert bench.engine.n_waiting == 0


@in_virtual_time
async def test_every_run_is_reported_with_its_ratio_to_what_was_predicted() -> None:
    bench = Bench(duration_s=lambda column, n: 2 * as_measured(column, n))
    await bench.submit(1, 0.050).settled
    (column, n_images, run_s, ratio), second, *_ = bench.observed
    assert (column, n_images) == ("1", 1)
    assert run_s == pytest.approx(0.002)
    assert ratio == pytest.approx(2)
    assert 1 < second[3] < 2  # the second prediction has learned from the first run


@in_virtual_time
async def test_a_run_that_failed_teaches_nothing() -> None:
    bench = Bench(duration_s=lambda *_: 0.030, behaviours=("raises",))
    assert (await bench.submit(1, 0.050).settled).outcome == "failed"
    assert bench.observed == []
    assert bench.profile.slowdown == 1


@in_virtual_time
async def test_answers_that_take_long_to_leave_raise_the_reserve() -> None:
    bench = Bench(duration_s=lambda column, n: 1.0 if column == "2" else as_measured(column, n))
    assert bench.engine.reserve_s == RESERVE_S
    for _ in range(200):
        bench.engine.observe_way_out(0.002)
    assert bench.engine.reserve_s == pytest.approx(0.002, rel=0.1)
    request = bench.submit(1, 0.020)
    served = await request.settled
    assert request.ready_by_s == pytest.approx(served.deadline_s - IN_HAND * bench.engine.reserve_s)
    assert served.settled_s == pytest.approx(request.ready_by_s)
    for _ in range(200):
        bench.engine.observe_way_out(0.050)
    assert bench.engine.reserve_s == 0.005
    with pytest.raises(Rejected, match=r"grant at least 6\.\d\d ms"):
        bench.submit(2, 0.0055)


@in_virtual_time
async def test_what_was_learnt_in_a_slow_moment_refuses_nobody_for_good() -> None:
    """Nothing would be run, so nothing be learnt any more: one refusal on an idle server, not many."""
    bench = Bench()
    for _ in range(40):
        bench.profile.observe("1", 1, 0.020)
    for _ in range(100):
        bench.engine.observe_way_out(0.004)
    await asyncio.sleep(5.0)
    with pytest.raises(Rejected):
        bench.submit(1, 0.005)
    assert (await bench.submit(1, 0.005).settled).outcome == "answered"


# ---- brief runs ----


@in_virtual_time
async def test_only_runs_that_are_predicted_to_be_brief_hold_the_loop_up() -> None:
    bench = Bench(brief_s=0.002)
    served = await bench.submit(7, 0.050).settled
    assert served.columns_run == ("1", "2", "3")
    assert served.inference_s == pytest.approx(0.012)
    assert (bench.processor.n_brief, len(bench.processor.runs)) == (1, 3)


@in_virtual_time
async def test_a_brief_run_that_fails_fails_its_request_alone() -> None:
    bench = Bench(brief_s=1.0, behaviours=("raises",))
    assert (await bench.submit(1, 0.050).settled).outcome == "failed"
    assert (await bench.submit(2, 0.050).settled).columns_run == ("1", "2", "3")


def beside(duration_s: Callable[[str, int], float] = as_measured) -> Bench:
    """Column 1 is brief, and a refinement in the thread can be preempted."""
    still = Still(PROFILE, 0.95, preemption_s=PREEMPTION_S)
    return Bench(profile=still, duration_s=duration_s, brief_s=0.0015)


@in_virtual_time
async def test_a_brief_run_is_over_when_its_request_is_in() -> None:
    bench = beside()
    request = bench.submit(7, 0.002)
    assert request.settled.result().columns_run == ("1",)
    assert bench.now() == pytest.approx(0.001)


@in_virtual_time
async def test_a_first_answer_does_not_wait_for_a_refinement() -> None:
    bench = beside()
    patient = bench.submit(1, 0.050)
    refinement = bench.processor.runs[-1]
    assert refinement[1] != "1"
    await asyncio.sleep(0.0005)
    newcomer = bench.submit(2, 0.0055)
    assert newcomer.columns_run == ("1",)  # and it may yet be refined
    assert bench.now() == pytest.approx(0.0025)
    assert (await newcomer.settled).runs[0].started_s == pytest.approx(0.0015)
    assert (await patient.settled).columns_run == ("1", "2", "3")
    assert bench.processor.n_preempted == 0  # there was time enough for a run that is slowed down
    assert [run.column for run in patient.settled.result().runs].count(refinement[1]) == 1


@in_virtual_time
async def test_a_refinement_makes_way_for_one_beside_whom_it_would_be_dangerous() -> None:
    bench = beside()
    patient = bench.submit(1, 0.050)
    await asyncio.sleep(0.0005)
    assert bench.submit(2, 0.0018).settled.result().columns_run == ("1",)
    assert bench.processor.n_preempted == 1
    assert (await patient.settled).columns_run == ("1", "2", "3")
    assert len(bench.preempted_runs) == 1


@in_virtual_time
async def test_whoever_comes_too_late_for_a_turn_after_a_refinement_is_not_kept_waiting_for_it() -> None:
    bench = beside()
    patient = bench.submit(1, 0.050)  # column 3 or 2 and 3 from 0.001 on
    await asyncio.sleep(0.0001)
    busy_until_s = 0.001 + as_measured(bench.processor.runs[-1][1], 1)
    newcomer = bench.submit(2, busy_until_s + 0.0025 - bench.now())
    assert (newcomer.settled.result().columns_run, newcomer.settled.result().stopped_by) == (("1",), "load")
    assert bench.processor.n_preempted == 0
    await patient.settled


@in_virtual_time
async def test_an_answer_in_hand_leaves_before_a_brief_run_would_make_it_late() -> None:
    bench = beside(lambda column, n: as_measured(column, n) * (1 if column == "1" else 3))
    waiting = bench.submit(1, 0.0055)  # its refinement overruns
    assert bench.processor.is_running
    await asyncio.sleep(0.0055 - IN_HAND * RESERVE_S - bench.now() - 0.0004)
    assert not waiting.settled.done()
    newcomer = bench.submit(2, 0.020)
    served = waiting.settled.result()
    assert (served.outcome, served.columns_run[0]) == ("answered", "1")
    assert served.settled_s <= 0.0055 - IN_HAND * RESERVE_S
    await newcomer.settled


@in_virtual_time
async def test_a_column_in_doubt_is_not_run_for_callers_beside_a_refinement() -> None:
    bench = beside()
    patient = bench.submit(1, 0.050)
    bench.engine._health.failed("1", IN_DOUBT, is_final=False, may_be_final=True)
    newcomer = bench.submit(2, 0.050)
    assert [column for _, column, _ in bench.processor.runs].count("1") == 1
    assert (await newcomer.settled).columns_run[0] == "1"
    blank = [batch for _, column, batch in bench.processor.runs if column == "1"]
    assert blank == [(1,), (), (2,)]
    await patient.settled


@in_virtual_time
async def test_the_end_of_a_run_is_learnt_as_it_was_and_not_as_it_was_noticed() -> None:
    bench = Bench(profile=LiveProfile(PROFILE, 0.95, preemption_s=PREEMPTION_S), brief_s=0.0015)
    patient = bench.submit(1, 0.050)
    column = bench.processor.runs[-1][1]
    took_s = as_measured(column, 1)
    await asyncio.sleep(took_s - 0.0002)
    bench.submit(2, 0.050)  # holds the loop until 0.8 ms after the end
    await patient.settled
    noticed = [one for one in bench.observed if one[0] == column]
    assert noticed[0][2] == pytest.approx(took_s)


@in_virtual_time
async def test_those_who_share_runs_are_not_run_one_by_one() -> None:
    bench = Bench(brief_s=0.002)
    together = [
        bench.engine.submit(picture(i), arrived_s=0.0, deadline_s=0.003, is_followed=True) for i in range(2)
    ]
    assert {(await one.settled).outcome for one in together} == {"answered"}
    assert [(column, batch) for _, column, batch in bench.processor.runs] == [("1", (0, 1))]


@in_virtual_time
async def test_a_brief_run_begins_at_once_also_when_time_is_scarce() -> None:
    bench = Bench(brief_s=0.002)
    for identity in range(900):
        with pytest.raises(Rejected):
            bench.submit(identity % 100, 0.0002)
    for identity in range(4):
        bench.submit(identity, 0.020)
    assert [batch for _, column, batch in bench.processor.runs if column == "1"] == [(0,), (1,), (2,), (3,)]


def crowd(bench: Bench) -> None:
    """Have nearly everybody find the event loop at work."""
    for _ in range(40):
        with pytest.raises(Rejected):
            bench.engine.check_admission(bench.now(), bench.now() + 0.0001, has_waited=True)


def crowded(brief_s: float, behaviours: tuple[Behaviour, ...] = ()) -> Bench:
    bench = Bench(brief_s=brief_s, behaviours=behaviours)
    crowd(bench)
    return bench


def submit_having_waited(bench: Bench, identity: int, budget_s: float = 0.050) -> Request:
    return bench.engine.submit(
        picture(identity), arrived_s=bench.now(), deadline_s=bench.now() + budget_s, has_waited=True
    )


@in_virtual_time
async def test_while_the_loop_is_busy_those_who_are_here_share_brief_runs_and_are_answered_between() -> None:
    bench = crowded(brief_s=0.0015)
    requests = [submit_having_waited(bench, identity) for identity in (1, 2, 3)]
    assert not bench.processor.runs
    await requests[0].settled
    assert [batch for *_, batch in bench.processor.runs] == [(1, 2)]  # one for three would not be brief
    await requests[2].settled
    assert [batch for *_, batch in bench.processor.runs] == [(1, 2), (3,)]
    assert bench.processor.n_brief == 2


@in_virtual_time
async def test_while_the_loop_is_busy_those_who_are_here_share_one_beside_a_refinement() -> None:
    bench = beside()
    patient = bench.submit(1, 0.050)
    refinement = bench.processor.runs[-1][1]
    crowd(bench)
    newcomers = [submit_having_waited(bench, identity, 0.0045) for identity in (2, 3)]
    assert {(await one.settled).outcome for one in newcomers} == {"answered"}
    assert [batch for _, column, batch in bench.processor.runs if column == "1"] == [(1,), (2, 3)]
    assert (await patient.settled).columns_run[1] == refinement
    assert bench.processor.n_preempted == 0


@pytest.mark.parametrize("behaviour", ["raises", "short"])
def test_a_shared_brief_run_that_fails_fails_those_who_shared_it_alone(behaviour: Behaviour) -> None:
    async def test() -> None:
        bench = crowded(brief_s=0.0015, behaviours=(behaviour,))
        requests = [submit_having_waited(bench, identity) for identity in (1, 2, 3)]
        assert [(await one.settled).outcome for one in requests] == ["failed", "failed", "answered"]
        assert [batch for *_, batch in bench.processor.runs] == [(1, 2), (3,)]
        assert (bench.failed_runs, bench.broken, bench.engine.n_waiting) == (["1"], [], 0)

    run_in_virtual_time(test)


@in_virtual_time
async def test_a_shared_brief_run_that_loses_the_processor_turns_the_others_away() -> None:
    bench = crowded(brief_s=0.0015, behaviours=(LOST,))
    requests = [submit_having_waited(bench, identity) for identity in (1, 2, 3)]
    assert [(await one.settled).outcome for one in requests] == ["failed", "failed", "stopped"]
    assert len(bench.broken) == 1


@in_virtual_time
async def test_those_who_wait_for_others_when_it_stops_are_turned_away() -> None:
    bench = beside()
    patient = bench.submit(1, 0.050)
    crowd(bench)
    newcomers = [submit_having_waited(bench, identity, 0.0045) for identity in (2, 3)]
    n_runs = len(bench.processor.runs)
    await bench.engine.stop(1.0)
    assert [(await one.settled).outcome for one in newcomers] == ["stopped", "stopped"]
    assert (await patient.settled).outcome == "answered"
    await asyncio.sleep(1)
    assert (len(bench.processor.runs), bench.processor.n_brief) == (n_runs, 1)


@in_virtual_time
async def test_those_who_share_a_brief_run_are_told_their_own_answers_as_they_are_there() -> None:
    bench = crowded(brief_s=0.0015)
    told: list[tuple[int, int, Served]] = []

    def submit(identity: int) -> Request:
        return bench.engine.submit(
            picture(identity),
            arrived_s=bench.now(),
            deadline_s=bench.now() + 0.050,
            has_waited=True,
            on_rung=lambda served: told.append((identity, bench.processor.n_brief, served)),
        )

    requests = [submit(identity) for identity in (1, 2, 3)]
    for request in requests:
        await request.settled
    first = [(identity, n_brief) for identity, n_brief, served in told if served.columns_run == ("1",)]
    assert first == [(1, 1), (2, 1), (3, 2)]
    for identity, _, served in told:
        assert (served.outcome, served.stopped_by, served.runs[0].n_images) == (
            *("answered", None),
            2 if identity < 3 else 1,
        )
        assert served.probabilities_K is not None
        assert served.probabilities_K.argmax() == identity


@in_virtual_time
async def test_who_is_told_an_answer_may_have_another_leave_who_shares_the_run() -> None:
    bench = crowded(brief_s=0.0015)
    requests: list[Request] = []
    now_s = bench.now()
    for identity, on_rung in ((1, lambda _: bench.engine.leave(requests[1])), (2, None)):
        requests.append(
            bench.engine.submit(
                picture(identity), arrived_s=now_s, deadline_s=0.050, has_waited=True, on_rung=on_rung
            )
        )
    assert [(await one.settled).outcome for one in requests] == ["answered", "disconnected"]
    assert [batch for _, column, batch in bench.processor.runs if column == "1"] == [(1, 2)]
    assert (bench.failed_runs, bench.engine.n_waiting) == ([], 0)


@in_virtual_time
async def test_one_who_was_to_wait_for_others_is_judged_again_if_decoding_took_its_time() -> None:
    bench = crowded(brief_s=0.0015)
    bench.engine._gathering_s = 0.0005
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    now_s, deadline_s = bench.now(), bench.now() + RESERVE_S + COST_S["1"] + 0.0006
    bench.engine.check_admission(now_s, deadline_s, has_waited=True)
    loop.work(0.0003)  # decodes
    with pytest.raises(Rejected):
        bench.engine.submit(picture(1), arrived_s=now_s, deadline_s=deadline_s, has_waited=True)


@in_virtual_time
async def test_where_no_run_is_brief_a_busy_loop_makes_no_batch_smaller() -> None:
    bench = crowded(brief_s=0.0)
    requests = [submit_having_waited(bench, identity) for identity in (1, 2, 3)]
    await requests[0].settled
    assert [batch for *_, batch in bench.processor.runs] == [(1, 2, 3)]
    assert bench.processor.n_brief == 0


@in_virtual_time
async def test_while_the_loop_is_busy_whoever_comes_is_told_of_the_wait_for_others_until_it_is_past() -> None:
    bench = crowded(brief_s=0.0015)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    budget_s = RESERVE_S + COST_S["1"] + 0.0003
    bench.engine.check_admission(bench.now(), bench.now() + budget_s)
    first = submit_having_waited(bench, 1)
    loop.work(0.004)  # for others
    await first.settled
    n_refused = 0
    while n_refused < 10:
        try:
            bench.engine.check_admission(bench.now(), bench.now() + budget_s, has_waited=True)
        except Rejected:
            n_refused += 1
            await asyncio.sleep(0.05)
        else:
            break
    assert 1 <= n_refused < 4
    assert busy(bench) > 0.7


@in_virtual_time
async def test_what_was_learnt_so_lately_is_not_doubted() -> None:
    bench = Bench()
    await bench.submit(1, 0.050, min_confidence=0.0).settled
    bench.profile.observe("1", 1, 0.5)
    slowdown = bench.profile.slowdown
    for pause_s, is_less in ((LEAST_DOUBT_S / 2, False), (LEAST_DOUBT_S, True)):
        await asyncio.sleep(pause_s)
        with pytest.raises(Rejected):
            bench.submit(2, 0.0002)
        assert (bench.profile.slowdown < slowdown) == is_less


@in_virtual_time
async def test_what_a_run_at_once_leads_to_happens_in_nobodys_name() -> None:
    bench = Bench(brief_s=0.002)
    calls: list[Callable[[], None]] = []
    bench.engine._call_now = calls.append
    bench.submit(7, 0.050)
    assert len(calls) == 1
    assert not bench.processor.runs


# ---- the thread that ships ----


def test_the_thread_that_ships_runs_what_it_is_told_and_tells_of_failures(inference: Inference) -> None:
    images_HWC = list(np.random.default_rng(3).integers(0, 256, (2, 8, 8, 3), np.uint8))
    threads: list[str] = []

    class Watching(Inference):
        def run(
            self, column: str, images_NHWC: NDArray[np.uint8], preemption: Preemption | None = None
        ) -> NDArray[np.float32]:
            threads.append(threading.current_thread().name)
            return super().run(column, images_NHWC, preemption)

    async def test() -> None:
        watching = Watching(inference.manifest, inference._sessions, provider="cpu", sha256="0" * 64)
        processor = InferenceThread(watching)
        for is_brief in (False, True):
            done = processor.start("2", images_HWC, is_brief=is_brief)
            assert done.done() == is_brief
            np.testing.assert_allclose(await done, inference.run("2", np.stack(images_HWC)), rtol=1e-5)
            with pytest.raises(KeyError):
                await processor.start("9", images_HWC, is_brief=is_brief)
        processor.start("1", images_HWC).cancel()
        assert len(await processor.start("1", images_HWC)) == 2  # nobody who gives up takes the thread along
        processor.close()

    asyncio.run(test())
    assert threads == ["inference", "inference", "MainThread", "MainThread", "inference", "inference"]


def test_who_gives_a_warm_up_up_leaves_the_thread_little_to_do(
    inference: Inference, session: BlockedSession
) -> None:
    async def test() -> None:
        sessions = dict.fromkeys(toy_artifact.COLUMNS, session)
        processor = InferenceThread(Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64))
        warming = asyncio.create_task(processor.warm_up((1, 2)))
        await asyncio.to_thread(session.started.wait, 30)
        warming.cancel()
        processor.close()
        session.released.set()
        await asyncio.to_thread(processor._thread.join, 30)
        assert set(session.n_images) == {1}

    asyncio.run(test())


# ---- leaving ----


@in_virtual_time
async def test_one_who_leaves_while_being_refined_makes_room_and_saves_the_columns_to_come() -> None:
    bench = Bench(max_waiting=2, profile=Still(PROFILE, 0.95))
    gone = bench.submit(1, 0.050)
    await asyncio.sleep(0.002)
    assert bench.processor.runs[-1][1] == "2"
    bench.engine.leave(gone)
    assert (await gone.settled).outcome == "disconnected"
    assert bench.saved_s == [pytest.approx(COST_S["3"])]
    requests = [bench.submit(identity, 0.050) for identity in (2, 3)]
    for request in requests:
        assert (await request.settled).columns_run == ("1", "2", "3")
    assert sum(1 in identities for _, _, identities in bench.processor.runs) == 2


@in_virtual_time
async def test_what_is_saved_by_one_who_leaves_is_what_would_still_have_been_run() -> None:
    bench = Bench(profile=Still(PROFILE, 0.95))
    running, waiting = await bench.begin(1, 0.050), bench.submit(2, 0.050)
    content = bench.submit(3, 0.050, min_confidence=0.3)
    bench.engine.leave(waiting)
    assert bench.saved_s.pop() == pytest.approx(sum(COST_S.values()))
    bench.engine.leave(running)  # its column 1 is being run all the same
    assert bench.saved_s.pop() == pytest.approx(COST_S["2"] + COST_S["3"])
    assert (await content.settled).columns_run == ("1",)
    bench.engine.leave(content)  # has its answer: nothing was saved
    assert sum(bench.saved_s) == 0


# ---- admission ----


@in_virtual_time
async def test_nobody_is_judged_twice_when_nothing_has_happened_in_between() -> None:
    policy = Watched()
    bench = Bench(policy=policy)
    bench.engine.check_admission(bench.now(), bench.now() + 0.050)
    bench.submit(1, 0.050)
    assert policy.n_admissions == 1
    bench.engine.check_admission(bench.now(), bench.now() + 0.040)
    bench.submit(2, 0.050)  # something has happened, and another deadline
    bench.submit(3, 0.040)
    assert policy.n_admissions == 4


@in_virtual_time
async def test_one_whose_time_has_gone_since_it_was_judged_is_rejected() -> None:
    bench = Bench()
    arrived_s, deadline_s = bench.now(), bench.now() + 0.010
    bench.engine.check_admission(arrived_s, deadline_s)
    await asyncio.sleep(0.009)  # as if its picture took this long to decode
    with pytest.raises(Rejected, match=r"1\.00 ms are left") as rejected:
        bench.engine.submit(picture(1), arrived_s=arrived_s, deadline_s=deadline_s)
    assert rejected.value.reason == "decode"


@in_virtual_time
async def test_one_whose_time_went_before_it_was_here_has_its_body_to_blame() -> None:
    bench = Bench()
    with pytest.raises(Rejected) as rejected:
        bench.engine.check_admission(bench.now() - 0.009, bench.now() + 0.001)
    assert rejected.value.reason == "body"


@in_virtual_time
async def test_a_server_that_has_become_slow_does_not_blame_its_callers() -> None:
    """Column 1 takes 20 ms now: 5 ms do not suffice any more, but would have when it was measured."""
    bench = Bench()
    for _ in range(40):
        bench.profile.observe("1", 1, 0.020)
    with pytest.raises(Rejected, match="grant at least") as rejected:
        bench.submit(1, 0.005)
    assert rejected.value.reason == "load"


# ---- overload ----

CAPACITY_HZ = SIZES[-1] / as_measured("1", SIZES[-1])
"""The most first answers that can be given in a second."""


@pytest.mark.parametrize("load", [1.5, 3.0])
def test_an_overload_is_served_as_far_as_it_goes_and_over_when_it_is_over(load: float) -> None:
    async def test() -> None:
        random, pace = np.random.default_rng(4), np.random.default_rng(5)
        spread = LatencyProfile(
            {
                column: {n: Latency(one.median_s, 1.18 * one.median_s) for n, one in by_size.items()}
                for column, by_size in PROFILE.items()
            }
        )
        bench = Bench(
            profile=LiveProfile(spread, 0.95),
            duration_s=lambda column, n: as_measured(column, n) * pace.lognormal(0.0, 0.1),
        )
        begin_s, end_s = bench.now(), bench.now() + 2.0
        requests: list[Request] = []
        longest = 0
        while bench.now() < end_s:
            with contextlib.suppress(Rejected):
                requests.append(bench.submit(len(requests) % 256, random.uniform(0.020, 0.030)))
            longest = max(longest, bench.engine.n_waiting)
            await asyncio.sleep(random.exponential(1 / (load * CAPACITY_HZ)))
        served = [await request.settled for request in requests]
        in_time = [one for one in served if one.outcome == "answered" and one.settled_s <= one.deadline_s]
        # Nobody stays for longer than the longest budget: first as one of those to be served in that time,
        # then perhaps with an answer that was to become better.
        assert longest <= 2 * 0.030 * CAPACITY_HZ + SIZES[-1]
        assert len(in_time) >= 0.9 * CAPACITY_HZ * (end_s - begin_s)
        assert len(in_time) >= 0.92 * len(served)

        await asyncio.sleep(end_s + 1.0 - bench.now())
        for identity in range(20):
            one = await bench.submit(identity, 0.025).settled
            assert one.columns_run == ("1", "2", "3")
            assert one.settled_s <= one.deadline_s
            await asyncio.sleep(0.1)

    run_in_virtual_time(test)


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
FAILS: Behaviour = "raises"
LOST = DeviceLost("CUDA failure 700: an illegal memory access was encountered")
IN_DOUBT = DeviceInDoubt("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED")
behaviours = st.lists(
    st.sampled_from([*["good"] * 12, *["raises"] * 3, *["short"] * 3, IN_DOUBT, LOST]), max_size=30
).map(tuple)
keep_warm = st.sampled_from([0.0, 0.002])
preemption = st.sampled_from([math.inf, PREEMPTION_S])
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
    policy: PolicyName = "anytime",
    learning: type[LiveProfile] = LiveProfile,
    brief_s: float = 0.0,
    keep_warm_s: float = 0.0,
    hope: float = HOPE,
    preemption_s: float = math.inf,
) -> Story:
    factors = iter(slowness * 1000)
    bench = Bench(
        profile=learning(PROFILE, quantile=0.95, preemption_s=preemption_s),
        policy=named(policy, hope=hope),
        duration_s=lambda column, n: as_measured(column, n) * next(factors),
        behaviours=behaviours,
        brief_s=brief_s,
        keep_warm_s=keep_warm_s,
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


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(arrivals, behaviours, slowness, st.none() | milliseconds, keep_warm, preemption)
def test_laws_hold_whatever_happens(
    policy: PolicyName,
    callers: list[Arrival],
    behaviours: tuple[Behaviour, ...],
    slowness: list[float],
    stop_after_s: float | None,
    keep_warm_s: float,
    preemption_s: float,
) -> None:
    async def test() -> None:
        story = await play(
            callers,
            behaviours,
            slowness,
            stop_after_s,
            policy=policy,
            keep_warm_s=keep_warm_s,
            preemption_s=preemption_s,
        )
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


@given(arrivals, behaviours, slowness, st.none() | milliseconds, keep_warm, preemption)
def test_laws_hold_with_brief_runs_too(
    callers: list[Arrival],
    behaviours: tuple[Behaviour, ...],
    slowness: list[float],
    stop_after_s: float | None,
    keep_warm_s: float,
    preemption_s: float,
) -> None:
    """Only what has to happen on time may be late by a brief run."""

    async def test() -> None:
        story = await play(
            callers,
            behaviours,
            slowness,
            stop_after_s,
            brief_s=0.0015,
            keep_warm_s=keep_warm_s,
            preemption_s=preemption_s,
        )
        assert story.served.keys() | story.refused.keys() == set(range(len(callers)))
        assert story.bench.engine.n_waiting == 0
        ran = {identity for _, _, identities in story.bench.processor.runs for identity in identities}
        assert not ran & story.refused.keys()
        for identity, served in story.served.items():
            assert (served.probabilities_K is not None) == (served.outcome == "answered")
            if served.probabilities_K is not None:
                assert served.probabilities_K.argmax() == identity
            if served.outcome == "expired":
                assert identity not in ran
            assert served.queue_s >= 0
            assert served.queue_s + served.inference_s == pytest.approx(served.settled_s - served.arrived_s)

    run_in_virtual_time(test)


@given(arrivals, keep_warm, preemption)
def test_law_whoever_is_admitted_is_answered_in_time_when_runs_take_what_was_predicted(
    callers: list[Arrival], keep_warm_s: float, preemption_s: float
) -> None:
    """The promise of column 1 holds, for whoever comes while a run keeps the processor warm, too."""

    async def test() -> None:
        # Odd budgets, so that no run ends at the very moment of a deadline: which of them then comes first
        # is up to rounding.
        staying = [Arrival(c.after_s, c.budget_s + 3e-5, None, c.min_confidence) for c in callers]
        story = await play(
            staying,
            (),
            [1.0],
            None,
            learning=Still,
            keep_warm_s=keep_warm_s,
            hope=1.0,
            preemption_s=preemption_s,
        )
        for served in story.served.values():
            assert served.outcome == "answered"
            assert served.settled_s <= served.deadline_s - RESERVE_S + 1e-9

    run_in_virtual_time(test)


@given(st.integers(15, 300).map(lambda tenths: tenths / 1e4 + 3e-5))
def test_law_an_idle_server_leaves_no_accuracy_on_the_table(budget_s: float) -> None:
    async def test() -> None:
        served = await Bench(profile=Still(PROFILE, 0.95)).submit(1, budget_s).settled
        fitting = [column for column in COST_S if COST_S[column] <= budget_s - RESERVE_S]
        assert LADDER.accuracy(served.columns_run) >= max(ACCURACY[column,] for column in fitting)
        assert served.settled_s <= served.deadline_s - RESERVE_S + 1e-9
        assert served.stopped_by in {"budget", "deepest"}

    run_in_virtual_time(test)


@in_virtual_time
async def test_where_batching_pays_as_on_a_gpu_all_who_wait_share_one_run() -> None:
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)

    def as_on_a_gpu(column: str, n_images: int) -> float:
        """A picture more costs a hundredth of the first."""
        size = next(size for size in sizes if size >= n_images)
        return COST_S[column] / 5 * (0.99 + 0.01 * size)

    measured = LatencyProfile(
        {c: {n: Latency(as_on_a_gpu(c, n), as_on_a_gpu(c, n)) for n in sizes} for c in COST_S}
    )
    bench = Bench(duration_s=as_on_a_gpu, profile=LiveProfile(measured, 0.95), max_waiting=300)
    first = await bench.begin(0, 0.005)
    others = [bench.submit(identity, 0.005) for identity in range(1, 129)]
    served = [await request.settled for request in (first, *others)]
    assert {one.outcome for one in served} == {"answered"}
    assert {len(batch) for _, column, batch in bench.processor.runs[:2]} == {1, 128}
    for identity, one in enumerate(served):
        assert one.probabilities_K is not None
        assert one.probabilities_K.argmax() == identity


# ---- kept warm ----


def blank_runs_s(bench: Bench) -> list[float]:
    """When runs on blank pictures began."""
    assert {column for _, column, batch in bench.processor.runs if not batch} <= {"1"}
    return [started_s for started_s, _, batch in bench.processor.runs if not batch]


@in_virtual_time
async def test_an_idle_processor_is_kept_warm_by_the_shallowest_column() -> None:
    bench = Bench(keep_warm_s=0.1)
    await asyncio.sleep(0.35)
    assert blank_runs_s(bench) == pytest.approx([0.1, 0.201, 0.302])


@in_virtual_time
async def test_a_processor_that_works_is_not() -> None:
    bench = Bench(keep_warm_s=0.1)
    for _ in range(6):
        await asyncio.sleep(0.06)
        await bench.submit(1, 0.050).settled
    assert blank_runs_s(bench) == []
    rested_since_s = bench.now()
    await asyncio.sleep(0.15)
    assert blank_runs_s(bench) == pytest.approx([rested_since_s + 0.1])


@in_virtual_time
async def test_without_the_setting_nothing_runs_for_nobody() -> None:
    bench = Bench()
    await asyncio.sleep(10)
    assert bench.processor.runs == []


@in_virtual_time
async def test_whoever_comes_while_it_is_kept_warm_waits_for_that_run_alone() -> None:
    bench = Bench(keep_warm_s=0.1)
    await asyncio.sleep(0.1004)
    assert bench.processor.is_running
    request = bench.submit(1, 0.050)
    served = await request.settled
    assert served.columns_run == ("1", "2", "3")
    assert served.queue_s == pytest.approx(0.0006)
    assert len(blank_runs_s(bench)) == 1


@in_virtual_time
async def test_whoever_cannot_wait_for_that_run_is_refused_at_once() -> None:
    bench = Bench(keep_warm_s=0.1)
    await asyncio.sleep(0.1004)
    with pytest.raises(Rejected):
        bench.submit(1, 0.0006 + 0.001 + RESERVE_S - 1e-5)
    assert (await bench.submit(2, 0.0006 + 0.001 + RESERVE_S + 1e-5).settled).outcome == "answered"


@in_virtual_time
async def test_what_keeps_it_warm_is_counted_only_if_it_fails_and_teaches_nothing() -> None:
    bench = Bench(keep_warm_s=0.1, duration_s=lambda *_: 0.040, behaviours=("good", "good", FAILS))
    await asyncio.sleep(1)
    assert len(blank_runs_s(bench)) > 3
    assert (bench.observed, bench.profile.slowdown) == ([], 1.0)
    assert bench.failed_runs == ["1"]


@in_virtual_time
async def test_a_server_that_stops_is_not_kept_warm() -> None:
    bench = Bench(keep_warm_s=0.1)
    await asyncio.sleep(0.1004)
    await bench.engine.stop(1.0)
    assert bench.now() == pytest.approx(0.101)  # the run in progress ends first
    await asyncio.sleep(1)
    assert len(blank_runs_s(bench)) == 1


# ---- broken ----


@in_virtual_time
async def test_a_lost_gpu_fails_its_run_and_turns_everybody_else_away_at_once() -> None:
    bench = Bench(behaviours=(LOST,))
    running, waiting = await bench.begin(1, 0.050), bench.submit(2, 0.050)
    assert (await running.settled).outcome == "failed"
    assert waiting.settled.result().outcome == "stopped"
    assert bench.now() == pytest.approx(0.001)
    with pytest.raises(Stopped):
        bench.submit(3, 0.050)
    assert bench.engine.is_stopping
    assert bench.broken == [f"the GPU is lost: {LOST}"]
    await bench.engine.stop(1.0)
    assert (len(bench.processor.runs), len(bench.broken)) == (1, 1)


@pytest.mark.parametrize("again", [IN_DOUBT, LOST, FAILS])
def test_a_gpu_that_may_be_lost_is_tried_at_once_and_is_if_that_fails(again: Behaviour) -> None:
    async def test() -> None:
        bench = Bench(behaviours=(IN_DOUBT, again))
        running, waiting = await bench.begin(1, 0.050), bench.submit(2, 0.050)
        assert (await running.settled).outcome == "failed"
        assert bench.broken == []
        assert (await waiting.settled).outcome == "stopped"
        assert [batch for _, _, batch in bench.processor.runs] == [(1,), ()]
        assert len(bench.broken) == 1

    run_in_virtual_time(test)


@in_virtual_time
async def test_a_gpu_that_might_have_been_lost_and_is_not_goes_on() -> None:
    bench = Bench(behaviours=(IN_DOUBT, "good") * N_FAILURES)
    for identity in range(N_FAILURES):
        assert (await bench.submit(identity, 0.050).settled).outcome == "failed"
    assert (await bench.submit(9, 0.050).settled).columns_run == ("1", "2", "3")
    assert len(blank_runs_s(bench)) == N_FAILURES
    assert bench.broken == []


@in_virtual_time
async def test_a_gpu_that_somebody_else_has_lost_turns_everybody_away_at_once() -> None:
    bench = Bench()
    running, waiting = await bench.begin(1, 0.050), bench.submit(2, 0.050)
    bench.engine.give_up("somebody said so")
    assert waiting.settled.result().outcome == "stopped"
    with pytest.raises(Stopped):
        bench.submit(3, 0.050)
    assert (await running.settled).outcome == "answered"
    assert bench.broken == ["somebody said so"]


@in_virtual_time
async def test_a_gpu_that_is_lost_while_nobody_is_here_is_noticed() -> None:
    bench = Bench(keep_warm_s=0.1, behaviours=("good", LOST))
    await asyncio.sleep(0.25)
    assert bench.broken == [f"the GPU is lost: {LOST}"]
    await asyncio.sleep(1)
    assert len(blank_runs_s(bench)) == 2


@in_virtual_time
async def test_a_column_that_fails_on_a_blank_picture_as_well_is_broken() -> None:
    bench = Bench(behaviours=(FAILS,) * (N_FAILURES + 1))
    for identity in range(N_FAILURES):
        assert (await bench.submit(identity, 0.050).settled).outcome == "failed"
        assert bench.broken == []
    waiting = bench.submit(9, 0.050)
    assert (await waiting.settled).outcome == "stopped"
    assert [batch for _, _, batch in bench.processor.runs] == [(0,), (1,), (2,), ()]
    assert bench.broken == [
        "column 1 failed 4 times in a row, at last on a blank picture: this run was told to fail"
    ]
    assert bench.failed_runs == ["1"] * 4


@in_virtual_time
async def test_pictures_that_make_a_column_fail_break_nothing() -> None:
    """Or whoever sends them could have the server started anew as often as he likes."""
    bench = Bench(behaviours=(*[FAILS] * N_FAILURES, "good"))
    for identity in range(N_FAILURES):
        assert (await bench.submit(identity, 0.050).settled).outcome == "failed"
    assert (await bench.submit(9, 0.050).settled).columns_run == ("1", "2", "3")
    assert len(blank_runs_s(bench)) == 1
    assert bench.broken == []


@in_virtual_time
async def test_failures_that_are_not_in_a_row_break_nothing() -> None:
    bench = Bench(behaviours=(FAILS, FAILS, "good", "good", "good") * 5)
    for identity in range(15):
        await bench.submit(identity, 0.050).settled
    assert blank_runs_s(bench) == []
    assert bench.failed_runs == ["1"] * 10


@in_virtual_time
async def test_a_deeper_column_that_fails_is_tried_itself() -> None:
    bench = Bench(behaviours=("good", FAILS) * N_FAILURES + (FAILS,))
    for identity in range(N_FAILURES):
        served = await bench.submit(identity, 0.050).settled
        assert (served.outcome, served.columns_run) == ("answered", ("1",))
    await asyncio.sleep(1)
    assert bench.processor.runs[-1][1:] == (bench.processor.runs[1][1], ())
    assert len(bench.broken) == 1


@in_virtual_time
async def test_a_run_that_hangs_breaks_the_engine() -> None:
    bench = Bench(behaviours=("good", "good", "good", "hangs"))
    await bench.submit(1, 0.050).settled
    await asyncio.sleep(RUN_TIMEOUT_S * 0.9)
    request = await bench.begin(2, 60.0)
    began_s, waiting = bench.now(), bench.submit(3, 60.0)
    assert (await waiting.settled).outcome == "stopped"
    assert bench.now() == pytest.approx(began_s + RUN_TIMEOUT_S)
    assert bench.broken == ["a run of column 1 has not ended for 10 s"]
    await bench.engine.stop(2.0)
    assert request.settled.result().outcome == "stopped"


@in_virtual_time
async def test_an_engine_that_stopped_leaves_no_timer_behind() -> None:
    """A timer would hold a version that was replaced, and its sessions, in memory."""
    bench = Bench(keep_warm_s=0.1)
    await bench.submit(1, 0.050).settled
    await bench.engine.stop(1.0)
    loop: Any = asyncio.get_running_loop()
    assert all(timer.cancelled() for timer in loop._scheduled)


def test_probabilities_of_the_fake_are_probabilities() -> None:
    """The fake obeys the contract that the engine relies on."""
    fake = FakeProcessor(as_measured)
    probabilities_K = fake.combine(("1",), [np.eye(256, dtype=np.float32)[3]])
    assert probabilities_K.sum() == pytest.approx(1)
