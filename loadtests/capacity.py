"""Prints what load 1 is: the requests/s that a running server answers by column 1 when it never lacks one.

    python -m loadtests.capacity http://127.0.0.1:8000

The server must have the machine for itself: whatever else runs there is counted against it.
"""

import argparse
import sys
from collections.abc import Sequence

from loadtests.plane import capacity_hz
from loadtests.targets import Target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    chosen = parser.parse_args(arguments)
    print(f"{capacity_hz(chosen.url, Target(chosen.url).pictures(None).bodies):.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
