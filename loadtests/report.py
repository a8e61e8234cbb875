"""What runs showed, for people: tables and pictures.

    python -m loadtests.report run.npz            # run.html and run.json
    python -m loadtests.report now.npz before.npz # the same, compared with another run

Must not know how requests were sent.
"""

import argparse
import io
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from loadtests import records
from loadtests.records import Point, Record, Summary

# Okabe and Ito, "Color Universal Design", 2008, without yellow, which is faint on white. With one marker more
# than colours, 56 policies differ, the first seven by colour alone and by marker alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
N_ABREAST = 3  # panels in a row, at most


def table(points: Sequence[Point]) -> str:
    """The points as a Markdown table, in the order given."""
    lines = [
        "| load | policy | attainment, % | accuracy, % | accuracy of all, % | goodput, 1/s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for p in points:
        shares = [
            _text(100 * mean, 100 * half) for mean, half in (p.attainment, p.accuracy, p.accuracy_of_all)
        ]
        cells = [p.panel, p.policy, *shares, _text(*p.goodput_hz)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def draw_plane(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw attainment against accuracy as SVG, one panel per load; up and to the right is better.

    A policy looks the same in every panel. One without a prediction in time has no accuracy and is named in
    its panel instead. The same points give the same bytes.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("there is nothing to draw: give at least one point")
    panels = list(dict.fromkeys(p.panel for p in points))
    styles = dict(zip(dict.fromkeys(p.policy for p in points), _styles(), strict=False))  # which never end
    n_rows = math.ceil(len(panels) / N_ABREAST)
    n_abreast = math.ceil(len(panels) / n_rows)
    figure = Figure(figsize=(max(6.0, 3.8 * n_abreast), 0.9 + 3.3 * n_rows), layout="constrained")
    places = figure.subplots(n_rows, n_abreast, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for panel, axes in zip(panels, places, strict=False):  # the last row may have places to spare
        _draw_panel(axes, [p for p in points if p.panel == panel], styles)
        axes.set_title(panel, fontsize=10)
    for axes in places[len(panels) :]:
        axes.remove()
    for axes in places[::n_abreast]:
        axes.set_ylabel("accuracy of predictions in time, %")
    figure.suptitle(title, fontsize=11)
    keys = [Line2D([], [], color=colour, marker=marker, ls="") for colour, marker in styles.values()]
    figure.legend(keys, list(styles), loc="outside lower center", ncols=2 * n_abreast, fontsize=9)
    path.write_text(_svg(figure), encoding="utf-8")


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "anytime"}):  # the same numbers give the same bytes
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw_panel(axes: Axes, points: Sequence[Point], styles: Mapping[str, tuple[str, str]]) -> None:
    for p in points:
        colour, marker = styles[p.policy]
        (x, x_half), (y, y_half) = ((100 * mean, 100 * half) for mean, half in (p.attainment, p.accuracy))
        x_bar, y_bar = (None if math.isnan(half) else half for half in (x_half, y_half))
        axes.errorbar(x, y, y_bar, x_bar, color=colour, marker=marker, ls="", elinewidth=1, capsize=2)
    unplaced = ", ".join(p.policy for p in points if math.isnan(p.accuracy[0]))
    if unplaced:
        axes.annotate(f"no accuracy: {unplaced}", (0.03, 0.03), xycoords="axes fraction", fontsize=8)
    axes.set_xlabel("attainment, %")
    axes.tick_params(labelbottom=True)  # also above a place that stays empty
    axes.grid(alpha=0.3)


def _styles() -> Iterator[tuple[str, str]]:
    return zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)


def _text(mean: float, half: float) -> str:
    if math.isnan(mean):
        return "none"
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


# ---- one run, or two compared ----


@dataclass(frozen=True)
class Estimate:
    """A figure of a run and the bounds that cover the truth with 95 % confidence; NaN if there are none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Run:
    """A record that was kept."""

    name: str
    record: Record
    about: Mapping[str, Any]

    @cached_property
    def summary(self) -> Summary:
        """Its figures."""
        return records.summary(self.record)

    @cached_property
    def in_time(self) -> NDArray[np.bool_]:
        """Which requests got a prediction within their budget."""
        is_answered: NDArray[np.bool_] = self.record.outcome == "answered"
        return is_answered & (self.record.latency_s <= self.record.budget_s)

    def figures(self) -> dict[str, Estimate]:
        """What the table shows, by name; shares in %, times in ms."""
        seen, record, n = self.summary, self.record, self.summary.n
        is_answered = record.outcome == "answered"
        n_in_time = int(self.in_time.sum())
        n_right = int((self.in_time & record.is_correct).sum())
        found = {"requests": Estimate(n), "attainment, %": _share(n_in_time, n)}
        if self.about.get("is_labelled"):
            found["accuracy of those in time, %"] = _share(n_right, n_in_time)
            found["right and in time, % of all"] = _share(n_right, n)
        found["goodput, 1/s"] = Estimate(seen.goodput_hz)
        for outcome in records.OUTCOMES[1:]:
            found[f"{outcome}, %"] = _share(int((record.outcome == outcome).sum()), n)
        for columns, share in seen.columns.items():
            n_answered = int(is_answered.sum())
            found[f"answered by {columns}, %"] = _share(round(share * n_answered), n_answered)
        for name, quantile in records.QUANTILES.items():
            low, high = records.quantile_interval(record.latency_s[is_answered], quantile)
            found[f"latency {name}, ms"] = Estimate(seen.latency_s[name] * 1e3, low * 1e3, high * 1e3)
        for budget_ms, share in seen.attainment_by_budget.items():
            n_of_it = int(np.isclose(record.budget_s, budget_ms / 1e3).sum())
            found[f"attainment at {budget_ms:g} ms, %"] = _share(round(share * n_of_it), n_of_it)
        found["claims of being in time that were false by over 1 ms"] = Estimate(seen.n_false_claims)
        found["generator lag p99, ms"] = Estimate(seen.lag_p99_s * 1e3)
        return found


def _share(n_hits: int, n: int) -> Estimate:
    low, high = records.share_interval(n_hits, n)
    return Estimate(100 * n_hits / n if n else math.nan, 100 * low, 100 * high)


def page(runs: Sequence[Run]) -> str:
    """One run, or several side by side, as a whole HTML page that needs nothing else."""
    names = list(dict.fromkeys(name for run in runs for name in run.figures()))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    )
    shown = [
        {
            "name": run.name,
            "about": dict(run.about),
            "summary": run.summary,
            "timeline": _svg(_draw_timeline(run)),
            "by_budget": _svg(_draw_by_budget(run)),
        }
        for run in runs
    ]
    rows = [_row(name, [run.figures().get(name, Estimate(math.nan)) for run in runs]) for name in names]
    return template.render(runs=shown, rows=rows, latencies=_svg(_draw_latencies(runs)))


def _row(name: str, figures: Sequence[Estimate]) -> dict[str, Any]:
    cells = [
        {
            "value": "none" if math.isnan(f.value) else f"{f.value:.5g}",
            "interval": "" if math.isnan(f.low) else f"{f.low:.4g} to {f.high:.4g}",
        }
        for f in figures
    ]
    if len(figures) == 1:
        return {"name": name, "cells": cells, "difference": None, "is_apart": False}
    first, second = figures[0], figures[1]
    difference = first.value - second.value
    return {
        "name": name,
        "cells": cells,
        "difference": "" if math.isnan(difference) else f"{difference:+.4g}",
        "is_apart": first.low > second.high or second.low > first.high,
    }


def _kinds(run: Run) -> dict[str, NDArray[np.bool_]]:
    """Every request in one of these: in time by columns, late, or its outcome."""
    record = run.record
    kinds = {
        f"in time, {columns}": run.in_time & (record.columns_run == columns)
        for columns in run.summary.columns
    }
    kinds["late"] = (record.outcome == "answered") & ~run.in_time
    return kinds | {outcome: record.outcome == outcome for outcome in records.OUTCOMES[1:]}


def _draw_timeline(run: Run) -> Figure:
    """What became of the requests that were due in each second."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    second = np.floor(run.record.due_s).astype(int)
    seconds = np.arange(second.max() + 1)
    kinds = {name: which for name, which in _kinds(run).items() if which.any()}
    # A step is drawn to where the next one begins: the last needs one after it.
    counts = [np.bincount(second[which], minlength=len(seconds) + 1) for which in kinds.values()]
    axes.stackplot([*seconds, len(seconds)], counts, labels=list(kinds), colors=_colours(kinds), step="post")
    axes.set(xlabel="due at, s", ylabel="requests per second", xlim=(0, len(seconds)))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _draw_by_budget(run: Run) -> Figure:
    """What became of the requests that granted each budget."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    budgets_ms = np.round(run.record.budget_s * 1e3, 6)
    each, n = np.unique(budgets_ms, return_counts=True)
    left = np.zeros(len(each))
    kinds = {name: which for name, which in _kinds(run).items() if which.any()}
    for (name, which), colour in zip(kinds.items(), _colours(kinds), strict=True):
        width = np.array([100 * which[budgets_ms == budget].sum() for budget in each]) / n
        axes.barh([f"{budget:g} ms" for budget in each], width, left=left, label=name, color=colour)
        left += width
    axes.set(xlabel="% of the requests with this budget", xlim=(0, 100))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _draw_latencies(runs: Sequence[Run]) -> Figure:
    """How many of the answered had their answer after how long."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
        latency_ms = np.sort(run.record.latency_s[run.record.outcome == "answered"]) * 1e3
        axes.step(latency_ms, 100 * np.arange(1, len(latency_ms) + 1) / max(1, len(latency_ms)), color=colour)
    for budget_ms in runs[0].summary.attainment_by_budget:
        axes.axvline(budget_ms, color="0.7", lw=0.8, zorder=0)
    axes.set(xscale="log", xlabel="from the due time to the last byte, ms", ylabel="% of the answered")
    keys = [Line2D([], [], color=colour) for _, colour in zip(runs, itertools.cycle(COLOURS), strict=False)]
    axes.legend([*keys, Line2D([], [], color="0.7")], [*(run.name for run in runs), "budgets"], fontsize=8)
    return figure


def _colours(kinds: Mapping[str, object]) -> list[str]:
    """Cold and dark for answers in time, the more so the deeper; warm for everything else."""
    in_time = [name for name in kinds if name.startswith("in time")]
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.35, 0.95, max(1, len(in_time))))
    cold = dict(zip(in_time, map(matplotlib.colors.to_hex, shades), strict=False))
    warm = {
        "late": "#E69F00",
        "rejected": "#D55E00",
        "expired": "#CC79A7",
        "failed": "#000000",
        "lost": "0.6",
    }
    return [(cold | warm)[name] for name in kinds]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help="made with --record; the first is the subject")
    parser.add_argument("--out", type=Path, help="write PATH.html and PATH.json; default: beside the first")
    chosen = parser.parse_args(arguments)
    try:
        runs = [Run(path.stem, *Record.load(path)) for path in chosen.records]
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    out: Path = chosen.out or chosen.records[0]
    out.with_suffix(".html").write_text(page(runs), encoding="utf-8")
    told = [
        {"name": run.name, "about": run.about, "summary": asdict(run.summary)}
        | {"figures": {name: asdict(figure) for name, figure in run.figures().items()}}
        for run in runs
    ]
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for run in runs:
        state = "" if run.summary.is_valid else "INVALID: the generator fell behind. "
        print(f"{run.name}: {state}{_sentence(run)}")
    print(f"Written: {out.with_suffix('.html')}, {out.with_suffix('.json')}")
    return 0


def _sentence(run: Run) -> str:
    seen = run.summary
    accuracy = f", {100 * seen.accuracy:.1f} % of them right" if run.about.get("is_labelled") else ""
    return (
        f"{seen.n} requests, {100 * seen.attainment:.2f} % in time{accuracy}; "
        f"{seen.goodput_hz:.0f} a second in time; generator lag p99 {seen.lag_p99_s * 1e3:.2f} ms."
    )


if __name__ == "__main__":
    sys.exit(main())
