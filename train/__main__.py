"""Trains a classifier on long-tailed data in two stages and prints its error by class size.

Stage 1 trains backbone and head on every image equally often. Stage 2 freezes the backbone, its
batch-norm statistics included, and trains a new cosine head on every class equally often.

    python -m train                        the recipe digits: t-vMF head against softmax head
    python -m train --kappa 64 --seed 1    the same, two values changed
    python -m train --resume               goes on after the last finished epoch
"""

import dataclasses
import json
import math
import sys
import time

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from train.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from train.config import Config, TrainError, parse_config
from train.data import DATASETS, LongTailed, balanced_over_classes, balanced_over_images, shift
from train.metrics import GROUPS, error_report
from train.model import NETS, make_head
from train.rng import seed_everything, set_rng
from tvmf_ext import build_info

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # the paper's
REACH = 2  # pixels: augmentation moves an image by up to this much
CHECKPOINT = "checkpoint.pt"

console = Console()


def cosine_lr(lr: float, epoch: int, epochs: int) -> float:
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


@torch.no_grad()
def evaluate(net, head, data: LongTailed, device) -> dict[str, float | None]:
    net.eval()
    batches = data.test_images.split(500)
    predicted = torch.cat([head.logits(net(images.to(device))).argmax(1) for images in batches])
    return error_report(predicted.cpu() != data.test_labels, data.test_labels, data.counts)


def make_directory(config: Config) -> None:
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(
            f"--out: got {config.out} ({error.strerror}), wanted a directory to write to"
        ) from error


def run(config: Config, data: LongTailed, resume: bool = False) -> dict[str, dict]:
    """Trains one head in both stages; returns {"stage1": report, "stage2": report}."""
    device = torch.device("cuda" if build_info().cuda and torch.cuda.is_available() else "cpu")
    path = config.out / CHECKPOINT
    saved = load_checkpoint(path, config) if resume else None
    make_directory(config)
    seed_everything(config.seed)

    images, labels = data.train_images.to(device), data.train_labels.to(device)
    net = NETS[config.net](images.shape[1]).to(device)
    results = saved["results"] if saved else {}

    for stage in (1, 2):
        if saved and saved["stage"] > stage:
            continue
        epochs = config.epochs if stage == 1 else config.stage2_epochs
        name = config.head if stage == 1 else "cosine"
        head = make_head(name, net.num_features, len(data.counts), config.kappa).to(device)
        net.requires_grad_(stage == 1)
        trained = [p for p in [*net.parameters(), *head.parameters()] if p.requires_grad]
        optimizer = torch.optim.SGD(trained, config.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
        states = {"net": net, "head": head, "optimizer": optimizer}
        start = 0
        if saved and saved["stage"] == stage:
            for key, part in states.items():
                part.load_state_dict(saved[key])
            set_rng(saved["rng"])
            start = saved["epoch"]

        title = f"{config.head}, stage {stage}"
        steps = len(labels) // config.batch_size
        columns = (*Progress.get_default_columns(), "{task.fields[note]}")
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(title, total=epochs * steps, completed=start * steps, note="")
            for epoch in range(start, epochs):
                began = time.perf_counter()
                lr = cosine_lr(config.lr, epoch, epochs)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # All random draws are made here, on the CPU: the device never waits for one, and
                # the CPU generators are the only ones that a checkpoint has to keep.
                draw = balanced_over_images if stage == 1 else balanced_over_classes
                order = draw(data.train_labels, config.batch_size)
                offsets = torch.randint(-REACH, REACH + 1, (steps, 2, config.batch_size))

                net.train(stage == 1)
                total_loss = torch.zeros((), device=device)
                total_wrong = torch.zeros((), dtype=torch.int64, device=device)
                for index, offset in zip(order.to(device), offsets.to(device), strict=True):
                    features = net(shift(images[index], offset, REACH))
                    stats = head.row_statistics(features, labels[index])
                    loss = head.loss(stats, labels[index])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total_loss += loss.detach()
                    total_wrong += (stats.rank >= 1).sum()
                    progress.advance(bar)

                mean_loss = total_loss.item() / steps
                error = 100 * total_wrong.item() / order.numel()
                if not math.isfinite(mean_loss):
                    raise TrainError(
                        f"--lr: got {config.lr}, with which the loss became {mean_loss} in epoch "
                        f"{epoch + 1}; wanted a smaller one"
                    )
                note = f"loss {mean_loss:.3f}, error@1 {error:.1f} %"
                progress.update(bar, note=note)
                log = f"{title}, epoch {epoch + 1}/{epochs}: {note}, lr {lr:.2g}, "
                console.print(log + f"{time.perf_counter() - began:.1f} s", highlight=False)
                if epoch + 1 == epochs:  # the last epoch is the result: nothing selects on test
                    results[f"stage{stage}"] = evaluate(net, head, data, device)
                save_checkpoint(path, config, stage, epoch + 1, states, results)

    text = json.dumps(results, indent=2) + "\n"
    write_atomically(config.out / "result.json", lambda file: file.write(text.encode()))
    return results


def print_table(results: dict[str, dict[str, dict]], config: Config, data: LongTailed) -> None:
    names = {"many": "many (> 100)", "medium": "medium (20..100)", "few": "few (< 20)"}
    tested = f"{len(data.test_labels)} balanced test images"
    table = Table(title=f"error@1 in %, {config.dataset} {config.imbalance:g} : 1, {tested}")
    for column in ("head", "stage", "overall", *(names[group] for group in GROUPS)):
        table.add_column(column, justify="left" if column == "head" else "right")
    for head, result in results.items():
        for stage, report in result.items():
            numbers = ("-" if value is None else f"{value:.1f}" for value in report.values())
            table.add_row(head, stage[-1], *numbers)
    console.print(table)


def main() -> None:
    config = parse_config(sys.argv[1:])
    data = DATASETS[config.dataset](config.imbalance)
    if config.batch_size > len(data.train_labels):
        raise TrainError(
            f"--batch-size: got {config.batch_size}, wanted at most the {len(data.train_labels)} "
            "training images"
        )
    runs = [config]
    if config.baseline and config.head != "softmax":
        runs.append(dataclasses.replace(config, head="softmax", out=config.out / "baseline"))
    make_directory(config)
    if not config.resume:  # what an older run left there must not be taken for this one's
        for each in runs:
            for name in (CHECKPOINT, "result.json"):
                (each.out / name).unlink(missing_ok=True)

    results = {}
    for each in runs:
        # The first run's checkpoint must be there; the baseline may not have got that far.
        resume = config.resume and (each is config or (each.out / CHECKPOINT).exists())
        results[each.head] = run(each, data, resume)
    print_table(results, config, data)


if __name__ == "__main__":
    try:
        main()
    except TrainError as error:
        sys.exit(f"error: {error}")
