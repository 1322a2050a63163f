"""Test problems, their exact results in float64, and the error of a result against those."""

import torch

from tvmf_ext import reference

SCALE = 16.0
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def problem(N, C, D, device, dtype):
    """Features, weight, targets and scale like a trained net's: each row is close to its target."""
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    weight = torch.randn(C, D, **draw)
    target = torch.randint(C, (N,), **draw)
    input = (0.5 * weight[target] + torch.randn(N, D, **draw)).to(dtype)
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    return input.requires_grad_(), weight.requires_grad_(), target, scale


def exact(tensors, kappa, classes=1 << 14):
    """Loss and gradients in float64, made from `classes` classes at a time to save memory; the
    weight's gradient is stored in float32 for the same reason."""
    input, weight, target, scale = (t.detach() for t in tensors)
    x, s = input.double().requires_grad_(), scale.double().requires_grad_()
    blocks = range(0, len(weight), classes)

    def block(begin):
        w = weight[begin : begin + classes].double().requires_grad_()
        return w, reference.tvmf_logits(x, w, kappa=kappa, scale=s)

    with torch.no_grad():
        lse = torch.stack([block(begin)[1].logsumexp(1) for begin in blocks]).logsumexp(0)
    loss, dx, ds, dw = 0.0, torch.zeros_like(x), torch.zeros_like(s), torch.empty_like(weight)
    for begin in blocks:
        w, logits = block(begin)
        rows = torch.where((target >= begin) & (target < begin + len(w)))[0]
        with torch.no_grad():
            upstream = (logits - lse[:, None]).exp()
            upstream[rows, target[rows] - begin] -= 1
            upstream /= len(x)
            loss += (lse[rows] - logits[rows, target[rows] - begin]).sum() / len(x)
        gradients = torch.autograd.grad(logits, (x, w, s), upstream)
        dx += gradients[0]
        dw[begin : begin + len(w)] = gradients[1]
        ds += gradients[2]
    return loss, dx, dw, ds


def error(got, wanted, rows=64):
    """The largest relative error, by norm, of the loss and of each `rows` rows of the gradients.

    The norm of a whole gradient would hide a few rows that are wrong. Where the exact result is
    zero the error is absolute. Results of the forward pass alone are compared by the loss alone.
    """

    def blocks(t):
        return t.split(rows) if t.dim() else [t]

    worst = 0.0
    for g, w in zip(got, wanted, strict=False):
        norms = [
            ((a.double() - b).norm(), b.double().norm())
            for a, b in zip(blocks(g), blocks(w), strict=True)
        ]
        difference, size = (torch.stack(column).double() for column in zip(*norms, strict=True))
        found = (difference / torch.where(size > 0, size, 1)).max().item()
        worst = found if not found <= worst else worst  # written so that NaN counts as the worst
    return worst
