"""`python -m bench.train`: the driver's loop beside a transcription of the paper's, in turns.

Stage 1: the steps of an epoch from the same weights, with the t-vMF head. The images are random, of
Fashion-MNIST's shape; all ways shift and mirror them.
    ours         train.fit as it is; it evaluates and saves after the steps, which is not timed
    reference    a DataLoader of PIL images and torchvision's transforms; the head in eager PyTorch;
                 SGD that is not fused; loss and two accuracies read from the device in every step.
                 Timed from its first batch on, without a progress bar
    same data    the reference's steps on our batches, so that its losses must equal ours
Stage 2: the whole stage on real digits, and with --data on long-tailed Fashion-MNIST. Features of 2
epochs are cached, and the time for that counts; the other way runs the backbone in every step as
the paper's code does (--views 0). Both are evaluated after each epoch, as in the paper's code, and
again after the last epoch alone.
Input: the CPU time that a worker takes for a JPEG of 256 to 500 pixels with ImageNet's transforms,
ours and torchvision's. Ours leaves the colours to the device; the time beside it is a CPU's.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import chain, count, starmap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.measure.machine import about
from train.augment import STATISTICS
from train.batches import ImageFiles, Loader, Readers, collate
from train.config import Config, load_recipe
from train.data import load_data
from train.fit import MOMENTUM
from train.model import Classifier, make_head
from train.session import Session
from train.splits import LongTailed, Paths, Split
from train.stages import build_net, train
from tvmf_ext import reference

# Classes of Fashion-MNIST, of iNaturalist 2018, and so many that the head takes most of the time.
CLASSES = (10, 8142, 100_000)
BATCH = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made_up(size, classes):
    """A long-tailed set of grey images of 28 x 28 pixels, noise over a pattern of their class."""
    draw = torch.Generator().manual_seed(0)
    labels = (classes * torch.rand(size, generator=draw) ** 4).long()
    patterns = torch.rand(classes, 1, 7, 7, generator=draw)[labels]
    noise = torch.rand(size, 1, 28, 28, generator=draw)
    images = Split((128 * F.interpolate(patterns, 28) + 127 * noise).byte(), labels)
    counts = torch.bincount(labels, minlength=classes)
    return LongTailed(images, images.take(torch.arange(BATCH)), None, classes, counts, "small", 28)


class Pictures(Dataset):
    """One transformed PIL image at a time, as from torchvision's data sets."""

    def __init__(self, split, loader):
        self.images, self.labels = split.images[:, 0].numpy(), split.labels.tolist()
        mean, std = (statistic.flatten().tolist() for statistic in (loader.mean, loader.std))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(self.images.shape[1], padding=loader.reach),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def quiet_session(data, recipe, **changes):
    session = Session(dataclasses.replace(recipe, **changes), data, device=DEVICE)
    session.console = Console(quiet=True)
    return session


def start(session):
    """Net and head with the weights that `train` starts from."""
    torch.manual_seed(session.config.seed)
    net = build_net(session).train()
    head = make_head("tvmf", net.num_features, session.data.num_classes, session.config)
    return net, head.to(session.device)


def epoch_of_ours(session):
    """Seconds and mean loss of the driver's epoch."""
    train(session)
    record = json.loads((session.config.out / "metrics.jsonl").read_text().splitlines()[-1])
    return record["seconds"], record["loss"]


def epoch_of_reference(session, batches):
    """Seconds and mean loss of the reference's epoch, from the weights that `train` starts from."""
    config, (net, head) = session.config, start(session)
    parameters = nn.ModuleList([net, head]).parameters()
    optimizer = torch.optim.SGD(parameters, config.lr, MOMENTUM, weight_decay=config.weight_decay)
    batches, sums, size = iter(batches), [0.0, 0.0, 0.0], 0
    first, began = next(batches), time.perf_counter()
    for images, labels in chain([first], batches):
        labels = labels.to(session.device, non_blocking=True)
        features = net(images.to(session.device, non_blocking=True))  # DataParallel moves them
        similarity = reference.tvmf_logits(features, head.weight, kappa=head.kappa)
        loss = F.cross_entropy(head.scale * similarity, labels)
        right = similarity.detach().topk(5).indices == labels[:, None]
        accuracy = [right[:, :k].float().sum() * (100 / len(labels)) for k in (1, 5)]
        numbers = loss.item(), 100 - accuracy[0].item(), 100 - accuracy[1].item()
        sums = [total + len(labels) * number for total, number in zip(sums, numbers, strict=True)]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        size += len(labels)
    return time.perf_counter() - began, sums[0] / size


def measure(about, functions, kind, seconds, progress):
    """A case of the report: calls `functions` in turns for that many seconds; each returns its own
    seconds and a figure named `kind`."""
    found, began, spent = {name: [] for name in functions}, time.perf_counter(), 0.0
    task = progress.add_task(about["name"], total=seconds)
    while len(found["ours"]) < (3 if seconds else 1) or spent < seconds:
        for name, function in functions.items():
            found[name].append(function())
            spent = time.perf_counter() - began
            progress.update(task, completed=spent)
    progress.remove_task(task)
    results = {}
    for name, pairs in found.items():
        times, figures = zip(*pairs, strict=True)
        results[name] = {"median_s": statistics.median(times), "runs_s": times, kind: figures}
    ratios = {name: r["median_s"] / results["ours"]["median_s"] for name, r in results.items()}
    return about | {"results": results, "ratios": ratios}


def stage1(classes, images, options, out, progress):
    recipe = Config(net="convnet", flip=True, batch_size=BATCH, epochs=1, stage2_epochs=0, out=out)
    session = quiet_session(made_up(images, classes), recipe)
    ours = session.loaders["train"]
    pictures = DataLoader(
        Pictures(session.data.train, ours),
        BATCH,
        shuffle=True,
        num_workers=options.workers,
        pin_memory=DEVICE == "cuda",
    )
    batch = next(ours(*session.epoch(1, 0)))  # also warms up both ways
    loss = Classifier(*start(session))(*batch)[0].item() / BATCH
    first = {"ours": loss, "reference": epoch_of_reference(session, [batch])[1]}
    about = {"name": f"stage 1, {classes} classes", "images": images, "first_loss": first}
    functions = {
        "ours": lambda: epoch_of_ours(session),
        "reference": lambda: epoch_of_reference(session, pictures),
        "same data": lambda: epoch_of_reference(session, ours(*session.epoch(1, 0))),
    }
    return measure(about, functions, "loss", options.seconds, progress)


def stage2(recipe, options, progress):
    data = load_data(recipe)
    train(quiet_session(data, dataclasses.replace(recipe, stage2_epochs=0)))

    def way(views, every):
        out, seeds = recipe.out / f"views {views}", count()
        out.mkdir(exist_ok=True)

        def whole():
            changes = {"model": recipe.out / "stage1.pt", "views": views, "out": out}
            session = quiet_session(data, recipe, eval_every=every, seed=next(seeds), **changes)
            began = time.perf_counter()
            report = train(session)["stage2"]
            return time.perf_counter() - began, report["error1"]

        return whole

    for every in (1, recipe.stage2_epochs):
        name = f"stage 2, {recipe.dataset}, evaluated every {every} of {recipe.stage2_epochs}"
        about = {"name": name, "images": len(data.train), "test_images": len(data.test)}
        functions = {"ours": way(2, every), "reference": way(0, every)}
        yield measure(about, functions, "error1", options.seconds, progress)


def write_jpegs(folder, size):
    """JPEGs of 256 to 500 pixels a side, whose coarse and fine patterns make the file as large as a
    photograph's of that size."""
    draw = torch.Generator().manual_seed(0)
    names = [str(folder / f"{i}.jpg") for i in range(size)]
    for name in names:
        height, width = torch.randint(256, 501, (2,), generator=draw).tolist()
        layers = [
            strength * F.interpolate(torch.rand(1, 3, side, side, generator=draw), (height, width))
            for side, strength in ((6, 150), (40, 70), (200, 35))
        ]
        pixels = sum(layers)[0].permute(1, 2, 0).byte().numpy()
        Image.fromarray(pixels).save(name, quality=92)
    return names


def input_pipeline(options, folder, progress):
    """Milliseconds of CPU time an image, in turns: our worker, torchvision's, and our device."""
    names = write_jpegs(folder, 8 if options.quick else 200)
    split = Split(Paths.of("", names), torch.zeros(len(names), dtype=torch.int64))
    cpu = torch.device("cpu")
    readers = Readers(ImageFiles([split], "imagenet", 224), 0, cpu)
    loader = Loader(split, readers, train=True)
    positions = range(len(split))
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
    theirs = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), jitter]
    theirs = transforms.Compose(
        [*theirs, transforms.ToTensor(), transforms.Normalize(*STATISTICS["imagenet"])]
    )

    def timed(work):
        began = time.process_time()
        return work(), (time.process_time() - began) / len(split) * 1000

    def by_torchvision():
        for i in positions:
            with Image.open(split.images[i]) as image:
                theirs(image.convert("RGB"))

    found, began = {"ours": [], "torchvision": [], "ours, device": []}, time.perf_counter()
    task = progress.add_task("input", total=None)
    while len(found["ours"]) < 3 or time.perf_counter() - began < options.seconds:
        items, spent = timed(lambda: [readers.images[0, True, i, 0, i] for i in positions])
        found["ours"].append(spent)
        found["torchvision"].append(timed(by_torchvision)[1])
        pixels, draws, *_ = collate(items)
        batch = zip(pixels.split(1), draws.split(1), strict=True)
        found["ours, device"].append(timed(partial(list, starmap(loader.prepare, batch)))[1])
    progress.remove_task(task)
    sizes = [os.path.getsize(split.images[i]) for i in positions]
    return {"name": "input", "images": len(split), "file_bytes": statistics.mean(sizes)} | {
        "ms_per_image": {name: statistics.median(times) for name, times in found.items()}
    }


def main(args=None):
    parser = argparse.ArgumentParser(
        "python -m bench.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=90,
        help="how long each line of the table is measured (default 90)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(12, os.cpu_count()),
        help="processes of the reference's DataLoader",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="torchvision's FashionMNIST")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument(
        "--quick", action="store_true", help="only try that it runs; its times mean nothing"
    )
    options = parser.parse_args(args)
    images, recipes = 50 * BATCH, [dataclasses.replace(load_recipe("digits"), epochs=15)]
    if options.data:
        fashion = load_recipe("fashion-mnist-lt")
        recipes += [dataclasses.replace(fashion, epochs=3, data=options.data)]
    if options.quick:
        images, options.seconds = 2 * BATCH, 0
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        cases = [stage1(c, images, options, Path(folder), progress) for c in CLASSES]
        for recipe in recipes:
            recipe = dataclasses.replace(recipe, stage2_epochs=30, out=Path(folder))
            if options.quick:
                recipe = dataclasses.replace(recipe, epochs=1, stage2_epochs=2, subset=0.2)
            cases += stage2(recipe, options, progress)
        inputs = input_pipeline(options, Path(folder), progress)

    table = Table("", "ours", "the reference's", "ratio", "same data", title="device: " + DEVICE)
    for case in cases:
        cells = [
            f"{case['images'] / r['median_s']:,.0f} images/s"
            if "loss" in r
            else f"{r['median_s']:.1f} s, error {statistics.mean(r['error1']):.1f} %"
            for r in case["results"].values()
        ]
        ratios = [f"{ratio:.2f}x" for ratio in case["ratios"].values()]
        table.add_row(case["name"], *cells[:2], *ratios[1:])
    Console().print(table)
    figures = (f"{name} {ms:.2f}" for name, ms in inputs["ms_per_image"].items())
    Console().print(f"input, ms of CPU time an image: {', '.join(figures)}")
    report = about(DEVICE) | {"workers": options.workers, "quick": options.quick}
    report |= {"batch_size": BATCH, "cases": cases, "input": inputs}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
