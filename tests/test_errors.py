"""Bad input is refused before anything runs, and the message says what was got and is wanted."""

import math
import re

import numpy as np
import pytest
import torch

from tests.problem import evaluate, leaves_of, make_problem, statistics_arguments
from tvmf_ext import (
    TvMFLoss,
    loss_of_statistics,
    ops,
    row_statistics,
    tvmf_cross_entropy,
    tvmf_logits,
)

N, C, D = 4, 5, 3
NEITHER = "float16, bfloat16, float32 or float64"


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


REFUSED = {
    "input rank 1": ({"input": zeros(D)}, "input must have shape [N, D], got [3]"),
    "input rank 3": ({"input": zeros(2, 2, D)}, "input must have shape [N, D], got [2, 2, 3]"),
    "weight rank": ({"linear_weight": zeros(D)}, "linear_weight must have shape [C, D], got [3]"),
    "target rank": (
        {"target": zeros(N, 1, dtype=torch.int64)},
        "target must have shape [N], got [4, 1]",
    ),
    "target 0-d": (
        {"input": zeros(1, D), "target": torch.tensor(1)},
        "target must have shape [N], got []",
    ),
    "D": ({"input": zeros(N, 7)}, "must agree in D, got [4, 7] and [5, 3]"),
    "N": ({"input": zeros(6, D)}, "must agree in N, got [6, 3] and [4]"),
    "no features": (
        {"input": zeros(N, 0), "linear_weight": zeros(C, 0)},
        "input must have at least one feature, got [4, 0]",
    ),
    "no classes": (
        {"linear_weight": zeros(0, D)},
        "linear_weight must have at least one class, got [0, 3]",
    ),
    "no rows and no classes": (
        {
            "input": zeros(0, D),
            "target": zeros(0, dtype=torch.int64),
            "linear_weight": zeros(0, D),
        },
        "linear_weight must have at least one class, got [0, 3]",
    ),
    "input dtype": (
        {"input": zeros(N, D, dtype=torch.int64)},
        f"input must be {NEITHER}, got int64",
    ),
    "weight dtype": (
        {"linear_weight": zeros(C, D, dtype=torch.complex64)},
        f"linear_weight must be {NEITHER}, got ComplexFloat",
    ),
    "target int32": ({"target": zeros(N, dtype=torch.int32)}, "target must be int64, got int32"),
    "target float": ({"target": zeros(N)}, "target must be int64, got float32"),
    "kappa -1/2": ({"kappa": -0.5}, "kappa must be<> > -1/2, got -0.5"),
    "kappa below": ({"kappa": -3}, "kappa must be<> > -1/2, got -3"),
    "kappa NaN": ({"kappa": math.nan}, "kappa must be<> > -1/2, got nan"),
    "kappa infinite": ({"kappa": math.inf}, "kappa must be<> > -1/2, got inf"),
    "kappa tensor": ({"kappa": torch.tensor(-0.5)}, "kappa must be<> > -1/2, got -0.5"),
    "kappa tensor [1]": ({"kappa": torch.tensor([-0.75])}, "kappa must be<> > -1/2, got -0.75"),
    "one kappa of [C]": (
        {"kappa": torch.tensor([1.0, 2.0, 3.0, -0.625, 4.0])},
        r"kappa must be<> > -1/2, got -0.625<> for class 3",
    ),
    "kappa shape": ({"kappa": zeros(4)}, "kappa must have shape [], [1] or [C] = [5], got [4]"),
    "kappa rank": (
        {"kappa": zeros(C, 1)},
        "kappa must have shape [], [1] or [C] = [5], got [5, 1]",
    ),
    "kappa dtype": ({"kappa": torch.tensor(16)}, f"kappa must be {NEITHER}, got int64"),
    "scale 0": ({"scale": 0.0}, "scale must be<> > 0, got 0"),
    "scale below": ({"scale": -1}, "scale must be<> > 0, got -1"),
    "scale NaN": ({"scale": math.nan}, "scale must be<> > 0, got nan"),
    "scale infinite": ({"scale": math.inf}, "scale must be<> > 0, got inf"),
    "scale tensor": ({"scale": torch.tensor(0.0)}, "scale must be<> > 0, got 0"),
    "scale tensor [1]": ({"scale": torch.tensor([-2.0])}, "scale must be<> > 0, got -2"),
    "scale shape": ({"scale": torch.ones(C)}, "scale must have shape [] or [1], got [5]"),
    "scale rank": ({"scale": torch.ones(1, 1)}, "scale must have shape [] or [1], got [1, 1]"),
    "scale dtype": ({"scale": torch.tensor(2)}, f"scale must be {NEITHER}, got int64"),
    "bias shape": ({"linear_bias": zeros(1)}, "linear_bias must have shape [C] = [5], got [1]"),
    "bias rank": ({"linear_bias": zeros(())}, "linear_bias must have shape [C] = [5], got []"),
    "prior shape": ({"prior": zeros(6)}, "prior must have shape [C] = [5], got [6]"),
    "class weight shape": ({"weight": zeros(4)}, "weight must have shape [C] = [5], got [4]"),
    "class weight rank": ({"weight": zeros(C, 1)}, "weight must have shape [C] = [5], got [5, 1]"),
    "class weight dtype": (
        {"weight": zeros(C, dtype=torch.int64)},
        f"weight must be {NEITHER}, got int64",
    ),
    "class weight with a gradient": (
        {"weight": torch.ones(C, requires_grad=True)},
        "weight must not require grad",
    ),
    "prior with a gradient": (
        {"prior": torch.ones(C, requires_grad=True)},
        "prior must not require grad",
    ),
}


def pattern(message):
    """A regular expression for the message, in which <> stands for any text."""
    return ".*".join(map(re.escape, message.split("<>")))


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
def test_bad_arguments_are_refused_with_got_and_wanted(operator, case):
    arguments, message = REFUSED[case]
    problem = statistics_arguments(make_problem(N, C, D))
    with pytest.raises(ValueError, match=pattern(message)):
        operator(**problem | arguments)


@pytest.mark.parametrize("label", [5, 1000, -1, -99, 2**40])
@pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
def test_a_label_out_of_range_is_named_with_its_row_and_the_range(operator, label):
    problem = statistics_arguments(make_problem(N, C, D))
    problem["target"][2] = label
    message = rf"target\[2\] is {label}, wanted a class in \[0, 5\).*ignore_index -100"
    with pytest.raises(IndexError, match=message):
        operator(**problem)
    operator(**problem, ignore_index=label)


@pytest.mark.parametrize("reduction", ["avg", "", None, "Mean"])
def test_an_unknown_reduction_is_refused(reduction):
    problem = statistics_arguments(make_problem(N, C, D))
    message = f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}"
    with pytest.raises(ValueError, match=message):
        tvmf_cross_entropy(**problem, reduction=reduction)
    statistics = row_statistics(**problem)
    with pytest.raises(ValueError, match=message):
        loss_of_statistics(statistics, problem["target"], num_classes=C, reduction=reduction)
    with pytest.raises(ValueError, match=message):
        TvMFLoss(D, C, reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, math.nan])
def test_label_smoothing_outside_0_to_1_is_refused(label_smoothing):
    problem = statistics_arguments(make_problem(N, C, D))
    message = r"label_smoothing must be in \[0, 1\], got "
    with pytest.raises(ValueError, match=message):
        tvmf_cross_entropy(**problem, label_smoothing=label_smoothing)
    with pytest.raises(ValueError, match=message):
        TvMFLoss(D, C, label_smoothing=label_smoothing)
    statistics = row_statistics(**problem)
    with pytest.raises(ValueError, match=message):
        loss_of_statistics(
            statistics, problem["target"], num_classes=C, label_smoothing=label_smoothing
        )


@pytest.mark.parametrize(
    "name", ["linear_weight", "target", "kappa", "scale", "linear_bias", "prior", "weight"]
)
@pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
def test_tensors_on_two_devices_are_refused(operator, name):
    """A meta tensor has a device and no data, so that a result made with one would be garbage."""
    problem = make_problem(
        N, C, D, kappa="[C]", scale="[]", bias=True, prior=True, class_weight=True
    )
    problem[name] = problem[name].to("meta")
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"device|meta"):
        operator(**problem)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features and num_classes must be at least 1, got 0, 5"),
        ({"num_classes": 0}, "in_features and num_classes must be at least 1, got 3, 0"),
        ({"kappa": -0.5}, "kappa must be<> > -1/2, got -0.5"),
        ({"kappa": torch.tensor([0.0, 1, 2, 3, -1])}, "kappa must be<> > -1/2, got -1"),
        ({"kappa": zeros(4)}, "kappa must have 1 or C = 5 values, got 4"),
        ({"weight": zeros(3)}, "weight must have shape [C] = [5], got [3]"),
        ({"prior": zeros(5, 1)}, "prior must have shape [C] = [5], got [5, 1]"),
    ],
)
def test_a_head_refuses_bad_arguments_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=pattern(message)):
        TvMFLoss(**{"in_features": D, "num_classes": C} | arguments)


def test_logits_of_mismatched_features_are_refused():
    with pytest.raises((ValueError, RuntimeError), match=r"[34]"):
        tvmf_logits(zeros(N, D), zeros(C, D + 1))


def test_second_derivatives_are_refused_by_name():
    problem, leaves = leaves_of(make_problem(N, C, D, kappa="[]"))
    for output in (
        tvmf_cross_entropy(**problem),
        row_statistics(**statistics_arguments(problem)).lse.sum(),
    ):
        (gradient, *_) = torch.autograd.grad(output, list(leaves.values()), create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiable once.*tvmf_ext\.reference"):
            gradient.square().sum().backward()


def test_arguments_changed_between_the_passes_are_refused():
    for name in ("input", "linear_weight", "target", "kappa", "scale", "linear_bias"):
        problem, leaves = leaves_of(make_problem(N, C, D, kappa="[C]", scale="[]", bias=True))
        loss = tvmf_cross_entropy(**problem)
        with torch.no_grad():
            problem[name].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, list(leaves.values()))


def test_a_refused_call_leaves_the_next_one_unharmed():
    problem = make_problem(N, C, D)
    expected = evaluate(tvmf_cross_entropy, problem)[0]["loss"]
    with pytest.raises(IndexError):
        tvmf_cross_entropy(**problem | {"target": torch.full((N,), C)})
    assert torch.equal(evaluate(tvmf_cross_entropy, problem)[0]["loss"], expected)


SHARED = ("input", "linear_weight", "kappa", "scale", "linear_bias", "prior")  # with the logits


@pytest.mark.parametrize("name", [*SHARED, "target", "weight", "ignore_index", "label_smoothing"])
def test_an_argument_of_another_type_is_refused_by_name_and_type(name):
    problem = {"input": zeros(N, D), "linear_weight": zeros(C, D), "target": torch.arange(N) % C}
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got list$"):
        tvmf_cross_entropy(**(problem | {name: [1.0]}))
    if name in SHARED:
        del problem["target"]
        with pytest.raises(TypeError, match=rf"^{name} must be .*, got list$"):
            tvmf_logits(**(problem | {name: [1.0]}))
    if name in ("weight", "prior"):
        with pytest.raises(TypeError, match=rf"^{name} must be .*, got dict$"):
            TvMFLoss(D, C, **{name: {}})
    if name == "label_smoothing":
        with pytest.raises(TypeError, match=rf"^{name} must be .*, got list$"):
            TvMFLoss(D, C, label_smoothing=[1.0])


def test_a_fraction_is_no_ignore_index():
    problem = make_problem(N, C, D)
    with pytest.raises(TypeError, match=r"^ignore_index must be an int, got float$"):
        tvmf_cross_entropy(**problem | {"ignore_index": 1.5})


def test_numpys_numbers_are_numbers():
    problem = make_problem(N, C, D)
    options = {"kappa": 4, "scale": 8, "label_smoothing": 0.5, "ignore_index": 1}
    kinds = {"ignore_index": np.int64}
    numpys = {name: kinds.get(name, np.float32)(value) for name, value in options.items()}
    expected = tvmf_cross_entropy(**problem | options)
    assert torch.equal(tvmf_cross_entropy(**problem | numpys), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": torch.inf}, "kappa must be finite and > -1/2, got inf"),
        ({"kappa": torch.ones(5, requires_grad=True)}, "kappa must not require grad"),
        ({"weight": torch.ones(5, dtype=torch.int64)}, "weight must have a floating-point dtype"),
        ({"prior": torch.ones(5, requires_grad=True)}, "prior must not require grad"),
    ],
)
def test_a_head_refuses_what_its_function_would_refuse_later(arguments, message):
    with pytest.raises(ValueError, match=message):
        TvMFLoss(3, 5, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": -1.0}, "kappa must be finite and > -1/2, got -1.0"),
        ({"kappa": math.inf}, "kappa must be finite and > -1/2, got inf"),
        ({"scale": -1.0}, "scale must be finite and > 0, got -1.0"),
        ({"scale": math.inf}, "scale must be finite and > 0, got inf"),
        ({"kappa": zeros(N, 1)}, "kappa must have shape .* got"),
        ({"linear_bias": zeros(N, 1)}, "linear_bias must have shape .* got"),
        ({"input": zeros(N, D, 1)}, "input must have shape .* got"),
        ({"input": zeros(N, D, dtype=torch.int64)}, "input must be float16.* got torch.int64"),
        ({"input": zeros(N, D, dtype=torch.float8_e4m3fn)}, "input must be float16.* got"),
    ],
)
def test_logits_refuse_what_the_loss_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tvmf_logits(**({"input": zeros(N, D), "linear_weight": zeros(C, D)} | arguments))


def operator_call(name, **changed):
    """Calls an operator or its backward operator as autograd does, but for what is changed."""
    g = torch.Generator().manual_seed(0)
    input, weight = torch.randn(N, D, generator=g), torch.randn(C, D, generator=g)
    numbers = {"kappa_value": 16.0, "scale_value": 8.0, "ignore_index": -100}
    numbers |= {"softplus_scale": False, "allow_tf32": False}
    numbers |= {"cosine_margin_value": 0.0, "angular_margin_value": 0.0}
    tensors = {"input": input, "weight": weight, "target": torch.arange(N) % C}
    head = ops.Head(**dict.fromkeys(ops.Head._fields) | tensors | numbers)
    options = {"label_smoothing": 0.1, "reduction": 1} if "cross" in name else {"with_sum": True}
    options |= {"kept": 0}
    forward = getattr(torch.ops.tvmf_ext, name.removesuffix("_backward"))
    *_, saved = forward(*head, *options.values())
    if not name.endswith("_backward"):
        return forward(*head, *(options | changed).values())
    options.pop("with_sum", None)
    options |= {"saved": saved, "wanted": 3} | changed
    gradients = [torch.ones(())] if "cross" in name else [torch.ones(N)] * 3
    return getattr(torch.ops.tvmf_ext, name)(*gradients, *head, *options.values())


EACH_OPERATOR = pytest.mark.parametrize(
    "name",
    ["row_statistics", "row_statistics_backward", "cross_entropy", "cross_entropy_backward"],
)


@EACH_OPERATOR
@pytest.mark.parametrize("kept", [-16, -8, 3, 8, 24, 32, 2**40])
def test_the_operators_refuse_a_wrong_number_of_kept_classes(name, kept):
    with pytest.raises(ValueError, match=rf"^kept must be a multiple of 16 .* got {kept}$"):
        operator_call(name, kept=kept)


@pytest.mark.parametrize("name", ["row_statistics_backward", "cross_entropy_backward"])
def test_the_operators_refuse_to_make_gradients_of_absent_tensors(name):
    for wanted, absent in ((4, "kappa"), (8, "scale"), (16, "bias"), (31, "kappa")):
        with pytest.raises(ValueError, match=rf"gradient of {absent}, which is absent"):
            operator_call(name, wanted=wanted)
    for wanted in (-1, 32, 2**40):
        with pytest.raises(ValueError, match=rf"^wanted must be five bits, got {wanted}$"):
            operator_call(name, wanted=wanted)
    assert [g.numel() > 0 for g in operator_call(name)] == [True, True, False, False, False]


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_backward"])
@pytest.mark.parametrize("reduction", [-1, 3, 7])
def test_the_operators_refuse_an_unknown_reduction(name, reduction):
    with pytest.raises(ValueError, match=rf"^reduction must be 0 .* got {reduction}$"):
        operator_call(name, reduction=reduction)


def test_a_saved_buffer_of_two_dimensions_is_refused():
    """Its number of elements may be right while most of them lie outside its memory."""
    N, C = 3, 5
    size = (5 * N + C + 15) // 16 * 16
    saved = torch.zeros(2).as_strided((2, size // 2), (1, 0))
    head = ops.Head(
        **dict.fromkeys(ops.Head._fields)
        | {"input": torch.ones(N, 4), "weight": torch.ones(C, 4), "target": torch.arange(N)}
        | {"kappa_value": 16.0, "scale_value": 8.0, "ignore_index": -100}
        | {"cosine_margin_value": 0.0, "angular_margin_value": 0.0}
        | {"softplus_scale": False, "allow_tf32": False}
    )
    with pytest.raises(ValueError, match=r"^saved must be what the forward pass returned, \[32\]"):
        torch.ops.tvmf_ext.cross_entropy_backward(torch.ones(()), *head, 0.0, 1, 0, saved, 3)


@pytest.mark.parametrize(("C", "D"), [(0, 8), (-5, 8), (5, 0), (5, -8)])
def test_the_question_of_kept_products_has_sizes(C, D):
    message = rf"^C and D must be at least 1, got {C}, {D}$"
    with pytest.raises(ValueError, match=message):
        torch.ops.tvmf_ext.kept_products(C, D, "float16", "float32", 8, 1, True, "H200")
