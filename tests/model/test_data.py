"""Datasets in their official files and as folders of pictures, also broken; and what augmentation does."""

import hashlib
import io
import os
import pickle
import re
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model import data
from model.data import DataError, Dataset, load
from tests.model.limits import no_file_larger_than

# ---- the official files, in miniature ----


def official_images(n: int, seed: int) -> NDArray[np.uint8]:
    """Rows of 3072 bytes: all of red, all of green, all of blue, each row by row."""
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def python_3_pickle(content: dict[str, Any]) -> bytes:
    return pickle.dumps(content, protocol=2)


def python_2_pickle(content: dict[str, Any]) -> bytes:
    """Byte for byte as Python 2 wrote the official files: its strings are bytes, its NumPy an old one."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    def integer(number: int) -> bytes:
        return b"J" + struct.pack("<i", number)

    def value(of: Any) -> bytes:
        if isinstance(of, str):
            return string(of.encode())
        if isinstance(of, int):
            return integer(of)
        if isinstance(of, list):
            return b"](" + b"".join(value(item) for item in of) + b"e"
        dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
        dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        empty = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + string(b"b")
        )
        shape = b"(" + b"".join(integer(int(n)) for n in of.shape) + b"t"
        return empty + b"tR(" + integer(1) + shape + dtype + b"\x89" + string(of.tobytes()) + b"tb"

    pairs = b"".join(string(key.encode()) + value(of) for key, of in content.items())
    return b"\x80\x02}(" + pairs + b"u."


Pickler = Callable[[dict[str, Any]], bytes]


def write_cifar10(folder: Path, write: Pickler = python_3_pickle, n: int = 20) -> Path:
    root = folder / "cifar-10-batches-py"
    root.mkdir(parents=True)
    (root / "batches.meta").write_bytes(write({"label_names": [f"class {i}" for i in range(10)]}))
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {"data": official_images(n, seed), "labels": [(seed + i) % 10 for i in range(n)]}
        (root / name).write_bytes(write(content))
    return root


@pytest.mark.parametrize("write", [python_2_pickle, python_3_pickle])
def test_cifar_10_is_read_from_its_official_files(tmp_path: Path, write: Pickler) -> None:
    write_cifar10(tmp_path, write)

    dataset = load("cifar10", tmp_path)

    assert dataset.labels == tuple(f"class {i}" for i in range(10))
    assert (len(dataset.train), len(dataset.held_out), len(dataset.test)) == (
        90,
        10,
        20,
    )  # a tenth at the most
    assert dataset.test.labels_N.tolist() == [(5 + i) % 10 for i in range(20)]
    official = official_images(20, 5)
    assert dataset.test.images_NCHW.shape == (20, 3, 32, 32)
    assert dataset.test.images_NCHW.dtype == torch.uint8
    assert dataset.test.images_NCHW[7, 2, 3, 4] == official[7, 2 * 1024 + 3 * 32 + 4]
    assert torch.equal(dataset.test.images_NCHW.flatten(1), torch.from_numpy(official))


@pytest.mark.parametrize("write", [python_2_pickle, python_3_pickle])
def test_cifar_100_is_read_with_its_fine_labels(tmp_path: Path, write: Pickler) -> None:
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    names = {"fine_label_names": ["apple", "bear"], "coarse_label_names": ["fruit"]}
    (root / "meta").write_bytes(write(names))
    for seed, name in enumerate(("train", "test")):
        labels = {"fine_labels": [i % 2 for i in range(20)], "coarse_labels": [0] * 20}
        (root / name).write_bytes(write({"data": official_images(20, seed)} | labels))

    dataset = load("cifar100", tmp_path)

    assert dataset.labels == ("apple", "bear")
    assert dataset.test.labels_N.tolist() == [0, 1] * 10
    assert torch.equal(dataset.test.images_NCHW.flatten(1), torch.from_numpy(official_images(20, 1)))


def write_svhn(folder: Path, name: str, n: int) -> NDArray[np.uint8]:
    images_HWCN = np.random.default_rng(n).integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    labels = np.array([[1 + i % 10] for i in range(n)], np.uint8)  # the digit 0 is labelled 10
    scipy.io.savemat(folder / name, {"X": images_HWCN, "y": labels})
    return images_HWCN


def test_svhn_is_read_from_its_official_files(tmp_path: Path) -> None:
    write_svhn(tmp_path, "train_32x32.mat", 30)
    images_HWCN = write_svhn(tmp_path, "test_32x32.mat", 20)

    dataset = load("svhn", tmp_path)

    assert dataset.labels == tuple("0123456789")
    assert dataset.test.labels_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert dataset.test.images_NCHW.shape == (20, 3, 32, 32)
    assert dataset.test.images_NCHW[11, 2, 3, 4] == images_HWCN[3, 4, 2, 11]


def test_an_unknown_dataset_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder, cifar10, cifar100, svhn"):
        load("mnist", tmp_path)


# ---- broken files ----


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_calls_nothing(tmp_path: Path) -> None:
    root = write_cifar10(tmp_path)
    (root / "data_batch_3").write_bytes(python_3_pickle({"data": _Malicious(tmp_path / "called")}))

    with pytest.raises(DataError, match=r"data_batch_3 cannot be read \(it wants to call (posix|nt)\.mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "called").exists()


WHOLE = python_3_pickle({"data": official_images(2, 0), "labels": [0, 1]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"no pickle at all", "cannot be read"),
        (WHOLE[:-100], "cannot be read"),
        (b"h\x05.", "cannot be read"),  # takes from an empty memo: a KeyError or IndexError inside
        (b"\x80\x02K\x01b.", "cannot be read"),  # sets the state of a number: an AttributeError inside
        (python_3_pickle({"labels": []}), "official form"),
        (python_3_pickle({"data": official_images(1, 0)[:, :9], "labels": [1]}), "official form"),
        (python_3_pickle({"data": official_images(1, 0), "labels": ["cat"]}), "official form"),
        (pickle.dumps([1, 2]), "no dictionary"),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_5", "test_batch"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    root = write_cifar10(tmp_path)
    (root / name).write_bytes(content)

    with pytest.raises(DataError, match=message) as error:
        load("cifar10", tmp_path)
    assert str(root) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    root = write_cifar10(tmp_path)
    (root / "data_batch_2").unlink()

    with pytest.raises(DataError, match="data_batch_2 cannot be read"):
        load("cifar10", tmp_path)


def test_names_of_classes_that_are_missing_are_an_error_too(tmp_path: Path) -> None:
    (write_cifar10(tmp_path) / "batches.meta").write_bytes(python_3_pickle({"num_vis": 3072}))

    with pytest.raises(DataError, match="label_names"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(200), b"MATLAB 5.0 MAT-file" + bytes(300)])
def test_a_broken_mat_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train_32x32.mat").write_bytes(content)

    with pytest.raises(DataError, match=r"train_32x32\.mat is not the official file"):
        load("svhn", tmp_path)


def test_too_few_images_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path, n=1)

    with pytest.raises(DataError, match="5 training images are too few"):
        load("cifar10", tmp_path)


# ---- download ----


def packed(folder: Path) -> Path:
    """The miniature CIFAR-10 as the archive that would be downloaded."""
    root = write_cifar10(folder)
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, root.name)
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_a_file_is_downloaded_once_into_a_folder_made_for_it(tmp_path: Path) -> None:
    source = packed(tmp_path / "source")
    file = data._File("archive.tar.gz", source.as_uri(), md5(source))

    path = data._fetch(file, tmp_path / "new" / "data")

    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert data._fetch(file, tmp_path / "new" / "data") == path  # not asked for again
    assert [p.name for p in path.parent.iterdir()] == ["archive.tar.gz"]


def test_a_file_of_another_checksum_is_not_kept(tmp_path: Path) -> None:
    source = packed(tmp_path / "source")
    file = data._File("archive.tar.gz", source.as_uri(), "0" * 32)

    with pytest.raises(DataError, match=f"not the official file .md5 {md5(source)}, should be 0000"):
        data._fetch(file, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def server_that_says() -> Iterator[Callable[[bytes], str]]:
    """Start a server that answers one connection with these bytes and closes it; returns its URL."""
    threads = []

    def start(answer: bytes) -> str:
        server = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with server, server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/archive"

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\ncut off",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"this is no HTTP\r\n\r\n",
        b"",
    ],
)
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, server_that_says: Callable[[bytes], str], answer: bytes
) -> None:
    url = server_that_says(answer)

    with pytest.raises(DataError, match=re.escape(url)):
        data._fetch(data._File("archive.tar.gz", url, "0" * 32), tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_data_without_a_network_is_an_error_that_says_where_to_put_it(tmp_path: Path) -> None:
    file = data._File("archive.tar.gz", f"http://127.0.0.1:{closed_port()}/archive", "0" * 32)

    with pytest.raises(DataError, match=re.escape(f"put archive.tar.gz into {tmp_path}")):
        data._read_cifar(tmp_path, file, "cifar-10-batches-py", ["train"], "test", "meta", ("a", "b"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file stands in the way")

    with pytest.raises(DataError, match="could not be downloaded"):
        load("cifar10", tmp_path / "data")


def read_archive(path: Path, checksum: str) -> data.Split:
    """The test split of a miniature CIFAR-10 archive that lies where it was put by hand."""
    file = data._File(path.name, "http://127.0.0.1/not-asked", checksum)
    train, meta, keys = ["data_batch_1"], "batches.meta", ("labels", "label_names")
    _, _, test = data._read_cifar(path.parent, file, "cifar-10-batches-py", train, "test_batch", meta, keys)
    return test


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The archive alone in a folder."""
    (tmp_path / "data").mkdir()
    return packed(tmp_path / "source").rename(tmp_path / "data" / "cifar-10-python.tar.gz")


def test_an_archive_is_unpacked_and_read(archive: Path) -> None:
    assert len(read_archive(archive, md5(archive))) == 20
    assert {p.name for p in archive.parent.iterdir()} == {"cifar-10-batches-py", archive.name}


def test_an_archive_of_another_checksum_is_not_unpacked(archive: Path) -> None:
    whole, checksum = archive.read_bytes(), md5(archive)
    middle = len(whole) // 2

    for broken in (b"garbage", whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :]):
        archive.write_bytes(broken)
        with pytest.raises(
            DataError, match=re.escape(f"{archive} is not the official file (md5 {md5(archive)}")
        ):
            read_archive(archive, checksum)

    assert list(archive.parent.iterdir()) == [archive]
    archive.write_bytes(whole)
    assert len(read_archive(archive, checksum)) == 20


def test_what_could_not_be_unpacked_whole_is_not_taken_for_whole(archive: Path) -> None:
    with no_file_larger_than(10_000), pytest.raises(DataError, match="is there room in"):
        read_archive(archive, md5(archive))

    assert list(archive.parent.iterdir()) == [archive]
    assert len(read_archive(archive, md5(archive))) == 20


# ---- held-out split and normalisation ----


def rows(of: data.Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in of.images_NCHW}


def test_the_held_out_split_is_taken_from_train_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    first, again = (load("cifar10", tmp_path, n_held_out=8, seed=3) for _ in range(2))
    other = load("cifar10", tmp_path, n_held_out=8, seed=4)

    everything = {row.tobytes() for seed in range(5) for row in official_images(20, seed)}
    assert rows(first.train) | rows(first.held_out) == everything
    assert not rows(first.train) & rows(first.held_out)
    assert (len(first.train), len(first.held_out)) == (92, 8)
    assert rows(again.held_out) == rows(first.held_out)
    assert rows(other.held_out) != rows(first.held_out)
    assert rows(other.test) == rows(first.test) == {row.tobytes() for row in official_images(20, 5)}


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    label_of = {
        row.tobytes(): (seed + i) % 10 for seed in range(6) for i, row in enumerate(official_images(20, seed))
    }

    dataset = load("cifar10", tmp_path)

    for split in (dataset.train, dataset.held_out, dataset.test):
        assert split.labels_N.tolist() == [label_of[image.numpy().tobytes()] for image in split.images_NCHW]


def test_normalised_training_images_have_mean_0_and_deviation_1(toy: Dataset) -> None:
    normalised = toy.normalise(toy.train.images_NCHW)

    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3))
    by_hand = (toy.test.images_NCHW / 255 - toy.mean_C[:, None, None]) / toy.std_C[:, None, None]
    torch.testing.assert_close(toy.normalise(toy.test.images_NCHW), by_hand, rtol=1e-5, atol=1e-5)


def test_mean_and_deviation_are_those_of_what_is_learned_from(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    dataset = load("cifar10", tmp_path)
    values = dataset.train.images_NCHW.double() / 255

    torch.testing.assert_close(dataset.mean_C.double(), values.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(dataset.std_C.double(), values.std((0, 2, 3)), rtol=1e-5, atol=0)


def test_a_dataset_moves_as_a_whole(toy: Dataset) -> None:
    there = toy.to(torch.device("meta"))

    splits = (there.train, there.held_out, there.test)
    tensors = [*(s.images_NCHW for s in splits), *(s.labels_N for s in splits), there.mean_C, there.std_C]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (there.name, there.labels) == (toy.name, toy.labels)


# ---- a folder of pictures ----


def save(path: Path, picture: Image.Image | None = None, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.new("RGB", (9, 9), "red")).save(path, **how)


def test_a_folder_per_class_is_a_dataset(pictures: Path) -> None:
    dataset = load("folder", pictures, size=40)

    assert dataset.labels == ("blue", "green", "red")
    assert (len(dataset.train), len(dataset.held_out), len(dataset.test)) == (44, 4, 12)
    splits = (dataset.train, dataset.held_out, dataset.test)
    assert len(set[bytes]().union(*map(rows, splits))) == 60  # disjoint, and nothing lost
    for split in splits:
        strongest = split.images_NCHW.float().mean((2, 3)).argmax(1)
        assert torch.equal(2 - strongest, split.labels_N)  # blue is 0, and the last channel
    again = load("folder", pictures, size=40)
    assert torch.equal(again.test.images_NCHW, dataset.test.images_NCHW)


def test_train_and_test_folders_are_used_as_they_are(tmp_path: Path) -> None:
    for half, n in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            for i in range(n):
                save(tmp_path / half / label / f"{i}.png")

    dataset = load("folder", tmp_path)

    assert dataset.labels == ("cat", "dog")
    assert (len(dataset.train), len(dataset.held_out), len(dataset.test)) == (11, 1, 4)
    assert dataset.train.images_NCHW.shape[1:] == (3, 32, 32)


def test_train_without_test_is_no_class_of_that_name(tmp_path: Path) -> None:
    for half in ("train", "val"):
        for label in ("cat", "dog"):
            save(tmp_path / half / label / "0.png")

    with pytest.raises(DataError, match="test must hold at least two folders"):
        load("folder", tmp_path)


def test_pictures_of_trains_are_a_class_like_others(tmp_path: Path) -> None:
    for label in ("bus", "train"):
        for i in range(8):
            save(tmp_path / label / f"{i}.png")

    assert load("folder", tmp_path).labels == ("bus", "train")


def test_train_and_test_of_other_classes_are_refused(tmp_path: Path) -> None:
    for path in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/cow/0.png"):
        save(tmp_path / path)

    with pytest.raises(DataError, match="folders of the same names"):
        load("folder", tmp_path)


@pytest.mark.parametrize("made", [None, "", "cat"])
def test_fewer_than_two_classes_are_refused(tmp_path: Path, made: str | None) -> None:
    folder = tmp_path / "pictures"
    if made is not None:
        folder.mkdir()
    if made:
        save(folder / made / "0.png")

    with pytest.raises(DataError, match=re.escape(f"{folder} must hold at least two folders")):
        load("folder", folder)


def test_a_class_without_pictures_is_named(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "0.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "readme.txt").write_text("none yet")

    with pytest.raises(DataError, match=r"dog holds no picture .*\.jpg"):
        load("folder", tmp_path)


def broken_pictures() -> dict[str, bytes]:
    """By name: no picture, a cut-off one, and one with wrong bytes in each part of the file."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    out = {"text.png": b"no picture", "empty.jpg": b""}
    for kind in ("png", "jpeg", "gif"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        out[f"cut.{kind}"] = file.getvalue()[: len(file.getvalue()) // 2]
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png")
    whole = bytearray(file.getvalue())
    whole[37:41] = b"\xff\xff\xff\xff"  # the type of the chunk that holds the pixels
    return out | {"chunk.png": bytes(whole)}


@pytest.mark.parametrize("name", broken_pictures())
def test_a_broken_picture_is_named(pictures: Path, name: str) -> None:
    path = pictures / "red" / name
    path.write_bytes(broken_pictures()[name])

    with pytest.raises(DataError, match=re.escape(f"{path} is no readable picture")):
        load("folder", pictures)


# ---- how a picture becomes an input ----


def numbers(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_picture_of_the_right_size_passes_untouched() -> None:
    np.testing.assert_array_equal(data.area_crop(Image.fromarray(numbers(8, 8)), 8), numbers(8, 8))


@pytest.mark.parametrize(("height", "width", "top", "left"), [(8, 14, 0, 3), (14, 8, 3, 0)])
def test_the_largest_centred_square_is_taken(height: int, width: int, top: int, left: int) -> None:
    picture = numbers(height, width)

    cropped = data.area_crop(Image.fromarray(picture), 8)

    np.testing.assert_array_equal(cropped, picture[top : top + 8, left : left + 8])


def test_shrinking_takes_the_mean_of_each_area() -> None:
    picture = numbers(16, 24)
    areas = picture[:, 4:20].astype(float).reshape(4, 4, 4, 4, 3).mean((1, 3))

    np.testing.assert_allclose(data.area_crop(Image.fromarray(picture), 4), areas, atol=1)


def test_enlarging_is_smooth() -> None:
    ramp = np.repeat(np.array([[[0] * 3, [240] * 3]], np.uint8), 2, 0)

    row = data.area_crop(Image.fromarray(ramp), 8)[3, :, 0].astype(int)

    assert (np.diff(row) >= 0).all()
    assert len(set(row.tolist())) > 4


def test_grey_and_palette_become_colour() -> None:
    grey = Image.fromarray(numbers(4, 4)[:, :, 0])
    expected = np.repeat(numbers(4, 4)[:, :, :1], 3, 2)

    np.testing.assert_array_equal(data.area_crop(grey, 4), expected)
    np.testing.assert_array_equal(data.area_crop(grey.convert("P"), 4), expected)
    assert data.area_crop(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), 4)[0, 0].tolist() == [255, 0, 0]
    assert data.area_crop(Image.new("1", (4, 4), 1), 4)[0, 0].tolist() == [255, 255, 255]


def test_what_is_transparent_is_seen_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    rgba.putpixel((2, 0), (200, 0, 0, 128))

    row = data.area_crop(rgba, 4)[0].tolist()

    assert row[:2] == [[255, 255, 255], [200, 0, 0]]
    np.testing.assert_allclose(row[2], [227, 127, 127], atol=1)
    assert data.area_crop(rgba.convert("LA"), 4)[0, 0].tolist() == [255, 255, 255]

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 1
    assert data.area_crop(palette, 4)[0, 0].tolist() == [255, 255, 255]


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste((255, 0, 0), (0, 0, 8, 4))  # the upper half as stored ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... which the camera says is to be turned clockwise
    save(tmp_path / "turned.png", picture, exif=exif)

    with Image.open(tmp_path / "turned.png") as stored:
        upright = data.area_crop(stored, 8)

    assert upright[4, 7].tolist() == [255, 0, 0]
    assert upright[4, 0].tolist() == [255, 255, 255]


# ---- what training sees ----


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(n=st.integers(0, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 9))
def test_batches_are_full_and_take_no_image_twice(n: int, batch_size: int, seed: int) -> None:
    batches = list(data.batches(n, batch_size, seeded(seed)))

    assert [len(batch) for batch in batches] == [batch_size] * (n // batch_size)
    taken = [row for batch in batches for row in batch.tolist()]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(n))


def test_batches_are_of_another_order_with_another_seed() -> None:
    first, again, other = (torch.cat(list(data.batches(30, 5, seeded(seed)))) for seed in (0, 0, 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.tolist() != sorted(first.tolist())


def test_alternate_flips_show_both_sides_of_every_image_in_two_epochs() -> None:
    order = torch.randperm(1000, generator=seeded())

    for epoch in (0, 1, 6):
        first, second = (data.flips(order, e, "alternate", seeded(e)) for e in (epoch, epoch + 1))
        assert torch.equal(first, ~second)
        assert 400 < first.sum() < 600
        assert torch.equal(data.flips(order[:5], epoch, "alternate", seeded(9)), first[:5])  # by image alone


def test_random_flips_toss_a_fair_coin_each_time() -> None:
    generator = seeded()
    first, second = (data.flips(torch.arange(1000), 0, "random", generator) for _ in range(2))

    assert 440 < first.sum() < 560
    assert 440 < (first == second).sum() < 560


def test_the_border_is_reflected() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=seeded())

    padded = data.pad(images, 3)

    expected = np.pad(images.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="reflect")
    np.testing.assert_array_equal(padded.numpy(), expected)
    assert padded.dtype == torch.uint8


def windows(padded_CHW: Tensor, size: int, mirrored: bool) -> Iterator[tuple[tuple[int, int], Tensor]]:
    room = padded_CHW.shape[1] - size + 1
    for top in range(room):
        for left in range(room):
            window = padded_CHW[:, top : top + size, left : left + size]
            yield (top, left), window.flip(2) if mirrored else window


def places(padded_NCHW: Tensor, cut_NCHW: Tensor, mirrored: Tensor, size: int) -> Sequence[tuple[int, int]]:
    """Where each image was cut out, found by trying every place."""
    found = []
    for padded, cut, flip in zip(padded_NCHW, cut_NCHW, mirrored.tolist(), strict=True):
        [place] = [place for place, window in windows(padded, size, flip) if torch.equal(window, cut)]
        found.append(place)
    return found


def test_images_are_shifted_by_whole_pixels_and_mirrored_where_asked() -> None:
    padded = torch.randint(0, 256, (300, 3, 10, 10), dtype=torch.uint8, generator=seeded())
    mirrored = torch.rand(300, generator=seeded(1)) < 0.5

    cut = data.shift_and_flip(padded, 8, mirrored, seeded(2))

    found = places(padded, cut, mirrored, 8)
    assert set(found) == {(top, left) for top in range(3) for left in range(3)}
    assert all(15 < found.count(place) < 55 for place in set(found))  # 33 of each on average
    assert torch.equal(cut, data.shift_and_flip(padded, 8, mirrored, seeded(2)))


def test_without_room_an_image_stays_where_it_is() -> None:
    images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8, generator=seeded())
    mirrored = torch.tensor([True, False, True, False])

    cut = data.shift_and_flip(images, 6, mirrored, seeded())

    assert torch.equal(cut[::2], images[::2].flip(3))
    assert torch.equal(cut[1::2], images[1::2])


# ---- cutout ----


@pytest.mark.parametrize("side", [1, 4, 5])
def test_a_square_is_cut_out_of_each_image_at_a_place_of_its_own(side: int) -> None:
    images = torch.ones(3000, 3, 16, 12)

    cut = data.cut_out(images, side, torch.Generator().manual_seed(0))

    assert torch.equal(images, torch.ones(3000, 3, 16, 12))  # what was given stays as it was
    assert torch.equal(cut[:, 0], cut[:, 1])
    assert torch.equal(cut[:, 0], cut[:, 2])
    hidden = cut[:, 0] == 0
    heights, widths = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == side
    assert heights.min() >= side // 2  # at a border a part of it juts out
    assert hidden.any(0).all()  # every pixel is hidden in some image
    assert len({str(each.tolist()) for each in hidden}) > 50


def test_what_is_cut_out_depends_on_the_generator_alone() -> None:
    images = torch.rand(20, 3, 8, 8)

    first, again, other = (data.cut_out(images, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
