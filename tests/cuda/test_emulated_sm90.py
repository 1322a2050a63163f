"""Tests of Hopper's own kernels on the emulator: both shapes of tiles and several chunks against
float64, exact results, infinity and NaN, any order of threads; counts against the plan."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

import tvmf_ext
from tests import problem as problems
from tests import simt
from tests.cuda.test_emulated import (  # noqa: F401
    OPTIONS,
    check,
    check_powers_of_two,
    check_ranges_of_float16,
    checks,
    make,
    module,
)
from tests.cuda.test_schedule import parts_of
from tests.test_loss import MARGINS, with_margins

MIXES = ("bf16-fp32", "fp16-fp32")
NARROW = ("bf16", "fp16")  # weights of the features' dtype
# GPUs that differ in their plans: with many multiprocessors tiles are small, and their products are
# kept or made again; with few they are large, and with a small L2 cache the classes are divided
# into chunks.
SMALL = {"capability": 90}
AGAIN = {"capability": 90, "kept": False}
LARGE = {"capability": 90, "sms": 1}
CHUNKED = {"capability": 90, "sms": 2, "l2": 90_000, "kept": False}
PATHS = pytest.mark.parametrize(
    "path",
    [SMALL, AGAIN, LARGE, CHUNKED],
    ids=["small tiles", "made again", "large tiles", "chunks"],
)
OF_EACH_DTYPE = pytest.mark.parametrize("mix", MIXES)
EPS = {"bf16-fp32": torch.finfo(torch.bfloat16).eps, "fp16-fp32": torch.finfo(torch.float16).eps}


def hopper(N, C, D, mix, **options):
    problem, _ = make(N, C, D, mix, **options)
    return problem


@OF_EACH_DTYPE
@PATHS
@pytest.mark.parametrize("few", [False, True], ids=["", "as small tiles"])
def test_statistics_of_ragged_tiles(few, path, mix):
    problem = hopper(70, 333, 68, mix, **OPTIONS)
    path = path | ({"sms": 4} if few else {})
    plan = check(problem, statistics=True, **path)["plan"]
    assert plan["architecture"] == "sm90"
    assert (plan["tile_classes"] == 64) == (few or "sms" not in path)
    assert (plan["kept"] > 0) == (plan["tile_classes"] == 64 and path.get("kept", True))
    assert (plan["chunks"] > 1) == ("l2" in path)
    launches = len(simt.load().reports())
    assert launches == plan["forward_launches"] + plan["backward_launches"]


@pytest.mark.parametrize("mix", NARROW)
@PATHS
def test_weights_of_the_features_dtype(path, mix):
    for options in (OPTIONS, {"scale": "[]"}, {"prior": True, "kappa": 4.0}):
        for statistics in (False, True):
            problem = hopper(70, 333, 72, mix, **options)
            plan = check(problem, statistics=statistics, **path)["plan"]
            assert plan["architecture"] == "sm90" and (plan["chunks"] > 1) == ("l2" in path)


@pytest.mark.parametrize("mix", NARROW)
@pytest.mark.parametrize("shape", [(1, 1, 8), (33, 65, 40), (257, 130, 136)], ids=str)
@pytest.mark.parametrize("path", [SMALL, LARGE], ids=["small tiles", "large tiles"])
def test_the_loss_alone_of_weights_of_the_features_dtype(path, shape, mix):
    assert check(hopper(*shape, mix), **path)["plan"]["architecture"] == "sm90"


@pytest.mark.parametrize("mix", [*MIXES, *NARROW])
@PATHS
def test_powers_of_two_change_no_bit(path, mix):
    check_powers_of_two(mix, path)


@PATHS
def test_ranges_of_float16(path):
    check_ranges_of_float16(lambda *shape, **how: hopper(*shape, "fp16-fp32", **how), path)


@PATHS
def test_ranks(path):
    """Ranks are exact where the weights need no rounding."""
    problem = hopper(70, 333, 68, "bf16-fp32", **OPTIONS)
    problem["linear_weight"] = problem["linear_weight"].bfloat16().float()
    problem = problems.statistics_arguments(problem)
    outputs, _, _ = simt.step(problem, {}, statistics=True, wanted=[], **path)
    problems.check_rank(problem, outputs["rank"])


@OF_EACH_DTYPE
@pytest.mark.parametrize(
    "shape", [(1, 1, 4), (1, 70, 8), (33, 65, 36), (3, 1, 64), (257, 130, 132)], ids=str
)
@pytest.mark.parametrize("path", [SMALL, LARGE], ids=["small tiles", "large tiles"])
def test_the_loss_alone(path, shape, mix):
    """Other instances of the kernels run where no sums, ranks or gradients of kappa and bias are
    wanted."""
    plan = check(hopper(*shape, mix, scale="[]"), **path)["plan"]
    assert plan["architecture"] == "sm90" and (plan["tile_classes"] == 64) == (path is SMALL)


@pytest.mark.parametrize("shape", [(3, 70, 2056), (5, 70, 516)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["", "strided features"])
def test_rows_longer_than_a_block_of_threads(shape, contiguous):
    """Projecting a row of dx takes a sum over all of it first."""
    problem = hopper(*shape, "bf16-fp32")
    if not contiguous:
        problem["input"] = problem["input"].T.contiguous().T
    check(problem, **SMALL)


@PATHS
def test_several_blocks_of_rows(path):
    problem = hopper(300, 200, 20, "bf16-fp32", kappa="[]", label_smoothing=0.1, bias=True)
    check(problem, **path)


@pytest.mark.parametrize("mix", [*MIXES, "bf16"])
@pytest.mark.parametrize(
    ("shape", "sms", "tile"), [((600, 70, 24), 4, 16), ((100, 700, 24), 7, 64)], ids=str
)
def test_kept_products_of_many_rows_and_of_several_tiles_a_block(shape, sms, tile, mix):
    """A warp has the rows of two steps, or a block has two tiles of classes."""
    problem = hopper(*shape, mix, **OPTIONS, label_smoothing=0.1)
    plan = check(problem, capability=90, sms=sms)["plan"]
    assert plan["kept"] > 0 and plan["backward_launches"] == 3
    assert plan["gradient_classes"] == tile
    assert plan["gradient_blocks"] == min(sms, -(-shape[1] // tile))


@pytest.mark.parametrize("mix", ["bf16-fp32", "bf16"])
@pytest.mark.parametrize("of_input", [1e-15, 1e-10, 1.0, 1e15])
@pytest.mark.parametrize("of_weight", [1e-15, 1e15])
def test_kept_products_of_extreme_norms(of_input, of_weight, mix):
    """The weights that are kept are not unit rows, so that their norm is in the gradient tile."""
    problem = hopper(40, 90, 24, mix, kappa="[C]", bias=True)
    problem["input"] *= of_input
    problem["linear_weight"] *= of_weight
    assert check(problem, **SMALL)["plan"]["kept"] > 0


@pytest.mark.parametrize(("C", "l2", "chunks"), [(1000, 2**25, 1), (1500, 1_000_000, 2)])
def test_tiles_of_dx_with_fewer_parts_than_there_are_partial_sums(C, l2, chunks):
    """The last block of such a tile clears the partial sums that are left."""
    plan = check(hopper(300, C, 24, "bf16-fp32"), capability=90, sms=11, l2=l2)["plan"]
    assert plan["chunks"] == chunks
    schedule = simt.load().product_schedule(300, 24, min(C, plan["chunk"]), 11, 12)
    counts = {len(parts) for parts in parts_of(schedule)}
    assert len(counts) > 1 and max(counts) <= plan["partial_features"]


@pytest.mark.parametrize("mix", [*MIXES, "bf16"])
@PATHS
@pytest.mark.parametrize("statistics", [False, True], ids=["loss", "statistics"])
def test_segments_of_rows(statistics, path, mix):
    """Each pass works on 256 rows after another, the last time on 44. They leave the sums of their
    losses, add up the gradients of the classes, and divide by the weight of all rows."""
    options = OPTIONS if statistics else OPTIONS | {"label_smoothing": 0.1, "reduction": "mean"}
    problem = hopper(300, 200, 24, mix, **options)
    plan = check(problem, statistics=statistics, most_rows=256, **path)["plan"]
    assert (plan["segments"], plan["segment_rows"]) == (2, 256)
    launches = plan["forward_launches"] + plan["backward_launches"]
    assert len(simt.load().reports()) == launches
    assert plan["backward_launches"] == 2 * (2 + 2 * plan["chunks"])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_segments_of_rows_with_other_reductions(reduction):
    problem = hopper(300, 70, 24, "bf16-fp32", reduction=reduction, class_weight=True)
    check(problem, most_rows=256, **SMALL)


def test_rows_in_segments_have_the_bits_of_rows_alone():
    """Statistics and gradients of features do not depend on how the rows are cut."""
    problem = hopper(512, 70, 24, "bf16-fp32", kappa=16.0, scale=16.0)
    problem = problems.statistics_arguments(problem)
    upstream = {name: torch.linspace(-1, 1, 512) for name in ("others", "cosine")}
    results = []
    for most_rows in (512, 256):
        outputs, gradients, rest = simt.step(
            problem, upstream, statistics=True, most_rows=most_rows, **SMALL
        )
        assert rest["plan"]["segments"] == 512 // most_rows
        results.append([outputs | {"input": gradients["input"]}])
    problems.assert_same_bits(*results)


@pytest.mark.parametrize(
    ("rows", "classes", "kernels"),
    [(70, 300, []), (300, 2000, ["finish_rows"])],
    ids=["of statistics", "of finish_rows"],
)
def test_the_last_block_makes_the_loss(rows, classes, kernels):
    problem = hopper(rows, classes, 4, "bf16-fp32", label_smoothing=0.1, class_weight=True)
    plan = check(problem, wanted=[], **SMALL)["plan"]
    names = [report.kernel for report in simt.load().reports()]
    assert plan["forward_launches"] == len(names) == 2 + len(kernels)
    assert all(name in last for name, last in zip(kernels, names[2:], strict=True))


def test_chunks_of_an_odd_number_of_small_tiles():
    """A block of the weight gradient takes two small tiles; for the last block the second of them
    belongs to the next chunk."""
    path = {"capability": 90, "sms": 6, "l2": 70_000, "kept": False}
    plan = check(hopper(70, 640, 68, "bf16-fp32", kappa="[C]", bias=True), **path)["plan"]
    assert plan["tile_classes"] == 64 and plan["chunks"] > 1 and plan["chunk"] // 64 % 2


def test_strides_that_bulk_copies_can_read():
    problem = hopper(40, 90, 24, "bf16-fp32")
    problem["input"] = problem["input"].T.contiguous().T
    padded = torch.zeros(90, 36)
    padded[:, :24] = problem["linear_weight"]
    problem["linear_weight"] = padded[:, :24]
    problem["target"] = torch.stack([problem["target"]] * 2, 1)[:, 0]
    assert check(problem, **SMALL)["plan"]["architecture"] == "sm90"


def test_what_bulk_copies_cannot_read_takes_another_path():
    assert check(hopper(20, 40, 18, "bf16-fp32"), **SMALL)["plan"]["architecture"] == "sm80"
    problem = hopper(20, 40, 24, "bf16-fp32")
    padded = torch.zeros(40, 33)
    padded[:, :24] = problem["linear_weight"]
    problem["linear_weight"] = padded[:, :24]
    assert check(problem, **SMALL)["plan"]["architecture"] == "sm80"


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions(reduction):
    check(hopper(40, 90, 24, "fp16-fp32", reduction=reduction, class_weight=True), **SMALL)


@pytest.mark.parametrize("name", ["input", "linear_weight", "kappa", "scale", "linear_bias"])
@pytest.mark.parametrize("kappa", ["[]", "[C]"])
@pytest.mark.parametrize("path", [SMALL, CHUNKED], ids=["small tiles", "chunks"])
def test_one_gradient_alone(name, kappa, path):
    problem = hopper(40, 200, 24, "bf16-fp32", kappa=kappa, scale="[]", bias=True)
    check(problem, wanted=[name], **path)


@pytest.mark.parametrize(
    ("kappa", "mix"), [*itertools.product((-0.49, 0.0, 1e4), MIXES), (1e6, "bf16-fp32")]
)
def test_extreme_kappa(kappa, mix):
    problem = hopper(40, 70, 16, mix, kappa=kappa, scale=64.0)
    # All rows are one point, opposed to every class but class 0.
    problem["linear_weight"][1:] = -problem["linear_weight"][0]
    problem["input"][:] = problem["linear_weight"][0]
    check(problem, **SMALL)


@pytest.mark.parametrize("kappa", [-0.4, 0.0, 16.0])
@pytest.mark.parametrize("scale", [1.0, 64.0, 300.0])
@PATHS
def test_large_scales_raise_the_reference(scale, kappa, path):
    """Some targets are far below the largest logit, and some rows have no target."""
    problem = hopper(40, 300, 24, "bf16-fp32", kappa=kappa, scale=scale, ignored=0.3)
    far = torch.arange(0, 40, 3)
    known = problem["target"][far] >= 0
    problem["target"][far[known]] = (problem["target"][far[known]] + 1) % 300
    check(problem, **path)
    if scale < 300:  # with more, the others of an easy row are too far below its target
        check(problem, statistics=True, **path)


def test_a_reference_is_raised_by_a_later_tile():
    """Logits grow from class to class, in all by more than the range of exp in float32."""
    problem = hopper(40, 700, 24, "bf16-fp32", kappa=0.0, bias=True, scale=50.0, ignored=0.2)
    problem["linear_bias"] = torch.linspace(0, 8, 700)
    problem["target"] = problem["target"].clamp_max(20)
    check(problem, statistics=True, **LARGE)


@PATHS
def test_what_lies_beyond_the_last_row_has_no_part(path):
    """The logits are about 200, so that exp of one would be infinite if no maximum were subtracted
    from it."""
    problem = hopper(35, 300, 24, "bf16-fp32", bias=True, kappa="[]", scale="[]")
    problem["prior"] = torch.full((300,), 200.0)
    check(problem, **path)


@OF_EACH_DTYPE
def test_rows_and_classes_of_zeros(mix):
    problem = hopper(40, 70, 16, mix)
    problem["input"][3] = 0
    problem["linear_weight"][problem["target"][5]] = 0
    upstream = [torch.full((), 1e-9, dtype=torch.float64)]  # 1e12 times it must be finite
    outputs, gradients, _ = simt.step(problem, {"loss": upstream[0].float()}, **SMALL)
    lines = problems.judge(
        tvmf_ext.tvmf_cross_entropy,
        problem,
        outputs,
        gradients,
        upstream,
        eager_dtype=torch.bfloat16 if mix == "bf16-fp32" else torch.float32,
        tolerance=EPS[mix],
    )
    assert all(line.error <= line.bound for line in lines), [str(line) for line in lines]
    assert gradients["input"][3].isfinite().all()


@pytest.mark.parametrize("path", [SMALL, LARGE], ids=["small tiles", "large tiles"])
def test_float16_keeps_small_gradients(path):
    """The loss has a factor of 1e-7, as in a mean over many rows. In float16 1e-7 rounds to 0."""
    problem = hopper(150, 203, 40, "fp16-fp32", scale="[]")
    for factor in (1e-7, 1e4):
        _, gradients, _ = simt.step(problem, {"loss": torch.tensor(factor)}, **path)
        upstream = [torch.tensor(factor).double()]
        _, exact, _ = problems.oracle(tvmf_ext.tvmf_cross_entropy, problem, upstream)
        for name in ("linear_weight", "scale"):
            assert problems.error(gradients[name], exact[name]) < 2**-10


@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_float16_gradient_tile_stays_in_range(length):
    """The elements of the tile grow with 1 / |w|, the slope of phi and the class weight."""
    problem = hopper(70, 90, 24, "fp16-fp32", kappa=64.0, scale="[]", class_weight=True)
    problem["linear_weight"] *= length
    problem["weight"][5] = 1e4
    problem = problems.statistics_arguments(problem)
    upstream = problems.upstream_of({name: torch.empty(70) for name in ("others", "cosine", "sum")})
    own = dict(zip(("others", "cosine", "sum"), [u.float() for u in upstream], strict=True))
    upstream.insert(2, None)  # the target, which the operator itself does not make
    _, gradients, _ = simt.step(problem, own, statistics=True, **SMALL)
    _, exact, _ = problems.oracle(tvmf_ext.row_statistics, problem, upstream)
    for name in ("input", "linear_weight"):
        assert problems.error(gradients[name], exact[name]) < 2**-7


@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS)
@PATHS
def test_margins(path, margins):
    problem = hopper(40, 200, 24, "bf16-fp32", **OPTIONS)
    check(with_margins(problem, margins), **path)


@pytest.mark.parametrize("loss", [1e-4, 1e-8, 1e-15, 1e-22, 1e-30])
@PATHS
def test_easy_rows_keep_their_digits(loss, path):
    """The features and weights are bfloat16 numbers, of which the products are exact enough. The
    gradient tiles are rounded to bfloat16."""
    problem = hopper(40, 200, 64, "bf16-fp32", kappa=0.0, reduction="none")
    problem["linear_weight"] = problem["linear_weight"].bfloat16().float()
    problem["input"] = problem["linear_weight"][problem["target"]].bfloat16() * 2
    problem["scale"] = torch.tensor(-1.6 * math.log(loss))
    outputs, gradients, _ = simt.step(problem, {"loss": torch.ones(40)}, **path)
    upstream = [torch.ones(40, dtype=torch.float64)]
    exact, of_exact, _ = problems.oracle(tvmf_ext.tvmf_cross_entropy, problem, upstream)
    assert exact["loss"].median() < 10 * loss
    relative = (outputs["loss"] - exact["loss"]).abs() / exact["loss"]
    assert relative[exact["loss"] > 1e-36].max() < 1e-4
    assert problems.error(gradients["scale"], of_exact["scale"]) < 1e-4
    assert problems.error(gradients["input"], of_exact["input"]) < 0.01


@PATHS
def test_a_small_loss_is_exact_to_a_rounding_of_one(path):
    """The error may be a rounding of 1, and not a rounding of the logits, which are about 30."""
    problem = hopper(30, 150, 16, "bf16-fp32", kappa=0.0, scale=30.3, reduction="none")
    problem["linear_weight"] = problem["linear_weight"].bfloat16().float()
    problem["input"] = problem["linear_weight"][problem["target"]].bfloat16() * 2
    outputs, gradients, _ = simt.step(problem, {"loss": torch.ones(30)}, **path)
    upstream = [torch.ones(30, dtype=torch.float64)]
    exact, of_exact, _ = problems.oracle(tvmf_ext.tvmf_cross_entropy, problem, upstream)
    small = exact["loss"] < 1e-4
    assert small.sum() > 3
    assert (outputs["loss"] - exact["loss"]).abs()[small].max() < 3e-7
    of_input = problems.error(gradients["input"][small], of_exact["input"][small], rows=True)
    assert of_input < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@PATHS
def test_what_is_not_finite_propagates(bad, path):
    problem = hopper(40, 200, 24, "bf16-fp32", reduction="none")
    problem["input"][7, 3] = bad
    outputs, gradients, _ = simt.step(problem, {"loss": torch.ones(40)}, **path)
    others = torch.arange(40) != 7
    assert outputs["loss"][7].isnan() and outputs["loss"][others].isfinite().all()
    assert gradients["input"][7].isnan().all() and gradients["input"][others].isfinite().all()
    assert gradients["linear_weight"].isnan().any()


@PATHS
def test_a_weight_that_is_not_finite_propagates(path):
    problem = hopper(40, 200, 24, "bf16-fp32", reduction="none")
    problem["linear_weight"][130, 3] = float("nan")
    outputs, gradients, _ = simt.step(problem, {"loss": torch.ones(40)}, **path)
    assert outputs["loss"].isnan().all() and gradients["input"].isnan().all()


@PATHS
def test_a_label_that_names_no_class(path):
    problem = hopper(40, 200, 24, "bf16-fp32", reduction="none")
    problem["target"][[3, 5]] = torch.tensor([200, -7])
    outputs, gradients, rest = simt.step(problem, {"loss": torch.ones(40)}, **path)
    assert rest["bad_label"]
    bad = torch.zeros(40, dtype=bool)
    bad[[3, 5]] = True
    assert torch.equal(outputs["loss"].isnan(), bad)
    problem["target"][[3, 5]] = -100
    outputs, as_ignored, rest = simt.step(problem, {"loss": torch.ones(40)}, **path)
    assert not rest["bad_label"] and (outputs["loss"][bad] == 0).all()
    problems.assert_same_bits([gradients], [as_ignored])


@PATHS
def test_shards_of_the_classes_give_what_all_give(path):
    problem = hopper(140, 300, 72, "bf16-fp32", **OPTIONS)
    problem["linear_weight"] = problem["linear_weight"].bfloat16().float()
    problems.check_shards(
        problem, [90, 1, 209], lambda part, up: simt.step(part, up, statistics=True, **path)[:2]
    )


@PATHS
@pytest.mark.parametrize(("rows", "classes"), [(70, 300), (260, 100)], ids=["", "segments"])
def test_bits_do_not_depend_on_the_order_of_threads(module, path, rows, classes):  # noqa: F811
    problem = hopper(rows, classes, 40, "bf16-fp32", **OPTIONS)
    results = []
    for seed in (1, 2):
        module.configure(seed=seed, check_races=False, count=False)
        loss = {"loss": torch.tensor(1.0)}
        results.append(simt.step(problem, loss, most_rows=256, **path)[:2])
    problems.assert_same_bits(*results)


@pytest.mark.parametrize("mix", ["bf16-fp32", "bf16"])
@PATHS
@pytest.mark.parametrize("rows", [256, 512], ids=["", "segments"])
def test_counts_are_the_plans(module, path, rows, mix):  # noqa: F811
    """The emulator counts the sectors and wgmma that the plan predicts, and no bank conflict."""
    module.configure(seed=0, check_races=False, count=True)
    problem = hopper(rows, 512, 256, mix)
    plan = check(problem, most_rows=256, **path)["plan"]
    reports = module.reports()
    forward = reports[: plan["forward_launches"]]
    backward = reports[plan["forward_launches"] :]
    assert len(backward) == plan["backward_launches"]

    def moved(launches):
        return 32 * sum(r.global_read_sectors + r.global_write_sectors for r in launches)

    assert moved(forward) == pytest.approx(plan["forward_l2"], rel=0.02)
    assert moved(backward) == pytest.approx(plan["backward_l2"], rel=0.02)
    for launches, name in ((forward, "forward_flops"), (backward, "backward_flops")):
        rows_of = [(r, 128 if "CosineShape<128" in r.kernel else 256) for r in launches]
        assert sum(2 * 64 * rows * 16 * r.wgmma for r, rows in rows_of) == plan[name]
    assert {s.where for r in reports for s in r.sites if s.conflicts} == set()


_UNDER_ASAN = """
from tests import simt
from tests.cuda import test_emulated_sm90 as t
module = simt.load("simt_asan")
for path in (t.SMALL, t.LARGE, t.CHUNKED):
    problem = t.hopper(66, 133, 36, "fp16-fp32", **t.OPTIONS)
    t.check(problem, statistics=True, module=module, **path)
t.check(t.hopper(1, 1, 4, "bf16-fp32"), module=module, **t.SMALL)
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


def test_command_line():
    flags = "--n 20 --c 70 --d 24 --bias --weight-dtype fp32 --capability 90 --counts"
    done = subprocess.run(
        [sys.executable, "-m", "tests.simt", *flags.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "path of sm90" in done.stdout and "products" in done.stdout
