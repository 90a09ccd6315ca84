"""Edges at which real scripts live: what the backend is given is not the whole model, or more.

A part of a model compiled, outputs beside the logits, graph breaks at any place, other default
dtypes, streams that take turns. Each is held against the same oracle as all else; where FOCUS is
not applied, the call must give what the model gives.
"""

from __future__ import annotations

import contextvars
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.fuzz.oracle import quick_importance
from tests.fuzz.plan import EVENTS, Plan
from tests.fuzz.play import NearTie, Player
from tests.fuzz.subjects import SUBJECTS, Subject
from tests.reference import algorithm
from tests.support.dialects import DIALECTS, Dialect
from tests.support.models.llada import LLaDA

LAYERS = 3
PLACES = range(LAYERS + 3)
"""Of a graph break: before the embedding, after each layer, before the head and after it."""
LOUD = ("interrupt", "crash", "evicted", "grow", "misshape", "gate")
QUIET = tuple(name for name in EVENTS if name not in LOUD)
"""Events that a graph which is left unchanged takes as well as FOCUS's programs do."""


class Scored(NamedTuple):
    """What public models return beside logits: some before them, some after."""

    hidden: Tensor
    logits: Tensor
    confidence: Tensor
    value: Tensor


class Scoring(LLaDA):
    """A LLaDA that tells how sure it is, and what it thinks the text is worth."""

    def __init__(self) -> None:
        super().__init__(groups=2, layers=LAYERS)
        self.value = nn.Linear(48, 1)

    def forward(self, input_ids: Tensor) -> Scored:  # type: ignore[override]
        found = super().forward(input_ids, output_hidden_states=True)
        assert found.hidden_states is not None
        hidden = found.hidden_states[-1]
        confidence = torch.softmax(found.logits, -1).amax(-1)
        return Scored(hidden, found.logits, confidence, self.value(hidden))


class Broken(LLaDA):
    """A LLaDA whose forward Dynamo breaks into several graphs, at one of :data:`PLACES`."""

    def __init__(self, place: int, bias: bool) -> None:
        super().__init__(groups=2, layers=LAYERS)
        self.place = place
        if bias:
            self.ff_out = nn.Linear(48, 61)

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        if self.place == 0:
            torch._dynamo.graph_break()
        x = self.wte(input_ids)
        for index, block in enumerate(self.blocks):
            x, _ = block(x, None, None)
            if self.place == index + 1:
                torch._dynamo.graph_break()
        x = self.ln_f(x)
        if self.place == LAYERS + 1:
            torch._dynamo.graph_break()
        assert self.ff_out is not None
        logits = self.ff_out(x)
        if self.place == LAYERS + 2:
            torch._dynamo.graph_break()
        return logits * 1.0


def _broken(place: int, bias: bool = False) -> Callable[[], Subject]:
    dialect = Dialect(
        lambda: Broken(place, bias),
        lambda _, draw: {"input_ids": draw.ids},
        lambda out: out,
        history=False,
    )
    return lambda: Subject(dialect, refusable=True, biased=bias)


def body(model: Any, compiled: Callable[[Any], Any]) -> Any:
    """The same model, of which all but the head is compiled."""
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made.model = compiled(model.model)
    return made


def _scoring() -> Subject:
    dialect = Dialect(
        Scoring, lambda _, draw: {"input_ids": draw.ids}, lambda out: out.logits, history=False
    )
    return Subject(dialect)


EDGE_SUBJECTS: dict[str, Callable[[], Subject]] = {
    "part": lambda: Subject(SUBJECTS["qwen3-uncached"], part=body),
    "part-cached": lambda: Subject(SUBJECTS["qwen3"], part=body),
    "scoring": _scoring,
    **{f"break-{place}": _broken(place) for place in PLACES},
    **{f"break-{place}-bias": _broken(place, bias=True) for place in PLACES},
    **{
        f"default-{name}": functools.partial(Subject, SUBJECTS["qwen3-uncached"], default=name)
        for name in ("bf16", "fp16", "fp64", "meta")
    },
    "streams": lambda: Subject(SUBJECTS["qwen3-uncached"]),
    "streams-canvas": lambda: Subject(DIALECTS["llada-canvas"]),
}


@functools.cache
def edge_subject(name: str) -> Subject:
    """Compiled once, and used by all sequences."""
    return EDGE_SUBJECTS[name]()


def events_of(name: str) -> tuple[str, ...]:
    return QUIET if name.startswith("break") else EVENTS


def play_streams(
    subject: Subject, plans: list[Plan], turns: Iterator[int], threads: int, tally: Counter[str]
) -> None:
    """Sequences that are advanced in turn, in one thread or in any of several.

    Each is a generator that enters its session, as a server's stream of tokens does. Each must
    give what it gives alone.
    """
    streams = [Player(subject, plan, tally).stream() for plan in plans]
    tally["streams"] += len(streams)
    with (
        patch.object(algorithm, "importance", quick_importance),
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(1) as two,
    ):
        places = [None, one, two][: threads + 1]
        while streams:
            turn = next(turns)
            stream, place = streams[turn % len(streams)], places[turn // 7 % len(places)]
            if not _advance(stream, place, tally):
                streams.remove(stream)


def _advance(stream: Iterator[None], place: ThreadPoolExecutor | None, tally: Counter[str]) -> bool:
    """One turn of a stream, here or in a thread; whether it goes on."""
    over = object()
    try:
        if place is None:
            return next(stream, over) is not over
        tally["turns in threads"] += 1
        context = contextvars.copy_context()  # Dynamo's configuration is in it
        return place.submit(context.run, next, stream, over).result() is not over
    except NearTie:
        tally["ties"] += 1
        return False
