"""The queue against a naive one; what traffic costs against summing it up bit by bit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.ladder import ConfidenceTable, Ladder
from service.waiting import N_LOOKED_AT, NO_TRAFFIC, Queue, Ticket, Traffic, TrafficMonitor
from tests.fakes import ACCURACY
from tests.service.strategies import LADDER, ladders, ticket, tickets, traffics

# ---- tickets and the queue ----


@pytest.mark.parametrize(
    ("waiting", "is_content"),
    [
        (ticket(9, "1", confidence=0.9), False),
        (ticket(9, "1", confidence=0.9, min_confidence=0.9), True),
        (ticket(9, "1", confidence=0.89, min_confidence=0.9), False),
    ],
)
def test_a_caller_is_content_with_the_confidence_that_was_asked_for(
    waiting: Ticket, is_content: bool
) -> None:
    assert waiting.is_content == is_content


def test_a_queue_is_kept_by_deadline_and_answers_by_kind() -> None:
    table = ConfidenceTable(("1",), (0.0, 0.8, 1.0), (9, 9), {("1",): (0.5, 0.9)})
    ladder = Ladder(("1", "2", "3"), ACCURACY, [table])
    late, early = ticket(30), ticket(20)
    sure, unsure, surer = (ticket(t, "1", confidence=c) for t, c in ((50, 0.9), (10, 0.5), (40, 0.95)))
    content, deepest = ticket(60, "1", min_confidence=0.0), ticket(70, "1", "2", "3")
    queue = Queue(ladder, [late, sure, early, unsure, content, surer, deepest])
    assert queue.unanswered == [early, late]
    assert queue.answered == {
        (("1",), 1): [surer, sure],
        (("1",), 0): [unsure],
        None: [content, deepest],
    }
    assert list(queue) == [late, sure, early, unsure, content, surer, deepest]


def test_one_who_is_not_here_cannot_be_taken_away() -> None:
    queue = Queue(LADDER, [ticket(5)])
    with pytest.raises(KeyError):
        queue.remove(ticket(5))
    assert len(queue) == 1


class QueueBesideANaiveOne(RuleBasedStateMachine):
    """Adds and removes at random, equal deadlines among them, and compares with a plain list."""

    @initialize(ladder=ladders())
    def begin(self, ladder: Ladder) -> None:
        self.ladder = ladder
        self.queue = Queue[Ticket](ladder)
        self.here: list[Ticket] = []

    @rule(one=tickets, place_s=st.none() | st.sampled_from([0.0, 0.01, 0.02]))
    def add(self, one: Ticket, place_s: float | None) -> None:
        added = Ticket(
            one.ready_by_s if place_s is None else place_s,
            one.min_confidence,
            one.columns_run,
            one.confidence,
        )
        self.queue.add(added)
        self.here.append(added)

    @precondition(lambda self: self.here)
    @rule(which=st.integers(0, 1000))
    def remove(self, which: int) -> None:
        gone = self.here.pop(which % len(self.here))
        self.queue.remove(gone)
        assert gone not in self.queue

    @invariant()
    def both_hold_the_same(self) -> None:
        assert list(self.queue) == self.here
        assert len(self.queue) == len(self.here)
        assert all(one in self.queue for one in self.here)
        first = [one for one in self.here if not one.columns_run]
        assert set(self.queue.unanswered) == set(first)
        assert all(self.queue.answered.values())
        for same in (self.queue.unanswered, *self.queue.answered.values()):
            by_s = [one.ready_by_s for one in same]
            assert by_s == sorted(by_s)

    @invariant()
    def kinds_are_what_they_say(self) -> None:
        answered = [(kind, one) for kind, same in self.queue.answered.items() for one in same]
        assert len(answered) + len(self.queue.unanswered) == len(self.here)
        for kind, one in answered:
            assert one.columns_run
            is_done = one.min_confidence is not None and one.confidence >= one.min_confidence
            if kind is None:
                assert is_done or not self.ladder.improvements(one.columns_run)
            else:
                assert kind == (one.columns_run, self.ladder.row(one.columns_run, one.confidence))
                assert not is_done
                assert self.ladder.improvements(*kind)


TestQueueBesideANaiveOne = QueueBesideANaiveOne.TestCase

# ---- traffic ----


def test_nobody_comes_nobody_is_lost() -> None:
    assert NO_TRAFFIC.losses(1.0, 0.1) == 0
    assert Traffic(100.0, ()).losses(1.0, 0.1) == 0
    assert Traffic(0.0, (0.2,)).losses(1.0, 0.1) == 0


def test_those_are_lost_who_have_no_time_left_when_the_run_is_over() -> None:
    """A run of 8 ms and a column of 1 ms: with 5 ms of slack those are lost who come in its first 4 ms."""
    assert Traffic(1000.0, (0.005,)).losses(0.008, 0.001) == pytest.approx(4)
    assert Traffic(1000.0, (0.005, 0.009)).losses(0.008, 0.001) == pytest.approx(2)
    assert Traffic(1000.0, (0.0005,)).losses(0.008, 0.001) == 0  # would have been lost anyway


def test_a_short_wait_costs_some_of_those_whose_time_is_short() -> None:
    """Column 1 takes 1 to 2 ms. Who has 1.5 ms is in time every other time, after 0.2 ms in 3 of 10."""
    assert Traffic(1000.0, (0.0015,)).losses_hz(0.0002, 0.001, 0.002) == pytest.approx(200)
    assert Traffic(1000.0, (0.0015, 0.050)).losses_hz(0.0002, 0.001, 0.002) == pytest.approx(100)
    assert Traffic(1000.0, (0.0009,)).losses_hz(0.0002, 0.001, 0.002) == 0  # would have been lost anyway
    assert Traffic(1000.0, (0.0021,)).losses_hz(0.0002, 0.001, 0.002) == pytest.approx(100)
    assert Traffic(1000.0, (0.0022,)).losses_hz(0.0002, 0.001, 0.002) == 0
    assert NO_TRAFFIC.losses_hz(0.0002, 0.001, 0.002) == 0


def test_a_few_of_many_who_wait_count_for_all_of_them() -> None:
    many = Traffic(1000.0, (0.0015,) * 10 * N_LOOKED_AT)
    assert many.losses_hz(0.0002, 0.001, 0.002) == pytest.approx(200, rel=0.15)


@given(traffics, st.floats(1e-5, 0.01), st.floats(0, 0.05), st.floats(1e-4, 0.02))
def test_law_a_few_who_wait_stand_for_all(
    traffic: Traffic, wait_s: float, least_s: float, width_s: float
) -> None:
    def in_time(left_s: float) -> float:
        return min(max((left_s - least_s) / width_s, 0.0), 1.0)

    most_s = least_s + width_s
    at_risk = [s for s in traffic.slacks_s if least_s <= s < most_s + wait_s]
    losses = [in_time(s) - in_time(s - wait_s) for s in at_risk]
    expected_hz = traffic.rate_hz * sum(losses) / max(1, len(traffic.slacks_s))
    found_hz = traffic.losses_hz(wait_s, least_s, most_s)
    if len(at_risk) < N_LOOKED_AT:
        assert found_hz == pytest.approx(expected_hz, abs=1e-6)
    assert 0 <= found_hz <= traffic.rate_hz * min(1.0, wait_s / width_s) * (1 + 1 / N_LOOKED_AT) + 1e-9


@given(traffics, st.floats(0, 0.1), st.floats(1e-4, 0.02))
def test_law_losses_are_what_summing_up_over_arrivals_gives(
    traffic: Traffic, run_s: float, column_1_s: float
) -> None:
    n_steps = 2000
    lost = 0
    for slack_s in traffic.slacks_s:
        for step in range(n_steps):
            left_of_run_s = run_s * (step + 0.5) / n_steps
            lost += column_1_s <= slack_s < left_of_run_s + column_1_s
    n_arrivals = traffic.rate_hz * run_s
    expected = n_arrivals * lost / n_steps / max(1, len(traffic.slacks_s))
    assert traffic.losses(run_s, column_1_s) == pytest.approx(expected, abs=1e-9 + n_arrivals / n_steps)


@given(traffics, st.floats(0, 0.1), st.floats(0, 0.1), st.floats(1e-4, 0.02))
def test_law_a_longer_run_loses_no_fewer_and_more_per_second(
    traffic: Traffic, one_s: float, other_s: float, column_1_s: float
) -> None:
    shorter_s, longer_s = sorted((one_s, other_s))
    shorter, longer = (traffic.losses(run_s, column_1_s) for run_s in (shorter_s, longer_s))
    assert 0 <= shorter <= longer + 1e-9
    assert shorter * longer_s <= longer * shorter_s + 1e-9


# ---- the monitor ----


@pytest.mark.parametrize("rate_hz", [20.0, 500.0, 10_000.0])
def test_steady_arrivals_are_seen_as_what_they_are(rate_hz: float) -> None:
    monitor, now_s = TrafficMonitor(window_s=0.25), 100.0
    for _ in range(int(2 * rate_hz)):
        now_s += 1 / rate_hz
        monitor.arrived(now_s, 0.01)
    assert monitor.traffic(now_s).rate_hz == pytest.approx(rate_hz, rel=0.15)


def test_one_who_comes_alone_is_no_traffic() -> None:
    monitor = TrafficMonitor(window_s=0.25)
    assert monitor.traffic(0.0) == NO_TRAFFIC
    monitor.arrived(5.0, 0.01)
    assert monitor.traffic(5.0).rate_hz == 0
    assert monitor.traffic(5.0).slacks_s == (0.01,)
    monitor.arrived(5.0, 0.02)
    assert monitor.traffic(5.0).rate_hz == pytest.approx(1 / 0.25)


def test_what_was_fades_when_it_becomes_quiet() -> None:
    monitor = TrafficMonitor(window_s=0.25)
    for step in range(1000):
        monitor.arrived(step / 1000, 0.01)
    busy_hz = monitor.traffic(1.0).rate_hz
    assert monitor.traffic(1.25).rate_hz == pytest.approx(busy_hz / math.e)
    assert monitor.traffic(3.0).rate_hz < 1
    assert monitor.traffic(1.0).rate_hz == busy_hz  # asking changes nothing


def test_a_clock_that_seems_to_go_back_raises_nothing_to_the_skies() -> None:
    monitor = TrafficMonitor(window_s=0.25)
    for now_s in (5.0, 5.0, 4.0):
        monitor.arrived(now_s, 0.01)
    assert monitor.traffic(1.0).rate_hz <= 3 / 0.25


def test_how_many_found_the_loop_at_work_is_known_of_late() -> None:
    monitor, now_s = TrafficMonitor(window_s=0.25), 100.0
    for n in range(1000):
        now_s += 1e-3
        monitor.arrived(now_s, 0.01, has_waited=n % 5 < 3)
    assert monitor.traffic(now_s).busy == pytest.approx(0.6, abs=0.02)
    for _ in range(250):
        now_s += 1e-3
        monitor.arrived(now_s, 0.01)
    assert monitor.traffic(now_s).busy == pytest.approx(0.6 / math.e, abs=0.02)
    monitor.arrived(now_s + 10, 0.01)  # who comes after a silence finds nobody
    assert monitor.traffic(now_s + 10).busy == pytest.approx(0, abs=1e-9)


def test_one_who_had_to_wait_makes_a_loop_no_busier_than_all_the_time() -> None:
    monitor = TrafficMonitor()
    assert monitor.traffic(1.0).busy == 0
    monitor.arrived(1.0, 0.01, has_waited=True)
    assert monitor.traffic(1.0).busy == 1


@given(st.lists(st.floats(-1, 1), max_size=40), st.integers(1, 10))
def test_law_the_latest_slacks_are_kept_ascending(slacks_s: list[float], n: int) -> None:
    monitor = TrafficMonitor(n_slacks=n)
    for now_s, slack_s in enumerate(slacks_s):
        monitor.arrived(float(now_s), slack_s)
    assert monitor.traffic(0.0).slacks_s == tuple(sorted(slacks_s[-n:]))
