"""The server on a real Ray cluster: two nodes of one core each on this machine, as deploy/ray/cpu.yaml says.

`make ray-test` sets up what it needs. A minute and two gigabytes; only this machine can reach it.
"""

import contextlib
import functools
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
OWN_PYTHON = ROOT / ".venv-ray" / "bin" / "python"
PYTHON = Path(sys.executable) if find_spec("ray") else OWN_PYTHON
"""That has Ray."""

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="Ray is not installed: make ray-test")
PATIENCE_S = 90.0
PNG = {"content-type": "image/png"}
ANSWER = ("model", "version", "label", "index", "confidence", "top", "column", "depth", "columns_run")

SCHEMA = """
import sys, yaml
from ray.serve import schema
from ray.serve.config import AutoscalingConfig
whole = yaml.safe_load(open(sys.argv[1]))
(application,) = whole["applications"]
(deployment,) = application["deployments"]
for part, kind in (
    (whole, schema.ServeDeploySchema),
    (whole["http_options"], schema.HTTPOptionsSchema),
    (application, schema.ServeApplicationSchema),
    (deployment, schema.DeploymentSchema),
    (deployment["ray_actor_options"], schema.RayActorOptionsSchema),
    (deployment["autoscaling_config"], AutoscalingConfig),
):
    assert set(part) <= set(kind.model_fields), set(part) - set(kind.model_fields)
schema.ServeDeploySchema.model_validate(whole)
"""


def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "ray" / name).read_text(encoding="utf-8"))
    return loaded


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def until(is_so: Callable[[], object], what: str) -> None:
    """Wait for something to become true."""
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s, f"{what} did not come within {PATIENCE_S:g} s"
        time.sleep(0.2)


def pictures(n: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    encoded = []
    for pixels_HWC in rng.integers(0, 256, (n, 32, 32, 3), np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


@dataclass
class OnRay:
    """The application on its cluster, reached through the proxy of either node."""

    proxies: tuple[httpx.Client, ...]
    cluster: subprocess.Popen[str]
    address: str
    environment: dict[str, str]
    path: Path

    def replicas(self) -> list[dict[str, Any]]:
        """Those that serve: `node` and `pid` of each."""
        assert self.cluster.stdin is not None
        assert self.cluster.stdout is not None
        self.cluster.stdin.write("replicas\n")
        self.cluster.stdin.flush()
        replicas: list[dict[str, Any]] = json.loads(self.cluster.stdout.readline())
        return replicas

    def deploy(self, **options: Any) -> None:
        """Have it run as the file says, but for these options."""
        chosen = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        chosen["applications"][0]["deployments"][0].update(options)
        self.path.write_text(yaml.safe_dump(chosen), encoding="utf-8")
        done = subprocess.run(
            [PYTHON.with_name("serve"), "run", "--non-blocking", "--address", self.address, self.path],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def hold(self, n: int, budget_ms: int) -> contextlib.ExitStack:
        """Have requests inside whose pictures do not come: they cost nothing, and are there."""
        stack = contextlib.ExitStack()
        for _ in range(n):
            stack.enter_context(contextlib.closing(self.begin(budget_ms, n_bytes=1000)))
        return stack

    def begin(self, budget_ms: int, n_bytes: int) -> http.client.HTTPConnection:
        """Send the head of a request."""
        url = self.proxies[0].base_url
        connection = http.client.HTTPConnection(url.host, url.port, timeout=PATIENCE_S)
        connection.putrequest("POST", f"/predict?budget_ms={budget_ms}")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", str(n_bytes))
        connection.endheaders()
        return connection


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    folder = tmp_path_factory.mktemp("ray")
    ports = free_port(), free_port()
    environment = os.environ | {
        "ANYTIME_POLICY": "fixed-deep",  # answers are to be the same wherever they come from
        "ANYTIME_PROFILE_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on 127.0.0.1 only, as there
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.budgets:middlewares",
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(ports[1]),  # the nodes have one address between them
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("w"))
        cluster = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("ray_cluster.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        stack.callback(end, cluster)
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        assert address, (folder / "log").read_text()
        chosen = config("cpu.yaml")
        chosen["http_options"].update(host="127.0.0.1", port=ports[0])
        (folder / "cpu.yaml").write_text(yaml.safe_dump(chosen), encoding="utf-8")
        proxies = tuple(
            stack.enter_context(
                httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False)
            )
            for port in ports
        )
        running = OnRay(proxies, cluster, address, environment, folder / "cpu.yaml")
        soon = {"look_back_period_s": 2.0, "upscale_delay_s": 0.0, "metrics_interval_s": 1.0}
        running.deploy(
            autoscaling_config={"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, **soon}
        )
        until(lambda: len(running.replicas()) == 1, "a replica")
        yield running


def end(cluster: subprocess.Popen[str]) -> None:
    """Tear it down, whatever has happened."""
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    cluster.stdin.close()
    try:
        cluster.wait(PATIENCE_S)
    finally:
        cluster.kill()
        cluster.stdout.close()


@pytest.fixture(scope="module")
def grown(on_ray: OnRay) -> OnRay:
    """With a replica on each node, because there was more to do than one is to have."""
    with on_ray.hold(8, budget_ms=10_000):
        until(lambda: len(on_ray.replicas()) == 2, "a second replica")
    until(lambda: all(proxy_answers(proxy) for proxy in on_ray.proxies), "a proxy on each node")
    return on_ray


def proxy_answers(proxy: httpx.Client) -> bool:
    try:
        return proxy.get("/healthz/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def plain_server(environment: dict[str, str]) -> Iterator[httpx.Client]:
    """The server without Ray, in a process of its own with the same settings."""
    port = free_port()
    own = {"ANYTIME_PORT": str(port), "ANYTIME_GRPC_PORT": ""}
    command = [str(PYTHON), "-m", "service", "serve"]
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment | own, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False) as client,
    ):
        try:
            until(lambda: proxy_answers(client), "a plain server")
            yield client
        finally:
            process.terminate()


# ---- the files ----


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_a_file_has_only_what_ray_knows(name: str) -> None:
    """Ray itself passes over what it does not know."""
    done = subprocess.run(
        [PYTHON, "-c", SCHEMA, ROOT / "deploy" / "ray" / name],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )

    assert done.returncode == 0, done.stderr


# ---- the cluster ----


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_it_grows_as_the_file_says_and_each_node_serves(grown: OnRay) -> None:
    replicas = grown.replicas()
    assert len({replica["node"] for replica in replicas}) == 2

    for proxy in grown.proxies:
        for picture in pictures(5):
            answer = proxy.post("/predict?budget_ms=5000", content=picture, headers=PNG)
            assert answer.status_code == 200, answer.text

    started = {series(proxy, "process_start_time_seconds") for proxy in grown.proxies}
    assert len(started) == 2  # each proxy prefers the replica of its own node
    assert all(series(proxy, 'anytime_requests_total{outcome="answered"}') >= 5 for proxy in grown.proxies)


def series(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_answers_are_those_of_a_plain_server(grown: OnRay) -> None:
    with plain_server(grown.environment) as plain:
        for i, picture in enumerate(pictures(20)):
            ask = functools.partial(httpx.Client.post, content=picture, headers=PNG)
            expected = ask(plain, "/predict?budget_ms=5000&top_k=10").json()
            answer = ask(grown.proxies[i % 2], "/predict?budget_ms=5000&top_k=10").json()

            assert [answer[name] for name in ANSWER] == [expected[name] for name in ANSWER]
            assert answer.keys() == expected.keys()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_budgets_are_kept_and_what_is_said_of_them_is_true(grown: OnRay) -> None:
    statuses = Counter[int]()
    for i, picture in enumerate(pictures(60)):
        budget_ms = (1, 15, 40, 1000)[i % 4]
        started_s = time.monotonic()
        reply = grown.proxies[i % 2].post(f"/predict?budget_ms={budget_ms}", content=picture, headers=PNG)
        took_ms = (time.monotonic() - started_s) * 1e3
        statuses[reply.status_code] += 1
        assert reply.headers.get_list("x-request-id", split_commas=True)[1:] == []
        if reply.status_code != 200:
            assert reply.json()["status"] == reply.status_code
            continue
        answer = reply.json()
        assert answer["budget_ms"] == budget_ms
        assert answer["elapsed_ms"] <= took_ms
        assert answer["elapsed_ms"] > answer["timing_ms"]["inference"]
        if answer["deadline_met"]:
            assert answer["elapsed_ms"] <= budget_ms
    assert statuses[200] >= 15, statuses  # all that have a second
    assert statuses[429] + statuses[504] >= 15, statuses  # all that have a millisecond
    assert set(statuses) <= {200, 429, 504}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_stream_comes_through_rung_by_rung(grown: OnRay) -> None:
    reply = grown.proxies[0].post(
        "/predict?budget_ms=5000&stream=ndjson", content=pictures(1)[0], headers=PNG
    )

    *predictions, done = [json.loads(line) for line in reply.text.splitlines()]
    assert {one["event"] for one in predictions} == {"prediction"}
    assert (done["event"], done["budget_ms"], done["deadline_met"]) == ("done", 5000.0, True)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_when_a_replica_is_killed_the_other_serves_and_ray_starts_a_new_one(grown: OnRay) -> None:
    before = {replica["pid"] for replica in grown.replicas()}
    picture = pictures(1)[0]
    os.kill(min(before), signal.SIGKILL)

    statuses = Counter[int]()

    def is_renewed() -> bool:
        for proxy in grown.proxies:
            reply = proxy.post("/predict?budget_ms=2000", content=picture, headers=PNG)
            assert reply.status_code == 200 or reply.json()["status"] == reply.status_code
            statuses[reply.status_code] += 1
        now = {replica["pid"] for replica in grown.replicas()}
        return len(now) == 2 and now != before

    until(is_renewed, "a new replica")
    assert set(statuses) <= {200, 429, 503, 504}, statuses  # never a bare 500, never no answer
    assert statuses[200] > statuses[503], statuses
    assert all(
        proxy.post("/predict?budget_ms=5000", content=picture, headers=PNG).status_code == 200
        for proxy in grown.proxies
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_replica_that_is_replaced_answers_those_it_has_first(grown: OnRay) -> None:
    picture = pictures(1)[0]
    connection = grown.begin(10_000, n_bytes=len(picture))
    before = {replica["pid"] for replica in grown.replicas()}
    with ThreadPoolExecutor(1) as deploying:
        # Replicas that need something else are new ones.
        done = deploying.submit(grown.deploy, ray_actor_options={"num_cpus": 0.9})
        until(lambda: before - {replica["pid"] for replica in grown.replicas()}, "a replica that leaves")
        connection.send(picture)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        done.result()

    assert (response.status, answer.get("label") is not None) == (200, True), answer
