"""What this build of the library is."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from . import ops  # noqa: F401  (loads the library)


@dataclass(frozen=True)
class BuildInfo:
    version: str
    """of tvmf_ext"""
    cuda: bool
    """compiled with nvcc"""
    cuda_archs: tuple[str, ...]
    """what nvcc compiled for, such as ("8.0", "9.0")"""
    cpu: str
    """instruction set chosen on this machine: baseline, avx2 or avx512"""
    stable_abi: str
    """oldest torch that the binary runs with"""
    torch: str
    """version of the torch it runs with now"""

    def __str__(self):
        cuda = "CUDA for " + ", ".join(self.cuda_archs) if self.cuda else "no CUDA"
        return (
            f"tvmf_ext {self.version}: CPU ({self.cpu}), {cuda}, "
            f"stable ABI of torch {self.stable_abi}, running with torch {self.torch}"
        )


def build_info() -> BuildInfo:
    """Version, compiled architectures, stable-ABI target, and whether CUDA was compiled in."""
    fields = dict(part.split("=") for part in torch.ops.tvmf_ext.build_info().split(";"))
    archs = tuple(
        f"{int(a) // 100}.{int(a) % 100 // 10}" for a in fields["cuda_archs"].split(",") if a
    )
    try:
        package = version("tvmf_ext")
    except PackageNotFoundError:
        package = "0+unknown"
    return BuildInfo(
        package, bool(archs), archs, fields["cpu"], fields["stable_abi"], torch.__version__
    )
