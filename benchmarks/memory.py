"""Memory of this process, resident or on a GPU, while something runs."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "resident", "sampled"]

EVERY = 0.01
"""Seconds between samples: shorter-lived allocations may be missed."""


@dataclass
class Peak:
    """MiB before, and the most seen."""

    before: float
    most: float


@contextmanager
def sampled(device: str = "cpu") -> Iterator[Peak]:
    """Watch memory; what freed memory the allocator still holds is given back first."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        peak = Peak(torch.cuda.memory_allocated(device) / 2**20, 0.0)
        yield peak
        peak.most = torch.cuda.max_memory_allocated(device) / 2**20
        return
    peak = Peak(resident(trim=True) / 2**20, 0.0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            peak.most = max(peak.most, resident() / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.most = max(peak.most, resident() / 2**20)


def resident(*, trim: bool = False) -> int:
    """Bytes of this process; ``trim``: once the allocator has given back what is free."""
    if trim:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
