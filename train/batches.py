"""Which images a step sees, in which process, and how they are augmented and loaded.

Every random draw is a function of (seed, stage, epoch, position in the epoch). So a checkpoint
keeps no generator's state, and the number of workers or processes changes no image.
"""

import os
import signal
import threading
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from train import augment
from train.images import LostImages, read_image
from train.splits import Split, members_of_classes

GROUP = 4  # images of one class in a row, as in the paper's code


def seed_of(*position: int) -> int:
    """A seed for the draws at a position, such as (seed, stage, epoch, step)."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))


def balanced_over_images(labels: Tensor, batch_size: int, seed: int) -> Tensor:
    """The order of an epoch of stage 1, [N]: a random permutation of all images."""
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))


def balanced_over_classes(labels: Tensor, batch_size: int, seed: int) -> Tensor:
    """The order of an epoch of stage 2, [N // batch_size * batch_size]: class-aware sampling.

    A shuffled list of the classes is gone through again and again, shuffled anew each time. Each
    turn of a class takes GROUP images from a shuffled list of its images, in the same way. The
    order has at least one batch, which is cut to the images, or to a turn of every class.
    """
    draw = np.random.default_rng(seed)

    def cycle(items):
        while True:
            yield from draw.permutation(items).tolist()

    batch_size = min(batch_size, max(len(labels), GROUP * len(labels.unique())))
    size = max(1, len(labels) // batch_size) * batch_size
    images = [cycle(members.numpy()) for members in members_of_classes(labels) if len(members)]
    classes = cycle(len(images))
    order = (image for c in classes for image in islice(images[c], GROUP))
    return torch.tensor(list(islice(order, size)))


def balanced_over_square_roots(labels: Tensor, batch_size: int, seed: int) -> Tensor:
    """The order of an epoch of stage 2, [N]: draws with replacement in which the share of a class
    is proportional to the square root of its size."""
    weights = torch.bincount(labels).double().rsqrt()[labels]
    draw = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, len(labels), replacement=True, generator=draw)


SAMPLING = {
    "images": balanced_over_images,
    "sqrt": balanced_over_square_roots,
    "classes": balanced_over_classes,
}


def shares(size: int, batch_size: int, rank: int, world: int) -> list[Tensor]:
    """The positions, in an epoch of `size` images, of a process's share of each step. A last step
    that gives a process fewer than two images is dropped, unless it is the only one."""
    steps = torch.arange(size).split(batch_size)
    steps = steps[:-1] if len(steps[-1]) < 2 * world and len(steps) > 1 else steps
    return [step.tensor_split(world)[rank] for step in steps]


class ImageFiles(TorchDataset):
    """The images of splits, and the batches of an epoch of one of these.

    files[split, train, index, *position in the training] are pixels, uint8 [size, size, 3]; draws
    of the augmentation, [10] or [0] where there is none; and label. Where the file cannot be read
    they are a message instead.
    """

    def __init__(self, splits: list[Split], augment: str, size: int):
        self.splits, self.augment, self.size, self.batches = splits, augment, size, ()

    def __iter__(self) -> Iterator[list]:
        return iter(self.batches)

    def __getitem__(self, item: tuple[int, ...]):
        number, train, index, *position = item
        split, state = self.splits[number], torch.get_rng_state()
        torch.default_generator.manual_seed(seed_of(*position))
        choose = augment.draw_part if train else partial(augment.centre, self.size)
        pixels = read_image(split.images[index], self.size, choose)
        draws = augment.draw_colours(self.augment == "imagenet") if train else torch.empty(0)
        torch.set_rng_state(state)  # without workers the training draws from this generator
        if isinstance(pixels, str):
            return pixels
        return torch.from_numpy(pixels), draws, int(split.labels[index])


def collate(items: list) -> tuple[Tensor, Tensor, Tensor] | str:
    """Stacks images, draws and labels; or joins the messages, where there are some."""
    if messages := [item for item in items if isinstance(item, str)]:
        return "; ".join(messages)
    pixels, draws, labels = zip(*items, strict=True)
    return torch.stack(pixels), torch.stack(draws), torch.tensor(labels)


def heed_only_the_parent(worker: int) -> None:
    """Lets a worker ignore any SIGTERM but its parent's. torchrun and SLURM send it to workers,
    too, while the training process still needs them to finish and save."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Readers:
    """The processes that read image files: one pool for all splits, as one split is read at a time.
    They start with the first batch and stay to the end."""

    def __init__(self, images: ImageFiles, workers: int, device: torch.device):
        self.images, self.workers, self.device = images, workers, device

    @cached_property
    def files(self) -> DataLoader:
        return DataLoader(
            self.images,
            batch_sampler=self.images,
            num_workers=self.workers,
            collate_fn=collate,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=heed_only_the_parent,
            generator=torch.Generator(),  # so that it draws nothing from torch's
        )

    def read(self, split: Split, train: bool, order, batches: list[Tensor], seed: int) -> Iterator:
        """What `collate` makes of each batch of positions in `order`, the images of an epoch."""
        number = [other is split for other in self.images.splits].index(True)
        places = (zip(order[b].tolist(), b.tolist(), strict=True) for b in batches)
        self.images.batches = ([(number, train, i, seed, p) for i, p in batch] for batch in places)
        files = iter(self.files)
        # PyTorch's handler would raise the death of a worker between any two lines, so that nothing
        # could be saved. Without it, the wait for that worker's batch does.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from files
        except (RuntimeError, OSError, EOFError) as error:  # the last two: of a batch half sent
            if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                raise
            raise LostImages(
                f"--workers: got the end of a process that reads images ({error}), perhaps as "
                "memory or /dev/shm was full; wanted fewer --workers. --resume goes on"
            ) from None


class Loader:
    """Batches of a split's images on a device, augmented where they are for training.

    Args:
        split: the images; those in memory are moved to the device once.
        readers: the processes that read files, and how these are prepared.
        statistics: mean and standard deviation, each [channels], to normalise images in memory.
    """

    def __init__(self, split, readers, *, train, flip=False, statistics=None):
        self.split, self.readers, self.device = split, readers, readers.device
        self.train, self.flip = train, flip
        self.augment = readers.images.augment
        self.in_memory = isinstance(split.images, Tensor)
        if self.in_memory:
            self.images, self.labels = (t.to(self.device) for t in (split.images, split.labels))
            self.reach = max(1, round(readers.images.size / 14))  # 2 pixels for MNIST's 28
        else:
            statistics = [torch.tensor(s) for s in augment.STATISTICS[self.augment]]
        self.mean, self.std = (s.view(-1, 1, 1).to(self.device) for s in statistics)

    def __call__(
        self, order: Tensor, batches: list[Tensor], epoch_seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images [B, channels, height, width] and labels [B] for each batch of positions in
        `order`, the images of an epoch. The position of an image decides its augmentation."""
        source = self._from_memory if self.in_memory else self._from_files
        return source(order, batches, epoch_seed)

    def _from_memory(self, order, batches, epoch_seed):
        if self.train:
            draws = torch.rand(len(order), 3, generator=torch.Generator().manual_seed(epoch_seed))
        for batch in batches:
            index = order[batch].to(self.device, non_blocking=True)
            images = self.images[index].float().div_(255)
            if self.train:
                drawn = draws[batch].to(self.device, non_blocking=True)
                offsets = (drawn[:, :2] * (2 * self.reach + 1)).long().t() - self.reach
                images = augment.shift(images, offsets, self.reach)
                if self.flip:
                    images = augment.mirror(images, drawn[:, 2])
            yield (images - self.mean) / self.std, self.labels[index]

    def _from_files(self, order, batches, epoch_seed):
        found = self.readers.read(self.split, self.train, order, batches, epoch_seed)
        for batch in found:
            if isinstance(batch, str):
                raise LostImages(
                    f"--data: got images that cannot be read, {batch}; wanted readable ones in "
                    "their place, with which --resume goes on"
                )
            pixels, draws, labels = (t.to(self.device, non_blocking=True) for t in batch)
            # A CPU takes a third of the time if its caches hold all of an image.
            size = 1 if self.device.type == "cpu" else len(pixels)
            parts = zip(pixels.split(size), draws.split(size), strict=True)
            yield torch.cat([self.prepare(*part) for part in parts]), labels

    def prepare(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Images [B, 3, height, width] of files, augmented as their draws say, and normalised."""
        images = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
        if self.train:
            images = augment.mirror(images, draws[:, 0])
            if self.augment == "imagenet":
                images = augment.augment_colours(images, draws)
        return (images - self.mean) / self.std
