"""How images are prepared: cropped, mirrored, moved, coloured and normalised.

Each image has draws of its own, made by its position in the training. All that pixels alone need is
done for a batch at once, on the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

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
        turns += [factors[turn] for turn in turns]
        draws[1:] = [torch.tensor(turns), torch.randn(3) * LIGHTING]
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
