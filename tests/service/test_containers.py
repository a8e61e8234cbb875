"""Files lose what is not needed for their pixels, and nothing else."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin, PngImagePlugin

from service.containers import MAX_CHUNKS, MAX_SEGMENTS, MAX_TABLE_BYTES, MAX_TAGS, stripped
from service.errors import TooLarge
from tests.service.test_fuzz_decoding import (
    SEEDS,
    bounded,
    chunk,
    chunks,
    damaged,
    encoded,
    lying_png,
)

NOISE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (37, 41, 3), np.uint8))
PNG, JPEG = encoded(NOISE, "PNG"), encoded(NOISE, "JPEG")


def opened(file: bytes) -> Any:
    return Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP"))


def segment(kind: int, content: bytes) -> bytes:
    return bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2) + content


def segments(file: bytes) -> list[int]:
    """What kinds a JPEG has up to its first scan."""
    found, at = list[int](), 2
    while not found or found[-1] != 0xDA:
        assert file[at] == 0xFF
        found.append(file[at + 1])
        at += 2 + int.from_bytes(file[at + 2 : at + 4])
    return found


def riff(*parts: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)
        for kind, content in parts
    )
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def riff_parts(file: bytes) -> list[tuple[bytes, bytes]]:
    found, at = list[tuple[bytes, bytes]](), 12
    while at < len(file):
        size = int.from_bytes(file[at + 4 : at + 8], "little")
        found.append((file[at : at + 4], file[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


def tiff(*tags: tuple[int, int, int], byte_order: str = "little") -> bytes:
    """A directory of tags of one value, of these numbers, types and values."""
    order: Any = byte_order
    body = (b"II*\0" if order == "little" else b"MM\0*") + (8).to_bytes(4, order)
    body += len(tags).to_bytes(2, order)
    for tag, kind, value in tags:
        body += tag.to_bytes(2, order) + kind.to_bytes(2, order) + (1).to_bytes(4, order)
        body += value.to_bytes(2, order) + bytes(2)
    return body + bytes(4)


# ---- nothing else is lost ----


@pytest.mark.parametrize("seed", SEEDS)
def test_the_pixels_and_the_orientation_stay(seed: bytes) -> None:
    picture = stripped(seed)
    before, after = opened(seed), opened(picture.file)
    assert (after.format, after.size, after.mode) == (
        before.format.replace("MPO", "JPEG"),
        *_size_mode(before),
    )
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    assert picture.orientation == before.getexif().get(0x0112, 1)
    assert after.info.get("transparency") == before.info.get("transparency")


def _size_mode(image: Any) -> tuple[object, object]:
    return image.size, image.mode


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_stripped_has_nothing_more_to_lose(seed: bytes) -> None:
    file = stripped(seed).file
    assert stripped(file).file == file


@pytest.mark.parametrize("body", [b"", b"GIF89a", b"RIFF\0\0\0\0WAVE", b"\x89PNG", b"\xff", b"RIFF"])
def test_another_file_is_left_as_it_is(body: bytes) -> None:
    assert stripped(body).file == body


# ---- what is lost ----


def shows_pillow_nothing_else(file: bytes) -> None:
    """Of what Pillow would work on before it comes to the pixels."""
    try:
        image = opened(file)
    except Exception:  # noqa: BLE001 - Pillow raises many kinds for a damaged header
        return
    assert not {"exif", "icc_profile", "comment", "photoshop", "mp", "xmp"} & set(image.info)
    if isinstance(image, PngImagePlugin.PngImageFile):
        assert {kind for kind, _ in chunks(file)} <= {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
    elif isinstance(image, JpegImagePlugin.JpegImageFile):
        assert {name for name, _ in image.applist} <= {"APP0", "APP14"}
    else:
        assert image.n_frames == 1


@bounded
@given(body=damaged() | lying_png())
def test_law_pillow_is_shown_nothing_else(body: bytes) -> None:
    picture = stripped(body)
    shows_pillow_nothing_else(picture.file)
    assert len(picture.file) <= len(body) + 8
    assert picture.orientation in range(1, 9)
    again = stripped(picture.file)
    assert again.file == picture.file


def test_a_png_keeps_what_its_pixels_need() -> None:
    body = SEEDS[2][:33] + chunk(b"gAMA", b"\0\1\2\3") + SEEDS[2][33:-12] + chunk(b"tEXt", b"a\0b")
    body += SEEDS[2][-12:] + b"a film"
    assert [kind for kind, _ in chunks(stripped(body).file)] == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("place", [33, -12], ids=["before", "after"])
def test_what_would_unpack_is_not_shown(kind: bytes, place: int) -> None:
    head = {b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0", b"iCCP": b"x\0\0"}[kind]
    packed = chunk(kind, head + zlib.compress(bytes(1 << 20), 9))
    assert stripped(PNG[:place] + packed * 29 + PNG[place:]).file == PNG


def test_a_jpeg_keeps_what_its_pixels_need() -> None:
    extra = b"".join(segment(kind, b"8BIM" * 100) for kind in (0xE1, 0xE2, 0xED, 0xEF, 0xFE, 0xE0, 0xEE))
    body = JPEG[:2] + extra + b"\xff\xff\0" + JPEG[2:]
    assert stripped(body).file == stripped(JPEG).file
    assert set(segments(stripped(body).file)) == {0xE0, 0xDB, 0xC0, 0xC4, 0xDA}


def test_a_jpeg_says_once_what_its_colours_mean() -> None:
    cmyk = encoded(NOISE.convert("CMYK"), "JPEG")
    adobe = segment(0xEE, b"Adobe" + bytes(7))
    assert cmyk.count(adobe[:9]) == 1
    doubled = (
        cmyk[:2] + segment(0xEE, b"AdobX" + bytes(7)) + cmyk[2:].replace(b"\xff\xdb", adobe + b"\xff\xdb", 1)
    )
    assert segments(stripped(doubled).file).count(0xEE) == 1
    np.testing.assert_array_equal(np.asarray(opened(stripped(doubled).file)), np.asarray(opened(cmyk)))


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(b"\xff\xdd\0\0", id="no length"),
        pytest.param(b"\xff\xdd\0\1", id="half a length"),
        pytest.param(b"\xff\xd9", id="an end"),
        pytest.param(b"\xff\xd8", id="a beginning"),
        pytest.param(b"\xff\xd0", id="a restart"),
        pytest.param(b"\xff\1", id="a private mark"),
    ],
)
def test_a_walk_through_a_jpeg_is_pillow_s_walk(hidden: bytes) -> None:
    """Whatever it stumbles over, no segment that was to be taken away is found behind it."""
    body = JPEG[:2] + hidden + segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 100) + JPEG[2:]
    shows_pillow_nothing_else(stripped(body).file)
    if len(hidden) == 4:  # what begins the first scan would be its length
        shows_pillow_nothing_else(
            stripped(JPEG[:2] + hidden + b"\xff\xda" + bytes(0xFFDA - 2) + body[2 + len(hidden) :]).file
        )
    tail = JPEG + segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 100) + JPEG[2:]
    shows_pillow_nothing_else(stripped(JPEG[:2] + hidden + tail).file)


def test_a_webp_keeps_one_frame() -> None:
    frames = [NOISE.rotate(90 * i) for i in range(3)]
    body = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], exif=b"Exif\0\0" + tiff())
    assert [kind for kind, _ in riff_parts(body)].count(b"ANMF") == 3
    assert [kind for kind, _ in riff_parts(stripped(body).file)] == [b"VP8X", b"ANIM", b"ANMF"]


def test_a_webp_says_no_longer_what_it_no_longer_has() -> None:
    whole = encoded(NOISE, "WEBP", exif=tiff((0x0112, 3, 6)), icc_profile=b"a profile", xmp=b"<x/>")
    kept = riff_parts(stripped(whole).file)
    assert [kind for kind, _ in kept] == [b"VP8X", b"VP8 "]
    assert kept[0][1][0] == 0
    assert stripped(whole).orientation == 6
    junk = riff(*riff_parts(whole), (b"JUNK", bytes(99))) + b"VP8 and a film"
    assert stripped(junk).file == stripped(whole).file


# ---- how much is looked at ----


@pytest.mark.parametrize(
    ("least", "most"),
    [
        pytest.param(
            PNG[:33] + chunk(b"teSt", b"") * (MAX_CHUNKS - 3) + PNG[33:],
            PNG[:33] + chunk(b"teSt", b"") * (MAX_CHUNKS - 2) + PNG[33:],
            id="chunks",
        ),
        pytest.param(
            riff(*[(b"JUNK", b"")] * (MAX_SEGMENTS - 1), (b"VP8L", b"")),
            riff(*[(b"JUNK", b"")] * MAX_SEGMENTS, (b"VP8L", b"")),
            id="chunks of a WebP",
        ),
        pytest.param(
            b"\xff\xd8" + segment(0xED, b"") * MAX_SEGMENTS,
            b"\xff\xd8" + segment(0xED, b"") * (MAX_SEGMENTS + 1),
            id="segments",
        ),
        pytest.param(
            b"\xff\xd8" + segment(0xDA, b"") + segment(0xED, b"") * (MAX_SEGMENTS - 1),
            b"\xff\xd8" + segment(0xDA, b"") + segment(0xED, b"") * MAX_SEGMENTS,
            id="segments between scans",
        ),
        pytest.param(
            b"\xff\xd8" + segment(0xDB, bytes(MAX_TABLE_BYTES - 4)),
            b"\xff\xd8" + segment(0xDB, bytes(MAX_TABLE_BYTES // 2)) * 2,
            id="tables",
        ),
    ],
)
def test_so_many_parts_are_taken_and_no_more(least: bytes, most: bytes) -> None:
    stripped(least)
    with pytest.raises(TooLarge, match="too many parts"):
        stripped(most)


# ---- the orientation ----


@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize(
    ("tags", "orientation"),
    [
        *[([(0x010E, 2, 0), (0x0112, 3, value), (0x0131, 2, 0)], value) for value in range(1, 9)],
        ([(0x0112, 3, 0)], 1),
        ([(0x0112, 3, 9)], 1),
        ([(0x0112, 4, 6)], 1),
        ([(0x0111, 3, 6)], 1),
        ([(0x0100, 3, 1)] * (MAX_TAGS - 1) + [(0x0112, 3, 6)], 6),
        ([(0x0100, 3, 1)] * MAX_TAGS + [(0x0112, 3, 6)], 1),
        ([], 1),
    ],
)
def test_the_orientation_is_read(tags: list[tuple[int, int, int]], orientation: int, byte_order: str) -> None:
    exif = tiff(*tags, byte_order=byte_order)
    for body in (
        PNG[:33] + chunk(b"eXIf", exif) + PNG[33:],
        JPEG[:2] + segment(0xE1, b"Exif\0\0" + exif) + JPEG[2:],
        riff((b"VP8X", bytes(10)), (b"EXIF", exif)),
        riff((b"VP8X", bytes(10)), (b"EXIF", b"Exif\0\0" + exif)),
    ):
        assert stripped(body).orientation == orientation


def test_of_two_orientations_the_first_counts() -> None:
    first, second = (tiff((0x0112, 3, value)) for value in (6, 3))
    for body in (
        PNG[:33] + chunk(b"eXIf", first) + chunk(b"eXIf", second) + PNG[33:],
        JPEG[:2] + b"".join(segment(0xE1, b"Exif\0\0" + one) for one in (first, second)) + JPEG[2:],
        riff((b"VP8X", bytes(10)), (b"EXIF", first), (b"EXIF", second)),
    ):
        assert stripped(body).orientation == 6


@given(
    st.binary(max_size=40), st.integers(0, 40), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0"])
)
def test_exif_that_makes_no_sense_turns_nothing(noise: bytes, cut: int, begins: bytes) -> None:
    for exif in (begins + noise, tiff((0x0112, 3, 6))[:cut]):
        assert stripped(PNG[:33] + chunk(b"eXIf", exif) + PNG[33:]).orientation in range(1, 9)
    assert stripped(PNG[:33] + chunk(b"eXIf", tiff((0x0112, 3, 6))[:18]) + PNG[33:]).orientation == 1
