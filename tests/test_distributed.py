"""A sharded head on 1 to 4 processes is the head of one process on the joined batch."""

import functools
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.problem import check_rank, error
from tests.ranks import run_ranks
from tvmf_ext import TvMFLoss
from tvmf_ext.distributed import ShardedTvMFLoss

WORLDS = (1, 2, 3, 4)
# Rows a rank. Of 5 classes 4 ranks have 2, 2, 1 and 0.
ROWS, FEATURES = 12, 16
SIZES = (5, 1003, 100_000)


def spread(C, low, high):
    return torch.linspace(low, high, C)


# The head's options for C classes; "ignored" is the share of ignored rows, "easy" the distance of
# the features from their class vectors.
CASES = {
    "plain": lambda C: {},
    "sum": lambda C: {"reduction": "sum", "ignored": 0.3},
    "none": lambda C: {"reduction": "none", "ignored": 0.3},
    "smoothing": lambda C: {"label_smoothing": 0.2, "ignored": 0.2},
    "per class": lambda C: {
        "kappa": spread(C, 1, 20),
        "learn_kappa": True,
        "bias": True,
        "prior": -spread(C, 0, 3),
        "weight": spread(C, 0.1, 2),
        "cosine_margin": spread(C, 0, 0.3),
        "angular_margin": spread(C, 0.2, 0),
        "label_smoothing": 0.1,
        "ignored": 0.2,
        "ignore_index": 3,
    },
    "per class, none": lambda C: {
        "kappa": spread(C, 1, 20),
        "weight": spread(C, 0.1, 2),
        "label_smoothing": 0.1,
        "reduction": "none",
    },
    "one kappa": lambda C: {"learn_kappa": True, "kappa": 3.0, "bias": True},
    "arcface": lambda C: {"kappa": 0.0, "scale": 64.0, "learn_scale": False, "angular_margin": 0.5},
    "easy": lambda C: {"kappa": 0.0, "scale": 42.0, "easy": 0.05},
}
PROBLEMS = [
    (case, C, dtype)
    for case in CASES
    for C in SIZES
    for dtype in (torch.float32, torch.float64)
    if C < 100_000 or (dtype == torch.float32 and case in ("plain", "per class", "arcface"))
]


def options_of(case, C):
    options = CASES[case](C)
    return options, options.pop("ignored", 0.0), options.pop("easy", None)


@functools.cache
def data(case, C, dtype, world):
    """The head of one process, and the features, labels and upstream gradients of all ranks."""
    options, ignored, easy = options_of(case, C)
    g = torch.Generator().manual_seed(C)
    torch.manual_seed(C)
    plain = TvMFLoss(FEATURES, C, dtype=dtype, **options)
    N = world * ROWS
    target = torch.randint(C, (N,), generator=g)
    noise = torch.randn(N, FEATURES, generator=g).to(dtype)
    near = torch.nn.functional.normalize(plain.weight.detach()[target]) * FEATURES**0.5
    if easy is not None:
        # One vector a class, and all of them far apart.
        plain.weight.data.copy_(torch.eye(C, FEATURES, dtype=dtype) * (1 if C <= FEATURES else 0))
        if C > FEATURES:
            plain.weight.data.normal_(generator=g)
        near = plain.weight.detach()[target]
    input = near * torch.rand(N, 1, generator=g).to(dtype) + noise
    if easy is not None:
        input = near + easy * noise
    target[torch.rand(N, generator=g) < ignored] = options.get("ignore_index", -100)
    upstream = torch.rand(N, generator=g).to(dtype) + 0.1
    return plain, input, target, upstream


def gradients(head):
    return {
        name: p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        for name, p in head.named_parameters()
    }


def step(head, input, target, upstream, by_statistics=False):
    """Loss, gradients and ranks of the rows."""
    head.zero_grad()
    input = input.clone().requires_grad_()
    if by_statistics:
        loss = head.loss(head.row_statistics(input, target), target)
    else:
        loss = head(input, target)
    # For single rows, the ranks' gradients are those of the mean over ranks.
    loss.backward(upstream if loss.dim() else None)
    return {"loss": loss.detach(), "input": input.grad, **gradients(head)}


def sharded(plain, case, C, dtype, mesh):
    options, _, _ = options_of(case, C)
    head = ShardedTvMFLoss(FEATURES, C, mesh=mesh, dtype=dtype, **options)
    head.load_state_dict(plain.state_dict())
    return head


def problem_of(plain, input, target):
    """The arguments of `row_statistics` that decide the rank."""
    return {
        "input": input,
        "linear_weight": plain.weight.detach(),
        "target": target,
        "kappa": plain.kappa.detach(),
        "scale": plain.scale.detach(),
        "linear_bias": None if plain.bias is None else plain.bias.detach(),
        "ignore_index": plain.ignore_index,
    }


def own_rows(tensor, rank):
    return tensor[rank * ROWS : (rank + 1) * ROWS]


def all_cases(rank, world):
    mesh, results = init_device_mesh("cpu", (world,)), {}
    for problem in PROBLEMS:
        C = problem[1]
        plain, *rows = data(*problem, world)
        head = sharded(plain, *problem, mesh)
        rows = [own_rows(t, rank) for t in rows]
        found = step(head, *rows)
        by_statistics = step(head, *rows, by_statistics=True)
        with torch.no_grad():
            statistics = head.row_statistics(*rows[:2])
        some = [] if C > 1003 else [head.logits(rows[0]), *head.topk(rows[0], min(C, 4))]
        results[problem] = found, by_statistics, statistics, some
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda world: run_ranks(all_cases, world, folder / str(world)))


def joined(found, head, world):
    """The results of all ranks as one process has them."""
    parts = {name: [each[name] for each in found] for name in found[0]}
    whole = {}
    for name, values in parts.items():
        per_row = name == "input" or (name == "loss" and values[0].dim())
        per_class = name in dict(head.named_parameters()) and getattr(head, name).numel() > 1
        if per_row or per_class:
            whole[name] = torch.cat(values)
        else:
            for value in values:
                assert torch.equal(value, values[0]), name
            whole[name] = values[0]
    # The backbone's average over ranks divides by their number.
    whole["input"] = whole["input"] / world
    return whole


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p[0]}-{p[1]}-{str(p[2])[-2:]}")
def test_sharded_head_is_that_of_one_process(results, problem, world):
    plain, input, target, upstream = data(*problem, world)
    dtype, reduction = problem[2], plain.reduction
    wanted = step(plain, input, target, upstream / world if reduction == "none" else upstream)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    if problem[0] == "easy":
        tolerance = {torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
    found = [each[problem] for each in results(world)]
    for way in (0, 1):
        whole = joined([each[way] for each in found], plain, world)
        assert whole.keys() == wanted.keys()
        for name, value in wanted.items():
            # The gradient of the scale is a difference of sums that are some 10 times as large.
            factor = 10 if name == "s_" else 1
            assert error(whole[name], value) <= factor * tolerance, (way, name)
    statistics = [torch.cat(values) for values in zip(*(each[2] for each in found), strict=True)]
    with torch.no_grad():
        expected = plain.row_statistics(input, target)
    check_rank(problem_of(plain, input, target), statistics[-1])
    for value, exact in zip(statistics[:-1], expected[:-1], strict=True):
        assert error(value, exact) <= tolerance
    assert math.isfinite(wanted["loss"].sum())
    if problem[1] <= 1003:
        logits, best, classes = (torch.cat(t) for t in zip(*(e[3] for e in found), strict=True))
        with torch.no_grad():
            assert error(logits, plain.logits(input)) <= tolerance
        assert torch.equal(logits.gather(1, classes), best)
        assert torch.equal(best, logits.topk(best.shape[1], dim=1).values)
