"""Tells what a call would run and what that would cost, without running it: `plan(N, C, D, ...)`.

The numbers come from the library, from the function that the kernels themselves ask
(csrc/cpu/plan.cpp, csrc/cuda/plan.cpp).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import ops
from .head import cuda_allows_tf32, kept_products, products_to_keep

_Kind = TypeVar("_Kind")
_MOST = 2**53  # up to here the counts of a plan, which are doubles and int64, are exact


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:.6g} GB"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Problem:
    N: int
    """rows"""
    C: int
    """classes"""
    D: int
    """features"""
    dtype: torch.dtype
    """of the features"""
    weight_dtype: torch.dtype
    """of the class weights"""
    backward: bool
    """whether a backward pass follows"""
    kept: int
    """classes, rounded up to 16, whose products the forward pass keeps for the backward pass;
    elements for each row where Hopper's kernels keep them, and rounded weights with them"""
    saved: int
    """bytes that the forward pass keeps in all"""

    def _title(self, device: str) -> str:
        return (
            f"[N, C, D] = [{self.N}, {self.C}, {self.D}], {_name(self.dtype)} features, "
            f"{_name(self.weight_dtype)} weight, on {device}"
        )

    def _saved_line(self, beside: str = "") -> str:
        kept = min(self.kept, self.C)
        products = "all products" if kept == self.C else f"products of {kept} classes"
        products += beside
        return f"kept for backward  {_bytes(self.saved)}, {products if kept else 'no products'}"


@dataclass(frozen=True)
class CpuPlan(_Problem):
    """How the CPU kernels cut a problem on this machine, for the threads that torch uses now."""

    own_products: bool
    """whether the head makes the matrix products itself; otherwise PyTorch's library does"""
    class_block: int
    """classes whose N x block tile of gradients is made at a time"""
    row_group: int
    """rows that are worked on together between the products"""
    stripe: int
    """classes per task"""
    workspace: int
    """bytes that a pass allocates at most, beside what is saved and its results"""

    @property
    def forward_flops(self) -> float:
        return 2.0 * self.N * self.C * self.D

    @property
    def backward_flops(self) -> float:
        """Two products, and once more the product of the classes that were not kept."""
        return 2.0 * self.N * self.D * (3 * self.C - min(self.kept, self.C))

    def __str__(self) -> str:
        blocks = -(-self.C // self.class_block)
        tile = self.N * self.class_block * ops.compute_dtype(self.dtype).itemsize
        lines = [
            self._title("the CPU"),
            f"products           {'our own' if self.own_products else 'by PyTorch'}",
            f"blocks             {blocks} of {self.class_block} classes, a tile of {_bytes(tile)}",
            f"tasks              {self.row_group} rows x {self.stripe} classes",
            f"workspace          {_bytes(self.workspace)}",
        ]
        if self.backward:
            lines.append(self._saved_line())
        lines.append(f"forward            {self.forward_flops:.3g} floating-point operations")
        if self.backward:
            lines.append(f"backward           {self.backward_flops:.3g} floating-point operations")
        return "\n".join(lines)


@dataclass(frozen=True)
class Sm80Plan:
    """The portable kernels (mma.sync): every mix of dtypes, compute capability 8.0 and newer."""

    latency: bool
    """few launches, for a small N x C; otherwise three launches for each chunk of classes"""
    tile: int
    """row statistics: a block makes tiles of tile x tile cosines"""
    row_tiles: int
    class_splits: int
    """blocks that share the classes; the grid is row_tiles x class_splits"""
    tiles_per_split: int
    class_tile: int
    """gradients: classes of a block"""
    chunk: int
    """classes per launch of the backward pass"""
    chunks: int
    resident: bool
    """whether a block's gradient tile stays in shared memory"""
    row_groups: int
    """blocks that share the rows of class_tile classes"""
    feature_splits: int
    """blocks that share the weight gradient of class_tile classes"""
    input_tile: int
    """gradient of the features: a block makes a tile of input_tile x input_tile"""
    input_splits: int
    """blocks that share a tile's classes"""

    @property
    def name(self) -> str:
        return "latency" if self.latency else "throughput"

    def forward_grids(self, problem: _Problem) -> list[str]:
        return [
            f"  row statistics   tile {self.tile} x {self.tile}, grid {self.row_tiles} x "
            f"{self.class_splits}, {self.tiles_per_split} class tiles a block"
        ]

    def backward_grids(self, problem: _Problem) -> list[str]:
        classes, tile = min(self.chunk, problem.C), self.input_tile
        class_tiles = -(-classes // self.class_tile)
        place = "in shared memory" if self.resident else "in the workspace"
        return [
            f"  weight gradient  {class_tiles} tiles of {self.class_tile} classes x "
            f"{self.row_groups} row groups x {self.feature_splits} feature splits, gradient tile "
            f"{place}",
            f"  input gradient   tile {tile} x {tile}, grid {-(-problem.N // tile)} x "
            f"{-(-problem.D // tile)} x {self.input_splits}",
        ]


@dataclass(frozen=True)
class Sm90Plan:
    """Hopper's own kernels (tensor copies and wgmma): 16-bit features, and a weight of float32 or
    of their dtype."""

    segments: int
    """segments of rows that each pass works on one after another"""
    segment_rows: int
    tile_rows: int
    tile_classes: int
    """a tile of cosines has tile_rows x tile_classes of them"""
    row_blocks: int
    """blocks of tile_rows rows"""
    class_tiles: int
    kept_weights: bool
    """whether rounded weights are kept beside the products"""
    statistics_blocks: int
    """row statistics: persistent blocks that share the class tiles of a block of rows"""
    gradient_classes: int
    """gradient tile: classes of a tile; where products are kept, a tile has all rows"""
    gradient_blocks: int
    """persistent blocks that share the class tiles of a chunk"""
    product_blocks: int
    """persistent blocks that share the tiles of both products, at most"""
    chunk: int
    """classes per launch of the backward pass"""
    chunks: int
    product_rows: int
    product_cols: int
    """gradients of weight and features: a block makes tiles of product_rows x product_cols"""
    partial_features: int
    """blocks that share a tile of the features' gradient, at most"""

    @property
    def name(self) -> str:
        return "Hopper"

    def _tiles(self, blocks: int, classes: int, kept: bool = False) -> str:
        of_tile = self.gradient_classes if kept else self.tile_classes
        rows, grid = (self.segment_rows, 1) if kept else (self.tile_rows, self.row_blocks)
        tiles = -(-classes // of_tile)
        return (
            f"tile {rows} rows x {of_tile} classes, grid {grid} x {blocks}, "
            f"{-(-tiles // blocks)} class tiles a block"
        )

    def forward_grids(self, problem: _Problem) -> list[str]:
        return [f"  row statistics   {self._tiles(self.statistics_blocks, problem.C)}"]

    def backward_grids(self, problem: _Problem) -> list[str]:
        classes, rows, cols = min(self.chunk, problem.C), self.product_rows, self.product_cols
        feature_tiles = -(-problem.D // cols)
        weight_tiles = -(-classes // rows) * feature_tiles
        return [
            f"  gradient tile    {self._tiles(self.gradient_blocks, classes, problem.kept > 0)}",
            f"  weight gradient  {weight_tiles} tiles of {rows} classes x {cols} features, in one "
            f"launch with the input gradient",
            f"  input gradient   {-(-problem.N // rows) * feature_tiles} tiles of {rows} rows x "
            f"{cols} features, each by up to {self.partial_features} blocks",
        ]


_ARCHITECTURES = {"sm80": Sm80Plan, "sm90": Sm90Plan}


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a pass."""

    name: str
    launches: int
    seconds: float
    """predicted, of all launches together"""

    @classmethod
    def read(cls, text: str) -> tuple["KernelTime", ...]:
        """The kernels of a pass from the library's text, "name:launches:seconds,..."."""
        parts = (part.split(":") for part in text.split(","))
        return tuple(cls(name, int(count), float(seconds)) for name, count, seconds in parts)

    def __str__(self) -> str:
        count = "" if self.launches == 1 else f"{self.launches} x "
        return f"{self.name} {count}{_time(self.seconds / self.launches)}"


@dataclass(frozen=True)
class CudaPlan(_Problem):
    """How the CUDA kernels cut a problem, what that costs by count, and how long it should take.

    Everything but the times depends on the problem and on the sizes of the GPU's parts alone.
    """

    variant: Sm80Plan | Sm90Plan
    """the plan of the architecture whose kernels run"""
    gpu: str
    sms: int
    math: str
    """the kind of product: float16, bfloat16, TF32, float32 or float64"""

    forward_launches: int
    backward_launches: int
    forward_workspace: int
    """bytes"""
    backward_workspace: int
    weight_copy: int
    """bytes of a copy of the weight in a dtype that the kernels read, in each pass"""
    forward_flops: float
    backward_flops: float
    forward_hbm: float
    """bytes that cross the GPU's memory interface"""
    backward_hbm: float
    forward_l2: float
    """bytes between the second-level cache and the multiprocessors"""
    backward_l2: float
    forward_products: float
    """seconds of the products, on the multiprocessor that has most of them"""
    backward_products: float
    forward_between: float
    """seconds in which no products go on: elementwise work, waits, stores"""
    backward_between: float
    forward_seconds: float
    """predicted, not measured"""
    backward_seconds: float
    forward_kernels: tuple[KernelTime, ...]
    backward_kernels: tuple[KernelTime, ...]

    hbm_rate: float
    """bytes/s that the prediction takes the kernels to reach"""
    l2_rate: float
    launch_seconds: float

    @property
    def workspace(self) -> int:
        """The most bytes that a pass holds while it runs, beside `saved` and its results."""
        passes = self.forward_workspace, self.backward_workspace if self.backward else 0
        return max(passes) + self.weight_copy

    def times(self, which: str) -> dict[str, float]:
        """Seconds that each part of the pass `"forward"` or `"backward"` takes by itself."""
        return {
            "matrix units": getattr(self, f"{which}_products"),
            "between products": getattr(self, f"{which}_between"),
            "GPU memory": getattr(self, f"{which}_hbm") / self.hbm_rate,
            "L2 cache": getattr(self, f"{which}_l2") / self.l2_rate,
            "launches": getattr(self, f"{which}_launches") * self.launch_seconds,
        }

    def limit(self, which: str) -> str:
        """The part of the pass `"forward"` or `"backward"` that takes longest."""
        times = self.times(which)
        return max(times, key=lambda part: times[part])

    def _pass(self, which: str) -> list[str]:
        seconds = getattr(self, f"{which}_seconds")
        parts = ", ".join(f"{name} {_time(t)}" for name, t in self.times(which).items())
        return [
            f"{which:<18} {_time(seconds)} predicted, limited by {self.limit(which)}",
            f"  each part alone  {parts}",
            f"  launches         {getattr(self, f'{which}_launches')}",
            *self._kernel_lines(which),
            f"  operations       {getattr(self, f'{which}_flops'):.3g} in {self.math}",
            f"  GPU memory       {_bytes(getattr(self, f'{which}_hbm'))}",
            f"  L2 cache         {_bytes(getattr(self, f'{which}_l2'))}",
            f"  workspace        {_bytes(getattr(self, f'{which}_workspace'))}",
        ]

    def _kernel_lines(self, which: str) -> list[str]:
        kernels = [str(kernel) for kernel in getattr(self, f"{which}_kernels")]
        return [
            f"                   {', '.join(kernels[at : at + 3])}"
            for at in range(0, len(kernels), 3)
        ]

    def _path(self) -> str:
        chunks, classes = self.variant.chunks, min(self.variant.chunk, self.C)
        count = "one chunk" if chunks == 1 else f"{chunks} chunks"
        return f"{self.variant.name}: {count} of {classes} classes"

    def __str__(self) -> str:
        lines = [
            self._title(f"{self.gpu} ({self.sms} SMs)"),
            f"path               {self._path()}",
            *self._pass("forward"),
            *self.variant.forward_grids(self),
        ]
        if self.weight_copy:
            lines.append(f"copy of the weight {_bytes(self.weight_copy)} in each pass")
        if self.backward:
            lines += self._pass("backward")
            lines += self.variant.backward_grids(self)
            weights = isinstance(self.variant, Sm90Plan) and self.variant.kept_weights
            lines.append(self._saved_line(" and rounded weights" if weights else ""))
        return "\n".join(lines)


def _read(kind: type[_Kind], values: dict[str, str], **given: Any) -> _Kind:
    """A `kind` whose fields are `given`, or else read from text values of the same names."""
    convert: dict[Any, Callable[[str], Any]] = {
        int: int,
        float: float,
        str: str,
        bool: lambda text: text == "1",
    }
    read = {
        field.name: convert[field.type](values[field.name])
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.name not in given
    }
    return kind(**given, **read)


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _device_name(device: str | torch.device | None) -> str:
    """`"cpu"`, `"cuda:0"` for a GPU that is here, or a GPU's name."""
    if device is None:
        device = "cuda" if ops.HAS_CUDA and torch.cuda.is_available() else "cpu"
    if isinstance(device, str) and device.split(":")[0] in ("cpu", "cuda"):
        device = torch.device(device)
    if not isinstance(device, torch.device):
        return str(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device must be one that is here or a GPU's name, got {device}")
        return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"
    return device.type


def plan(
    N: int,
    C: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    allow_tf32: bool | None = None,
    backward: bool = True,
) -> CudaPlan | CpuPlan:
    """Tells what a call with features `[N, D]` and class weights `[C, D]` would run.

    Args:
        N, C, D: rows, classes and features.
        dtype, weight_dtype: of the features, and of the weight if it differs.
        device: a GPU's name such as `"H200"`, which need not be here, `"cpu"`, or a torch device;
            by default a GPU that is here, or else the CPU.
        allow_tf32: whether float32 products may be rounded to TF32; by default torch's setting.
        backward: whether a backward pass follows.

    Returns:
        A plan whose fields are the kernels' own numbers, and whose `str` is a report.

    Raises:
        ValueError: a size below 1 or a product of two above 2^53, a dtype without kernels, an
            unknown device.
    """
    for name, size in (("N", N), ("C", C), ("D", D)):
        _check_size(name, size)
    if max(N * C, N * D, C * D) > _MOST:
        raise ValueError(f"N x C, N x D and C x D must be at most 2^53, got {N}, {C}, {D}")
    weight_dtype = weight_dtype or dtype
    for name, value in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        if value not in ops.DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {value}")
    device = _device_name(device)
    if allow_tf32 is None:
        allow_tf32 = cuda_allows_tf32()
    if not backward:
        kept = 0
    elif device == "cpu":
        kept = products_to_keep(N, C, D, dtype)
    else:
        keeps = kept_products(C, D, dtype, weight_dtype, (D, 1, True), device)
        kept = keeps.elements(N, C, D, dtype)
    names = (_name(dtype), _name(weight_dtype))
    text = torch.ops.tvmf_ext.plan(N, C, D, *names, allow_tf32, kept, False, device)
    values = dict(part.split("=") for part in text.split(";") if part)
    given = {
        "N": N,
        "C": C,
        "D": D,
        "dtype": dtype,
        "weight_dtype": weight_dtype,
        "backward": backward,
    }
    if values["architecture"] == "cpu":
        return _read(CpuPlan, values, **given)
    given["variant"] = _read(_ARCHITECTURES[values["architecture"]], values)
    for kernels in ("forward_kernels", "backward_kernels"):
        given[kernels] = KernelTime.read(values[kernels])
    return _read(CudaPlan, values, **given)
