"""The arguments that the operators share: their checks, and how many products are kept."""

import functools
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

IGNORE_INDEX = -100  # torch's default, which None stands for

# The forward pass keeps products for the backward pass. On the CPU they and the working tile share
# a number of bytes, so that the extra memory stays under 64 MB whatever C is; a tile has 2 MiB, or
# 256 classes of many rows (csrc/cpu/plan.cpp). On CUDA all products are kept, or none, and Hopper's
# kernels keep rounded weights as well (csrc/cuda/sm90/plan.cpp has their rule). With fewer
# features than this, a product takes about as little time to recompute as to write and read.
_KEEP_BYTES = 50 * 1024 * 1024
_TILE_BYTES, _TILE_CLASSES = 2 * 1024 * 1024, 256
_KEEP_MIN_FEATURES = 128
_CUDA_KEEP_BYTES = 64 * 1024 * 1024
_CUDA_KEEP_MIN_FEATURES = 64


class SoftplusScale(NamedTuple):
    """The scale `softplus(s) + 1`. The kernels compute and differentiate it themselves, because
    PyTorch's operators for it take as long as the whole backward pass of a small head."""

    s: Tensor

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The scale as a tensor, computed in `dtype`, by default that of `s`."""
        return F.softplus(self.s if dtype is None else self.s.to(dtype)) + 1


class KeptProducts(NamedTuple):
    """What the kernels that serve a weight on a CUDA device keep of its products: KeptProducts of
    csrc/cuda/cost.h."""

    most_rows: int = 2**31
    row_multiple: int = 1
    beside: int = 0

    def elements(self, N: int, C: int, D: int, dtype: torch.dtype) -> int:
        """Elements for each row that the forward pass keeps, a multiple of 16, or 0."""
        few = N * C * ops.compute_dtype(dtype).itemsize <= _CUDA_KEEP_BYTES
        if D < _CUDA_KEEP_MIN_FEATURES or N < 1 or self.most_rows < N or not few:
            return 0
        rows = (N + self.row_multiple - 1) // self.row_multiple * self.row_multiple
        # Hopper's path keeps 16 more, so that the number says whose products they are.
        more = 16 if self.row_multiple > 1 else 0
        return (C * (rows + self.beside) + 16 * N - 1) // (16 * N) * 16 + more


def products_to_keep(N: int, C: int, D: int, dtype: torch.dtype) -> int:
    """The number of classes, a multiple of 16, whose products the CPU's forward pass keeps."""
    if D < _KEEP_MIN_FEATURES:
        return 0
    itemsize, every = ops.compute_dtype(dtype).itemsize, (C + 15) // 16 * 16
    left = max(0, _KEEP_BYTES - max(0, N * _TILE_CLASSES * itemsize - _TILE_BYTES))
    return min(every, 16 * (left // (itemsize * 16) // max(N, 1)))


def _constant_to_compile(function: Callable[..., Any]) -> Any:
    """Makes torch.compile take the function's result for a constant, and compile again when it
    changes. torch.compiler.assume_constant_result does the same, but loads the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_to_compile
@functools.lru_cache(maxsize=1024)
def _kept_products(
    C: int,
    D: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    row_stride: int,
    col_stride: int,
    aligned: bool,
    device: int,
) -> KeptProducts:
    """What the kernels that serve such a weight on a CUDA device keep."""
    if not (ops.HAS_CUDA and torch.cuda.is_available()):
        return KeptProducts()  # a fake tensor, whose device need not exist
    layout = (row_stride, col_stride, aligned)
    return kept_products(C, D, dtype, weight_dtype, layout, f"cuda:{device}")


def kept_products(
    C: int,
    D: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    layout: tuple[int, int, bool],
    device: str,
) -> KeptProducts:
    """The same on any GPU that has a name. The layout is the strides of the weight in elements,
    and whether its first element lies on a 16-byte boundary."""
    names = (str(each).removeprefix("torch.") for each in (dtype, weight_dtype))
    return KeptProducts(*torch.ops.tvmf_ext.kept_products(C, D, *names, *layout, device))


def _kept(input: Tensor, weight: Tensor, *others: Tensor | None) -> int:
    """How many classes have their products kept, or on CUDA how many elements of each row: none if
    no backward pass can follow. The others are the tensors besides input and weight that may
    require grad."""
    if not torch.is_grad_enabled() or input.dim() != 2 or weight.dim() != 2:
        return 0
    if torch._C._get_tracing_state() is not None:
        return 0  # torch.jit.trace records one number for any batch, with gradients and without
    if not (
        input.requires_grad
        or weight.requires_grad
        or any(t is not None and t.requires_grad for t in others)
    ):
        return 0
    (N, D), C = input.shape, weight.shape[0]
    if input.is_cuda:
        # torch.compile cannot trace storage_offset (torch 2.11 to 2.14). A compiled weight at an
        # odd offset is therefore taken for an aligned one, and its products are made twice.
        aligned = ops.is_compiling() or weight.storage_offset() * weight.element_size() % 16 == 0
        layout = (weight.stride(0), weight.stride(1), aligned)
        dtypes = (input.dtype, weight.dtype)
        keeps = _kept_products(C, D, *dtypes, *layout, input.device.index or 0)
        return keeps.elements(N, C, D, input.dtype)
    return products_to_keep(N, C, D, input.dtype)


@_constant_to_compile
def cuda_allows_tf32() -> bool:
    """torch's setting for float32 products on CUDA. It is read where it is newest: the older name,
    `allow_tf32`, raises after the newer one was set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def number(name: str, value: Any) -> float:
    if isinstance(value, (int, float, Real)):
        return float(value)
    raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")


def _as_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # torch.compile keeps the factor of a product variable, and the value of torch.full constant.
    return torch.ones((), dtype=torch.float64, device=like.device) * number(name, value)


def check_margins(kappa: Tensor, cosine_margin: Any, angular_margin: Any) -> None:
    """Checks the values of the margins, and that of kappa, which may be -1/2 without them only."""
    m, a = (
        margin.detach().to("cpu", torch.float64)
        if isinstance(margin, Tensor)
        else torch.tensor(number(name, margin), dtype=torch.float64, device="cpu")
        for name, margin in (("cosine_margin", cosine_margin), ("angular_margin", angular_margin))
    )
    if not bool(((m >= 0) & m.isfinite()).all()):
        raise ValueError(f"cosine_margin must be finite and >= 0, got {m.min().item():g}")
    if not bool(((a >= 0) & (a <= math.pi)).all()):
        raise ValueError(f"angular_margin must be in [0, pi], got {a.max().item():g}")
    smallest = -1 / (3 - a.cos() + m)
    if not bool((kappa.to(torch.float64) > smallest).all()):
        raise ValueError(
            f"kappa must be > {smallest.max().item():g} with these margins, got "
            f"{kappa.min().item():g}"
        )


def check_ignore_index(value: Any) -> int:
    """The label of the rows to ignore, which fits int64 as the labels do."""
    if value is None:
        return IGNORE_INDEX
    if not isinstance(value, (int, Integral)):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")
    if not (ops.is_compiling() or -(2**63) <= int(value) < 2**63):
        raise ValueError(f"ignore_index must fit int64, got {value}")
    return value  # type: ignore[return-value]


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_tensor(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        return
    hint = ""
    if type(value).__name__ == "Proxy":
        hint = "; torch.fx cannot trace the head, make it a leaf module of the tracer"
    raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")


def _check_constant(name: str, value: Any) -> None:
    """Checks `weight` or `prior`. The operator checks their shape and dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: the head has no gradient for it")


def _margin(name: str, value: Any) -> tuple[Tensor | None, float]:
    """A margin as the operators take it: a tensor, or a number where there is none."""
    if not isinstance(value, Tensor):
        return None, number(name, value)
    _check_constant(name, value)
    return value, 0.0


def autocast_input(input: Tensor) -> Tensor:
    """The features, rounded as autocast wants them."""
    if (
        input.dtype == torch.float32
        and (input.is_cpu or input.is_cuda)  # other devices may not know of autocast
        and torch.is_autocast_enabled(input.device.type)
    ):
        return input.to(torch.get_autocast_dtype(input.device.type))
    return input


def make_head(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    kappa: float | Tensor,
    scale: float | Tensor | SoftplusScale,
    linear_bias: Tensor | None,
    prior: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int | None,
    cosine_margin: float | Tensor,
    angular_margin: float | Tensor,
    target_score: Tensor | None = None,
) -> tuple[ops.Head, int]:
    """The arguments that the operators share, and the number of classes to keep."""
    check_tensor("input", input)
    check_tensor("linear_weight", linear_weight)
    check_tensor("target", target)
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias)
    if class_weight is not None:
        _check_constant("weight", class_weight)
    if prior is not None:
        _check_constant("prior", prior)
    ignore_index = check_ignore_index(ignore_index)
    input = autocast_input(input)
    softplus_scale = isinstance(scale, SoftplusScale)
    if isinstance(scale, SoftplusScale):
        scale = scale.s
    if ops.is_compiling():
        # An operator's number is a constant of the compiled code. As a tensor, the number of a
        # schedule is not, and torch.compile does not compile again for each of its values.
        kappa, scale = _as_tensor("kappa", kappa, input), _as_tensor("scale", scale, input)
        if isinstance(cosine_margin, Tensor) or cosine_margin != 0:
            cosine_margin = _as_tensor("cosine_margin", cosine_margin, input)
        if isinstance(angular_margin, Tensor) or angular_margin != 0:
            angular_margin = _as_tensor("angular_margin", angular_margin, input)
    kappa_tensor = kappa if isinstance(kappa, Tensor) else None
    scale_tensor = scale if isinstance(scale, Tensor) else None
    cosine_margin_tensor, cosine_margin_value = _margin("cosine_margin", cosine_margin)
    angular_margin_tensor, angular_margin_value = _margin("angular_margin", angular_margin)
    allow_tf32 = input.is_cuda and input.dtype == torch.float32 and cuda_allows_tf32()
    # The arguments are given by position, because keywords take a small head a noticeable time.
    head = ops.Head(
        input,
        linear_weight,
        target,
        kappa_tensor,
        scale_tensor,
        linear_bias,
        prior,
        class_weight,
        cosine_margin_tensor,
        angular_margin_tensor,
        target_score,
        0.0 if kappa_tensor is not None else number("kappa", kappa),
        1.0 if scale_tensor is not None else number("scale", scale),
        cosine_margin_value,
        angular_margin_value,
        softplus_scale,
        ignore_index,
        allow_tf32,
    )
    return head, _kept(input, linear_weight, kappa_tensor, scale_tensor, linear_bias)
