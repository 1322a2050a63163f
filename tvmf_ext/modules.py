"""The classification head as a module."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .functional import (
    RowStatistics,
    check_loss_options,
    loss_of_statistics,
    row_statistics,
    tvmf_cross_entropy,
)
from .head import IGNORE_INDEX, SoftplusScale, check_ignore_index, check_margins
from .logits import topk, tvmf_logits
from .margin import check_prior

if TYPE_CHECKING:
    from typing_extensions import Self

_MARGINS = ("cosine_margin", "angular_margin")


def _initial_kappa(kappa: Any, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Kappa as a tensor `[1]` or `[C]` on the CPU, where its values can be checked."""
    if isinstance(kappa, Tensor) and kappa.requires_grad:
        raise ValueError("kappa must not require grad; learn_kappa=True makes it a parameter")
    try:
        given = torch.as_tensor(kappa, dtype=torch.float64, device="cpu").detach().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(kappa).__name__
        raise TypeError(f"kappa must be a number or C numbers, got {got}") from error
    if given.numel() not in (1, num_classes):
        raise ValueError(f"kappa must have 1 or C = {num_classes} values, got {given.numel()}")
    _check_kappa(given, given.to(dtype))
    return given.to(dtype, copy=True)


def _check_kappa(given: Tensor, kappa: Tensor) -> None:
    """Checks kappa after it was rounded to its dtype, which may move it to -1/2 or to infinity."""
    wrong = given[~((kappa > -0.5) & kappa.isfinite())]
    if len(wrong):
        first = wrong[0].item()
        rounded = f" in {kappa.dtype}" if -0.5 < first < math.inf else ""
        raise ValueError(f"kappa must be finite and > -1/2{rounded}, got {first:g}")


def _initial_constant(name: str, values: Any, num_classes: int) -> Tensor | None:
    """The class weights or the prior as a tensor `[C]` on the CPU."""
    if values is None:
        return None
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            got = type(values).__name__
            raise TypeError(
                f"{name} must be a tensor, an array or a list of C numbers, got {got}"
            ) from error
    if values.shape != (num_classes,):
        raise ValueError(f"{name} must have shape [C] = [{num_classes}], got {list(values.shape)}")
    if name == "prior":
        check_prior(values)
    if not values.is_floating_point():
        raise ValueError(f"{name} must have a floating-point dtype, got {values.dtype}")
    if values.requires_grad:
        raise ValueError(f"{name} must not require grad: the head does not learn it")
    return values.detach().clone().cpu()


def _inverse_scale(scale: float | None) -> float:
    """`s_` where `softplus(s_) + 1` is the scale."""
    if scale is None:
        return 0.0
    if not isinstance(scale, (int, float, Real)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not 1 < scale < math.inf:
        raise ValueError(f"scale must be finite and > 1, as softplus(s_) + 1 is, got {scale}")
    above = float(scale) - 1
    return above + math.log(-math.expm1(-above))


class TvMFLoss(nn.Module):
    """The t-vMF head: class vectors, learnable scale and softmax cross-entropy in one module.

    It replaces `nn.Linear(in_features, num_classes)` and `nn.CrossEntropyLoss()` (Kobayashi, "t-vMF
    Similarity for Regularizing In-Class Feature Distribution", CVPR 2021). Parameters and buffers
    are those of the paper's code, so that its checkpoints load: `weight [C, D]`, `s_ [1]` for the
    scale `softplus(s_) + 1`, the buffer `kappa [1]` (or `[C]`), and with `bias=True` `bias [C]`.

    Args:
        in_features: D, the number of features.
        num_classes: C, the number of classes.
        kappa: the concentration, above -1/2: a number, or one for each class, `[C]`. With 0 the
            similarity is the cosine.
        learn_kappa: whether kappa is a parameter. An optimizer does not know its bound of -1/2.
        scale: where the scale starts, a number above 1, because it is `softplus(s_) + 1`; None is
            the paper's start, `s_ = 0`.
        learn_scale: whether `s_` is a parameter. Otherwise it is a buffer, and the scale is fixed.
        bias: whether a bias for each class is learnt; it is added to the similarity.
        weight: the class weights of the loss, `[C]`, as in `nn.CrossEntropyLoss`.
        prior: the logarithms of class frequencies, `[C]`, which the loss adds to the logits (logit
            adjustment); `tvmf_ext.margin.log_prior` makes them of class sizes. It is for training:
            `logits`, `topk` and the rank of `row_statistics` leave it out.
        cosine_margin, angular_margin: the margins of the target's cosine (CosFace, LDAM; ArcFace),
            as in `tvmf_cross_entropy`: a number, or one for each class, `[C]`. The logits do not
            have them.
        ignore_index, reduction, label_smoothing: as in `nn.CrossEntropyLoss`.

    Arguments after the sizes go by name, because `TvMFLoss(512, 10, True)` would read as a bias.
    Where `[C]` is taken, a list or a NumPy array is, too. `reset_parameters` restores everything
    that the constructor sets, so that a head can be made on the meta device.
    """

    bias: nn.Parameter | None
    kappa: Tensor
    class_weight: Tensor | None
    prior: Tensor | None
    cosine_margin: float | Tensor
    angular_margin: float | Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kappa: float | Tensor = 16.0,
        learn_kappa: bool = False,
        scale: float | None = None,
        learn_scale: bool = True,
        bias: bool = False,
        weight: Tensor | None = None,
        prior: Tensor | None = None,
        cosine_margin: float | Tensor = 0.0,
        angular_margin: float | Tensor = 0.0,
        ignore_index: int | None = IGNORE_INDEX,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(
                f"in_features and num_classes must be at least 1, got {in_features}, {num_classes}"
            )
        check_loss_options(reduction, label_smoothing)
        ignore_index = check_ignore_index(ignore_index)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        # What reset_parameters restores, on the CPU, whatever the device of the head is.
        kappa = _initial_kappa(kappa, num_classes, dtype or torch.get_default_dtype())
        self._initial: dict[str, Any] = {
            "kappa": kappa,
            "s_": torch.tensor([_inverse_scale(scale)], dtype=torch.float64, device="cpu"),
            "class_weight": _initial_constant("weight", weight, num_classes),
            "prior": _initial_constant("prior", prior, num_classes),
        }
        margins = {"cosine_margin": cosine_margin, "angular_margin": angular_margin}
        for name, margin in margins.items():
            if getattr(margin, "requires_grad", False):
                raise ValueError(f"{name} must not require grad: the head does not learn it")
            if isinstance(margin, (int, float, Real)):
                setattr(self, name, float(margin))
            elif getattr(margin, "shape", None) in ((), (1,)):
                setattr(self, name, float(torch.as_tensor(margin).item()))
            else:
                self._initial[name] = _initial_constant(name, margin, num_classes)
        given = [self._initial.get(name, getattr(self, name, None)) for name in _MARGINS]
        check_margins(kappa, *given)
        self._initial = {
            name: self._own(values) if values is not None and len(values) > 1 else values
            for name, values in self._initial.items()
        }
        self.weight = nn.Parameter(self._per_class(num_classes, in_features, **options))
        s_ = torch.empty(1, **options)
        if learn_scale:
            self.s_ = nn.Parameter(s_)
        else:
            self.register_buffer("s_", s_)
        if bias:
            self.bias = nn.Parameter(self._per_class(num_classes, **options))
        else:
            self.register_parameter("bias", None)
        device = self.weight.device  # also where torch.device is a context
        if kappa.numel() == 1:
            kappa = torch.empty_like(kappa, device=device)
        else:
            kappa = self._per_class(num_classes, device=device, dtype=kappa.dtype)
        if learn_kappa:
            self.kappa = nn.Parameter(kappa)
        else:
            self.register_buffer("kappa", kappa)
        for name, values in self._initial.items():
            if name in ("kappa", "s_"):
                continue
            # These belong to the data: a checkpoint of the paper has none of them.
            empty = None if values is None else torch.empty_like(values, device=device)
            self.register_buffer(name, empty, persistent=False)
        self.reset_parameters()

    def _per_class(self, *size: int, **options: Any) -> Tensor:
        """An uninitialised tensor with a row for each class."""
        return torch.empty(*size, **options)

    def _own(self, values: Tensor) -> Tensor:
        """Of values `[C]`, those of the classes that this process holds."""
        return values

    @classmethod
    def arcface(
        cls, in_features: int, num_classes: int, *, margin: float = 0.5, **options: Any
    ) -> "Self":
        """ArcFace (Deng et al., CVPR 2019): cosine, scale 64 and an angular margin in radians.

        `options` are further arguments of the class; they may replace the preset's.
        """
        preset = {"kappa": 0.0, "scale": 64.0, "learn_scale": False, "angular_margin": margin}
        return cls(in_features, num_classes, **preset | options)

    @classmethod
    def cosface(
        cls, in_features: int, num_classes: int, *, margin: float = 0.35, **options: Any
    ) -> "Self":
        """CosFace (Wang et al., CVPR 2018): cosine, scale 64 and a margin of the cosine.

        `options` are further arguments of the class; they may replace the preset's.
        """
        preset = {"kappa": 0.0, "scale": 64.0, "learn_scale": False, "cosine_margin": margin}
        return cls(in_features, num_classes, **preset | options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives all parameters and buffers the values that the constructor gives them.

        Weight and bias are initialised as in `nn.Linear`; kappa, the scale, the class weights and
        the prior get the constructor's arguments.
        """
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self._restore(self._initial)

    @torch.no_grad()
    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            values, now = self._initial[name], getattr(self, name)
            if values is None:
                continue
            if values.numel() == 1:
                now.fill_(values.item())
            elif hasattr(now, "device_mesh"):  # a DTensor, which FSDP2 makes of a parameter
                from torch.distributed.tensor import distribute_tensor

                shards = distribute_tensor(values.to(now.device), now.device_mesh, now.placements)
                now.copy_(shards)
            else:
                now.copy_(values)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        was_meta = self.kappa.is_meta
        if not was_meta:
            # half() has no number above 65504 but infinity, and bfloat16() rounds -0.4999 to -1/2.
            kappa = fn(self.kappa)
            if kappa.dtype != self.kappa.dtype and not kappa.is_meta:
                # A rank checks its own part of a DTensor.
                own = (t.to_local() if hasattr(t, "to_local") else t for t in (self.kappa, kappa))
                _check_kappa(*(t.detach() for t in own))
        super()._apply(fn, *args, **kwargs)
        if was_meta and not self.kappa.is_meta:
            # Whoever calls to_empty initialises the parameters. Nobody else knows the buffers.
            self._restore(name for name in self._initial if name in self._buffers)
        return self

    @property
    def scale(self) -> Tensor:
        """The factor of the similarity in the logit, `softplus(s_) + 1`, `[1]`."""
        return SoftplusScale(self.s_).value()

    def _head(self) -> dict[str, Any]:
        return {
            "kappa": self.kappa,
            "scale": SoftplusScale(self.s_),
            "linear_bias": self.bias,
        }

    def _margins(self) -> dict[str, Any]:
        return {"cosine_margin": self.cosine_margin, "angular_margin": self.angular_margin}

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of features `[N, D]` and labels `[N]`; see `tvmf_cross_entropy`."""
        return tvmf_cross_entropy(
            input,
            self.weight,
            target,
            weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            prior=self.prior,
            **self._margins(),
            **self._head(),
        )

    def logits(self, input: Tensor) -> Tensor:
        """The logits `[N, C]`, for inference, without the prior. Their `softmax` are the class
        probabilities."""
        return tvmf_logits(input, self.weight, **self._head())

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row, without the prior, and their classes; see `topk`."""
        return topk(input, self.weight, k, **self._head())

    def row_statistics(self, input: Tensor, target: Tensor) -> RowStatistics:
        """`others, cosine, target, sum, rank` of each row: they make the loss and, at no cost, the
        training error."""
        return row_statistics(
            input,
            self.weight,
            target,
            weight=self.class_weight,
            ignore_index=self.ignore_index,
            prior=self.prior,
            **self._margins(),
            **self._head(),
        )

    def loss(self, statistics: RowStatistics, target: Tensor) -> Tensor:
        """The loss that `forward` returns, made of row statistics."""
        return loss_of_statistics(
            statistics,
            target,
            num_classes=self.num_classes,
            weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _is_cosine(self) -> bool:
        """Whether this head was made as the paper's cosine head, which stores no kappa.

        The constructor's argument decides. If the value of kappa did, the keys of a state would
        depend on where a schedule of kappa stands.
        """
        made = self._initial["kappa"]
        return not isinstance(self.kappa, nn.Parameter) and made.numel() == 1 and not made.any()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_cosine() and (self.kappa.is_meta or not self.kappa.any()):
            del destination[prefix + "kappa"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and self._is_cosine():
            device = weight.device if self.kappa.is_meta else self.kappa.device
            kappa = torch.zeros_like(self.kappa, device=device)
            state_dict.setdefault(prefix + "kappa", kappa)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, values in self._initial.items():
            # With assign=True a head from the meta device takes its tensors from the state, which
            # has no class weights, prior and margins.
            if values is None or name not in self._non_persistent_buffers_set:
                continue
            if getattr(self, name).is_meta and not self.weight.is_meta:
                setattr(self, name, values.to(self.weight.device, copy=True))

    def _known(self, name: str) -> Tensor:
        """A parameter or buffer; on the meta device, which has no values, its initial value."""
        value = getattr(self, name)
        return self._initial[name] if value.is_meta else value

    def extra_repr(self) -> str:
        kappa = self._known("kappa")
        value = f"{kappa.item():g}" if kappa.numel() == 1 else f"[{self.num_classes}]"
        text = f"in_features={self.in_features}, num_classes={self.num_classes}, kappa={value}"
        if isinstance(self.kappa, nn.Parameter):
            text += ", learn_kappa=True"
        if not isinstance(self.s_, nn.Parameter):
            scale = SoftplusScale(self._known("s_")).value().item()
            text += f", scale={scale:g}, learn_scale=False"
        if self.bias is not None:
            text += ", bias=True"
        defaults = {"ignore_index": IGNORE_INDEX, "reduction": "mean", "label_smoothing": 0.0}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        for name in ("class_weight", "prior"):
            if getattr(self, name) is not None:
                text += f", {name}=[{self.num_classes}]"
        for name, margin in self._margins().items():
            if isinstance(margin, Tensor):
                text += f", {name}=[{self.num_classes}]"
            elif margin:
                text += f", {name}={margin:g}"
        return text
