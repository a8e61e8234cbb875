"""The process that ships: starts, says where, answers, drains on SIGTERM, refuses in one sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import toy_artifact

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("ANYTIME_")} | environ,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def process(artifact: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(
        *("--artifact", str(artifact), "--port", "0", "--profile-seconds", "0.01", "--batch-sizes", "1,2"),
        *("--profile-cache", str(tmp_path / "cache")),
    )
    with process:
        yield process
        process.kill()


def test_it_serves_and_stops_when_told_to(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    said = ""
    while "curl" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    assert "toy version 7: 5 labels, 3 columns, running on cpu." in said
    assert "column 3: 90.0 %" in said
    (url,) = re.findall(r"'(http://[^']+/predict\?budget_ms=50)'", said)
    pixels = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)
    request = urllib.request.Request(url, pixels, {"content-type": "application/octet-stream"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        assert json.load(response)["label"] in toy_artifact.LABELS
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    assert "Stopping" in rest
    assert "Traceback" not in rest
    assert process.returncode in {0, -signal.SIGTERM}


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"ANYTIME_ARTIFACT": "/nowhere"}, "set ANYTIME_ARTIFACT to an exported folder"),
        ({"ANYTIME_PROT": "1"}, "ANYTIME_PROT"),
        ({"ANYTIME_PORT": "high"}, "ANYTIME_PORT"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(environ: dict[str, str], says: str) -> None:
    process = start(**environ)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert says in said
    assert len(said.strip().splitlines()) == 1
