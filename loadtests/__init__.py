"""Open-loop load on a running service, and what reached the client in time.

Knows the service by its HTTP contract alone and never imports model or service.
"""

import os

# ONNX Runtime tells its maker about machines and models, unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
