"""Requests over HTTP that are wrong in one way each, and what must be said to them.

Each is bytes, complete or as far as it goes. Must not know what else is sent at the same time.
"""

import base64
import gzip
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from loadtests.chaos.callers import (
    BOUNDARY,
    BUSY,
    RAW,
    Caller,
    Counts,
    Form,
    Pictures,
    Place,
    encoded,
    fields,
)
from loadtests.chaos.over_http import LONG_MS, http, post, predict

QUERY = f"budget_ms={LONG_MS}"
WRONG_KEY = "anytime_of-somebody-else"
TOO_MANY_PARTS = 10_050
TOO_MANY_SCANS = 70


@dataclass(frozen=True, slots=True)
class Odd:
    """One of them.

    Attributes:
        kind: What is wrong.
        message: What is sent.
        expected: What may come, the server's being busy apart.
        counts: Whether it counts among the requests for an answer.
        outcome: What as, where that does not follow from the status.
    """

    kind: str
    message: bytes
    expected: frozenset[str]
    counts: Counts = "surely"
    outcome: str | None = None


async def ask(caller: Caller, odd: Odd) -> None:
    """Send one of them, and note what comes."""
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(odd.message)
        response = await line.response()
        outcome = None if response.status in BUSY else odd.outcome
        is_picture = odd.counts == "surely" and "200" in odd.expected  # it may yet be one, and be run
        caller.saw(
            response.status,
            odd.expected,
            sent_s,
            counts=odd.counts,
            outcome=outcome,
            shares_runs=is_picture,
        )


def catalogue(place: Place, pictures: Pictures) -> Sequence[Odd]:
    """All there are.

    Args:
        place: Whose bounds are overstepped.
        pictures: Some of them are damaged.
    """
    return [
        *_bodies(place, pictures),
        *_bombs(place),
        *_compressed(place, pictures),
        *_parameters(place, pictures),
        *_keys(place, pictures),
        *_tensors(place, pictures),
        *_heads(place, pictures),
        *_elsewhere(place),
    ]


def _picture(place: Place, kind: str, body: bytes, *expected: int, of_type: str = "image/png") -> Odd:
    message = predict(place, Form(of_type, body, None), QUERY)
    return Odd(kind, message, frozenset(map(str, expected)) | BUSY)


def _bodies(place: Place, pictures: Pictures) -> Iterator[Odd]:
    """What is no picture, or no longer."""
    files = {form.content_type: form.body for form in reversed(pictures.forms) if not form.encoding}
    for kind in ("png", "jpeg", "webp"):
        of_type, file = f"image/{kind}", files[f"image/{kind}"]
        yield _picture(place, f"{kind}: noise", bytes(range(256)) * 4, 415, of_type=of_type)
        yield _picture(place, f"{kind}: cut short", file[: len(file) // 2], 400, 415, of_type=of_type)
        for n in range(8):
            at = len(file) * (n + 1) // 9
            damaged = file[:at] + bytes([file[at] ^ 0xFF]) + file[at + 1 :]
            yield _picture(place, f"{kind}: damaged", damaged, 200, 400, 413, 415, of_type=of_type)
    yield _picture(place, "empty", b"", 400)
    yield _picture(place, "of no type", files["image/png"], 415, of_type="text/plain")
    yield _picture(place, "of no type", files["image/png"], 415, of_type="")
    yield _picture(place, "pixels: too few", bytes(10), 400, of_type=RAW)
    yield _picture(place, "pixels: none", b"", 400, of_type=RAW)
    for document in (
        *(b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"image": 1}', b'{"image": "%"}', b"{}"),
        *(b'{"image": ""}', b'{"image": "AAAA", "more": 1}', b"[" * 50_000),
    ):
        yield _picture(place, "json: wrong", document, 400, of_type="application/json")
    noise = json.dumps({"image": base64.b64encode(bytes(range(256))).decode()}).encode()
    yield _picture(place, "json: noise", noise, 415, of_type="application/json")
    form = f"multipart/form-data; boundary={BOUNDARY}"
    yield _picture(place, "form: no boundary", fields(files["image/png"]), 400, of_type="multipart/form-data")
    yield _picture(place, "form: two pictures", fields(*[files["image/png"]] * 2), 400, of_type=form)
    yield _picture(place, "form: noise", bytes(range(256)), 400, of_type=form)
    yield _picture(place, "form: cut short", fields(files["image/png"])[:-50], 400, 415, of_type=form)


def _bombs(place: Place) -> Iterator[Odd]:
    """Small bodies that would cost much."""
    side = 1 + int(place.max_pixels**0.5)
    black = encoded(Image.new("RGB", (side, side)), "png")
    yield _picture(place, "bomb: pixels", black, 413)
    yield _picture(place, "bomb: pixels, declared", _png((1 << 16, 1 << 16), []), 413)
    yield _picture(place, "bomb: parts", _png((8, 8), [(b"tEXt", b"")] * TOO_MANY_PARTS), 413)
    scans = b"\xff\xd8" + b"\xff\xda\x00\x02" * TOO_MANY_SCANS
    yield _picture(place, "bomb: scans", scans, 413, of_type="image/jpeg")
    grey = encoded(Image.new("L", (side - 2, side - 2)), "png")
    yield _picture(place, "large, but not too large", grey, 200)


def _png(size: tuple[int, int], parts: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The file of a picture with more parts than it needs, and no pixels."""

    def part(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content).to_bytes(4)
        return len(content).to_bytes(4) + name + content + check

    header = size[0].to_bytes(4) + size[1].to_bytes(4) + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [part(*one) for one in ((b"IHDR", header), *parts, (b"IEND", b""))]
    )


def _compressed(place: Place, pictures: Pictures) -> Iterator[Odd]:
    def odd(kind: str, body: bytes, expected: int, encoding: str = "gzip") -> Odd:
        message = predict(place, Form(RAW, body, None, encoding), QUERY)
        return Odd(kind, message, frozenset({str(expected)}) | BUSY)

    pixels = gzip.compress(pictures.images_NHWC[0].tobytes())
    yield odd("gzip: bomb", gzip.compress(bytes(4 * place.max_body_bytes)), 413)
    yield odd("deflate: bomb", zlib.compress(bytes(4 * place.max_body_bytes)), 413, "deflate")
    yield odd("gzip: cut short", pixels[: len(pixels) // 2], 400)
    yield odd("gzip: more behind it", pixels + b"more", 400)
    yield odd("gzip: noise", bytes(range(256)), 400)
    yield odd("unknown encoding", pixels, 415, "br")
    yield odd("twice encoded", pixels, 415, "gzip, gzip")


def _parameters(place: Place, pictures: Pictures) -> Iterator[Odd]:
    form = next(form for form in pictures.forms if form.content_type == RAW)
    for query in (
        *("budget_ms=0", "budget_ms=-1", "budget_ms=nan", "budget_ms=inf", "budget_ms=1e9", "budget_ms="),
        *("budget_ms=5&budget_ms=5", "budget_ms=%00", "top_k=0", "top_k=1.5", "top_k=1000000"),
        *("min_confidence=2", "stream=yes", "unknown=1", "budget_ms=5;top_k=1", "%ff=%fe"),
    ):
        yield Odd("query", predict(place, form, query), frozenset({"422"}))
    long = "x" * (place.max_query_bytes + 1)
    yield Odd("query: too long", predict(place, form, long), frozenset({"414"}))
    too_large = predict(place, Form(RAW, b"", None), QUERY, n_declared=place.max_body_bytes + 1)
    yield Odd("body: declared too large", too_large, frozenset({"413"}) | BUSY)


def _keys(place: Place, pictures: Pictures) -> Iterator[Odd]:
    body = pictures.images_NHWC[0].tobytes()
    raw = {"Content-Type": RAW}
    for path in (f"/predict?{QUERY}", f"/v2/models/{place.model}/infer"):
        yield Odd("no key", post(path, body, raw, key=""), frozenset({"401"}))
        yield Odd("wrong key", post(path, body, raw, key=WRONG_KEY), frozenset({"401"}))
        yield Odd("another's key", post(path, body, raw, key=place.admin_key), frozenset({"403"}))
    for path in ("/v2/repository/index", f"/v2/repository/models/{place.model}/unload"):
        yield Odd("admin: no key", post(path, b"", {}, key=""), frozenset({"401"}), "not")
        yield Odd("admin: another's key", post(path, b"", {}, key=place.key), frozenset({"403"}), "not")


def _tensors(place: Place, pictures: Pictures) -> Iterator[Odd]:
    """The Open Inference Protocol, and how it is misspelt."""
    height, width = pictures.images_NHWC.shape[1:3]
    pixels = pictures.images_NHWC[0].tobytes()
    shape = [1, height, width, 3]
    right: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": shape}
    sized = right | {"parameters": {"binary_data_size": len(pixels)}}

    def odd(kind: str, document: object, binary: bytes = b"", length: object = None, **named: Any) -> Odd:
        header = json.dumps(document).encode()
        told = len(header) if length is None else length
        headers: Mapping[str, object] = {"Inference-Header-Content-Length": told} if binary else {}
        path = f"/v2/models/{named.get('model', place.model)}/infer"
        message = post(path, header + binary, headers, key=place.key)
        return Odd(kind, message, frozenset(named.get("expected", {"400"})) | BUSY)

    for length in (-1, "x", 1 << 40, "9" * 30, len(pixels) * 9):
        yield odd("tensor: length of header", {"inputs": [sized]}, pixels, length)
    yield odd("tensor: too few bytes", {"inputs": [sized]}, pixels[:-1])
    yield odd("tensor: too many bytes", {"inputs": [sized]}, pixels + b"x")
    for claimed in (-1, 0, 1 << 62, "12", None, True):
        size = {"parameters": {"binary_data_size": claimed}}
        yield odd("tensor: claimed size", {"inputs": [right | size]}, pixels)
    wrongs: Sequence[dict[str, Any]] = (
        *({"name": "picture"}, {"name": 7}, {"datatype": "FP32"}, {"datatype": None}, {"shape": [1]}),
        *({"shape": [1, height, width, 4]}, {"shape": [1 << 40, height, width, 3]}, {"shape": ["1"]}),
        *({"shape": []}, {"shape": [1.0, height, width, 3]}, {"shape": [1] * 100_000}),
    )
    for wrong in wrongs:
        yield odd("tensor: misdescribed", {"inputs": [sized | wrong]}, pixels, expected={"400", "422"})
    for n in (0, -1, place.max_images_per_request + 1):
        many = {"shape": [n, height, width, 3]}
        yield odd("tensor: number of pictures", {"inputs": [sized | many]}, pixels, expected={"422"})
    contents: Sequence[Any] = ([], [1], ["x"], [300] * len(pixels), "text", {"a": 1}, [[[[]]]], None)
    for data in contents:
        yield odd("tensor: elements", {"inputs": [right | {"data": data}]})
    text = {"name": "image_bytes", "datatype": "BYTES", "shape": [2]}
    for raw in (b"", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00ab", b"\x01\x00\x00\x00a" * 3):
        claimed_text = text | {"parameters": {"binary_data_size": len(raw)}}
        yield odd("tensor: BYTES", {"inputs": [claimed_text]}, raw or b" ")
    documents: Sequence[Any] = (None, [], {}, {"inputs": 7}, {"inputs": []}, {"inputs": [right] * 2})
    for document in (*documents, {"id": 7}):
        yield odd("tensor: document", document)
    for parameter in ({"budget_ms": "soon"}, {"budget_ms": -1}, {"min_confidence": 7}, {"timeout": "x"}):
        asking = {"inputs": [sized], "parameters": parameter}
        yield odd("tensor: parameter", asking, pixels, expected={"422"})
    yield odd("tensor: output", {"inputs": [sized], "outputs": [{"name": "x"}]}, pixels, expected={"422"})
    yield odd("tensor: model", {"inputs": [sized]}, pixels, model="nobody", expected={"404"})
    yield odd("tensor: model", {"inputs": [sized]}, pixels, model="%00", expected={"404"})


def _heads(place: Place, pictures: Pictures) -> Iterator[Odd]:
    """What is no request; the server's HTTP knows, and the application never hears of it."""
    for text in (
        *(
            "nonsense\r\n\r\n",
            "GET\r\n\r\n",
            "GET / HTTP/9.9\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        ),
        *("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET / HTTP/1.1\r\nno colon\r\n\r\n"),
        *("GET / HTTP/1.1\r\nA: b\x00c\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"),
        *("POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"),
        "POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 1\r\n\r\nx",
    ):
        yield Odd("head", text.encode("latin-1"), frozenset({"400"}), "not")
    large = b"GET / HTTP/1.1\r\nX: %b\r\n\r\n" % (b"x" * place.max_header_bytes)
    yield Odd("head: too large", large, frozenset({"431"}), "not")
    line = b"GET /%b HTTP/1.1\r\n\r\n" % (b"x" * place.max_header_bytes)
    yield Odd("head: too large", line, frozenset({"431"}), "not")
    chunked = predict(place, Form(RAW, b"", None), QUERY).replace(
        b"Content-Length: 0", b"Transfer-Encoding: chunked"
    )
    # Said by the server's HTTP, while the application waits for a body: to it, the caller has gone.
    for chunk in (b"x\r\n", b"-1\r\n", b"5\r\nabcdefgh"):
        yield Odd("chunk", chunked + chunk, frozenset({"400"}), outcome="disconnected")


def _elsewhere(place: Place) -> Iterator[Odd]:
    """What asks for no answer, or in no way that gives one."""

    def get(path: str, expected: int, method: str = "GET", counts: Counts = "not") -> Odd:
        message = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {place.key}\r\n\r\n".encode()
        return Odd("elsewhere", message, frozenset({str(expected)}), counts)

    for path in (
        "/",
        "/model",
        "/metrics",
        "/healthz/live",
        "/healthz/ready",
        "/docs",
        "/openapi.json",
        "/v2",
    ):
        yield get(path, 200)
    for path in ("/nothing", "/../../etc/passwd", "/%2e%2e/", "/v2/models/nobody"):
        yield get(path, 404)
    yield get("/model", 405, "DELETE")
    yield get("/predict", 405, counts="surely")
    yield get(f"/v2/models/{place.model}/infer", 405, counts="surely")
