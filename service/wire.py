"""Counts what a message of protocol buffers consists of, before any of it is built.

Must not know what a message means. Building takes half a microsecond for a field, which may have two bytes,
and holds the interpreter meanwhile: 16 MB of them would keep everybody waiting for seconds.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from functools import cache
from typing import Any, Literal

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from service.errors import Malformed, TooLarge

MAX_FIELDS = 1000
"""Of a message and those within it: 32 files, 5 outputs and 100 parameters are some 500."""

TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
LONGEST_VARINT = 10


def check(kind: type[Message], body: bytes, max_values: int) -> None:
    """Refuse a message that would take long to build.

    Args:
        kind: What it should be.
        body: As it came.
        max_values: Bytes of its lists of numbers, each of which has one at least.

    Raises:
        TooLarge: it has more of them, or more fields than `MAX_FIELDS`.
        Malformed: where a field ends cannot be told.

    Cost: 4 us for a message that asks for one picture, at most 0.4 ms.
    """
    descriptor: Any = kind.DESCRIPTOR  # the stub has two classes for it
    try:
        n_values = _count(descriptor, body)
    except IndexError as error:  # it ends within a field
        raise _malformed() from error
    if n_values > max_values:
        raise TooLarge(
            f"The message has lists of numbers of more than {max_values} bytes: send tensors in "
            "`raw_input_contents`."
        )


def _count(kind: Descriptor, body: bytes) -> int:
    """Walk through all fields and count the bytes of lists of numbers; calls would cost more than the walk.

    Raises:
        TooLarge: there are more fields than `MAX_FIELDS`.
        Malformed: where one ends cannot be told.
        IndexError: one does not end.
    """
    n_fields, n_values = 0, 0
    waiting = [(kind, 0, len(body))]
    while waiting:
        message, at, end = waiting.pop()
        inside = _with_content(message)
        while at < end:
            n_fields += 1
            if n_fields > MAX_FIELDS:
                raise TooLarge(
                    f"The message has more than {MAX_FIELDS} fields: send fewer parameters and outputs, "
                    "and tensors in `raw_input_contents`."
                )
            tag, at = (body[at], at + 1) if body[at] < 0x80 else _varint(body, at)
            start = 0
            match tag & 7:
                case 2:
                    length, start = (body[at], at + 1) if body[at] < 0x80 else _varint(body, at)
                    at = start + length
                case 0:
                    _, at = _varint(body, at)
                case 1:
                    at += 8
                case 5:
                    at += 4
                case _:  # groups, which no message here has
                    raise _malformed()
            if at > end:
                raise _malformed()
            what = inside.get(tag >> 3) if start else None
            if what is True:
                n_values += at - start
            elif what:
                waiting.append((what, start, at))
    return n_values


@cache
def _with_content(message: Descriptor) -> dict[int, Descriptor | Literal[True]]:
    """The fields by number that may consist of more: of messages of this kind, or of numbers."""
    return {one.number: one.message_type or True for one in message.fields if one.type not in TEXTS}


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """A number, and where the next thing begins.

    Raises:
        Malformed: it is longer than any.
        IndexError: it does not end.
    """
    value = 0
    for i in range(LONGEST_VARINT):
        value |= (body[at + i] & 0x7F) << 7 * i
        if body[at + i] < 0x80:
            return value, at + i + 1
    raise _malformed()


def _malformed() -> Malformed:
    return Malformed("The message is no protocol buffer: send what grpc_predict_v2.proto describes.")
