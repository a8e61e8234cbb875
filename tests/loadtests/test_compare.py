"""The comparison with other servers: the same requests for all, and nothing is lost when interrupted."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests import compare
from loadtests.compare import BEGIN, END, OWN, Journal, Trial, fill, remainder_table, requests_of, trials
from tests.service import toy_artifact


def requests(trial: Trial, seed: int = 0) -> Any:
    return requests_of(trial, capacity_hz=500, seconds=1.0, budgets_s=[0.002, 0.05], n_images=10, seed=seed)


def row(server: str, **changes: Any) -> dict[str, Any]:
    """What is kept of one run."""
    outcomes = {"answered": 0.8, "rejected": 0.1, "expired": 0.06, "failed": 0.03, "lost": 0.01}
    seen = {
        "n": 100,
        "span_s": 1.0,
        "attainment": 0.5,
        "accuracy": 0.9,
        "accuracy_of_all": 0.45,
        "goodput_hz": 50.0,
        "outcomes": outcomes,
        "columns": {"1": 1.0},
        "latency_s": {"p50": 0.002, "p95": 0.01, "p99": 0.03, "p99.9": 0.04},
        "attainment_by_budget": {"2.0": 0.5},
        "worst_false_claim_s": math.nan,
        "n_false_claims": 0,
        "lag_p99_s": 0.001,
        "lag_max_s": 0.001,
        "is_valid": True,
    }
    return {"panel": "load 1, poisson", "repeat": 0, "server": server} | seen | changes


def test_every_load_comes_once_before_any_comes_again() -> None:
    planned = trials([0.5, 1.0], ["poisson", "gamma-4"], 2)
    assert len(planned) == len(set(planned)) == 8
    assert [trial.repeat for trial in planned] == [0] * 4 + [1] * 4
    assert planned[0].panel == "load 0.5, poisson"


def test_every_server_gets_the_same_requests_and_every_repetition_others() -> None:
    trial = Trial("gamma-4", 0.5, 0)
    first, again, other = requests(trial), requests(trial), requests(Trial("gamma-4", 0.5, 1))
    assert first.at_s.tolist() == again.at_s.tolist()
    assert first.image.tolist() == again.image.tolist()
    assert first.budget_s.tolist() == again.budget_s.tolist()
    assert first.at_s.tolist() != other.at_s.tolist()
    assert first.at_s.tolist() != requests(trial, seed=1).at_s.tolist()


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.runs.jsonl"
    head = {"plan": {"seconds": 4}, "capacity_hz": 100.0}
    journal = Journal(path)
    assert journal.begin(head) == head
    journal.add(row("mosec"))
    with path.open("a") as file:
        file.write('{"panel": "load 1, poi')  # cut off

    journal = Journal(path)
    assert journal.begin({"plan": {"seconds": 4}}) == head
    assert journal.has(Trial("poisson", 1.0, 0), "mosec")
    assert not journal.has(Trial("poisson", 1.0, 0), OWN)
    assert not journal.has(Trial("poisson", 1.0, 1), "mosec")
    journal.add(row(OWN))
    assert [each["server"] for each in Journal(path).rows] == ["mosec", OWN]


def test_another_run_is_not_mixed_into_one_that_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.runs.jsonl"
    Journal(path).begin({"plan": {"seconds": 4}})
    with pytest.raises(ValueError, match="remove it or change --out"):
        Journal(path).begin({"plan": {"seconds": 5}})
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="remove it"):
        Journal(path)


def test_what_became_of_the_rest_is_told_apart() -> None:
    rows = [row("mosec"), row("mosec", repeat=1, is_valid=False, attainment=0.7), row(OWN)]
    table = remainder_table(rows).splitlines()
    assert table[2] == f"| load 1, poisson | {OWN} | 30.0 | 10.0 | 6.0 | 4.0 | 2.0 | 30.0 | 1 of 1 |"
    assert table[3] == "| load 1, poisson | mosec | 20.0 | 10.0 | 6.0 | 4.0 | 2.0 | 30.0 | 1 of 2 |"


def test_only_what_stands_between_the_marks_of_a_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="has no place"):
        fill(page, "new")


@pytest.mark.slow
@pytest.mark.timeout(170)  # four servers are started, and one of them measures the machine
def test_a_peer_is_compared_and_a_second_call_only_adds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    data = tmp_path / "cifar-10-batches-py"
    data.mkdir()
    side = toy_artifact.HEIGHT
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3 * side * side), dtype=np.uint8)
    (data / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [0] * 20}))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"Words.\n{BEGIN}\n{END}\n")
    out = tmp_path / "results" / "compare"
    arguments = ["--data", str(tmp_path), "--artifact", str(artifact), "--peers", "fastapi", "--loads", "0.5"]
    arguments += ["--arrivals", "poisson", "--seconds", "0.5", "--capacity", "100", "--out", str(out)]
    arguments += ["--page", str(page)]

    assert compare.main([*arguments, "--repeats", "1"]) == 0
    first = json.loads(out.with_suffix(".json").read_text())
    assert compare.main([*arguments, "--repeats", "2"]) == 0
    both = json.loads(out.with_suffix(".json").read_text())

    assert both["runs"][:2] == first["runs"]
    assert len(both["runs"]) == 4
    assert {run["server"] for run in both["runs"]} == {OWN, "FastAPI, column 1"}
    assert len({run["n"] for run in first["runs"]}) == 1
    assert all(run["outcomes"]["answered"] > 0 for run in both["runs"])
    assert set(both["servers"]) == {OWN, "FastAPI, column 1"}
    assert both["servers"][OWN]["capacity_hz"] > 100  # measured, whatever load 1 is
    assert both["n_checked"] == {OWN: 20, "FastAPI, column 1": 20}
    written = page.read_text()
    assert written.startswith("Words.\n")
    assert "(../results/compare.svg)" in written
    assert "| FastAPI, column 1 |" in written
    assert out.with_suffix(".svg").exists()
    assert "median, ms" in out.with_suffix(".md").read_text()
    assert "Load 1 is 100 requests/s" in capsys.readouterr().out
