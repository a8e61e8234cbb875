"""Encoded bodies: undone within bounds, or refused with a sentence."""

import contextlib
import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.compression import CHUNK_BYTES, undo
from service.errors import Malformed, TooLarge, UnsupportedEncoding

LIMIT = 1 << 20


@given(st.binary(max_size=300), st.integers(0, 3 * CHUNK_BYTES), st.sampled_from([0, 1, 9]))
def test_what_was_encoded_comes_out(some: bytes, n: int, level: int) -> None:
    body = (some * (n // len(some) + 1))[:n] if some else b""
    assert undo("gzip", gzip.compress(body, level), LIMIT) == body
    assert undo(" X-GZIP", gzip.compress(body, level), LIMIT) == body
    assert undo("deflate", zlib.compress(body, level), LIMIT) == body


def test_a_body_that_is_not_encoded_is_left_alone() -> None:
    assert undo("identity", b"as it is", LIMIT) == b"as it is"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_the_limit_is_exact(encoding: str) -> None:
    encode = gzip.compress if encoding == "gzip" else zlib.compress
    assert len(undo(encoding, encode(bytes(LIMIT)), LIMIT)) == LIMIT
    with pytest.raises(TooLarge, match="send a smaller picture"):
        undo(encoding, encode(bytes(LIMIT + 1)), LIMIT)


def test_a_bomb_never_takes_more_than_the_limit_and_a_chunk() -> None:
    bomb = gzip.compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            undo("gzip", bomb, LIMIT)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1.5 * LIMIT  # io.BytesIO allocates somewhat in advance


@given(st.data())
def test_damage_is_malformed(data: st.DataObject) -> None:
    content = bytes(range(256)) * 8
    whole = gzip.compress(content)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(Malformed):
        undo("gzip", whole[:cut], LIMIT)
    place = data.draw(st.integers(10, len(whole) - 1))  # before it: a name and a time, which may be anything
    flipped = bytearray(whole)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(Malformed):  # a bit that only fills the last byte up means nothing
        assert undo("gzip", bytes(flipped), LIMIT) == content


@pytest.mark.parametrize("n", [10, CHUNK_BYTES, 5 * CHUNK_BYTES])
def test_nothing_may_follow(n: int) -> None:
    stream = zlib.compress(bytes(n), 0)
    for more in (b"\0", stream, bytes(2 * CHUNK_BYTES)):
        with pytest.raises(Malformed, match="follows the deflate"):
            undo("deflate", stream + more, LIMIT)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 1000])
def test_another_encoding_is_refused_and_told_what_is_taken(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding) as refused:
        undo(encoding, b"", LIMIT)
    assert refused.value.headers == {"accept-encoding": "gzip, deflate"}
    assert len(refused.value.detail) < 200
