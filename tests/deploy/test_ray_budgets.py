"""Budgets on the way through a Ray cluster: in virtual time, with a way and a replica of our own."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.budgets import CALLBACK, CALLED, WAY_START_S, Budgets, check_called, middlewares
from service.settings import Settings
from tests.fakes import VirtualLoop, run_in_virtual_time

SETTINGS = Settings(_env_file=None)
JSON = (b"content-type", b"application/json")
PROBLEM = (b"content-type", b"application/problem+json")


@dataclass
class Reply:
    """What a caller got, and when."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    done_s: float = 0.0

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(b"".join(self.parts))
        return document


async def ask(
    app: ASGIApp, query: str = "", *, path: str = "/predict", method: str = "POST", header: bytes = b""
) -> Reply:
    """Send one request as a server would, one that keeps to the length it has announced."""
    reply = Reply()
    is_whole = asyncio.Event()

    async def receive() -> Message:
        await is_whole.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        assert not is_whole.is_set(), "nothing may follow a whole response"
        if message["type"] == "http.response.start":
            assert not reply.status
            reply.status, reply.headers = message["status"], dict(message["headers"])
            assert len(message["headers"]) == len(reply.headers)
            return
        reply.parts.append(message["body"])
        if not message.get("more_body"):
            reply.done_s = asyncio.get_running_loop().time()
            is_whole.set()

    headers = [(b"x-budget-ms", header)] if header else []
    scope: Scope = {"type": "http", "path": path, "method": method, "headers": headers}
    await app({**scope, "query_string": query.encode()}, receive, send)
    if b"content-length" in reply.headers:
        assert int(reply.headers[b"content-length"]) == len(b"".join(reply.parts))
    return reply


@dataclass
class Way:
    """Takes its time to a replica and back; the replica takes its own, and says how long that was."""

    there_s: float = 0.003
    run_s: float = 0.004
    back_s: float = 0.002
    scopes: list[Scope] = field(default_factory=list)
    was_told: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        answering = asyncio.ensure_future(self._answer(send))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.was_told = gone.result()["type"] == "http.disconnect"
            answering.cancel()
        gone.cancel()

    async def _answer(self, send: Send) -> None:
        await asyncio.sleep(self.there_s + self.run_s)
        answer = {"label": "cat", "budget_ms": 1.0, "elapsed_ms": self.run_s * 1e3, "deadline_met": True}
        await asyncio.sleep(self.back_s)
        await respond(send, 200, [JSON], json.dumps(answer).encode())

    @property
    def granted_ms(self) -> float:
        """What the last request told the replica."""
        return float(dict(self.scopes[-1]["headers"])[b"x-budget-ms"])


async def respond(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], *parts: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [*headers]})
    for i, part in enumerate(parts, start=1):
        await send({"type": "http.response.body", "body": part, "more_body": i < len(parts)})


def through(way: ASGIApp, talk: Callable[[ASGIApp], Awaitable[Reply]]) -> Reply:
    """Have a talk with a cluster, in virtual time."""

    async def main() -> Reply:
        return await talk(Budgets(way, SETTINGS, asyncio.get_running_loop().time))

    return run_in_virtual_time(main)


def test_a_replica_is_granted_what_is_left_when_the_way_is_paid_for() -> None:
    way = Way(there_s=0.002, run_s=0.0, back_s=0.001)

    async def talk(app: ASGIApp) -> Reply:
        for _ in range(200):
            await ask(app, "budget_ms=100")
        return await ask(app, "budget_ms=5")

    reply = through(way, talk)

    assert reply.status == 200
    assert way.granted_ms == pytest.approx(2.0, abs=0.2)


def test_the_query_names_no_budget_any_more_but_all_else() -> None:
    way = Way()

    through(way, lambda app: ask(app, "top_k=2&budget_ms=50&stream=&x=%C3%A4", header=b"7"))

    assert way.scopes[-1]["query_string"] == b"top_k=2&stream=&x=%C3%A4"
    assert [name for name, _ in way.scopes[-1]["headers"]] == [b"x-budget-ms"]
    assert 40 < way.granted_ms < 50


@pytest.mark.parametrize(
    ("query", "header", "budget_ms"), [("", b"40", 40.0), ("", b"", SETTINGS.default_budget_ms)]
)
def test_a_budget_may_be_a_header_or_the_default(query: str, header: bytes, budget_ms: float) -> None:
    way = Way()

    reply = through(way, lambda app: ask(app, query, header=header))

    assert way.granted_ms == pytest.approx(budget_ms - WAY_START_S * 1e3, abs=0.01)
    assert reply.document["budget_ms"] == budget_ms


def test_an_answer_says_what_the_callers_budget_was_and_how_long_all_of_it_took() -> None:
    reply = through(Way(), lambda app: ask(app, "budget_ms=50"))

    assert reply.document == {"label": "cat", "budget_ms": 50.0, "elapsed_ms": 9.0, "deadline_met": True}


def test_an_answer_that_comes_after_the_deadline_is_not_called_in_time() -> None:
    """The loop was busy when it came: neither the timer nor the answer had its turn before."""

    async def way(_: Scope, __: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.work(0.06)
        answer = {"label": "cat", "elapsed_ms": 4.0, "deadline_met": True}
        await respond(send, 200, [JSON], json.dumps(answer).encode())

    reply = through(way, lambda app: ask(app, "budget_ms=50"))

    assert reply.document["elapsed_ms"] == 60.0
    assert reply.document["deadline_met"] is False


def test_at_the_deadline_the_caller_is_told_and_the_replica_too() -> None:
    way = Way(run_s=1.0)

    reply = through(way, lambda app: ask(app, "budget_ms=50"))

    assert (reply.status, reply.document["status"]) == (504, 504)
    assert reply.done_s == pytest.approx(0.05)
    assert way.was_told


def test_an_answer_that_comes_when_the_caller_was_told_otherwise_is_dropped() -> None:
    async def way(_: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1.0)  # does not ask whether anybody waits
        await respond(send, 200, [JSON], b'{"label": "cat", "elapsed_ms": 4.0}')

    assert through(way, lambda app: ask(app, "budget_ms=50")).status == 504


def test_a_budget_that_the_way_takes_up_is_refused_at_once_and_costs_nothing() -> None:
    way = Way()

    reply = through(way, lambda app: ask(app, f"budget_ms={WAY_START_S * 1e3:g}"))

    assert (reply.status, reply.done_s) == (429, 0.0)
    assert reply.headers[b"retry-after"] == b"1"
    assert way.scopes == []


def test_a_way_that_was_slow_is_tried_again_although_all_are_refused_for_it() -> None:
    way = Way(there_s=0.02)
    statuses: list[int] = []

    async def talk(app: ASGIApp) -> Reply:
        for _ in range(200):
            await ask(app, "budget_ms=100")
        way.there_s = 0.001
        for _ in range(100):
            await asyncio.sleep(0.1)
            statuses.append((await ask(app, "budget_ms=20")).status)
        return Reply()

    through(way, talk)

    assert statuses[0] == 429
    assert statuses[-1] == 200


def test_deadlines_missed_teach_that_the_way_is_slow() -> None:
    way = Way(there_s=0.03, run_s=0.0, back_s=0.01)
    statuses: list[int] = []

    async def talk(app: ASGIApp) -> Reply:
        statuses.extend([(await ask(app, "budget_ms=20")).status for _ in range(100)])
        return Reply()

    through(way, talk)

    assert statuses[0] == 504
    assert statuses[-1] == 429


@pytest.mark.parametrize(
    ("query", "path", "method"),
    [
        ("budget_ms=50", "/model", "GET"),
        ("budget_ms=50", "/predict", "GET"),
        ("budget_ms=x", "/predict", "POST"),
        ("budget_ms=50&budget_ms=60", "/predict", "POST"),
        ("budget_ms=0.01", "/predict", "POST"),
        ("budget_ms=nan", "/predict", "POST"),
        ("budget_ms=1e9", "/predict", "POST"),
    ],
)
def test_whatever_the_replica_is_to_say_is_left_as_it_is(query: str, path: str, method: str) -> None:
    scopes: list[Scope] = []

    async def way(scope: Scope, _: Receive, send: Send) -> None:
        scopes.append(scope)
        await respond(send, 422, [PROBLEM], b'{"status": 422}')

    reply = through(way, lambda app: ask(app, query, path=path, method=method))

    assert scopes[0]["query_string"] == query.encode()
    assert scopes[0]["headers"] == []
    assert (reply.status, reply.parts) == (422, [b'{"status": 422}'])


def test_the_problems_of_a_replica_are_passed_on() -> None:
    async def way(_: Scope, __: Receive, send: Send) -> None:
        await respond(send, 429, [PROBLEM, (b"retry-after", b"3")], b'{"status": 429}')

    reply = through(way, lambda app: ask(app, "budget_ms=50"))

    assert (reply.status, reply.headers[b"retry-after"]) == (429, b"3")
    assert reply.parts == [b'{"status": 429}']


def test_each_event_of_a_stream_is_judged_when_it_comes_and_the_last_repeats_it() -> None:
    async def way(_: Scope, __: Receive, send: Send) -> None:
        async def part(event: str, record: dict[str, Any], *, more: bool = True) -> None:
            body = f"event: {event}\ndata: {json.dumps(record)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": [JSON]})
        await asyncio.sleep(0.010)
        await part("prediction", {"label": "cat", "elapsed_ms": 4.0, "deadline_met": True})
        await asyncio.sleep(0.045)
        await part("prediction", {"label": "dog", "elapsed_ms": 20.0, "deadline_met": True})
        await asyncio.sleep(0.010)
        await part("done", {"elapsed_ms": 20.0, "deadline_met": True}, more=False)

    reply = through(way, lambda app: ask(app, "budget_ms=50"))

    records = [json.loads(part.partition(b"data: ")[2]) for part in reply.parts]
    assert [part.partition(b"\n")[0] for part in reply.parts] == [
        *(b"event: prediction", b"event: prediction", b"event: done")
    ]
    assert [(record["elapsed_ms"], record["deadline_met"]) for record in records] == [
        *((10.0, True), (55.0, False), (55.0, False))
    ]
    assert {record["budget_ms"] for record in records} == {50.0}
    assert b"content-length" not in reply.headers


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_ray_says_itself_is_a_problem_with_a_sentence(status: int) -> None:
    async def way(_: Scope, __: Receive, send: Send) -> None:
        await respond(send, status, [(b"content-type", b"text/plain")], b"Request dropped due to ", b"this")

    reply = through(way, lambda app: ask(app, "budget_ms=50"))

    assert (reply.status, reply.headers[b"content-type"]) == (503, b"application/problem+json")
    assert "send it again" in reply.document["detail"]


def test_a_replica_that_dies_with_a_request_leaves_no_caller_without_a_word() -> None:
    async def way(_: Scope, __: Receive, send: Send) -> None:
        await asyncio.sleep(0.01)

    assert through(way, lambda app: ask(app, "budget_ms=50")).status == 503


def test_a_request_is_named_once() -> None:
    name = (b"x-request-id", b"seven")

    async def way(_: Scope, __: Receive, send: Send) -> None:
        await respond(send, 200, [JSON, name, name], b'{"label": "cat", "elapsed_ms": 4.0}')

    assert through(way, lambda app: ask(app, "budget_ms=50")).headers[b"x-request-id"] == b"seven"


def test_a_replica_does_not_start_on_a_ray_that_would_not_count_the_way() -> None:
    check_called({CALLBACK: CALLED})

    for environment in ({}, {CALLBACK: "other:middlewares"}):
        with pytest.raises(RuntimeError, match=f"{CALLBACK}={CALLED}"):
            check_called(environment)


def test_what_ray_is_to_call_is_there_and_gives_budgets() -> None:
    module, _, name = CALLED.partition(":")
    assert (module, name) == (Budgets.__module__, middlewares.__name__)

    way = Way()
    (middleware,) = middlewares()

    reply = run_in_virtual_time(lambda: ask(middleware.cls(way, *middleware.args, **middleware.kwargs)))

    assert reply.document["budget_ms"] == SETTINGS.default_budget_ms
    assert 0 < way.granted_ms < SETTINGS.default_budget_ms
