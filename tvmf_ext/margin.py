"""Values for each class, `[C]`, that are made of class sizes."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# The logarithm of 7e10. Classes of that size do not occur.
_LARGEST_LOG_COUNT = 25.0


def _counts(counts: Any) -> Tensor:
    """Class sizes `[C]` as float64."""
    try:
        sizes = torch.as_tensor(counts)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(counts).__name__
        raise TypeError(f"counts must be a tensor, an array or a list, got {got}") from error
    if sizes.dim() != 1 or sizes.numel() == 0:
        raise ValueError(f"counts must have shape [C], got {list(sizes.shape)}")
    if sizes.is_complex() or sizes.dtype == torch.bool:
        raise ValueError(f"counts must be class sizes, got {sizes.dtype}")
    sizes = sizes.detach().double()
    refused = sizes[~((sizes >= 0) & sizes.isfinite())]
    if len(refused):
        raise ValueError(f"counts must be finite and at least 0, got {refused[0].item():g}")
    if not sizes.any():
        raise ValueError("counts must name at least one image, got only zeros")
    return sizes


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def log_prior(counts: Any, tau: float = 1.0) -> Tensor:
    """The prior of logit adjustment (Menon et al., ICLR 2021): `tau log(n_c / sum n)`.

    With `tau = 1` it is balanced softmax (Ren et al., NeurIPS 2020).

    Args:
        counts: the class sizes `[C]`, a tensor, an array or a list. A class of size 0 is taken for
            one of size 1/2, because the logarithm of 0 would remove it from every softmax.
        tau: the strength, a finite number of at least 0.

    Returns:
        `[C]` in float32, for the argument `prior`.

    Raises:
        TypeError: an argument is of another type than the above.
        ValueError: counts are negative, not finite, all 0 or not `[C]`; tau is out of range.
    """
    _check_number("tau", tau)
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be finite and at least 0, got {tau}")
    sizes = _counts(counts)
    sizes = sizes.where(sizes > 0, 0.5)
    return (tau * (sizes / sizes.sum()).log()).float()


def ldam(counts: Any, largest: float = 0.5) -> Tensor:
    """The margins of LDAM (Cao et al., NeurIPS 2019), proportional to `n_c^(-1/4)`.

    Args:
        counts: the class sizes `[C]`, a tensor, an array or a list. A class of size 0 is taken for
            one of size 1.
        largest: the margin of the smallest class, a finite number of at least 0.

    Returns:
        `[C]` in float32, for the argument `cosine_margin`.

    Raises:
        TypeError: an argument is of another type than the above.
        ValueError: counts are negative, not finite, all 0 or not `[C]`; largest is out of range.
    """
    _check_number("largest", largest)
    if not 0 <= largest < math.inf:
        raise ValueError(f"largest must be finite and at least 0, got {largest}")
    sizes = _counts(counts).clamp(min=1)
    return (largest * (sizes / sizes.min()).pow(-0.25)).float()


def check_prior(prior: Tensor) -> None:
    """Refuses class sizes that were passed for their logarithms; ValueError.

    Logarithms of frequencies are at most 0. Those of class sizes, which differ from them by a
    constant that the softmax does not see, are accepted, too.
    """
    counts = not prior.is_floating_point() or (
        not prior.is_meta and prior.numel() > 0 and bool((prior > _LARGEST_LOG_COUNT).any())
    )
    if counts:
        what = f"values up to {prior.max().item():g}" if not prior.is_meta else str(prior.dtype)
        raise ValueError(
            "prior must be the logarithms of class frequencies, which "
            f"tvmf_ext.margin.log_prior(counts) makes, got {what}"
        )
