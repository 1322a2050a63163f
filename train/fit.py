"""The training of one stage, epoch by epoch: what a step changes, and what a checkpoint holds."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import nn

from train import advice, checkpoint, distributed, log, sharded
from train.batches import seed_of
from train.config import Config, TrainError
from train.images import LostImages
from train.metrics import error_report, full_report
from train.model import Classifier
from train.report import analysis
from train.session import Session, Stopped
from train.stage2 import freeze
from tvmf_ext import ShardedTvMFLoss

MOMENTUM = 0.9  # the paper's, without Nesterov's correction
LOOK = 50  # steps between looks at the loss, each of which waits for the device
CHEAP = 10  # seconds of epochs on cached features that are cheaper to repeat than to save
AGREE = 8  # steps after which several processes agree on whether to stop


def cosine_lr(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch: half a cosine from `lr` to zero."""
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


def make_optimizer(net: nn.Module, head: nn.Module, config: Config) -> torch.optim.SGD:
    """SGD over the parameters that require gradients; the head's scale has a rate of its own."""
    sharded = isinstance(head, ShardedTvMFLoss)
    named = [*net.named_parameters(), *head.named_parameters()]
    scale = [p for name, p in named if name == "s_"]
    others = [p for name, p in named if name != "s_" and p.requires_grad]
    groups = [{"params": others, "factor": 1.0}, {"params": scale, "factor": config.scale_lr}]
    if sharded:  # its class vectors, the last of the others, want a group of their own
        groups.insert(1, {"params": [others.pop()], "factor": 1.0})
    return torch.optim.SGD(
        groups, config.lr, MOMENTUM, weight_decay=config.weight_decay, fused=not sharded
    )


def scale_of(head: nn.Module) -> float | None:
    """The scale of a head; a softmax head has none."""
    return None if head.scale is None else head.scale.item()


class Fit:
    """The training of one stage. `epoch` and `step` say where it stands.

    Args:
        cached: features of the frozen backbone (`stage2.cache_features`), from which the head
            then trains; None trains from images.
        saved: the checkpoint of this stage from which the training goes on; None begins anew.
    """

    def __init__(self, session: Session, stage: int, net: nn.Module, head, cached, saved):
        config = session.config
        self.session, self.stage, self.net, self.head = session, stage, net, head
        self.cached = cached
        self.epochs, self.batch_size, self.lr = config.epochs, config.batch_size, config.lr
        if stage == 2:
            self.epochs = config.stage2_epochs
            self.batch_size = config.stage2_batch_size or self.batch_size
            self.lr = config.stage2_lr or self.lr
        self.optimizer = make_optimizer(net, head, config)
        net = nn.Identity() if cached else net
        if session.mesh:
            rows = -(-self.batch_size // session.world)
            net = distributed.parallel(net, session.device)
            self.model = sharded.ShardedClassifier(net, head, rows)
        else:
            self.model = distributed.parallel(Classifier(net, head), session.device)
        self.select = config.select
        if self.select == "auto":
            self.select = "val" if session.data.val else "last"
        self.evaluated = "val" if session.data.val and self.select != "test" else "test"
        self.model_file = config.out / f"stage{stage}.pt"

        self.epoch = self.step = 0
        self.best = None  # error@1 and number, from 1 on, of the epoch whose model is chosen
        self.history = []  # loss, error1, scale and steps of each epoch
        # Loss, images, errors at 1 and at 5: sums over this process's images of the epoch so far.
        self.totals = torch.zeros(4, dtype=torch.float64, device=session.device)
        self.saved_at = time.monotonic()
        if saved:
            self.restore(saved)
        elif session.world > 1:  # they cannot save where one of them loses images
            self.save()

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes back to where a checkpoint was saved."""
        self.session.saves = saved["shards"]
        if saved["shards"]:
            sharded.load(self.session.config.out, saved["shards"], self.head, self.optimizer)
        else:
            sharded.load_whole(self.head, self.optimizer, saved)
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.best, self.history = saved["best"], saved["history"]
        if self.session.rank == 0:  # the checkpoint has the sums over all processes
            self.totals.copy_(saved["totals"])
        if not self.cached:
            self.net.load_state_dict(saved["net"])

    def save(self) -> None:
        """Writes a checkpoint, unless the model is no longer finite."""
        session = self.session
        totals = distributed.total(self.totals)
        self.check_finite(totals[0].item())
        out = session.config.out
        session.saves += 1
        if session.mesh:
            sharded.save(out, session.saves, self.head, self.optimizer)
        if session.rank == 0:
            parts = ("net", "head", "optimizer")
            in_shards = ("head", "optimizer") if session.mesh else ()
            state = {n: {} if n in in_shards else getattr(self, n).state_dict() for n in parts}
            state["shards"] = session.saves if session.mesh else 0
            state |= {"config": session.identity(), "stage": self.stage}
            state |= {"epoch": self.epoch, "step": self.step, "totals": totals.cpu()}
            state |= {"history": self.history, "best": self.best, "results": session.results}
            checkpoint.save(out, state)
            sharded.keep(out, session.saves)
        self.saved_at = time.monotonic()

    def save_or_stop(self, due: bool) -> None:
        """Saves if that is due in any process, and leaves, in all of them, if any was asked to."""
        stop, due = distributed.any_of(self.session.stopping, due)
        if stop:
            raise Stopped
        if due:
            self.save()

    def check_finite(self, loss: float) -> None:
        parameters = map(distributed.own, self.model.parameters())
        if not torch.stack([p.isfinite().all() for p in parameters]).all():
            loss = math.nan  # as the loss of the next step would be
        (lost,) = distributed.any_of(not math.isfinite(loss))
        if lost:
            own = self.stage == 2 and self.session.config.stage2_lr
            raise TrainError(
                f"--{'stage2-' if own else ''}lr: got {self.lr:g}, with which the loss became "
                f"{loss} in epoch {self.epoch + 1}; wanted a smaller one or --precision fp32. "
                "The last checkpoint was saved before that and is whole"
            )

    def run(self) -> dict[str, Any]:
        """Trains the epochs that are left; leaves the chosen model in net and head and returns its
        report."""
        session, config = self.session, self.session.config
        with session.progress() as progress:
            bar = progress.add_task(f"stage {self.stage}", total=self.epochs)
            try:
                while self.epoch < self.epochs:
                    record = self.train_epoch(progress, bar)
                    number = self.epoch + 1
                    if number == self.epochs or number % (config.eval_every or 1) == 0:
                        self.evaluate(record)
                    if session.rank == 0:
                        log.write(session, record)
                    self.end_epoch(record)
            except (Stopped, LostImages) as error:
                # Images are lost in one process, while the others would not come to save.
                if isinstance(error, Stopped) or session.world == 1:
                    self.save()
                raise
        return self.report()

    def train_epoch(self, progress: Progress, bar: TaskID) -> dict[str, Any]:
        """Trains the steps of the epoch that are left; returns the epoch's record."""
        session, config = self.session, self.session.config
        lr = cosine_lr(self.lr, self.epoch, self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.model.train()
        if self.stage == 2 and not self.cached:
            freeze(self.net, config.bn)
        sizes, batches = self.batches()
        began, images = time.perf_counter(), sum(sizes[self.step :])
        while self.step < len(sizes):
            self.train_step(batches, sizes[self.step])
            progress.update(bar, completed=self.epoch + self.step / len(sizes))
            if self.step % LOOK == 0:
                loss, count = self.totals[:2].tolist()
                self.check_finite(loss)
                about = f"stage {self.stage}, loss {loss / max(count, 1):.3f}"
                progress.update(bar, description=about)
            if self.step < len(sizes) and (session.world == 1 or self.step % AGREE == 0):
                minutes = (time.monotonic() - self.saved_at) / 60
                self.save_or_stop(due=minutes > config.checkpoint_minutes)
        loss, count, wrong1, wrong5 = distributed.total(self.totals).tolist()
        seconds, count = time.perf_counter() - began, max(count, 1)
        self.check_finite(loss)
        record = {"stage": self.stage, "epoch": self.epoch + 1, "epochs": self.epochs, "lr": lr}
        record |= {"steps": len(sizes), "scale": scale_of(self.head), "loss": loss / count}
        record |= {"error1": 100 * wrong1 / count, "error5": 100 * wrong5 / count}
        return record | {"images_per_s": images / seconds, "seconds": seconds}

    def batches(self) -> tuple[list[int], Iterator]:
        """The number of images of each step of the epoch, over all processes; and this process's
        batches from `step` on."""
        session, config = self.session, self.session.config
        view = self.epoch % len(self.cached["train"]) if self.cached else self.epoch
        order, mine, seed = session.epoch(self.stage, view)
        sizes = [len(part) for part in order.split(self.batch_size)]
        if not self.cached:
            loader = session.loaders["train"]
            return sizes[: len(mine)], loader(order, mine[self.step :], seed)
        turn = list(range(len(mine)))
        if self.epoch != view:  # the view's steps in another order, in all processes alike
            draw = torch.Generator().manual_seed(seed_of(config.seed, self.stage, self.epoch))
            turn = torch.randperm(len(turn), generator=draw).tolist()
        return [sizes[i] for i in turn], map(self.cached["train"][view].batch, turn[self.step :])

    def train_step(self, batches: Iterator, size: int) -> None:
        """One step of the optimizer, on `size` images over all processes."""
        session, config = self.session, self.session.config
        # Dropout draws from the global generator.
        torch.manual_seed(seed_of(config.seed, self.stage, self.epoch, self.step, session.rank))
        # Before anything changes, as an image that cannot be read makes the run save and end.
        images, labels = next(batches)
        with session.autocast():
            loss, counts = self.model(images, labels)
        # DDP takes the mean over processes; the mean over images is wanted.
        (loss * (session.world / size)).backward()
        self.totals[0] += loss.detach()
        self.totals[1:] += counts
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def evaluate(self, record: dict[str, Any]) -> None:
        """Adds the errors after this epoch to its record, and saves a model that is chosen."""
        session, number = self.session, self.epoch + 1
        if not self.cached and (self.stage == 1 or session.config.bn == "batch"):
            distributed.average_buffers(self.net)  # they differ between processes
        rows = session.evaluate(self.evaluated, self.net, self.head, self.cached)
        record[self.evaluated] = error_report(rows)
        error = record[self.evaluated]["error1"]
        better = self.best is None or error < self.best[0]
        chosen = number == self.epochs if self.select == "last" else better
        if chosen:
            self.best = (error, number)
            head = sharded.whole(self.head)
            if session.rank == 0:
                checkpoint.save_model(self.model_file, self.net, head, number, session.config)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Moves on to the next epoch, and saves unless that costs more than it may lose."""
        self.history.append({key: record[key] for key in ("loss", "error1", "scale", "steps")})
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        seconds = time.monotonic() - self.saved_at
        self.save_or_stop(self.epoch == self.epochs or not self.cached or seconds > CHEAP)

    def report(self) -> dict[str, Any]:
        """Loads the chosen model and tests it."""
        session = self.session
        distributed.barrier()  # until the first process has written the file
        states = checkpoint.load_model(self.model_file, "--resume")
        for module, state in zip((self.net, self.head), states, strict=True):
            module.load_state_dict(state)
        rows = session.evaluate("test", self.net, self.head, self.cached)
        analysis.write(session, self.stage, self.net, self.head, rows)
        report = full_report(rows, session.data.test.labels, session.data.counts)
        report["selected_on"] = "last epoch" if self.select == "last" else self.select
        report |= {"epoch": self.best[1], "scale": scale_of(self.head)}
        report["kappa"] = None if report["scale"] is None else self.head.kappa.mean().item()
        report["steps"] = sum(epoch["steps"] for epoch in self.history)
        report |= {f"train_{name}": self.history[-1][name] for name in ("loss", "error1")}
        selects = self.evaluated == "val" or self.select == "test"
        report["selection_error1"] = self.best[0] if selects else None
        self.advise(report)
        return report

    def advise(self, report: dict[str, Any]) -> None:
        """Warns of a stage that ended badly, here and in its report."""
        session = self.session
        if self.stage == 1:
            text = advice.too_short(session.config, self.history, report["steps"])
        elif report["selection_error1"] is not None:
            text = advice.worse_than_stage1(report, session.results)
        else:
            classes = session.data.num_classes
            text = advice.stage2_spoilt(session.config, classes, self.history, session.results)
        report["warning"] = text
        if text:
            session.warn(text)
