"""Writes what `loadtests.gpu` has found so far, as a page and as JSON: whole files at any moment.

Must not know how anything was measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS_OF_TIME = {
    "lag": "before it was sent",
    "outside": "outside the server",
    "decode": "decode",
    "queue": "queue",
    "inference": "inference",
    "other": "else in the server",
}
"""What they are called in a `Split`, and on the page; together they are the latency."""


def write(out: Path, found: Mapping[str, Any]) -> None:
    """Replace OUT.json and OUT.md, each in one go: whoever is killed meanwhile leaves those before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(_plain(found), indent=1, allow_nan=False) + "\n", ".md": page(found)}
    for suffix, text in texts.items():
        beside = out.with_suffix(f"{suffix}.part")
        beside.write_text(text)
        beside.replace(out.with_suffix(suffix))


def _plain(found: Any) -> Any:
    """As JSON can have it: a figure that there is not is null."""
    if isinstance(found, Mapping):
        return {name: _plain(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def page(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    gpus = ", ".join(found["gpus"]) or "no GPU"
    machine = f"{gpus}; {found['cores']} cores of {found['processor']}"
    lines = [
        f"# {found['artifact']}, version {found['version']}, on {found['provider']}",
        "",
        f"{machine}; {found['precision']}; commit {found['commit']}; {found['date']}.",
        f"`{found['command']}`",
        "",
    ]
    for part, why in found["failed"].items():
        lines += [f"**The part {part} failed**; what it had found until then is below.", "", "```"]
        lines += [why, "```", ""]
    if found["unfinished"]:
        lines += [f"**Not finished: {', '.join(found['unfinished'])}.**", ""]
    if "latency_ms" in found:
        lines += ["## One run", "", *_latency_lines(found["latency_ms"]), ""]
    if "load" in found:
        title = f"## Answers within {found['budget_ms']:g} ms"
        lines += [title, "", *_load_lines(found["load"], found["share"]), ""]
        lines += ["## Where the time goes", "", *_time_lines(found["load"]["steps"]), ""]
    if "silence" in found:
        title = f"## After {found['idle_s']:g} s of silence"
        lines += [title, "", *_silence_lines(found["silence"]["arms"]), ""]
    return "\n".join(lines)


def _latency_lines(measured: Mapping[str, Any]) -> list[str]:
    heads = [f"{name}: {what}" for name in measured for what in ("median, ms", "p99, ms", "images/s")]
    lines = _table_head(["column", "batch", *heads])
    first = next(iter(measured.values()))
    for column, by_size in first.items():
        for size in by_size:
            cells = []
            for one in measured.values():
                latency = one[column][size]
                rate_hz = int(size) / latency["median"] * 1e3
                cells += [f"{latency['median']:.3f}", f"{latency['high']:.3f}", f"{rate_hz:,.0f}"]
            lines.append(_row([column, size, *cells]))
    return lines


def _load_lines(load: Mapping[str, Any], share: float) -> list[str]:
    heads = ["requests/s", "in time, %", "right of those, %", "p50, ms", "p99, ms", "refused, %"]
    lines = _table_head([*heads, "GPU busy, %", "power, W", "columns"])
    for step in _by_rate(load["steps"]):
        latency, gpu = step["latency_ms"], step["gpu"]
        cells = [
            f"{step['rate_hz']:,.0f}" + ("" if step["is_valid"] else " (generator too slow)"),
            *(_text(step[name] * 100, 2) for name in ("attainment", "accuracy")),
            *(_text(latency[name], 2) for name in ("p50", "p99")),
            _text(step["outcomes"]["rejected"] * 100, 2),
            *(_text(gpu.get(name, math.nan), 0) for name in ("busy_percent", "power_w")),
            _most(step["columns"]),
        ]
        lines.append(_row(cells))
    return [*lines, "", _verdict(load, share)]


def _verdict(load: Mapping[str, Any], share: float) -> str:
    held = load["best"]
    if not held:
        least_hz = min(step["rate_hz"] for step in load["steps"])
        return f"No load was answered in time for {share:.0%} or more, not even {least_hz:,.0f} requests/s."
    limit = {
        "attainment": "Beyond that they are not.",
        "generator": "Beyond that the generator could not send on time: the server was not at its limit.",
        "steps": "The steps were used up: the server was not at its limit.",
    }
    verdict = f"{held['rate_hz']:,.0f} requests/s are answered in time for {share:.0%} of them or more."
    return f"{verdict} {limit[load['ended_by']]}"


def _time_lines(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = _table_head(["requests/s", "answers", "n", *PARTS_OF_TIME.values(), "deepest column"])
    for step in _by_rate(steps):
        for which, split in step["splits"].items():
            if split["n"]:
                parts = (split["part_ms"][name] for name in PARTS_OF_TIME)
                times = (f"{_text(part['p50'], 2)}, {_text(part['p99'], 2)}" for part in parts)
                row = [f"{step['rate_hz']:,.0f}", which, f"{split['n']:,}", *times, _most(split["deepest"])]
                lines.append(_row(row))
    return [*lines, "", "Times are medians and p99 in ms; late are those that came after their budget."]


def _by_rate(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(steps, key=lambda step: step["rate_hz"])


def _most(shares: Mapping[str, float]) -> str:
    """The largest three."""
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ranked[:3])


def _silence_lines(arms: Mapping[str, Any]) -> list[str]:
    heads = ["silences", "void", "first, median, ms", "first, worst, ms", "n", "in time, %", "no answer"]
    lines = _table_head(["", *heads, "all, p50, ms", "all, p99, ms", "all, p99.9, ms"])
    for name, arm in arms.items():
        row = [name, *(str(arm[count]) for count in ("n_rounds", "n_void"))]
        row += [_text(ms, 2) for ms in arm["first"].values()]
        row += [str(arm["n"]), _text(arm["attainment"] * 100, 2), str(arm["n_unanswered"])]
        row += [_text(ms, 2) for ms in arm["all"].values()]
        lines.append(_row(row))
    lines += ["", "A silence is void, and not counted, if the generator was late after it."]
    for name, arm in arms.items():
        firsts = ", ".join(_text(ms, 2) for ms in arm["first_ms"])
        lines += ["", f"Every first answer, {name} (n = {len(arm['first_ms'])}), ms: {firsts}"]
    return lines


def _text(value: float, n_digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{n_digits}f}"


def _table_head(names: Sequence[str]) -> list[str]:
    return [_row(names), _row(["---:"] * len(names))]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
