"""`predict`: send pictures to a running server, one after another, and print what comes back.

Must not know the server's code: only what its HTTP interface promises.
"""

import json
import math
import os
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

KEY_VARIABLE = "PREDICT_API_KEY"
"""Not ANYTIME_…: those are the server's settings, and it refuses to start with one that it does not know."""

EXTRA_S = 10.0
"""How much longer than the budget an answer may take on its way: a late one is still worth printing."""

CONNECT_S = 5.0
"""How long a connection may take; beyond it the server counts as not reachable."""

PICTURE = "image/png"
"""What every picture is called: the server takes any of its kinds under any of their names."""

ALL_ANSWERED, SOME_UNANSWERED, WRONG_USAGE, UNREACHABLE = range(4)
"""Exit statuses."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to ask for each picture, and how to print it.

    Args:
        budget_ms: Time granted to the server for each [ms].
        min_confidence: Stop refining at an answer this sure.
        top_k: Labels in each answer.
        stream: Print each rung as it arrives.
        as_json: Print what the server says, one JSON object a line, instead of a sentence.
    """

    budget_ms: float
    min_confidence: float | None = None
    top_k: int | None = None
    stream: bool = False
    as_json: bool = False


class Unanswered(Exception):
    """A picture that got no answer; the message says why in one sentence."""


def predict(files: Sequence[str], url: str, wanted: Wanted, key_file: Path | None = None) -> int:
    """Print an answer for each picture, or on stderr why there is none; returns the exit status.

    Args:
        files: Paths; `-` is standard input.
        url: The server's.
        wanted: What to ask.
        key_file: Holds the key that opens predictions; without one the variable `PREDICT_API_KEY` does.
    """
    timeout = httpx.Timeout(wanted.budget_ms / 1e3 + EXTRA_S, connect=CONNECT_S)
    status = ALL_ANSWERED
    try:
        # Directly, whatever proxy there is for the web; and the system says whose certificates hold.
        with httpx.Client(
            base_url=url,
            headers=_key_header(key_file),
            timeout=timeout,
            trust_env=False,
            verify=ssl.create_default_context(),
        ) as client:
            for file in files:
                try:
                    for record in _answers(client, file, wanted):
                        print(_printed(file, record, wanted), flush=True)
                except Unanswered as error:
                    status = SOME_UNANSWERED
                    print(f"{file}: {error}", file=sys.stderr)
    except _UsageError as error:
        print(f"predict: {error}", file=sys.stderr)
        return WRONG_USAGE
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        print(f"predict: --url {url} is no address ({error}): try http://127.0.0.1:8000.", file=sys.stderr)
        return WRONG_USAGE
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        reason = str(error) or f"no connection within {CONNECT_S:g} s"
        print(
            f"predict: No server can be reached at {url} ({reason}): start one with python -m service "
            "serve, or name another with --url.",
            file=sys.stderr,
        )
        return UNREACHABLE
    return status


class _UsageError(Exception):
    """The command cannot be carried out as it was given."""


def _key_header(file: Path | None) -> dict[str, str]:
    """The header that shows the key. The key itself is never repeated.

    Raises:
        _UsageError: the file cannot be read, or what is in it or in the variable cannot be a key.
    """
    source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "")
    if file is not None:
        try:
            source, key = str(file), file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _UsageError(f"The key in {file} cannot be read ({_reason(error)}).") from error
        if not key.strip():
            raise _UsageError(f"{file} is empty: put the key there that hash-key printed.")
    key = key.strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise _UsageError(
            f"{source} holds no key: put the key there that hash-key printed, and nothing else."
        )
    return {"authorization": f"Bearer {key}"} if key else {}


def _answers(client: httpx.Client, file: str, wanted: Wanted) -> Iterator[Record]:
    """What the server says about one picture, as it comes in.

    Raises:
        Unanswered: it says nothing, or why it does not.
        httpx.ConnectError, httpx.ConnectTimeout: there is no server.
    """
    try:
        picture = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise Unanswered(f"cannot be read ({_reason(error)}).") from error
    asked = {"budget_ms": wanted.budget_ms, "min_confidence": wanted.min_confidence, "top_k": wanted.top_k}
    parameters: dict[str, float | str] = {name: value for name, value in asked.items() if value is not None}
    if wanted.stream:
        parameters["stream"] = "ndjson"
    try:
        with client.stream(
            "POST", "/predict", params=parameters, content=picture, headers={"content-type": PICTURE}
        ) as response:
            if response.status_code != 200:
                raise Unanswered(_problem(response.status_code, response.read()))
            is_whole = False
            for line in response.iter_lines():
                record = _record(line)
                yield record
                is_whole = not wanted.stream or record.get("event") == "done"
            if not is_whole:
                raise Unanswered("the answer broke off: retry, and see the server's log if it persists.")
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol):
        raise
    except httpx.TimeoutException as error:
        late_s = wanted.budget_ms / 1e3 + EXTRA_S
        raise Unanswered(f"no answer within {late_s:g} s: see whether the server is overloaded.") from error
    except httpx.HTTPError as error:
        raise Unanswered(f"the connection was lost ({error}): retry.") from error


def _record(line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "stopped_by" not in record:
        raise Unanswered("what came is no prediction: does --url lead to an anytime server?")
    return record


def _problem(status: int, body: bytes) -> str:
    """The server's own sentence, if it gave one."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    if not isinstance(detail, str):
        return f"status {status} without an explanation: does --url lead to an anytime server?"
    return f"{detail} (status {status})"


def _printed(file: str, record: Record, wanted: Wanted) -> str:
    if wanted.as_json:
        return json.dumps({"file": file, **record}, ensure_ascii=False)
    try:
        return f"{file}: {_sentence(record)}"
    except (KeyError, TypeError, ValueError) as error:
        raise Unanswered("what came is no prediction: does --url lead to an anytime server?") from error


def _sentence(record: Record) -> str:
    when = f"{record['elapsed_ms']:.1f} ms, {'in time' if record['deadline_met'] else 'late'}"
    if record.get("event") == "done":
        return f"done: {'+'.join(record['columns_run'])}, stopped by {record['stopped_by']}, {when}"
    said = ", ".join(f"{one['label']} {_percent(one['probability'])}" for one in record["top"])
    why = f", stopped by {record['stopped_by']}" if record["stopped_by"] else ""
    return f"{said}, column {record['column']}{why}, {when}"


def _percent(probability: float) -> str:
    """Never 100 % of what is not certain."""
    return f"{math.floor(probability * 1000) / 10:.1f} %"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "it is no text"
