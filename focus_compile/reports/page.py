"""An explanation as one HTML file that needs nothing else: no server, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from focus_compile.analysis import Analysis
from focus_compile.calibration.replay import LETTERS
from focus_compile.graph.sizes import GENERIC
from focus_compile.reports.counts import Counts, counts_of
from focus_compile.reports.curves import Curve, curves, svg
from focus_compile.reports.explanation import Explanation, GraphReport
from focus_compile.reports.heatmap import CELLS, grids
from focus_compile.reports.signals import HEADS, rankings
from focus_compile.views.cost import BATCH, FED, HISTORY, RETAINED, TOKENS, Cost
from focus_compile.views.describe import describe, difference
from focus_compile.views.dot import AFTER, BEFORE, dot

__all__ = ["page"]

SCRIPTS = ("vendor/viz-global.js", "vendor/svg-pan-zoom.min.js", "page.js")


@dataclass(frozen=True)
class Stage:
    """One bar of the funnel: what is computed, for how many tokens, of which domain."""

    name: str
    tokens: int
    domain: str


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step, (dense, focus); curves of a ratio; ``drawing``: SVG, or None."""

    flops: tuple[int, int]
    bytes: tuple[int, int]
    ratio: float
    curves: tuple[Curve, ...]
    drawing: str | None


@dataclass(frozen=True)
class Applied:
    """What there is to see of a graph that FOCUS was applied to.

    ``before`` and ``after`` are DOT text; ``difference`` holds lines with their class; ``work`` is
    None where FLOPs depend on sizes that the page is not told.
    """

    description: dict[str, Any]
    funnel: tuple[Stage, ...]
    before: str
    after: str
    difference: tuple[tuple[str, str], ...]
    cost: Cost
    work: Work | None


@dataclass(frozen=True)
class Section:
    """One graph. ``suffix`` keeps ids apart: the first that is applied has none."""

    index: int
    suffix: str
    report: GraphReport
    applied: Applied | None


def page(
    explanation: Explanation,
    title: str,
    trace: Mapping[str, Any] | None = None,
    *,
    batch: int | None = None,
    block: int | None = None,
    history: int | None = None,
    fed: float | None = None,
    retained: float | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """HTML text of the report.

    Args:
        explanation: from :func:`focus_compile.explain`.
        trace: of a generation, for the heat map: see :func:`focus_compile.reports.heatmap.grids`.
        batch, block, history: sizes of the step whose cost is told; fed, retained: shares of its
            tokens, from 0 to 1. What is None is read off the trace, or else assumed, and the page
            says so: see :mod:`focus_compile.reports.counts`.
        calibration: of the model, for a table and a picture of each signal.

    Raises:
        ValueError: trace or calibration are malformed, or more is retained than fed.
    """
    heat = None if trace is None else grids(trace)
    options = {"batch": batch, "block": block, "history": history, "fed": fed, "retained": retained}
    counts = counts_of(options, trace)
    environment = Environment(
        loader=PackageLoader("focus_compile.reports", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        explanation=explanation,
        sections=list(_sections(explanation, counts)),
        counts=counts,
        primes=GENERIC,
        legends={
            "before": BEFORE,
            "after": AFTER,
            "cells": CELLS,
            "signals": dict(LETTERS.values()),
        },
        grids=heat,
        rankings=None if calibration is None else rankings(calibration),
        ranking_heads=HEADS,
        calibration=calibration,
        style=Markup(_asset("page.css")),  # ours, like the scripts: nothing of a model is in them
        scripts=[Markup(_asset(name)) for name in SCRIPTS],
    )


def _asset(name: str) -> str:
    folder = resources.files("focus_compile.reports")
    return folder.joinpath("assets", name).read_text(encoding="utf-8")


def _sections(explanation: Explanation, counts: Counts) -> Iterator[Section]:
    unsuffixed = True
    for index, report in enumerate(explanation.graphs):
        applied = None
        if report.analysis is not None and report.cost is not None:
            applied = _applied(report.analysis, report.cost, counts)
        yield Section(index, "" if applied and unsuffixed else f"-{index}", report, applied)
        unsuffixed = unsuffixed and applied is None


def _applied(analysis: Analysis, cost: Cost, counts: Counts) -> Applied:
    return Applied(
        description=describe(analysis),
        funnel=tuple(_funnel(len(analysis.plan.sites), counts)),
        before=dot(analysis, after=False),
        after=dot(analysis, after=True),
        difference=tuple(_lines(difference(analysis))),
        cost=cost,
        work=_work(cost, counts),
    )


def _funnel(layers: int, counts: Counts) -> Iterator[Stage]:
    yield Stage("layer 0", counts.fed, "fed")
    yield Stage("layer 1: q, k, v", counts.fed, "fed")
    yield Stage("layer 1: the rest", counts.retained, "retained")
    for layer in range(2, layers):
        yield Stage(f"layer {layer}", counts.retained, "retained")
    yield Stage("logits", counts.retained, "retained")


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Lines of a unified diff with their class."""
    for line in text.splitlines():
        if line.startswith(("---", "+++", "@@")):
            yield "hunk", line
        else:
            yield {"+": "added", "-": "removed"}.get(line[:1], "same"), line


def _work(cost: Cost, counts: Counts) -> Work | None:
    sizes = {BATCH, TOKENS, HISTORY, FED, RETAINED}
    if not cost.dense.free_symbols | cost.focus.free_symbols <= sizes:
        return None
    shape = (counts.batch, counts.block, counts.history)
    step = (*shape, counts.fed, counts.retained)
    drawn = curves(cost, *shape, counts.fed / counts.tokens, counts.retained / counts.tokens)
    drawing = svg(drawn)
    return Work(
        flops=cost.flops(*step),
        bytes=cost.bytes(*step),
        ratio=float(cost.speedup(*step)),
        curves=drawn,
        drawing=None if drawing is None else Markup(drawing),
    )
