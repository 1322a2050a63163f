"""`python -m bench.end_to_end`: a training step with the fused and with the eager head, in turns.

Backbone, head, backward pass and SGD with momentum on random images: what the head is of a step,
and what the fused one buys. `head` is its loss and gradients alone, on the same features; the
update of its weight belongs to the rest of the step. Memory is a step's peak beyond weights and
momenta: activations, gradients and what the head needs. On a GPU under bfloat16 autocast and
channels_last; on the CPU float32, with fewer images.
"""

import argparse
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tabulate import tabulate

from bench.measure import Clock, about, extra_memory, summary
from bench.show import ROOT, bytes_of, load, save, with_spread, write_between
from train.model import make_net
from tvmf_ext import TvMFLoss, reference

CASES = {  # net, classes, images on the CPU and on a GPU
    "ResNet-10, ImageNet-LT": ("resnet10", 1000, 32, 256),
    "ResNet-50, iNaturalist 2018": ("resnet50", 8142, 8, 256),
    "ResNet-10, a million classes": ("resnet10", 10**6, 32, 256),
}
HEADS = ("fused", "eager")


def step_of(net, head, images, labels, name):
    """The training step, and the head's part of it alone, as functions of no arguments."""
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, 1e-4, 0.9, weight_decay=1e-4, fused=True)
    cuda = images.device.type == "cuda"
    autocast = partial(torch.autocast, images.device.type, torch.bfloat16, enabled=cuda)

    def loss_of(features):
        if name == "fused":
            return head(features, labels)
        return reference.tvmf_cross_entropy(
            features, head.weight, labels, kappa=head.kappa, scale=F.softplus(head.s_) + 1
        )

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = loss_of(net(images))
        loss.backward()
        optimizer.step()
        return loss.detach()

    with torch.no_grad(), autocast():
        features = net(images).detach().requires_grad_()

    def alone():
        with autocast():
            loss = loss_of(features)
        return torch.autograd.grad(loss, (features, *head.parameters()))

    return step, alone


def measure(name, net, classes, batch, size, seconds, device, progress):
    torch.manual_seed(0)
    net = make_net(net, 3).to(device)
    head = TvMFLoss(net.num_features, classes).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    if device == "cuda":
        net, images = (t.to(memory_format=torch.channels_last) for t in (net, images))
    labels = torch.randint(classes, (batch,), device=device)
    results, clock, calls = {}, Clock(device), {}
    for variant in HEADS:
        step, alone = step_of(net, head, images, labels, variant)
        step()  # makes the momenta, which are no part of the peak
        results[variant] = {"loss": step().item()}
        for parameter in (*net.parameters(), *head.parameters()):
            parameter.grad = None
        results[variant]["extra_bytes"] = extra_memory(device, step, 0)
        calls |= {(variant, "step"): step, (variant, "head"): alone}
    times = {key: [] for key in calls}
    task, spent = progress.add_task(name, total=seconds), 0.0
    for turn in count():
        if turn > 5 and spent >= seconds:
            break
        for key, call in calls.items():
            begin = clock.mark()
            result = call()
            times[key] += clock.seconds([begin, clock.mark()])
            spent += times[key][-1]
            del result
        progress.update(task, completed=spent)
    progress.remove_task(task)
    for variant in HEADS:
        step, alone = (times[variant, part][1:] for part in ("step", "head"))
        shares = [h / s for h, s in zip(alone, step, strict=True)]
        results[variant] |= {
            "step_ms": summary([1e3 * s for s in step]),
            "images_per_s": summary([batch / s for s in step]),
            "head_share": summary(shares),
            "runs": len(step),
        }
    pairs = zip(times["eager", "step"][1:], times["fused", "step"][1:], strict=True)
    ratio = summary([eager / fused for eager, fused in pairs])
    return {"name": name, "shape": [batch, classes, net.num_features], "image_size": size,
            "eager_over_fused": ratio, "results": results}  # fmt: skip


def table(report, style="simple"):
    rows = []
    for case in report["cases"]:
        fused, eager = (case["results"][name] for name in HEADS)
        rows.append({
            "": case["name"],
            "(N, C, D)": "({}, {}, {})".format(*case["shape"]),
            "images/s, fused": with_spread(fused["images_per_s"]),
            "eager": with_spread(eager["images_per_s"]),
            "eager's step over fused's": f"{case['eager_over_fused']['median']:.2f}x",
            "head's share, fused": f"{fused['head_share']['median']:.1%}",
            "eager ": f"{eager['head_share']['median']:.1%}",
            "runs": str(fused["runs"]),
            "memory, fused": bytes_of(fused["extra_bytes"]),
            "eager  ": bytes_of(eager["extra_bytes"]),
        })  # fmt: skip
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def main(args=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=40, help="of each case (default 40)")
    parser.add_argument("--image-size", type=int, default=224, help="(default 224)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--load", type=Path, metavar="PATH", help="show a JSON, measure nothing")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table and "
                        "bench/results/end-to-end-DEVICE.json")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="see that it runs, measure nothing")
    options = parser.parse_args(args)
    if options.device == "cuda" and not options.load and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU, got none")
    if options.image_size < 32:
        parser.error(f"--image-size wants 32 or more, got {options.image_size}")
    if options.quick and options.readme:
        parser.error("--readme wants figures, --quick measures none")
    cases = {} if options.load else CASES
    report = load(options, parser) or {"quick": options.quick, **about(options.device), "cases": []}
    with Progress(transient=True) as progress:
        for name, (net, classes, few, many) in cases.items():
            batch = few if options.device == "cpu" else many
            if options.quick:
                classes, batch, options.image_size, options.seconds = min(classes, 5000), 2, 64, 0
            report["cases"].append(measure(
                name, net, classes, batch, options.image_size, options.seconds, options.device,
                progress,
            ))  # fmt: skip
    print(table(report))
    if options.readme and not options.json:
        options.json = ROOT / f"bench/results/end-to-end-{options.device}.json"
    save(report, options.json)
    if options.readme:
        write_between("README.md", f"end to end {options.device}", table(report, "github"))


if __name__ == "__main__":
    main()
