"""What people are shown says what was measured, and the same figures look the same."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests import report
from loadtests.records import Point, Record


def a_point(
    policy: str = "anytime", panel: str = "poisson", attainment: float = 0.9, **changed: Any
) -> Point:
    values: dict[str, Any] = {
        "attainment": (attainment, 0.01),
        "accuracy": (0.8, 0.02),
        "accuracy_of_all": (0.72, math.nan),
        "goodput_hz": (123.456, 1.5),
    }
    return Point(policy, panel, **(values | changed))


def test_the_table_has_a_row_per_point() -> None:
    nobody = a_point("deep", attainment=0.0, accuracy=(math.nan, math.nan), goodput_hz=(0.0, math.nan))
    rows = report.table([a_point("a|b"), nobody]).splitlines()
    assert rows[0].split(" | ")[0] == "| load"
    assert rows[2:] == [
        "| poisson | a\\|b | 90.00 ± 1.00 | 80.00 ± 2.00 | 72.00 | 123.46 ± 1.50 |",
        "| poisson | deep | 0.00 ± 1.00 | none | 72.00 | 0.00 |",
    ]
    assert rows[0].count("|") == rows[1].count("|") == rows[3].count("|")


@pytest.mark.parametrize("n_panels", [1, 2, 4])
def test_the_same_points_give_the_same_picture(n_panels: int, tmp_path: Path) -> None:
    points = [
        a_point(policy, f"load {panel}", attainment=0.5 + 0.1 * panel)
        for panel in range(n_panels)
        for policy in ("anytime", "column 1", "deep")
    ]
    for name in ("one.svg", "two.svg"):
        report.draw_plane(points, tmp_path / name, "a title")
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert b"<dc:date>" not in drawn
    report.draw_plane([*points[:-1], a_point("deep", "load 0", 0.4)], tmp_path / "other.svg", "a title")
    assert drawn != (tmp_path / "other.svg").read_bytes()


def test_the_picture_names_panels_policies_and_whoever_has_no_accuracy(tmp_path: Path) -> None:
    points = [
        a_point("anytime", "poisson"),
        a_point("deep", "gamma-8", attainment=0.0, accuracy=(math.nan, math.nan)),
        a_point("unrepeated", "gamma-8", accuracy=(0.7, math.nan)),
    ]
    report.draw_plane(points, tmp_path / "plane.svg", "all of it")
    said = re.findall(r"<!-- (.*?) -->", (tmp_path / "plane.svg").read_text())
    for text in ("poisson", "gamma-8", "anytime", "deep", "unrepeated", "no accuracy: deep", "all of it"):
        assert text in said


def test_fifty_six_policies_look_different() -> None:
    styles = report._styles()
    first = [next(styles) for _ in range(len(report.COLOURS) * len(report.MARKERS))]
    assert len(set(first)) == 56
    assert len({colour for colour, _ in first[:7]}) == len({marker for _, marker in first[:7]}) == 7


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        report.draw_plane([], tmp_path / "plane.svg", "none")


# ---- the report of a run ----


def a_run(name: str, latency_ms: float) -> report.Run:
    n = 400
    record = Record(
        due_s=np.linspace(0, 3, n),
        budget_s=np.full(n, 0.005),
        latency_s=np.where(np.arange(n) % 4, latency_ms / 1e3, 0.006),
        outcome=np.full(n, "answered"),
        columns_run=np.where(np.arange(n) % 2, "1", "1+2"),
        is_correct=np.arange(n) % 5 > 0,
        claims_met=np.full(n, fill_value=True),
        lag_s=np.zeros(n),
    )
    return report.Run(name, record, {"claim": "A <claim>.", "is_labelled": True})


def test_the_figures_of_a_run_are_judged_by_the_budget() -> None:
    figures = a_run("now", 2.0).figures()

    assert figures["attainment, %"].value == 75.0
    assert figures["attainment, %"].low < 75.0 < figures["attainment, %"].high
    assert figures["accuracy of those in time, %"].value == pytest.approx(80.0)
    assert figures["right and in time, % of all"].value == pytest.approx(60.0)
    assert figures["latency p50, ms"].value == 2.0
    assert figures["claims of being in time that were false by over 1 ms"].value == 0


def test_two_runs_stand_side_by_side_and_what_differs_stands_out() -> None:
    page = report.page([a_run("now", 2.0), a_run("before", 4.0)])
    [latency] = re.findall(r"<td>latency p50, ms</td>.*?</tr>", page, re.DOTALL)
    [share] = re.findall(r"<td>attainment, %</td>.*?</tr>", page, re.DOTALL)

    assert '<td class="bad">-2</td>' in latency
    assert "<td>+0</td>" in share
    assert "A &lt;claim&gt;." in page
