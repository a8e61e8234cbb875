"""Keeps callers' budgets on the way through a Ray cluster: runs in Ray's HTTP proxy, where requests arrive.

A replica sees a request only when Ray has carried it there, some milliseconds later, and would count its
budget from then. So here its time of arrival is taken; the replica is granted what is left, less what the way
there and back takes; the caller is told how long all of it took, and whether that was in time; and whoever's
budget has ended is told so on time, whatever has become of the request. A plain ASGI middleware: must not
know of Ray, nor how an answer is computed.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import settings
from service.errors import Expired, Problem, Rejected, Stopped
from service.exchange import PROBLEM_HEADER, problem_document
from service.latency import Reserve
from service.models import milliseconds
from service.settings import Settings

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Variable in the environment of Ray that says whom its HTTP proxy asks for middlewares."""

CALLED = "deploy.ray.budgets:middlewares"
BUDGET = b"x-budget-ms"
REQUEST_ID = b"x-request-id"

WAY_START_S, WAY_LEAST_S, WAY_MOST_S = 0.005, 0.0002, 0.25
"""What is kept free for the way before any answer was seen, and at least, and at most.

Source: 7.5 ms is what it takes on two busy cores (loadtests/results/hops.md). Less than that to begin with:
who is let in teaches what it takes, who is refused does not.
"""

MEMORY_S = 1.0
"""How long it is remembered that the way is slow while everybody is refused for it. Larger: the first who
could be served again are refused for longer; smaller: more are let in to end in 504."""

RETRY_S = 1.0
"""When to come again if the way alone takes longer than the budget: no backlog says when that will change."""

NO_REPLICA = Stopped("No replica took the request, or it was lost with its replica: send it again.")


def check_called(environment: Mapping[str, str]) -> None:
    """See whether Ray was told to call `middlewares`: nobody would notice in an answer that it was not.

    Raises:
        RuntimeError: it was not.
    """
    if environment.get(CALLBACK) != CALLED:
        raise RuntimeError(f"Start Ray with {CALLBACK}={CALLED} in its environment, on every node.")


def middlewares() -> list[Middleware]:
    """What Ray is to put around its proxy.

    Raises:
        SettingsError: a variable ANYTIME_… is refused.
    """
    return [Middleware(Budgets, chosen=settings.load())]


class Budgets:
    """Counts the way to a replica and back as part of each budget.

    Args:
        app: Carries a request to a replica, and its answer back.
        chosen: The default budget and the bounds of one; the same as the replicas'.
        clock: Monotonic time [s].
    """

    def __init__(self, app: ASGIApp, chosen: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._chosen = chosen
        self._clock = clock
        self._way = Reserve(WAY_START_S, least_s=WAY_LEAST_S, most_s=WAY_MOST_S)
        self._learnt_s = clock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        arrived_s = self._clock()
        budget_ms = self._budget_ms(scope)
        if budget_ms is None:
            await self._app(scope, receive, send)
            return
        budget_s = budget_ms / 1e3
        way_s = self._way.of(budget_s)
        left_ms = milliseconds(budget_s - way_s - (self._clock() - arrived_s))
        if left_ms < self._chosen.min_budget_ms:
            await _respond(send, self._refusal(way_s))
            return
        passage = _Passage(
            send,
            self._clock,
            arrived_s=arrived_s,
            budget_s=budget_s,
            write_s=self._chosen.write_reserve_ms / 1e3,
            learn=self._learn,
        )
        carrying = asyncio.ensure_future(self._app(_granting(scope, left_ms), receive, passage.send))
        try:
            await asyncio.wait({carrying}, timeout=arrived_s + budget_s - self._clock())
            if not carrying.done() and passage.has_nothing:
                self._learn(math.inf)  # a replica answers in what it is granted: the rest was too little
                await passage.end(
                    Expired("The deadline passed before an answer came: grant a larger budget.")
                )
            await carrying  # its `receive` says that nobody waits any more once there is an answer
            if passage.has_nothing:
                await passage.end(NO_REPLICA)
        finally:
            carrying.cancel()

    def _budget_ms(self, scope: Scope) -> float | None:
        """What a request for an answer grants; None for others, or if a replica is to say what is wrong."""
        if scope["type"] != "http" or scope["path"] != "/predict" or scope["method"] != "POST":
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "budget_ms"]
        given = given or [value.decode("latin-1") for name, value in scope["headers"] if name == BUDGET]
        if not given:
            return self._chosen.default_budget_ms
        try:
            (budget_ms,) = map(float, given)
        except ValueError:
            return None
        return budget_ms if self._chosen.min_budget_ms <= budget_ms <= self._chosen.max_budget_ms else None

    def _learn(self, way_s: float) -> None:
        """Learn how long the way took for one answer."""
        self._way.observe(way_s)
        self._learnt_s = self._clock()

    def _refusal(self, way_s: float) -> Rejected:
        """The refusal of a budget that the way alone takes up; whoever is refused teaches nothing."""
        now_s = self._clock()
        self._way.fade(1 - math.exp((self._learnt_s - now_s) / MEMORY_S))
        self._learnt_s = now_s
        return Rejected(
            f"The way to a replica and back takes {milliseconds(way_s):g} ms of a budget: grant more.",
            RETRY_S,
            "budget",
        )


class _Passage:
    """An answer on its way back: held to the caller's clock, or taken the place of.

    Args:
        send: Leads to the caller.
        clock: Monotonic time [s].
        arrived_s: When the request came, on that clock.
        budget_s: Granted by the caller.
        write_s: What is written later than this before the deadline counts as late [s].
        learn: Told of each way to the replica and back [s].
    """

    def __init__(
        self,
        send: Send,
        clock: Callable[[], float],
        *,
        arrived_s: float,
        budget_s: float,
        write_s: float,
        learn: Callable[[float], None],
    ) -> None:
        self._send = send
        self._clock = clock
        self._arrived_s = arrived_s
        self._budget_s = budget_s
        self._write_s = write_s
        self._learn = learn
        self._head: Message = {}
        self._verdict: dict[str, Any] = {}
        self._is_ended = False
        self.has_nothing = True
        """Nothing was sent to the caller yet."""

    async def end(self, problem: Problem) -> None:
        """Send this in the place of whatever may still come."""
        self._is_ended, self.has_nothing = True, False
        await _respond(self._send, problem)

    async def send(self, message: Message) -> None:
        """Send one of the answer's messages on; its head with the body, whose length is not what it was."""
        if self._is_ended:
            return
        if message["type"] == "http.response.start":
            self._head = message
            return
        head, part, is_whole = self._head, message.get("body", b""), not message.get("more_body", False)
        if head["status"] == 200:
            part = self._restated(part)
        elif PROBLEM_HEADER not in [tuple(pair) for pair in head["headers"]]:  # Ray's own words
            await self.end(NO_REPLICA)
            return
        if self.has_nothing:
            self.has_nothing = False
            headers = [
                pair for pair in head["headers"] if pair[0].lower() not in {b"content-length", REQUEST_ID}
            ]
            headers += [pair for pair in head["headers"] if pair[0] == REQUEST_ID][:1]  # Ray repeats it
            if is_whole:
                headers.append((b"content-length", b"%d" % len(part)))
            await self._send({**head, "headers": headers})
        await self._send({**message, "body": part})

    def _restated(self, part: bytes) -> bytes:
        """An answer, or an event of a stream, with the caller's budget, and judged by the time until now."""
        start, end = part.find(b"{"), part.rfind(b"}") + 1
        record = orjson.loads(part[start:end])
        if "label" in record:  # the last event of a stream repeats what was said of the last answer
            now_s = self._clock()
            took_s = now_s - self._arrived_s
            self._learn(took_s - record["elapsed_ms"] / 1e3)
            self._verdict = {
                "elapsed_ms": milliseconds(took_s),
                "deadline_met": took_s + self._write_s <= self._budget_s,
            }
        record |= {"budget_ms": milliseconds(self._budget_s), **self._verdict}
        return part[:start] + orjson.dumps(record) + part[end:]


def _granting(scope: Scope, budget_ms: float) -> Scope:
    """The same request with this budget."""
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    query = [(name, value) for name, value in query if name != "budget_ms"]  # it would win over the header
    headers = [(name, value) for name, value in scope["headers"] if name != BUDGET]
    return {
        **scope,
        "query_string": urlencode(query).encode(),
        "headers": [*headers, (BUDGET, b"%.3f" % budget_ms)],
    }


async def _respond(send: Send, problem: Problem) -> None:
    status, headers, body = problem_document(problem)
    length = b"content-length", b"%d" % len(body)
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
