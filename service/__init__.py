"""From an HTTP request to the best answer that can be had before its deadline.

Needs an artifact folder and nothing of `model/`: no torch, no onnx.
"""

import os

# ONNX Runtime tells its maker about machines and models, unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
