"""Trains several heads with several seeds and reports them side by side.

    python -m train.compare --out runs --dataset fashion-mnist-lt --data DIR --epochs 20

All flags but --heads, --seeds, --jobs and --out go to `python -m train`. --jobs runs are trained at
once. Called again, it skips finished runs and resumes those that were interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import Progress

from train.config import TrainError, parse_config
from train.report import cli
from train.shell import one_line_errors

# What a run replaces by its own choice (train.config.settle), beside "auto".
SETTLED = (("batch_size", 0), ("eval_every", 0))
HEADS = "softmax,cosine,tvmf:4,tvmf:16,tvmf:64"


def flags_of(head: str, seed: str, flags: list[str]) -> list[str]:
    name, _, kappa = head.partition(":")
    return [*flags, "--head", name, "--seed", seed, *(["--kappa", kappa] if kappa else [])]


def train_one(out: Path, head: str, seed: str, flags: list[str], threads: int) -> None:
    """Trains a head with a seed in OUT, unless a run of the same flags has finished there."""
    flags = flags_of(head, seed, flags)
    if (out / "result.json").exists():
        had = json.loads((out / "result.json").read_text())["config"]
        wanted = parse_config(flags).identity()
        wanted = {k: v for k, v in wanted.items() if v != "auto" and (k, v) not in SETTLED}
        if odd := {k: had.get(k) for k, v in wanted.items() if v != had.get(k)}:
            raise TrainError(f"--out: got {out}, a run with {odd}; wanted another directory")
        return
    command = [sys.executable, "-m", "train", *flags, "--out", str(out)]
    command += ["--resume"] if any(out.glob("checkpoint*.pt")) else []
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
            last = (out / "log.txt").read_text().strip().splitlines()[-1:]
            raise TrainError(f"{' '.join(command)} failed: {''.join(last)} (see {out}/log.txt)")


def main(args: list[str]) -> None:
    """Trains the runs that the flags name, and writes the report on them."""
    parser = argparse.ArgumentParser(
        "python -m train.compare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--heads", default=HEADS, help=f"head or tvmf:KAPPA (default {HEADS})")
    parser.add_argument("--seeds", default="0,1,2", help="(default 0,1,2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="(default runs)")
    options, flags = parser.parse_known_args(args)
    if options.jobs < 1:
        raise TrainError(f"--jobs: got {options.jobs}, wanted 1 or more")
    runs = {
        options.out / f"{head.replace(':', '')}-seed{seed}": (head, seed)
        for head in options.heads.split(",")
        for seed in options.seeds.split(",")
    }
    for head, seed in runs.values():
        parse_config(flags_of(head, seed, flags))  # refuses a wrong flag before any run has begun
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with Progress() as progress, ThreadPoolExecutor(options.jobs) as pool:
        bar = progress.add_task("runs", total=len(runs))
        started = [pool.submit(train_one, out, *run, flags, threads) for out, run in runs.items()]
        try:
            for run in started:
                run.result()
                progress.advance(bar)
        finally:
            pool.shutdown(cancel_futures=True)
    cli.main([*map(str, runs), "--out", str(options.out / "report")])


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
