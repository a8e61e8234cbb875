"""What an answer is worth: held-out accuracy by the columns that have run and by how sure they are. Pure.

Must not know of latencies, requests, clocks or I/O.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

PRIOR_IMAGES = 20.0
"""A confidence table's row counts as if this many more images had gained what all images gain on average:
rows with a few images prove little."""

LEAST_GAIN_SHARE = 1e-3
"""Least gain of an answer that is sure already, as a share of the average gain: an idle server goes on all
the same, a busy one has better things to do."""


@dataclass(frozen=True, slots=True)
class ConfidenceTable:
    """How accurate combinations of columns are, by the confidence of the answer that some of them gave.

    Attributes:
        columns: The columns whose answer's confidence is looked at.
        edges: Bounds of the rows, ascending from 0 to 1; one more than there are rows.
        n: Held-out images by row.
        accuracy: Held-out accuracy by row, for these columns and for combinations that include them.
    """

    columns: tuple[str, ...]
    edges: tuple[float, ...]
    n: tuple[int, ...]
    accuracy: Mapping[tuple[str, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Improvement:
    """Columns that, run after those already run, give an answer of higher measured accuracy.

    Attributes:
        added: What to run, shallow first.
        accuracy: Of the answer then, over all held-out images.
        gain: By how much an answer as confident as the one in hand is expected to become more accurate.
    """

    added: tuple[str, ...]
    accuracy: float
    gain: float


class Ladder:
    """What each combination of columns is worth, by accuracy on held-out images.

    A combination without a measured accuracy is worth its deepest column alone, which is then also its
    answer.

    Args:
        columns: Shallow first.
        accuracy: Held-out accuracy by combination.
        tables: Held-out accuracy by confidence; where there is none, every answer gains the average.

    Raises:
        ValueError: a column has no accuracy of its own; give one.
    """

    def __init__(
        self,
        columns: Sequence[str],
        accuracy: Mapping[tuple[str, ...], float],
        tables: Iterable[ConfidenceTable] = (),
    ) -> None:
        if missing := [column for column in columns if (column,) not in accuracy]:
            raise ValueError(f"column {missing[0]} has no accuracy of its own: measure each single column")
        self.columns = tuple(columns)
        self._accuracy = dict(accuracy)
        self._tables = {table.columns: table for table in tables}
        runs = (run for size in range(len(columns) + 1) for run in combinations(self.columns, size))
        self._improvements = {
            run: tuple(self._find_improvements(run, row) for row in range(self._n_rows(run))) for run in runs
        }

    @property
    def shallowest(self) -> str:
        """The mandatory column."""
        return self.columns[0]

    def accuracy(self, columns_run: tuple[str, ...]) -> float:
        """Held-out accuracy of the answer after these columns; 0 when none has run."""
        if not columns_run:
            return 0.0
        return self._accuracy.get(columns_run, self._accuracy[columns_run[-1:]])

    def row(self, columns_run: tuple[str, ...], confidence: float) -> int:
        """The row of the confidence table in which an answer falls; 0 without a table."""
        if not (table := self._tables.get(columns_run)):
            return 0
        return min(max(bisect_right(table.edges, confidence) - 1, 0), len(table.n) - 1)

    def improvements(self, columns_run: tuple[str, ...], row: int = 0) -> tuple[Improvement, ...]:
        """Every way on to a more accurate answer through deeper columns, the most accurate first."""
        return self._improvements[columns_run][row]

    def _n_rows(self, columns_run: tuple[str, ...]) -> int:
        table = self._tables.get(columns_run)
        return len(table.n) if table else 1

    def _find_improvements(self, columns_run: tuple[str, ...], row: int) -> tuple[Improvement, ...]:
        deeper = self.columns[self.columns.index(columns_run[-1]) + 1 :] if columns_run else self.columns
        ways = (added for size in range(1, len(deeper) + 1) for added in combinations(deeper, size))
        found = (
            Improvement(added, self.accuracy(columns_run + added), self._gain(columns_run, added, row))
            for added in ways
        )
        better = [way for way in found if way.accuracy > self.accuracy(columns_run)]
        return tuple(sorted(better, key=lambda way: -way.accuracy))

    def _gain(self, columns_run: tuple[str, ...], added: tuple[str, ...], row: int) -> float:
        on_average = self.accuracy(columns_run + added) - self.accuracy(columns_run)
        table = self._tables.get(columns_run)
        if not table or not {columns_run, columns_run + added} <= table.accuracy.keys():
            return on_average
        here = table.accuracy[columns_run + added][row] - table.accuracy[columns_run][row]
        n = table.n[row]
        gain = (n * here + PRIOR_IMAGES * on_average) / (n + PRIOR_IMAGES)
        return max(gain, LEAST_GAIN_SHARE * on_average)
