"""Every way a request can go wrong, each with its status, its title and what the caller can do.

Knows nothing of HTTP frameworks: the edge (`api`) turns a `Problem` into RFC 9457 `application/problem+json`.
"""

import math
from typing import ClassVar, Literal, get_args

Outcome = Literal["answered", "late", "rejected", "expired", "failed", "stopped", "disconnected", "invalid"]
"""How a request ended. `late` was answered after its deadline; `invalid` was the caller's fault (4xx)."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

Reason = Literal["budget", "body", "decode", "load", "rate"]
"""Why a request was rejected: `budget`, because it would not even do on an idle server as fast as when it was
measured; `body` and `decode`, because these took too long; `load`, because others were in the way or the
server has become slower; `rate`, because its client had had its share."""

REASONS: tuple[Reason, ...] = get_args(Reason)

STOPPING = "This server is stopping: send the request again, another one will take it."
OUR_FAULT = "The server failed on this request: tell the operator if it persists."


class CallerGone(Exception):
    """Nobody waits for the answer any more."""


class Problem(Exception):
    """A request that gets no prediction.

    The detail is one sentence for the caller: what was wrong and what to do about it.
    """

    status: ClassVar[int]
    title: ClassVar[str]
    outcome: ClassVar[Outcome] = "invalid"
    reason: Reason | None = None

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    @property
    def type(self) -> str:
        """URI of the problem type: the same for every request that fails in this way."""
        return "urn:anytime:problem:" + self.title.lower().replace(" ", "-")

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to this problem."""
        return {}

    @property
    def document(self) -> dict[str, str | int]:
        """The members of its RFC 9457 document."""
        return {"type": self.type, "title": self.title, "status": self.status, "detail": self.detail}


class Malformed(Problem):
    """The body is not what its Content-Type says."""

    status, title = 400, "Malformed request"


class Unauthorized(Problem):
    """No key came, or one that is not known."""

    status, title = 401, "Unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        """How a key is sent."""
        return {"www-authenticate": "Bearer"}


class Forbidden(Problem):
    """The key is known, but not for this, or no key opens this."""

    status, title = 403, "Forbidden"


class NotFound(Problem):
    """There is nothing at this path."""

    status, title = 404, "Not found"


class MethodNotAllowed(Problem):
    """The path takes other methods."""

    status, title = 405, "Method not allowed"

    def __init__(self, detail: str, allowed: str) -> None:
        super().__init__(detail)
        self.allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        """The methods that are taken."""
        return {"allow": self.allowed}


class NotLoadable(Problem):
    """The model's files in the repository cannot be served; what was served before still is."""

    status, title = 409, "Model not loadable"


class HeadTimeout(Problem):
    """The request line and headers took too long to arrive."""

    status, title = 408, "Head too slow"


class BodyTimeout(Problem):
    """The body took too long to arrive."""

    status, title = 408, "Body too slow"


class TooLarge(Problem):
    """Too many bytes, or too many pixels."""

    status, title = 413, "Too large"


class QueryTooLong(Problem):
    """More parameters than any request needs."""

    status, title = 414, "Query too long"


class UnsupportedType(Problem):
    """The Content-Type, or what is really inside, is not taken."""

    status, title = 415, "Unsupported media type"


class UnsupportedEncoding(UnsupportedType):
    """The Content-Encoding is not taken.

    Args:
        detail: One sentence for the caller.
        accepted: What is taken instead, as in an Accept-Encoding header.
    """

    title = "Unsupported content encoding"

    def __init__(self, detail: str, accepted: str) -> None:
        super().__init__(detail)
        self.accepted = accepted

    @property
    def headers(self) -> dict[str, str]:
        """The encodings that are taken."""
        return {"accept-encoding": self.accepted}


class OutOfRange(Problem):
    """A parameter is unknown, doubled or out of its range."""

    status, title = 422, "Parameter out of range"


class Rejected(Problem):
    """Not even the shallowest column can be had in time.

    Args:
        detail: One sentence for the caller.
        retry_after_s: When to come again [s from now], computed from the backlog and jittered by the engine.
        reason: What took the time.
    """

    status, title = 429, "Not in time"
    outcome: ClassVar[Outcome] = "rejected"

    def __init__(self, detail: str, retry_after_s: float, reason: Reason) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s
        self.reason = reason

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` counts whole seconds, at least 1; `retry-after-ms` says it more finely."""
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_s))),
            "retry-after-ms": str(max(1, math.ceil(self.retry_after_s * 1000))),
        }


class TooManyRequests(Rejected):
    """The caller has had its share for now; whoever else asks may well be answered."""

    title = "Too many requests"

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail, retry_after_s, "rate")


class HeadTooLarge(Problem):
    """The request line and headers have more bytes than any request needs."""

    status, title = 431, "Head too large"


class Failed(Problem):
    """The run failed, or the server did."""

    status, title = 500, "Inference failed"
    outcome: ClassVar[Outcome] = "failed"


class Stopped(Problem):
    """The server is not ready, or draining."""

    status, title = 503, "Not serving"
    outcome: ClassVar[Outcome] = "stopped"

    @property
    def headers(self) -> dict[str, str]:
        """Another server, or this one restarted, will be there soon."""
        return {"retry-after": "1"}


class Expired(Problem):
    """The deadline passed while the request waited."""

    status, title = 504, "Deadline passed"
    outcome: ClassVar[Outcome] = "expired"
