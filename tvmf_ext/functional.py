"""Functions of the t-vMF head: row statistics, and the losses put together from them."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import ops

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# Products that the forward pass keeps for the backward pass, in bytes. On the CPU those and the
# working tile (csrc/cpu/plan.cpp: 2 MiB, or 256 classes of many rows) share what leaves the extra
# memory under 64 MB whatever C is; below this many features a product costs about as little to
# recompute as to write and read, by count. On CUDA all are kept, or none.
_KEEP_BYTES = 50 * 1024 * 1024
_TILE_BYTES, _TILE_CLASSES = 2 * 1024 * 1024, 256
_KEEP_MIN_FEATURES = 128
_CUDA_KEEP_BYTES = 64 * 1024 * 1024
_CUDA_KEEP_MIN_FEATURES = 64


class RowStatistics(NamedTuple):
    """Per-row statistics of the logits `z`, each `[N]`; every softmax loss is a function of them.

    `lse`, `target` and `sum` are float32 (float64 for float64 features) and differentiable.
    """

    lse: torch.Tensor
    """`log sum_c exp z_nc`"""
    target: torch.Tensor
    """`z_{n, y_n}`; 0 for an ignored row"""
    sum: torch.Tensor
    """`sum_c weight_c z_nc`"""
    rank: torch.Tensor
    """int64: classes that score above the target's `phi + bias`; -1 for an ignored row. A row is
    an error at k where `rank >= k`."""


class SoftplusScale(NamedTuple):
    """A scale `softplus(s) + 1` that the kernels compute and differentiate: as a tensor it would
    cost a small head as much as all the rest of its backward pass."""

    s: torch.Tensor


def products_to_keep(N, C, D, dtype, cuda):
    """Classes, in steps of 16, whose products a forward pass keeps for a backward pass."""
    fewest = _CUDA_KEEP_MIN_FEATURES if cuda else _KEEP_MIN_FEATURES
    if fewest > D:
        return 0
    itemsize, every = ops.compute_dtype(dtype).itemsize, (C + 15) // 16 * 16
    if cuda:
        return every if N * C * itemsize <= _CUDA_KEEP_BYTES else 0
    left = max(0, _KEEP_BYTES - max(0, N * _TILE_CLASSES * itemsize - _TILE_BYTES))
    return min(every, 16 * (left // (itemsize * 16) // max(N, 1)))


def _uses_kept_products(C, D, dtype, weight_dtype, row_stride, col_stride, aligned, device):
    """Whether kernels on a CUDA device use products that a forward pass kept; Hopper's do not."""
    if not (ops.HAS_CUDA and torch.cuda.is_available()):
        return True  # a fake tensor's device need not be there
    names = (str(each).removeprefix("torch.") for each in (dtype, weight_dtype))
    layout = (row_stride, col_stride, aligned)
    return torch.ops.tvmf_ext.keeps_products(C, D, *names, *layout, f"cuda:{device}")


# One question for each kind of head; to torch.compile the answer is a constant.
_uses_kept_products = functools.lru_cache(maxsize=1024)(_uses_kept_products)
_uses_kept_products._dynamo_marked_constant = True


def _kept(input, linear_weight, *others):
    """What a forward pass keeps; nothing where no backward pass will come."""
    if not torch.is_grad_enabled() or input.dim() != 2 or linear_weight.dim() != 2:
        return 0
    if not (input.requires_grad or linear_weight.requires_grad
            or any(t is not None and t.requires_grad for t in others)):  # fmt: skip
        return 0
    (N, D), C = input.shape, linear_weight.shape[0]
    if input.is_cuda:
        weight = linear_weight
        aligned = weight.storage_offset() * weight.element_size() % 16 == 0
        layout = (weight.stride(0), weight.stride(1), aligned)
        dtypes = (input.dtype, weight.dtype)
        if not _uses_kept_products(C, D, *dtypes, *layout, input.device.index or 0):
            return 0
    return products_to_keep(N, C, D, input.dtype, input.is_cuda)


def cuda_allows_tf32():
    """torch's own setting for float32 products; the older `allow_tf32` raises where a user of the
    newer one is looked at."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# A constant to torch.compile, which compiles again when the setting changes. This is what
# torch.compiler.assume_constant_result does, without loading the compiler.
cuda_allows_tf32._dynamo_marked_constant = True


def check_loss_options(reduction, label_smoothing):
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def _number(name, value):
    if isinstance(value, (int, float)):
        return float(value)
    raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")


def _check_constant(name, value):
    """`weight` or `prior`; their shape and dtype are the operator's to check."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: the head has no gradient for it")


def _head(input, linear_weight, target, kappa, scale, linear_bias, prior, weight, ignore_index):
    """The operators' common arguments, and the number of classes to keep."""
    for name, value in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if (
        input.dtype == torch.float32
        and (input.is_cpu or input.is_cuda)  # other devices may not know of autocast
        and torch.is_autocast_enabled(input.device.type)
    ):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    kappa_tensor = kappa if isinstance(kappa, torch.Tensor) else None
    softplus_scale = isinstance(scale, SoftplusScale)
    if softplus_scale:
        scale = scale.s
    scale_tensor = scale if isinstance(scale, torch.Tensor) else None
    for name, constant in (("weight", weight), ("prior", prior)):
        if constant is not None:
            _check_constant(name, constant)
    kappa_value = 0.0 if kappa_tensor is not None else _number("kappa", kappa)
    scale_value = 1.0 if scale_tensor is not None else _number("scale", scale)
    allow_tf32 = input.is_cuda and input.dtype == torch.float32 and cuda_allows_tf32()
    # By position, because keywords would take a small head a noticeable time.
    head = ops.Head(
        input,
        linear_weight,
        target,
        kappa_tensor,
        scale_tensor,
        linear_bias,
        prior,
        weight,
        kappa_value,
        scale_value,
        softplus_scale,
        ignore_index,
        allow_tf32,
    )
    return head, _kept(input, linear_weight, kappa_tensor, scale_tensor, linear_bias)


def row_statistics(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    kappa: float | torch.Tensor = 16.0,
    scale: float | torch.Tensor | SoftplusScale = 1.0,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    prior: torch.Tensor | None = None,
) -> RowStatistics:
    """Row statistics of the logits `z_nc = scale (phi(x_n, w_c; kappa_c) + bias_c) + prior_c`.

    Arguments are those of `tvmf_cross_entropy`; no `[N, C]` tensor is made. Build a loss from the
    result with `cross_entropy_from_statistics` or a few lines of PyTorch, for example with a z-loss
    `1e-4 * (stats.lse ** 2).mean()`; statistics of class shards combine by all-reduce.
    """
    head, kept = _head(
        input, linear_weight, target, kappa, scale, linear_bias, prior, weight, ignore_index
    )
    return RowStatistics(*ops.row_statistics(*head, True, kept)[:4])


def tvmf_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    kappa: float | torch.Tensor = 16.0,
    scale: float | torch.Tensor | SoftplusScale = 1.0,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy over t-vMF similarities (Kobayashi, CVPR 2021), without the logits.

    With the cosine `c` of feature and class weight, `phi = (1 + c) / (1 + kappa (1 - c)) - 1`, the
    logit is `scale (phi + bias) + prior`, and the rest is `torch.nn.functional.cross_entropy`.

    Args:
        input: features `[N, D]`, float16, bfloat16, float32 or float64, any strides.
        linear_weight: class weights `[C, D]`; its dtype may differ from the input's.
        target: class indices `[N]`, int64.
        kappa: concentration, > -1/2: a float, or a tensor `[]`, `[1]` or `[C]`. 0 is the cosine
            head.
        scale: > 0, a float or a tensor `[]` or `[1]`, or `SoftplusScale` of such a tensor.
        linear_bias: `[C]`, added to the similarity, inside the scale.
        weight: class weights of the loss, `[C]`; constant.
        ignore_index: rows with this target count for nothing.
        reduction: `"mean"` (over the weights of the rows that count), `"sum"` or `"none"`.
        label_smoothing: in [0, 1].
        prior: `[C]`, added to the logit, outside the scale: log class frequencies give logit
            adjustment (Menon et al., ICLR 2021) or balanced softmax; constant.

    Returns:
        The loss, `[]` or for `"none"` `[N]`, in float32 (float64 for float64 features). Gradients
        reach input, linear_weight, kappa, scale and linear_bias, each in its own dtype.
        Under autocast float32 features are rounded to its dtype, as for `torch.nn.Linear`.

    Raises:
        TypeError: an argument that is neither a tensor nor what may stand for one.
        ValueError: a shape, dtype, device or value other than the above.
        IndexError: a target outside [0, C) that is not ignore_index. On CUDA, where nothing waits
            for the device, that row's loss is NaN, and a later call on the device raises.
        NotImplementedError: a tensor on a device without kernels.

    On CUDA the values of tensors, `kappa`'s and `scale`'s too, are not looked at; float32 products
    are rounded to TF32 where `torch.backends.cuda.matmul.fp32_precision` is `"tf32"`.
    """
    check_loss_options(reduction, label_smoothing)
    head, kept = _head(
        input, linear_weight, target, kappa, scale, linear_bias, prior, weight, ignore_index
    )
    return ops.cross_entropy(*head, float(label_smoothing), _REDUCTIONS[reduction], kept)[0]


def cross_entropy_from_statistics(
    statistics: RowStatistics,
    target: torch.Tensor,
    *,
    num_classes: int,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`tvmf_cross_entropy` from row statistics that are there already, `[]` or `[N]`.

    `target` is `[N]`, int64, and `weight` `[C]`; it and `ignore_index` must be those that the
    statistics were made with. `lse - target` is a difference of rounded numbers: losses far below
    `lse` itself are exact only from `tvmf_cross_entropy`.
    """
    check_loss_options(reduction, label_smoothing)
    valid = target != ignore_index
    # NaN in an ignored row must not reach the sum.
    lse, target_logit, total = (torch.where(valid, t, 0) for t in statistics[:3])
    row_weight = valid.to(lse.dtype)
    total_weight = num_classes
    if weight is not None:
        row_weight = row_weight * weight.to(lse.dtype)[torch.where(valid, target, 0)]
        total_weight = weight.sum().to(lse.dtype)
    loss = (1 - label_smoothing) * row_weight * (lse - target_logit)
    if label_smoothing > 0:
        smooth = lse * total_weight - total
        loss = loss + label_smoothing / num_classes * torch.where(valid, smooth, 0)
    if reduction == "none":
        return loss
    return loss.sum() / row_weight.sum() if reduction == "mean" else loss.sum()


def _check_logits(input, linear_weight, kappa, scale, linear_bias, prior):
    for name, value, shape in (
        ("input", input, "[N, D]"),
        ("linear_weight", linear_weight, "[C, D]"),
    ):
        if value.dim() != 2:
            raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}"
            )
    if input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            "input [N, D] and linear_weight [C, D] must agree in D, got "
            f"{list(input.shape)} and {list(linear_weight.shape)}"
        )
    C = linear_weight.shape[0]
    for name, value, allowed in (
        ("kappa", kappa, ((), (1,), (C,))),
        ("scale", scale, ((), (1,))),
        ("linear_bias", linear_bias, ((C,),)),
        ("prior", prior, ((C,),)),
    ):
        if isinstance(value, torch.Tensor) and tuple(value.shape) not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")
    if not isinstance(kappa, torch.Tensor) and not kappa > -0.5:
        raise ValueError(f"kappa must be > -1/2, got {kappa}")
    if not isinstance(scale, torch.Tensor) and not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")


def tvmf_logits(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    *,
    kappa: float | torch.Tensor = 16.0,
    scale: float | torch.Tensor | SoftplusScale = 1.0,
    linear_bias: torch.Tensor | None = None,
    prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits `[N, C]` themselves, for inference, in float32 (float64 for float64 features).

    Arguments as in `tvmf_cross_entropy`. Made of PyTorch's operators, with their gradients; the
    cosine is never rounded below float32, where `kappa` would multiply its error.
    """
    if isinstance(scale, SoftplusScale):
        # As in the kernels: not in the parameter's own dtype where that is shorter.
        scale = F.softplus(scale.s.to(ops.compute_dtype(input.dtype))) + 1
    _check_logits(input, linear_weight, kappa, scale, linear_bias, prior)
    dtype = ops.compute_dtype(input.dtype)
    with torch.autocast(input.device.type, enabled=False):
        cosine = F.linear(
            F.normalize(input.to(dtype), dim=1), F.normalize(linear_weight.to(dtype), dim=1)
        ).clamp(-1, 1)
        kappa, scale, linear_bias, prior = (
            t.to(dtype) if isinstance(t, torch.Tensor) else t
            for t in (kappa, scale, linear_bias, prior)
        )
        gap = 1 - cosine
        score = (1 - gap * (1 + kappa)) / (1 + kappa * gap)
        if linear_bias is not None:
            score = score + linear_bias
        logits = scale * score
        return logits if prior is None else logits + prior
