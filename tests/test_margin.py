"""`tvmf_ext.margin`: values for each class that are made of class sizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tvmf_ext import TvMFLoss, margin, tvmf_cross_entropy


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_log_prior_is_the_logarithm_of_the_frequencies(kind):
    counts = [5, 3, 2]
    expected = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().float()
    assert torch.equal(margin.log_prior(kind(counts)), expected)
    assert torch.equal(margin.log_prior(kind(counts), tau=0), torch.zeros(3))


def test_a_class_without_images_counts_as_half_an_image():
    prior = margin.log_prior([3, 0])
    torch.testing.assert_close(prior.exp(), torch.tensor([6 / 7, 1 / 7]))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, -1], "counts must be finite and at least 0, got -1"),
        ([1, float("nan")], "counts must be finite and at least 0, got nan"),
        ([0, 0], "counts must name at least one image, got only zeros"),
        ([[1, 2]], r"counts must have shape \[C\], got \[1, 2\]"),
        ([], r"counts must have shape \[C\], got \[0\]"),
        ([True, False], r"counts must be class sizes, got torch.bool"),
    ],
)
def test_counts_that_are_no_class_sizes_are_refused(counts, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        margin.log_prior(counts)


@pytest.mark.parametrize("tau", [-1, float("nan"), float("inf")])
def test_tau_out_of_range_is_refused(tau):
    with pytest.raises(ValueError, match=r"^tau must be finite and at least 0, got"):
        margin.log_prior([1, 2], tau)


@pytest.mark.parametrize(
    "counts", [torch.tensor([500.0, 20, 3]), torch.tensor([5, 3, 2]), [9, 2, 1]]
)
def test_counts_in_place_of_their_logarithms_are_refused(counts):
    message = r"^prior must be the logarithms .*log_prior\(counts\)"
    with pytest.raises(ValueError, match=message):
        TvMFLoss(8, 3, prior=counts)
    # As floats they show where they are larger than any logarithm of a size.
    prior = torch.as_tensor(counts).float() + 25
    with pytest.raises(ValueError, match=message):
        tvmf_cross_entropy(torch.ones(4, 8), torch.ones(3, 8), torch.arange(4) % 3, prior=prior)


def test_ldam_margins_fall_with_the_fourth_root_of_the_size():
    torch.testing.assert_close(margin.ldam([16, 1, 0, 81]), torch.tensor([0.25, 0.5, 0.5, 0.5 / 3]))
    with pytest.raises(ValueError, match=r"^largest must be finite and at least 0, got -1$"):
        margin.ldam([1, 2], largest=-1)


@pytest.mark.parametrize("name", ["arcface", "cosface", "ldam"])
def test_the_loss_with_a_margin_is_cross_entropy_of_the_published_logits(name):
    torch.manual_seed(0)
    counts, target = [50, 20, 10, 5, 1], torch.arange(12) % 5
    input = torch.randn(12, 8, dtype=torch.float64)
    if name == "ldam":
        head = TvMFLoss(8, 5, kappa=0.0, scale=30.0, cosine_margin=margin.ldam(counts)).double()
    else:
        head = getattr(TvMFLoss, name)(8, 5).double()
    cosine = F.linear(F.normalize(input), F.normalize(head.weight))
    picked = F.one_hot(target, 5).bool()
    moved = {
        "arcface": (cosine.arccos() + 0.5).cos(),
        "cosface": cosine - 0.35,
        "ldam": cosine - margin.ldam(counts).double(),
    }[name]
    scale = 30 if name == "ldam" else 64
    expected = F.cross_entropy(scale * torch.where(picked, moved, cosine), target)
    assert (cosine.arccos()[picked] + 0.5 < torch.pi).all()
    torch.testing.assert_close(head(input, target), expected, rtol=1e-6, atol=0)
    assert isinstance(head.s_, torch.nn.Parameter) == (name == "ldam")
