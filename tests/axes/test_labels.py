"""Axes are told apart by labels: sizes that are equal on purpose, and operators over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from focus_compile.analysis import Analysis, analyze
from focus_compile.axes.axes import Role
from focus_compile.backend import focus_backend
from tests.reference.state import Config
from tests.reference.system import standalone_batch
from tests.support.harness import Run, Sizes, build_model, eager_inner, random_call, retained
from tests.support.toy import VOCAB, Between, Toy

EQUAL = {
    "batch is kv heads": (Sizes(), 2, 9, 7),
    "batch is heads": (Sizes(), 6, 9, 7),
    "batch is head size": (Sizes(head_dim=8), 8, 9, 7),
    "history is head size": (Sizes(), 3, 9, 16),
    "history is block": (Sizes(), 3, 9, 9),
    "block is head size": (Sizes(), 3, 16, 7),
    "block is hidden size": (Sizes(), 3, 40, 7),
    "block is heads times size": (Sizes(heads=3, groups=1, head_dim=4), 2, 12, 7),
    "keys are head size": (Sizes(), 3, 9, 7),
    "all at once": (Sizes(heads=4, groups=4, head_dim=4, hidden=16), 4, 4, 4),
}
"""Sizes of the model, batch, block, history."""


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", EQUAL)
def test_equal_sizes(name: str, dynamic: bool) -> None:
    """Duck shaping merges symbols of equal sizes; the numbers are those of the reference."""
    sizes, batch, tokens, history = EQUAL[name]
    run = Run(build_model(sizes), {"alpha": 1.0}, dynamic=dynamic)
    masked = torch.ones(batch, tokens, dtype=torch.bool)
    masked[0, 1] = masked[1, -1] = False
    for seed in range(9):
        call = random_call(seed, run.model, batch, tokens, history, "bool", masked)
        logits = run.logits(call)
        kept = retained(logits)
        if not kept.all():
            break
    assert not kept.all()
    results = standalone_batch(
        run.model, call.ids, masked, call.past, call.positions, call.visible, Config(alpha=1.0)
    )
    for row, expected in enumerate(results):
        assert kept[row].tolist() == expected.retain_mask
        error = (logits[row, expected.retained] - expected.logits).abs().max().item()
        assert error <= 1e-4


@pytest.mark.parametrize("dynamic", [False, True])
def test_labels_of_attention(dynamic: bool) -> None:
    """At every site q, new k and v are [batch, heads, token, size], keys are history plus block."""
    sizes, batch, tokens, history = EQUAL["all at once"]
    model = build_model(sizes)
    seen: list[Analysis] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        seen.append(analyze(gm))
        return gm

    call = random_call(3, model, batch, tokens, history)
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(**call.kwargs(model))
    (analysis,) = seen
    axes = analysis.canonical.axes
    nodes = {node.name: node for node in analysis.canonical.gm.graph.nodes}
    assert len(analysis.plan.sites) == sizes.layers
    for site in analysis.plan.sites:
        for name in (site.query, *(write.new for write in site.writes)):
            dims = axes.of(nodes[name])
            assert [axes.position(dims, role) for role in (Role.BATCH, Role.TOKEN)] == [0, 2]
        for name in (write.joined for write in site.writes):
            dims = axes.of(nodes[name])
            assert axes.history(dims[2]) is not None
            assert axes.position(dims, Role.TOKEN) is None


def compiled(between: Between) -> tuple[Any, list[Any], Toy]:
    torch.manual_seed(0)
    model, programs = Toy(between).eval(), list[Any]()

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        options = {"mask_token_id": VOCAB - 1, "strict": True, "alpha": 1e9}
        programs.append(focus_backend(gm, inputs, options=options, inner=eager_inner))
        return programs[-1]

    return torch.compile(model, backend=backend), programs, model


ALLOWED: dict[str, Between] = {
    "pointwise": lambda x: x * torch.sigmoid(x),
    "cumsum over features": lambda x: x.cumsum(-1),
    "softmax over features": lambda x: x.softmax(-1),
    "halves of features": lambda x: torch.cat([-x[..., 6:], x[..., :6]], -1),
    "batch and token folded": lambda x: torch.tanh(x.reshape(-1, x.shape[-1])).view(x.shape),
}
MIXES = "this operator mixes tokens outside attention"
NO_RULE = "no rule says how this operator treats the token axis"
KERNEL = torch.ones(12, 1, 3)
PART = "this operator changes the length of the token axis"
REFUSED: dict[str, tuple[Between, str, str]] = {
    "cumsum": (lambda x: x.cumsum(1), MIXES, "aten.cumsum.default"),
    "softmax": (lambda x: x.softmax(1), MIXES, "aten.softmax.int"),
    "mean": (lambda x: x - x.mean(1, keepdim=True), MIXES, "aten.mean.dim"),
    "mean over rows": (lambda x: x - x.mean(0, keepdim=True), MIXES, "aten.mean.dim"),
    "flip": (lambda x: x.flip(1), NO_RULE, "aten.flip.default"),
    "roll": (lambda x: x.roll(1, 1), NO_RULE, "aten.roll.default"),
    "shift": (lambda x: torch.cat([x[:, :1], x[:, :-1]], 1), PART, "aten.slice.Tensor"),
    "last token": (lambda x: x + x[:, -1:], MIXES, "aten.add.Tensor"),
    "convolution": (
        lambda x: torch.conv1d(x.transpose(1, 2), KERNEL, padding=1, groups=12).transpose(1, 2),
        NO_RULE,
        "aten.conv1d.default",
    ),
    "channel shuffle": (  # fails on other sizes than the seen ones: still no rule
        lambda x: nn.functional.channel_shuffle(x.unsqueeze(-1), 7).squeeze(-1),
        NO_RULE,
        "aten.channel_shuffle.default",
    ),
    "sum over processes": (
        lambda x: torch.ops._c10d_functional.all_reduce(x, "sum", "0"),
        "the model calls collectives of its own",
        "_c10d_functional.all_reduce",
    ),
}


def toy_ids() -> Tensor:
    ids = torch.randint(0, VOCAB - 1, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[:, 2:6] = VOCAB - 1
    return ids


@torch.no_grad()
@pytest.mark.parametrize("name", ALLOWED)
def test_what_commutes_is_accepted(name: str) -> None:
    function, programs, model = compiled(ALLOWED[name])
    torch.testing.assert_close(function(toy_ids()), model(toy_ids()), atol=1e-5, rtol=0)
    (program,) = programs
    assert (program.dense_calls, program.prefix.calls, program.suffix.calls) == (0, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_tokens_is_refused(name: str) -> None:
    between, reason, op = REFUSED[name]
    function, _, _ = compiled(between)
    with pytest.raises(BackendCompilerFailed) as refusal:
        function(toy_ids())
    assert reason in str(refusal.value) and op in str(refusal.value)
