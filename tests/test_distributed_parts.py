"""A sharded head whose gradient is never whole: samples of the classes, and blocks of them."""

import functools
import math

import pytest
import torch
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.problem import error
from tests.ranks import run_ranks
from tests.test_distributed_training import (
    CLASSES,
    FEATURES,
    OPTIMIZERS,
    assert_close,
    backbone,
    batches,
    groups_of,
    part_of,
    plain_head,
    sharded_head,
    train,
    values,
)
from tvmf_ext import ShardedTvMFLoss, TvMFLoss, row_statistics

# The first counts every class into the sample, so that it is the whole head.
PARTS = {"all sampled": {"sample_rate": 0.999}, "blocks": {"gradient_blocks": 2}}
# The optimizer steps one kappa before the blocks, which need its old value.
ONE_KAPPA = {"kappa": 3.0}
NOT_SMOOTHED = {"label_smoothing": 0.0}  # without it the statistics have no sum


def trained(rank, world, mesh, optimizer_name, scaled=False, **options):
    """Five steps, and what the optimizer keeps for the class vectors."""
    net, head = DistributedDataParallel(backbone()), sharded_head(mesh, **options)
    optimizer = OPTIMIZERS[optimizer_name](groups_of(net, head))
    if not scaled:
        head.attach(optimizer)
        train(net, head, optimizer, part_of(rank, world), 5, clip=False)
    else:
        scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=100)
        head.attach(optimizer, scaler)
        for i, (input, target) in enumerate([*batches(5), *batches(1)]):
            optimizer.zero_grad()
            loss = head(net(input[part_of(rank, world)]), target[part_of(rank, world)])
            # The sixth gradient is infinite on the first rank, and no rank may take that step.
            loss = loss * (torch.inf if i == 5 and rank == 0 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512
    assert head.weight.grad is None
    state = optimizer.state[head.weight]
    kept = {f"state {n}": v.full_tensor() for n, v in state.items() if v.dim()}
    return values(net, head) | kept


SAMPLED = {"bias": True, "kappa": torch.linspace(1, 9, 40), "learn_kappa": True}
SAMPLED |= {"weight": torch.linspace(0.5, 2, 40), "prior": -torch.linspace(0, 2, 40)}
SAMPLED |= {"label_smoothing": 0.2, "cosine_margin": torch.linspace(0, 0.2, 40)}
SAMPLED |= {"dtype": torch.float64}


def sampled_rows(world):
    g = torch.Generator().manual_seed(5)
    input = torch.randn(4 * world, FEATURES, generator=g).double()
    target = torch.randint(40, (4 * world,), generator=g)
    target[1] = -100
    return input, target


def of_40(mesh, **options):
    torch.manual_seed(4)
    plain = TvMFLoss(FEATURES, 40, **SAMPLED)
    head = ShardedTvMFLoss(FEATURES, 40, mesh=mesh, **SAMPLED, **options)
    head.load_state_dict(plain.state_dict())
    return plain, head


def sampled_step(rank, world, mesh):
    """One step with a sample; returns the sample, its gradients, and what changed."""
    _, head = of_40(mesh, sample_rate=0.4)
    _, twin = of_40(mesh, sample_rate=0.4)
    own = slice(4 * rank, 4 * rank + 4)
    input, target = (t[own] for t in sampled_rows(world))
    input.requires_grad_()
    optimizer = torch.optim.SGD(
        [
            {"params": [head.weight, head.bias, head.kappa]},
            {"params": [head.s_]},
        ],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
    )
    head.attach(optimizer)
    for _ in range(2):
        before = [t.to_local().clone() for t in (head.weight, head.bias)]
        state = optimizer.state[head.weight].get("momentum_buffer")
        state = torch.zeros_like(before[0]) if state is None else state.to_local().clone()
        optimizer.zero_grad()
        input.grad = None
        loss = head(input, target)
        assert torch.equal(loss, twin(input, target)) == (head.sample_step == 1)
        loss.backward()
        rows, leaves = head._pending.rows, head._pending.leaves
        scale = head.s_.grad.clone()
        optimizer.step()
        untouched = torch.ones(len(before[0]), dtype=torch.bool)
        untouched[rows] = False
        assert untouched.any() and len(rows) == max(len(rows), math.ceil(0.4 * len(before[0])))
        for old, now in zip(before, (head.weight, head.bias), strict=True):
            changed = (now.to_local() != old).reshape(len(old), -1).any(1)
            assert torch.equal(changed, ~untouched)
        momentum = optimizer.state[head.weight]["momentum_buffer"].to_local()
        assert torch.equal(momentum[untouched], state[untouched])
        assert leaves["linear_weight"].grad.shape == (len(rows), FEATURES)
        if head.sample_step == 1:
            first = {n: t.grad for n, t in leaves.items()} | {"loss": loss.detach()}
            first |= {"input": input.grad / world, "scale": scale, "rows": head.first_class + rows}
    return first


def means_of_samples(mesh):
    """Mean and standard deviation of the mean of what samples have, and what all classes have."""
    _, head = of_40(mesh, sample_rate=0.3)
    input, target = sampled_rows(1)
    found = {"exp": [], "sum": []}
    with torch.no_grad():
        for _ in range(600):
            statistics = head.row_statistics(input, target)
            found["exp"].append(statistics.others.exp())
            found["sum"].append(statistics.sum)
        exact = head.eval().row_statistics(input, target)
    exact = {"exp": exact.others.exp(), "sum": exact.sum}
    stacked = {name: torch.stack(each) for name, each in found.items()}
    return {n: (t.mean(0), t.std(0) / len(t) ** 0.5, exact[n]) for n, t in stacked.items()}


def refused(mesh):
    """The messages for options that are refused."""
    options = ({"sample_rate": 0.0}, {"sample_rate": 0.5, "gradient_blocks": 2})
    messages = []
    for each in (*options, {"gradient_blocks": 0}):
        with pytest.raises(ValueError) as caught:
            ShardedTvMFLoss(FEATURES, CLASSES, mesh=mesh, **each)
        messages.append(str(caught.value))
    return messages


def attached_without_weight(mesh):
    """What attach says to None, and to an optimizer that does not have the class vectors."""
    head = ShardedTvMFLoss(4, 7, mesh=mesh, sample_rate=0.5)
    said = []
    with pytest.raises(TypeError) as error:
        head.attach(None)
    said.append(str(error.value))
    with pytest.raises(ValueError) as error:
        head.attach(torch.optim.SGD([head.s_], lr=0.1))
    said.append(str(error.value))
    return said


def not_attached(mesh):
    """What the second call raises where no optimizer would have stepped the class vectors."""
    messages = []
    for options in ({"sample_rate": 0.5}, {"gradient_blocks": 2}):
        head = ShardedTvMFLoss(FEATURES, CLASSES, mesh=mesh, **options)
        input, target = torch.randn(3, FEATURES), torch.tensor([0, 8, 3])
        head(input, target)
        head(input, target).backward()
        with pytest.raises(RuntimeError) as caught:
            head(input, target)
        messages.append(str(caught.value))
    return messages


def every_job(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    found = {
        (name, kind): trained(rank, world, mesh, name, **options)
        for name in OPTIMIZERS
        for kind, options in PARTS.items()
    }
    for kind, options in PARTS.items():
        found["scaled", kind] = trained(rank, world, mesh, "AdamW", scaled=True, **options)
    found["one kappa"] = trained(rank, world, mesh, "SGD", gradient_blocks=2, changes=ONE_KAPPA)
    found["not smoothed"] = trained(
        rank, world, mesh, "SGD", gradient_blocks=2, changes=NOT_SMOOTHED
    )
    found["not attached"] = not_attached(mesh)
    found["without weight"] = attached_without_weight(mesh)
    if world == 1:
        found["means"], found["refused"] = means_of_samples(mesh), refused(mesh)
    if world == 3:
        found["sample"] = sampled_step(rank, world, mesh)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        found["2 x 2"] = trained(rank, world, mesh, "SGD", gradient_blocks=2)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda world: run_ranks(every_job, world, folder / str(world)))


@functools.cache
def trained_by_one(optimizer_name, **changes):
    net, head = backbone(), plain_head(**changes)
    optimizer = OPTIMIZERS[optimizer_name](groups_of(net, head))
    train(net, head, optimizer, slice(None), 5, clip=False)
    state = optimizer.state[head.weight]
    return values(net, head) | {f"state {n}": v for n, v in state.items() if v.dim()}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world", [1, 3, 4])
def test_steps_in_parts_are_the_steps_of_one_process(results, world, optimizer, kind):
    for found in results(world):
        assert_close(found[optimizer, kind], trained_by_one(optimizer))
        if optimizer == "AdamW":
            assert_close(found["scaled", kind], trained_by_one(optimizer))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_blocks_with_one_kappa_or_without_smoothing(results, world):
    for found in results(world):
        assert_close(found["one kappa"], trained_by_one("SGD", **ONE_KAPPA))
        assert_close(found["not smoothed"], trained_by_one("SGD", **NOT_SMOOTHED))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_parts_without_an_optimizer_are_refused(results, world):
    for found in results(world):
        assert all("want attach(optimizer)" in text for text in found["not attached"])
        none, without = found["without weight"]
        assert none == "attach wants an optimizer, got NoneType"
        assert "wants an optimizer with the head's weight" in without


def test_blocks_over_two_groups_of_two_ranks(results):
    for found in results(4):
        assert_close(found["2 x 2"], trained_by_one("SGD"))


def chances(rows, target):
    """The logarithms of the chances of the classes in the samples of three ranks of 14, 14, 12."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    for begin, end in ((0, 14), (14, 28), (28, 40)):
        inside = (begin <= rows) & (rows < end)
        positive = torch.isin(rows, target) & inside
        rest = inside & ~positive
        found[rest] = math.log(rest.sum() / (end - begin - positive.sum()))
    return found


def test_a_sampled_step_is_that_of_a_head_of_the_sample(results):
    torch.manual_seed(4)
    plain = TvMFLoss(FEATURES, 40, **SAMPLED)
    found = [each["sample"] for each in results(3)]
    rows = torch.cat([each["rows"] for each in found])
    input, target = sampled_rows(3)
    log_q = chances(rows, target)
    assert (log_q < 0).any()
    column = torch.where(target < 0, -100, torch.searchsorted(rows, target.clamp_min(0)))
    leaves = {
        "input": input,
        "linear_weight": plain.weight.detach()[rows],
        "kappa": plain.kappa.detach()[rows],
        "linear_bias": plain.bias.detach()[rows],
    }
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    omega, scale = plain.class_weight.double(), plain.scale.detach()
    statistics = row_statistics(
        target=column,
        prior=(plain.prior[rows] - log_q).double(),
        weight=omega[rows] * (-log_q).exp(),
        cosine_margin=plain.cosine_margin[rows].double(),
        scale=scale,
        **leaves,
    )
    total = statistics.sum + (omega[rows] * (-log_q).exp() * log_q).sum()
    valid = target >= 0
    row_weight = torch.where(valid, omega[target.clamp_min(0)], 0)
    hard = row_weight * torch.nn.functional.softplus(statistics.others - statistics.target)
    soft = statistics.lse * omega.sum() - total - row_weight * statistics.target
    loss = torch.where(valid, 0.8 * hard + 0.2 / 40 * soft, 0).sum() / row_weight.sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for each in found:
        assert error(each["loss"], loss.detach()) <= 1e-12
    for name, gradient in zip(leaves, gradients, strict=True):
        assert error(torch.cat([each[name] for each in found]), gradient) <= 1e-11, name


def test_the_mean_over_samples_is_that_of_all_classes(results):
    """Of the sum of exponentials, and of the sum of weighted logits."""
    means = results(1)[0]["means"]
    for mean, deviation, exact in means.values():
        assert ((mean - exact).abs() <= 5 * deviation + 1e-9).all()
        assert (deviation > 0).all()


def test_options_that_are_refused(results):
    rate, both, blocks = results(1)[0]["refused"]
    assert rate == "sample_rate must be in (0, 1], got 0.0"
    assert both.startswith("sample_rate below 1 needs one block of gradients and a mesh of one")
    assert blocks == "gradient_blocks must be at least 1, got 0"
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got NoneType"):
        ShardedTvMFLoss(FEATURES, CLASSES, mesh=None)
