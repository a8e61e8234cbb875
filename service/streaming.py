"""An answer that is sent rung by rung as it gets better: server-sent events, or one JSON document a line.

Must not know how answers are scheduled. A slow reader holds up nobody but itself: what it has not yet taken
waits here, at most one record for each column.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from service.engine import Served
from service.errors import OutOfRange
from service.exchange import Exchange
from service.models import Asked, Model, settled
from service.record import Answer

Format = Literal["sse", "ndjson"]
CONTENT_TYPES: Mapping[Format, bytes] = {"sse": b"text/event-stream", "ndjson": b"application/x-ndjson"}


def chosen(asked: str | None, accept: bytes) -> Format | None:
    """The format that a caller wants its stream in; None for a single answer.

    Args:
        asked: The parameter `stream`, which wins.
        accept: The header `Accept`.

    Raises:
        OutOfRange: the parameter names no format.
    """
    match asked:
        case "sse" | "ndjson":
            return asked
        case None:
            for kind, content_type in CONTENT_TYPES.items():
                if content_type in accept.lower():
                    return kind
            return None
        case _:
            raise OutOfRange(
                f"stream must be sse or ndjson, not {asked[:40]!r}: leave it out for one answer."
            )


async def answer(
    exchange: Exchange,
    model: Model,
    image_HWC: NDArray[np.uint8],
    decode_s: float,
    asked: Asked,
    kind: Format,
    clock: Callable[[], float],
) -> Served:
    """Send a record for each rung as it completes, shallow first, and one that says why there are no more.

    The last one says of the last answer when that was there and whether it was in time; not of itself.

    Raises:
        Problem: there is no answer; nothing has been sent.
        CallerGone: nobody reads any more; no further column runs.
    """
    rungs: asyncio.Queue[Served | None] = asyncio.Queue()
    record = exchange.record
    request = model.enter(image_HWC, asked, record, rungs.put_nowait)
    request.settled.add_done_callback(lambda _: rungs.put_nowait(None))

    def leave() -> None:
        model.engine.leave(request)

    try:
        with exchange.called_when_gone(leave):
            verdict: dict[str, Any] = {}
            while rung := await rungs.get():
                if not verdict:
                    await exchange.start(200, _headers(kind))
                document, verdict = model.document(Answer(rung, decode_s), asked)
                await exchange.send_part(_event(kind, b"prediction", document))
                record.ended_s = clock()  # what comes after the last answer is not waited for
            served = await settled(request)
            record.answer = Answer(served, decode_s)
            end = model.progress(record.answer, asked) | verdict
            await exchange.send_part(_event(kind, b"done", orjson.dumps(end)), is_last=True)
            return served
    finally:
        leave()


def _headers(kind: Format) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", CONTENT_TYPES[kind]),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx would collect the rungs and pass them on together
    ]


def _event(kind: Format, name: bytes, document: bytes) -> bytes:
    if kind == "sse":
        return b"event: %b\ndata: %b\n\n" % (name, document)
    return b'{"event":"%b",%b\n' % (name, document[1:])
