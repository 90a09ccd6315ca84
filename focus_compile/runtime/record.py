"""What became of a compiled model: graphs, masked calls that ran dense and why, compile time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from focus_compile.runtime.pace import Paces

__all__ = ["Record", "Status"]


@dataclass(frozen=True, repr=False)
class Status:
    """Of a model that :func:`focus_compile.compile` compiled, up to now.

    Attributes:
        graphs: that Dynamo captured with attention in them; applied: to how many FOCUS was applied.
        refusals: why it was not applied to others, and to how many.
        focus_calls: masked calls that ran prefix and suffix.
        masked_dense: why masked calls computed every token, and how many, as far as they are known.
        compile_seconds: spent in the backend and in the inner compiler, not in Dynamo.
        paces: with ``evict="auto"``, per batch class what was chosen, and what each program took.
    """

    graphs: int = 0
    applied: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    focus_calls: int = 0
    masked_dense: Mapping[str, int] = field(default_factory=dict)
    compile_seconds: float = 0.0
    paces: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        dense = "".join(f"; {count} dense: {why}" for why, count in self.masked_dense.items())
        paces = "".join(f"; {name}: {told}" for name, told in self.paces.items())
        refused = "".join(f"; refused: {why}" for why in self.refusals)
        return (
            f"FOCUS applied to {self.applied} of {self.graphs} graphs, {self.focus_calls} masked "
            f"calls{dense}{paces}{refused}; compiled for {self.compile_seconds:.1f} s"
        )


class Record:
    """What is counted of one compiled model, by whichever thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.masked_dense: Counter[str] = Counter()
        self.paces = Paces()
        self.seconds = 0.0

    def graph(self, refusal: str | None = None) -> None:
        with self.lock:
            self.counts["graphs"] += 1
            self.counts["applied"] += refusal is None
            self.refusals.update([] if refusal is None else [refusal])

    def focus_call(self) -> None:
        with self.lock:
            self.counts["focus_calls"] += 1

    def dense_call(self, why: str, count: int = 1) -> None:
        with self.lock:
            self.masked_dense[why] += count

    @contextmanager
    def compiling(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds += time.perf_counter() - start

    def status(self) -> Status:
        with self.lock:
            return Status(
                self.counts["graphs"],
                self.counts["applied"],
                dict(self.refusals),
                self.counts["focus_calls"],
                dict(self.masked_dense),
                self.seconds,
                self.paces.told(),
            )
