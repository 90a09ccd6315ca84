"""generate() decodes what the model returned, whatever part of it is compiled."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from transformers import Qwen3Config, Qwen3ForCausalLM

import focus_compile
from focus_compile.backend import focus_backend
from focus_compile.errors import Unsupported
from focus_compile.generation.scores import step_scores
from focus_compile.graph.recompute import InvalidGraph, set_input_values
from focus_compile.graph.sizes import GENERIC
from focus_compile.reports.explanation import explain
from focus_compile.runtime.executable import Executable
from focus_compile.runtime.reader import Outputs, Reader
from focus_compile.runtime.session import Session
from tests.support.harness import CACHE, MASK, PAPER, Sizes, build_model, eager_inner, retained
from tests.support.toy import HIDDEN, VOCAB, Attention

TOKENS, PROMPT = 8, 5
Then = Callable[[Any], Any]


class Wrapped(nn.Module):
    """A language model whose output is changed by ``then``."""

    def __init__(self, then: Then, calls: int = 1) -> None:
        super().__init__()
        self.inner, self.then, self.calls = build_model(Sizes(layers=2)), then, calls
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        cache = given.pop("past_key_values", None)
        out = self.inner(input_ids, **given, **({} if cache is None else {CACHE: cache}))
        for _ in range(1, self.calls):
            again = self.inner(
                input_ids,
                attention_mask=torch.ones_like(given["attention_mask"][..., -input_ids.shape[1] :]),
            )
            out.logits = out.logits + 0 * again.logits
        return self.then(out)


def compiled(module: Any, seen: list[Any] | None = None) -> Any:
    def backend(gm: Any, inputs: Any) -> Any:
        options = {"mask_token_id": MASK, "delayed_cache": False, **PAPER}
        made = focus_backend(gm, inputs, options=options, inner=eager_inner)
        if seen is not None:
            seen.append(made)
        return made

    return torch.compile(
        module, backend=backend, dynamic=False
    )  # two shapes a test, captured quickly


def generated(model: Any) -> focus_compile.Generated:
    torch.manual_seed(1)
    out = focus_compile.generate(
        model,
        torch.randint(0, MASK, (2, PROMPT)),
        max_new_tokens=TOKENS,
        block_length=TOKENS,
        mask_token_id=MASK,
        return_dict=True,
    )
    return out


def same(out: Any) -> Any:
    return out


def confidence(out: Any) -> Any:
    out["confidence"] = out.logits.softmax(-1).amax(-1)
    return out


def value(out: Any) -> Any:
    out["value"] = out.logits.mean(-1, keepdim=True)
    return out


def cooler(out: Any) -> Any:
    out.logits = out.logits / 0.5 + torch.arange(out.logits.shape[-1])
    return out


def behind_a_break(out: Any) -> Any:
    torch._dynamo.graph_break()
    return cooler(out)


def whole(model: Wrapped) -> Any:
    return compiled(model)


def inner(model: Wrapped) -> Any:
    model.inner = compiled(model.inner)
    return model


def body(model: Wrapped) -> Any:
    model.inner.model = compiled(model.inner.model)
    return model


@pytest.mark.parametrize(
    ("then", "compile_", "told"),
    [
        (confidence, whole, None),
        (value, whole, None),
        (behind_a_break, whole, "are not the tensor"),
        (cooler, inner, "are not the tensor"),
        (same, inner, None),
        (same, body, "returns hidden states"),
    ],
)
def test_generate(
    then: Then, compile_: Any, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generated(Wrapped(then))
    model = compile_(Wrapped(then))
    with focus_compile.session(alpha=1e9):
        out = generated(model)
    assert torch.equal(out.sequences, expected.sequences)
    with focus_compile.session(alpha=1.0):
        fewer = generated(model)
    assert fewer.focus_steps == fewer.forwards > 0 and fewer.retained_fraction < 1
    lines = [line for line in caplog.messages if "spread over all tokens of the block" in line]
    assert len(lines) == (told is not None) and all(str(told) in line for line in lines)
    for kept, chosen in zip(fewer.retain_masks, fewer.decode_masks, strict=True):
        assert not bool((chosen & ~kept).any())


def test_shifts_behind_the_program_are_found() -> None:
    def shift(out: Any) -> Any:
        out.logits = torch.cat([out.logits[:, :1], out.logits[:, :-1]], 1)
        return out

    told = "the model moves or mixes the logits"
    with focus_compile.session(alpha=1.0), pytest.raises(ValueError, match=told):
        generated(inner(Wrapped(shift)))


@pytest.mark.parametrize("first_step", ["evict", "open"])
def test_a_wrapper_that_calls_twice_runs_dense(
    first_step: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From its first step on, whether or not that one evicts."""
    model = Wrapped(same, calls=2)
    expected = generated(build_model(Sizes(layers=2)))
    with focus_compile.session(alpha=1.0, first_step=first_step):
        out = generated(inner(model))
    assert torch.equal(out.sequences, expected.sequences) and out.focus_steps == 0
    assert any("and each evicts tokens of its own" in line for line in caplog.messages)


def test_packed_only_for_the_model_that_was_seen(caplog: pytest.LogCaptureFixture) -> None:
    """One program, two models: one returns its logits as they are, one changes them."""
    model, seen = Wrapped(cooler), list[Any]()
    expected = generated(model)
    plain = model.inner = compiled(model.inner, seen)
    with focus_compile.session(alpha=1e9):
        generated(plain)
        assert torch.equal(generated(model).sequences, expected.sequences)
    programs = [program for program in seen if isinstance(program, Executable)]
    assert any(program.read_as.get(plain) is not None for program in programs)
    assert all(program.read_as.get(model) is None for program in programs)
    assert any("are not the tensor" in line for line in caplog.messages)


@dataclasses.dataclass
class Counting:
    """A wrapper that equals others, and so has no hash."""

    model: Any
    calls: int = 0

    @property
    def config(self) -> Any:
        return self.model.config

    def parameters(self) -> Any:
        return self.model.parameters()

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        self.calls += 1
        return self.model(input_ids, **given)

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self.forward(*args, **given)


def test_models_that_are_no_modules() -> None:
    """They are known by what they are, not by what they equal, for as long as they live."""
    outputs, one, two = Outputs(), Counting(1), Counting(1)
    outputs.set(one, 3)
    assert one == two and outputs.get(one) == 3 and outputs.get(two) is None
    outputs.set([], 4)  # a list has neither a hash nor weak references
    assert outputs.get([]) is None
    del one
    gc.collect()
    assert not outputs._known

    wrapped = build_model(Sizes(layers=2))
    expected = generated(wrapped)
    model = Counting(compiled(wrapped))
    with focus_compile.session(alpha=1e9):
        out = generated(model)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.focus_steps == out.forwards == model.calls - 2


class Halves(nn.Module):
    """Three layers, and what stands between them."""

    def __init__(self, before: int, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(64, HIDDEN)
        self.a, self.b, self.c = (Attention() for _ in range(3))
        self.head, self.before = nn.Linear(HIDDEN, VOCAB, bias=bias), before

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        x = x + self.a(x)
        x = x + self.b(x)
        if self.before == 2:
            torch._dynamo.graph_break()
        x = x + self.c(x)
        if self.before == 3:
            torch._dynamo.graph_break()
        logits = self.head(x)
        if self.before == 4:
            torch._dynamo.graph_break()
        return logits * 2


@torch.no_grad()
@pytest.mark.parametrize(("before", "bias"), [(2, False), (3, True), (3, False)])
def test_breaks_before_the_logits_are_refused(
    before: int, bias: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Halves(before, bias).eval()
    ids = torch.full((2, 9), 22)
    options = {"mask_token_id": 22}
    backend = functools.partial(focus_backend, options=options, inner=eager_inner)
    assert torch.equal(torch.compile(model, backend=backend)(ids), model(ids))
    told = "the model goes on behind a graph break"
    assert any(told in line and "test_readout.py:" in line for line in caplog.messages)
    torch._dynamo.reset()
    (refusal, *_) = explain(model, ids).refusals
    assert isinstance(refusal, Unsupported) and refusal.reason.startswith(told) and refusal.cure


@torch.no_grad()
def test_a_break_behind_the_logits_is_none(caplog: pytest.LogCaptureFixture) -> None:
    seen = list[Any]()

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(focus_backend(gm, inputs, options={"mask_token_id": 22}, inner=eager_inner))
        return seen[-1]

    model, ids = Halves(4).eval(), torch.full((2, 9), 22)
    with focus_compile.session(alpha=1.0, logits="packed", first_step="evict") as focus:
        logits = torch.compile(model, backend=backend)(ids)
        kept = focus.retain_mask
        assert focus.logits is None and kept is not None and not bool(kept.all())
    assert isinstance(seen[0], Executable) and seen[0].suffix.calls == 1
    assert torch.equal(retained(logits), kept)
    with caplog.at_level(logging.WARNING):
        assert any("leaves logits on the canvas, and session.logits" in m for m in caplog.messages)


@torch.no_grad()
@pytest.mark.parametrize("length", [7, 8])
def test_a_window_that_prompt_and_answer_outgrow(length: int) -> None:
    config = Qwen3Config(
        vocab_size=61, hidden_size=40, intermediate_size=72, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        use_sliding_window=True, sliding_window=PROMPT + TOKENS - 8 + length, max_window_layers=2,
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    if length == 7:
        with pytest.raises(ValueError, match="a sliding window of 12, which generate"):
            generated(model)
    else:
        assert generated(model).forwards > 0


def test_dynamic_rope_is_named() -> None:
    config = Qwen3Config(
        vocab_size=61, hidden_size=40, intermediate_size=72, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    story = explain(model, input_ids=torch.zeros(2, 9, dtype=torch.int64), attention_mask=mask)
    (refusal,) = story.refusals
    assert (
        refusal.reason.startswith("dynamic RoPE breaks the graph") and "rope_type" in refusal.cure
    )
    assert "dynamic RoPE" in str(story.breaks[0].remedy)


def test_logits_of_the_last_tokens_alone() -> None:
    masked = torch.ones(2, 9, dtype=torch.bool)
    reader, told = Reader(nn.Identity()), "tokens: expected one row per token"
    with pytest.raises(ValueError, match=told):
        step_scores(lambda: torch.zeros(2, 1, 5), masked, Session(), reader)


def test_no_number_of_the_analysis_reaches_a_compiler() -> None:
    """As a literal, a sum or product of two, or as the length of an input."""
    batch, token = GENERIC["batch"], GENERIC["token"]
    for number, shape in ((batch, (3,)), (batch * token, (3,)), (1, (token, 2))):
        graph = Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.add, (x, number)),))
        with pytest.raises(InvalidGraph, match="a size became a constant: "):
            set_input_values(GraphModule(nn.Module(), graph), [torch.empty(shape, device="meta")])
