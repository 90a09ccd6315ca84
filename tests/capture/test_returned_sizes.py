"""Numbers that a model returns or keeps: with symbolic sizes they are outputs of Dynamo's graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.capture.returned_sizes import with_sizes, without_sizes
from focus_compile.graph.nodes import graph_outputs
from tests.support.toy import VOCAB, Toy

MASK = VOCAB - 1


class Seen:
    """A cache of the model's own: how many tokens it has seen."""

    tokens = 0


class Counts(Toy):
    """Counts tokens in Python, and returns numbers beside its logits."""

    def forward(self, ids: Tensor, seen: Seen) -> tuple[int, Tensor, int]:  # type: ignore[override]
        rows, tokens = ids.shape
        seen.tokens = seen.tokens + tokens
        return tokens, super().forward(ids), 3 * rows * tokens + 1


@torch.no_grad()
@pytest.mark.usefixtures("no_inductor")
def test_sizes_are_returned() -> None:
    """In masked calls as in others, and FOCUS is applied."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, seen = Counts().eval(), Seen()
    seen.tokens = count = 13
    compiled = focus_compile.compile(model, mask_token_id=MASK, strict=True)
    for rows, tokens in ((2, 9), (3, 7), (5, 11)):
        for fill in (MASK, 4):
            ids = torch.full((rows, tokens), fill)
            with focus_compile.session(exact=True) as focus:
                first, logits, last = compiled(ids, seen)
            count += tokens
            assert (first, last, seen.tokens) == (tokens, 3 * rows * tokens + 1, count)
            torch.testing.assert_close(logits, model(ids, Seen())[1], rtol=0, atol=1e-5)
            assert focus.stats.steps == (fill == MASK)
    assert focus_compile.status(compiled).graphs == 1


@torch.no_grad()
def test_the_graph_without_them() -> None:
    """They are taken out of a copy; what is no sum or product of sizes stays."""
    found: list[Any] = []

    def backend(gm: Any, _: Any) -> Any:
        before = list(graph_outputs(gm))
        made, sizes = without_sizes(gm)
        assert list(graph_outputs(gm)) == before
        found.append((len(before), [node is None for node in graph_outputs(made)], sizes))
        return gm.forward

    def function(x: Tensor) -> tuple[Any, ...]:
        return x + 1, x.shape[0] + 2, x.shape[0] // 2

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=True)(torch.zeros(7, 3))
    (count, gone, sizes) = found[0]
    assert count == 3 and gone == [False, True, False]
    (size,) = sizes
    for length in (4, 9):
        args = (length, torch.zeros(length, 3))
        assert size.of(args) == length + 2
        assert with_sizes(("a", None, "c"), sizes, args) == ("a", length + 2, "c")
