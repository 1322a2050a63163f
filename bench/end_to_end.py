"""`python -m bench.end_to_end`: a training step with the fused and with the eager head, in turns.

A step is backbone, head, backward pass and SGD with momentum on random images. The head's share is
the time of its loss and gradients alone on the same features; the update of its weight belongs to
the rest of the step. Memory is a step's peak beyond weights and momenta: activations, gradients and
what the head needs. A GPU runs under bfloat16 autocast in channels_last, the CPU in float32.
"""

import argparse
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress

from bench.measure.clock import Clock, summary
from bench.measure.machine import about
from bench.measure.memory import extra_memory
from bench.show import documents
from bench.show.results import load, save
from bench.show.tables import table
from bench.show.units import shape_of, with_spread, with_unit
from train.model import make_net
from tvmf_ext import TvMFLoss, reference

# The net, the number of classes, and how many images a batch has on the CPU and on a GPU.
CASES = {
    "ResNet-10, ImageNet-LT": ("resnet10", 1000, 32, 256),
    "ResNet-50, iNaturalist 2018": ("resnet50", 8142, 8, 256),
    "ResNet-10, a million classes": ("resnet10", 10**6, 32, 256),
}
HEADS = ("fused", "eager")


def make_step(net, head, images, labels, name):
    """The training step, and the head's part of it alone, as functions without arguments."""
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, 1e-4, 0.9, weight_decay=1e-4, fused=True)
    cuda = images.device.type == "cuda"
    autocast = partial(torch.autocast, images.device.type, torch.bfloat16, enabled=cuda)

    def loss_of(features):
        if name == "fused":
            return head(features, labels)
        scale = F.softplus(head.s_) + 1
        logits = reference.tvmf_logits(features, head.weight, kappa=head.kappa, scale=scale)
        return F.cross_entropy(logits, labels)

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


def take_turns(clock, calls, seconds, tick):
    """The seconds of each call in each turn; the first turn warms up and is dropped."""
    times, spent = {key: [] for key in calls}, 0.0
    for turn in count():
        if turn > 5 and spent >= seconds:
            break
        for key, call in calls.items():
            begin = clock.mark()
            result = call()
            times[key] += clock.seconds([begin, clock.mark()])
            spent += times[key][-1]
            del result
        tick(completed=spent)
    return {key: values[1:] for key, values in times.items()}


def measure(name, net, classes, batch, size, seconds, device, progress):
    """The figures of one case, as the JSON file has them."""
    torch.manual_seed(0)
    net = make_net(net, 3).to(device)
    head = TvMFLoss(net.num_features, classes).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    if device == "cuda":
        net, images = (t.to(memory_format=torch.channels_last) for t in (net, images))
    labels = torch.randint(classes, (batch,), device=device)
    results, calls = {}, {}
    for variant in HEADS:
        step, alone = make_step(net, head, images, labels, variant)
        step()  # makes the momenta, which do not count as extra memory
        results[variant] = {"loss": step().item()}
        for parameter in (*net.parameters(), *head.parameters()):
            parameter.grad = None
        results[variant]["extra_bytes"] = extra_memory(device, step, 0)
        calls |= {(variant, "step"): step, (variant, "head"): alone}
    task = progress.add_task(name, total=seconds)
    times = take_turns(Clock(device), calls, seconds, partial(progress.update, task))
    progress.remove_task(task)
    for variant in HEADS:
        step, alone = (times[variant, part] for part in ("step", "head"))
        results[variant] |= {
            "step_ms": summary([1e3 * s for s in step]),
            "images_per_s": summary([batch / s for s in step]),
            "head_share": summary([h / s for h, s in zip(alone, step, strict=True)]),
            "runs": len(step),
        }
    pairs = zip(times["eager", "step"], times["fused", "step"], strict=True)
    return {
        "name": name,
        "shape": [batch, classes, net.num_features],
        "image_size": size,
        "eager_over_fused": summary([eager / fused for eager, fused in pairs]),
        "results": results,
    }


def step_table(report):
    rows = []
    for case in report["cases"]:
        fused, eager = (case["results"][name] for name in HEADS)
        rows.append(
            {
                "training": case["name"],
                "(N, C, D)": shape_of(case),
                "images/s, fused": with_spread(fused["images_per_s"]),
                "images/s, eager": with_spread(eager["images_per_s"]),
                "eager step / fused step": f"{case['eager_over_fused']['median']:.2f}x",
                "fused head's share": f"{fused['head_share']['median']:.1%}",
                "eager head's share": f"{eager['head_share']['median']:.1%}",
                "steps": fused["runs"],
                "memory, fused": with_unit(fused["extra_bytes"], "B"),
                "memory, eager": with_unit(eager["extra_bytes"], "B"),
            }
        )
    return table(rows)


def parse(args):
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seconds", type=float, default=40, help="how long each case is measured (default 40)")
    add("--image-size", type=int, default=224, help="(default 224)")
    add("--json", type=Path, metavar="PATH", help="write the figures there")
    add("--load", type=Path, metavar="PATH", help="show a file of --json, measure nothing")
    text = (
        f"write the table into {documents.MEASUREMENTS} and the figures into "
        "bench/results/end-to-end-DEVICE.json"
    )
    add("--document", action="store_true", help=text)
    add("--quick", action="store_true", help="only try that it runs; its times mean nothing")
    options = parser.parse_args(args)
    if options.device == "cuda" and not options.load and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU, got none")
    if options.image_size < 32:
        parser.error(f"--image-size wants 32 or more, got {options.image_size}")
    if options.quick and options.document:
        parser.error("--document wants measured figures, got --quick")
    if options.document and not options.json:
        options.json = documents.results_path(f"end-to-end-{options.device}")
    options.load = load(options, parser)
    return options


def run(options):
    """Measures all cases and returns the report."""
    report = {"quick": options.quick, **about(options.device), "cases": []}
    with Progress(transient=True) as progress:
        for name, (net, classes, few, many) in CASES.items():
            batch, size, seconds = few, options.image_size, options.seconds
            if options.device == "cuda":
                batch = many
            if options.quick:
                classes, batch, size, seconds = min(classes, 5000), 2, 64, 0
            case = measure(name, net, classes, batch, size, seconds, options.device, progress)
            report["cases"].append(case)
    return report


def main(args=None):
    options = parse(args)
    report = options.load or run(options)
    print(step_table(report))
    save(report, options.json)
    if options.document:
        name = f"end to end {options.device}"
        documents.write_between(documents.MEASUREMENTS, name, step_table(report))


if __name__ == "__main__":
    main()
