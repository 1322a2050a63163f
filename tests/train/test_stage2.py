"""Stage 2: batch norm of the frozen backbone, and features that are computed once."""

import pytest
import torch
import torch.nn.functional as F

from tests.train.runs import configure, equal, feat, in_memory, load_state, records, train_both
from train import stage2, stages
from train.fit import Fit
from train.model import make_head
from train.session import Session
from train.stage2 import Cached


def is_statistic(name):
    return "running" in name or "tracked" in name


@pytest.mark.parametrize("bn", ["frozen", "batch"])
@pytest.mark.parametrize("views", [0, 2])
def test_stage2_leaves_the_weights_alone(tmp_path, bn, views):
    data = in_memory()
    train_both(configure(tmp_path, bn=bn, views=views), data)
    before, after = feat(tmp_path / "stage1.pt"), feat(tmp_path / "stage2.pt")
    weights = [name for name in before if not is_statistic(name)]
    assert len(weights) == 9 and len(before) == 18
    assert all(torch.equal(before[name], after[name]) for name in weights)
    moved = [not torch.equal(before[n], after[n]) for n in before if is_statistic(n)]
    assert all(moved) if bn == "batch" else not any(moved)
    if bn == "batch":  # 2 epochs of 3 steps, for any number of views
        steps = [after[n] - before[n] for n in before if "tracked" in n]
        assert steps == [6, 6, 6]


@pytest.mark.parametrize("bn", ["frozen", "batch"])
def test_as_many_views_as_epochs_change_nothing(tmp_path, bn):
    data = in_memory()
    for views in (0, 3, 5):
        config = configure(tmp_path / str(views), bn=bn, views=views, stage2_epochs=3)
        train_both(config, data)
    wanted = load_state(tmp_path / "0/stage2.pt")
    for views in (3, 5):
        assert equal(load_state(tmp_path / str(views) / "stage2.pt"), wanted)
        a, b = records(tmp_path / str(views)), records(tmp_path / "0")
        assert {k: r["loss"] for k, r in a.items()} == {k: r["loss"] for k, r in b.items()}


def test_cached_features_are_what_the_net_gives(tmp_path):
    data = in_memory(val=(2, 2, 2, 2))
    run = Session(configure(tmp_path, bn="frozen", views=2), data)
    net = stages.build_net(run)
    cached = stage2.cache_features(run, net)
    assert set(cached) == {"train", "test", "val"} and len(cached["train"]) == 2
    seen = []
    for view in range(2):
        batches = list(run.loaders["train"](*run.epoch(2, view)))
        assert len(batches) == 3
        seen.append(torch.cat([images for images, _ in batches]))
        for i, (images, labels) in enumerate(batches):
            features, theirs = cached["train"][view].batch(i)
            assert torch.equal(features, net(images)) and torch.equal(theirs, labels)
    assert not torch.equal(*seen)
    for name in ("test", "val"):
        split = getattr(data, name)
        images, labels = next(run.loaders[name](*run.test_epoch(len(split))))
        features, theirs = cached[name].batch(0)
        assert torch.equal(features, net(images)) and torch.equal(theirs, split.labels)
        assert torch.equal(labels, split.labels)


def test_views_are_used_again_in_another_order(monkeypatch, small_net, tmp_path):
    batch, asked = Cached.batch, []

    def spy(self, i):
        asked.append((self, i))
        return batch(self, i)

    monkeypatch.setattr(Cached, "batch", spy)
    data = in_memory((60, 30, 4, 2))  # 12 steps
    train_both(configure(tmp_path, views=2, stage2_epochs=4, eval_every=4), data)
    epochs = [asked[start : start + 12] for start in range(0, 48, 12)]
    order = [[i for _, i in epoch] for epoch in epochs]
    assert order[0] == order[1] == list(range(12))
    assert all(sorted(o) == order[0] for o in order)
    assert order[0] != order[2] != order[3] != order[1]
    views = [{id(cached) for cached, _ in epoch} for epoch in epochs]
    assert views[0] == views[2] != views[1] == views[3] and len(views[0]) == 1


def test_start_from_means(tmp_path):
    data = in_memory((9, 5, 0, 2))
    run = Session(configure(tmp_path, batch_size=4), data)
    net = stages.build_net(run)
    head = make_head("cosine", net.num_features, 4, run.config)
    random = head.weight.detach().clone()
    stage2.start_from_means(run, net, head)
    net.eval()
    epoch = run.epoch(1, run.config.epochs)
    batches = [(net(images).detach(), y) for images, y in run.loaders["train"](*epoch)]
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    features = F.normalize(features)
    assert sorted(labels.tolist()) == [0] * 9 + [1] * 5 + [3] * 2
    for c in (0, 1, 3):
        mean = F.normalize(features[labels == c].sum(0), dim=0)
        torch.testing.assert_close(head.weight[c].detach(), mean)
    assert torch.equal(head.weight[2], random[2])  # class 2 has no image


def test_stage2_has_settings_of_its_own(monkeypatch, small_net, tmp_path):
    data, made = in_memory((60, 30, 4, 2)), []

    def spy(*args, **options):
        made.append(make_head(*args, **options))
        return made[-1]

    monkeypatch.setattr(stages, "make_head", spy)
    own = {"stage2_prior": 0.5, "stage2_batch_size": 8, "stage2_lr": 0.05}
    first = {"prior": 1.0, "kappa": 16.0}
    config = configure(tmp_path, batch_size=32, lr=0.1, **first, **own)
    train_both(config, data)
    first, second = made
    frequency = torch.tensor([60, 30, 4, 2]) / 96
    torch.testing.assert_close(first.prior, frequency.log())
    torch.testing.assert_close(second.prior, 0.5 * frequency.log())
    assert first.kappa == 16 and second.kappa == 0
    logged = records(tmp_path)
    assert (logged[1, 1]["steps"], logged[1, 1]["lr"]) == (3, 0.1)
    assert (logged[2, 1]["steps"], logged[2, 1]["lr"]) == (12, 0.05)


@pytest.mark.parametrize("sampling", ["classes", "sqrt", "images"])
def test_sampling_of_stage2(tmp_path, sampling):
    data = in_memory((400, 100, 25, 4))
    run = Session(configure(tmp_path, batch_size=23, sampling=sampling), data)
    shares = torch.stack(
        [torch.bincount(data.train.labels[run.epoch(2, e)[0]], minlength=4) for e in range(9)]
    ).double()
    shares = shares.sum(0) / shares.sum()
    power = {"classes": 0, "sqrt": 0.5, "images": 1}[sampling]
    wanted = data.counts.double() ** power
    torch.testing.assert_close(shares, wanted / wanted.sum(), rtol=0, atol=0.03)
    assert torch.equal(run.epoch(1, 0)[0].sort().values, torch.arange(529))


@pytest.mark.parametrize("head", ["softmax", "tvmf"])
def test_start_from_stage1(monkeypatch, small_net, tmp_path, head):
    data, started = in_memory(), []
    run = Fit.run

    def spy(self):
        started.append(self.head.weight.detach().clone())
        return run(self)

    monkeypatch.setattr(Fit, "run", spy)
    config = configure(tmp_path / "first", head=head, stage2_start="stage1")
    train_both(config, data)
    trained = load_state(tmp_path / "first/stage1.pt")["fc_state_dict"]["weight"]
    torch.testing.assert_close(started[1], F.normalize(trained))

    # A model with other classes starts from class means.
    fewer = in_memory((13, 7, 4), (5, 4, 4))
    model = tmp_path / "first/stage1.pt"
    train_both(configure(tmp_path / "second", model=model, stage2_start="stage1"), fewer)
    torch.testing.assert_close(started[2].norm(dim=1), torch.ones(3))
