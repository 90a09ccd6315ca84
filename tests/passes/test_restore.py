"""Restore: packed outputs leave the graph in canvas shape, 0 where nothing was computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from focus_compile.errors import Unsupported
from focus_compile.passes import PASSES
from focus_compile.passes.restore import restore
from focus_compile.plan.plan import Plan
from tests.passes.reading import Subject, missing, subject
from tests.passes.step import FED, RETAINED, Step, controls
from tests.passes.tiny import VOCAB, Values, call, model


def test_lines(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    before, after = (tiny.lines(stages[name]) for name in ("narrow", "restore"))
    assert after == [*before, "restore = focus.restore(linear, tokens, retain_mask, 0, 1)"]
    assert not missing(before, after)
    assert tiny.inputs(stages["restore"]) == tiny.inputs(stages["narrow"])
    linear, *rest = tiny.outputs(stages["narrow"]).partition(",")
    assert linear == "[[linear"
    assert tiny.outputs(stages["restore"]) == "".join(["[[restore", *rest])


@torch.no_grad()
def test_numbers(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    values = {**call(), **controls()}
    (logits, *_), _, _ = tiny.run(stages["restore"], values)["output"]
    expected, *_ = model(values, Step(values).attend)
    assert expected[~RETAINED].abs().min() > 0
    expected = torch.where(RETAINED[..., None], expected, 0.0)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert not logits[~RETAINED].any()


def narrowed(changed: Subject) -> tuple[GraphModule, Plan]:
    gm = changed.canonical.gm
    for apply in PASSES[: PASSES.index(restore)]:
        gm = apply(gm, changed.plan)
    return gm, changed.plan


@torch.no_grad()
def test_what_is_computed_before_the_cut_is_restored_by_fed_tokens() -> None:
    def function(values: Values) -> tuple[Tensor, ...]:
        early = F.embedding(values["ids"], values["embed"]) + values["style"]
        return early, *model(values)

    values = {**call(layers=2), **controls()}
    changed = subject(call(layers=2), function)
    gm, plan = narrowed(changed)
    after = restore(gm, plan)
    assert missing(changed.lines(after), changed.lines(gm)) == [
        "restore = focus.restore(add, fed_tokens, fed, 0, 1)",
        "restore = focus.restore(linear, tokens, retain_mask, 0, 1)",
    ]
    (early, *_), _, _ = changed.run(after, values)["output"]
    expected = torch.where(FED[..., None], function(values)[0], 0.0)
    torch.testing.assert_close(early, expected)
    assert early[FED].abs().min() > 0 and not FED.all()


def test_folded_tokens_are_refused() -> None:
    def function(values: Values) -> tuple[Tensor, ...]:
        logits, *cache = model(values)
        return logits.reshape(-1, VOCAB), *cache

    gm, plan = narrowed(subject(call(layers=2), function))
    with pytest.raises(Unsupported) as refusal:
        restore(gm, plan)
    reason = "the model returns tokens in another order, or folded"
    assert str(refusal.value) == f"{reason} [op aten.reshape.default]"
    assert refusal.value.cure
