"""An upper bound for every policy: what could be had by one who knows all requests, answers and run times.

Two relaxations, each of which can only raise the bound:

* Attainment: column 1 may be interrupted and resumed at no cost, and takes its median at the batch size that
  is cheapest per image, whatever the real batches. For equal lengths, earliest deadline first that gives up
  whoever can no longer make it then answers as many as can be answered at all.
* Accuracy: the time that column 1 leaves over is spent on the best refinements first, wherever in the run it
  is left over, provided that each fits the request's own budget. The oracle knows how sure column 1 will be
  of each picture before it has run, but not whether it is right: it expects what the confidence tables say.

Must not know how any policy decides.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtests.arrivals import Arrivals
from loadtests.offline import Outcomes


@dataclass(frozen=True)
class Bound:
    """Shares of all requests that no policy can exceed, apart from luck in single pictures."""

    attainment: float
    accuracy_of_all: float


def bound(
    arrivals: Arrivals,
    outcomes: Outcomes,
    *,
    cost_s: dict[str, float],
    overhead_s: float,
    n_replicas: int = 1,
) -> Bound:
    """Bound attainment and accuracy over all requests.

    Args:
        arrivals: The requests.
        outcomes: How sure column 1 is of each picture; also tells what refinements are worth, on average over
            pictures of which column 1 is as sure.
        cost_s: Time of one image by column, at the cheapest batch size [s]; shallow first.
        overhead_s: Part of each budget that is not for running columns [s].
        n_replicas: Machines; time is shared between them as if they were one that is so many times faster.

    Cost: O(n log n) in requests.
    """
    column_1, *deeper = cost_s
    unit_s = cost_s[column_1] / n_replicas
    slack_s = arrivals.budget_s - overhead_s
    is_answered = _preemptive_edf(arrivals.at_s, arrivals.at_s + slack_s, unit_s)
    span_s = float(arrivals.at_s[-1] - arrivals.at_s[0] + slack_s[-1])
    spare_s = max(0.0, span_s - float(is_answered.sum()) * unit_s)
    right = expected_accuracy(outcomes, column_1)
    image = arrivals.image
    total = float(right[column_1,][image][is_answered].sum())
    steps = _steps(right, cost_s, deeper)
    gains = np.concatenate([gain[image][is_answered] for gain, _, _ in steps])
    costs = np.concatenate([np.full(int(is_answered.sum()), cost / n_replicas) for _, cost, _ in steps])
    fits = np.concatenate([slack_s[is_answered] >= alone_s for _, _, alone_s in steps])
    rates = np.where(fits & (gains > 0), gains / costs, 0.0)
    order = np.argsort(-rates)
    spent_s = np.cumsum(np.where(rates[order] > 0, costs[order], 0.0))
    total += float(gains[order][(rates[order] > 0) & (spent_s <= spare_s)].sum())
    n = len(arrivals)
    return Bound(attainment=float(is_answered.mean()), accuracy_of_all=total / n)


def expected_accuracy(outcomes: Outcomes, column_1: str) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """By choice of columns and picture: the accuracy among pictures of which column 1 is as sure."""
    confidence = outcomes.confidence[column_1,]
    rows = np.digitize(confidence, np.quantile(confidence, np.linspace(0, 1, 21)[1:-1]))
    return {
        columns: np.array([is_correct[rows == row].mean() for row in range(20)])[rows]
        for columns, is_correct in outcomes.is_correct.items()
    }


def _steps(
    right: dict[tuple[str, ...], NDArray[np.float64]], cost_s: dict[str, float], deeper: Sequence[str]
) -> list[tuple[NDArray[np.float64], float, float]]:
    """Refinements in steps of falling gain per time, so that taking the best first is never wrong.

    Each deeper column is a step; its gain is the most that any set that ends with it adds to any set without
    it: more than can be had together, which only raises the bound.
    """
    column_1 = next(iter(cost_s))
    steps = []
    for column in deeper:
        with_it = [columns for columns in right if column in columns and columns[0] == column_1]
        gain = np.max(
            [
                right[columns] - right[tuple(other for other in columns if other != column)]
                for columns in with_it
            ],
            axis=0,
        )
        steps.append((gain, cost_s[column], cost_s[column_1] + cost_s[column]))
    return steps


def _preemptive_edf(at_s: NDArray[np.float64], by_s: NDArray[np.float64], unit_s: float) -> NDArray[np.bool_]:
    """Who is answered when each takes `unit_s`, can be interrupted, and is given up if it cannot make it."""
    is_answered = np.zeros(len(at_s), np.bool_)
    queue: list[tuple[float, int, float]] = []
    now_s = 0.0
    arrivals_s = [*at_s.tolist(), math.inf]
    deadlines_s = by_s.tolist()
    for i, next_s in enumerate(arrivals_s):
        while queue and now_s < next_s:
            deadline_s, j, left_s = heapq.heappop(queue)
            if now_s + left_s > deadline_s + 1e-12:
                continue
            if now_s + left_s <= next_s:
                now_s += left_s
                is_answered[j] = True
            else:
                heapq.heappush(queue, (deadline_s, j, left_s - (next_s - now_s)))
                now_s = next_s
        if i < len(deadlines_s):
            now_s = max(now_s, next_s)
            heapq.heappush(queue, (deadlines_s[i], i, unit_s))
    return is_answered
