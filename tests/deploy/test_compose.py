"""The compose files: what holds for every container, and that nothing is open to other machines."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
GPU: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = PROJECT["services"]


def seconds(duration: str) -> int:
    matched = re.fullmatch(r"(\d+)s", duration)
    assert matched, duration
    return int(matched[1])


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_may_do_and_take_no_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"privileged", "cap_add", "network_mode", "pid", "ipc", "user"}.isdisjoint(service)
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert "restart" in service
    assert all("noexec" in mount and "size=" in mount for mount in service["tmpfs"])


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_to_this_machine_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_built_here_or_of_a_version(name: str) -> None:
    service = SERVICES[name]

    assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_from_the_repository_is_there_and_cannot_be_written(name: str) -> None:
    mounts = [mount for mount in SERVICES[name].get("volumes", ()) if mount.startswith("./")]

    for mount in mounts:
        source, _, rest = mount.partition(":")
        assert (ROOT / source).exists(), source
        assert rest.endswith(":ro"), mount


def test_no_password_stands_in_the_files() -> None:
    said = [line for name in SERVICES for line in SERVICES[name].get("environment", {}).items()]
    secret = {name: value for name, value in said if re.search("PASSWORD|KEY|SECRET|TOKEN", name)}

    assert secret == {"GF_SECURITY_ADMIN_PASSWORD": "${GRAFANA_ADMIN_PASSWORD:-}"}


def test_stopping_has_time_to_drain() -> None:
    chosen = Settings(_env_file=None)
    longest_s = chosen.drain_notice_s + chosen.drain_timeout_s + chosen.drain_linger_s + 3

    assert seconds(SERVICES["service"]["stop_grace_period"]) > longest_s


def test_the_override_asks_for_a_gpu_and_refuses_to_do_without() -> None:
    service = GPU["services"]["service"]

    assert service["build"]["target"] == "gpu"
    assert service["environment"]["ANYTIME_PROVIDER"] == "cuda"
    assert service["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    ]


def test_prometheus_asks_the_server_by_the_name_it_has_there() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}

    assert targets == {"anytime": ["service:8000"], "prometheus": ["localhost:9090"]}
    assert "service" in SERVICES


def test_grafana_asks_prometheus_and_finds_its_dashboards_where_they_are_mounted() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text(encoding="utf-8"))
    providers = yaml.safe_load((provisioning / "dashboards/files.yml").read_text(encoding="utf-8"))
    path = providers["providers"][0]["options"]["path"]

    assert [(s["uid"], s["url"]) for s in sources["datasources"]] == [
        ("prometheus", "http://prometheus:9090")
    ]
    assert "prometheus" in SERVICES
    assert f"./deploy/grafana/dashboards:{path}:ro" in SERVICES["grafana"]["volumes"]


def test_without_a_password_nobody_can_log_in_to_grafana() -> None:
    text = (ROOT / "deploy" / "grafana" / "grafana.ini").read_text(encoding="utf-8")
    environment = SERVICES["grafana"]["environment"]

    for line, name in (
        ("disable_login_form = true", "GF_AUTH_DISABLE_LOGIN_FORM"),
        ("disable_initial_admin_creation = true", "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"),
        ("[auth.basic]\nenabled = false", "GF_AUTH_BASIC_ENABLED"),
    ):
        assert line in text
        assert environment[name].startswith("${GRAFANA_ADMIN_PASSWORD:+"), "Grafana ignores what is empty"
    assert "org_role = Viewer" in text


@pytest.mark.docker
@pytest.mark.parametrize("override", [(), ("docker-compose.gpu.yml",)])
def test_compose_accepts_the_files(override: tuple[str, ...]) -> None:
    docker = shutil.which("docker")
    if (
        not docker
        or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("there is no docker compose")
    files = [word for name in ("docker-compose.yml", *override) for word in ("--file", name)]

    checked = subprocess.run(
        [docker, "compose", *files, "--profile", "load", "config", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("environ", [{"PATH": ""}, {"DOCKER_HOST": "unix:///nowhere"}])
def test_without_an_engine_it_is_said_that_nothing_was_tried(environ: dict[str, str]) -> None:
    tried = subprocess.run(
        [sys.executable, "-m", "tests.compose"],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert (tried.returncode, tried.stderr) == (0, "")
    assert tried.stdout.startswith("skipped: there is no ")


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_all_of_it_with_a_real_engine() -> None:
    tried = subprocess.run(
        [sys.executable, "-m", "tests.compose"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2900,
        check=False,
    )

    if tried.stdout.startswith("skipped: "):
        pytest.skip(tried.stdout.strip())
    assert tried.returncode == 0, tried.stdout + tried.stderr


def test_promtool_accepts_the_configuration() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("there is no promtool; tests/compose.py asks Prometheus itself")

    checked = subprocess.run(
        [promtool, "check", "config", ROOT / "deploy" / "prometheus" / "prometheus.yml"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert checked.returncode == 0, checked.stderr
