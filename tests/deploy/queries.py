"""What holds for every query of rules, runbooks and dashboards: it asks for what there is."""

import re
from collections.abc import Iterator

import promql_parser

from service.errors import OUTCOMES, REASONS
from service.metrics import STAGES
from service.providers import NAMES
from service.scheduling import STOPPED_BY
from tests.service.test_metrics import CONTRACT, PROCESS

METRICS = CONTRACT | PROCESS
CLOSED: dict[str, set[str]] = {
    "outcome": set(OUTCOMES),
    "reason": set(REASONS),
    "stage": set(STAGES),
    "stopped_by": set(STOPPED_BY),
    "provider": set(NAMES),
    "alertstate": {"firing", "pending"},
}
"""What a label that is asked for by name may be."""

PROMETHEUS: dict[str, set[str]] = {
    "up": set(),
    "scrape_duration_seconds": set(),
    "ALERTS": {"alertname", "alertstate", "severity"},
}
"""Prometheus' own, with the labels that it gives them."""

TARGET = {"job", "instance", "namespace"}
SUFFIXES = ("_bucket", "_sum", "_count")


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """Everything that a query asks for by name.

    Raises:
        ValueError: it is no PromQL.
    """
    found: list[promql_parser.VectorSelector] = []

    def visit(expression: promql_parser.Expr) -> bool:
        if isinstance(expression, promql_parser.MatrixSelector):
            found.append(expression.vector_selector)
        elif isinstance(expression, promql_parser.VectorSelector):
            found.append(expression)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def check(query: str, recorded: set[str]) -> None:
    """Fail if a query asks for a metric, a label or a value of a label that does not exist.

    Args:
        query: PromQL, variables of Grafana replaced.
        recorded: Names that rules record.
    """
    asked = selectors(query)
    assert asked or "vector" in query, f"{query} asks for nothing"
    for selector in asked:
        name = selector.name or ""
        labels = labels_of(name, recorded)
        for matcher in selector.matchers.matchers:
            assert labels is None or matcher.name in labels | TARGET, f"{name} has no label {matcher.name}"
            if matcher.name in CLOSED:
                unknown = set(matcher.value.split("|")) - CLOSED[matcher.name]
                assert not unknown, f"{matcher.name} is never {unknown}: {query}"


def labels_of(name: str, recorded: set[str]) -> set[str] | None:
    """The labels of a series beside its target's; None: whatever its rule leaves."""
    if name in recorded:
        return None
    if name in PROMETHEUS:
        return PROMETHEUS[name]
    if name in METRICS:
        kind, labels = METRICS[name]
        assert kind != "histogram", f"{name} is a histogram: ask for one of {SUFFIXES}"
        return labels
    family = re.sub(rf"({'|'.join(SUFFIXES)})$", "", name)
    assert METRICS.get(family, ("", set()))[0] == "histogram", f"there is no metric {name}"
    return METRICS[family][1] | ({"le"} if name.endswith("_bucket") else set())


def blocks(page: str) -> Iterator[str]:
    """The queries of a page in Markdown."""
    yield from re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
