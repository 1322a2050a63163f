"""Trains the driver with a head that its flags do not make: one with margins in stage 1.

    python -m examples.margins --ldam 0.5 --dataset list --data data/icons --out out

--ldam makes them wider for smaller classes. All flags but those of the margins go to `python -m
train`; --scale-lr 0 fixes the scale, which margins otherwise push down.
"""

import argparse
import functools

from train import command, stages
from train.config import TrainError, parse_config
from train.shell import one_line_errors
from tvmf_ext.margin import ldam


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ldam", type=float, metavar="M", help="margin of the cosine of the smallest class")
    add(
        "--cosine-margin",
        type=float,
        metavar="M",
        default=0.0,
        help="margin of all classes' cosines",
    )
    add(
        "--angular-margin",
        type=float,
        metavar="A",
        default=0.0,
        help="margin of their angles in radians",
    )
    options, flags = parser.parse_known_args()
    config = parse_config(flags)
    if config.head == "softmax":
        raise TrainError("--head: got softmax, wanted cosine or tvmf: margins are those of cosines")
    train_stage1, make_head = stages.train_stage1, stages.make_head

    def train_with_margins(session, *rest):
        counts = session.data.counts
        cosine_margin = (
            options.cosine_margin if options.ldam is None else ldam(counts, options.ldam)
        )

        margins = {"cosine_margin": cosine_margin, "angular_margin": options.angular_margin}
        stages.make_head = functools.partial(make_head, **margins)
        try:
            return train_stage1(session, *rest)
        finally:
            stages.make_head = make_head

    stages.train_stage1 = train_with_margins
    command.main(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
