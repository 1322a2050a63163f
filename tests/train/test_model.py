"""Backbones and heads."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.config import Config, TrainError
from train.metrics import image_rows
from train.model import Classifier, ConvNet, SoftmaxHead, head_of_state, make_head, make_net


def keys_of_resnet(blocks, convolutions, narrow):
    """The keys of a ResNet's state_dict: the stem, then blocks of convolutions and batch norms."""

    def norm(name):
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{part}" for part in parts]

    keys = ["conv1.weight", *norm("bn1")]
    for layer, size in enumerate(blocks, 1):
        for block in range(size):
            at = f"layer{layer}.{block}"
            for i in range(1, convolutions + 1):
                keys += [f"{at}.conv{i}.weight", *norm(f"{at}.bn{i}")]
            if block == 0 and (layer > 1 or not narrow):
                keys += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    return keys


NETS = {
    "resnet10": (4_905_792, 512, keys_of_resnet([1, 1, 1, 1], 2, True)),
    "resnet50": (23_508_032, 2048, keys_of_resnet([3, 4, 6, 3], 3, False)),
}


@pytest.mark.parametrize("name", NETS)
def test_resnets_are_the_references(name):
    torch.manual_seed(0)
    net = make_net(name, 3)
    parameters, features, keys = NETS[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.num_features == features
    assert list(net.state_dict()) == keys
    wide = 0
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Conv2d):
            k, out = module.kernel_size[0], module.out_channels
            std = math.sqrt(2 / (k * k * out))
            wide += (
                module.in_channels != out
            )  # fan-in and fan-out differ, so that the mode of initialisation shows
            tolerance = 5 / math.sqrt(2 * module.weight.numel())  # five standard deviations
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance)
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(module.weight.numel())
    assert wide >= 7


@torch.no_grad()
@pytest.mark.parametrize("name, size", [("resnet10", 64), ("resnet10", 97), ("resnet50", 64)])
def test_features_are_the_mean_of_the_last_relu(name, size):
    torch.manual_seed(0)
    net, seen = make_net(name, 3).eval(), []
    net.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = net(torch.randn(2, 3, size, size))
    assert seen[0].shape[2:] == (math.ceil(size / 32),) * 2
    assert (features >= 0).all() and (seen[0] == 0).any()
    torch.testing.assert_close(features, seen[0].mean((2, 3)))


@torch.no_grad()
def test_grey_images():
    torch.manual_seed(0)
    net = make_net("resnet10", 1).eval()
    assert net.conv1.weight.shape == (64, 1, 7, 7)
    assert net.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.07)
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, 512)


@torch.no_grad()
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (3, 64)])
def test_convnet(channels, size):
    net = make_net("convnet", channels).eval()
    features = net(torch.rand(2, channels, size, size))
    assert isinstance(net, ConvNet) and features.shape == (2, net.num_features)
    assert (features >= 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_convnext", "mobilenetv3_small_050"])
def test_timm_backbones(name):
    # MobileNetV3 has a layer after its pooling, so that its features are longer than its last map.
    net = make_net(f"timm:{name}", 1).eval()
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, net.num_features)


@pytest.mark.parametrize("name", ["nonesuch", "resnet18.nonesuch", "none/such"])
def test_unknown_timm_backbone_is_named(name):
    with pytest.raises(TrainError, match=rf"--net: got timm:{name} .*wanted a name of timm"):
        make_net(f"timm:{name}", 3)


def test_pretrained_weights_that_cannot_be_loaded(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(TrainError, match=r"got timm:resnet18 \(no route .*wanted .*--pretrained"):
        make_net("timm:resnet18", 3, pretrained=True)


def test_softmax_head_is_linear_and_cross_entropy():
    torch.manual_seed(0)
    head, features, labels = SoftmaxHead(8, 5), torch.randn(20, 8), torch.randint(5, (20,))
    labels[[3, 7]] = -100
    features.requires_grad_()
    logits = F.linear(features, head.weight, head.bias)
    stats = head.row_statistics(features, labels)
    loss, wanted = head.loss(stats, labels), F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (
        torch.autograd.grad(part, features, retain_graph=True)[0] for part in (loss, wanted)
    )
    torch.testing.assert_close(ours, theirs)
    assert not ours[[3, 7]].any()
    place = logits.argsort(1, descending=True).eq(labels[:, None]).int().argmax(1)
    place[[3, 7]] = -1
    assert torch.equal(stats.rank, place)
    assert torch.equal(head.logits(features), logits) and head.scale is None


@pytest.mark.parametrize("name", ["softmax", "tvmf"])
def test_ties_are_no_errors_and_nan_is_one(name):
    head = make_head(name, 4, 6, Config())
    with torch.no_grad():
        head.weight.fill_(1)
        if name == "softmax":
            head.bias.zero_()
    features = torch.ones(2, 4)
    features[1] = math.nan
    rank = head.row_statistics(features, torch.tensor([2, 2])).rank
    assert rank[0] == 0 and rank[1] >= 1
    rows = image_rows(head, features, torch.tensor([2, 2]), torch.zeros(6))
    assert rows[0, 1] == 0 and rows[1, 1] >= 1


@pytest.mark.parametrize("name, kappa", [("tvmf", 16.0), ("tvmf", -0.3), ("cosine", 0.0)])
def test_similarity_heads(name, kappa):
    torch.manual_seed(0)
    head = make_head(name, 8, 5, Config(kappa=kappa or 4.0))  # the cosine head has none
    features, labels = torch.randn(20, 8), torch.arange(20) % 5
    labels[6] = -100
    cosine = F.linear(F.normalize(features), F.normalize(head.weight))
    phi = (1 + cosine) / (1 + kappa * (1 - cosine)) - 1
    logits = (1 + math.log(2)) * phi  # softplus(0) + 1
    torch.testing.assert_close(head.logits(features), logits)
    stats = head.row_statistics(features, labels)
    wanted = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(head.loss(stats, labels), wanted)
    known = labels >= 0
    assert torch.equal(stats.rank[known] >= 1, (logits.argmax(1) != labels)[known])
    assert head.bias is None and head.s_.requires_grad


@pytest.mark.parametrize("start", [1.001, 1 + math.log(2), 16.0, 64.0])
def test_scale_start(start):
    head = make_head("tvmf", 8, 5, Config(scale_start=start))
    assert head.scale.item() == pytest.approx(start, rel=1e-5)
    features = torch.randn(3, 8)
    unit = make_head("tvmf", 8, 5, Config(scale_start=2.0))
    unit.weight = head.weight
    torch.testing.assert_close(head.logits(features), unit.logits(features) * (start / 2))


@pytest.mark.parametrize("kind", ["softmax", "softmax without bias", "CosLoss", "tvMFLoss", "bias"])
def test_head_of_state(kind):
    """The head is known by the keys and shapes that the paper's heads and ours are saved with."""
    torch.manual_seed(0)
    weight, bias, s = torch.randn(5, 8), torch.randn(5), torch.tensor([0.7])
    features = torch.randn(4, 8)
    cosine = F.linear(F.normalize(features), F.normalize(weight))
    scale, phi = F.softplus(s) + 1, (1 + cosine) / (1 + 4 * (1 - cosine)) - 1
    state, wanted = {
        "softmax": ({"weight": weight, "bias": bias}, F.linear(features, weight, bias)),
        "softmax without bias": ({"weight": weight}, F.linear(features, weight)),
        "CosLoss": ({"weight": weight, "s_": s}, scale * cosine),
        "tvMFLoss": ({"weight": weight, "s_": s, "kappa": torch.tensor([4.0])}, scale * phi),
        "bias": (
            {"weight": weight, "bias": bias, "s_": s, "kappa": torch.tensor([4.0])},
            scale * (phi + bias),
        ),
    }[kind]
    kept = dict(state)
    head = head_of_state(state)
    torch.testing.assert_close(head.logits(features), wanted)
    assert state.keys() == kept.keys()
    # A file that our head saves gives the same head again.
    torch.testing.assert_close(head_of_state(head.state_dict()).logits(features), wanted)


@pytest.mark.parametrize("name", ["softmax", "tvmf"])
def test_classifier_sums_losses_and_errors(name):
    torch.manual_seed(0)
    head, labels = make_head(name, 6, 9, Config()), torch.randint(9, (40,))
    labels[5] = -100
    images = torch.randn(40, 6)
    loss, counts = Classifier(nn.Identity(), head)(images, labels)
    logits = head.logits(images)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="sum"))
    top = logits.topk(5, 1).indices == labels[:, None]
    wrong1, wrong5 = ((~top[:, :k].any(1) & (labels >= 0)).sum().item() for k in (1, 5))
    assert counts.tolist() == [39, wrong1, wrong5] and wrong1 > wrong5 > 0
    assert not counts.requires_grad


@pytest.mark.parametrize("name", ["softmax", "cosine", "tvmf"])
def test_a_prior_is_in_the_loss_alone(name):
    torch.manual_seed(0)
    prior = torch.tensor([-0.1, -2.0, -5.0, -3.0])
    head = make_head(name, 6, 4, Config(), prior=prior)
    features, labels = torch.randn(20, 6), torch.arange(20) % 4
    stats = head.row_statistics(features, labels)
    logits = head.logits(features)
    wanted = F.cross_entropy(logits + prior, labels, reduction="sum")
    torch.testing.assert_close(head.loss(stats, labels), wanted)
    own = logits.gather(1, labels[:, None])
    assert torch.equal(stats.rank, (logits > own).sum(1))
    assert "prior" not in head.state_dict()  # it belongs to the data
