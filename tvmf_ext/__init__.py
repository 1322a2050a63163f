"""Fused t-vMF similarity classification head: normalise, cosine, t-vMF, softmax cross-entropy."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules:
    # Without NumPy, which nothing here needs, torch warns while it is imported.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
        import torch  # noqa: F401

from . import margin
from .functional import (
    RowStatistics,
    check_targets,
    error_at,
    loss_of_statistics,
    row_statistics,
    tvmf_cross_entropy,
)
from .head import SoftplusScale
from .info import VERSION, build_info
from .logits import topk, tvmf_logits
from .modules import TvMFLoss
from .planning import CpuPlan, CudaPlan, plan

if TYPE_CHECKING:
    from .distributed import ShardedTvMFLoss

__version__ = VERSION

__all__ = [
    "CpuPlan",
    "CudaPlan",
    "RowStatistics",
    "ShardedTvMFLoss",
    "SoftplusScale",
    "TvMFLoss",
    "build_info",
    "check_targets",
    "error_at",
    "loss_of_statistics",
    "margin",
    "plan",
    "row_statistics",
    "topk",
    "tvmf_cross_entropy",
    "tvmf_logits",
]


def __getattr__(name: str) -> Any:
    # torch.distributed.tensor takes seconds to import, and a head on one device does not need it.
    if name == "ShardedTvMFLoss":
        from .distributed import ShardedTvMFLoss

        return ShardedTvMFLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
