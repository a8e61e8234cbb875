"""The Open Inference Protocol as translation: what is sent is understood, or refused with a sentence."""

import base64
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service import oip
from service.engine import InferenceThread, Served
from service.errors import Malformed, OutOfRange, Problem, TooLarge
from service.inference import Inference, Manifest, read_manifest
from service.models import Asked, Model
from service.oip import OutputTensor, RequestedOutput
from service.record import Answer
from service.settings import Settings
from tests.service import toy_artifact
from tests.service.conftest import profile_of

SHAPE = (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3)
PIXELS = np.random.default_rng(3).integers(0, 256, (2, *SHAPE), np.uint8)
SETTINGS = Settings(_env_file=None, profile_cache=None, max_images_per_request=3)


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return read_manifest(artifact)[0]


def body(without: str = "", /, **changes: Any) -> bytes:
    """A request's JSON for two pictures with one thing changed in its input."""
    one = {"name": "image", "datatype": "UINT8", "shape": [2, *SHAPE], "data": PIXELS.tolist()} | changes
    return orjson.dumps({"inputs": [{name: value for name, value in one.items() if name != without}]})


def binary_body(n_bytes: object, **changes: Any) -> bytes:
    return body("data", parameters={"binary_data_size": n_bytes}, **changes)


def encoded(elements: list[bytes]) -> bytes:
    """A BYTES tensor, as the protocol describes it."""
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def arrays(request: oip.InferRequest) -> NDArray[np.uint8]:
    return np.stack([picture for picture in request.pictures if not isinstance(picture, bytes)])


# ---- what comes in ----


@pytest.mark.parametrize("data", [PIXELS.tolist(), PIXELS.ravel().tolist()], ids=["nested", "flat"])
def test_pixels_in_json_are_the_pixels_that_were_sent(manifest: Manifest, data: list[Any]) -> None:
    assert np.array_equal(arrays(oip.read_json(manifest, SETTINGS, body(data=data), b"")), PIXELS)


def test_binary_pixels_are_the_pixels_that_were_sent(manifest: Manifest) -> None:
    request = oip.read_json(manifest, SETTINGS, binary_body(PIXELS.size), PIXELS.tobytes())

    assert np.array_equal(arrays(request), PIXELS)


@pytest.mark.parametrize("name", ["image", "image_bytes"])
@given(elements=st.lists(st.binary(max_size=20), min_size=1, max_size=3))
def test_files_are_the_bytes_that_were_sent(manifest: Manifest, name: str, elements: list[bytes]) -> None:
    tensor: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": [len(elements)]}
    raw = encoded(elements)
    texts = [base64.b64encode(element).decode() for element in elements]

    for header, binary in ((binary_body(len(raw), **tensor), raw), (body(data=texts, **tensor), b"")):
        request = oip.read_json(manifest, SETTINGS, header, binary)

        assert request.pictures == tuple(elements)


@given(raw=st.binary(max_size=40), n=st.integers(1, 3))
def test_any_bytes_are_either_a_bytes_tensor_or_refused(manifest: Manifest, raw: bytes, n: int) -> None:
    tensor = oip.tensor(manifest, SETTINGS, "image_bytes", "BYTES", [n])
    try:
        pictures = oip.pictures(tensor, raw)
    except Malformed:
        return

    assert len(pictures) == n
    assert encoded([picture for picture in pictures if isinstance(picture, bytes)]) == raw


LONG = (2**32 - 1).to_bytes(4, "little")
FILE: dict[str, Any] = {"name": "image_bytes", "datatype": "BYTES", "shape": [1]}
INPUT = {"name": "image", "datatype": "UINT8", "shape": [2, *SHAPE], "data": PIXELS.tolist()}


@pytest.mark.parametrize(
    ("header", "binary", "says"),
    [
        (b"", b"", "no JSON"),
        (b"[]", b"", "must be an object"),
        (b'{"inputs": [{"shape": [NaN]}]}', b"", "no JSON"),
        (b"[" * 100_000, b"", "no JSON"),
        (b"{}", b"", "0 inputs came"),
        (b'{"inputs": {}}', b"", "`inputs` must be a list"),
        (b'{"inputs": [1]}', b"", "`inputs` must be a list"),
        (orjson.dumps({"inputs": [INPUT, INPUT]}), b"", "2 inputs came"),
        (orjson.dumps({"inputs": [INPUT], "id": 5}), b"", "`id` must be a string"),
        (orjson.dumps({"inputs": [INPUT], "parameters": []}), b"", "`parameters` of the request"),
        (
            orjson.dumps({"inputs": [INPUT], "outputs": [{"name": "label", "parameters": 1}]}),
            b"",
            "an output",
        ),
        (orjson.dumps({"inputs": [INPUT], "outputs": "label"}), b"", "`outputs` must be a list"),
        (body(name="picture"), b"", "no input 'picture'"),
        (body(name=None), b"", "`name` and a `datatype`"),
        (body("datatype"), b"", "`name` and a `datatype`"),
        (body(datatype="FP32"), b"", "UINT8 or BYTES, not 'FP32'"),
        (body(name="image_bytes"), b"", "`image_bytes` is BYTES"),
        (body(shape=None), b"", "must be a list of whole numbers"),
        (body(shape=[2.0, *SHAPE]), b"", "must be a list of whole numbers"),
        (body(shape=[True, *SHAPE]), b"", "must be a list of whole numbers"),
        (body(shape=[2, 8, 9, 3]), b"", "has the shape [-1, 8, 8, 3]"),
        (body(shape=[-2, -8, 8, 3]), b"", "has the shape [-1, 8, 8, 3]"),
        (body(shape=SHAPE), b"", "has the shape [-1, 8, 8, 3]"),
        (body(shape=[]), b"", "has the shape [-1, 8, 8, 3]"),
        (body(shape=[2, *SHAPE, *[1] * 100_000]), b"", "has the shape [-1, 8, 8, 3]"),
        (body(shape=[1, *SHAPE]), b"", "nested as its shape"),
        (body(data=PIXELS.ravel().tolist()[:-1]), b"", "has 384 elements, but 383 came"),
        (body(data=[PIXELS[0].tolist(), PIXELS[1, 1:].tolist()]), b"", "nested as its shape"),
        (body(data=7), b"", "must be a flat list"),
        (body(data=[256] * PIXELS.size), b"", "from 0 to 255"),
        (body(data=[-1] * PIXELS.size), b"", "from 0 to 255"),
        (body(data=[2**63] * PIXELS.size), b"", "from 0 to 255"),
        (body(data=[1.0] * PIXELS.size), b"", "must be whole numbers"),
        (body(data=["1"] * PIXELS.size), b"", "must be whole numbers"),
        (body(data=[True] * PIXELS.size), b"", "must be whole numbers"),
        (body(data=[None] * PIXELS.size), b"", "must be whole numbers"),
        (body("data"), b"", "either `data` or"),
        (body(parameters={"binary_data_size": 384}), PIXELS.tobytes(), "either `data` or"),
        (body("data", parameters={"shared_memory_region": "mine"}), b"", "shared memory is not"),
        (body(), b"1", "but 1 bytes follow"),
        (binary_body(384), PIXELS.tobytes()[1:], "but 383 bytes follow"),
        (binary_body(383), PIXELS.tobytes()[1:], "has 384 elements, but 383 came"),
        (binary_body(384.0), PIXELS.tobytes(), "binary_data_size"),
        (binary_body(True), b"1", "binary_data_size"),
        (binary_body(-1), b"", "binary_data_size"),
        (binary_body("384"), PIXELS.tobytes(), "binary_data_size"),
        (binary_body(4, **FILE), LONG, "no BYTES tensor of 1 elements"),
        (binary_body(8, **FILE), encoded([b"", b""]), "no BYTES tensor of 1 elements"),
        (binary_body(5, **FILE), encoded([b""]) + b"1", "no BYTES tensor of 1 elements"),
        (binary_body(3, **FILE), b"\0\0\0", "no BYTES tensor of 1 elements"),
        (binary_body(0, **FILE), b"", "no BYTES tensor of 1 elements"),
        (body(**FILE, data=["ÿ"]), b"", "base64 of each file"),
        (body(**FILE, data=["YQ"]), b"", "base64 of each file"),
        (body(**FILE, data=["YQ==!"]), b"", "base64 of each file"),
        (body(**FILE, data=[1]), b"", "base64 of each file"),
        (body(**FILE, data=[{}]), b"", "base64 of each file"),
        (body(**FILE, data=["YQ==", "YQ=="]), b"", "has 1 elements, but 2 came"),
        (body(**FILE | {"shape": [1, 1]}, data=[["YQ=="]]), b"", "has the shape [-1]"),
    ],
)
def test_what_is_malformed_is_refused_with_a_sentence(
    manifest: Manifest, header: bytes, binary: bytes, says: str
) -> None:
    with pytest.raises(Malformed) as refused:
        oip.read_json(manifest, SETTINGS, header, binary)

    assert says in refused.value.detail
    assert len(refused.value.detail) < 300


@pytest.mark.parametrize("inner", [b"[]", b"{}", b"7", b'"x"', b'{"x":1}'])
def test_json_of_more_values_than_allowed_is_refused_before_it_is_parsed(
    manifest: Manifest, inner: bytes
) -> None:
    header = body(data=[]).replace(b'"data":[]', b'"data":[%b]' % b",".join([inner] * 500_000))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="more than 262144 values: send pixels as a binary tensor"):
            oip.read_json(manifest, SETTINGS, header, b"")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_as_many_pictures_as_allowed_fit_as_json(manifest: Manifest) -> None:
    """Of the size of the network that ships, nested as their shape says."""
    chosen = Settings(_env_file=None, profile_cache=None)
    shape = [chosen.max_images_per_request, 32, 32, 3]
    data = np.full(shape, 255).tolist()
    header = orjson.dumps({"inputs": [{"name": "image", "datatype": "UINT8", "shape": shape, "data": data}]})
    large = manifest.model_copy(
        update={"input": manifest.input.model_copy(update={"height": 32, "width": 32})}
    )

    assert len(oip.read_json(large, chosen, header, b"").pictures) == 32


def with_parameters(**parameters: Any) -> bytes:
    return orjson.dumps({"inputs": [INPUT], "parameters": parameters})


def with_output(name: object, **parameters: Any) -> bytes:
    return orjson.dumps({"inputs": [INPUT], "outputs": [{"name": name, "parameters": parameters}]})


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (body(shape=[0, *SHAPE], data=[]), "from 1 to 3"),
        (body(shape=[4, *SHAPE]), "from 1 to 3"),
        (body(shape=[-2, *SHAPE]), "from 1 to 3"),
        (body(shape=[2**63 - 1, *SHAPE]), "from 1 to 3"),
        (with_parameters(budget_ms=0.05), "budget_ms must be a number from 0.1 to 10000"),
        (with_parameters(budget_ms=10_001), "budget_ms"),
        (with_parameters(budget_ms="nan"), "budget_ms"),
        (with_parameters(budget_ms="soon"), "budget_ms"),
        (with_parameters(budget_ms="5" + "." + "0" * 400), "budget_ms"),
        (with_parameters(budget_ms=True), "budget_ms"),
        (with_parameters(budget_ms=None), "budget_ms"),
        (with_parameters(budget_ms=[5]), "budget_ms"),
        (with_parameters(timeout=-1), "timeout"),
        (with_parameters(timeout="soon"), "timeout"),
        (with_parameters(min_confidence=1.1), "min_confidence"),
        (with_parameters(binary_data_output=1), "binary_data_output must be true or false"),
        (with_output("labels"), "no output 'labels'"),
        (with_output(None), "no output 'None'"),
        (with_output("label", binary_data="no"), "binary_data must be true or false"),
        (with_output("label", classification=1), "only for the output probabilities"),
        (with_output("probabilities", classification=6), "from 1 to 5"),
        (with_output("probabilities", classification=-1), "from 1 to 5"),
        (with_output("probabilities", classification=True), "from 1 to 5"),
        (with_output("probabilities", classification=2.0), "from 1 to 5"),
        (orjson.dumps({"inputs": [INPUT], "outputs": [{"name": "label"}] * 2}), "named twice"),
    ],
)
def test_what_is_out_of_range_is_refused_with_a_sentence(
    manifest: Manifest, header: bytes, says: str
) -> None:
    with pytest.raises(OutOfRange) as refused:
        oip.read_json(manifest, SETTINGS, header, b"")

    assert says in refused.value.detail


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner))
FULL = {
    "id": "mine",
    "parameters": {"budget_ms": 5, "min_confidence": 0.5, "timeout": 5, "binary_data_output": True},
    "inputs": [{**FILE, "parameters": {"binary_data_size": 5}, "data": ["YQ=="]}],
    "outputs": [{"name": "probabilities", "parameters": {"binary_data": True, "classification": 1}}],
}


def paths(value: Any) -> Iterator[tuple[Any, ...]]:
    """Every place in a document."""
    yield ()
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from ((key, *path) for path in paths(part))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


@given(path=st.sampled_from([*paths(FULL)]), by=VALUES, binary=st.sampled_from([b"", encoded([b"a"])]))
def test_any_json_is_either_a_request_or_a_problem(
    manifest: Manifest, path: tuple[Any, ...], by: Any, binary: bytes
) -> None:
    try:
        request = oip.read_json(manifest, SETTINGS, orjson.dumps(replaced(FULL, path, by)), binary)
    except Problem as problem:
        assert problem.status in {400, 422}  # noqa: PT017 - most are none
    else:
        assert request.pictures


@pytest.mark.parametrize(
    ("shape", "contents"),
    [([3], LONG * 3), ([2**62], b""), ([3, *SHAPE], b""), ([2**62, *SHAPE], b"")],
)
def test_a_claim_takes_no_memory(manifest: Manifest, shape: list[int], contents: bytes) -> None:
    datatype = "BYTES" if len(shape) == 1 else "UINT8"
    tracemalloc.start()
    try:
        with pytest.raises(Problem):
            oip.pictures(oip.tensor(manifest, SETTINGS, "image", datatype, shape), contents)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("length", "parts"),
    [(None, (b"{}1", b"")), ("2", (b"{}", b"1")), ("3", (b"{}1", b"")), ("0", (b"", b"{}1"))],
)
def test_a_body_is_split_where_its_header_says(length: str | None, parts: tuple[bytes, bytes]) -> None:
    assert oip.split(b"{}1", length) == parts


@pytest.mark.parametrize("length", ["4", "-1", "", "two", "1.0", "0x1", "²", "9" * 5000])
def test_a_body_is_split_nowhere_else(length: str) -> None:
    with pytest.raises(Malformed, match="Inference-Header-Content-Length"):
        oip.split(b"{}1", length)


@pytest.mark.parametrize(
    ("parameters", "left_s", "budget_s"),
    [
        ({}, None, 0.05),
        ({"budget_ms": 5}, None, 0.005),
        ({"budget_ms": "5.5"}, None, 0.0055),
        ({"timeout": 7000}, None, 0.007),
        ({"timeout": "7000"}, None, 0.007),
        ({"timeout": 60_000_000}, None, 10.0),  # patience is no error
        ({"timeout": 0}, None, 0.05),  # Triton's word for none
        ({"budget_ms": 5, "timeout": 7000}, None, 0.005),
        ({}, 0.2, 0.2),
        ({}, 60.0, 10.0),
        ({"budget_ms": 5}, 0.2, 0.005),
        ({"budget_ms": 5}, 0.002, 0.002),
        ({"timeout": 7000}, 0.002, 0.002),
        ({"timeout": 0}, 0.2, 0.2),
        ({}, -0.1, 0.0),
    ],
)
def test_the_budget_is_what_the_caller_says_and_never_more_than_its_deadline(
    parameters: dict[str, Any], left_s: float | None, budget_s: float
) -> None:
    asked = oip.asked(SETTINGS, parameters) if left_s is None else oip.asked(SETTINGS, parameters, left_s)

    assert asked == Asked(budget_s)


def test_what_triton_s_clients_send_beside_it_is_ignored() -> None:
    parameters = {"priority": 1, "sequence_id": 3, "sequence_start": True, "min_confidence": "0.5"}

    assert oip.asked(SETTINGS, parameters) == Asked(0.05, min_confidence=0.5)


def test_outputs_are_those_that_were_asked_for_as_they_were_asked_for(manifest: Manifest) -> None:
    document = {
        "inputs": [INPUT],
        "parameters": {"binary_data_output": True},
        "outputs": [
            {"name": "label", "parameters": {"binary_data": False}},
            {"name": "probabilities", "parameters": {"classification": 2}},
        ],
    }

    request = oip.read_json(manifest, SETTINGS, orjson.dumps(document), b"")

    assert request.outputs == (RequestedOutput("label"), RequestedOutput("probabilities", True, 2))
    everything = oip.read_json(manifest, SETTINGS, body(), b"").outputs
    assert everything == tuple(RequestedOutput(name) for name in oip.OUTPUTS)


# ---- what goes out ----


@pytest.fixture
def model(inference: Inference) -> Iterator[Model]:
    model = Model(SETTINGS, inference, InferenceThread(inference), profile_of(1e-5), clock=lambda: 10.004)
    yield model
    model.close()


def answer(columns_run: tuple[str, ...], *probabilities: float, queue_s: float = 0.001) -> Answer:
    served = Served(
        outcome="answered",
        arrived_s=10.0,
        deadline_s=10.005,
        entered_s=10.001,
        settled_s=10.003,
        queue_s=queue_s,
        inference_s=0.002,
        columns_run=columns_run,
        probabilities_K=np.array(probabilities, np.float32),
        stopped_by="deepest",
    )
    return Answer(served, 0.0005)


ANSWERS = (
    answer(("1", "3"), 0.1, 0.6, 0.1, 0.1, 0.1, queue_s=0.0),
    answer(("1", "2"), 0.1, 0.1, 0.2, 0.2, 0.4),
)


def asking(*outputs: RequestedOutput) -> oip.InferRequest:
    return oip.InferRequest("mine", (b"", b""), Asked(0.005), outputs)


def test_an_answer_in_json_is_the_answers_in_their_order(model: Model) -> None:
    request = asking(*(RequestedOutput(name) for name in oip.OUTPUTS))

    document, binary = oip.write_json(model, request, ANSWERS)

    found = orjson.loads(document)
    assert (found["model_name"], found["model_version"], found["id"], binary) == ("toy", "7", "mine", b"")
    outputs = [(one["name"], one["datatype"], one["shape"], one["data"]) for one in found["outputs"]]
    assert outputs == [
        ("probabilities", "FP32", [2, 5], [0.1, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.4]),
        ("label", "BYTES", [2], ["bee", "elk"]),
        ("confidence", "FP32", [2], [0.6, 0.4]),
        ("column", "BYTES", [2], ["3", "2"]),
        ("columns_run", "BYTES", [2], ["1,3", "1,2"]),
    ]


def test_a_binary_answer_is_cut_where_its_json_says(model: Model) -> None:
    request = asking(
        RequestedOutput("label", is_binary=True),
        RequestedOutput("column"),
        RequestedOutput("probabilities", is_binary=True),
    )

    document, binary = oip.write_json(model, request, ANSWERS)

    label, column, probabilities = orjson.loads(document)["outputs"]
    n_bytes = label["parameters"]["binary_data_size"]
    assert binary[:n_bytes] == encoded([b"bee", b"elk"])
    assert column["data"] == ["3", "2"]
    assert probabilities["parameters"] == {"binary_data_size": len(binary) - n_bytes}
    assert np.frombuffer(binary[n_bytes:], "<f4").tolist() == pytest.approx(
        [0.1, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.4]
    )


def test_classification_gives_the_likeliest_classes_first(model: Model) -> None:
    request = asking(RequestedOutput("probabilities", n_classes=2))

    (tensor,) = oip.output_tensors(model, request, ANSWERS)

    assert (tensor.datatype, tensor.shape) == ("BYTES", (2, 2))
    assert tensor.values == ["0.600000:1:bee", "0.100000:0:ant", "0.400000:4:elk", "0.200000:2:cat"]


def test_the_parameters_of_several_answers_are_those_of_the_shallowest(model: Model) -> None:
    document, _ = oip.write_json(model, asking(RequestedOutput("label")), ANSWERS)

    assert orjson.loads(document)["parameters"] == {
        "label": "elk",
        "index": 4,
        "confidence": pytest.approx(0.4),
        "column": "2",
        "depth": 8,
        "columns_run": "1,2",
        "stopped_by": "deepest",
        "budget_ms": 5.0,
        "elapsed_ms": 4.0,
        "deadline_met": True,
        "decode_ms": 0.5,
        "queue_ms": 1.0,
        "inference_ms": 2.0,
    }


@given(texts=st.lists(st.text()))
def test_text_goes_out_as_it_would_come_in(texts: list[str]) -> None:
    raw = OutputTensor("label", "BYTES", (len(texts),), texts).raw()

    assert raw == encoded([text.encode() for text in texts])


def test_metadata_describes_the_tensors(model: Model) -> None:
    described = oip.model_metadata(model, ["6", "7"])

    assert (described["name"], described["versions"]) == ("toy", ["6", "7"])
    assert described["inputs"] == [
        {"name": "image", "datatype": "UINT8", "shape": [-1, *SHAPE]},
        {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
    ]
    assert [(one["name"], one["shape"]) for one in described["outputs"]] == [
        ("probabilities", [-1, 5]),
        ("label", [-1]),
        ("confidence", [-1]),
        ("column", [-1]),
        ("columns_run", [-1]),
    ]
