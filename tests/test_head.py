"""`TvMFLoss`: its state, checkpoints and repr, and that loss, logits and statistics agree."""

import copy
import io
import pickle
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from tests.problem import error
from tvmf_ext import TvMFLoss, error_at, logits, reference, tvmf_cross_entropy

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


def training_logits(head, input):
    """The logits of the loss, which have the prior."""
    logits = head.logits(input)
    return logits if head.prior is None else logits + head.prior


@ALL_HEADS
def test_loss_is_cross_entropy_of_the_logits(options):
    head, (input, target) = head_of(**options), batch()
    logits = training_logits(head, input)
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
    right = (head.logits(input).argmax(1) == target)[valid]
    assert torch.equal(statistics.rank[valid] == 0, right)
    assert error_at(statistics) == 1 - right.float().mean()


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
    logits = training_logits(head, input)
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


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_trains_a_head(one_process):
    head, (input, target) = head_of(bias=True), batch()
    expected = torch.autograd.grad(head(input, target), list(head.parameters()))
    model = DistributedDataParallel(head)
    model(input, target).backward()
    for parameter, gradient in zip(head.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_sharded_head_works_and_is_restored_from_the_meta_device(one_process):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    options = HEADS["every option"] | {"kappa": torch.arange(1.0, C + 1), "learn_kappa": True}
    plain, (input, target) = head_of(**options), batch()
    with torch.device("meta"):
        head = TvMFLoss(D, C, **options)
    fully_shard(head, mesh=mesh)
    for name in ("logits", "row_statistics", "topk"):
        register_fsdp_forward_method(head, name)
    head.to_empty(device="cpu")
    head.reset_parameters()
    assert torch.equal(head.kappa.full_tensor(), plain.kappa)
    assert head.s_.full_tensor() == 0
    assert torch.equal(head.prior, plain.prior)
    plain.load_state_dict({n: p.full_tensor() for n, p in head.state_dict().items()})
    assert torch.equal(head(input, target), plain(input, target))
    assert torch.equal(head.logits(input), plain.logits(input))
    assert torch.equal(head.topk(input, 2)[1], plain.topk(input, 2)[1])
    assert torch.equal(
        head.row_statistics(input, target).lse, plain.row_statistics(input, target).lse
    )


def test_arguments_after_the_sizes_go_by_name():
    with pytest.raises(TypeError, match="positional"):
        TvMFLoss(D, C, True)


@pytest.mark.parametrize("scale", [1.001, 2, 16.0, 64.0])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_the_scale_starts_where_it_is_set(scale, learn_scale):
    head = TvMFLoss(D, C, scale=scale, learn_scale=learn_scale)
    assert head.scale.item() == pytest.approx(scale, rel=2e-7)
    assert ("s_" in dict(head.named_parameters())) == learn_scale
    assert "s_" in head.state_dict()
    assert ("learn_scale=False" in repr(head)) != learn_scale


@pytest.mark.parametrize("scale", [1.0, 0.5, -1, float("inf"), float("nan")])
def test_a_scale_that_the_head_cannot_have_is_refused(scale):
    with pytest.raises(ValueError, match=rf"^scale must be finite and > 1, .* got {scale}$"):
        TvMFLoss(D, C, scale=scale)


@pytest.mark.parametrize("kappa", [4.0, torch.linspace(1, 9, C)], ids=["one", "[C]"])
def test_a_learnt_kappa_has_a_gradient_and_is_in_the_state(kappa):
    head, (input, target) = head_of(kappa=kappa, learn_kappa=True), batch()
    wanted = torch.as_tensor(kappa).reshape(-1).clone().requires_grad_()
    reference.tvmf_cross_entropy(
        input, head.weight, target, kappa=wanted, scale=head.scale
    ).backward()
    head(input, target).backward()
    assert error(head.kappa.grad, wanted.grad) <= 1e-5
    assert "kappa" in TvMFLoss(D, C, kappa=0.0, learn_kappa=True).state_dict()


def everything(head):
    """The constants of a head, its weight aside, which is drawn at random."""
    names = ("kappa", "s_", "class_weight", "prior")
    return {name: getattr(head, name).detach().tolist() for name in names}


@pytest.mark.parametrize("way", ["context", "argument", "skip_init"])
@pytest.mark.parametrize("learn", [True, False])
def test_a_head_from_the_meta_device_has_its_constants(way, learn):
    options = HEADS["every option"] | {"learn_scale": learn, "learn_kappa": learn, "scale": 5.0}
    if way == "skip_init":
        head = torch.nn.utils.skip_init(TvMFLoss, D, C, **options)
    else:
        with torch.device("meta" if way == "context" else "cpu"):
            meta = {"device": "meta"} if way == "argument" else {}
            head = TvMFLoss(D, C, **options, **meta)
        assert all(t.is_meta for t in [*head.parameters(), *head.buffers()])
        assert "kappa=4" in repr(head)
        head = head.to_empty(device="cpu")
    if learn:  # parameters are the caller's to initialise
        head.reset_parameters()
    assert everything(head) == everything(TvMFLoss(D, C, **options))


def test_reset_parameters_restores_what_the_constructor_sets():
    head = TvMFLoss(D, C, **HEADS["every option"])
    wanted = everything(head)
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            tensor.fill_(7)
    head.reset_parameters()
    assert everything(head) == wanted
    assert head.weight.std() > 0
    assert (head.bias.abs() <= D**-0.5).all()


def test_a_kappa_beyond_half_precision_is_refused():
    head = TvMFLoss(D, C, kappa=70000.0)
    with pytest.raises(ValueError, match=r"^kappa must be .* in torch.float16, got 70000$"):
        head.half()
    assert head.kappa.dtype == head.weight.dtype == torch.float32
    assert head.bfloat16().kappa.isfinite().all()


def test_the_state_of_a_cosine_head_is_that_of_the_papers():
    head = TvMFLoss(D, C, kappa=0.0)
    assert set(head.state_dict()) == {"weight", "s_"}
    other = TvMFLoss(D, C, kappa=0.0)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)


def test_class_weights_and_prior_may_be_lists_and_arrays():
    values = [1.0] * C
    for kind in (list, np.array, torch.tensor):
        head = TvMFLoss(D, C, weight=kind(values), prior=kind(values))
        assert head.class_weight.tolist() == head.prior.tolist() == values


def test_no_ignore_index_is_torchs_default():
    input, target = batch()
    target[0] = -100
    head = head_of(ignore_index=None)
    assert torch.equal(head(input, target), head_of()(input, target))
    loss = tvmf_cross_entropy(input, head.weight, target, ignore_index=None)
    assert torch.equal(loss, tvmf_cross_entropy(input, head.weight, target))


def test_the_error_does_not_count_ignored_rows():
    head, (input, target) = head_of(), batch()
    right = head.logits(input).argmax(1)
    target = torch.where(torch.arange(N) % 3 == 0, -100, right)
    statistics = head.row_statistics(input, target)
    assert error_at(statistics) == 0
    wrong = head.row_statistics(input, torch.where(target == -100, -100, (right + 1) % C))
    assert error_at(wrong) == 1 and error_at(wrong, C) == 0
    assert error_at(head.row_statistics(input, torch.full((N,), -100))).isnan()
    with pytest.raises(ValueError, match=r"^k must be at least 1, got 0$"):
        error_at(statistics, 0)


@ALL_HEADS
@pytest.mark.parametrize("k", [1, 4, C])
@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_topk_is_that_of_the_logits(options, k, block, monkeypatch):
    monkeypatch.setattr(logits, "_TOPK_BLOCK", block)
    head, (input, _) = head_of(**options), batch()
    values, classes = head.topk(input, k)
    wanted = head.logits(input).topk(k)
    torch.testing.assert_close(values, wanted.values, rtol=1e-6, atol=1e-6)
    assert torch.equal(classes, wanted.indices)
    assert not values.requires_grad


@pytest.mark.parametrize("k", [0, C + 1])
def test_topk_refuses_more_classes_than_there_are(k):
    with pytest.raises(ValueError, match=rf"^k must be from 1 to C = {C}, got {k}$"):
        head_of().topk(batch()[0], k)


def test_topk_of_no_rows():
    values, classes = head_of().topk(torch.empty(0, D), 2)
    assert values.shape == classes.shape == (0, 2)
