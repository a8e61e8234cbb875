"""Artifacts that fail on purpose: for marked pictures only, or whenever somebody tries to load them.

A trapped artifact is the one that it was made from, with a few nodes more in each graph: for a picture that
bears a mark the run raises, lasts very long or gives NaN, as a faulty runtime would; every other picture gets
the answer that it always got. So a server can be shown failing runs without a switch in the server. Must not
know HTTP or servers.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Trap = Literal["raise", "raise deep", "nan", "stall"]

MARKS: Mapping[Trap, int] = MappingProxyType({"raise": 1, "raise deep": 2, "nan": 3, "stall": 4})
"""The last byte of each mark; a mark is the picture's first two pixels."""

SHALLOWEST_IS_SPARED = frozenset[Trap]({"raise deep"})
"""Set in deeper columns only: whoever has the shallowest one's answer keeps it."""

BUSY_SIDE = 256
"""Of the matrices that a stall multiplies: large enough that a turn of the loop costs little beside it."""


def mark(trap: Trap) -> NDArray[np.uint8]:
    """The two pixels, [2, 3], that spring this trap: no picture has them by chance (1 in 2^48)."""
    return np.array([[255, 0, 255], [0, 255, MARKS[trap]]], np.uint8)


def marked(image_HWC: NDArray[np.uint8], trap: Trap) -> NDArray[np.uint8]:
    """The picture with the mark in its corner."""
    image_HWC = image_HWC.copy()
    image_HWC[0, :2] = mark(trap)
    return image_HWC


def write(artifact: Path, folder: Path, *, name: str, version: str, stall_s: float) -> Path:
    """Write a trapped copy of an artifact, and return its folder.

    Args:
        artifact: What to copy.
        folder: Where to.
        name: Of the copy.
        version: Of the copy.
        stall_s: How long a run with a stalling picture takes, about, if the machine has nothing else to do.
    """
    turns = _turns(stall_s)

    def trapped(graph: bytes, place: int) -> bytes:
        traps = [trap for trap in MARKS if place or trap not in SHALLOWEST_IS_SPARED]
        return _with_traps(graph, traps, turns)

    return _copy(artifact, folder, {"name": name, "version": version}, trapped)


def write_broken(artifact: Path, folder: Path, *, name: str) -> Mapping[str, str]:
    """Write copies of an artifact that cannot be served, as versions of one model.

    Args:
        artifact: What to copy.
        folder: Of the model, in a repository: one folder for each version is made in it.
        name: Of the model.

    Returns:
        By version, a part of the sentence with which a server must refuse it.
    """

    def copy(version: str, change: Callable[[bytes, int], bytes] = lambda graph, _: graph) -> Path:
        return _copy(artifact, folder / version, {"name": name, "version": version}, change)

    cut = copy("101") / "manifest.json"
    cut.write_bytes(cut.read_bytes()[:-40])
    _first_graph(copy("102")).unlink()
    _first_graph(copy("103")).write_bytes(b"another file")
    copy("104", lambda *_: b"no graph, and the manifest knows its hash")
    copy("105", lambda graph, _: _with_nan(graph))
    copy("106", lambda graph, _: _with_fewer_logits(graph))
    _copy(artifact, folder / "107", {"name": name, "version": "1000"})
    _copy(artifact, folder / "108", {"name": name, "version": "108", "labels": []})
    return MappingProxyType(
        {
            "101": "not a usable manifest",
            "102": "cannot be read",
            "103": "SHA-256 differs",
            "104": "no graph that onnxruntime can load",
            "105": "not finite",
            "106": "must have the one output",
            "107": "name the folders like that",
            "108": "not a usable manifest",
        }
    )


def write_shallow(artifact: Path, folder: Path, *, name: str, version: str) -> Path:
    """Write a copy that has the shallowest column only: quickly loaded, and small."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    first = manifest["rungs"][:1]
    alone = [rule for rule in manifest["combinations"] if rule["columns"] == [first[0]["column"]]]
    changes = {"name": name, "version": version, "rungs": first, "combinations": alone, "confidence": []}
    return _copy(artifact, folder, changes)


def _first_graph(folder: Path) -> Path:
    return folder / str(json.loads((folder / "manifest.json").read_text())["rungs"][0]["file"])


def _copy(
    artifact: Path,
    folder: Path,
    changes: Mapping[str, Any],
    change: Callable[[bytes, int], bytes] = lambda graph, _: graph,
) -> Path:
    """An artifact with another manifest and other graphs, whose hashes the manifest knows.

    Args:
        artifact: What to copy.
        folder: Where to.
        changes: Fields of the manifest.
        change: Makes a graph of a graph and its rung's place, 0 for the shallowest.
    """
    folder.mkdir(parents=True)
    manifest = json.loads((artifact / "manifest.json").read_text()) | changes
    for place, rung in enumerate(manifest["rungs"]):
        graph = change((artifact / rung["file"]).read_bytes(), place)
        (folder / rung["file"]).write_bytes(graph)
        rung["sha256"] = hashlib.sha256(graph).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


# ---- graphs ----


def _with_traps(graph: bytes, traps: list[Trap], turns: int) -> bytes:
    """Add to the logits a number that is 0, NaN, or there only after an error or a long loop."""
    constants: dict[str, NDArray[Any]] = {
        "trap/start": np.array([0, 0], np.int64),
        "trap/end": np.array([1, 2], np.int64),
        "trap/axes": np.array([1, 2], np.int64),
        "trap/pixels": np.array([1, 2, 3], np.int64),
        "trap/all": np.array(2 * 3, np.float32),
        "trap/most": np.array(1, np.float32),
        "trap/nothing": np.array([0], np.float32),
        "trap/nan": np.array([0, np.nan], np.float32),
        "trap/turns": np.array(turns, np.int64),
        "trap/goes on": np.array(True),
        "trap/busy": np.eye(BUSY_SIDE, dtype=np.float32),
        "trap/flat": np.array([-1], np.int64),
        "trap/column": np.array([-1, 1], np.int64),
    }
    nodes = [
        helper.make_node(
            "Slice", ["images_NHWC", "trap/start", "trap/end", "trap/axes"], ["trap/corner uint8"]
        ),
        helper.make_node("Cast", ["trap/corner uint8"], ["trap/corner"], to=TensorProto.INT32),
    ]
    harms = ["trap/logits"]
    for trap in traps:
        constants[f"{trap}/mark"] = mark(trap)[None, None].astype(np.int32)
        nodes += _is_marked(trap)
        nodes += _harm(trap)
        harms.append(f"{trap}/harm")
    nodes.append(helper.make_node("Sum", harms, ["logits_NK"]))
    return _extended(graph, nodes, constants)


def _is_marked(trap: Trap) -> list[onnx.NodeProto]:
    """`<trap>/number`: 1 if any picture of the batch bears the mark, else 0."""
    return [
        helper.make_node("Equal", ["trap/corner", f"{trap}/mark"], [f"{trap}/equal"]),
        helper.make_node("Cast", [f"{trap}/equal"], [f"{trap}/equal float"], to=TensorProto.FLOAT),
        helper.make_node(
            "ReduceSum", [f"{trap}/equal float", "trap/pixels"], [f"{trap}/n equal"], keepdims=0
        ),
        helper.make_node("Equal", [f"{trap}/n equal", "trap/all"], [f"{trap}/is marked"]),
        helper.make_node("Cast", [f"{trap}/is marked"], [f"{trap}/marked"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", [f"{trap}/marked"], [f"{trap}/n marked"], keepdims=0),
        helper.make_node("Min", [f"{trap}/n marked", "trap/most"], [f"{trap}/one"]),
        helper.make_node("Cast", [f"{trap}/one"], [f"{trap}/number"], to=TensorProto.INT64),
    ]


def _harm(trap: Trap) -> list[onnx.NodeProto]:
    """`<trap>/harm`: 0 if no picture is marked. NaN is for the marked picture alone, [N, 1]."""
    if trap == "nan":
        return [
            helper.make_node("Cast", [f"{trap}/marked"], [f"{trap}/place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["trap/nan", f"{trap}/place"], [f"{trap}/row"]),
            helper.make_node("Reshape", [f"{trap}/row", "trap/column"], [f"{trap}/harm"]),
        ]
    if trap != "stall":
        # From a list of one: the second element cannot be had, and onnxruntime says so.
        return [helper.make_node("Gather", ["trap/nothing", f"{trap}/number"], [f"{trap}/harm"])]
    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["goes on"], ["still goes on"]),
            helper.make_node("MatMul", ["before", "trap/busy"], ["after"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [BUSY_SIDE, BUSY_SIDE]),
        ],
        [
            helper.make_tensor_value_info("still goes on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [BUSY_SIDE, BUSY_SIDE]),
        ],
    )
    return [
        helper.make_node("Mul", [f"{trap}/number", "trap/turns"], [f"{trap}/turns"]),
        helper.make_node(
            "Loop", [f"{trap}/turns", "trap/goes on", "trap/busy"], [f"{trap}/product"], body=turn
        ),
        helper.make_node("ReduceMax", [f"{trap}/product"], [f"{trap}/max"], keepdims=0),  # 1: the identity's
        helper.make_node("Sub", [f"{trap}/max", "trap/most"], [f"{trap}/zero"]),
        helper.make_node("Reshape", [f"{trap}/zero", "trap/flat"], [f"{trap}/harm"]),
    ]


def _with_nan(graph: bytes) -> bytes:
    nodes = [helper.make_node("Add", ["trap/logits", "trap/nan"], ["logits_NK"])]
    return _extended(graph, nodes, {"trap/nan": np.array([np.nan], np.float32)})


def _with_fewer_logits(graph: bytes) -> bytes:
    nodes = [helper.make_node("ReduceMax", ["trap/logits"], ["logits_NK"], keepdims=0)]
    model = onnx.load_from_string(_extended(graph, nodes, {}))
    model.graph.output[0].type.tensor_type.shape.Clear()
    return bytes(model.SerializeToString())


def _extended(graph: bytes, nodes: list[onnx.NodeProto], constants: Mapping[str, NDArray[Any]]) -> bytes:
    """Put nodes between what gave the logits, now called `trap/logits`, and the graph's output."""
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        node.output[:] = ["trap/logits" if name == "logits_NK" else name for name in node.output]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    return bytes(model.SerializeToString())


def _turns(stall_s: float) -> int:
    """How many products of two matrices take so long here, on one core."""
    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, [BUSY_SIDE, BUSY_SIDE])
    b = helper.make_tensor_value_info("b", TensorProto.FLOAT, [BUSY_SIDE, BUSY_SIDE])
    product = helper.make_graph([helper.make_node("MatMul", ["a", "a"], ["b"])], "product", [a], [b])
    model = helper.make_model(product, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    identity = {"a": np.eye(BUSY_SIDE, dtype=np.float32)}
    session.run(["b"], identity)
    started_s, n = time.perf_counter(), 20
    for _ in range(n):
        session.run(["b"], identity)
    return math.ceil(stall_s * n / (time.perf_counter() - started_s))
