"""One round: callers of every sort at the same time, while models change and the process is held up.

Must not know what is judged good enough. What is sent, and when, follows from a seed; what becomes of it does
not, as on any real machine.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import grpc.aio

from loadtests.chaos import odd_requests, over_grpc, over_http
from loadtests.chaos.callers import NOTHING, PATIENCE_S, Caller, Pictures, Place, Seen
from loadtests.hosting import Server

MAX_CALLERS = 128
"""At once. When so many are there the next one waits, however late it is: a flood would be a test of the
generator, which shares the cores."""

HELD_UP_S = 0.4
"""How long the process is stopped, once a round: every timer of it is late then. Shorter than its time limits
for heads, so that nobody is sent away who sent everything in time."""

TRAP = "trap: "


@dataclass(frozen=True)
class Sort:
    """One sort of callers.

    Attributes:
        share: Of all callers, in parts.
        n_requests: What one of them sends, from and to.
        call: Sends so many, over HTTP or the channel for gRPC.
    """

    share: float
    n_requests: tuple[int, int]
    call: Callable[[Caller, grpc.aio.Channel, int], Awaitable[None]]


def sorts(place: Place, pictures: Pictures) -> Mapping[str, Sort]:
    """All there are: by requests, about three quarters are good ones."""
    odd_http = odd_requests.catalogue(place, pictures)
    odd_grpc = over_grpc.catalogue(place, *pictures.images_NHWC.shape[1:3])

    async def ask_oddly(caller: Caller, *_: object) -> None:
        await odd_requests.ask(caller, caller.rng.choice(odd_http))

    async def call_oddly(caller: Caller, channel: grpc.aio.Channel, _: int) -> None:
        await over_grpc.odd(caller, channel, caller.rng.choice(odd_grpc))

    def alone(call: Callable[[Caller], Awaitable[None]], share: float) -> Sort:
        return Sort(share, (1, 1), lambda caller, *_: call(caller))

    def many(call: Callable[[Caller, int], Awaitable[None]], share: float, least: int, most: int) -> Sort:
        return Sort(share, (least, most), lambda caller, _, n: call(caller, n))

    def over_channel(call: Callable[[Caller, grpc.aio.Channel], Awaitable[None]], share: float) -> Sort:
        return Sort(share, (1, 1), lambda caller, channel, _: call(caller, channel))

    ahead = place.max_pipelined_requests
    return MappingProxyType(
        {
            "good": many(over_http.good, 45, 1, 8),
            "good, gRPC": Sort(10, (1, 4), over_grpc.good),
            "burst": many(over_http.burst, 0.4, 32, 64),
            "pipeline": many(over_http.pipeline, 3, 2, ahead),
            "pipeline, too long": many(over_http.pipeline_too_much, 0.4, ahead + 2, ahead + 8),
            "odd": Sort(18, (1, 1), ask_oddly),
            "odd, gRPC": Sort(6, (1, 1), call_oddly),
            "leaves before the body": alone(over_http.leave_before_body, 2),
            "leaves in the body": alone(over_http.leave_mid_body, 2),
            "leaves while waiting": alone(over_http.leave_waiting, 2),
            "leaves in the stream": alone(over_http.leave_mid_stream, 2),
            "resets": alone(over_http.reset, 2),
            "half-closes": alone(over_http.half_close, 2),
            "cancels, gRPC": over_channel(over_grpc.cancel, 1.5),
            "impatient, gRPC": over_channel(over_grpc.impatient, 1),
            "silent": alone(over_http.silent, 0.3),
            "slow head": alone(over_http.slow_head, 0.4),
            "slow body": alone(over_http.slow_body, 0.5),
            "slow, gRPC": over_channel(over_grpc.slow, 0.3),
            "oversize": alone(over_http.oversize, 0.3),
            "oversize, gRPC": over_channel(over_grpc.oversize, 0.2),
            "takes nothing": alone(over_http.hoard, 0.1),
            "noise, gRPC": alone(over_grpc.noise, 1),
            TRAP + "raise": alone(partial(over_http.spring, trap="raise"), 0.4),
            TRAP + "raise deep": alone(partial(over_http.spring, trap="raise deep"), 0.3),
            TRAP + "nan": alone(partial(over_http.spring, trap="nan"), 0.3),
            TRAP + "stall": alone(partial(over_http.spring, trap="stall"), 0.05),
        }
    )


@dataclass(frozen=True, slots=True)
class Planned:
    """A caller to come."""

    sort: str
    n_requests: int
    due_s: float
    seed: int


def plan(among: Mapping[str, Sort], n_requests: int, rate_hz: float, seed: int) -> list[Planned]:
    """Callers who send as many requests at least, as a Poisson stream of so many requests/s.

    Each sort comes once before chance decides, so that a short round has all of them, too.
    """
    rng = random.Random(seed)  # noqa: S311 - a schedule, not a secret
    names = rng.sample(list(among), len(among))
    shares = [sort.share for sort in among.values()]
    planned: list[Planned] = []
    n = due_s = 0.0
    while n < n_requests or names:
        name = names.pop() if names else rng.choices(list(among), shares)[0]
        each = rng.randint(*among[name].n_requests)
        planned.append(Planned(name, each, due_s, rng.getrandbits(63)))
        due_s += rng.expovariate(1) * each / rate_hz
        n += each
    return planned


async def callers(place: Place, pictures: Pictures, planned: Sequence[Planned]) -> list[Seen]:
    """Have all of them call when they are due; returns what they noted."""
    among = sorts(place, pictures)
    notes: list[Seen] = []
    gate = asyncio.Semaphore(MAX_CALLERS)
    async with over_grpc.channel(place) as channel, asyncio.TaskGroup() as all_of_them:

        async def call(one: Planned) -> None:
            caller = Caller(one.sort, place, pictures, random.Random(one.seed))  # noqa: S311 - as in `plan`
            begun_s = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await among[one.sort].call(caller, channel, one.n_requests)
            except (OSError, TimeoutError) as error:  # TimeoutError is one: it hung
                complaint = f"{type(error).__name__} {error}".strip()
                caller.saw(NOTHING, {NOTHING}, begun_s, counts="perhaps", complaint=complaint)
            finally:
                gate.release()
                notes.extend(caller.notes)

        start_s = time.monotonic()
        for one in planned:
            await asyncio.sleep(start_s + one.due_s - time.monotonic())
            await gate.acquire()
            all_of_them.create_task(call(one))
    return notes


# ---- what else happens meanwhile ----


@dataclass(frozen=True)
class Shelf:
    """What the server's repository holds.

    Attributes:
        versions: Of the model that answers, all of which can be loaded.
        broken: Of the same; by version, a part of what the server must say.
    """

    versions: Sequence[str]
    broken: Mapping[str, str]


async def hold_up(server: Server, after_s: float) -> None:
    """Stop the process for a moment, after so long."""
    await asyncio.sleep(after_s)
    server.freeze()
    try:
        await asyncio.sleep(HELD_UP_S)
    finally:
        server.thaw()


async def come_and_go(place: Place) -> list[str]:
    """Load the small model and unload it; returns what was not as it should be.

    After any change of its models a server gives back memory that is free. What it has then is what it holds,
    and not the most that it ever needed at once.
    """
    told = [await over_http.change(place, place.other, verb, {}) for verb in ("load", "unload")]
    return [f"{place.other}: {status} {text[:200]}" for status, text in told if status != "200"]


async def changes(place: Place, shelf: Shelf, n_swaps: int) -> list[str]:
    """Load, swap and unload what can be, and try to load what cannot; returns what was not as it should be.

    Args:
        place: The server.
        shelf: What can be loaded, and what cannot.
        n_swaps: How often another version takes the place of the one that answers, once at least. The first
            time its administrator does not wait for the end.
    """
    complaints: list[str] = []

    async def expect(status: str, saying: str, model: str, verb: str, **parameters: str) -> None:
        got, text = await over_http.change(place, model, verb, parameters)
        if got != status or saying not in text:
            complaints.append(f"{verb} of {model} {parameters}: {got} {text[:200]}, not {status} {saying}")

    await over_http.begin_change(place, place.model, "load", {"version": shelf.versions[-1]})
    await expect("200", "", place.other, "load")
    for version, saying in shelf.broken.items():
        await expect("409", saying, place.model, "load", version=version)
    for i in range(1, n_swaps):
        await expect("200", "", place.model, "load", version=shelf.versions[i % len(shelf.versions)])
    never_loaded = next(iter(shelf.broken))
    await expect("404", "is not loaded", place.model, "unload", version=never_loaded)
    await expect("404", "The repository has no", "nobody", "load")
    await expect("200", "", place.other, "unload")
    await expect("404", "is not loaded", place.other, "unload")
    return complaints


# ---- what was noted ----


def complaints(notes: Sequence[Seen]) -> list[str]:
    """What callers complain about.

    A run that raises fails for all who are in it: a request that failed is explained if such a trap was
    sprung while it was there. One that gives NaN for a picture fails for that one alone.
    """
    sprung = [note for note in notes if note.kind.startswith(TRAP + "raise")]
    found = []
    for note in notes:
        if note.complaint:
            found.append(f"{note.kind}: {note.complaint}")
        elif (
            note.shares_runs
            and note.status in {"500", "INTERNAL"}
            and not any(trap.sent_s <= note.done_s and note.sent_s <= trap.done_s for trap in sprung)
        ):
            found.append(f"{note.kind}: failed, and nobody had sprung a trap")
    return found
