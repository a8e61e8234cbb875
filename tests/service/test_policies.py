"""The policies that the one that ships is compared with: each by example, all by law."""

import pytest
from hypothesis import given

from service.ladder import Ladder
from service.latency import Latency, LatencyProfile
from service.policies import POLICY_NAMES, PolicyName, named
from service.scheduling import Admission, Anytime, Plan
from service.waiting import Queue, Ticket, Traffic
from tests.service.strategies import (
    GAIN,
    LADDER,
    MS,
    NO_GAIN,
    ladders,
    profile_of,
    profiles,
    queues,
    ticket,
    traffics,
)

BASELINES = [name for name in POLICY_NAMES if name != "anytime"]


def plan(
    name: PolicyName, waiting: list[Ticket], profile: LatencyProfile, now_s: float = 0.0
) -> Plan[Ticket]:
    return named(name, hope=1.0).plan(Queue(LADDER, waiting), now_s, profile, LADDER)


def admit(name: PolicyName, ready_by_ms: float, *waiting: Ticket) -> Admission:
    return named(name, hope=1.0).admit(ready_by_ms / 1e3, 0.0, 0.0, Queue(LADDER, waiting), NO_GAIN, LADDER)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_name_is_a_policy_that_serves_one_who_has_time(name: PolicyName) -> None:
    one = ticket(100)
    assert plan(name, [one], NO_GAIN).batch == (one,)
    assert admit(name, 100).is_accepted
    assert not admit(name, 0.5).is_accepted


def test_the_policy_that_ships_weighs_answers_as_it_is_told() -> None:
    policy, heavy = named("anytime", 0.0), named("anytime", 1e9)
    assert isinstance(policy, Anytime)
    answered, short = Queue(LADDER, [ticket(50, "1")]), Traffic(100.0, (0.003,))
    assert policy.plan(answered, 0.0, NO_GAIN, LADDER, short).column is not None
    assert heavy.plan(answered, 0.0, NO_GAIN, LADDER, short).column is None
    busy = Traffic(rate_hz=500.0, busy=0.9)
    assert policy.plan(answered, 0.0, NO_GAIN, LADDER, busy).column is None
    assert named("anytime", refine_below=0.9).plan(answered, 0.0, NO_GAIN, LADDER, busy).column is not None


@pytest.mark.parametrize(
    ("name", "column"),
    [("fixed-shallow", "1"), ("fixed-deep", None), ("deepest-fit", "2"), ("slackfit", "2")],
)
def test_each_has_its_own_column_for_a_slack_of_five_milliseconds(
    name: PolicyName, column: str | None
) -> None:
    assert plan(name, [ticket(5)], NO_GAIN).column == column


def test_one_past_help_keeps_nobody_waiting() -> None:
    hurried, relaxed = ticket(5), ticket(100)
    assert plan("fixed-deep", [hurried, relaxed], NO_GAIN).batch == (relaxed,)


@pytest.mark.parametrize("name", BASELINES)
def test_whoever_has_an_answer_is_done(name: PolicyName) -> None:
    answered = ticket(100, "1")
    decided = plan(name, [answered], NO_GAIN)
    assert (decided.column, decided.finished) == (None, ((answered, "deepest"),))


@pytest.mark.parametrize("name", ["fixed-shallow", "fixed-deep", "deepest-fit"])
def test_first_come_first_served_whatever_the_deadline(name: PolicyName) -> None:
    first, second = ticket(90), ticket(20)
    assert plan(name, [first, second], NO_GAIN).batch == (first,)


def test_slackfit_serves_the_earliest_deadline_first() -> None:
    first, second = ticket(90), ticket(20)
    assert plan("slackfit", [first, second], NO_GAIN).batch == (second, first)


@pytest.mark.parametrize(
    ("name", "column"), [("fixed-shallow", "1"), ("fixed-deep", "3"), ("deepest-fit", "3")]
)
def test_batches_where_that_is_cheaper_and_in_time_for_each(name: PolicyName, column: str) -> None:
    waiting = [ticket(60 + i) for i in range(6)]
    assert plan(name, waiting, GAIN).batch == tuple(waiting[:4])
    assert plan(name, waiting, NO_GAIN).batch == tuple(waiting[:1])
    hurried = ticket(MS[column] * 1.15)  # a batch of two takes 1.1 times as long as one, of four 1.3
    for place in (0, 2):
        one_hurried = [*waiting[:place], hurried, *waiting[place:]]
        assert plan(name, one_hurried, GAIN).batch == tuple(one_hurried[:2])


def test_deepest_fit_counts_with_the_high_quantile() -> None:
    erratic = profile_of(MS, high=2.0)
    assert plan("deepest-fit", [ticket(9)], erratic).column == "2"
    assert plan("deepest-fit", [ticket(16)], erratic).column == "3"
    assert plan("deepest-fit", [ticket(1.5)], erratic).column == "1"


# Two columns and two sizes from 1 to 11 ms: ten buckets of one millisecond.
TWO = Ladder(("1", "2"), {("1",): 0.8, ("2",): 0.9})
OPTIONS = LatencyProfile(
    {
        "1": {1: Latency(0.001, 0.001), 4: Latency(0.0031, 0.0031)},
        "2": {1: Latency(0.0035, 0.0035), 4: Latency(0.011, 0.011)},
    }
)


@pytest.mark.parametrize(
    ("slack_ms", "n_waiting", "column", "n"),
    [
        pytest.param(2.0, 9, "1", 1, id="only the least fits"),
        pytest.param(3.2, 9, "1", 4, id="the bucket that the slack reaches"),
        pytest.param(3.6, 9, "1", 4, id="in one bucket the larger batch wins over the more accurate column"),
        pytest.param(3.6, 1, "2", 1, id="a batch that cannot be filled is no option"),
        pytest.param(12.0, 9, "2", 4, id="the highest bucket"),
    ],
)
def test_slackfit_takes_the_largest_batch_of_the_bucket_of_the_slack(
    slack_ms: float, n_waiting: int, column: str, n: int
) -> None:
    waiting = [ticket(slack_ms + i) for i in range(n_waiting)]
    decided = named("slackfit").plan(Queue(TWO, waiting), 0.0, OPTIONS, TWO)
    assert (decided.column, decided.batch) == (column, tuple(waiting[:n]))


def test_baselines_admit_whoever_their_least_run_would_serve_on_an_idle_server() -> None:
    ahead = [ticket(2) for _ in range(9)]
    assert admit("fixed-shallow", 2, *ahead).is_accepted
    assert not admit("fixed-deep", 7.9, *ahead).is_accepted
    assert admit("fixed-deep", 8.1, *ahead).is_accepted
    assert admit("deepest-fit", 1.1, *ahead).is_accepted
    assert admit("slackfit", 1.1, *ahead).is_accepted
    assert admit("fixed-deep", 7.9).needs_s == pytest.approx(0.008)


COLUMN_OF_LEAST: dict[PolicyName, int] = {"fixed-deep": -1}
"""Place of the column that a request must at least have time for; 0 for the others."""


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(queues, profiles(), ladders(), traffics)
def test_law_none_runs_a_ticket_that_it_cannot_serve_in_time(
    name: PolicyName, waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    decided = named(name, hope=1.0).plan(Queue(ladder, waiting), 0.0, profile, ladder, traffic)
    assert (decided.column is None) == (not decided.batch)
    if decided.column is not None:
        latency = profile.latency(decided.column, len(decided.batch))
        assert all(latency.median_s <= member.ready_by_s for member in decided.batch)
        if len(decided.batch) > 1 and not any(member.columns_run for member in decided.batch):
            assert all(latency.high_s <= member.ready_by_s for member in decided.batch)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(queues, profiles(), ladders())
def test_law_none_lets_one_wait_in_vain_who_could_be_served(
    name: PolicyName, waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    """As long as anyone without an answer has time for the column that is meant for them, something runs."""
    column = COLUMN_OF_LEAST.get(name, 0)
    least_s = profile.latency(ladder.columns[column], 1).median_s
    decided = named(name).plan(Queue(ladder, waiting), 0.0, profile, ladder)
    if any(not one.columns_run and one.ready_by_s >= least_s for one in waiting):
        assert decided.batch


@pytest.mark.parametrize("name", BASELINES)
@given(queues, profiles(), ladders())
def test_law_baselines_run_nobody_twice_and_finish_everyone_with_an_answer(
    name: PolicyName, waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    decided = named(name).plan(Queue(ladder, waiting), 0.0, profile, ladder)
    assert not any(member.columns_run for member in decided.batch)
    assert len(set(decided.batch)) == len(decided.batch)
    assert {one for one, _ in decided.finished} == {one for one in waiting if one.columns_run}
