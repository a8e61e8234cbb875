"""How fast training is: images per second of a plain PyTorch loop and of this one, in one run.

    python -m model.speed --out docs/training_speed

The same network, recipe and batches four ways, in turns: a plain loop (float32, which cuDNN rounds to TF32,
channels first, pictures prepared by the CPU between the steps and not by workers beside them), and
`train.Run` without CUDA graphs, with them, and compiled. cuDNN searches its algorithms for all of them.
Beside them the share of what the chip's matrix units reach in one large product, with the operations of
dropped paths counted, which only a recorded step carries out. The pictures are noise: nothing is learnt.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

from model import data
from model.fractalnet import FractalNet, cost
from model.recipe import RECIPES, Recipe
from model.train import (
    MARGIN,
    Objective,
    Run,
    TrainingError,
    about_this_machine,
    augmented,
    build,
    optimiser_for,
    sample_parts,
)

FLOPS_PER_MAC = 6
"""Two forward, twice as many backward: for the images, and for the weights."""
N_PRODUCTS = 20
TAUGHT = RECIPES["distilled"]


@dataclass(frozen=True)
class Speed:
    """Images per second of one way, in each of its turns."""

    way: str
    images_hz: tuple[float, ...]


def noise(n: int, seed: int = 0) -> data.Dataset:
    """A dataset of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.randint(10, (n,), generator=generator))
    labels = tuple("0123456789")
    return data.Dataset(
        "noise", labels, split, split[:10], split[:10], torch.full((3,), 0.5), torch.full((3,), 0.3)
    )


class PlainLoop:
    """What a training script does before anybody has made it faster."""

    def __init__(self, recipe: Recipe, dataset: data.Dataset, device: torch.device) -> None:
        self.recipe, self.dataset, self.device = recipe, dataset, device
        self.net = build(recipe, dataset, 0).to(device)
        self.objective = Objective(self.net, recipe)
        self.optimiser = optimiser_for(self.net, recipe)
        self.padded_NCHW = data.pad(dataset.train.images_NCHW, MARGIN)
        self.epoch = 0

    def train_epoch(self) -> float:
        """Train one and return the sum of its losses."""
        generator = torch.Generator().manual_seed(self.epoch)
        self.net.train()
        total = 0.0
        for rows in data.batches(len(self.dataset.train), self.recipe.batch_size, generator):
            images = augmented(self.recipe, self.dataset, self.padded_NCHW, rows, self.epoch, generator)
            parts = sample_parts(self.recipe, self.net.architecture, generator)
            labels_N = self.dataset.train.labels_N[rows].to(self.device)
            loss = self.objective(images.to(self.device), labels_N, parts)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            total += loss.item()
        self.epoch += 1
        return total


def measure(
    ways: Mapping[str, Callable[[], object]], n_images: int, n_turns: int, device: torch.device
) -> list[Speed]:
    """Let each way train an epoch, in turns; the first turn warms up and is not counted."""
    taken_s: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + n_turns):
        for way, epoch in ways.items():
            start_s = time.perf_counter()
            epoch()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken_s[way].append(time.perf_counter() - start_s)
    return [Speed(way, tuple(n_images / s for s in each[1:])) for way, each in taken_s.items()]


def peak_flops(device: torch.device, side: int) -> float:
    """Floating-point operations per second in a product of two bfloat16 matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def seconds(n: int) -> float:
        start_s = time.perf_counter()
        for _ in range(n):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start_s

    seconds(3)
    return N_PRODUCTS * 2 * side**3 / seconds(N_PRODUCTS)


def flops_per_image(recipe: Recipe, net: FractalNet) -> float:
    """Of a step, on average: those of the networks that a batch trains, by the recipe's shares."""
    macs = {name: cost(network, net.architecture).macs for name, network in net.networks().items()}
    columns = sum(macs[name] for name in macs if name != "full")
    if recipe.passes == "tied":
        return FLOPS_PER_MAC * (macs["full"] + columns)
    per_coin = columns if recipe.passes == "columns" else columns / net.architecture.n_columns
    return FLOPS_PER_MAC * (recipe.local_share * macs["full"] + (1 - recipe.local_share) * per_coin)


def table(recipe: Recipe, speeds: list[Speed], flops: float, peak: float) -> str:
    """The speeds as Markdown."""
    plain_hz = mean(speeds[0].images_hz)
    about = (
        f"{recipe.architecture}, batches of {recipe.batch_size}, {flops / 1e9:.2f} GFLOP an image; "
        f"one large product of bfloat16 matrices: {peak / 1e12:.1f} TFLOP/s."
    )
    lines = [
        about,
        "",
        "| way | images/s | of the plain loop | of the large product, % |",
        "|---|---:|---:|---:|",
    ]
    for speed in speeds:
        hz = mean(speed.images_hz)
        lines.append(
            f"| {speed.way} | {hz:,.0f} ± {stdev(speed.images_hz):,.0f} | {hz / plain_hz:.2f} "
            f"| {100 * hz * flops / peak:.1f} |"
        )
    return "\n".join(lines)


def compare(recipe: Recipe, n_steps: int, n_turns: int, device: torch.device, peak: float) -> str:
    """Measure one recipe's ways."""
    dataset = noise(n_steps * recipe.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        run = partial(Run, recipe, dataset, Path(folder), seed=0, bf16=True, device=str(device))
        eager = run(has_cuda_graphs=False)
        ways: dict[str, Callable[[], object]] = {
            "plain loop": PlainLoop(recipe, dataset, device).train_epoch,
            "bfloat16, channels last, pictures on the device": eager.train_epoch,
        }
        if device.type == "cuda":
            ways["the same, replayed as CUDA graphs"] = run().train_epoch
            ways["the same, compiled and replayed"] = run(is_compiled=True).train_epoch
        speeds = measure(ways, len(dataset.train), n_turns, device)
        return table(recipe, speeds, flops_per_image(recipe, eager.net.cpu()), peak)


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line says; the exit code is 0, or 1 with a sentence for each that failed."""
    parser = argparse.ArgumentParser(prog="python -m model.speed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipes", default="paper,wide,anytime", help="with commas; without a given teacher"
    )
    parser.add_argument("--batch-size", type=int, help="instead of each recipe's")
    parser.add_argument("--steps", type=int, default=30, help="in a turn")
    parser.add_argument(
        "--turns", type=int, default=5, help="of each way, at least 2, after one that is not counted"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write PATH.md")
    options = parser.parse_args(argv)
    if options.turns < 2:
        parser.error("--turns must be at least 2, to tell a deviation")
    if unknown := [name for name in options.recipes.split(",") if RECIPES.get(name, TAUGHT) == TAUGHT]:
        parser.error(f"{unknown[0]!r} is no recipe that needs no teacher")
    device = torch.device(options.device)
    here = about_this_machine()
    about = (
        f"{here['hardware']}, torch {here['packages']['torch']}, {datetime.now(UTC):%Y-%m-%d}, "
        f"{options.turns} turns of {options.steps} steps each. "
        f"`python -m model.speed {' '.join(sys.argv[1:] if argv is None else argv)}`"
    )
    lines = [about]
    print(about)
    peak = peak_flops(device, 8192 if device.type == "cuda" else 512)
    failed = False
    for name in options.recipes.split(","):
        recipe = RECIPES[name]
        try:
            recipe = dataclasses.replace(recipe, batch_size=options.batch_size or recipe.batch_size)
            found = compare(recipe, options.steps, options.turns, device, peak)
        except (TrainingError, ValueError, torch.OutOfMemoryError) as error:
            print(f"model.speed: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"\n{found}", flush=True)
        lines += ["", found]
        if options.out:  # after each: what comes next may not fit, or be cut off
            options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
