"""Rules ask for what there is; each alert fires and stays silent when it should, and has a runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import PREFIX, Settings
from tests.deploy import queries

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RUNBOOKS = ROOT / "docs" / "runbooks"
FILES = sorted((FOLDER / "rules").glob("*.yml"))
CASES = sorted((FOLDER / "tests").glob("*.yml"))
PAGES = sorted(set(RUNBOOKS.glob("*.md")) - {RUNBOOKS / "README.md"})
SECTIONS = ["What it means", "Look at", "Do", "Do not"]

promtool = shutil.which("promtool")
prometheus = pytest.mark.prometheus
needs_promtool = pytest.mark.skipif(
    promtool is None, reason="needs promtool (Debian: apt install prometheus)"
)


def loaded(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


RULES: list[dict[str, Any]] = [
    rule for file in FILES for group in loaded(file)["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
NAMES = sorted({alert["alert"] for alert in ALERTS})


def run(*arguments: str | Path) -> None:
    assert promtool
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- as Prometheus reads them ----


@prometheus
@needs_promtool
def test_prometheus_takes_its_configuration_and_every_rule() -> None:
    run("check", "config", FOLDER / "prometheus.yml")
    run("check", "rules", *FILES)


@prometheus
@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_rules_record_and_alert_as_they_should(case: Path) -> None:
    run("test", "rules", case)


# ---- what they say ----


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    queries.check(rule["expr"], RECORDED)


def test_what_is_recorded_is_named_by_level_metric_and_operation() -> None:
    for name in RECORDED:
        level, metric, operation = name.split(":")
        assert level in {"instance", "job", "anytime"}
        assert re.fullmatch(r"anytime_[a-z_]+|slo_objective", metric)
        assert re.fullmatch(r"ratio|(ratio_|quantile_)?rate(\d+[mhd])", operation)


def test_what_is_recorded_for_a_window_is_of_that_window() -> None:
    for rule in RULES:
        window = re.search(r"rate(\d+[mhd])$", rule.get("record", ""))
        if window:
            asked = re.findall(r"\[(\w+)\]|:\w*rate(\d+[mhd])", rule["expr"])
            assert {one or other for one, other in asked} == {window[1]}, rule["record"]


def test_the_objective_is_one_number_in_one_place() -> None:
    (objective,) = [rule for rule in RULES if rule.get("record") == "anytime:slo_objective:ratio"]
    assert re.fullmatch(r"vector\((0\.\d+)\)", objective["expr"])
    burns = [rule for rule in RULES if ":anytime_error_budget_burn:" in rule.get("record", "")]
    assert [rule for rule in RULES if "slo_objective" in rule["expr"]] == burns
    assert all(rule["expr"].count("(1 - scalar(anytime:slo_objective:ratio))") == 1 for rule in burns)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_it_is_how_urgent_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"page", "ticket"}
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert annotations["runbook_url"] == f"docs/runbooks/{alert['alert']}.md"
    assert not annotations["summary"].endswith(".")
    is_told = alert["alert"] in {"AnytimeAbsent", "AnytimeGpuNotUsed"}  # whose value is 1, always
    assert is_told or "$value" in annotations["description"]


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_is_seen_to_fire_and_to_stay_silent(name: str) -> None:
    expected = [
        one["exp_alerts"]
        for case in CASES
        for test in loaded(case)["tests"]
        for one in test.get("alert_rule_test", ())
        if one["alertname"] == name
    ]
    labels = [alert["exp_labels"] for alerts in expected for alert in alerts]
    for alert in ALERTS:
        if alert["alert"] == name:
            assert any(alert["labels"].items() <= given.items() for given in labels)
    assert any(not alerts for alerts in expected) or any("bad" in str(given) for given in labels)


# ---- runbooks ----


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    assert [page.stem for page in PAGES] == NAMES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_runbook_says_what_to_look_at_what_to_do_and_what_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.stem}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert all(section.strip() for section in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:])


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "metrics.md"], ids=lambda page: page.stem)
def test_a_page_names_what_there_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    asked = list(queries.blocks(text))
    assert asked or page.stem == "metrics"
    for query in asked:
        queries.check(query, RECORDED)
    for setting in re.findall(rf"`{PREFIX}([A-Z_]+)", text):
        assert setting.lower() in Settings.model_fields
    for name in re.findall(r"`((?:anytime|process)_[a-z_]+)`", text):
        assert name in queries.METRICS or queries.labels_of(name, RECORDED) is not None
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target


def test_the_list_of_runbooks_is_complete() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\]\(\1\.md\) \| (.+?) \|", (RUNBOOKS / "README.md").read_text("utf-8"), re.MULTILINE
    )
    severities: dict[str, list[str]] = {}
    for alert in ALERTS:
        known = severities.setdefault(alert["alert"], [])
        if alert["labels"]["severity"] not in known:
            known.append(alert["labels"]["severity"])
    assert dict(rows) == {name: ", ".join(known) for name, known in severities.items()}
