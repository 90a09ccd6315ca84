"""Signals by name: what they rank by, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import FocusConfig, Signal, Step
from focus_compile.ops.selection import select
from focus_compile.runtime.signals import SIGNALS, check_signal, reads_confidence, signal_of
from tests.support.harness import MASK, Run, Sizes, build_model, eager_logits, random_call


def step(masked: Tensor, **values: Tensor) -> Step:
    return Step(0, masked.long(), masked, torch.ones_like(masked), **values)


def test_weights() -> None:
    some = step(torch.ones(1, 3, dtype=torch.bool))
    assert signal_of("delta", some) == Signal((-1.0, 1.0)) == Signal()
    assert signal_of("importance", some) == Signal((0.0, 1.0))
    assert signal_of((0.25, 2.0), some) == Signal((0.25, 2.0))
    own = Signal((3.0, 1.0))
    assert signal_of(own, some) is own is signal_of(lambda _: own, some)


@pytest.mark.parametrize("length", [2, 5, 32, 300])
def test_position_keeps_the_leftmost(length: int) -> None:
    """As many as the budget, whatever stands out: nothing does."""
    generator = torch.Generator().manual_seed(length)
    masked = torch.rand(64, length, generator=generator) < 0.7
    masked[:, 0] = True
    bias = signal_of("position", step(masked)).bias
    assert bias is not None
    count = torch.randint(1, length + 1, (64,), generator=generator)
    count = torch.minimum(count, masked.sum(1))
    kept = select(bias, masked, count)
    assert torch.equal(kept, masked & (masked.cumsum(1) <= count.unsqueeze(1)))


def test_confidence_of_steps_before() -> None:
    """The surest first; of equals the one that was computed last; those that never were at last."""
    masked = torch.ones(1, 5, dtype=torch.bool)
    sure, age = torch.tensor([[0.5, 0.5, 0.0, 0.9, 0.5]]), torch.tensor([[3, 0, -1, 7, 1]])
    bias = signal_of("confidence", step(masked, confidence=sure, age=age)).bias
    assert bias is not None
    assert bias.argsort(descending=True).tolist() == [[3, 1, 4, 0, 2]]
    assert float(bias[0, 2]) == 0
    with pytest.raises(ValueError, match="not known to return logits"):
        signal_of("confidence", step(masked))


def test_who_asks_for_confidences() -> None:
    assert {name for name in SIGNALS if reads_confidence(name)} == {"confidence"}
    assert reads_confidence(lambda _: Signal()) and not reads_confidence((1.0, 0.0))


@pytest.mark.parametrize("signal", ["left", 3, (1.0,), (1.0, "a"), None])
def test_refused(signal: Any) -> None:
    with pytest.raises(ValueError, match=r"signal=.*expected one of \('delta', 'importance'"):
        check_signal(signal)
    if signal is not None:
        with pytest.raises(ValueError, match=r"signal=.*expected one of \('delta', 'importance'"):
            focus_compile.session(signal=signal).__enter__()
        with pytest.raises(ValueError, match=r"signal=.*expected one of \('delta', 'importance'"):
            FocusConfig(signal=signal)


@pytest.mark.parametrize("layers", [(0,), (1, 1), (2, 1), (-1, 0), (0.0, 1.0), "01"])
def test_refused_layers(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers=.*0 <= i < j"):
        FocusConfig(layers=layers)


@pytest.mark.parametrize("wanted", [False, True])
@torch.no_grad()
def test_a_function_asks_for_confidences(wanted: bool) -> None:
    """They take a softmax of every step, so they come where they are wanted."""
    model = build_model(Sizes(layers=3))
    run, call = Run(model, dynamic=True), random_call(1, model, 3, 9, 7)
    seen: dict[str, list[Step]] = {"loop": [], "generate": []}
    now = "loop"

    def watch(given: Step) -> Signal:
        seen[now].append(given)
        return Signal()

    with focus_compile.session(signal=watch) as focus:
        focus.confidences = wanted
        for _ in range(2):
            run.logits(call)
        now = "generate"
        focus_compile.generate(
            run.compiled, call.ids[:, :5], max_new_tokens=8, block_length=8, mask_token_id=MASK
        )
    for steps in seen.values():
        confidence = steps[1].confidence
        assert confidence is not None and bool((confidence > 0).any()) == wanted


@torch.no_grad()
def test_layers() -> None:
    """Scores are those of the layers that are asked for; with nothing evicted, logits eager's."""
    model = build_model(Sizes(layers=4))
    call = random_call(1, model, 3, 9, 7)

    def scores(layers: tuple[int, int], weights: tuple[float, float]) -> Tensor:
        torch._dynamo.reset()
        run = Run(model, {"layers": layers, "exact": True}, dynamic=True)
        with focus_compile.session(signal=weights) as focus:
            logits = run.logits(call)
            assert focus.scores is not None
            torch.testing.assert_close(logits, eager_logits(model, call), atol=1e-4, rtol=1e-4)
            return focus.scores

    first, third = scores((0, 1), (1.0, 0.0)), scores((1, 2), (0.0, 1.0))
    delta = scores((0, 2), (-1.0, 1.0))
    torch.testing.assert_close(delta, third - first)
    assert not torch.allclose(delta, scores((0, 1), (-1.0, 1.0)), atol=1e-2)


@torch.no_grad()
def test_rescue_needs_logits(caplog: pytest.LogCaptureFixture) -> None:
    """A part of the model that returns hidden states: rescue is off, and says so."""
    model = build_model(Sizes(layers=3))
    run, call = Run(model.model, dynamic=True), random_call(1, model, 3, 9, 7)
    with focus_compile.session(alpha=1.0, rescue=1.0) as focus:
        run.compiled(**call.kwargs(model))
        assert focus.stats.rescued == 0 and focus.retain_mask is not None
        assert not focus.retain_mask.all()
    assert (
        "rescue, confidences and audits are off: no output of this program is known" in caplog.text
    )
