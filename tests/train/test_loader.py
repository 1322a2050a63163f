"""Loaders: batches of images in memory and of files, with and without bad ones."""

import math
from collections import Counter

import pytest
import torch

from tests.train.image_files import noise, numbered, spoil
from train.augment import channel_statistics
from train.batches import (
    ImageFiles,
    Loader,
    Readers,
    balanced_over_images,
    shares,
)
from train.config import TrainError
from train.splits import Paths, Split

LABELS = torch.arange(12) % 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("noise")
    for i in range(12):
        noise(root / f"{i}.png", i)
    paths = [str(root / f"{i}.png") for i in range(12)]
    return Split(Paths.of("", paths), LABELS)


def loader_of(split, train=True, **options):
    in_memory = isinstance(split.images, torch.Tensor)
    statistics = channel_statistics(split.images) if in_memory else None
    augment, size = ("small", split.images.shape[-1]) if in_memory else ("imagenet", 32)
    readers = Readers(
        ImageFiles([split], augment, size), options.pop("workers", 0), torch.device("cpu")
    )
    options = {"statistics": statistics, "flip": True} | options
    return Loader(split, readers, train=train, **options)


@pytest.fixture(params=["memory", "files", "files, 2 workers"])
def loader(request, files):
    if request.param == "memory":
        return loader_of(Split(torch.from_numpy(numbered(12, 3, 16, 16)), LABELS))
    return loader_of(files, workers=2 if "workers" in request.param else 0)


def by_position(loader, order, batches, seed):
    """Images [N, ...] and labels [N] of an epoch, in the order of their positions."""
    images, labels = zip(*loader(order, batches, seed), strict=True)
    assert [len(i) for i in images] == [len(b) for b in batches]
    back = torch.cat(batches).argsort()
    assert len(back) == len(order)
    return torch.cat(images)[back], torch.cat(labels)[back]


def test_augmentation_depends_on_the_position_alone(loader):
    order = torch.cat([balanced_over_images(LABELS, 5, 3), torch.tensor([4, 4])])
    whole = shares(14, 5, 0, 1)
    split = shares(14, 5, 0, 2) + shares(14, 5, 1, 2)
    images, labels = by_position(loader, order, whole, 9)
    assert torch.equal(labels, LABELS[order])
    assert not torch.equal(images[12], images[13])  # the same image at two positions
    ranks = by_position(loader, order, split, 9)
    assert torch.equal(ranks[0], images) and torch.equal(ranks[1], labels)
    resumed = torch.cat([i for i, _ in loader(order, whole[1:], 9)])
    assert torch.equal(resumed, images[5:])
    assert not torch.equal(by_position(loader, order, whole, 10)[0], images)


def test_workers_make_no_difference(files):
    order, batches = torch.arange(12), list(torch.arange(12).split(5))
    images = [by_position(loader_of(files, workers=w), order, batches, 1)[0] for w in (0, 2)]
    assert torch.equal(*images)


def test_loader_leaves_the_global_generator_alone(loader):
    order, batches = torch.arange(12), list(torch.arange(12).split(4))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images = []
    for batch, _ in loader(order, batches, 1):
        assert torch.equal(torch.get_rng_state(), state)
        images.append(batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    for (batch, _), wanted in zip(loader(order, batches, 1), images, strict=True):
        assert torch.equal(batch, wanted)
        torch.rand(3)  # as dropout would


@pytest.mark.parametrize("flip", [True, False])
def test_small_images_are_shifted_and_mirrored(flip):
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, 10, 5] = 255
    still = (torch.zeros(1), torch.ones(1))
    split = Split(image, torch.zeros(1, dtype=torch.int64))
    order, batches = torch.zeros(400, dtype=torch.int64), [torch.arange(400)]
    images = next(loader_of(split, statistics=still, flip=flip)(order, batches, 0))[0]
    assert (images.flatten(1).sum(1) == 1).all()
    at = images.flatten(1).argmax(1)
    rows, columns = at // 28, at % 28
    # Up to two pixels either way: 25 offsets. Half of the images are mirrored after that.
    mirrored = columns > 13
    columns = torch.where(mirrored, 27 - columns, columns)
    offsets = Counter(zip((rows - 10).tolist(), (columns - 5).tolist(), strict=True))
    assert {*offsets} == {(r, c) for r in range(-2, 3) for c in range(-2, 3)}
    for column in range(3, 8):  # mirrored as often at every offset
        part = mirrored[columns == column].double().mean()
        assert 0.3 < part < 0.7 if flip else part == 0


def test_images_for_evaluation_are_normalised_alone(files):
    pixels = torch.from_numpy(numbered(12, 3, 16, 16))
    mean, std = channel_statistics(pixels)
    scaled = pixels.double() / 255
    torch.testing.assert_close(mean.double(), scaled.mean((0, 2, 3)))
    torch.testing.assert_close(std.double(), scaled.std((0, 2, 3), unbiased=False))
    order, batches = torch.arange(12), [torch.tensor([3, 1]), torch.tensor([0])]
    loader = loader_of(Split(pixels, LABELS), train=False)
    got = [i for i, _ in loader(order, batches, 0)]
    wanted = (scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(torch.cat(got), wanted[[3, 1, 0]].float())
    assert all(map(torch.equal, got, [i for i, _ in loader(order, batches, 1)]))

    loader = loader_of(files, train=False)
    got = torch.cat([i for i, _ in loader(order, batches, 0)])
    assert torch.equal(got, torch.cat([i for i, _ in loader(order, batches, 1)]))


def test_statistics_of_constant_images_are_finite():
    _, std = channel_statistics(torch.full((3, 2, 4, 4), 9, dtype=torch.uint8))
    assert (std > 0).all()
    # The images are taken in parts of 1000, and the last part has fewer.
    pixels = torch.zeros(1001, 1, 1, 1, dtype=torch.uint8)
    pixels[1000] = 255
    mean, std = channel_statistics(pixels)
    assert mean.item() == pytest.approx(1 / 1001)
    assert std.item() == pytest.approx(math.sqrt(1000) / 1001)


@pytest.fixture
def spoilt(files, tmp_path):
    """The images of `files`, of which 2 and 7 cannot be read."""
    paths = [files.images[i] for i in range(12)]
    for i, how in ((2, "truncated"), (7, "text")):
        paths[i] = str(tmp_path / f"{i}.png")
        spoil(tmp_path / f"{i}.png", how)
    return Split(Paths.of("", paths), LABELS)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_file_stops_and_is_named(spoilt, workers):
    for train in (True, False):
        loader = loader_of(spoilt, train=train, workers=workers)
        batches = loader(torch.arange(12), list(torch.arange(12).split(6)), 0)
        with pytest.raises(TrainError, match=r"/2\.png \(.*wanted readable ones in their place"):
            next(batches)
        with pytest.raises(TrainError, match=r"/2\.png \(.*; /.*/7\.png \("):
            next(loader(torch.arange(12), [torch.arange(12)], 0))
