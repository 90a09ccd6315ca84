"""Dialects of public diffusion LLMs as test subjects: a model, its calls, its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import (
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
)
from transformers.models.diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
)

from focus_compile import focus_backend
from focus_compile.analysis import Analysis, analyze
from focus_compile.runtime.executable import Executable
from tests.support.harness import CACHE, MASK, PAPER, computed, eager_inner
from tests.support.models.dream import Dream
from tests.support.models.gemma import Gemma
from tests.support.models.llada import LLaDA
from tests.support.models.llada2 import LLaDA2
from tests.support.models.parts import randomize

QWEN3: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Draw:
    """One call: ``ids``, ``masked`` ``[B, T]``; ``visible`` bool ``[B, T, S + T]``; history S."""

    ids: Tensor
    masked: Tensor
    visible: Tensor
    history: int
    seed: int
    dtype: torch.dtype = torch.float32

    def random(self, *shape: int) -> Tensor:
        """Numbers that are the same whenever the call is made."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator).to(self.ids.device, self.dtype)

    def to(self, device: str, dtype: torch.dtype) -> Draw:
        """The same call with tensors on a device, and another precision."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "masked", "visible")}
        return replace(self, **moved, dtype=dtype)

    def additive(self, rows: slice = slice(None)) -> Tensor:
        """``[B, 1, T, S + T]``, 0 or the lowest number."""
        hidden = ~self.visible[rows].unsqueeze(1)
        zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        return zeros.masked_fill(hidden, torch.finfo(self.dtype).min)


@dataclass(frozen=True)
class Dialect:
    """How a model is made and called.

    ``history``: whether calls have one. ``arguments`` makes keyword arguments anew for every call:
    models may write into their caches.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[[Any, Draw], dict[str, Any]]
    logits: Callable[[Any], Tensor]
    history: bool = True
    least: int = 1
    """Of the history."""


def _llada(model: LLaDA, draw: Draw) -> dict[str, Any]:
    shape = (len(draw.ids), model.groups, draw.history, model.head)
    past = [(draw.random(*shape), draw.random(*shape)) for _ in range(model.layers)]
    return {"input_ids": draw.ids, "past_key_values": past, "use_cache": True}


def _llada_dual(model: LLaDA, draw: Draw) -> dict[str, Any]:
    """A cache of the whole canvas: the block, and four tokens to its right."""
    tokens = draw.ids.shape[1]
    shape = (len(draw.ids), model.groups, draw.history + tokens + 4, model.head)
    past = [(draw.random(*shape), draw.random(*shape)) for _ in range(model.layers)]
    places = draw.history + torch.arange(tokens)
    return {"input_ids": draw.ids, "past_key_values": past, "replace_position": places}


def _llada_span(model: LLaDA, draw: Draw) -> dict[str, Any]:
    """The same cache; the block is told by where it begins."""
    return _llada_dual(model, draw) | {"replace_position": draw.history}


def _llada_canvas(_: LLaDA, draw: Draw) -> dict[str, Any]:
    return {"input_ids": draw.ids, "output_hidden_states": True}


def _dream(model: Dream, draw: Draw) -> dict[str, Any]:
    heads = (model.groups * model.head,) if model.folded else (model.groups, model.head)
    shape = (len(draw.ids), draw.history, *heads)
    past = [(draw.random(*shape), draw.random(*shape)) for _ in model.layers]
    return {
        "input_ids": draw.ids,
        "attention_mask": draw.visible.unsqueeze(1),
        "past_key_values": past,
        "use_cache": True,
    }


def _dream_canvas(_: Dream, draw: Draw) -> dict[str, Any]:
    return {"input_ids": draw.ids, "attention_mask": draw.additive()}


def _llada2(model: LLaDA2, draw: Draw) -> dict[str, Any]:
    cache = DynamicCache()
    shape = (len(draw.ids), model.groups, draw.history, model.head)
    for layer in range(len(model.layers)):
        cache.update(draw.random(*shape), draw.random(*shape), layer)
    tokens = draw.ids.shape[1]
    return {
        "input_ids": draw.ids,
        "attention_mask": draw.additive(),
        "position_ids": (draw.history + torch.arange(tokens)).expand(len(draw.ids), tokens),
        "past_key_values": cache,
    }


def _gemma(_: Gemma, draw: Draw) -> dict[str, Any]:
    tokens = draw.ids.shape[1]
    near = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs() < 5
    return {
        "input_ids": draw.ids,
        "position_ids": torch.arange(tokens).expand(len(draw.ids), tokens),
        "masks": {
            "full": draw.visible.unsqueeze(1),
            "sliding": (draw.visible & near).unsqueeze(1),
        },
        "output_hidden_states": True,
    }


def sdar_moe(experts: str) -> Qwen3MoeForCausalLM:
    """SDAR-MoE's weights load into this model of transformers."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **QWEN3,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        experts_implementation=experts,
    )
    model = Qwen3MoeForCausalLM(config)
    randomize(model, 0)
    return model


def _sdar(model: Qwen3MoeForCausalLM, draw: Draw) -> dict[str, Any]:
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (len(draw.ids), config.num_key_value_heads, draw.history, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(draw.random(*shape), draw.random(*shape), layer)
    return {
        "input_ids": draw.ids,
        "attention_mask": draw.visible.unsqueeze(1),
        "use_cache": True,
        CACHE: cache,
    }


def _static(model: Qwen3ForCausalLM, draw: Draw) -> dict[str, Any]:
    """transformers' StaticCache: slots of fixed number, the first of them filled."""
    config, (batch, tokens) = model.config, draw.ids.shape
    slots = draw.history + tokens + 5
    cache = StaticCache(config, max_cache_len=slots)
    heads = config.num_key_value_heads
    cache.early_initialization(batch, heads, config.head_dim, draw.dtype, draw.ids.device)
    shape = (batch, heads, draw.history, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(draw.random(*shape), draw.random(*shape), layer)
    visible = torch.nn.functional.pad(draw.visible, (0, 5))
    return {"input_ids": draw.ids, "attention_mask": visible.unsqueeze(1), CACHE: cache}


def qwen3(attention: str, layers: int = 3) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        **{**QWEN3, "num_hidden_layers": layers},
        attn_implementation=attention,
    )
    model = Qwen3ForCausalLM(config)
    randomize(model, 0)
    return model


def _build_diffusion_gemma() -> DiffusionGemmaForBlockDiffusion:
    """transformers' own model, small; the eager experts read their counts on the host."""
    text = DiffusionGemmaTextConfig(
        vocab_size=61,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=24,
        num_global_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=24,
    )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "position_embedding_size": 8}
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    made = DiffusionGemmaForBlockDiffusion._from_config(config, experts_implementation="grouped_mm")
    randomize(made, 0)
    return made


def _diffusion_gemma(model: DiffusionGemmaForBlockDiffusion, draw: Draw) -> dict[str, Any]:
    """A step of its decoder: the encoder's cache, which it does not write, and logits before."""
    batch, tokens = draw.ids.shape
    cache = DynamicCache(config=model.config.text_config)
    for index, layer in enumerate(model.model.decoder.layers):
        size = layer.self_attn.head_dim
        shape = (batch, layer.self_attn.k_proj.out_features // size, draw.history, size)
        cache.update(draw.random(*shape), draw.random(*shape), index)
    mask = draw.visible.unsqueeze(1)
    return {
        "decoder_input_ids": draw.ids,
        "decoder_attention_mask": {"full_attention": mask, "sliding_attention": mask},
        "decoder_position_ids": (draw.history + torch.arange(tokens)).expand(batch, tokens),
        "self_conditioning_logits": draw.random(batch, tokens, 61),
        CACHE: cache,
    }


DIALECTS: dict[str, Dialect] = {
    "llada": Dialect(lambda: LLaDA(groups=2), _llada, lambda out: out.logits),
    "llada-canvas": Dialect(
        lambda: LLaDA(tied=True), _llada_canvas, lambda out: out.logits, history=False
    ),
    "llada-dual": Dialect(lambda: LLaDA(groups=2), _llada_dual, lambda out: out.logits),
    "llada-span": Dialect(lambda: LLaDA(groups=2), _llada_span, lambda out: out.logits, least=2),
    "sdar-static": Dialect(lambda: qwen3("sdpa"), _static, lambda out: out.logits),
    "causal": Dialect(
        lambda: LLaDA(causal=True), _llada_canvas, lambda out: out.logits, history=False
    ),
    "dream": Dialect(Dream, _dream, lambda out: out[-1]),
    "dream-heads": Dialect(lambda: Dream(folded=False), _dream, lambda out: out[-1]),
    "dream-canvas": Dialect(
        lambda: Dream(groups=3), _dream_canvas, lambda out: out[0], history=False
    ),
    "llada2-dense": Dialect(LLaDA2, _llada2, lambda out: out.logits),
    "llada2-picked": Dialect(lambda: LLaDA2(way="picked"), _llada2, lambda out: out.logits),
    "llada2-sorted": Dialect(lambda: LLaDA2(way="sorted"), _llada2, lambda out: out.logits),
    "sdar-moe-grouped": Dialect(lambda: sdar_moe("grouped_mm"), _sdar, lambda out: out.logits),
    "sdar-moe-batched": Dialect(lambda: sdar_moe("batched_mm"), _sdar, lambda out: out.logits),
    "diffusion-gemma": Dialect(_build_diffusion_gemma, _diffusion_gemma, lambda out: out.logits),
    "gemma": Dialect(Gemma, _gemma, lambda out: out[0], history=False),
}

DISTINCT = (
    "llada-canvas", "llada-dual", "dream-heads", "llada2-dense", "sdar-moe-grouped", "gemma",
)  # fmt: skip
"""A few with the operators of nearly all, where a test costs half a minute a dialect:
tests/system/test_dialects.py, which has all of them, says which operators are missing."""


@dataclass
class Subject:
    """A model of a dialect, compiled; graphs are refused with an error.

    Attributes:
        executables, analyses: of every graph that Dynamo captured.
    """

    dialect: Dialect
    inner: Callable[..., Any] | None = eager_inner
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    executables: list[Executable] = field(default_factory=list)
    analyses: list[Analysis] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.dialect.build().to(self.device, self.dtype).eval()
        chosen = {} if self.inner is None else {"inner": self.inner}

        def backend(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
            options = {"mask_token_id": MASK, "strict": True, **PAPER}
            with mock.patch("focus_compile.backend.analyze", self._analyze):
                program = focus_backend(gm, inputs, options=options, **chosen)
            if isinstance(program, Executable):
                self.executables.append(program)
            return program

        self.compiled = torch.compile(self.model, backend=backend, dynamic=True, fullgraph=True)

    def _analyze(self, *given: Any) -> Analysis:
        self.analyses.append(analyze(*given))
        return self.analyses[-1]

    @torch.no_grad()
    def eager(self, draw: Draw) -> Tensor:
        return self.dialect.logits(self.model(**self.dialect.arguments(self.model, draw)))

    @torch.no_grad()
    def focus(self, draw: Draw) -> Tensor:
        """Logits of a call that must run prefix and suffix once, 0 where none were computed."""
        before = self.suffixes()
        out = self.dialect.logits(self.compiled(**self.dialect.arguments(self.model, draw)))
        assert self.suffixes() == before + 1
        return computed(out)

    def suffixes(self) -> int:
        return sum(program.suffix.calls for program in self.executables)


SubjectOf = Callable[[Dialect], Subject]
"""The fixture ``subject_of``: a dialect, compiled once for all tests of a module."""


def draw_call(dialect: Dialect, seed: int) -> Draw:
    """Another batch, length, history and share of masks for every seed.

    Those of seed 0 are no model's: where a call's first batch is as large as, say, its key heads,
    Dynamo takes the two for one size, its first graph serves that batch alone, and a second one is
    captured.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    batch, tokens = pick(2, 6), pick(7, 15)
    history = pick(dialect.least + 1, 20) if dialect.history else 0
    if seed == 0:
        batch, tokens, history = 5, 13, 17 if dialect.history else 0
    masked = torch.rand(batch, tokens, generator=generator) < 0.8
    masked[0] = True
    if pick(0, 3) == 0:
        masked[-1] = False
    ids = torch.randint(0, MASK, (batch, tokens), generator=generator).masked_fill(masked, MASK)
    visible = torch.rand(batch, tokens, history + tokens, generator=generator) < 0.9
    visible |= torch.eye(tokens, history + tokens, dtype=torch.bool).roll(history, 1)
    return Draw(ids, masked, visible, history, seed)
