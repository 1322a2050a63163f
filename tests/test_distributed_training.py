"""Training with a sharded head: optimizers, clipping, checkpoints, mixed meshes, torch.compile."""

import copy
import functools
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.problem import error
from tests.ranks import run_ranks
from tvmf_ext import TvMFLoss, collectives
from tvmf_ext.distributed import GradScaler, ShardedTvMFLoss, clip_grad_norm_

# All worlds divide the rows. Of 9 classes 4 ranks have 3, 3, 3 and 0.
ROWS, PIXELS, FEATURES, CLASSES = 24, 10, 8, 9
OPTIONS = {
    "kappa": torch.linspace(1, 20, CLASSES),
    "learn_kappa": True,
    "bias": True,
    "weight": torch.linspace(0.5, 2, CLASSES),
    "label_smoothing": 0.1,
    "dtype": torch.float64,
}
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(
        groups, 0.1, momentum=0.9, weight_decay=1e-2, foreach=True
    ),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 1e-2, weight_decay=1e-2, foreach=True),
}


@functools.cache
def batches(count):
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        target = torch.randint(CLASSES, (ROWS,), generator=g)
        target[torch.rand(ROWS, generator=g) < 0.2] = -100
        found.append((torch.randn(ROWS, PIXELS, generator=g).double(), target))
    return found


def backbone():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(PIXELS, FEATURES), nn.Tanh()).double()


def plain_head(**changes):
    torch.manual_seed(3)
    return TvMFLoss(FEATURES, CLASSES, **OPTIONS | changes)


def sharded_head(mesh, changes=(), **options):
    head = ShardedTvMFLoss(FEATURES, CLASSES, mesh=mesh, **OPTIONS | dict(changes), **options)
    head.load_state_dict(plain_head(**dict(changes)).state_dict())
    return head


def groups_of(net, head):
    """An optimizer with foreach wants DTensors and plain parameters in groups of their own."""
    sharded = [p for p in head.parameters() if p.dim() and p.shape[0] == CLASSES]
    rest = [p for p in head.parameters() if all(p is not q for q in sharded)]
    return [{"params": sharded}, {"params": [*net.parameters(), *rest]}]


def train(net, head, optimizer, part, steps, clip=True):
    """Steps on the rows `part` of each batch. Returns the norms of the gradients."""
    norms = []
    for input, target in batches(5)[:steps]:
        optimizer.zero_grad()
        head(net(input[part]), target[part]).backward()
        if clip:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms.append(clip_grad_norm_(parameters, 0.05).item())
        optimizer.step()
    return norms


def values(*modules):
    """All parameters in full."""
    return {
        f"{i}.{name.removeprefix('module.')}": (
            p.full_tensor() if hasattr(p, "full_tensor") else p
        ).detach()
        for i, module in enumerate(modules)
        for name, p in module.named_parameters()
    }


def part_of(rank, world):
    return slice(rank * ROWS // world, (rank + 1) * ROWS // world)


def trained(rank, world, mesh, optimizer_name):
    net, head = DistributedDataParallel(backbone()), sharded_head(mesh)
    optimizer = OPTIMIZERS[optimizer_name](groups_of(net, head))
    norms = train(net, head, optimizer, part_of(rank, world), 5)
    return {"norms": torch.tensor(norms), **values(net, head)}


def saved_and_loaded(rank, world, mesh, folder):
    """Three ranks save after two steps. All ranks load that, and take two more steps."""
    net, head = DistributedDataParallel(backbone()), sharded_head(mesh)
    optimizer = OPTIMIZERS["AdamW"](groups_of(net, head))
    model = nn.ModuleDict({"net": net.module, "head": head})
    if world == 3:
        train(net, head, optimizer, part_of(rank, world), 2)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=folder / "three")
    load(model, optimizer, folder / "three")
    train(net, head, optimizer, part_of(rank, world), 2)
    after_plain = sharded_head(mesh)
    state = after_plain.state_dict()
    dcp.load(state, checkpoint_id=folder / "plain")
    after_plain.load_state_dict(state)
    return {"three": values(net, head), "plain": values(after_plain)}


def load(model, optimizer, path):
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def message(error_type, function):
    """The message of the error that the function raises."""
    with pytest.raises(error_type) as caught:
        function()
    return str(caught.value)


def refused(rank, world, mesh):
    """What each rank raises where one of them has a bad label or other rows."""
    head, found = sharded_head(mesh), {}
    input = torch.randn(4, FEATURES).double()
    target = torch.zeros(4, dtype=torch.int64)
    rows = input if rank else input[:3]
    found["rows"] = message(ValueError, lambda: head(rows, target[: len(rows)]))
    dtype = torch.float64 if rank else torch.float32
    found["dtype"] = message(ValueError, lambda: head(input.to(dtype), target))
    for wrong in (CLASSES, -1):
        bad = target.clone()
        if rank == world - 1:
            bad[2] = wrong
        found[wrong] = message(IndexError, lambda bad=bad: head(input, bad))
    assert head(input, target).isfinite()  # the ranks still agree
    return found


def loss_and_gradients(head, input, target):
    input = input.clone().requires_grad_()
    head.zero_grad()
    loss = head(input, target)
    loss.backward()
    sharded = {name: p.grad for name, p in head.named_parameters()}
    return {"loss": loss.detach(), "input": input.grad} | {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in sharded.items()
    }


def compiled(rank, world, mesh):
    """The head as it stands and under torch.compile, and what a bad label does there."""
    head = sharded_head(mesh)
    g = torch.Generator().manual_seed(rank)
    input = torch.randn(5, FEATURES, generator=g).double()
    target = torch.randint(CLASSES, (5,), generator=g)
    plain = loss_and_gradients(head, input, target)
    torch.compiler.reset()
    program = torch.compile(head, fullgraph=True, backend="aot_eager")
    found = loss_and_gradients(program, input, target)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    return plain, found, message(RuntimeError, lambda: program(input, target + 3 * rank + 5))


def merged_in_parts(rank, world, mesh):
    """The loss and the gradients with either way to merge statistics."""
    head, found = sharded_head(mesh), []
    input, target = (t[part_of(rank, world)] for t in batches(1)[0])
    input = input[:, :FEATURES]
    for most in (collectives.GATHERED_RANKS, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "GATHERED_RANKS", most)
            found.append(loss_and_gradients(head, input, target))
    return found


def first_weights(mesh):
    """The weights of a new head, and of one that was made on the meta device first."""
    options = {"mesh": mesh, "bias": True, "kappa": torch.linspace(1, 2, 9000)}
    torch.manual_seed(6)
    made = ShardedTvMFLoss(4, 9000, **options)
    with torch.device("meta"):
        head = ShardedTvMFLoss(4, 9000, **options)
    assert head.weight.is_meta
    head.to_empty(device="cpu")
    torch.manual_seed(6)
    head.reset_parameters()
    assert torch.equal(head.s_, made.s_)
    found = {name: getattr(made, name).full_tensor() for name in ("weight", "bias", "kappa")}
    for name, value in found.items():
        assert torch.equal(getattr(head, name).full_tensor(), value), name
    return found


def in_bfloat16(rank, world, mesh):
    """Under autocast, with the features' gradient summed in float32 and in bfloat16."""
    found = []
    for dtype in (None, torch.bfloat16):
        head = sharded_head(mesh, reduce_dtype=dtype).float()
        input, target = (t[part_of(rank, world)] for t in batches(1)[0])
        with torch.autocast("cpu", torch.bfloat16):
            found.append(loss_and_gradients(head, input[:, :FEATURES].float(), target))
    return found


def scaled(rank, world, mesh):
    """Steps with a GradScaler; the third gradient is infinite on the last rank alone."""
    net, head = DistributedDataParallel(backbone()), sharded_head(mesh)
    optimizer = OPTIMIZERS["AdamW"](groups_of(net, head))
    scaler = GradScaler("cpu", init_scale=1024.0)
    for i, (input, target) in enumerate(batches(5)):
        part = part_of(rank, world)
        optimizer.zero_grad()
        loss = head(net(input[part]), target[part])
        scaler.scale(loss * (torch.inf if i == 2 and rank == world - 1 else 1)).backward()
        if i == 4:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512
    return values(net, head)


def odd_uses(mesh):
    """Copies, no rows, and what is refused."""
    head = sharded_head(mesh)
    (drawn,) = collectives.gather(head._group, torch.randint(1 << 40, (1,)))
    assert len(drawn.unique()) == 1  # the ranks' generators are alike
    input, target = torch.randn(3, FEATURES).double(), torch.tensor([0, 8, 3])
    wanted = head(input, target)
    saved = io.BytesIO()
    torch.save(head, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(head), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(input, target), wanted)
    with torch.device("meta"):
        loaded = ShardedTvMFLoss(FEATURES, CLASSES, mesh=mesh, **OPTIONS)
    loaded.load_state_dict(plain_head().state_dict(), assign=True)
    assert torch.equal(loaded(input, target), wanted)
    wanted.backward()
    assert clip_grad_norm_(head.weight, 1.0) > 0

    none = torch.zeros(0, FEATURES, dtype=torch.float64, requires_grad=True)
    head(none, target[:0]).backward()
    assert none.grad.shape == none.shape
    assert head.logits(none).shape == (0, CLASSES) and head.topk(none, 4)[1].shape == (0, 4)
    assert all(len(values) == 0 for values in head.row_statistics(none, target[:0]))
    make = functools.partial(ShardedTvMFLoss, FEATURES, CLASSES, mesh=mesh)
    wrong = ({"sample_rate": "a"}, {"gradient_blocks": 1.5}, {"sample_seed": None})
    calls = [functools.partial(make, **options) for options in wrong]
    found = [message(TypeError, call) for call in (lambda: head.topk(input, 2.0), *calls)]
    wrong = (input[0], input[:, 1:], input.long())
    calls = [functools.partial(head.logits, each) for each in wrong]
    calls += [functools.partial(head.topk, each, 2) for each in wrong]
    return found + [message(ValueError, call) for call in calls]


def every_job(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    found = {name: trained(rank, world, mesh, name) for name in OPTIMIZERS}
    found["first weights"] = first_weights(mesh)
    found["scaled"], found["odd uses"] = scaled(rank, world, mesh), odd_uses(mesh)
    found["bfloat16"] = in_bfloat16(rank, world, mesh)
    found["checkpoints"] = saved_and_loaded(rank, world, mesh, folder)
    if world > 1:
        found["refused"] = refused(rank, world, mesh)
        found["merged"] = merged_in_parts(rank, world, mesh)
    if world == 2:
        found["compiled"] = compiled(rank, world, mesh)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
        found["2 x 2"] = trained(rank, world, mesh, "SGD")
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    dcp.save(plain_head().state_dict(), checkpoint_id=folder / "plain", no_dist=True)

    @functools.cache
    def run(world):
        if world != 3:
            run(3)  # which saves what the others load
        return folder, run_ranks(every_job, world, folder / str(world), folder)

    return run


def assert_close(found, wanted, tolerance=1e-10):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert error(found[name], value) <= tolerance, name


@functools.cache
def trained_by_one(optimizer_name):
    net, head = backbone(), plain_head()
    optimizer = OPTIMIZERS[optimizer_name](groups_of(net, head))
    norms = train(net, head, optimizer, slice(None), 5)
    assert min(norms) > 0.05  # every step is clipped
    return {"norms": torch.tensor(norms), **values(net, head)}


WORLDS = pytest.mark.parametrize("world", [1, 2, 3, 4])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@WORLDS
def test_five_clipped_steps_with_a_backbone_equal_one_process(results, world, optimizer):
    for found in results(world)[1]:
        assert_close(found[optimizer], trained_by_one(optimizer))


@WORLDS
def test_a_grad_scaler_skips_the_same_steps_everywhere(results, world):
    net, head = backbone(), plain_head()
    optimizer = OPTIMIZERS["AdamW"](groups_of(net, head))
    for i, (input, target) in enumerate(batches(5)):
        optimizer.zero_grad()
        head(net(input), target).backward()
        if i != 2:
            optimizer.step()
    for found in results(world)[1]:
        assert_close(found["scaled"], values(net, head))


@WORLDS
def test_odd_uses(results, world):
    wanted = ["k must be an int, got float", "sample_rate must be a number, got str"]
    wanted += ["gradient_blocks must be an int, got float"]
    wanted += ["sample_seed must be an int, got NoneType"]
    wanted += 2 * [
        "input must have shape [N, 8], got [8]",
        "input must have shape [N, 8], got [3, 7]",
        "input must be float16, bfloat16, float32 or float64, got torch.int64",
    ]
    for found in results(world)[1]:
        assert found["odd uses"] == wanted


def test_two_groups_of_two_ranks_equal_one_process(results):
    """Classes are spread in a group, and rows over all ranks."""
    for found in results(4)[1]:
        assert_close(found["2 x 2"], trained_by_one("SGD"))


@WORLDS
def test_first_weights_do_not_depend_on_the_number_of_ranks(results, world):
    wanted = results(1)[1][0]["first weights"]
    for found in results(world)[1]:
        for name, value in found["first weights"].items():
            assert torch.equal(value, wanted[name]), name
    weight = wanted["weight"]
    assert len(weight.unique(dim=0)) == 9000 and 0.49 < weight.abs().max() <= 0.5
    assert abs(weight.std() - 0.5 / 3**0.5) < 0.01 and abs(weight.mean()) < 0.01


@WORLDS
def test_bfloat16_features(results, world):
    head = plain_head().float()
    input, target = batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = loss_and_gradients(head, input[:, :FEATURES].float(), target)
    for i in range(2):
        found = [each["bfloat16"][i] for each in results(world)[1]]
        rows = torch.cat([each["input"] for each in found]) / world
        assert error(rows, wanted["input"]) <= 2**-7
        for name in wanted.keys() - {"input"}:
            assert error(found[0][name], wanted[name]) <= 1e-5, name


@pytest.mark.parametrize("world", [2, 3, 4])
def test_many_ranks_merge_in_parts_with_the_same_bits(results, world):
    for found in results(world)[1]:
        at_once, in_parts = found["merged"]
        for name, value in at_once.items():
            assert torch.equal(in_parts[name], value), name


def test_torch_compile_takes_the_head_whole(results):
    for found in results(2)[1]:
        plain, program, refusal = found["compiled"]
        assert_close(program, plain, 1e-13)
        assert "wanted a class in [0, 9)" in refusal


@WORLDS
def test_a_checkpoint_of_three_ranks_continues_on_any_number(results, world):
    folder, found = results(world)
    net, head = backbone(), plain_head()
    optimizer = OPTIMIZERS["AdamW"](groups_of(net, head))
    load(nn.ModuleDict({"net": net, "head": head}), optimizer, folder / "three")
    assert not torch.equal(head.weight, plain_head().weight)
    train(net, head, optimizer, slice(None), 2)
    for each in found:
        assert_close(each["checkpoints"]["three"], values(net, head))
        for name, value in values(plain_head()).items():
            assert torch.equal(each["checkpoints"]["plain"][name], value)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_raises_alike(results, world):
    first, *others = (found["refused"] for found in results(world)[1])
    assert all(each == first for each in others)
    counts = [3] + [4] * (world - 1)
    assert first["rows"] == f"all ranks must have the same number of rows, got {counts}"
    assert "must have the same dtype on all ranks" in first["dtype"]
    for wrong in (CLASSES, -1):
        assert first[wrong] == (
            f"target[2] of rank {world - 1} is {wrong}, wanted a class in [0, {CLASSES}) or "
            "ignore_index -100"
        )
