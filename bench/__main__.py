"""`python -m bench`; cli.py is the command."""

import sys

from bench.cli import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
