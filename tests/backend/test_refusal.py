"""Where FOCUS does not apply: eager's numbers, one warning that says why, an error when strict."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from focus_compile import analysis, session
from focus_compile.backend import focus_backend
from focus_compile.refusals import HEAD_GROUPS, catalogue
from focus_compile.runtime.executable import Executable
from tests.support.harness import (
    MASK,
    VOCAB,
    Call,
    Run,
    Sizes,
    bound,
    build_model,
    eager_inner,
    eager_logits,
    random_call,
)
from tests.support.toy import HIDDEN, Attention, Toy

LAYERS3 = Sizes(layers=3)
BATCH, TOKENS, HISTORY = 3, 9, 7


class Compiled:
    """A callable compiled with the backend, and what the backend made of each graph."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.programs: list[Any] = []
        options = {"mask_token_id": MASK, **options}

        def backend(gm: GraphModule, inputs: list[Any]) -> Any:
            self.programs.append(focus_backend(gm, inputs, options=options, inner=eager_inner))
            return self.programs[-1]

        self.call = torch.compile(function, backend=backend)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Warnings of the package so far."""
    caplog.set_level(logging.DEBUG, logger="focus_compile")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("focus_compile") and record.levelno >= logging.WARNING
    ]


Said = Callable[[], list[str]]


def one_layer() -> tuple[nn.Module, Callable[..., Any]]:
    model = Toy(layers=1).eval()
    return model, lambda: (torch.randint(0, 23, (BATCH, TOKENS)),)


def single_layer() -> tuple[nn.Module, Callable[..., Any]]:
    return Attention().eval(), lambda: (torch.randn(BATCH, TOKENS, HIDDEN),)


def flipped() -> tuple[nn.Module, Callable[..., Any]]:
    return Toy(lambda x: x.flip(1)).eval(), lambda: (torch.randint(0, 23, (BATCH, TOKENS)),)


def interleaved() -> tuple[nn.Module, Callable[..., Any]]:
    """Query head h reads key head h % 2 of two, and not h // 2."""

    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(HIDDEN, 4 * 5), nn.Linear(HIDDEN, 2 * 5)
            self.o = nn.Linear(4 * 5, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, tokens, _ = x.shape
            q = self.q(x).view(batch, tokens, 4, 5).transpose(1, 2)
            k = self.k(x).view(batch, tokens, 2, 5).transpose(1, 2)
            k = k[:, None].expand(-1, 2, -1, -1, -1).reshape(batch, 4, tokens, 5)
            y = nn.functional.scaled_dot_product_attention(q, k, k)
            return self.o(y.transpose(1, 2).reshape(batch, tokens, 20))

    model = Toy(layers=2)
    model.layers = nn.ModuleList(Interleaved() for _ in range(2))
    return model.eval(), lambda: (torch.randint(0, 23, (BATCH, TOKENS)),)


REFUSED = {
    "heads in another order": (interleaved, "neighbouring query heads do not share a key head"),
    "one layer": (one_layer, "FOCUS compares the attention of two layers, and this graph has one"),
    "a single layer": (single_layer, "compile the whole model, not single layers"),
    "an operator over tokens": (flipped, "no rule says how this operator treats the token axis"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, said: Said) -> None:
    make, reason = REFUSED[name]
    model, arguments = make()
    compiled = Compiled(model)
    for _ in range(2):
        given = arguments()
        torch.testing.assert_close(compiled.call(*given), model(*given))
    assert len(compiled.programs) == 1 and not isinstance(compiled.programs[0], Executable)
    (warning,) = said()
    assert warning.startswith("backend 'focus' leaves this graph as it is: ") and reason in warning
    (entry,) = (entry for entry in catalogue().values() if reason in entry.reason)
    assert warning.endswith(f". What to do: {entry.cure}")


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_strict(name: str, said: Said) -> None:
    make, reason = REFUSED[name]
    model, arguments = make()
    with pytest.raises(BackendCompilerFailed, match="Unsupported") as refusal:
        Compiled(model, strict=True).call(*arguments())
    assert reason in str(refusal.value)
    assert not said()


@torch.no_grad()
def test_a_refusal_names_operator_and_module() -> None:
    with pytest.raises(BackendCompilerFailed) as refusal:
        model, arguments = interleaved()
        Compiled(model, strict=True).call(*arguments())
    where = "[op aten.scaled_dot_product_attention.default in module layers.0]"
    assert where in str(refusal.value)


@torch.no_grad()
def test_the_warning_says_all_of_it(said: Said) -> None:
    """Reason, operator, module and cure."""
    model, arguments = interleaved()
    Compiled(model).call(*arguments())
    where = "[op aten.scaled_dot_product_attention.default in module layers.0]"
    assert said() == [
        f"backend 'focus' leaves this graph as it is: {HEAD_GROUPS.reason} {where}. "
        f"What to do: {HEAD_GROUPS.cure}"
    ]


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(build_model(LAYERS3))


@torch.no_grad()
def test_nothing_masked_is_dense_and_silent(run: Run, said: Said) -> None:
    masked = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    call = random_call(1, run.model, BATCH, TOKENS, HISTORY, masked=masked)
    dense, prefix, suffix = run.counts()
    logits = run.compiled(**call.kwargs(run.model)).logits
    assert run.counts() == (dense + 1, prefix, suffix)
    expected = eager_logits(run.model, call)
    assert (logits - expected).abs().max().item() <= bound(expected)
    assert not said()


@torch.no_grad()
def test_no_mask_token_id(said: Said) -> None:
    """Dense, one warning; whoever says later which tokens are masked gets FOCUS."""
    run = Run(build_model(LAYERS3), {"mask_token_id": None, "alpha": 1.0})
    call = random_call(1, run.model, BATCH, TOKENS, HISTORY)
    expected = eager_logits(run.model, call)
    for _ in range(2):
        logits = run.compiled(**call.kwargs(run.model)).logits
        assert (logits - expected).abs().max().item() <= bound(expected)
    assert run.counts() == (2, 0, 0)
    (warning,) = said()
    for cure in ("options={'mask_token_id': ...}", "session(mask_token_id=...)", ".masked = ..."):
        assert cure in warning
    with session(mask_token_id=MASK):
        by_id = run.logits(call)
    with session() as focus:
        focus.masked = call.masked
        by_hand = run.logits(call)
    assert torch.equal(by_id, by_hand)
    assert run.counts() == (2, 2, 2)


@torch.no_grad()
def test_a_block_of_one_token_is_dense(run: Run, said: Said) -> None:
    call = random_call(1, run.model, BATCH, 1, HISTORY, masked=torch.ones(BATCH, 1).bool())
    before = run.counts()
    logits = run.compiled(**call.kwargs(run.model)).logits
    expected = eager_logits(run.model, call)
    assert (logits - expected).abs().max().item() <= bound(expected)
    assert run.counts() == before
    assert not said()


@torch.no_grad()
@pytest.mark.parametrize("bad", [VOCAB, -1])
def test_ids_out_of_range_fail_as_in_eager(run: Run, bad: int) -> None:
    call = random_call(1, run.model, BATCH, TOKENS, HISTORY)
    assert call.masked.any()
    ids = call.ids.clone()
    row, position = (~call.masked).nonzero()[0].tolist()
    ids[row, position] = bad
    call = dataclasses.replace(call, ids=ids)
    with pytest.raises(IndexError, match="index out of range"):
        eager_logits(run.model, call)
    with pytest.raises(IndexError, match="index out of range"):
        run.compiled(**call.kwargs(run.model))


@torch.no_grad()
@pytest.mark.parametrize(("batch", "tokens"), [(0, TOKENS), (BATCH, 0)])
def test_an_empty_call_is_one_clear_error(batch: int, tokens: int) -> None:
    """At first, or after calls that were not: Dynamo captures sizes of 0 apart."""
    message = re.escape(f"the token ids have shape ({batch}, {tokens}): batch or block is empty")
    torch._dynamo.reset()
    compiled = Compiled(Toy().eval(), mask_token_id=22)
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled.call(torch.zeros(batch, tokens, dtype=torch.int64))
    compiled = Compiled(Toy().eval(), mask_token_id=22)
    compiled.call(torch.zeros(BATCH, TOKENS, dtype=torch.int64))
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled.call(torch.zeros(batch, tokens, dtype=torch.int64))


@torch.no_grad()
def test_the_recompile_limit_is_reported_once(said: Said) -> None:
    """Dynamo runs what comes after eagerly, and says so in its own log only."""
    torch._dynamo.reset()
    limit = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False)
    with limit, torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        compiled = Compiled(Toy().eval(), mask_token_id=22)
        for tokens in (TOKENS, TOKENS + 1, TOKENS + 2, TOKENS + 3):
            compiled.call(torch.zeros(BATCH, tokens, dtype=torch.int64))
    assert len(compiled.programs) == 2
    (warning,) = said()
    assert warning.startswith("this is the last of 2 graphs that Dynamo compiles")
    assert "torch._dynamo.config.recompile_limit" in warning


@torch.no_grad()
def test_a_sampler_is_compiled_in_silence(caplog: pytest.LogCaptureFixture, said: Said) -> None:
    """Softmax over the vocabulary is no attention: also when strict nothing is refused."""

    def sample(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best = logits.argmax(-1)
        return best, (logits - logits.logsumexp(-1, keepdim=True)).exp().amax(-1)

    compiled = Compiled(sample, strict=True)
    logits = torch.randn(BATCH, TOKENS, VOCAB)
    for actual, expected in zip(compiled.call(logits), sample(logits), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(compiled.programs) == 1
    assert not said()
    assert any("no attention in this graph" in record.getMessage() for record in caplog.records)


def test_gradients_fall_back_to_dense(said: Said) -> None:
    """The numbers and the gradients are eager's, and the warning names the cure."""
    model = build_model(LAYERS3)
    call: Call = random_call(1, model, BATCH, TOKENS, HISTORY)
    expected = model(**call.kwargs(model)).logits
    expected.sum().backward()
    wanted = model.lm_head.weight.grad.clone()
    model.zero_grad()
    compiled = Compiled(model)
    logits = compiled.call(**call.kwargs(model)).logits
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(model.lm_head.weight.grad, wanted)
    assert not any(isinstance(program, Executable) for program in compiled.programs)
    (warning,) = said()
    assert "torch.no_grad()" in warning


@torch.no_grad()
def test_autocast_falls_back_to_dense(said: Said) -> None:
    """The numbers are those of eager under autocast, and the warning names the cure."""
    model = build_model(LAYERS3)
    call: Call = random_call(1, model, BATCH, TOKENS, HISTORY)
    compiled = Compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**call.kwargs(model)).logits
        logits = compiled.call(**call.kwargs(model)).logits
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.1)
    assert not any(isinstance(program, Executable) for program in compiled.programs)
    (warning,) = said()
    assert "give the model its dtype with model.to(...)" in warning


@torch.no_grad()
def test_an_error_inside_the_analysis_is_a_refusal(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model runs unchanged, with a warning that asks for a report; strict raises."""

    def fails(_: GraphModule) -> None:
        raise ValueError("out of luck")

    monkeypatch.setattr(analysis, "grow", fails)
    told = "internal error, please report it: ValueError: out of luck"
    model = build_model()
    ids = torch.full((2, 4), MASK)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=lambda gm, inputs: focus_backend(gm, inputs, inner=eager_inner)
    )
    actual = compiled(ids, mask, use_cache=False).logits
    assert torch.equal(actual, model(ids, mask, use_cache=False).logits)
    assert any(told in line for line in said())
    torch._dynamo.reset()
    strict = torch.compile(model, backend="focus", options={"strict": True})
    with pytest.raises(BackendCompilerFailed, match=told):
        strict(ids, mask, use_cache=False)
