"""From an HTTP request to the best answer that can be had before its deadline.

Needs an artifact folder and nothing of `model/`: no torch, no onnx.
"""

__version__ = "0.1.0"
