"""The policy by example and by law, over random queues, profiles and ladders."""

from collections.abc import Mapping
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduling import (
    STOPPED_BY,
    Ladder,
    Latency,
    LatencyProfile,
    Ticket,
    admit,
    backlog_s,
    plan,
    stopped_by,
)
from tests.fakes import ACCURACY

LADDER = Ladder(("1", "2", "3"), ACCURACY)


def profile_of(
    singles_ms: Mapping[str, float],
    *,
    per_image: float = 1.0,
    high: float = 1.0,
    sizes: tuple[int, ...] = (1, 2, 4),
) -> LatencyProfile:
    """Each further image of a batch costs `per_image` of the first; the high quantile is `high` medians."""
    return LatencyProfile(
        {
            column: {
                n: Latency(median, median * high)
                for n in sizes
                for median in [ms / 1e3 * (1 + per_image * (n - 1))]
            }
            for column, ms in singles_ms.items()
        }
    )


MS = {"1": 1.0, "2": 3.0, "3": 8.0}
NO_GAIN = profile_of(MS)
GAIN = profile_of(MS, per_image=0.1)


def ticket(ready_by_ms: float, *columns_run: str, **fields: float) -> Ticket:
    return Ticket(ready_by_ms / 1e3, columns_run=columns_run, **fields)


def test_nothing_waits_nothing_runs() -> None:
    assert plan([], 0.0, NO_GAIN, LADDER).column is None


def test_one_without_an_answer_goes_before_any_refinement() -> None:
    answered, fresh = ticket(20, "1"), ticket(100)
    decided = plan([answered, fresh], 0.0, NO_GAIN, LADDER)
    assert (decided.column, decided.batch) == ("1", (fresh,))


def test_earliest_deadline_goes_first() -> None:
    late, early = ticket(30), ticket(20)
    assert plan([late, early], 0.0, NO_GAIN, LADDER).batch == (early,)


def test_batches_only_where_that_is_cheaper_per_image() -> None:
    tickets = [ticket(100 + i) for i in range(6)]
    assert plan(tickets, 0.0, GAIN, LADDER).batch == tuple(tickets[:4])
    assert plan(tickets, 0.0, NO_GAIN, LADDER).batch == tuple(tickets[:1])


def test_a_batch_never_costs_its_earliest_ticket_the_deadline() -> None:
    hurried, relaxed = ticket(1.05), ticket(100)
    assert plan([hurried, relaxed], 0.0, GAIN, LADDER).batch == (hurried,)


def test_a_ticket_past_help_blocks_nobody() -> None:
    hopeless, answered = ticket(0.5), ticket(100, "1")
    decided = plan([hopeless, answered], 0.0, NO_GAIN, LADDER)
    assert (decided.column, decided.batch) == ("2", (answered,))


@pytest.mark.parametrize(
    ("slack_ms", "column"),
    [
        pytest.param(1.0, "1", id="column 1 alone fits"),
        pytest.param(3.5, "2", id="column 2 fits, but not after column 1"),
        pytest.param(4.5, "1", id="columns 1 and 2 fit"),
        pytest.param(8.5, "3", id="column 3 fits, but not after column 1"),
        pytest.param(10.0, "1", id="columns 1 and 3 fit"),
        pytest.param(50.0, "1", id="everything fits"),
    ],
)
def test_a_request_alone_opens_towards_the_most_accurate_answer(slack_ms: float, column: str) -> None:
    assert plan([ticket(slack_ms)], 0.0, NO_GAIN, LADDER).column == column


def test_opens_deep_only_if_the_high_quantile_fits() -> None:
    erratic = profile_of(MS, high=2.0)
    assert plan([ticket(9.5)], 0.0, erratic, LADDER).column == "1"


def test_refines_towards_the_most_accurate_combination_that_fits() -> None:
    assert plan([ticket(8.5, "1")], 0.0, NO_GAIN, LADDER).column == "3"
    assert plan([ticket(13.0, "1")], 0.0, NO_GAIN, LADDER).column == "2"
    assert plan([ticket(5.0, "1")], 0.0, NO_GAIN, LADDER).column == "2"


def test_tickets_that_want_the_same_column_share_a_refinement() -> None:
    first, other, second = ticket(9.0, "1"), ticket(9.5, "1", "2"), ticket(50.0, "1")
    third = ticket(13.0, "1", "2")
    decided = plan([first, other, second, third], 0.0, GAIN, LADDER)
    assert (decided.column, decided.batch) == ("3", (first, other))


@pytest.mark.parametrize(
    ("waiting", "reason"),
    [
        pytest.param(ticket(50, "1", "2", "3"), "deepest", id="nothing deeper"),
        pytest.param(ticket(2.0, "1"), "budget", id="nothing fits"),
        pytest.param(ticket(2.0, "1", lost_s=0.002), "load", id="would have fitted alone"),
        pytest.param(ticket(50, "1", confidence=0.9, min_confidence=0.9), "confidence", id="content"),
    ],
)
def test_says_why_an_answer_is_final(waiting: Ticket, reason: str) -> None:
    decided = plan([waiting], 0.0, NO_GAIN, LADDER)
    assert decided.finished == ((waiting, reason),)
    assert decided.column is None


def test_a_rung_that_is_no_more_accurate_is_not_run() -> None:
    flat = Ladder(("1", "2"), {("1",): 0.9, ("2",): 0.8, ("1", "2"): 0.9})
    decided = plan([ticket(50, "1")], 0.0, NO_GAIN, flat)
    assert [reason for _, reason in decided.finished] == ["deepest"]


def test_an_unmeasured_combination_is_worth_its_deepest_column() -> None:
    assert LADDER.accuracy(("2", "3")) == ACCURACY["3",]


class TestAdmission:
    def test_an_idle_server_takes_what_column_1_can_serve(self) -> None:
        assert admit(1.001, 1.0, 0.0, [], NO_GAIN, LADDER).is_accepted
        assert not admit(1.0009, 1.0, 0.0, [], NO_GAIN, LADDER).is_accepted

    def test_it_counts_with_the_high_quantile(self) -> None:
        assert not admit(0.0015, 0.0, 0.0, [], profile_of(MS, high=2.0), LADDER).is_accepted

    def test_the_run_in_progress_comes_first(self) -> None:
        refused = admit(0.005, 0.0, 0.0045, [], NO_GAIN, LADDER)
        assert not refused.is_accepted
        assert refused.needs_s == pytest.approx(0.0055)

    def test_only_earlier_deadlines_without_an_answer_come_first(self) -> None:
        ahead, behind, answered = ticket(4), ticket(40), ticket(3, "1")
        assert admit(0.005, 0.0, 0.0, [ahead] * 4 + [behind, answered], NO_GAIN, LADDER).is_accepted
        assert not admit(0.005, 0.0, 0.0, [ahead] * 4 + [ticket(5)], NO_GAIN, LADDER).is_accepted

    def test_nobody_admitted_before_loses_their_answer(self) -> None:
        promised = [ticket(1.9)]
        assert not admit(0.0015, 0.0, 0.0, promised, NO_GAIN, LADDER).is_accepted
        assert admit(0.0015, 0.0, 0.0, [ticket(2.1)], NO_GAIN, LADDER).is_accepted

    def test_those_ahead_count_with_the_batches_that_will_really_be_formed(self) -> None:
        """Batches of four would take 0.3 ms an image, but nobody here has the time to wait for one."""
        ahead = [ticket(1.0), ticket(2.05), ticket(3.05)]
        assert not admit(0.0035, 0.0, 0.0, ahead, GAIN, LADDER).is_accepted
        assert admit(0.0041, 0.0, 0.0, ahead, GAIN, LADDER).is_accepted

    def test_those_ahead_count_with_the_high_quantile(self) -> None:
        erratic = profile_of(MS, high=2.0)
        assert not admit(0.0039, 0.0, 0.0, [ticket(2.5)], erratic, LADDER).is_accepted
        assert admit(0.0040, 0.0, 0.0, [ticket(2.5)], erratic, LADDER).is_accepted

    def test_one_who_is_late_anyway_keeps_nobody_out(self) -> None:
        hopeless, late = ticket(0.5), ticket(1.5)
        erratic = profile_of(MS, high=2.0)
        assert admit(0.0045, 0.0, 0.0, [hopeless, late], erratic, LADDER).is_accepted
        assert admit(0.0020, 0.0, 0.0, [hopeless, ticket(2.5)], profile_of(MS), LADDER).is_accepted

    def test_the_backlog_is_the_run_in_progress_and_column_1_for_everyone(self) -> None:
        assert backlog_s(0.0, 0.0, [], NO_GAIN, LADDER) == 0
        assert backlog_s(0.0, 0.002, [ticket(90, "1")], NO_GAIN, LADDER) == pytest.approx(0.002)
        assert backlog_s(0.0, 0.002, [ticket(90)] * 10, NO_GAIN, LADDER) == pytest.approx(0.012)


class TestProfile:
    def test_a_batch_counts_as_the_next_measured_size(self) -> None:
        assert NO_GAIN.latency("1", 3) == NO_GAIN.latency("1", 4)

    def test_a_batch_larger_than_measured_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at most 4"):
            NO_GAIN.latency("1", 5)

    def test_columns_must_be_measured_alike(self) -> None:
        with pytest.raises(ValueError, match="same batch sizes"):
            LatencyProfile({"1": {1: Latency(1, 1)}, "2": {1: Latency(1, 1), 2: Latency(1, 1)}})

    def test_likely_is_a_little_more_than_the_median_but_never_more_than_high(self) -> None:
        assert Latency(1.0, 5.0).likely_s == pytest.approx(1.1)
        assert Latency(1.0, 1.01).likely_s == pytest.approx(1.01)


def test_each_column_needs_an_accuracy_of_its_own() -> None:
    with pytest.raises(ValueError, match="column 2"):
        Ladder(("1", "2"), {("1",): 0.5})


# ---- laws ----

COLUMNS = ("1", "2", "3", "4")
SUBSETS = [run for size in range(1, 5) for run in combinations(COLUMNS, size)]


@st.composite
def profiles(draw: st.DrawFn) -> LatencyProfile:
    """Deeper columns are slower, larger batches are no faster; any gain, any spread."""
    costs = sorted(draw(st.lists(st.floats(0.1, 20.0), min_size=4, max_size=4)))
    return profile_of(
        dict(zip(COLUMNS, costs, strict=True)),
        per_image=draw(st.floats(0, 1.2)),
        high=draw(st.floats(1, 3)),
        sizes=draw(st.sampled_from([(1,), (1, 2, 4), (1, 8)])),
    )


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    singles = {(column,) for column in COLUMNS}
    measured = singles | draw(st.sets(st.sampled_from(SUBSETS)))
    return Ladder(COLUMNS, {run: draw(st.floats(0.1, 1.0)) for run in sorted(measured)})


tickets = st.builds(
    Ticket,
    ready_by_s=st.floats(-0.01, 0.1),
    min_confidence=st.none() | st.floats(0, 1),
    columns_run=st.just(()) | st.sampled_from(SUBSETS),
    confidence=st.floats(0, 1),
    lost_s=st.just(0.0) | st.floats(0, 0.02),
)
queues = st.lists(tickets, max_size=12)


@given(queues, profiles(), ladders())
def test_law_a_plan_is_well_formed(waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder) -> None:
    decided = plan(waiting, 0.0, profile, ladder)
    assert (decided.column is None) == (not decided.batch)
    involved = [*decided.batch, *(finished for finished, _ in decided.finished)]
    assert len(set(involved)) == len(involved)
    assert set(involved) <= set(waiting)
    assert {reason for _, reason in decided.finished} <= set(STOPPED_BY)
    assert all(finished.columns_run for finished, _ in decided.finished)


@given(queues, profiles(), ladders())
def test_law_everyone_in_a_batch_is_predicted_in_time(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    decided = plan(waiting, 0.0, profile, ladder)
    if decided.column is not None:
        latency = profile.latency(decided.column, len(decided.batch))
        assert all(latency.median_s <= member.ready_by_s for member in decided.batch)
        if len(decided.batch) > 1:
            assert all(latency.high_s <= member.ready_by_s for member in decided.batch)
            assert latency.median_s / len(decided.batch) < profile.latency(decided.column, 1).median_s


@given(queues, profiles(), ladders())
def test_law_nobody_is_refined_while_another_could_have_column_1(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    decided = plan(waiting, 0.0, profile, ladder)
    column_1_s = profile.latency("1", 1).median_s
    claimants = [w for w in waiting if not w.columns_run and w.ready_by_s >= column_1_s]
    if claimants:
        assert all(not member.columns_run for member in decided.batch)
        assert min(claimants, key=lambda w: w.ready_by_s).ready_by_s == decided.batch[0].ready_by_s
        if decided.column != "1":
            assert claimants == list(decided.batch)


@given(queues, profiles(), ladders())
def test_law_a_run_adds_a_deeper_column(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    decided = plan(waiting, 0.0, profile, ladder)
    for member in decided.batch:
        assert decided.column is not None
        assert all(COLUMNS.index(run) < COLUMNS.index(decided.column) for run in member.columns_run)


@given(queues, profiles(), ladders())
def test_law_nobody_with_an_answer_is_left_without_hope_or_reason(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    """Every answered ticket is finished, or something more accurate still fits its slack."""
    decided = plan(waiting, 0.0, profile, ladder)
    finished = {done for done, _ in decided.finished}
    for left in set(waiting) - finished:
        if left.columns_run:
            assert any(
                sum(profile.latency(column, 1).likely_s for column in way.added) <= left.ready_by_s
                for way in ladder.improvements(left.columns_run)
            )


@given(queues, profiles(), ladders())
def test_law_load_is_blamed_only_on_lost_time(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    for finished, reason in plan(waiting, 0.0, profile, ladder).finished:
        assert reason != "load" or finished.lost_s > 0
        assert reason == stopped_by(finished, 0.0, profile, ladder)


@given(st.floats(0, 0.1), profiles(), ladders())
def test_law_a_request_alone_leaves_no_accuracy_on_the_table(
    slack_s: float, profile: LatencyProfile, ladder: Ladder
) -> None:
    """If every run takes its median, the answer is at least as accurate as any column that safely fits."""
    alone, now_s = Ticket(slack_s), 0.0
    while (decided := plan([alone], now_s, profile, ladder)).column is not None:
        now_s += profile.latency(decided.column, 1).median_s
        alone.columns_run += (decided.column,)
    fitting = [column for column in COLUMNS if profile.latency(column, 1).high_s <= slack_s]
    assert now_s <= slack_s
    for column in fitting:
        assert ladder.accuracy(alone.columns_run) >= ladder.accuracy((column,))


@given(queues, profiles(), ladders())
def test_law_the_order_of_the_queue_does_not_matter(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    distinct = list({w.ready_by_s: w for w in waiting}.values())
    assert plan(distinct, 0.0, profile, ladder) == plan(distinct[::-1], 0.0, profile, ladder)


@given(st.lists(st.floats(0, 0.1), max_size=12), profiles(), ladders())
def test_law_whoever_is_admitted_has_an_answer_in_time_if_no_run_exceeds_its_high_quantile(
    ready_by_s: list[float], profile: LatencyProfile, ladder: Ladder
) -> None:
    """Everyone comes at once; whoever is let in is then played through `plan`."""
    waiting: list[Ticket] = []
    for by_s in ready_by_s:
        if admit(by_s, 0.0, 0.0, waiting, profile, ladder).is_accepted:
            waiting.append(Ticket(by_s))
    now_s = 0.0
    while unanswered := [w for w in waiting if not w.columns_run]:
        decided = plan(unanswered, now_s, profile, ladder)
        assert decided.column is not None
        now_s += profile.latency(decided.column, len(decided.batch)).high_s
        for member in decided.batch:
            assert now_s <= member.ready_by_s
            member.columns_run = (decided.column,)
