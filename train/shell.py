"""How the commands end: with one line, and no traceback, for what a user or the machine did."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from train.config import TrainError


def one_line(text: str) -> str:
    """The text with the characters that would break its line or move the cursor, which a path may
    hold, written as Python writes them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns errors that a user can put right into a line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a path may have what the locale has not
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except TrainError as error:
        sys.exit(one_line(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        got = f"{error.filename} ({error.strerror})"
        sys.exit(one_line(f"error: got {got}, wanted a file that can be used"))
