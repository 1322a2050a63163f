"""The CPU's products: the library's and our own, forced by TVMF_CPU_PRODUCT, by the error rule.

Our own for AVX-512 and AMX are built once more with emulated instructions, so that they run
anywhere.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_resources import output_of

ROOT = Path(__file__).parent.parent

# Features and weight of each case have one of the DTYPES, and there is room to keep all products,
# those of half of the classes, or none. Then each matrix is a part of a larger one, and transposed.
CHECKS = """
import itertools, torch
from tests.problem import *
from tvmf_ext import head, row_statistics, tvmf_cross_entropy
head._KEEP_MIN_FEATURES = 1
SHAPES = (1, 1, 2), (1, 8, 8), (3, 130, 17), (16, 16, 16), (33, 300, 131), (300, 701, 33)
SHAPES += (17, 40, 1030),  # sums over features in several pieces, for pairs of bfloat16 as well
OPTIONS = (
    dict(),
    dict(kappa="[C]", scale="softplus", bias=True, prior=True, class_weight=True, ignored=0.2,
         label_smoothing=0.1, cosine_margin=0.1, angular_margin=0.2, reduction="none"),
    dict(kappa="[]", scale="[]", ignored=0.5, class_weight=True, reduction="sum"),
)
for shape, (i, options) in itertools.product(SHAPES, enumerate(OPTIONS)):
    N, C, D = shape
    for dtypes in DTYPES:
        dtype, weight_dtype = (getattr(torch, name) for name in dtypes.split("/"))
        kept = (1 << 30, 4 * N * (C // 2), 0)[(N + i) % 3]
        head._KEEP_BYTES = kept
        problem = make_problem(*shape, dtype=dtype, weight_dtype=weight_dtype, **options)
        for function in (tvmf_cross_entropy, row_statistics):
            check(function, problem)
        if product_dtype(problem["input"]) != torch.bfloat16 or weight_dtype == torch.bfloat16:
            check_rank(problem)
    padded = {k: v for k, v in make_problem(N, C, D, **options).items()}
    for name in ("input", "linear_weight"):
        rows, cols = padded[name].shape
        padded[name] = torch.nn.functional.pad(padded[name], (3, 4))[:, 3:3 + cols]
        check(tvmf_cross_entropy, padded)
        padded[name] = padded[name].t().contiguous().t()
        check(tvmf_cross_entropy, padded)
print("done")
"""
DTYPES = ("float32/float32", "bfloat16/float32", "float16/float16", "float32/bfloat16")

# Waves of classes grow with the number of threads; sums over classes must not notice. At the first
# shape the waves of one thread and of eight differ, and one sum of the features' gradient ends.
BITS = """
import hashlib, sys, torch
from tests.problem import *
from tvmf_ext import build_info, row_statistics, tvmf_cross_entropy
digests = []
for threads in THREADS:
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for dtype, *shape in (
        (torch.float32, 520, 8300, 18),
        (torch.float32, 70, 2500, 129),
        (torch.bfloat16, 40, 3000, 64),
    ):
        problem = make_problem(
            *shape, dtype=dtype, weight_dtype=torch.float32, kappa="[C]", scale="[]", bias=True,
            class_weight=True, ignored=0.1, label_smoothing=0.1,
        )
        statistics = statistics_arguments(problem)
        digest.update(row_statistics(**statistics).rank.numpy().tobytes())
        for result in (evaluate(row_statistics, statistics), evaluate(tvmf_cross_entropy, problem)):
            for tensors in result:
                for tensor in tensors.values():
                    digest.update(tensor.double().numpy().tobytes())
    digests.append(digest.hexdigest())
print(*digests)
"""

# The relative error of the gradients of features and weight, ours and eager's, at many classes.
ERRORS = """
import torch
from tvmf_ext import tvmf_cross_entropy
torch.manual_seed(0)
x, w, target = torch.randn(16, 24), torch.randn(300_000, 24), torch.randint(300_000, (16,))

def eager(x, w, target, kappa, scale):
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    similarity = (1 + cosine) / (1 + kappa * (1 - cosine)) - 1
    return torch.nn.functional.cross_entropy(scale * similarity, target)

def gradients(function, dtype):
    operands = [t.to(dtype).requires_grad_() for t in (x, w)]
    return torch.autograd.grad(function(*operands, target, kappa=16.0, scale=16.0), operands)

exact = gradients(eager, torch.float64)
for function in (tvmf_cross_entropy, eager):
    for gradient, wanted in zip(gradients(function, torch.float32), exact):
        print(((gradient - wanted).norm() / wanted.norm()).item())
"""


def start(code, package, **environment):
    """A Python process that finds the folder `package` before the tests."""
    paths = (package, ROOT, os.environ.get("PYTHONPATH", ""))
    environment = {"OMP_NUM_THREADS": "1"} | environment
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=package,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def checks(*dtypes):
    return CHECKS.replace("DTYPES", repr(dtypes))


@pytest.mark.parametrize("product", ["own", "library"])
def test_products_follow_the_error_rule(product):
    process = start(checks(*DTYPES), ROOT, TVMF_CPU_PRODUCT=product)
    assert output_of(process) == ["done"]


def test_our_own_products_give_the_same_bits_on_any_number_of_threads():
    code = BITS.replace("THREADS", "(1, 2, 8, 1)")
    digests = output_of(start(code, ROOT, TVMF_CPU_PRODUCT="own"))
    assert len(digests) == 4 and len({*digests}) == 1


def test_the_error_of_a_gradient_does_not_grow_with_the_classes():
    errors = [float(e) for e in output_of(start(ERRORS, ROOT, TVMF_CPU_PRODUCT="own"))]
    ours, eager = errors[:2], errors[2:]
    assert ours[0] <= 0.5 * eager[0] and ours[1] <= 1.1 * eager[1], errors


@pytest.mark.parametrize(
    "variable, wanted",
    [
        ("TVMF_CPU_PRODUCT", "own or library"),
        ("TVMF_CPU_CAPABILITY", "baseline, avx2, avx512, avx512_bf16 or amx_bf16"),
    ],
)
def test_an_unknown_name_in_the_environment_is_refused(variable, wanted):
    process = start(
        "import torch, tvmf_ext\n"
        "x = torch.ones(1, 2)\n"
        "tvmf_ext.tvmf_cross_entropy(x, x, torch.zeros(1, dtype=torch.int64))",
        ROOT,
        **{variable: "ours"},
    )
    assert f"{variable} must be {wanted}, got ours" in process.communicate()[1]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The package with emulated AVX-512 and AMX, in a folder of its own."""
    if not shutil.which("cmake") or "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs cmake and AVX2")
    folder = tmp_path_factory.mktemp("emulated")
    package = folder / "tvmf_ext"
    shutil.copytree(ROOT / "tvmf_ext", package, ignore=shutil.ignore_patterns("*.so"))
    settings = ("-DTVMF_EMULATED=ON", f"-DTVMF_OUTPUT_DIR={package}")
    for command in (
        ("-S", ROOT, "-B", folder / "build", "-G", "Ninja", *settings),
        ("--build", folder / "build"),
    ):
        subprocess.run(["cmake", *command], env=os.environ | {"TVMF_CUDA": "0"}, check=True)
    return folder


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_emulated_products_follow_the_error_rule(emulated, name):
    dtypes = ["bfloat16/bfloat16", "bfloat16/float32"]
    if name == "avx512_bf16":
        dtypes.append("float32/float32")  # AMX has no products of float32
    forced = {"TVMF_CPU_CAPABILITY": name, "TVMF_CPU_PRODUCT": "own"}
    code = f"import tvmf_ext; assert tvmf_ext.build_info().cpu == {name!r}\n" + checks(*dtypes)
    assert output_of(start(code, emulated, **forced)) == ["done"]


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_emulated_products_give_the_same_bits_on_any_number_of_threads(emulated, name):
    code = BITS.replace("THREADS", "(1, 3)")
    forced = {"TVMF_CPU_CAPABILITY": name, "TVMF_CPU_PRODUCT": "own"}
    digests = output_of(start(code, emulated, **forced))
    assert len(digests) == 2 and len({*digests}) == 1


def test_emulated_avx512_gives_the_bits_of_avx2_in_float32(emulated):
    code, forced = BITS.replace("THREADS", "(1,)"), {"TVMF_CPU_PRODUCT": "own"}
    digests = [
        output_of(start(code, emulated, TVMF_CPU_CAPABILITY=name, **forced))
        for name in ("avx2", "avx512")
    ]
    assert digests[0] == digests[1]
