"""Fused t-vMF similarity classification head: normalise, cosine, t-vMF, softmax cross-entropy."""

import sys
import warnings

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
    topk,
    tvmf_cross_entropy,
    tvmf_logits,
)
from .head import SoftplusScale
from .info import VERSION, build_info
from .modules import TvMFLoss
from .planning import CpuPlan, CudaPlan, plan

__version__ = VERSION

__all__ = [
    "CpuPlan",
    "CudaPlan",
    "RowStatistics",
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
