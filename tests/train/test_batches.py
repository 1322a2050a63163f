"""The order of an epoch's images, their division into parts, and their augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from torchvision import transforms

from train.augment import shift
from train.batches import (
    ImageFiles,
    Loader,
    Readers,
    balanced_over_classes,
    balanced_over_images,
    balanced_over_square_roots,
    seed_of,
    shares,
)
from train.splits import Paths, Split


@pytest.mark.parametrize("batch_size", [8, 10])
def test_class_aware_order(batch_size):
    # Class 3 has no image.
    labels = torch.tensor([0] * 60 + [1] * 22 + [2] * 9 + [4] * 2)[torch.randperm(93)]
    order = balanced_over_classes(labels, batch_size, 5)
    assert order.shape == (93 // batch_size * batch_size,)

    groups = labels[order][: len(order) // 4 * 4].view(-1, 4)
    assert (groups == groups[:, :1]).all()
    turns = groups[:, 0]
    passes = turns[: len(turns) // 4 * 4].view(-1, 4)
    assert (
        passes.sort(1).values == torch.tensor([0, 1, 2, 4])
    ).all()  # every pass has each class once
    assert len(passes.unique(dim=0)) > 1  # and passes differ in their order
    for c, size in ((0, 60), (1, 22), (2, 9), (4, 2)):
        visits = order[labels[order] == c]
        for cycle in visits.split(
            size
        ):  # no image is repeated before all of its class had their turn
            assert len(cycle.unique()) == len(cycle)


def test_class_aware_order_shuffles_a_class_anew():
    order = balanced_over_classes(torch.tensor([0] * 3 + [1] * 93), 96, 1)
    assert len(order[order < 3].view(-1, 3).unique(dim=0)) > 1


def test_class_aware_epoch_is_at_least_one_batch():
    order = balanced_over_classes(torch.tensor([0, 0, 1]), 8, 0)
    assert len(order) == 8 and set(order.tolist()) == {0, 1, 2}


def test_order_over_images_is_a_permutation():
    order = balanced_over_images(torch.zeros(47), 5, 0)
    assert sorted(order.tolist()) == list(range(47)) != order.tolist()


def test_order_over_square_roots():
    # Class 1 has no image; 900, 100 and 25 images have the roots 30, 10 and 5.
    labels = torch.tensor([0] * 900 + [2] * 100 + [3] * 25)
    orders = [balanced_over_square_roots(labels, 64, seed) for seed in range(20)]
    assert all(len(order) == len(labels) for order in orders)
    shares = torch.bincount(labels[torch.cat(orders)]).double() / (20 * len(labels))
    wanted = torch.tensor([30, 0, 10, 5]).double() / 45
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.015)  # 4 standard deviations


@pytest.mark.parametrize(
    "draw", [balanced_over_images, balanced_over_classes, balanced_over_square_roots]
)
def test_order_is_decided_by_the_seed_alone(draw):
    labels = torch.arange(3).repeat(30)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    order = draw(labels, 9, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw(labels, 9, 1), order)
    assert not torch.equal(draw(labels, 9, 2), order)


def test_seeds_of_positions_differ():
    seeds = {seed_of(*p) for p in np.ndindex(4, 3, 40)}
    assert len(seeds) == 4 * 3 * 40
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [64, 80, 16])
def test_shares_are_disjoint_and_complete(world, size):
    every = [shares(size, 32, rank, world) for rank in range(world)]
    seen = []
    for step, parts in enumerate(zip(*every, strict=True)):
        wanted = range(32 * step, min(size, 32 * (step + 1)))
        assert torch.cat(parts).tolist() == list(wanted)
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        seen += torch.cat(parts).tolist()
    assert seen == list(range(size))


@pytest.mark.parametrize(
    "size, world, steps",
    [
        *[(100, 1, 10), (101, 1, 10), (102, 1, 11), (109, 1, 11)],
        *[(103, 2, 10), (104, 2, 11), (105, 3, 10), (106, 3, 11)],
        *[(10, 2, 1), (5, 1, 1), (1, 1, 1), (3, 2, 1)],
    ],
)
def test_a_last_batch_of_less_than_two_images_a_process_is_dropped(size, world, steps):
    for rank in range(world):
        mine = shares(size, 10, rank, world)
        assert len(mine) == steps
        if size >= 2 * world:
            assert min(map(len, mine)) >= 2


def test_shift_moves_each_image_by_its_own_offset():
    images = torch.rand(3, 2, 5, 6)
    offsets = torch.tensor([[1, 0, -2], [-1, 2, 0]])
    moved = shift(images, offsets, 2)
    wanted = torch.zeros_like(images)
    wanted[0, :, 1:, :-1] = images[0, :, :-1, 1:]
    wanted[1, :, :, 2:] = images[1, :, :, :-2]
    wanted[2, :, :-2] = images[2, :, 2:]
    assert torch.equal(moved, wanted)


class Lighting:
    """Adds a random mixture of ImageNet's principal colours (Krizhevsky et al., 2012)."""

    def __call__(self, image):
        a, b, c = (0.1 * torch.randn(3)).tolist()
        red = -0.5675 * 0.2175 * a + 0.7192 * 0.0188 * b + 0.4009 * 0.0045 * c
        green = -0.5808 * 0.2175 * a - 0.0045 * 0.0188 * b - 0.8140 * 0.0045 * c
        blue = -0.5836 * 0.2175 * a - 0.6948 * 0.0188 * b + 0.4203 * 0.0045 * c
        return image + torch.tensor([red, green, blue]).view(3, 1, 1)


def reference_transforms(augment, train):
    """The transforms in config/model_config.py of the paper's code."""
    statistics = {
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "inat": ([0.466, 0.471, 0.380], [0.195, 0.194, 0.192]),
    }[augment]
    end = [transforms.ToTensor(), transforms.Normalize(*statistics)]
    if not train:
        return transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *end])
    begin = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    if augment == "imagenet":
        begin.append(transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4))
        end.insert(1, Lighting())
    return transforms.Compose([*begin, *end])


@pytest.mark.parametrize("side", [(300, 270), (1100, 1340)], ids=["small", "large"])
@pytest.mark.parametrize("augment", ["imagenet", "inat"])
@pytest.mark.parametrize("train", [True, False])
def test_transforms_are_the_references(tmp_path, augment, train, side):
    """The same draws give the same image as torchvision's transforms of a PIL image, up to the
    rounding to 256 levels after each of these; a large JPEG is decoded at a smaller size."""
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    path, large = str(tmp_path / "image.jpg"), side[0] > 1000
    Image.fromarray(pixels).resize(side, Image.Resampling.BICUBIC).save(path, quality=98)
    split = Split(Paths.of("", [path] * 4), torch.zeros(4, dtype=torch.int64))
    cpu = torch.device("cpu")
    readers = Readers(ImageFiles([split], augment, 224), 0, cpu)
    loader = Loader(split, readers, train=train)
    (ours, _) = next(loader(torch.arange(4), [torch.arange(4)], 9))
    assert ours.dtype == torch.float32 and ours.shape == (4, 3, 224, 224)
    image, theirs = Image.open(path), reference_transforms(augment, train)
    level = 1 / 255 / 0.19
    for position in range(4):
        torch.manual_seed(seed_of(9, position))  # both must draw the same, in the same order
        error = (ours[position] - theirs(image)).abs()
        assert error.mean() < (2 if large or (train and augment == "imagenet") else 0.3) * level
        # At its edge our part of an image takes pixels from beyond the edge into account.
        assert error[:, 3:-3, 3:-3].max() < (12 if large else 8) * level
    assert torch.equal(ours[0], ours[1]) is not train


def test_jitter_has_torchvisions_distribution(tmp_path):
    Image.new("RGB", (8, 8), (90, 120, 60)).save(tmp_path / "0.png")
    split = Split(Paths.of(str(tmp_path), ["0.png"]), torch.zeros(1, dtype=torch.int64))
    cpu = torch.device("cpu")
    readers = Readers(ImageFiles([split], "imagenet", 8), 0, cpu)
    loader = Loader(split, readers, train=True)
    ours = next(loader(torch.zeros(1500, dtype=torch.int64), [torch.arange(1500)], 3))[0]
    theirs = reference_transforms("imagenet", True).transforms[2:]
    theirs = transforms.Compose(theirs)
    torch.manual_seed(5)
    image = Image.new("RGB", (8, 8), (90, 120, 60))
    theirs = torch.stack([theirs(image) for _ in range(1500)])
    for got, wanted in ((x[:, c, 0, 0] for x in (ours, theirs)) for c in range(3)):
        assert kstest(got.numpy(), wanted.numpy()).pvalue > 1e-3
