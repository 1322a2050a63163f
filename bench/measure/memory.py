"""The extra memory of a call: the allocator's peak on a GPU, the resident set's on the CPU."""

import ctypes
import gc
from pathlib import Path

import torch


def extra_memory(device, call, gradients):
    """Peak bytes of a call beyond what was allocated before and `gradients`, the bytes of what it
    returns. None on a CPU whose system does not tell the peak of the resident set."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return max(0, torch.cuda.max_memory_allocated() - before - gradients)
    status = Path("/proc/self/status")

    def resident(key):
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed must be taken again
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        call()
        return max(0, resident("VmHWM") - before - gradients)
    except (OSError, AttributeError, StopIteration):
        return None
