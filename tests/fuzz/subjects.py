"""What is fuzzed: models of all dialects and a few of Qwen3's forms, their options open to change.

Sizes of some of them are equal on purpose: a batch may be as large as a head, a block as long.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import Qwen3ForCausalLM, StaticCache

from focus_compile import focus_backend
from focus_compile.runtime.ambient import _ENTERED
from focus_compile.runtime.executable import Executable
from tests.support.defaults import default
from tests.support.dialects import DIALECTS, Dialect, Draw, qwen3
from tests.support.harness import CACHE, MASK, PAPER, Call, Sizes, build_model, eager_inner
from tests.support.models.llada import LLaDA

SLOTS = 40
"""Of a cache of fixed length, whatever its history."""


@dataclass(frozen=True)
class RowDraw(Draw):
    """A call whose rows have seeds: a row's keys and values go with it wherever it stands."""

    rows: tuple[int, ...] = ()
    turns: Iterator[int] = field(init=False, repr=False, default_factory=itertools.count)

    def random(self, *shape: int) -> Tensor:
        """Other numbers at every turn, the same ones in every copy of the call."""
        turn = next(self.turns)
        made = []
        for row in self.rows:
            generator = torch.Generator().manual_seed(1_000_003 * row + turn)
            made.append(torch.randn(shape[1:], generator=generator))
        return torch.stack(made).to(self.dtype)


def _past(model: Qwen3ForCausalLM, draw: Draw) -> list[tuple[Tensor, Tensor]]:
    config = model.config
    shape = (len(draw.ids), config.num_key_value_heads, draw.history, config.head_dim)
    return [(draw.random(*shape), draw.random(*shape)) for _ in range(config.num_hidden_layers)]


def _qwen3(kind: str) -> Callable[[Any, Draw], dict[str, Any]]:
    """How a Qwen3 is called: ``bool``, ``float`` or ``shared`` mask, none, or without a cache."""

    def arguments(model: Qwen3ForCausalLM, draw: Draw) -> dict[str, Any]:
        (batch, tokens), visible = draw.ids.shape, draw.visible
        if kind == "shared":
            visible = visible[:1]
        if kind == "float":
            low = torch.finfo(torch.float32).min
            visible = draw.random(*visible.shape).masked_fill(~visible, low)
        positions = (draw.history + torch.arange(tokens)).expand(batch, tokens)
        past = None if kind == "uncached" else _past(model, draw)
        mask = None if kind == "unmasked" else visible
        return Call(draw.ids, draw.masked, positions, mask, past).kwargs(model)

    return arguments


def _static(model: Qwen3ForCausalLM, draw: Draw) -> dict[str, Any]:
    """A StaticCache whose number of slots never changes: the block moves on in it."""
    config, tokens = model.config, draw.ids.shape[1]
    past = _past(model, dataclasses.replace(draw, history=SLOTS))
    cache = StaticCache(config, max_cache_len=SLOTS)
    heads = config.num_key_value_heads
    cache.early_initialization(len(draw.ids), heads, config.head_dim, draw.dtype, draw.ids.device)
    for layer, (key, value) in enumerate(past):
        cache.update(key[:, :, : draw.history], value[:, :, : draw.history], layer)
    behind = SLOTS - draw.history - tokens
    visible = torch.nn.functional.pad(draw.visible, (0, behind)).unsqueeze(1)
    return {"input_ids": draw.ids, "attention_mask": visible, CACHE: cache}


def _dual(model: LLaDA, draw: Draw) -> dict[str, Any]:
    """Fast-dLLM's cache of the whole canvas, always as long."""
    shape = (len(draw.ids), model.groups, SLOTS, model.head)
    past = [(draw.random(*shape), draw.random(*shape)) for _ in range(model.layers)]
    places = draw.history + torch.arange(draw.ids.shape[1])
    return {"input_ids": draw.ids, "past_key_values": past, "replace_position": places}


def _form(kind: str, sizes: Sizes, history: bool = True) -> Dialect:
    return Dialect(
        lambda: build_model(sizes), _qwen3(kind), lambda out: out.logits, history=history, least=0
    )


SUBJECTS: dict[str, Dialect] = DIALECTS | {
    "qwen3": _form("bool", Sizes(layers=3)),
    "qwen3-two-layers": _form("bool", Sizes(layers=2, heads=4, groups=4, head_dim=4, hidden=16)),
    "qwen3-one-key-head": _form("bool", Sizes(layers=5, heads=3, groups=1, head_dim=8, hidden=8)),
    "qwen3-float": _form("float", Sizes(layers=3)),
    "qwen3-shared": _form("shared", Sizes(layers=3)),
    "qwen3-unmasked": _form("unmasked", Sizes(layers=3)),
    "qwen3-uncached": _form("uncached", Sizes(layers=3), history=False),
    "static-fixed": Dialect(lambda: qwen3("sdpa"), _static, lambda out: out.logits),
    "dual-fixed": Dialect(lambda: LLaDA(groups=2), _dual, lambda out: out.logits),
}


EDGES = ("qwen3", "llada", "dream-canvas")
"""Those that get batches of one row and empty histories too: each is captured anew."""
FIXED = ("static-fixed", "dual-fixed")


def outside(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function outside every session: in a thread, where no generator of ours runs."""
    context = contextvars.copy_context()  # Dynamo's configuration is in it
    context.run(_ENTERED.set, ())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(context.run, torch.no_grad()(function), *args).result()


@dataclass
class Subject:
    """A model of a dialect, eager and compiled; graphs are refused with an error.

    Attributes:
        part: makes a model of which a part is compiled: by default, all of it is.
        refusable: Dynamo may break the model into graphs, of which some, or all, are refused.
        biased: logits of an evicted token are the bias of a head that is not compiled.
        default: what the process sets for all of torch around calls of the compiled model.
    """

    dialect: Dialect
    part: Callable[[Any, Callable[[Any], Any]], Any] | None = None
    refusable: bool = False
    biased: bool = False
    default: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    executables: list[Executable] = field(default_factory=list)
    kinds: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.dialect.build().eval()

        def backend(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
            options = {"mask_token_id": MASK, "strict": not self.refusable, **PAPER, **self.options}
            program = focus_backend(gm, inputs, options=options, inner=eager_inner)
            if isinstance(program, Executable):
                self.executables.append(program)
            return program

        def compiled(model: Any) -> Any:
            whole = not self.refusable
            return torch.compile(model, backend=backend, dynamic=True, fullgraph=whole)

        self.compiled: Any = (self.part or _whole)(self.model, compiled)

    def configure(self, **options: Any) -> None:
        """Options that are inputs of the programs: nothing is compiled anew."""
        self.options = options
        for program in self.executables:
            program.config = dataclasses.replace(program.config, **options)

    def warm(self, draw: Draw) -> None:
        """Let Dynamo capture calls of this kind with sizes that all differ.

        It tells sizes apart by their values alone; and 0 and 1 are kinds of their own.
        """
        (batch, tokens), history = draw.ids.shape, draw.history
        kind = (min(batch, 2), min(tokens, 2), min(history, 2), *self.default.encode())
        if kind in self.kinds:
            return
        self.kinds.add(kind)
        batch, tokens, history = (
            size if size < 2 else other for size, other in ((batch, 3), (tokens, 5), (history, 7))
        )
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        visible = torch.ones(batch, tokens, history + tokens, dtype=torch.bool)
        plain = RowDraw(ids, ids == MASK, visible, history, 0, rows=tuple(range(batch)))
        outside(self.logits, self.compiled, plain)

    def logits(self, model: Any, draw: Draw) -> Tensor:
        """Of the eager or the compiled model, called with a cache of its own."""
        if model is self.compiled:
            self.warm(draw)
        arguments = self.dialect.arguments(self.model, dataclasses.replace(draw))
        with default(self.default if model is self.compiled else ""):
            return self.dialect.logits(model(**arguments))

    def suffixes(self) -> int:
        return sum(program.suffix.calls for program in self.executables)


def _whole(model: Any, compiled: Callable[[Any], Any]) -> Any:
    return compiled(model)


@functools.cache
def subject(name: str) -> Subject:
    """Compiled once, and used by all sequences."""
    return Subject(SUBJECTS[name])
