"""What a user of Triton's gRPC client does with a server, printed as one JSON document.

    python tests/clients/oip_grpc.py HOST:PORT ADMIN_KEY < picture.png

A process of its own: tritonclient registers the same protocol buffers as this project.
"""

import io
import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf.json_format import MessageToDict
from PIL import Image

PROBABILITIES = [triton.InferRequestedOutput("probabilities")]


def as_input(name: str, datatype: str, values: Any) -> Any:
    tensor = triton.InferInput(name, values.shape, datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def infer(client: Any, tensor: Any, **how: Any) -> Any:
    return client.infer("toy", [tensor], **({"parameters": {"budget_ms": 5000}} | how))


def answer(result: Any, name: str = "probabilities") -> Any:
    return json.loads(json.dumps(result.as_numpy(name).tolist(), default=bytes.decode))


def parameters(result: Any) -> dict[str, Any]:
    told = result.get_response().parameters
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in told.items()}


def document(message: Any) -> Any:
    return MessageToDict(message, preserving_proto_field_name=True)


def refusal(call: Any) -> list[str]:
    try:
        call()
    except triton.InferenceServerException as error:
        return [error.status().removeprefix("StatusCode."), error.message()]
    raise AssertionError("nothing was refused")


def main(address: str, key: str, png: bytes) -> dict[str, Any]:
    client = triton.InferenceServerClient(address)
    image_NHWC = np.asarray(Image.open(io.BytesIO(png)))[np.newaxis]
    pixels = as_input("image", "UINT8", image_NHWC)
    file = as_input("image_bytes", "BYTES", np.array([png], np.object_))
    three = as_input("image", "UINT8", np.repeat(image_NHWC, 3, axis=0))
    two = as_input("image", "BYTES", np.array([png, png], np.object_))
    # Of several pictures some may skip a column, and what is compared must not depend on that.
    shallow = {"budget_ms": 5000, "min_confidence": 0.0}
    some = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("column")]
    classes = [triton.InferRequestedOutput("probabilities", class_count=2)]
    admin = {"authorization": f"Bearer {key}"}
    chosen = infer(client, pixels, outputs=some, request_id="mine")
    found = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [
            client.is_model_ready("toy"),
            client.is_model_ready("toy", "7"),
            client.is_model_ready("dog"),
        ],
        "server": document(client.get_server_metadata()),
        "model": client.get_model_metadata("toy", as_json=True),
        "version": client.get_model_metadata("toy", "7").name,
        "probabilities": [
            answer(infer(client, tensor, **how))
            for tensor, how in (
                (pixels, {}),
                (pixels, {"outputs": PROBABILITIES, "model_version": "7"}),
                (pixels, {"compression_algorithm": "gzip"}),
                (pixels, {"parameters": {}, "timeout": 5_000_000, "priority": 1, "sequence_id": 4}),
                (pixels, {"parameters": {}, "client_timeout": 8}),
                (file, {}),
                (file, {"parameters": {"budget_ms": "5000"}}),
            )
        ],
        "three": answer(infer(client, three, parameters=shallow)),
        "two": answer(infer(client, two, parameters=shallow)),
        "chosen": [chosen.get_response().id, answer(chosen, "label"), answer(chosen, "column")],
        "classes": answer(infer(client, pixels, outputs=classes)),
        "parameters": parameters(infer(client, pixels, parameters=shallow)),
        "budgets_ms": [
            parameters(infer(client, pixels, **how))["budget_ms"]
            for how in (
                dict[str, Any](parameters={}),
                {"parameters": {}, "client_timeout": 8},
                {"parameters": {}, "client_timeout": 60},
                {"parameters": {"budget_ms": 500}, "client_timeout": 8},
                {"parameters": {"budget_ms": 9000.0}, "client_timeout": 8},
            )
        ],
        "refusals": [
            refusal(lambda: infer(client, pixels, parameters={"budget_ms": 0})),
            refusal(lambda: infer(client, pixels, outputs=[triton.InferRequestedOutput("logits")])),
            refusal(lambda: infer(client, as_input("image", "UINT8", image_NHWC[:, 1:]))),
            refusal(lambda: infer(client, as_input("picture", "UINT8", image_NHWC))),
            refusal(lambda: infer(client, as_input("image_bytes", "BYTES", np.array([b"GIF"], np.object_)))),
            refusal(lambda: client.infer("toy", [pixels, file])),
            refusal(lambda: client.infer("dog", [pixels])),
            refusal(lambda: client.get_model_metadata("dog")),
            refusal(lambda: client.get_inference_statistics("toy")),
            refusal(lambda: client.load_model("toy")),
            refusal(lambda: client.load_model("dog", headers=admin)),
            refusal(lambda: client.load_model("toy", headers=admin, config="{}")),
            refusal(lambda: client.get_model_repository_index(headers={"x-api-key": "guessed"})),
        ],
        "index": document(client.get_model_repository_index(headers={"x-api-key": key}))["models"],
    }
    client.load_model("toy", headers=admin)
    swapped = infer(client, pixels).get_response().model_version
    client.unload_model("toy", headers=admin)
    return found | {"swapped": swapped, "unloaded": client.is_model_ready("toy")}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.stdin.buffer.read())))
