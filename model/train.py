"""Train a FractalNet with drop-path: a frozen recipe in, a checkpoint and a run record out.

    python -m model.train --recipe anytime --dataset cifar10 --data data --out runs/latest

Must not know calibration, export or serving. Everything random comes from generators seeded by (seed, epoch),
so an epoch is a function of the checkpoint before it: a run that was interrupted ends like one that was not.
"""

import argparse
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NotRequired, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model import data, droppath
from model.fractalnet import (
    Architecture,
    FractalNet,
    Stem,
    initialise,
    join_weights,
    preset,
)
from model.recipe import RECIPES, Recipe, add_overrides, learning_rate, overridden
from model.replay import Replay

Answers = Callable[[Tensor], Tensor]
"""Logits_NK, or log probabilities, of normalised images_NCHW."""

CHECKPOINT = "checkpoint.pt"
EVALUATION_BATCH = 500
MARGIN = 4  # shift in pixels, and the border reflected for it [the paper's "+" and "++"]
N_WHITENING_PIXELS = 5000 * 32 * 32  # the filters settle long before; see whitening_filters


class TrainingError(Exception):
    """Training cannot go on; the message says why and what is left."""


def build(recipe: Recipe, dataset: data.Dataset, seed: int) -> FractalNet:
    """The recipe's network for this dataset, with fresh weights."""
    images = dataset.train.images_NCHW
    architecture = preset(
        recipe.architecture, n_classes=len(dataset.labels), size=images.shape[2], channels=images.shape[1]
    )
    dropout = architecture.dropout if recipe.dropout else ()
    architecture = dataclasses.replace(architecture, dropout=dropout, affine=recipe.affine)
    torch.manual_seed(seed)
    net = FractalNet(architecture)
    n_whitening = max(100, N_WHITENING_PIXELS // images.shape[2] ** 2)
    initialise(net, recipe.initialisation, dataset.normalise(images[:n_whitening]))
    return net


# ---- one step ----


def augmented(
    recipe: Recipe,
    dataset: data.Dataset,
    padded_NCHW: Tensor,
    rows: Tensor,
    epoch: int,
    generator: torch.Generator,
) -> Tensor:
    """A batch as the recipe has it seen: float images_NCHW, on the device of the padded ones.

    Args:
        recipe: What is done to each image.
        dataset: How they are normalised, and how large they are.
        padded_NCHW: All training images, from `data.pad`.
        rows: Which of them, on the same device.
        epoch: Of the run, counted from 0.
        generator: Draws everything that is random, in the same order on every device.
    """
    mirrored = data.flips(rows, epoch, recipe.flip, generator)
    size = dataset.train.images_NCHW.shape[2]
    images_NCHW = data.shift_and_flip(padded_NCHW[rows], size, mirrored, generator)
    normalised_NCHW = dataset.normalise(images_NCHW)
    return data.cut_out(normalised_NCHW, recipe.cutout, generator) if recipe.cutout else normalised_NCHW


class Objective(nn.Module):
    """The loss of one batch, as a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, net: FractalNet, recipe: Recipe, teacher: Answers | None = None) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.teacher = teacher

    def forward(self, images_NCHW: Tensor, labels_N: Tensor, parts: list[droppath.Paths]) -> Tensor:
        """The weighted sum of the losses of the parts, a scalar."""
        answers = [self._answer(images_NCHW, paths) for paths in parts]
        taught_NK = self._taught(images_NCHW, answers)
        losses = []
        for paths, logits_NK in zip(parts, answers, strict=True):
            is_teacher = isinstance(paths, droppath.Local) and self.recipe.teacher == "joined"
            loss = self._loss(logits_NK, labels_N, None if is_teacher else taught_NK)
            losses.append(self._weight(paths) * loss)
        return torch.stack(losses).sum()

    def _answer(self, images_NCHW: Tensor, paths: droppath.Paths) -> Tensor:
        if isinstance(paths, droppath.Local):
            logits_NK: Tensor = self.net(images_NCHW, paths.masks)
        else:
            logits_NK = self.net.column(paths.column)(images_NCHW)
        return logits_NK.float()

    def _weight(self, paths: droppath.Paths) -> float:
        of_recipe = self.recipe.column_weight
        of_column = 1 / self.net.architecture.n_columns if of_recipe is None else of_recipe
        return 1.0 if isinstance(paths, droppath.Local) else of_column

    def _taught(self, images_NCHW: Tensor, answers: list[Tensor]) -> Tensor | None:
        """What the teacher says; the joined net's answer is the first of "tied" passes."""
        if self.teacher:
            return self.teacher(images_NCHW)
        return answers[0].detach() if self.recipe.distillation else None

    def _loss(self, logits_NK: Tensor, labels_N: Tensor, taught_NK: Tensor | None) -> Tensor:
        smoothing = self.recipe.label_smoothing
        of_labels = nn.functional.cross_entropy(logits_NK, labels_N, label_smoothing=smoothing)
        if taught_NK is None:
            return of_labels
        share, temperature = self.recipe.distillation, self.recipe.temperature
        of_teacher = nn.functional.kl_div(
            (logits_NK / temperature).log_softmax(1),
            (taught_NK / temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        # The square keeps the size of the gradient: Hinton et al., arXiv 1503.02531, section 2.
        return (1 - share) * of_labels + share * temperature**2 * of_teacher


def answers_of(kept: "Checkpoint", device: torch.device) -> Answers:
    """A trained network as a teacher: the geometric mean of its columns' answers.

    Its columns rather than its joined net, whose BatchNorm statistics training leaves those of dropped paths.
    """
    net = kept.network().to(device).requires_grad_(False)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's hints lack it
    columns = [net.column(k) for k in range(1, net.architecture.n_columns + 1)]

    @torch.no_grad()
    def answers(images_NCHW: Tensor) -> Tensor:
        return torch.stack([column(images_NCHW).float().log_softmax(1) for column in columns]).mean(0)

    return answers


def sample_parts(
    recipe: Recipe, architecture: Architecture, generator: torch.Generator
) -> list[droppath.Paths]:
    """Which networks the next batch trains."""
    n_blocks, n_columns = len(architecture.widths), architecture.n_columns
    every_column: list[droppath.Paths] = [droppath.Global(k) for k in range(1, n_columns + 1)]
    if recipe.passes == "tied":
        return [droppath.sample_local(n_blocks, n_columns, recipe.local_drop, generator), *every_column]
    paths = droppath.sample(n_blocks, n_columns, recipe.local_drop, recipe.local_share, generator)
    return every_column if isinstance(paths, droppath.Global) and recipe.passes == "columns" else [paths]


def optimiser_for(net: FractalNet, recipe: Recipe) -> torch.optim.SGD:
    """SGD as the recipe has it, with weight decay on what has more than one dimension."""
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.SGD(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )


# ---- a run ----


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on, or an export to begin; read with `weights_only=True`."""

    recipe: Recipe
    architecture: Architecture
    dataset: str
    labels: tuple[str, ...]
    mean_C: Tensor
    std_C: Tensor
    seed: int
    epoch: int
    seconds: float
    model: dict[str, Any]
    optimiser: dict[str, Any]
    n_train: int = 0
    made_with: dict[str, Any] = field(default_factory=dict)
    averaged: dict[str, Any] = field(default_factory=dict)
    split_seed: int = 0
    n_held_out: int = data.N_HELD_OUT

    def save(self, path: Path) -> None:
        """Write beside, then rename: a full disk or a kill leaves the last good checkpoint.

        Raises:
            TrainingError: if it cannot be written.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {
            "recipe": dataclasses.asdict(self.recipe),
            "architecture": dataclasses.asdict(self.architecture),
        }
        part = path.with_suffix(".part")
        try:
            torch.save(fields, part)
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a short write
            part.unlink(missing_ok=True)
            raise TrainingError(
                f"{path} cannot be written; is the disk full? The checkpoint before it is untouched ({error})"
            ) from error

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read one.

        Raises:
            TrainingError: if the file is missing or no checkpoint of this version.
        """
        try:
            fields = torch.load(path, map_location="cpu", weights_only=True)
            architecture = fields.pop("architecture")
            stem = architecture.pop("stem")
            return cls(
                recipe=Recipe(**fields.pop("recipe")),
                architecture=Architecture(**architecture, stem=Stem(**stem) if stem else None),
                **fields,
            )
        except FileNotFoundError as error:
            raise TrainingError(f"there is no checkpoint {path}: train first, or check the path") from error
        except Exception as error:  # torch.load raises whatever the bytes make it raise
            raise TrainingError(f"{path} is no checkpoint that can be read here ({error})") from error

    def check(self, dataset: data.Dataset) -> None:
        """Make sure that this is the data that was trained on, split as it was then.

        Otherwise images would be held out that the network has seen, and labels could be exchanged.

        Raises:
            TrainingError: if other images are held out, or labels, or mean and deviation of the training
                images, are others.
        """
        if (self.n_held_out, self.split_seed) != (dataset.n_held_out, dataset.split_seed):
            raise TrainingError(
                f"the checkpoint held out {self.n_held_out} images of its data by seed {self.split_seed}, "
                f"and here {dataset.n_held_out} are by seed {dataset.split_seed}: hold out the same ones"
            )
        theirs, ours = (torch.cat([d.mean_C.cpu(), d.std_C.cpu()]) for d in (self, dataset))
        if self.labels != dataset.labels or not torch.allclose(theirs, ours, atol=1e-5):
            raise TrainingError(
                f"this is not the data that the checkpoint was trained on ({self.dataset}, "
                f"{len(self.labels)} labels): give the same folder, unchanged, with --data"
            )

    @property
    def split(self) -> dict[str, int]:
        """How `data.load` holds out the same images again."""
        return {"n_held_out": self.n_held_out, "seed": self.split_seed}

    def load_data(self, folder: Path) -> data.Dataset:
        """Read the data that was trained on, split as it was then.

        Raises:
            TrainingError: as `check`.
            data.DataError: if it is missing or broken.
        """
        dataset = data.load(self.dataset, folder, size=self.architecture.size, **self.split)
        self.check(dataset)
        return dataset

    @property
    def title(self) -> str:
        """Which network this is, in a few words and a hash of its weights."""
        weights = hashlib.sha256()
        for tensor in self._weights.values():
            weights.update(tensor.numpy().tobytes())
        return (
            f"{self.recipe.architecture}, {self.epoch} epochs, seed {self.seed}, "
            f"weights {weights.hexdigest()[:12]}"
        )

    @property
    def _weights(self) -> dict[str, Any]:
        """Of the network that the run was for: the averaged ones, where it averaged."""
        return self.averaged or self.model

    def network(self) -> FractalNet:
        """The trained network, in evaluation mode."""
        net = FractalNet(self.architecture)
        net.load_state_dict(self._weights)
        return net.eval()


@torch.no_grad()
def logits(network: nn.Module, split: data.Split, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits_NK of a network on a split, in evaluation mode, on the images' device."""
    was_training = network.training
    network.eval()
    starts = range(0, len(split), EVALUATION_BATCH)
    parts = [network(normalise(split.images_NCHW[i : i + EVALUATION_BATCH])).float() for i in starts]
    network.train(was_training)
    return torch.cat(parts)


def accuracy(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    return float((logits_NK.argmax(1) == labels_N).float().mean())


class Way(TypedDict):
    """How a network is trained, whatever its recipe; see `Run`."""

    bf16: bool
    device: str
    has_cuda_graphs: NotRequired[bool]
    is_compiled: NotRequired[bool]


class Average:
    """Weights and statistics of a network, averaged exponentially over steps.

    Args:
        net: What is trained.
        share: Of each step in the average.

    torch's `AveragedModel` would ask for the device's counter at each step, and wait for it.
    """

    def __init__(self, net: FractalNet, share: float) -> None:
        self.net = copy.deepcopy(net).requires_grad_(False)
        self._averaged, self._trained = (
            [each for each in (*of.parameters(), *of.buffers()) if each.is_floating_point()]
            for of in (self.net, net)
        )
        self._share = share

    def take(self, *, is_first: bool) -> None:
        """Take in the weights after a step; the first are taken as they are."""
        decay = 0.0 if is_first else 1 - self._share
        get_ema_multi_avg_fn(decay)(self._averaged, self._trained, None)


class Run:
    """One training run, on this process's share of the batches."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: data.Dataset,
        out: Path,
        *,
        seed: int,
        bf16: bool,
        device: str,
        teacher: "Checkpoint | None" = None,
        has_cuda_graphs: bool = True,
        is_compiled: bool = False,
    ) -> None:
        """Set up without training.

        Args:
            recipe: What to do.
            dataset: On which images.
            out: Folder for checkpoint.pt, record.jsonl and TensorBoard's events.
            seed: Of weights, order, augmentation and masks.
            bf16: Mixed precision.
            device: "cpu", "cuda", …
            teacher: The network whose answers are learnt, where the recipe says that one is given.
            has_cuda_graphs: Record each kind of step and replay it; on one GPU.
            is_compiled: Let torch.compile fuse what stands between the convolutions: minutes at the start,
                more images per second after it.

        Raises:
            TrainingError: if the images are fewer than one batch, the batch does not divide among the
                processes, or a teacher is missing, not wanted or was trained on other data.
        """
        self.rank, self.n_processes = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        if len(dataset.train) < recipe.batch_size:
            raise TrainingError(
                f"{len(dataset.train)} training images do not fill one batch of {recipe.batch_size}: "
                "choose a smaller --batch-size"
            )
        if recipe.batch_size % self.n_processes:
            raise TrainingError(
                f"a batch of {recipe.batch_size} does not divide among {self.n_processes} processes"
            )
        if (teacher is not None) != recipe.is_taught_by_another:
            raise TrainingError(
                "this recipe learns from no other network: leave --teacher out"
                if teacher
                else "this recipe learns from another network: name its checkpoint with --teacher"
            )
        self.recipe, self.seed, self.bf16, self.out = recipe, seed, bf16, out
        self.device = torch.device(device)
        self._records = has_cuda_graphs and self.device.type == "cuda" and self.n_processes == 1
        if is_compiled and not self._records:
            raise TrainingError(
                "--compile needs one GPU and CUDA graphs: elsewhere each new mask would be compiled anew"
            )
        if teacher:
            teacher.check(dataset)
        self.net = build(recipe, dataset, seed).to(self.device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's hints lack it
        self.dataset = dataset.to(self.device)
        self.padded_NCHW = data.pad(self.dataset.train.images_NCHW, MARGIN)
        self.optimiser = optimiser_for(self.net, recipe)
        objective = Objective(self.net, recipe, answers_of(teacher, self.device) if teacher else None)
        if is_compiled:
            objective.compile(dynamic=False)
        # Dropped paths leave parameters without a gradient, the same ones in every process.
        self.objective = (
            DistributedDataParallel(objective, find_unused_parameters=True)
            if self.n_processes > 1
            else objective
        )
        self.made_with = about_this_machine() | {
            "precision": "bf16" if bf16 else "fp32",
            "device": device,
            "n_processes": self.n_processes,
        }
        if self._records:
            self.made_with |= {"cuda_graphs": True, "compiled": is_compiled}
        if teacher:
            self.made_with["teacher"] = teacher.title
        self.epoch, self.seconds = 0, 0.0
        self._kept_epoch = 0
        self.n_steps = len(dataset.train) // recipe.batch_size
        n_averaged_over = max(1.0, recipe.averaging * recipe.epochs * self.n_steps)
        self._average = Average(self.net, 1 / n_averaged_over) if recipe.averaging else None
        self._recorded: dict[tuple[int, ...], Replay] = {}
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True

    @property
    def trained(self) -> FractalNet:
        """The network that the run is for: with averaged weights, where the recipe averages."""
        return self.net if self._average is None else self._average.net

    @property
    def checkpoint(self) -> Path:
        """Where the last finished epoch is kept."""
        return self.out / CHECKPOINT

    def resume(self) -> None:
        """Go on from the checkpoint in the run's folder.

        Raises:
            TrainingError: if there is none, or it is of another recipe, network, dataset or seed.
        """
        kept = Checkpoint.load(self.checkpoint)
        ours = {
            "recipe": self.recipe,
            "architecture": self.net.architecture,
            "dataset": self.dataset.name,
            "labels": self.dataset.labels,
            "seed": self.seed,
            "n_train": len(self.dataset.train),
        }
        different = [name for name, value in ours.items() if getattr(kept, name) != value]
        way = ("precision", "n_processes", "cuda_graphs", "teacher")
        different += [name for name in way if kept.made_with.get(name) != self.made_with.get(name)]
        if different:
            raise TrainingError(
                f"{self.checkpoint} is of a run with other {', '.join(different)}: use that, or another --out"
            )
        kept.check(self.dataset)
        self.net.load_state_dict(kept.model)
        self.optimiser.load_state_dict(kept.optimiser)
        if self._average is not None:
            self._average.net.load_state_dict(kept.averaged)
        self.epoch, self.seconds = kept.epoch, kept.seconds
        self._kept_epoch = kept.epoch

    def save(self) -> None:
        """Keep the state after the last finished epoch."""
        Checkpoint(
            recipe=self.recipe,
            architecture=self.net.architecture,
            dataset=self.dataset.name,
            labels=self.dataset.labels,
            mean_C=self.dataset.mean_C.cpu(),
            std_C=self.dataset.std_C.cpu(),
            seed=self.seed,
            epoch=self.epoch,
            seconds=self.seconds,
            model=self.net.state_dict(),
            optimiser=self.optimiser.state_dict(),
            n_train=len(self.dataset.train),
            made_with=self.made_with,
            averaged={} if self._average is None else self.trained.state_dict(),
            split_seed=self.dataset.split_seed,
            n_held_out=self.dataset.n_held_out,
        ).save(self.checkpoint)
        self._kept_epoch = self.epoch

    def train_epoch(self, progress: Callable[[float], None] = lambda loss: None) -> float:
        """Train one epoch and return its mean loss.

        Raises:
            TrainingError: if the loss or a weight is no longer a number.
        """
        started_s = time.monotonic()
        self.net.train()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # Dropout draws from torch's own generator: other masks in each process.
        torch.manual_seed((self.seed * 1_000_003 + self.epoch) * 1009 + self.rank)
        total = 0.0
        rows_of_step = data.batches(len(self.dataset.train), self.recipe.batch_size, generator)
        for step, rows in enumerate(rows_of_step):
            rate = learning_rate(self.recipe, (self.epoch + step / self.n_steps) / self.recipe.epochs)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            images_NCHW, labels_N = self._batch(rows, generator)
            parts = sample_parts(self.recipe, self.net.architecture, generator)
            loss = self._gradients(images_NCHW, labels_N, parts)
            self.optimiser.step()
            if self._average is not None:
                self._average.take(is_first=self.epoch == step == 0)
            value = float(loss) / len(parts)  # waits for a GPU, which is still busy with the step
            if not math.isfinite(value):
                raise self._diverged(f"the loss became {value}")
            total += value
            progress(value)
        # The loss is taken before the step, so the last one may have broken the weights unseen.
        if not all(bool(tensor.isfinite().all()) for tensor in self.net.state_dict().values()):
            raise self._diverged("a weight is no longer a number")
        self.epoch += 1
        self.seconds += time.monotonic() - started_s
        return total / self.n_steps

    def _diverged(self, what: str) -> TrainingError:
        kept = (
            f"{self.checkpoint} still holds epoch {self._kept_epoch}" if self._kept_epoch else "none is kept"
        )
        return TrainingError(f"{what} in epoch {self.epoch + 1}: lower --learning-rate; {kept}")

    def _loss(self, images_NCHW: Tensor, labels_N: Tensor, parts: list[droppath.Paths]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.objective(images_NCHW, labels_N, parts)
        return loss

    def _gradients(self, images_NCHW: Tensor, labels_N: Tensor, parts: list[droppath.Paths]) -> Tensor:
        """Leave the gradients of one batch in the parameters; returns its loss, on the device.

        On one GPU each kind of batch is recorded when it comes first: the kernels of so small networks end
        sooner than Python could start them. A recording computes dropped paths, too, whose parameters then
        have gradients of 0, as in the authors' graph; elsewhere they have none and the optimiser skips them.

        Raises:
            TrainingError: the step cannot be recorded.
        """
        if not self._records:
            loss = self._loss(images_NCHW, labels_N, parts)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            return loss.detach()
        masks = [part.masks for part in parts if isinstance(part, droppath.Local)]
        columns = [part for part in parts if isinstance(part, droppath.Global)]
        inputs = (images_NCHW, labels_N, *(join_weights(each).to(self.device) for each in masks))

        def loss_of(images_NCHW: Tensor, labels_N: Tensor, *weights_BJC: Tensor) -> Tensor:
            return self._loss(images_NCHW, labels_N, [*map(droppath.Local, weights_BJC), *columns])

        kind = len(masks), *(part.column for part in columns)
        if kind not in self._recorded:
            try:
                self._recorded[kind] = Replay(loss_of, self.net, inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # whatever CUDA refuses in a recording
                way = "leave --compile out" if self.made_with["compiled"] else "try --no-cuda-graphs"
                raise TrainingError(f"this step cannot be recorded; {way} ({error})") from error
        return self._recorded[kind](*inputs)

    def _batch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """This process's share of a batch, augmented and normalised; each draws for the whole batch alike."""
        rows = rows.to(self.device)
        normalised = augmented(self.recipe, self.dataset, self.padded_NCHW, rows, self.epoch, generator)
        mine = slice(self.rank, None, self.n_processes)
        share = normalised[mine].contiguous(memory_format=torch.channels_last)
        return share, self.dataset.train.labels_N[rows[mine]]

    def networks(self) -> dict[str, nn.Module]:
        """What has been trained: each column, and the joined net if any batch trains it."""
        networks = self.trained.networks()
        if not self.recipe.trains_joined:
            del networks["full"]
        return networks

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy of what has been trained."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return {
                name: accuracy(
                    logits(network, self.dataset.held_out, self.dataset.normalise),
                    self.dataset.held_out.labels_N,
                )
                for name, network in self.networks().items()
            }


def about_this_machine() -> dict[str, Any]:
    """Versions, commit and hardware, for a record that can be repeated."""

    def commit() -> str:
        try:
            describe = [
                "git",
                "-C",
                str(Path(__file__).parent),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=12",
            ]
            done = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 fixed
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "unknown"

    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {
        "commit": commit(),
        "packages": packages,
        "python": sys.version.split()[0],
        "hardware": _hardware(),
    }


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


@contextmanager
def _stopping_between_batches_on_ctrl_c(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C asks for an end before the next batch; a second one ends the run at once."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Interrupted(Exception):
    pass


def train(run: Run, *, every: int = 1) -> None:
    """Train to the end of the recipe, keeping checkpoints and lines of record.

    Ctrl-C stops between two batches; the last checkpoint stays, and resuming repeats what came after it.

    Args:
        run: What to train.
        every: Epochs from one checkpoint, and measurement on the held-out images, to the next. More: less is
            kept of a run that is cut off; on a GPU an epoch can be shorter than that takes.

    Raises:
        TrainingError: see `Run.train_epoch` and `Checkpoint.save`.
        KeyboardInterrupt: after Ctrl-C.
    """
    stop = threading.Event()
    lead = run.rank == 0
    run.out.mkdir(parents=True, exist_ok=True)
    writer: AbstractContextManager[SummaryWriter | None] = (
        SummaryWriter(str(run.out)) if lead else nullcontext()
    )
    bar = tqdm(
        total=run.recipe.epochs * run.n_steps, initial=run.epoch * run.n_steps, unit="batch", disable=not lead
    )

    def on_step(loss: float) -> None:
        bar.update()
        bar.set_postfix_str(
            f"epoch {run.epoch + 1}/{run.recipe.epochs} loss {loss:.3f} {seen}", refresh=False
        )
        if stop.is_set():
            raise _Interrupted

    seen = ""
    with _stopping_between_batches_on_ctrl_c(stop), writer as board, bar:
        while run.epoch < run.recipe.epochs:
            try:
                loss = run.train_epoch(on_step)
            except _Interrupted:
                raise KeyboardInterrupt from None
            if not lead or (run.epoch % every and run.epoch < run.recipe.epochs):
                continue
            reached = run.evaluate()
            seen = " ".join(f"{name}:{100 * value:.1f}" for name, value in reached.items())
            run.save()
            _record(
                run, {"epoch": run.epoch, "loss": loss, "held_out_accuracy": reached, "seconds": run.seconds}
            )
            if board is not None:
                board.add_scalar("loss", loss, run.epoch)
                for name, value in reached.items():
                    board.add_scalar(f"held_out_accuracy/{name}", value, run.epoch)


def _record(run: Run, line: dict[str, Any]) -> None:
    try:
        with (run.out / "record.jsonl").open("a") as record:
            record.write(json.dumps(line) + "\n")
    except OSError as error:
        raise TrainingError(f"{run.out / 'record.jsonl'} cannot be written ({error})") from error


# ---- the command ----


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model.train", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default="anytime")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100", "svhn", "folder"), default="cifar10")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with the data, or to download it into"
    )
    parser.add_argument(
        "--size", type=at_least_1, default=32, help="pixels to which the pictures of a folder are brought"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/latest"), help="folder for checkpoint and record"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--limit", type=at_least_1, help="use only the first so many training images (to try things out)"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        help="checkpoint of the network whose answers are learnt; the same images are held out as from it",
    )
    add_way(parser, every=1)
    add_overrides(parser)
    return parser.parse_args(argv)


def at_least_1(text: str) -> int:
    """What a command line's whole number has to be."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_way(parser: argparse.ArgumentParser, *, every: int) -> None:
    """Let the command line say how to train, whatever the recipe: `every` unless it says otherwise."""
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--every",
        type=at_least_1,
        default=every,
        help=f"epochs from one checkpoint and measurement to the next; {every} if not given",
    )
    parser.add_argument(
        "--compile", action="store_true", help="a slow start and faster steps: for long runs on a GPU"
    )
    parser.add_argument(
        "--no-cuda-graphs", action="store_true", help="on a GPU: slower, with less memory, each step anew"
    )


def way_of(options: argparse.Namespace) -> Way:
    """What the command line says of it."""
    return {
        "bf16": options.precision == "bf16",
        "device": options.device,
        "has_cuda_graphs": not options.no_cuda_graphs,
        "is_compiled": options.compile,
    }


@contextmanager
def _one_process_before_the_others() -> Iterator[None]:
    """On each machine one process goes through the block first: the others find the data it has fetched."""
    waits = dist.is_initialized() and os.environ["LOCAL_RANK"] != "0"
    if waits:
        dist.barrier()
    yield
    if dist.is_initialized() and not waits:
        dist.barrier()


def _prepare(options: argparse.Namespace) -> Run:
    recipe = overridden(RECIPES[options.recipe], options)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise TrainingError(f"--device {options.device} cannot be used here ({error})") from error
    teacher = Checkpoint.load(options.teacher) if options.teacher else None
    split = teacher.split if teacher else {"seed": options.seed}
    with _one_process_before_the_others():
        dataset = data.load(options.dataset, options.data, size=options.size, **split)
    if options.limit:
        dataset = dataclasses.replace(dataset, train=dataset.train[: options.limit])
    run = Run(
        recipe,
        dataset,
        options.out,
        seed=options.seed,
        teacher=teacher,
        **way_of(options),
    )
    if options.resume:
        run.resume()
    elif run.checkpoint.exists():
        raise TrainingError(f"{run.checkpoint} exists: --resume to go on with it, or another --out")
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; the exit code is 0, 1 (could not), 2 (bad usage), or 130 (Ctrl-C)."""
    options = _arguments(argv)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        if options.device == "cuda":
            options.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(options.device)
        dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
    try:
        run = _prepare(options)
        if run.rank == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            settings = {
                "recipe": dataclasses.asdict(run.recipe),
                "seed": run.seed,
                "dataset": options.dataset,
                "n_train": len(run.dataset.train),
                "resumed_at": run.epoch,
            }
            _record(run, settings | run.made_with)
        train(run, every=options.every)
    except (TrainingError, data.DataError, ValueError, OSError) as error:
        print(f"model.train: {error}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(f"model.train: out of memory, choose a smaller --batch-size ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        checkpoint = options.out / CHECKPOINT
        left = (
            f"--resume goes on from {checkpoint}"
            if checkpoint.exists()
            else "no checkpoint had been kept yet"
        )
        print(f"model.train: stopped; {left}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
