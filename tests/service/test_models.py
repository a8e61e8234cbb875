"""Where a model runs: on what was asked for, and with `auto` on a GPU that works."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service import models, providers
from service.errors import NotLoadable, Stopped
from service.inference import ProviderUnavailable
from service.models import Model
from service.repository import Repository
from service.settings import Settings
from tests.service.conftest import BATCH_SIZES
from tests.service.fake_cuda import FakeCuda, install

LOST = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=here"


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


@pytest.mark.parametrize(
    ("provider", "chosen", "expected"),
    [
        ("cpu", None, (1, 2, 4, 8)),
        ("auto", None, (1, 2, 4, 8, 16, 32, 64)),
        ("cuda", None, (1, 2, 4, 8, 16, 32, 64)),
        ("cuda", (1, 3), (1, 3)),
        ("cpu", (1, 16), (1, 16)),
    ],
)
def test_batches_are_as_large_as_pays_on_what_was_taken_unless_that_is_chosen(
    cuda: FakeCuda, artifact: Path, provider: Any, chosen: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    settings = Settings(profile_cache=None, profile_seconds=0.01, batch_sizes=chosen, provider=provider)
    model = asyncio.run(models.load(settings, artifact))
    model.close()
    assert model.profile.batch_sizes == expected
    assert all(max(map(len, session.images)) == expected[-1] for session in cuda.sessions)


def test_where_no_gpu_works_batches_are_those_of_the_cpu(cuda: FakeCuda, artifact: Path) -> None:
    cuda.open_error = "CUDA failure 35: CUDA driver version is insufficient ; GPU=-1"
    settings = Settings(profile_cache=None, profile_seconds=0.01, provider="auto")
    model = asyncio.run(models.load(settings, artifact))
    model.close()
    assert model.profile.batch_sizes == (1, 2, 4, 8)


@pytest.mark.parametrize("way", ["open", "run"])
def test_a_gpu_that_is_lost_at_the_start_is_one_that_does_not_work(
    cuda: FakeCuda, artifact: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    setattr(cuda, f"{way}_error", LOST)
    with pytest.raises(ProviderUnavailable, match=r"failure 700.*ANYTIME_PROVIDER=cpu"):
        loaded(artifact, provider="cuda")
    assert loaded(artifact, provider="auto").provider == "cpu"
    assert "everything will run on the CPU" in caplog.text


@pytest.mark.parametrize("way", ["open", "run"])
def test_a_gpu_that_is_lost_while_a_version_is_loaded_is_lost_to_those_who_serve(
    cuda: FakeCuda, artifact: Path, tmp_path: Path, way: str
) -> None:
    """Also with `auto`: the version is not loaded on the CPU instead."""
    chosen: dict[str, Any] = {"profile_seconds": 0.01, "batch_sizes": BATCH_SIZES, "keep_warm_ms": 0}
    settings = Settings(profile_cache=None, model_repository=tmp_path, **chosen)
    shutil.copytree(artifact, tmp_path / "toy" / "7")

    async def lose() -> None:
        repository = Repository(settings, await models.load(settings, artifact))
        async with repository.serving():
            setattr(cuda, f"{way}_error", LOST)
            with pytest.raises(NotLoadable, match=r"The GPU is lost, and this server ends: .*failure 700"):
                await repository.load("toy")
            assert not repository.is_ready
            assert repository.broken.startswith("the GPU is lost: ")
            with pytest.raises(Stopped):
                repository.model().engine.check_admission(0.0, 1e9)

    asyncio.run(lose())
