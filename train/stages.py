"""The two stages of a run, one after the other; or the test of a model that is given."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import checkpoint, distributed, sharded
from train.batches import seed_of
from train.config import TrainError
from train.fit import Fit
from train.metrics import full_report
from train.model import head_of_state, make_head, make_net
from train.session import Session
from train.stage2 import cache_features, start_from_means
from tvmf_ext.margin import log_prior


def build_net(session: Session) -> nn.Module:
    """The backbone that the flags ask for, on the session's device. One that cannot take images of
    that size is refused, such as most vision transformers."""
    config, images, size = session.config, session.data.train.images, session.data.image_size
    channels = images.shape[1] if isinstance(images, Tensor) else 3
    net = make_net(config.net, channels, config.pretrained)
    net.to(session.device, memory_format=torch.channels_last)  # convnet then takes 3/4 of the time
    try:
        with torch.no_grad():
            features = net.eval()(torch.zeros(1, channels, size, size, device=session.device))
        if features.shape != (1, net.num_features):
            raise ValueError(f"its output is {list(features.shape)}")
    except Exception as error:  # each net of timm fails in a way of its own
        raise TrainError(
            f"--net: got {config.net} ({checkpoint.first_line(error)}), wanted a net that makes "
            f"features of {size} x {size} pixels, or another --image-size"
        ) from None
    return net.train()


def check_session(session: Session) -> None:
    """Refuses a selection without images for it, and batches too small for the processes."""
    config, data = session.config, session.data
    if config.select == "val" and not data.val:
        raise TrainError("--select: got val, wanted last or test: there are no images of val")
    smallest = min(config.batch_size, len(data.train))
    if smallest < 2 * session.world:
        raise TrainError(
            f"--batch-size: got {smallest} images for {session.world} process(es), wanted 2 for "
            f"each: {2 * session.world} or more"
        )


def train(session: Session) -> dict[str, dict]:
    """Trains both stages, or those that the flags ask for; returns {"stage1": report, "stage2":
    report}."""
    config = session.config
    check_session(session)
    saved = checkpoint.load(config.out, session.identity(), session.warn) if config.resume else None
    session.results = saved["results"] if saved else {}
    torch.manual_seed(config.seed)
    net = build_net(session)
    if config.model:
        checkpoint.fill(net, config.model, config.net)
    if session.rank == 0 and not config.resume:
        checkpoint.clear(config.out)  # only now, as nothing is left that could refuse the run
    distributed.barrier()
    if config.model is None and (saved is None or saved["stage"] == 1):
        session.results["stage1"] = train_stage1(session, net, saved)
        saved = None
    if config.stage2_epochs:
        session.results["stage2"] = train_stage2(session, net, saved)
    return session.results


def new_head(session: Session, name: str, num_features: int, tau: float) -> nn.Module:
    """A head on the session's device, with the logarithm of the class frequencies times `tau`."""
    counts = session.data.counts
    prior = log_prior(counts, tau) if tau else None
    size = num_features, len(counts)
    return make_head(name, *size, session.config, prior=prior, mesh=session.mesh).to(session.device)


def train_stage1(session: Session, net: nn.Module, saved: dict | None) -> dict:
    """Trains backbone and head on every image equally often."""
    config = session.config
    head = new_head(session, config.head, net.num_features, config.prior)
    return Fit(session, 1, net, head, None, saved).run()


def train_stage2(session: Session, net: nn.Module, saved: dict | None) -> dict:
    """Trains a new cosine head on the frozen backbone, on images as --sampling draws them."""
    config = session.config
    source = (config.model, "--model") if config.model else (config.out / "stage1.pt", "--resume")
    before = checkpoint.fill(net, source[0], config.net, source[1])["weight"]
    net.requires_grad_(False)
    torch.manual_seed(seed_of(config.seed, 2))
    head = new_head(session, "cosine", net.num_features, config.stage2_prior)
    cached = cache_features(session, net) if config.views else None
    if config.stage2_start == "stage1" and before.shape == head.weight.shape:
        with torch.no_grad():
            weight, first = sharded.own_classes(head)
            weight.copy_(F.normalize(before[first : first + len(weight)]))
    elif config.stage2_start != "fresh" and saved is None:  # --model may have other classes
        start_from_means(session, net, head)
    return Fit(session, 2, net, head, cached, saved).run()


def test_model(session: Session) -> dict[str, dict]:
    """Tests --model with the head that the file holds; returns {"model": report}."""
    config, classes = session.config, session.data.num_classes
    net = build_net(session)
    state = checkpoint.fill(net, config.model, config.net)
    head = head_of_state(state, session.mesh).to(session.device)
    if len(head.weight) != classes:
        raise TrainError(
            f"--model: got {config.model} with {len(head.weight)} classes, wanted the {classes} "
            f"of --dataset {config.dataset}"
        )
    rows = session.evaluate("test", net, head)
    report = full_report(rows, session.data.test.labels, session.data.counts)
    return {"model": report | {"selected_on": "as given"}}
