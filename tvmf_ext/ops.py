"""The operators: loads the library, and gives them fake implementations and gradients.

`torch.ops.tvmf_ext.row_statistics` and `torch.ops.tvmf_ext.cross_entropy` are what
`tvmf_ext.functional` calls; csrc/torch/bind.cpp holds their schemas and checks their arguments.
"""

import os
from typing import NamedTuple

import torch
from torch import library

try:
    import tvmf_ext._C  # noqa: F401  (its import registers the operators)
except ImportError as error:
    raise ImportError(
        f"tvmf_ext: the compiled library cannot be loaded ({error}). Build it with `pip install .` "
        "in a checkout of tvmf_ext (in a checkout that you import from: `pip install -e .`), with "
        f"torch >= 2.11; this is torch {torch.__version__} in {os.path.dirname(torch.__file__)}."
    ) from error

_row_statistics = torch.ops.tvmf_ext.row_statistics.default
_row_statistics_backward = torch.ops.tvmf_ext.row_statistics_backward.default
_cross_entropy = torch.ops.tvmf_ext.cross_entropy.default
_cross_entropy_backward = torch.ops.tvmf_ext.cross_entropy_backward.default


class Head(NamedTuple):
    """The arguments that come first in every operator, in the order of csrc/torch/schema.h."""

    input: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    kappa: torch.Tensor | None
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    prior: torch.Tensor | None
    class_weight: torch.Tensor | None
    kappa_value: float
    scale_value: float
    softplus_scale: bool
    ignore_index: int
    allow_tf32: bool


_COUNT = len(Head._fields)
_TENSORS = Head._fields.index("kappa_value")  # the first _TENSORS arguments are tensors or None
# The backward operators return these gradients in this order; gradient i has bit i of `wanted`.
DIFFERENTIABLE = ("input", "weight", "kappa", "scale", "bias")
_GRADIENTS = tuple(
    (Head._fields.index(name), 1 << bit, bit) for bit, name in enumerate(DIFFERENTIABLE)
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and accumulations for features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Whether this build has CUDA kernels, wherever it runs now.
HAS_CUDA = "cuda_archs=;" not in torch.ops.tvmf_ext.build_info()


def _no_cuda_kernels(*args):
    device = next(a.device for a in args if isinstance(a, torch.Tensor) and a.is_cuda)
    raise NotImplementedError(
        f"this build of tvmf_ext has no CUDA kernels, got a tensor on {device}. Rebuild it where "
        "nvcc is found (TVMF_CUDA=1 demands it), move the head's tensors to the CPU, or use the "
        "eager functions of tvmf_ext.reference."
    )


if not HAS_CUDA:
    for _name in ("row_statistics", "cross_entropy"):
        library.register_kernel(f"tvmf_ext::{_name}", "cuda")(_no_cuda_kernels)


def _check_device(input, *others):
    for other in others:
        if isinstance(other, torch.Tensor) and other.device != input.device:
            raise ValueError(
                f"all tensors must be on the input's device, {input.device}, got {other.device}"
            )


def _fake_saved(input, weight, kept):
    """Its size is that of SavedLayout (csrc/problem.h)."""
    N, C = input.shape[0], weight.shape[0]
    size = (4 * N + C + 15) // 16 * 16 + N * kept
    return input.new_empty(size, dtype=compute_dtype(input.dtype))


@library.register_fake("tvmf_ext::row_statistics")
def _(input, weight, target, *args):
    _check_device(input, weight, target, *args)
    with_sum, kept = args[-2:]
    N, dtype = input.shape[0], compute_dtype(input.dtype)
    lse, target_logit = (input.new_empty(N, dtype=dtype) for _ in range(2))
    total = input.new_empty(N if with_sum else 0, dtype=dtype)
    rank = input.new_empty(N, dtype=torch.int64)
    return lse, target_logit, total, rank, _fake_saved(input, weight, kept)


@library.register_fake("tvmf_ext::cross_entropy")
def _(input, weight, target, *args):
    _check_device(input, weight, target, *args)
    _, reduction, kept = args[-3:]
    shape = (input.shape[0],) if reduction == 0 else ()
    loss = input.new_empty(shape, dtype=compute_dtype(input.dtype))
    return loss, _fake_saved(input, weight, kept)


def _fake_gradients(head, wanted):
    return tuple(
        torch.empty_like(head[position], memory_format=torch.contiguous_format)
        if wanted & bit
        else head[0].new_empty(0)
        for position, bit, _ in _GRADIENTS
    )


@library.register_fake("tvmf_ext::row_statistics_backward")
def _(grad_lse, grad_target, grad_sum, *args):
    return _fake_gradients(args[:_COUNT], args[-1])


@library.register_fake("tvmf_ext::cross_entropy_backward")
def _(grad_loss, *args):
    return _fake_gradients(args[:_COUNT], args[-1])


class _OnceDifferentiable(torch.autograd.Function):
    """A backward operator under `create_graph=True`, whose own gradient is refused."""

    @staticmethod
    def forward(ctx, backward_operator, *args):
        return backward_operator(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "tvmf_ext: the t-vMF head is differentiable once; for second derivatives use the eager "
            "functions of tvmf_ext.reference"
        )


def _call_once(backward_operator, *args):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _OnceDifferentiable.apply(backward_operator, *args)
    return backward_operator(*args)


class _Function(torch.autograd.Function):
    """One operator and its gradient. The gradient is not registered with the operator, because its
    way through the dispatcher takes longer than the whole of a small head."""

    @staticmethod
    def save(ctx, head, saved):
        ctx.constants = head[_TENSORS:]
        ctx.save_for_backward(*head[:_TENSORS], saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward_arguments(ctx):
        """The head's arguments as the forward operator had them, `saved`, and `wanted`."""
        *tensors, saved = ctx.saved_tensors
        needs, wanted = ctx.needs_input_grad, 0
        for position, bit, _ in _GRADIENTS:
            if needs[position]:
                wanted |= bit
        return (*tensors, *ctx.constants), saved, wanted

    @staticmethod
    def input_gradients(gradients, wanted):
        """The gradients in the order of the head's arguments."""
        out = [None] * _COUNT
        for position, bit, index in _GRADIENTS:
            if wanted & bit:
                out[position] = gradients[index]
        return out


class _RowStatistics(_Function):
    @staticmethod
    def forward(ctx, *args):
        output = _row_statistics(*args)
        ctx.kept = args[-1]
        _Function.save(ctx, args[:_COUNT], output[-1])
        ctx.mark_non_differentiable(output[-2])
        return output[:-1]

    @staticmethod
    def backward(ctx, grad_lse, grad_target, grad_sum, *_):
        head, saved, wanted = _Function.backward_arguments(ctx)
        grads = (grad_lse, grad_target, grad_sum)
        args = (*grads, *head, ctx.kept, saved, wanted)
        gradients = _call_once(_row_statistics_backward, *args)
        return *_Function.input_gradients(gradients, wanted), None, None


class _CrossEntropy(_Function):
    @staticmethod
    def forward(ctx, *args):
        loss, saved = _cross_entropy(*args)
        ctx.options = args[_COUNT:]
        _Function.save(ctx, args[:_COUNT], saved)
        return (loss,)

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * (_COUNT + 3)
        head, saved, wanted = _Function.backward_arguments(ctx)
        args = (grad_loss, *head, *ctx.options, saved, wanted)
        gradients = _call_once(_cross_entropy_backward, *args)
        return *_Function.input_gradients(gradients, wanted), None, None, None


row_statistics = _RowStatistics.apply
cross_entropy = _CrossEntropy.apply
