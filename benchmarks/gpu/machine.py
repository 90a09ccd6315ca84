"""Which machine and which code figures hold for, and what the machine can do at most."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from benchmarks.contest import now
from benchmarks.gpu.plan import Plan
from benchmarks.provenance import commit, cpu

__all__ = ["machine", "roofs"]


def machine(plan: Plan) -> dict[str, Any]:
    """What the figures hold for."""
    out: dict[str, Any] = {
        "device": plan.device,
        "cpu": cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": plan.commit or _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if plan.device != "cpu":
        import triton  # a CPU build of PyTorch comes without

        properties = torch.cuda.get_device_properties(plan.device)
        out |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return out


def _commit() -> str:
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):  # a copy without git
        return "unknown"


def roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs per second of a square matrix product, bytes per second of a copy; medians of 10."""
    size = 8192 if device != "cpu" else 512
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    source = torch.empty(2**30 if device != "cpu" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops_per_s": 2 * size**3 / _seconds(lambda: left @ right),
        "bytes_per_s": 2 * source.numel() / _seconds(lambda: target.copy_(source)),
    }


def _seconds(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(13):
        start = now()
        function()
        times.append(now() - start)
    return statistics.median(times[3:])
