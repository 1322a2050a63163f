"""What the report shows of a model beyond result.json: each class's errors, norms and angles, how
sure the model is and how often right, and which classes it confuses. A run writes it after each
stage into OUT/stage1.analysis.json and OUT/stage2.analysis.json.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from train import distributed
from train.checkpoint import write_atomically
from train.images import to_rgb
from train.metrics import BINS, COLUMNS, GROUPS
from train.splits import Paths, Split

SAMPLE = 20_000  # training images to look at, which costs about as much as a test
LEAST = 4  # of each class, however many classes there are
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PAIRS, EXAMPLES, SIDE = 12, 3, 64  # confused pairs, images of each, pixels of an image


def sample(train: Split, num_classes: int) -> Split:
    """As many training images of each class, or all of them, SAMPLE or fewer where possible."""
    sizes = torch.bincount(train.labels, minlength=num_classes)
    taken = sizes.clamp(max=max(LEAST, SAMPLE // num_classes))
    number = torch.arange(int(taken.sum())) - (taken.cumsum(0) - taken).repeat_interleave(taken)
    # Spread evenly, because a list may have the images of one source next to each other.
    spread = number * sizes.repeat_interleave(taken) // taken.repeat_interleave(taken)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(taken)
    return train.take(train.labels.argsort(stable=True)[first + spread])


def degrees(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1, 1).arccos().rad2deg()


def by_class(labels: Tensor, num_classes: int, values: Tensor, of: Callable) -> list[float | None]:
    """`of` the values of each class; None for a class without any."""
    sizes = torch.bincount(labels, minlength=num_classes).tolist()
    parts = values[labels.argsort(stable=True)].split(sizes)
    return [rounded(of(part)) if len(part) else None for part in parts]


def rounded(value: Tensor | float) -> float:
    """Five significant digits, which are more than a plot shows."""
    return float(f"{float(value):.5g}")


def angle_quantiles(angle: Tensor, labels: Tensor, counts: Tensor) -> dict[str, list[float] | None]:
    """QUANTILES of the angles of all images, and of those of large, medium and small classes."""
    size, at = counts[labels], torch.tensor(QUANTILES, dtype=torch.float64)
    member = {"all": torch.ones_like(labels, dtype=torch.bool)}
    member |= {name: (size >= low) & (size <= high) for name, (low, high) in GROUPS.items()}
    return {
        name: [rounded(q) for q in angle[m].quantile(at)] if m.any() else None
        for name, m in member.items()
    }


def reliability(confidence: Tensor, right: Tensor) -> list[dict[str, float]]:
    """Mean confidence and accuracy in percent of the images in each bin that has some; the bins
    are those of the calibration error."""
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    members = (bins == i for i in range(BINS))
    return [
        {
            "images": int(m.sum()),
            "confidence": rounded(100 * confidence[m].mean()),
            "accuracy": rounded(100 * right[m].double().mean()),
        }
        for m in members
        if m.any()
    ]


def thumbnail(images: Sequence[str] | Paths | Tensor, index: int) -> str | None:
    """An image of at most SIDE pixels as a data URI; None where its file cannot be read."""
    if isinstance(images, Tensor):
        pixels = images[index].cpu().permute(1, 2, 0).numpy()
        image, kind = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]), "png"
    else:
        kind = "jpeg"
        try:
            with Image.open(images[index]) as file:
                file.draft(file.mode, (2 * SIDE, 2 * SIDE))
                image = to_rgb(file).copy()
        except Exception:  # a damaged file fails in many ways
            return None
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def confused_pairs(
    test: Split, train: Split, predicted: Tensor, confidence: Tensor, wrong: Tensor, classes: int
) -> list[dict[str, Any]]:
    """The pairs (true class, predicted class) with the most test images, PAIRS of them, each with
    the images that the model was surest of, and with a training image of the predicted class."""
    wrong = torch.where(wrong)[0]
    keys, inverse, images = (test.labels * classes + predicted)[wrong].unique(
        return_inverse=True, return_counts=True
    )
    tested = torch.bincount(test.labels, minlength=classes)
    share = images / tested[keys // classes]
    pairs = []
    for pair in (images + share / 2).argsort(descending=True)[:PAIRS].tolist():
        true, other = divmod(int(keys[pair]), classes)
        members = wrong[inverse == pair]
        surest = members[confidence[members].argsort(descending=True)][:EXAMPLES]
        known = torch.where(train.labels == other)[0][:1]
        pairs.append(
            {
                "true": true,
                "predicted": other,
                "images": int(images[pair]),
                "of": int(tested[true]),
                "examples": [thumbnail(test.images, i) for i in surest.tolist()],
                "predicted_example": [thumbnail(train.images, i) for i in known.tolist()],
            }
        )
    return pairs


def write(session, stage: int, net: nn.Module, head: nn.Module, rows: Tensor) -> None:
    """Writes the analysis of a stage's model. All processes must call this.

    rows [M, COLUMNS]: `metrics.image_rows` of the test images.
    """
    data, counts, classes = session.data, session.data.counts, session.data.num_classes
    trained = session.evaluate("sample", net, head)
    weight_norm = torch.linalg.vector_norm(head.weight.detach(), dim=1, dtype=torch.float64)
    weight_norm = distributed.full(weight_norm).tolist()
    if session.rank:
        return
    seen, looked = data.test, session.sample
    test, train = (dict(zip(COLUMNS, r.t(), strict=True)) for r in (rows, trained))
    wrong = test["rank"] >= 1
    angle, train_angle = degrees(test["target_cosine"]), degrees(train["target_cosine"])
    mean, median = torch.mean, torch.median
    analysis = {
        "names": data.names or [str(c) for c in range(classes)],
        "tested": torch.bincount(seen.labels, minlength=classes).tolist(),
        "train_images": len(looked),
        "weight_norm": [rounded(norm) for norm in weight_norm],
        "feature_norm": by_class(looked.labels, classes, train["norm"], mean),
        "test_feature_norm": by_class(seen.labels, classes, test["norm"], mean),
        "angle": by_class(looked.labels, classes, train_angle, median),
        "test_angle": by_class(seen.labels, classes, angle, median),
        "angles": angle_quantiles(train_angle, looked.labels, counts),
        "test_angles": angle_quantiles(angle, seen.labels, counts),
        "reliability": reliability(test["confidence"], ~wrong),
        "pairs": confused_pairs(
            seen, data.train, test["predicted"].long(), test["confidence"], wrong, classes
        ),
    }
    text = json.dumps(analysis) + "\n"
    path = session.config.out / f"stage{stage}.analysis.json"
    write_atomically(path, lambda file: file.write(text.encode()))
