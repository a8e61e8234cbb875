"""The open-loop generator against a real socket: never waits for a reply, never mixes two up, never hangs."""

import asyncio
import contextlib
import gc
import math
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from loadtests.offline import Offline
from loadtests.openloop import MAX_CONNECTIONS, Reply, read_reply, run, send
from tests.service import toy_artifact
from tests.service.conftest import Running, artifact, inference, server

__all__ = ["artifact", "inference", "server"]  # fixtures

RESPONSE = b"HTTP/1.1 %d Whatever\r\nX-Before: 1\r\nContent-Length: %d\r\n%b\r\n%b"


@dataclass
class Scripted:
    """Does with each request what its body says, and keeps what came."""

    url: str = ""
    n_connections: int = 0
    heads: list[bytes] = field(default_factory=list)
    held: list[asyncio.StreamWriter] = field(default_factory=list)
    release_at: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                n_bytes = int(head.lower().partition(b"content-length:")[2].split()[0])
                body = await reader.readexactly(n_bytes)
                self.heads.append(head)
                await self._answer(body, writer)
                if body == b"last":
                    await reader.read()  # to the end of the connection: asked anything more, it never answers
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def _answer(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        match body.split()[0]:
            case b"never":
                return
            case b"hold":  # until as many are held: no answer at all for one that waits for answers
                self.held.append(writer)
                if len(self.held) == self.release_at:
                    for each in self.held:
                        each.write(RESPONSE % (200, len(body), b"", body))
                return
            case b"cut":
                writer.close()
                return
            case b"garbage":
                writer.write(b"220 mail.example.org ESMTP\r\n\r\n")
                return
            case b"busy":
                writer.write(RESPONSE % (429, len(body), b"", body))
            case b"pieces":
                for byte in RESPONSE % (200, len(body), b"", body):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0)
            case b"last":
                writer.write(RESPONSE % (200, len(body), b"Connection: close\r\n", body))
            case b"twice":
                writer.write(RESPONSE % (200, len(body), b"", body) * 2)
            case b"silently-last":
                writer.write(RESPONSE % (200, len(body), b"", body))
                writer.close()
            case b"slow":
                await asyncio.sleep(int(body.split()[1]) / 1e3)
                writer.write(RESPONSE % (200, len(body), b"", body))
            case _:
                writer.write(RESPONSE % (200, len(body), b"", body))
        await writer.drain()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """The scripted server, in a thread of its own."""
    handler = Scripted()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    handler.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with await asyncio.start_server(handler, sock=listener):
            started.set()
            await stop.wait()
            # First, because asyncio loses a connection that is accepted while its server closes.
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(10)
    yield handler
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def ask(
    scripted: Scripted,
    bodies: Sequence[bytes],
    *,
    gap_s: float = 0.0,
    max_connections: int = 100,
    timeout_s: float = 20.0,
) -> list[Reply]:
    """Send each body once, in order."""
    n = len(bodies)
    return run(
        send(
            scripted.url,
            np.arange(n, dtype=np.float64) * gap_s,
            np.full(n, 0.005),
            np.arange(n),
            bodies,
            content_type="text/plain",
            max_connections=max_connections,
            timeout_s=timeout_s,
        )
    )


def test_sends_on_schedule_although_no_reply_comes(scripted: Scripted) -> None:
    scripted.release_at = 60
    replies = ask(scripted, [b"hold"] * 60, gap_s=0.002)
    assert [reply.status for reply in replies] == [200] * 60
    assert max(reply.sent_s for reply in replies) < min(reply.done_s for reply in replies)
    assert all(reply.lag_s >= 0 for reply in replies)
    assert [reply.due_s for reply in replies] == pytest.approx([i * 0.002 for i in range(60)])
    assert [reply.sent_s for reply in replies] == sorted(reply.sent_s for reply in replies)


def test_each_reply_is_that_of_its_request(scripted: Scripted) -> None:
    bodies = [b"slow %d for %d" % ((i * 37) % 11, i) for i in range(200)]
    replies = ask(scripted, bodies, gap_s=0.001)
    assert [reply.body for reply in replies] == bodies
    assert [reply.image for reply in replies] == list(range(200))
    assert all(reply.due_s <= reply.sent_s < reply.done_s for reply in replies)
    assert scripted.n_connections <= 100


def test_the_request_says_what_it_grants(scripted: Scripted) -> None:
    budgets_s = [0.005, 0.0125, 2000.0]
    replies = run(
        send(
            scripted.url + "/prefix/",
            [0, 0, 0],
            budgets_s,
            [1, 0, 1],
            [b"a", b"bc"],
            content_type="image/png",
        )
    )
    assert [reply.body for reply in replies] == [b"bc", b"a", b"bc"]
    assert [reply.image for reply in replies] == [1, 0, 1]
    starts = sorted(head.split(b"\r\n")[0] for head in scripted.heads)
    assert starts == [
        b"POST /prefix/predict?budget_ms=%b HTTP/1.1" % value for value in (b"12.5", b"2000000", b"5")
    ]
    for head in scripted.heads:
        assert b"\r\nContent-Type: image/png\r\n" in head
        assert f"\r\nHost: {scripted.url.removeprefix('http://')}\r\n".encode() in head


def test_a_server_that_is_asked_otherwise_gets_its_own_head(scripted: Scripted) -> None:
    asked: list[tuple[float, str, int]] = []

    def head(address: urllib.parse.SplitResult, budget_s: float, content_type: str, n_bytes: int) -> bytes:
        asked.append((budget_s, content_type, n_bytes))
        return b"POST /infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n{}" % (2 + n_bytes)

    bodies = [b"one", b"two", b"three"]
    replies = run(
        send(
            scripted.url,
            np.zeros(3),
            np.full(3, 0.005),
            np.arange(3),
            bodies,
            content_type="text/plain",
            head=head,
            timeout_s=20,
        )
    )
    assert [reply.body for reply in replies] == [b"{}one", b"{}two", b"{}three"]
    assert all(sent.startswith(b"POST /infer ") for sent in scripted.heads)
    assert asked == [(0.005, "text/plain", 3), (0.005, "text/plain", 5)]  # once for each length


def test_a_request_without_a_connection_waits_and_its_lag_shows_it(scripted: Scripted) -> None:
    replies = ask(scripted, [b"slow 5"] * 10, max_connections=2)
    assert [reply.status for reply in replies] == [200] * 10
    assert scripted.n_connections == 2
    sent_s, done_s = sorted(r.sent_s for r in replies), sorted(r.done_s for r in replies)
    assert all(sent_s[i + 2] >= done_s[i] for i in range(8))
    assert replies[-1].lag_s >= 0.015  # four rounds of 5 ms came before
    assert replies[-1].own_lag_s == replies[0].own_lag_s  # all were seen at once: the server made them wait


def test_what_has_no_response_is_lost_and_harms_no_other(scripted: Scripted) -> None:
    kinds = [b"cut", b"busy", b"ok", b"garbage", b"pieces", b"last", b"twice", b"ok"]
    replies = ask(scripted, kinds * 5, gap_s=0.001)
    expected = {b"cut": 0, b"garbage": 0, b"busy": 429}
    assert [reply.status for reply in replies] == [expected.get(kind, 200) for kind in kinds * 5]
    for kind, reply in zip(kinds * 5, replies, strict=True):
        assert math.isfinite(reply.sent_s)
        assert math.isnan(reply.done_s) == (reply.status == 0)
        assert reply.body == (kind if reply.status else b"")


def test_a_request_that_never_gets_a_connection_is_lost(scripted: Scripted) -> None:
    replies = ask(scripted, [b"never", b"ok"], max_connections=1, timeout_s=0.3)
    assert [reply.status for reply in replies] == [0, 0]
    assert math.isfinite(replies[0].sent_s)
    assert math.isnan(replies[1].sent_s)
    assert math.isnan(replies[1].lag_s)


def test_a_connection_that_the_server_has_closed_is_replaced(scripted: Scripted) -> None:
    first, *others = ask(scripted, [b"silently-last"] * 6, gap_s=0.1, max_connections=1)
    assert first.status == 200
    # Not all: on a machine that stalls, one may be sent before it is seen that the connection is closed.
    assert any(reply.status == 200 for reply in others)


def test_a_server_that_goes_away_loses_the_rest_at_once() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def leave() -> None:
        connection, _ = listener.accept()
        connection.recv(1)
        listener.close()
        connection.close()

    thread = threading.Thread(target=leave)
    thread.start()
    bodies = [b"x"]
    started_s = time.monotonic()
    replies = run(
        send(
            url, [0, 0.1, 0.2], [1] * 3, [0] * 3, bodies, content_type="a/b", max_connections=1, timeout_s=50
        )
    )
    thread.join()
    assert [reply.status for reply in replies] == [0, 0, 0]
    assert time.monotonic() - started_s < 40


def test_nobody_there_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(OSError):  # noqa: PT011 - its words are the system's
        run(send(url, [0], [1], [0], [b""], content_type="a/b"))


@pytest.mark.parametrize(
    ("url", "at_s", "image", "max_connections", "says"),
    [
        ("http://x", [0.0], [0], 0, "1 to 900"),
        ("http://x", [0.0], [0], MAX_CONNECTIONS + 1, "1 to 900"),
        ("https://x", [0.0], [0], 1, "such as http"),
        ("localhost:8000", [0.0], [0], 1, "such as http"),
        ("http://x", [0.0, 1.0], [0], 1, "as many of each"),
        ("http://x", [1.0, 0.0], [0, 0], 1, "sort"),
        ("http://x", [-1.0, 0.0], [0, 0], 1, "sort"),
        ("http://x", [0.0], [1], 1, "index into the bodies"),
        ("http://x", [0.0], [-1], 1, "index into the bodies"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    url: str, at_s: list[float], image: list[int], max_connections: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        run(
            send(
                url,
                at_s,
                [1.0] * len(image),
                image,
                [b""],
                content_type="a/b",
                max_connections=max_connections,
            )
        )


def test_nothing_to_send_needs_no_server() -> None:
    assert run(send("http://x", [], [], [], [], content_type="a/b")) == []


def test_garbage_is_collected_again_afterwards(scripted: Scripted) -> None:
    n_frozen = gc.get_freeze_count()
    ask(scripted, [b"ok"])
    assert gc.isenabled()
    assert gc.get_freeze_count() <= n_frozen


def test_the_service_answers_as_its_artifact_does(server: Running, artifact: Path) -> None:
    shape = (40, toy_artifact.HEIGHT, toy_artifact.WIDTH, 3)
    images_NHWC = np.random.default_rng(4).integers(0, 256, shape, np.uint8)
    image = np.random.default_rng(5).permutation(40)
    replies = run(
        send(
            str(server.client.base_url),
            np.arange(40, dtype=np.float64) * 0.005,
            np.full(40, 10.0),
            image,
            [image_HWC.tobytes() for image_HWC in images_NHWC],
            content_type="application/octet-stream",
        )
    )
    offline = Offline(artifact, images_NHWC)
    for reply in replies:
        prediction = read_reply(reply)
        assert prediction.index == offline.predictions(prediction.columns_run)[reply.image]
        assert prediction.deadline_met
        assert prediction.stopped_by in {"deepest", "load"}
        assert 0 < prediction.timing_ms["inference"] < prediction.elapsed_ms
        assert prediction.elapsed_ms < (reply.done_s - reply.sent_s) * 1e3


def test_only_an_answer_can_be_read() -> None:
    with pytest.raises(ValueError, match="status 429"):
        read_reply(Reply(0, 0.0, 0.0, 0.1, 429, b"{}"))
    with pytest.raises(ValueError, match="Expecting value"):
        read_reply(Reply(0, 0.0, 0.0, 0.1, 200, b"<html>"))
    with pytest.raises(KeyError):
        read_reply(Reply(0, 0.0, 0.0, 0.1, 200, b"{}"))
