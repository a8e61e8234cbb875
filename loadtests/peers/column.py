"""One column of an artifact as a plain function from pixels to classes: what each peer puts behind its front.

Runs in the peers' environments, which have numpy and onnxruntime. Must not know how a peer is asked.
"""

import json
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnxruntime


class Answer(TypedDict):
    """What one image is, and how sure that is."""

    index: int
    confidence: float


class Column:
    """A session with one thread that does not spin, and the calibration that the manifest gives.

    Args:
        artifact: Folder of the artifact.
        column: Such as "1".

    Attributes:
        shape: Of one image, height x width x channels.

    Source: one thread and no spinning is what this project's own server does, because more were no better on
    two cores that also serve (docs/decisions/0005-threads.md).
    """

    def __init__(self, artifact: str, column: str) -> None:
        manifest = json.loads((Path(artifact) / "manifest.json").read_text())
        file = next(rung["file"] for rung in manifest["rungs"] if rung["column"] == column)
        rule = next(rule for rule in manifest["combinations"] if rule["columns"] == [column])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            Path(artifact) / file, options, providers=["CPUExecutionProvider"]
        )
        self._temperature = rule["temperature"]
        self._bias_K = np.array(rule["bias"], np.float32)
        spec = manifest["input"]
        self.shape: tuple[int, int, int] = (spec["height"], spec["width"], spec["channels"])

    def classify(self, pixels: bytes) -> list[Answer]:
        """Classify one or more images: raw pixels, row by row, RGB, one image after the other.

        Raises:
            ValueError: these are not whole images.
        """
        images_NHWC = np.frombuffer(pixels, np.uint8).reshape(-1, *self.shape)
        logits_NK = self._session.run(["logits_NK"], {"images_NHWC": images_NHWC})[0]
        score_NK = logits_NK / self._temperature + self._bias_K
        probability_NK = np.exp(score_NK - score_NK.max(axis=1, keepdims=True))
        confidence_N = probability_NK.max(axis=1) / probability_NK.sum(axis=1)
        pairs = zip(probability_NK.argmax(axis=1).tolist(), confidence_N.tolist(), strict=True)
        return [Answer(index=index, confidence=confidence) for index, confidence in pairs]
