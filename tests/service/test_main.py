"""The commands that ship: a server that starts, says where, answers and drains; what is said without one."""

import hashlib
import json
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import service
from service.__main__ import main
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
        "serve",
        *("--artifact", str(artifact), "--port", "0", "--grpc-port", "0"),
        *("--profile-seconds", "0.01", "--batch-sizes", "1,2"),
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


def test_a_taken_port_is_one_sentence_and_status_2(artifact: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(
            "serve",
            *("--artifact", str(artifact), "--port", "0", "--grpc-port", str(taken.getsockname()[1])),
            *("--profile-seconds", "0.01", "--batch-sizes", "1,2", "--log-level", "error"),
            *("--profile-cache", str(tmp_path / "cache")),
        )
        _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "ANYTIME_GRPC_PORT" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"ANYTIME_ARTIFACT": "/nowhere"}, "set ANYTIME_ARTIFACT to an exported folder"),
        ({"ANYTIME_PROT": "1"}, "ANYTIME_PROT"),
        ({"ANYTIME_PORT": "high"}, "ANYTIME_PORT"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(environ: dict[str, str], says: str) -> None:
    process = start("serve", **environ)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert says in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--port", "8000"], ["server"]])
def test_without_a_command_it_says_what_there_is_and_serves_nothing(arguments: list[str]) -> None:
    process = start(*arguments)
    printed, said = process.communicate(timeout=30)
    assert (process.returncode, printed) == (2, "")
    for command in ("serve", "predict", "inspect", "profile", "hash-key"):
        assert re.search(rf"^ +{command} +\w", said, re.MULTILINE)


@pytest.mark.parametrize("command", ["serve", "predict", "inspect", "profile", "hash-key"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m service {command}")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"anytime-inference {service.__version__}\n"
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["version"] == service.__version__


def test_the_installed_command_is_this_one() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["anytime"]) is main


def test_a_reader_that_leaves_is_no_fault(artifact: Path) -> None:
    process = start("inspect", str(artifact))
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(30) == 141


def test_an_interrupt_is_no_fault(tmp_path: Path) -> None:
    pipe = tmp_path / "never-written"
    os.mkfifo(pipe)
    process = start("predict", str(pipe))
    with pipe.open("wb"):  # opens once the client reads it
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_a_new_key_comes_with_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hash-key"]) == 0
    key, hash_ = re.findall(r"(?:key|hash) +(\S+)", capsys.readouterr().out)
    assert hash_ == "sha256:" + hashlib.sha256(key.encode()).hexdigest()
