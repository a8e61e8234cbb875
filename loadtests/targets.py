"""A running server as a load test sees it: what it takes, and pictures of that kind.

Must not know schedules, nor what becomes of a request.
"""

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.offline import read_test_images

TIMEOUT_S = 10.0
N_MADE_UP = 256
N_TEST_IMAGES = 10_000


@dataclass(frozen=True)
class Pictures:
    """What can be sent.

    Attributes:
        bodies: Raw pixels, as `application/octet-stream`.
        labels: The class of each; empty if it is not known.
    """

    bodies: Sequence[bytes]
    labels: Sequence[int] = ()

    def __len__(self) -> int:
        """How many."""
        return len(self.bodies)

    @property
    def is_labelled(self) -> bool:
        """Accuracy can be told."""
        return bool(self.labels)


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: Such as http://127.0.0.1:8000.
        api_key: If it wants one.
    """

    url: str
    api_key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """Of every request for an answer."""
        key = {"X-API-Key": self.api_key} if self.api_key else {}
        return {"Content-Type": "application/octet-stream", **key}

    @cached_property
    def model(self) -> dict[str, Any]:
        """What the server says at /model.

        Raises:
            OSError: it says nothing.
        """
        where = f"{self.url}/model"
        request = urllib.request.Request(where, headers=self.headers)  # noqa: S310 - the tester's own choice
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310 - as above
            model: dict[str, Any] = json.load(response)
        return model

    def pictures(self, data: Path | None) -> Pictures:
        """CIFAR-10's test images where the folder holds them and they suit the model; else noise."""
        spec = self.model["input"]
        shape = spec["height"], spec["width"], spec["channels"]
        if data and shape == (32, 32, 3) and len(self.model["labels"]) == 10:
            try:
                images_NHWC, labels_N = read_test_images(data, N_TEST_IMAGES, *shape[:2])
            except FileNotFoundError:
                pass
            else:
                return Pictures([image.tobytes() for image in images_NHWC], labels_N.tolist())
        noise = np.random.default_rng(0)
        return Pictures([noise.integers(0, 256, shape, np.uint8).tobytes() for _ in range(N_MADE_UP)])
