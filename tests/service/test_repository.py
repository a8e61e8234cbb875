"""Models come and go beside serving: whole or not at all, and nobody who is inside is turned out."""

import asyncio
import gc
import hashlib
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from service.errors import NotFound, NotLoadable, Problem, Stopped
from service.inference import ArtifactError, Inference, Manifest
from service.repository import TRIM, Repository, prepare
from service.settings import Settings
from tests.service import toy_artifact
from tests.service.conftest import BATCH_SIZES, BlockedSession, Launcher, Running, nothing_left_of

BODY = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)
RAW = {"content-type": "application/octet-stream"}
URL = "/predict?budget_ms=5000"
QUICKLY: dict[str, Any] = {"profile_seconds": 0.01, "batch_sizes": BATCH_SIZES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with three versions of the model that is served, the first of which it is."""
    for version in ("7", "9", "10"):
        toy_artifact.write(tmp_path / "toy" / version, version)
    return tmp_path


@pytest.fixture
def server(launch: Launcher, folder: Path) -> Running:
    return launch(model_repository=folder, **QUICKLY)


def version_that_answers(server: Running) -> str:
    response = server.client.post(URL, content=BODY, headers=RAW)
    assert response.status_code == 200, response.text
    return str(response.json()["version"])


def states(server: Running) -> dict[str, str]:
    listed = asyncio.run_coroutine_threadsafe(server.repository.index(), server.loop).result()
    return {f"{one.name}/{one.version}": one.state for one in listed}


@pytest.mark.parametrize(("asked", "loaded"), [("", "10"), ("9", "9"), ("10", "10")])
def test_a_version_takes_the_place_of_the_one_before(server: Running, asked: str, loaded: str) -> None:
    assert version_that_answers(server) == "7"
    server.on_loop(server.repository.load("toy", asked))
    assert version_that_answers(server) == loaded
    assert server.client.get("/model").json()["version"] == loaded
    ready = [name for name, state in states(server).items() if state == "READY"]
    assert ready == [f"toy/{loaded}"]
    assert 'model="toy",provider="cpu",sha256=' in server.client.get("/metrics").text
    assert server.client.get("/metrics").text.count("anytime_model_info{") == 1


def test_versions_may_stay_side_by_side(server: Running) -> None:
    server.on_loop(server.repository.load("toy", "9", keep_others=True))
    assert server.repository.model().version == "9"
    assert server.repository.model("toy", "7").version == "7"
    assert server.repository.versions("toy") == ["7", "9"]
    server.on_loop(server.repository.unload("toy", "9"))
    assert version_that_answers(server) == "7"


def test_a_swap_fails_no_request(server: Running) -> None:
    """Callers in a row all the while: each is answered, first by the old version, then by the new one."""
    seen: list[tuple[int, str]] = []
    is_over = threading.Event()

    def call() -> None:
        while not is_over.is_set() or seen[-1][1] == "7":
            response = server.client.post(URL, content=BODY, headers=RAW)
            seen.append((response.status_code, str(response.json().get("version"))))

    caller = threading.Thread(target=call)
    caller.start()
    server.on_loop(server.repository.load("toy", "10"))
    is_over.set()
    caller.join()
    assert {status for status, _ in seen} == {200}
    versions = [version for _, version in seen]
    assert versions == sorted(versions, key=int)
    assert set(versions) == {"7", "10"}


def test_who_is_inside_is_answered_by_the_version_that_took_it_in(
    launch: Launcher, folder: Path, inference: Inference, session: BlockedSession
) -> None:
    waiting = Inference(
        inference.manifest, dict.fromkeys(toy_artifact.COLUMNS, session), provider="cpu", sha256="0" * 64
    )
    server = launch(inference=waiting, model_repository=folder, **QUICKLY)
    answers: list[dict[str, Any]] = []
    caller = threading.Thread(
        target=lambda: answers.append(server.client.post(URL, content=BODY, headers=RAW).json())
    )
    caller.start()
    assert session.started.wait(30)
    swap = asyncio.run_coroutine_threadsafe(server.repository.load("toy", "9"), server.loop)
    while states(server)["toy/9"] != "READY":
        pass
    assert states(server)["toy/7"] == "UNLOADING"
    assert not swap.done()
    session.released.set()
    caller.join()
    swap.result()
    ((version, columns_run),) = [(answer["version"], answer["columns_run"]) for answer in answers]
    assert (version, columns_run) == ("7", ["1", "2", "3"])
    assert states(server)["toy/7"] == "UNAVAILABLE"


def test_a_version_that_was_replaced_leaves_the_memory(server: Running) -> None:
    """Without the garbage collector: what lived when a version began to serve is frozen, out of its sight."""
    gc.disable()
    try:
        replaced = []
        for version in ("9", "10"):
            replaced.append(weakref.ref(server.repository.model()))
            version_that_answers(server)
            server.on_loop(server.repository.load("toy", version))
        while any(model() for model in replaced):  # the thread that ran it may still be about to end
            pass
    finally:
        gc.enable()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(TRIM is None, reason="needs glibc")
def test_memory_that_is_free_after_a_change_is_given_back_to_the_system(server: Running) -> None:
    pieces = [b"x" * 50_000 for _ in range(4_000)]
    kept = pieces[::20]  # so that none of the holes between them is at the end of a heap
    del pieces
    before = resident_bytes()
    server.on_loop(server.repository.load("toy", "9"))
    while resident_bytes() > before - 100_000_000:
        pass
    assert len(kept) == 200


def test_what_lives_when_a_version_is_loaded_is_not_frozen(server: Running) -> None:
    """It may be a request of somebody who leaves, and with it the version that was to answer."""
    frozen = gc.get_freeze_count()
    server.on_loop(server.repository.load("toy", "9"))
    assert gc.get_freeze_count() <= frozen


def test_a_circle_that_holds_a_version_is_collected_when_that_is_replaced(server: Running) -> None:
    circle: list[Any] = [server.repository.model()]
    circle.append(circle)
    replaced = weakref.ref(circle[0])
    del circle
    gc.disable()
    try:
        server.on_loop(server.repository.load("toy", "9"))
        while replaced():
            pass
    finally:
        gc.enable()


def damage(folder: Path) -> None:
    (folder / "column-2.onnx").write_bytes(b"damaged")


def rename(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": "11"}))


@pytest.mark.parametrize(("break_", "says"), [(damage, "SHA-256 differs"), (rename, "version '11'")])
def test_what_cannot_be_loaded_changes_nothing(
    server: Running, folder: Path, break_: Callable[[Path], None], says: str
) -> None:
    break_(folder / "toy" / "9")
    with pytest.raises(NotLoadable, match=says):
        server.on_loop(server.repository.load("toy", "9"))
    assert version_that_answers(server) == "7"
    listed = asyncio.run_coroutine_threadsafe(server.repository.index(), server.loop).result()
    assert [says in one.reason for one in listed if one.version == "9"] == [True]
    assert states(server)["toy/9"] == "UNAVAILABLE"


def remove(folder: Path) -> None:
    (folder / "column-2.onnx").unlink()


def poison(folder: Path) -> None:
    """Divide by 0: a picture of zeros, with which it is warmed up, gives NaN."""
    graph = onnx.load_from_string((folder / "column-1.onnx").read_bytes())
    white = next(constant for constant in graph.graph.initializer if constant.name == "white")
    white.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), "white"))
    (folder / "column-1.onnx").write_bytes(graph.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["rungs"][0]["sha256"] = hashlib.sha256(graph.SerializeToString()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("break_", [remove, damage, rename, poison])
def test_what_cannot_be_loaded_leaves_nothing(
    server: Running, folder: Path, break_: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Not even until garbage is collected: the next version that is loaded freezes it for good."""
    caplog.set_level(logging.CRITICAL, "service.repository")  # pytest would keep the error with the message
    break_(folder / "toy" / "9")
    with nothing_left_of(Inference, Manifest, n_bytes=100_000):
        for _ in range(2):
            with pytest.raises(NotLoadable):
                server.on_loop(server.repository.load("toy", "9"))


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [("max_models", 1, "set max_models"), ("load_timeout_s", 1e-6, "set load_timeout_s")],
)
def test_loading_has_bounds(launch: Launcher, folder: Path, setting: str, value: Any, says: str) -> None:
    server = launch(model_repository=folder, **QUICKLY, **{setting: value})
    with pytest.raises(NotLoadable, match=says):
        server.on_loop(server.repository.load("toy", "9"))
    assert version_that_answers(server) == "7"


@pytest.mark.parametrize("name", ["dog", "..", ".", "", "toy/7", "../toy", "*", "toy\0"])
def test_only_what_is_in_the_repository_can_be_loaded(server: Running, name: str) -> None:
    with pytest.raises(NotFound, match="The repository has no"):
        server.on_loop(server.repository.load(name))
    with pytest.raises(NotFound, match="The repository has no"):
        server.on_loop(server.repository.load("toy", name or "11"))


def test_without_a_repository_nothing_can_be_loaded(launch: Launcher) -> None:
    server = launch()
    with pytest.raises(NotFound, match="model_repository"):
        server.on_loop(server.repository.load("toy"))


def test_an_unloaded_model_is_answered_with_503_and_can_come_back(server: Running) -> None:
    server.on_loop(server.repository.unload("toy"))
    assert server.client.post(URL, content=BODY, headers=RAW).status_code == 503
    assert server.client.get("/healthz/ready").status_code == 503
    with pytest.raises(NotFound, match="is not loaded"):
        server.on_loop(server.repository.unload("toy"))
    server.on_loop(server.repository.load("toy"))
    assert version_that_answers(server) == "10"
    assert server.client.get("/healthz/ready").status_code == 200


def test_a_server_that_stops_loads_nothing(server: Running) -> None:
    loading = asyncio.run_coroutine_threadsafe(server.repository.load("toy"), server.loop)
    server.on_loop(server.service.drain())
    with pytest.raises(Stopped):
        loading.result()
    with pytest.raises(Stopped):
        server.on_loop(server.repository.load("toy"))


def prepared(**settings: Any) -> Repository:
    return asyncio.run(prepare(Settings(profile_cache=None, **QUICKLY, **settings)))


def test_models_are_loaded_from_the_start(artifact: Path, folder: Path) -> None:
    repository = prepared(artifact=artifact, model_repository=folder, models=("toy/9",))
    assert repository.model().version == "9"
    assert repository.model("toy", "7").version == "7"
    with pytest.raises(ArtifactError, match="ANYTIME_MODELS names dog"):
        prepared(artifact=artifact, model_repository=folder, models=("dog",))


def test_a_model_that_is_not_loaded_is_not_found(server: Running) -> None:
    problem: type[Problem]
    for name, version, problem in (("dog", "", NotFound), ("toy", "8", NotFound)):
        with pytest.raises(problem, match="is not loaded"):
            server.repository.model(name, version)


def test_only_a_server_that_may_run_on_a_gpu_looks_at_one(launch: Launcher) -> None:
    """Else a GPU that is left to others would look like one that could not be used."""
    assert launch(provider="cpu").repository.metrics._gpus is None
    assert launch(provider="auto").repository.metrics._gpus is not None
