"""Seeded problems, their float64 oracle, and the error rule.

The rule: a fused result may be off from the oracle by twice the error of eager PyTorch in the same
compute dtype, plus a few roundings.
"""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F

import tvmf_ext
from tvmf_ext import reference
from tvmf_ext.head import SoftplusScale

DIFFERENTIABLE = ("input", "linear_weight", "kappa", "scale", "linear_bias")
LOGITS = ("input", "linear_weight", "kappa", "scale", "linear_bias", "prior")
# The few roundings: the error that is allowed where eager PyTorch happens to be exact.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(input):
    """The dtype in which the CPU multiplies: some CPUs have products of bfloat16."""
    pairs = tvmf_ext.build_info().cpu in ("avx512_bf16", "amx_bf16")
    if input.dtype == torch.bfloat16 and pairs and os.getenv("TVMF_CPU_PRODUCT") != "library":
        return torch.bfloat16
    return compute_dtype(input.dtype)


def make_problem(
    N,
    C,
    D,
    *,
    dtype=torch.float32,
    weight_dtype=None,
    kappa=16.0,
    scale=8.0,
    bias=False,
    prior=False,
    class_weight=False,
    ignored=0.0,
    seed=0,
    **options,
):
    """Random arguments of `tvmf_cross_entropy`; `kappa` and `scale` may be shapes such as `"[C]"`.

    Some features lie near their class, as in training, so that probabilities of all sizes occur.
    """
    g = torch.Generator().manual_seed(seed)
    weight_dtype = weight_dtype or dtype
    target = torch.randint(C, (N,), generator=g)
    weight = torch.randn(C, D, generator=g)
    input = torch.randn(N, D, generator=g) + 2 * torch.rand(N, 1, generator=g) * weight[target]
    target[torch.rand(N, generator=g) < ignored] = options.get("ignore_index", -100)
    shapes = {"[]": (), "[1]": (1,), "[C]": (C,)}
    if kappa in shapes:
        kappa = torch.rand(shapes[kappa], generator=g).mul(20).to(weight_dtype)
    if scale in shapes:
        scale = torch.rand(shapes[scale], generator=g).mul(8).add(4).to(weight_dtype)
    elif scale == "softplus":
        scale = SoftplusScale(torch.randn(1, generator=g).to(weight_dtype))
    problem = {
        "input": input.to(dtype),
        "linear_weight": weight.to(weight_dtype),
        "target": target,
        "kappa": kappa,
        "scale": scale,
        **options,
    }
    if bias:
        problem["linear_bias"] = torch.randn(C, generator=g).mul(0.3).to(weight_dtype)
    if prior:
        problem["prior"] = torch.rand(C, generator=g).add(0.01).log().to(weight_dtype)
    if class_weight:
        problem["weight"] = torch.rand(C, generator=g).add(0.1).to(weight_dtype)
    return problem


def shards_of(problem, sizes):
    """The head in shards of so many classes: for each its problem, with labels of its own, -1 for
    an ignored row, any other number for the class of another shard, and `target_score`, the score
    of every row's target."""
    C = len(problem["linear_weight"])
    target, ignored = problem["target"], problem["target"] == problem.get("ignore_index", -100)
    exact = to_dtype(problem, torch.float64)
    exact = {name: exact[name] for name in LOGITS if name in exact} | {"scale": 1, "prior": None}
    score = reference.tvmf_logits(**exact)
    score = score.gather(1, torch.where(ignored, 0, target)[:, None])[:, 0]
    score = score.detach().to(compute_dtype(problem["input"].dtype))
    begin = 0
    for size in sizes:
        part = {
            name: value[begin : begin + size]
            if torch.is_tensor(value) and name != "input" and value.shape[:1] == (C,)
            else value
            for name, value in problem.items()
            if name != "target"
        }
        own = torch.where(ignored, -1, torch.where(target < begin, size, target - begin))
        yield part | {"target": own, "ignore_index": -1, "target_score": score}
        begin += size


def check_shards(problem, sizes, step):
    """Checks that shards of the classes have the statistics and the gradients of all classes.

    `step(problem, upstream)` returns the outputs of `row_statistics` and the gradients, by name.
    """
    problem = statistics_arguments(problem)
    dtype, N = compute_dtype(problem["input"].dtype), len(problem["input"])
    upstream = {
        name: torch.randn(N, dtype=dtype, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(("others", "cosine", "sum"))
    }
    whole, gradients = step(problem, upstream)
    parts = list(shards_of(problem, sizes))
    outputs = [step(part, {})[0] for part in parts]
    others = torch.stack([each["others"] for each in outputs])
    merged = {name: sum(each[name] for each in outputs) for name in ("cosine", "sum")}
    merged["others"] = others.logsumexp(0)
    for name, value in merged.items():
        assert error(value, whole[name]) <= 10 * TOLERANCE[dtype], name
    rank = torch.stack([each["rank"] for each in outputs])
    ignored = problem["target"] == problem.get("ignore_index", -100)
    assert ((rank == -1) == ignored).all()
    check_rank(problem, torch.where(ignored, -1, rank.sum(0)))

    upstreams = [
        upstream | {"others": upstream["others"] * (own - merged["others"]).exp()} for own in others
    ]
    found = [step(*each)[1] for each in zip(parts, upstreams, strict=True)]
    for name, gradient in gradients.items():
        of_shards = [each[name] for each in found]
        per_class = gradient.shape[:1] == (sum(sizes),) and name != "input"
        value = torch.cat(of_shards) if per_class else sum(of_shards)
        size = 16 * torch.finfo(gradient.dtype).eps
        assert error(value, gradient) <= max(size, 10 * TOLERANCE[dtype]), name


def statistics_arguments(problem):
    """The arguments of `tvmf_cross_entropy` without those that `row_statistics` does not take."""
    return {k: v for k, v in problem.items() if k not in ("reduction", "label_smoothing")}


def to_dtype(problem, dtype):
    """The problem with every floating-point tensor in another dtype."""

    def convert(value):
        if isinstance(value, SoftplusScale):
            return SoftplusScale(value.s.to(dtype))
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return {name: convert(value) for name, value in problem.items()}


def to_device(problem, device):
    """The problem with its tensors on another device, with the same strides."""

    def move(value):
        if isinstance(value, SoftplusScale):
            return SoftplusScale(move(value.s))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in problem.items()}


def leaves_of(problem):
    """The problem with new leaves, which share memory and strides, and these leaves by name."""
    problem, leaves = dict(problem), {}
    for name in DIFFERENTIABLE:
        value = problem.get(name)
        softplus = isinstance(value, SoftplusScale)
        value = value.s if softplus else value
        if isinstance(value, torch.Tensor):
            leaf = leaves[name] = value.detach().requires_grad_()
            problem[name] = SoftplusScale(leaf) if softplus else leaf
    return problem, leaves


def differentiable(result):
    """The outputs that have a gradient, by name: a loss, or others, cosine, target and sum."""
    if isinstance(result, torch.Tensor):
        return {"loss": result}
    return dict(zip(("others", "cosine", "target", "sum"), result, strict=False))


def upstream_of(outputs, seed=1):
    """A random gradient for each output. A None in its place would leave the output out."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in outputs.values()]


def gradients_of(outputs, upstream, tensors):
    pairs = [(t, g.to(t)) for t, g in zip(outputs.values(), upstream, strict=True) if g is not None]
    outputs, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, tensors, gradients, allow_unused=True, materialize_grads=True
    )


def evaluate(function, problem, upstream=None):
    """The outputs, and the gradients of the leaves, by name."""
    problem, leaves = leaves_of(problem)
    outputs = differentiable(function(**problem))
    upstream = upstream_of(outputs) if upstream is None else upstream
    gradients = gradients_of(outputs, upstream, list(leaves.values()))
    return {name: t.detach() for name, t in outputs.items()}, dict(
        zip(leaves, gradients, strict=True)
    )


def eager(function):
    """The function of `tvmf_ext.reference` with the same name."""
    plain = getattr(reference, function.__name__)

    def call(**problem):
        if isinstance(problem["scale"], SoftplusScale):
            problem["scale"] = F.softplus(problem["scale"].s) + 1
        return plain(**problem)

    return call


def oracle(function, problem, upstream=None):
    """The results of `evaluate` in float64, and the norm of the terms that each result sums.

    A sum cannot be more exact than its terms, so that errors are relative to the norm of the terms.
    Input and weight have a norm for each row. For kappa the cosines are taken for 0, because they
    cancel in `1 - c^2`. The norm of a loss is that of the rows' lse. The norm of others, which is
    the sum of the largest logit and a logarithm, is that of the logit.
    """
    problem, leaves = leaves_of(to_dtype(problem, torch.float64))
    x, w, target = problem["input"], problem["linear_weight"], problem["target"]
    # Each logit gets a kappa, scale and bias of its own, whose gradients are the terms.
    spread, terms = dict(problem), {}
    for name in ("kappa", "scale", "linear_bias"):
        value = leaves.get(name, torch.zeros(1).to(x).requires_grad_())
        if name in leaves or name == "linear_bias":
            terms[name] = value.expand(len(x), len(w))
            softplus = isinstance(problem.get(name), SoftplusScale)
            spread[name] = SoftplusScale(terms[name]) if softplus else terms[name]
    outputs = differentiable(eager(function)(**spread))
    upstream = upstream_of(outputs) if upstream is None else upstream
    gradients = gradients_of(outputs, upstream, [*leaves.values(), *terms.values()])
    exact = dict(zip(leaves, gradients, strict=False))
    terms = dict(zip(terms, gradients[len(leaves) :], strict=True))

    with torch.no_grad():
        kappa, unit_x, unit_w = problem["kappa"], F.normalize(x), F.normalize(w)
        d = 1 + kappa * (1 - unit_x @ unit_w.T)
        dphi = terms["linear_bias"]  # the bias is added to phi
        t = dphi * (1 + 2 * kappa) / d**2
        of_cosine = dict(zip(outputs, upstream, strict=True)).get("cosine")
        if of_cosine is not None:  # it does not pass through the bias
            rows = (target != problem.get("ignore_index", -100)).nonzero()[:, 0]
            t[rows, target[rows]] += of_cosine[rows].to(t)
        size = {
            "input": (t @ unit_w).norm(dim=1).maximum(t.norm(dim=1)),
            "linear_weight": (t.T @ unit_x).norm(dim=1).maximum(t.norm(dim=0)),
            "kappa": (dphi / d**2).norm(),
        }
        for name, rows in (("input", x), ("linear_weight", w)):
            size[name] /= rows.norm(dim=1).clamp_min(1e-12)
        size |= {name: terms[name].norm() for name in terms if name != "kappa"}
        logits = eager(tvmf_ext.tvmf_logits)(**{k: problem[k] for k in LOGITS if k in problem})
        class_weight = problem.get("weight", torch.ones_like(logits[0]))
        size["sum"] = (class_weight * logits).norm()
        size["others"] = logits.amax(1).norm()
        valid = target != problem.get("ignore_index", -100)
        row_weight = class_weight[torch.where(valid, target, 0)] * valid
        mean = problem.get("reduction", "mean") == "mean"
        size["loss"] = (row_weight * logits.logsumexp(1)).norm()
        if mean:
            size["loss"] /= row_weight.sum()
    return {name: t.detach() for name, t in outputs.items()}, exact, size


def error(got, exact, size=0.0, rows=False):
    """The relative error in norm, of the whole tensor or, with `rows`, the largest of a row."""
    assert got.shape == exact.shape
    shape = (len(got), -1) if rows else (1, -1)
    got, exact = got.double().reshape(shape), exact.double().reshape(shape)
    both = (got.isnan() & exact.isnan()) | (got == exact)
    got, exact = (torch.where(both, 0, t) for t in (got, exact))
    size = torch.as_tensor(size, dtype=torch.float64, device=exact.device)
    size = exact.norm(dim=1).clamp_min(size if rows else size.norm())
    difference = (got - exact).norm(dim=1)
    return torch.where(difference == 0, 0, difference / size).max().item()


def rounding(dtype, exact):
    """The relative error in norm that rounding to `dtype` makes. Below the smallest normal number
    of `dtype` a rounding is absolute."""
    info = torch.finfo(dtype)
    absolute = info.smallest_normal * info.eps / 2 * exact.numel() ** 0.5
    return info.eps / 2 + absolute / max(exact.nan_to_num().norm().item(), info.smallest_normal)


def check(function, problem, upstream=None, rows=False, tolerance=None, eager_dtype=None):
    """Checks `tvmf_cross_entropy` or `row_statistics` by the error rule, and shapes and dtypes.

    With `rows` the rule must hold for each row of the gradients of input and weight. Eager PyTorch
    computes in `eager_dtype`, by default in the dtype of the CPU's products.
    """
    if function is tvmf_ext.row_statistics:
        problem = statistics_arguments(problem)
    outputs, gradients = evaluate(function, problem, upstream)
    for line in judge(
        function, problem, outputs, gradients, upstream, rows, tolerance, eager_dtype
    ):
        assert line.error <= line.bound, str(line)


def conditioning(problem):
    """The factor by which a problem enlarges roundings of float64, which the oracle has too: the
    rounding of a cosine in its logit, or of p_y in `1 - p_y`, which is small in an easy row."""
    tensors = to_dtype({k: problem[k] for k in LOGITS if k in problem}, torch.float64)
    logits = eager(tvmf_ext.tvmf_logits)(**tensors).detach()
    scale = tensors["scale"]
    scale = F.softplus(scale.s) + 1 if isinstance(scale, SoftplusScale) else scale
    kappa = tensors["kappa"]
    cosine = F.normalize(tensors["input"]) @ F.normalize(tensors["linear_weight"]).T
    steepest = (scale * (1 + 2 * kappa) / (1 + kappa * (1 - cosine)) ** 2).max().item()
    valid = problem["target"] != problem.get("ignore_index", -100)
    others = logits[valid].softmax(1).scatter(1, problem["target"][valid, None], 0).sum(1)
    return max(steepest, len(others) ** 0.5 / max(others.norm().item(), 1e-300))


class Judgement(NamedTuple):
    name: str
    error: float
    bound: float

    def __str__(self):
        return f"{self.name} is off by {self.error:.1e}, allowed are {self.bound:.1e}"


def judge(
    function,
    problem,
    outputs,
    gradients,
    upstream=None,
    rows=False,
    tolerance=None,
    eager_dtype=None,
):
    """The error of each output and gradient, and the error that the rule allows; see `check`."""
    dtype = compute_dtype(problem["input"].dtype)
    tolerance = tolerance or TOLERANCE[dtype]
    rounds_weight = product_dtype(problem["input"]) != problem["linear_weight"].dtype
    if product_dtype(problem["input"]) == torch.bfloat16 and rounds_weight:
        tolerance = max(tolerance, torch.finfo(torch.bfloat16).eps / 4)
    if dtype == torch.float64:
        tolerance += 4 * torch.finfo(dtype).eps * conditioning(problem)
    exact_outputs, exact, size = oracle(function, problem, upstream)
    plain_problem = to_dtype(problem, eager_dtype or product_dtype(problem["input"]))
    plain_outputs, plain = evaluate(eager(function), plain_problem, upstream)
    _, leaves = leaves_of(problem)
    lines = []
    for name, wanted in exact_outputs.items():
        if name not in outputs:
            continue  # the operator itself does not make the target's logit
        assert outputs[name].dtype == dtype
        scale = size.get(name, 0.0)
        of_eager = error(plain_outputs[name], wanted, scale)
        fused = error(outputs[name], wanted, scale)
        lines.append(Judgement(name, fused, 2 * of_eager + tolerance))
    for name, got in gradients.items():
        assert got.dtype == leaves[name].dtype
        measure = (exact[name], size[name], rows and got.dim() == 2)
        of_eager = error(plain[name], *measure)
        bound = 2 * of_eager + tolerance + rounding(got.dtype, exact[name])
        lines.append(Judgement(f"d{name}", error(got, *measure), bound))
    return lines


def check_rank(problem, rank=None):
    """Checks that ranks are those of the oracle. A class whose score differs from the target's by
    no more than roundings may or may not count."""
    problem = statistics_arguments(problem)
    if rank is None:
        rank = tvmf_ext.row_statistics(**problem).rank
    exact = to_dtype(problem, torch.float64)
    exact = {name: exact[name] for name in LOGITS if name in exact} | {"scale": 1, "prior": None}
    score = reference.tvmf_logits(**exact)
    valid = problem["target"] != problem.get("ignore_index", -100)
    of_target = score.gather(1, torch.where(valid, problem["target"], 0)[:, None])
    others = torch.ones_like(score, dtype=torch.bool).scatter(
        1, torch.where(valid, problem["target"], 0)[:, None], False
    )
    margin = 1e-5 if compute_dtype(problem["input"].dtype) == torch.float32 else 1e-13
    fewest = (others & (score > of_target + margin)).sum(1)
    most = (others & (score > of_target - margin)).sum(1)
    assert rank.dtype == torch.int64
    assert (rank[~valid] == -1).all()
    assert ((fewest <= rank) & (rank <= most))[valid].all()


def assert_same_bits(one, other):
    """Checks that two results of `evaluate` have the same bits, and NaN at the same places."""
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
