"""Steps recorded as CUDA graphs: the same numbers as without. Needs a GPU: `make test ARGS="-m gpu"`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.data import Dataset
from model.droppath import Global, Local, Paths, sample_local
from model.recipe import Recipe
from model.replay import Replay
from model.train import Run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

RECIPE = Recipe("cifar-deep-3", 2, 12, 0.05, "triangle", passes="tied", dropout=False, local_drop=0.0)
KINDS: dict[str, list[Paths]] = {
    "joined": [sample_local(5, 3, 0.3, torch.Generator().manual_seed(3))],
    "column": [Global(2)],
    "everything": [
        sample_local(5, 3, 0.3, torch.Generator().manual_seed(5)),
        Global(1),
        Global(2),
        Global(3),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def _exactly() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here, or a torch without CUDA")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def a_run(dataset: Dataset, out: Path, recipe: Recipe = RECIPE, *, has_cuda_graphs: bool) -> Run:
    return Run(recipe, dataset, out, seed=0, bf16=False, device="cuda", has_cuda_graphs=has_cuda_graphs)


def gradients(run: Run, parts: list[Paths], seed: int) -> tuple[Tensor, list[Tensor]]:
    """The loss of all images and the gradient of each parameter, 0 where it has none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(run.dataset.train), generator=generator)
    loss = run._gradients(*run._batch(rows, generator), parts)
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.net.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_gives_the_gradients_of_one_that_is_not(
    toy: Dataset, tmp_path: Path, kind: str
) -> None:
    recorded, eager = (a_run(toy, tmp_path, has_cuda_graphs=graphs) for graphs in (True, False))

    for seed in (1, 2, 3):  # recorded in the first, replayed in the others
        ours, theirs = (gradients(run, KINDS[kind], seed) for run in (recorded, eager))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
        for a, b in zip(ours[1], theirs[1], strict=True):
            # Other kernels and another order of sums, through 20 layers of BatchNorm over few images.
            assert float((a - b).norm()) <= 0.05 * float(b.norm()) + 1e-6


def test_other_masks_are_not_those_that_were_recorded(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, has_cuda_graphs=True)
    shallow, deep = (Local((((True, False), (k == 1, False, k == 3)),) * 5) for k in (1, 3))

    of_shallow, of_deep, again = (gradients(run, [masks], 1)[0] for masks in (shallow, deep, shallow))

    assert float(of_shallow) != float(of_deep)
    torch.testing.assert_close(of_shallow, again)


def test_a_run_learns_alike_with_graphs_and_without(toy: Dataset, tmp_path: Path) -> None:
    runs = [a_run(toy, tmp_path, has_cuda_graphs=graphs) for graphs in (True, False)]

    first, second = (run.train_epoch() for run in runs)

    assert first == pytest.approx(second, rel=0.05)  # no closer: what differs in the last digit grows
    counts = ([float(b) for n, b in run.net.named_buffers() if n.endswith("tracked")] for run in runs)
    assert next(counts) == next(counts)  # warming up has left no trace


def test_recording_changes_neither_buffers_nor_what_is_drawn_at_random() -> None:
    norm = torch.nn.BatchNorm2d(3).cuda().train()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    torch.cuda.manual_seed(7)
    drawn = torch.rand(5, device="cuda")

    def loss(images: Tensor) -> Tensor:
        return torch.nn.functional.dropout(norm(images), 0.5).square().mean()

    example = torch.randn(4, 3, 8, 8, device="cuda")
    torch.cuda.manual_seed(7)
    replay = Replay(loss, norm, (example,))

    torch.testing.assert_close(dict(norm.named_buffers()), before, rtol=0, atol=0)
    assert torch.equal(torch.rand(5, device="cuda"), drawn)
    losses = {float(replay(torch.ones(4, 3, 8, 8, device="cuda").normal_())) for _ in range(3)}
    assert len(losses) == 3
    assert dict(norm.named_buffers())["num_batches_tracked"].item() == 3


def test_dropout_draws_anew_in_each_replay(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, dataclasses.replace(RECIPE, dropout=True), has_cuda_graphs=True)

    losses = {float(gradients(run, KINDS["column"], 1)[0]) for _ in range(4)}

    assert len(losses) == 4
