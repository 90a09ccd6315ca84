"""docs/quality.json -> docs/quality.md and docs/quality.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"

HEAD = """# Quality on the tiny model

Written by `benchmarks/quality_page.py` from `quality.json`; measured by `benchmarks/quality.py`.

{n} prompts per task, batch {batch}, confidence threshold {threshold} for every contestant,
{dtype}, {threads} thread(s), torch {torch}, transformers {transformers}, CPU, Inductor. "Dense" is
the eager model. Fed and retained are shares of the block's tokens over all denoising forwards, rows
that wait for others included. The paper's setting is alpha 1.5, visibility prefix; ours is alpha
1.5, visibility written.

![exact match against retained tokens](quality.png)

| task | contestant | exact match | steps per block | decoded per step | fed | retained |
|---|---|---|---|---|---|---|
"""

WITHIN, STEPS = 0.01, 1.15


def _line(row: dict[str, Any]) -> str:
    cells = [
        row["task"],
        row["contestant"],
        f"{row['exact_match']:.3f}",
        f"{row['steps_per_block']:.2f}",
        f"{row['decoded_per_step']:.2f}",
        f"{row['fed_fraction']:.1%}",
        f"{row['retained_fraction']:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def _goal(rows: list[dict[str, Any]], task: str) -> str:
    """Which settings stay within one point of dense, in at most 1.15 times its steps."""
    mine = [row for row in rows if row["task"] == task]
    (dense,) = [row for row in mine if row["contestant"] == "dense"]
    good = [
        row["contestant"]
        for row in mine
        if row["alpha"] is not None
        and row["exact_match"] >= dense["exact_match"] - WITHIN
        and row["steps_per_block"] <= STEPS * dense["steps_per_block"]
    ]
    return f"- `{task}`: {'; '.join(good) or 'none'}."


def _plot(rows: list[dict[str, Any]], tasks: list[str]) -> None:
    mpl.use("Agg")
    figure, panels = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.4), sharey=True)
    for panel, task in zip(panels, tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for visibility, mark in (("written", "o-"), ("prefix", "s--")):
            line = [row for row in mine if row["visibility"] == visibility]
            xs = [row["retained_fraction"] for row in line]
            ys = [row["exact_match"] for row in line]
            panel.plot(xs, ys, mark, label=f"visibility {visibility}")
            for row in line:
                at = (row["retained_fraction"], row["exact_match"])
                panel.annotate(f"{row['alpha']:g}", at, fontsize=7)
        for row in mine:
            if row["contestant"] == "dense":
                panel.axhline(row["exact_match"], color="grey", linewidth=1, label="dense")
            elif row["alpha"] is None:
                label = row["contestant"].rpartition(", ")[2]
                panel.plot(row["retained_fraction"], row["exact_match"], "x", label=label)
        panel.set_title(task)
        panel.set_xlabel("retained tokens, share of the block")
    panels[0].set_ylabel("exact match (numbers: alpha)")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(DOCS / "quality.png", dpi=110)


def main() -> None:
    """Write the page."""
    report: dict[str, Any] = json.loads((DOCS / "quality.json").read_text())
    tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
    rows = sorted(report["rows"], key=lambda row: tasks.index(row["task"]))
    _plot(rows, tasks)
    lines = [_line(row) for row in rows]
    page = HEAD.format(**report) + "\n".join(lines) + "\n\n"
    page += "Within one point of dense's exact match and 1.15 times its steps per block:\n\n"
    page += "\n".join(_goal(rows, task) for task in tasks) + "\n"
    (DOCS / "quality.md").write_text(page)


if __name__ == "__main__":
    main()
