"""One column behind LitServe.

Settings are environment variables: ARTIFACT, COLUMN, PORT, MAX_BATCH, BATCH_TIMEOUT_MS, WORKERS (processes
for inference), API_SERVERS (processes for HTTP), FAST_QUEUE (1: ZeroMQ, not a queue of multiprocessing),
TIMEOUT_MS (a request that has waited longer is refused with 504; 0 for no limit).
"""

import os
from typing import Annotated

import litserve
from fastapi import Body, Response

from loadtests.peers.column import Answer, Column

MAX_BATCH = int(os.environ.get("MAX_BATCH", "1"))


class Api(litserve.LitAPI):
    """The steps that LitServe knows; `predict` gets a list when MAX_BATCH is above 1."""

    def setup(self, device: str) -> None:
        """Load the column, once per process for inference."""
        self.column = Column(os.environ["ARTIFACT"], os.environ["COLUMN"])

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        """Raw pixels, as they came."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Leave the requests of a batch as they are."""
        return inputs

    def predict(self, x: bytes | list[bytes]) -> Answer | list[Answer]:
        """Classify one image, or those of several requests in one run."""
        return self.column.classify(b"".join(x)) if isinstance(x, list) else self.column.classify(x)[0]

    def unbatch(self, output: list[Answer]) -> list[Answer]:
        """They are apart already."""
        return output

    def encode_response(self, output: Answer) -> Response:
        """Answer with what LitServe turns into JSON.

        The annotation is FastAPI's model of the response; Response has none, so that nothing is validated.
        """
        return output  # type: ignore[return-value] # as said


if __name__ == "__main__":
    timeout_ms = float(os.environ.get("TIMEOUT_MS", "0"))
    server = litserve.LitServer(
        Api(max_batch_size=MAX_BATCH, batch_timeout=float(os.environ.get("BATCH_TIMEOUT_MS", "0")) / 1e3),
        accelerator="cpu",
        workers_per_device=int(os.environ.get("WORKERS", "1")),
        timeout=timeout_ms / 1e3 if timeout_ms else False,
        fast_queue=os.environ.get("FAST_QUEUE") == "1",
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        num_api_servers=int(os.environ.get("API_SERVERS", "1")),
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
