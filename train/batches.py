"""Which images a step sees, in which process, and how they are augmented and loaded.

Every random draw is a function of (seed, stage, epoch, position in the epoch). So a checkpoint
keeps no generator's state, and the number of workers or processes changes no image.
"""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from train.images import LostImages, bad_image, read_image
from train.splits import Split

GROUP = 4  # images of one class in a row, as in the paper's code
NO_LABEL = -100  # label of an image that could not be read; the heads ignore it

STATISTICS = {  # mean and standard deviation of the channels, as in the paper's code
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inat": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
# Principal components of ImageNet's colours (Krizhevsky et al., NeurIPS 2012; fb.resnet.torch).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
GREY = (0.299, 0.587, 0.114)  # parts of red, green and blue in the brightness of a pixel
JITTER = (0.6, 1.4)  # range of the factors of brightness, contrast and saturation
LIGHTING = 0.1  # standard deviation of the coefficients of the principal components


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
    by_class = labels.argsort(stable=True).split(torch.bincount(labels).tolist())
    images = [cycle(members.numpy()) for members in by_class if len(members)]
    classes = cycle(len(images))
    order = []
    while len(order) < size:
        members = images[next(classes)]
        order += [next(members) for _ in range(GROUP)]
    return torch.tensor(order[:size])


def steps_of(size: int, batch_size: int, parts: int) -> int:
    """Steps of an epoch. A last batch is dropped if it gives a part fewer than two images."""
    steps, rest = divmod(size, batch_size)
    return steps + (rest >= 2 * parts) or 1


def share(step: int, size: int, batch_size: int, part: int, parts: int) -> Tensor:
    """The positions, in an epoch of `size` images, of one of the `parts` parts of a step."""
    batch = torch.arange(step * batch_size, min(size, (step + 1) * batch_size))
    return batch.tensor_split(parts)[part]


def draw_part(width: int, height: int) -> tuple[int, int, int, int]:
    """The random part of an image, of 8 to 100 % of its area, that training crops."""
    sides = torch.empty(1, height, width, device="meta")
    top, left, height, width = transforms.RandomResizedCrop.get_params(
        sides, (0.08, 1), (3 / 4, 4 / 3)
    )
    return left, top, left + width, top + height


def draw_colours(jitter: bool) -> Tensor:
    """What an image's augmentation draws beside its part, [10]: whether it is mirrored (below 0.5);
    the turns of brightness (0), contrast (1) and saturation (2), and their factors; coefficients of
    the principal components. These are the draws of torchvision's transforms, in their order."""
    draws = [torch.rand(1), torch.zeros(9)]
    if jitter:
        turns, *factors, _ = transforms.ColorJitter.get_params(JITTER, JITTER, JITTER, None)
        turns = [turn for turn in turns.tolist() if turn < 3]  # 3 would be the hue
        draws[1:] = [
            torch.tensor([*turns, *(factors[t] for t in turns)]),
            torch.randn(3) * LIGHTING,
        ]
    return torch.cat(draws)


def centre(size: int, width: int, height: int) -> tuple[float, float, float, float]:
    """The part that is left when the shorter side is resized to size * 256 / 224 pixels, and a
    square of `size` is cut from the middle."""
    shorter = round(size * 256 / 224)
    scaled = [shorter * side // min(width, height) for side in (width, height)]
    begin = [round((side - size) / 2) for side in scaled]
    ratio = [side / after for side, after in zip((width, height), scaled, strict=True)]
    left, top = (b * r for b, r in zip(begin, ratio, strict=True))
    return left, top, left + size * ratio[0], top + size * ratio[1]


def augment_colours(images: Tensor, draws: Tensor) -> Tensor:
    """Colour jitter and lighting for images [B, 3, height, width] in [0, 1], as draws [B, 10] say.

    Each turn of the jitter moves an image from, or to, its black, mean grey or grey image.
    """
    draws = draws[:, :, None, None, None]
    weights = images.new_tensor(GREY).view(3, 1, 1)
    for turn in range(3):
        kind, factor = draws[:, 1 + turn], draws[:, 4 + turn]
        grey = (images * weights).sum(1, keepdim=True)
        against = torch.where(kind == 2, grey, (kind == 1) * grey.mean((2, 3), keepdim=True))
        images = torch.lerp(against, images, factor).clamp_(0, 1)
    components = images.new_tensor(EIGENVECTORS) * images.new_tensor(EIGENVALUES)
    return images + (draws[:, 7:, 0, 0, 0] @ components.t())[:, :, None, None]


def shift(images: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """Moves image i by offsets[:, i], each in [-reach, reach], filling with zeros.

    images [B, channels, height, width], offsets [2, B] (rows, columns).
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (reach,) * 4)
    rows = torch.arange(height, device=images.device) + reach - offsets[0, :, None]
    columns = torch.arange(width, device=images.device) + reach - offsets[1, :, None]
    item = torch.arange(len(images), device=images.device)
    # Indices on both sides of the channels move these to the end.
    moved = padded[item[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


class FileImages(TorchDataset):
    """The images of a split. read(index, *position in the training) returns pixels, uint8
    [size, size, 3]; draws [10] of the augmentation, or None where there is none; label; and None,
    or a message where the file cannot be read, when the pixels are zeros and the label NO_LABEL."""

    def __init__(self, split: Split, augment: str, size: int, train: bool):
        self.split, self.size, self.train, self.jitter = split, size, train, augment == "imagenet"

    def read(self, index: int, *position: int):
        state = torch.get_rng_state()  # without workers the training draws from this generator
        torch.default_generator.manual_seed(seed_of(*position))
        choose = draw_part if self.train else partial(centre, self.size)
        pixels = read_image(self.split.images[index], self.size, choose)
        draws = draw_colours(self.jitter) if self.train else None
        torch.set_rng_state(state)
        if isinstance(pixels, str):
            return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), draws, NO_LABEL, pixels
        return torch.from_numpy(pixels), draws, int(self.split.labels[index]), None


def collate(items: list) -> tuple[Tensor, Tensor | None, Tensor, list[str]]:
    """Stacks images, draws and labels, and collects the messages. Training leaves bad images out,
    which batch norm should not see, unless fewer than the two that it needs were left."""
    messages = [message for *_, message in items if message]
    if items[0][1] is not None:
        items = sorted(items, key=lambda item: item[3] is not None)  # puts bad ones last
        items = items[: max(2, len(items) - len(messages))]
    pixels, draws, labels, _ = zip(*items, strict=True)
    draws = None if draws[0] is None else torch.stack(draws)
    return torch.stack(pixels), draws, torch.tensor(labels), messages


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


class Readers(TorchDataset):
    """The processes that read image files: one pool for all splits, as one split is read at a time.

    They start with the first batch, stay to the end, and know the splits added until then.
    """

    def __init__(self, workers: int, device: torch.device):
        self.splits, self.batches = [], []
        self.files = DataLoader(
            self,
            batch_sampler=self,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=heed_only_the_parent,
            generator=torch.Generator(),  # so that it draws nothing from torch's
        )

    def add(self, split: FileImages) -> int:
        self.splits.append(split)
        return len(self.splits) - 1

    def __getitem__(self, item: tuple[int, ...]):
        number, *place = item
        return self.splits[number].read(*place)

    def __iter__(self) -> Iterator:
        """The items of each batch of the epoch that `read` was last called for."""
        return iter(self.batches)

    def read(self, number: int, order: Tensor, batches: list[Tensor], seed: int) -> Iterator:
        """What `collate` makes of each batch of positions in `order`, for the split `number`."""
        self.batches = (
            [(number, i, seed, p) for i, p in zip(order[b].tolist(), b.tolist(), strict=True)]
            for b in batches
        )
        files = iter(self.files)
        # PyTorch's handler would raise the death of a worker between any two lines, so that nothing
        # could be saved. Without it, the wait for that worker's batch does.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from files
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise LostImages(
                f"--workers: got the end of a process that reads images ({error}), perhaps as "
                "memory or /dev/shm was full; wanted fewer --workers. --resume goes on"
            ) from None


class Loader:
    """Batches of a split's images on a device, augmented where they are for training.

    Args:
        split: the images; those in memory are moved to the device once.
        statistics: mean and standard deviation, each [channels], to normalise images in memory.
        skip_bad: leave out a file that cannot be read, and put its message into `bad`.
        readers: the processes that read files.
    """

    def __init__(
        self,
        split: Split,
        augment: str,
        image_size: int,
        device: torch.device,
        *,
        train: bool,
        flip: bool = False,
        statistics: tuple[Tensor, Tensor] | None = None,
        skip_bad: bool = False,
        readers: Readers | None = None,
    ):
        self.device, self.train, self.flip, self.skip_bad = device, train, flip, skip_bad
        self.bad: set[str] = set()
        self.in_memory, self.jitter = isinstance(split.images, Tensor), augment == "imagenet"
        if self.in_memory:
            self.images, self.labels = split.images.to(device), split.labels.to(device)
            self.reach = max(1, round(image_size / 14))  # 2 pixels for MNIST's 28
        else:
            statistics = [torch.tensor(s) for s in STATISTICS[augment]]
            self.readers = readers
            self.number = readers.add(FileImages(split, augment, image_size, train))
        self.mean, self.std = (s.view(-1, 1, 1).to(device) for s in statistics)

    def __call__(
        self, order: Tensor, batches: list[Tensor], epoch_seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images [B, channels, height, width] and labels [B] for each batch of positions in
        `order`, the images of an epoch. The position of an image decides its augmentation."""
        if self.in_memory:
            return self._from_memory(order, batches, epoch_seed)
        return self._from_files(order, batches, epoch_seed)

    def _from_memory(self, order, batches, epoch_seed):
        if self.train:
            draws = torch.rand(len(order), 3, generator=torch.Generator().manual_seed(epoch_seed))
        for batch in batches:
            index = order[batch].to(self.device, non_blocking=True)
            images = self.images[index].float().div_(255)
            if self.train:
                drawn = draws[batch].to(self.device, non_blocking=True)
                offsets = (drawn[:, :2] * (2 * self.reach + 1)).long().t() - self.reach
                images = shift(images, offsets, self.reach)
                if self.flip:
                    images = mirror(images, drawn[:, 2])
            yield (images - self.mean) / self.std, self.labels[index]

    def _from_files(self, order, batches, epoch_seed):
        for *batch, messages in self.readers.read(self.number, order, batches, epoch_seed):
            if messages and not self.skip_bad:
                raise bad_image(messages[0])
            self.bad.update(messages)
            pixels, draws, labels = (
                t if t is None else t.to(self.device, non_blocking=True) for t in batch
            )
            images = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
            if self.train:
                images = mirror(images, draws[:, 0])
                images = augment_colours(images, draws) if self.jitter else images
            yield (images - self.mean) / self.std, labels


def mirror(images: Tensor, draws: Tensor) -> Tensor:
    """Mirrors the images whose number in [0, 1) is below 0.5."""
    return torch.where(draws[:, None, None, None] < 0.5, images.flip(3), images)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images, as fractions of 255."""
    parts = images.split(1000)
    mean = sum(p.double().sum((0, 2, 3)) for p in parts) / images[:, 0].numel()
    square = sum(p.double().square().sum((0, 2, 3)) for p in parts) / images[:, 0].numel()
    std = (square - mean**2).clamp(min=1).sqrt()  # at least one grey level: constant images have 0
    return (mean / 255).float(), (std / 255).float()
