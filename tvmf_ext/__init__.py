"""Fused t-vMF similarity classification head: normalise, cosine, t-vMF, softmax cross-entropy."""

from importlib.metadata import PackageNotFoundError, version

from .functional import (
    RowStatistics,
    SoftplusScale,
    cross_entropy_from_statistics,
    row_statistics,
    tvmf_cross_entropy,
    tvmf_logits,
)
from .info import build_info
from .modules import TvMFLoss
from .planning import CpuPlan, CudaPlan, plan

try:
    __version__ = version("tvmf_ext")
except PackageNotFoundError:  # imported from a checkout that was built by hand
    __version__ = "0+unknown"

__all__ = [
    "CpuPlan",
    "CudaPlan",
    "RowStatistics",
    "SoftplusScale",
    "TvMFLoss",
    "build_info",
    "cross_entropy_from_statistics",
    "plan",
    "row_statistics",
    "tvmf_cross_entropy",
    "tvmf_logits",
]
