"""docs/scaling.json, docs/quality.json -> the pictures of docs/performance.md and quality.md.

    python -m docs.pictures

Needs matplotlib (extra ``plots``), whose releases draw differently: no test compares the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent


def scaling(report: dict[str, Any], picture: Path) -> None:
    """Seconds per step against each size, dense and with FOCUS."""
    figure, axes = plt.subplots(1, len(report["curves"]), figsize=(13, 3), layout="constrained")
    for axis, (name, curve) in zip(axes, report["curves"].items(), strict=True):
        axis.plot(curve["sizes"], curve["dense_s"], "s--", label="dense")
        axis.plot(curve["sizes"], curve["focus_s"], "o-", label="focus")
        axis.set_xlabel("retained tokens" if name == "kept" else name)
        axis.set_ylim(0)
    axes[0].set_ylabel("seconds per step")
    axes[0].legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def quality(rows: list[dict[str, Any]], tasks: list[str], picture: Path) -> None:
    """Exact match of each task against the share of retained tokens, alpha by alpha."""
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
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw all of them anew."""
    mpl.use("Agg")
    scaling(json.loads((DOCS / "scaling.json").read_text()), DOCS / "performance_scaling.png")
    rows = json.loads((DOCS / "quality.json").read_text())["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        mine = [row for row in rows if row["checkpoint"] == checkpoint]
        mine.sort(key=lambda row: tasks.index(row["task"]))
        quality(mine, tasks, DOCS / f"quality_{checkpoint}.png")


if __name__ == "__main__":
    main()
