"""One column as a runtime of MLServer with adaptive batching, and the start of the server.

Settings are environment variables: ARTIFACT, COLUMN, PORT, MAX_BATCH (below 2: no batching), BATCH_TIME_MS,
WORKERS (processes for inference; 0: in the server's own).
"""

import asyncio
import os
import socket

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from loadtests.peers.column import Column


class Runtime(MLModel):
    """Images as base64, the cheapest that its REST interface takes; MLServer joins requests along them."""

    async def load(self) -> bool:
        """Load the column."""
        self.column = Column(os.environ["ARTIFACT"], os.environ["COLUMN"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Classify the images of one request or, batched, of several."""
        answers = self.column.classify(b"".join(Base64Codec.decode_input(payload.inputs[0])))
        classes = [answer["index"] for answer in answers]
        output = ResponseOutput(name="index", shape=[len(classes), 1], datatype="INT64", data=classes)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def serve() -> None:
    """Serve the one model until SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as probe:  # it cannot do without gRPC
        grpc_port = probe.getsockname()[1]
    settings = Settings(
        host="127.0.0.1",
        http_port=int(os.environ["PORT"]),
        grpc_port=grpc_port,
        metrics_endpoint=None,
        parallel_workers=int(os.environ.get("WORKERS", "0")),
        debug=False,
    )
    model = ModelSettings(
        name="column",
        implementation=Runtime,
        max_batch_size=int(os.environ.get("MAX_BATCH", "0")),
        max_batch_time=float(os.environ.get("BATCH_TIME_MS", "0")) / 1e3,
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(serve())
