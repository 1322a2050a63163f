"""`python -m tests.simt`: see command.py."""

import sys

from tests.simt import command

if __name__ == "__main__":
    try:
        sys.exit(0 if command.main() else 1)
    except RuntimeError as error:
        sys.exit(f"python -m tests.simt: {error}")
