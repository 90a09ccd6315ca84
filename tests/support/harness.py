"""Small Qwen3 models, calls of a diffusion LLM, and compiled models whose programs are counted."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from focus_compile import focus_backend
from focus_compile.programs.program import Program
from focus_compile.runtime.ambient import current_session
from focus_compile.runtime.executable import Executable
from focus_compile.runtime.implicit import session_here

VOCAB, MASK = 61, 60
PAPER: dict[str, Any] = {"first_step": "evict", "rescue": None}
"""Options for what the references do, unless they are told of first steps and rescue."""
KNOWN = inspect.signature(Qwen3ForCausalLM.forward).parameters
CACHE = "cache" if "cache" in KNOWN else "past_key_values"
"""What the model calls its K/V cache, as argument and as output: transformers 5.24 renamed it."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; pairwise distinct unless a test wants them equal."""

    layers: int = 3
    heads: int = 6
    groups: int = 2
    head_dim: int = 16
    hidden: int = 40
    intermediate: int = 72


def build_model(
    sizes: Sizes = Sizes(),
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """Random weights, large enough that attention is peaked; bidirectional when given no mask."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        head_dim=sizes.head_dim,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model.to(dtype)


@dataclass(frozen=True)
class Call:
    """Arguments of one call.

    Attributes:
        ids: ``[B, T]``; masked: bool ``[B, T]``; positions: ``[B, T]``, or None: the model counts.
        visible: ``[B or 1, T, S + T]``, bool or additive, or None.
        past: per layer keys and values ``[B, G, S, D]``, or None for a call without a cache.
    """

    ids: Tensor
    masked: Tensor
    positions: Tensor | None
    visible: Tensor | None
    past: Sequence[tuple[Tensor, Tensor]] | None

    def kwargs(self, model: Qwen3ForCausalLM) -> dict[str, Any]:
        """Keyword arguments of the model, with a cache of their own."""
        mask = None if self.visible is None else self.visible[:, None]
        out: dict[str, Any] = {
            "input_ids": self.ids,
            "attention_mask": {"full_attention": None} if mask is None else mask,
            "use_cache": self.past is not None,
        }
        if self.positions is not None:
            out["position_ids"] = self.positions
        if self.past is not None:
            cache = DynamicCache(config=model.config)
            for layer, (key, value) in enumerate(self.past):
                if key.shape[2]:
                    cache.update(key.clone(), value.clone(), layer)
            out[CACHE] = cache
        return out

    def to(self, dtype: torch.dtype) -> Call:
        """The same call in another precision."""
        past = self.past and [(key.to(dtype), value.to(dtype)) for key, value in self.past]
        visible = self.visible
        if visible is not None and visible.dtype != torch.bool:
            hidden = visible == torch.finfo(visible.dtype).min
            visible = visible.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)
        return dataclasses.replace(self, past=past, visible=visible)


def random_visible(generator: torch.Generator, shape: tuple[int, int, int], kind: str) -> Tensor:
    """``[B or 1, T, S + T]``: a tenth of the keys hidden, every query sees itself."""
    batch, tokens, keys = shape
    batch = 1 if kind.endswith("shared") else batch
    visible = torch.rand(batch, tokens, keys, generator=generator) < 0.9
    visible |= torch.eye(tokens, keys, dtype=torch.bool).roll(keys - tokens, 1)
    if kind.startswith("bool"):
        return visible
    bias = torch.randn(visible.shape, generator=generator)
    return bias.masked_fill(~visible, torch.finfo(torch.float32).min)


def random_masked(generator: torch.Generator, batch: int, tokens: int) -> Tensor:
    """bool ``[B, T]``: another share of masked tokens in each row, at least three in the first."""
    share = torch.rand(batch, 1, generator=generator) * 0.8 + 0.2
    masked = torch.rand(batch, tokens, generator=generator) < share
    masked[0, torch.randperm(tokens, generator=generator)[:3]] = True
    return masked


def random_call(
    seed: int,
    model: Qwen3ForCausalLM,
    batch: int,
    tokens: int,
    history: int | None,
    mask: str | None = "bool",
    masked: Tensor | None = None,
) -> Call:
    """A call with ``history`` cached tokens; None: without a cache.

    mask: ``bool``, ``float``, ``bool shared``, ``float shared`` (one for all rows) or None.
    """
    generator = torch.Generator().manual_seed(seed)
    if masked is None:
        masked = random_masked(generator, batch, tokens)
    ids = torch.randint(0, MASK, (batch, tokens), generator=generator).masked_fill(masked, MASK)
    length = history or 0
    past = None
    if history is not None:
        config = model.config
        shape = (batch, config.num_key_value_heads, history, config.head_dim)
        past = [
            (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
            for _ in range(config.num_hidden_layers)
        ]
    visible = None
    if mask is not None:
        visible = random_visible(generator, (batch, tokens, length + tokens), mask)
    positions = (length + torch.arange(tokens)).expand(batch, tokens)
    return Call(ids, masked, positions, visible, past)


class Recorded:
    """A program that keeps what it was called with."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[str, Tensor] = {}

    @property
    def calls(self) -> int:
        return self.program.calls

    def __call__(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.values = dict(values)
        return self.program(values)


def eager_inner(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """An inner compiler that compiles nothing."""
    return graph


def without_inductor() -> contextlib.AbstractContextManager[object]:
    """The backend's programs run as the graphs that Inductor would get."""
    return mock.patch("focus_compile.backend.compile_fx", lambda graph, *_, **__: graph)


@contextlib.contextmanager
def halves_through_inductor() -> Iterator[list[GraphModule]]:
    """Prefix and suffix go through Inductor, and are listed; dense programs, plain Inductor's, do
    not."""

    def compile_halves(graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        if not any(isinstance(value, FakeTensor) for value in inputs):  # Dynamo gives real tensors
            return graph
        halves.append(graph)
        return compile_fx(graph, inputs, **options)

    halves: list[GraphModule] = []
    with mock.patch("focus_compile.backend.compile_fx", compile_halves):
        yield halves


@dataclass
class Run:
    """A model compiled with FOCUS, and what became of each graph that Dynamo captured.

    ``inner`` compiles the programs, Inductor if None. Graphs are refused with an error. Options are
    the paper's, unless others are given.
    """

    model: Qwen3ForCausalLM
    options: dict[str, Any] = field(default_factory=dict)
    inner: Callable[..., Any] | None = eager_inner
    dynamic: bool | None = None
    executables: list[Executable] = field(default_factory=list)

    def __post_init__(self) -> None:
        chosen = {} if self.inner is None else {"inner": self.inner}

        def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            options = {"mask_token_id": MASK, "strict": True, **PAPER, **self.options}
            program = focus_backend(gm, inputs, options=options, **chosen)
            if isinstance(program, Executable):
                self.executables.append(program)
            return program

        self.compiled = torch.compile(self.model, backend=backend, dynamic=self.dynamic)

    def counts(self) -> tuple[int, int, int]:
        """How often the dense program, the prefix and the suffix ran."""
        return (
            sum(program.dense_calls for program in self.executables),
            sum(program.prefix.calls for program in self.executables),
            sum(program.suffix.calls for program in self.executables),
        )

    @torch.no_grad()
    def logits(self, call: Call) -> Tensor:
        """Logits of a call that must run prefix and suffix once each, and nothing dense.

        In no session it is the first one of its thread: tests draw calls that belong to no loop.
        """
        if current_session() is None:
            session_here().reset()
        assert call.masked.any()
        dense, prefix, suffix = self.counts()
        logits = self.compiled(**call.kwargs(self.model)).logits
        assert self.counts() == (dense, prefix + 1, suffix + 1)
        return logits

    def program_of(self, call: Call) -> Executable:
        """The compiled graph that serves a call."""
        before = [program.prefix.calls for program in self.executables]
        self.logits(call)
        before += [0] * (len(self.executables) - len(before))
        (found,) = [
            program
            for program, calls in zip(self.executables, before, strict=True)
            if program.prefix.calls > calls
        ]
        return found

    def configure(self, **changes: Any) -> None:
        """Change options that are inputs of the programs, such as alpha, without recompiling."""
        self.options.update(changes)
        for program in self.executables:
            program.config = dataclasses.replace(program.config, **changes)


@torch.no_grad()
def eager_logits(model: Qwen3ForCausalLM, call: Call) -> Tensor:
    """Logits of the plain model."""
    return model(**call.kwargs(model)).logits


def retained(logits: Tensor) -> Tensor:
    """bool ``[B, T]``: an evicted token has logits of exactly zero, but for that of its own id."""
    return (logits != 0).sum(-1) > 1


def computed(logits: Tensor) -> Tensor:
    """Logits of retained tokens, 0 elsewhere."""
    return logits * retained(logits).unsqueeze(-1)


def bound(logits: Tensor) -> float:
    """Allowed absolute error of fp32: relative to the largest logit, or to 1."""
    return 1e-5 * max(1.0, logits.abs().max().item())
