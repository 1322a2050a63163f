"""Features of the frozen backbone on disk, mapped into memory: the head trains without images."""

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.config import TrainError


class Cached:
    """Batches of features [B, D] and labels [B], numbered as they were written."""

    def __init__(self, path: Path, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device):
        labels, sizes, self.device = [], [], device
        try:
            # The file is written before it is mapped: a full disk then raises OSError, whereas a
            # write to a mapping would end in a bus error.
            with open(path, "wb") as file:
                for features, label in batches:
                    file.write(features.contiguous().cpu().view(torch.uint8).numpy().data)
                    labels.append(label.cpu())
                    sizes.append(len(label))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise TrainError(
                f"--views: got {error.strerror} on writing features to {path}, wanted room for "
                "them; --views 0 needs none"
            ) from None
        if not sizes:  # there are more processes than images
            return
        # torch.from_file takes no path that is not UTF-8.
        content = torch.from_numpy(np.memmap(path, mode="c"))
        self.features = content.view(features.dtype).view(sum(sizes), -1)
        self.labels, self.ends = torch.cat(labels), [0, *accumulate(sizes)]

    def batch(self, i: int) -> list[Tensor]:
        """Features and labels of the i-th batch, on the device."""
        rows = slice(self.ends[i], self.ends[i + 1])
        return [t[rows].to(self.device, non_blocking=True) for t in (self.features, self.labels)]
