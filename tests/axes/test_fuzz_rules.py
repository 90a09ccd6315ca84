"""The law on chains: 2,000 random compositions of operators, gathered before or after.

Where no operator of a chain mixes tokens, as its labels say, computing fewer tokens gives what
picking them from the result gives. Where one does, the chain counts as refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from focus_compile.axes.axes import AxisMap, Role
from focus_compile.axes.propagate import propagate
from focus_compile.errors import Unsupported

BATCH, TOKENS, SIZE = 3, 5, 8
CHAINS = 500
PICKED = torch.tensor([3, 0])
TABLE = torch.randn(23, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

TOKENWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "silu": F.silu,
    "scale": lambda x: x * 1.5 + 0.5,
    "residual": lambda x: x + torch.tanh(x),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda x: F.layer_norm(x, (x.shape[-1],)),
    "softmax": lambda x: x.softmax(-1),
    "running features": lambda x: x.cumsum(-1),
    "halves": lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1),
    "chunk": lambda x: x.chunk(2, dim=-1)[0] * x.chunk(2, dim=-1)[1],
    "double": lambda x: torch.cat([x, x], dim=-1),
    "heads": lambda x: x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2),
    "join": lambda x: x.flatten(-2) if x.dim() > 3 else x,
    "move heads": lambda x: x.transpose(1, 2) if x.dim() > 3 else x,
    "swap last": lambda x: x.transpose(-1, -2) if x.dim() > 4 else x,
    "unsqueeze": lambda x: x.unsqueeze(1) if x.dim() < 5 else x,
    "repeat heads": lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]) if x.dim() < 5 else x,
    "fold and back": lambda x: torch.cos(x.flatten(0, 1)).view(x.shape),
    "top": lambda x: x.topk(2, dim=-1)[0],
    "in order": lambda x: x.sort(dim=-1)[0],
    "gather": lambda x: x.gather(-1, x.argsort(-1)),
    "one hot": lambda x: x * F.one_hot(x.argmax(-1), x.shape[-1]),
    "clip": lambda x: torch.where(x > 0, x, x.clamp(min=-0.5)),
    "filled alike": lambda x: x * torch.full_like(x, 0.5) + torch.zeros_like(x),
    "shaped alike": lambda x: x.flatten(0, 1).view_as(x) + x[..., :1].expand_as(x),
    "tiled": lambda x: x.repeat(*[1] * (x.dim() - 1), 2),
    "repeat": lambda x: x.repeat_interleave(2, dim=-1),
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of tokens": lambda x: x - x.mean(1, keepdim=True),
    "softmax of tokens": lambda x: x.softmax(1),
    "running sum": lambda x: x.cumsum(1),
    "shift": lambda x: x.roll(1, 1),
    "backwards": lambda x: x.flip(1),
    "sorted tokens": lambda x: x.sort(dim=1)[0],
    "triangle": lambda x: x.transpose(1, -1).tril().transpose(1, -1),
    "first token": lambda x: x + x[:, :1],
}
"""Along dim 1, where tokens mostly stand."""


def usable(names: list[str], ids: Tensor) -> list[str]:
    """The operators of a chain that leave something small, of even width; told once per chain."""
    x, out = F.embedding(ids, TABLE), list[str]()
    for name in names:
        made = (TOKENWISE | MIXING)[name](x)
        if made.shape[-1] % 2 == 0 and made.numel() < 5_000:
            x = made
            out.append(name)
    return out


def chain(names: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(ids: Tensor, table: Tensor) -> Tensor:
        x = F.embedding(ids, table)
        for name in names:
            x = (TOKENWISE | MIXING)[name](x)
        return x

    return run


def tokenwise(gm: GraphModule, axes: AxisMap) -> bool:
    """Whether the labels say that nothing mixes tokens."""
    if axes.conflicts:
        return False
    for node in gm.graph.nodes:
        if node in axes.unruled:
            return False
        if any(axes.holds(dim, Role.TOKEN) for dim in axes.mixed.get(node, ())):
            return False
    return True


def picked(x: Tensor, axes: AxisMap, gm: GraphModule) -> Tensor:
    """Two tokens of a result, wherever its labels say that they stand."""
    (out,) = gm.graph.output_node().all_input_nodes
    dims = axes.of(out)
    factors = [axis for dim in dims for axis in dim]
    (at,) = [index for index, axis in enumerate(factors) if axis.role is Role.TOKEN]
    return x.reshape([int(axis.size) for axis in factors]).index_select(at, PICKED)


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    tally: Counter[str] = Counter()
    yield tally
    print(f"\n{tally['kept']} chains of {tally.total()} commute, the others are refused")
    assert tally.total() >= CHAINS
    assert tally["kept"] >= 0.7 * tally.total()


@settings(
    max_examples=CHAINS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(st.sampled_from(list(TOKENWISE)), min_size=1, max_size=8),
    mixing=st.sampled_from([None] * 28 + list(MIXING)),
)
def test_chains_commute_or_are_refused(
    tally: Counter[str], names: list[str], mixing: str | None
) -> None:
    names = [*names[: len(names) // 2], *([mixing] if mixing else []), *names[len(names) // 2 :]]
    ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 23
    run = chain(usable(names, ids))
    gm = make_fx(run, pre_dispatch=True, tracing_mode="fake")(ids, TABLE)
    try:
        axes = propagate(gm)
    except Unsupported:
        tally["refused"] += 1
        return
    if not tokenwise(gm, axes):
        tally["refused"] += 1
        return
    tally["kept"] += 1
    actual, expected = run(ids[:, PICKED], TABLE), picked(run(ids, TABLE), axes, gm)
    torch.testing.assert_close(actual.reshape(expected.shape), expected, atol=1e-12, rtol=0)
