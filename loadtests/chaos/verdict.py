"""From what was seen before, during and after to what passes, and to tables.

Must not know how anything was sent or measured.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from loadtests.chaos.callers import Seen
from loadtests.chaos.footprint import Capacities, Footprint

MAX_GROWTH_MIB = 16.0
"""Resident memory that the last two rounds may add, together, in which no model changes. At 20,000 requests a
round, as `make chaos` has them, a leak of 0.4 KB for each would be more; without one it was 2 MiB."""

MAX_SWAP_GROWTH_MIB = 100.0
"""Resident memory that the rounds before may add, in which versions are swapped and broken ones refused: what
is free but cannot be given back comes and goes by some 40 MiB. A version that stays costs 55 MiB (the network
that ships), so that two of all the swaps would be more."""

MAX_HANDLES = 4
"""Open files and sockets more than before: gRPC's event engine opens one or two more when it is busy."""

MAX_THREADS = 8
"""Threads more than before: the pools of asyncio (for what blocks) and of gRPC grow when they are busy, to
bounds of their own. A thread lost for each swap, refused load or cancelled call would be more."""

MAX_IDLE_CPU = 0.10
"""Cores that a server may keep busy for whom nobody asks anything. Timers and gRPC's threads take some 0.01;
one task that goes round for somebody who has left takes a whole one."""

MIN_AMPLE = 0.50
"""Share of the good requests with 200 ms and more that are answered in the storm. Alone all of them would be.
Here the process is stopped, runs last for half a second and bursts fill the queue; but a server that refuses
everybody would pass every other bar."""

MIN_CALM = 0.90
"""Share of the calm requests that are answered: what else runs on the machine may cost some."""

MAX_SLOWER, MAX_SLOWER_MS = 1.5, 1.0
"""How much longer half of the calm requests may take than at a server that has just been started: by this
factor, and so much beside it."""

MAX_TAIL_SLOWER, MAX_TAIL_SLOWER_MS = 3.0, 10.0
"""The same for all but 1 %, which is told by five requests of 500 and is mostly the noise of the machine."""

MAX_STOP_S = 10.0
"""From the signal to the end of the process: its 2 s for those inside, 1 s for gRPC, and time to unwind."""

MAX_COMPLAINTS = 100
"""Of a round that are kept: if there are so many, more would say the same."""


@dataclass(frozen=True)
class Calm:
    """What a few requests get while nobody else asks. Latency [ms] counts from when each was due.

    Attributes:
        n: Sent.
        n_answered: Of them.
        n_wrong: Answers that are not what the artifact says offline.
        p50_ms: Of the answered.
        p99_ms: As well.
    """

    n: int
    n_answered: int
    n_wrong: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Moment:
    """Everything that is looked at while nobody else asks: before the storm, and after it.

    Attributes:
        footprint: What the server holds.
        capacities: What it lets in.
        calm: What a few requests get.
        fresh: What they get at the same time from a server that has just been started.
    """

    footprint: Footprint
    capacities: Capacities
    calm: Calm
    fresh: Calm


@dataclass(frozen=True)
class Round:
    """What became of one round.

    Attributes:
        n_requests: Sent.
        seconds: It took, without what comes after it.
        n_swaps: Versions that took another's place.
        is_quiet: The server was without connections and queue soon after.
        statuses: Number of requests by kind and status.
        surely: Requests that the server must have counted, by outcome; "" where that cannot be known.
        n_perhaps: Requests of which nobody can say whether it has.
        counted: What it counted, by outcome.
        n_ample: Good requests with plenty of time.
        n_ample_answered: Of them.
        complaints: Of callers and of the administrator.
        footprint: Afterwards.
    """

    n_requests: int
    seconds: float
    n_swaps: int
    is_quiet: bool
    statuses: Mapping[str, Mapping[str, int]]
    surely: Mapping[str, int]
    n_perhaps: int
    counted: Mapping[str, int]
    n_ample: int
    n_ample_answered: int
    complaints: Sequence[str]
    footprint: Footprint


@dataclass(frozen=True)
class End:
    """How the server was stopped, with requests inside.

    Attributes:
        status: Of the process; None if it had to be killed.
        seconds: From the signal.
        complaints: Of those who were inside.
        faults: Lines of its log that tell of what must not happen.
    """

    status: int | None
    seconds: float
    complaints: Sequence[str]
    faults: Sequence[str]


@dataclass(frozen=True)
class Bar:
    """One thing that must hold.

    Attributes:
        name: What is judged.
        found: What was found, as it is shown.
        wanted: What must be.
        is_met: Whether it is.
        is_timed: A busy machine may fail it as well.
    """

    name: str
    found: str
    wanted: str
    is_met: bool
    is_timed: bool = False


def round_of(
    notes: Sequence[Seen],
    complaints: Sequence[str],
    *,
    seconds: float,
    n_swaps: int,
    is_quiet: bool,
    counted: Mapping[str, int],
    footprint: Footprint,
) -> Round:
    """Sum a round up; arguments as the fields of `Round`."""
    statuses: dict[str, Counter[str]] = {}
    for note in notes:
        statuses.setdefault(note.kind, Counter())[note.status or "none"] += 1
    ample = [note for note in notes if note.is_ample]
    return Round(
        n_requests=len(notes),
        seconds=seconds,
        n_swaps=n_swaps,
        is_quiet=is_quiet,
        statuses={kind: dict(of) for kind, of in statuses.items()},
        surely=dict(Counter(note.outcome for note in notes if note.counts == "surely")),
        n_perhaps=sum(note.counts == "perhaps" for note in notes),
        counted=counted,
        n_ample=len(ample),
        n_ample_answered=sum(note.status in {"200", "OK"} for note in ample),
        complaints=complaints[:MAX_COMPLAINTS],
        footprint=footprint,
    )


def miscounted(one: Round) -> list[str]:
    """What of a round's counts cannot be.

    The server must have counted as many of each outcome as callers know of; and of all together as many as it
    surely got, and no more than those and the ones that it perhaps got.
    """
    n_surely, n_counted = sum(one.surely.values()), sum(one.counted.values())
    found = []
    if not n_surely <= n_counted <= n_surely + one.n_perhaps:
        found.append(f"{n_counted} counted, {n_surely} to {n_surely + one.n_perhaps} sent")
    for outcome, least in one.surely.items():
        if outcome and one.counted.get(outcome, 0) < least:
            found.append(f"{one.counted.get(outcome, 0)} counted as {outcome}, and {least} were")
    return found


def bars(before: Moment, rounds: Sequence[Round], after: Moment, bounds: Capacities, end: End) -> list[Bar]:
    """Everything that must hold."""
    first, last = before.footprint, after.footprint
    complaints = [complaint for one in rounds for complaint in one.complaints]
    counts = [wrong for one in rounds for wrong in miscounted(one)]
    n_ample = sum(one.n_ample for one in rounds)
    ample = sum(one.n_ample_answered for one in rounds) / max(1, n_ample)
    n_wrong = before.calm.n_wrong + after.calm.n_wrong
    calm = after.calm.n_answered / after.calm.n
    p50_ms = after.fresh.p50_ms * MAX_SLOWER + MAX_SLOWER_MS
    p99_ms = after.fresh.p99_ms * MAX_TAIL_SLOWER + MAX_TAIL_SLOWER_MS
    return [
        _none("unexpected, wrong or missing answers", complaints),
        _none("requests miscounted", counts),
        _none("answers of the calm that are wrong", ["wrong"] * n_wrong),
        _most("connections left", last.n_connections, 0),
        _most("requests left in the queue", last.n_waiting, 0),
        Bar(
            "rounds after which it was quiet",
            f"{sum(one.is_quiet for one in rounds)}",
            f"all {len(rounds)}",
            all(one.is_quiet for one in rounds),
        ),
        *_whole(bounds, after.capacities),
        _most("open handles more than before", last.n_handles - first.n_handles, MAX_HANDLES),
        _most("threads more than before", last.n_threads - first.n_threads, MAX_THREADS),
        *_memory(first, rounds),
        _none("faults in the server's log", end.faults),
        Bar(
            "exit status when stopped with requests inside",
            f"{end.status}",
            f"0, or -{signal.SIGTERM}: the signal's own, which uvicorn hands on when all is done",
            end.status in {0, -signal.SIGTERM},
        ),
        _none("unexpected answers while stopping", end.complaints),
        _most("seconds to stop", end.seconds, MAX_STOP_S, is_timed=True),
        _most("cores busy with nothing", last.idle_cpu, MAX_IDLE_CPU, is_timed=True),
        _least("answered of those with plenty of time, in the storm", ample, MIN_AMPLE),
        _least("answered in the calm after", calm, MIN_CALM),
        _most("p50 in the calm after, ms", after.calm.p50_ms, p50_ms, is_timed=True),
        _most("p99 in the calm after, ms", after.calm.p99_ms, p99_ms, is_timed=True),
    ]


def _none(name: str, found: Sequence[str]) -> Bar:
    shown = f"{len(found)}" + (f", the first: {found[0]}" if found else "")
    return Bar(name, shown, "0", not found)


def _most(name: str, found: float, most: float, *, is_timed: bool = False) -> Bar:
    return Bar(name, f"{found:.4g}", f"at most {most:.4g}", found <= most, is_timed)


def _least(name: str, found: float, least: float) -> Bar:
    return Bar(name, f"{found:.2%}", f"at least {least:.0%}", found >= least, is_timed=True)


def _whole(bounds: Capacities, found: Capacities) -> Iterator[Bar]:
    names = {
        "n_connections": "connections that are let in at once",
        "n_open_requests": "requests that are let in at once",
        "n_open_calls": "gRPC calls that are let in at once",
        "bodies_bytes": "bytes of bodies that are let in at once",
    }
    for field, name in names.items():
        bound, n = asdict(bounds)[field], asdict(found)[field]
        yield Bar(name, f"{n}", f"{bound}", n == bound)


def _memory(first: Footprint, rounds: Sequence[Round]) -> Iterator[Bar]:
    """By rounds, not by one number: an allocator keeps some of what it once had."""
    mib = [first.rss_mib, *(one.footprint.rss_mib for one in rounds)]
    n_swapping = sum(one.n_swaps > 0 for one in rounds)
    if n_swapping and n_swapping < len(rounds):
        growth = mib[n_swapping] - mib[0]
        yield _most("MiB grown by in the rounds with swaps", growth, MAX_SWAP_GROWTH_MIB)
    if len(rounds) - n_swapping >= 2:
        yield _most("MiB grown by in the last two rounds", mib[-1] - mib[-3], MAX_GROWTH_MIB)


# ---- tables ----


def tables(before: Moment, rounds: Sequence[Round], after: Moment, judged: Sequence[Bar]) -> str:
    """All of them, as Markdown."""
    return "\n\n".join(
        (_before_and_after(before, after), _by_round(rounds), _by_bar(judged), _by_kind(rounds))
    )


def _before_and_after(before: Moment, after: Moment) -> str:
    shown: Sequence[tuple[str, Callable[[Moment], str]]] = (
        ("resident memory, MiB", lambda moment: f"{moment.footprint.rss_mib:.1f}"),
        ("open handles", lambda moment: f"{moment.footprint.n_handles}"),
        ("threads", lambda moment: f"{moment.footprint.n_threads}"),
        ("connections", lambda moment: f"{moment.footprint.n_connections}"),
        ("requests in the queue", lambda moment: f"{moment.footprint.n_waiting}"),
        ("cores busy with nothing", lambda moment: f"{moment.footprint.idle_cpu:.3f}"),
        ("connections let in", lambda moment: f"{moment.capacities.n_connections}"),
        ("requests let in", lambda moment: f"{moment.capacities.n_open_requests}"),
        ("gRPC calls let in", lambda moment: f"{moment.capacities.n_open_calls}"),
        ("bytes of bodies let in", lambda moment: f"{moment.capacities.bodies_bytes}"),
        ("calm: answered", lambda moment: f"{moment.calm.n_answered} of {moment.calm.n}"),
        ("calm: p50, ms", lambda moment: f"{moment.calm.p50_ms:.2f}"),
        ("calm: p99, ms", lambda moment: f"{moment.calm.p99_ms:.2f}"),
        ("a fresh server at the same time: p50, ms", lambda moment: f"{moment.fresh.p50_ms:.2f}"),
        ("a fresh server at the same time: p99, ms", lambda moment: f"{moment.fresh.p99_ms:.2f}"),
    )
    return _markdown(("", "before", "after"), [(name, of(before), of(after)) for name, of in shown])


def _by_round(rounds: Sequence[Round]) -> str:
    head = (
        "round",
        "requests",
        "s",
        "swaps",
        "memory, MiB",
        "handles",
        "threads",
        "answered, plenty of time",
    )
    rows = [
        (
            *(f"{i}", f"{one.n_requests}", f"{one.seconds:.0f}", f"{one.n_swaps}"),
            *(f"{one.footprint.rss_mib:.1f}", f"{one.footprint.n_handles}", f"{one.footprint.n_threads}"),
            f"{one.n_ample_answered / max(1, one.n_ample):.1%}",
        )
        for i, one in enumerate(rounds, 1)
    ]
    return _markdown(head, rows)


def _by_kind(rounds: Sequence[Round]) -> str:
    kinds: dict[str, Counter[str]] = {}
    for one in rounds:
        for kind, statuses in one.statuses.items():
            kinds.setdefault(kind, Counter()).update(statuses)
    rows = [
        (kind, f"{sum(of.values())}", ", ".join(f"{status} {n}" for status, n in of.most_common()))
        for kind, of in sorted(kinds.items(), key=lambda item: -sum(item[1].values()))
    ]
    return _markdown(("caller", "requests", "what came"), rows)


def _by_bar(judged: Sequence[Bar]) -> str:
    rows = [(bar.name, bar.found, bar.wanted, "" if bar.is_met else "**no**") for bar in judged]
    return _markdown(("", "found", "wanted", "not met"), rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
