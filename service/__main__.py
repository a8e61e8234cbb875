"""The command line: `python -m service COMMAND`, installed as `anytime`. Here it is only read.

Each command's own module is imported when it is asked for: a client should not wait for the server's
libraries.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import service

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 and the number of the signal, as shells have it."""

PIPE_CLOSED = 141
"""As INTERRUPTED, when whoever was to read what is printed has gone."""

WRONG_USAGE = 2

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_BUDGET_MS = 50.0

PREDICT_EPILOG = """\
examples:
  python -m service predict cat.jpg dog.png --budget-ms 5
  curl -s https://example.org/cat.jpg | python -m service predict - --stream

A server that asks for a key is shown the one in --api-key-file, or else in the environment's PREDICT_API_KEY.

exit status: 0 every file was answered, 1 some file was not, 2 wrong usage, 3 no server can be reached."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command; returns the exit status.

    Args:
        arguments: Those of the command line if None.

    Raises:
        SystemExit: help or the version was asked for, or an option is wrong (status 2).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python would try to write the rest at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return status


def _dispatch(arguments: Sequence[str]) -> int:
    if (
        arguments and arguments[0] == "serve"
    ):  # its options are the settings, which read and document themselves
        from service import serving  # noqa: PLC0415 - see this module's first lines

        return serving.serve(arguments[1:])
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return WRONG_USAGE
    asked = parser.parse_args(arguments)
    match asked.command:
        case "predict":
            from service import client  # noqa: PLC0415 - as above

            wanted = client.Wanted(
                asked.budget_ms, asked.min_confidence, asked.top_k, asked.stream, asked.json
            )
            return client.predict(asked.files, asked.url, wanted, asked.api_key_file)
        case "inspect":
            from service import inspection  # noqa: PLC0415 - as above

            return inspection.inspect(asked.artifact, run=asked.run, as_json=asked.json)
        case "profile":
            from service import inspection  # noqa: PLC0415 - as above

            options = ("artifact", "batch_sizes", "profile_seconds", "provider")
            given = [(name, getattr(asked, name)) for name in options]
            return inspection.profile(
                [f"--{name.replace('_', '-')}={value}" for name, value in given if value is not None],
                as_json=asked.json,
            )
        case _:
            from service import access  # noqa: PLC0415 - as above

            key, hash_ = access.new_key()
            print(f"key   {key}\nhash  {hash_}")
            print("Give the key to the client and the hash to the server: ANYTIME_API_KEYS.", file=sys.stderr)
            return 0


class _Parser(argparse.ArgumentParser):
    """Whoever names no command is shown what there is."""

    def error(self, message: str) -> NoReturn:
        """Print the help, then what is wrong; the exit status is 2."""
        self.print_help(sys.stderr)
        self.exit(WRONG_USAGE, f"\n{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m service",
        description="An image classification server that gives the best answer it can within each caller's "
        "time budget.",
        epilog="Options come after the command, as in `serve --port 9000`; each command has a --help of its "
        "own. Installed, all of this is also called `anytime`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"anytime-inference {service.__version__}")
    commands = parser.add_subparsers(
        title="commands",
        dest="command",
        metavar="COMMAND",
        required=True,
        parser_class=argparse.ArgumentParser,
    )

    def command(name: str, says: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=says,
            description=f"{says[0].upper()}{says[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    command("serve", "start the server; every setting is an option")
    _add_predict(command("predict", "send pictures to a running server"))
    _add_inspect(command("inspect", "verify an artifact and say what is in it; no server needed"))
    _add_profile(command("profile", "measure latencies on this machine; no server needed"))
    command("hash-key", "make a key for a client, and its hash for the server")
    return parser


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.epilog = PREDICT_EPILOG
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a PNG, JPEG or WebP; - reads standard input"
    )
    server = parser.add_argument_group("the server")
    server.add_argument("--url", default=DEFAULT_URL, help="where it is (%(default)s)")
    server.add_argument(
        "--api-key-file", metavar="FILE", type=Path, help="holds the key, if the server asks for one"
    )
    answer = parser.add_argument_group("the answer")
    answer.add_argument(
        "--budget-ms",
        metavar="MS",
        type=_budget_ms,
        default=DEFAULT_BUDGET_MS,
        help="time the server is granted for each picture (%(default)g)",
    )
    answer.add_argument("--min-confidence", metavar="P", type=float, help="stop once it is this sure, 0 to 1")
    answer.add_argument("--top-k", metavar="N", type=int, help="labels in each answer (1)")
    answer.add_argument("--stream", action="store_true", help="print each rung as it arrives")
    answer.add_argument(
        "--json", action="store_true", help="print what the server says, one JSON object a line"
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "exit status: 0 it can be served, 1 it cannot, 2 wrong usage."
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder with manifest.json")
    parser.add_argument("--run", action="store_true", help="also run each column, on the CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "What is measured is what would serve: the environment's ANYTIME_ settings hold.\n"
        "exit status: 0 measured, 1 the artifact or the provider cannot be used, 2 wrong usage."
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT", nargs="?", help="folder with manifest.json (the one that ships)"
    )
    parser.add_argument("--batch-sizes", metavar="N,N", help="sizes to measure (1,2,4,8; on a GPU up to 64)")
    parser.add_argument(
        "--seconds", metavar="S", dest="profile_seconds", help="time for all of it; more is steadier (3)"
    )
    parser.add_argument("--provider", metavar="NAME", help="auto, cpu, cuda or tensorrt (auto)")
    parser.add_argument("--json", action="store_true", help="print what GET /model has as latency_ms")


def _budget_ms(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a budget is a number of milliseconds above 0, not {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
