"""The two dashboards; `make dashboards` writes them after a change here.

In Grafana's own JSON a query is hard to find: here a panel is its question, what is seen in it, and what is
asked. What each metric means: docs/metrics.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.grafana.panels import (
    HERE,
    JOB,
    Colour,
    Panel,
    Row,
    Thresholds,
    dashboard,
    mean,
    quantile,
    rate,
    share,
)

FOLDER = Path(__file__).parent / "dashboards"

BUSY: Thresholds = (("green", None), ("yellow", 0.75), ("red", 0.9))

ANSWERED = rate("anytime_requests_total", 'outcome="answered"')
MISSED = " + ".join(
    [
        rate("anytime_requests_total", 'outcome=~"late|expired|failed|stopped"'),
        rate("anytime_rejections_total", 'reason=~"load|decode"'),
    ]
)
ANSWERS = rate("anytime_answers_total")
OUTCOME_COLOURS: Mapping[str, Colour] = {
    "answered": "green",
    "late": "orange",
    "rejected": "yellow",
    "expired": "red",
    "failed": "red",
}

OPERATOR = dashboard(
    "anytime-operator",
    "Anytime: operator",
    "Are deadlines kept, what is given up for it, and is it time to scale?",
    [
        Row(
            "Are deadlines kept?",
            7,
            [
                Panel(
                    "In time",
                    "Of the requests that could have been answered in time, all replicas, over 5 minutes. "
                    "The objective is the share that should be.",
                    "percentunit",
                    {
                        "in time": f"job:anytime_attainment:ratio_rate5m{{{JOB}}}",
                        "objective": "anytime:slo_objective:ratio",
                    },
                    kind="stat",
                    width=3,
                    most=1,
                ),
                Panel(
                    "Error budget burn",
                    "How many times faster than it may be the error budget is used up, over an hour and "
                    "over six. At 1 it lasts just as long as it should; 14.4 and 6 wake somebody.",
                    "suffix: times",
                    {
                        "1 h": f"job:anytime_error_budget_burn:ratio_rate1h{{{JOB}}}",
                        "6 h": f"job:anytime_error_budget_burn:ratio_rate6h{{{JOB}}}",
                    },
                    kind="stat",
                    width=3,
                    thresholds=(("green", None), ("yellow", 1), ("red", 6)),
                ),
                Panel(
                    "How many are in time?",
                    "Attainment of all replicas chosen, live. Refusals of what no server could have "
                    "answered in time do not count.",
                    "percentunit",
                    {
                        "in time": f"{ANSWERED} / ({ANSWERED} + {MISSED})",
                        "objective": "anytime:slo_objective:ratio",
                    },
                    width=6,
                    most=1,
                    least=None,
                    colours={"in time": "green", "objective": "text"},
                ),
                Panel(
                    "How do requests end?",
                    "Green is an answer in time. late: sent after its deadline; rejected: 429; expired: "
                    "504; failed: 500; stopped: 503; invalid: other 4xx; disconnected: the caller left.",
                    "reqps",
                    {"{{outcome}}": rate("anytime_requests_total", by="outcome")},
                    width=6,
                    stacked=True,
                    colours=OUTCOME_COLOURS,
                ),
                Panel(
                    "How much of their budgets do answers take?",
                    "Latency divided by the budget that the caller gave; above 1 it is late. Near 1 under "
                    "load is as it should be: what is left of a budget is spent on a better answer.",
                    "percentunit",
                    {
                        "median": quantile(0.5, "anytime_latency_over_budget_ratio"),
                        "95 % take less": quantile(0.95, "anytime_latency_over_budget_ratio"),
                        "99 % take less": quantile(0.99, "anytime_latency_over_budget_ratio"),
                    },
                    width=6,
                    thresholds=(("green", None), ("red", 1)),
                ),
            ],
        ),
        Row(
            "What is given up for it?",
            6,
            [
                Panel(
                    "What are the answers worth?",
                    "Held-out accuracy of the columns that gave them: expected, not observed on your "
                    "pictures. Between what the shallowest column and what everything together would give. "
                    "See AnytimeAccuracyGivenUp.",
                    "percentunit",
                    {
                        "sent": share(rate("anytime_expected_correct_answers_total"), ANSWERS),
                        "best there is": f"max(anytime_model_accuracy_ratio{{{HERE}}})",
                        "least there is": f"min(anytime_model_accuracy_ratio{{{HERE}}})",
                    },
                    least=None,
                    colours={"sent": "blue", "best there is": "text", "least there is": "text"},
                ),
                Panel(
                    "How deep do answers go?",
                    "Share of the answers by the deepest column that contributed. More of column 1 means "
                    "less time for each.",
                    "percentunit",
                    {
                        "column {{column}}": share(
                            rate("anytime_answers_total", by="column"), ANSWERS, "column"
                        )
                    },
                    stacked=True,
                    most=1,
                ),
                Panel(
                    "Why do they not go deeper?",
                    "budget: nothing deeper fitted. deepest: there is nothing deeper. confidence: the "
                    "caller was content. load: it would have been refined, had it been alone.",
                    "percentunit",
                    {
                        "{{stopped_by}}": share(
                            rate("anytime_answers_total", by="stopped_by"), ANSWERS, "stopped_by"
                        )
                    },
                    stacked=True,
                    most=1,
                    colours={"load": "orange"},
                ),
            ],
        ),
        Row(
            "Is it time to scale?",
            6,
            [
                Panel(
                    "Who is refused, and why?",
                    "load: others were in the way; scale before it is 5 %. decode: threads for large "
                    "pictures are busy. budget, body, rate: the caller's own. See AnytimeRefusing.",
                    "reqps",
                    {"{{reason}}": rate("anytime_rejections_total", by="reason")},
                    width=6,
                    stacked=True,
                    colours={"load": "red", "decode": "orange"},
                ),
                Panel(
                    "How busy is each replica?",
                    "The event loop near 1: only another replica helps (AnytimeEventLoopBusy). The "
                    "inference thread near 1 is no alarm: what first answers leave of it goes to better "
                    "ones.",
                    "percentunit",
                    {
                        "event loop {{instance}}": rate(
                            "anytime_event_loop_cpu_seconds_total", by="instance"
                        ),
                        "inference {{instance}}": rate("anytime_inference_seconds_sum", by="instance"),
                    },
                    width=6,
                    thresholds=BUSY,
                ),
                Panel(
                    "Is a replica slower than it was?",
                    "Time of runs divided by what was measured when the model was loaded. Above 1.5 for "
                    "long: AnytimeMachineSlow.",
                    "suffix: times",
                    {"{{instance}}": f"anytime_slowdown_ratio{{{HERE}}}"},
                    width=6,
                    thresholds=(("green", None), ("yellow", 1.5), ("red", 3)),
                ),
                Panel(
                    "What needs somebody?",
                    "Alerts that fire. The page of each is docs/runbooks/<name>.md; a click opens it if the"
                    " variable above says where you can read them. Empty is good.",
                    "none",
                    {"{{alertname}}": 'ALERTS{alertname=~"Anytime.+", alertstate="firing"}'},
                    kind="table",
                    width=6,
                    links={"Runbook": "${runbooks}/${__data.fields.alertname}.md"},
                    hidden=("Value", "alertstate", "job", "namespace"),
                ),
            ],
        ),
    ],
)

ENGINEER = dashboard(
    "anytime-engineer",
    "Anytime: engineer",
    "What the engine does, whether it predicts well, where time goes, and how the machine beneath is.",
    [
        Row(
            "What does the engine do?",
            7,
            [
                Panel(
                    "How many runs are made?",
                    "Runs a second by column. Column 1 is everybody's first answer, deeper ones refine.",
                    "ops",
                    {"column {{column}}": rate("anytime_inference_seconds_count", by="column")},
                    width=6,
                    stacked=True,
                ),
                Panel(
                    "How many images share a run?",
                    "Mean batch by column. 1 on a CPU, where batching gains little; more on a GPU under "
                    "load.",
                    "short",
                    {
                        "column {{column}}": f"{rate('anytime_inference_images_total', by='column')}"
                        f" / {rate('anytime_inference_seconds_count', by='column')}"
                    },
                    width=6,
                    least=1,
                ),
                Panel(
                    "Which batch sizes are used?",
                    "Runs by the measured batch size that they count as.",
                    "ops",
                    {"batch {{batch}}": rate("anytime_inference_seconds_count", by="batch")},
                    width=6,
                    stacked=True,
                ),
                Panel(
                    "How many wait?",
                    "Requests that wait for a first answer or a better one.",
                    "short",
                    {"{{instance}}": f"anytime_queue_length{{{HERE}}}"},
                    width=6,
                ),
                Panel(
                    "How long do runs take?",
                    "Median and 95 % quantile of a run by column, all batch sizes, hand-over to the thread "
                    "included.",
                    "s",
                    {
                        "{{column}} median": quantile(0.5, "anytime_inference_seconds", "column"),
                        "{{column}} 95 %": quantile(0.95, "anytime_inference_seconds", "column"),
                    },
                    width=6,
                ),
                Panel(
                    "Do runs fail?",
                    "Runs without a result. Who had an answer was sent it. See AnytimeRunsFailing.",
                    "ops",
                    {
                        "column {{column}}": rate("anytime_failed_runs_total", by="column"),
                        "column {{column}}, preempted": rate("anytime_preempted_runs_total", by="column"),
                    },
                    width=6,
                    thresholds=(("green", None), ("red", 0.001)),
                ),
                Panel(
                    "How much is saved because callers left?",
                    "Predicted time of columns that were not run, for each second.",
                    "percentunit",
                    {"saved": rate("anytime_inference_saved_seconds_total")},
                    width=6,
                ),
                Panel(
                    "How busy is the inference thread?",
                    "Time in runs for each second. Each version of a model has a thread of its own.",
                    "percentunit",
                    {"{{instance}}": rate("anytime_inference_seconds_sum", by="instance")},
                    width=6,
                    thresholds=BUSY,
                ),
            ],
        ),
        Row(
            "Are predictions right?",
            7,
            [
                Panel(
                    "How long do runs take, compared with what was predicted?",
                    "Real time over predicted median, by column: the median should be 1, and 80 % be below "
                    "what admission trusts. Erratic means that something else uses the cores.",
                    "suffix: times",
                    {
                        "{{column}} median": quantile(0.5, "anytime_run_over_predicted_ratio", "column"),
                        "{{column}} 95 %": quantile(0.95, "anytime_run_over_predicted_ratio", "column"),
                    },
                    width=6,
                    thresholds=(("green", None), ("red", 2)),
                ),
                Panel(
                    "How far are predictions from what was measured at first?",
                    "Predicted over profiled median of a run of one image: 1 as when the model was loaded.",
                    "suffix: times",
                    {
                        "{{column}} {{instance}}": f'anytime_predicted_run_seconds{{{HERE}, batch="1"}}'
                        f' / anytime_profiled_run_seconds{{{HERE}, batch="1"}}'
                    },
                    width=6,
                    thresholds=(("green", None), ("yellow", 1.5), ("red", 3)),
                ),
                Panel(
                    "What does a run of one image take now, by prediction?",
                    "What decisions are made with.",
                    "s",
                    {"{{column}} {{instance}}": f'anytime_predicted_run_seconds{{{HERE}, batch="1"}}'},
                    width=6,
                ),
                Panel(
                    "What is kept free of each budget?",
                    "For building and writing the answer; it follows what that takes, up to "
                    "max_overhead_reserve_ms.",
                    "s",
                    {"{{instance}}": f"anytime_reserve_seconds{{{HERE}}}"},
                    width=6,
                ),
            ],
        ),
        Row(
            "Where does the time go?",
            7,
            [
                Panel(
                    "What is an answer's latency made of?",
                    "Mean of each stage; together the mean latency. read: the body; way_out: from the last "
                    "result to the last byte.",
                    "s",
                    {"{{stage}}": mean("anytime_stage_seconds", "stage")},
                    stacked=True,
                ),
                Panel(
                    "How long is each stage when it is long?",
                    "95 % quantile by stage.",
                    "s",
                    {"{{stage}}": quantile(0.95, "anytime_stage_seconds", "stage")},
                ),
                Panel(
                    "How long do answers take?",
                    "From arrival to the last byte; what is long depends on the budgets that callers give.",
                    "s",
                    {
                        "median": quantile(0.5, "anytime_latency_seconds"),
                        "95 %": quantile(0.95, "anytime_latency_seconds"),
                        "99 %": quantile(0.99, "anytime_latency_seconds"),
                    },
                ),
                Panel(
                    "How are latencies spread?",
                    "Answers by latency; two bands are two kinds of budgets, or two depths.",
                    "s",
                    {"{{le}}": rate("anytime_latency_seconds_bucket", by="le")},
                    kind="heatmap",
                    width=12,
                    least=None,
                ),
                Panel(
                    "How are shares of budgets spread?",
                    "Answers by latency over budget; what is above 1 was late.",
                    "percentunit",
                    {"{{le}}": rate("anytime_latency_over_budget_ratio_bucket", by="le")},
                    kind="heatmap",
                    width=12,
                    least=None,
                ),
            ],
        ),
        Row(
            "How is the process?",
            7,
            [
                Panel(
                    "How busy is the event loop?",
                    "Processor time of its thread for each second. Near 1 everybody waits for it.",
                    "percentunit",
                    {"{{instance}}": rate("anytime_event_loop_cpu_seconds_total", by="instance")},
                    width=6,
                    thresholds=BUSY,
                ),
                Panel(
                    "How late is the event loop?",
                    "99 % quantile of how late a timer is, exact to a millisecond. Long stalls come from "
                    "work on the loop or from cores that are taken away.",
                    "s",
                    {"{{instance}}": quantile(0.99, "anytime_event_loop_lag_seconds", "instance")},
                    width=6,
                    thresholds=(("green", None), ("yellow", 0.005), ("red", 0.02)),
                ),
                Panel(
                    "How much time goes to garbage?",
                    "Time in collections for each second, by generation, during which nothing else runs.",
                    "percentunit",
                    {"generation {{generation}}": rate("anytime_gc_pause_seconds_sum", by="generation")},
                    width=6,
                    stacked=True,
                ),
                Panel(
                    "How long does one collection take?",
                    "Mean by generation. A full one (2) should be rare, and as short as the others: what "
                    "lives when serving begins is frozen.",
                    "s",
                    {"generation {{generation}}": mean("anytime_gc_pause_seconds", "generation")},
                    width=6,
                ),
                Panel(
                    "How much processor does it take?",
                    "Cores of the whole process: event loop, inference, decoding.",
                    "short",
                    {"{{instance}}": rate("process_cpu_seconds_total", by="instance")},
                    width=6,
                ),
                Panel(
                    "How much memory does it hold?",
                    "Resident, and reserved addresses. See AnytimeMemoryGrowing.",
                    "bytes",
                    {
                        "resident {{instance}}": f"process_resident_memory_bytes{{{HERE}}}",
                        "reserved {{instance}}": f"process_virtual_memory_bytes{{{HERE}}}",
                    },
                    width=6,
                ),
                Panel(
                    "How many files are open?",
                    "Connections are files; the red line is as many as may be open.",
                    "percentunit",
                    {"{{instance}}": f"process_open_fds{{{HERE}}} / process_max_fds{{{HERE}}}"},
                    width=6,
                    thresholds=(("green", None), ("red", 0.9)),
                ),
                Panel(
                    "How long has it run?",
                    "Since the process was started. See AnytimeRestarting.",
                    "s",
                    {"{{instance}}": f"time() - process_start_time_seconds{{{HERE}}}"},
                    width=6,
                ),
            ],
        ),
        Row(
            "How is the GPU? (nothing where there is none)",
            6,
            [
                Panel(
                    "How busy is it?",
                    "Part of the time in which anything runs on it, of all processes; not how much of it is"
                    " used.",
                    "percentunit",
                    {"GPU {{gpu}} {{instance}}": f"anytime_gpu_busy_ratio{{{HERE}}}"},
                    width=12,
                    most=1,
                ),
                Panel(
                    "How full is its memory?",
                    "Of all processes. onnxruntime's arena grows with the largest batch and stays.",
                    "percentunit",
                    {
                        "GPU {{gpu}} {{instance}}": f"anytime_gpu_memory_used_bytes{{{HERE}}}"
                        f" / anytime_gpu_memory_size_bytes{{{HERE}}}"
                    },
                    width=12,
                    thresholds=(("green", None), ("red", 0.95)),
                    most=1,
                ),
            ],
        ),
        Row(
            "What is served?",
            6,
            [
                Panel(
                    "Which models are loaded, and on what do they run?",
                    "One line for each version on each replica. cpu where a GPU should be: "
                    "AnytimeGpuNotUsed.",
                    "none",
                    {"{{model}}": f"anytime_model_info{{{HERE}}}"},
                    kind="table",
                    width=12,
                    hidden=("Value", "job", "namespace"),
                ),
                Panel(
                    "What is each combination of columns worth?",
                    "Accuracy on held-out images, from the manifest.",
                    "percentunit",
                    {"{{columns}}": f"max by (model, columns) (anytime_model_accuracy_ratio{{{HERE}}})"},
                    kind="table",
                    width=8,
                ),
                Panel(
                    "Which release runs?",
                    "Replicas by version of the server; two only while a new one is rolled out.",
                    "short",
                    {"{{version}}": f"count by (version) (anytime_build_info{{{HERE}}})"},
                    kind="stat",
                    width=4,
                ),
            ],
        ),
    ],
)

DASHBOARDS = {"operator.json": OPERATOR, "engineer.json": ENGINEER}


def text(dashboard: Mapping[str, Any]) -> str:
    """As it is kept."""
    return json.dumps(dashboard, indent=2) + "\n"


if __name__ == "__main__":
    for name, one in DASHBOARDS.items():
        (FOLDER / name).write_text(text(one), encoding="utf-8")
