"""Runs the command: makes a session from the flags, trains or tests, and reports the result."""

import dataclasses
import json
import shutil
import signal
import sys

import torch
from rich.table import Table

from train import checkpoint, distributed
from train.config import Config, TrainError, settle
from train.data import load_data
from train.metrics import FIGURES, SIZES
from train.session import Session, Stopped
from train.stages import test_model, train


def main(config: Config) -> None:
    """Runs the command in this process; exits with 143 where a signal stopped it."""
    try:
        run(config)
    except Stopped:
        print("stopped by a signal; --resume goes on", file=sys.stderr)
        sys.exit(143)
    except RuntimeError as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not memory:
            raise
        raise TrainError(
            f"--batch-size: got {config.batch_size}, for which there is not enough memory "
            f"({checkpoint.first_line(error)}); wanted fewer images"
        ) from None
    finally:
        distributed.finish()


def run(config: Config) -> None:
    """Trains or tests in one process of the run."""
    rank, world, device = distributed.start(config.device)
    data = load_data(config, quiet=rank > 0)
    evaluated = len(data.test if data.val is None else data.val)
    small = data.augment == "small"
    config = settle(config, len(data.train), evaluated, data.num_classes, small)
    if config.model:  # tables name the head in the file, as the flags say nothing about it
        config = dataclasses.replace(config, **checkpoint.trained_head(config.model))
    session = Session(config, data, rank, world, device)
    heed_signals(session)
    describe(session)
    with checkpoint.lock(config, rank):
        results = test_model(session) if config.evaluate else train(session)
        write_result(session, results)


def heed_signals(session: Session) -> None:
    """Lets SIGTERM and Ctrl-C ask the session to save and leave."""

    def stop(number, frame):
        session.stopping = True
        # A second Ctrl-C ends the process as usual. A second SIGTERM does not, because SLURM sends
        # one to all processes, and torchrun then forwards the one that it got itself.
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def describe(session: Session) -> None:
    """Prints the data set, the net and the device."""
    config, data = session.config, session.data
    empty = int((data.counts == 0).sum())
    session.say(
        f"{config.dataset}: {len(data.train):,} training images of {data.num_classes:,} classes, "
        f"{int(data.counts.max()):,} to {int(data.counts.min()):,} a class, "
        f"{len(data.val or ()):,} for validation, {len(data.test):,} for the test; {config.net}, "
        f"{data.augment} transforms at {data.image_size} pixels, batches of {config.batch_size}, "
        f"{session.world} process(es), {session.device.type}"
        + (f"; {empty} classes have no training image" if empty else "")
    )
    for note in data.notes:
        session.warn(note)


def write_result(session: Session, results: dict[str, dict]) -> None:
    """Writes result.json (or evaluation.json) and prints the table."""
    config, data = session.config, session.data
    about = {"classes": data.num_classes, "val": 0, "counts": data.counts.tolist()}
    about |= {name: len(split) for name, split in data.splits()}
    about |= {"augment": data.augment, "image_size": data.image_size, "notes": data.notes}
    text = json.dumps({"config": config.as_dict(), "dataset": about} | results, indent=1) + "\n"
    if session.rank == 0:
        path = config.out / ("evaluation.json" if config.evaluate else "result.json")
        checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
        shutil.rmtree(config.out / "features", ignore_errors=True)
        print_table(session, results)
        session.say(str(path))


def print_table(session: Session, results: dict[str, dict]) -> None:
    """A row for each stage: its errors, overall and by the size of the class."""
    config = session.config
    head = f"t-vMF, kappa {config.kappa:g}" if config.head == "tvmf" else config.head
    head = str(config.model) if config.evaluate else head
    title = f"error in %, {config.dataset}, {head}, {len(session.data.test):,} test images"
    table = Table("stage", title=title)
    shown = ("error1", "adjusted_error1", "error5", *SIZES)
    for name in shown:
        size = f"\n{SIZES[name]}" if name in SIZES else ""
        table.add_column(FIGURES[name] + size, justify="right")
    table.add_column("selected on", justify="right")
    for stage, report in results.items():
        cells = ("-" if report[name] is None else f"{report[name]:.1f}" for name in shown)
        mark = " (!)" if report.get("warning") else ""
        table.add_row(stage.removeprefix("stage") + mark, *cells, report["selected_on"])
    session.console.print(table)
