"""What a message of protocol buffers consists of is counted before it is built, however it is written."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from service import oip_pb2 as pb
from service import wire
from service.errors import Malformed, TooLarge
from service.wire import MAX_FIELDS

Input = pb.ModelInferRequest.InferInputTensor
Output = pb.ModelInferRequest.InferRequestedOutputTensor
Kind = type[Message]


def n_fields(message: Message) -> int:
    """Everything that was built, as the library itself tells it."""
    n = 0
    for field, value in message.ListFields():
        if field.message_type and field.message_type.GetOptions().map_entry:
            for one in value.values():  # an entry, its name and its value
                n += 3 + (n_fields(one) if isinstance(one, Message) else 0)
        elif field.is_repeated:
            n += len(value) + sum(n_fields(one) for one in value if isinstance(one, Message))
        else:
            n += 1 + (n_fields(value) if isinstance(value, Message) else 0)
    return n


def varint(value: int, at_least: int = 1) -> bytes:
    """A number, which may be written longer than it has to be."""
    groups = [value & 0x7F]
    while (value := value >> 7) or len(groups) < at_least:
        groups.append(value & 0x7F)
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def field(number: int, content: bytes, at_least: int = 1) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2, at_least) + varint(len(content), at_least) + content


texts = st.text(max_size=4)
parameters = st.dictionaries(texts, st.builds(pb.InferParameter, int64_param=st.integers(-5, 5)), max_size=3)
contents = st.builds(
    pb.InferTensorContents,
    bytes_contents=st.lists(st.binary(max_size=3), max_size=3),
    uint_contents=st.lists(st.integers(0, 300), max_size=3),
    fp32_contents=st.lists(st.floats(width=32), max_size=3),
)
inputs = st.builds(
    Input,
    name=texts,
    shape=st.lists(st.integers(-1, 2**62), max_size=3),
    parameters=parameters,
    contents=contents,
)
requests = st.builds(
    pb.ModelInferRequest,
    model_name=texts,
    parameters=parameters,
    inputs=st.lists(inputs, max_size=3),
    outputs=st.lists(st.builds(Output, name=texts, parameters=parameters), max_size=3),
    raw_input_contents=st.lists(st.binary(max_size=200), max_size=3),
)


@given(requests)
def test_what_a_client_s_library_writes_is_taken(request: pb.ModelInferRequest) -> None:
    wire.check(pb.ModelInferRequest, request.SerializeToString(), 1000)


@given(st.binary(max_size=60) | requests.map(lambda request: request.SerializeToString()), st.data())
def test_law_what_cannot_be_counted_is_not_built(body: bytes, data: st.DataObject) -> None:
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(0, 3)) if body else 0):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    one = bytes(damaged)
    many = one * (MAX_FIELDS + 1)
    try:
        built = pb.ModelInferRequest.FromString(one)
    except DecodeError:
        return
    if n_fields(built):  # and so often that there are too many
        with pytest.raises((TooLarge, Malformed)):
            wire.check(pb.ModelInferRequest, many, len(many))


@pytest.mark.parametrize(
    ("kind", "one", "n_each"),
    [
        pytest.param(pb.ModelInferRequest, field(5, b""), 1, id="inputs"),
        pytest.param(pb.ModelInferRequest, field(5, b"", at_least=2), 1, id="a tag of two bytes"),
        pytest.param(pb.ModelInferRequest, field(5, b"", at_least=5), 1, id="a tag of five bytes"),
        pytest.param(pb.ModelInferRequest, field(4, b""), 1, id="parameters"),
        pytest.param(pb.ModelInferRequest, field(4, field(2, b"\x08\1")), 3, id="parameters with values"),
        pytest.param(pb.ModelInferRequest, field(6, field(1, b"label")), 2, id="outputs"),
        pytest.param(pb.ModelInferRequest, field(7, b""), 1, id="contents"),
        pytest.param(pb.ModelInferRequest, field(99, b"x"), 1, id="unknown fields"),
        pytest.param(pb.ModelInferRequest, b"\xa0\x06\1", 1, id="unknown numbers"),
        pytest.param(pb.ModelInferRequest, b"\xa1\x06" + bytes(8), 1, id="unknown numbers of 64 bits"),
        pytest.param(pb.ModelInferRequest, b"\xa5\x06" + bytes(4), 1, id="unknown numbers of 32 bits"),
        pytest.param(pb.RepositoryModelLoadRequest, field(3, b""), 1, id="parameters of a change"),
    ],
)
def test_a_message_may_have_so_many_fields_and_no_more(kind: Kind, one: bytes, n_each: int) -> None:
    most = MAX_FIELDS // n_each
    wire.check(kind, one * most, 0)
    kind.FromString(one * most)
    with pytest.raises(TooLarge, match="more than 1000 fields"):
        wire.check(kind, one * (most + 1), 0)


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(b"\x18\1", id="a shape that is not packed"),
        pytest.param(field(4, b""), id="parameters"),
        pytest.param(field(5, b""), id="contents, again and again"),
    ],
)
def test_fields_within_an_input_count_as_well(inner: bytes) -> None:
    wire.check(pb.ModelInferRequest, field(5, inner * (MAX_FIELDS - 1)), 0)
    for body in (field(5, inner * MAX_FIELDS), field(5, inner) * (MAX_FIELDS // 2 + 1)):
        with pytest.raises(TooLarge, match="more than 1000 fields"):
            wire.check(pb.ModelInferRequest, body, 0)


@pytest.mark.parametrize(
    "fields",
    [{"uint_contents": [1] * 100}, {"int64_contents": [0] * 100}, {"bool_contents": [True] * 100}],
)
def test_numbers_in_lists_are_counted_by_their_bytes(fields: Any) -> None:
    body = pb.ModelInferRequest(inputs=[Input(contents=fields)]).SerializeToString()
    wire.check(pb.ModelInferRequest, body, 100)
    with pytest.raises(TooLarge, match="more than 99 bytes"):
        wire.check(pb.ModelInferRequest, body, 99)


def test_files_and_raw_contents_are_no_numbers() -> None:
    contents = pb.InferTensorContents(bytes_contents=[bytes(5000)])
    request = pb.ModelInferRequest(inputs=[Input(contents=contents)], raw_input_contents=[bytes(5000)])
    wire.check(pb.ModelInferRequest, request.SerializeToString(), 0)


@pytest.mark.parametrize(
    "body",
    [
        b"\x2a",
        b"\x2a\x05",
        b"\x2a\x80",
        b"\x08",
        b"\x08\x80",
        b"\x09\0",
        b"\x0d\0",
        b"\x0b\0\0\0\0",
        b"\x0c\0\0\0\0",
        b"\x80" * 11,
        b"\x2a" + b"\xff" * 9 + b"\1",
        b"\x2a\x02\x22\x05",
        b"\x2a\x01\x22\x00",
    ],
)
def test_a_field_without_an_end_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed, match="no protocol buffer"):
        wire.check(pb.ModelInferRequest, body, 1000)
