"""A whole server, on a GPU that is not there, which fails when the process is sent SIGUSR1.

    python -m tests.service.failing_server {lost,doubtful,failing,hanging} SETTING...

What a test cannot do to a server in its own process: see it end, and with which status.
"""

import asyncio
import logging
import signal
import sys
import threading

import pytest

from service import repository, serving, settings
from tests.service.fake_cuda import FakeCuda, install


def main(way: str, arguments: list[str]) -> int:
    logging.basicConfig(level="INFO")
    cuda = install(pytest.MonkeyPatch(), FakeCuda())

    def fail(*_: object) -> None:
        match way:
            case "lost":
                cuda.run_error = "CUDA failure 700: an illegal memory access was encountered ; GPU=0"
            case "doubtful":
                cuda.run_error = "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0"
            case "failing":
                cuda.run_error = "CUDA failure 2: out of memory ; GPU=0"
            case _:
                cuda.during_run = threading.Event().wait

    signal.signal(signal.SIGUSR1, fail)
    chosen = settings.load([*arguments, "--provider", "cuda", "--profile-cache", "", "--grpc-port", ""])
    return serving.run(chosen, asyncio.run(repository.prepare(chosen)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
