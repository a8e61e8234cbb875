"""One column behind Ray Serve with dynamic request batching.

Settings are environment variables: ARTIFACT, COLUMN, PORT, MAX_BATCH, BATCH_WAIT_MS, REPLICAS, MAX_ONGOING
(requests in a replica), MAX_QUEUED (requests for which there is no replica, beyond which 503 is answered; -1
for no bound), TIMEOUT_MS (of a request; 0 for none).
"""

import os
import signal
import socket

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loadtests.peers.column import Answer, Column

TIMEOUT_MS = float(os.environ.get("TIMEOUT_MS", "0"))


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", "1")),
    max_ongoing_requests=int(os.environ.get("MAX_ONGOING", "64")),
    max_queued_requests=int(os.environ.get("MAX_QUEUED", "-1")),
    ray_actor_options={"num_cpus": 0.5},
)
class Api:
    """One replica: a column, and the batches that Serve makes for it."""

    def __init__(self, artifact: str, column: str) -> None:
        self.column = Column(artifact, column)

    @serve.batch(
        max_batch_size=int(os.environ.get("MAX_BATCH", "8")),
        batch_wait_timeout_s=float(os.environ.get("BATCH_WAIT_MS", "0")) / 1e3,
    )
    async def infer(self, images: list[bytes]) -> list[Answer]:
        """Classify the images of several requests in one run."""
        return self.column.classify(b"".join(images))

    async def __call__(self, request: Request) -> Response:
        """Classify one image: raw pixels; a GET only asks whether the replica is there."""
        if request.method == "GET":
            return JSONResponse({"ready": True})
        return JSONResponse(await self.infer(await request.body()))


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as probe:  # clear of the ports that Ray gives its workers
        os.environ["RAY_GCS_SERVER_PORT"] = str(probe.getsockname()[1])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    serve.start(
        http_options=HTTPOptions(
            host="127.0.0.1",
            port=int(os.environ["PORT"]),
            request_timeout_s=TIMEOUT_MS / 1e3 or None,
        )
    )
    serve.run(Api.bind(os.environ["ARTIFACT"], os.environ["COLUMN"]), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
