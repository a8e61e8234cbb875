"""Hostile bytes: whatever comes, the decoder gives an image or a problem, within its bounds."""

import asyncio
import base64
import io
import json
import logging
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.containers import MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS
from service.decoding import Decoder
from service.errors import Problem, TooLarge

ROOT = Path(__file__).resolve().parents[2]
SIDE = 32
MAX_PIXELS = 100_000
BOUNDARY = b"xyz"
FORM = "multipart/form-data; boundary=xyz"

bounded = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
"""Some seconds for each law, and the same examples every time."""


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def seeds() -> list[bytes]:
    """Valid files of every kind that is taken, with everything in them that has code of its own in Pillow."""
    noise = np.random.default_rng(2).integers(0, 256, (37, 41, 4), np.uint8)
    rgba = Image.fromarray(noise)
    rgb = rgba.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a picture"
    return [
        encoded(rgb, "PNG", exif=exif, dpi=(72, 72), icc_profile=b"not a profile"),
        encoded(rgba, "PNG"),
        encoded(rgb.quantize(7), "PNG", transparency=3),
        encoded(Image.fromarray(noise[..., 0].astype(np.uint16) << 7), "PNG"),
        encoded(rgb.convert("1"), "PNG", bits=1),
        encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        encoded(rgb, "JPEG", exif=exif, icc_profile=bytes(200), comment=b"hello"),
        encoded(rgb, "JPEG", progressive=True, restart_marker_rows=1),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(rgb.convert("L"), "JPEG", quality=1),
        encoded(rgb, "MPO", save_all=True, append_images=[rgb], exif=exif),
        encoded(rgba, "WEBP", lossless=True, exif=exif),
        encoded(rgb, "WEBP", quality=30),
        encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
    ]


SEEDS = seeds()
EXTREMES = [
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\xff\xda",
    b"\xff\xd8",
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file after some accidents: flipped bits, lies, parts lost, doubled or new."""
    body = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, min(80, len(body))), st.integers(0, len(body))))
        match draw(st.sampled_from(["flip", "lie", "cut", "lose", "double", "insert"])):
            case "flip" if at < len(body):
                body[at] ^= 1 << draw(st.integers(0, 7))
            case "lie":
                lie = draw(st.sampled_from(EXTREMES))
                body[at : at + len(lie)] = lie
            case "cut":
                del body[at:]
            case "lose":
                del body[at : at + draw(st.integers(1, 64))]
            case "double":
                body[at:at] = body[at : at + draw(st.integers(1, 64))]
            case _:
                body[at:at] = draw(st.binary(max_size=16))
    return bytes(body)


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def chunks(body: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(body):
        length = int.from_bytes(body[at : at + 4])
        found.append((body[at + 4 : at + 8], body[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


KINDS = [
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"tRNS",
    b"iCCP",
    b"pHYs",
    b"gAMA",
    b"sRGB",
    b"cHRM",
    b"tEXt",
    b"zTXt",
    b"iTXt",
]
KINDS += [b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IEND", b"teSt"]


@st.composite
def lying_png(draw: st.DrawFn) -> bytes:
    """A PNG whose checksums hold, so that what is wrong in its chunks is believed."""
    parts = chunks(draw(st.sampled_from(SEEDS[:6])))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(parts) - 1))
        kind, content = parts[at]
        match draw(st.sampled_from(["alter", "rename", "lose", "double", "insert", "lie"])):
            case "alter" if content:
                place = draw(st.integers(0, len(content) - 1))
                value = draw(st.sampled_from(EXTREMES) | st.binary(max_size=6))
                parts[at] = kind, content[:place] + value + content[place + len(value) :]
            case "rename":
                parts[at] = draw(st.sampled_from(KINDS)), content
            case "lose" if len(parts) > 1:
                del parts[at]
            case "double":
                parts.insert(at, parts[at])
            case "lie":
                n = draw(st.integers(0, 2**32 - 1))
                parts[at] = kind, n.to_bytes(4) + content[4:]
            case _:
                inside = st.binary(max_size=40) | st.binary(max_size=40).map(
                    lambda raw: b"x\0\0" + zlib.compress(raw)
                )
                parts.insert(at + 1, (draw(st.sampled_from(KINDS)), draw(inside)))
    return SEEDS[0][:8] + b"".join(chunk(*part) for part in parts)


class Decoding:
    """A decoder in an event loop of its own, which is kept: to make one takes longer than to decode."""

    def __init__(self, runner: asyncio.Runner, threads: ThreadPoolExecutor) -> None:
        self._runner = runner
        self._decoder = Decoder(
            height=SIDE,
            width=SIDE,
            max_pixels=MAX_PIXELS,
            max_decoded_pixels=MAX_PIXELS,
            max_values=1000,
            threads=threads,
        )

    def image(self, body: bytes) -> NDArray[np.uint8]:
        return self._runner.run(self._decoder.decode("image/png", body))

    def must_hold(self, content_type: str, body: bytes) -> None:
        """Where Pillow's warnings are errors, as in tests, and where they are not, as when serving."""
        actions: tuple[Literal["error", "ignore"], ...] = ("error", "ignore")
        for action in actions:
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                try:
                    image_HWC = self._runner.run(self._decoder.decode(content_type, body))
                except Problem as problem:
                    assert len(problem.detail) < 1000  # noqa: PT017 - either outcome is right
                    continue
            assert image_HWC.shape == (SIDE, SIDE, 3)
            assert image_HWC.dtype == np.uint8


@pytest.fixture(scope="module")
def decoding() -> Iterator[Decoding]:
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as threads:
        yield Decoding(runner, threads)


@bounded
@given(
    body=st.binary(max_size=400), content_type=st.sampled_from(["image/png", "application/json", FORM, ""])
)
def test_law_noise_is_an_image_or_a_problem(decoding: Decoding, body: bytes, content_type: str) -> None:
    decoding.must_hold(content_type, body)


@bounded
@given(body=damaged())
def test_law_a_damaged_picture_is_an_image_or_a_problem(decoding: Decoding, body: bytes) -> None:
    decoding.must_hold("image/png", body)


@bounded
@given(body=lying_png())
def test_law_a_png_that_lies_is_an_image_or_a_problem(decoding: Decoding, body: bytes) -> None:
    decoding.must_hold("image/png", body)


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Forms with good and bad heads, names, contents and ends."""
    name = st.sampled_from([b"image", b"", b"imag\xc3\xa9", b"a" * 300]) | st.binary(max_size=8)
    extra = st.sampled_from(
        [b"", b'; filename="a.png"', b"; filename=", b"; filename*=UTF-8''a", b'; name="image"']
    )
    header = st.sampled_from(
        [b"", b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: x\r\n", b":\r\n"]
    )
    content = st.sampled_from([SEEDS[0], b"", b"--xyz"]) | st.binary(max_size=40)
    body = b""
    for _ in range(draw(st.integers(0, 3))):
        head = b'Content-Disposition: form-data; name="' + draw(name) + b'"' + draw(extra) + b"\r\n"
        body += b"--" + BOUNDARY + b"\r\n" + head + draw(header) + b"\r\n" + draw(content) + b"\r\n"
    body += draw(st.sampled_from([b"--xyz--\r\n", b"--xyz", b"", b"--xyz--" + bytes(20)]))
    at = draw(st.integers(0, len(body)))
    return body[:at] + draw(st.binary(max_size=3)) + body[at:]


CONTENT_TYPES = [
    FORM,
    "multipart/form-data; boundary=",
    "multipart/form-data; boundary=\xff",
    FORM + "; boundary=a",
]


@bounded
@given(body=forms(), content_type=st.sampled_from(CONTENT_TYPES))
def test_law_a_strange_form_is_an_image_or_a_problem(
    decoding: Decoding, body: bytes, content_type: str
) -> None:
    decoding.must_hold(content_type, body)


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "x"]), inner, max_size=2)
    ),
)


@bounded
@given(
    document=documents
    | st.fixed_dictionaries({"image": st.binary(max_size=80).map(base64.b64encode).map(bytes.decode)})
)
def test_law_a_strange_document_is_an_image_or_a_problem(decoding: Decoding, document: object) -> None:
    decoding.must_hold("application/json", json.dumps(document).encode())


def test_deep_nesting_is_a_problem(decoding: Decoding) -> None:
    decoding.must_hold("application/json", b"[" * 1_000_000)
    decoding.must_hold("application/json", b'{"image":' * 100_000)


def test_every_seed_is_a_picture(decoding: Decoding) -> None:
    """Or the laws above would hold of nothing."""
    for body in SEEDS:
        assert decoding.image(body).shape == (SIDE, SIDE, 3)


# ---- bombs ----


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(SEEDS[0][:33] + chunk(b"teSt", b"") * (MAX_CHUNKS + 1) + SEEDS[0][33:], id="chunks"),
        pytest.param(SEEDS[6][:2] + b"\xff\xe5\0\2" * (MAX_SEGMENTS + 1) + SEEDS[6][2:], id="segments"),
        pytest.param(SEEDS[6][:2] + b"\xff" * (MAX_SEGMENTS + 1) + SEEDS[6][2:], id="padding"),
        pytest.param(SEEDS[6][:2] + b"\xff\0" * (MAX_SEGMENTS + 1) + SEEDS[6][2:], id="junk"),
        pytest.param(SEEDS[7][:-2] + b"\xff\xda\0\10\1\1\0\1\5\1" * MAX_SCANS + SEEDS[7][-2:], id="scans"),
    ],
)
def test_a_file_of_a_myriad_of_parts_is_refused_before_it_is_read(decoding: Decoding, body: bytes) -> None:
    with pytest.raises(TooLarge, match="too many parts"):
        decoding.image(body)


BOMBS = """
import asyncio, io, pathlib, resource, sys
from concurrent.futures import ThreadPoolExecutor
from numpy.typing import NDArray
from PIL import Image
from service.decoding import Decoder
from service.errors import TooLarge

forget = pathlib.Path("/proc/self/clear_refs")

def most_bytes():
    # On Linux ru_maxrss begins with the most that the parent has had, and that may be more than a bomb takes.
    if not forget.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def grown_bytes(kind, body, max_pixels):
    if forget.exists():
        forget.write_text("5")
    before = most_bytes()
    with ThreadPoolExecutor(1) as threads:
        bounds = {"max_pixels": max_pixels, "max_decoded_pixels": max_pixels, "max_values": 1000}
        decoder = Decoder(height=32, width=32, **bounds, threads=threads)
        try:
            asyncio.run(decoder.decode("image/png", body))
        except TooLarge:
            assert max_pixels == 1_000_000, kind
        else:
            assert max_pixels > 1_000_000, kind
    return most_bytes() - before

for kind, body in zip(sys.argv[1:], sys.stdin.buffer.read().split(b"|BOMB|"), strict=True):
    print(kind, grown_bytes(kind, body, 1_000_000), flush=True)
print("control", grown_bytes("control", body, 400_000_000))
"""


def test_a_bomb_takes_no_memory() -> None:
    """Small files of 64 million pixels each; the PNG is also decoded, to show what it would take."""
    side = 8000
    png = SEEDS[0][:8] + chunk(b"IHDR", side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0]))
    png += chunk(b"IDAT", zlib.compress(bytes((3 * side + 1) * side), 1)) + chunk(b"IEND", b"")
    flat = Image.new("L", (side, side))
    bombs = {"JPEG": encoded(flat, "JPEG", progressive=True), "PNG": png}
    run = subprocess.run(
        [sys.executable, "-c", BOMBS, *bombs],
        input=b"|BOMB|".join(bombs.values()),
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=50,
    )
    assert run.returncode == 0, run.stderr.decode()
    grown = {line.split()[0]: int(line.split()[1]) for line in run.stdout.decode().splitlines()}
    assert grown["control"] > 150e6
    assert max(grown["JPEG"], grown["PNG"]) < 20e6, grown


@pytest.mark.parametrize(
    "kind", ["zTXt", "iTXt", "iCCP"], ids=["text", "international text", "colour profile"]
)
def test_text_that_unpacks_to_much_is_a_problem(decoding: Decoding, kind: str) -> None:
    packed = zlib.compress(bytes(100 << 20), 9)
    head = {"zTXt": b"x\0\0", "iTXt": b"x\0\1\0\0\0", "iCCP": b"x\0\0"}[kind]
    decoding.must_hold("image/png", SEEDS[1][:33] + chunk(kind.encode(), head + packed) + SEEDS[1][33:])


def test_what_follows_the_end_of_a_picture_is_no_part_of_it(decoding: Decoding) -> None:
    film = np.random.default_rng(6).bytes(4 << 20)
    for body in (SEEDS[0], SEEDS[6]):
        assert decoding.image(body + film + b"\xff\xda\0\0" * 100_000).shape == (SIDE, SIDE, 3)


def test_scans_are_found_behind_a_comment_that_looks_like_an_end(decoding: Decoding) -> None:
    comment, scan = b"\xff\xfe\0\4\xff\xd9", b"\xff\xda\0\10\1\1\0\1\5\1"
    with pytest.raises(TooLarge, match="too many parts"):
        decoding.image(SEEDS[7][:-2] + comment + scan * MAX_SCANS + SEEDS[7][-2:])


def test_a_large_photograph_has_few_enough_parts(decoding: Decoding) -> None:
    noise = Image.fromarray(np.random.default_rng(7).integers(0, 256, (300, 330, 3), np.uint8))
    for kind, options in (("PNG", {"compress_level": 0}), ("JPEG", {"progressive": True, "quality": 98})):
        assert decoding.image(encoded(noise, kind, **options)).shape == (SIDE, SIDE, 3)


# ---- what is said about it ----


def test_pillows_warnings_reach_neither_the_log_nor_the_answer() -> None:
    """As it is when serving, where a warning is no error."""
    side = 10_000
    body = SEEDS[0][:8] + chunk(b"IHDR", side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])) + chunk(b"IEND", b"")
    script = (
        "import asyncio, sys; from service.decoding import Decoder; from service.errors import TooLarge\n"
        "bounds = dict(max_pixels=1_000_000, max_decoded_pixels=1_000_000, max_values=1000)\n"
        "decoder = Decoder(height=32, width=32, **bounds, threads=None)\n"
        "try: asyncio.run(decoder.decode('image/png', sys.stdin.buffer.read()))\n"
        "except TooLarge as problem: print(problem.detail)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], input=body, cwd=ROOT, capture_output=True, check=False
    )
    says = "The picture is 10000 x 10000; at most 1000000 pixels are taken: scale it down."
    assert (run.stdout.decode().strip(), run.stderr.decode()) == (says, "")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(body))
    assert said, "this picture shows nothing: Pillow does not warn of it"
