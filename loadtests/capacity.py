"""Prints what load 1 is: the requests/s that a running server answers by column 1 when it never lacks one.

    python -m loadtests.capacity http://127.0.0.1:8000

The server must have the machine for itself: whatever else runs there is counted against it.
"""

import argparse
import sys
import urllib.parse
from collections.abc import Sequence

from loadtests import openloop
from loadtests.plane import capacity_hz
from loadtests.targets import Target


def first_column_head(
    address: urllib.parse.SplitResult, budget_s: float, content_type: str, n_bytes: int
) -> bytes:
    """Ask /predict for the answer of column 1, whatever time there is: any confidence is enough."""
    head = openloop.predict_head(address, budget_s, content_type, n_bytes)
    return head.replace(b" HTTP/1.1\r\n", b"&min_confidence=0 HTTP/1.1\r\n", 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    chosen = parser.parse_args(arguments)
    bodies = Target(chosen.url).pictures(None).bodies
    print(f"{capacity_hz(chosen.url, bodies, head=first_column_head):.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
