"""Artifacts of a compilation in PyTorch's structured trace: ``TORCH_TRACE=dir``, ``tlparse dir``.

``focus_before``: the canonical graph; ``focus_plan``: what was found in it; ``focus_after``: the
graph after all passes; ``focus_refusals``: why a graph was left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from torch.fx import GraphModule

from focus_compile.analysis import Analysis
from focus_compile.errors import Unsupported
from focus_compile.torch_private import trace_structured
from focus_compile.views.describe import code, describe, legend

__all__ = ["trace_analysis", "trace_refusal"]


def trace_analysis(analysis: Analysis) -> None:
    """Write what was made of a graph, if a trace is being taken; else nothing is computed."""
    _artifact("focus_before", "string", lambda: _code(analysis.canonical.gm))
    _artifact("focus_plan", "json", lambda: json.dumps(describe(analysis), indent=1))
    _artifact("focus_after", "string", lambda: _code(analysis.stages[-1][1]))


def trace_refusal(refusal: Unsupported) -> None:
    """Write why a graph was refused, if a trace is being taken."""
    _artifact("focus_refusals", "json", lambda: json.dumps(refusal.to_dict(), indent=1))


def _code(gm: GraphModule) -> str:
    python = code(gm)
    return legend(python) + python


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
    )
