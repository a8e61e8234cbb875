"""What a server holds, seen from outside: what the system says of its process, its metrics, and its bounds.

Rooms and counters inside a process cannot be seen, but what they refuse can: `capacities` fills each bound to
its last place and asks for one more. A place that was never given back is then missing, and one that was
given back twice is too many. Linux only: it reads /proc.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.chaos import over_grpc, over_http
from loadtests.chaos.callers import PATIENCE_S, RAW, Form, Place
from loadtests.chaos.over_http import LONG_MS, connected, predict
from loadtests.hosting import Server

IDLE_WINDOW_S = 1.0
POLL_S = 0.05
N_TRIES = 4
"""Of a probe that does not find what it should. What is lost inside the server is lost in each."""


@dataclass(frozen=True)
class Footprint:
    """What a server holds while nobody asks for anything.

    Attributes:
        rss_mib: Resident memory.
        n_handles: Open files, sockets and the like.
        n_threads: Threads.
        n_connections: Of callers to its ports.
        n_waiting: Requests in its queue.
        idle_cpu: Cores that it keeps busy: tasks that nobody waits for any more would show here.
    """

    rss_mib: float
    n_handles: int
    n_threads: int
    n_connections: int
    n_waiting: int
    idle_cpu: float


@dataclass(frozen=True)
class Capacities:
    """How much is let in until something is refused, if nothing else is there.

    Attributes:
        n_connections: Connections at once over HTTP.
        n_open_requests: Requests at once whose body has not come, over HTTP.
        n_open_calls: Calls at once whose message has not come, over gRPC.
        bodies_bytes: Bytes of bodies at once.
    """

    n_connections: int
    n_open_requests: int
    n_open_calls: int
    bodies_bytes: int


# ---- the system and the metrics ----


async def footprint(server: Server, place: Place) -> Footprint:
    """Look at a server that nobody asks for anything; takes `IDLE_WINDOW_S`."""
    before_s = server.cpu_s()
    await asyncio.sleep(IDLE_WINDOW_S)
    idle_cpu = (server.cpu_s() - before_s) / IDLE_WINDOW_S
    process = Path(f"/proc/{server.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Footprint(
        rss_mib=int(status["VmRSS"].split()[0]) / 1024,
        n_handles=sum(1 for _ in (process / "fd").iterdir()),
        n_threads=int(status["Threads"]),
        n_connections=n_connections(place),
        n_waiting=int((await metrics(place))["anytime_queue_length"]),
        idle_cpu=idle_cpu,
    )


def n_connections(place: Place) -> int:
    """Connections at the server's ports that its process holds."""
    return len(over_http.held_by(place.port)) + len(over_http.held_by(place.grpc_port))


async def metrics(place: Place) -> Mapping[str, float]:
    """What /metrics says, by series."""
    async with connected(place.host, place.port) as line:
        await line.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        response = await line.response()
    lines = [row for row in response.body.decode().splitlines() if row and not row.startswith("#")]
    return {series: float(value) for series, _, value in (row.rpartition(" ") for row in lines)}


async def quiet(place: Place, limit_s: float) -> bool:
    """Wait until nobody is connected and nothing waits; False if that takes longer [s]."""
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        if not n_connections(place) and not (await metrics(place))["anytime_queue_length"]:
            return True
        await asyncio.sleep(POLL_S)
    return False


# ---- the bounds ----


async def capacities(place: Place, bounds: Capacities) -> Capacities:
    """Fill every bound, one after the other, and ask for one more.

    Args:
        place: The server, whom nobody else asks for anything.
        bounds: What its settings say; no more than one beyond them is tried.
    """
    return Capacities(
        n_connections=await _measured(place, bounds.n_connections, _connections),
        n_open_requests=await _measured(place, bounds.n_open_requests, _open_requests),
        n_open_calls=await _measured(place, bounds.n_open_calls, _open_calls),
        bodies_bytes=await _measured(place, bounds.bodies_bytes, _bodies),
    )


async def _measured(place: Place, bound: int, probe: Callable[[Place, int], Awaitable[int]]) -> int:
    """What a probe finds; tried again if it is not the bound, as some of it may have timed out meanwhile."""
    found = 0
    for _ in range(N_TRIES):
        found = await probe(place, bound)
        await quiet(place, PATIENCE_S)
        if found == bound:
            break
    return found


async def _connections(place: Place, bound: int) -> int:
    """Of one more connection than there may be, those on which a request is answered."""
    async with contextlib.AsyncExitStack() as stack:

        async def is_served() -> bool:
            line = await stack.enter_async_context(connected(place.host, place.port))
            await line.send(b"GET /healthz/live HTTP/1.1\r\nHost: x\r\n\r\n")
            return (await line.response()).status == "200"

        return sum(await asyncio.gather(*(is_served() for _ in range(bound + 1))))


async def _open_requests(place: Place, bound: int) -> int:
    """Of one more request than may be open, those that are not refused while their body does not come."""
    async with contextlib.AsyncExitStack() as stack:

        async def refused() -> bool:
            line = await stack.enter_async_context(connected(place.host, place.port))
            await line.send(predict(place, Form(RAW, b"", None), f"budget_ms={LONG_MS}", n_declared=1))
            return (await line.response()).status == "429"

        return bound + 1 - await _n_true_soon(place, [refused() for _ in range(bound + 1)])


async def _open_calls(place: Place, bound: int) -> int:
    """As `_open_requests`, over gRPC."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(PATIENCE_S)
        yield b""

    async with over_grpc.channel(place) as channel:

        async def refused() -> bool:
            infer = over_grpc.in_parts(channel, "ModelInfer")
            status, _ = await over_grpc.ended(infer(nothing(), metadata=over_grpc.shown(place.key)))
            return status == "RESOURCE_EXHAUSTED"

        return bound + 1 - await _n_true_soon(place, [refused() for _ in range(bound + 1)])


async def _n_true_soon(place: Place, asked: Sequence[Coroutine[None, None, bool]]) -> int:
    """How many say yes before the time for a body is half over; the others are cancelled."""
    tasks = [asyncio.create_task(one) for one in asked]
    done, waiting = await asyncio.wait(tasks, timeout=place.body_timeout_s / 2)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return sum(task.result() for task in done)


async def _bodies(place: Place, bound: int) -> int:
    """Bytes that the room for bodies takes, exactly.

    Bodies of the largest size fill it but for one byte each, which does not come. What is left takes a body
    of so many bytes, and none that has one more.
    """
    n, largest = bound // place.max_body_bytes, place.max_body_bytes
    most = Form(RAW, bytes(largest - 1), None)
    async with contextlib.AsyncExitStack() as stack:

        async def refused() -> bool:
            line = await stack.enter_async_context(connected(place.host, place.port))
            await line.send(predict(place, most, f"budget_ms={LONG_MS}", n_declared=largest))
            return (await line.response()).status == "429"

        async def n_left() -> int:
            until_s = time.monotonic() + place.body_timeout_s / 4
            while not await _is_refused(place, n + 1):
                if time.monotonic() > until_s:
                    return n + 1
            return 0 if await _is_refused(place, n) else n

        n_refused, left = await asyncio.gather(_n_true_soon(place, [refused() for _ in range(n)]), n_left())
        return (n - n_refused) * (largest - 1) + left


async def _is_refused(place: Place, n_bytes: int) -> bool:
    async with connected(place.host, place.port) as line:
        await line.send(predict(place, Form(RAW, bytes(n_bytes), None), f"budget_ms={LONG_MS}"))
        return (await line.response()).status == "429"
