"""The soak and chaos test: its own parts, each leak that it must notice, and one short run of all of it."""

import asyncio
import json
import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from loadtests.chaos import __main__ as chaos
from loadtests.chaos import artifacts, callers, footprint, odd_requests, over_grpc, storm, verdict
from loadtests.chaos.callers import Caller, Pictures, Place, Seen
from loadtests.chaos.footprint import Capacities, Footprint
from loadtests.chaos.verdict import Calm, End, Moment, Round
from service import oip_pb2 as pb
from service.inference import ArtifactError, Inference, load
from tests.service import toy_artifact
from tests.service.conftest import Launcher, artifact, inference, launch

__all__ = ["artifact", "inference", "launch"]  # fixtures

SIDE = toy_artifact.HEIGHT


# ---- artifacts that fail ----


@pytest.fixture(scope="module")
def trapped(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trapped") / "1"
    return artifacts.write(artifact, folder, name="trapped", version="1", stall_s=0.01)


def logits(folder: Path, column: str, images_NHWC: Any) -> Any:
    session = onnxruntime.InferenceSession(folder / f"column-{column}.onnx")
    return session.run(["logits_NK"], {"images_NHWC": images_NHWC})[0]


@pytest.mark.parametrize("column", toy_artifact.COLUMNS)
def test_only_marked_pictures_spring_a_trap(artifact: Path, trapped: Path, column: str) -> None:
    images_NHWC = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    expected_NK = logits(artifact, column, images_NHWC)
    np.testing.assert_array_equal(logits(trapped, column, images_NHWC), expected_NK)
    for trap in artifacts.MARKS:
        marked_NHWC = images_NHWC.copy()
        marked_NHWC[1] = artifacts.marked(images_NHWC[1], trap)
        if trap == "raise" or (trap == "raise deep" and column != "1"):
            with pytest.raises(Exception, match="out of data bounds"):  # onnxruntime's have no public base
                logits(trapped, column, marked_NHWC)
        elif trap == "nan":
            found_NK = logits(trapped, column, marked_NHWC)
            assert np.isnan(found_NK).all(axis=1).tolist() == [False, True, False]
        else:
            np.testing.assert_array_equal(
                logits(trapped, column, marked_NHWC), logits(artifact, column, marked_NHWC)
            )


def test_what_is_broken_is_refused_as_it_is_said_to_be(artifact: Path, tmp_path: Path) -> None:
    broken = artifacts.write_broken(artifact, tmp_path, name="toy")
    assert set(broken) == {path.name for path in tmp_path.iterdir()}
    for version, says in broken.items():
        if says == "name the folders like that":  # whoever loads it from a repository finds out
            continue
        with pytest.raises(ArtifactError, match=says):
            opened(tmp_path / version).warm_up([1])


def opened(folder: Path) -> Inference:
    return load(folder, provider="cpu", intra_op_threads=1, batch_sizes=(1,))


def test_the_shallow_copy_can_be_served(artifact: Path, tmp_path: Path) -> None:
    folder = artifacts.write_shallow(artifact, tmp_path / "small", name="small", version="1")
    assert [rung.column for rung in opened(folder).manifest.rungs] == ["1"]


# ---- who calls, and what is made of it ----


@pytest.fixture(scope="module")
def pictures(artifact: Path) -> Pictures:
    return callers.make_up(artifact, 2, seed=0)


def place(**fields: Any) -> Place:
    bounds = {name: value for name, value in chaos.SETTINGS.items() if name in Place.__dataclass_fields__}
    where = {"host": "127.0.0.1", "port": 1, "grpc_port": 2, "key": "", "admin_key": ""}
    model = {"model": "toy", "labels": toy_artifact.LABELS, "other": "small"}
    return Place(**{**where, **model, **bounds, **fields})


def test_somebody_else_s_answer_is_noticed(pictures: Pictures) -> None:
    p_NK = pictures.probabilities(("1", "2"))
    own, other = p_NK[0], p_NK[4]
    assert pictures.complaint(0, ("1", "2"), int(own.argmax()), float(own.max())) == ""
    assert "somebody else's" in pictures.complaint(0, ("1", "2"), int(other.argmax()), float(other.max()))
    assert "somebody else's" in pictures.complaint(0, ("1", "2"), int(own.argmax()), float(own.max()) - 0.01)
    assert pictures.complaint(None, ("1", "2"), int(other.argmax()), 0.0) == ""


def test_messages_are_those_of_the_protocol() -> None:
    pixels = bytes(range(12))
    message = over_grpc.infer(
        "toy", "image", "UINT8", [1, -2, 300], pixels, budget_ms=2.5, outputs=("label",)
    )
    assert pb.ModelInferRequest.FromString(message) == pb.ModelInferRequest(
        model_name="toy",
        parameters={"budget_ms": pb.InferParameter(double_param=2.5)},
        inputs=[{"name": "image", "datatype": "UINT8", "shape": [1, -2, 300]}],
        outputs=[{"name": "label"}],
        raw_input_contents=[pixels],
    )
    response = pb.ModelInferResponse(model_name="toy", raw_output_contents=[b"a" * 200, b""])
    response.parameters["x"].double_param = 1.0
    found = list(over_grpc.fields_of(response.SerializeToString()))
    assert [content for number, content in found if number == 6] == [b"a" * 200, b""]


def test_a_plan_has_every_sort_and_follows_from_its_seed(pictures: Pictures) -> None:
    among = storm.sorts(place(), pictures)
    planned = storm.plan(among, 2_000, 100.0, seed=1)
    assert planned == storm.plan(among, 2_000, 100.0, seed=1)
    assert planned != storm.plan(among, 2_000, 100.0, seed=2)
    assert {one.sort for one in planned} == set(among)
    assert sum(one.n_requests for one in planned) >= 2_000
    assert 10 < planned[-1].due_s < 40
    good = sum(one.n_requests for one in planned if one.sort in {"good", "good, gRPC", "burst", "pipeline"})
    assert good > 1_200


def seen(status: str, sent_s: float = 0.0, done_s: float = 1.0, **fields: Any) -> Seen:
    ordinary = {"kind": "good", "outcome": callers.OUTCOMES.get(status, ""), "counts": "surely"}
    rest = {"complaint": "", "shares_runs": True, "is_ample": False, "sent_s": sent_s, "done_s": done_s}
    return Seen(**{"status": status, **ordinary, **rest, **fields})


def test_a_failure_is_explained_by_a_trap_at_the_same_time_only() -> None:
    trap = seen("500", 10, 11, kind="trap: raise")
    assert storm.complaints([trap, seen("500", 10.5, 12), seen("INTERNAL", 9, 10.1)]) == []
    assert len(storm.complaints([trap, seen("500", 11.5, 12), seen("500", 8, 9)])) == 2
    assert (
        len(storm.complaints([replace(trap, kind="trap: nan", shares_runs=False), seen("500", 10, 11)])) == 1
    )
    assert storm.complaints([seen("200", complaint="odd")]) == ["good: odd"]


def test_what_comes_unexpected_is_a_complaint(pictures: Pictures) -> None:
    caller = Caller("good", place(), pictures, random.Random(0))
    caller.saw("200", {"200", "429"}, 0.0)
    caller.saw("500", {"200"}, 0.0, shares_runs=True)
    caller.saw("500", {"200"}, 0.0)
    caller.saw("", {"200"}, 0.0, counts="perhaps")
    caller.saw("404", {"404"}, 0.0, counts="not")
    assert [bool(note.complaint) for note in caller.notes] == [False, False, True, True, False]
    assert [note.outcome for note in caller.notes] == ["answered", "failed", "failed", "", ""]


# ---- what must hold ----

WHOLE = Capacities(512, 160, 160, 8 << 20)
STILL = Footprint(rss_mib=200.0, n_handles=20, n_threads=15, n_connections=0, n_waiting=0, idle_cpu=0.0)
CALM = Calm(n=500, n_answered=500, n_wrong=0, p50_ms=3.0, p99_ms=9.0)
BEFORE = Moment(STILL, WHOLE, CALM, fresh=CALM)


def a_round(rss_mib: float = 200.0, **fields: Any) -> Round:
    notes = [seen("200", is_ample=True), seen("429"), seen("", counts="perhaps"), seen(""), seen("")]
    counted = {"answered": 1, "rejected": 1, "disconnected": 2}
    ordinary = {"seconds": 1.0, "n_swaps": 0, "is_quiet": True, "counted": counted}
    still = replace(STILL, rss_mib=rss_mib)
    return verdict.round_of(notes, **{"complaints": [], **ordinary, "footprint": still, **fields})


END = End(status=-signal.SIGTERM, seconds=1.0, complaints=[], faults=[])


def unmet(rounds: Sequence[Round] = (a_round(),) * 5, after: Moment = BEFORE, end: End = END) -> list[str]:
    return [bar.name for bar in verdict.bars(BEFORE, rounds, after, WHOLE, end) if not bar.is_met]


def test_a_server_that_is_as_it_was_passes() -> None:
    assert unmet() == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n_connections", 1, "connections left"),
        ("n_waiting", 1, "requests left in the queue"),
        ("n_handles", 25, "open handles more"),
        ("n_threads", 24, "threads more"),
        ("idle_cpu", 0.5, "cores busy with nothing"),
    ],
)
def test_what_is_left_does_not_pass(field: str, value: float, says: str) -> None:
    footprint: dict[str, Any] = {field: value}
    (found,) = unmet(after=replace(BEFORE, footprint=replace(STILL, **footprint)))
    assert says in found


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("field", ["n_connections", "n_open_requests", "n_open_calls", "bodies_bytes"])
def test_a_bound_that_is_not_whole_again_does_not_pass(field: str, by: int) -> None:
    changed: dict[str, Any] = {field: getattr(WHOLE, field) + by}
    assert len(unmet(after=replace(BEFORE, capacities=replace(WHOLE, **changed)))) == 1


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n_wrong", 1, "wrong"),
        ("n_answered", 400, "answered in the calm"),
        ("p50_ms", 6.0, "p50"),
        ("p99_ms", 50.0, "p99"),
    ],
)
def test_a_calm_that_is_worse_does_not_pass(field: str, value: float, says: str) -> None:
    changed: dict[str, Any] = {field: value}
    (found,) = unmet(after=replace(BEFORE, calm=replace(CALM, **changed)))
    assert says in found


def test_a_machine_that_is_slower_now_is_no_reason() -> None:
    slower = replace(CALM, p50_ms=30.0, p99_ms=200.0)
    assert unmet(after=replace(BEFORE, calm=slower, fresh=slower)) == []


def test_memory_is_judged_by_rounds() -> None:
    swapping = [a_round(rss_mib, n_swaps=4) for rss_mib in (250, 290)]
    assert unmet([*swapping, a_round(350), a_round(358), a_round(366)]) == []
    (found,) = unmet([*swapping, a_round(350), a_round(360), a_round(370)])
    assert "last two rounds" in found
    (found,) = unmet([a_round(250, n_swaps=4), a_round(310, n_swaps=4), *[a_round(310)] * 3])
    assert "rounds with swaps" in found


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"complaints": ["good: nothing came"]}, "unexpected, wrong or missing"),
        ({"is_quiet": False}, "quiet"),
        ({"counted": {"answered": 1, "rejected": 1, "disconnected": 1}}, "miscounted"),
        ({"counted": {"answered": 1, "rejected": 1, "disconnected": 4}}, "miscounted"),
        ({"counted": {"answered": 0, "rejected": 1, "disconnected": 3}}, "miscounted"),
        ({"counted": {"answered": 2, "disconnected": 2}}, "miscounted"),
    ],
)
def test_one_round_that_is_not_right_does_not_pass(fields: dict[str, Any], says: str) -> None:
    (found,) = unmet([a_round(), a_round(**fields)])
    assert says in found


def test_those_of_whom_nobody_knows_may_be_counted_as_anything_once() -> None:
    for outcome in ("answered", "failed", "disconnected"):
        counted = {"answered": 1, "rejected": 1, "disconnected": 2}
        counted[outcome] = counted.get(outcome, 0) + 1
        assert verdict.miscounted(a_round(counted=counted)) == []


def test_a_server_that_answers_nobody_in_the_storm_does_not_pass() -> None:
    one = replace(a_round(), n_ample_answered=0)
    assert unmet([one]) == ["answered of those with plenty of time, in the storm"]


@pytest.mark.parametrize(
    "end",
    [
        End(1, 1.0, [], []),
        End(None, 1.0, [], []),
        End(0, 11.0, [], []),
        End(0, 1.0, ["nothing came"], []),
        End(0, 1.0, [], ["ERROR   A request failed."]),
    ],
)
def test_an_end_that_is_not_right_does_not_pass(end: End) -> None:
    assert len(unmet(end=end)) == 1


# ---- on a real server ----


@pytest.mark.parametrize("by", [0, -1, 1])
def test_a_place_that_is_lost_or_given_back_twice_is_found(launch: Launcher, by: int) -> None:
    bounds = Capacities(n_connections=40, n_open_requests=20, n_open_calls=20, bodies_bytes=8 << 10)
    settings: dict[str, Any] = {"max_connections": 40, "max_open_requests": 20}
    settings |= {"max_bodies_bytes": bounds.bodies_bytes, "max_body_bytes": 1 << 10, "grpc_port": 0}
    settings["keep_alive_s"] = 1.0  # gRPC's client leaves its connection open, which is then waited for
    server = launch(**settings, body_timeout_s=1.0)
    server.service._room.give_back(by)
    server.service._n_open -= by
    here = place(
        port=server.address[1], grpc_port=server.grpc_port, max_body_bytes=1 << 10, body_timeout_s=1.0
    )
    found = asyncio.run(footprint.capacities(here, bounds))
    assert (found.n_connections, found.n_open_calls) == (40, 20)
    assert found.n_open_requests == 20 + by
    assert (found.bodies_bytes == bounds.bodies_bytes) == (by == 0)
    server.service._room.give_back(-by)
    server.service._n_open += by


async def ask_oddly(subject: chaos.Subject) -> list[str]:
    """Every odd request once; returns the complaints."""
    here, pictures = subject.place, subject.pictures
    caller = Caller("odd", here, pictures, random.Random(0))
    for one in odd_requests.catalogue(here, pictures):
        await odd_requests.ask(replace(caller, kind=one.kind), one)
    async with over_grpc.channel(here) as channel:
        for call in over_grpc.catalogue(here, SIDE, SIDE):
            await over_grpc.odd(replace(caller, kind=call.kind), channel, call)
    return storm.complaints(caller.notes)


def test_a_calm_is_told_by_what_comes_back(launch: Launcher, artifact: Path) -> None:
    server = launch(max_images_per_request=16)
    pictures = callers.make_up(artifact, 2, seed=0)
    told = asyncio.run(chaos.calm(pictures, place(port=server.address[1]), 0.2, seed=0))
    assert (told.n_answered, told.n_wrong) == (told.n, 0)
    assert 0 < told.p50_ms <= told.p99_ms
    wrong = replace(pictures, probabilities=lambda columns_run: 1 - pictures.probabilities(columns_run))
    told = asyncio.run(chaos.calm(wrong, place(port=server.address[1]), 0.2, seed=0))
    assert told.n_wrong == told.n_answered


def test_what_was_seen_is_written(tmp_path: Path) -> None:
    tried = chaos.Trial(BEFORE, [a_round(), a_round()], BEFORE, END)
    chaos._write(tmp_path / "folder" / "chaos", tried, "the command")
    text = (tmp_path / "folder" / "chaos.md").read_text()
    assert text.startswith("10 requests after the warm-up")
    assert "| resident memory, MiB | 200.0 | 200.0 |" in text
    assert "**no**" not in text
    written = json.loads((tmp_path / "folder" / "chaos.json").read_text())
    assert written["rounds"][1]["statuses"]["good"] == {"200": 1, "429": 1, "none": 3}
    assert all(bar["is_met"] for bar in written["bars"])


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(artifact: Path) -> None:
    """What depends on how busy this machine is, is not judged here."""

    async def rounds(subject: chaos.Subject) -> tuple[Footprint, Round, Moment, End]:
        assert await ask_oddly(subject) == []
        await chaos.one_round(subject, 600, 400.0, 2, seed=0)
        before = await footprint.footprint(subject.server, subject.place)
        one = await chaos.one_round(subject, 1_200, 400.0, 0, seed=1)
        after = Moment(
            await footprint.footprint(subject.server, subject.place),
            await footprint.capacities(subject.place, chaos.BOUNDS),
            calm=CALM,
            fresh=CALM,
        )
        return before, one, after, await chaos.stop(subject)

    with chaos.started(artifact, seed=0) as subject:
        before, one, after, end = asyncio.run(rounds(subject))
    bars = verdict.bars(replace(BEFORE, footprint=before), [one], after, chaos.BOUNDS, end)
    assert [(bar.name, bar.found) for bar in bars if not (bar.is_met or bar.is_timed)] == []
    assert set(one.statuses) == set(storm.sorts(subject.place, subject.pictures))
