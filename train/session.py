"""The state that both stages of a run share: configuration, data, device, processes, terminal."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from train import distributed
from train.augment import channel_statistics
from train.batches import SAMPLING, ImageFiles, Loader, Readers, seed_of, shares
from train.config import Config
from train.metrics import COLUMNS, image_rows
from train.report.analysis import sample
from train.splits import LongTailed
from tvmf_ext.margin import log_prior

EVAL_BATCH = 256


class Stopped(Exception):
    """SIGTERM or SIGINT asked the run to leave, and its state is saved."""


class Session:
    """A run in one process, which is number `rank` of `world` processes.

    Setting `stopping` asks the run to save and leave.
    """

    stopping = False
    saves = 0  # checkpoints so far, which number the directories of shards
    results: dict[str, dict]  # the reports of the stages that are done

    def __init__(self, config: Config, data: LongTailed, rank=0, world=1, device="cpu"):
        self.config, self.data, self.rank, self.world = config, data, rank, world
        self.device = torch.device(device)
        # Brackets and colons may belong to a path.
        self.console = Console(quiet=rank > 0, markup=False, emoji=False)
        self.mesh = distributed.mesh(self.device) if config.shard_classes else None
        self.results = {}
        self.sample = sample(data.train, data.num_classes)
        self.log_prior = log_prior(data.counts).to(self.device)
        self.data_summary = data.summary()
        splits = (*data.splits(), ("sample", self.sample))
        files = ImageFiles([split for _, split in splits], data.augment, data.image_size)
        readers = Readers(files, config.workers, self.device)
        options = {"flip": config.flip}
        if isinstance(data.train.images, Tensor):
            options["statistics"] = channel_statistics(data.train.images)
        self.loaders = {
            name: Loader(split, readers, train=name == "train", **options) for name, split in splits
        }

    def identity(self) -> dict[str, Any]:
        """What decides the result of the run: a checkpoint of another one does not fit."""
        return self.config.identity() | {"data set": self.data_summary}

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line, in the first process alone."""
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", "yellow")

    def autocast(self) -> AbstractContextManager:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def progress(self) -> Progress:
        return Progress(console=self.console)

    def epoch(self, stage: int, epoch: int) -> tuple[Tensor, list[Tensor], int]:
        """The order of an epoch's images; this process's batches, each of positions in that order;
        and the seed of the augmentation."""
        config, seed = self.config, seed_of(self.config.seed, stage, epoch)
        sampling, size = "images", config.batch_size
        if stage == 2:
            sampling, size = config.sampling, config.stage2_batch_size or size
        order = SAMPLING[sampling](self.data.train.labels, size, seed)
        return order, shares(len(order), size, self.rank, self.world), seed

    def test_epoch(self, size: int) -> tuple[Tensor, list[Tensor], int]:
        """The same for the evaluation of `size` images, each of which counts in one process."""
        mine = torch.arange(self.rank, size, self.world)
        if self.mesh:  # a sharded head needs the same number in each: some repeat the last image
            mine = torch.arange(self.rank, size + self.rank, self.world).clamp(max=size - 1)
        return torch.arange(size), list(mine.split(EVAL_BATCH)) if len(mine) else [], 0

    def features(self, net: nn.Module, split: str, *epoch):
        """Yields features and labels of an epoch's batches. A run that is asked to stop leaves at
        once, as these are computed again when it is resumed."""
        for images, labels in self.loaders[split](*epoch):
            if self.stopping and self.world == 1:  # others might wait for this process
                raise Stopped
            with self.autocast():
                features = net(images)
            yield features, labels

    @torch.no_grad()
    def evaluate(self, split: str, net: nn.Module, head: nn.Module, cached=None) -> Tensor:
        """The rows [M, COLUMNS] of the M images of a split, in every process; from the features in
        `cached` where it is given."""
        net.eval()
        size = len(self.sample if split == "sample" else getattr(self.data, split))
        rows = torch.zeros(size, len(COLUMNS), dtype=torch.float64, device=self.device)
        epoch = self.test_epoch(size)
        batches = self.features(net, split, *epoch)
        if cached:
            batches = map(cached[split].batch, range(len(epoch[1])))
        for positions, (features, labels) in zip(epoch[1], batches, strict=True):
            with self.autocast():
                rows[positions] = image_rows(head, features, labels, self.log_prior)
        rows[torch.arange(size) % self.world != self.rank] = 0
        return distributed.total(rows).cpu()
