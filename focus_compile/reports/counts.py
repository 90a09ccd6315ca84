"""The sizes of a step that a report is about, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ASSUMED", "Counts", "counts_of"]

ASSUMED: Mapping[str, float] = {
    "batch": 16,
    "block": 32,
    "history": 64,
    "fed": 1.0,
    "retained": 0.15,
}
"""Sizes that neither options nor a trace say; ``fed`` and ``retained`` are shares."""


@dataclass(frozen=True)
class Counts:
    """Sizes of a step; ``tokens`` of the batch, of which ``fed`` and ``retained`` are computed.

    ``origins``: by name, ``"given"``, ``"from the trace"`` or ``"assumed"``.
    """

    batch: int
    block: int
    history: int
    fed: int
    retained: int
    origins: Mapping[str, str]

    @property
    def tokens(self) -> int:
        return self.batch * self.block

    @property
    def assumed(self) -> list[str]:
        """Names of what was assumed."""
        return [name for name, origin in self.origins.items() if origin == "assumed"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``{name: {"value": number, "origin": text}}``."""
        values = {name: getattr(self, name) for name in ASSUMED}
        return {
            name: {"value": value, "origin": self.origins[name]} for name, value in values.items()
        }


def counts_of(options: Mapping[str, float | None], trace: Mapping[str, Any] | None) -> Counts:
    """What ``options`` say, or else what a trace shows, or else :data:`ASSUMED`.

    Args:
        options: by the names of :data:`ASSUMED`, None where it is not; trace: one that
            :func:`focus_compile.reports.heatmap.grids` accepts.

    Raises:
        ValueError: more is retained than fed.
    """
    traced = {} if trace is None else dict(_traced(trace))
    values, origins = dict[str, float](), dict[str, str]()
    for name, default in ASSUMED.items():
        assumed = min(default, values["fed"]) if name == "retained" else default
        candidates = (
            ("given", options[name]),
            ("from the trace", traced.get(name)),
            ("assumed", assumed),
        )
        for origin, value in reversed(candidates):
            if value is not None:
                origins[name], values[name] = origin, value
    fed, retained = values["fed"], values["retained"]
    if not 0 <= retained <= fed <= 1:
        raise ValueError(f"retained {retained} and fed {fed}: expected 0 <= retained <= fed <= 1")
    batch, block, history = (round(values[name]) for name in ("batch", "block", "history"))
    tokens = batch * block
    return Counts(batch, block, history, round(fed * tokens), round(retained * tokens), origins)


def _traced(trace: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Means over the steps of a trace; masked tokens are fed, and what is retained is."""
    rows, length, steps = trace["rows"], trace["block_length"], trace["steps"]
    yield "batch", rows
    yield "block", length
    if not steps:
        return
    canvas = rows * length * len(steps)
    retained = [cell for step in steps for row in step["retained"] for cell in row]
    masked = [cell for step in steps for row in step["masked"] for cell in row]
    yield "fed", sum(map(max, masked, retained)) / canvas
    yield "retained", sum(retained) / canvas
    prompt = trace.get("history")
    if isinstance(prompt, int):
        blocks = sum(step["block"] for step in steps) / len(steps)
        yield "history", prompt + length * blocks if prompt else 0
