"""The figures of result.json, by hand and against scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from train.config import Config
from train.metrics import COLUMNS, error_report, full_report, image_rows
from train.model import SoftmaxHead, make_head


def rows_of(*columns):
    return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.float64)


def test_image_rows_by_hand():
    head = SoftmaxHead(2, 4)
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    head.load_state_dict({"weight": weight, "bias": torch.tensor([0.0, 0.5, 0.0, 0.0])})
    features = torch.tensor([[2.0, 0.0], [0.6, 0.8], [2.0, 0.0]])
    labels = torch.tensor([0, 3, 1])
    prior = torch.tensor([0.0, 0.0, -9.0, -1.0])
    rows = image_rows(head, features, labels, prior)
    assert rows.shape == (3, len(COLUMNS)) and rows.dtype == torch.float64
    logits = [[2.0, 0.5, -6.0, 2.0], [0.6, 2.1, -1.8, 1.4], [2.0, 0.5, -6.0, 2.0]]
    lse = [math.log(sum(map(math.exp, z))) for z in logits]
    half = math.sqrt(0.5)
    assert rows[0, 1] == 0  # class 3 ties with the target
    wanted = [
        # loss, rank, predicted, confidence, target cosine, other cosine; then rank and
        # predicted of the logits [2, 0.5, 3, 3], [0.6, 2.1, 7.2, 2.4] and again the first; norm
        [lse[0] - 2.0, 0, 0, math.exp(2.0 - lse[0]), 1.0, half, 2, 2, 2],
        [lse[1] - 1.4, 1, 1, math.exp(2.1 - lse[1]), 1.4 * half, 0.8, 1, 2, 1],
        [lse[2] - 0.5, 2, 0, math.exp(2.0 - lse[2]), 0.0, 1.0, 3, 2, 2],
    ]
    rows[0, 2] = rows[2, 2] = 0  # the first or the other of two that tie
    rows[0, 7] = rows[2, 7] = 2
    torch.testing.assert_close(rows, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


def test_image_rows_of_a_similarity_head():
    torch.manual_seed(0)
    head = make_head("tvmf", 8, 6, Config(kappa=4.0, scale_start=9.0))
    features, labels = torch.randn(30, 8), torch.arange(30) % 6
    rows = image_rows(head, features, labels, torch.zeros(head.weight.shape[0]))
    cosine = F.linear(F.normalize(features), F.normalize(head.weight))
    own = cosine[torch.arange(30), labels]
    other = torch.stack([cosine[:, [j for j in range(6) if j != c]].amax(1) for c in range(6)], 1)
    torch.testing.assert_close(rows[:, 4], own.double())
    torch.testing.assert_close(rows[:, 5], other[torch.arange(30), labels].double())
    torch.testing.assert_close(rows[:, 1], (cosine > own[:, None]).sum(1).double())
    loss = F.cross_entropy(head.logits(features), labels, reduction="none")
    torch.testing.assert_close(rows[:, 0], loss.double())


def test_error_report_by_hand():
    rows = rows_of([1, 2, 3, 6], [0, 4, 5, 9], *[[0] * 4] * 6)
    assert error_report(rows) == {"error1": 75, "error5": 50, "loss": 3}


def example():
    """Nine images; class 4 has none."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])
    counts = torch.tensor([101, 100, 20, 19, 50])
    predicted = [0, 0, 1, 0, 1, 4, 0, 2, 3]
    rank = [0, 0, 1, 0, 0, 6, 2, 0, 0]
    confidence = [0.95, 0.95, 0.95, 0.5, 0.55, 0.6, 0.95, 0.5, 1.0]
    own = [0.9, 0.7, 0.5, 0.9, 0.2, 0.4, -1.0, 0.0, 1.0]
    other = [0.1, 0.2, 0.6, 0.1, 0.1, 0.5, 0.3, -0.2, 0.0]
    loss = [0.5, 0.5, 2.0, 0.5, 0.5, 3.0, 1.5, 0.3, 0.2]
    adjusted_rank = [0, 5, 0, 0, 0, 0, 2, 0, 0]
    adjusted = [0, 4, 0, 0, 1, 1, 0, 2, 3]
    columns = (loss, rank, predicted, confidence, own, other, adjusted_rank, adjusted)
    return rows_of(*columns), labels, counts


def test_full_report_by_hand():
    rows, labels, counts = example()
    report = full_report(rows, labels, counts)
    wanted = {"error1": 100 * 3 / 9, "error5": 100 / 9, "loss": 1.0}
    wanted |= {"many": 25, "medium": 50, "few": 0}  # classes of 101; of 100 and 20; of 19 images
    for name, value in wanted.items():
        assert report[name] == pytest.approx(value), name
    assert report["class_accuracy"] == [75, 50, 50, 100, None]
    assert report["adjusted_error1"] == pytest.approx(100 * 2 / 9)
    adjusted = report["adjusted"]
    assert adjusted["error5"] == pytest.approx(100 / 9)
    assert [adjusted[group] for group in ("many", "medium", "few")] == [25, 25, 0]
    assert adjusted["class_accuracy"] == [75, 100, 50, 100, None]
    # f1 of the classes: 6 / 8, 2 * 2 / 4, 2 / 3, 2 / 2
    assert adjusted["macro_f1"] == pytest.approx(100 * (6 / 8 + 1 + 2 / 3 + 1) / 4)

    f1 = f1_score(labels, rows[:, 2], labels=[0, 1, 2, 3], average="macro")
    assert report["macro_f1"] == pytest.approx(100 * f1)
    # Bins are 1/15 wide. 0.95 and 1.0 are in the last, 0.55 and 0.6 in (8/15, 9/15], 0.5 below.
    last, next_, half = 4 * 0.95 + 1.0 - 3, 0.55 + 0.6 - 1, 2 * 0.5 - 2
    assert report["ece"] == pytest.approx(100 * (abs(last) + abs(next_) + abs(half)) / 9)

    cosine = report["cosine"]
    assert cosine["many"] == pytest.approx(
        # spread of 0.9, 0.7, 0.5, 0.9 about 0.75
        {"target_mean": 0.75, "target_spread": math.sqrt(0.11 / 4), "other_mean": 0.25}
    )
    assert cosine["medium"] == pytest.approx(
        # spread about each class's own mean: of 0.2, 0.4 about 0.3, of -1, 0 about -0.5
        {"target_mean": -0.1, "target_spread": math.sqrt(0.52 / 4), "other_mean": 0.175}
    )
    assert cosine["few"] == pytest.approx(
        {"target_mean": 1.0, "target_spread": 0.0, "other_mean": 0.0}
    )
    assert cosine["overall"] == pytest.approx(
        {"target_mean": 3.6 / 9, "target_spread": math.sqrt(0.63 / 9), "other_mean": 1.7 / 9}
    )

    histogram = report["cosine_histogram"]
    edges = histogram["edges"]
    assert len(edges) == 51 and (edges[0], edges[-1]) == (-1, 1)
    for kind, values in (("target", rows[:, 4]), ("other", rows[:, 5])):
        assert {g: sum(h) for g, h in histogram[kind].items()} == {"many": 4, "medium": 4, "few": 1}
        together = np.sum(list(histogram[kind].values()), 0)
        assert together.tolist() == np.histogram(values.float(), np.float32(edges))[0].tolist()
    assert histogram["target"]["few"][-1] == 1 and histogram["target"]["medium"][0] == 1
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    "counts, full",
    [([200] * 5, "many"), ([20, 100, 50, 60, 0], "medium"), ([19, 0, 1, 2, 3], "few")],
)
def test_group_without_images_is_none(counts, full):
    rows, labels, _ = example()
    report = full_report(rows, labels, torch.tensor(counts))
    for group in ("many", "medium", "few"):
        if group == full:
            assert report[group] == report["error1"]
            assert report["cosine"][group] == report["cosine"]["overall"]
        else:
            assert report[group] is None and report["cosine"][group] is None
            assert not any(report["cosine_histogram"]["target"][group])


def test_full_report_against_sklearn_and_plain_loops():
    generator = torch.Generator().manual_seed(0)
    n, classes = 500, 12
    labels = torch.randint(classes - 1, (n,), generator=generator)  # the last has no test image
    predicted = torch.where(
        torch.rand(n, generator=generator) < 0.5,
        labels,
        torch.randint(classes, (n,), generator=generator),
    )
    rank = (predicted != labels).double() * 3
    confidence = torch.rand(n, generator=generator).double()
    zeros = torch.zeros(n).double()
    columns = (zeros, rank, predicted, confidence, zeros, zeros, rank, predicted)
    rows = torch.stack(columns, 1)
    report = full_report(rows, labels, torch.arange(classes) * 20)
    f1 = f1_score(labels, predicted, labels=range(classes - 1), average="macro")
    assert report["macro_f1"] == pytest.approx(100 * f1)
    assert report["adjusted"]["macro_f1"] == report["macro_f1"]
    ece = 0
    for b in range(15):
        m = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        right = (predicted == labels)[m].double()
        ece += 100 * m.sum() / n * abs(confidence[m].mean() - right.mean())
    assert report["ece"] == pytest.approx(ece.item())


def test_a_model_of_nan_has_a_report():
    head = SoftmaxHead(4, 5)
    features, labels = torch.randn(6, 4), torch.arange(6) % 5
    features[2] = math.nan
    rows = image_rows(head, features, labels, torch.zeros(head.weight.shape[0]))
    report = full_report(rows, labels, torch.full((5,), 50))
    assert rows[2, 1] >= 5 and report["error5"] == pytest.approx(100 / 6)
    assert math.isfinite(report["ece"]) and math.isfinite(report["macro_f1"])
