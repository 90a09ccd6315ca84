"""Pictures of docs/performance.md, quality.md and protocol.md, from the records that these are of.

    python -m docs.pictures

Needs matplotlib (extra ``plots``), whose releases draw differently: no test compares the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from docs.protocol import cost, dense_of, lost

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


def pareto(rows: list[dict[str, Any]], picture: Path) -> None:
    """Answers lost against cost, and the contestants that no other beats in both."""
    places = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    models = list(dict.fromkeys(model for model, _ in places))
    columns = len(places) // len(models)
    figure, grid = plt.subplots(
        len(models), columns, figsize=(4.6 * columns, 3.6 * len(models)), layout="constrained"
    )
    for panel, place in zip(grid.flat, places, strict=True):
        mine = [row for row in rows if (row["model"], row["task"]) == place]
        plain = next(row for row in mine if row["name"] == "dense")
        usual = [row for row in mine if dense_of(row, rows) is plain]
        found = [(cost(row, plain), lost(row, plain)) for row in usual]
        for factor in dict.fromkeys(row["factor"] for row in usual):
            points = [at for at, row in zip(found, usual, strict=True) if row["factor"] == factor]
            panel.plot(*zip(*points, strict=True), "o", label=factor, alpha=0.7, markersize=4)
        for at in dict.fromkeys((round(spent, 2), gone) for spent, gone in found):
            if not any(_beats((round(spent, 2), gone), at) for spent, gone in found):
                panel.annotate(_names(at, found, usual), at, (4, 8), textcoords="offset points")
        panel.set_title(", ".join(place))
        panel.set_yscale("symlog", linthresh=1)
        panel.set_ylim(-0.2, 1000)
        panel.set_xlim(0.25, 1.7)
        panel.set_xlabel("cost over dense's")
    grid.flat[0].set_ylabel("answers lost")
    grid.flat[0].legend(fontsize=6)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _names(at: tuple[float, int], found: list[Any], rows: list[dict[str, Any]]) -> str:
    """Contestants at a place, the first of them by name."""
    here = [
        row["name"]
        for (spent, gone), row in zip(found, rows, strict=True)
        if (round(spent, 2), gone) == at
    ]
    return here[0] + (f" (+{len(here) - 1})" if here[1:] else "")


def _beats(one: tuple[float, int], other: tuple[float, int]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def main() -> None:
    """Draw all of them anew."""
    mpl.use("Agg")
    scaling(json.loads((DOCS / "scaling.json").read_text()), DOCS / "performance_scaling.png")
    pareto(json.loads((DOCS / "protocol.json").read_text())["rows"], DOCS / "protocol.png")
    rows = json.loads((DOCS / "quality.json").read_text())["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        mine = [row for row in rows if row["checkpoint"] == checkpoint]
        mine.sort(key=lambda row: tasks.index(row["task"]))
        quality(mine, tasks, DOCS / f"quality_{checkpoint}.png")


if __name__ == "__main__":
    main()
