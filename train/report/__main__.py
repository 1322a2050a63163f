"""python -m train.report RUN [RUN ...] [--out DIR] [--markdown] [--pictures]"""

import sys

from train.config import TrainError
from train.report.cli import main

if __name__ == "__main__":
    try:
        main()
    except TrainError as error:
        sys.exit(f"error: {error}")
