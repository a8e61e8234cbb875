"""Servers of any kind: started, waited for, frozen, and stopped with every process that came of them."""

import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from loadtests import hosting
from loadtests.hosting import Server
from loadtests.hosting import hosting as host

SERVER = """
import http.server, os, subprocess, sys
if sys.argv[1] == "child":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if sys.argv[1] == "spin":
    subprocess.Popen([sys.executable, "-c", "while True: pass"])
if sys.argv[1] == "dies":
    sys.exit("no model")
address = ("127.0.0.1", int(os.environ["PORT"]))
http.server.ThreadingHTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
"""
on_linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")


def starting(tmp_path: Path, what: str) -> AbstractContextManager[Server]:
    port = hosting.free_port()
    return host(
        [sys.executable, "-c", SERVER, what],
        port,
        environment={"PORT": str(port)},
        log=tmp_path / "log",
        is_ready=hosting.answers,
        limit_s=30.0,
        folder=tmp_path,
    )


@on_linux
def test_no_process_is_left_not_even_one_that_went_its_own_way(tmp_path: Path) -> None:
    with starting(tmp_path, "child") as server:
        assert len(server.pids()) == 2
        assert server.process.pid in server.pids()
    assert server.pids() == []
    assert server.process.poll() is not None


@on_linux
def test_a_frozen_server_takes_no_processor_time_until_it_is_thawed(tmp_path: Path) -> None:
    with starting(tmp_path, "spin") as server:
        server.freeze()
        time.sleep(0.1)  # for a signal to arrive
        before_s = server.cpu_s()
        time.sleep(0.3)
        assert server.cpu_s() == before_s
        server.thaw()
        until_s = time.monotonic() + 20
        while server.cpu_s() == before_s:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        server.freeze()  # a frozen one can be stopped, too
    assert server.pids() == []


def test_one_that_does_not_start_is_said_at_once_and_its_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"did not start: see .*log"), starting(tmp_path, "dies"):
        pass
    assert "no model" in (tmp_path / "log").read_text()


def test_one_that_never_becomes_ready_is_given_up(tmp_path: Path) -> None:
    port = hosting.free_port()
    stuck = host(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        port,
        environment={},
        log=tmp_path / "log",
        is_ready=hosting.answers,
        limit_s=0.2,
    )
    with pytest.raises(RuntimeError, match="did not start"), stuck:
        pass


def test_nobody_and_nonsense_are_no_answer(tmp_path: Path) -> None:
    assert not hosting.answers(f"http://127.0.0.1:{hosting.free_port()}")
    with starting(tmp_path, "plain") as server:
        assert hosting.answers(server.url)
        assert not hosting.answers(f"{server.url}/nothing-here")
