"""One column behind BentoML with adaptive batching; `bentoml serve app:Api` starts it.

Settings are environment variables: ARTIFACT, COLUMN, MAX_BATCH, MAX_LATENCY_MS (what has waited longer, or
would have when done, is refused with 503), WORKERS (processes).
"""

import base64
import os

import bentoml

from loadtests.peers.column import Column

MAX_BATCH = int(os.environ.get("MAX_BATCH", "8"))


@bentoml.service(
    workers=int(os.environ.get("WORKERS", "1")),
    threads=1,
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    traffic={"timeout": 10},
)
class Api:
    """A list of images in, a list of classes out: BentoML joins the lists of several requests."""

    def __init__(self) -> None:
        self.column = Column(os.environ["ARTIFACT"], os.environ["COLUMN"])

    @bentoml.api(
        batchable=MAX_BATCH > 1,
        max_batch_size=MAX_BATCH,
        max_latency_ms=int(os.environ.get("MAX_LATENCY_MS", "50")),
    )
    def predict(self, images: list[str]) -> list[int]:
        """Classify images: raw pixels in base64, the cheapest that a batchable endpoint takes."""
        answers = self.column.classify(b"".join(map(base64.b64decode, images)))
        return [answer["index"] for answer in answers]
