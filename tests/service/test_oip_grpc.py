"""The Open Inference Protocol over gRPC: Triton's own client is served, and a call's costs are bounded."""

import asyncio
import contextlib
import io
import json
import random
import shutil
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import SecretStr

from service import oip_pb2 as pb
from service.access import Access, new_key
from service.errors import Problem
from service.exchange import Room
from service.inference import Inference
from service.oip_grpc import CODES, SERVICE, GrpcServer, _address, _Calls
from service.record import Journal
from service.settings import Settings, SettingsError
from service.turns import LEAST_WAIT_S, Turns
from tests.service import toy_artifact
from tests.service.conftest import (
    BATCH_SIZES,
    BlockedSession,
    Launcher,
    Running,
    nothing_left_of,
    profile_of,
)
from tests.service.test_errors import kinds

ROOT = Path(__file__).resolve().parents[2]
PIXELS = np.random.default_rng(1).integers(0, 256, (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8)
SHAPE = [1, *PIXELS.shape]
ADMIN_KEY, ADMIN_HASH = new_key()
KEY, HASH = new_key()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


def asking(budget_ms: float | None = 5000, **changes: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(
        inputs=[{"name": "image", "datatype": "UINT8", "shape": SHAPE} | changes],
        raw_input_contents=[PIXELS.tobytes()],
    )
    if budget_ms is not None:
        request.parameters["budget_ms"].double_param = budget_ms
    return request


class Caller:
    """A plain gRPC client that sends what it is told, well-formed or not."""

    def __init__(self, server: Running, credentials: grpc.ChannelCredentials | None = None) -> None:
        address = f"localhost:{server.grpc_port}" if credentials else f"127.0.0.1:{server.grpc_port}"
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        if credentials:
            self.channel = grpc.secure_channel(address, credentials, options)
        else:
            self.channel = grpc.insecure_channel(address, options)

    def method(self, name: str = "ModelInfer") -> Any:
        return self.channel.unary_unary(f"/inference.GRPCInferenceService/{name}")

    def infer(self, request: pb.ModelInferRequest | bytes, **how: Any) -> pb.ModelInferResponse:
        body = request if isinstance(request, bytes) else request.SerializeToString()
        return pb.ModelInferResponse.FromString(self.method()(body, **how))

    def infer_stream(self, messages: Iterator[bytes]) -> pb.ModelInferResponse:
        """As a client that sends its one message late, or never, may."""
        infer: Any = self.channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        return pb.ModelInferResponse.FromString(infer(messages))


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Callable[..., Caller]:
    """Makes callers whose connections are closed at the end."""

    def made(*of: Any) -> Caller:
        caller = Caller(*of)
        request.addfinalizer(caller.channel.close)
        return caller

    return made


@pytest.fixture(scope="module")
def server(inference: Inference) -> Iterator[Running]:
    with Launcher(inference, contextlib.ExitStack()) as launcher:
        yield launcher(grpc_port=0)


def assert_refused(call: Callable[[], Any], code: grpc.StatusCode, says: str) -> Any:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    error: Any = refused.value
    assert (error.code(), says in error.details()) == (code, True), error.details()
    return error


def outcomes(server: Running, **least: float) -> None:
    """Wait until so many requests are counted."""
    for outcome, n in least.items():
        server.wait_for(f'anytime_requests_total{{outcome="{outcome}"}}', n)


def test_the_last_call_does_not_keep_a_version_that_is_replaced(
    launch: Launcher, call: Callable[..., Caller], tmp_path: Path
) -> None:
    for version in ("7", "9"):
        toy_artifact.write(tmp_path / "toy" / version, version)
    server = launch(grpc_port=0, model_repository=tmp_path, profile_seconds=0.01, batch_sizes=BATCH_SIZES)
    assert call(server).infer(asking()).model_version == "7"
    replaced = weakref.ref(server.repository.model())
    server.on_loop(server.repository.load("toy", "9"))
    while replaced():
        pass


# ---- other people's clients ----


def predicted(server: Running, more: str = "") -> dict[str, Any]:
    """What /predict answers."""
    url = f"/predict?budget_ms=5000&top_k={len(toy_artifact.LABELS)}{more}"
    answer: dict[str, Any] = server.client.post(
        url, content=png(), headers={"content-type": "image/png"}
    ).json()
    return answer


def by_index(answer: dict[str, Any]) -> list[float]:
    return [one["probability"] for one in sorted(answer["top"], key=lambda one: one["index"])]


@pytest.mark.timeout(120)
def test_triton_s_client_is_served(launch: Launcher, tmp_path: Path) -> None:
    toy_artifact.write(tmp_path / "toy" / "8", "8")
    server = launch(
        grpc_port=0,
        model_repository=tmp_path,
        admin_keys=(ADMIN_HASH,),
        profile_seconds=0.01,
        batch_sizes=BATCH_SIZES,
    )
    answer = predicted(server)
    probabilities, shallow = by_index(answer), by_index(predicted(server, "&min_confidence=0"))

    client = ROOT / "tests" / "clients" / "oip_grpc.py"
    address = f"127.0.0.1:{server.grpc_port}"
    done = subprocess.run(
        [sys.executable, client, address, ADMIN_KEY],
        input=png(),
        capture_output=True,
        check=False,
        timeout=100,
    )

    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, [True, True, False])
    assert found["server"]["name"] == "anytime-inference"
    assert {"binary_tensor_data", "model_repository"} <= set(found["server"]["extensions"])
    assert (found["model"]["name"], found["model"]["versions"], found["version"]) == ("toy", ["7"], "toy")
    shape = [str(size) for size in (-1, *PIXELS.shape)]  # as protocol buffers have int64 in JSON
    assert found["model"]["inputs"][0] == {"name": "image", "datatype": "UINT8", "shape": shape}
    for answered in found["probabilities"]:
        assert answered == [pytest.approx(probabilities, abs=1e-5)]
    assert found["three"] == [pytest.approx(shallow, abs=1e-5)] * 3
    assert found["two"] == [pytest.approx(shallow, abs=1e-5)] * 2
    assert found["chosen"] == ["mine", [answer["label"]], ["3"]]
    assert [text.split(":")[2] for text in found["classes"][0]] == [one["label"] for one in answer["top"][:2]]
    told = found["parameters"]
    assert (told["column"], told["columns_run"], told["stopped_by"]) == ("1", "1", "confidence")
    assert (told["budget_ms"], told["deadline_met"]) == (5000, True)
    assert 0 < told["inference_ms"] < told["elapsed_ms"]
    default, deadline, long_deadline, both, both_the_other_way = found["budgets_ms"]
    assert (default, long_deadline, both) == (50, 10_000, 500)
    assert 5000 < deadline < 8100  # gRPC rounds up what it sends
    assert 5000 < both_the_other_way < 8100
    assert [code for code, _ in found["refusals"]] == [
        *["INVALID_ARGUMENT"] * 6,
        *["NOT_FOUND"] * 2,
        "UNIMPLEMENTED",
        *("UNAUTHENTICATED", "NOT_FOUND", "INVALID_ARGUMENT", "UNAUTHENTICATED"),
    ]
    assert "budget_ms must be a number" in found["refusals"][0][1]
    listed = {(one["name"], one["version"]): one["state"] for one in found["index"]}
    assert listed == {("toy", "7"): "READY", ("toy", "8"): "UNAVAILABLE"}
    assert (found["swapped"], found["unloaded"]) == ("8", False)


def described(serialized: bytes) -> dict[str, Any]:
    """Every message's fields and every method's types, by name."""
    file = descriptor_pb2.FileDescriptorProto.FromString(serialized)
    found: dict[str, Any] = {}
    waiting = [("", message) for message in file.message_type]
    while waiting:
        path, message = waiting.pop()
        name = f"{path}.{message.name}"
        found[name] = {(one.name, one.number, one.type, one.label, one.type_name) for one in message.field}
        waiting += [(name, inner) for inner in message.nested_type]
    for method in file.service[0].method:
        found[f"{file.service[0].name}/{method.name}"] = (method.input_type, method.output_type)
    return {"package": file.package, **found}


def test_names_and_numbers_are_those_of_triton_s_client() -> None:
    script = (
        "import sys; from tritonclient.grpc import service_pb2;"
        "sys.stdout.buffer.write(service_pb2.DESCRIPTOR.serialized_pb)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout

    ours, theirs = described(pb.DESCRIPTOR.serialized_pb), described(printed)

    assert ours == {name: theirs.get(name) for name in ours}


def test_the_generated_code_is_what_the_proto_gives(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", ROOT / "service" / "protos"),
            *(f"--descriptor_set_out={tmp_path / 'set'}", f"--pyi_out={tmp_path}", "open_inference.proto"),
        ],
        check=True,
    )
    made = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes())
    committed = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)

    for message in [*committed.message_type]:  # the compiler writes what is the default, too
        for field in message.field:
            field.ClearField("json_name")
    assert described(committed.SerializeToString()) == described(made.file[0].SerializeToString())
    assert (ROOT / "service/oip_pb2.pyi").read_text() == (tmp_path / "open_inference_pb2.pyi").read_text()


# ---- what comes in ----


def test_contents_may_be_typed(server: Running, call: Callable[..., Caller]) -> None:
    caller = call(server)
    raw = caller.infer(asking())
    pixels = asking(contents={"uint_contents": PIXELS.ravel().tolist()})
    file = asking(name="image_bytes", datatype="BYTES", shape=[1], contents={"bytes_contents": [png()]})
    for typed in (pixels, file):
        typed.ClearField("raw_input_contents")

        assert caller.infer(typed).raw_output_contents == raw.raw_output_contents


@pytest.mark.parametrize(
    ("changes", "raw", "says"),
    [
        ({}, [], "but 0 came"),
        ({}, [b"1"], "but 1 came"),
        ({}, [PIXELS.tobytes()] * 2, "contents twice"),
        ({"contents": {"uint_contents": [1]}}, [PIXELS.tobytes()], "contents twice"),
        ({"contents": {"uint_contents": [256] * PIXELS.size}}, [], "from 0 to 255"),
        ({"contents": {"fp32_contents": [1] * PIXELS.size}}, [], "but 0 came"),
        ({"shape": [2**63 - 1, *PIXELS.shape]}, [b""], "from 1 to 32"),
        ({"shape": [-1, *PIXELS.shape]}, [b""], "from 1 to 32"),
        ({"shape": [1] * 100_000}, [b""], "has the shape"),
        (
            {"name": "image_bytes", "datatype": "BYTES", "shape": [1]},
            [b"\xff\xff\xff\xff"],
            "no BYTES tensor",
        ),
        ({"name": "image_bytes", "datatype": "BYTES", "shape": [1]}, [b"\0\0\0\0"], "picture is empty"),
    ],
)
def test_what_is_malformed_is_refused_with_a_sentence(
    server: Running, call: Callable[..., Caller], changes: dict[str, Any], raw: list[bytes], says: str
) -> None:
    request = asking(**changes)
    request.ClearField("raw_input_contents")
    request.raw_input_contents.extend(raw)

    assert_refused(lambda: call(server).infer(request), grpc.StatusCode.INVALID_ARGUMENT, says)


@pytest.mark.parametrize("method", ["ModelInfer", "ModelReady", "ModelMetadata", "ServerLive"])
def test_a_message_of_a_myriad_of_fields_is_refused_before_it_is_built(
    server: Running, call: Callable[..., Caller], method: str
) -> None:
    assert_refused(
        lambda: call(server).method(method)(b"\x2a\0" * 1_000_000),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "more than 1000 fields",
    )


def test_lists_of_more_numbers_than_allowed_are_refused(
    launch: Launcher, call: Callable[..., Caller]
) -> None:
    request = asking(contents={"uint_contents": [0] * PIXELS.size})
    request.ClearField("raw_input_contents")
    n_numbers = PIXELS.size + len(SHAPE)
    assert call(launch(grpc_port=0, max_values=n_numbers)).infer(request).model_name == "toy"

    assert_refused(
        lambda: call(launch(grpc_port=0, max_values=n_numbers - 1)).infer(request),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "raw_input_contents",
    )


@given(body=st.binary(max_size=200))
def test_garbage_for_a_message_is_refused_and_harms_nobody(server: Running, body: bytes) -> None:
    caller = Caller(server)
    with caller.channel, pytest.raises(grpc.RpcError) as refused:
        caller.method()(body)
    error: Any = refused.value
    assert error.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


def test_garbage_for_a_connection_harms_nobody(server: Running, call: Callable[..., Caller]) -> None:
    chance = random.Random(5)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for begins in (b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + b"\0\0\0\4\0\0\0\0\0"):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.grpc_port)) as connection:
                connection.sendall(begins + chance.randbytes(500))

    assert call(server).infer(asking()).model_name == "toy"


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_that_is_too_large_is_refused(
    launch: Launcher, call: Callable[..., Caller], compression: grpc.Compression
) -> None:
    server = launch(grpc_port=0, max_body_bytes=10_000)

    assert_refused(
        lambda: call(server).infer(asking(name="x" * 10_000), compression=compression),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "larger than max",
    )


def test_metadata_that_is_too_large_is_refused(launch: Launcher, call: Callable[..., Caller]) -> None:
    caller = call(launch(grpc_port=0, max_header_bytes=1000))

    assert_refused(
        lambda: caller.infer(asking(), metadata=[("x", "y" * 1000)]),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "metadata size exceeds",
    )
    assert caller.infer(asking()).model_name == "toy"


def test_a_message_that_does_not_come_is_not_waited_for(
    launch: Launcher, call: Callable[..., Caller]
) -> None:
    server = launch(grpc_port=0, body_timeout_s=0.05)
    caller = call(server)

    def nothing() -> Iterator[bytes]:
        outcomes(server, invalid=1)
        yield b""

    assert_refused(
        lambda: caller.infer_stream(nothing()),
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "did not arrive within 0.05 s",
    )


def test_a_call_without_a_message_is_refused(server: Running, call: Callable[..., Caller]) -> None:
    assert_refused(
        lambda: call(server).infer_stream(iter([])), grpc.StatusCode.INVALID_ARGUMENT, "has no message"
    )


# ---- who may come in ----


def test_a_key_opens_what_it_is_for_and_nothing_else(launch: Launcher, call: Callable[..., Caller]) -> None:
    caller = call(launch(grpc_port=0, api_keys=(HASH,), admin_keys=(ADMIN_HASH,)))
    unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    bearer = [("authorization", f"Bearer {KEY}")]
    admin = [("x-api-key", ADMIN_KEY)]

    assert_refused(lambda: caller.infer(asking()), unauthenticated, "A key is needed")
    assert_refused(lambda: caller.infer(asking(), metadata=admin), denied, "does not open this")
    assert_refused(lambda: caller.method("RepositoryIndex")(b"", metadata=bearer), denied, "does not open")
    assert_refused(lambda: caller.method("RepositoryModelLoad")(b""), unauthenticated, "A key is needed")
    assert_refused(lambda: caller.method("RepositoryModelUnload")(b""), unauthenticated, "A key is needed")
    assert caller.infer(asking(), metadata=bearer).model_name == "toy"
    assert caller.infer(asking(), metadata=[("x-api-key", KEY)]).model_name == "toy"
    assert caller.method("RepositoryIndex")(b"", metadata=admin)
    assert caller.method("ServerMetadata")(b"")


def test_one_who_comes_too_often_is_told_when_to_come_again(
    launch: Launcher, call: Callable[..., Caller]
) -> None:
    server = launch(grpc_port=0, max_requests_per_second=0.001, request_burst=1)
    caller = call(server)
    caller.infer(asking())

    error = assert_refused(
        lambda: caller.infer(asking()), grpc.StatusCode.RESOURCE_EXHAUSTED, "more requests than your share"
    )

    assert int(dict(error.trailing_metadata())["retry-after-ms"]) > 900_000
    assert pb.ServerReadyResponse.FromString(caller.method("ServerReady")(b"")).ready
    assert pb.ServerLiveResponse.FromString(caller.method("ServerLive")(b"")).live


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:5000", "::1"),
        ("ipv6:[2001:db8::7]:5000", "2001:db8::7"),
        ("unix:", ""),
    ],
)
def test_the_address_is_found_in_what_grpc_calls_the_peer(peer: str, address: str) -> None:
    assert _address(peer) == address


# ---- what becomes of it ----


def test_every_problem_has_a_code() -> None:
    elsewhere = {405, 431}  # of HTTP only: methods, heads
    assert {kind.status for kind in kinds()} - elsewhere == set(CODES)


def test_every_call_for_an_answer_is_counted_once(launch: Launcher, call: Callable[..., Caller]) -> None:
    server = launch(grpc_port=0)
    caller = call(server)
    caller.infer(asking())
    for wrong in (asking(0.0), b"garbage"):
        with pytest.raises(grpc.RpcError):
            caller.infer(wrong)
    caller.method("ServerMetadata")(b"")

    outcomes(server, answered=1, invalid=2, failed=0, disconnected=0)
    assert server.metric('anytime_expected_correct_answers_total{outcome="answered"}') == 0.93
    assert server.metric('anytime_answers_total{column="3",stopped_by="deepest"}') == 1
    assert server.metric("anytime_latency_seconds_count") == 1


def test_a_call_that_ends_leaves_nothing_of_its_message_to_the_garbage_collector(
    hung: Running, session: BlockedSession, call: Callable[..., Caller]
) -> None:
    infer, n_bytes = call(hung).method(), 100_000
    good = asking(9000)
    good.id = "i" * n_bytes
    late = asking(0.0)
    late.id = good.id
    with nothing_left_of(Problem, pb.ModelInferRequest, n_bytes=n_bytes):
        for wrong in (late.SerializeToString(), b"\xff" * n_bytes):
            # Not raised: a client's own circles would be found as well.
            assert infer.future(wrong).code() is grpc.StatusCode.INVALID_ARGUMENT
        leaving = infer.future(good.SerializeToString())
        assert session.started.wait(30)
        leaving.cancel()
        outcomes(hung, disconnected=1)
        session.released.set()
        assert infer.future(good.SerializeToString()).code() is grpc.StatusCode.OK
        outcomes(hung, answered=1)


def test_what_cannot_be_had_in_time_is_refused_and_counted(
    launch: Launcher, call: Callable[..., Caller]
) -> None:
    server = launch(grpc_port=0, profile=profile_of(1.0))

    error = assert_refused(
        lambda: call(server).infer(asking(100)), grpc.StatusCode.RESOURCE_EXHAUSTED, "would take"
    )

    assert int(dict(error.trailing_metadata())["retry-after-ms"]) >= 1
    outcomes(server, rejected=1)
    assert server.metric('anytime_rejections_total{reason="budget"}') == 1


def hanging(inference: Inference, session: BlockedSession) -> Inference:
    sessions = dict.fromkeys(toy_artifact.COLUMNS, session)
    return Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64)


@pytest.fixture
def hung(launch: Launcher, session: BlockedSession, inference: Inference) -> Running:
    """A server whose every run waits for `session.released`."""
    return launch(inference=hanging(inference, session), grpc_port=0)


def test_one_who_cancels_is_not_refined_and_harms_nobody(
    hung: Running, session: BlockedSession, call: Callable[..., Caller]
) -> None:
    caller = call(hung)
    running = caller.method().future(asking(9000).SerializeToString())
    assert session.started.wait(30)
    waiting = caller.method().future(asking(9000).SerializeToString())
    hung.wait_for("anytime_queue_length", 1)
    waiting.cancel()
    hung.wait_for("anytime_queue_length", 0)
    running.cancel()
    outcomes(hung, disconnected=2)
    other = caller.method().future(asking(9000).SerializeToString())
    hung.wait_for("anytime_queue_length", 1)
    session.released.set()

    told = pb.ModelInferResponse.FromString(other.result(30)).parameters
    assert told["columns_run"].string_param == "1,2,3"
    assert session.n_images == [1, 1, 1, 1]  # one run for who cancelled, three for the other


def test_a_deadline_that_passes_ends_the_call(
    hung: Running, session: BlockedSession, call: Callable[..., Caller]
) -> None:
    caller = call(hung)
    running = caller.method().future(asking(None).SerializeToString(), timeout=1)
    assert session.started.wait(30)
    waiting = caller.method().future(asking(None).SerializeToString(), timeout=1)
    for late in (running, waiting):
        assert_refused(late.result, grpc.StatusCode.DEADLINE_EXCEEDED, "")
    ended = ('anytime_requests_total{outcome="disconnected"}', 'anytime_requests_total{outcome="expired"}')
    while sum(map(hung.metric, ended)) < 2:  # who says so first, the caller's library or the engine, is open
        pass
    session.released.set()

    assert caller.infer(asking(9000)).model_name == "toy"
    assert session.n_images == [1, 1, 1, 1]  # one run for who is gone, three for the other


def test_more_open_calls_than_allowed_are_refused_but_health_is_not(
    launch: Launcher, inference: Inference, session: BlockedSession, call: Callable[..., Caller]
) -> None:
    server = launch(inference=hanging(inference, session), grpc_port=0, max_open_requests=1)
    caller = call(server)
    first = caller.method().future(asking(9000).SerializeToString())
    assert session.started.wait(30)

    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_refused(lambda: caller.infer(asking()), exhausted, "1 requests are open")

    assert pb.ServerLiveResponse.FromString(caller.method("ServerLive")(b"")).live
    session.released.set()
    first.result(30)
    outcomes(server, answered=1, rejected=1)
    assert caller.infer(asking()).model_name == "toy"


def test_the_room_for_bodies_is_taken_and_given_back(
    hung: Running, session: BlockedSession, call: Callable[..., Caller]
) -> None:
    assert hung.service._room.take(256 << 20)  # all of it, as if other bodies had come

    assert_refused(
        lambda: call(hung).infer(asking()), grpc.StatusCode.RESOURCE_EXHAUSTED, "bodies of other requests"
    )

    hung.service._room.give_back(256 << 20)
    session.released.set()
    assert call(hung).infer(asking()).model_name == "toy"
    outcomes(hung, answered=1, rejected=1)
    assert hung.service._room.take(256 << 20)


def test_stopping_settles_everyone(
    hung: Running, session: BlockedSession, call: Callable[..., Caller]
) -> None:
    running = call(hung).method().future(asking(9000).SerializeToString())
    assert session.started.wait(30)
    waiting = call(hung).method().future(asking(9000).SerializeToString())
    hung.wait_for("anytime_queue_length", 1)
    draining = asyncio.run_coroutine_threadsafe(hung.service.drain(), hung.loop)
    assert_refused(lambda: waiting.result(30), grpc.StatusCode.UNAVAILABLE, "stopping")
    assert_refused(lambda: call(hung).infer(asking()), grpc.StatusCode.UNAVAILABLE, "")
    assert not pb.ServerReadyResponse.FromString(call(hung).method("ServerReady")(b"")).ready
    session.released.set()
    draining.result(30)

    told = pb.ModelInferResponse.FromString(running.result(30)).parameters
    assert told["columns_run"].string_param == "1"


# ---- where it listens ----


def test_a_taken_port_is_one_sentence(server: Running) -> None:
    chosen = Settings(_env_file=None, profile_cache=None, grpc_port=server.grpc_port)
    grpc_server = GrpcServer(
        chosen, server.repository, Access(chosen), Room(1), Journal(server.repository.metrics), Turns()
    )

    with pytest.raises(SettingsError, match="ANYTIME_GRPC_PORT"):
        asyncio.run(grpc_server.start())


def test_the_event_loop_s_turns_are_told_of_a_call(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, turns, noted_s = Settings(_env_file=None, profile_cache=None), Turns(), list[float]()

    def mark(now_s: float) -> float:
        noted_s.append(now_s)
        return 0.0

    monkeypatch.setattr(turns, "mark", mark)
    journal = Journal(server.repository.metrics)
    calls = _Calls(chosen, server.repository, Access(chosen), Room(1), journal, turns, lambda: 5.0)
    details = SimpleNamespace(method="unknown", invocation_metadata=())
    assert calls.service(cast("grpc.HandlerCallDetails", details)) is None
    assert noted_s == [5.0]


@pytest.mark.parametrize("worked_s", [LEAST_WAIT_S, 1.1 * LEAST_WAIT_S])
def test_a_call_that_found_the_loop_at_work_is_known_as_such(
    server: Running, monkeypatch: pytest.MonkeyPatch, worked_s: float
) -> None:
    chosen, turns, journal = Settings(_env_file=None), Turns(), Journal(server.repository.metrics)
    monkeypatch.setattr(turns, "mark", lambda _: worked_s)
    calls = _Calls(chosen, server.repository, Access(chosen), Room(1), journal, turns, lambda: 5.0)
    details: Any = SimpleNamespace(method=f"{SERVICE}ServerLive", invocation_metadata=())
    handler: Any = calls.service(details)
    _, record, _ = handler.stream_unary.args
    assert record.has_waited == (worked_s > LEAST_WAIT_S)


def test_without_grpc_nothing_of_it_is_imported() -> None:
    script = "import sys, service.serving; sys.exit('grpc' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_it_is_secured_as_http_is(launch: Launcher, call: Callable[..., Caller], tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    server = launch(grpc_port=0, tls_certificate=certificate, tls_key=key)
    trusting = grpc.ssl_channel_credentials(certificate.read_bytes())

    assert pb.ServerLiveResponse.FromString(call(server, trusting).method("ServerLive")(b"")).live
    assert_refused(lambda: call(server).method("ServerLive")(b""), grpc.StatusCode.UNAVAILABLE, "")


def test_an_encrypted_key_is_refused_with_a_sentence(server: Running, tmp_path: Path) -> None:
    chosen = Settings(
        _env_file=None,
        profile_cache=None,
        grpc_port=0,
        tls_certificate=tmp_path / "certificate.pem",
        tls_key=tmp_path / "key.pem",
        tls_key_password=SecretStr("secret"),
    )
    grpc_server = GrpcServer(
        chosen, server.repository, Access(chosen), Room(1), Journal(server.repository.metrics), Turns()
    )

    with pytest.raises(SettingsError, match="cannot open an encrypted key"):
        asyncio.run(grpc_server.start())
