"""Losses that stay exact however small they are, and the margins of the target."""

import math

import pytest
import torch
import torch.nn.functional as F

import tvmf_ext
from tests.problem import (
    check,
    check_shards,
    error,
    evaluate,
    leaves_of,
    make_problem,
    shards_of,
    statistics_arguments,
    to_dtype,
)
from tvmf_ext import (
    SoftplusScale,
    TvMFLoss,
    loss_of_statistics,
    ops,
    reference,
    row_statistics,
    tvmf_cross_entropy,
)
from tvmf_ext.head import make_head


def step_of_shard(problem, upstream):
    part, leaves = leaves_of(problem)
    names = ("input", "linear_weight", "target", "kappa", "scale", "linear_bias", "prior", "weight")
    names += ("ignore_index", "cosine_margin", "angular_margin", "target_score")
    defaults = {"cosine_margin": 0.0, "angular_margin": 0.0, "ignore_index": -100}
    head, kept = make_head(*(part.get(name, defaults.get(name)) for name in names))
    outputs = ops.row_statistics(*head, True, kept)
    outputs = dict(zip(("others", "cosine", "sum", "rank"), outputs, strict=True))
    if not upstream:
        return outputs, {}
    chosen = [outputs[name] for name in upstream]
    gradients = torch.autograd.grad(chosen, list(leaves.values()), list(upstream.values()))
    return outputs, dict(zip(leaves, gradients, strict=True))


# The angle of a row that lies near its class is small; with these it stays below pi, or crosses it.
MARGINS = {
    "none": {},
    "cosface": {"cosine_margin": 0.35},
    "arcface": {"angular_margin": 0.5},
    "both": {"cosine_margin": 0.2, "angular_margin": 0.3},
    "ldam": {"cosine_margin": "[C]"},
    "angle per class": {"angular_margin": "[C]"},
    "both per class": {"cosine_margin": "[C]", "angular_margin": "[C]"},
    "across pi": {"angular_margin": 2.5},
    "pi": {"angular_margin": math.pi},
}


def with_margins(problem, margins):
    C = len(problem["linear_weight"])
    spread = torch.linspace(0, 0.3, C, dtype=problem["linear_weight"].dtype)
    return problem | {k: spread if v == "[C]" else v for k, v in margins.items()}


def easy_problem(loss, margins, kappa=4.0, **options):
    """Rows near their class, with the scale that gives this mean loss, or the nearest to it."""
    problem = make_problem(32, 20, 64, kappa=kappa, **options)
    noise = torch.randn(32, 64, generator=torch.Generator().manual_seed(7))
    problem["input"] = problem["linear_weight"][problem["target"]] + 0.05 * noise
    problem = with_margins(problem, margins)
    exact, low, high = to_dtype(problem, torch.float64), 1.0, 600.0
    for _ in range(12):
        middle = (low + high) / 2
        small = reference.tvmf_cross_entropy(**exact | {"scale": middle}) < loss
        low, high = (low, middle) if small else (middle, high)
    return problem | {"scale": torch.tensor(high)}


def from_statistics(**problem):
    statistics = row_statistics(**statistics_arguments(problem))
    options = {k: problem[k] for k in ("weight", "label_smoothing", "reduction") if k in problem}
    classes = len(problem["linear_weight"])
    return loss_of_statistics(statistics, problem["target"], num_classes=classes, **options)


FUNCTIONS = pytest.mark.parametrize("function", [tvmf_cross_entropy, from_statistics])


@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("loss", [1e-4, 1e-8, 1e-15, 1e-22, 1e-30])
@FUNCTIONS
def test_easy_rows_keep_their_digits(function, loss, margins):
    """`lse - target` would be off by 100 % at the third of these losses."""
    problem = easy_problem(loss, margins)
    exact_loss, exact = evaluate(
        reference.tvmf_cross_entropy, to_dtype(problem, torch.float64), [torch.ones(())]
    )
    if max(margins.values(), default=0, key=str) not in (2.5, math.pi):
        assert loss / 4 < exact_loss["loss"] < loss * 4
    outputs, gradients = evaluate(function, problem, [torch.ones(())])
    assert error(outputs["loss"], exact_loss["loss"]) <= 1e-4
    for name in ("input", "linear_weight", "scale"):
        assert error(gradients[name], exact[name]) <= 1e-4, name


@pytest.mark.parametrize("kappa", [0.0, 16.0, "[C]"])
@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
def test_margins_with_all_other_options(operator, margins, kappa):
    problem = make_problem(
        37,
        70,
        12,
        kappa=kappa,
        scale="softplus",
        bias=True,
        prior=True,
        class_weight=True,
        ignored=0.2,
        label_smoothing=0.1,
    )
    check(operator, with_margins(problem, margins))


@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS)
@FUNCTIONS
def test_margins_pass_gradcheck(function, margins):
    problem = make_problem(
        5,
        6,
        4,
        dtype=torch.float64,
        kappa="[C]",
        scale="softplus",
        bias=True,
        prior=True,
        class_weight=True,
        label_smoothing=0.2,
        reduction="none",
    )
    problem = with_margins(problem, margins)
    _, leaves = leaves_of(problem)

    def loss(input, linear_weight, kappa, s, linear_bias):
        new = {"input": input, "linear_weight": linear_weight, "kappa": kappa}
        new |= {"scale": SoftplusScale(s), "linear_bias": linear_bias}
        return function(**problem | new)

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


def test_margins_are_those_of_cosface_and_arcface():
    """The papers' formulas, with arccos and plain softmax cross-entropy."""
    problem = make_problem(20, 30, 16, dtype=torch.float64, kappa=0.0, scale=10.0)
    cosine = F.normalize(problem["input"]) @ F.normalize(problem["linear_weight"]).T
    rows, y = torch.arange(20), problem["target"]
    for margins, moved in (
        ({"cosine_margin": 0.35}, cosine - 0.35),
        ({"angular_margin": 0.5}, (cosine.arccos() + 0.5).cos()),
    ):
        logits = cosine.index_put((rows, y), moved[rows, y]) * 10
        expected = F.cross_entropy(logits, y)
        torch.testing.assert_close(tvmf_cross_entropy(**problem, **margins), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS)
@FUNCTIONS
def test_parallel_and_opposed_rows_are_finite(function, margins, sign, dtype):
    problem = make_problem(12, 20, 32, dtype=dtype, kappa=1.0, scale=30.0)
    problem["input"] = sign * 2 * problem["linear_weight"][problem["target"]]
    outputs, gradients = evaluate(function, with_margins(problem, margins))
    assert all(t.isfinite().all() for t in (*outputs.values(), *gradients.values()))


def test_the_target_falls_as_the_angle_grows_across_pi():
    angle = torch.linspace(0, math.pi, 400, dtype=torch.float64)
    input = torch.stack([angle.cos(), angle.sin()], 1)
    weight = torch.eye(2, dtype=torch.float64)
    label = torch.zeros(400, dtype=torch.int64)
    for a in (0.5, 2.0, math.pi):
        target = row_statistics(input, weight, label, kappa=0.0, angular_margin=a).target
        steps = target.diff()
        assert (steps < 0).all() and (steps.abs() < 0.01).all()


def test_statistics_have_the_margins_in_the_target_alone():
    problem = make_problem(20, 30, 16, kappa=3.0, scale=5.0, ignored=0.3)
    plain = row_statistics(**problem)
    moved = row_statistics(**problem, cosine_margin=0.2)
    for name in ("others", "cosine", "sum", "rank"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    named = problem["target"] >= 0
    assert (moved.target < plain.target)[named].all()
    logits = tvmf_ext.tvmf_logits(problem["input"], problem["linear_weight"], kappa=3.0, scale=5.0)
    torch.testing.assert_close(plain.lse, logits.logsumexp(1))
    with_target = torch.logaddexp(moved.others, moved.target)
    assert torch.equal(moved.lse, torch.where(named, with_target, moved.others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_kappa_zero_a_logit_is_the_scaled_cosine(dtype):
    input = torch.randn(9, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    cosine = F.normalize(input) @ F.normalize(weight).T
    logits = tvmf_ext.tvmf_logits(input, weight, kappa=0.0, scale=64.0)
    assert torch.equal(logits, 64 * cosine)
    statistics = row_statistics(input, weight, torch.arange(9) % 7, kappa=0.0, scale=64.0)
    assert torch.equal(statistics.target, 64 * statistics.cosine)


def test_the_gradient_of_the_scale_keeps_its_digits_where_it_cancels():
    """All scores of a row are about equal, so that it is a small difference of large sums."""
    problem = make_problem(64, 400, 8, kappa=0.0, scale=torch.tensor(0.05), label_smoothing=0.3)
    problem["input"] = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    problem["linear_weight"][:] = problem["linear_weight"][:1]
    problem["linear_weight"] += 1e-3 * torch.randn(
        400, 8, generator=torch.Generator().manual_seed(6)
    )
    _, gradients = evaluate(tvmf_cross_entropy, problem, [torch.ones(())])
    exact = to_dtype(problem, torch.float64)
    _, wanted = evaluate(reference.tvmf_cross_entropy, exact, [torch.ones(())])
    assert error(gradients["scale"], wanted["scale"]) <= 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cosine_margin": -0.1}, "cosine_margin must be finite and >= 0, got -0.1"),
        ({"cosine_margin": math.inf}, "cosine_margin must be finite and >= 0, got inf"),
        ({"angular_margin": 3.2}, r"angular_margin must be in \[0, pi\], got 3.2"),
        ({"cosine_margin": torch.tensor(-1.0)}, "cosine_margin must be finite and >= 0, got -1"),
        ({"kappa": -0.45, "cosine_margin": 0.5}, "kappa must be > -0.4 with these margins"),
        (
            {"kappa": torch.tensor(-0.45), "cosine_margin": torch.full((5,), 0.5)},
            "kappa must be > -0.4 with these margins",
        ),
        ({"cosine_margin": torch.zeros(3)}, r"cosine_margin must have shape .* \[5\], got \[3\]"),
    ],
)
def test_margins_that_are_refused(arguments, message):
    input, weight, target = torch.ones(4, 3), torch.ones(5, 3), torch.arange(4)
    for function in (tvmf_cross_entropy, row_statistics):
        with pytest.raises(ValueError, match=message):
            function(input, weight, target, **arguments)


@pytest.mark.parametrize("margin", [0.2, torch.linspace(0, 0.3, 5)], ids=["float", "[C]"])
def test_a_head_has_margins(margin):
    torch.manual_seed(0)
    head = TvMFLoss(3, 5, kappa=2.0, cosine_margin=margin, angular_margin=0.1)
    input, target = torch.randn(6, 3), torch.arange(6) % 5
    margins = {"cosine_margin": margin, "angular_margin": 0.1}
    expected = tvmf_cross_entropy(
        input, head.weight, target, kappa=2.0, scale=SoftplusScale(head.s_), **margins
    )
    assert torch.equal(head(input, target), expected)
    torch.testing.assert_close(head.loss(head.row_statistics(input, target), target), expected)
    assert head.state_dict().keys() == TvMFLoss(3, 5).state_dict().keys()
    assert "cosine_margin" in repr(head) and "angular_margin=0.1" in repr(head)
    with pytest.raises(ValueError, match=r"kappa must be > -0\.4 with these margins"):
        TvMFLoss(3, 5, kappa=-0.45, cosine_margin=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [[9], [4, 1, 4], [1] * 9], ids=str)
def test_shards_of_the_classes_give_what_all_give(sizes, dtype):
    options = {"kappa": "[C]", "scale": "softplus", "bias": True, "prior": True}
    options |= {"class_weight": True}
    problem = make_problem(20, 9, 17, dtype=dtype, ignored=0.2, **options)
    check_shards(problem, sizes, step_of_shard)


def test_a_loss_needs_all_classes():
    part = next(shards_of(make_problem(4, 5, 3), [2, 3]))
    tensors = (part["input"], part["linear_weight"], part["target"])
    absent = (None, None, None)  # bias, prior and class weights
    head, kept = make_head(*tensors, 16.0, 1.0, *absent, -1, 0.0, 0.0, part["target_score"])
    with pytest.raises(ValueError, match="target_score must be None for a loss"):
        ops.cross_entropy(*head, 0.0, 1, kept)
