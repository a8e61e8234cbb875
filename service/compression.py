"""Undoes a Content-Encoding within bounds: what comes out is counted while it comes out.

Must not know what the bytes mean.
"""

import io
import zlib

from service.errors import Malformed, TooLarge, UnsupportedEncoding

ENCODINGS = ("gzip", "deflate")
CHUNK_BYTES = 64 * 1024
"""Undone at a time. Larger is hardly faster; smaller costs more calls."""

WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""`deflate` is zlib's format, checksum included (RFC 9110, 8.4.1.2), and x-gzip another word for gzip."""


def undo(encoding: str, body: bytes, limit: int) -> bytes:
    """The body before it was encoded.

    Args:
        encoding: Of the request's Content-Encoding.
        body: As it came.
        limit: The most bytes that may come out.

    Raises:
        TooLarge: more would come out; no more than `limit` and a chunk ever did.
        Malformed: the body is damaged, cut short, or followed by something else.
        UnsupportedEncoding: the encoding is another one, or several one around the other.

    Cost: 3 to 10 ms for each MiB that comes out; blocks for so long.
    """
    encoding = encoding.strip().lower()
    if encoding in {"", "identity"}:
        return body
    if encoding not in WINDOW_BITS:
        raise UnsupportedEncoding(
            f"Content-Encoding is {encoding[:40]!r}: use one of {', '.join(ENCODINGS)}, or "
            "none: pictures are compressed already.",
            ", ".join(ENCODINGS),
        )
    undoing = zlib.decompressobj(WINDOW_BITS[encoding])
    whole, n_given = io.BytesIO(), 0
    try:
        while n_given < len(body) and not undoing.eof:
            # In parts, because what was not yet undone is copied each time.
            rest = body[n_given : n_given + CHUNK_BYTES]
            n_given += len(rest)
            while rest and not undoing.eof:
                part = undoing.decompress(rest, CHUNK_BYTES)
                if whole.tell() + len(part) > limit:
                    raise TooLarge(f"The body has more than {limit} bytes undone: send a smaller picture.")
                whole.write(part)
                rest = undoing.unconsumed_tail
    except zlib.error as error:
        raise Malformed(f"The body is damaged {encoding} ({error}): send it whole.") from error
    if not undoing.eof:
        raise Malformed(f"The body is {encoding} that was cut short: send it whole.")
    if undoing.unused_data or n_given < len(body):
        raise Malformed(f"Something follows the {encoding} in the body: send one stream.")
    return whole.getvalue()  # no copy: io.BytesIO hands out what it wrote into
