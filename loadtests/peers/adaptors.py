"""How each peer is started, asked and understood.

A peer is another server with one column of the artifact behind it. `Peer` says what differs between them and
no more; what is alike (arrivals, clocks, judging) is that of every load test. Must not know figures.
"""

import base64
import json
import math
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loadtests.openloop import Head, Prediction, Reply

FOLDER = Path(__file__).parent

OUTCOME_BY_STATUS: Mapping[int, str] = {
    200: "answered",
    408: "expired",
    429: "rejected",
    503: "rejected",
    504: "expired",
    0: "lost",
}
"""What peers mean by their statuses; any other is a failure. A refusal on arrival and a time that ran out in
the queue are told apart only as far as the peer does it."""


@dataclass(frozen=True)
class Peer:
    """One other server.

    Attributes:
        name: Of its folder and of its environment.
        title: As tables name it.
        distribution: Whose version is told.
        command: From its interpreter and a port to what starts it, in its folder.
        ready: Path that answers 200 once it can be asked.
        content_type: Of what it is sent.
        body: From an image's raw pixels to what is sent.
        head: What stands before a body; the budget is only in that of a peer that knows budgets.
        index: From the body of an answer to the class.
        knobs: The settings that it runs with, as environment variables.
        tried: Other values of the knobs that were measured before those were chosen.
        fixed: Environment variables that are no matter of tuning.
        has_environment: It has a virtual environment of its own; otherwise this one serves.
    """

    name: str
    title: str
    distribution: str
    command: Callable[[Path, int], list[str]]
    ready: str
    content_type: str
    body: Callable[[bytes], bytes]
    head: Head
    index: Callable[[bytes], int]
    knobs: Mapping[str, str]
    tried: Mapping[str, Sequence[str]]
    fixed: Mapping[str, str]
    has_environment: bool = True

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return FOLDER / self.name

    def read(self, column: str, reply: Reply) -> Prediction:
        """What an answer of this peer with this column says; it makes no claims about deadlines."""
        return Prediction(
            columns_run=(column,),
            index=self.index(reply.body),
            deadline_met=False,
            stopped_by="",
            elapsed_ms=math.nan,
            timing_ms={},
        )


def _post(
    path: str, address: urllib.parse.SplitResult, budget_s: float, content_type: str, n_bytes: int
) -> bytes:
    """Ask a server that knows no budgets."""
    return (
        f"POST {path} HTTP/1.1\r\n"
        f"Host: {address.netloc}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {n_bytes}\r\n\r\n"
    ).encode("ascii")


def triton_head(address: urllib.parse.SplitResult, budget_s: float, content_type: str, n_bytes: int) -> bytes:
    """Ask Triton with the binary tensor extension, the budget as the request's timeout in the queue [us].

    The extension puts JSON before the tensor's bytes. That part is alike for all images, and so stands here.
    Source: Triton's docs, protocol/extension_binary_data.md and extension_schedule_policy.md.
    """
    side = math.isqrt(n_bytes // 3)
    request = {
        "inputs": [
            {
                "name": "images_NHWC",
                "shape": [1, side, side, 3],
                "datatype": "UINT8",
                "parameters": {"binary_data_size": n_bytes},
            }
        ],
        "outputs": [{"name": "index", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": round(budget_s * 1e6)},
    }
    description = json.dumps(request, separators=(",", ":")).encode()
    return (
        f"POST /v2/models/column/infer HTTP/1.1\r\n"
        f"Host: {address.netloc}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Inference-Header-Content-Length: {len(description)}\r\n"
        f"Content-Length: {len(description) + n_bytes}\r\n\r\n"
    ).encode("ascii") + description


def triton_index(body: bytes) -> int:
    """The class, which is the one INT64 that stands at the end of the answer."""
    return int.from_bytes(body[-8:], "little", signed=True)


def _as_it_is(pixels: bytes) -> bytes:
    return pixels


def _bentoml_body(pixels: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(pixels).decode()]}).encode()


def _mlserver_body(pixels: bytes) -> bytes:
    tensor = {
        "name": "images",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(pixels).decode()],
    }
    return json.dumps({"inputs": [tensor]}).encode()


def _json_index(body: bytes) -> int:
    return int(json.loads(body)["index"])


def _bentoml_index(body: bytes) -> int:
    return int(json.loads(body)[0])


def _mlserver_index(body: bytes) -> int:
    return int(json.loads(body)["outputs"][0]["data"][0])


def _script(python: Path, port: int) -> list[str]:
    return [str(python), "app.py"]


def _bentoml_command(python: Path, port: int) -> list[str]:
    return [str(python), "-m", "bentoml", "serve", "app:Api", "--host", "127.0.0.1", "--port", str(port)]


RAW = "application/octet-stream"
JSON = "application/json"

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="fastapi",
            title="FastAPI",
            distribution="fastapi",
            command=_script,
            ready="/ready",
            content_type=RAW,
            body=_as_it_is,
            head=partial(_post, "/predict"),
            index=_json_index,
            knobs={"RUN": "thread", "WORKERS": "1", "MAX_WAITING": "8"},
            tried={
                "RUN": ("loop", "thread", "pool"),
                "WORKERS": ("1", "2"),
                "MAX_WAITING": ("0", "4", "8", "16"),
            },
            fixed={},
            has_environment=False,
        ),
        Peer(
            name="litserve",
            title="LitServe",
            distribution="litserve",
            command=_script,
            ready="/health",
            content_type=RAW,
            body=_as_it_is,
            head=partial(_post, "/predict"),
            index=_json_index,
            knobs={
                "MAX_BATCH": "8",
                "BATCH_TIMEOUT_MS": "0",
                "WORKERS": "1",
                "API_SERVERS": "1",
                "FAST_QUEUE": "1",
                "TIMEOUT_MS": "50",
            },
            tried={
                "MAX_BATCH": ("1", "4", "8"),
                "BATCH_TIMEOUT_MS": ("0", "1"),
                "WORKERS": ("1", "2"),
                "FAST_QUEUE": ("0", "1"),
                "TIMEOUT_MS": ("10", "50"),
            },
            fixed={},
        ),
        Peer(
            name="bentoml",
            title="BentoML",
            distribution="bentoml",
            command=_bentoml_command,
            ready="/readyz",
            content_type=JSON,
            body=_bentoml_body,
            head=partial(_post, "/predict"),
            index=_bentoml_index,
            knobs={"MAX_BATCH": "4", "MAX_LATENCY_MS": "50", "WORKERS": "1"},
            tried={
                "MAX_BATCH": ("1", "4", "16"),
                "MAX_LATENCY_MS": ("5", "10", "50"),
                "WORKERS": ("1", "2"),
            },
            fixed={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{work}"},
        ),
        Peer(
            name="ray",
            title="Ray Serve",
            distribution="ray",
            command=_script,
            ready="/predict",
            content_type=RAW,
            body=_as_it_is,
            head=partial(_post, "/predict"),
            index=_json_index,
            knobs={
                "MAX_BATCH": "8",
                "BATCH_WAIT_MS": "0",
                "REPLICAS": "1",
                "MAX_ONGOING": "16",
                "MAX_QUEUED": "8",
                "TIMEOUT_MS": "0",
            },
            tried={
                "MAX_BATCH": ("1", "8"),
                "REPLICAS": ("1", "2"),
                "MAX_ONGOING": ("4", "16"),
                "MAX_QUEUED": ("-1", "8"),
            },
            # The token would guard a cluster that only listens on 127.0.0.1, and be left in the home folder.
            fixed={"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "{work}"},
        ),
        Peer(
            name="triton",
            title="Triton",
            distribution="nvidia-pytriton",
            command=_script,
            ready="/v2/health/ready",
            content_type=RAW,
            body=_as_it_is,
            head=triton_head,
            index=triton_index,
            knobs={
                "MAX_BATCH": "8",
                "DELAY_US": "0",
                "INSTANCES": "1",
                "TIMEOUT_US": "50000",
                "MAX_QUEUE": "0",
            },
            tried={
                "MAX_BATCH": ("1", "4", "8"),
                "DELAY_US": ("0", "500"),
                "INSTANCES": ("1", "2"),
            },
            fixed={},
        ),
        Peer(
            name="mosec",
            title="mosec",
            distribution="mosec",
            command=_script,
            ready="/",
            content_type=RAW,
            body=_as_it_is,
            head=partial(_post, "/inference"),
            index=_json_index,
            knobs={
                "MAX_BATCH": "4",
                "WAIT_MS": "0",
                "WORKERS": "1",
                "MOSEC_TIMEOUT": "50",
                "MOSEC_CAPACITY": "1024",
            },
            tried={
                "MAX_BATCH": ("1", "4", "8"),
                "WORKERS": ("1", "2"),
                "MOSEC_TIMEOUT": ("10", "50"),
                "MOSEC_CAPACITY": ("16", "1024"),
            },
            fixed={"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PORT": "{port}"},
        ),
        Peer(
            name="mlserver",
            title="MLServer",
            distribution="mlserver",
            command=_script,
            ready="/v2/health/ready",
            content_type=JSON,
            body=_mlserver_body,
            head=partial(_post, "/v2/models/column/infer"),
            index=_mlserver_index,
            knobs={"MAX_BATCH": "0", "BATCH_TIME_MS": "1", "WORKERS": "0"},
            tried={"MAX_BATCH": ("0", "8"), "WORKERS": ("0", "1")},
            fixed={},
        ),
    )
}
"""Why these knobs: the README.md in the folder of each, and `python -m loadtests.peers.tune`."""
