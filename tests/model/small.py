"""Nets and datasets small enough to train, export and measure within a test."""

import torch

from model.data import Dataset, Split
from model.fractalnet import Architecture, FractalNet, initialise
from model.recipe import Recipe
from model.train import Checkpoint, about_this_machine

ARCHITECTURE = Architecture((4, 6), 2, n_classes=4, size=8)
LABELS = ("red", "green", "blue", "grey")


def a_split(n: int, seed: int) -> Split:
    """Noise with a tint that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    tint = torch.eye(4)[labels][:, :3] * 90
    images = torch.rand(n, 3, 8, 8, generator=generator) * 160 + tint[:, :, None, None]
    return Split(images.to(torch.uint8), labels)


def a_dataset(n_train: int = 80, n_held_out: int = 80, n_test: int = 40) -> Dataset:
    train = a_split(n_train, 0)
    values = train.images_NCHW.transpose(0, 1).flatten(1).float() / 255
    return Dataset(
        "small",
        LABELS,
        train,
        a_split(n_held_out, 1),
        a_split(n_test, 2),
        values.mean(1),
        values.std(1),
        split_seed=3,
    )


def a_network(seed: int, architecture: Architecture = ARCHITECTURE) -> FractalNet:
    """Untrained, but with statistics that are not those of a fresh BatchNorm."""
    torch.manual_seed(seed)
    net = FractalNet(architecture)
    initialise(net, "xavier")
    for network in net.networks().values():
        network.train()(torch.randn(16, 3, architecture.size, architecture.size))
    return net.eval()


def a_checkpoint(dataset: Dataset, architecture: Architecture = ARCHITECTURE) -> Checkpoint:
    return Checkpoint(
        recipe=Recipe("cifar-anytime", 1, 8, 0.1, "triangle"),
        architecture=architecture,
        dataset=dataset.name,
        labels=dataset.labels,
        mean_C=dataset.mean_C,
        std_C=dataset.std_C,
        seed=0,
        split_seed=3,
        epoch=1,
        seconds=1.0,
        model=a_network(0, architecture).state_dict(),
        optimiser={},
        n_train=len(dataset.train),
        made_with=about_this_machine(),
    )
