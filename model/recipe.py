"""Every choice of a training run: what a recipe is, those that there are, and what a command line may change.

Must not know how anything is trained.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from model import data
from model.fractalnet import Initialisation

Passes = Literal["tied", "coin", "columns"]


@dataclass(frozen=True)
class Recipe:
    """Every choice of a training run.

    Attributes:
        architecture: A preset's name.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes together.
        learning_rate: At its peak.
        schedule: "steps" divides by 10 whenever the remaining epochs halve, four times; "triangle" rises over
            the first fifth and falls to zero.
        momentum: Of SGD.
        nesterov: Whether the momentum looks ahead.
        weight_decay: On convolutions and classifier; BatchNorm has none.
        label_smoothing: Share of the target spread over all classes.
        local_drop: Probability of dropping an input of a join under local drop-path.
        passes: What one batch trains. "tied": the joined net under local drop-path and every column, as the
            authors' graph does; "coin": one of the two, and of the columns a random one, as their paper says;
            "columns": one of the two, and then every column.
        local_share: Probability that the coin says "joined net".
        column_weight: Of each column's loss; the joined net's is 1. None is 1/C.
        initialisation: See `fractalnet.initialise`.
        flip: See `data.flips`.
        dropout: Whether the architecture's dropout is used.
        affine: Whether BatchNorm learns a scale and a bias, which the authors' has not.
        cutout: Side of the square that each image loses [pixels]; 0 is none.
        distillation: Share of the loss that is the distance from a teacher's answers; 0 is none.
        teacher: "joined" is the joined net on the same batch, for the columns alone ("tied" passes have one);
            "given" is a network of another run, for all.
        temperature: Of both answers, where they are compared.
        averaging: Share of the run over which the weights that are kept are averaged, exponentially; 0 keeps
            those of the last step.
    """

    architecture: str
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: Literal["steps", "triangle"]
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    local_drop: float = 0.15
    passes: Passes = "coin"
    local_share: float = 0.5
    column_weight: float | None = 1.0
    initialisation: Initialisation = "xavier"
    flip: data.Flip = "random"
    dropout: bool = True
    affine: bool = True
    cutout: int = 0
    distillation: float = 0.0
    teacher: Literal["joined", "given"] = "joined"
    temperature: float = 1.0
    averaging: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError("epochs must be at least 1, the batch size at least 2")
        if not 0 <= self.distillation <= 1 or self.temperature <= 0 or self.cutout < 0:
            raise ValueError("distillation is a share, the temperature above 0 and cutout at least 0")
        if self.distillation and self.teacher == "joined" and self.passes != "tied":
            raise ValueError('the joined net teaches only where passes are "tied": it must see each batch')
        if not 0 <= self.averaging < 1:
            raise ValueError("averaging is a share of the run, below 1")
        if not 0 < self.learning_rate < torch.finfo(torch.float32).max:
            raise ValueError("the learning rate must be above 0 and finite")

    @property
    def is_taught_by_another(self) -> bool:
        """Whether a network of another run has to be given."""
        return self.distillation > 0 and self.teacher == "given"

    @property
    def trains_joined(self) -> bool:
        """Whether any batch trains the joined net."""
        return self.passes == "tied" or self.local_share > 0


RECIPES: dict[str, Recipe] = {
    # Larsson et al.: SGD 0.9, lr 0.02, batch 100, 400 epochs. They train one local and all global samples in
    # every batch, each column at 1/C of the weight, as their released generator writes it. The weight decay
    # is ours: the paper does not state it, and their solver file is not released.
    "paper": Recipe(
        "cifar-20",
        400,
        100,
        0.02,
        "steps",
        weight_decay=1e-4,
        passes="tied",
        column_weight=None,
        affine=False,
    ),
    # A short schedule for a machine without an accelerator.
    "anytime": Recipe(
        "cifar-anytime",
        40,
        256,
        0.3,
        "triangle",
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
        passes="columns",
        local_share=0.25,
        initialisation="dirac",
        flip="alternate",
        dropout=False,
    ),
    # For a GPU: the paper's network by what is usual today. A quarter of the paper's epochs.
    "wide": Recipe(
        "cifar-20",
        100,
        512,
        0.3,
        "triangle",
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
        passes="tied",
        initialisation="dirac",
        flip="alternate",
        dropout=False,
        cutout=8,
        distillation=0.5,
    ),
    # For a GPU: "anytime" for longer, with the answers of a wide network before it.
    "distilled": Recipe(
        "cifar-anytime",
        300,
        512,
        0.4,
        "triangle",
        nesterov=True,
        weight_decay=5e-4,
        passes="columns",
        local_share=0.0,
        initialisation="dirac",
        flip="alternate",
        dropout=False,
        cutout=8,
        distillation=0.9,
        teacher="given",
        temperature=4.0,
    ),
}


def learning_rate(recipe: Recipe, progress: float) -> float:
    """The rate after a share `progress` (0 to 1) of all steps."""
    if recipe.schedule == "steps":
        # At 1/2, 3/4, 7/8 and 15/16 of the run: 200, 300, 350, 375 of 400 epochs.
        return recipe.learning_rate * 10.0 ** -sum(progress >= 1 - 0.5**i for i in range(1, 5))
    warm_up, start = 0.2, 0.2
    rising = start + (1 - start) * progress / warm_up
    return recipe.learning_rate * max(0.0, min(rising, (1 - progress) / (1 - warm_up)))


# ---- on a command line ----


OVERRIDABLE: dict[str, Callable[[str], Any]] = {
    "architecture": str,
    "epochs": int,
    "batch_size": int,
    "learning_rate": float,
    "label_smoothing": float,
    "cutout": int,
    "distillation": float,
    "temperature": float,
    "averaging": float,
}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let the command line replace parts of a recipe."""
    for name, kind in OVERRIDABLE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="instead of the recipe's")


def overridden(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with what the command line has instead.

    Raises:
        ValueError: as `Recipe`.
    """
    given = {name: value for name in OVERRIDABLE if (value := getattr(options, name)) is not None}
    return dataclasses.replace(recipe, **given)
