"""Trains a classifier on long-tailed data in two stages and reports its error by class size.

Stage 1 trains backbone and head on every image equally often. Stage 2 freezes the backbone and
trains a new cosine head that balances the classes. `python -m train --help` lists the flags.
"""

import sys

from train.config import parse_config
from train.shell import one_line_errors


def main() -> None:
    config = parse_config(sys.argv[1:])
    from train import command  # imports torch, which --help need not wait for

    command.main(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
