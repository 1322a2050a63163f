"""python -m train.report RUN [RUN ...] [--out DIR] [--markdown] [--pictures]"""

from train.report.cli import main
from train.shell import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        main()
