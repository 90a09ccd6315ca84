"""Where a test runs, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.harness import eager_inner

__all__ = ["Where"]


@dataclass(frozen=True)
class Where:
    """A device; ``draws`` of a test on a GPU are a few on the CPU."""

    device: str

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def draws(self, gpu: int, cpu: int) -> int:
        return gpu if self.gpu else cpu

    @property
    def inner(self) -> Callable[..., Any] | None:
        """Inductor on a GPU (None); on the CPU, where other tests have it, nothing."""
        return None if self.gpu else eager_inner

    def stream(self) -> AbstractContextManager[Any]:
        """A stream of its own."""
        return torch.cuda.stream(torch.cuda.Stream()) if self.gpu else nullcontext()

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()
