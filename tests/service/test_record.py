"""What a record holds: the trace of a request, as W3C writes it, and what became of its pictures."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import Request, Served
from service.metrics import Metrics
from service.record import Answer, Journal, Record, TraceContext, together, trace_context

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def read(*parents: str, states: tuple[str, ...] = ()) -> TraceContext | None:
    headers = [
        ("host", "x"),
        *(("traceparent", one) for one in parents),
        *(("tracestate", one) for one in states),
    ]
    return trace_context([(name.encode(), value.encode()) for name, value in headers])


def answer(settled_s: float, accuracy: float, decode_s: float) -> Answer:
    served = Served(
        outcome="answered",
        arrived_s=0.0,
        deadline_s=1.0,
        entered_s=0.0,
        settled_s=settled_s,
        queue_s=settled_s / 4,
        inference_s=settled_s / 2,
        columns_run=("1",),
        accuracy=accuracy,
        stopped_by="budget",
    )
    return Answer(served, decode_s)


def test_several_pictures_are_one_request_that_ends_with_the_last_of_them() -> None:
    whole = together([answer(0.2, 0.8, 0.01), answer(0.4, 0.6, 0.02), answer(0.1, 1.0, 0.03)])

    assert (whole.served.settled_s, whole.served.queue_s, whole.served.inference_s) == (0.4, 0.1, 0.2)
    assert whole.served.accuracy == pytest.approx(0.8)
    assert whole.decode_s == pytest.approx(0.06)


def test_at_its_end_a_record_keeps_what_became_of_pictures_and_not_the_pictures() -> None:
    metrics = Metrics(
        n_waiting=lambda: 0,
        slowdown=lambda: 1.0,
        reserve_s=lambda: 0.0,
        run_times=lambda: (),
    )
    told: list[Record] = []
    record = Record("1", 0.0)

    async def three() -> None:
        for ending in ("settled", "cancelled", "open"):
            settled: asyncio.Future[Served] = asyncio.get_running_loop().create_future()
            record.requests.append(
                Request(
                    ready_by_s=1.0,
                    min_confidence=None,
                    image_HWC=np.zeros((1, 1, 3), np.uint8),
                    arrived_s=0.0,
                    deadline_s=1.0,
                    entered_s=0.0,
                    waiting_since_s=0.0,
                    settled=settled,
                )
            )
            if ending == "settled":
                settled.set_result(answer(0.2, 0.8, 0.0).served)
            elif ending == "cancelled":
                settled.cancel()

    asyncio.run(three())
    Journal(metrics, [told.append]).close(record, 0.5)
    assert told == [record]
    assert [served.settled_s for served in record.pictures] == [0.2]
    assert record.requests == []
    assert (record.outcome, record.closed_s) == ("disconnected", 0.5)


def test_a_context_is_read_whole() -> None:
    assert read(GOOD, states=("a=1,b=2", "c=3")) == TraceContext(TRACE, SPAN, True, "a=1,b=2,c=3")
    assert read() is None


@pytest.mark.parametrize(
    ("flags", "is_sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("fe", False)]
)
def test_only_one_bit_says_that_a_trace_is_recorded(flags: str, is_sampled: bool) -> None:
    context = read(f"00-{TRACE}-{SPAN}-{flags}")
    assert context is not None
    assert context.is_sampled is is_sampled


@pytest.mark.parametrize(
    "parent",
    [
        "",
        GOOD[:-1],
        GOOD + "0",
        GOOD + "-more",
        GOOD.upper(),
        GOOD.replace("-", "_"),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE}{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01more",
        f"{GOOD}\n",
    ],
)
def test_a_malformed_context_is_none(parent: str) -> None:
    assert read(parent) is None


def test_a_context_that_comes_twice_is_none() -> None:
    assert read(GOOD, GOOD) is None


def test_a_later_version_may_say_more() -> None:
    assert read(f"01-{TRACE}-{SPAN}-01-more") == TraceContext(TRACE, SPAN, True)
    assert read(f"01-{TRACE}-{SPAN}-01") == TraceContext(TRACE, SPAN, True)


def test_a_state_that_is_too_long_is_left_out() -> None:
    assert read(GOOD, states=("a=" + "1" * 510,)) == TraceContext(TRACE, SPAN, True, "a=" + "1" * 510)
    assert read(GOOD, states=("a=" + "1" * 511,)) == TraceContext(TRACE, SPAN, True)


@given(st.binary(max_size=80), st.binary(max_size=20))
def test_whatever_comes_is_read_without_a_fault(parent: bytes, state: bytes) -> None:
    trace_context([(b"traceparent", parent), (b"tracestate", state)])
