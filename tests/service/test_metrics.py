"""Metric names and labels that dashboards rely on, and that every series exists from the start."""

import re

import pytest

from service.errors import OUTCOMES
from service.metrics import Metrics
from service.scheduling import STOPPED_BY


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(batch_sizes=[1, 4], n_waiting=lambda: 3, slowdown=lambda: 1.5, reserve_s=lambda: 0.0004)
    metrics.add_model("toy", "7", sha256="0", provider="cpu", columns=["1", "2"])
    return metrics


def series(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_names_and_labels_are_frozen(metrics: Metrics) -> None:
    without_buckets = {
        re.sub(r'"[^"]*"', '""', name) for name in series(metrics) if not re.search(r"_bucket|_sum", name)
    }
    assert without_buckets == {
        'anytime_requests_total{outcome=""}',
        'anytime_answers_total{column="",stopped_by=""}',
        "anytime_latency_seconds_count",
        "anytime_latency_over_budget_ratio_count",
        'anytime_inference_seconds_count{batch="",column=""}',
        'anytime_run_over_predicted_ratio_count{column=""}',
        "anytime_inference_saved_seconds_total",
        "anytime_slowdown_ratio",
        "anytime_reserve_seconds",
        "anytime_queue_length",
        'anytime_build_info{version=""}',
        'anytime_model_info{model="",provider="",sha256="",version=""}',
    }


def test_every_series_exists_from_the_start(metrics: Metrics) -> None:
    initial = series(metrics)
    for outcome in OUTCOMES:
        assert initial[f'anytime_requests_total{{outcome="{outcome}"}}'] == 0
    for stopped_by in STOPPED_BY:
        assert initial[f'anytime_answers_total{{column="2",stopped_by="{stopped_by}"}}'] == 0
    assert initial['anytime_inference_seconds_count{batch="4",column="2"}'] == 0
    assert initial['anytime_run_over_predicted_ratio_count{column="2"}'] == 0
    assert initial["anytime_inference_saved_seconds_total"] == 0
    assert initial["anytime_queue_length"] == 3


def test_gauges_are_asked_at_each_scrape(metrics: Metrics) -> None:
    assert series(metrics)["anytime_slowdown_ratio"] == 1.5
    assert series(metrics)["anytime_reserve_seconds"] == 0.0004


def test_recording_never_adds_a_series(metrics: Metrics) -> None:
    before = series(metrics).keys()
    metrics.count_request("rejected")
    metrics.count_answer(outcome="late", column="2", stopped_by="load", latency_s=0.003, budget_s=0.002)
    metrics.observe_run("1", 3, 0.001, 1.3)
    metrics.observe_saved(0.25)
    metrics.observe_saved(0.5)
    after = series(metrics)
    assert after.keys() == before
    assert after['anytime_requests_total{outcome="rejected"}'] == 1
    assert after['anytime_requests_total{outcome="late"}'] == 1
    assert after['anytime_answers_total{column="2",stopped_by="load"}'] == 1
    assert after['anytime_inference_seconds_count{batch="4",column="1"}'] == 1
    assert after['anytime_run_over_predicted_ratio_bucket{column="1",le="1.25"}'] == 0
    assert after['anytime_run_over_predicted_ratio_bucket{column="1",le="1.5"}'] == 1
    assert after['anytime_run_over_predicted_ratio_count{column="2"}'] == 0
    assert after["anytime_inference_saved_seconds_total"] == 0.75
    assert after['anytime_latency_over_budget_ratio_bucket{le="1.1"}'] == 0
    assert after['anytime_latency_over_budget_ratio_bucket{le="1.5"}'] == 1


def test_sub_millisecond_latencies_are_told_apart(metrics: Metrics) -> None:
    metrics.count_answer(outcome="answered", column="1", stopped_by="budget", latency_s=4e-4, budget_s=1e-3)
    measured = series(metrics)
    assert measured['anytime_latency_seconds_bucket{le="0.0003"}'] == 0
    assert measured['anytime_latency_seconds_bucket{le="0.0005"}'] == 1
