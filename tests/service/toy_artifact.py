"""A tiny artifact without training and without torch: real ONNX graphs whose answers are easy to foresee.

Column k's logits are a fixed random projection of the picture, so columns differ, answers depend on every
pixel, and deeper columns cost more (they multiply by an identity `WORK[k]` times).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

HEIGHT = WIDTH = 8
LABELS = ("ant", "bee", "cat", "dog", "elk")
COLUMNS = ("1", "2", "3")
ACCURACY = {"1": 0.80, "2": 0.85, "3": 0.90, "1+2": 0.87, "1+3": 0.91, "1+2+3": 0.93}
CONFIDENCE = {
    "columns": ["1"],
    "edges": [0.0, 0.5, 1.0],
    "n": [60, 40],
    "accuracy": {"1": [0.7, 0.95], "1+2": [0.8, 0.97], "1+3": [0.9, 0.95], "1+2+3": [0.92, 0.97]},
}
WORK = {"1": 1, "2": 4, "3": 16}


def projection(column: str) -> NDArray[np.float32]:
    """The matrix, pixels by labels, that column applies to pixels in 0..1."""
    rng = np.random.default_rng(int(column))
    return rng.normal(size=(HEIGHT * WIDTH * 3, len(LABELS))).astype(np.float32)


def graph(column: str, *, output: str = "logits_NK", height: int = HEIGHT) -> bytes:
    """One column's ONNX file."""
    n_pixels = height * WIDTH * 3
    matrix = np.resize(projection(column), (n_pixels, len(LABELS)))
    initializers = [
        numpy_helper.from_array(np.array([-1, n_pixels], np.int64), "flat"),
        numpy_helper.from_array(np.array(255, np.float32), "white"),
        numpy_helper.from_array(np.eye(n_pixels, dtype=np.float32), "identity"),
        numpy_helper.from_array(matrix, "projection"),
    ]
    nodes = [
        helper.make_node("Cast", ["images_NHWC"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["pixels", "flat"], ["rows"]),
        helper.make_node("Div", ["rows", "white"], ["work_0"]),
        *(
            helper.make_node("MatMul", [f"work_{i}", "identity"], [f"work_{i + 1}"])
            for i in range(WORK[column])
        ),
        helper.make_node("MatMul", [f"work_{WORK[column]}", "projection"], [output]),
    ]
    images = helper.make_tensor_value_info("images_NHWC", TensorProto.UINT8, ["N", height, WIDTH, 3])
    logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", len(LABELS)])
    model = helper.make_model(
        helper.make_graph(nodes, f"column-{column}", [images], [logits], initializers),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def manifest(graphs: dict[str, bytes]) -> dict[str, Any]:
    """What manifest.json says about these graphs."""
    return {
        "format": 1,
        "name": "toy",
        "version": "7",
        "created": "2026-01-02T03:04:05Z",
        "source": {"dataset": "none", "seed": 0},
        "labels": list(LABELS),
        "input": {
            "height": HEIGHT,
            "width": WIDTH,
            "channels": 3,
            "dtype": "uint8",
            "layout": "NHWC",
            "resize": "area-crop",
        },
        "rungs": [
            {
                "column": column,
                "file": f"column-{column}.onnx",
                "sha256": hashlib.sha256(content).hexdigest(),
                "depth": 4 * int(column),
                "parameters": 100,
                "macs": 1000,
                "accuracy": ACCURACY[column],
            }
            for column, content in graphs.items()
        ],
        "combinations": [
            {
                "columns": key.split("+"),
                "weights": [1 / len(key.split("+"))] * len(key.split("+")),
                "bias": [0.0],
                "temperature": 2.0,
                "accuracy": accuracy,
                "nll": 0.5,
                "ece": 0.01,
            }
            for key, accuracy in ACCURACY.items()
        ],
        "confidence": [CONFIDENCE],
        "held_out": {"n": 100, "from": "train", "seed": 0},
        "test": {"n": 100, "accuracy": {}},
    }


def write(folder: Path, version: str = "7") -> Path:
    """Write the whole artifact into a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {column: graph(column) for column in COLUMNS}
    for column, content in graphs.items():
        (folder / f"column-{column}.onnx").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest(graphs) | {"version": version}))
    return folder
