"""Small mistakes of users: each has its right value, or a message that says what is wanted."""

import copy

import pytest
import torch

import tvmf_ext
from tvmf_ext import TvMFLoss, error_at, margin, tvmf_cross_entropy, tvmf_logits

PRIOR = [-1.0, -2.0, -3.0]


def test_a_schedule_that_passes_zero_does_not_change_the_keys_of_a_state():
    head = TvMFLoss(4, 3, kappa=16.0)
    head.kappa.zero_()
    fresh = TvMFLoss(4, 3, kappa=16.0)
    fresh.load_state_dict(head.state_dict())
    assert fresh.kappa.item() == 0
    each = TvMFLoss(4, 3, kappa=[0.0, 0.0, 0.0])
    assert "kappa" in each.state_dict()


def test_a_cosine_head_loads_the_state_of_one_that_stores_no_kappa():
    state = TvMFLoss(4, 3, kappa=0.0).state_dict()
    assert "kappa" not in state
    moved = TvMFLoss(4, 3, kappa=0.0)
    moved.kappa.fill_(5.0)
    assert moved.state_dict()["kappa"].item() == 5
    moved.load_state_dict(state)
    assert moved.kappa.item() == 0
    assert "kappa" not in TvMFLoss(4, 3, kappa=0.0, device="meta").state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"kappa"'):
        TvMFLoss(4, 3, kappa=16.0).load_state_dict(state)


@pytest.mark.parametrize("kappa", [0.0, 16.0])
def test_a_head_on_meta_takes_over_a_state_with_assign(kappa):
    options = {
        "kappa": kappa,
        "prior": PRIOR,
        "weight": [1.0, 2.0, 3.0],
        "cosine_margin": [0.1] * 3,
    }
    trained = TvMFLoss(4, 3, **options)
    head = TvMFLoss(4, 3, device="meta", **options)
    head.load_state_dict(trained.state_dict(), assign=True)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(head(x, y), trained(x, y))


def test_kappa_is_checked_as_it_is_rounded():
    with pytest.raises(ValueError, match=r"^kappa must be .* in torch.float16, got 70000$"):
        TvMFLoss(4, 3, kappa=70000.0, dtype=torch.float16)
    head = TvMFLoss(4, 3, kappa=-0.49999)
    with pytest.raises(ValueError, match=r"^kappa must be .* in torch.bfloat16, got -0.49999$"):
        copy.deepcopy(head).bfloat16()
    assert head.double().kappa > -0.5
    for kappa in ("16", None):
        with pytest.raises(TypeError, match=r"^kappa must be a number or C numbers, got"):
            TvMFLoss(4, 3, kappa=kappa)


def test_the_constructor_checks_ignore_index_and_margins():
    with pytest.raises(TypeError, match=r"^ignore_index must be an int, got float$"):
        TvMFLoss(4, 3, ignore_index=3.0)
    with pytest.raises(ValueError, match=r"^cosine_margin must not require grad"):
        TvMFLoss(4, 3, cosine_margin=torch.tensor(0.1, requires_grad=True))
    assert TvMFLoss(4, 3, cosine_margin=torch.tensor([0.25])).cosine_margin == 0.25


def test_numbers_of_a_wrong_kind_are_named():
    x, w, y = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^ignore_index must fit int64, got 9223372036854775808$"):
        tvmf_cross_entropy(x, w, y, ignore_index=2**63)
    with pytest.raises(ValueError, match=r"^reduction must be .*, got \['mean'\]$"):
        tvmf_cross_entropy(x, w, y, reduction=["mean"])
    with pytest.raises(TypeError, match=r"^k must be an int, got float$"):
        tvmf_ext.topk(x, w, 2.0)
    with pytest.raises(TypeError, match=r"^k must be an int, got float$"):
        error_at(tvmf_ext.row_statistics(x, w, y), 2.5)
    for counts in (None, {0: 1}, "abc"):
        with pytest.raises(TypeError, match=r"^counts must be a tensor, an array or a list, got"):
            margin.log_prior(counts)
    with pytest.raises(TypeError, match=r"^tau must be a number, got str$"):
        margin.log_prior([1, 2], "1")
    with pytest.raises(TypeError, match=r"^largest must be a number, got NoneType$"):
        margin.ldam([1, 2], None)


def test_logits_have_a_shape_on_the_meta_device():
    x, w = torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta")
    assert tvmf_logits(x, w).shape == (2, 3)


def test_the_cpu_has_no_earlier_targets_to_check():
    tvmf_ext.check_targets("cpu")
    if not torch.cuda.is_available():
        tvmf_ext.check_targets()
        with pytest.raises(
            NotImplementedError, match=r"^check_targets needs a build .* got cuda:0$"
        ):
            tvmf_ext.check_targets("cuda:0")
