"""Shows that answers over HTTP are exactly as accurate as the same columns offline, at several budgets.

    python -m loadtests.http_accuracy --data data --artifact model/pretrained --url http://127.0.0.1:8000 \
        --budgets 2,5,10,50 --n 1000 --out loadtests/results/http_accuracy.json

Sends real CIFAR-10 test images as PNG, one after the other over one kept connection, to a running server. For
each budget it counts which columns answered and how many answers came in time by the client's own clock, and
compares every answer with that of the artifact's ONNX files run here, by code of its own. Exits 1 if a single
one differs, or if a budget got no answer at all: then it has shown nothing.
"""

import argparse
import http.client
import io
import json
import os
import platform
import sys
import time
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loadtests.offline import Offline, processor_name, read_test_images


@dataclass(frozen=True)
class Answer:
    """What one request brought."""

    image: int
    status: int
    columns_run: tuple[str, ...]
    index: int
    is_called_met: bool
    took_ms: float


def ask(url: str, budget_ms: float, pngs: Sequence[bytes]) -> list[Answer]:
    """Send each picture and wait for its answer before the next."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    answers = []
    for image, png in enumerate(pngs):
        started_s = time.perf_counter()
        connection.request("POST", f"/predict?budget_ms={budget_ms:g}", png, {"Content-Type": "image/png"})
        response = connection.getresponse()
        body = response.read()
        took_ms = (time.perf_counter() - started_s) * 1e3
        answer = json.loads(body) if response.status == 200 else {}
        answers.append(
            Answer(
                image=image,
                status=response.status,
                columns_run=tuple(answer.get("columns_run", ())),
                index=answer.get("index", -1),
                is_called_met=answer.get("deadline_met", False),
                took_ms=took_ms,
            )
        )
    connection.close()
    return answers


def judge(
    answers: Sequence[Answer], budget_ms: float, labels: NDArray[np.int64], offline: Offline
) -> dict[str, Any]:
    """Compare one budget's answers with the labels and with the artifact run here."""
    by_columns: dict[tuple[str, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.status == 200:
            by_columns[answer.columns_run].append(answer)
    groups = {}
    for columns_run, group in sorted(by_columns.items()):
        images = [answer.image for answer in group]
        online = np.array([answer.index for answer in group])
        expected = offline.predictions(columns_run)
        groups["+".join(columns_run)] = {
            "n": len(group),
            "online_accuracy": float((online == labels[images]).mean()),
            "offline_accuracy_same_images": float((expected[images] == labels[images]).mean()),
            "offline_accuracy_all_images": float((expected == labels).mean()),
            "mismatches": int((online != expected[images]).sum()),
        }
    answered = [answer for group in by_columns.values() for answer in group]
    return {
        "budget_ms": budget_ms,
        "n": len(answers),
        "n_answered": len(answered),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "attainment_by_server": sum(answer.is_called_met for answer in answers) / len(answers),
        "attainment_by_client": sum(answer.took_ms <= budget_ms for answer in answered) / len(answers),
        "client_ms": dict(
            zip(
                ("p50", "p95", "p99"),
                np.quantile([a.took_ms for a in answers], [0.5, 0.95, 0.99]).round(3).tolist(),
                strict=True,
            )
        ),
        "accuracy": sum(a.index == labels[a.image] for a in answered) / max(1, len(answered)),
        "mismatches": sum(group["mismatches"] for group in groups.values()),
        "by_columns_run": groups,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the running server")
    parser.add_argument("--budgets", default="2,5,10,50", help="budgets [ms], with commas")
    parser.add_argument("--n", type=int, default=1000, help="images per budget")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    chosen = parser.parse_args(arguments)

    manifest = json.loads((chosen.artifact / "manifest.json").read_text())
    images_NHWC, labels = read_test_images(
        chosen.data, chosen.n, manifest["input"]["height"], manifest["input"]["width"]
    )
    offline = Offline(chosen.artifact, images_NHWC)
    pngs = [_png(image_HWC) for image_HWC in images_NHWC]
    results = []
    for budget_ms in map(float, chosen.budgets.split(",")):
        result = judge(ask(chosen.url, budget_ms, pngs), budget_ms, labels, offline)
        results.append(result)
        mix = ", ".join(f"{key} {group['n']}" for key, group in result["by_columns_run"].items())
        print(
            f"{budget_ms:6g} ms: in time {result['attainment_by_server']:6.1%} (server) "
            f"{result['attainment_by_client']:6.1%} (client), accuracy {result['accuracy']:.2%}, "
            f"{result['mismatches']} answers differ from offline; columns: {mix or 'none'}"
        )
        for key, group in result["by_columns_run"].items():
            print(
                f"           {key}: online {group['online_accuracy']:.2%}, offline on the same images "
                f"{group['offline_accuracy_same_images']:.2%}, on all "
                f"{group['offline_accuracy_all_images']:.2%}"
            )
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "python -m loadtests.http_accuracy " + " ".join(arguments or sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "machine": f"{platform.machine()}, {platform.system()}",
            "artifact": f"{manifest['name']}@{manifest['version']}",
            "results": results,
        }
        chosen.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(result["mismatches"] or not result["n_answered"] for result in results))


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
