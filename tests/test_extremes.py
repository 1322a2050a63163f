"""Extreme values: easy and opposed rows, extreme kappa and norms, ignored rows, infinity, NaN."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.problem import (
    assert_same_bits,
    check,
    check_rank,
    error,
    evaluate,
    make_problem,
    statistics_arguments,
    to_dtype,
)
from tvmf_ext import (
    loss_of_statistics,
    reference,
    row_statistics,
    tvmf_cross_entropy,
)

OPERATORS = pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])


@pytest.mark.parametrize("D", [64, 256])
@pytest.mark.parametrize(("scale", "near"), [(8.0, 3.0), (8.0, 10.0), (16.0, 3.0), (64.0, 1.0)])
def test_rows_that_are_easy_have_gradients_as_exact_as_eagers(D, scale, near):
    """p_y - 1 is a difference of nearly equal numbers, so that both passes must round the logit
    in the same way."""
    problem = make_problem(64, 500, D, scale=scale)
    noise = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    problem["input"] = near * problem["linear_weight"][problem["target"]] + noise
    check(tvmf_cross_entropy, problem)


@pytest.mark.parametrize("kappa", [0.0, 16.0, -0.49, 1e4])
@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("sign", [1, -1], ids=["parallel", "opposed"])
@OPERATORS
def test_vectors_parallel_and_opposed_at_any_kappa(operator, kappa, scale, sign):
    problem = make_problem(24, 700, 16, kappa=kappa, scale=scale, bias=True)
    noise = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    near = problem["linear_weight"][problem["target"]] + 0.3 * noise
    check(operator, problem | {"input": sign * near})


def test_a_row_that_is_its_class_vector_scores_one():
    problem = make_problem(30, 40, 100, kappa=1e4, scale=64.0)
    problem["input"] = 3 * problem["linear_weight"][problem["target"]]
    exact = reference.row_statistics(**to_dtype(problem, torch.float64))
    statistics = row_statistics(**problem)
    assert (statistics.target <= 64).all()
    # The bound is a rounding of the cosine, times phi' = 1 + 2 kappa and the scale.
    assert (statistics.target - exact.target).abs().max() <= 4 * 6e-8 * 2e4 * 64
    opposed = row_statistics(**problem | {"input": -problem["input"]})
    assert (opposed.target >= -64).all()


@OPERATORS
def test_zero_rows_of_features_and_weight(operator):
    """A zero row is divided by eps, as in `F.normalize`, and its gradient alone is large."""
    problem = make_problem(12, 40, 20, kappa="[C]", scale="[]", bias=True)
    problem["input"][3] = 0
    problem["linear_weight"][5] = 0
    problem["linear_weight"][problem["target"][7]] = 0
    check(operator, problem, rows=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@OPERATORS
def test_norms_from_1e_minus_20_to_1e15_row_by_row(operator, dtype):
    problem = make_problem(30, 60, 20, dtype=dtype, scale="[]")
    # With 5e-14 the norms are just below eps, where a gradient has no projection although the
    # cosines are not small.
    powers = torch.tensor([1e-20, 5e-14, 1e-10, 1.0, 1e10, 1e15])
    problem["input"] *= powers.repeat(5)[:, None].to(dtype)
    problem["linear_weight"] *= powers.repeat(10)[:, None].to(dtype)
    if operator is tvmf_cross_entropy:
        problem["reduction"] = "none"
    check(operator, problem, rows=True)


def test_float16_features_whose_square_is_beyond_float16():
    problem = make_problem(20, 30, 64, dtype=torch.float16, weight_dtype=torch.float32)
    problem["input"] *= 2000
    check(tvmf_cross_entropy, problem, [torch.tensor(1e4)])


@OPERATORS
def test_duplicated_rows_have_the_same_statistics_and_gradients(operator):
    problem = make_problem(20, 48, 24, kappa="[]", bias=True, scale="[1]")
    for name in ("input", "target"):
        problem[name][10:] = problem[name][:10]
    for name in ("linear_weight", "linear_bias"):
        problem[name][24:] = problem[name][:24]
    check(operator, problem)
    check_rank(problem)
    statistics = row_statistics(**problem)
    for values in statistics:
        torch.testing.assert_close(values[:10], values[10:], rtol=1e-6, atol=0)


def test_classes_of_the_same_vector_do_not_outrank_each_other():
    """The numbers are small integers, so that a product is exact in any order of summation."""
    problem = make_problem(50, 20, 33)
    problem["input"] = problem["input"].round()
    problem["linear_weight"] = problem["linear_weight"][:1].mul(4).round().repeat(20, 1)
    assert (row_statistics(**problem).rank == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows_as_in_cross_entropy(reduction, label_smoothing, dtype):
    problem = make_problem(
        0,
        7,
        5,
        dtype=dtype,
        kappa="[C]",
        scale="[1]",
        bias=True,
        prior=True,
        class_weight=True,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    outputs, gradients = evaluate(tvmf_cross_entropy, problem)
    expected = reference.tvmf_cross_entropy(**problem).float()
    torch.testing.assert_close(outputs["loss"], expected, rtol=0, atol=0, equal_nan=True)
    for name, gradient in gradients.items():
        assert gradient.shape == problem[name].shape
        assert gradient.dtype == problem[name].dtype
        assert not gradient.any()


def test_statistics_of_no_rows_are_empty_with_zero_gradients():
    problem = make_problem(0, 7, 5, kappa="[C]", scale="[1]", bias=True)
    outputs, gradients = evaluate(row_statistics, problem)
    assert all(t.shape == (0,) for t in outputs.values())
    assert row_statistics(**problem).rank.shape == (0,)
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("class_weight", [False, True])
def test_all_rows_ignored_as_in_cross_entropy(class_weight, label_smoothing):
    problem = make_problem(
        6,
        7,
        5,
        kappa="[C]",
        scale="[]",
        bias=True,
        class_weight=class_weight,
        ignored=1.0,
        label_smoothing=label_smoothing,
    )
    for reduction, loss in (("mean", math.nan), ("sum", 0.0), ("none", torch.zeros(6))):
        problem["reduction"] = reduction
        outputs, gradients = evaluate(tvmf_cross_entropy, problem)
        expected = torch.as_tensor(loss)
        torch.testing.assert_close(outputs["loss"], expected, rtol=0, atol=0, equal_nan=True)
        _, plain = evaluate(reference.tvmf_cross_entropy, problem)
        assert_same_bits([gradients], [plain])


def test_class_weights_of_zero_as_in_cross_entropy():
    problem = make_problem(9, 5, 8, label_smoothing=0.2)
    problem["weight"] = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5])
    check(tvmf_cross_entropy, problem)
    problem["target"] = torch.full((9,), 2)
    for function in (tvmf_cross_entropy, reference.tvmf_cross_entropy):
        assert not function(**problem).isfinite()
        assert function(**problem | {"label_smoothing": 0.0}).isnan()


def test_ignored_rows_have_neither_target_nor_rank_nor_gradient():
    problem = make_problem(30, 600, 20, kappa="[]", ignored=0.4)
    ignored = problem["target"] == -100
    statistics = row_statistics(**problem)
    assert (statistics.rank[ignored] == -1).all()
    assert (statistics.rank[~ignored] >= 0).all()
    assert (statistics.target[ignored] == 0).all()
    _, gradients = evaluate(tvmf_cross_entropy, problem)
    assert (gradients["input"][ignored] == 0).all()
    kept = {k: problem[k][~ignored] for k in ("input", "target")}
    _, without = evaluate(tvmf_cross_entropy, problem | kept)
    for name in ("linear_weight", "kappa"):
        assert error(gradients[name], without[name]) <= 2e-6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_a_nan_or_infinite_feature_spoils_its_row_alone(value, label_smoothing):
    problem = make_problem(
        40, 700, 20, bias=True, reduction="none", label_smoothing=label_smoothing
    )
    clean = tvmf_cross_entropy(**problem)
    problem["input"][17, 3] = value
    loss = tvmf_cross_entropy(**problem)
    others = torch.arange(40) != 17
    assert loss[17].isnan()
    assert torch.equal(loss[others], clean[others])
    assert tvmf_cross_entropy(**problem | {"reduction": "mean"}).isnan()
    _, gradients = evaluate(tvmf_cross_entropy, problem)
    assert gradients["input"][17].isnan().any()
    assert gradients["input"][others].isfinite().all()
    assert gradients["linear_weight"].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_or_infinite_weight_spoils_every_loss(value):
    problem = make_problem(10, 600, 20, reduction="none")
    problem["linear_weight"][555, 2] = value
    assert tvmf_cross_entropy(**problem).isnan().all()
    assert reference.tvmf_cross_entropy(**problem).isnan().all()


def test_a_nan_row_is_an_error_in_the_ranks():
    problem = make_problem(8, 600, 20, kappa=0.0)
    rank = row_statistics(**problem).rank
    problem["input"][2] = math.nan
    problem["input"][5] = math.inf
    spoilt = row_statistics(**problem).rank
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    assert (spoilt[[2, 5]] == 599).all()
    assert torch.equal(spoilt[others], rank[others])


def test_a_nan_row_that_is_ignored_does_not_reach_the_loss():
    problem = make_problem(9, 30, 8, label_smoothing=0.1)
    problem["target"][4] = -100
    expected = tvmf_cross_entropy(**problem)
    problem["input"][4] = math.nan
    assert torch.equal(tvmf_cross_entropy(**problem), expected)
    statistics = row_statistics(**statistics_arguments(problem))
    assert statistics.rank[4] == -1
    for reduction in ("mean", "sum"):
        loss = loss_of_statistics(
            statistics, problem["target"], num_classes=30, label_smoothing=0.1, reduction=reduction
        )
        assert loss.isfinite()


def test_classes_excluded_by_a_prior_of_minus_infinity():
    problem = make_problem(20, 600, 16, kappa="[C]", scale="[]", bias=True, prior=True)
    excluded = torch.arange(600) % 3 == 0
    problem["target"] = problem["target"] // 3 * 3 + 1
    problem["prior"][excluded] = -math.inf
    check(tvmf_cross_entropy, problem)
    _, gradients = evaluate(tvmf_cross_entropy, problem)
    assert not gradients["linear_weight"][excluded].any()
    problem["target"][2] = 0
    problem["reduction"] = "none"
    assert tvmf_cross_entropy(**problem)[2] == math.inf


def test_a_target_whose_bias_is_minus_infinity_ranks_below_the_finite_ones():
    problem = make_problem(10, 21, 8, bias=True)
    problem["linear_bias"][:4] = -math.inf
    problem["target"] %= 4
    assert (row_statistics(**problem).rank == 17).all()


def test_large_logits_neither_overflow_nor_underflow():
    problem = make_problem(16, 600, 8, kappa=0.0, scale=5000.0, reduction="none")
    loss = tvmf_cross_entropy(**problem)
    exact = F.cross_entropy(
        reference.tvmf_logits(
            problem["input"].double(), problem["linear_weight"].double(), kappa=0.0, scale=5000.0
        ),
        problem["target"],
        reduction="none",
    )
    assert loss.isfinite().all()
    assert error(loss, exact, 5000.0) <= 1e-6


@pytest.mark.parametrize("C", [5, 16, 300])
def test_classes_that_a_prior_rules_out_leave_no_trace(C):
    problem = make_problem(6, C, 20)
    rows = row_statistics(**problem, prior=torch.full((C,), -torch.inf))
    assert (rows.lse == -torch.inf).all()
    low = row_statistics(**problem, prior=torch.full((C,), -1e38))
    assert torch.equal(low.lse, torch.full((6,), -1e38))
    assert torch.equal(low.rank, row_statistics(**problem).rank)
    bias = row_statistics(**problem, linear_bias=torch.full((C,), -torch.inf))
    assert (bias.rank == 0).all()
