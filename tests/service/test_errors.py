"""Statuses, titles and outcomes that callers and dashboards rely on."""

import pytest

from service.errors import OUTCOMES, Malformed, Problem, Rejected, TooManyRequests


def kinds(of: type[Problem] = Problem) -> set[type[Problem]]:
    return {kind for direct in of.__subclasses__() for kind in (direct, *kinds(direct))}


def test_statuses_titles_and_outcomes_are_frozen() -> None:
    assert {(kind.status, kind.title, kind.outcome) for kind in kinds()} == {
        (400, "Malformed request", "invalid"),
        (401, "Unauthorized", "invalid"),
        (403, "Forbidden", "invalid"),
        (404, "Not found", "invalid"),
        (405, "Method not allowed", "invalid"),
        (408, "Head too slow", "invalid"),
        (408, "Body too slow", "invalid"),
        (409, "Model not loadable", "invalid"),
        (413, "Too large", "invalid"),
        (414, "Query too long", "invalid"),
        (415, "Unsupported media type", "invalid"),
        (415, "Unsupported content encoding", "invalid"),
        (422, "Parameter out of range", "invalid"),
        (429, "Not in time", "rejected"),
        (429, "Too many requests", "rejected"),
        (431, "Head too large", "invalid"),
        (500, "Inference failed", "failed"),
        (503, "Not serving", "stopped"),
        (504, "Deadline passed", "expired"),
    }
    frozen = ("answered", "late", "rejected", "expired", "failed", "stopped", "disconnected", "invalid")
    assert frozen == OUTCOMES


def test_each_status_means_one_outcome() -> None:
    """The edge counts by status."""
    assert len({(kind.status, kind.outcome) for kind in kinds()}) == len({kind.status for kind in kinds()})


@pytest.mark.parametrize(
    ("retry_after_s", "seconds", "milliseconds"),
    [(0.0, "1", "1"), (0.0123, "1", "13"), (1.0, "1", "1000"), (1.001, "2", "1001")],
)
def test_the_retry_headers_never_promise_too_early(
    retry_after_s: float, seconds: str, milliseconds: str
) -> None:
    headers = Rejected("Not now.", retry_after_s, "load").headers
    assert headers == {"retry-after": seconds, "retry-after-ms": milliseconds}


def test_only_a_rejection_has_a_reason() -> None:
    assert Rejected("Not now.", 1.0, "load").reason == "load"
    assert TooManyRequests("Not so often.", 1.0).reason == "rate"
    assert Malformed("No.").reason is None
