"""The operators: loads the library, and gives them fake implementations and gradients.

`row_statistics` and `cross_entropy` of this module are the operators with their gradients, which
`tvmf_ext.functional` calls. csrc/torch/bind.cpp holds their schemas and checks their arguments.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

try:
    import tvmf_ext._C  # noqa: F401  (its import registers the operators)
except ImportError as error:
    raise ImportError(
        f"tvmf_ext: the compiled library cannot be loaded ({error}). Build it with `pip install .` "
        "in a checkout of tvmf_ext (in a checkout that you import from: `pip install -e .`), with "
        f"torch >= 2.11; this is torch {torch.__version__} in {os.path.dirname(torch.__file__)}."
    ) from error

_row_statistics = torch.ops.tvmf_ext.row_statistics_forward.default
_row_statistics_backward = torch.ops.tvmf_ext.row_statistics_backward.default
_cross_entropy = torch.ops.tvmf_ext.cross_entropy_forward.default
_cross_entropy_backward = torch.ops.tvmf_ext.cross_entropy_backward.default


is_compiling = torch.compiler.is_compiling  # true while exporting, too


class Head(NamedTuple):
    """The arguments that come first in every operator, in the order of csrc/torch/schema.h.

    The tensors come before the rest. `class_weight` is what the public functions call `weight`.
    `target_score` `[N]` says that the classes are one shard of all: it is `phi + bias` of each
    row's target, against which the rank is counted, and a target outside [0, C) belongs to another
    shard.
    """

    input: Tensor
    weight: Tensor
    target: Tensor
    kappa: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    prior: Tensor | None
    class_weight: Tensor | None
    cosine_margin: Tensor | None
    angular_margin: Tensor | None
    target_score: Tensor | None
    kappa_value: float
    scale_value: float
    cosine_margin_value: float
    angular_margin_value: float
    softplus_scale: bool
    ignore_index: int
    allow_tf32: bool


# The arguments that have a gradient. The backward operators return the gradients in this order, and
# make gradient i if bit i of their argument `wanted` is set.
DIFFERENTIABLE = ("input", "weight", "kappa", "scale", "bias")

_COUNT = len(Head._fields)
_TENSORS = Head._fields.index("kappa_value")  # the first _TENSORS arguments are tensors or None
_GRADIENTS = tuple(
    (Head._fields.index(name), 1 << bit, bit) for bit, name in enumerate(DIFFERENTIABLE)
)


# The dtypes of features, class weights and other floating-point arguments.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and accumulations for features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Whether this build has CUDA kernels, even if the machine it runs on has no GPU.
HAS_CUDA: bool = "cuda_archs=;" not in torch.ops.tvmf_ext.build_info()


def _no_cuda_kernels(*args: Any) -> Any:
    device = next(a.device for a in args if isinstance(a, Tensor) and a.is_cuda)
    raise NotImplementedError(
        f"this build of tvmf_ext has no CUDA kernels, got a tensor on {device}. Rebuild it where "
        "nvcc is found (TVMF_CUDA=1 demands it), move the head's tensors to the CPU, or use the "
        "eager functions of tvmf_ext.reference."
    )


if not HAS_CUDA:
    for _name in ("row_statistics", "cross_entropy"):
        for _suffix in ("", "_forward"):
            library.register_kernel(f"tvmf_ext::{_name}{_suffix}", "cuda")(_no_cuda_kernels)


# Fake implementations: the shapes and dtypes of the results, for torch.compile and fake tensors.


def _check_device(input: Tensor, *others: Any) -> None:
    for other in others:
        if isinstance(other, Tensor) and other.device != input.device:
            raise ValueError(
                f"all tensors must be on the input's device, {input.device}, got {other.device}"
            )


def _fake_saved(input: Tensor, weight: Tensor, kept: int) -> Tensor:
    # SavedLayout (csrc/problem.h) has the size. It is repeated here because torch.compile needs it
    # as an expression in N and C, which may be symbols.
    N, C = input.shape[0], weight.shape[0]
    size = (5 * N + C + 15) // 16 * 16 + N * kept
    return input.new_empty(size, dtype=compute_dtype(input.dtype))


@library.register_fake("tvmf_ext::row_statistics_forward")
@library.register_fake("tvmf_ext::row_statistics")
def _(input: Tensor, weight: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _check_device(input, weight, target, *args)
    with_sum, kept = args[-2:]
    N, dtype = input.shape[0], compute_dtype(input.dtype)
    others, cosine = (input.new_empty(N, dtype=dtype) for _ in range(2))
    total = input.new_empty(N if with_sum else 0, dtype=dtype)
    rank = input.new_empty(N, dtype=torch.int64)
    return others, cosine, total, rank, _fake_saved(input, weight, kept)


@library.register_fake("tvmf_ext::cross_entropy_forward")
@library.register_fake("tvmf_ext::cross_entropy")
def _(input: Tensor, weight: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _check_device(input, weight, target, *args)
    _, reduction, kept = args[-3:]
    shape = (input.shape[0],) if reduction == 0 else ()
    loss = input.new_empty(shape, dtype=compute_dtype(input.dtype))
    return loss, _fake_saved(input, weight, kept)


def _fake_gradients(head: tuple[Any, ...], wanted: int) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(head[position], memory_format=torch.contiguous_format)
        if wanted & bit
        else head[0].new_empty(0)
        for position, bit, _ in _GRADIENTS
    )


@library.register_fake("tvmf_ext::row_statistics_backward")
def _(grad_others: Any, grad_cosine: Any, grad_sum: Any, *args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(args[:_COUNT], args[-1])


@library.register_fake("tvmf_ext::cross_entropy_backward")
def _(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(args[:_COUNT], args[-1])


ONCE = (
    "tvmf_ext: the t-vMF head is differentiable once, by backward(); for second derivatives, "
    "forward mode and torch.func use the eager functions of tvmf_ext.reference"
)


class _OnceDifferentiable(torch.autograd.Function):
    """A backward operator under `create_graph=True`, whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, backward_operator: Callable[..., Any], *args: Any) -> Any:
        return backward_operator(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ONCE)


def _call_once(backward_operator: Callable[..., Any], *args: Any) -> Any:
    if torch.is_grad_enabled() and not is_compiling():
        return _OnceDifferentiable.apply(backward_operator, *args)
    return backward_operator(*args)


class _Function(torch.autograd.Function):
    """The code that the gradients of both operators share. Eager code does not use the gradients
    that are registered with PyTorch's dispatcher, because the way through it takes longer than the
    whole of a small head."""

    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], saved: Tensor, options: tuple[Any, ...]) -> None:
        """Keeps what the backward operator takes between its gradients and `wanted`: the head, of
        the operator's arguments, then `options` and `saved`."""
        ctx.save_for_backward(*args[:_TENSORS], saved)
        ctx.constants = args[_TENSORS:_COUNT] + options
        ctx.set_materialize_grads(False)

    @staticmethod
    def gradients(ctx: Any, backward_operator: Callable[..., Any], *upstream: Any) -> Any:
        """A gradient, or None, for each argument of the operator."""
        needs, wanted = ctx.needs_input_grad, 0
        for position, bit, _ in _GRADIENTS:
            if needs[position]:
                wanted |= bit
        *tensors, saved = ctx.saved_tensors
        args = (*upstream, *tensors, *ctx.constants, saved, wanted)
        gradients = _call_once(backward_operator, *args)
        out: list[Tensor | None] = [None] * len(needs)
        for position, bit, index in _GRADIENTS:
            if wanted & bit:
                out[position] = gradients[index]
        return tuple(out)


class _RowStatistics(_Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = _row_statistics(*args)
        _Function.save(ctx, args, output[-1], args[-1:])
        ctx.mark_non_differentiable(output[-2])
        return output[:-1]

    @staticmethod
    def backward(ctx: Any, grad_others: Any, grad_cosine: Any, grad_sum: Any, *_: Any) -> Any:
        upstream = (grad_others, grad_cosine, grad_sum)
        return _Function.gradients(ctx, _row_statistics_backward, *upstream)


class _CrossEntropy(_Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor]:
        loss, saved = _cross_entropy(*args)
        _Function.save(ctx, args, saved, args[_COUNT:])
        return (loss,)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> Any:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        return _Function.gradients(ctx, _cross_entropy_backward, grad_loss)


_eager_row_statistics: Callable[..., tuple[Tensor, ...]] = _RowStatistics.apply
_eager_cross_entropy: Callable[..., tuple[Tensor]] = _CrossEntropy.apply

_tracing_state = torch._C._get_tracing_state
_count_modes = torch._C._len_torch_dispatch_stack


def is_recorded() -> bool:
    """Whether a program may be recorded: by torch.compile, torch.export, torch.jit.trace or make_fx
    or another dispatch mode. It then has the operators that have gradients of their own."""
    return is_compiling() or _tracing_state() is not None or _count_modes() > 0


# These two take the fields of a Head one by one, and then the operator's own arguments. They do not
# take a Head, because autograd does not look for tensors inside a tuple.


def row_statistics(*args: Any) -> tuple[Tensor, ...]:
    """`others, cosine, sum, rank`, with gradients."""
    if is_recorded():
        return torch.ops.tvmf_ext.row_statistics.default(*args)[:-1]
    return _eager_row_statistics(*args)


def cross_entropy(*args: Any) -> Tensor:
    """The loss, with its gradients."""
    if is_recorded():
        return torch.ops.tvmf_ext.cross_entropy.default(*args)[0]
    return _eager_cross_entropy(*args)[0]


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _Function.save(ctx, inputs, output[-1], inputs[-1:])


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _Function.save(ctx, inputs, output[-1], inputs[_COUNT:])


library.register_autograd(
    "tvmf_ext::row_statistics", _RowStatistics.backward, setup_context=_save_statistics
)
library.register_autograd(
    "tvmf_ext::cross_entropy",
    lambda ctx, grad_loss, _: _CrossEntropy.backward(ctx, grad_loss),
    setup_context=_save_loss,
)


def _products(count: int, input: Any, weight: Any) -> int:
    """The floating-point operations of so many products of features and class vectors."""
    (N, D), C = input, weight[0]
    return 2 * count * N * C * D


@register_flop_formula([torch.ops.tvmf_ext.row_statistics, torch.ops.tvmf_ext.cross_entropy])
def _forward_flops(input: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _products(1, input, weight)


def _backward_flops(head: tuple[Any, ...], kept: int, wanted: int) -> int:
    C = head[1][0]
    again = 0 if kept >= C else 1  # a product that was not kept is made again
    return _products(again + (wanted & 1) + (wanted >> 1 & 1), *head[:2])


@register_flop_formula(torch.ops.tvmf_ext.row_statistics_backward)
def _(grad_others: Any, grad_cosine: Any, grad_sum: Any, *args: Any, **_: Any) -> int:
    return _backward_flops(args[:_COUNT], args[-3], args[-1])


@register_flop_formula(torch.ops.tvmf_ext.cross_entropy_backward)
def _(grad_loss: Any, *args: Any, **_: Any) -> int:
    return _backward_flops(args[:_COUNT], args[-3], args[-1])
