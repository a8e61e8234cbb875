"""What the tests of the training half share: toy data, and one thread for toy networks."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from model import train
from model.data import Dataset, Split

COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200))

torch.set_num_threads(1)  # handing work to a second thread costs more than a toy network does


def coloured(n: int, n_classes: int, size: int, seed: int) -> Split:
    """Noisy images, each of the colour of its class: easily told apart, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(n) % n_classes
    noise = torch.randint(-60, 61, (n, 3, size, size), generator=generator)
    images_NCHW = torch.tensor(COLOURS)[labels_N][:, :, None, None] + noise
    return Split(images_NCHW.clamp(0, 255).to(torch.uint8), labels_N)


@pytest.fixture
def toy() -> Dataset:
    """48 images to train on, 12 held out and 12 to test, of 32x32 pixels and three classes."""
    train, held_out, test = (coloured(n, 3, 32, seed) for seed, n in enumerate((48, 12, 12)))
    of_channel = train.images_NCHW.transpose(0, 1).flatten(1).float() / 255
    return Dataset(
        "folder", ("red", "green", "blue"), train, held_out, test, of_channel.mean(1), of_channel.std(1)
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 20 small pictures per class, as a user would have it."""
    split = coloured(60, 3, 40, seed=5)
    for index, (image_CHW, label) in enumerate(zip(split.images_NCHW, split.labels_N.tolist(), strict=True)):
        folder = tmp_path / "pictures" / ("red", "green", "blue")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def finished_run(pictures: Path, tmp_path: Path) -> Path:
    """The folder of a finished training run on `pictures`."""
    out = tmp_path / "run"
    arguments = ["--dataset", "folder", "--data", str(pictures), "--out", str(out), "--epochs", "1"]
    assert train.main([*arguments, "--architecture", "cifar-deep-2", "--batch-size", "8"]) == 0
    return out
