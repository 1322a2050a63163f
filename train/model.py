"""Backbones, which map images to features [B, num_features], and heads, which classify these."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from train.config import Config, TrainError
from tvmf_ext import ShardedTvMFLoss, TvMFLoss

GRIDS = {"convnet": 1, "gridnet": 3}
RESNETS = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet50": (Bottleneck, [3, 4, 6, 3])}
DRAWN = 4096  # classes whose first vectors are drawn at once


class ConvNet(nn.Sequential):
    """Three 3 x 3 convolutions and an average over each of `grid` x `grid` parts of the image:
    enough for images of 28 to 32 pixels. A global average forgets where things are."""

    def __init__(self, channels: int, grid: int = 1):
        widths = (channels, 32, 64, 128)
        layers = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(grid)
        super().__init__(*layers, nn.Flatten())
        self.num_features = widths[-1] * grid**2


def resnet(block: type[nn.Module], layers: list[int], channels: int) -> ResNet:
    """torchvision's ResNet without a classifier. Its parameters' names and their initialisation
    (He's, by fan-out) are those of the paper's code, whose checkpoints therefore load."""
    net = ResNet(block, layers)
    net.num_features = net.fc.in_features
    net.fc = nn.Identity()
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


def make_net(name: str, channels: int, pretrained: bool = False) -> nn.Module:
    """The backbone of that name; its attribute num_features is the length of a feature."""
    if name in GRIDS:
        return ConvNet(channels, GRIDS[name])
    if name in RESNETS:
        return resnet(*RESNETS[name], channels)
    name, options = name.removeprefix("timm:"), {"num_classes": 0, "in_chans": channels}
    try:
        import timm

        net = timm.create_model(name, pretrained, **options)
    except Exception as error:  # a download fails in ways of the library that does it
        raise TrainError(
            f"--net: got timm:{name} ({error}), wanted a name of timm.list_models() (after pip "
            "install timm), whose weights can be loaded with --pretrained"
        ) from None
    # MobileNetV3, VGG and others have a layer between pooling and classifier.
    net.num_features = getattr(net, "head_hidden_size", None) or net.num_features
    return net


class SoftmaxStatistics(NamedTuple):
    loss: Tensor  # [B]
    rank: Tensor  # [B] int64


class SoftmaxHead(nn.Linear):
    """nn.Linear and F.cross_entropy, with the methods of TvMFLoss that the driver calls."""

    logits = nn.Linear.forward
    scale = None

    def __init__(self, num_features: int, num_classes: int, bias=True, prior: Tensor | None = None):
        super().__init__(num_features, num_classes, bias)
        self.register_buffer("prior", prior, persistent=False)

    def row_statistics(self, features: Tensor, labels: Tensor) -> SoftmaxStatistics:
        logits = self(features).float()
        target = logits.gather(1, labels.clamp(min=0)[:, None])
        rank = torch.where(labels < 0, -1, (~(logits <= target)).sum(1))  # a NaN is an error
        logits = logits if self.prior is None else logits + self.prior
        return SoftmaxStatistics(F.cross_entropy(logits, labels, reduction="none"), rank)

    def loss(self, stats: SoftmaxStatistics, labels: Tensor) -> Tensor:
        return stats.loss.sum()


def tvmf_head(num_features: int, num_classes: int, mesh: DeviceMesh | None = None, **options):
    """A t-vMF head whose loss is a sum over images, and whose classes are spread over the mesh."""
    if mesh is None:
        return TvMFLoss(num_features, num_classes, reduction="sum", **options)
    with torch.random.fork_rng(devices=[]):
        head = ShardedTvMFLoss(num_features, num_classes, mesh=mesh, reduction="sum", **options)
    draw_as_one(head)
    return head


@torch.no_grad()
def draw_as_one(head: ShardedTvMFLoss) -> None:
    """Gives the class vectors the first values that they have in a head of one process."""
    begin, end = head.first_class, head.first_class + head.own_classes
    for first in range(0, head.num_classes, DRAWN):
        drawn = torch.empty(min(DRAWN, head.num_classes - first), head.in_features)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))  # as TvMFLoss.reset_parameters
        low = min(max(begin, first), first + len(drawn))
        high = max(low, min(end, first + len(drawn)))
        head.weight.to_local()[low - begin : high - begin] = drawn[low - first : high - first]


def make_head(name: str, num_features: int, num_classes: int, config: Config, **options) -> Any:
    """The head of that name, whose loss is a sum over images. `options` are those of `tvmf_head`,
    such as the `prior` [C] that is added to the logits in the loss alone."""
    if name == "softmax":
        options.pop("mesh", None)  # parse_config refuses to spread its classes
        return SoftmaxHead(num_features, num_classes, **options)
    options |= {"kappa": config.kappa if name == "tvmf" else 0.0, "scale": config.scale_start}
    return tvmf_head(num_features, num_classes, **options)


def head_of_state(state: dict[str, Tensor], mesh: DeviceMesh | None = None) -> nn.Module:
    """The head whose state_dict this is: ours, or CosLoss or tvMFLoss of the paper's code."""
    num_classes, num_features = state["weight"].shape
    if "s_" not in state:
        if mesh:
            raise TrainError("--shard-classes: got a softmax head, wanted a t-vMF or cosine head")
        head = SoftmaxHead(num_features, num_classes, bias="bias" in state)
    else:
        kappa = state.get("kappa", torch.zeros(1))
        head = tvmf_head(num_features, num_classes, mesh, kappa=kappa, bias="bias" in state)
    head.load_state_dict(state)
    return head


class Classifier(nn.Module):
    """Backbone and head. forward(images, labels) returns the sum of the losses, and the numbers of
    known labels, of errors at 1 and of errors at 5. They come from the head's row statistics, which
    need no logits and do not wait for the device."""

    def __init__(self, net: nn.Module, head: nn.Module):
        super().__init__()
        self.net, self.head = net, head

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.classify(self.net(images), labels)

    def classify(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        stats = self.head.row_statistics(features, labels)
        counts = (labels >= 0, stats.rank >= 1, stats.rank >= 5)
        return self.head.loss(stats, labels), torch.stack([c.sum() for c in counts])
