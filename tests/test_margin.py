"""`tvmf_ext.margin`: values for each class that are made of class sizes."""

import numpy as np
import pytest
import torch

from tvmf_ext import TvMFLoss, margin


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
    with pytest.raises(ValueError, match=r"^prior must be the logarithms .*log_prior\(counts\)"):
        TvMFLoss(8, 3, prior=counts)
