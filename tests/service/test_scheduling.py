"""The policy that ships, by example and by law, over random queues, profiles, ladders and traffic."""

from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.ladder import ConfidenceTable, Ladder
from service.latency import Latency, LatencyProfile, LiveProfile
from service.scheduling import (
    INDISTINCT,
    STOPPED_BY,
    Admission,
    Anytime,
    Plan,
    backlog_s,
    stopped_by,
    to_come_s,
)
from service.waiting import NO_TRAFFIC, Queue, Ticket, Traffic
from tests.fakes import ACCURACY
from tests.service.strategies import (
    COLUMNS,
    GAIN,
    LADDER,
    MS,
    NO_GAIN,
    SUBSETS,
    ladders,
    profile_of,
    profiles,
    queues,
    ticket,
    traffics,
)

TABULATED = Ladder(
    ("1", "2", "3"),
    ACCURACY,
    [
        ConfidenceTable(
            columns=("1",),
            edges=(0.0, 0.8, 1.0),
            n=(1000, 9000),
            accuracy={
                ("1",): (0.40, 0.98),
                ("1", "2"): (0.60, 0.98),
                ("1", "3"): (0.70, 0.98),
                ("1", "2", "3"): (0.75, 0.98),
            },
        )
    ],
)
"""Sure answers of column 1 have nothing to gain."""

UP_TO_TWO = Ladder(
    ("1", "2"),
    {("1",): 0.8, ("2",): 0.85, ("1", "2"): 0.87},
    [
        ConfidenceTable(
            columns=("1",),
            edges=(0.0, 0.8, 1.0),
            n=(1000, 9000),
            accuracy={("1",): (0.40, 0.98), ("1", "2"): (0.60, 0.98)},
        )
    ],
)


def plan(
    waiting: Iterable[Ticket],
    now_s: float,
    profile: LatencyProfile,
    ladder: Ladder,
    traffic: Traffic = NO_TRAFFIC,
    answer_worth: float = 4.0,
) -> Plan[Ticket]:
    return Anytime(answer_worth).plan(Queue(ladder, waiting), now_s, profile, ladder, traffic)


def admit(
    ready_by_s: float,
    now_s: float,
    busy_until_s: float,
    waiting: Iterable[Ticket],
    profile: LatencyProfile,
    ladder: Ladder,
    traffic: Traffic = NO_TRAFFIC,
) -> Admission:
    queue = Queue(ladder, waiting)
    return Anytime().admit(ready_by_s, now_s, busy_until_s, queue, profile, ladder, traffic)


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


@pytest.mark.parametrize(
    ("more", "slack_ms", "column"),
    [
        pytest.param(0.0004, 50.0, "1", id="nobody can tell them apart"),
        pytest.param(0.0004, 11.5, "2", id="nobody can, but column 1 does not fit before them"),
        pytest.param(0.01, 50.0, "2", id="better without column 1"),
    ],
)
def test_column_1_opens_where_a_way_around_it_is_no_better_than_held_out_images_can_tell(
    more: float, slack_ms: float, column: str
) -> None:
    accuracy = {**ACCURACY, ("2", "3"): ACCURACY["1", "2", "3"] + more}
    around = Ladder(("1", "2", "3"), accuracy)

    assert plan([ticket(slack_ms)], 0.0, NO_GAIN, around).column == column


def test_opens_deep_only_if_the_high_quantile_fits() -> None:
    erratic = profile_of(MS, high=2.0)
    assert plan([ticket(9.5)], 0.0, erratic, LADDER).column == "1"


def test_refines_towards_the_most_accurate_combination_that_fits() -> None:
    assert plan([ticket(8.5, "1")], 0.0, NO_GAIN, LADDER).column == "3"
    assert plan([ticket(13.0, "1")], 0.0, NO_GAIN, LADDER).column == "2"
    assert plan([ticket(5.0, "1")], 0.0, NO_GAIN, LADDER).column == "2"


def test_tickets_that_want_the_same_column_share_a_refinement() -> None:
    one, other, third = ticket(50.0, "2"), ticket(20.0, "1", "2"), ticket(8.5, "1", "2")
    decided = plan([one, other, third], 0.0, GAIN, LADDER)
    assert (decided.column, set(decided.batch)) == ("3", {one, other})  # the third has only time for itself


def test_one_who_is_unsure_is_refined_before_one_who_is_sure() -> None:
    sure, unsure, later = (ticket(t, "1", confidence=c) for t, c in ((45, 0.95), (50, 0.4), (60, 0.4)))
    decided = plan([sure, unsure, later], 0.0, NO_GAIN, TABULATED)
    assert (decided.column, decided.batch) == ("2", (unsure,))
    assert plan([sure, unsure, later], 0.0, GAIN, TABULATED).batch == (unsure, later)


def test_the_run_with_the_most_gain_for_its_time_wins() -> None:
    """From 1 to 2: 0.07 in 3 ms; from 2 to 3: 0.05 in 8 ms. With a column 2 of 12 ms it is the other way."""
    near, far = ticket(50, "1"), ticket(40, "2")
    assert plan([near, far], 0.0, NO_GAIN, LADDER).batch == (near,)
    slow = profile_of({"1": 1.0, "2": 12.0, "3": 13.0})
    skipping = Ladder(("1", "2", "3"), {**ACCURACY, ("2", "3"): 0.99})
    assert plan([near, far], 0.0, slow, skipping).batch == (far,)


def test_more_gain_in_a_batch_may_win_over_more_gain_for_one() -> None:
    alone, together = ticket(50, "2", confidence=0.2), [ticket(40 + i, "1") for i in range(4)]
    ladder = Ladder(("1", "2", "3"), {**ACCURACY, ("2", "3"): 0.99, ("1", "3"): 0.81})
    assert plan([alone, together[0]], 0.0, profile_of({**MS, "3": 5.0}), ladder).batch == (alone,)
    decided = plan([alone, *together], 0.0, profile_of({**MS, "3": 5.0}, per_image=0.1), ladder)
    assert (decided.column, decided.batch) == ("2", tuple(together))


def test_rungs_are_skipped_where_that_pays() -> None:
    """Column 2 gains next to nothing here, so two requests go from 1 straight to 3."""
    steep = Ladder(("1", "2", "3"), {**ACCURACY, ("2",): 0.805, ("1", "2"): 0.805})
    waiting = [ticket(50, "1"), ticket(60, "1")]
    assert plan(waiting, 0.0, NO_GAIN, steep).column == "3"
    assert plan(waiting, 0.0, NO_GAIN, LADDER).column == "2"


def test_a_way_that_no_longer_fits_as_a_whole_is_not_begun() -> None:
    """Column 2 is worth something only on the way to column 3, and there is no time for both."""
    bridge = Ladder(
        ("1", "2", "3"),
        {("1",): 0.80, ("2",): 0.70, ("3",): 0.70, ("1", "2"): 0.80, ("1", "2", "3"): 0.95, ("1", "3"): 0.7},
    )
    waiting = [ticket(10.9, "1"), ticket(10.8, "1")]
    assert plan(waiting, 0.0, NO_GAIN, bridge).column is None
    assert plan([*waiting, ticket(11.1, "1")], 0.0, NO_GAIN, bridge).column == "2"


def test_one_alone_goes_on_even_when_sure() -> None:
    decided = plan([ticket(50, "1", confidence=0.999)], 0.0, NO_GAIN, TABULATED)
    assert (decided.column, decided.finished) == ("2", ())


def test_one_whose_turn_would_come_too_late_is_sent_its_answer_now() -> None:
    """Those with more to gain come first, 3 ms each, or twice that if half the time goes to first answers."""
    unsure = [ticket(50, "1", confidence=0.2) for _ in range(3)]
    early, late = ticket(11.9, "1", confidence=0.9), ticket(12.1, "1", confidence=0.9)
    decided = plan([*unsure, early, late], 0.0, profile_of({"1": 1.0, "2": 3.0}), UP_TO_TWO)
    assert decided.column == "2"
    assert decided.finished == ((early, "load"),)
    half = Traffic(500.0, (1.0,))
    assert len(plan([*unsure, late], 0.0, profile_of({"1": 1.0, "2": 3.0}), UP_TO_TWO).finished) == 0
    assert len(plan([*unsure, late], 0.0, profile_of({"1": 1.0, "2": 3.0}), UP_TO_TWO, half).finished) == 1


# ---- what is to be expected ----

SHORT = Traffic(200.0, (0.003, 0.004, 0.005))
"""Two hundred a second that a run of 8 ms would cost their answer."""


def test_a_long_refinement_is_not_run_where_it_would_cost_those_who_come_their_answer() -> None:
    waiting = [ticket(50, "1", "2"), ticket(60, "1", "2")]
    assert plan(waiting, 0.0, NO_GAIN, LADDER).column == "3"
    blocked = plan(waiting, 0.0, NO_GAIN, LADDER, SHORT)
    assert (blocked.column, set(blocked.finished)) == (None, {(one, "load") for one in waiting})
    assert plan(waiting, 0.0, NO_GAIN, LADDER, SHORT, answer_worth=0.0).column == "3"
    assert plan(waiting, 0.0, NO_GAIN, LADDER, Traffic(200.0, (0.1,))).column == "3"
    assert plan(waiting, 0.0, NO_GAIN, LADDER, Traffic(0.5, SHORT.slacks_s)).column == "3"


@pytest.mark.parametrize("waiting", [[ticket(50, "1")], [ticket(50, "1"), ticket(60, "1", "2")]])
def test_nobody_is_refined_where_the_loop_has_no_time_for_those_who_come(waiting: list[Ticket]) -> None:
    busy = Traffic(rate_hz=120.0, busy=0.6)
    done = Anytime(refine_below=0.5).plan(Queue(LADDER, waiting), 0.0, NO_GAIN, LADDER, busy)
    assert (done.column, done.batch) == (None, ())
    assert set(done.finished) == {(one, "load") for one in waiting}
    refined = Anytime(refine_below=0.6).plan(Queue(LADDER, waiting), 0.0, NO_GAIN, LADDER, busy)
    assert refined.column in {"2", "3"}
    assert refined.finished == ()
    # Some who came at once, on a server that has little to do.
    burst = Traffic(rate_hz=80.0, busy=0.9)
    refined = Anytime(refine_below=0.5).plan(Queue(LADDER, waiting), 0.0, NO_GAIN, LADDER, burst)
    assert refined.column in {"2", "3"}


def test_a_first_answer_is_run_however_busy_the_loop_is() -> None:
    fresh, answered = ticket(50), ticket(50, "1")
    decided = plan([answered, fresh], 0.0, NO_GAIN, LADDER, Traffic(500.0, busy=1.0))
    assert (decided.column, decided.batch) == ("1", (fresh,))
    assert decided.finished == ((answered, "load"),)


def test_one_alone_is_weighed_against_those_who_come_too() -> None:
    alone = ticket(50, "1", "2")
    blocked = plan([alone], 0.0, NO_GAIN, LADDER, SHORT)
    assert (blocked.column, blocked.finished) == (None, ((alone, "load"),))
    assert plan([alone], 0.0, NO_GAIN, LADDER, SHORT, answer_worth=0.0).column == "3"
    assert plan([ticket(8.5)], 0.0, NO_GAIN, LADDER).column == "3"
    assert plan([ticket(8.5)], 0.0, NO_GAIN, LADDER, SHORT).column == "1"


def test_of_two_ways_that_gain_as_much_the_cheaper_is_taken_whichever_comes_first() -> None:
    accuracy = {
        ("1",): 0.8,
        ("2",): 0.9,
        ("3",): 0.9,
        ("1", "2"): 0.9,
        ("1", "3"): 0.9,
        ("1", "2", "3"): 0.85,
    }
    ladder = Ladder(("1", "2", "3"), accuracy)
    ticket = Ticket(ready_by_s=1.0, columns_run=("1",), confidence=0.5)
    assert Anytime().plan(Queue(ladder, [ticket]), 0.0, profile_of(MS), ladder).column == "2"


PREEMPTIBLE = LiveProfile(profile_of(MS), 0.95, preemption_s=0.0003)
"""A run goes on for 0.3 ms when it is told to end."""


def test_a_refinement_that_can_be_preempted_costs_those_who_come_only_what_that_takes() -> None:
    waiting = [ticket(50, "1", "2"), ticket(60, "1", "2")]
    blocked = plan(waiting, 0.0, NO_GAIN, LADDER, SHORT)
    assert blocked.column is None
    assert plan(waiting, 0.0, PREEMPTIBLE, LADDER, SHORT).column == "3"
    assert plan([waiting[0]], 0.0, PREEMPTIBLE, LADDER, SHORT).column == "3"
    # Who comes has as much time as column 1 takes, give or take: 0.3 ms are a good part of that.
    narrow = Traffic(SHORT.rate_hz, (0.0012,))
    assert plan(waiting, 0.0, PREEMPTIBLE, LADDER, narrow).column is None
    assert plan([waiting[0]], 0.0, PREEMPTIBLE, LADDER, narrow).column is None


def test_a_refinement_that_will_hardly_reach_its_end_gains_little() -> None:
    """The short one wins by its chance not to be preempted, though the long one gains more a second."""
    near, far = ticket(50, "1"), ticket(40, "2")
    skipping = Ladder(("1", "2", "3"), {**ACCURACY, ("2", "3"): 0.999})
    slow = LiveProfile(profile_of({"1": 1.0, "2": 3.0, "3": 6.0}), 0.95, preemption_s=0.0003)
    assert plan([near, far], 0.0, slow, skipping).batch == (far,)
    many = Traffic(400.0, (0.004,))
    assert plan([near, far], 0.0, slow, skipping, many, answer_worth=0.0).batch == (near,)


def test_a_deeper_column_opens_only_where_hardly_anybody_comes() -> None:
    """A first run makes way for nobody, so it is to be a short one where others come."""
    assert plan([ticket(8.5)], 0.0, PREEMPTIBLE, LADDER, Traffic(20.0, (0.05,))).column == "3"
    assert plan([ticket(8.5)], 0.0, PREEMPTIBLE, LADDER, Traffic(40.0, (0.05,))).column == "1"


def test_who_is_alone_is_tried_for_with_little_time_while_there_is_time_for_everybody() -> None:
    hopeful = Anytime(hope=0.4)
    hurried = ticket(0.5)

    def column(*others: Ticket, traffic: Traffic = NO_TRAFFIC) -> tuple[str | None, tuple[Ticket, ...]]:
        decided = hopeful.plan(Queue(LADDER, [hurried, *others]), 0.0, NO_GAIN, LADDER, traffic)
        return decided.column, decided.batch

    def is_let_in(ready_by_ms: float, *others: Ticket, traffic: Traffic = NO_TRAFFIC) -> bool:
        waiting = Queue(LADDER, others)
        return hopeful.admit(ready_by_ms / 1e3, 0.0, 0.0, waiting, NO_GAIN, LADDER, traffic).is_accepted

    assert column() == ("1", (hurried,))
    assert plan([hurried], 0.0, NO_GAIN, LADDER).column is None
    relaxed = ticket(20)
    assert column(relaxed) == ("1", (relaxed,))  # it must not cost others their time
    assert column(traffic=FLOOD) == (None, ())
    assert is_let_in(0.5)
    assert not is_let_in(0.3)
    assert not is_let_in(0.5, relaxed)
    assert not is_let_in(0.5, traffic=FLOOD)


FLOOD = Traffic(10_000.0, (0.05,))
"""Many more than could be served even in the best batches of GAIN, four in 1.3 ms."""


def test_in_overload_one_without_time_for_the_best_batch_gives_way() -> None:
    hurried, relaxed = ticket(1.05), [ticket(20 + i) for i in range(4)]
    assert plan([hurried, *relaxed], 0.0, GAIN, LADDER).batch == (hurried,)
    assert plan([hurried, *relaxed], 0.0, GAIN, LADDER, Traffic(2000.0, (0.05,))).batch == (hurried,)
    assert plan([hurried, *relaxed], 0.0, GAIN, LADDER, FLOOD).batch == tuple(relaxed)


def test_where_an_image_is_dear_alone_two_full_batches_do_without_one_who_has_no_time() -> None:
    """GAIN: alone 1 ms, in a batch of four 0.325 ms each."""
    hurried, relaxed = ticket(1.05), [ticket(20 + i) for i in range(8)]
    assert plan([hurried, *relaxed[:6]], 0.0, GAIN, LADDER).batch == (hurried,)
    assert plan([hurried, *relaxed], 0.0, GAIN, LADDER).batch == tuple(relaxed[:4])
    little_gain = profile_of(MS, per_image=0.5)
    assert plan([hurried, *relaxed], 0.0, little_gain, LADDER).batch == (hurried,)


def test_nobody_is_admitted_who_makes_others_wait_for_batches_that_they_have_no_time_for() -> None:
    hurried, relaxed = ticket(1.05), [ticket(60 + i) for i in range(7)]
    assert admit(0.050, 0.0, 0.0, [hurried, *relaxed[:5]], GAIN, LADDER).is_accepted
    assert not admit(0.050, 0.0, 0.0, [hurried, *relaxed[:6]], GAIN, LADDER).is_accepted
    # Whoever is past help in any case keeps nobody out.
    assert admit(0.050, 0.0, 0.0, [ticket(0.5), *relaxed[:6]], GAIN, LADDER).is_accepted


def test_in_overload_one_without_time_is_served_all_the_same_if_nobody_has_more() -> None:
    hurried, other = ticket(1.02), ticket(1.05)
    assert plan([hurried, other], 0.0, GAIN, LADDER, FLOOD).batch == (hurried,)
    assert plan([hurried], 0.0, GAIN, LADDER, FLOOD).batch == (hurried,)


def test_where_batches_do_not_pay_overload_changes_nothing() -> None:
    hurried, relaxed = ticket(1.2), [ticket(20 + i) for i in range(4)]
    assert plan([hurried, *relaxed], 0.0, NO_GAIN, LADDER, FLOOD).batch == (hurried,)
    assert admit(0.0012, 0.0, 0.0, [], NO_GAIN, LADDER, FLOOD).is_accepted


def test_in_overload_nobody_is_admitted_who_has_no_time_for_the_best_batch() -> None:
    assert admit(0.0012, 0.0, 0.0, [], GAIN, LADDER).is_accepted
    assert not admit(0.0012, 0.0, 0.0, [], GAIN, LADDER, FLOOD).is_accepted
    assert admit(0.0015, 0.0, 0.0, [], GAIN, LADDER, FLOOD).is_accepted


# Column 1 takes hardly longer for four than for one; a refinement lasts while two more arrive.
STEADY = Traffic(1000.0, (0.05,))


def test_a_batch_fills_during_a_refinement_where_batching_pays() -> None:
    fresh, answered = ticket(40), ticket(50, "1")
    decided = plan([fresh, answered], 0.0, GAIN, LADDER, STEADY)
    assert (decided.column, decided.batch) == ("2", (answered,))
    assert plan([fresh, answered], 0.0, GAIN, LADDER).batch == (fresh,)  # nobody will come
    assert plan([fresh, answered], 0.0, NO_GAIN, LADDER, STEADY).batch == (fresh,)  # does not pay


def test_a_batch_fills_only_where_the_batch_that_it_becomes_pays() -> None:
    """Two together cost little more than one, but four cost as much as twice two."""
    stepped = LatencyProfile(
        {
            "1": {1: Latency(0.001, 0.001), 2: Latency(0.0011, 0.0011), 4: Latency(0.0022, 0.0022)},
            **{
                column: {n: Latency(ms / 1e3, ms / 1e3) for n in (1, 2, 4)}
                for column, ms in (("2", 3), ("3", 8))
            },
        }
    )
    fresh, answered = [ticket(40), ticket(41)], ticket(50, "1")
    assert plan([fresh[0], answered], 0.0, stepped, LADDER, Traffic(400.0, (0.05,))).column == "2"
    assert plan([*fresh, answered], 0.0, stepped, LADDER, Traffic(700.0, (0.05,))).column == "1"
    assert plan([*fresh, answered], 0.0, GAIN, LADDER, Traffic(700.0, (0.05,))).column == "2"


def test_a_batch_does_not_fill_at_the_cost_of_anybodys_answer() -> None:
    answered = ticket(50, "1")
    assert plan([ticket(4.2), answered], 0.0, GAIN, LADDER, STEADY).column == "2"
    assert plan([ticket(3.8), answered], 0.0, GAIN, LADDER, STEADY).column == "1"
    erratic = profile_of(MS, per_image=0.1, high=1.5)  # the refinement may take 4.5 ms, column 1 then 1.5
    assert plan([ticket(5.5), answered], 0.0, erratic, LADDER, STEADY).column == "1"
    assert plan([ticket(6.5), answered], 0.0, erratic, LADDER, STEADY).column == "2"


def test_in_overload_no_batch_fills() -> None:
    """One who has time for column 1 after the refinement would not have time for the best batch."""
    waiting = [ticket(4.1), ticket(40), ticket(50, "1")]
    assert plan(waiting, 0.0, GAIN, LADDER, STEADY).column == "2"
    assert plan(waiting, 0.0, GAIN, LADDER, FLOOD).column == "1"


def test_a_full_batch_does_not_wait() -> None:
    waiting = [ticket(40 + i) for i in range(4)]
    assert plan([*waiting, ticket(50, "1")], 0.0, GAIN, LADDER, STEADY).batch == tuple(waiting)


# ---- done ----


def test_what_is_to_come_is_the_most_accurate_way_that_fits() -> None:
    assert to_come_s(ticket(50), 0.0, NO_GAIN, LADDER) == pytest.approx(0.012)
    assert to_come_s(ticket(50, "1"), 0.0, NO_GAIN, LADDER) == pytest.approx(0.011)
    assert to_come_s(ticket(8.5, "1"), 0.0, NO_GAIN, LADDER) == pytest.approx(0.008)
    assert to_come_s(ticket(2, "1"), 0.0, NO_GAIN, LADDER) == 0
    assert to_come_s(ticket(50, "1", "2", "3"), 0.0, NO_GAIN, LADDER) == 0
    assert to_come_s(ticket(50, "1", confidence=0.9, min_confidence=0.9), 0.0, NO_GAIN, LADDER) == 0


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


def plan_column_1(
    waiting: Iterable[Ticket],
    now_s: float,
    profile: LatencyProfile,
    ladder: Ladder = LADDER,
    traffic: Traffic = NO_TRAFFIC,
) -> tuple[Ticket, ...]:
    """Whom the policy would give column 1 next, were there nothing else to do."""
    decided = plan(waiting, now_s, profile, ladder, traffic)
    return decided.batch if decided.column is not None else ()


SCARCE = Traffic(rate_hz=1_100.0)
"""More than runs of a millisecond can serve, and not yet overload."""


class TestAdmission:
    def test_an_idle_server_takes_what_column_1_can_serve(self) -> None:
        assert admit(1.001, 1.0, 0.0, [], NO_GAIN, LADDER).is_accepted
        assert not admit(1.0009, 1.0, 0.0, [], NO_GAIN, LADDER).is_accepted

    def test_it_counts_with_the_high_quantile_when_time_is_scarce(self) -> None:
        erratic = profile_of(MS, high=2.0)
        assert not admit(0.0019, 0.0, 0.0, [], erratic, LADDER, SCARCE).is_accepted
        assert admit(0.0021, 0.0, 0.0, [], erratic, LADDER, SCARCE).is_accepted

    def test_whoever_is_more_likely_in_time_than_not_is_let_in_when_there_is_time_for_everybody(self) -> None:
        erratic, plenty = profile_of(MS, high=2.0), Traffic(rate_hz=700.0)
        assert admit(0.0011, 0.0, 0.0, [], erratic, LADDER, plenty).is_accepted
        assert not admit(0.0009, 0.0, 0.0, [], erratic, LADDER, plenty).is_accepted
        assert admit(0.0021, 0.0, 0.0, [ticket(1.9)], erratic, LADDER, plenty).is_accepted

    def test_the_run_in_progress_comes_first(self) -> None:
        refused = admit(0.005, 0.0, 0.0045, [], NO_GAIN, LADDER)
        assert not refused.is_accepted
        assert refused.needs_s == pytest.approx(0.0055)

    def test_only_earlier_deadlines_without_an_answer_come_first(self) -> None:
        ahead, behind, answered = [ticket(4) for _ in range(4)], ticket(40), ticket(3, "1")
        assert admit(0.005, 0.0, 0.0, [*ahead, behind, answered], NO_GAIN, LADDER).is_accepted
        assert not admit(0.005, 0.0, 0.0, [*ahead, ticket(5)], NO_GAIN, LADDER).is_accepted

    def test_nobody_admitted_before_loses_their_answer(self) -> None:
        promised = [ticket(1.9)]
        assert not admit(0.0015, 0.0, 0.0, promised, NO_GAIN, LADDER).is_accepted
        assert admit(0.0015, 0.0, 0.0, [ticket(2.1)], NO_GAIN, LADDER).is_accepted

    def test_those_ahead_count_with_the_batches_that_will_really_be_formed(self) -> None:
        """Batches of four would take 0.3 ms an image, but nobody here has the time to wait for one."""
        ahead = [ticket(1.0), ticket(2.05), ticket(3.05)]
        assert not admit(0.0035, 0.0, 0.0, ahead, GAIN, LADDER).is_accepted
        assert admit(0.0041, 0.0, 0.0, ahead, GAIN, LADDER).is_accepted

    def test_what_several_runs_may_take_longer_adds_up_like_independent_errors(self) -> None:
        erratic = profile_of(MS, high=2.0)
        assert not admit(0.00341, 0.0, 0.0, [ticket(2.5)], erratic, LADDER, SCARCE).is_accepted
        assert admit(0.00342, 0.0, 0.0, [ticket(2.5)], erratic, LADDER, SCARCE).is_accepted

    def test_it_holds_for_as_many_as_the_high_quantile_says(self) -> None:
        """Ninety-five in a hundred, with every run at random around its median, however many wait."""
        random = np.random.default_rng(6)
        high = float(np.exp(1.6449 * 0.15))
        profile = profile_of(MS, per_image=0.3, high=high)
        n_promised = n_kept = 0
        for _ in range(200):
            waiting: list[Ticket] = []
            for by_s in random.uniform(0.001, 0.02, 40):
                if admit(float(by_s), 0.0, 0.0, waiting, profile, LADDER).is_accepted:
                    waiting.append(Ticket(float(by_s)))
            n_promised += len(waiting)
            now_s = 0.0
            while waiting and (decided := plan_column_1(waiting, now_s, profile)):
                now_s += profile.latency("1", len(decided)).median_s * random.lognormal(0.0, 0.15)
                n_kept += sum(now_s <= member.ready_by_s for member in decided)
                waiting = [one for one in waiting if one not in decided]
        assert n_promised > 2000
        assert n_kept / n_promised > 0.94

    def test_one_who_is_late_anyway_keeps_nobody_out(self) -> None:
        hopeless, late = ticket(0.5), ticket(1.5)
        erratic = profile_of(MS, high=2.0)
        assert admit(0.0045, 0.0, 0.0, [hopeless, late], erratic, LADDER).is_accepted
        assert admit(0.0020, 0.0, 0.0, [hopeless, ticket(2.5)], profile_of(MS), LADDER).is_accepted

    def test_the_backlog_is_the_run_in_progress_and_column_1_for_everyone(self) -> None:
        answered, ten = Queue(LADDER, [ticket(90, "1")]), Queue(LADDER, [ticket(90) for _ in range(10)])
        assert backlog_s(0.0, 0.0, Queue[Ticket](LADDER), NO_GAIN, LADDER) == 0
        assert backlog_s(0.0, 0.002, answered, NO_GAIN, LADDER) == pytest.approx(0.002)
        assert backlog_s(0.0, 0.002, ten, NO_GAIN, LADDER) == pytest.approx(0.012)


# ---- laws ----


@given(queues, profiles(), ladders(), traffics)
def test_law_a_plan_is_well_formed(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    assert (decided.column is None) == (not decided.batch)
    involved = [*decided.batch, *(finished for finished, _ in decided.finished)]
    assert len(set(involved)) == len(involved)
    assert set(involved) <= set(waiting)
    assert {reason for _, reason in decided.finished} <= set(STOPPED_BY)
    assert all(finished.columns_run for finished, _ in decided.finished)


@given(queues, profiles(), ladders(), traffics)
def test_law_everyone_in_a_batch_is_predicted_in_time(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    """A first answer with the high quantile; a better one, which costs no deadline, with the likely time."""
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    if decided.column is not None:
        latency = profile.latency(decided.column, len(decided.batch))
        assert all(latency.median_s <= member.ready_by_s for member in decided.batch)
        if len(decided.batch) > 1:
            for member in decided.batch:
                assert (latency.likely_s if member.columns_run else latency.high_s) <= member.ready_by_s
            assert latency.median_s / len(decided.batch) < profile.latency(decided.column, 1).median_s


@given(queues, profiles(), ladders(), traffics)
def test_law_column_1_goes_to_the_earliest_deadline_and_nobody_opens_deeper_but_one_who_is_alone(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    openers = [member for member in decided.batch if not member.columns_run]
    if openers:
        assert openers == list(decided.batch)
        claimants = sorted(
            (w for w in waiting if not w.columns_run and w.ready_by_s >= profile.latency("1", 1).median_s),
            key=lambda w: w.ready_by_s,
        )
        begin = claimants.index(openers[0])
        assert claimants[begin : begin + len(openers)] == openers
        if traffic == NO_TRAFFIC:
            assert openers[0].ready_by_s == claimants[0].ready_by_s
        if decided.column != "1":
            assert waiting == openers


def can_all_have_column_1(by_s: Sequence[float], start_s: float, profile: LatencyProfile) -> bool:
    """Whether there is any way to cut the queue, earliest deadline first, into batches in time for everybody.

    Runs take their medians one after the other, and longer like independent errors: tried with all ways.
    """
    deadlines_s = sorted(by_s)
    for cuts in product((True, False), repeat=len(deadlines_s) - 1):
        ends = [*(i for i, is_cut in enumerate(cuts, 1) if is_cut), len(deadlines_s)]
        now_s, variance_s2, begin, is_in_time = start_s, 0.0, 0, True
        for end in ends:
            if end - begin > profile.batch_sizes[-1]:
                is_in_time = False
                break
            latency = profile.latency("1", end - begin)
            now_s += latency.median_s
            variance_s2 += (latency.high_s - latency.median_s) ** 2
            is_in_time = is_in_time and now_s + variance_s2**0.5 <= deadlines_s[begin] + 1e-12
            begin = end
        if is_in_time:
            return True
    return False


@given(queues, profiles(per_image=st.just(1.0), sizes=st.just((1, 2, 4))), ladders(), traffics)
def test_law_where_batches_save_nothing_nobody_is_refined_while_another_could_have_column_1(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    column_1_s = profile.latency("1", 1).median_s
    if any(not w.columns_run and w.ready_by_s >= column_1_s for w in waiting):
        assert decided.batch
        assert all(not member.columns_run for member in decided.batch)


paying = profiles(per_image=st.floats(0, 0.4), sizes=st.sampled_from([(1, 2, 4), (1, 8), (1, 2, 4, 8, 16)]))
busy = st.builds(
    Traffic,
    rate_hz=st.floats(50, 5000),
    slacks_s=st.lists(st.floats(0.02, 0.3), min_size=1, max_size=4).map(lambda s: tuple(sorted(s))),
)
fresh = st.builds(Ticket, ready_by_s=st.floats(0.0, 0.15))
refinable = st.builds(
    Ticket,
    ready_by_s=st.floats(0.0, 0.2),
    columns_run=st.sampled_from([("1",), ("1", "2"), ("2",)]),
    confidence=st.floats(0, 1),
)
mixed = st.tuples(st.lists(fresh, min_size=1, max_size=6), st.lists(refinable, min_size=1, max_size=6)).map(
    lambda two: [*two[0], *two[1]]
)
mixed_cases = st.tuples(mixed, paying, busy) | st.tuples(queues, profiles(), traffics)


@given(mixed_cases, ladders())
def test_law_nobody_is_refined_while_another_would_thereby_miss_column_1(
    case: tuple[list[Ticket], LatencyProfile, Traffic], ladder: Ladder
) -> None:
    """Whoever could have column 1 now can have it after the refinement, too.

    Even if that takes its high quantile; and it is put before them only where batching pays.
    """
    waiting, profile, traffic = case
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    column_1_s = profile.latency("1", 1).median_s
    claimants = [w.ready_by_s for w in waiting if not w.columns_run and w.ready_by_s >= column_1_s]
    if claimants and any(member.columns_run for member in decided.batch):
        assert decided.column is not None
        run_s = profile.latency(decided.column, len(decided.batch)).high_s
        assert can_all_have_column_1(claimants, run_s, profile)
        n = len(claimants)

        def median_s(n_images: int) -> float:
            return profile.latency("1", n_images).median_s

        assert any(
            median_s(n) + median_s(more) >= 1.3 * median_s(n + more)
            for more in range(1, profile.batch_sizes[-1] - n + 1)
        )


@given(mixed_cases, ladders())
def test_law_whoever_would_have_column_1_without_a_refinement_has_it_with_one(
    case: tuple[list[Ticket], LatencyProfile, Traffic], ladder: Ladder
) -> None:
    """Played on as the policy itself would go on, if nobody else came and runs took their medians."""
    waiting, profile, traffic = case
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    unanswered = [w for w in waiting if not w.columns_run]
    if not unanswered or not decided.batch or not decided.batch[0].columns_run:
        return
    assert decided.column is not None
    run_s = profile.latency(decided.column, len(decided.batch)).high_s

    def in_time(now_s: float) -> set[Ticket]:
        left, answered = list(unanswered), set[Ticket]()
        while batch := plan_column_1(left, now_s, profile, ladder, traffic):
            now_s += profile.latency("1", len(batch)).median_s
            answered |= {member for member in batch if now_s <= member.ready_by_s}
            left = [w for w in left if w not in batch]
        return answered

    assert in_time(run_s) >= in_time(0.0)


@given(queues, profiles(), ladders(), traffics)
def test_law_a_run_adds_a_deeper_column(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    for member in decided.batch:
        assert decided.column is not None
        assert all(COLUMNS.index(run) < COLUMNS.index(decided.column) for run in member.columns_run)


@given(queues, profiles(), ladders(), traffics)
def test_law_nobody_with_an_answer_is_left_without_hope_or_reason(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    """Every answered ticket is finished or run, or something more accurate still fits its slack."""
    decided = plan(waiting, 0.0, profile, ladder, traffic)
    finished = {done for done, _ in decided.finished}
    for left in set(waiting) - finished:
        if left.columns_run:
            assert any(
                sum(profile.latency(column, 1).likely_s for column in way.added) <= left.ready_by_s
                for way in ladder.improvements(left.columns_run)
            )


@given(queues, profiles(), ladders())
def test_law_load_is_blamed_only_on_lost_time_or_on_others_whose_turn_is_first(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    for finished, reason in plan(waiting, 0.0, profile, ladder).finished:
        assert reason != "load" or finished.lost_s > 0 or len(waiting) > 1
        assert reason == stopped_by(finished, 0.0, profile, ladder)


@given(st.floats(0, 0.1), profiles(), ladders(with_tables=False))
def test_law_a_request_alone_leaves_no_accuracy_on_the_table(
    slack_s: float, profile: LatencyProfile, ladder: Ladder
) -> None:
    """If every run takes its median, the answer is as accurate as any column that safely fits, or nearly."""
    alone, now_s = Ticket(slack_s), 0.0
    while (decided := plan([alone], now_s, profile, ladder)).column is not None:
        now_s += profile.latency(decided.column, 1).median_s
        alone.columns_run += (decided.column,)
    fitting = [column for column in COLUMNS if profile.latency(column, 1).high_s <= slack_s]
    assert now_s <= slack_s
    for column in fitting:
        assert ladder.accuracy(alone.columns_run) >= ladder.accuracy((column,)) - INDISTINCT


@given(
    st.floats(0, 0.1),
    st.just(()) | st.sampled_from(SUBSETS),
    st.floats(0, 1),
    profiles(),
    ladders(),
)
def test_law_a_request_alone_goes_on_as_long_as_anything_fits_however_sure(
    slack_s: float,
    columns_run: tuple[str, ...],
    confidence: float,
    profile: LatencyProfile,
    ladder: Ladder,
) -> None:
    """And by the way that gains most for an answer as sure as the one in hand; to open, by nearly that."""
    alone = Ticket(slack_s, columns_run=columns_run, confidence=confidence)
    decided = plan([alone], 0.0, profile, ladder)

    def cost_s(added: tuple[str, ...]) -> float:
        first, *rest = (profile.latency(column, 1) for column in added)
        return (first.likely_s if columns_run else first.high_s) + sum(later.likely_s for later in rest)

    ways = ladder.improvements(columns_run, ladder.row(columns_run, confidence))
    fitting = {way.added[0]: way.gain for way in reversed(ways) if cost_s(way.added) <= slack_s}
    for way in ways:
        if cost_s(way.added) <= slack_s:
            fitting[way.added[0]] = max(fitting[way.added[0]], way.gain)
    if fitting:
        assert decided.column is not None
        assert fitting[decided.column] >= max(fitting.values()) - (0.0 if columns_run else INDISTINCT)
    elif columns_run:
        assert decided.column is None


@given(queues, profiles(), ladders())
def test_law_the_order_of_the_queue_does_not_matter(
    waiting: list[Ticket], profile: LatencyProfile, ladder: Ladder
) -> None:
    distinct = list({w.ready_by_s: w for w in waiting}.values())
    one, other = plan(distinct, 0.0, profile, ladder), plan(distinct[::-1], 0.0, profile, ladder)
    assert one.column == other.column
    assert set(one.batch) == set(other.batch)
    assert set(one.finished) == set(other.finished)


deadlines = st.lists(st.floats(0, 0.1), max_size=12)


@given(deadlines, profiles(), ladders())
def test_law_whoever_is_admitted_has_an_answer_in_time_if_every_run_takes_its_median(
    ready_by_s: list[float], profile: LatencyProfile, ladder: Ladder
) -> None:
    """Everyone comes at once; whoever is let in is then played through `plan`.

    What runs take longer is allowed for, but not that all of them take their high quantile.
    """
    waiting: list[Ticket] = []
    for by_s in ready_by_s:
        if admit(by_s, 0.0, 0.0, waiting, profile, ladder).is_accepted:
            waiting.append(Ticket(by_s))
    now_s = 0.0
    while waiting:
        # Two at least, or the last would open deeper; the other has no time for anything.
        decided = plan([*waiting, Ticket(-1.0)], now_s, profile, ladder)
        assert decided.column == "1"
        now_s += profile.latency(decided.column, len(decided.batch)).median_s
        for member in decided.batch:
            assert now_s <= member.ready_by_s
        waiting = [one for one in waiting if one not in decided.batch]


@given(st.floats(0, 0.1), profiles(), ladders(), traffics)
def test_law_one_admitted_to_an_idle_server_has_an_answer_in_time_if_its_run_takes_what_it_is_to_take(
    by_s: float, profile: LatencyProfile, ladder: Ladder, traffic: Traffic
) -> None:
    decided = plan([Ticket(by_s)], 0.0, profile, ladder, traffic)
    if admit(by_s, 0.0, 0.0, [], profile, ladder, traffic).is_accepted:
        assert decided.column is not None
        run = profile.latency(decided.column, 1)
        is_scarce = (
            traffic.rate_hz * min(profile.latency("1", n).median_s / n for n in profile.batch_sizes) > 1
        )
        assert (run.high_s if is_scarce else run.median_s) <= by_s + 1e-12


@given(queues, st.floats(0, 0.1), st.floats(0, 0.03), profiles(), ladders(), traffics)
def test_law_what_is_needed_is_more_than_there_is_exactly_for_those_refused_for_their_own_sake(
    waiting: list[Ticket],
    by_s: float,
    busy_until_s: float,
    profile: LatencyProfile,
    ladder: Ladder,
    traffic: Traffic,
) -> None:
    admission = admit(by_s, 0.0, busy_until_s, waiting, profile, ladder, traffic)
    assert admission.needs_s >= busy_until_s + profile.latency("1", 1).median_s - 1e-12
    if admission.is_accepted:
        assert admission.needs_s <= by_s
