"""How many kernels the eager functions of a layer launch on a GPU, and how many ours do.

Operators of ATen that compute or copy are a launch each, at least; views and allocations are none.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from focus_compile.ops.attention import attend
from focus_compile.ops.packing import join
from focus_compile.ops.shapes import SHAPES
from focus_compile.programs import lower

FREE = ("empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts operators that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if not func.is_view and name not in FREE:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of a join that copies, of one that does not, and of attention."""
    torch.manual_seed(0)
    batch, groups, share, length, history, size = 3, 2, 2, 8, 5, 16
    keep = torch.rand(batch, length) < 0.5
    keep[:, 0] = True
    tokens = keep.reshape(-1).nonzero()[:, 0]
    count, most = len(tokens), int(keep.sum(1).max())
    past, stale = (
        torch.randn(batch, groups, history + 2, size)[:, :, :history],
        torch.randn(batch, groups, history + length, size),
    )
    new = torch.randn(1, groups, count, size)
    index = torch.zeros(batch, most, dtype=torch.int64)
    lines = torch.arange(count)
    query = torch.randn(1, count, groups * share, size).transpose(1, 2)
    mask = torch.zeros(batch, 1, share * most, history + length)
    written = torch.ones(batch, length, dtype=torch.bool)
    return {
        "join, copied": (past, new, tokens, stale, written, None, 2),
        "join, in place": (past, new, tokens, stale, written, torch.tensor(True), 2),
        "attend": (query, stale, stale, mask, index, lines, 0.25),
    }


EAGER = {"join, copied": 7, "join, in place": 3, "attend": 5}
OURS = {"join, copied": 2, "join, in place": 1, "attend": 3}
KERNELS = ("fold_queries", "join_history", "join_rows", "unfold_lines")


class Kernel:
    """Counts its launches; what it computes does not matter here."""

    def __init__(self, seen: list[str], name: str) -> None:
        self.seen, self.name = seen, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return lambda *_, **__: self.seen.append(self.name)


def test_eager() -> None:
    for name, given in calls().items():
        with Launches() as launches:
            (attend if name == "attend" else join)(*given).contiguous()
        assert len(launches.seen) == EAGER[name], (name, launches.seen)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_gpu_gets_them() -> None:
    """Lowering for CUDA gives both operators an implementation for it, and no other one."""
    lower._fused()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {name for name in SHAPES if has(f"focus::{name}", "CUDA")} == {"join", "attend"}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from focus_compile.ops.triton import layers

    for name, given in calls().items():
        with Launches() as launches, monkeypatch.context() as patch:
            for kernel in KERNELS:
                patch.setattr(layers, kernel, Kernel(launches.seen, kernel))
            (layers.launch_attend if name == "attend" else layers.launch_join)(*given)
        assert len(launches.seen) == OURS[name], (name, launches.seen)
