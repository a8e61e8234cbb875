"""Servers that take turns on one machine: each is checked, saturated, and offered requests, the others rest.

Must not know schedules, nor which servers there are.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests import openloop, plane, records
from loadtests.arrivals import Arrivals
from loadtests.hosting import Server
from loadtests.offline import Offline
from loadtests.openloop import Head, Prediction, Reply
from loadtests.peers import launch
from loadtests.peers.adaptors import OUTCOME_BY_STATUS, Peer
from loadtests.records import Summary

SETTLE_S = 0.4
"""From the beginning of a server's turn to its first request [s]. Larger gives more time to find its feet."""
DRAIN_LIMIT_S = 2.0
"""How long a server may go on with what nobody waits for any more, before it is frozen all the same [s]."""
SAMPLE_S = 0.2
BUSY_SHARE = 0.25
"""Of a core, above what it takes idle: beyond it a server is still at work."""
IDLE_S = 0.5
"""How long idle servers are watched [s]."""
WAKE_LIMIT_S = 60.0
"""How long a server that says it is ready may go without an answer [s]."""
N_CHECKED = 160
CHECKED_AT_ONCE = 8
CHECK_EVERY_S = 0.16
CHECK_BUDGET_S = 5.0
MIN_CHECKED_SHARE = 0.75
"""A server with limits of its own may refuse some if the machine is busy; fewer answers show nothing."""
OWN_PROCESSES = 2
"""Of this server, sharing a port: as many as the machine has cores, and as the peers whose best is two."""
OWN_SETTINGS = {"ANYTIME_NETWORK_MS": "0.2"}
"""Of this server: the clock is the caller's, so that the way there and back counts. Found as theirs are."""
LOST_AFTER_S = 0.5
"""After the last due time [s]: 10 times the largest usual budget. Larger waits longer for what is late."""
N_SATURATING = 1500


@dataclass(frozen=True)
class Contestant:
    """A server on this machine, and how it is asked.

    Attributes:
        name: Of its rows.
        server: The running one; frozen when it is not its turn.
        bodies: What is sent for each image.
        content_type: Of all bodies.
        head: What stands before a body; that of /predict if None.
        read: What an answer says.
        outcome_by_status: What its statuses mean.
        idle_share: Of a core, what it takes when nobody asks.
    """

    name: str
    server: Server
    bodies: Sequence[bytes]
    content_type: str = plane.RAW_PIXELS
    head: Head | None = None
    read: Callable[[Reply], Prediction] = openloop.read_reply
    outcome_by_status: Mapping[int, str] = field(default_factory=lambda: records.OUTCOME_BY_STATUS)
    idle_share: float = 0.0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let it run; afterwards wait until it has nothing to do, and freeze it."""
        self.server.thaw()
        try:
            time.sleep(SETTLE_S)
            with _ahead_of_servers():
                yield
            until_s = time.monotonic() + DRAIN_LIMIT_S
            while time.monotonic() < until_s and self._busy_share() > self.idle_share + BUSY_SHARE:
                pass
        finally:
            self.server.freeze()

    def measure(self, arrivals: Arrivals, labels: NDArray[np.int64]) -> Summary:
        """Offer it these requests in a turn of its own, and judge what comes back."""
        with self.turn():
            replies = plane.offer(
                self.server.url,
                arrivals,
                self.bodies,
                content_type=self.content_type,
                head=self.head,
                timeout_s=LOST_AFTER_S,
            )
        return records.summary(
            plane.record(replies, arrivals, labels, read=self.read, outcome_by_status=self.outcome_by_status)
        )

    def capacity_hz(self) -> float:
        """Answers per second when it never lacks a request."""
        with self.turn():
            return plane.capacity_hz(
                self.server.url,
                self.bodies,
                content_type=self.content_type,
                head=self.head,
                n=N_SATURATING,
            )

    def check(self, offline: Offline) -> int:
        """Compare its answers with those of the artifact, in bursts so that it makes batches.

        Returns:
            How many answers were compared.

        Raises:
            ValueError: one differs, or too few came to show anything; the message says which.
        """
        n = min(N_CHECKED, len(self.bodies))
        image = np.arange(n)
        at_s = (image // CHECKED_AT_ONCE).astype(np.float64) * CHECK_EVERY_S
        arrivals = Arrivals(at_s, np.full(n, CHECK_BUDGET_S), image)
        with self.turn():
            replies = plane.offer(
                self.server.url, arrivals, self.bodies, content_type=self.content_type, head=self.head
            )
        n_answered = 0
        for reply in replies:
            if self.outcome_by_status.get(reply.status) == "answered":
                answer = self.read(reply)
                expected = int(offline.predictions(answer.columns_run)[reply.image])
                n_answered += 1
                if answer.index != expected:
                    raise ValueError(
                        f"{self.name} says {answer.index} of image {reply.image}, the artifact {expected}"
                    )
        if n_answered < MIN_CHECKED_SHARE * n:
            raise ValueError(f"{self.name} answered {n_answered} of {n} requests one could wait for")
        return n_answered

    def wake(self) -> None:
        """Ask until one request is answered: to say that one is ready does not mean that the model is.

        Raises:
            RuntimeError: that did not happen in time.
        """
        until_s = time.monotonic() + WAKE_LIMIT_S
        one = Arrivals(np.zeros(1), np.full(1, CHECK_BUDGET_S), np.zeros(1, np.int64))
        while time.monotonic() < until_s:
            (reply,) = plane.offer(
                self.server.url, one, self.bodies, content_type=self.content_type, head=self.head
            )
            if self.outcome_by_status.get(reply.status) == "answered":
                return
            time.sleep(SAMPLE_S)
        raise RuntimeError(f"{self.name} answers nothing: its log says why")

    def rested(self) -> "Contestant":
        """Watch what it takes when nobody asks, and freeze it until its turn."""
        idle_share = busy_share(self.server, IDLE_S)
        self.server.freeze()
        return replace(self, idle_share=idle_share)

    def _busy_share(self) -> float:
        return busy_share(self.server, SAMPLE_S)


@contextlib.contextmanager
def _ahead_of_servers() -> Iterator[None]:
    """Take a core as soon as one is wanted, where that is allowed: clients are elsewhere and wait for none.

    A real-time class, since Linux weighs niceness only within a session (`sched_autogroup_enabled`), and even
    there lets who runs finish a slice of a millisecond. Only while it sends: a server that is started
    meanwhile would have it too.
    """
    if not hasattr(os, "SCHED_FIFO"):
        yield
        return
    before = os.sched_getscheduler(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        try:
            os.sched_setscheduler(0, before, os.sched_param(0))
        except PermissionError:  # who was allowed the class by RLIMIT_RTPRIO alone may not take the flag back
            os.sched_setscheduler(0, before | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def busy_share(server: Server, span_s: float) -> float:
    """How much of a core it takes, watched for so long [s]."""
    before_s, started_s = server.cpu_s(), time.monotonic()
    time.sleep(span_s)
    return (server.cpu_s() - before_s) / (time.monotonic() - started_s)


@contextlib.contextmanager
def peer_contestant(
    peer: Peer,
    artifact: Path,
    column: str,
    pixels: Sequence[bytes],
    log: Path,
    knobs: Mapping[str, str],
    name: str,
) -> Iterator[Contestant]:
    """Start a peer with one column; it rests until its turn."""
    with launch.launched(peer, artifact, column, log, knobs) as server:
        contestant = Contestant(
            name=name,
            server=server,
            bodies=[peer.body(image) for image in pixels],
            content_type=peer.content_type,
            head=peer.head,
            read=partial(peer.read, column),
            outcome_by_status=OUTCOME_BY_STATUS,
        )
        contestant.wake()
        yield contestant.rested()


@contextlib.contextmanager
def own_contestant(
    policy: str, artifact: Path, pixels: Sequence[bytes], log: Path, name: str
) -> Iterator[Contestant]:
    """Start this project's server with a policy; it rests until its turn."""
    with plane.serving(policy, artifact, log, OWN_SETTINGS, n_processes=OWN_PROCESSES) as server:
        yield Contestant(name, server, pixels).rested()
