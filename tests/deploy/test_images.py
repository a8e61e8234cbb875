"""What goes into the images, as far as it can be told without building them, as tests/compose.py does."""

import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import service

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


# ---- the Dockerfile ----


def test_the_dockerfile_is_as_it_should_be() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    linted = subprocess.run(
        [linter, "--failure-threshold", "style", ROOT / "deploy" / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert (linted.returncode, linted.stdout) == (0, "")


def stages() -> dict[str, str]:
    """The text of each stage by name, in order."""
    parts = re.split(r"^FROM (?:\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_without_a_target_the_server_for_processors_is_built() -> None:
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("image", ["cpu", "gpu", "load"])
def test_an_image_runs_as_a_user_with_a_number_and_says_what_it_is(image: str) -> None:
    text = stages()[image]

    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    assert re.findall(r"^ARG VERSION=(.+)$", text, re.MULTILINE) == [service.__version__]
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in text


def test_every_folder_and_file_that_is_copied_may_be_seen_by_the_build() -> None:
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    allowed = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    copied = [
        source.rstrip("/")
        for line in re.findall(r"^COPY ((?!--from).+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in line.split()
    ]

    assert patterns[0] == "*", "what is not named stays out"
    assert [path for path in allowed if not (ROOT / path).exists()] == []
    assert copied
    assert set(copied) == set(allowed)


# ---- what pip installs ----


def listed(*arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "deploy" / "requirements.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=50).stdout.splitlines()


def test_an_image_for_processors_has_the_runtime_for_processors_as_it_is_pinned() -> None:
    runtimes = [line for line in listed("cpu", "serve", "tracing") if "onnxruntime" in line]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")

    assert len(runtimes) == 1
    assert re.fullmatch(r"onnxruntime==[\d.]+", runtimes[0])
    assert re.search(rf"^{re.escape(runtimes[0])}\b", pins, re.MULTILINE)


def test_an_image_for_gpus_has_the_libraries_of_cuda_too() -> None:
    assert [line for line in listed("gpu", "serve", "cuda") if line.startswith("onnxruntime-gpu[cuda,cudnn]")]


def test_both_have_everything_else_that_serving_needs() -> None:
    def others(lines: list[str]) -> set[str]:
        return {line for line in lines if not re.match("onnxruntime|nvidia", line)}

    assert others(listed("cpu", "serve")) == others(listed("gpu", "serve", "cuda"))
    assert {"torch", "pytest", "locust"}.isdisjoint(line.split(">")[0] for line in listed("cpu", "serve"))


def test_a_mistake_in_what_is_asked_for_is_told() -> None:
    command = [sys.executable, str(ROOT / "deploy" / "requirements.py"), "tpu", "serve"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert told.returncode == 2
    assert told.stderr.startswith("usage: ")


# ---- the health check ----


@contextmanager
def answering(status: int, secure: Callable[[socket.socket], socket.socket] | None = None) -> Iterator[int]:
    """A server whose readiness has this status; gives its port."""

    class Probed(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz/ready" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Probed) as server:
        if secure:
            server.socket = secure(server.socket)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def check(port: int, **environ: str) -> int:
    """What Docker does every ten seconds."""
    command = [sys.executable, "-IS", str(ROOT / "deploy" / "healthcheck.py")]
    environ = {"ANYTIME_HOST": "0.0.0.0", "ANYTIME_PORT": str(port), **environ}
    return subprocess.run(command, env=environ, timeout=50, check=False).returncode


@pytest.mark.parametrize(("status", "verdict"), [(200, 0), (503, 1)])
def test_healthy_is_who_says_that_it_is_ready(status: int, verdict: int) -> None:
    with answering(status) as port:
        assert check(port) == verdict


def test_who_does_not_listen_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]

    assert check(port) == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_whoever_serves_tls_is_asked_over_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=x",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
        timeout=50,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def secure(listener: socket.socket) -> socket.socket:
        return context.wrap_socket(listener, server_side=True)

    with answering(200, secure) as port:
        assert check(port, ANYTIME_TLS_CERTIFICATE="certificate.pem") == 0
        assert check(port, ANYTIME_TLS_CERTIFICATE="certificate.pem", ANYTIME_TLS_CLIENT_CA="ca.pem") == 0
    with answering(503, secure) as port:
        assert check(port, ANYTIME_TLS_CERTIFICATE="certificate.pem") == 1
