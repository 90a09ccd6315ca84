"""What some dialects alone do: half precision, adapters, hooks, and what is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import focus_compile
from tests.reference.emulation import Emulation
from tests.reference.state import Config
from tests.support.dialects import DIALECTS, DISTINCT, Dialect, Draw, Subject, draw_call, sdar_moe
from tests.support.harness import PAPER, retained
from tests.support.models import dream, llada, parts
from tests.support.models.dream import Dream
from tests.support.models.llada2 import LLaDA2

TOLERANCE = 1e-4


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", DISTINCT)
def test_half_precision(name: str) -> None:
    """bf16 weights, end to end: as near to the fp32 model as the eager bf16 model is.

    In the median: a router that rounds otherwise picks another expert, and moves a token far.
    """
    wide, half = Subject(DIALECTS[name]), Subject(DIALECTS[name], dtype=torch.bfloat16)
    evicted = 0
    for seed in range(3):
        draw = draw_call(half.dialect, seed)
        exact = wide.eager(draw)
        draw = dataclasses.replace(draw, dtype=torch.bfloat16)
        with focus_compile.session(alpha=1e9):
            actual = half.focus(draw)
        error, usual = ((x.float() - exact).abs().median() for x in (actual, half.eager(draw)))
        assert error <= 1.2 * usual
        with focus_compile.session(alpha=1.0):
            evicted += int((~retained(half.focus(draw))).sum())
    assert evicted


@pytest.mark.parametrize("merged", [False, True])
def test_lora(merged: bool) -> None:
    """Adapters beside the weights, or merged into them."""

    def build() -> torch.nn.Module:
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "up"], init_lora_weights=False
        )
        model = peft.get_peft_model(Dream(), config)
        return model.merge_and_unload() if merged else model

    def arguments(model: Any, draw: Draw) -> dict[str, Any]:
        base = model if merged else model.base_model.model
        return DIALECTS["dream"].arguments(base, draw)

    subject = Subject(dataclasses.replace(DIALECTS["dream"], build=build, arguments=arguments))
    plain = Subject(DIALECTS["dream"])
    for seed in range(5):
        draw = draw_call(subject.dialect, seed)
        expected = subject.eager(draw)
        assert not torch.allclose(expected, plain.eager(draw), atol=0.1)
        with focus_compile.session(alpha=1e9):
            torch.testing.assert_close(subject.focus(draw), expected, atol=TOLERANCE, rtol=0)
        found = Emulation(Config(1.2)).step(
            lambda d=draw: subject.eager(d), draw.ids, draw.masked, draw.history
        )
        with focus_compile.session(alpha=1.2):
            assert torch.equal(retained(subject.focus(draw)), found.retained)


def test_accelerate_hooks() -> None:
    """They break graphs by their own choice: what to do is said, and helps."""
    dialect = DIALECTS["sdar-moe-grouped"]
    draw = draw_call(dialect, 1)
    model = dialect.build().eval()
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    stories = []
    for undo in (False, True):
        torch._dynamo.reset()
        if undo:
            remove_hook_from_submodules(model)
        stories.append(focus_compile.explain(model, **dialect.arguments(model, draw)))
    assert not stories[0].applied and stories[1].applied
    assert "remove_hook_from_submodules(model)" in (stories[0].breaks[0].remedy or "")


def test_last_tokens_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last token's axis is dropped, nothing can be cut off what comes back."""
    monkeypatch.setattr(Dream, "forward", last_token_alone(Dream.forward))
    subject = Subject(DIALECTS["dream-canvas"])
    with pytest.raises(BackendCompilerFailed, match="last tokens alone is not understood"):
        subject.focus(draw_call(subject.dialect, 0))


def last_token_alone(forward: Callable[..., Any]) -> Callable[..., Any]:
    def alone(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        (logits,) = forward(self, input_ids, **kwargs)
        return (logits[:, -1:].squeeze(1),)

    return alone


def test_keys_that_are_mixed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that hold nothing would have a part in what other keys become."""
    plain = llada.Rotary.forward

    def centred(self: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any) -> Any:
        return plain(self, query, key - key.mean(2, keepdim=True), *rest)

    monkeypatch.setattr(llada.Rotary, "forward", centred)
    subject = Subject(DIALECTS["llada"])
    with pytest.raises(BackendCompilerFailed, match="mixed before they are attended to"):
        subject.focus(draw_call(subject.dialect, 0))


@pytest.mark.parametrize("way", ["alpha", "scaled", "bool"])
def test_masks_that_are_not_added_as_they_are(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention that means something else than scores plus a mask."""

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float
    ) -> torch.Tensor:
        scores = torch.matmul(query, key.transpose(2, 3))
        if way == "alpha":
            scores = torch.add(scores * scale, mask, alpha=3)
        elif way == "scaled":
            scores = (scores + mask) * scale
        else:
            scores = scores * scale + (mask > -1)
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32), value)

    monkeypatch.setattr(parts, "softmax_attention", attention)
    subject = Subject(DIALECTS["llada2-dense"])
    with pytest.raises(
        BackendCompilerFailed, match=r"mask of an attention site is scaled|True adds"
    ):
        subject.focus(draw_call(subject.dialect, 0))


def test_flex_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks are functions; what to load the model with instead is said."""
    functions = SimpleNamespace(**{name: getattr(F, name) for name in ("silu", "linear")})
    functions.scaled_dot_product_attention = lambda q, k, v, *_: flex_attention(q, k, v)
    monkeypatch.setattr(llada, "F", functions)
    subject = Subject(DIALECTS["llada-canvas"])
    with pytest.raises(BackendCompilerFailed, match=r"flex_attention.*='sdpa' or 'eager'"):
        subject.focus(draw_call(subject.dialect, 0))


@torch.no_grad()
@pytest.mark.usefixtures("no_inductor")
def test_a_model_without_a_mask_token(caplog: pytest.LogCaptureFixture) -> None:
    """DiffusionGemma's canvas holds random tokens: FOCUS runs where it is told the open ones."""
    dialect = DIALECTS["diffusion-gemma"]
    torch._dynamo.reset()
    model = dialect.build().eval()
    draw = draw_call(dialect, 1)
    compiled = torch.compile(model, backend="focus", options={"strict": True})
    with focus_compile.session(alpha=1.2, **PAPER) as focus, caplog.at_level("WARNING"):
        dense = dialect.logits(compiled(**dialect.arguments(model, draw)))
        assert (focus.stats.steps, focus.stats.dense_calls) == (0, 1)
        focus.masked = draw.masked
        actual = dialect.logits(compiled(**dialect.arguments(model, draw)))
        assert focus.stats.steps == 1
    assert "does not know which tokens are masked" in caplog.text
    expected = dialect.logits(model(**dialect.arguments(model, draw)))
    torch.testing.assert_close(dense, expected, atol=TOLERANCE, rtol=TOLERANCE)
    found = Emulation(Config(1.2)).step(
        lambda: subject_logits(dialect, model, draw), draw.ids, draw.masked, draw.history
    )
    assert torch.equal(retained(actual), found.retained)


def subject_logits(dialect: Dialect, model: torch.nn.Module, draw: Draw) -> torch.Tensor:
    return dialect.logits(model(**dialect.arguments(model, draw)))


def test_graph_breaks_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the model at fault, and a remedy, for what public files do."""
    monkeypatch.setattr(dream.Attention, "branches", True)
    for dialect, line, remedy in (
        (DIALECTS["dream"], "torch.all(mask)", "Qwen3ForCausalLM"),
        (
            dataclasses.replace(DIALECTS["llada2-sorted"], build=lambda: LLaDA2(way="counted")),
            "int(count)",
            "focus_compile.compile(model)",
        ),
        (
            dataclasses.replace(DIALECTS["sdar-moe-grouped"], build=lambda: sdar_moe("eager")),
            "expert_hit",
            "experts_implementation='grouped_mm'",
        ),
    ):
        torch._dynamo.reset()
        model = dialect.build().eval()
        story = focus_compile.explain(model, **dialect.arguments(model, draw_call(dialect, 1)))
        assert not story.applied
        assert line in story.breaks[0].line
        assert remedy in (story.breaks[0].remedy or "")
        assert "ended by a graph break" in str(story)
