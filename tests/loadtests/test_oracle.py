"""The bound is what can be reached where that is easy to see, and no policy exceeds it."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadtests import records
from loadtests.arrivals import Arrivals
from loadtests.offline import Outcomes
from loadtests.oracle import bound, expected_accuracy
from service.policies import POLICY_NAMES, PolicyName
from tests.loadtests.test_simulate import EXACT, MS, OUTCOMES, play, requests

COST_S = {column: ms / 1e3 for column, ms in MS.items()}
ARTIFACT = Path(__file__).parents[2] / "model" / "pretrained"


def at_once(*budgets_ms: float) -> Arrivals:
    n = len(budgets_ms)
    return Arrivals(np.zeros(n), np.array(budgets_ms) / 1e3, np.zeros(n, np.int64))


def test_of_those_that_come_at_once_as_many_are_answered_as_fit() -> None:
    attainment = bound(at_once(0.6, 0.9, 1.1, 1.4, 1.6), OUTCOMES, cost_s=COST_S, overhead_s=0.0).attainment
    assert attainment == 3 / 5  # in steps of 0.5 ms: by 0.6, by 1.1, by 1.6


def test_one_may_be_interrupted_for_another() -> None:
    arrivals = Arrivals(np.array([0.0, 0.0002]), np.array([0.0011, 0.0006]), np.array([0, 0]))
    assert bound(arrivals, OUTCOMES, cost_s=COST_S, overhead_s=0.0).attainment == 1.0


def test_what_the_server_adds_is_off_the_budget() -> None:
    assert bound(at_once(0.6), OUTCOMES, cost_s=COST_S, overhead_s=0.0002).attainment == 0.0


def test_with_time_for_everything_every_picture_is_refined() -> None:
    n = 100
    arrivals = Arrivals(np.arange(n, dtype=np.float64), np.full(n, 0.9), np.arange(n))
    limit = bound(arrivals, OUTCOMES, cost_s=COST_S, overhead_s=0.0).accuracy_of_all
    best = expected_accuracy(OUTCOMES, "1")["1", "2", "3"][:n].mean()
    assert limit >= best


def test_expected_accuracy_is_right_on_average() -> None:
    for columns, expected in expected_accuracy(OUTCOMES, "1").items():
        assert expected.mean() == pytest.approx(OUTCOMES.is_correct[columns].mean())


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize(("load", "name"), [(0.5, "poisson"), (1.5, "poisson"), (1.0, "gamma-4")])
def test_no_policy_exceeds_the_bound(policy: PolicyName, load: float, name: str) -> None:
    """With pictures enough, luck in single ones is within a point."""
    outcomes = Outcomes.made_up(json.loads((ARTIFACT / "manifest.json").read_text()), 2000, seed=0)
    arrivals = requests(load, name=name)
    limit = bound(arrivals, outcomes, cost_s=COST_S, overhead_s=0.0)
    seen = records.summary(play(policy, arrivals, EXACT))
    assert seen.attainment <= limit.attainment
    assert seen.accuracy_of_all <= limit.accuracy_of_all + 0.01
