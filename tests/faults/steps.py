"""Two steps of a block, of which the second meets a fault, and what they must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import focus_compile
from focus_compile import Session
from tests.support.harness import MASK, Call, Run, Sizes, bound, build_model, random_call, retained

BATCH, TOKENS, HISTORY, ALPHA = 3, 9, 7, 1.2


def new_run(**options: object) -> Run:
    return Run(build_model(Sizes(layers=3)), {"alpha": ALPHA}, dynamic=True, **options)  # type: ignore[arg-type]


def first_call(run: Run, seed: int = 3) -> Call:
    """All masks."""
    masked = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    return random_call(seed, run.model, BATCH, TOKENS, HISTORY, "bool", masked)


def second_call(call: Call, focus: Session) -> Call:
    """Two tokens more in each row."""
    assert focus.retain_mask is not None
    where = call.masked & focus.retain_mask
    ids = call.ids.masked_fill(where & (where.cumsum(1) <= 2), 5)
    return Call(ids, ids == MASK, call.positions, call.visible, call.past)


@dataclass(frozen=True)
class Steps:
    """A block's first two calls.

    Attributes:
        calls: both; first: logits of the first one; second: those of the second one after the
            first; fresh: those of the second one in a session of its own.
    """

    calls: tuple[Call, Call]
    first: Tensor
    second: Tensor
    fresh: Tensor

    @classmethod
    def of(cls, run: Run) -> Steps:
        call = first_call(run)
        with focus_compile.session() as focus:
            first = run.logits(call)
            after = second_call(call, focus)
            second = run.logits(after)
        with focus_compile.session():
            fresh = run.logits(after)
        for logits in (first, second, fresh):
            kept = retained(logits)
            assert kept.any() and not kept.all()
        assert not torch.equal(retained(second), retained(fresh)) or not same(second, fresh)
        return cls((call, after), first, second, fresh)


def same(actual: Tensor, expected: Tensor) -> bool:
    """The same tokens retained, and logits within the bound of fp32."""
    if not torch.equal(retained(actual), retained(expected)):
        return False
    return bool((actual - expected).abs().max() <= bound(expected))


def retry(run: Run, steps: Steps, fault: Callable[[Call], None]) -> tuple[Tensor, Session]:
    """Logits of the second call, repeated after a fault in it, in one session."""
    with focus_compile.session() as focus:
        assert same(run.logits(steps.calls[0]), steps.first)
        fault(steps.calls[1])
        return run.logits(steps.calls[1]), focus
