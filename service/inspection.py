"""`inspect` and `profile`: what an artifact holds, and how fast it is here, without a server.

Must not know of requests. Verifies and measures with the code that serves.
"""

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from service import inference, models, settings
from service.inference import ArtifactError, Manifest
from service.latency import LatencyProfile
from service.settings import SettingsError

REFUSED = 1
"""Exit status for an artifact that cannot be used."""

WRONG_USAGE = 2
"""Exit status for a setting that is refused."""

PAYS = 1.1
"""Batching is said to pay from this many times the images per second of one by one: less may be noise."""


def inspect(folder: Path, *, run: bool, as_json: bool) -> int:
    """Verify an artifact as a server would, and print what is in it; returns the exit status.

    Args:
        folder: The artifact.
        run: Whether to run every column, too, on one black picture on the CPU.
        as_json: Print one JSON object instead of tables.
    """
    try:
        manifest, sha256, graphs = inference.verify(folder)
        if run:
            loaded = inference.load(folder, provider="cpu", intra_op_threads=1, batch_sizes=(1,))
            loaded.warm_up((1,))
    except ArtifactError as error:
        print(f"inspect: {error}", file=sys.stderr)
        return REFUSED
    n_bytes = {column: len(graph) for column, graph in graphs.items()}
    if as_json:
        _print_json(_contents(manifest, sha256, n_bytes))
    else:
        _print_contents(manifest, sha256, n_bytes)
        print("Every file is the one its manifest describes" + (" and every column runs." if run else "."))
    return 0


def profile(arguments: Sequence[str], *, as_json: bool) -> int:
    """Measure how long columns and batches take here, and print it; returns the exit status.

    Args:
        arguments: Settings as options, which win over the environment: what is measured is what would serve.
        as_json: Print what `GET /model` has as `latency_ms` instead of a table.

    Cost: the setting `profile_seconds`, and some seconds to load and warm up. Nothing is remembered.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-7s %(message)s")
    try:
        chosen = settings.load(arguments).model_copy(update={"profile_cache": None})
        model = asyncio.run(models.load(chosen, chosen.artifact))
    except SettingsError as error:
        print(f"profile: {error}", file=sys.stderr)
        return WRONG_USAGE
    except ArtifactError as error:
        print(f"profile: {error}", file=sys.stderr)
        return REFUSED
    model.close()
    if as_json:
        _print_json(orjson.loads(model.card)["latency_ms"])
    else:
        print(f"{model.name} version {model.version} on {model.provider}")
        _print_profile(model.profile, chosen.profile_quantile)
    return 0


def _contents(manifest: Manifest, sha256: str, n_bytes: dict[str, int]) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "sha256": sha256,
        "source": manifest.source,
        "labels": manifest.labels,
        "input": manifest.input.model_dump(),
        "rungs": [{**rung.model_dump(), "bytes": n_bytes[rung.column]} for rung in manifest.rungs],
        "combinations": [{"columns": c.columns, "accuracy": c.accuracy} for c in manifest.combinations],
        "bytes": sum(n_bytes.values()),
    }


def _print_contents(manifest: Manifest, sha256: str, n_bytes: dict[str, int]) -> None:
    spec = manifest.input
    print(f"{manifest.name} version {manifest.version}, made {manifest.created:%Y-%m-%d %H:%M %Z}")
    print(f"manifest  sha256:{sha256}")
    print(f"labels    {len(manifest.labels)}: {', '.join(manifest.labels)}")
    print(f"input     {spec.height} x {spec.width} x {spec.channels} {spec.dtype}, resized by {spec.resize}")
    print()
    _print_table(
        ("column", "depth", "MMACs", "parameters", "held-out accuracy, %", "bytes", "file"),
        [
            (
                *(rung.column, str(rung.depth), f"{rung.macs / 1e6:.3g}", f"{rung.parameters:,}"),
                *(f"{rung.accuracy * 100:.2f}", f"{n_bytes[rung.column]:,}", rung.file),
            )
            for rung in manifest.rungs
        ],
    )
    print()
    _print_table(
        ("columns run", "held-out accuracy, %"),
        [("+".join(c.columns), f"{c.accuracy * 100:.2f}") for c in manifest.combinations],
    )
    print()


def _print_profile(measured: LatencyProfile, quantile: float) -> None:
    rows, verdicts = [], []
    for column, by_size in measured.items():
        images_per_s = {size: size / latency.median_s for size, latency in by_size.items()}
        rows += [
            (
                *(column, str(size), f"{latency.median_s * 1e3:.3f}", f"{latency.high_s * 1e3:.3f}"),
                f"{images_per_s[size]:,.0f}",
            )
            for size, latency in by_size.items()
        ]
        best = max(images_per_s, key=images_per_s.__getitem__)
        gain = images_per_s[best] / images_per_s[1]
        pays = f"batches of {best} pay: {gain:.1f} times the images/s of one by one"
        verdicts.append(f"column {column}: {pays if gain >= PAYS else 'batching does not pay'}")
    _print_table(("column", "batch", "median, ms", f"{quantile * 100:g} % within, ms", "images/s"), rows)
    print(*verdicts, sep="\n")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _print_json(document: object) -> None:
    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
