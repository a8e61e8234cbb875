"""One who calls a server and notes what came of it; and what there is to be sent.

What a caller may expect is known to itself, because only it knows how badly it behaved. Must not know how
anything is sent, nor when all that was noted is good enough.
"""

import base64
import gzip
import io
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loadtests.offline import Offline

Counts = Literal["surely", "perhaps", "not"]
"""Whether the server counts a request among those for an answer. Perhaps: nobody can say whether it came."""

NOTHING = ""
"""The status where no response came."""

BUSY = frozenset({"429", "504"})
"""What a server may say to any request for an answer whose budget ends before it is answered."""

ANSWERED = frozenset({"200"}) | BUSY
"""What may come of a request that is right."""

OUTCOMES: Mapping[str, str] = MappingProxyType(
    {"200": "answered", "429": "rejected", "504": "expired", "500": "failed", "503": "stopped"}
)
"""What a server counts a request as that it gave this status; as invalid if it gave another. Answered may be
late as well: only the server sees the last byte leave."""

MAX_ERROR = 2e-3
"""Between two ways to compute one probability. Larger would take a neighbour's answer for one's own."""

PATIENCE_S = 30.0
"""Beyond any budget and time limit of the server: who waits for longer hangs."""

BUDGETS_MS = (2, 5, 10, 50, 200, 1000)
AMPLE_MS = 200
"""Who grants so much may hope for an answer from a server that is busy, too."""

RAW = "application/octet-stream"
BOUNDARY = "between-the-fields"


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of one request.

    Attributes:
        kind: Of caller.
        status: Of the response; `NOTHING` if none came.
        outcome: What the server must have counted it as; "" if that cannot be known.
        counts: Whether it counts among the requests for an answer.
        complaint: What is wrong with it; "" if nothing is.
        shares_runs: It may run together with others, and fail with them.
        is_ample: It was right, and had `AMPLE_MS` and more.
        sent_s: When it was sent [s, time.monotonic].
        done_s: When the caller had its response, or went [s, the same].
    """

    kind: str
    status: str
    outcome: str
    counts: Counts
    complaint: str
    shares_runs: bool
    is_ample: bool
    sent_s: float
    done_s: float


@dataclass(frozen=True, slots=True)
class Form:
    """One picture as it can be sent.

    Attributes:
        content_type: Of the body.
        body: As /predict takes it.
        row: Which of `Pictures.images_NHWC` it shows; None if it is shrunk first, so that nobody knows.
        encoding: What the body is compressed with.
    """

    content_type: str
    body: bytes
    row: int | None
    encoding: str = ""


@dataclass(frozen=True)
class Pictures:
    """What is sent, and what the artifact says of it offline.

    Attributes:
        images_NHWC: As the network sees them.
        forms: How they are sent.
        probabilities: Of all images and classes, [N, K], by the columns that ran.
    """

    images_NHWC: NDArray[np.uint8]
    forms: Sequence[Form]
    probabilities: Callable[[tuple[str, ...]], NDArray[np.float64]]

    def complaint(self, row: int | None, columns_run: Sequence[str], index: int, confidence: float) -> str:
        """Say what is wrong with an answer; "" if nothing is."""
        if row is None:
            return ""
        p_K = self.probabilities(tuple(columns_run))[row]
        if abs(p_K[index] - confidence) <= MAX_ERROR and p_K.max() - p_K[index] <= MAX_ERROR:
            return ""
        return (
            f"class {index} with {confidence:.3f} by {'+'.join(columns_run)}, but offline it is class "
            f"{p_K.argmax()} with {p_K.max():.3f}: somebody else's answer?"
        )


@dataclass(frozen=True)
class Place:
    """Where a server is, what opens it, and its bounds, which are named as its settings are.

    Attributes:
        host: Where it listens.
        port: For HTTP.
        grpc_port: For gRPC.
        model: The name of the model that answers.
        labels: Its classes.
        other: The name of a model that comes and goes.
        key: Opens predictions.
        admin_key: Opens the model repository.
        max_body_bytes: As all that follow, its setting of this name.
    """

    host: str
    port: int
    grpc_port: int
    model: str
    labels: Sequence[str]
    other: str
    key: str
    admin_key: str
    max_body_bytes: int
    max_pixels: int
    max_query_bytes: int
    max_header_bytes: int
    max_images_per_request: int
    max_pipelined_requests: int
    header_timeout_s: float
    body_timeout_s: float
    send_timeout_s: float


@dataclass
class Caller:
    """One who calls; `notes` grows with each of its requests."""

    kind: str
    place: Place
    pictures: Pictures
    rng: random.Random
    notes: list[Seen] = field(default_factory=list)

    def saw(
        self,
        status: str,
        expected: Iterable[str],
        sent_s: float,
        *,
        counts: Counts = "surely",
        outcome: str | None = None,
        complaint: str = "",
        shares_runs: bool = False,
        is_ample: bool = False,
    ) -> None:
        """Note one request.

        Args:
            status: What came.
            expected: What may come.
            sent_s: When it was sent [s, time.monotonic].
            counts: Whether the server counts it.
            outcome: What as. None: what belongs to the status.
            complaint: What is wrong with what came, apart from its status.
            shares_runs: Others' pictures may be run with its own.
            is_ample: It was right, and had plenty of time.
        """
        if status not in expected and not (shares_runs and status == "500"):
            complaint = complaint or f"{status or 'nothing'} came where {sorted(expected)} may"
        if outcome is None:
            outcome = OUTCOMES.get(status, "invalid" if status else "")
        now_s = time.monotonic()
        outcome = outcome if counts == "surely" else ""
        self.notes.append(
            Seen(self.kind, status, outcome, counts, complaint, shares_runs, is_ample, sent_s, now_s)
        )


def make_up(artifact: Path, n: int, seed: int) -> Pictures:
    """Pictures in every form that is taken, of the size that an artifact takes."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    size = manifest["input"]
    rng = np.random.default_rng(seed)
    images: list[NDArray[np.uint8]] = []
    forms: list[Form] = []
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        picture = coarse.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)
        pixels = picture.tobytes()
        forms += [Form(RAW, pixels, len(images)), Form(RAW, gzip.compress(pixels), len(images), "gzip")]
        images.append(np.asarray(picture))
        for kind in ("png", "jpeg", "webp"):
            body = encoded(picture, kind)
            forms += [Form(f"image/{kind}", body, len(images)), *_wrapped(body, len(images))]
            images.append(np.asarray(Image.open(io.BytesIO(body)).convert("RGB")))
        forms.append(Form("image/jpeg", encoded(coarse.resize((320, 240)), "jpeg"), None))
    images_NHWC = np.stack(images)
    probabilities = cache(Offline(artifact, images_NHWC).probabilities)
    columns = [rung["column"] for rung in manifest["rungs"]]
    for n_columns in range(1, len(columns) + 1):  # now: while callers wait for answers it would hold them up
        for columns_run in itertools.combinations(columns, n_columns):
            probabilities(columns_run)
    return Pictures(images_NHWC, forms, probabilities)


def encoded(picture: Image.Image, kind: str) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def _wrapped(file: bytes, row: int) -> tuple[Form, Form]:
    document = json.dumps({"image": base64.b64encode(file).decode()}).encode()
    return (
        Form("application/json", document, row),
        Form(f"multipart/form-data; boundary={BOUNDARY}", fields(file), row),
    )


def fields(*files: bytes) -> bytes:
    """A form with a field `image` for each file."""
    head = b'--%b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' % BOUNDARY.encode()
    return b"".join([head + file + b"\r\n" for file in files]) + b"--%b--\r\n" % BOUNDARY.encode()
