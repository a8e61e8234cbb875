"""From images to an artifact: the fractal network, its training, calibration, evaluation and export.

Needs torch. Must not know the server: the two meet only in the exported artifact.
"""

import os

# ONNX Runtime tells its maker about machines and models, unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
