"""The head against code of others: PyTorch's samples for cross-entropy, the losses of
pytorch-metric-learning, and the formula of the t-vMF paper."""

import pytest
import torch
import torch.nn.functional as F

from tests.problem import error
from tvmf_ext import TvMFLoss, tvmf_cross_entropy

OPTIONS = ("weight", "ignore_index", "reduction", "label_smoothing")


def samples(name):
    """PyTorch's own samples of an operator in float64, as logits `[N, C]`, labels and options."""
    op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    for operator in op_db:
        if operator.name != f"nn.functional.{name}":
            continue
        for sample in operator.sample_inputs("cpu", torch.float64, requires_grad=False):
            input, *arguments = (sample.input, *sample.args)
            bias = sample.kwargs.get("linear_bias")
            options = {k: v for k, v in sample.kwargs.items() if k in OPTIONS}
            target = arguments[-1]
            if target.dtype != torch.int64 or target.dim() != 1 or input.dim() != 2:
                continue
            if name == "linear_cross_entropy":
                if arguments[0].dim() != 2:
                    continue
                input = F.linear(input, arguments[0], bias)
            yield input, target, options


def head_with(logits):
    """Features, class vectors and a scale whose scaled cosines are the logits: the features are the
    axes, and a further coordinate makes each class vector a unit vector."""
    N = len(logits)
    scale = 1.5 * logits.norm(dim=0).amax().clamp(min=1)
    cosine = (logits / scale).T
    rest = (1 - cosine.square().sum(1)).sqrt()
    return torch.eye(N, N + 1).to(logits), torch.cat([cosine, rest[:, None]], 1), scale


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_the_samples_of_torch(name):
    tried = 0
    for logits, target, options in samples(name):
        logits = logits.detach().clone().requires_grad_()
        expected = F.cross_entropy(logits, target, **options)
        upstream = torch.linspace(0.5, 1.5, max(1, expected.numel())).to(logits)
        upstream = upstream.reshape(expected.shape)
        (by_logits,) = torch.autograd.grad(expected, logits, upstream)
        input, weight, scale = head_with(logits.detach())
        bias = torch.zeros(logits.shape[1]).to(logits).requires_grad_()
        head = {"kappa": 0.0, "scale": scale, "linear_bias": bias}
        loss = tvmf_cross_entropy(input, weight, target, **head, **options)
        (by_bias,) = torch.autograd.grad(loss, bias, upstream)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        expected = scale * by_logits.sum(0)
        torch.testing.assert_close(by_bias, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
        tried += 1
    assert tried >= 8


@pytest.mark.parametrize("name", ["CosFaceLoss", "ArcFaceLoss"])
@pytest.mark.parametrize("margin", [0.1, 0.35, 0.5])
def test_the_margins_of_pytorch_metric_learning(name, margin):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    N, C, D = 24, 7, 16
    degrees = name == "ArcFaceLoss"
    theirs = getattr(losses, name)(
        C, D, margin=torch.rad2deg(torch.tensor(margin)).item() if degrees else margin, scale=16
    ).double()
    preset = TvMFLoss.arcface if degrees else TvMFLoss.cosface
    ours = preset(D, C, margin=margin, scale=16.0).double()
    target = torch.arange(N) % C
    with torch.no_grad():
        ours.weight.copy_(theirs.W.T)
        # Near their class, so that no angle passes pi, where theirs jumps.
        x = F.normalize(ours.weight)[target] + 0.1 * torch.randn(N, D)
    results = []
    for head, weight in ((theirs, theirs.W), (ours, ours.weight)):
        input = x.clone().requires_grad_()
        loss = head(input, target)
        dx, dw = torch.autograd.grad(loss, [input, weight])
        results.append((loss, dx, dw if head is ours else dw.T))
    for got, expected in zip(*reversed(results), strict=True):
        assert error(got, expected) <= 1e-6  # theirs keeps the margin in float32


@pytest.mark.parametrize("kappa", [-0.3, 0.0, 4.0, 16.0, 64.0])
def test_the_formula_of_the_paper(kappa):
    torch.manual_seed(0)
    input, weight = torch.randn(20, 8).double(), torch.randn(6, 8).double()
    target = torch.arange(20) % 6
    cosine = F.linear(F.normalize(input), F.normalize(weight))
    logits = (1 + cosine) / (1 + kappa * (1 - cosine)) - 1
    expected = F.cross_entropy(12 * logits, target)
    loss = tvmf_cross_entropy(input, weight, target, kappa=kappa, scale=12.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
