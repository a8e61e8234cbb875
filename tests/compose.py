"""Run docker-compose.yml with a real engine and see what it promises: `make compose-test`.

Builds the images, has them serve, asks, loads, kills and stops them, and says a line about each. The project
has a name, ports and volumes of its own, and leaves nothing behind but images. What cannot be had here (an
image from a registry, a way to the containers) is left out, and said to be. The exit status is 1 if something
is not as promised, and 0 otherwise: without an engine, too.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from tests.callers import Callers

ROOT = Path(__file__).resolve().parent.parent
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PIXELS = bytes(range(256)) * 12
"""A picture of 32 x 32 pixels in three colours, as the artifact that ships takes it."""

LOOK_INSIDE = """
import importlib.util, json, os, pathlib, shutil, sys
unwanted = ("torch", "onnx", "pytest", "locust", "matplotlib")
print(json.dumps({
    "uid": os.getuid(),
    "packages": [name for name in unwanted if importlib.util.find_spec(name)],
    "tools": [name for name in ("gcc", "cc", "c++", "make", "git", "curl") if shutil.which(name)],
    "tests": [str(path) for top in ("/app", "/opt/venv") for path in pathlib.Path(top).rglob("tests")],
    "sources": sorted(os.listdir("/app")),
}))
"""

READ_PROVISIONING = """
import configparser, json, pathlib
configparser.ConfigParser().read("/etc/grafana/grafana.ini")
etc = pathlib.Path("/etc/grafana")
boards = [json.loads(path.read_text()) for path in sorted(etc.glob("dashboards/*.json"))]
files = [path.read_text() for path in etc.glob("provisioning/*/*.yml")]
print(json.dumps({"boards": [board["title"] for board in boards], "files": len(files)}))
"""

TRY_TO_WRITE = """
import contextlib, pathlib, sys
for folder in sys.argv[1:]:
    with contextlib.suppress(OSError):
        (pathlib.Path(folder) / "written").touch()
        print(folder)
"""

STARTED_S = time.monotonic()


class BrokenPromise(Exception):
    """Something is not as it should be."""


class Skipped(Exception):
    """Nothing can be tried here, and why."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", flush=True)


def expect(holds: object, what: str) -> None:
    if not holds:
        raise BrokenPromise(what)


def run(*command: str, timeout_s: float = 60, environ: Mapping[str, str] | None = None) -> str:
    """What a command prints, on both of its streams if it has no output proper.

    Raises:
        BrokenPromise: it fails, or takes too long.
    """
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environ or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BrokenPromise(f"{' '.join(command)} took longer than {timeout_s:g} s") from error
    if done.returncode:
        raise BrokenPromise(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout or done.stderr


def fetch(url: str, body: bytes | None = None, timeout_s: float = 10) -> tuple[int, bytes]:
    """Status and body of an answer.

    Raises:
        OSError: there is none.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/octet-stream"})
    try:
        with DIRECT.open(request, timeout=timeout_s) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def until(what: str, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Ask until this is true of something, and return that.

    Raises:
        BrokenPromise: it never was.
    """
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        try:
            if result := condition():
                return result
        except (OSError, KeyError, IndexError, BrokenPromise):
            pass
        time.sleep(0.05)
    raise BrokenPromise(f"{what}: not within {timeout_s:g} s")


class Project:
    """The compose project, under another name and on ports that the system chooses.

    Args:
        override: A file that says what is different here.
    """

    def __init__(self, override: Path) -> None:
        self.name = f"anytime-test-{os.getpid()}"
        self._files = ("--file", "docker-compose.yml", "--file", str(override))

    def compose(self, *arguments: str, timeout_s: float = 60, **environ: str) -> str:
        ports = dict.fromkeys(("HTTP_PORT", "GRPC_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0")
        return run(
            *("docker", "compose", "--project-name", self.name, *self._files, *arguments),
            timeout_s=timeout_s,
            environ=ports | environ,
        )

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str, what: str) -> Any:
        return json.loads(
            run("docker", "inspect", "--format", f"{{{{json {what}}}}}", self.container(service))
        )

    def url(self, service: str, port: int) -> str:
        return f"http://{self.compose('port', service, str(port)).strip()}"

    def is_healthy(self, service: str) -> bool:
        return bool(self.inspect(service, ".State.Health.Status") == "healthy")

    def query(self, promql: str) -> float:
        """The value of a query that has one; 0 without any."""
        url = f"{self.url('prometheus', 9090)}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"
        result = json.loads(fetch(url)[1])["data"]["result"]
        return float(result[0]["value"][1]) if result else 0.0


@contextmanager
def project() -> Iterator[Project]:
    """The project, taken down at the end with all that it has made."""
    with tempfile.TemporaryDirectory() as folder:
        override = Path(folder) / "override.yml"
        override.write_text(
            "services: {}"
            if has_image("grafana")
            # Its files are read by a container of the same mounts and user in its place.
            else "services: {grafana: {image: 'anytime-inference:cpu', healthcheck: {disable: true}}}"
        )
        made = Project(override)
        try:
            yield made
        finally:
            made.compose("--profile", "load", "down", "--volumes", "--timeout", "30", timeout_s=120)


def image_of(service: str) -> str:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    found: str = re.findall(rf"^  {service}:\n.*?^    image: (\S+)$", text, re.MULTILINE | re.DOTALL)[0]
    return found


def has_image(service: str) -> bool:
    """Whether an image that is not built here is there, or can be fetched."""
    image = image_of(service)
    if (
        subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode
        == 0
    ):
        return True
    try:
        run("docker", "pull", "--quiet", image, timeout_s=300)
    except BrokenPromise:
        return False
    return True


# ---- the steps ----


def check_engine() -> None:
    """Find an engine, compose and the images that are not built here.

    Raises:
        Skipped: there are none.
    """
    if not shutil.which("docker"):
        raise Skipped("there is no docker command here")
    for command in (
        ("docker", "version", "--format", "{{.Server.Version}}"),
        ("docker", "compose", "version"),
    ):
        try:
            run(*command)
        except BrokenPromise as error:
            raise Skipped(f"there is no engine with compose here ({str(error).splitlines()[-1]})") from error
    if not has_image("prometheus"):
        raise Skipped(f"{image_of('prometheus')} is neither here nor to be had")


def tell_where() -> None:
    """Print when and on what this is."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    version = run("docker", "version", "--format", "{{.Server.Version}}").strip()
    compose = run("docker", "compose", "version", "--short").strip()
    processor = models[0] if models else platform.processor()
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores of {processor}, {platform.system()};"
    )
    print(f"Docker {version}, compose {compose}")


def build(made: Project) -> None:
    began_s = time.monotonic()
    made.compose("--profile", "load", "build", timeout_s=1800)
    built_s = time.monotonic() - began_s
    sizes = []
    for image in ("anytime-inference:cpu", "anytime-inference:load"):
        layers = json.loads(run("docker", "image", "inspect", "--format", "{{json .Size}}", image))
        sizes.append(f"{image} {layers / 1e6:.0f} MB")
    say(f"built in {built_s:.0f} s: {', '.join(sizes)} (of which {size_of_base()} are the base)")


def size_of_base() -> str:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    base = re.findall(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)[0]
    try:
        return f"{int(run('docker', 'image', 'inspect', '--format', '{{.Size}}', base)) / 1e6:.0f} MB"
    except BrokenPromise:  # BuildKit keeps what it has pulled to itself
        return f"those of {base}"


def look_inside() -> None:
    found = json.loads(
        run("docker", "run", "--rm", "--entrypoint", "python", "anytime-inference:cpu", "-c", LOOK_INSIDE)
    )
    expect(found["uid"] == 10001, f"runs as uid {found['uid']}")
    expect(not found["packages"], f"has {found['packages']}")
    expect(not found["tools"], f"has {found['tools']}")
    expect(not found["tests"], f"has {found['tests'][:5]}")
    expect(found["sources"] == ["LICENSE", "healthcheck.py", "service"], f"/app has {found['sources']}")
    say("the image has no torch, no compiler, no tests; its user is 10001")


def start(made: Project) -> None:
    services = ["service", "prometheus", *(["grafana"] if has_image("grafana") else [])]
    began_s = time.monotonic()
    made.compose("up", "--detach", "--wait", "--wait-timeout", "180", *services, timeout_s=240)
    say(f"{', '.join(services)} healthy after {time.monotonic() - began_s:.1f} s")


def check_confinement(made: Project) -> None:
    host = made.inspect("service", ".HostConfig")
    expect(host["ReadonlyRootfs"], "the root file system can be written")
    expect(host["CapDrop"] == ["ALL"] and not host["CapAdd"], "it has capabilities")
    expect(host["Memory"] and host["NanoCpus"] and host["PidsLimit"], "it has no bounds")
    ports = {
        binding["HostIp"]
        for of in made.inspect("service", ".NetworkSettings.Ports").values()
        for binding in of
    }
    expect(ports == {"127.0.0.1"}, f"it is published on {ports}")
    status = made.compose("exec", "--no-TTY", "service", "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    expect(fields["Uid"].split() == ["10001"] * 4, f"process 1 has uid {fields['Uid']}")
    expect(int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0, "process 1 has capabilities")
    expect(fields["NoNewPrivs"] == "1", "process 1 may gain privileges")
    places = ("/", "/app", "/artifact", "/models", "/opt/venv", "/usr", "/etc", "/cache", "/tmp")
    writable = made.compose("exec", "--no-TTY", "service", "python", "-c", TRY_TO_WRITE, *places).split()
    expect(writable == ["/cache", "/tmp"], f"it can write to {writable}")
    memory_mb = int(fields["VmRSS"].split()[0]) / 1e3
    say(f"process 1: uid 10001, no capability, writes to /cache and /tmp only, {memory_mb:.0f} MB resident")


def predict(made: Project) -> None:
    status, body = fetch(f"{made.url('service', 8000)}/predict?budget_ms=1000", PIXELS)
    expect(status == 200, f"/predict: {status} {body!r}")
    answer = json.loads(body)
    say(
        f"POST /predict: {answer['label']}, columns {'+'.join(answer['columns_run'])}, "
        f"{answer['elapsed_ms']:.1f} of {answer['budget_ms']:.0f} ms"
    )
    with grpc.insecure_channel(made.compose("port", "service", "8001").strip()) as channel:
        ready: Any = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
        expect(ready(b"", timeout=10, wait_for_ready=True) == b"\x08\x01", "gRPC says that it is not ready")
    say("gRPC: ready")


def check_grafana(made: Project) -> None:
    if not has_image("grafana"):
        read = made.compose(
            *("run", "--rm", "--no-deps", "--no-TTY", "--user", "472:0", "--entrypoint", "python", "grafana"),
            *("-c", READ_PROVISIONING),
        )
        found = json.loads(read)
        expect(found["boards"] and found["files"] >= 2, f"Grafana would find {found}")
        boards = ", ".join(found["boards"])
        say(f"{image_of('grafana')} is not to be had here: its user, with its mounts, reads {boards}")
        return
    url = made.url("grafana", 3000)
    shown = until("dashboards", lambda: json.loads(fetch(f"{url}/api/search?type=dash-db")[1]))
    boards = ", ".join(board["title"] for board in shown)
    expect(fetch(f"{url}/login", b'{"user":"admin","password":"admin"}')[0] >= 400, "admin can log in")
    say(f"Grafana shows {boards} to everybody on this machine, and nobody can log in")


def load(made: Project) -> None:
    say("the load generator offers the scenario `steady`, 100 requests/s, for a minute")
    said = made.compose("run", "--rm", "--no-TTY", "load", timeout_s=300, LOAD_ARGS="--capacity 200")
    counted = re.findall(r"^ +Aggregated +(\d+) +(\d+)\((\S+?)\)", said, re.MULTILINE)
    expect(counted, f"it says nothing of its requests:\n{said[-3000:]}")
    say(f"{counted[0][0]} requests, {counted[0][2]} without an answer in time, beside everything else here")


def check_prometheus(made: Project) -> None:
    expect(made.query('up{job="anytime"}') == 1, "Prometheus does not reach the service")
    total = until("series of requests", lambda: made.query("sum(anytime_requests_total)"))
    url = made.url("prometheus", 9090)
    groups = json.loads(fetch(f"{url}/api/v1/rules")[1])["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    until("rules evaluated", lambda: not unhealthy(url), timeout_s=90)
    checked = made.compose(
        "exec", "--no-TTY", "prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml"
    )
    expect("SUCCESS" in checked, checked)
    say(f"Prometheus has {total:.0f} requests of the service; {len(rules)} rules are evaluated without error")


def unhealthy(url: str) -> list[str]:
    groups = json.loads(fetch(f"{url}/api/v1/rules")[1])["data"]["groups"]
    return [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "ok"]


def crash(made: Project) -> None:
    """Kill the process, not the container: Docker restarts what ends by itself."""
    try:
        os.kill(made.inspect("service", ".State.Pid"), signal.SIGKILL)
    except OSError as error:
        say(f"left out: the process cannot be killed from here ({error})")
        return
    died_s = time.monotonic()
    until("restarted", lambda: made.inspect("service", ".RestartCount") == 1)
    url = until("published again", lambda: made.url("service", 8000))
    until("answers again", lambda: fetch(f"{url}/predict?budget_ms=1000", PIXELS, timeout_s=2)[0] == 200)
    took_s = time.monotonic() - died_s
    logs = run("docker", "logs", made.container("service"))
    found = re.findall("recalled from|no longer hold", logs)
    expect(found, f"it has found no latencies in its volume:\n{logs[-2000:]}")
    how = "recalled from" if found[-1] == "recalled from" else "measured again, those were others in"
    say(f"kill -9: restarted, the next answer {took_s:.1f} s later; latencies {how} its volume")
    until("healthy again", lambda: made.is_healthy("service"))


def stop_under_load(made: Project) -> None:
    networks = made.inspect("service", ".NetworkSettings.Networks")
    address = next(iter(networks.values()))["IPAddress"]
    try:
        fetch(f"http://{address}:8000/healthz/live", timeout_s=3)
    except OSError as error:
        say(f"left out: containers cannot be reached from here but through a proxy of Docker's ({error})")
        return
    callers = Callers((address, 8000), PIXELS)
    with callers.calling():
        callers.wait_for(lambda: callers.n_answered > 500)
        began_s = time.monotonic()
        run("docker", "stop", "--time", "20", made.container("service"))
        took_s = time.monotonic() - began_s
    state = made.inspect("service", ".State")
    logs = run("docker", "logs", made.container("service"))
    expect(not callers.unanswered, f"without an answer: {callers.unanswered}")
    expect(state["ExitCode"] == 0 and not state["OOMKilled"], f"it ended with {state['ExitCode']}")
    expect("Traceback" not in logs, logs[-3000:])
    told = ", ".join(f"{n} x {status}" for status, n in sorted(callers.statuses.items()))
    say(f"docker stop under load: every request answered ({told}), status 0 after {took_s:.1f} s")


def start_again(made: Project) -> None:
    before = made.query('count_over_time(up{job="anytime"}[1h])')
    made.compose("restart", "--timeout", "30", "prometheus", timeout_s=120)
    made.compose(
        "up",
        "--detach",
        "--wait",
        "--wait-timeout",
        "180",
        "--no-build",
        "service",
        "prometheus",
        timeout_s=240,
    )
    kept = until(
        "what Prometheus had", lambda: made.query('count_over_time(up{job="anytime"}[1h])') >= before
    )
    expect(kept, "Prometheus has lost its series")
    expect(fetch(f"{made.url('service', 8000)}/healthz/ready")[0] == 200, "it is not ready")
    say("started again: ready, and Prometheus still has what it had before its own restart")


def check_nothing_is_left(name: str) -> None:
    mine = ("--filter", f"label=com.docker.compose.project={name}", "--quiet")
    left = [
        *run("docker", "ps", "--all", *mine).split(),
        *run("docker", "volume", "ls", *mine).split(),
        *run("docker", "network", "ls", *mine).split(),
    ]
    expect(not left, f"left behind: {left}")
    say("taken down: no container, volume or network is left")


def main() -> int:
    """Try everything, in order; returns the exit status."""
    try:
        check_engine()
        tell_where()
        with project() as made:
            build(made)
            look_inside()
            start(made)
            for step in (check_confinement, predict, check_grafana, load, check_prometheus, crash):
                step(made)
            stop_under_load(made)
            start_again(made)
        check_nothing_is_left(made.name)
    except Skipped as reason:
        print(f"skipped: {reason}")
        return 0
    except (BrokenPromise, OSError, TimeoutError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print("all is as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
