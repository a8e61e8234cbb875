"""Every body type and every bound; resizing against an oracle of plain arrays."""

import asyncio
import base64
import contextlib
import io
import json
import random
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from service.decoding import (
    BASE64_LENGTH,
    BLENDED_PIXELS,
    INLINE_BYTES,
    MAX_FIELDS,
    Decoder,
    from_base64,
    loads,
)
from service.errors import Malformed, Problem, TooLarge, UnsupportedType

SIDE = 32
MAX_DECODED_PIXELS = 500_000
PIXELS = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with ThreadPoolExecutor(1) as threads:
        yield Decoder(
            height=SIDE,
            width=SIDE,
            max_pixels=1_000_000,
            max_decoded_pixels=MAX_DECODED_PIXELS,
            max_values=1000,
            threads=threads,
        )


def decode(decoder: Decoder, content_type: str, body: bytes) -> NDArray[np.uint8]:
    return asyncio.run(decoder.decode(content_type, body))


def encoded(picture: Image.Image | NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def form(*parts: tuple[str, str, bytes]) -> bytes:
    body = b"".join(
        f'--xyz\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + content + b"\r\n"
        for name, extra, content in parts
    )
    return body + b"--xyz--\r\n"


FORM = "multipart/form-data; boundary=xyz"
AS_FILE = '; filename="a.png"'


def test_a_picture_of_the_right_size_passes_untouched(decoder: Decoder) -> None:
    as_json = json.dumps({"image": base64.b64encode(encoded(PIXELS)).decode()}).encode()
    for content_type, body in (
        ("image/png", encoded(PIXELS)),
        ("IMAGE/PNG; q=1", encoded(PIXELS)),
        ("image/webp", encoded(PIXELS, "WEBP", lossless=True)),
        ("application/octet-stream", PIXELS.tobytes()),
        ("application/json", as_json),
        (FORM, form(("note", "", b"hello"), ("image", AS_FILE, encoded(PIXELS)))),
        (FORM, form(("image", "", encoded(PIXELS)))),
    ):
        image_HWC = decode(decoder, content_type, body)
        assert image_HWC.dtype == np.uint8
        np.testing.assert_array_equal(image_HWC, PIXELS)


def test_jpeg_is_close(decoder: Decoder) -> None:
    flat = np.full((SIDE, SIDE, 3), (10, 120, 230), np.uint8)
    image_HWC = decode(decoder, "image/jpeg", encoded(flat, "JPEG", quality=95))
    assert np.abs(image_HWC.astype(int) - flat).max() <= 4


def test_shrinking_is_the_mean_of_the_centred_square(decoder: Decoder) -> None:
    wide = np.random.default_rng(4).integers(0, 256, (4 * SIDE, 6 * SIDE, 3), np.uint8)
    square = wide[:, SIDE : 5 * SIDE].astype(float)
    means = square.reshape(SIDE, 4, SIDE, 4, 3).mean(axis=(1, 3))
    image_HWC = decode(decoder, "image/png", encoded(wide))
    assert np.abs(image_HWC - means).max() <= 1


def test_a_large_jpeg_shrinks_to_the_same_means(decoder: Decoder) -> None:
    smooth = np.linspace(0, 255, 32 * SIDE)[:, None] * np.ones((1, 24 * SIDE))
    tall = np.stack([smooth, smooth[::-1], smooth / 2], axis=-1).astype(np.uint8)
    square = tall[4 * SIDE : 28 * SIDE].astype(float)
    means = square.reshape(SIDE, 24, SIDE, 24, 3).mean(axis=(1, 3))
    body = encoded(tall, "JPEG", quality=95)
    assert np.abs(decode(decoder, "image/jpeg", body) - means).max() <= 3


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("MPO", {"save_all": True}), ("JPEG", {"progressive": True})]
)
def test_a_photograph_may_be_larger_than_what_is_decoded(
    decoder: Decoder, kind: str, options: dict[str, Any]
) -> None:
    """A JPEG, or the file of several that phones write, is scaled down while it is decoded."""
    assert MAX_DECODED_PIXELS < 1000 * 1000
    flat = Image.new("RGB", (1000, 1000), (10, 120, 230))
    if kind == "MPO":
        options = options | {"append_images": [flat]}
    image_HWC = decode(decoder, "image/jpeg", encoded(flat, kind, **options))
    assert np.abs(image_HWC.astype(int) - (10, 120, 230)).max() <= 4


@pytest.mark.parametrize(("kind", "side"), [("PNG", (708, 707)), ("WEBP", (708, 707)), ("JPEG", (250, 2004))])
def test_what_would_be_decoded_to_too_many_pixels_is_refused(
    decoder: Decoder, kind: str, side: tuple[int, int]
) -> None:
    """A JPEG so narrow that no part of its size is enough; and in each kind the largest that is taken."""
    width, height = side
    assert width * height > MAX_DECODED_PIXELS
    with pytest.raises(TooLarge, match=f"decoded to {width} x {height}; at most 500000"):
        decode(decoder, "image/png", encoded(Image.new("RGB", side), kind))
    largest = Image.new("RGB", (width, MAX_DECODED_PIXELS // width))
    assert decode(decoder, "image/png", encoded(largest, kind)).shape == (SIDE, SIDE, 3)


def test_a_large_form_never_touches_the_disk(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was made")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", no_file)
    monkeypatch.setattr(tempfile, "mkstemp", no_file)
    picture = PNG + bytes(2 << 20)  # what follows a PNG's end is ignored
    np.testing.assert_array_equal(decode(decoder, FORM, form(("image", AS_FILE, picture))), PIXELS)


def test_enlarging_keeps_the_colours(decoder: Decoder) -> None:
    tiny = np.full((5, 9, 3), (200, 30, 60), np.uint8)
    assert (decode(decoder, "image/png", encoded(tiny)) == (200, 30, 60)).all()


def test_the_orientation_of_a_photograph_is_applied(decoder: Decoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    body = encoded(PIXELS, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(decoder, "image/png", body), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(24, 16), (48, 96), (96, 48), (60, 30), (5, 9)])
def test_a_picture_that_is_turned_is_what_it_would_be_if_it_were_saved_so(
    orientation: int, size: tuple[int, int]
) -> None:
    """For a network that is no square, too."""
    noise = np.random.default_rng(6).integers(0, 256, (*size, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded(noise, "PNG", exif=exif)
    saved = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    with ThreadPoolExecutor(1) as threads:
        bounds = {"max_pixels": 10_000, "max_decoded_pixels": 10_000, "max_values": 100}
        decoder = Decoder(height=16, width=24, threads=threads, **bounds)
        image_HWC = decode(decoder, "image/png", turned)
        expected_HWC = decode(decoder, "image/png", encoded(np.asarray(saved)))
    assert image_HWC.shape == (16, 24, 3)
    np.testing.assert_array_equal(image_HWC, expected_HWC)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_shrinking_is_the_mean_of_what_is_laid_on_white(decoder: Decoder, mode: str) -> None:
    assert BLENDED_PIXELS < (16 * SIDE) ** 2
    noise = np.random.default_rng(7).integers(0, 256, (16 * SIDE, 16 * SIDE, 4), np.uint8)
    picture = Image.fromarray(noise)
    options: dict[str, Any] = {}
    if mode == "P":
        picture = picture.convert("RGB").quantize(16)
        options = {"transparency": bytes(range(0, 256, 16))}
    elif mode == "LA":
        picture = picture.convert("LA")
    body = encoded(picture, "PNG", **options)
    rgba = np.asarray(Image.open(io.BytesIO(body)).convert("RGBA")).astype(float)
    on_white = 255 + (rgba[..., :3] - 255) * rgba[..., 3:] / 255
    means = on_white.reshape(SIDE, 16, SIDE, 16, 3).mean(axis=(1, 3))
    assert np.abs(decode(decoder, "image/png", body) - means).max() <= 1.5


def test_shrinking_of_16_bit_grey_is_the_mean_of_the_upper_bytes(decoder: Decoder) -> None:
    noise = np.random.default_rng(8).integers(0, 2**16, (16 * SIDE, 16 * SIDE), np.uint16)
    means = (noise >> 8).reshape(SIDE, 16, SIDE, 16).mean(axis=(1, 3))
    image_HWC = decode(decoder, "image/png", encoded(noise))
    assert np.abs(image_HWC - means[..., None]).max() <= 1.5


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        pytest.param(Image.new("L", (40, 40), 77), (77, 77, 77), id="grey"),
        pytest.param(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), (255, 255, 255), id="transparent"),
        pytest.param(Image.new("RGBA", (40, 40), (200, 0, 0, 255)), (200, 0, 0), id="opaque"),
        pytest.param(Image.new("LA", (40, 40), (9, 0)), (255, 255, 255), id="transparent grey"),
        pytest.param(Image.new("1", (40, 40), 1), (255, 255, 255), id="black and white"),
        pytest.param(Image.new("P", (40, 40), 0), (0, 0, 0), id="palette"),
        pytest.param(
            Image.fromarray(np.full((40, 40), 0x8123, np.uint16)), (0x81, 0x81, 0x81), id="16-bit grey"
        ),
    ],
)
def test_every_mode_becomes_rgb(decoder: Decoder, picture: Image.Image, colour: tuple[int, ...]) -> None:
    assert (decode(decoder, "image/png", encoded(picture)) == colour).all()


def test_cmyk_becomes_rgb(decoder: Decoder) -> None:
    body = encoded(Image.new("CMYK", (40, 40), (0, 0, 0, 0)), "JPEG")
    assert (decode(decoder, "image/jpeg", body) == 255).all()


def test_large_pictures_are_decoded_off_the_loop(decoder: Decoder) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (200, 200, 3), np.uint8)
    assert len(encoded(noise)) > INLINE_BYTES
    assert decode(decoder, "image/png", encoded(noise)).shape == (SIDE, SIDE, 3)


PNG = encoded(PIXELS)


@pytest.mark.parametrize(
    "written",
    [
        '{"image":"%s"}',
        ' { "image" : "%s" }\n',
        '{"image":\n\n\n\n\n\n\n\n\n\n"%s"}',
        '{"\\u0069mage":"%s"}',
        '{"image":"%s"' + " " * 100 + "}",
    ],
)
@pytest.mark.parametrize("slash", ["/", "\\/", "\\u002f"])
def test_a_picture_in_json_may_be_large_and_written_in_any_way(
    decoder: Decoder, written: str, slash: str
) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (400, 400, 3), np.uint8)
    text = base64.b64encode(encoded(noise)).decode()
    assert len(text) > 2 * BASE64_LENGTH
    assert "/" in text
    body = (written % text.replace("/", slash)).encode()
    np.testing.assert_array_equal(
        decode(decoder, "application/json", body), decode(decoder, "image/png", encoded(noise))
    )


@given(st.integers(-9, 9), st.integers(0, 12), st.sampled_from("=A!\n"))
@example(3, 1, "=")
def test_base64_in_parts_is_base64(n: int, back: int, put: str) -> None:
    whole = base64.b64encode(bytes(BASE64_LENGTH // 4 * 3 + n)).decode()
    at = min(BASE64_LENGTH, len(whole) - 1) - back
    for text in (whole, whole[:at] + put + whole[at + 1 :], whole[:-1]):
        try:
            expected = base64.b64decode(text, validate=True)
        except ValueError:
            with pytest.raises(ValueError, match=r"."):
                from_base64(text)
        else:
            assert from_base64(text) == expected


# ---- what is made of a body is counted before it is made ----


values = st.recursive(
    st.none() | st.integers(0, 9) | st.sampled_from(["", "a"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
)


def n_objects(document: object) -> int:
    """Everything that Python has to make of it: names as well, once each time."""
    if isinstance(document, list):
        return 1 + sum(map(n_objects, document))
    if isinstance(document, dict):
        return 1 + sum(1 + n_objects(value) for value in document.values())
    return 1


@given(values)
def test_law_no_more_objects_are_made_of_json_than_are_counted(document: object) -> None:
    body = orjson.dumps(document)
    allowed = next(n for n in range(1000) if _is_taken(body, n))
    assert n_objects(document) <= allowed + 1
    assert loads(body, allowed) == document


def _is_taken(body: bytes, most: int) -> bool:
    with contextlib.suppress(TooLarge):
        loads(body, most)
        return True
    return False


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"image":[' + b"[]," * 2_000_000 + b"[]]}", id="lists"),
        pytest.param(b'{"image":[' + b"{}," * 2_000_000 + b"{}]}", id="objects"),
        pytest.param(b"{" + b",".join(b'"%d":1' % i for i in range(200_000)) + b"}", id="names"),
        pytest.param(b'{"image":[' + b"1," * 2_000_000 + b"1]}", id="numbers"),
        pytest.param(b'{"image":[' + b'"",' * 2_000_000 + b'""]}', id="texts"),
    ],
)
def test_json_that_is_all_structure_is_refused_before_it_is_parsed(decoder: Decoder, body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="more than 1000 values"):
            decode(decoder, "application/json", body)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 1e6


@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "after them"])
def test_what_is_in_a_picture_beside_its_pixels_is_not_unpacked(decoder: Decoder, place: int) -> None:
    content = b"x\0\0" + zlib.compress(bytes(1 << 20), 9)
    text = len(content).to_bytes(4) + b"zTXt" + content + zlib.crc32(b"zTXt" + content).to_bytes(4)
    body = PNG[:place] + text * 20 + PNG[place:]
    assert len(body) < INLINE_BYTES
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(decode(decoder, "image/png", body), PIXELS)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 500_000


def test_a_form_of_a_myriad_of_fields_is_not_read_to_its_end(decoder: Decoder) -> None:
    fields = [("note", "", b"")] * (MAX_FIELDS - 1)
    picture = ("image", AS_FILE, PNG)
    assert decode(decoder, FORM, form(*fields, picture)).shape == (SIDE, SIDE, 3)
    for extra in ("", AS_FILE):
        with pytest.raises(TooLarge, match="more than 100 fields"):
            decode(decoder, FORM, form(*fields, ("note", extra, b""), picture))


@pytest.mark.parametrize(
    ("content_type", "body", "problem", "says"),
    [
        ("", PNG, UnsupportedType, "missing"),
        ("text/plain", PNG, UnsupportedType, "text/plain"),
        ("image/gif", encoded(PIXELS, "GIF"), UnsupportedType, "image/gif"),
        ("image/png", encoded(PIXELS, "GIF"), UnsupportedType, "convert"),
        ("image/png", encoded(PIXELS, "BMP"), UnsupportedType, "convert"),
        ("image/png", b"", Malformed, "empty"),
        ("image/png", PNG[: len(PNG) // 2], Malformed, "whole"),
        ("image/png", PNG[:20], Malformed, "whole"),
        ("image/jpeg", encoded(PIXELS, "JPEG")[:-200], Malformed, "whole"),
        ("image/webp", encoded(PIXELS, "WEBP")[:-200], Malformed, "whole"),
        ("image/png", encoded(np.zeros((1001, 1000, 3), np.uint8)), TooLarge, "1000 x 1001; at most 1000000"),
        (
            "image/jpeg",
            encoded(np.zeros((1001, 1000, 3), np.uint8), "JPEG"),
            TooLarge,
            "1000 x 1001; at most",
        ),
        ("application/octet-stream", PIXELS.tobytes()[1:], Malformed, "3072 bytes"),
        ("application/octet-stream", PIXELS.tobytes() + b"x", Malformed, "3072 bytes"),
        ("application/json", b"{", Malformed, "no JSON"),
        ("application/json", b"[]", Malformed, "one field"),
        ("application/json", b'{"image": 3}', Malformed, "one field"),
        ("application/json", b'{"image": "", "x": 1}', Malformed, "one field"),
        ("application/json", b'{"image": "abcd!?"}', Malformed, "no base64"),
        ("application/json", b'{"image": "\xc3\xa9"}', Malformed, "no base64"),
        ("application/json", b'{"image": ""}', Malformed, "empty"),
        ("application/json", b'{"image": "}', Malformed, "no JSON"),
        ("application/json", b'{"image": "abcd"', Malformed, "no JSON"),
        ("application/json", b'{"image": "abcd"}}', Malformed, "no JSON"),
        ("application/json", b'{"image": "ab", "image": "abcd"}', UnsupportedType, "convert"),
        ("multipart/form-data", form(("image", AS_FILE, PNG)), Malformed, "boundary"),
        (FORM, b"nothing", Malformed, "form"),
        (FORM, form(("picture", AS_FILE, PNG)), Malformed, "0 fields"),
        (FORM, form(("image", AS_FILE, PNG), ("image", AS_FILE, PNG)), Malformed, "2 fields"),
        (FORM, form(("image", AS_FILE, PNG))[:-200], Malformed, "0 fields"),
    ],
)
def test_refusals_say_what_to_do(
    decoder: Decoder, content_type: str, body: bytes, problem: type[Problem], says: str
) -> None:
    with pytest.raises(problem, match=says):
        decode(decoder, content_type, body)


@pytest.mark.parametrize("side", [1_001, 10_000, 60_000])
def test_a_bomb_is_refused_by_its_header(decoder: Decoder, side: int) -> None:
    """A few hundred bytes that claim millions of pixels: nothing of it may be decoded."""
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = side.to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(TooLarge, match="scale it down"):
        decode(decoder, "image/png", bytes(bomb))


@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_law_no_bytes_lead_to_anything_but_an_image_or_a_problem(noise: bytes, seed: int) -> None:
    with ThreadPoolExecutor(1) as threads:
        decoder = Decoder(
            height=SIDE,
            width=SIDE,
            max_pixels=1_000_000,
            max_decoded_pixels=MAX_DECODED_PIXELS,
            max_values=1000,
            threads=threads,
        )
        damaged = bytearray(PNG)
        rng = random.Random(seed)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        for content_type, body in (
            ("image/png", noise),
            ("image/png", PNG[:33] + noise),
            ("image/jpeg", bytes(damaged)),
            (FORM, b"--xyz\r\n" + noise),
            ("application/json", noise),
        ):
            with contextlib.suppress(Problem):
                assert decode(decoder, content_type, body).shape == (SIDE, SIDE, 3)
