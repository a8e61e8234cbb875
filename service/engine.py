"""Owns the queue: runs what the policy decides, batch by batch, and settles every request exactly once.

Must not know of HTTP or images' encodings. All methods belong to the event loop's thread. Runs happen
elsewhere, except for brief ones on a CPU: those begin at once, also beside a refinement, or, while the event
loop is busy, when all who are here have joined them. There is no loop that could die: each arrival, each end
of a run and each timer calls `_advance`.
"""

import asyncio
import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service import scheduling
from service.errors import STOPPING, Outcome, Reason, Rejected, Stopped
from service.health import Health
from service.inference import Inference, Preempted, Preemption
from service.ladder import Ladder
from service.latency import LiveProfile, Reserve
from service.providers import DeviceInDoubt, DeviceLost
from service.scheduling import Policy, StoppedBy
from service.waiting import Queue, Ticket, TrafficMonitor, ready_by

logger = logging.getLogger(__name__)

LEAST_DOUBT_S = 1e-3
"""What was learnt so lately is not doubted [s]: with many refused one after the other, to forget a thousandth
each time would cost a good part of a refusal."""

END_LIMIT_S = 0.5
"""How long stopping waits for a run that has been told to end [s]; what hangs within a node never does."""

GATHERING_STEP = 0.1
"""Part of what is known of how long brief runs are waited for that one of them replaces."""

IN_HAND = 2.0
"""An answer in hand leaves no later than this many times what nearly all answers take before its deadline:
timers and callers' clocks are not that exact, and what it waits for is worth less than what it may lose."""

GATHER_ABOVE = 0.7
"""Where more of those who come than this share find the event loop at work for others (`Traffic.busy`), brief
first runs are for all who are here already, instead of one for each: four together take two thirds of the
time of four alone, and each but the last waits a little longer."""

Begins = Literal["any", "brief", "nothing"]
"""What may begin at once, where somebody has just come in, or has just been answered."""

Result = TypeVar("Result")
_Work = tuple[asyncio.AbstractEventLoop, Callable[[], Any], "asyncio.Future[Any]"]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a column, which several requests may share.

    Args:
        id: Counts the engine's runs.
        column: What was run.
        n_images: On how many images.
        predicted_s: The median that was predicted for it.
        started_s: When it was handed over.
        ended_s: When its result was there; for a request that was settled before, that moment.
    """

    id: int
    column: str
    n_images: int
    predicted_s: float
    started_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """What the engine did for one image, built once when it is settled.

    `outcome` is `answered` here even if the answer then turns out late: only the edge sees the last byte
    leave. `probabilities_K`, `columns_run`, their held-out `accuracy` and `stopped_by` are given exactly for
    an answer; one that may yet be refined has no `stopped_by`. `runs` are all it was in, good or bad, one
    after the other: whenever it was in none since `entered_s`, it waited.
    """

    outcome: Outcome
    arrived_s: float
    deadline_s: float
    entered_s: float
    settled_s: float
    queue_s: float
    inference_s: float
    columns_run: tuple[str, ...] = ()
    probabilities_K: NDArray[np.float32] | None = None
    accuracy: float = 0.0
    stopped_by: StoppedBy | None = None
    runs: tuple[Run, ...] = ()


class Cancellable(Protocol):
    """A timer that has not fired."""

    def cancel(self) -> None:
        """Do not fire."""


class Processor(Protocol):
    """What runs columns. Runs never overlap, but a brief one may begin while another is in progress.

    Attributes:
        ended_s: When the last run ended that was no brief one [s, on the engine's clock].
    """

    ended_s: float

    def start(
        self, column: str, images_HWC: Sequence[NDArray[np.uint8]], *, is_brief: bool = False
    ) -> asyncio.Future[NDArray[np.float32]]:
        """Begin a run; never raises. A brief one is over on return: the caller can spare that time.

        The future holds logits_NK, one row per image in the same order, finite or NaN throughout; or what the
        run raised.
        """

    def start_blank(self, column: str) -> asyncio.Future[NDArray[np.float32]]:
        """Begin a run on one black picture, for nobody; otherwise as `start`."""

    def preempt(self) -> None:
        """Have the run in progress, no brief one, end soon: its future then holds `Preempted`, or a result.

        Never called where the profile's `preemption_s` is infinite.
        """

    def combine(
        self, columns_run: tuple[str, ...], logits_K: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Probabilities of one image from the logits of the columns that ran on it, shallow first."""


class InferenceThread:
    """The processor that ships: one thread in front of `Inference`.

    A thread of our own, because handing a run over and waking up for its result is a good part of what a
    small network costs: about half of what an executor takes.

    Args:
        inference: What it runs.
        niceness: How far its runs stand back behind those of others. Only Linux has that for a thread.
        clock: The engine's [s].
    """

    def __init__(
        self, inference: Inference, niceness: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inference = inference
        self._clock = clock
        self._niceness = niceness if sys.platform == "linux" else 0
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._preemption = Preemption()
        self._keeps_inference = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self.ended_s = -math.inf
        self.combine = inference.combine
        self._thread.start()

    def start(
        self, column: str, images_HWC: Sequence[NDArray[np.uint8]], *, is_brief: bool = False
    ) -> asyncio.Future[NDArray[np.float32]]:
        """Begin a run in the thread, or do it here and now if it is brief, whatever the thread does."""
        if not is_brief:
            self._preemption = Preemption()
            return self._submit(partial(self._run_together, column, images_HWC, self._preemption))
        done: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        try:
            done.set_result(self._run_together(column, images_HWC))
        except Exception as error:  # noqa: BLE001 - whoever waits for the run is told
            done.set_exception(error)
        return done

    def _run_together(
        self, column: str, images_HWC: Sequence[NDArray[np.uint8]], preemption: Preemption | None = None
    ) -> NDArray[np.float32]:
        # Of a single one a view: stacking takes as long as a tenth of a column.
        images_NHWC = images_HWC[0][np.newaxis] if len(images_HWC) == 1 else np.stack(images_HWC)
        return self._inference.run(column, images_NHWC, preemption)

    def start_blank(self, column: str) -> asyncio.Future[NDArray[np.float32]]:
        """Begin a run on one black picture in the thread."""
        return self._submit(partial(self._inference.run_blank, column))

    def preempt(self) -> None:
        """Have the run in progress end between two nodes of its graph."""
        self._preemption.demand()

    async def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """`Inference.warm_up` in the thread that will serve.

        Raises:
            ArtifactError: a graph cannot be run or gives no usable logits.
            DeviceLost: nothing will run any more.
        """
        for size in batch_sizes:  # one by one, so that who is tired of waiting leaves the thread little to do
            await self._submit(partial(self._inference.warm_up, [size]))

    def close(self, *, keeps_inference: bool = False) -> None:
        """Take no more runs; one in progress is left to end by itself, and `inference` is closed then.

        Args:
            keeps_inference: It is not: somebody else goes on with it.
        """
        self._keeps_inference = keeps_inference
        self._work.put(None)

    def _submit(self, call: Callable[[], Result]) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        self._work.put((loop, call, done))
        return done

    def _run(self) -> None:
        if self._niceness:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while work := self._work.get():
            loop, call, done = work
            settle: Callable[[], None]
            try:
                settle = partial(_set, done, call())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the run is told
                settle = partial(_fail, done, error)
            self.ended_s = self._clock()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle)
            del work, call, done, settle  # an error holds this frame, and with it what the run needed
        if not self._keeps_inference:
            self._inference.close()  # here, because it may wait for others on the GPU


def _set(done: asyncio.Future[Result], result: Result) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Ticket):
    """A ticket with what only the engine needs. Await `settled`; everything else is the engine's own."""

    image_HWC: NDArray[np.uint8]
    arrived_s: float
    deadline_s: float
    entered_s: float
    waiting_since_s: float
    settled: asyncio.Future[Served]
    on_rung: Callable[[Served], None] | None = None
    timer: Cancellable | None = None
    logits_K: list[NDArray[np.float32]] = field(default_factory=list)
    probabilities_K: NDArray[np.float32] | None = None
    queue_s: float = 0.0
    inference_s: float = 0.0
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Running:
    """A run in progress; one without a batch is on a blank picture, for nobody."""

    id: int
    column: str
    batch: tuple[Request, ...]
    predicted_s: float
    started_s: float
    busy_until_s: float

    @property
    def is_refinement(self) -> bool:
        return bool(self.batch) and bool(self.batch[0].columns_run)

    def until(self, ended_s: float) -> Run:
        return Run(self.id, self.column, len(self.batch), self.predicted_s, self.started_s, ended_s)


@dataclass(frozen=True, slots=True)
class _Judged:
    """An admission: whose, after which change of the queue, until when it holds, if a run must make way."""

    deadline_s: float
    n_changes: int
    until_s: float
    preempts: bool


class Engine:
    """The queue of one artifact.

    Args:
        processor: Runs the columns.
        policy: Decides what they run on, and whom to refuse.
        profile: Latency by column and batch size [s]; learns from every run.
        ladder: Accuracy by combination of columns.
        clock: Monotonic time [s]; every `_s` below is on it.
        call_at: Calls back at a time on that clock.
        call_soon: Calls back when what is ready now has had its turn.
        call_now: Calls back at once, and in nobody's name, as the two above do.
        observe_run: Told column, number of images, duration [s] and the ratio to the predicted median of
            every
            run that did not fail.
        observe_failed_run: Told the column of every run that did fail.
        observe_preempted_run: Told the column of every run that was preempted before it had a result.
        observe_saved: Told the predicted time of the columns that a caller who left will not need [s].
        observe_broken: Told, once, why no run will succeed any more; nobody is taken in from then on.
        health: Judges that by the runs that fail.
        reserve: Kept free of every budget for building and writing the answer [s]; learns from every answer.
        brief_s: A first run of the shallowest column that is predicted to take no longer is not handed over
            to a thread, and waits for no refinement that is in progress there [s].
        keep_warm_s: The shallowest column runs on a blank picture when nothing has run for so long [s]; 0:
            never. Nothing is learnt from it and no metric counts it, unless it fails. Whoever comes meanwhile
            waits for it, and is taken in or refused with that in mind, as if it were anybody's run.
        run_timeout_s: A run that has not ended by then never will [s].
        max_waiting: Requests in here at once. One that has an answer makes room for one that has none.
        jitter: A factor for each retry time, so that rejected callers do not all return at once.
    """

    def __init__(
        self,
        processor: Processor,
        policy: Policy,
        profile: LiveProfile,
        ladder: Ladder,
        *,
        clock: Callable[[], float],
        call_at: Callable[[float, Callable[[], None]], Cancellable],
        call_soon: Callable[[Callable[[], None]], object],
        call_now: Callable[[Callable[[], None]], object],
        observe_run: Callable[[str, int, float, float], None],
        observe_failed_run: Callable[[str], None],
        observe_preempted_run: Callable[[str], None],
        observe_saved: Callable[[float], None],
        observe_broken: Callable[[str], None],
        health: Health,
        reserve: Reserve,
        brief_s: float,
        keep_warm_s: float,
        run_timeout_s: float,
        max_waiting: int,
        jitter: Callable[[], float],
    ) -> None:
        self._processor = processor
        self._policy = policy
        self._profile = profile
        self._ladder = ladder
        self._clock = clock
        self._call_at = call_at
        self._call_soon = call_soon
        self._call_now = call_now
        self._observe_run = observe_run
        self._observe_failed_run = observe_failed_run
        self._observe_preempted_run = observe_preempted_run
        self._observe_saved = observe_saved
        self._observe_broken = observe_broken
        self._health = health
        self._reserve = reserve
        self._brief_s = brief_s
        self._keep_warm_s = keep_warm_s
        self._run_timeout_s = run_timeout_s
        self._max_waiting = max_waiting
        self._jitter = jitter
        self._queue: Queue[Request] = Queue(ladder)
        self._traffic = TrafficMonitor()
        self._running: _Running | None = None
        self._preempted_s: float | None = None
        self._beside_until_s = -math.inf
        self._n_runs = 0
        self._gathering_s = 0.0  # how long the first in brief runs has waited for them lately
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_stopping = False
        self._n_changes = 0
        self._is_advance_due = False
        self._learnt_s = self._rests_since_s = clock()
        self._judged = _Judged(-math.inf, 0, 0.0, preempts=False)
        self._watching: Cancellable | None = None
        self._warming: Cancellable | None = None
        if keep_warm_s:
            self._keep_warm()

    @property
    def is_stopping(self) -> bool:
        """No request is taken in any more."""
        return self._is_stopping

    @property
    def is_running(self) -> bool:
        """A run is in progress."""
        return self._running is not None

    @property
    def n_waiting(self) -> int:
        """Requests in here that are not running."""
        return len(self._queue)

    @property
    def reserve_s(self) -> float:
        """What is kept free of a large budget now [s]."""
        return self._reserve.sure_s

    def observe_way_out(self, way_out_s: float) -> None:
        """Learn how long an answer took from being settled to its last byte being written [s]."""
        self._reserve.observe(way_out_s)

    def check_admission(
        self, arrived_s: float, deadline_s: float, spent_on: Reason = "body", *, has_waited: bool = False
    ) -> None:
        """Find out, before anything is spent on a request, whether it would be taken in now.

        Args:
            arrived_s: When the request came.
            deadline_s: When its answer must have been written.
            spent_on: What its time went to since it came.
            has_waited: The event loop was at work for others when it came.

        Raises:
            Stopped: the server is stopping.
            Rejected: not even the shallowest column can be had in time.
        """
        if self._is_stopping:
            raise Stopped(STOPPING)
        now_s = self._clock()
        n_unanswered = len(self._queue.unanswered)
        for request in self._in_run():
            n_unanswered += not (request.columns_run or request.settled.done())
        ready_by_s = deadline_s - self._reserve.of(deadline_s - arrived_s)
        if n_unanswered >= self._max_waiting:
            self._traffic.arrived(now_s, ready_by_s - now_s, has_waited=has_waited)
            raise self.refusal(f"{n_unanswered} requests wait for their first answer: retry later.", "load")
        busy_until_s, sooner_s, is_beside = now_s, math.inf, False
        gathers = self._gathers(now_s)
        if self._running:
            busy_until_s = self._busy_until_s(now_s)
            sooner_s = now_s + self._profile.preemption_s if self._is_preemptible else math.inf
            is_beside = self._has_room_beside and (gathers or not self._queue.unanswered)
        elif gathers:
            busy_until_s += self._gathering_s * self._profile.share_left(now_s - self._learnt_s)
        admission = scheduling.admit(
            self._policy,
            ready_by_s,
            now_s,
            busy_until_s,
            sooner_s,
            self._queue,
            self._profile,
            self._ladder,
            self._traffic.traffic(now_s),
            is_beside=is_beside,
        )
        if not admission.is_accepted:
            self._doubt(now_s)
            self._traffic.arrived(now_s, ready_by_s - now_s, has_waited=has_waited)
            raise self.refusal(
                self._why_not_in_time(arrived_s, deadline_s, now_s, admission.needs_s),
                self._reason(arrived_s, deadline_s, now_s, spent_on),
            )
        start_s = sooner_s if admission.preempts else busy_until_s
        if is_beside or not self._running:
            start_s = now_s
        needs_s = admission.needs_s
        if is_beside and not admission.preempts:  # which holds as long as there is time for a crowded run
            needs_s *= scheduling.CROWDED
        until_s = max(ready_by_s - needs_s, start_s)
        self._judged = _Judged(deadline_s, self._n_changes, until_s, admission.preempts)

    def _why_not_in_time(self, arrived_s: float, deadline_s: float, now_s: float, needs_s: float) -> str:
        """One sentence; retrying is advised only to one whose budget would do on an idle server."""
        alone_s = self._profile.latency(self._ladder.shallowest, 1).high_s
        reserve_s = self._reserve.of(deadline_s - arrived_s)
        least_s = now_s - arrived_s + alone_s + reserve_s
        remedy = "grant more or retry later"
        if deadline_s - arrived_s < least_s:
            remedy = f"grant at least {math.ceil(least_s * 1e5) / 1e2:.2f} ms"
        return (
            f"An answer would take about {(needs_s + reserve_s) * 1e3:.2f} ms and "
            f"{max(0.0, deadline_s - now_s) * 1e3:.2f} ms are left: {remedy}."
        )

    def _reason(self, arrived_s: float, deadline_s: float, now_s: float, spent_on: Reason) -> Reason:
        """Judged by what was measured at first: a server that has become slow must not blame its callers."""
        least_s = self._profile.measured(self._ladder.shallowest, 1).high_s + self._reserve.start_s
        if least_s > deadline_s - arrived_s:
            return "budget"
        return spent_on if deadline_s - now_s < least_s else "load"

    def _doubt(self, now_s: float) -> None:
        """Someone is refused although nobody is here: was that learnt in a slow moment that is over?

        Without this, nothing would be run, nothing be learnt any more, and everybody refused for good.
        """
        if self._running or self._queue or now_s - self._learnt_s < LEAST_DOUBT_S:
            return
        share_left = self._profile.share_left(now_s - self._learnt_s)
        self._profile.fade(now_s - self._learnt_s)
        self._reserve.fade(1 - share_left)
        self._gathering_s *= share_left
        self._learnt_s = now_s

    def _in_run(self) -> tuple[Request, ...]:
        return self._running.batch if self._running else ()

    def _busy_until_s(self, now_s: float) -> float:
        if self._preempted_s is not None:
            return self._preempted_s + self._profile.preemption_s
        return self._running.busy_until_s if self._running else now_s

    @property
    def _has_room_beside(self) -> bool:
        """A refinement is in progress, and a brief first run may begin all the same."""
        is_refining = self._running is not None and self._running.is_refinement
        return is_refining and not self._health.suspect and self._is_brief(1)

    def _is_brief(self, n_images: int) -> bool:
        """Whether the event loop can spare the time for a first run of the shallowest column."""
        return self._profile.latency(self._ladder.shallowest, n_images).median_s <= self._brief_s

    @property
    def _in_preemptible_run(self) -> tuple[Request, ...]:
        """Those in a run that could be told to end, and has not been."""
        can_be = self._preempted_s is None and self._profile.preemption_s < math.inf
        return self._in_run() if can_be else ()

    @property
    def _is_preemptible(self) -> bool:
        """A run is in progress that could be told to end, and in which nobody waits for a first answer."""
        batch = self._in_preemptible_run
        return bool(batch) and all(one.columns_run or one.settled.done() for one in batch)

    @property
    def _is_in_vain(self) -> bool:
        """A run is in progress that could be told to end, and nobody waits for it any more."""
        batch = self._in_preemptible_run
        return bool(batch) and all(one.settled.done() for one in batch)

    def _preempt(self) -> None:
        """Have the run in progress make way; whoever still wants it waits for another."""
        self._preempted_s = self._clock()
        self._processor.preempt()

    def _make_room(self) -> None:
        """An answer for a newcomer is worth more than a better one for somebody else."""
        n_in_run = sum(not request.settled.done() for request in self._in_run())
        if len(self._queue) + n_in_run >= self._max_waiting:
            queued = (same[0] for same in self._queue.answered.values())
            running = (r for r in self._in_run() if r.columns_run and not r.settled.done())
            self._settle(min((*queued, *running), key=ready_by), "answered", "load")

    def refusal(self, why: str, reason: Reason) -> Rejected:
        """A refusal with the time until what waits now is done.

        Args:
            why: One sentence for the caller.
            reason: What took the time.
        """
        now_s = self._clock()
        backlog_s = scheduling.backlog_s(
            now_s, self._busy_until_s(now_s), self._queue, self._profile, self._ladder
        )
        return Rejected(why, backlog_s * self._jitter(), reason)

    def submit(
        self,
        image_HWC: NDArray[np.uint8],
        *,
        arrived_s: float,
        deadline_s: float,
        min_confidence: float | None = None,
        has_waited: bool = False,
        on_rung: Callable[[Served], None] | None = None,
        is_followed: bool = False,
    ) -> Request:
        """Take a request in; its `settled` will hold what became of it, and may do so already.

        Args:
            image_HWC: Of the network's size.
            arrived_s: When the request came.
            deadline_s: When its answer must have been written.
            min_confidence: Enough to stop refining.
            has_waited: As `check_admission`.
            on_rung: Told each answer as it is there, shallow first; must not block.
            is_followed: It is one of several that are submitted in this turn of the event loop.

        Raises:
            Problem: as `check_admission`.

        Cancellation: call `leave`, whatever the reason.
        """
        # Not judged twice if nothing has happened in here since it was judged before its picture was decoded,
        # unless decoding took so long that a run can no longer start in time.
        now_s = self._clock()
        judged = self._judged
        if judged.deadline_s != deadline_s or judged.n_changes != self._n_changes or now_s > judged.until_s:
            self.check_admission(arrived_s, deadline_s, "decode", has_waited=has_waited)
        self._make_room()
        request = Request(
            ready_by_s=deadline_s - self._reserve.of(deadline_s - arrived_s),
            in_hand_by_s=deadline_s - IN_HAND * self._reserve.sure_s,
            min_confidence=min_confidence,
            image_HWC=image_HWC,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            entered_s=now_s,
            waiting_since_s=now_s,
            settled=asyncio.get_running_loop().create_future(),
            on_rung=on_rung,
        )
        self._traffic.arrived(now_s, request.ready_by_s - now_s, has_waited=has_waited)
        self._queue.add(request)
        self._n_changes += 1
        if self._judged.preempts and self._is_preemptible:  # it may have come to be in vain meanwhile
            self._preempt()
        self._begin(now_s, is_followed=is_followed)
        if not request.settled.done():
            self._set_timer(request)
        return request

    def _set_timer(self, request: Request) -> None:
        if request.timer:
            request.timer.cancel()
        request.timer = self._call_at(request.ready_by_s, partial(self._ready_or_never, request))

    def _begin(self, now_s: float, *, is_followed: bool) -> None:
        """Have a newcomer run: at once, where to wait for others to join would cost more than it saves."""
        if self._is_advance_due or (self._running and not self._has_room_beside):
            return
        if self._is_brief(1) and not (is_followed or self._gathers(now_s)):
            self._call_now(partial(self._advance, "brief"))
        else:
            self._advance_soon()

    def _advance_soon(self) -> None:
        """Let whoever was read in the same turn of the event loop join the first run."""
        if not self._is_advance_due:
            self._is_advance_due = True
            self._call_soon(self._advance_when_due)

    def _advance_when_due(self) -> None:
        self._is_advance_due = False
        self._advance()

    def leave(self, request: Request) -> None:
        """The caller has gone: cost nothing more. A run in progress goes on for its neighbours."""
        self._observe_saved(0.0 if request.settled.done() else self._to_come_s(request))
        self._settle(request, "disconnected")

    def _to_come_s(self, request: Request) -> float:
        """Predicted time of the columns to come for this request; one in progress is run all the same."""
        now_s = self._clock()
        ticket: Ticket = request
        if self._running and request in self._running.batch:
            columns_run = (*request.columns_run, self._running.column)
            ticket = Ticket(request.refined_by_s, request.min_confidence, columns_run, request.confidence)
        start_s = max(now_s, self._busy_until_s(now_s))
        return scheduling.to_come_s(ticket, start_s, self._profile, self._ladder)

    async def stop(self, timeout_s: float) -> None:
        """Settle everyone: running answers go out, waiting requests get what they have or `stopped`.

        Args:
            timeout_s: How long to wait for the run in progress. After it, its requests count as waiting.
        """
        self._is_stopping = True
        for timer in filter(None, (self._warming, self._watching)):
            timer.cancel()
        self._advance()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            logger.warning("A run did not end within %.1f s of stopping: its requests are let go.", timeout_s)
        if self._running:
            for request in self._running.batch:
                self._settle_with_what_there_is(request, "stopped", "load")
            if self._preempted_s is not None:  # told to end, it does so at its next node
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), END_LIMIT_S)
        self._idle.set()  # whoever stops this once more need not wait once more

    def _advance(self, begins: Begins = "any") -> None:
        """Settle who is done and start the next run, if there is room for one.

        Args:
            begins: What may begin now; anything else begins when the event loop has done what is due.
        """
        if self._is_stopping:
            for request in tuple(self._queue):
                self._settle_with_what_there_is(request, "stopped")
        self._n_changes += 1
        if self._running and not self._has_room_beside:
            return
        now_s = self._clock()
        if (suspect := self._health.suspect) and not self._is_stopping:
            self._start(suspect, (), now_s)
            return
        if not self._queue:
            return
        # Beside a refinement only first answers can begin; others are done if their turn would come too late.
        start_s = now_s if self._queue.unanswered else max(now_s, self._busy_until_s(now_s))
        try:
            plan = self._policy.plan(
                self._queue, start_s, self._profile, self._ladder, self._traffic.traffic(now_s)
            )
        except Exception:  # a fault in the policy may fail requests but must not leave them hanging
            logger.exception("The policy failed; the waiting requests are let go.")
            for request in tuple(self._queue):
                self._settle_with_what_there_is(request, "failed")
            return
        for request, reason in plan.finished:
            if start_s > now_s:
                self._settle_with_what_there_is(request, "failed")
            else:
                self._settle(request, "answered", reason)
        if plan.column is None:
            return
        # Refinements are for the thread, too: somebody may come and preempt them.
        batch, is_brief = plan.batch, False
        is_first = not batch[0].columns_run
        if is_first and plan.column == self._ladder.shallowest:
            batch, is_brief = self._on_loop_or_not(batch, now_s)
        if begins == "nothing" or (begins == "brief" and not is_brief):
            self._advance_soon()
        elif is_brief or not self._running:
            self._start(plan.column, batch, now_s, is_brief=is_brief)
        elif is_first and self._is_preemptible:
            self._preempt()  # it was to be brief when they were let in

    def _on_loop_or_not(self, batch: tuple[Request, ...], now_s: float) -> tuple[tuple[Request, ...], bool]:
        """Whom a first run of the shallowest column is for, and whether it is a brief one, on the event loop.

        With others waiting, the thread runs them while the loop reads and answers, unless the loop is busy:
        then they would only take turns.
        """
        if self._gathers(now_s):
            return batch[: self._most_brief(len(batch))], True
        return batch, len(batch) == len(self._queue.unanswered) and self._is_brief(len(batch))

    def _gathers(self, now_s: float) -> bool:
        """Whether first runs are brief, and for all who are here already instead of for each who comes."""
        return self._is_brief(1) and self._traffic.traffic(now_s).busy > GATHER_ABOVE

    def _most_brief(self, n_images: int) -> int:
        """How many of so many one brief run can be for; at least 1."""
        if self._is_brief(n_images):
            return n_images
        smaller = [size for size in self._profile.batch_sizes if size < n_images and self._is_brief(size)]
        return max(smaller, default=1)

    def _start(
        self, column: str, batch: tuple[Request, ...], now_s: float, *, is_brief: bool = False
    ) -> None:
        for request in batch:
            self._queue.remove(request)
            request.queue_s += now_s - request.waiting_since_s
        predicted = self._profile.latency(column, len(batch))
        self._n_runs += 1
        run = _Running(self._n_runs, column, batch, predicted.median_s, now_s, now_s + predicted.likely_s)
        images_HWC = [request.image_HWC for request in batch]
        if is_brief:
            waited_s = now_s - batch[0].entered_s
            self._gathering_s += GATHERING_STEP * (waited_s - self._gathering_s)
            self._settle_those_due(run.busy_until_s)
            self._finish(run, self._processor.start(column, images_HWC, is_brief=True))
            return
        self._running = run
        self._idle.clear()
        if self._watching is None:
            self._watching = self._call_at(now_s + self._run_timeout_s, self._watch)
        done = self._processor.start(column, images_HWC) if batch else self._processor.start_blank(column)
        done.add_done_callback(partial(self._finish, run))

    def _settle_those_due(self, until_s: float) -> None:
        """Send what there is to those whose last moment would come while a brief run holds the event loop."""
        waiting = [
            one
            for same in self._queue.answered.values()
            for one in takewhile(lambda one: one.ready_by_s < until_s, same)
        ]
        running = [one for one in self._in_run() if one.ready_by_s < until_s and not one.settled.done()]
        for request in (*waiting, *running):
            self._settle_with_what_there_is(request, "failed")

    def _keep_warm(self) -> None:
        """Run something, if nothing has run for a while; and come back."""
        if self._is_stopping:
            return
        now_s = self._clock()
        next_s = self._rests_since_s + self._keep_warm_s
        if self._running or self._queue:
            next_s = now_s + self._keep_warm_s
        elif now_s >= next_s:
            self._start(self._ladder.shallowest, (), now_s)
            next_s = now_s + self._keep_warm_s
        self._warming = self._call_at(next_s, self._keep_warm)

    def _watch(self) -> None:
        """See whether a run hangs. One timer for many runs: each would cost a caller its share."""
        self._watching = None
        if self._running is None:
            return
        now_s, until_s = self._clock(), self._running.started_s + self._run_timeout_s
        if now_s < until_s:
            self._watching = self._call_at(until_s, self._watch)
            return
        self.give_up(f"a run of column {self._running.column} has not ended for {self._run_timeout_s:g} s")

    def give_up(self, why: str) -> None:
        """Take nobody in any more, and turn away who waits: no run will succeed."""
        if not self._is_stopping:
            self._is_stopping = True
            self._observe_broken(why)
        self._advance()

    def _judge(self, column: str, error: BaseException) -> None:
        """See whether what made a run fail will make all others fail."""
        is_final, may_be_final = isinstance(error, DeviceLost), isinstance(error, DeviceInDoubt)
        if why := self._health.failed(column, error, is_final=is_final, may_be_final=may_be_final):
            self.give_up(why)

    def _finish(self, run: _Running, done: asyncio.Future[NDArray[np.float32]]) -> None:
        """Take in the end of a run, good or bad, and go on."""
        now_s = self._clock()
        elapsed_s = took_s = now_s - run.started_s
        is_brief = run is not self._running
        if not is_brief:
            self._running = None
            self._idle.set()
            ended_s = now_s
            # A brief run may have kept us from noticing the end.
            if self._beside_until_s > self._processor.ended_s:
                ended_s = self._processor.ended_s
            took_s = ended_s - run.started_s
            if self._preempted_s is not None:
                self._profile.observe_preemption(max(0.0, ended_s - self._preempted_s))
                self._preempted_s = None
        else:
            self._beside_until_s = now_s
        self._rests_since_s = now_s
        self._learnt_s = now_s if run.batch else self._learnt_s
        share = 0.0
        if len(run.batch) > 1:
            alone_s = self._profile.latency(run.column, 1).median_s
            share = max(0.0, 1 - alone_s / self._profile.latency(run.column, len(run.batch)).median_s)
        if self._running is None:  # else they wait for that run, not for this one
            for request in self._queue:
                request.lost_s += _overlap_s(request, run, now_s)
        ended = run.until(now_s)
        for request in run.batch:
            request.runs.append(ended)
            request.inference_s += elapsed_s
            request.lost_s += elapsed_s * share
            request.waiting_since_s = now_s
        try:
            # All pairs before the first is used: rows of a result that is too short may be anyone's.
            logits_NK = done.result()
            if run.batch:
                for request, logits_K in list(zip(run.batch, logits_NK, strict=True)):
                    if not request.settled.done():  # its caller may have left
                        self._take_in(request, run, logits_K)
                # When the answers are on their way: nobody waits for what is learnt.
                self._call_soon(partial(self._learn, run, took_s))
            self._health.succeeded(run.column)
        except Preempted:
            self._observe_preempted_run(run.column)
            if took_s > run.predicted_s:  # or nothing would be learnt of a column that never ends in time
                self._learn(run, took_s)
            for request in [one for one in run.batch if not one.settled.done()]:
                request.lost_s += elapsed_s * (1 - share)
                self._queue.add(request)
        except (Exception, asyncio.CancelledError) as error:  # whatever a run raises fails this run alone
            logger.exception(
                "Run %d, of column %s for %d images, failed.", run.id, run.column, len(run.batch)
            )
            self._observe_failed_run(run.column)
            for request in run.batch:
                self._settle_with_what_there_is(request, "failed", "load")
            self._judge(run.column, error)
        finally:
            del done  # an error holds this frame, and it would hold the error
        # Who has just been answered is not to wait for another brief run.
        self._advance("nothing" if is_brief and self._queue.unanswered else "any")
        for request in run.batch:  # who still waits with a first answer in hand leaves sooner than without
            if request.timer and len(request.columns_run) == 1 and not request.settled.done():
                self._set_timer(request)

    def _learn(self, run: _Running, took_s: float) -> None:
        ratio = self._profile.observe(run.column, len(run.batch), took_s)
        self._observe_run(run.column, len(run.batch), took_s, ratio)

    def _take_in(self, request: Request, run: _Running, logits_K: NDArray[np.float32]) -> None:
        columns_run = (*request.columns_run, run.column)
        logits = [*request.logits_K, logits_K]
        probabilities_K = self._processor.combine(columns_run, logits)
        confidence = float(probabilities_K.max())
        if math.isnan(confidence):  # its picture, not the run, is what the column cannot do
            logger.error(
                "Run %d, of column %s, gave no numbers for one of %d images.",
                run.id,
                run.column,
                len(run.batch),
            )
            self._settle_with_what_there_is(request, "failed", reason="load")
            return
        request.logits_K, request.probabilities_K = logits, probabilities_K
        request.confidence, request.columns_run = confidence, columns_run
        request.ready_by_s = request.refined_by_s
        self._queue.add(request)
        if request.on_rung:
            request.on_rung(self._served(request, "answered", self._clock()))

    def _ready_or_never(self, request: Request) -> None:
        """Send what there is, in the last moment for it. A first run in progress goes on: a late answer."""
        if request.columns_run or request in self._queue:
            self._settle_with_what_there_is(request, "expired")

    def _settle_with_what_there_is(
        self, request: Request, otherwise: Outcome, reason: StoppedBy | None = None
    ) -> None:
        """Settle with the answer in hand, if there is one.

        Args:
            request: Waiting or running.
            otherwise: What became of it if it has no answer.
            reason: Why the answer is no deeper one. None: whatever the policy says.
        """
        if not request.columns_run:
            self._settle(request, otherwise)
            return
        now_s = self._clock()
        if request in self._queue and self._running:
            request.lost_s += _overlap_s(request, self._running, now_s)
        reason = reason or scheduling.stopped_by(request, now_s, self._profile, self._ladder)
        self._settle(request, "answered", reason)

    def _settle(self, request: Request, outcome: Outcome, stopped_by: StoppedBy | None = None) -> None:
        """The only place where a request ends. Harmless for one that has ended already."""
        now_s = self._clock()
        if request.timer:
            request.timer.cancel()
        if request in self._queue:
            self._queue.remove(request)
            request.queue_s += now_s - request.waiting_since_s
        elif self._running and request in self._running.batch:
            request.inference_s += now_s - self._running.started_s
            request.runs.append(self._running.until(now_s))
        if not request.settled.done():  # it is if its task was cancelled
            request.settled.set_result(self._served(request, outcome, now_s, stopped_by))
        if self._is_in_vain:
            self._preempt()

    def _served(
        self, request: Request, outcome: Outcome, now_s: float, stopped_by: StoppedBy | None = None
    ) -> Served:
        is_answered = outcome == "answered"
        return Served(
            outcome=outcome,
            arrived_s=request.arrived_s,
            deadline_s=request.deadline_s,
            entered_s=request.entered_s,
            settled_s=now_s,
            queue_s=request.queue_s,
            inference_s=request.inference_s,
            columns_run=request.columns_run if is_answered else (),
            probabilities_K=request.probabilities_K if is_answered else None,
            accuracy=self._ladder.accuracy(request.columns_run) if is_answered else 0.0,
            stopped_by=stopped_by,
            runs=tuple(request.runs),
        )


def _overlap_s(request: Request, run: _Running, now_s: float) -> float:
    """How long a waiting request has stood still because of this run."""
    return now_s - max(run.started_s, request.waiting_since_s)
