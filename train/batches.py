"""Which images a step sees, in which process, and how they are augmented and loaded.

Every random draw is a function of (seed, stage, epoch, position in the epoch). So a checkpoint
keeps no generator's state, and the number of workers or processes changes no image.
"""

import math
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from train.images import bad_image, read_image
from train.splits import Split

# The reach of random affine transforms: degrees, the logarithm of the scale, the shear's slope, and
# the part of the image's side.
TURN, SCALE, SHEAR, MOVE = 10, 0.2, 0.1, 0.1
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
    order has at least one batch.
    """
    draw = np.random.default_rng(seed)

    def cycle(items):
        while True:
            yield from draw.permutation(items).tolist()

    size = max(1, len(labels) // batch_size) * batch_size
    by_class = labels.argsort(stable=True).split(torch.bincount(labels).tolist())
    images = [cycle(members.numpy()) for members in by_class if len(members)]
    classes = cycle(len(images))
    order = []
    while len(order) < size:
        members = images[next(classes)]
        order += [next(members) for _ in range(GROUP)]
    return torch.tensor(order[:size])


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


def steps_of(size: int, batch_size: int, parts: int) -> int:
    """Steps of an epoch. A last batch is dropped if it gives a part fewer than two images."""
    steps, rest = divmod(size, batch_size)
    return steps + (rest >= 2 * parts) or 1


def share(step: int, size: int, batch_size: int, part: int, parts: int) -> Tensor:
    """The positions, in an epoch of `size` images, of one of the `parts` parts of a step."""
    batch = torch.arange(step * batch_size, min(size, (step + 1) * batch_size))
    return batch.tensor_split(parts)[part]


class Lighting(v2.Transform):
    """Adds a random mixture of the principal colours to an image, as AlexNet does."""

    def __init__(self, std: float):
        super().__init__()
        self.std = std
        self.components = torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)

    def forward(self, image: Tensor) -> Tensor:
        return image + (self.components @ (torch.randn(3) * self.std)).view(3, 1, 1)


def file_transforms(augment: str, size: int, train: bool) -> v2.Transform:
    """The transforms of the paper's code, from a PIL image to float32 [3, size, size]."""
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    normalise = [v2.Normalize(*STATISTICS[augment])]
    if not train:
        crop = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
        return v2.Compose(crop + tensor + normalise)
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    if augment == "imagenet":
        crop.append(v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4))
        tensor.append(Lighting(0.1))
    return v2.Compose(crop + tensor + normalise)


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


def random_affine(images: Tensor, draws: Tensor) -> Tensor:
    """Turns, stretches, shears and moves each image, and repeats the pixels of its border.

    images [B, channels, height, width], draws [B, 6] uniform in [0, 1).
    """
    turn, size, stretch, shear, *move = (2 * draws - 1).unbind(1)
    turn = math.radians(TURN) * turn
    wide, high = torch.exp(SCALE * size), torch.exp(SCALE * size + SCALE / 2 * stretch)
    across, down = (2 * MOVE * m for m in move)  # the image goes from -1 to 1
    rows = (
        torch.stack([turn.cos() * wide, (SHEAR * shear - turn.sin()) * wide, across], 1),
        torch.stack([turn.sin() * high, turn.cos() * high, down], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def erase(images: Tensor, draws: Tensor, share: float, fill: Tensor) -> Tensor:
    """Fills a rectangle in a share of the images, as random erasing does (Zhong et al., AAAI 2020).

    images [B, channels, height, width], draws [B, 5] uniform in [0, 1), fill [channels, 1, 1].
    """
    inside = draws[:, 4, None, None] < share
    for axis, length in enumerate(images.shape[2:]):
        place = torch.arange(length, device=images.device) / length
        centre, side = draws[:, axis, None], 0.1 + 0.4 * draws[:, axis + 2, None]
        inside = inside & ((place - centre).abs() < side / 2).unsqueeze(2 - axis)
    return torch.where(inside[:, None], fill, images)


class FileImages(TorchDataset):
    """Maps (index, epoch's seed, position) to (image [3, size, size], label, None), or to (zeros,
    NO_LABEL, message) where the file cannot be read."""

    def __init__(self, split: Split, augment: str, size: int, train: bool):
        self.split, self.size, self.train = split, size, train
        self.transforms = file_transforms(augment, size, train)

    def __getitem__(self, item: tuple[int, int, int]):
        index, *position = item
        image = read_image(self.split.images[index])
        if isinstance(image, str):
            return torch.zeros(3, self.size, self.size), NO_LABEL, image
        state = torch.get_rng_state()  # without workers the training draws from this generator
        torch.default_generator.manual_seed(seed_of(*position))
        image = self.transforms(image)
        torch.set_rng_state(state)
        return image, int(self.split.labels[index]), None

    def collate(self, items: list) -> tuple[Tensor, Tensor, list[str]]:
        """Stacks images and labels, and collects the messages. Training leaves bad images out,
        which batch norm should not see, unless fewer than the two that it needs were left."""
        messages = [message for _, _, message in items if message]
        if self.train:
            items = sorted(items, key=lambda item: item[2] is not None)  # puts bad ones last
            items = items[: max(2, len(items) - len(messages))]
        images, labels, _ = zip(*items, strict=True)
        return torch.stack(images), torch.tensor(labels), messages


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


class Loader:
    """Batches of a split's images on a device, augmented where they are for training.

    Args:
        split: the images; those in memory are moved to the device once.
        statistics: mean and standard deviation, each [channels], to normalise images in memory.
        skip_bad: leave out a file that cannot be read, and put its message into `bad`.
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
        erase: float = 0.0,
        statistics: tuple[Tensor, Tensor] | None = None,
        skip_bad: bool = False,
        workers: int = 0,
    ):
        self.device, self.train, self.flip, self.skip_bad = device, train, flip, skip_bad
        self.augment, self.erase = augment, erase
        self.bad: set[str] = set()
        self.in_memory = isinstance(split.images, Tensor)
        if self.in_memory:
            self.images, self.labels = split.images.to(device), split.labels.to(device)
            self.mean, self.std = (s.view(-1, 1, 1).to(device) for s in statistics)
            self.reach = max(1, round(image_size / 14))  # 2 pixels for MNIST's 28
        else:
            files, self.sampler = FileImages(split, augment, image_size, train), []
            self.files = DataLoader(
                files,
                batch_sampler=self.sampler,
                num_workers=workers,
                collate_fn=files.collate,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=heed_only_the_parent,
                generator=torch.Generator(),  # so that it draws nothing from torch's
            )

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
            width = 3 if self.augment == "small" else 14
            draw = torch.Generator().manual_seed(epoch_seed)
            draws = torch.rand(len(order), width, generator=draw)
        for batch in batches:
            index = order[batch].to(self.device, non_blocking=True)
            images = self.images[index].float().div_(255)
            if self.train:
                images = self._augmented(images, draws[batch].to(self.device, non_blocking=True))
            yield (images - self.mean) / self.std, self.labels[index]

    def _augmented(self, images, drawn):
        if self.augment == "small":
            offsets = (drawn[:, :2] * (2 * self.reach + 1)).long().t() - self.reach
            images = shift(images, offsets, self.reach)
        else:
            images = random_affine(images, drawn[:, 3:9])
        if self.flip:
            mirrored = drawn[:, 2, None, None, None] < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        if self.erase:
            images = erase(images, drawn[:, 9:14], self.erase, self.mean)
        return images

    def _from_files(self, order, batches, epoch_seed):
        # Workers stay from epoch to epoch and hold this one list, which is therefore filled anew.
        self.sampler[:] = [
            [(i, epoch_seed, p) for i, p in zip(order[b].tolist(), b.tolist(), strict=True)]
            for b in batches
        ]
        for images, labels, messages in self.files:
            if messages and not self.skip_bad:
                raise bad_image(messages[0])
            self.bad.update(messages)
            yield [t.to(self.device, non_blocking=True) for t in (images, labels)]


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images, as fractions of 255."""
    parts = images.split(1000)
    mean = sum(p.double().sum((0, 2, 3)) for p in parts) / images[:, 0].numel()
    square = sum(p.double().square().sum((0, 2, 3)) for p in parts) / images[:, 0].numel()
    std = (square - mean**2).clamp(min=1).sqrt()  # at least one grey level: constant images have 0
    return (mean / 255).float(), (std / 255).float()
