"""The classification head as a module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .functional import (
    RowStatistics,
    SoftplusScale,
    check_loss_options,
    check_margins,
    loss_of_statistics,
    row_statistics,
    tvmf_cross_entropy,
    tvmf_logits,
)


class TvMFLoss(nn.Module):
    """The t-vMF head: class vectors, learnable scale and softmax cross-entropy in one module.

    It replaces `nn.Linear(in_features, num_classes)` and `nn.CrossEntropyLoss()` (Kobayashi, "t-vMF
    Similarity for Regularizing In-Class Feature Distribution", CVPR 2021). Parameters and buffers
    are those of the paper's code, so that its checkpoints load: `weight [C, D]`, `s_ [1]` for the
    scale `softplus(s_) + 1`, the buffer `kappa [1]` (or `[C]`), and with `bias=True` `bias [C]`.

    Args:
        in_features: D, the number of features.
        num_classes: C, the number of classes.
        kappa: the concentration, above -1/2: a float or a tensor `[C]`. With 0 the similarity is
            the cosine.
        bias: whether a bias for each class is learnt; it is added to the similarity.
        weight: the class weights of the loss, `[C]`, as in `nn.CrossEntropyLoss`.
        prior: the logarithms of class frequencies, `[C]`, which are added to the logits (logit
            adjustment).
        cosine_margin, angular_margin: the margins of the target's cosine (CosFace, LDAM; ArcFace),
            as in `tvmf_cross_entropy`: floats or tensors `[C]`. The logits do not have them.
        ignore_index, reduction, label_smoothing: as in `nn.CrossEntropyLoss`.
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
        kappa: float | Tensor = 16.0,
        bias: bool = False,
        *,
        weight: Tensor | None = None,
        prior: Tensor | None = None,
        cosine_margin: float | Tensor = 0.0,
        angular_margin: float | Tensor = 0.0,
        ignore_index: int = -100,
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
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(kappa, Tensor) and kappa.requires_grad:
            raise ValueError(
                "kappa must not require grad: the module does not learn it; tvmf_cross_entropy does"
            )
        # A copy on the CPU, where its values can be checked whatever the device of the head is.
        kappa = torch.as_tensor(kappa, dtype=dtype or torch.get_default_dtype(), device="cpu")
        kappa = kappa.detach().clone().reshape(-1)
        if kappa.numel() not in (1, num_classes):
            raise ValueError(f"kappa must have 1 or C = {num_classes} values, got {kappa.numel()}")
        refused = kappa[~((kappa > -0.5) & kappa.isfinite())]
        if len(refused):
            raise ValueError(f"kappa must be finite and > -1/2, got {refused[0].item():g}")
        per_class = {"weight": weight, "prior": prior}
        margins = {"cosine_margin": cosine_margin, "angular_margin": angular_margin}
        per_class |= {k: v for k, v in margins.items() if isinstance(v, Tensor) and v.dim() > 0}
        for name, values in per_class.items():
            if values is None:
                continue
            if not isinstance(values, Tensor):
                raise TypeError(f"{name} must be a tensor or None, got {type(values).__name__}")
            if values.shape != (num_classes,):
                raise ValueError(
                    f"{name} must have shape [C] = [{num_classes}], got {list(values.shape)}"
                )
            if not values.is_floating_point():
                raise ValueError(f"{name} must have a floating-point dtype, got {values.dtype}")
            if values.requires_grad:
                raise ValueError(f"{name} must not require grad: the head does not learn it")
        check_margins(kappa, cosine_margin, angular_margin)
        self.in_features = in_features
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, **options))
        self.s_ = nn.Parameter(torch.zeros(1, **options))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_classes, **options))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("kappa", kappa.to(self.weight.device))
        # These two belong to the data and not to the state: a checkpoint of the paper has neither.
        self.register_buffer("class_weight", weight, persistent=False)
        self.register_buffer("prior", prior, persistent=False)
        for name, margin in margins.items():
            if isinstance(margin, Tensor):
                self.register_buffer(name, margin, persistent=False)
            else:
                setattr(self, name, float(margin))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weight and bias as `nn.Linear` does, and the scale to `softplus(0) + 1`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.s_)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def scale(self) -> Tensor:
        """The factor of the similarity in the logit, `softplus(s_) + 1`, `[1]`."""
        return SoftplusScale(self.s_).value()

    def _head(self) -> dict[str, Any]:
        return {
            "kappa": self.kappa,
            "scale": SoftplusScale(self.s_),
            "linear_bias": self.bias,
            "prior": self.prior,
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
            **self._margins(),
            **self._head(),
        )

    def logits(self, input: Tensor) -> Tensor:
        """The logits `[N, C]`, for inference. Their `softmax` are the class probabilities."""
        return tvmf_logits(input, self.weight, **self._head())

    def row_statistics(self, input: Tensor, target: Tensor) -> RowStatistics:
        """`others, cosine, target, sum, rank` of each row: they make the loss and, at no cost, the
        training error."""
        return row_statistics(
            input,
            self.weight,
            target,
            weight=self.class_weight,
            ignore_index=self.ignore_index,
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

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The paper's cosine head stores no kappa. It is this head with a kappa of 0.
        if prefix + "weight" in state_dict and not self.kappa.is_meta and not self.kappa.any():
            state_dict.setdefault(prefix + "kappa", self.kappa.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        kappa = f"{self.kappa.item():g}" if self.kappa.numel() == 1 else f"[{self.num_classes}]"
        text = f"in_features={self.in_features}, num_classes={self.num_classes}, kappa={kappa}"
        if self.bias is not None:
            text += ", bias=True"
        defaults = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
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
