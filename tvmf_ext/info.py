"""Describes this build of the library."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from . import ops  # noqa: F401  (loads the library)

try:
    VERSION = version("tvmf_ext")
except PackageNotFoundError:  # a checkout that was built by hand
    VERSION = "0+unknown"


@dataclass(frozen=True)
class BuildInfo:
    version: str
    """the version of tvmf_ext"""
    cuda: bool
    """whether CUDA kernels were compiled"""
    cuda_archs: tuple[str, ...]
    """the compute capabilities that nvcc compiled for, such as ("8.0", "9.0")"""
    no_cuda: str
    """why no CUDA kernels were compiled, such as "TVMF_CUDA=0"; empty where they were"""
    cpu: str
    """the instruction set that was chosen on this machine: baseline, avx2, avx512, avx512_bf16 or
    amx_bf16"""
    stable_abi: str
    """the oldest torch that the binary runs with"""
    torch: str
    """the version of the torch that it runs with now"""

    def __str__(self) -> str:
        cuda = (
            "CUDA for " + ", ".join(self.cuda_archs) if self.cuda else f"no CUDA ({self.no_cuda})"
        )
        return (
            f"tvmf_ext {self.version}: CPU ({self.cpu}), {cuda}, "
            f"stable ABI of torch {self.stable_abi}, running with torch {self.torch}"
        )


def build_info() -> BuildInfo:
    """The version, the compiled architectures, and the oldest torch that the binary runs with."""
    text = torch.ops.tvmf_ext.build_info()
    fields = dict(part.split("=", 1) for part in text.split(";"))
    archs = tuple(
        f"{int(a) // 100}.{int(a) % 100 // 10}" for a in fields["cuda_archs"].split(",") if a
    )
    return BuildInfo(
        version=VERSION,
        cuda=bool(archs),
        cuda_archs=archs,
        no_cuda=fields.get("no_cuda", ""),
        cpu=fields["cpu"],
        stable_abi=fields["stable_abi"],
        torch=torch.__version__,
    )
