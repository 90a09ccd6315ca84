"""docs/gpu/*.json and docs/gpu.md.j2 -> docs/gpu.md.

    python -m benchmarks.gpu.page

The limit by FLOPs of a row is the cost model's, read off a graph of the model's sizes; that takes
no GPU and, on the meta device, no memory.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from transformers import DynamicCache

import focus_compile
from benchmarks.gpu.generation import CONTESTANTS
from benchmarks.gpu.plan import ROOT, SHAPES
from benchmarks.gpu.steps import ROOFS, key
from benchmarks.shapes import RANDOM, build
from benchmarks.trace import BLOCK
from focus_compile.models.masks import cache_keyword

__all__ = ["DOCS", "Row", "rows", "text"]

DOCS = ROOT / "docs"
Row = dict[str, Any]
FEW = 3
"""Layers of the graph that costs are read off: all later ones cost the same."""


@functools.cache
def cost(model: str) -> focus_compile.Cost:
    """FLOPs and bytes of a denoising step of a model."""
    shape = SHAPES.get(model, model)
    made = build(shape, "meta", torch.bfloat16, layers=FEW)
    keyword, cache = cache_keyword(made), DynamicCache(config=made.config)
    ids = torch.zeros(2, 2 + BLOCK, dtype=torch.int64, device="meta")
    with torch.no_grad():
        made(input_ids=ids[:, :2], use_cache=True, **{keyword: cache})
    seen = ids.new_ones((2, 1, BLOCK, 2 + BLOCK), dtype=torch.bool)
    call = {"input_ids": ids[:, 2:], "attention_mask": seen, "use_cache": True, keyword: cache}
    (graph,) = focus_compile.explain(made, **call).graphs
    assert graph.cost is not None
    return graph.cost.of_layers(RANDOM[shape]["num_hidden_layers"])


def rows(report: Row) -> list[Row]:
    """Figures of each model and batch of ``steps``, contestants side by side."""
    cells, found = report["cells"], []
    places = {
        (cell["model"], cell["batch"]): None for cell in cells.values() if "contestant" in cell
    }
    for model, batch in places:
        done = {name: cells.get(key(model, batch, name), {}) for name in CONTESTANTS}
        row: Row = {"model": model, "batch": batch, "by": done}
        focus, dense = (done[name].get("tokens_per_s") for name in ("focus", "inductor"))
        row["ratio"] = focus / dense if focus and dense else None
        captured = done["focus, graphs"].get("tokens_per_s")
        row["ratio_graphs"] = captured / dense if captured and dense else None
        row |= _limits(model, batch, done["focus"], cells.get(ROOFS, {}))
        found.append(row)
    return found


def _limits(model: str, batch: int, focus: Row, roof: Row) -> Row:
    """By the cost model: the ratio that FLOPs allow, commit included; the roofs' ms of a step."""
    if "steps" not in focus:
        return {"limit": None, "roof_ms": {}}
    counted = []
    for count in (cost(model).flops, cost(model).bytes):
        pairs = list(zip(focus["fed_per_step"], focus["retained_per_step"], strict=True))
        works = [count(batch, BLOCK, focus["history"], *pair) for pair in pairs]
        commit = count(batch, BLOCK, focus["history"], 0, 0)[0]
        counted.append(([sum(work[n] for work in works) for n in range(2)], commit))
    ((flops, commit), (moved, _)) = counted
    limit = (flops[0] + commit) / (flops[1] + commit)
    if "flops_per_s" not in roof:
        return {"limit": limit, "roof_ms": {}}
    allowed = [
        1e3 * max(f / roof["flops_per_s"], b / roof["bytes_per_s"]) / focus["steps"]
        for f, b in zip(flops, moved, strict=True)
    ]
    return {"limit": limit, "roof_ms": dict(zip(("inductor", "focus"), allowed, strict=True))}


def failures(report: Row) -> list[tuple[str, str, str]]:
    """Cells that are no figures: name, outcome, last line of what was said."""
    return [
        (name, cell["outcome"], _last_line(cell.get("error", "")))
        for name, cell in report["cells"].items()
        if cell["outcome"] not in ("ok", "passed")
    ]


def outcomes(report: Row) -> dict[str, dict[str, int]]:
    """How many tests of each file ended in which way."""
    out: dict[str, dict[str, int]] = {}
    for name, cell in report["cells"].items():
        counts = out.setdefault(name.partition("::")[0], {})
        counts[cell["outcome"]] = counts.get(cell["outcome"], 0) + 1
    return out


def kinds(report: Row) -> list[str]:
    """Kinds of work in a profile, those that take longest first."""
    total: dict[str, float] = {}
    for cell in report["cells"].values():
        for name, ms in cell.get("ms_by_kind", {}).items():
            total[name] = total.get(name, 0.0) + ms
    return sorted(total, key=lambda name: -total[name])


def _last_line(told: str) -> str:
    lines = [line for line in told.splitlines() if line.strip()]
    return lines[-1][:160].replace("|", "/") if lines else ""


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def text(folder: Path) -> str:
    """The page, from the JSON files of a folder; those that lack are said to."""
    reports: dict[str, Row] = {
        stage: json.loads(file.read_text())
        for stage in ("numbers", "steps", "profile", "compile")
        if (file := folder / f"{stage}.json").exists()
    }
    seen = {report["machine"].get("device", "?") for report in reports.values()} - {"cpu"}
    template = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string((DOCS / "gpu.md.j2").read_text())
    return template.render(
        reports=reports,
        gpus=sorted(seen),
        rows=rows(reports["steps"]) if "steps" in reports else [],
        contestants=CONTESTANTS,
        roof=reports.get("steps", {"cells": {}})["cells"].get(ROOFS, {}),
        failures=failures,
        outcomes=outcomes,
        kinds=kinds,
        number=number,
    )


if __name__ == "__main__":
    (DOCS / "gpu.md").write_text(text(DOCS / "gpu"))
