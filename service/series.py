"""Counters, gauges and histograms over closed sets of labels, and their text as Prometheus reads it.

Must not know what is counted. To be used from one thread. What is wrong with prometheus_client's own, where
callers grant milliseconds: docs/decisions/0007-metrics-of-our-own.md.

Source of the text format, version 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Literal, Protocol, TypeVar

Values = tuple[str, ...]
"""Of labels, in the order of their names."""


class Counter:
    """A number that only grows."""

    __slots__ = ("_head", "value")

    def __init__(self, name: str, labels: str) -> None:
        self._head = f"{name}{_braced(labels)} "
        self.value = 0.0

    def inc(self, by: float = 1.0) -> None:
        """Add so much, at least 0. Cost: 0.1 us."""
        self.value += by

    def lines(self) -> Iterator[str]:
        """As Prometheus reads it."""
        yield f"{self._head}{self.value!r}\n"


class Histogram:
    """How many values were at most as large as each bound, and their sum.

    Args:
        name: Of its family.
        labels: Rendered, without braces.
        bounds: Ascending; one without end is added.
    """

    __slots__ = ("_bounds", "_heads", "_sum", "_sum_head", "counts")

    def __init__(self, name: str, labels: str, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self.counts = [0] * (len(self._bounds) + 1)
        """Values in each bucket alone."""
        self._sum = 0.0
        comma = "," if labels else ""
        edges = (*map(repr, self._bounds), "+Inf")
        self._heads = [f'{name}_bucket{{{labels}{comma}le="{edge}"}} ' for edge in edges]
        self._heads.append(f"{name}_count{_braced(labels)} ")
        self._sum_head = f"{name}_sum{_braced(labels)} "

    def observe(self, value: float) -> None:
        """Take one value in. Cost: 0.2 us."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        """As Prometheus reads it."""
        n = 0
        for head, count in zip(self._heads, self.counts, strict=False):  # the last head is for n
            n += count
            yield f"{head}{n}\n"
        yield f"{self._heads[-1]}{n}\n"
        yield f"{self._sum_head}{self._sum!r}\n"


class Series(Protocol):
    """One series, or several that belong together."""

    def lines(self) -> Iterator[str]:
        """As Prometheus reads it."""


SeriesT = TypeVar("SeriesT", bound=Series)


class Family(Generic[SeriesT]):
    """All series of one name that this process keeps.

    Args:
        name: As Prometheus has it, with unit and suffix.
        text: One line that says what is counted.
        kind: Of metric.
        labels: Their names.
        make: Makes a series from its rendered labels, without braces.
    """

    def __init__(
        self,
        name: str,
        text: str,
        kind: Literal["counter", "histogram"],
        labels: Sequence[str],
        make: Callable[[str], SeriesT],
    ) -> None:
        self._head = _head(name, text, kind)
        self._labels = tuple(labels)
        self._make = make
        self._series: dict[Values, SeriesT] = {}

    def add(self, *values: str) -> SeriesT:
        """Have the series of these labels; the one that is there if it is."""
        if values not in self._series:
            self._series[values] = self._make(_rendered(self._labels, values))
        return self._series[values]

    def __getitem__(self, values: Values) -> SeriesT:
        """The series of these labels.

        Raises:
            KeyError: it was never added: labels come from closed sets.
        """
        return self._series[values]

    def lines(self) -> Iterator[str]:
        """As Prometheus reads it."""
        yield self._head
        for series in self._series.values():
            yield from series.lines()


class Asked:
    """All series of one name whose values are asked for at each scrape.

    Args:
        name: As `Family`.
        text: As `Family`.
        kind: Of metric.
        labels: Their names.
        ask: Gives the labels and the value of each series that there is now.
    """

    def __init__(
        self,
        name: str,
        text: str,
        kind: Literal["counter", "gauge"],
        labels: Sequence[str],
        ask: Callable[[], Iterable[tuple[Values, float]]],
    ) -> None:
        self._name = name
        self._head = _head(name, text, kind)
        self._labels = tuple(labels)
        self._ask = ask

    def lines(self) -> Iterator[str]:
        """As Prometheus reads it."""
        yield self._head
        for values, value in self._ask():
            yield f"{self._name}{_braced(_rendered(self._labels, values))} {float(value)!r}\n"


def _head(name: str, text: str, kind: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _rendered(labels: Sequence[str], values: Values) -> str:
    pairs = sorted(zip(labels, values, strict=True))
    return ",".join(f'{label}="{_escaped(value)}"' for label, value in pairs)


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
