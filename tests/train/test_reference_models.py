"""Model files of the paper's code, and files that are no model."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.train.runs import FLAGS, configure, equal, feat, in_memory, load_state, main
from train import checkpoint, stages
from train.config import TrainError
from train.model import head_of_state, make_net, tvmf_head
from train.session import Session


class Block(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(fan_out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (self.downsample(x) if self.downsample else x))


class ResNet10(nn.Module):
    """The ResNet-10 of the paper's code; its features are taken after the final ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        for i in range(4):
            block = Block(widths[i], widths[i + 1], 1 if i == 0 else 2)
            setattr(self, f"layer{i + 1}", nn.Sequential(block))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return x.mean((2, 3))


def write_reference(path, classes, *, prefix="", kappa=16.0, bias=False, linear=False):
    """Writes a model_best.pth.tar; returns the function of images that gives its logits."""
    torch.manual_seed(0)
    net = ResNet10().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    head = {"weight": torch.randn(classes, 512)}
    if not linear:
        head["s_"] = torch.tensor([2.5])
        head |= {} if kappa is None else {"kappa": torch.tensor([kappa])}
    head |= {"bias": torch.randn(classes) / 4} if bias or linear else {}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    stats = {"train": [50.0, 40.0], "test": [60.0, 55.5], "lr": [0.1, 0.05]}
    state = {"epoch": 90, "arch": "resnet10", "stats": stats, "optimizer": optimizer.state_dict()}
    state["feat_state_dict"] = {prefix + name: t for name, t in net.state_dict().items()}
    torch.save(state | {"fc_state_dict": head}, path)

    @torch.no_grad()
    def logits(images):
        features = net(images)
        if linear:
            return F.linear(features, head["weight"], head["bias"])
        cosine = F.linear(F.normalize(features), F.normalize(head["weight"]))
        sharp = 0.0 if kappa is None else kappa
        phi = (1 + cosine) / (1 + sharp * (1 - cosine)) - 1
        return (F.softplus(head["s_"]) + 1) * (phi + head.get("bias", 0))

    return logits


REFERENCES = {
    "t-vMF": {},
    "t-vMF, DataParallel, bias": {"prefix": "module.", "kappa": 4.0, "bias": True},
    "CosLoss": {"kappa": None},
    "linear": {"linear": True, "prefix": "module."},
}


@pytest.mark.parametrize("options", REFERENCES.values(), ids=REFERENCES)
def test_reference_checkpoint(tmp_path, options):
    data = in_memory(side=32, channels=3)
    path = tmp_path / "model_best.pth.tar"
    logits = write_reference(path, 4, **options)
    settings = {"net": "resnet10", "model": path, "bn": "frozen", "batch_size": 26}
    config = configure(tmp_path / "out", **settings, stage2_epochs=1, views=1)
    run = Session(config, data)
    net = stages.build_net(run).eval()
    head = head_of_state(checkpoint.fill(net, path, "resnet10"))
    images, labels = next(run.loaders["test"](*run.test_epoch(len(data.test))))
    wanted = logits(images)
    assert wanted.std() > 0.005
    with torch.no_grad():
        torch.testing.assert_close(head.logits(net(images)), wanted, rtol=1e-5, atol=1e-5)
    report = stages.test_model(run)["model"]
    assert report["loss"] == pytest.approx(F.cross_entropy(wanted, labels).item(), rel=1e-5)
    wrong = wanted.argmax(1) != labels
    assert report["error1"] == pytest.approx(100 * wrong.double().mean().item())

    if "prefix" in options and "kappa" in options:
        assert list(stages.train(run)) == ["stage2"]
        saved = load_state(path)["feat_state_dict"].items()
        saved = {name.removeprefix("module."): tensor for name, tensor in saved}
        assert equal(dict(feat(config.out / "stage2.pt")), saved)


def test_wrong_models_are_refused(folder, tmp_path, capsys):
    path = tmp_path / "model_best.pth.tar"
    write_reference(path, 5)
    (tmp_path / "garbage").write_bytes(b"garbage" * 99)
    torch.save({"state_dict": {}}, tmp_path / "other.pt")

    def evaluate(model, *flags):
        flags = [*FLAGS, "--data", folder, "--out", tmp_path / "out", "--model", model, *flags]
        main([*flags, "--evaluate"])

    with pytest.raises(TrainError, match=r"got .*tar with 5 classes, wanted the 12 of --dataset"):
        evaluate(path, "--net", "resnet10")
    other = r"got .*tar, a model of resnet10 whose 0\.weight is absent; wanted one of --net convnet"
    with pytest.raises(TrainError, match=other):
        evaluate(path)
    grey = r"whose conv1\.weight is \[64, 3, 7, 7\]; .* whose conv1\.weight is \[64, 1, 7, 7\]"
    with pytest.raises(TrainError, match=grey):
        checkpoint.fill(make_net("resnet10", 1), path, "resnet10")
    net = make_net("convnet", 3)  # whose tensors have the shapes of gridnet's
    checkpoint.save_model(tmp_path / "grid.pt", net, tvmf_head(1152, 5), 1, configure(tmp_path))
    features = r"convnet whose num_features is 1152; .* --net convnet, whose num_features is 128"
    with pytest.raises(TrainError, match=features):
        checkpoint.fill(net, tmp_path / "grid.pt", "convnet")
    with pytest.raises(TrainError, match=r"got .*garbage, unreadable"):
        evaluate(tmp_path / "garbage")
    with pytest.raises(TrainError, match=r"other\.pt, unreadable \('feat_state_dict'\)"):
        evaluate(tmp_path / "other.pt")
    with pytest.raises(TrainError, match="none, which is no file"):
        evaluate(tmp_path / "none")


class CosLoss(nn.Linear):
    """The parameters and buffers of the heads in the paper's code: kappa only with t-vMF."""

    def __init__(self, features, classes, kappa=None):
        super().__init__(features, classes, bias=False)
        self.s_ = nn.Parameter(torch.zeros(1))
        if kappa is not None:
            self.register_buffer("kappa", torch.tensor([float(kappa)]))


@pytest.mark.parametrize("head, kappa", [("tvmf", 4.0), ("cosine", None)])
def test_our_models_load_in_the_papers_code(tmp_path, head, kappa):
    """As its `main_train.py -e --resume` and `main_finetune.py` load them."""
    settings = {"net": "resnet10", "head": head, "kappa": 4.0}
    settings |= {"epochs": 1, "stage2_epochs": 1, "prior": 1.0, "weight_decay": 3e-4}
    config = configure(tmp_path, **settings)
    data = in_memory(side=32, channels=3)
    stages.train(Session(config, data))
    for name, wanted in (("stage1.pt", kappa), ("stage2.pt", None)):
        file = load_state(tmp_path / name)
        assert (file["arch"], file["epoch"]) == ("ResNet10Feature", 1)
        net, loss = ResNet10(), CosLoss(512, 4, wanted)
        net.load_state_dict(file["feat_state_dict"])
        loss.load_state_dict(file["fc_state_dict"])
        both = nn.ModuleList([net, loss])
        optimizer = torch.optim.SGD(both.parameters(), 0.1, momentum=0.9)
        optimizer.load_state_dict(file["optimizer"])
        (group,) = optimizer.param_groups  # with which the paper's code goes on
        assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (3e-4, 0.9, False)
        figures = {f"{s}_{n}" for s in ("train", "test") for n in ("err1", "err5", "loss")}
        assert set(file["stats"]) == figures
        again = head_of_state(load_state(tmp_path / name)["fc_state_dict"])
        assert again.kappa.tolist() == [wanted or 0.0]


@pytest.mark.parametrize(
    "options, title, flags",
    [
        ({"kappa": None}, "cosine", {"head": "cosine"}),
        ({"kappa": 4.0}, "t-vMF, kappa 4", {"head": "tvmf", "kappa": 4.0}),
        ({"linear": True}, "softmax", {"head": "softmax"}),
    ],
)
def test_stage2_of_a_model_is_titled_by_its_file(folder, tmp_path, capsys, options, title, flags):
    write_reference(tmp_path / "model.tar", 12, **options)
    more = ["--model", tmp_path / "model.tar", "--net", "resnet10", "--stage2-epochs", 1]
    main([*FLAGS, "--data", folder, "--out", tmp_path / "out", *more, "--views", 1, "--kappa", 64])
    assert f", {title}, 60 test images" in " ".join(capsys.readouterr().out.split())
    config = json.loads((tmp_path / "out/result.json").read_text())["config"]
    assert {key: config[key] for key in flags} == flags
