"""One turn of a real server that sends its spans to the collector that throws them away."""

import math
from pathlib import Path

from loadtests.telemetry import TRACED, WAYS, Way, measure
from tests.service import toy_artifact

QUICKLY = {"ANYTIME_PROFILE_SECONDS": "0.01", "ANYTIME_PROFILE_CACHE": ""}


def test_a_turn_says_what_an_answer_costs(tmp_path: Path) -> None:
    ways = [Way("spans", {**TRACED, **QUICKLY}, is_sampled=True)]
    [seen] = measure(toy_artifact.write(tmp_path), ways, rate_hz=50, seconds=1, rounds=1).values()
    (one,) = seen
    assert one.cpu_us >= 0
    assert 0 < one.p50_ms <= one.p99_ms < math.inf


def test_the_first_way_is_what_the_others_are_compared_with() -> None:
    first, *others = WAYS
    assert first.settings == {}
    assert all(way.settings for way in others)
    assert len({way.name for way in WAYS}) == len(WAYS)
