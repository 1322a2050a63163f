"""The machine: what it is, which rates it reaches now, and the floor that follows for a case."""

import platform
import resource
import statistics
import subprocess
import time
from datetime import date
from functools import cache, partial
from pathlib import Path

import torch

import tvmf_ext
from bench import variants

ROOT = Path(__file__).parents[2]
# The L2 cache of an H200, in bytes: for files of figures without `cache_bytes`, which are its own.
# On a CPU the operations take longer than the weight's bytes, whatever its cache.
CACHE_BYTES = 60 << 20


def about(device):
    """The machine, the versions and the date of a measurement, as its JSON file has them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    found = {
        "device": "cpu",
        "cpu": cpu,
        "isa": tvmf_ext.build_info().cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tvmf_ext": tvmf_ext.__version__,
        "cuda": torch.version.cuda,
        "peers": variants.versions(),
        "commit": commit or "unknown",
        "date": date.today().isoformat(),
    }
    if device == "cuda":
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        found["device"] = torch.cuda.get_device_name()
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        found["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
    return found


@cache
def square_matrices(size):
    """Two random matrices, drawn on the CPU: a CUDA graph's failed capture can leave the GPU's
    generator unusable."""
    return [torch.randn(size, size) for _ in range(2)]


def rates(device, dtype, clock):
    """The operations/s of a large matrix product and the bytes/s that a large copy reads and
    writes, here and now. On the CPU the product is made in float32 where that is faster."""
    size, length = (1024, 1 << 24) if device == "cpu" else (8192, 1 << 28)
    a, b = (t.to(device) for t in square_matrices(size))
    source, copy = (torch.zeros(length, device=device) for _ in range(2))
    calls = [partial(copy.copy_, source)]
    for kind in {dtype, torch.float32} if device == "cpu" else {dtype}:
        x, y = a.to(kind), b.to(kind)
        calls.append(partial(torch.mm, x, y, out=torch.empty_like(x)))
    medians = []
    for call in calls:
        call()
        times, start = [], time.perf_counter()
        while not times or (len(times) < 9 and time.perf_counter() - start < 1):
            begin = clock.mark()
            call()
            times += clock.seconds([begin, clock.mark()])
        medians.append(statistics.median(times))
    copied, *products = medians
    found = {"flops_per_s": 2 * size**3 / min(products), "bytes_per_s": 8 * length / copied}
    if device == "cuda":
        found["cache_bytes"] = torch.cuda.get_device_properties().L2_cache_size
    return found


def operations(shape):
    """Operations of the matrix products in the forward pass, the backward pass, and both."""
    N, C, D = shape
    return 2 * N * C * D, 4 * N * C * D, 6 * N * C * D


def floors(shape, speed):
    """Seconds that the forward pass, the backward pass, and both take at the least.

    That is the longer of two times: the operations at the rate of a large product, and the weight's
    bytes at the rate of a copy. Each pass reads the float32 weight; the backward pass writes its
    gradient. A weight that stays in the cache between the passes is read from memory once.
    """
    weight = 4 * shape[1] * shape[2]
    crossing = weight / speed["bytes_per_s"]
    both = 2 if weight <= speed.get("cache_bytes", CACHE_BYTES) else 3
    work = [count / speed["flops_per_s"] for count in operations(shape)]
    moves = (crossing, 2 * crossing, both * crossing)
    return [max(pair) for pair in zip(work, moves, strict=True)]


def preempted():
    """How many times another process took a core from this one so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
