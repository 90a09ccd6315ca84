"""What a process may set for all of torch: default dtypes, and a device that holds no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DEFAULTS = (*DTYPES, "meta")


@contextmanager
def default(name: str) -> Iterator[None]:
    """Another default dtype; or a device on which nothing that forgot its own can be used."""
    if name == "meta":
        torch.set_default_device("meta")
    elif name:
        torch.set_default_dtype(DTYPES[name])
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
