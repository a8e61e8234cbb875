"""Where a model runs: on what was asked for, and with `auto` on a GPU that works."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from service import models, providers
from service.inference import ProviderUnavailable
from service.models import Model
from service.repository import Repository
from service.settings import Settings, load
from tests.service.conftest import BATCH_SIZES
from tests.service.fake_cuda import FakeCuda, install


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCuda:
    """A machine with a GPU."""
    monkeypatch.setattr(providers, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    return install(monkeypatch, FakeCuda())


def loaded(artifact: Path, **settings: Any) -> Model:
    chosen = Settings(profile_cache=None, profile_seconds=0.01, batch_sizes=BATCH_SIZES, **settings)
    model = asyncio.run(models.load(chosen, artifact))
    model.close()
    return model


def test_auto_takes_a_gpu_that_works_and_says_so(
    cuda: FakeCuda, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = loaded(artifact, provider="auto")
    assert (model.provider, json.loads(model.card)["provider"]) == ("cuda", "cuda")
    assert "running on cuda" in caplog.text


@pytest.mark.parametrize("way", ["absent", "open", "run"])
def test_auto_says_loudly_that_a_gpu_does_not_work_and_takes_the_cpu(
    cuda: FakeCuda, artifact: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level("INFO")
    if way == "absent":
        cuda.absent = ("CUDAExecutionProvider",)
    else:
        setattr(cuda, f"{way}_error", "CUDA failure 35: CUDA driver version is insufficient ; GPU=-1")
    model = loaded(artifact, provider="auto")
    assert (model.provider, json.loads(model.card)["provider"]) == ("cpu", "cpu")
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "everything will run on the CPU" in said.message
    assert "running on cpu." in caplog.text


@pytest.mark.parametrize("way", ["open", "run"])
def test_a_gpu_that_was_asked_for_is_not_replaced(cuda: FakeCuda, artifact: Path, way: str) -> None:
    setattr(cuda, f"{way}_error", "CUDA failure 35: CUDA driver version is insufficient ; GPU=-1")
    with pytest.raises(ProviderUnavailable, match="failure 35"):
        loaded(artifact, provider="cuda")


def test_settings_reach_the_gpu(cuda: FakeCuda, artifact: Path) -> None:
    loaded(
        artifact,
        provider="cuda",
        cuda_graphs=False,
        cudnn_conv_algo_search="exhaustive",
        use_tf32=True,
        prefer_nhwc=True,
    )
    assert cuda.sessions[0].chain[0][1] == {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "enable_cuda_graph": "0",
        "prefer_nhwc": "1",
        "use_tf32": "1",
    }


@pytest.mark.parametrize(
    ("provider", "chosen", "expected_s"),
    [
        ("cuda", None, models.KEEP_WARM_S),
        ("cuda", 0, 0),
        ("cuda", 5, 0.005),
        ("cpu", None, 0),
        ("cpu", 20, 0.02),
    ],
)
def test_a_gpu_is_kept_warm_and_a_processor_only_if_that_is_asked_for(
    cuda: FakeCuda, artifact: Path, provider: Any, chosen: float | None, expected_s: float
) -> None:
    async def opened() -> float:
        settings = Settings(
            profile_cache=None,
            profile_seconds=0.01,
            batch_sizes=BATCH_SIZES,
            provider=provider,
            keep_warm_ms=chosen,
        )
        model = await models.load(settings, artifact)
        repository = Repository(settings, model)
        async with repository.serving():
            return model.engine._keep_warm_s

    assert asyncio.run(opened()) == expected_s


def test_an_empty_interval_is_left_to_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYTIME_KEEP_WARM_MS", "")
    assert load().keep_warm_ms is None
