"""What an answer is worth: by example, and gains against a formula written a second time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.ladder import ConfidenceTable, Ladder
from tests.fakes import ACCURACY
from tests.service.strategies import COLUMNS, LADDER, SUBSETS, ladders

TABLE = ConfidenceTable(
    columns=("1",),
    edges=(0.0, 0.5, 0.9, 1.0),
    n=(80, 0, 980),
    accuracy={
        ("1",): (0.30, 0.70, 0.99),
        ("1", "2"): (0.50, 0.75, 0.99),
        ("1", "3"): (0.70, 0.80, 0.98),
    },
)
TABULATED = Ladder(("1", "2", "3"), ACCURACY, [TABLE])


def gains(ladder: Ladder, columns_run: tuple[str, ...], row: int = 0) -> dict[tuple[str, ...], float]:
    return {way.added: way.gain for way in ladder.improvements(columns_run, row)}


def test_each_column_needs_an_accuracy_of_its_own() -> None:
    with pytest.raises(ValueError, match="column 2"):
        Ladder(("1", "2"), {("1",): 0.5})


def test_an_unmeasured_combination_is_worth_its_deepest_column() -> None:
    assert LADDER.accuracy(("2", "3")) == ACCURACY["3",]
    assert LADDER.accuracy(("1", "2")) == ACCURACY["1", "2"]
    assert LADDER.accuracy(()) == 0


def test_the_ways_on_lead_through_deeper_columns_the_most_accurate_first() -> None:
    assert [way.added for way in LADDER.improvements(("1",))] == [("2", "3"), ("3",), ("2",)]
    assert [way.added for way in LADDER.improvements(("2",))] == [("3",)]
    assert LADDER.improvements(("3",)) == ()
    assert LADDER.improvements(())[0].added == ("1", "2", "3")


def test_what_is_no_more_accurate_is_no_way_on() -> None:
    flat = Ladder(("1", "2"), {("1",): 0.9, ("2",): 0.8, ("1", "2"): 0.9})
    assert flat.improvements(("1",)) == ()


def test_without_a_table_every_answer_gains_the_average() -> None:
    assert gains(LADDER, ("1",)) == pytest.approx({("2",): 0.07, ("3",): 0.11, ("2", "3"): 0.13})
    assert gains(TABULATED, ("2",)) == gains(LADDER, ("2",))


def test_a_row_with_many_images_gains_what_they_gained() -> None:
    """80 images of the row and 20 as on average."""
    unsure = gains(TABULATED, ("1",), 0)
    assert unsure["2",] == pytest.approx((80 * 0.20 + 20 * 0.07) / 100)
    assert unsure["3",] == pytest.approx((80 * 0.40 + 20 * 0.11) / 100)


def test_a_row_without_images_gains_the_average() -> None:
    assert gains(TABULATED, ("1",), 1)["2",] == pytest.approx(0.07)


def test_one_who_is_sure_gains_little_but_never_nothing() -> None:
    sure = gains(TABULATED, ("1",), 2)
    assert sure["2",] == pytest.approx(20 * 0.07 / 1000)
    assert sure["3",] == pytest.approx(0.11e-3)  # it would even lose: a thousandth of the average


def test_a_combination_that_the_table_lacks_gains_the_average() -> None:
    assert gains(TABULATED, ("1",), 0)["2", "3"] == pytest.approx(0.13)


@pytest.mark.parametrize(
    ("confidence", "row"),
    [(-0.1, 0), (0.0, 0), (0.4999, 0), (0.5, 1), (0.8999, 1), (0.9, 2), (1.0, 2), (1.1, 2)],
)
def test_a_row_begins_at_its_edge_and_both_ends_are_inside(confidence: float, row: int) -> None:
    assert TABULATED.row(("1",), confidence) == row


def test_without_a_table_there_is_one_row() -> None:
    assert TABULATED.row(("2",), 0.95) == 0
    assert LADDER.row(("1",), 0.95) == 0


@given(ladders(), st.sampled_from([(), *SUBSETS]), st.floats(0, 1))
def test_law_every_way_on_is_deeper_and_more_accurate_and_gains_something(
    ladder: Ladder, columns_run: tuple[str, ...], confidence: float
) -> None:
    ways = ladder.improvements(columns_run, ladder.row(columns_run, confidence))
    deepest = COLUMNS.index(columns_run[-1]) if columns_run else -1
    deeper = [run for run in SUBSETS if COLUMNS.index(run[0]) > deepest]
    here = ladder.accuracy(columns_run)
    assert {way.added for way in ways} == {
        added for added in deeper if ladder.accuracy(columns_run + added) > here
    }
    assert [way.accuracy for way in ways] == sorted((way.accuracy for way in ways), reverse=True)
    for way in ways:
        assert way.accuracy == ladder.accuracy(columns_run + way.added)
        assert 0 < way.gain <= 1


@given(ladders(), st.sampled_from(SUBSETS))
def test_law_confidence_changes_what_is_gained_but_not_what_leads_on(
    ladder: Ladder, columns_run: tuple[str, ...]
) -> None:
    ways = [
        [(way.added, way.accuracy) for way in ladder.improvements(columns_run, ladder.row(columns_run, sure))]
        for sure in (0.0, 0.4, 0.6, 0.8, 1.0)
    ]
    assert all(one == ways[0] for one in ways)
