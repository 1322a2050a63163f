"""The CUDA kernels on the CPU: builds the emulator's modules, and runs one pass of the head.

`step` takes the arguments of `tvmf_cross_entropy` as torch tensors; simt.cpp is the emulator.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

import tvmf_ext
from tests import problem as problems
from tvmf_ext.functional import SoftplusScale

_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "build" / "simt"
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def build():
    """Compiles what is out of date: `simt_hooks` and, for AddressSanitizer, `simt_asan`."""
    configure = ["cmake", "-S", _ROOT, "-B", _BUILD, "-G", "Ninja", "-DTVMF_SIMT=ON",
                 f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    for command in (configure, ["cmake", "--build", _BUILD]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


@functools.cache
def load(name="simt_hooks"):
    """The emulator's Python module."""
    build()
    (path,) = _BUILD.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asan_environment():
    """Of a Python that loads `simt_asan`: it is not instrumented itself, so the runtimes have to be
    there before it is."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libstdc++")
    ]
    return os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def _array(tensor):
    """The tensor as the emulator takes it: its memory and strides, and the name of its dtype."""
    name = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach()
    if tensor.element_size() == 2:
        return tensor.view(torch.uint16).numpy(), name
    return tensor.numpy(), name


def _tensor(array, like):
    tensor = torch.from_numpy(array)
    return tensor.view(like) if like.itemsize == 2 else tensor


def _argument(value):
    return _array(value) if isinstance(value, torch.Tensor) else value


def step(
    problem, upstream, *, statistics=False, wanted=None, kept=True, tf32=False, module=None, **gpu
):
    """One forward and backward pass of the kernels.

    Args:
        problem: arguments of `tvmf_cross_entropy`, or of `row_statistics` with `statistics`.
        upstream: gradients of the outputs, by name; absent ones are 0.
        wanted: names of the tensors whose gradients are made; all of them by default.
        kept: whether the forward pass keeps the products.
        gpu: `sms`, `l2`, `shared_per_block`, `shared_per_sm` of the GPU that is planned for, where
            they are not an H200's.

    Returns:
        Outputs by name, gradients by name, and the rest: the plan, `bad_label`.
    """
    scale = problem["scale"]
    softplus = isinstance(scale, SoftplusScale)
    tensors = {
        name: problem.get(name)
        for name in ("input", "linear_weight", "kappa", "linear_bias", "prior", "weight")
    } | {"scale": scale.s if softplus else scale}
    tensors = {
        name: float(value) if isinstance(value, (int, float)) else value
        for name, value in tensors.items()
    }
    kappa = tensors["kappa"]
    if isinstance(kappa, torch.Tensor) and kappa.numel() == 1:
        tensors["kappa"] = kappa.reshape(())
    if isinstance(tensors["scale"], torch.Tensor):
        tensors["scale"] = tensors["scale"].reshape(())
    differentiable = ("input", "linear_weight", "kappa", "scale", "linear_bias")
    if wanted is None:
        wanted = [name for name in differentiable if isinstance(tensors[name], torch.Tensor)]
    result = (module or load()).step(
        {name: _argument(value) for name, value in tensors.items()}
        | {
            "target": problem["target"].numpy(),
            "of_loss": not statistics,
            "label_smoothing": float(problem.get("label_smoothing", 0.0)),
            "reduction": _REDUCTIONS[problem.get("reduction", "mean")],
            "ignore_index": problem.get("ignore_index", -100),
            "softplus_scale": softplus,
            "allow_tf32": tf32,
            "kept": kept,
            "wanted": list(wanted),
            "upstream": {name: _argument(value) for name, value in upstream.items()},
        }
        | gpu
    )
    names = ("lse", "target", "sum", "rank") if statistics else ("loss",)
    outputs = {name: torch.from_numpy(result.pop(name)) for name in names}
    gradients = {}
    for name, array in result.pop("gradients").items():
        value = problem["scale"].s if name == "scale" and softplus else problem[name]
        gradients[name] = _tensor(array, value.dtype).reshape(value.shape)
    return outputs, gradients, result


def judge(problem, *, statistics=False, rows=False, tf32=False, **options):
    """`step` on a problem with upstream gradients of all sizes, its results by the error rule.

    What 16-bit and TF32 results may be off at least is one unit in the last place of an operand.
    For TF32 the rule's eager PyTorch is that of float16, which has as many bits of mantissa: on a
    CPU PyTorch has no TF32.
    """
    function = tvmf_ext.row_statistics if statistics else tvmf_ext.tvmf_cross_entropy
    if statistics:
        problem = problems.statistics_arguments(problem)
    dtype = problem["input"].dtype
    names = ("lse", "target", "sum") if statistics else ("loss",)
    shape = () if problem.get("reduction", "mean") != "none" and not statistics else (
        len(problem["input"]),
    )  # fmt: skip
    upstream = problems.upstream_of({name: torch.empty(shape) for name in names})
    own = [u.to(problems.compute_dtype(dtype)) for u in upstream]
    outputs, gradients, rest = step(
        problem, dict(zip(names, own, strict=True)), statistics=statistics, tf32=tf32, **options
    )
    outputs.pop("rank", None)
    operand = torch.float16 if tf32 else dtype
    lines = problems.judge(
        function, problem, outputs, gradients, upstream, rows,
        tolerance=torch.finfo(operand).eps if operand.itemsize == 2 else None,
        eager_dtype=operand,
    )  # fmt: skip
    return lines, rest
