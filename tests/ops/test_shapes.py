"""Each operator's shape-only form agrees with what the operator returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from focus_compile.ops.library import focus
from focus_compile.ops.shapes import SHAPES
from focus_compile.ops.tables import tables

B, T, S, G, H, D, E = 3, 7, 5, 2, 6, 4, 10
KEEP = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.5
ORDER, INVERSE, PLACES, SIZES = tables(KEEP)
N, R = (int(size) for size in SIZES)
TOKENS, ROWS = ORDER[:N], PLACES[:, :R].contiguous()
INDEX = torch.tensor([1, -1, 0])


def mixed(*shape: int) -> Tensor:
    """Random numbers that are not contiguous where that is possible."""
    return torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))


def bools(*shape: int) -> Tensor:
    return torch.rand(*shape) < 0.7


NEW, STALE = mixed(1, G, N, D), mixed(B, G, S + T, D)
COUNT, AVERAGE = torch.zeros(B, dtype=torch.int64), torch.ones(B)
CASES: dict[str, list[tuple[Any, ...]]] = {
    "attend": [
        (mixed(1, H, N, D), STALE, mixed(B, G, S + T, 2 * D),
         torch.zeros(B, heads, H // G * R, S + T),
         INVERSE.gather(1, ROWS), torch.arange(N) % (B * R), 0.5)
        for heads in (1, G)
    ],
    "block": [(STALE, KEEP)],
    "causal": [(KEEP, STALE)],
    "clear": [(STALE, INDEX, 2)],
    "embedding_shard": [(mixed(9, E), torch.randint(0, 30, (B, T)), 9), (mixed(0, E), ORDER, 9)],
    "experts": [
        (mixed(N, E).to(dtype), torch.randint(0, 3, (N, 2)), torch.rand(N, 2),
         *([mixed(*shape).to(dtype) for _ in range(3)] for shape in ((D, E), (E, D), (D, E))),
         "silu")
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "extend": [(mixed(T, E), INDEX, 0), (mixed(B, G, S, D), INDEX, 2)],
    "extend_mask": [
        (None, STALE, INDEX, 2), (bools(B, 1, 3, S + T), STALE, INDEX, 2),
        (mixed(1, 1, 1, S + T), STALE, INDEX, 2),
    ],
    "importance": [(mixed(B, H, T, D).to(dtype), mixed(B, G, T, D).to(dtype), KEEP, 0.5)
                   for dtype in (torch.float32, torch.bfloat16)],
    "join": [
        (past, NEW, TOKENS, STALE[:, :, S if past is None else 0 :], KEEP, None, 2)
        for past in (None, mixed(B, G, S, D))
    ],
    "line_index": [(TOKENS, INVERSE, ROWS)],
    "linear": [(mixed(1, N, E), mixed(D, E), bias) for bias in (None, mixed(D))],
    "pack": [
        (mixed(B, T, E), TOKENS, INVERSE, 0, 1), (mixed(T, B, E), TOKENS, INVERSE, 1, 0),
        (mixed(B, H, T, D), TOKENS, INVERSE, 0, 2), (mixed(1, T, E), TOKENS, INVERSE, None, 1),
    ],
    "pack_rows": [(mixed(B, 1, E), TOKENS, INVERSE, 0, 1), (mixed(E, 1, B), TOKENS, INVERSE, 2, 1)],
    "repack": [(mixed(1, N, E), INVERSE, TOKENS[:2], 1)],
    "replace": [(mixed(B, G, S, D), mixed(B, G, S + 3, D), INDEX, 2)],
    "restore": [
        (mixed(1, N, E), TOKENS, KEEP, 0, 1), (mixed(1, H, N, D), TOKENS, KEEP, 0, 2),
        (mixed(2, 4, E), torch.arange(4), KEEP, None, 1),
    ],
    "retain": [(mixed(B, T), KEEP, bools(B, T) | KEEP, COUNT, AVERAGE, torch.tensor(1.5))],
    "signal": [(mixed(B, T), mixed(B, T), torch.tensor([-1.0, 1.0]), mixed(B, T))],
    "site_index": [(INVERSE, ROWS)],
    "site_mask": [
        (mask, ROWS, KEEP, S, H // G, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for mask in (None, bools(B, 1, T, S + T), mixed(1, 1, T, S + T), mixed(B, H, T, S + T),
                     bools(B, 1, 1, S + T))
    ],
    "store": [(STALE.clone(), NEW, TOKENS, T, 2)],
    "tables": [(KEEP,)],
    "unpack": [
        (mixed(1, N, E), INVERSE, 0, 1), (mixed(1, H, N, D), ROWS % N, 0, 2),
        (mixed(2, N, E), INVERSE, None, 1),
    ],
    "visible": [(KEEP, bools(B, T), bools(B, T), torch.tensor(True))],
}  # fmt: skip
WRITES = {"store"}
"""They write into their first operand and return it; its layout is that of the result."""
RANKS = {"gather_ranks", "sum_ranks"}
"""They need processes: tests/parallel has them."""


CALLS = [
    pytest.param(name, arguments, id=f"{name}-{index}")
    for name, cases in CASES.items()
    for index, arguments in enumerate(cases)
]


def test_no_operator_is_left_out() -> None:
    assert CASES.keys() | RANKS == SHAPES.keys()


def test_the_host_waits() -> None:
    """What no CUDA graph can hold says so."""
    assert torch.Tag.cudagraph_unsafe in focus.experts.default.tags
    assert torch.Tag.cudagraph_unsafe not in focus.linear.default.tags


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_shapes(name: str, arguments: tuple[Any, ...]) -> None:
    """Shape and dtype; contiguous whatever the operands are; no operand is written to."""
    operator = getattr(focus, name).default
    if name not in WRITES:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    made, shape = operator(*arguments), SHAPES[name](*arguments)
    for real, fake in zip(*((x,) if isinstance(x, Tensor) else x for x in (made, shape)),
                          strict=True):  # fmt: skip
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        if name in WRITES:
            assert real is arguments[0] and real.stride() == fake.stride()
        else:
            assert real.is_contiguous() and fake.is_contiguous()
