"""The variants that are compared: the fused head, eager PyTorch, torch.compile, other packages.

The other packages (peers) have no t-vMF similarity and run at kappa = 0 alone. They do not
normalise either, so their operands are normalised before the call. Where features are shorter than
the weight (bfloat16 beside float32) the weight is rounded, as eager PyTorch has to do.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import traceback
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tvmf_ext
from tvmf_ext import reference

ABOUT = {
    "fused": "tvmf_ext.tvmf_cross_entropy",
    "eager": "tvmf_ext.reference.tvmf_logits and F.cross_entropy; at kappa 0 the scaled cosine",
    "compile": "the same under torch.compile",
    "max-autotune": "the same in mode max-autotune-no-cudagraphs; by default on GPUs alone",
    "linear_ce": "torch.nn.functional.linear_cross_entropy",
    "linear_ce_chunked": "the same with LinearCrossEntropyOptions(), made for N >= D",
    "pml": "pytorch-metric-learning's NormalizedSoftmaxLoss",
    "cce": "Apple's cut-cross-entropy",
    "liger": "Liger's fused linear cross-entropy",
    "quack": "quack's chunked linear cross-entropy",
    "products": "the three matrix products alone: no head that calls the library for its products "
    "takes less time",
}
NAMES = tuple(ABOUT)
# Eager PyTorch comes first, because its error is the measure of the others' errors.
ORDER = ("eager", *(name for name in NAMES if name != "eager")).index


class Refused(Exception):
    """A variant cannot run a case; the text says why."""


@dataclasses.dataclass
class Loss:
    """A variant that is a loss function and leaves the backward pass to autograd."""

    forward: Callable
    """makes the loss from features, weight, targets and scale"""
    transposed: bool = False
    """whether its weight is [D, C]"""

    def backward(self, loss, *leaves):
        return torch.autograd.grad(loss, leaves)


class Products:
    """The logits, then the gradients of features and weight, all in the features' dtype.

    The gradient of the logits and the rounded weight are made before anything is timed.
    """

    transposed = False

    def __init__(self, N, C, device, dtype):
        generator = torch.Generator(device).manual_seed(1)
        self.grad_logits = torch.randn(N, C, device=device, generator=generator).to(dtype)
        self.rounded = {}

    @torch.no_grad()
    def forward(self, input, weight, target, scale):
        key = weight.data_ptr()
        if key not in self.rounded:
            self.rounded[key] = weight.to(input.dtype)
        return input @ self.rounded[key].t()

    @torch.no_grad()
    def backward(self, logits, input, weight, scale):
        rounded = self.rounded[weight.data_ptr()]
        return self.grad_logits @ rounded, self.grad_logits.t() @ input


def eager(input, weight, target, scale, kappa):
    weight = weight.to(input.dtype)
    if kappa == 0:  # the usual cosine head, as a user would write it
        cosine = F.linear(F.normalize(input), F.normalize(weight))
        return F.cross_entropy(scale * cosine, target)
    logits = reference.tvmf_logits(input, weight, kappa=kappa, scale=scale)
    return F.cross_entropy(logits, target)


def normalised(input, weight, scale):
    """Operands with which a linear cross-entropy computes a cosine head."""
    return scale * F.normalize(input), F.normalize(weight).to(input.dtype)


def make_linear_ce(chunked=False):
    if not hasattr(F, "linear_cross_entropy"):
        raise Refused(f"not in torch {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def loss(input, weight, target, scale):
        return F.linear_cross_entropy(*normalised(input, weight, scale), target, options=options)

    return Loss(loss)


def make_pml():
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

    module = NormalizedSoftmaxLoss(num_classes=1, embedding_size=1)
    del module.W  # torch refuses to replace a parameter by a tensor

    def loss(input, weight, target, scale):
        module.W, module.temperature = weight.to(input.dtype), 1 / scale
        return module(input, target)

    return Loss(loss, transposed=True)


def make_cce():
    from cut_cross_entropy import linear_cross_entropy

    return Loss(lambda x, w, y, s: linear_cross_entropy(*normalised(x, w, s), y))


def make_liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss()

    def loss(input, weight, target, scale):
        input, weight = normalised(input, weight, scale)
        return function(weight, input, target)

    return Loss(loss)


def make_quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Loss(lambda x, w, y, s: chunked_linear_cross_entropy(*normalised(x, w, s), y))


PEERS = {
    "linear_ce": make_linear_ce,
    "linear_ce_chunked": partial(make_linear_ce, chunked=True),
    "pml": make_pml,
    "cce": make_cce,
    "liger": make_liger,
    "quack": make_quack,
}
MODULES = {
    "pml": "pytorch_metric_learning",
    "cce": "cut_cross_entropy",
    "liger": "liger_kernel",
    "quack": "quack",
}


def versions():
    """The versions of the peers that are installed."""
    found = {}
    for name in MODULES.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            name = {"quack": "quack-kernels"}.get(name, name)
            found[name] = importlib.metadata.version(name)
    return found


def make(name, shape, kappa, device, dtype):
    """The variant of that name; raises Refused, or whatever the import of a peer raises."""
    N, C, _ = shape
    if name == "products":
        return Products(N, C, device, dtype)
    if name in PEERS:
        if kappa != 0:
            raise Refused("has no t-vMF, only kappa = 0")
        if name in MODULES and torch.device(device).type == "cpu":
            raise Refused("needs a GPU")
        if name in MODULES and not importlib.util.find_spec(MODULES[name]):
            raise Refused("not installed: pip install '.[bench]'")
        return PEERS[name]()

    def function(input, weight, target, scale):
        return eager(input, weight, target, scale, kappa)

    if name in ("compile", "max-autotune"):
        mode = None if name == "compile" else "max-autotune-no-cudagraphs"
        return Loss(torch.compile(function, dynamic=False, mode=mode))
    if name == "fused":
        return Loss(lambda x, w, y, s: tvmf_ext.tvmf_cross_entropy(x, w, y, kappa=kappa, scale=s))
    return Loss(function)


def reason(error):
    """One line that says why a variant did not run."""
    if isinstance(error, Refused):
        return str(error)
    # A bare assert has no text, so its source line is shown.
    text = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:160]


def first_call(variant, tensors, backward):
    """(loss, *gradients), and the first line of a warning or None; compiles, tunes and warms up."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        input, weight, _, scale = tensors
        loss = variant.forward(*tensors)
        gradients = variant.backward(loss, input, weight, scale) if backward else ()
    lines = [str(w.message).splitlines()[0] for w in caught if issubclass(w.category, UserWarning)]
    return (loss.detach(), *gradients), lines[0][:160] if lines else None
