"""Labelled images: CIFAR-10, CIFAR-100, SVHN in their official files, or a folder of pictures per class.

Tensors in memory, a held-out split taken from train, seeded batches, augmentation as functions of a
generator. Must not know networks or recipes.
"""

import hashlib
import http.client
import io
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

DOWNLOAD_TIMEOUT_S = 60.0
N_HELD_OUT = 5000
"""Images for every choice that is made. Larger: choices are surer, and less is learned from."""
CHUNK = 1000  # images turned into floats at once
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

Flip = Literal["random", "alternate"]


class DataError(Exception):
    """The data is missing or broken; the message says what to do."""


@dataclass(frozen=True)
class Split:
    """Some labelled images.

    Attributes:
        images_NCHW: uint8.
        labels_N: int64.
    """

    images_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, rows: Tensor | slice) -> "Split":
        return Split(self.images_NCHW[rows], self.labels_N[rows])

    def to(self, device: torch.device) -> "Split":
        """The same images on a device."""
        return Split(self.images_NCHW.to(device), self.labels_N.to(device))


@dataclass(frozen=True)
class Dataset:
    """A dataset ready to train on.

    Attributes:
        name: As asked for.
        labels: Name of each class.
        train: What is learned from.
        held_out: Taken from the official training set; every choice is made on it.
        test: The official test set; it decides nothing.
        mean_C: Mean of each channel over `train`, of values 0 to 1.
        std_C: Standard deviation likewise.
        split_seed: Decided which images are held out.
        n_held_out: How many, when it was read.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    held_out: Split
    test: Split
    mean_C: Tensor
    std_C: Tensor
    split_seed: int = 0
    n_held_out: int = N_HELD_OUT

    def normalise(self, images_NCHW: Tensor) -> Tensor:
        """uint8 -> float32 of mean 0 and deviation 1 over the training set."""
        scale = (1 / (255 * self.std_C)).view(-1, 1, 1).to(images_NCHW.device)
        shift = (self.mean_C / self.std_C).view(-1, 1, 1).to(images_NCHW.device)
        return images_NCHW.float() * scale - shift

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device."""
        return replace(
            self,
            train=self.train.to(device),
            held_out=self.held_out.to(device),
            test=self.test.to(device),
            mean_C=self.mean_C.to(device),
            std_C=self.std_C.to(device),
        )


# ---- where it comes from ----


@dataclass(frozen=True)
class _File:
    name: str
    url: str
    md5: str  # of the official release; torchvision checks the same


_CIFAR10 = _File(
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
)
_CIFAR100 = _File(
    "cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
)
_SVHN = {
    "train": _File(
        "train_32x32.mat",
        "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        "e26dedcc434d2e4c54c9b2d4a06d8373",
    ),
    "test": _File(
        "test_32x32.mat",
        "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
        "eb5a983be6a315427106f1b164d9cef3",
    ),
}


def load(name: str, folder: Path, *, size: int = 32, n_held_out: int = N_HELD_OUT, seed: int = 0) -> Dataset:
    """Read a dataset, downloading it into `folder` where it is missing.

    Args:
        name: "cifar10", "cifar100", "svhn", or "folder": then `folder` holds a folder of pictures per class,
            or `train` and `test` folders of such; without them a fifth is set aside as test.
        folder: Where the files are, or shall be.
        size: Height and width to which pictures of a "folder" are brought [pixels].
        n_held_out: Images taken out of train for every choice that is made; a tenth of train at the most.
        seed: Of the split.

    Raises:
        DataError: if the data is missing and cannot be had, or is broken.
    """
    if name == "folder":
        labels, train, test = _read_folder(folder, size, seed)
    elif name in _READERS:
        labels, train, test = _READERS[name](folder)
    else:
        raise DataError(f"no dataset is called {name!r}: use folder, {', '.join(_READERS)}")
    n_held_out = min(n_held_out, len(train) // 10)
    if n_held_out < 1:
        raise DataError(f"{len(train)} training images are too few to hold any out: give at least 10")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out, kept = train[order[:n_held_out]], train[order[n_held_out:]]
    mean_C, std_C = _mean_and_deviation(kept.images_NCHW)
    return Dataset(name, labels, kept, held_out, test, mean_C, std_C, seed, n_held_out)


def _mean_and_deviation(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel, for values 0 to 1; a few images at a time: as floats, all would need much memory."""
    n_channels = images_NCHW.shape[1]
    total_C, squares_C = torch.zeros(2, n_channels, dtype=torch.double)
    for start in range(0, len(images_NCHW), CHUNK):
        values = images_NCHW[start : start + CHUNK].double() / 255
        total_C += values.sum((0, 2, 3))
        squares_C += values.square().sum((0, 2, 3))
    n = images_NCHW.numel() / n_channels
    mean_C = total_C / n
    return mean_C.float(), (squares_C / n - mean_C.square()).sqrt().float()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(file: _File, folder: Path) -> Path:
    """Download unless it is there; a file of the wrong checksum is never left behind under its name."""
    path = folder / file.name
    if path.exists():
        return path
    part = path.with_suffix(path.suffix + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        source = urllib.request.urlopen(file.url, timeout=DOWNLOAD_TIMEOUT_S)  # noqa: S310 the URL is a constant
        with source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        if folder.is_dir():
            part.unlink(missing_ok=True)
        raise DataError(
            f"{file.url} could not be downloaded ({error}): put {file.name} into {folder}"
        ) from error
    if (found := _md5(part)) != file.md5:
        part.unlink()
        raise DataError(f"{file.url} is not the official file (md5 {found}, should be {file.md5})")
    return part.replace(path)


class _PlainUnpickler(pickle.Unpickler):
    """Reads the official pickles, and refuses to call anything but what builds a NumPy array."""

    ALLOWED = frozenset({("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (
            module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct"
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # unpickling raises whatever the bytes make it raise
        raise DataError(
            f"{path} cannot be read ({error}): remove {path.parent} and its archive to download them anew"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no dictionary: it is not the official file")
    return content


def _read_cifar(
    folder: Path, archive: _File, inside: str, train: list[str], test: str, meta: str, keys: tuple[str, str]
) -> tuple[tuple[str, ...], Split, Split]:
    root = folder / inside
    if not root.is_dir():
        path = _fetch(archive, folder)
        if (found := _md5(path)) != archive.md5:  # tarfile itself does not notice most damage
            raise DataError(
                f"{path} is not the official file (md5 {found}, should be {archive.md5}): remove it"
            )
        try:  # beside, then renamed: what was cut off is never taken for whole
            with tempfile.TemporaryDirectory(dir=folder) as beside, tarfile.open(path) as tar:
                unpacked = Path(beside, inside)
                unpacked.mkdir()
                for name in (*train, test, meta):
                    # Members by name: what else is inside is not wanted, and a filter is not in every 3.11.
                    member = cast(IO[bytes], tar.extractfile(f"{inside}/{name}"))
                    with member, (unpacked / name).open("wb") as file:
                        shutil.copyfileobj(member, file)
                unpacked.replace(root)
        except OSError as error:
            raise DataError(f"{path} cannot be unpacked ({error}): is there room in {folder}?") from error
    labels_key, names_key = keys

    def split(files: list[str]) -> Split:
        parts = [_unpickle(root / file) for file in files]
        images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = [label for part in parts for label in part[labels_key]]
        return Split(torch.from_numpy(images), torch.tensor(labels))

    try:
        return tuple(_unpickle(root / meta)[names_key]), split(train), split([test])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{root} is not in the official form ({error})") from error


def _read_cifar10(folder: Path) -> tuple[tuple[str, ...], Split, Split]:
    train = [f"data_batch_{i}" for i in range(1, 6)]
    return _read_cifar(
        folder,
        _CIFAR10,
        "cifar-10-batches-py",
        train,
        "test_batch",
        "batches.meta",
        ("labels", "label_names"),
    )


def _read_cifar100(folder: Path) -> tuple[tuple[str, ...], Split, Split]:
    keys = ("fine_labels", "fine_label_names")
    return _read_cifar(folder, _CIFAR100, "cifar-100-python", ["train"], "test", "meta", keys)


def _read_svhn(folder: Path) -> tuple[tuple[str, ...], Split, Split]:
    from scipy.io import loadmat  # noqa: PLC0415 heavy, and needed for this format alone

    def split(file: _File) -> Split:
        path = _fetch(file, folder)
        try:
            content = loadmat(path)
            images_HWCN, labels = content["X"], content["y"].ravel()
        except Exception as error:  # loadmat raises whatever the bytes make it raise
            raise DataError(f"{path} is not the official file ({error}): remove it") from error
        images_NCHW = np.ascontiguousarray(images_HWCN.transpose(3, 2, 0, 1))
        return Split(torch.from_numpy(images_NCHW), torch.from_numpy(labels.astype(np.int64) % 10))

    return tuple("0123456789"), split(_SVHN["train"]), split(_SVHN["test"])


_READERS: dict[str, Callable[[Path], tuple[tuple[str, ...], Split, Split]]] = {
    "cifar10": _read_cifar10,
    "cifar100": _read_cifar100,
    "svhn": _read_svhn,
}

RESIZE = "area-crop"


def area_crop(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """A picture as [size, size, 3]: upright, on white, its largest centred square, averaged down or enlarged.

    The manifest names this rule (`RESIZE`), and the server follows it.
    """
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16-bit grey: its upper byte, where Pillow would clip to white
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = upright.convert("RGB")
    how = Image.Resampling.BOX if min(rgb.size) > size else Image.Resampling.BICUBIC
    return np.asarray(rgb if rgb.size == (size, size) else ImageOps.fit(rgb, (size, size), how))


def _read_folder(folder: Path, size: int, seed: int) -> tuple[tuple[str, ...], Split, Split]:
    halves = (folder / "train", folder / "test")
    # Folders inside `train` make it a half: pictures of trains would lie in it themselves.
    if halves[0].is_dir() and any(path.is_dir() for path in halves[0].iterdir()):
        (labels, train), (test_labels, test) = (_read_classes(half, size) for half in halves)
        if labels != test_labels:
            raise DataError(f"{halves[0]} and {halves[1]} must hold folders of the same names")
        return labels, train, test
    labels, everything = _read_classes(folder, size)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    n_test = max(1, len(everything) // 5)
    return labels, everything[order[n_test:]], everything[order[:n_test]]


def _read_classes(folder: Path, size: int) -> tuple[tuple[str, ...], Split]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise DataError(f"{folder} must hold at least two folders, one per class, named as the class")
    images, labels = [], []
    for index, of_class in enumerate(classes):
        files = sorted(p for p in of_class.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
        if not files:
            raise DataError(f"{of_class} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")
        for path in files:
            try:
                with Image.open(path) as picture:
                    images.append(area_crop(picture, size))
            except Exception as error:  # Pillow raises whatever the bytes make it raise
                raise DataError(f"{path} is no readable picture ({error}): mend or remove it") from error
            labels.append(index)
    images_NCHW = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return tuple(p.name for p in classes), Split(torch.from_numpy(images_NCHW), torch.tensor(labels))


# ---- what training sees of it ----


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices of full batches in random order; what fills no batch waits for another epoch's order."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - n % batch_size, batch_size):
        yield order[start : start + batch_size]


def pad(images_NCHW: Tensor, margin: int) -> Tensor:
    """Reflect the border outwards by `margin` pixels: what `shift_and_flip` cuts its windows from."""
    size = images_NCHW.shape[2]
    place = torch.arange(-margin, size + margin, device=images_NCHW.device).abs()
    place = torch.where(place < size, place, 2 * (size - 1) - place)
    # By index, since torch reflects floats only, and all images as floats would need much memory.
    return images_NCHW[:, :, place][:, :, :, place]


def flips(rows: Tensor, epoch: int, how: Flip, generator: torch.Generator) -> Tensor:
    """Which images of a batch to mirror.

    "random" tosses a coin each time. "alternate" tosses it once per image and then takes turns, so that two
    epochs in a row show both sides of every image (https://github.com/KellerJordan/cifar10-airbench).
    """
    if how == "random":
        return torch.rand(len(rows), generator=generator) < 0.5
    coin = (rows * 2654435761 >> 16) & 1  # Knuth's multiplicative hash of the row
    return (coin + epoch) % 2 == 1


def shift_and_flip(padded_NCHW: Tensor, size: int, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a window of `size` at a random place out of each padded image, mirrored where asked."""
    n, channels, height, _ = padded_NCHW.shape
    room = height - size + 1
    top, left = (torch.randint(room, (n, 1), generator=generator).to(padded_NCHW.device) for _ in range(2))
    steps = torch.arange(size, device=padded_NCHW.device)
    xs = torch.where(mirrored.to(padded_NCHW.device)[:, None], left + steps.flip(0), left + steps)
    ys = top + steps
    image = torch.arange(n, device=padded_NCHW.device)[:, None, None, None]
    channel = torch.arange(channels, device=padded_NCHW.device)[:, None, None]
    return padded_NCHW[image, channel, ys[:, None, :, None], xs[:, None, None, :]]


def cut_out(images_NCHW: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square of `side` pixels to 0 around a random pixel of each image; what juts out is lost.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    arXiv 1708.04552.
    """
    n, _, height, width = images_NCHW.shape

    def inside(size: int) -> Tensor:
        first_N1 = torch.randint(-(side // 2), size - side // 2, (n, 1), generator=generator)
        offset_NS = torch.arange(size, device=images_NCHW.device) - first_N1.to(images_NCHW.device)
        return (offset_NS >= 0) & (offset_NS < side)

    return images_NCHW.masked_fill((inside(height)[:, :, None] & inside(width)[:, None, :])[:, None], 0)
