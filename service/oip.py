"""The Open Inference Protocol v2 in this server's words: tensors and parameters come in, and go out.

Must not know of HTTP or gRPC, and waits for nothing. No memory is taken for what a request claims before the
claim is compared with what came.

Source: https://github.com/kserve/open-inference-protocol; for binary tensors, BYTES, `timeout` and
classification the extensions in https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

import service
from service import decoding
from service.errors import Malformed, OutOfRange
from service.inference import Manifest
from service.models import Asked, Model, number
from service.record import Answer
from service.settings import Settings

Parameters = Mapping[str, Any]
"""Scalars by name, as a caller gave them: of any type."""

INPUTS: Mapping[str, tuple[str, ...]] = {"image": ("UINT8", "BYTES"), "image_bytes": ("BYTES",)}
"""The inputs there are, each with the datatypes that it takes. A request has one of them."""

OUTPUTS: Mapping[str, str] = {
    "probabilities": "FP32",
    "label": "BYTES",
    "confidence": "FP32",
    "column": "BYTES",
    "columns_run": "BYTES",
}
"""The outputs there are, each with its datatype."""

PARAMETERS = ("budget_ms", "timeout", "min_confidence")
"""Those of a request that mean something here. Others are ignored, as Triton does."""

LOAD_PARAMETERS: Mapping[str, type] = {"version": str, "keep_others": bool}
UNLOAD_PARAMETERS: Mapping[str, type] = {"version": str, "unload_dependents": bool}
"""Those of the model repository; nothing depends on a model here."""

PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository", "parameters")

MAX_AXES = 4
"""No input has more."""

MAX_TIMEOUT_US = 2**63
"""Whatever a client's library can say: it is a bound of patience, and is cut to the largest budget."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input that the model takes, but for its contents, which come after."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the caller wants, and how.

    With `n_classes` it is the likeliest classes instead, each as text: `probability:index:label`.
    """

    name: str
    is_binary: bool = False
    n_classes: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What a caller wants: each picture is an encoded file, or image_HWC of the network's size."""

    id: str
    pictures: tuple[bytes | NDArray[np.uint8], ...]
    asked: Asked
    outputs: tuple[RequestedOutput, ...]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """An output as it goes: FP32 as an array, BYTES as a list of texts, row by row."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[np.float32] | list[str]

    def raw(self) -> bytes:
        """Its bytes, little-endian; of BYTES each element with its length before it."""
        if isinstance(self.values, list):
            texts = [text.encode() for text in self.values]
            return b"".join([len(text).to_bytes(4, "little") + text for text in texts])
        return self.values.astype("<f4").tobytes()


# ---- what comes in ----


def split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """The JSON and the binary part of an HTTP body.

    Args:
        body: Both.
        header_length: The header `Inference-Header-Content-Length`; None if there is none: all is JSON.

    Raises:
        Malformed: it is no number, or more than there is.
    """
    if header_length is None:
        return body, b""
    is_number = header_length.isascii() and header_length.isdigit() and len(header_length) < 20
    if not is_number or int(header_length) > len(body):
        raise Malformed(
            f"Inference-Header-Content-Length is {header_length[:40]!r} and the body has {len(body)} bytes: "
            "give the length of the JSON that it begins with."
        )
    return body[: int(header_length)], body[int(header_length) :]


def read_json(manifest: Manifest, settings: Settings, header: bytes, binary: bytes) -> InferRequest:
    """Read a request's JSON and the binary part that follows it.

    Raises:
        Malformed: it is none, or its input is not what it says or not what the model takes.
        TooLarge: it has more values than the setting `max_values`.
        OutOfRange: a parameter, an output or the number of pictures.

    Cost: some 10 ns for each byte of pixels, 5 of files.
    """
    document = _loaded(header, settings.max_values)
    request_id = document.get("id", "")
    if not isinstance(request_id, str):
        raise Malformed("`id` must be a string.")
    parameters = _parameters(document, "the request")
    is_binary = _flag(parameters, "binary_data_output", is_set=False)
    inputs = _objects(document, "inputs")
    check_one_input(len(inputs))
    tensor, contents = _json_tensor(manifest, settings, inputs[0], binary)
    named = [(one.get("name"), _parameters(one, "an output")) for one in _objects(document, "outputs")]
    return InferRequest(
        id=request_id,
        pictures=pictures(tensor, contents),
        asked=asked(settings, parameters),
        outputs=requested(manifest, named, is_binary=is_binary),
    )


def check_one_input(n_inputs: int) -> None:
    """Have exactly one input, whichever it is.

    Raises:
        Malformed: there are none, or several.
    """
    if n_inputs != 1:
        raise Malformed(
            f"{n_inputs} inputs came where one is needed: send `image` (pixels) or `image_bytes` (files); "
            "several pictures are one tensor."
        )


def tensor(manifest: Manifest, settings: Settings, name: str, datatype: str, shape: Sequence[int]) -> Tensor:
    """The input that a caller means.

    Raises:
        Malformed: the model has none of that name, datatype and shape.
        OutOfRange: more pictures than the setting `max_images_per_request`, or none.
    """
    if name not in INPUTS:
        raise Malformed(f"There is no input {name[:40]!r}: send `image` (pixels) or `image_bytes` (files).")
    if datatype not in INPUTS[name]:
        raise Malformed(f"`{name}` is {' or '.join(INPUTS[name])}, not {datatype[:40]!r}.")
    one = [manifest.input.height, manifest.input.width, 3] if datatype == "UINT8" else []
    found = list(shape[: MAX_AXES + 1])
    if not found or found[1:] != one:
        raise Malformed(f"`{name}` as {datatype} has the shape {[-1, *one]}, not {found}.")
    n, most = found[0], settings.max_images_per_request
    if not 1 <= n <= most:
        raise OutOfRange(f"`{name}` has {n} pictures: a request may have from 1 to {most}.")
    return Tensor(name, datatype, (n, *one))


def pictures(tensor: Tensor, contents: bytes | Sequence[Any]) -> tuple[bytes | NDArray[np.uint8], ...]:
    """The pictures in an input.

    Args:
        tensor: The input.
        contents: Its bytes; or its elements row by row: numbers, or for BYTES the bytes of each.

    Raises:
        Malformed: there are more or fewer than the shape says, or other ones than the datatype says.
    """
    if tensor.datatype == "UINT8":
        return tuple(_pixels(tensor, contents))
    if isinstance(contents, bytes):
        return tuple(_elements(tensor, contents))
    _check_number(tensor, contents)
    return tuple(contents)


def _pixels(tensor: Tensor, contents: bytes | Sequence[Any]) -> NDArray[np.uint8]:
    _check_number(tensor, contents)
    if not isinstance(contents, bytes):
        try:
            contents = bytes(contents)
        except (TypeError, ValueError) as error:
            raise Malformed(f"`{tensor.name}` is UINT8: send whole numbers from 0 to 255.") from error
    return np.frombuffer(contents, np.uint8).reshape(tensor.shape)


def _check_number(tensor: Tensor, contents: Sequence[Any]) -> None:
    if len(contents) != math.prod(tensor.shape):
        raise Malformed(
            f"`{tensor.name}` of shape {list(tensor.shape)} has {math.prod(tensor.shape)} elements, but "
            f"{len(contents)} came."
        )


def _elements(tensor: Tensor, contents: bytes) -> list[bytes]:
    """The elements of a BYTES tensor, each of which has its length before it: 4 bytes, little-endian."""
    elements, at = [], 0
    for _ in range(tensor.shape[0]):
        start = at + 4
        at = start + int.from_bytes(contents[at:start], "little")
        elements.append(contents[start:at])  # whatever is claimed, no more than there is
    if at != len(contents):
        raise Malformed(
            f"`{tensor.name}` is no BYTES tensor of {tensor.shape[0]} elements: write before each its length "
            "in 4 bytes, lowest first, and nothing after the last."
        )
    return elements


def asked(settings: Settings, parameters: Parameters, left_s: float = math.inf) -> Asked:
    """What a caller may choose.

    The budget is `budget_ms`, or else Triton's `timeout`, in microseconds. A deadline that came with the call
    bounds it, and is the budget where there is no other.

    Args:
        settings: The bounds.
        parameters: The request's; looked at are `PARAMETERS`.
        left_s: Until the call's own deadline [s]; infinity if it has none.

    Raises:
        OutOfRange: `budget_ms`, `timeout` or `min_confidence` is no number, or out of its range.
    """
    most = settings.max_budget_ms
    budget_ms = 0.0
    if "budget_ms" in parameters:
        budget_ms = number("budget_ms", parameters["budget_ms"], settings.min_budget_ms, most)
    elif "timeout" in parameters:
        budget_ms = min(number("timeout", parameters["timeout"], 0, MAX_TIMEOUT_US) / 1e3, most)
    if not budget_ms:  # 0 is no timeout
        budget_ms = settings.default_budget_ms if left_s == math.inf else most
    min_confidence = parameters.get("min_confidence")
    if min_confidence is not None:
        min_confidence = number("min_confidence", min_confidence, 0, 1)
    return Asked(max(0.0, min(budget_ms / 1e3, left_s)), min_confidence=min_confidence)


def requested(
    manifest: Manifest, named: Sequence[tuple[object, Parameters]], *, is_binary: bool
) -> tuple[RequestedOutput, ...]:
    """The outputs that a caller wants, in its order.

    Args:
        manifest: The model's.
        named: Each output's name and parameters; none: all outputs.
        is_binary: Whether they are to be binary where their parameters do not say.

    Raises:
        OutOfRange: there is no such output, or it is named twice or wanted as it cannot be had.
    """
    found: dict[str, RequestedOutput] = {}
    for name, parameters in named or [(name, {}) for name in OUTPUTS]:
        if not isinstance(name, str) or name not in OUTPUTS:
            raise OutOfRange(f"There is no output {str(name)[:40]!r}: there are {', '.join(OUTPUTS)}.")
        if name in found:
            raise OutOfRange(f"The output {name} is named twice: name it once.")
        n_classes = parameters.get("classification", 0)
        most = len(manifest.labels) if name == "probabilities" else 0
        if type(n_classes) is not int or not 0 <= n_classes <= most:
            raise OutOfRange(
                f"classification must be a whole number from 1 to {len(manifest.labels)}, and is only for "
                "the output probabilities."
            )
        is_so = _flag(parameters, "binary_data", is_set=is_binary)
        found[name] = RequestedOutput(name, is_so, n_classes)
    return tuple(found.values())


def checked(parameters: Parameters, known: Mapping[str, type]) -> dict[str, Any]:
    """Parameters that change what is served: to ignore one would do something else than was asked for.

    Raises:
        OutOfRange: one is not known, or of another type.
    """
    for name, value in parameters.items():
        if name not in known:
            raise OutOfRange(f"{name[:40]!r} is not known here: there are {', '.join(known)}.")
        if not isinstance(value, known[name]):
            raise OutOfRange(f"{name} must be of type {known[name].__name__}.")
    return dict(parameters)


def _loaded(header: bytes, max_values: int) -> dict[str, Any]:
    try:
        document = decoding.loads(header, max_values)
    except orjson.JSONDecodeError as error:
        raise Malformed(
            f"The body is no JSON ({error}): if binary data follows it, give its length as "
            "Inference-Header-Content-Length."
        ) from error
    if not isinstance(document, dict):
        raise Malformed("The JSON must be an object with the field `inputs`.")
    return document


def _objects(document: dict[str, Any], field: str) -> list[dict[str, Any]]:
    objects = document.get(field, [])
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise Malformed(f"`{field}` must be a list of objects, each with a `name`.")
    return objects


def _parameters(document: dict[str, Any], whose: str) -> Parameters:
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Malformed(f"`parameters` of {whose} must be an object.")
    return parameters


def _flag(parameters: Parameters, name: str, *, is_set: bool) -> bool:
    flag = parameters.get(name, is_set)
    if not isinstance(flag, bool):
        raise OutOfRange(f"{name} must be true or false.")
    return flag


def _json_tensor(
    manifest: Manifest, settings: Settings, one: dict[str, Any], binary: bytes
) -> tuple[Tensor, bytes | list[Any]]:
    """An input and its contents."""
    name, datatype, shape = one.get("name"), one.get("datatype"), one.get("shape")
    if not isinstance(name, str) or not isinstance(datatype, str):
        raise Malformed("An input has a `name` and a `datatype`, both strings.")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise Malformed(f"The `shape` of {name[:40]!r} must be a list of whole numbers.")
    meant = tensor(manifest, settings, name, datatype, shape)
    n_bytes, data = _parameters(one, "an input").get("binary_data_size"), one.get("data")
    if (n_bytes is None) == (data is None):
        raise Malformed(
            f"`{name}` needs either `data` or the parameter `binary_data_size`; shared memory is not taken."
        )
    if n_bytes is None and not binary:
        return meant, _decoded(meant, _flattened(meant, data))
    if type(n_bytes) is not int or n_bytes != len(binary):
        raise Malformed(
            f"binary_data_size of `{name}` is {str(n_bytes)[:40]}, but {len(binary)} bytes follow the JSON."
        )
    return meant, binary


def _flattened(tensor: Tensor, data: object) -> list[Any]:
    """The elements of a JSON tensor, which may be nested as its shape says, or flat."""
    parts: list[Any] = [data]
    for size in tensor.shape:
        if not all(isinstance(part, list) and len(part) == size for part in parts):
            break
        parts = list(chain.from_iterable(parts))
    else:
        return parts
    if isinstance(data, list) and not any(isinstance(element, list) for element in data):
        return data
    raise Malformed(
        f"`data` of `{tensor.name}` must be a flat list, or nested as its shape {list(tensor.shape)} says."
    )


def _decoded(tensor: Tensor, elements: list[Any]) -> list[Any]:
    """Elements as JSON has them in a tensor's own types."""
    if tensor.datatype == "UINT8":
        if not set(map(type, elements)) <= {int}:
            raise Malformed(f"`data` of `{tensor.name}` must be whole numbers.")
        return elements
    try:
        return [_from_base64(element) for element in elements]
    except (TypeError, ValueError) as error:
        raise Malformed(
            f"`data` of `{tensor.name}` must be the base64 of each file, a string: JSON has no bytes."
        ) from error


def _from_base64(element: object) -> bytes:
    if not isinstance(element, str):
        raise TypeError("is no string")
    return decoding.from_base64(element)


# ---- what goes out ----


def write_json(model: Model, request: InferRequest, answers: Sequence[Answer]) -> tuple[bytes, bytes]:
    """A response's JSON, and the binary part that follows it, which may be empty. To be asked last."""
    described, parts = list[dict[str, Any]](), list[bytes]()
    for wanted, given in zip(request.outputs, output_tensors(model, request, answers), strict=True):
        output: dict[str, Any] = {"name": given.name, "datatype": given.datatype, "shape": given.shape}
        if wanted.is_binary:
            parts.append(given.raw())
            described.append(output | {"parameters": {"binary_data_size": len(parts[-1])}})
        else:
            is_text = isinstance(given.values, list)
            described.append(output | {"data": given.values if is_text else np.ravel(given.values)})
    named = {"id": request.id} if request.id else {}
    document = orjson.dumps(
        {"model_name": model.name, "model_version": model.version, **named, "outputs": described},
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    verdict = orjson.dumps(parameters(model, request.asked, answers))
    return document[:-1] + b',"parameters":' + verdict + b"}", b"".join(parts)


def output_tensors(
    model: Model, request: InferRequest, answers: Sequence[Answer]
) -> tuple[OutputTensor, ...]:
    """The outputs that were asked for, in that order; along their first axis the answers in theirs."""
    probabilities_NK = np.stack([_probabilities(answer) for answer in answers])
    return tuple([_output(model, wanted, probabilities_NK, answers) for wanted in request.outputs])


def _probabilities(answer: Answer) -> NDArray[np.float32]:
    assert answer.served.probabilities_K is not None  # noqa: S101 - for the type checker: an answer has them
    return answer.served.probabilities_K


def _output(
    model: Model, wanted: RequestedOutput, probabilities_NK: NDArray[np.float32], answers: Sequence[Answer]
) -> OutputTensor:
    n, labels = len(answers), model.manifest.labels
    if wanted.n_classes:
        classes = [
            f"{row[i]:f}:{i}:{labels[i]}"
            for row in probabilities_NK
            for i in np.argsort(-row, kind="stable")[: wanted.n_classes]
        ]
        return OutputTensor(wanted.name, "BYTES", (n, wanted.n_classes), classes)
    values: NDArray[np.float32] | list[str]
    match wanted.name:
        case "probabilities":
            values = probabilities_NK
        case "label":
            values = [labels[i] for i in probabilities_NK.argmax(axis=1)]
        case "confidence":
            values = probabilities_NK.max(axis=1)
        case "column":
            values = [answer.served.columns_run[-1] for answer in answers]
        case _:
            values = [",".join(answer.served.columns_run) for answer in answers]
    shape = (n, len(labels)) if wanted.name == "probabilities" else (n,)
    return OutputTensor(wanted.name, OUTPUTS[wanted.name], shape, values)


def parameters(model: Model, asked: Asked, answers: Sequence[Answer]) -> dict[str, str | int | float | bool]:
    """A response's parameters: the record of its answer, of several the shallowest. To be asked last."""
    columns = [rung.column for rung in model.manifest.rungs]
    weakest = min(answers, key=lambda answer: columns.index(answer.served.columns_run[-1]))
    record = model.record(weakest, asked)
    told = ("label", "index", "confidence", "column", "depth", "stopped_by", "budget_ms")
    return {
        **{name: record[name] for name in told},
        "columns_run": ",".join(record["columns_run"]),
        **{f"{part}_ms": spent_ms for part, spent_ms in record["timing_ms"].items()},
        **model.verdict(weakest.served),  # they share one deadline
    }


def model_metadata(model: Model, versions: Sequence[str]) -> dict[str, Any]:
    """What a model takes and gives. It lists both inputs, of which a request has one.

    Args:
        model: The one described.
        versions: Those of its name that are loaded.
    """
    spec, n_labels = model.manifest.input, len(model.manifest.labels)
    inputs = (("image", "UINT8", [-1, spec.height, spec.width, 3]), ("image_bytes", "BYTES", [-1]))
    outputs = [
        (name, datatype, [-1, n_labels] if name == "probabilities" else [-1])
        for name, datatype in OUTPUTS.items()
    ]
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [{"name": name, "datatype": kind, "shape": shape} for name, kind, shape in inputs],
        "outputs": [{"name": name, "datatype": kind, "shape": shape} for name, kind, shape in outputs],
    }


def server_metadata() -> dict[str, Any]:
    """What this server is, and which extensions of the protocol it has."""
    return {"name": "anytime-inference", "version": service.__version__, "extensions": list(EXTENSIONS)}
