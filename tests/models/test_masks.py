"""Masks: the one that a diffusion LLM needs, and what is said where transformers makes another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import block_mask
from tests.support.harness import Call, Run, Sizes, build_model, eager_logits, random_call

SMALL = Sizes(layers=2, heads=4, head_dim=8, hidden=24, intermediate=20)
VALID = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
"""Two rows, a history of three tokens (two of them padding in one row), a block of four."""


def test_the_mask_of_a_block() -> None:
    made = block_mask(build_model(SMALL), VALID, 4)
    assert made.dtype == torch.bool and made.shape == (2, 1, 4, 7)
    for row in range(2):
        for query in range(4):
            assert made[row, 0, query].tolist() == VALID[row].bool().tolist()
    whole = block_mask(build_model(SMALL), VALID.bool())
    assert whole.shape == (2, 1, 7, 7) and torch.equal(whole[:, :, 3:], made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eager_attention_gets_an_additive_mask(dtype: torch.dtype) -> None:
    """transformers adds it to the scores as it is; compiled or not, the model tells."""
    model = build_model(SMALL, "eager", dtype)
    made = block_mask(model, VALID, 4)
    assert made.dtype == dtype and made.shape == (2, 1, 4, 7)
    assert torch.equal(made == 0, block_mask(build_model(SMALL), VALID, 4))
    assert (made[~(made == 0)] == torch.finfo(dtype).min).all()
    assert torch.equal(block_mask(torch.compile(model, backend="eager"), VALID, 4), made)


@torch.no_grad()
def test_attention_of_both_kinds_agrees() -> None:
    """The mask is what both mean by it; and padding in the history is hidden."""
    logits = []
    for attention in ("sdpa", "eager"):
        model = build_model(SMALL, attention)
        call = random_call(1, model, 2, 4, 3, None)
        for noise in (0.0, 1.0):
            past = [(key.clone(), value.clone()) for key, value in call.past or ()]
            for key, value in past:
                key[0, :, :2] += noise
                value[0, :, :2] -= noise
            mask = block_mask(model, VALID, 4)[:, 0]
            moved = Call(call.ids, call.masked, call.positions, mask, past)
            logits.append(eager_logits(model, moved))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("valid", "tokens"), [(VALID[0], 4), (VALID, 8), (VALID, 0)])
def test_what_is_no_mask_of_a_block(valid: Tensor, tokens: int) -> None:
    with pytest.raises(ValueError, match=r"valid has shape \(.*: expected \[batch, history"):
        block_mask(build_model(SMALL), valid, tokens)


def without_a_mask(seed: int, run: Run) -> dict[str, object]:
    """A call as users of transformers write it."""
    kwargs = random_call(seed, run.model, 3, 5, 7, None).kwargs(run.model)
    return kwargs | {"attention_mask": None}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_causal_mask_is_told(attention: str, caplog: pytest.LogCaptureFixture) -> None:
    """``attention_mask=None``: at the first masked call, and once; explain says it, too."""
    run = Run(build_model(SMALL, attention), {"alpha": 1e9}, dynamic=True)
    kwargs = without_a_mask(0, run)
    kwargs["input_ids"] = torch.zeros(3, 5, dtype=torch.int64)
    run.compiled(**kwargs)
    assert "attention is causal" not in caplog.text  # nothing is masked: a prompt may be so
    for seed in range(2):
        logits = run.compiled(**without_a_mask(seed, run)).logits
        expected = run.model(**without_a_mask(seed, run)).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    assert caplog.text.count("attention is causal: no token sees those on its right") == 1
    if attention == "eager":
        return
    caplog.clear()
    call = random_call(0, run.model, 3, 5, 7, None)
    mask = block_mask(run.model, torch.ones(3, 12), 5)[:, 0]
    run.logits(Call(call.ids, call.masked, call.positions, mask, call.past))
    assert "causal" not in caplog.text
    story = focus_compile.explain(run.model, **without_a_mask(0, run))
    assert story.applied and "focus_compile.block_mask(model, valid, tokens)" in str(story)
    (graph,) = story.to_dict()["graphs"]
    assert all(site["causal"] for site in graph["analysis"]["sites"])


@pytest.mark.parametrize(("attention", "history"), [("sdpa", 7), ("eager", None)])
def test_a_mask_that_the_model_makes_of_a_2d_one(attention: str, history: int | None) -> None:
    model = build_model(SMALL, attention)
    kwargs = random_call(0, model, 3, 5, history, None).kwargs(model)
    kwargs["attention_mask"] = torch.ones(3, 5 + (history or 0), dtype=torch.int64)
    (refusal,) = focus_compile.explain(model, **kwargs).refusals
    assert refusal.reason == "the model makes its attention mask itself"
    assert "of attention_mask=None and of a 2-D mask, transformers makes a causal" in refusal.cure
    assert "block_mask" in refusal.cure
