"""What a user of Triton's HTTP client does with a server, printed as one JSON document.

    python tests/clients/oip_http.py HOST:PORT ADMIN_KEY < picture.png

A process of its own: tritonclient registers the same protocol buffers as this project.
"""

import io
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
from PIL import Image


def answer(result: Any, name: str = "probabilities") -> Any:
    values = result.as_numpy(name).tolist()  # of BYTES: bytes if they came as such, text if they came as JSON
    return json.loads(json.dumps(values, default=bytes.decode))


def as_input(name: str, datatype: str, values: Any, *, is_binary: bool) -> Any:
    tensor = triton.InferInput(name, values.shape, datatype)
    tensor.set_data_from_numpy(values, binary_data=is_binary)
    return tensor


def infer(client: Any, tensor: Any, *, outputs: Any = None, parameters: Any = None, **how: Any) -> Any:
    parameters = {"budget_ms": 5000} if parameters is None else parameters
    return client.infer("toy", [tensor], outputs=outputs, parameters=parameters, **how)


def refusal(call: Any) -> list[str]:
    try:
        call()
    except triton.InferenceServerException as error:
        return [error.status(), error.message()]
    raise AssertionError("nothing was refused")


def main(address: str, key: str, png: bytes) -> dict[str, Any]:
    client = triton.InferenceServerClient(address, connection_timeout=30, network_timeout=30)
    image_NHWC = np.asarray(Image.open(io.BytesIO(png)))[np.newaxis]
    pixels = as_input("image", "UINT8", image_NHWC, is_binary=True)
    plain = as_input("image", "UINT8", image_NHWC, is_binary=False)
    file = as_input("image_bytes", "BYTES", np.array([png], np.object_), is_binary=True)
    three = as_input("image", "UINT8", np.repeat(image_NHWC, 3, axis=0), is_binary=True)
    # Of several pictures some may skip a column, and what is compared must not depend on that.
    shallow = {"budget_ms": 5000, "min_confidence": 0.0}
    some = [triton.InferRequestedOutput("label", binary_data=False), triton.InferRequestedOutput("column")]
    classes = [triton.InferRequestedOutput("probabilities", binary_data=True, class_count=2)]
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
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("toy"),
        "version": client.get_model_metadata("toy", "7")["name"],
        "probabilities": [
            answer(infer(client, tensor, **how))
            for tensor, how in (
                (pixels, {}),
                (plain, {}),
                (file, {}),
                (pixels, {"outputs": [triton.InferRequestedOutput("probabilities", binary_data=False)]}),
                (pixels, {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}),
                (plain, {"request_compression_algorithm": "deflate"}),
                (pixels, {"model_version": "7"}),
                (pixels, {"parameters": {}, "timeout": 5_000_000}),
            )
        ],
        "three": answer(infer(client, three, parameters=shallow)),
        "chosen": [chosen.get_response()["id"], answer(chosen, "label"), answer(chosen, "column")],
        "classes": answer(infer(client, pixels, outputs=classes)),
        "parameters": infer(client, pixels, parameters=shallow).get_response()["parameters"],
        "refusals": [
            refusal(lambda: infer(client, pixels, parameters={"budget_ms": 0})),
            refusal(lambda: infer(client, as_input("image", "UINT8", image_NHWC[:, 1:], is_binary=True))),
            refusal(lambda: infer(client, as_input("picture", "UINT8", image_NHWC, is_binary=True))),
            refusal(lambda: client.infer("dog", [pixels])),
            refusal(lambda: client.load_model("toy")),
            refusal(lambda: client.load_model("dog", headers=admin)),
        ],
        "index": client.get_model_repository_index(headers=admin),
    }
    client.load_model("toy", headers=admin)
    swapped = infer(client, pixels).get_response()["model_version"]
    client.unload_model("toy", headers=admin)
    return found | {"swapped": swapped, "unloaded": client.is_model_ready("toy")}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.stdin.buffer.read())))
