"""Tests of the CUDA kernels on the emulator, under its checks for races and uninitialised memory:
every dtype, path and option against float64; launches and counts against the plan. A few problems
also run under AddressSanitizer and UBSan."""

import subprocess
import sys

import pytest
import torch

import tvmf_ext
from tests import problem as problems
from tests import simt
from tests.simt import command
from tests.test_loss import MARGINS, easy_problem, with_margins

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MIXES = {
    "bf16": {"dtype": BF16},
    "bf16-fp32": {"dtype": BF16, "weight_dtype": F32},
    "fp16": {"dtype": F16},
    "fp16-fp32": {"dtype": F16, "weight_dtype": F32},
    "tf32": {"dtype": F32, "tf32": True},
    "fp32": {"dtype": F32},
    "fp64": {"dtype": F64},
}
BF16_MIXES = [mix for mix in MIXES if mix.startswith("bf16")]
OPTIONS = {
    "kappa": "[C]",
    "scale": "softplus",
    "bias": True,
    "prior": True,
    "class_weight": True,
    "ignored": 0.2,
}
# SMALL has so few multiprocessors that few tiles fill it. CHUNKED takes the throughput path: its
# blocks cannot hold the gradient tile of all rows, and its L2 cache holds few classes.
SMALL = {"sms": 4}
CHUNKED = {"shared_per_block": 60_000, "l2": 60_000}
# The same with a multiprocessor that large tiles of classes fill, for more than 1024 rows, which do
# not take the latency path.
LARGE_CLASSES = CHUNKED | {"sms": 1}


@pytest.fixture(scope="module")
def module():
    return simt.load()


@pytest.fixture(autouse=True)
def checks(module):
    module.configure(seed=0, check_races=True, count=False)
    module.reset()


def check(problem, **options):
    lines, rest = simt.judge(problem, **options)
    off = [str(line) for line in lines if not line.error <= line.bound]
    assert not off, off
    return rest


def make(N, C, D, mix, **options):
    mix = dict(MIXES[mix])
    tf32 = mix.pop("tf32", False)
    return problems.make_problem(N, C, D, **mix, **options), {"tf32": tf32}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_latency_path(mix, kept):
    problem, how = make(140, 200, 72, mix, **OPTIONS)
    plan = check(problem, statistics=True, kept=kept, **how)["plan"]
    assert plan["latency"] and plan["chunks"] == 1
    unit_rows = mix.startswith("fp16")  # the launch that copies the weights
    assert plan["forward_launches"] == 3 and plan["backward_launches"] == 4 + unit_rows
    assert len(simt.load().reports()) == 7 + unit_rows


@pytest.mark.parametrize("mix", MIXES)
def test_large_tiles(mix):
    problem, how = make(256, 256, 64, mix)
    plan = check(problem, **SMALL, **how)["plan"]
    assert plan["tile"] == (64 if mix in ("fp32", "fp64") else 128)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_throughput_path(mix, kept):
    problem, how = make(200, 331, 40, mix, label_smoothing=0.1, **OPTIONS)
    plan = check(problem, kept=kept, **CHUNKED, **how)["plan"]
    assert not plan["latency"] and plan["chunks"] > 1 and plan["row_groups"] == 2
    assert plan["class_tile"] == 64
    assert len(simt.load().reports()) == 3 + plan["backward_launches"]


@pytest.mark.parametrize("mix", BF16_MIXES)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("options", [OPTIONS | {"label_smoothing": 0.1}, {}], ids=["all", "none"])
def test_large_tiles_of_classes(mix, kept, options):
    problem, how = make(1030, 203, 24, mix, **options)
    plan = check(problem, kept=kept, **LARGE_CLASSES, **how)["plan"]
    assert not plan["latency"] and plan["chunks"] > 1 and plan["class_tile"] == 128


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 5, 3), (3, 1, 7), (2, 130, 1), (65, 67, 129), (5, 1003, 16)], ids=str
)
def test_ragged_shapes(mix, shape):
    problem, how = make(*shape, mix, kappa="[]", scale="[]", bias=True)
    check(problem, **how)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("path", [{}, CHUNKED], ids=["latency", "throughput"])
def test_any_strides(mix, path):
    problem, how = make(70, 90, 24, mix)
    problem["input"] = problem["input"].T.contiguous().T
    padded = torch.zeros(90, 33, dtype=problem["linear_weight"].dtype)
    padded[:, 1:25] = problem["linear_weight"]
    problem["linear_weight"] = padded[:, 1:25]
    problem["target"] = torch.stack([problem["target"]] * 2, 1)[:, 0]
    check(problem, **path, **how)


PATHS = pytest.mark.parametrize("path", [{}, CHUNKED], ids=["latency", "throughput"])


def powers_of_two(rows, most):
    return 2.0 ** torch.linspace(-most, most, rows).round()[:, None]


def check_powers_of_two(mix, path):
    """A row of the weight or of x times a power of two has the same loss to the bit, and its
    gradient is the same divided by that power."""
    problem, how = make(70, 90, 24, mix, scale=16.0)
    half = {name: problem[name].dtype == F16 for name in ("input", "linear_weight")}
    upstream = {"loss": torch.ones((), dtype=problems.compute_dtype(problem["input"].dtype))}
    loss, gradients, _ = simt.step(problem, upstream, **path, **how)
    for name in half:
        by = powers_of_two(len(problem[name]), 3 if half[name] else 26).to(problem[name].dtype)
        scaled, of_scaled, _ = simt.step(
            problem | {name: problem[name] * by}, upstream, **path, **how
        )
        assert torch.equal(scaled["loss"], loss["loss"])
        for other in half:
            gradient = of_scaled[other] * (by if other == name else 1)
            if half[other]:  # a gradient in float16 can be subnormal
                torch.testing.assert_close(gradient, gradients[other], rtol=0.01, atol=2e-6)
            else:
                assert torch.equal(gradient, gradients[other])


@pytest.mark.parametrize("mix", MIXES)
@PATHS
def test_powers_of_two_change_no_bit(mix, path):
    check_powers_of_two(mix, path)


def largest_errors(problem, loss=1.0, **path):
    """The largest error of a row's gradient relative to the size of its terms, for x and weight."""
    upstream = torch.tensor(loss)
    _, gradients, _ = simt.step(problem, {"loss": upstream}, **path)
    _, exact, size = problems.oracle(
        tvmf_ext.tvmf_cross_entropy, problem, upstream=[upstream.double()]
    )
    return [
        problems.error(gradients[name], exact[name], size[name], rows=True)
        for name in ("input", "linear_weight")
    ]


def check_ranges_of_float16(make_problem, path):
    """A problem that leaves float16's range has the error of one that does not."""
    most = 2.5 * torch.finfo(F16).eps

    def check(problem, names=2, **options):
        for error in largest_errors(problem, **options, **path)[-names:]:
            assert error < most

    problem = make_problem(40, 100, 32, scale=16.0)
    for row in (7, problem["target"][3]):
        problem["linear_weight"][row] *= 1e8
        problem["linear_weight"][row + 1] *= 1e-8
    check(problem)
    problem = make_problem(256, 100, 32, scale=16.0)
    problem["input"][5] = 0
    problem["input"][5, 3] = 6e-8  # its own gradient is beyond float16
    check(problem, names=1)
    # The upstream gradient brings that of x into float16's normal numbers.
    check(make_problem(40, 1000, 64, scale=16.0, kappa=1e4), loss=1e4)
    check(make_problem(8, 20_000, 32, scale=16.0, kappa=1e4), loss=1e4)
    check(make_problem(40, 1000, 64, scale=16.0, kappa=1e6), loss=1e6, names=1)
    for loss in (1e-30, 1e30):
        check(make_problem(40, 100, 32, scale=16.0), loss=loss, names=1)


@PATHS
def test_ranges_of_float16(path):
    check_ranges_of_float16(lambda *shape, **how: make(*shape, "fp16-fp32", **how)[0], path)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions(reduction):
    problem, how = make(70, 90, 24, "bf16-fp32", reduction=reduction, class_weight=True)
    check(problem, **how)


@pytest.mark.parametrize("name", ["input", "linear_weight", "kappa", "scale", "linear_bias"])
@pytest.mark.parametrize("path", [{}, CHUNKED], ids=["latency", "throughput"])
def test_one_gradient_alone(name, path):
    problem, how = make(70, 90, 24, "fp32", kappa="[]", scale="[]", bias=True)
    check(problem, wanted=[name], **path, **how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_any_dtype(dtype):
    problem, how = make(70, 90, 24, "fp32", kappa="[C]", scale="[]", bias=True, prior=True)
    for name in ("kappa", "scale", "linear_bias", "prior"):
        problem[name] = problem[name].to(dtype)
    check(problem, **how)


@pytest.mark.parametrize("mix", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("kappa", [-0.49, 0.0, 1e4])
def test_extreme_kappa(mix, kappa):
    problem, how = make(40, 70, 16, mix, kappa=kappa, scale=64.0)
    # All rows are one point, opposed to every class but class 0.
    problem["linear_weight"][1:] = -problem["linear_weight"][0]
    problem["input"][:] = problem["linear_weight"][0]
    check(problem, **how)


@pytest.mark.parametrize("mix", ["bf16", "fp16", "fp32", "fp64"])
def test_rows_and_classes_of_zeros(mix):
    problem, how = make(40, 70, 16, mix)
    problem["input"][3] = 0
    problem["linear_weight"][problem["target"][5]] = 0
    upstream = [torch.full((), 1e-9, dtype=torch.float64)]  # 1e12 times it must be finite
    own = {"loss": upstream[0].to(problems.compute_dtype(problem["input"].dtype))}
    outputs, gradients, _ = simt.step(problem, own, **how)
    lines = problems.judge(
        tvmf_ext.tvmf_cross_entropy,
        problem,
        outputs,
        gradients,
        upstream,
        eager_dtype=problem["input"].dtype if mix != "fp16" else F32,
    )
    assert all(line.error <= line.bound for line in lines), [str(line) for line in lines]
    assert gradients["input"][3].isfinite().all()


def test_float16_keeps_small_gradients():
    """The loss has a factor of 1e-7, as in a mean over many rows. In float16 1e-7 rounds to 0."""
    problem, _ = make(150, 203, 40, "fp16-fp32", scale="[]")
    for factor in (1e-7, 1.0, 1e4):
        _, gradients, _ = simt.step(problem, {"loss": torch.tensor(factor)})
        upstream = [torch.tensor(factor).double()]
        _, exact, _ = problems.oracle(tvmf_ext.tvmf_cross_entropy, problem, upstream)
        for name in ("linear_weight", "scale"):
            assert problems.error(gradients[name], exact[name]) < 2**-10


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_float16_gradient_tile_stays_in_range(length):
    """The elements of the tile grow with 1 / |w|, the slope of phi and the class weight."""
    problem, _ = make(70, 90, 24, "fp16-fp32", kappa=64.0, scale="[]", class_weight=True)
    problem["linear_weight"] *= length
    problem["weight"][5] = 1e4
    problem = problems.statistics_arguments(problem)
    upstream = problems.upstream_of({name: torch.empty(70) for name in ("others", "cosine", "sum")})
    own = dict(zip(("others", "cosine", "sum"), [u.float() for u in upstream], strict=True))
    upstream.insert(2, None)  # the target, which the operator itself does not make
    _, gradients, _ = simt.step(problem, own, statistics=True)
    _, exact, _ = problems.oracle(tvmf_ext.row_statistics, problem, upstream)
    for name in ("input", "linear_weight"):
        assert problems.error(gradients[name], exact[name]) < 2**-7


@pytest.mark.parametrize("mix", ["fp32", "fp64"])
def test_rows_shorter_than_eps_are_not_projected(mix):
    problem, how = make(40, 70, 16, mix)
    problem["input"][3] *= 1e-14
    problem["linear_weight"][4] *= 1e-14
    check(problem, rows=True, **how)


@pytest.mark.parametrize("path", [{}, SMALL, CHUNKED], ids=["latency", "large tiles", "throughput"])
@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("mix", ["fp32", "bf16-fp32", "fp64"])
def test_margins(mix, margins, path):
    problem, how = make(70, 90, 24, mix, **OPTIONS)
    check(with_margins(problem, margins), **path, **how)


@pytest.mark.parametrize("margins", ["none", "both", "both per class"])
@pytest.mark.parametrize("loss", [1e-4, 1e-8, 1e-15, 1e-22, 1e-30])
def test_easy_rows_keep_their_digits(loss, margins):
    problem = easy_problem(loss, MARGINS[margins])
    outputs, gradients, _ = simt.step(problem, {"loss": torch.tensor(1.0)})
    upstream = [torch.ones((), dtype=torch.float64)]
    exact_loss, exact, _ = problems.oracle(tvmf_ext.tvmf_cross_entropy, problem, upstream)
    assert problems.error(outputs["loss"], exact_loss["loss"]) <= 1e-4
    for name in ("input", "linear_weight", "scale"):
        assert problems.error(gradients[name], exact[name]) <= 1e-4, name


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", ["fp32", "bf16-fp32", "fp64"])
def test_one_class_has_no_loss_and_no_gradient(mix, label_smoothing):
    problem, how = make(6, 1, 24, mix, kappa="[C]", scale="[]", bias=True, class_weight=True)
    problem["label_smoothing"] = label_smoothing
    upstream = {"loss": torch.tensor(1.0).to(problems.compute_dtype(problem["input"].dtype))}
    outputs, gradients, _ = simt.step(problem, upstream, **how)
    assert outputs["loss"] == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("path", [{}, CHUNKED], ids=["latency", "throughput"])
def test_what_lies_beyond_the_last_row_has_no_part(path):
    """The logits are about 200, so that exp of one would be infinite if no maximum were subtracted
    from it."""
    problem, how = make(70, 90, 24, "bf16-fp32", bias=True, kappa="[]", scale="[]")
    problem["prior"] = torch.full((90,), 200.0)
    check(problem, kept=False, **path, **how)


@pytest.mark.parametrize("s", [-30.0, 19.0, 25.0])
def test_softplus_of_any_scale(s):
    problem, how = make(40, 70, 16, "fp32", scale="softplus", kappa=0.0)
    problem["scale"].s.fill_(s)
    check(problem, **how)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates(bad):
    problem, _ = make(70, 90, 24, "bf16-fp32", reduction="none")
    problem["input"][7, 3] = bad
    outputs, gradients, _ = simt.step(problem, {"loss": torch.ones(70)})
    others = torch.arange(70) != 7
    assert outputs["loss"][7].isnan() and outputs["loss"][others].isfinite().all()
    assert gradients["input"][7].isnan().all() and gradients["input"][others].isfinite().all()
    assert gradients["linear_weight"].isnan().any()


def test_a_label_that_names_no_class():
    problem, _ = make(70, 90, 24, "fp32", reduction="none")
    problem["target"][[3, 5]] = torch.tensor([90, -7])
    outputs, gradients, rest = simt.step(problem, {"loss": torch.ones(70)})
    assert rest["bad_label"]
    bad = torch.zeros(70, dtype=bool)
    bad[[3, 5]] = True
    assert torch.equal(outputs["loss"].isnan(), bad)
    problem["target"][[3, 5]] = -100
    outputs, as_ignored, rest = simt.step(problem, {"loss": torch.ones(70)})
    assert not rest["bad_label"] and (outputs["loss"][bad] == 0).all()
    problems.assert_same_bits([gradients], [as_ignored])


def test_ranks():
    problem, _ = make(140, 200, 72, "fp32", **OPTIONS)
    problem = problems.statistics_arguments(problem)
    outputs, _, _ = simt.step(problem, {}, statistics=True, wanted=[])
    problems.check_rank(problem, outputs["rank"])


def test_shards_of_the_classes_give_what_all_give():
    problem, _ = make(140, 200, 72, "fp32", **OPTIONS)
    problems.check_shards(
        problem, [90, 1, 109], lambda part, up: simt.step(part, up, statistics=True)[:2]
    )


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ({}, (140, 300, 40)),
        (SMALL, (140, 300, 40)),
        (CHUNKED, (140, 300, 40)),
        (LARGE_CLASSES, (1030, 140, 24)),
    ],
    ids=["latency", "large tiles", "throughput", "large tiles of classes"],
)
def test_bits_do_not_depend_on_the_order_of_threads(module, path, shape):
    problem, _ = make(*shape, "bf16-fp32", **OPTIONS)
    results = []
    for seed in (1, 2):
        module.configure(seed=seed, check_races=False, count=False)
        outputs, gradients, _ = simt.step(problem, {"loss": torch.tensor(1.0)}, kept=False, **path)
        results.append((outputs, gradients))
    problems.assert_same_bits(*results)


@pytest.mark.parametrize(
    ("mix", "path", "shape"),
    [
        *((mix, path, (256, 512, 256)) for path in (SMALL, CHUNKED) for mix in MIXES),
        *((mix, LARGE_CLASSES, (1152, 128, 256)) for mix in BF16_MIXES),
    ],
)
def test_counts_are_the_plans(module, mix, path, shape):
    """The emulator counts the sectors and mma that the plan predicts, and no bank conflict on the
    paths of tensor cores."""
    module.configure(seed=0, check_races=False, count=True)
    problem, how = make(*shape, mix)
    plan = check(problem, kept=False, **path, **how)["plan"]
    reports = module.reports()
    forward, backward = reports[:3], reports[3:]
    assert len(backward) == plan["backward_launches"]

    def moved(launches):
        return 32 * sum(r.global_read_sectors + r.global_write_sectors for r in launches)

    assert moved(forward) == pytest.approx(plan["forward_l2"], rel=0.05)
    assert moved(backward) == pytest.approx(plan["backward_l2"], rel=0.05)
    depth = {"fp32": 0, "fp64": 0, "tf32": 8}.get(mix, 16)
    for launches, flops in ((forward, "forward_flops"), (backward, "backward_flops")):
        ideal = plan[flops] / (2 * 16 * 8 * depth) if depth else 0
        assert sum(r.mma for r in launches) == ideal
    if path == LARGE_CLASSES:  # a block of finish_gradient has 4 rows, whose few sums share banks
        reports = [r for r in reports if "finish_gradient" not in r.kernel]
    if mix != "fp64":
        assert {s.where for r in reports for s in r.sites if s.conflicts} == set()


_UNDER_ASAN = """
import torch
from tests import simt
from tests.test_loss import MARGINS, easy_problem, with_margins
from tests.cuda import test_emulated as t
module = simt.load("simt_asan")
for mix in t.MIXES:
    for shape in ((67, 131, 20), (66, 130, 33), (1, 1, 1)):
        for path in ({}, t.CHUNKED):
            problem, how = t.make(*shape, mix, **t.OPTIONS)
            t.check(problem, statistics=True, kept=not path, module=module, **path, **how)
problem, how = t.make(1030, 131, 20, "bf16-fp32", **t.OPTIONS)
t.check(problem, kept=False, module=module, **t.LARGE_CLASSES, **how)
print("no error")
"""


def test_under_address_and_undefined_behaviour_sanitizers():
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_ASAN],
        env=simt.asan_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "no error", done.stderr[-3000:]


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.simt", *arguments], capture_output=True, text=True
    )


def test_command_line():
    done = run_command("--n", "20", "--c", "70", "--d", "24", "--dtype", "fp16", "--bias")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("loss", "dinput", "dlinear_weight", "dlinear_bias"))
    done = run_command("--dtype", "fp32", "--kappa", "-0.5")
    assert done.returncode == 2 and "must be > -1/2, got -0.5" in done.stderr


def test_command_line_fails_where_a_result_is_off(monkeypatch, capsys):
    exact = simt.step

    def off(*args, **options):
        outputs, gradients, rest = exact(*args, **options)
        gradients["linear_weight"][3] *= 1.001
        return outputs, gradients, rest

    arguments = ["simt", "--n", "20", "--c", "70", "--d", "24", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main()
    monkeypatch.setattr(simt, "step", off)
    assert not command.main()
    assert "<- off" in capsys.readouterr().out
