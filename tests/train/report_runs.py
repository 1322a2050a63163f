"""Runs for the tests of the report: the files that a run leaves, with figures made by hand."""

import base64
import io
import json

import numpy as np
from PIL import Image

COUNTS = [200, 150, 50, 10]
NAMES = ["cat", "<dog>", "emu", "fox"]


def epoch(stage, number, **changes):
    record = {"stage": stage, "epoch": number, "epochs": 2, "lr": 0.1, "scale": 2.0, "loss": 1.0}
    record |= {"error1": 50.0 / number, "val": {"error1": 60.0}, "test": {"error1": 70.0}}
    return record | changes


def stage_result(error1, select, accuracy):
    bins = {"many": [0] * 49 + [4], "medium": [1, 3] + [0] * 48, "few": [0] * 50}
    edges = np.linspace(-1, 1, 51).tolist()
    adjusted = {"many": 9.0, "medium": 15.0, "few": None}
    adjusted["class_accuracy"] = [a and a + 5 for a in accuracy]
    return {
        "error1": error1,
        "error5": 1.0,
        "many": 8.0,
        "medium": 20.0,
        "few": None,
        "macro_f1": 77.0,
        "ece": 3.0,
        "adjusted_error1": error1 - 1,
        "adjusted": adjusted,
        "selected_on": select,
        "epoch": 2,
        "class_accuracy": accuracy,
        "cosine_histogram": {"edges": edges, "target": bins, "other": bins},
    }


def picture(shade):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def stage_analysis(angle):
    quantiles = [angle + d for d in (-20, -10, 0, 10, 20)]
    sizes = {"all": quantiles, "many": quantiles, "medium": quantiles, "few": None}
    pair = {"true": 0, "predicted": 1, "images": 3, "of": 10}
    pair |= {"examples": [picture(50), None], "predicted_example": [picture(200)]}
    return {
        "names": NAMES,
        "tested": [10, 10, 10, 0],
        "train_images": 300,
        "weight_norm": [4.0, 3.0, 2.0, 1.0],
        "feature_norm": [2.0, 2.0, 2.0, 2.0],
        "test_feature_norm": [2.0, 2.0, 2.0, None],
        "angle": [angle, angle + 1, angle + 2, angle + 3],
        "test_angle": [angle, angle, angle, None],
        "angles": sizes,
        "test_angles": sizes,
        "reliability": [
            {"images": 10, "confidence": 50.0, "accuracy": 40.0},
            {"images": 20, "confidence": 99.0, "accuracy": 95.0},
        ],
        "pairs": [pair],
    }


def write_run(
    path, head="tvmf", kappa=16.0, seed=0, error1=10.0, select="val", analysis=True, **config
):
    """A finished run of two epochs a stage; its last class has no test images."""
    path.mkdir(parents=True)
    log = [epoch(stage, n, loss=1.0 + seed) for stage in (1, 2) for n in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    fixed = {"dataset": "digits", "net": "convnet", "head": head, "kappa": kappa, "seed": seed}
    data = {"classes": 4, "train": 410, "val": 40, "test": 30, "counts": COUNTS}
    result = {"config": fixed | {"out": str(path), "select": select} | config, "dataset": data}
    for stage in (1, 2):
        accuracy = [90.0, 80.0, 60.0 + 10 * (stage == 2), None]
        result[f"stage{stage}"] = stage_result(error1, select, accuracy)
        if analysis:
            text = json.dumps(stage_analysis(30.0 + 10 * stage + seed))
            (path / f"stage{stage}.analysis.json").write_text(text)
    (path / "result.json").write_text(json.dumps(result))
    return path


def write_runs(root):
    """Three seeds of a t-vMF head, one of a softmax head, and an unfinished run."""
    tvmf = [write_run(root / f"t{s}", seed=s, error1=10.0 + 2 * s) for s in range(3)]
    killed = root / "killed<b>$_$"
    killed.mkdir()
    (killed / "metrics.jsonl").write_text(json.dumps(epoch(1, 1, scale=None)) + '\n{"stage')
    return [*tvmf, write_run(root / "softmax", "softmax", kappa=4.0, error1=11.0), killed]
