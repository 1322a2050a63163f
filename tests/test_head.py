"""`TvMFLoss`: its state, checkpoints and repr, and that loss, logits and statistics agree."""

import copy
import io
import pickle
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.problem import error
from tvmf_ext import TvMFLoss, reference, tvmf_cross_entropy

N, C, D = 12, 9, 16


def batch(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g).to(dtype), torch.randint(C, (N,), generator=g)


def head_of(*args, s=0.7, **options):
    """A head whose scale is not the initial one, as after training."""
    torch.manual_seed(1)
    head = TvMFLoss(D, C, *args, **options)
    torch.nn.init.constant_(head.s_, s)
    return head


HEADS = {
    "plain": {},
    "cosine": {"kappa": 0.0},
    "kappa and bias per class": {"kappa": torch.linspace(-0.3, 30, C), "bias": True},
    "every option": {
        "kappa": 4.0,
        "bias": True,
        "weight": torch.linspace(0.1, 2, C),
        "prior": torch.linspace(-3, 0, C),
        "ignore_index": 3,
        "label_smoothing": 0.1,
    },
}
ALL_HEADS = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)


def paper_checkpoint(kappa=64.0, bias=False):
    """The state that the paper's `tvMFLoss` saves; `CosLoss` has no kappa."""
    state = OrderedDict(weight=torch.randn(C, D), s_=torch.Tensor([1.25]))
    if bias:
        state["bias"] = torch.randn(C)
    if kappa is not None:
        state["kappa"] = torch.Tensor([kappa])
    return state


@pytest.mark.parametrize("bias", [False, True])
def test_state_has_the_names_and_shapes_of_the_papers_code(bias):
    head = TvMFLoss(D, C, kappa=16.0, bias=bias, weight=torch.ones(C), prior=torch.zeros(C))
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    expected = {"weight": (C, D), "s_": (1,), "kappa": (1,)} | ({"bias": (C,)} if bias else {})
    assert shapes == expected
    learnt = {name for name, _ in head.named_parameters()}
    assert learnt == expected.keys() - {"kappa"}


def test_kappa_may_be_an_integer():
    input, target = batch()
    torch.manual_seed(1)
    by_integer = TvMFLoss(D, C, kappa=16)(input, target)
    torch.manual_seed(1)
    assert torch.equal(by_integer, TvMFLoss(D, C, kappa=16.0)(input, target))


def test_a_head_keeps_its_own_copy_of_kappa():
    kappa = torch.full((C,), 2.0)
    head, other = TvMFLoss(D, C, kappa=kappa), TvMFLoss(D, C, kappa=kappa)
    head.load_state_dict(other.state_dict() | {"kappa": torch.full((C,), 5.0)})
    assert (kappa == 2).all()
    assert (other.kappa == 2).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_checkpoint_of_the_paper_loads_and_is_used(bias):
    state = paper_checkpoint(bias=bias)
    before = copy.deepcopy(state)
    head = TvMFLoss(D, C, kappa=16.0, bias=bias)
    head.load_state_dict(state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    input, target = batch()
    expected = reference.tvmf_cross_entropy(
        input,
        state["weight"],
        target,
        kappa=64.0,
        scale=F.softplus(torch.tensor(1.25)) + 1,
        linear_bias=state.get("bias"),
    )
    assert error(head(input, target), expected) <= 1e-6


def test_a_cosine_checkpoint_without_kappa_loads_into_a_head_of_kappa_0_alone():
    state = paper_checkpoint(kappa=None)
    names = list(state)
    head = TvMFLoss(D, C, kappa=0.0)
    head.load_state_dict(state)
    assert head.kappa.tolist() == [0.0]
    assert torch.equal(head.weight, state["weight"])
    result = TvMFLoss(D, C, kappa=16.0).load_state_dict(state, strict=False)
    assert result.missing_keys == ["kappa"]
    with pytest.raises(RuntimeError, match="kappa"):
        TvMFLoss(D, C, kappa=16.0).load_state_dict(state)
    assert list(state) == names


def test_a_checkpoint_loads_into_a_head_inside_a_model():
    state = OrderedDict((f"0.{name}", value) for name, value in paper_checkpoint(None).items())
    names = list(state)
    model = torch.nn.Sequential(TvMFLoss(D, C, kappa=0.0))
    model.load_state_dict(state)
    assert list(state) == names
    assert torch.equal(model[0].s_, state["0.s_"])
    missing = torch.nn.Sequential(TvMFLoss(D, C, kappa=0.0)).load_state_dict({}, strict=False)
    assert set(missing.missing_keys) == {"0.weight", "0.s_", "0.kappa"}


def test_a_checkpoint_with_a_kappa_loads_into_a_head_of_kappa_0():
    head = TvMFLoss(D, C, kappa=0.0)
    head.load_state_dict(paper_checkpoint(kappa=32.0))
    assert head.kappa.tolist() == [32.0]


@ALL_HEADS
def test_loss_is_cross_entropy_of_the_logits(options):
    head, (input, target) = head_of(**options), batch()
    logits = head.logits(input)
    assert logits.shape == (N, C)
    expected = F.cross_entropy(
        logits,
        target,
        weight=options.get("weight"),
        ignore_index=options.get("ignore_index", -100),
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    loss = head(input, target)
    assert error(loss.detach(), expected.detach()) <= 2e-6
    learnt = list(head.parameters())
    gradients = torch.autograd.grad(loss, learnt)
    for gradient, like in zip(gradients, torch.autograd.grad(expected, learnt), strict=True):
        assert error(gradient, like) <= 1e-5


@ALL_HEADS
def test_loss_from_statistics_is_the_loss(options):
    head, (input, target) = head_of(**options), batch()
    statistics = head.row_statistics(input, target)
    assert error(head.loss(statistics, target).detach(), head(input, target).detach()) <= 2e-6
    valid = target != options.get("ignore_index", -100)
    score = head.logits(input) if head.prior is None else head.logits(input) - head.prior
    assert torch.equal(statistics.rank[valid] == 0, (score.argmax(1) == target)[valid])


def test_scale_is_softplus_of_s_plus_1():
    head, (input, target) = head_of(s=-1.5), batch()
    assert error(head.scale.detach(), F.softplus(torch.tensor([-1.5])) + 1) == 0
    by_value = tvmf_cross_entropy(input, head.weight, target, scale=head.scale.item())
    assert error(head(input, target).detach(), by_value.detach()) <= 1e-6
    assert TvMFLoss(D, C).s_.item() == 0


@pytest.mark.parametrize("s", [-30.0, 0.0, 30.0])
def test_scale_and_its_gradient_at_any_s(s):
    head, (input, target) = head_of(s=s), batch()
    loss = head(input, target)
    expected = tvmf_cross_entropy(input, head.weight, target, scale=head.scale)
    assert error(loss.detach(), expected.detach()) <= 1e-6
    gradients = [torch.autograd.grad(t, head.s_)[0] for t in (loss, expected)]
    assert error(*gradients) <= 1e-5


@ALL_HEADS
def test_training_reduces_the_loss(options):
    head, (input, target) = head_of(**options), batch()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(head(input, target))
        losses[-1].backward()
        optimizer.step()
    assert all(after < before for before, after in pairwise(losses))
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_head_give_the_same_loss(way):
    head, (input, target) = head_of(**HEADS["every option"]), batch()
    if way == "deepcopy":
        other = copy.deepcopy(head)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(head))
    else:
        file = io.BytesIO()
        torch.save(head.state_dict(), file)
        other = TvMFLoss(D, C, **HEADS["every option"])
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(other(input, target), head(input, target))
    assert repr(other) == repr(head)
    with torch.no_grad():
        other.weight.zero_()
    assert head.weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@ALL_HEADS
def test_a_head_moves_to_another_dtype_with_all_it_holds(options, dtype):
    head, (input, target) = head_of(**options).to(dtype), batch(dtype=dtype)
    assert all(t.dtype == dtype for t in [*head.parameters(), *head.buffers()])
    loss = head(input, target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert all(p.grad.dtype == dtype for p in head.parameters())
    logits = head.logits(input)
    assert logits.dtype == loss.dtype
    expected = F.cross_entropy(
        logits.double(),
        target,
        weight=None if head.class_weight is None else head.class_weight.double(),
        ignore_index=head.ignore_index,
        label_smoothing=head.label_smoothing,
    )
    assert error(loss.detach(), expected.detach()) <= 32 * torch.finfo(loss.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_features_of_another_dtype_than_the_heads(dtype):
    head, (input, target) = head_of(bias=True).to(dtype), batch()
    assert head(input, target).dtype == torch.float32
    assert head.logits(input).dtype == torch.float32
    assert error(head(input, target).detach(), F.cross_entropy(head.logits(input), target)) <= 2e-6


def test_a_head_can_be_made_on_the_meta_device_and_filled_later():
    with torch.device("meta"):
        head = TvMFLoss(D, C, bias=True)
    assert head.weight.is_meta
    other = head_of(bias=True)
    head = TvMFLoss(D, C, bias=True, device="meta").to_empty(device="cpu")
    head.load_state_dict(other.state_dict())
    assert torch.equal(head(*batch()), other(*batch()))


def test_initialisation_is_that_of_linear():
    torch.manual_seed(4)
    head = TvMFLoss(D, C, bias=True)
    torch.manual_seed(4)
    linear = torch.nn.Linear(D, C)
    assert torch.equal(head.weight, linear.weight)
    assert torch.equal(head.bias, linear.bias)


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(TvMFLoss(D, C)) == "TvMFLoss(in_features=16, num_classes=9, kappa=16)"
    text = repr(head_of(**HEADS["every option"] | {"reduction": "sum"}))
    options = ("kappa=4", "bias=True", "ignore_index=3", "reduction='sum'", "label_smoothing=0.1")
    for part in (*options, "class_weight=[9]", "prior=[9]"):
        assert part in text
    assert "kappa=[9]" in repr(head_of(**HEADS["kappa and bias per class"]))


def test_distributed_data_parallel_trains_a_head(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        head, (input, target) = head_of(bias=True), batch()
        expected = torch.autograd.grad(head(input, target), list(head.parameters()))
        model = DistributedDataParallel(head)
        model(input, target).backward()
        for parameter, gradient in zip(head.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()
