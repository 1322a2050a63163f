"""Trains a classifier on long-tailed data in two stages and reports its error by class size.

Stage 1 trains backbone and head on every image equally often. Stage 2 freezes the backbone and
trains a new cosine head on every class equally often.

    python -m train                                    digits, a t-vMF head
    python -m train --dataset imagenetlt --data DIR    a recipe of the paper
    torchrun --nproc-per-node 8 -m train --dataset inat2018 --data DIR --resume
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import shutil
import signal
import sys
import time
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from train import checkpoint, distributed
from train.batches import (
    Loader,
    balanced_over_classes,
    balanced_over_images,
    channel_statistics,
    seed_of,
    share,
    steps_of,
)
from train.config import Config, TrainError, parse_config
from train.data import LongTailed, load_data
from train.features import Cached
from train.metrics import COLUMNS, error_report, full_report, image_rows
from train.model import Classifier, head_of_state, make_head, make_net

MOMENTUM = 0.9  # the paper's, without Nesterov's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVAL_BATCH = 256
LOOK = 50  # steps between looks at the loss: each waits for the device
CHEAP = 10  # seconds of epochs on cached features that are sooner trained again than saved
AGREE = 8  # steps after which many processes agree on whether to stop


class Stopped(Exception):
    """SIGTERM or SIGINT asked to leave, and what was done is saved."""


class Run:
    """What both stages share: configuration, data, device, processes, terminal."""

    stopping = False

    def __init__(self, config: Config, data: LongTailed, rank=0, world=1, device="cpu"):
        self.config, self.data, self.rank, self.world = config, data, rank, world
        self.device, self.console = torch.device(device), Console(quiet=rank > 0)
        self.parts = world * config.accumulate
        self.bad: set[str] = set()
        images = data.train.images
        statistics = channel_statistics(images) if isinstance(images, Tensor) else None
        self.loaders = {
            name: Loader(
                split, data.augment, data.image_size, self.device, train=name == "train",
                flip=config.flip, statistics=statistics, skip_bad=config.bad_images == "skip",
                workers=config.workers,
            )
            for name, split in data.splits()
        }  # fmt: skip

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def autocast(self):
        dtype = DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def progress(self) -> Progress:
        return Progress(
            *Progress.get_default_columns(), "{task.fields[note]}", console=self.console
        )

    def epoch(self, stage: int, epoch: int) -> tuple[Tensor, list[Tensor], int]:
        """Order of an epoch's images, this process's batches of positions in it (`accumulate` a
        step), seed of the augmentation."""
        config, seed = self.config, seed_of(self.config.seed, stage, epoch)
        draw = balanced_over_images if stage == 1 else balanced_over_classes
        order = draw(self.data.train.labels, config.batch_size, seed)
        first = self.rank * config.accumulate
        batches = [
            share(step, len(order), config.batch_size, part, self.parts)
            for step in range(steps_of(len(order), config.batch_size, self.parts))
            for part in range(first, first + config.accumulate)
        ]
        return order, batches, seed

    def test_epoch(self, size: int) -> tuple[Tensor, list[Tensor], int]:
        """Likewise for evaluation: every image in one process, once."""
        mine = torch.arange(self.rank, size, self.world)
        return torch.arange(size), list(mine.split(EVAL_BATCH)) if len(mine) else [], 0

    def features(self, net: nn.Module, split: str, *epoch):
        """Yields features and labels of an epoch's batches, which are made again after a stop."""
        for images, labels in self.loaders[split](*epoch):
            if self.stopping and self.world == 1:  # others might wait for this process
                raise Stopped
            with self.autocast():
                features = net(self.laid_out(images))
            yield features, labels

    def laid_out(self, images: Tensor) -> Tensor:
        last = self.config.channels_last
        return images.contiguous(memory_format=torch.channels_last) if last else images

    def bad_images(self) -> set[str]:
        """Of all processes; to be called in all of them."""
        return distributed.union(self.bad.union(*(loader.bad for loader in self.loaders.values())))


@torch.no_grad()
def evaluate(run: Run, name: str, net: nn.Module, head: nn.Module, cached=None) -> Tensor:
    """[M, COLUMNS] for the M images of a split, in every process."""
    net.eval()
    size = len(getattr(run.data, name))
    rows = torch.zeros(size, len(COLUMNS), dtype=torch.float64, device=run.device)
    epoch = run.test_epoch(size)
    batches = run.features(net, name, *epoch)
    if cached:
        batches = map(cached[name].batch, range(len(epoch[1])))
    for positions, (features, labels) in zip(epoch[1], batches, strict=True):
        with run.autocast():
            rows[positions] = image_rows(head, features, labels)
    return distributed.total(rows).cpu()


def cosine_lr(lr: float, epoch: int, epochs: int) -> float:
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


def still_rises(scales: list[float], epochs: int) -> bool:
    """Whether a scale (before the first epoch and after each) grew, over the last quarter of the
    sum of learning rates, more than half as fast as on average."""
    rates = [cosine_lr(1, epoch, epochs) for epoch in range(epochs)]
    left = [sum(rates[epoch:]) / sum(rates) for epoch in range(epochs)]
    late = max(epoch for epoch in range(epochs) if left[epoch] >= 0.25)
    growth = scales[-1] - scales[0]
    return growth > 0.1 and scales[-1] - scales[late] > 0.5 * left[late] * growth


def freeze(net: nn.Module, bn: str) -> None:
    """Evaluation mode, but for batch norm that is to normalise by the batch."""
    net.eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.train(bn == "batch")


@torch.no_grad()
def shift_statistics(run: Run, net: nn.Module) -> None:
    """Replaces batch norm's running statistics by their mean over an epoch of class-balanced
    batches; after MiSLAS (Zhong et al., CVPR 2021), but once, and normalising by them."""
    freeze(net, "batch")
    momenta = {m: m.momentum for m in net.modules() if isinstance(m, _BatchNorm)}
    for module in momenta:
        module.reset_running_stats()
        module.momentum = None  # the mean over all batches
    for _ in run.features(net, "train", *run.epoch(2, 0)):
        pass
    for module, momentum in momenta.items():
        module.momentum = momentum
    distributed.average_buffers(net)


@torch.no_grad()
def cache_features(run: Run, net: nn.Module) -> dict:
    """Features of `views` epochs of stage 2, a list, then of each split for evaluation. What the
    backbone does in stage 2 does not depend on the head: as many views as epochs change nothing."""
    folder = run.config.out / "features"
    folder.mkdir(exist_ok=True)
    views = range(min(run.config.views, run.config.stage2_epochs))
    tested = {name: run.test_epoch(len(split)) for name, split in run.data.splits()}
    del tested["train"]
    with run.progress() as progress:
        epochs = {f"view {view}": run.epoch(2, view) for view in views} | tested
        steps = sum(len(batches) for _, batches, _ in epochs.values())
        bar = progress.add_task("features for stage 2", total=steps, note="")

        def cache(name):
            def counted():
                split = name if name in tested else "train"
                for batch in run.features(net, split, *epochs[name]):
                    progress.advance(bar)
                    yield batch

            return Cached(folder / f"{name}, rank {run.rank}", counted(), run.device)

        freeze(net, run.config.bn)
        # In the order of the epochs, which batch norm's running statistics follow.
        cached = {"train": [cache(f"view {view}") for view in views]}
        distributed.average_buffers(net)
        net.eval()
        return cached | {name: cache(name) for name in tested}


def log_epoch(run: Run, writer: SummaryWriter, record: dict) -> None:
    """A line in metrics.jsonl and on the terminal, and TensorBoard's scalars."""
    with open(run.config.out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    step = record["epoch"] - 1
    text = f"stage {record['stage']}, epoch {record['epoch']}/{record['epochs']}: "
    text += f"loss {record['loss']:.3f}, error@1 {record['error1']:.1f} %"
    writer.add_scalar("LearningRate", record["lr"], step)
    for name in ("train", "val", "test"):
        if seen := record if name == "train" else record.get(name):
            for tag, key in (("Loss", "loss"), ("Error_1", "error1"), ("Error_5", "error5")):
                writer.add_scalar(f"{tag}/{name}", seen[key], step)
            text += f", {name} {seen['error1']:.1f} %" if name != "train" else ""
    text += f", lr {record['lr']:.2g}"
    if record["scale"] is not None:
        writer.add_scalar("Scale", record["scale"], step)
        text += f", scale {record['scale']:.2f}"
    writer.flush()
    run.say(f"{text}, {record['images_per_s']:.0f} images/s")


def check_finite(loss: float, model: nn.Module, config: Config, epoch: int) -> None:
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        loss = math.nan  # that of the next step
    if not math.isfinite(loss):
        raise TrainError(
            f"--lr: got {config.lr}, with which the loss became {loss} in epoch {epoch + 1}; "
            "wanted a smaller one or --precision fp32. The checkpoint before that is whole"
        )


def fit(run: Run, stage: int, net, head, cached: dict | None, saved: dict | None, results: dict):
    """Trains one stage from where `saved` left it; leaves the chosen model in net and head and
    returns its report."""
    config, world, first = run.config, run.world, run.rank == 0
    epochs = config.epochs if stage == 1 else config.stage2_epochs
    named = [*net.named_parameters(), *head.named_parameters()]
    scale = [p for name, p in named if name == "s_"]
    others = [p for name, p in named if name != "s_" and p.requires_grad]
    groups = [{"params": others, "factor": 1.0}, {"params": scale, "factor": config.scale_lr}]
    decay = config.weight_decay
    optimizer = torch.optim.SGD(groups, config.lr, MOMENTUM, weight_decay=decay, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=config.precision == "fp16")
    model = Classifier(nn.Identity() if cached else net, head)
    if world > 1:
        ids = [run.device] if run.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids)

    start, step, best = 0, 0, None
    totals = torch.zeros(4, dtype=torch.float64)  # loss, images, errors at 1 and at 5
    history = [head.scale.item()] if scale else []
    if saved:
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        start, step, best, history = (saved[k] for k in ("epoch", "step", "best", "history"))
        totals = saved["totals"] if first else totals
        if not cached:
            net.load_state_dict(saved["net"])
    totals = totals.to(run.device)
    select = config.select
    if select == "auto":
        select = "val" if run.data.val else "last"
    shown = "val" if run.data.val and select != "test" else "test"
    path = config.out / f"stage{stage}.pt"
    logs = config.out / "logs" / path.stem
    writer = SummaryWriter(str(logs), purge_step=start) if first else None
    saved_at = time.monotonic()

    def save(epoch, step):
        nonlocal saved_at
        together, bad = distributed.total(totals), run.bad_images()
        check_finite(together[0].item(), model, config, epoch)
        if first:
            states = {"net": net, "head": head, "optimizer": optimizer, "scaler": scaler}
            state = {name: part.state_dict() for name, part in states.items()}
            state |= {"config": config.identity(), "stage": stage, "epoch": epoch, "step": step}
            state |= {"totals": together.cpu(), "history": history, "best": best}
            checkpoint.save(config.out, state | {"results": results, "bad_images": sorted(bad)})
        saved_at = time.monotonic()

    def batches(epoch, step):
        """Images of each step in all processes, and this process's batches from `step` on."""
        view = epoch % len(cached["train"]) if cached else epoch
        order, mine, seed = run.epoch(stage, view)
        sizes = [len(part) for part in order.split(config.batch_size)]
        turn = list(range(len(mine) // config.accumulate))
        if not cached:
            mine = mine[step * config.accumulate :]
            return [sizes[i] for i in turn], run.loaders["train"](order, mine, seed)
        if epoch != view:  # the view's steps in another order, in all processes alike
            draw = torch.Generator().manual_seed(seed_of(config.seed, stage, epoch))
            turn = torch.randperm(len(turn), generator=draw).tolist()
        parts = range(config.accumulate)
        numbers = (i * config.accumulate + part for i in turn[step:] for part in parts)
        return [sizes[i] for i in turn], map(cached["train"][view].batch, numbers)

    with run.progress() as progress:
        title = f"{config.head if stage == 1 else 'cosine'}, stage {stage}"
        bar = progress.add_task(title, total=epochs, note="")
        for epoch in range(start, epochs):
            lr = cosine_lr(config.lr, epoch, epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            model.train()
            if stage == 2 and not cached:
                freeze(net, config.bn)
            sizes, parts = batches(epoch, step)
            began, seen = time.perf_counter(), sum(sizes[step:])
            while step < len(sizes):
                torch.manual_seed(seed_of(config.seed, stage, epoch, step, run.rank))  # dropout's
                for part in range(config.accumulate):
                    images, labels = next(parts)
                    wait = world > 1 and part + 1 < config.accumulate
                    with model.no_sync() if wait else contextlib.nullcontext():
                        with run.autocast():
                            loss, counts = model(images if cached else run.laid_out(images), labels)
                        # DDP takes the mean over processes; wanted is the mean over images.
                        scaler.scale(loss * (world / sizes[step])).backward()
                    totals[0] += loss.detach()
                    totals[1:] += counts
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                step += 1
                progress.update(bar, completed=epoch + step / len(sizes))
                if step % LOOK == 0:
                    loss, count = totals[:2].tolist()
                    check_finite(loss, model, config, epoch)
                    progress.update(bar, note=f"loss {loss / max(count, 1):.3f}")
                if step < len(sizes) and (world == 1 or step % AGREE == 0):
                    due = time.monotonic() - saved_at > 60 * config.checkpoint_minutes
                    stop, due = distributed.any_of(run.stopping, due)
                    if stop or due:
                        save(epoch, step)
                    if stop:
                        raise Stopped

            loss, count, wrong1, wrong5 = distributed.total(totals).tolist()
            seconds, count = time.perf_counter() - began, max(count, 1)
            check_finite(loss, model, config, epoch)
            record = {
                "stage": stage, "epoch": epoch + 1, "epochs": epochs, "lr": lr,
                "scale": head.scale.item() if scale else None, "loss": loss / count,
                "error1": 100 * wrong1 / count, "error5": 100 * wrong5 / count,
                "images_per_s": seen / seconds, "seconds": seconds,
            }  # fmt: skip
            last = epoch + 1 == epochs
            if last or (epoch + 1) % config.eval_every == 0:
                if not cached and (stage == 1 or config.bn == "batch"):
                    distributed.average_buffers(net)  # each process has those of its last step
                try:
                    rows = evaluate(run, shown, net, head, cached)
                except Stopped:
                    save(epoch, step)
                    raise
                record[shown] = error_report(rows)
                better = best is None or record[shown]["error1"] < best[0]
                if last if select == "last" else better:
                    best = (record[shown]["error1"], epoch + 1)
                    if first:
                        checkpoint.save_model(path, net, head, epoch + 1, config.net)
            progress.update(bar, note=f"loss {record['loss']:.3f}")
            if first:
                try:
                    log_epoch(run, writer, record)
                except OSError as error:
                    raise checkpoint.no_room(config.out, error) from None
            history += [record["scale"]] if scale else []
            step = 0
            totals.zero_()
            due = last or not cached or time.monotonic() - saved_at > CHEAP
            stop, due = distributed.any_of(run.stopping, due)
            if stop or due:
                save(epoch + 1, 0)
            if stop:
                raise Stopped

    distributed.barrier()  # the model file is there
    for module, state in zip((net, head), checkpoint.load_model(path), strict=True):
        module.load_state_dict(state)
    rows = evaluate(run, "test", net, head, cached)
    report = full_report(rows, run.data.test.labels, run.data.counts)
    report |= {"selected_on": "last epoch" if select == "last" else select, "epoch": best[1]}
    report["scale"] = head.scale.item() if scale else None
    if first:
        inputs = ("dataset", "net", "batch_size", "head", "kappa", "seed")
        outputs = {"err_1": report["error1"], "err_5": report["error5"], "epoch": best[1]}
        writer.add_hparams({k: getattr(config, k) for k in inputs},
                           {f"best/{k}": v for k, v in outputs.items()})  # fmt: skip
        writer.close()
    if scale and still_rises(history, epochs):
        run.say(
            f"[yellow]warning:[/] the scale still rose at the end of stage {stage}, from "
            f"{history[0]:.2f} to {history[-1]:.2f}: the head is short of training; try "
            "--scale-start, --scale-lr or more epochs"
        )
    return report


def build_net(run: Run) -> nn.Module:
    config, images = run.config, run.data.train.images
    channels = images.shape[1] if isinstance(images, Tensor) else 3
    net = make_net(config.net, channels, config.pretrained).to(run.device)
    if config.sync_bn:
        if run.device.type != "cuda":
            raise TrainError("--sync-bn: got CPU processes, wanted GPUs: PyTorch has none for CPUs")
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)
    if config.compile:
        net.compile()
    return net


def train(run: Run) -> dict[str, dict]:
    """Both stages; returns {"stage1": report, "stage2": report}, as far as they were asked for."""
    config, data = run.config, run.data
    if config.select == "val" and not data.val:
        raise TrainError("--select: got val, wanted last or test: there are no images of val")
    smallest = min(config.batch_size, len(data.train))
    if smallest < 2 * run.parts:
        raise TrainError(
            f"--batch-size: got {smallest} images for {run.world} process(es) x --accumulate "
            f"{config.accumulate}, wanted 2 for each: {2 * run.parts} or more"
        )
    saved = None
    if config.resume:
        saved = checkpoint.load(config.out, config, lambda text: run.say(f"warning: {text}"))
        run.bad |= set(saved["bad_images"])
    results = saved["results"] if saved else {}
    torch.manual_seed(config.seed)
    net = build_net(run)
    if config.model:
        checkpoint.fill(net, config.model, config.net)
    if run.rank == 0 and not config.resume:
        clear(config)  # now that nothing is left to refuse
    distributed.barrier()
    if config.model is None and (saved is None or saved["stage"] == 1):
        head = make_head(config.head, net.num_features, data.num_classes, config).to(run.device)
        results["stage1"] = fit(run, 1, net, head, None, saved, results)
        saved = None
    if config.stage2_epochs:
        if config.model is None:
            checkpoint.fill(net, config.out / "stage1.pt", config.net)
        net.requires_grad_(False)
        torch.manual_seed(seed_of(config.seed, 2))
        head = make_head("cosine", net.num_features, data.num_classes, config).to(run.device)
        if config.bn == "shift":
            shift_statistics(run, net)
        cached = cache_features(run, net) if config.views else None
        results["stage2"] = fit(run, 2, net, head, cached, saved, results)
    return results


def test_model(run: Run) -> dict[str, dict]:
    """Tests --model with the head that it holds."""
    config, classes = run.config, run.data.num_classes
    net = build_net(run)
    head = head_of_state(checkpoint.fill(net, config.model, config.net)).to(run.device)
    if len(head.weight) != classes:
        raise TrainError(
            f"--model: got {config.model} with {len(head.weight)} classes, wanted the {classes} "
            f"of --dataset {config.dataset}"
        )
    rows = evaluate(run, "test", net, head)
    report = full_report(rows, run.data.test.labels, run.data.counts)
    return {"model": report | {"selected_on": "as given"}}


def print_table(results: dict[str, dict], run: Run) -> None:
    config = run.config
    head = f"t-vMF, kappa {config.kappa:g}" if config.head == "tvmf" else config.head
    head = str(config.model) if config.evaluate else head
    title = f"error in %, {config.dataset}, {head}, {len(run.data.test):,} test images"
    table = Table("stage", title=title)
    columns = {"error1": "error@1", "error5": "error@5", "many": "many\n> 100"}
    columns |= {"medium": "medium\n20..100", "few": "few\n< 20"}
    for name in (*columns.values(), "selected on"):
        table.add_column(name, justify="right")
    for stage, report in results.items():
        numbers = ("-" if report[c] is None else f"{report[c]:.1f}" for c in columns)
        table.add_row(stage.removeprefix("stage"), *numbers, report["selected_on"])
    run.console.print(table)


def lock(config: Config, rank: int) -> TextIO:
    """Makes OUT; as long as the file is open no other run goes on there."""
    out = config.out.resolve()
    if config.model and not config.evaluate and config.model.parent.resolve() == out:
        raise TrainError(f"--out: got that of {config.model}, wanted another than --model's")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        file = open(config.out / "lock", "w")  # noqa: SIM115
        if rank == 0:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its workers do not inherit it
        return file
    except BlockingIOError:
        raise TrainError(f"--out: got {config.out}, where a run goes on, wanted another") from None
    except OSError as error:
        raise TrainError(
            f"--out: got {config.out} ({error.strerror}), wanted a directory to write to"
        ) from error


def clear(config: Config) -> None:
    """What an older run left in OUT must not be taken for this one's."""
    config.out.mkdir(parents=True, exist_ok=True)
    for name in (checkpoint.NAME, checkpoint.PREVIOUS, "stage1.pt", "stage2.pt", "result.json",
                 "metrics.jsonl"):  # fmt: skip
        (config.out / name).unlink(missing_ok=True)
    shutil.rmtree(config.out / "logs", ignore_errors=True)


def main(args: list[str]) -> None:
    config = parse_config(args)
    rank, world, device = distributed.start(config.device)
    data = load_data(config, quiet=rank > 0)
    if config.net == "auto":
        net = "convnet" if data.augment == "small" else "resnet10"
        config = dataclasses.replace(config, net=net)
    run = Run(config, data, rank, world, device)

    def stop(number, frame):
        run.stopping = True
        if number == signal.SIGINT:  # of SIGTERM torchrun forwards what SLURM has sent already
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process as usual

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    empty = int((data.counts == 0).sum())
    run.say(
        f"{config.dataset}: {len(data.train):,} training images of {data.num_classes:,} classes, "
        f"{int(data.counts.max()):,} to {int(data.counts.min()):,} a class, "
        f"{len(data.val or ()):,} for validation, {len(data.test):,} for the test; {config.net}, "
        f"{data.augment} transforms at {data.image_size} pixels, {world} process(es), {device.type}"
        + (f"; [yellow]{empty} classes have no training image[/]" if empty else "")
    )
    with lock(config, rank):
        run_and_report(run)


def run_and_report(run: Run) -> None:
    """Trains or tests, writes the result and prints the table."""
    config, data = run.config, run.data
    results = test_model(run) if config.evaluate else train(run)
    bad = data.bad_images + len(run.bad_images())
    about = {"classes": data.num_classes, "val": 0, "counts": data.counts.tolist()}
    about |= {name: len(split) for name, split in data.splits()} | {"bad_images": bad}
    about |= {"augment": data.augment, "image_size": data.image_size}
    text = json.dumps({"config": config.as_dict(), "dataset": about} | results, indent=1) + "\n"
    if run.rank == 0:
        path = config.out / ("evaluation.json" if config.evaluate else "result.json")
        checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
        shutil.rmtree(config.out / "features", ignore_errors=True)
        print_table(results, run)
        run.say(f"{bad} images could not be read and were left out" if bad else str(path))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TrainError as error:
        sys.exit(f"error: {error}")
    except Stopped:
        print("stopped by a signal; --resume goes on", file=sys.stderr)
        sys.exit(143)
    finally:
        distributed.finish()
