"""The column inside Triton's Python backend: one run for all that the dynamic batcher put together."""

import os
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

sys.path.append(os.environ["PYTHONPATH"])  # the backend's stub does not look there by itself

from loadtests.peers.column import Column


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the column, once per instance."""
        self.column = Column(os.environ["ARTIFACT"], os.environ["COLUMN"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch of requests, each with one image or more."""
        images = [triton.get_input_tensor_by_name(request, "images_NHWC").as_numpy() for request in requests]
        answers = self.column.classify(b"".join(image.tobytes() for image in images))
        classes = np.array([[answer["index"]] for answer in answers], np.int64)
        parts = np.split(classes, np.cumsum([len(image) for image in images])[:-1])
        return [triton.InferenceResponse([triton.Tensor("index", part)]) for part in parts]
