"""One column behind mosec: HTTP in Rust, the column in processes of Python.

Settings are environment variables: ARTIFACT, COLUMN, MAX_BATCH, WAIT_MS, WORKERS (processes), and mosec's own
MOSEC_PORT, MOSEC_TIMEOUT (of a request [ms]: 408) and MOSEC_CAPACITY (of the queue: 429).
"""

import os

from mosec import Server, Worker

from loadtests.peers.column import Answer, Column


class Api(Worker):
    """Raw pixels in, JSON out; `forward` gets a list when MAX_BATCH is above 1."""

    def __init__(self) -> None:
        super().__init__()
        self.column = Column(os.environ["ARTIFACT"], os.environ["COLUMN"])

    def deserialize(self, data: bytes) -> bytes:
        """Leave the pixels as they came."""
        return data

    def forward(self, data: bytes | list[bytes]) -> Answer | list[Answer]:
        """Classify one image, or those of several requests in one run."""
        if isinstance(data, list):
            return self.column.classify(b"".join(data))
        return self.column.classify(data)[0]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Api,
        num=int(os.environ.get("WORKERS", "1")),
        max_batch_size=int(os.environ.get("MAX_BATCH", "1")),
        max_wait_time=int(os.environ.get("WAIT_MS", "0")),
    )
    server.run()
