"""Long-tailed class sizes, subsets, label noise."""

from collections import Counter

import pytest
import torch

from train.config import TrainError
from train.splits import Paths, Split, add_label_noise, exponential_profile, thin_out


def test_exponential_profile():
    # The published class sizes of CIFAR-10-LT.
    sizes = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert exponential_profile(5000, 100, 10) == sizes
    assert exponential_profile(400, 1, 4) == [400] * 4
    with pytest.raises(TrainError, match=r"--imbalance: got 401.*wanted at most 400"):
        exponential_profile(400, 401, 10)


@pytest.mark.parametrize("imbalance, total", [(100, 10_847), (50, 12_608), (10, 19_573)])
def test_cifar100_lt_has_the_published_size(imbalance, total):
    sizes = exponential_profile(500, imbalance, 100)
    assert sum(sizes) == total and (sizes[0], sizes[-1]) == (500, 500 // imbalance)


def test_subset_keeps_a_share_of_each_class():
    labels = torch.tensor([2] * 3 + [0] * 40 + [1] * 15)
    split = Split(Paths.of("", [str(i) for i in range(58)]), labels, "line ")

    def numbers(kept):
        return [int(kept.images[i]) for i in range(len(kept))]

    kept = thin_out(split, 0.1, 3)
    assert torch.bincount(kept.labels).tolist() == [4, 2, 1]  # at least one of each
    assert [kept.where(i) for i in range(7)] == [f"line {i + 1}" for i in numbers(kept)]
    assert torch.equal(kept.labels, labels[numbers(kept)])
    assert numbers(kept) == sorted(set(numbers(kept)))
    assert numbers(thin_out(split, 0.1, 3)) == numbers(kept) != numbers(thin_out(split, 0.1, 4))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
def test_label_noise_is_exact_and_uniform(share):
    labels = torch.arange(4).repeat(500)
    noisy = add_label_noise(labels, share, 4, 1)
    assert (noisy != labels).sum() == round(share * 2000)
    assert noisy.min() == 0 and noisy.max() == 3
    assert torch.equal(noisy, add_label_noise(labels, share, 4, 1))
    if share:
        assert not torch.equal(noisy, add_label_noise(labels, share, 4, 2))
        moves = Counter(((noisy - labels) % 4)[noisy != labels].tolist())
        assert max(moves.values()) < 1.3 * min(moves.values()) and len(moves) == 3
    assert torch.equal(
        labels, torch.arange(4).repeat(500)
    )  # the labels that were given are unchanged
