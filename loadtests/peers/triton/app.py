"""Writes a model repository for one column and becomes Triton Inference Server with it.

The server is the real one that the package nvidia-pytriton carries; the column runs in its Python backend
(`model.py` beside this file). Settings are environment variables: ARTIFACT, COLUMN, PORT, MAX_BATCH, DELAY_US
(how long a request may wait for a fuller batch), INSTANCES (processes of the backend), TIMEOUT_US (how long
one may wait in the queue before it is rejected; a request may name less, and never more), MAX_QUEUE (requests
in the queue beyond which one is rejected; 0 for no bound).
"""

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytriton

CONFIG = """\
name: "column"
backend: "python"
max_batch_size: {max_batch}
input [{{ name: "images_NHWC" data_type: TYPE_UINT8 dims: {dims} }}]
output [{{ name: "index" data_type: TYPE_INT64 dims: [1] }}]
instance_group [{{ kind: KIND_CPU count: {instances} }}]
dynamic_batching {{
  max_queue_delay_microseconds: {delay_us}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {timeout_us}
    allow_timeout_override: true
    max_queue_size: {max_queue}
  }}
}}
"""


def write_repository(folder: Path) -> None:
    """Lay out the one model as Triton wants it."""
    spec = json.loads((Path(os.environ["ARTIFACT"]) / "manifest.json").read_text())["input"]
    version = folder / "column" / "1"
    version.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("model.py"), version)
    (folder / "column" / "config.pbtxt").write_text(
        CONFIG.format(
            max_batch=os.environ.get("MAX_BATCH", "8"),
            dims=[spec["height"], spec["width"], spec["channels"]],
            instances=os.environ.get("INSTANCES", "1"),
            delay_us=os.environ.get("DELAY_US", "0"),
            timeout_us=os.environ.get("TIMEOUT_US", "1000000"),
            max_queue=os.environ.get("MAX_QUEUE", "0"),
        )
    )


def place_backend(folder: Path, server: Path) -> None:
    """Put the stub of this Python's version where the backend looks for it, as pytriton does."""
    shutil.copytree(server / "backends" / "python", folder / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "python")


if __name__ == "__main__":
    server = Path(pytriton.__file__).parent / "tritonserver"
    work = Path(tempfile.mkdtemp(prefix="triton-"))
    write_repository(work / "models")
    place_backend(work / "backends", server)
    # The stub must load this Python's library, not another one of the system. It looks for packages where the
    # first python on the PATH looks.
    libraries = [sysconfig.get_config_var("LIBDIR"), f"{sysconfig.get_path('purelib')}/nvidia_pytriton.libs"]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={work / 'models'}",
        f"--backend-directory={work / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={os.environ['PORT']}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--log-info=false",
        "--exit-timeout-secs=5",
    ]
    os.execve(command[0], command, environment)  # noqa: S606 - from the environment's own package
