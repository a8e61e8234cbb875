"""What the text says is what was counted, as Prometheus' own client reads it."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.parser import text_string_to_metric_families

from service.series import Asked, Counter, Family, Histogram

BOUNDS = (0.001, 0.5, 1.0, 20.0)


def read(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@given(st.lists(st.floats(min_value=0, max_value=100) | st.sampled_from(BOUNDS)))
def test_a_histogram_has_the_same_samples_as_prometheus_clients(values: list[float]) -> None:
    ours = Family(
        "a_seconds", "Text", "histogram", ["column"], partial(Histogram, "a_seconds", bounds=BOUNDS)
    )
    theirs = TheirHistogram("a_seconds", "Text", ["column"], buckets=BOUNDS, registry=CollectorRegistry())
    ours.add("1")
    theirs.labels("1")

    for value in values:
        ours["1",].observe(value)
        theirs.labels("1").observe(value)

    expected = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in theirs.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert read("".join(ours.lines())) == pytest.approx(expected)


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_labels_may_hold_anything(one: str, other: str) -> None:
    family = Family("a_total", "Text", "counter", ["one", "other"], partial(Counter, "a_total"))

    family.add(one, other).inc(2.5)

    (samples,) = [family.samples for family in text_string_to_metric_families("".join(family.lines()))]
    assert [(sample.labels, sample.value) for sample in samples] == [({"one": one, "other": other}, 2.5)]


def test_without_labels_there_are_no_braces() -> None:
    counter = Family("a_total", "Text", "counter", [], partial(Counter, "a_total"))
    counter.add().inc()
    histogram = Family("b_ratio", "Text", "histogram", [], partial(Histogram, "b_ratio", bounds=(1.0,)))
    histogram.add().observe(3)

    assert "".join([*counter.lines(), *histogram.lines()]) == (
        "# HELP a_total Text\n# TYPE a_total counter\na_total 1.0\n"
        "# HELP b_ratio Text\n# TYPE b_ratio histogram\n"
        'b_ratio_bucket{le="1.0"} 0\nb_ratio_bucket{le="+Inf"} 1\nb_ratio_count 1\nb_ratio_sum 3.0\n'
    )


def test_a_series_is_added_once_and_only_on_purpose() -> None:
    family = Family("a_total", "Text", "counter", ["column"], partial(Counter, "a_total"))

    assert family.add("1") is family.add("1")
    with pytest.raises(KeyError):
        family["2",]


def test_what_is_asked_for_is_asked_at_each_scrape() -> None:
    there = {"0": 3, "1": 4}
    asked = Asked("a_bytes", "Text", "gauge", ["gpu"], lambda: [((gpu,), n) for gpu, n in there.items()])
    assert read("".join(asked.lines())) == {("a_bytes", (("gpu", "0"),)): 3, ("a_bytes", (("gpu", "1"),)): 4}

    del there["0"]

    assert read("".join(asked.lines())) == {("a_bytes", (("gpu", "1"),)): 4}
