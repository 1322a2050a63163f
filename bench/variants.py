"""What is compared: the fused head, eager PyTorch, torch.compile, and peers for kappa = 0.

A variant has `forward(input, weight, target, scale)` and `backward(state, input, weight, scale)`,
which returns the gradients of the last three; state is what forward returned. The others normalise
before the peer's function, which knows no cosine, and where features are shorter than the weight
they round it, as eager PyTorch must.
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
    "eager": "tvmf_ext.reference.tvmf_cross_entropy: the paper's formulas in eager PyTorch; for "
    "kappa 0 the cosine times the scale",
    "compile": "the same under torch.compile",
    "max-autotune": "the same in mode max-autotune-no-cudagraphs; by default on GPUs alone",
    "linear_ce": "torch.nn.functional.linear_cross_entropy",
    "linear_ce_chunked": "the same with LinearCrossEntropyOptions(), made for N >= D",
    "pml": "pytorch-metric-learning's NormalizedSoftmaxLoss",
    "cce": "Apple's cut-cross-entropy",
    "liger": "Liger's fused linear cross-entropy",
    "quack": "quack's chunked linear cross-entropy",
    "products": "the three bare matrix products: the floor of all that is made of library products",
}
NAMES = tuple(ABOUT)
# Eager comes first, for the errors of the others are held against its own.
ORDER = ("eager", *(name for name in NAMES if name != "eager")).index


class Refused(Exception):
    """A variant does not do a problem; the text says why."""


@dataclasses.dataclass
class Loss:
    """A variant that is a loss function with autograd's backward pass."""

    forward: Callable
    transposed: bool = False  # its weight is [D, C]

    def backward(self, loss, *leaves):
        return torch.autograd.grad(loss, leaves)


class Products:
    """Logits, then features' and weights' gradients, all of features' dtype; the gradient of the
    logits and the rounded weight are there before."""

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
    if kappa == 0:  # as one would write it
        cosine = F.linear(F.normalize(input), F.normalize(weight))
        return F.cross_entropy(scale * cosine, target)
    return reference.tvmf_cross_entropy(input, weight, target, kappa=kappa, scale=scale)


def normalised(input, weight, scale):
    """Operands of a linear cross-entropy that is a cosine head."""
    return scale * F.normalize(input), F.normalize(weight).to(input.dtype)


def of_linear_ce(chunked=False):
    if not hasattr(F, "linear_cross_entropy"):
        raise Refused(f"not in torch {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def loss(input, weight, target, scale):
        return F.linear_cross_entropy(*normalised(input, weight, scale), target, options=options)

    return Loss(loss)


def of_pml():
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

    module = NormalizedSoftmaxLoss(num_classes=1, embedding_size=1)
    del module.W  # a parameter, which nothing but a parameter may replace

    def loss(input, weight, target, scale):
        module.W, module.temperature = weight.to(input.dtype), 1 / scale
        return module(input, target)

    return Loss(loss, transposed=True)


def of_cce():
    from cut_cross_entropy import linear_cross_entropy

    return Loss(lambda x, w, y, s: linear_cross_entropy(*normalised(x, w, s), y))


def of_liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss()

    def loss(input, weight, target, scale):
        input, weight = normalised(input, weight, scale)
        return function(weight, input, target)

    return Loss(loss)


def of_quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Loss(lambda x, w, y, s: chunked_linear_cross_entropy(*normalised(x, w, s), y))


PEERS = {"linear_ce": of_linear_ce, "linear_ce_chunked": partial(of_linear_ce, chunked=True),
         "pml": of_pml, "cce": of_cce, "liger": of_liger, "quack": of_quack}  # fmt: skip
MODULES = {"pml": "pytorch_metric_learning", "cce": "cut_cross_entropy", "liger": "liger_kernel",
           "quack": "quack"}  # fmt: skip


def versions():
    """Of the peers that are installed."""
    found = {}
    for name in MODULES.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            name = {"quack": "quack-kernels"}.get(name, name)
            found[name] = importlib.metadata.version(name)
    return found


def make(name, shape, kappa, device, dtype):
    """The variant of that name; raises Refused, or whatever the peer's import does."""
    N, C, _ = shape
    if name == "products":
        return Products(N, C, device, dtype)
    if name in PEERS:
        if kappa != 0:
            raise Refused("has no t-vMF, only kappa = 0")
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
    """Why a variant refused, in a line."""
    if isinstance(error, Refused):
        return str(error)
    # A bare assert says nothing but its line.
    text = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:160]


def first_call(variant, tensors, backward):
    """(loss, gradients), and what the variant warned of, in a line; compiles, tunes, warms up."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        input, weight, _, scale = tensors
        loss = variant.forward(*tensors)
        gradients = variant.backward(loss, input, weight, scale) if backward else ()
    told = [str(w.message).splitlines()[0] for w in caught if issubclass(w.category, UserWarning)]
    return (loss.detach(), *gradients), told[0][:160] if told else None
