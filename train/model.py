"""Backbones, which map images to features [B, num_features], and heads, which classify those."""

from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from tvmf_ext import TvMFLoss


class ConvNet(nn.Sequential):
    """Three 3 x 3 convolutions and a global average: enough for images of 28 to 32 pixels."""

    def __init__(self, channels: int):
        widths = (channels, 32, 64, 128)
        layers = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        super().__init__(*layers, nn.Flatten())
        self.num_features = widths[-1]


NETS = {"convnet": ConvNet}


class SoftmaxStatistics(NamedTuple):
    loss: Tensor  # [B]
    rank: Tensor  # [B] int64


class SoftmaxHead(nn.Linear):
    """nn.Linear and F.cross_entropy, with the methods of TvMFLoss that the script calls."""

    logits = nn.Linear.forward

    def row_statistics(self, features: Tensor, labels: Tensor) -> SoftmaxStatistics:
        logits = self(features)
        rank = (logits > logits.gather(1, labels[:, None])).sum(1)
        return SoftmaxStatistics(F.cross_entropy(logits, labels, reduction="none"), rank)

    def loss(self, stats: SoftmaxStatistics, labels: Tensor) -> Tensor:
        return stats.loss.mean()


def make_head(name: str, num_features: int, num_classes: int, kappa: float) -> nn.Module:
    if name == "softmax":
        return SoftmaxHead(num_features, num_classes)
    return TvMFLoss(num_features, num_classes, kappa=kappa if name == "tvmf" else 0.0)
