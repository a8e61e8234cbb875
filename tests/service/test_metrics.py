"""Names, types and labels that dashboards rely on, series from the start, and what they say."""

import asyncio
import gc
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import OUTCOMES, REASONS
from service.gpu import Gpu, Gpus
from service.metrics import STAGES, Metrics, RunTime
from service.scheduling import STOPPED_BY

CONTRACT: dict[str, tuple[str, set[str]]] = {
    "anytime_requests_total": ("counter", {"outcome"}),
    "anytime_rejections_total": ("counter", {"reason"}),
    "anytime_latency_seconds": ("histogram", set()),
    "anytime_latency_over_budget_ratio": ("histogram", set()),
    "anytime_stage_seconds": ("histogram", {"stage"}),
    "anytime_answers_total": ("counter", {"column", "stopped_by"}),
    "anytime_expected_correct_answers_total": ("counter", {"outcome"}),
    "anytime_inference_seconds": ("histogram", {"column", "batch"}),
    "anytime_inference_images_total": ("counter", {"column"}),
    "anytime_run_over_predicted_ratio": ("histogram", {"column"}),
    "anytime_failed_runs_total": ("counter", {"column"}),
    "anytime_preempted_runs_total": ("counter", {"column"}),
    "anytime_inference_saved_seconds_total": ("counter", set()),
    "anytime_profiled_run_seconds": ("gauge", {"model", "version", "column", "batch"}),
    "anytime_predicted_run_seconds": ("gauge", {"model", "version", "column", "batch"}),
    "anytime_gc_pause_seconds": ("histogram", {"generation"}),
    "anytime_event_loop_lag_seconds": ("histogram", set()),
    "anytime_event_loop_cpu_seconds_total": ("counter", set()),
    "anytime_gpu_memory_used_bytes": ("gauge", {"gpu"}),
    "anytime_gpu_memory_size_bytes": ("gauge", {"gpu"}),
    "anytime_gpu_busy_ratio": ("gauge", {"gpu"}),
    "anytime_queue_length": ("gauge", set()),
    "anytime_slowdown_ratio": ("gauge", set()),
    "anytime_reserve_seconds": ("gauge", set()),
    "anytime_build_info": ("gauge", {"version"}),
    "anytime_model_info": ("gauge", {"model", "version", "sha256", "provider"}),
    "anytime_model_accuracy_ratio": ("gauge", {"model", "version", "columns"}),
}
PROCESS: dict[str, tuple[str, set[str]]] = {
    "process_virtual_memory_bytes": ("gauge", set()),
    "process_resident_memory_bytes": ("gauge", set()),
    "process_start_time_seconds": ("gauge", set()),
    "process_cpu_seconds_total": ("counter", set()),
    "process_open_fds": ("gauge", set()),
    "process_max_fds": ("gauge", set()),
}
"""prometheus_client's, on Linux only."""

RUN_TIMES = (RunTime("toy", "7", "1", 1, 0.001, 0.002), RunTime("toy", "7", "1", 4, 0.003, 0.004))


class ThreeGpus(Gpus):
    """The first is idle, the last does not say how busy it is."""

    async def sample(self) -> tuple[Gpu, ...]:
        return Gpu(0, 5, 80, 0.0), Gpu(1, 6, 80, 0.25), Gpu(2, 7, 80, None)


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(
        n_waiting=lambda: 3,
        slowdown=lambda: 1.5,
        reserve_s=lambda: 0.0004,
        run_times=lambda: RUN_TIMES,
        gpus=ThreeGpus(),
    )
    metrics.add_model(
        *("toy", "7"),
        sha256="0",
        provider="cpu",
        columns=["1", "2"],
        batch_sizes=[1, 4],
        accuracy={("1",): 0.8, ("1", "2"): 0.9},
    )
    return metrics


def text(metrics: Metrics) -> str:
    return asyncio.run(metrics.exposition()).decode()


def series(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in text(metrics).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def answer(**different: Any) -> dict[str, Any]:
    return {
        "outcome": "answered",
        "column": "1",
        "stopped_by": "budget",
        "accuracy": 0.8,
        "latency_s": 0.004,
        "budget_s": 0.008,
        "decode_s": 0.0005,
        "queue_s": 0.0,
        "inference_s": 0.002,
        "way_out_s": 0.001,
    } | different


# ---- the contract ----


def test_names_types_and_labels_are_frozen(metrics: Metrics) -> None:
    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(text(metrics)):
        name = family.name + "_total" * (family.type == "counter")
        assert name not in found
        found[name] = (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
    assert found == CONTRACT | (PROCESS if sys.platform == "linux" else {})


@pytest.mark.prometheus
@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: apt install prometheus)"
)
def test_prometheus_has_no_complaint(metrics: Metrics) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text(metrics),
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_each_metric_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    explained = {}
    for name, kind, labels in rows:
        assert name not in explained
        explained[name.strip(" `")] = (kind.strip(" `"), set(re.findall(r"`(\w+)`", labels)))
    assert explained == CONTRACT | PROCESS


def test_names_follow_the_conventions() -> None:
    for name, (kind, _) in CONTRACT.items():
        assert name.endswith("_total") == (kind == "counter")
        unit = name.removesuffix("_total").rpartition("_")[2]
        assert unit in {
            *("seconds", "bytes", "ratio", "info"),
            *("requests", "rejections", "answers", "images", "runs", "length"),
        }


def test_every_series_exists_from_the_start(metrics: Metrics) -> None:
    initial = series(metrics)
    for outcome in OUTCOMES:
        assert initial[f'anytime_requests_total{{outcome="{outcome}"}}'] == 0
    for reason in REASONS:
        assert initial[f'anytime_rejections_total{{reason="{reason}"}}'] == 0
    for stage in STAGES:
        assert initial[f'anytime_stage_seconds_count{{stage="{stage}"}}'] == 0
    for outcome in ("answered", "late"):
        assert initial[f'anytime_expected_correct_answers_total{{outcome="{outcome}"}}'] == 0
    for stopped_by in STOPPED_BY:
        assert initial[f'anytime_answers_total{{column="2",stopped_by="{stopped_by}"}}'] == 0
    for generation in "012":
        assert initial[f'anytime_gc_pause_seconds_count{{generation="{generation}"}}'] == 0
    assert initial['anytime_inference_seconds_count{batch="4",column="2"}'] == 0
    assert initial['anytime_inference_images_total{column="2"}'] == 0
    assert initial['anytime_run_over_predicted_ratio_count{column="2"}'] == 0
    assert initial['anytime_failed_runs_total{column="2"}'] == 0
    assert initial["anytime_inference_saved_seconds_total"] == 0
    assert initial["anytime_event_loop_lag_seconds_count"] == 0
    assert initial["anytime_queue_length"] == 3


def test_gauges_are_asked_at_each_scrape(metrics: Metrics) -> None:
    asked = series(metrics)
    assert asked["anytime_slowdown_ratio"] == 1.5
    assert asked["anytime_reserve_seconds"] == 0.0004
    assert asked['anytime_profiled_run_seconds{batch="4",column="1",model="toy",version="7"}'] == 0.003
    assert asked['anytime_predicted_run_seconds{batch="4",column="1",model="toy",version="7"}'] == 0.004
    assert asked['anytime_gpu_memory_used_bytes{gpu="1"}'] == 6
    assert asked['anytime_gpu_memory_size_bytes{gpu="1"}'] == 80
    assert asked['anytime_gpu_busy_ratio{gpu="0"}'] == 0
    assert asked['anytime_gpu_busy_ratio{gpu="1"}'] == 0.25
    assert 'anytime_gpu_busy_ratio{gpu="2"}' not in asked


def test_recording_never_adds_a_series(metrics: Metrics) -> None:
    before = series(metrics).keys()
    metrics.count_request("disconnected")
    metrics.count_request("invalid")
    metrics.count_request("rejected", "rate")
    metrics.count_request("rejected", "load")
    metrics.count_answer(
        **answer(outcome="late", column="2", stopped_by="load", latency_s=0.003, budget_s=0.002)
    )
    metrics.observe_run("1", 3, 0.001, 1.3)
    metrics.observe_failed_run("2")
    metrics.observe_saved(0.25)
    metrics.observe_saved(0.5)
    after = series(metrics)
    assert after.keys() == before
    assert after['anytime_requests_total{outcome="disconnected"}'] == 1
    assert after['anytime_requests_total{outcome="invalid"}'] == 1
    assert after['anytime_requests_total{outcome="rejected"}'] == 2
    assert after['anytime_requests_total{outcome="late"}'] == 1
    assert after['anytime_rejections_total{reason="rate"}'] == 1
    assert after['anytime_rejections_total{reason="load"}'] == 1
    assert after['anytime_rejections_total{reason="budget"}'] == 0
    assert after['anytime_answers_total{column="2",stopped_by="load"}'] == 1
    assert after['anytime_inference_seconds_count{batch="4",column="1"}'] == 1
    assert after['anytime_inference_images_total{column="1"}'] == 3
    assert after['anytime_failed_runs_total{column="2"}'] == 1
    assert after['anytime_run_over_predicted_ratio_bucket{column="1",le="1.25"}'] == 0
    assert after['anytime_run_over_predicted_ratio_bucket{column="1",le="1.5"}'] == 1
    assert after['anytime_run_over_predicted_ratio_count{column="2"}'] == 0
    assert after["anytime_inference_saved_seconds_total"] == 0.75
    assert after['anytime_latency_over_budget_ratio_bucket{le="1.1"}'] == 0
    assert after['anytime_latency_over_budget_ratio_bucket{le="1.5"}'] == 1


# ---- what is said of requests ----


def test_models_with_larger_batches_are_counted_beside_others_with_smaller_ones(metrics: Metrics) -> None:
    for name, column, batch_sizes in (("large", "1", [1, 4, 16]), ("small", "3", [1])):
        metrics.add_model(
            name, "1", sha256="0", provider="cpu", columns=[column], batch_sizes=batch_sizes, accuracy={}
        )
    for n_images in (1, 3, 5):
        metrics.observe_run("1", n_images, 0.001, 1.0)
    told = series(metrics)
    counts = [told[f'anytime_inference_seconds_count{{batch="{n}",column="1"}}'] for n in (1, 4, 16)]
    assert counts == [1, 1, 1]
    assert 'anytime_inference_seconds_count{batch="4",column="3"}' not in told


def test_sub_millisecond_latencies_are_told_apart(metrics: Metrics) -> None:
    metrics.count_answer(**answer(latency_s=4e-4))
    measured = series(metrics)
    assert measured['anytime_latency_seconds_bucket{le="0.0003"}'] == 0
    assert measured['anytime_latency_seconds_bucket{le="0.0005"}'] == 1


def test_the_stages_add_up_to_the_latency(metrics: Metrics) -> None:
    metrics.count_answer(
        **answer(latency_s=0.0105, decode_s=0.001, queue_s=0.002, inference_s=0.003, way_out_s=0.004)
    )
    after = series(metrics)
    seconds = {stage: after[f'anytime_stage_seconds_sum{{stage="{stage}"}}'] for stage in STAGES}
    assert seconds == pytest.approx(
        {"read": 0.0005, "decode": 0.001, "queue": 0.002, "inference": 0.003, "way_out": 0.004}
    )
    assert sum(seconds.values()) == pytest.approx(after["anytime_latency_seconds_sum"])


def test_a_rate_over_a_rate_is_the_accuracy_of_what_was_sent(metrics: Metrics) -> None:
    metrics.count_answer(**answer(accuracy=0.8))
    metrics.count_answer(**answer(accuracy=0.8))
    metrics.count_answer(**answer(accuracy=0.9, column="2"))
    metrics.count_answer(**answer(accuracy=0.9, column="2", outcome="late"))
    after = series(metrics)
    right = {name: value for name, value in after.items() if name.startswith("anytime_expected_correct")}
    sent = [value for name, value in after.items() if name.startswith("anytime_answers_total")]
    assert right == pytest.approx(
        {
            'anytime_expected_correct_answers_total{outcome="answered"}': 2.5,
            'anytime_expected_correct_answers_total{outcome="late"}': 0.9,
        }
    )
    assert sum(right.values()) / sum(sent) == pytest.approx((0.8 + 0.8 + 0.9 + 0.9) / 4)


# ---- models come and go ----


def test_a_model_that_goes_takes_its_description_along_and_leaves_its_counts(metrics: Metrics) -> None:
    metrics.count_answer(**answer(column="2"))
    there = 'anytime_model_info{model="toy",provider="cpu",sha256="0",version="7"}'
    accuracy = 'anytime_model_accuracy_ratio{columns="1+2",model="toy",version="7"}'
    before = series(metrics)
    assert before[there] == 1
    assert before[accuracy] == 0.9
    metrics.remove_model("toy", "7")
    after = series(metrics)
    assert there not in after
    assert accuracy not in after
    assert after['anytime_answers_total{column="2",stopped_by="budget"}'] == 1


# ---- the machine beneath ----


def test_collections_of_garbage_are_timed_while_serving_and_not_after(metrics: Metrics) -> None:
    full = 'anytime_gc_pause_seconds_count{generation="2"}'

    async def serve() -> None:
        with metrics.watching():
            gc.collect()

    gc.disable()
    try:
        asyncio.run(serve())
        gc.collect()
    finally:
        gc.enable()

    assert series(metrics)[full] == 1
    assert series(metrics)['anytime_gc_pause_seconds_sum{generation="2"}'] > 0


def test_a_deaf_event_loop_is_seen(metrics: Metrics) -> None:
    async def serve() -> None:
        with metrics.watching():
            time.sleep(0.35)  # noqa: ASYNC251 - what this is about
            async with asyncio.timeout(30):
                while True:
                    await asyncio.sleep(0)
                    if "anytime_event_loop_lag_seconds_count 1" in (await metrics.exposition()).decode():
                        return

    asyncio.run(serve())
    after = series(metrics)
    assert after['anytime_event_loop_lag_seconds_bucket{le="0.1"}'] == 0
    assert after['anytime_event_loop_lag_seconds_bucket{le="+Inf"}'] == 1


def burn(seconds: float) -> None:
    started_s = time.thread_time()
    while time.thread_time() - started_s < seconds:
        pass


def test_the_processor_time_of_the_loop_is_its_threads(metrics: Metrics) -> None:
    before = series(metrics)["anytime_event_loop_cpu_seconds_total"]
    burn(0.05)
    other = threading.Thread(target=burn, args=(0.3,))
    other.start()
    other.join()
    assert 0.05 <= series(metrics)["anytime_event_loop_cpu_seconds_total"] - before < 0.3
