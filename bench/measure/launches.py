"""Counts what a call launches, by torch's profiler."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def gpu_events(found):
    """Kernels and copies that ran on a GPU while the profiler was on."""
    return [
        event
        for event in found.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def launches(device, call):
    """How many kernels and copies a call starts on a GPU; on the CPU, how many operators it runs
    that call no other operator."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        return len(gpu_events(found))
    return sum("::" in event.name and not event.cpu_children for event in found.events())
