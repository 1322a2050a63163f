"""What a run writes for its report: figures by hand, and the files that a run leaves."""

import base64
import io
import json
import math

import pytest
import torch
from PIL import Image

from tests.train.runs import configure, in_memory, main, train_both
from train import checkpoint
from train.metrics import COLUMNS
from train.report import analysis
from train.session import Session
from train.splits import Paths, Split, class_names


def split(labels, files=None):
    labels = torch.tensor(labels)
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 4, 4)
    return Split(pixels if files is None else Paths.of("root", files), labels)


def shade(uri):
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return image.getpixel((0, 0)), image.size


def test_sample_takes_as_many_of_each_class(monkeypatch):
    monkeypatch.setattr(analysis, "SAMPLE", 18)
    data = split([0] * 20 + [2] * 3 + [1] * 9)
    taken = analysis.sample(data, 3)
    assert taken.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 3
    # Spread over the class's images.
    assert taken.images[:6, 0, 0, 0].tolist() == [0, 3, 6, 10, 13, 16]
    monkeypatch.setattr(analysis, "SAMPLE", 3)
    assert len(analysis.sample(data, 3)) == 3 + 2 * analysis.LEAST


def test_quantiles_of_angles_by_size():
    labels = torch.tensor([0] * 5 + [1] * 2)
    angle = analysis.degrees(torch.tensor([1.0, 0.5, 0.0, -0.5, -1.5, 1.0, 0.0]).double())
    found = analysis.angle_quantiles(angle, labels, torch.tensor([500, 5]))
    assert found["many"] == pytest.approx([12, 60, 90, 120, 168], abs=1e-3)
    assert found["few"] == pytest.approx([4.5, 22.5, 45, 67.5, 85.5]) and found["medium"] is None
    assert found["all"][2] == 90


def test_reliability():
    confidence = torch.tensor([0.95, 0.99, 0.5, 0.0]).double()
    right = torch.tensor([True, False, True, False])
    assert analysis.reliability(confidence, right) == [
        {"images": 1, "confidence": 0.0, "accuracy": 0.0},
        {"images": 1, "confidence": 50.0, "accuracy": 100.0},
        {"images": 2, "confidence": 97.0, "accuracy": 50.0},
    ]


def test_confused_pairs():
    test, train = split([0, 0, 0, 0, 1, 1, 2]), split([2, 1, 1, 0])
    predicted = torch.tensor([1, 1, 2, 0, 0, 1, 2])
    confidence = torch.tensor([0.3, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    pairs = analysis.confused_pairs(
        test, train, predicted, confidence, predicted != test.labels, classes=3
    )
    # Of equal numbers the larger share of its class comes first.
    assert [(p["true"], p["predicted"], p["images"], p["of"]) for p in pairs] == [
        (0, 1, 2, 4),
        (1, 0, 1, 2),
        (0, 2, 1, 4),
    ]
    assert [shade(uri)[0] for uri in pairs[0]["examples"]] == [1, 0]  # the surest first
    assert [shade(uri)[0] for uri in pairs[0]["predicted_example"]] == [1]
    right = torch.zeros(7, dtype=torch.bool)
    assert analysis.confused_pairs(test, train, test.labels, confidence, right, 3) == []


def test_thumbnails(tmp_path):
    Image.new("RGB", (300, 200), (200, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    (red, *_), size = shade(analysis.thumbnail(files, 0))
    assert abs(red - 200) < 9 and size == (64, 43)
    assert analysis.thumbnail(files, 1) is None
    color = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 5, 5)
    assert shade(analysis.thumbnail(color, 0)) == ((10, 20, 30), (5, 5))


def test_class_names():
    files = ["x/cat/1.png", "x/dog/1.png", "x/cat/2.png"]
    assert class_names(split([0, 1, 0], files), 3) == ["cat", "dog", "2"]
    assert class_names(split([0, 1, 0]), 2) is None  # they are in memory
    for files in (["x/1.png"] * 3, ["x/a/1.png", "x/a/2.png", "x/b/3.png"]):
        assert class_names(split([0, 1, 0], files), 2) is None, files


def read(out, stage):
    return json.loads((out / f"stage{stage}.analysis.json").read_text())


def test_a_run_writes_the_analysis_of_both_stages(small_net, tmp_path):
    data = in_memory()
    results = train_both(configure(tmp_path), data)
    for stage in (1, 2):
        found, result = read(tmp_path, stage), results[f"stage{stage}"]
        assert found["train_images"] == len(data.train) and found["tested"] == [5, 4, 4, 2]
        assert sum(part["images"] for part in found["reliability"]) == len(data.test)
        gap = [p["images"] * abs(p["confidence"] - p["accuracy"]) for p in found["reliability"]]
        assert sum(gap) / len(data.test) == pytest.approx(result["ece"], abs=0.02)
        wrong = result["error1"] * len(data.test) / 100
        assert sum(pair["images"] for pair in found["pairs"]) == pytest.approx(wrong)
        head = checkpoint.load_model(tmp_path / f"stage{stage}.pt")[1]
        norms = head["weight"].norm(dim=1).tolist()
        assert found["weight_norm"] == pytest.approx(norms, rel=1e-4)
        assert all(0 <= angle <= 180 for angle in found["angle"] + found["test_angle"])
    assert found["names"] == ["0", "1", "2", "3"]


def test_angles_and_norms_are_those_of_training_images_as_they_are(small_net, tmp_path):
    """Without augmentation, in evaluation mode, and of each class the median."""
    config, data = configure(tmp_path), in_memory()
    session = Session(config, data)
    torch.manual_seed(0)
    from train import stages
    from train.model import make_head

    net, head = stages.build_net(session), make_head("tvmf", 16, 4, config)
    rows = session.evaluate("test", net, head)
    assert rows.shape == (len(data.test), len(COLUMNS))
    analysis.write(session, 1, net, head, rows)
    images = data.train.images.double() / 255
    images = ((images - images.mean()) / images.std(correction=0)).float()
    with torch.no_grad():
        features = net.eval()(images)
    own = head.weight[data.train.labels]
    angle = torch.cosine_similarity(features, own).arccos() * 180 / math.pi
    members = [data.train.labels == c for c in range(4)]
    found = read(tmp_path, 1)
    wanted = [angle[m].median().item() for m in members]
    assert found["angle"] == pytest.approx(wanted, abs=0.05)
    wanted = [features[m].norm(dim=1).mean().item() for m in members]
    assert found["feature_norm"] == pytest.approx(wanted, rel=1e-3)


def test_files_in_folders_name_their_classes(folder, tmp_path):
    flags = ["--dataset", "folder", "--data", folder, "--device", "cpu", "--out", tmp_path / "out"]
    main([*flags, "--epochs", 1, "--stage2-epochs", 0, "--batch-size", 64])
    assert read(tmp_path / "out", 1)["names"] == sorted(map(str, range(12)))
