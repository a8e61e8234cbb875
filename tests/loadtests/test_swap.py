"""What is said of a swap, from replies that are made up, and the folder that a server is given."""

import json
import math
from pathlib import Path

import pytest

from loadtests.openloop import Reply
from loadtests.swap import VERSIONS, judged, versions_of


def reply(due_s: float, took_s: float, version: str, status: int = 200) -> Reply:
    body = json.dumps({"version": version}).encode()
    done_s = due_s + took_s if status else math.nan
    return Reply(image=0, due_s=due_s, sent_s=due_s, done_s=done_s, status=status, body=body)


def test_latencies_before_and_during_are_told_apart_and_failures_counted() -> None:
    before = [reply(i / 100, 0.002, "1") for i in range(100)]
    during = [reply(1 + i / 100, 0.003, "1") for i in range(100)]
    after = [reply(2.01 + i / 100, 0.5, "2") for i in range(100)]
    failed = [reply(1.5, 0.1, "", status=503), reply(1.6, 0.1, "", status=0)]
    refused = [reply(1.7, 0.001, "", status=429), reply(1.8, 0.001, "", status=504)]
    swap = judged([*before, *during, *after, *failed, *refused], 0.0025, 1.0, 2.0)
    assert (swap.n_before, swap.n_during, swap.n_failed, swap.n_refused) == (100, 100, 2, 2)
    assert [swap.before_p99_ms, swap.during_p99_ms] == pytest.approx([2, 3])
    assert (swap.before_in_time, swap.during_in_time) == (1.0, 0.0)
    assert swap.ratio == pytest.approx(1.5)
    assert swap.versions == ("1", "2")
    assert swap.loading_s == 1.0


def test_a_repository_has_the_artifact_in_two_versions(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "toy", "version": "7"}))
    (tmp_path / "column-1.onnx").write_bytes(b"a graph")
    with versions_of(tmp_path) as folder:
        assert folder.name == "toy"
        for version in VERSIONS:
            manifest = json.loads((folder / version / "manifest.json").read_text())
            assert manifest == {"name": "toy", "version": version}
            assert (folder / version / "column-1.onnx").read_bytes() == b"a graph"
    assert not folder.exists()
