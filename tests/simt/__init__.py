"""Runs the CUDA kernels on a CPU: builds the emulator's modules and runs one pass of the head.

`step` takes the arguments of `tvmf_cross_entropy` as torch tensors. simt.h describes the emulator.
"""

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import tvmf_ext
from tests import problem as problems
from tvmf_ext.head import SoftplusScale

_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "build" / "simt"
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def build():
    """Compiles the emulator's three modules where their sources have changed."""
    # Python's own folder comes first: it has cmake and ninja even where nobody has activated the
    # environment.
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    missing = [name for name in ("cmake", "ninja") if not shutil.which(name, path=path)]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if missing:
        raise RuntimeError(
            f"building the emulator needs {', '.join(missing)}: pip install -e '.[test]'"
        )
    options = ("-G", "Ninja", "-DTVMF_SIMT=ON", f"-DPython_EXECUTABLE={sys.executable}")
    _BUILD.mkdir(parents=True, exist_ok=True)
    # Two processes that build in one folder would disturb each other.
    with open(_BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", _ROOT, "-B", _BUILD, *options],
            ["cmake", "--build", _BUILD],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"PATH": path}
            )
            if done.returncode:
                printed = f"{done.stdout}{done.stderr}"
                raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{printed}")


@functools.cache
def load(name="simt_hooks"):
    """Builds and imports one of the emulator's modules."""
    build()
    (path,) = _BUILD.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asan_environment():
    """The environment of a Python process that loads `simt_asan`.

    Python itself is not instrumented, so the sanitizer's runtime must be loaded before it starts.
    """
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libstdc++")
    ]
    return os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def _array(tensor):
    """The tensor as an array that shares its memory, and the name of its dtype.

    NumPy has no bfloat16, so 16-bit numbers become uint16.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach()
    if tensor.element_size() == 2:
        return tensor.view(torch.uint16).numpy(), name
    return tensor.numpy(), name


def _tensor(array, dtype):
    """The array as a tensor of `dtype`: uint16 has its bits, and float32 is rounded to it."""
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if tensor.dtype == torch.uint16 else tensor.to(dtype)


def _argument(value):
    return _array(value) if isinstance(value, torch.Tensor) else value


def step(
    problem, upstream, *, statistics=False, wanted=None, kept=True, tf32=False, module=None, **gpu
):
    """Runs one forward and backward pass of the kernels.

    Args:
        problem: the arguments of `tvmf_cross_entropy`, or of `row_statistics` if `statistics`.
        upstream: the gradients of the outputs by name. Absent ones are 0.
        wanted: the names of the tensors whose gradients are computed, by default all tensors.
        kept: whether the forward pass keeps the products for the backward pass.
        tf32: whether float32 products may be TF32.
        module: one of the emulator's modules, by default `simt_hooks`.
        gpu: properties in which the planned GPU differs from an H200: `sms`, `l2`,
            `shared_per_block`, `shared_per_sm`, and `capability`, 80 by default and 90 for Hopper's
            own kernels; and `most_rows`, the most rows that these work on at a time.

    Returns:
        The outputs by name, the gradients by name, and a dict of the plan and `bad_label`.
    """
    scale = problem["scale"]
    softplus = isinstance(scale, SoftplusScale)
    tensors = {
        name: problem.get(name)
        for name in ("input", "linear_weight", "kappa", "linear_bias", "prior", "weight")
    }
    tensors |= {name: problem.get(name, 0.0) for name in ("cosine_margin", "angular_margin")}
    tensors |= {"target_score": problem.get("target_score", 0.0)}
    tensors |= {"scale": scale.s if softplus else scale}
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
    names = ("others", "cosine", "sum", "rank") if statistics else ("loss",)
    outputs = {name: torch.from_numpy(result.pop(name)) for name in names}
    gradients = {}
    for name, array in result.pop("gradients").items():
        value = problem["scale"].s if name == "scale" and softplus else problem[name]
        gradients[name] = _tensor(array, value.dtype).reshape(value.shape)
    return outputs, gradients, result


def judge(problem, *, statistics=False, rows=False, tf32=False, **options):
    """Runs `step` with upstream gradients of many sizes and compares its results with float64.

    The error may always be one unit in the last place of a 16-bit or TF32 operand. PyTorch has no
    TF32 on a CPU, so the eager result for TF32 is that of float16, which has as many bits of
    mantissa.

    Returns:
        A line of error and bound for each result, and the rest that `step` returns.
    """
    function = tvmf_ext.row_statistics if statistics else tvmf_ext.tvmf_cross_entropy
    if statistics:
        problem = problems.statistics_arguments(problem)
    dtype = problem["input"].dtype
    names = ("others", "cosine", "sum") if statistics else ("loss",)
    reduced = not statistics and problem.get("reduction", "mean") != "none"
    shape = () if reduced else (len(problem["input"]),)
    upstream = problems.upstream_of({name: torch.empty(shape) for name in names})
    own = [u.to(problems.compute_dtype(dtype)) for u in upstream]
    outputs, gradients, rest = step(
        problem, dict(zip(names, own, strict=True)), statistics=statistics, tf32=tf32, **options
    )
    outputs.pop("rank", None)
    if statistics:  # the operator itself does not make the target's logit
        upstream.insert(2, None)
    operand = torch.float16 if tf32 else dtype
    lines = problems.judge(
        function,
        problem,
        outputs,
        gradients,
        upstream,
        rows,
        tolerance=torch.finfo(operand).eps if operand.itemsize == 2 else None,
        eager_dtype=operand,
    )
    return lines, rest
