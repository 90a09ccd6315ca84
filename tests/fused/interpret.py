"""Run the Triton kernels in Triton's interpreter, or on a GPU, beside the eager functions.

TRITON_INTERPRET=1 python -m tests.fused.interpret --what importance --cases 200
python -m tests.fused.interpret --what importance --cases 200 --device cuda --dtype bfloat16

Prints one line of JSON. For a process of its own: Triton looks at the variable when a kernel is
defined. In the interpreter inputs are fp32, since its bf16 products are wrong.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.ops.attention import attend, line_index, site_index
from focus_compile.ops.importance import importance
from focus_compile.ops.packing import join
from focus_compile.ops.selection import retain, signal
from focus_compile.ops.tables import tables
from focus_compile.ops.triton.layers import launch_attend, launch_join, launch_store
from focus_compile.ops.triton.operators import launch_choose, launch_importance

SIZES = (32, 40, 48, 64, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256)
"""Head sizes; small ones more often, since the interpreter is slow."""
COMPILED = (32, 40, 64, 128, 256)
"""Those on a GPU: each is another kernel to be compiled."""


@dataclass(frozen=True)
class Where:
    """What cases run on."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def sizes(self) -> tuple[int, ...]:
        return SIZES if self.device == "cpu" else COMPILED

    def take(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments on the device."""
        return tuple(x.to(self.device) if isinstance(x, Tensor) else x for x in values)


def masks(draw: random.Random, batch: int, tokens: int) -> Tensor:
    """bool ``[B, T]`` of any density; no masked token, one, and all of them included."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    lines = []
    for _ in range(batch):
        line = torch.rand(tokens, generator=generator) < draw.choice([0.1, 0.5, 0.9])
        kind = draw.randrange(8)
        if kind < 2:
            line[:] = kind == 1
        elif kind == 2:
            line[:] = False
            line[draw.randrange(tokens)] = True
        lines.append(line)
    return torch.stack(lines)


def importance_case(
    draw: random.Random, where: Where = Where()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call; its sizes are pairwise distinct."""
    while True:
        batch, groups, share = draw.randint(1, 3), draw.randint(1, 2), draw.randint(2, 3)
        tokens, size = int(4 * 64 ** (draw.random() ** 4) + 0.5), draw.choice(where.sizes)
        if tokens > 64:
            batch, groups, share = 1, 2, 2
        heads = groups * share
        if len({batch, groups, heads, tokens, size}) == 5:
            break
    torch.manual_seed(draw.randrange(2**31))
    masked = masks(draw, batch, tokens)
    query, key = torch.randn(batch, heads, tokens, size), torch.randn(batch, groups, tokens, size)
    if draw.randrange(2):  # as a transposed view, which is what a model has
        query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    if draw.randrange(4) == 0:  # what is not masked must not matter
        hidden = ~masked.view(batch, 1, tokens, 1)
        query, key = (x.masked_fill(hidden, float("nan")) for x in (query, key))
    sizes = {"batch": batch, "heads": heads, "groups": groups, "tokens": tokens, "size": size}
    query, key = query.to(where.dtype), key.to(where.dtype)
    return where.take((query, key, masked, draw.choice([size**-0.5, 0.3]))), sizes


def compare_importance(draw: random.Random, where: Where) -> dict[str, Any]:
    given, sizes = importance_case(draw, where)
    made, expected = launch_importance(*given), importance(*given)
    assert not expected.isnan().any()
    again = launch_importance(*given) if draw.randrange(6) == 0 else made
    return sizes | {
        "masked": int(given[2].sum()),
        "error": float(((made - expected).abs() / (1 + expected.abs())).max()),
        "repeated": again is not made,
        "same_again": torch.equal(made, again),
    }


def choose_case(draw: random.Random) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of one call: ties, NaN and infinities among the signals."""
    batch, tokens = draw.randint(1, 5), int(4 * 128 ** (draw.random() ** 2) + 0.5)
    torch.manual_seed(draw.randrange(2**31))
    masked = masks(draw, batch, tokens)
    first, second, bias = torch.randn(3, batch, tokens).unbind()
    ties = draw.randrange(3) == 0
    if ties:
        first, second, bias = ((x * 2).round() / 2 for x in (first, second, bias))
    if draw.randrange(2):
        bias = torch.zeros_like(bias)
    strange = draw.randrange(6) == 0
    if strange:
        second[torch.rand(batch, tokens) < 0.1] = draw.choice([float("nan"), float("inf")])
    weights = torch.tensor([-1.0, 1.0]) if draw.randrange(3) else torch.randn(2)
    fed = masked | (torch.rand(batch, tokens) < 0.5)
    progress = torch.randint(-1, tokens, (batch,))
    average = torch.rand(batch) * draw.choice([1, 4, 16])
    alpha = torch.tensor(draw.choice([1.0, 1.2, 1.5, 3.0, float("inf")]))
    given = (first, second, weights, bias, masked, fed, progress, average, alpha)
    return given, {"batch": batch, "tokens": tokens, "ties": ties, "strange": strange}


def compare_choose(draw: random.Random, where: Where) -> dict[str, Any]:
    given, sizes = choose_case(draw)
    given = where.take(given)
    made = launch_choose(*given)
    # the kernel may fuse a product and a sum, and rounds once: it is given its own signal
    delta = made[0]
    gap = (delta - signal(*given[:4])).abs()
    mask = retain(delta, *given[4:])
    expected = (mask, *tables(mask))
    return sizes | {
        "evicted": int((given[5] & ~mask).sum()),
        "signal_error": float((gap / (1 + delta.abs())).nan_to_num(0.0).max()),
        "equal": [torch.equal(a, b) for a, b in zip(made[1:], expected, strict=True)],
    }


def kept_tokens(draw: random.Random, batch: int, length: int) -> Tensor:
    """bool ``[B, T]``, at least one."""
    keep = masks(draw, batch, length)
    keep[draw.randrange(batch), draw.randrange(length)] = True
    return keep


def compare_join(draw: random.Random, where: Where) -> dict[str, Any]:
    """Heads before or behind tokens, or folded; caches that are parts of longer ones."""
    batch, groups, length = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 40)
    size, history = draw.choice((8, 40, 64, 136)), draw.choice((None, 0, 1, 17, 60))
    kind = draw.choice(("heads first", "tokens first", "folded"))
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    dim = 2 if kind == "heads first" else 1
    torch.manual_seed(draw.randrange(2**31))

    def values(rows: int, tokens: int) -> Tensor:
        shapes = {
            "heads first": (rows, groups, tokens, size),
            "tokens first": (rows, tokens, groups, size),
            "folded": (rows, tokens, groups * size),
        }
        return torch.randn(shapes[kind]).to(dtype)

    keep, written = kept_tokens(draw, batch, length), masks(draw, batch, length)
    order, _, _, (count, _) = tables(keep)
    past = None if history is None else values(batch, history + 3).narrow(dim, 2, history)
    stale = values(batch, (history or 0) + length)
    block = stale.narrow(dim, history or 0, length).movedim(dim, 1)
    block[~written] = float("nan")
    reuse = draw.choice((None, False, True))
    fresh = reuse is not True and draw.randrange(4) == 0
    if fresh:  # slots that nobody has written
        written = torch.zeros_like(written)
        stale = stale.new_zeros(size).expand(stale.shape) if kind != "folded" else stale * 0
    new = values(1, int(count) + 1).narrow(dim, 0, int(count))
    given = (past, new, order[:count], stale, written)
    flag = None if reuse is None else torch.tensor(reuse)
    expected = join(*given[:3], stale.clone(), written, flag, dim)
    here = where.take(given)
    made = launch_join(*here[:3], here[3].clone() if reuse else here[3], here[4], flag, dim)
    if reuse and kind != "folded":  # the slots of a longer cache, which keeps what lies around them
        longer = where.take((values(batch, stale.shape[dim] + 3),))[0]
        slots, rest = (
            longer.narrow(dim, 0, stale.shape[dim]),
            longer.narrow(dim, made.shape[dim], 3),
        )
        before = rest.clone()
        launch_store(slots.copy_(here[3]), here[1], here[2], length, dim)
        assert torch.equal(rest, before)
        made = slots.contiguous()
    return {
        "kind": kind, "dtype": str(dtype), "reuse": reuse, "fresh": fresh, "history": history,
        "equal": torch.equal(_bits(made.cpu()), _bits(expected.contiguous())),
    }  # fmt: skip


def compare_attend(draw: random.Random, where: Where) -> dict[str, Any]:
    batch, groups, share = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 4)
    length, history, size = draw.randint(1, 40), draw.choice((0, 1, 17)), draw.choice((8, 40, 64))
    torch.manual_seed(draw.randrange(2**31))
    fed = kept_tokens(draw, batch, length)
    keep = fed if draw.randrange(3) == 0 else fed & kept_tokens(draw, batch, length)
    if not keep.any():
        keep = fed
    order, inverse, places, (count, most) = tables(keep)
    _, source, _, (packed, _) = tables(fed)
    tokens, rows = order[:count], places[:, :most].contiguous()
    query = torch.randn(1, int(packed), groups * share, size).to(where.dtype)
    query = query.transpose(1, 2) if draw.randrange(2) else query.transpose(1, 2).contiguous()
    key, value = torch.randn(2, batch, groups, history + length, size).to(where.dtype)
    hidden = torch.rand(batch, 1, share * int(most), history + length) < 0.3
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -100.0).to(where.dtype)
    given = (
        query, key, value, mask, site_index(source, rows), line_index(tokens, inverse, rows),
        size**-0.5,
    )  # fmt: skip
    here = where.take(given)
    return {
        "heads": groups * share, "groups": groups, "fed": bool((fed & ~keep).any()),
        "equal": torch.equal(launch_attend(*here), attend(*here).contiguous()),
    }  # fmt: skip


def _bits(x: Tensor) -> Tensor:
    """NaN equals itself."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


COMPARE = {
    "importance": compare_importance,
    "choose": compare_choose,
    "join": compare_join,
    "attend": compare_attend,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=COMPARE, required=True)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(given.seed)
    where = Where(given.device, getattr(torch, given.dtype))
    print(json.dumps([COMPARE[given.what](draw, where) for _ in range(given.cases)]))


if __name__ == "__main__":
    main()
