"""What runs showed, for people: tables and pictures.

Must not know how a figure is worked out, nor how requests were sent.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from loadtests.records import Point

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
    with matplotlib.rc_context({"svg.hashsalt": "anytime"}):  # the same numbers give the same bytes
        figure.savefig(path, format="svg", metadata={"Date": None})


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
