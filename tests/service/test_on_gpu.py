"""What can only be seen on a GPU: `make test ARGS="-m gpu"` there."""

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import models, providers
from service.engine import InferenceThread
from service.inference import Inference, ProviderUnavailable, load
from service.providers import GpuOptions
from service.settings import Settings, embedded_artifact
from tests.service import toy_artifact
from tests.service.conftest import Launcher, Running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ARTIFACT = embedded_artifact()
SIZES = (1, 2, 8, 64)
COUNTS = (1, 2, 3, 8, 33, 64)
"""Images in a run: of each batch size, and fewer than some."""
RAW = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    if "cuda" not in providers.candidates("auto"):
        pytest.skip("no GPU here, or an onnxruntime without CUDA")


@pytest.fixture(scope="module")
def images_NHWC() -> Any:  # noqa: N802 - as N803
    spec = load_on("cpu").manifest.input
    shape = max(COUNTS), spec.height, spec.width, spec.channels
    return np.random.default_rng(7).integers(0, 256, shape, np.uint8)


def load_on(provider: Any, artifact: Path = ARTIFACT, **gpu: Any) -> Inference:
    return load(artifact, provider=provider, intra_op_threads=1, batch_sizes=SIZES, gpu=GpuOptions(**gpu))


def logits(loaded: Inference, images_NHWC: Any) -> list[Any]:
    """Of every column and number of images, twice, in the thread that was warmed up, as when serving."""

    async def run() -> list[Any]:
        thread = InferenceThread(loaded)
        try:
            await thread.warm_up(SIZES)
            return [
                await thread.start(rung.column, list(images_NHWC[:n]))
                for _ in range(2)
                for n in COUNTS
                for rung in loaded.manifest.rungs
            ]
        finally:
            thread.close()

    return asyncio.run(run())


def assert_alike(some: list[Any], others: list[Any], tolerance: float) -> None:
    for some_NK, others_NK in zip(some, others, strict=True):
        np.testing.assert_allclose(some_NK, others_NK, rtol=tolerance, atol=tolerance)


def test_every_operator_runs_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert load_on("cuda").provider == "cuda"
    assert "Not all of a column" not in caplog.text


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_answers_are_those_of_the_cpu(images_NHWC: Any, cuda_graphs: bool) -> None:
    on_gpu = logits(load_on("cuda", cuda_graphs=cuda_graphs), images_NHWC)
    assert_alike(on_gpu, logits(load_on("cpu"), images_NHWC), 1e-3)


def test_graphs_change_no_answer(images_NHWC: Any) -> None:
    with_graphs = logits(load_on("cuda"), images_NHWC)
    assert_alike(with_graphs, logits(load_on("cuda", cuda_graphs=False), images_NHWC), 1e-5)


@pytest.mark.parametrize(
    "option", [{"use_tf32": True}, {"prefer_nhwc": True}, {"conv_algorithms": "exhaustive"}]
)
def test_what_may_be_chosen_changes_no_answer_by_much(images_NHWC: Any, option: dict[str, Any]) -> None:
    assert_alike(logits(load_on("cuda", **option), images_NHWC), logits(load_on("cpu"), images_NHWC), 5e-2)


def test_tensorrt_gives_the_same_answers_and_finds_again_what_it_built(
    images_NHWC: Any, tmp_path: Path
) -> None:
    try:
        built = load_on("tensorrt", tensorrt_cache=tmp_path)
    except ProviderUnavailable as error:
        pytest.skip(f"no TensorRT here: {error}")
    expected = logits(load_on("cpu"), images_NHWC)
    assert_alike(logits(built, images_NHWC), expected, 1e-2)
    engines = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")}
    assert len(engines) >= len(built.manifest.rungs)
    assert_alike(logits(load_on("tensorrt", tensorrt_cache=tmp_path), images_NHWC), expected, 1e-2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")} == engines


def test_auto_takes_it() -> None:
    chosen = Settings(profile_cache=None, profile_seconds=0.5, batch_sizes=SIZES)
    model = asyncio.run(models.load(chosen, ARTIFACT))
    model.close()
    assert model.provider == "cuda"


# ---- serving ----


@pytest.fixture
def server(launch: Launcher, tmp_path: Path) -> Running:
    """A server on the GPU, with another version to load."""
    toy_artifact.write(tmp_path / "toy" / "7", "7")
    toy_artifact.write(tmp_path / "toy" / "8", "8")
    settings: dict[str, Any] = {"provider": "cuda", "batch_sizes": (1, 2, 4), "profile_seconds": 0.5}
    chosen = Settings(profile_cache=None, **settings)
    model = asyncio.run(models.load(chosen, tmp_path / "toy" / "7"))
    return launch(model=model, model_repository=tmp_path, **settings)


def test_a_version_is_captured_beside_serving_without_harm(server: Running) -> None:
    statuses: list[int] = []
    is_over = threading.Event()
    body = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)

    def call() -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60, trust_env=False) as client:
            while not is_over.is_set():
                response = client.post("/predict?budget_ms=5000", content=body, headers=RAW)
                statuses.append(response.status_code)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for version in ("8", "7", "8"):
        server.on_loop(server.repository.load("toy", version))
    is_over.set()
    for caller in callers:
        caller.join()
    assert set(statuses) == {200}
    assert server.client.get("/model").json()["provider"] == "cuda"
    assert 'provider="cuda"' in server.client.get("/metrics").text


@pytest.mark.slow
def test_whoever_comes_after_a_silence_is_answered_in_time(server: Running) -> None:
    body = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)
    for _ in range(5):
        threading.Event().wait(5)
        response = server.client.post("/predict?budget_ms=20", content=body, headers=RAW)
        assert response.status_code == 200
        assert response.json()["deadline_met"]
