"""Each command that trains, at toy size where it is meant to run: `make test ARGS="-m gpu"`."""

from pathlib import Path

import pytest
import torch

from model import ablate, export, reproduce, speed
from model.reproduce import BEGIN, END
from service import inference, providers
from tests.model.test_data import write_cifar10

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SMALL = ["--architecture", "cifar-deep-2", "--epochs", "2", "--batch-size", "8", "--learning-rate", "0.01"]


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here, or a torch without CUDA")


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A folder with a miniature CIFAR-10 and a page with a place."""
    write_cifar10(tmp_path, n=10)
    (tmp_path / "page.md").write_text(f"{BEGIN}\n{END}\n")
    return tmp_path


def arguments(official: Path, out: str) -> list[str]:
    places = {"--data": official, "--out": official / out, "--page": official / "page.md"}
    return [*SMALL, *(str(part) for item in places.items() for part in item), "--seeds", "1"]


@pytest.mark.parametrize("recipe", ["paper", "wide"])
@pytest.mark.parametrize("way", ["--compile", "--no-cuda-graphs", "--precision=fp32"])
def test_the_papers_networks_train_in_every_way(official: Path, recipe: str, way: str) -> None:
    how = ["--studies", "cifar10-20", "--recipes", recipe, way, "--averaging", "0.5"]

    assert reproduce.main([*arguments(official, "runs"), *how]) == 0
    assert "| joined |" in (official / "page.md").read_text()


def test_the_networks_that_ship_are_taught_by_another_and_compared(official: Path) -> None:
    only = ["--only", "averaged,taught-by-joined"]
    assert ablate.main([*arguments(official, "untaught"), *only]) == 0
    teacher = official / "untaught" / "as-it-is-seed-0" / "checkpoint.pt"

    assert ablate.main([*arguments(official, "taught"), "--teacher", str(teacher), *only]) == 0
    assert "| averaged: points added | 1 |" in (official / "page.md").read_text()


def test_the_speed_of_every_way_is_measured(tmp_path: Path) -> None:
    how = ["--batch-size", "8", "--steps", "2", "--turns", "2", "--out", str(tmp_path / "speed")]

    assert speed.main(["--recipes", "anytime", *how]) == 0
    assert "compiled and replayed" in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 2e-2)])
def test_what_was_trained_there_is_exported_and_answers_there_as_on_a_cpu(
    official: Path, precision: str, tolerance: float
) -> None:
    if "cuda" not in providers.candidates("auto"):
        pytest.skip("this onnxruntime has no CUDA")
    how = ["--studies", "cifar10-20", "--recipes", "wide", "--held-out", "5"]
    assert reproduce.main([*arguments(official, "runs"), *how]) == 0
    made = {"--checkpoint": official / "runs" / "cifar10-20-wide-seed-0" / "checkpoint.pt"}
    made |= {"--data": official, "--out": official / "artifact"}
    words = [str(part) for item in made.items() for part in item]

    assert export.main([*words, "--precision", precision, "--with-joined"]) == 0

    images_NHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8).numpy()
    gpu, cpu = (
        inference.load(official / "artifact", provider=provider, intra_op_threads=1, batch_sizes=(1, 4))
        for provider in ("cuda", "cpu")
    )
    for column in ("1", "2", "full"):
        ours, theirs = (torch.from_numpy(each.run(column, images_NHWC).copy()) for each in (gpu, cpu))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
