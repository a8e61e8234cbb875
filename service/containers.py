"""What PNG, JPEG and WebP files consist of: from a whole file to what is needed for its pixels.

Must not know what a pixel is. Pillow reads everything in a file, much of it in Python and all of it while it
holds the interpreter: texts that unpack to a megabyte each, tags by the thousand, frames that nobody asked
for. Nothing of that is wanted here but the orientation, which is read by hand.

Sources: https://www.w3.org/TR/png-3/ · ITU-T T.81, annex B · RFC 9649 (WebP) · CIPA DC-008 (Exif), 4.5, 4.6.
"""

import re
import struct
from dataclasses import dataclass

from service.errors import TooLarge

MAX_CHUNKS = 10_000
"""Of a PNG; 16 MB in the 8 KB that are usual are 2,000. Each takes 0.4 us, and Pillow 4 us."""

MAX_SEGMENTS = 1000
"""Of a JPEG, bytes between them included, or chunks of a WebP; cameras write some 50. Each takes 1 us."""

MAX_SCANS = 64
"""Times that a progressive JPEG paints over the whole picture; encoders write about 10. A scan may have 13
bytes and takes 0.8 ns a pixel: 16 MB of them would keep a thread for an hour and more."""

MAX_TABLE_BYTES = 16 * 1024
"""Of a JPEG's tables before its first scan; encoders write about 1,000. Pillow takes 0.1 us for each."""

MAX_TAGS = 100
"""Of Exif that are looked at. They are in order, and the orientation is one of the first."""

WINDOW_BYTES = 1 << 20
"""Searched at a time: for a few milliseconds at most others have to wait."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})

JPEG_MARK = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""Where a segment begins: among pixels, 255 is followed by 0 or a restart."""

JPEG_TABLES = frozenset({*range(0xC0, 0xD0), 0xDB, 0xDD})
"""Frames; Huffman, arithmetic and quantisation tables; restarts."""

SCAN, END, EXIF = 0xDA, 0xD9, 0xE1
COLOURS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
"""Segments that say what the numbers mean, by how they begin."""

WEBP_CHUNKS = frozenset({b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
WEBP_OTHERS = 0x20 | 0x08 | 0x04
"""What VP8X says of a colour profile, Exif and XMP."""

ORIENTATION, SHORT = 0x0112, 3


@dataclass(frozen=True, slots=True)
class Picture:
    """A file with the same pixels as the one that came, and how to turn them: as Exif has it, 1 to 8."""

    file: bytes
    orientation: int = 1


def stripped(body: bytes) -> Picture:
    """Take away what is not needed for the pixels. What is no PNG, JPEG or WebP is left as it is.

    Raises:
        TooLarge: it has more parts than any ordinary picture.

    Cost: 3 us for a 32 x 32 PNG, 10 us for such a JPEG; for large ones 0.2 ns a byte, and 4 for a JPEG that
    is made for it.
    """
    if body.startswith(PNG_SIGNATURE):
        return _png(body)
    if body.startswith(b"\xff\xd8"):
        return _jpeg(body)
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return _webp(body)
    return Picture(body)


def _png(body: bytes) -> Picture:
    """Its end is the end: what follows it is no part of it."""
    whole, kept, tiff = memoryview(body), list[bytes | memoryview](), b""
    at, n_chunks, kind = len(PNG_SIGNATURE), 0, b""
    while at < len(body) and kind != b"IEND":
        n_chunks += 1
        _check(n_chunks <= MAX_CHUNKS)
        kind, end = body[at + 4 : at + 8], at + 12 + int.from_bytes(body[at : at + 4])
        if kind in PNG_CHUNKS:
            kept.append(whole[at:end])
        elif kind == b"eXIf":
            tiff = tiff or body[at + 8 : end - 4]
        at = end
    return Picture(PNG_SIGNATURE + b"".join(kept), _orientation(tiff))


def _jpeg(body: bytes) -> Picture:
    """From its first scan on it is left as it is: libjpeg reads that, and skips what it does not know."""
    kept, tiff, colours = [body[:2]], b"", dict(COLOURS)
    at, n_segments, n_table_bytes = 2, 0, 0
    while (mark := _mark(body, at)) and (kind := mark[0][1]) not in {SCAN, END}:
        n_segments += 1 + mark.start() - at
        content = mark.end() + 2
        length = int.from_bytes(body[mark.end() : content])
        at = mark.end() + length
        _check(n_segments <= MAX_SEGMENTS)
        if kind in JPEG_TABLES and length >= 2:
            kept.append(body[mark.start() : at])
            n_table_bytes += len(kept[-1])
            _check(n_table_bytes <= MAX_TABLE_BYTES)
        elif kind in colours and body.startswith(colours[kind], content):
            kept.append(body[mark.start() : at])
            del colours[kind]  # the first one counts
        elif kind == EXIF and body.startswith(b"Exif\0\0", content):
            tiff = tiff or body[content:at]
    if mark and mark[0][1] == SCAN:
        _check_scans(body, mark.start(), n_segments)
        kept.append(body[mark.start() :])
    return Picture(b"".join(kept), _orientation(tiff))


def _check_scans(body: bytes, at: int, n_segments: int) -> None:
    n_scans = 0
    while (mark := _mark(body, at)) and mark[0][1] != END:  # phones append films and more
        n_segments += 1
        n_scans += mark[0][1] == SCAN
        _check(n_segments <= MAX_SEGMENTS and n_scans <= MAX_SCANS)
        at = mark.end() + int.from_bytes(body[mark.end() : mark.end() + 2])


def _mark(body: bytes, at: int) -> re.Match[bytes] | None:
    while at < len(body):
        if mark := JPEG_MARK.search(body, at, at + WINDOW_BYTES + 1):
            return mark
        at += WINDOW_BYTES
    return None


def _webp(body: bytes) -> Picture:
    """Of an animation the first frame is the picture."""
    whole, kept, tiff = memoryview(body), list[bytes | memoryview](), b""
    at, n_chunks, kind = 12, 0, b""
    length = min(len(body), 8 + int.from_bytes(body[4:8], "little"))
    while at < length and kind != b"ANMF":
        n_chunks += 1
        _check(n_chunks <= MAX_SEGMENTS)
        kind, size = body[at : at + 4], int.from_bytes(body[at + 4 : at + 8], "little")
        content, end = at + 8, at + 8 + size + size % 2
        if kind == b"VP8X":
            flags = int.from_bytes(body[content : content + 1]) & ~WEBP_OTHERS
            kept += [whole[at:content], bytes([flags]), whole[content + 1 : end]]
        elif kind in WEBP_CHUNKS:
            kept.append(whole[at:end])
        elif kind == b"EXIF":
            tiff = tiff or body[content:end]
        at = end
    chunks = b"WEBP" + b"".join(kept)
    return Picture(b"RIFF" + len(chunks).to_bytes(4, "little") + chunks, _orientation(tiff))


def _orientation(tiff: bytes) -> int:
    """What the first directory of a TIFF says; 1 if it says nothing, or makes no sense."""
    tiff = tiff.removeprefix(b"Exif\0\0")
    byte_order = "<" if tiff.startswith(b"II") else ">"
    try:
        (at,) = struct.unpack_from(byte_order + "I", tiff, 4)
        (n_tags,) = struct.unpack_from(byte_order + "H", tiff, at)
        for i in range(min(n_tags, MAX_TAGS)):
            tag, kind, _, value = struct.unpack_from(byte_order + "HHIH", tiff, at + 2 + 12 * i)
            if tag == ORIENTATION:
                return value if kind == SHORT and 1 <= value <= 8 else 1
    except struct.error:
        pass  # it is cut short
    return 1


def _check(is_ordinary: bool) -> None:
    if not is_ordinary:
        raise TooLarge("The picture's file has too many parts: save it anew, as a plain PNG or JPEG.")
