"""The dashboards ask for what there is, say what they show, and a real Prometheus answers every query."""

import contextlib
import functools
import itertools
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from deploy.grafana import generate
from deploy.grafana.panels import WIDTH
from service.inference import Inference, Session
from service.inference import load as inference_of
from tests.deploy import queries
from tests.deploy.test_rules import FILES, NAMES, RECORDED, loaded
from tests.service import toy_artifact
from tests.service.conftest import BATCH_SIZES, Launcher, Running

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
DASHBOARDS: dict[str, dict[str, Any]] = {
    path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))
}
SCREEN = 22
"""Units of height that a screen of 1080 lines shows at once: 38 pixels each, below Grafana's bars."""


@dataclass(frozen=True)
class Shown:
    """One panel where it is."""

    dashboard: str
    panel: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel['title']}"


PANELS = [
    Shown(name, panel)
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
QUERIES = [(shown, target["expr"]) for shown in PANELS for target in shown.panel["targets"]]


def filled_in(query: str, *, job: str = "anytime", interval: str = "10s") -> str:
    """As Grafana sends it, for all replicas."""
    return query.replace("$job", job).replace("$instance", ".*").replace("$__rate_interval", interval)


# ---- what is written ----


def test_the_files_are_what_the_generator_writes() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert written == {name: generate.text(one) for name, one in generate.DASHBOARDS.items()}, (
        "make dashboards"
    )


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_the_same_on_every_installation(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == f"anytime-{Path(name).stem}"
    assert dashboard["title"]
    assert dashboard["description"]
    assert "id" not in dashboard

    text = json.dumps(dashboard)
    assert set(re.findall(r'"datasource": \{.*?"uid": (".*?")\}', text)) == {'"${datasource}"'}
    assert text.count('"datasource": {') == text.count('"uid": ') - 1  # the last one is its own
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", text))
    assert used - {"__rate_interval", "__data", "__all"} <= declared
    assert declared == {"datasource", "job", "instance", "runbooks"}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(name: str) -> None:
    panels = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
            )
        )
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(taken) == WIDTH * max(y + 1 for _, y in taken), "there are holes"


def test_the_operators_dashboard_fits_one_screen() -> None:
    places = [panel["gridPos"] for panel in DASHBOARDS["operator.json"]["panels"]]
    assert max(place["y"] + place["h"] for place in places) <= SCREEN


@pytest.mark.parametrize("shown", PANELS, ids=str)
def test_a_panel_says_what_it_shows(shown: Shown) -> None:
    panel, defaults = shown.panel, shown.panel["fieldConfig"]["defaults"]
    assert panel["title"][0].isupper()
    assert not panel["title"].endswith((".", ":"))
    assert panel["description"].endswith(".")
    assert defaults["unit"]
    first, *rest = defaults["thresholds"]["steps"]
    assert first["value"] is None
    assert [step["value"] for step in rest] == sorted(step["value"] for step in rest)
    names = [target["refId"] for target in panel["targets"]]
    legends = [target["legendFormat"] for target in panel["targets"]]
    assert len(set(names)) == len(names) >= 1
    assert len(set(legends)) == len(legends)
    assert all(legends)
    for alert in re.findall(r"\bAnytime[A-Z]\w+", panel["description"]):
        assert alert in NAMES


# ---- what is asked ----


@pytest.mark.parametrize(("shown", "query"), QUERIES, ids=lambda value: str(value)[:60])
def test_a_panel_asks_for_what_there_is(shown: Shown, query: str) -> None:
    del shown
    queries.check(filled_in(query), RECORDED)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_variables_and_annotations_ask_for_what_there_is(name: str) -> None:
    dashboard = DASHBOARDS[name]
    for annotation in dashboard["annotations"]["list"]:
        queries.check(filled_in(annotation["expr"]), RECORDED)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked
            queries.check(filled_in(asked[1]), RECORDED)
            assert asked[2] in queries.TARGET


def test_each_metric_is_shown_somewhere() -> None:
    asked = {selector.name for _, query in QUERIES for selector in queries.selectors(filled_in(query))}
    families = {re.sub(r"_(bucket|sum|count)$", "", name or "") for name in asked}
    assert queries.METRICS.keys() <= families | asked


# ---- what Prometheus answers ----

BLACK = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)
WHITE = b"\xff" * len(BLACK)
RAW = {"content-type": "application/octet-stream"}
NO_DATA = {"anytime_gpu_": "there is no GPU here"}
"""What may have no answer, and why."""


@dataclass
class Faulty:
    """A session of onnxruntime that fails on a white picture."""

    session: Session

    def run(
        self, names: list[str], inputs: dict[str, NDArray[np.uint8]], options: Any = None, /
    ) -> Sequence[Any]:
        if inputs["images_NHWC"].min() == 255:
            raise RuntimeError("CUDA error 700")
        return self.session.run(names, inputs, options)


@dataclass
class Prometheus:
    """One that runs."""

    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        document = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert document["status"] == "success", document
        return document["data"]

    def has(self, query: str) -> bool:
        """There is an answer, and one of its values is a number."""
        return any(math.isfinite(float(one["value"][1])) for one in self.get("query", query=query)["result"])


@contextlib.contextmanager
def watched(server: Running, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with our rules that scrapes this server every second."""
    binary = shutil.which("prometheus")
    assert binary
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(file) for file in FILES],
        "scrape_configs": [
            {"job_name": "anytime", "static_configs": [{"targets": [":".join(map(str, server.address))]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as client:
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(20)


def ask_in_every_way(server: Running) -> None:
    """Answers, streams, refusals, what is invalid, what fails, and one who hangs up."""
    post = functools.partial(server.client.post, headers=RAW)
    statuses = [
        post("/predict?budget_ms=5000", content=BLACK).status_code,
        post("/predict?budget_ms=5000&stream=sse", content=BLACK).status_code,
        post("/predict?budget_ms=5000&min_confidence=0", content=BLACK).status_code,
        post("/predict?budget_ms=0.1", content=BLACK).status_code,
        post("/predict?budget_ms=5000", content=b"x").status_code,
        post("/predict?budget_ms=5000", content=WHITE).status_code,
    ]
    assert statuses == [200, 200, 200, 429, 400, 500]
    with server.connect() as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has watched a server that was asked in every way for some seconds."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus (Debian: apt install prometheus)")
    artifact = toy_artifact.write(tmp_path_factory.mktemp("toy"))
    inference = inference_of(artifact, provider="cpu", intra_op_threads=1, batch_sizes=BATCH_SIZES)
    sessions = {column: Faulty(session) for column, session in inference._sessions.items()}
    faulty = Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64)
    with Launcher(inference, contextlib.ExitStack()) as launch:
        server = launch(inference=faulty)
        with watched(server, tmp_path_factory.mktemp("prometheus")) as prometheus:
            end_s = time.monotonic() + 50
            n_scraped = 'count_over_time(up{job="anytime"}[5m]) >= 5'
            while True:
                assert time.monotonic() < end_s, "Prometheus does not scrape"
                ask_in_every_way(server)
                with contextlib.suppress(httpx.TransportError):  # it is starting
                    if prometheus.client.get("/-/ready").is_success and prometheus.has(n_scraped):
                        break
            yield prometheus


@pytest.mark.prometheus
@pytest.mark.parametrize(("shown", "query"), QUERIES, ids=lambda value: str(value)[:60])
def test_prometheus_has_an_answer(prometheus: Prometheus, shown: Shown, query: str) -> None:
    is_exempt = any(name in query for name in NO_DATA)
    assert prometheus.has(filled_in(query)) != is_exempt, shown


@pytest.mark.prometheus
def test_every_rule_is_evaluated_and_records_something(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for file in FILES for group in loaded(file)["groups"])
    assert {rule["health"] for rule in rules} == {"ok"}
    for name in RECORDED:
        assert prometheus.has(name), name


@pytest.mark.prometheus
def test_what_fails_is_alarming_and_nothing_else_is(prometheus: Prometheus) -> None:
    alerts = prometheus.get("alerts")["alerts"]
    firing = {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}
    assert firing - {"AnytimeErrorBudgetBurn"} == {"AnytimeRequestsFailing", "AnytimeRunsFailing"}
