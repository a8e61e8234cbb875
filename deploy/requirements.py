"""Print what an image's pip has to install: the requirements of extras, with the onnxruntime of that image.

On Linux with an x86-64 processor pyproject.toml asks for `onnxruntime-gpu`, which also runs without a GPU, so
that one installation serves everywhere. An image for processors alone takes `onnxruntime` instead, of the
version that constraints.txt pins: a tenth of the size.

    python deploy/requirements.py {cpu,gpu} EXTRA [EXTRA ...]
"""

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOR_GPUS = frozenset({"onnxruntime-gpu", "nvidia-ml-py"})


def main(arguments: Sequence[str]) -> int:
    """Print one requirement a line; returns the exit status."""
    if len(arguments) < 2 or arguments[0] not in {"cpu", "gpu"}:
        print("usage: python deploy/requirements.py {cpu,gpu} EXTRA [EXTRA ...]", file=sys.stderr)
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    wanted = {line for extra in arguments[1:] for line in extras[extra]}
    if arguments[0] == "cpu":
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        pinned = re.search(r"^onnxruntime==[\w.]+", pins, re.MULTILINE)
        assert pinned, "constraints.txt pins no onnxruntime"
        wanted = {line for line in wanted if name(line) not in {*FOR_GPUS, "onnxruntime"}} | {pinned[0]}
    print("\n".join(sorted(wanted)))
    return 0


def name(requirement: str) -> str:
    """The distribution that a requirement is for."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
