"""The quick benchmark at toy size: everything is really started, and the history gets its line."""

import json
import re
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from loadtests import bench, capacity
from loadtests.openloop import predict_head
from loadtests.plane import serving
from tests.service import toy_artifact


@pytest.mark.slow
def test_a_line_of_history_holds_the_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    history = tmp_path / "bench.jsonl"
    arguments = ["--artifact", str(artifact), "--rounds", "2", "--requests", "60", "--out", str(history)]
    assert bench.main(arguments) == 0
    assert bench.main(arguments) == 0
    first, second = (json.loads(line) for line in history.read_text().splitlines())

    assert set(first["ratio_to"]) == {"plain FastAPI", "bare ASGI, a constant", "the runtime alone"}
    assert all(rate > 0 for rate in first["rates_hz"].values())
    assert first["added_p50_ms"][0] > 0
    assert first["commit"] == second["commit"]
    assert "as a ratio" in capsys.readouterr().out


def test_the_capacity_is_that_of_column_1_on_any_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    with serving("anytime", artifact, tmp_path / "log", {"ANYTIME_PROFILE_SECONDS": "0.1"}) as server:
        assert capacity.main([server.url]) == 0
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
            counted = re.findall(r'anytime_answers_total\{column="(\d)".*\} (\S+)', response.read().decode())
    assert float(capsys.readouterr().out) > 0
    assert {column for column, n in counted if float(n)} == {"1"}


def test_only_the_query_differs_from_an_ordinary_request() -> None:
    address = urllib.parse.urlsplit("http://127.0.0.1:8000")
    plain = predict_head(address, 0.005, "application/octet-stream", 12)
    asked = capacity.first_column_head(address, 0.005, "application/octet-stream", 12)
    assert asked.replace(b"&min_confidence=0", b"") == plain
    assert asked.startswith(b"POST /predict?budget_ms=5&min_confidence=0 HTTP/1.1\r\n")
