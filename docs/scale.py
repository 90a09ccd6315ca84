"""docs/scale.json and scale.md.j2 -> docs/scale.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

DOCS = Path(__file__).resolve().parent
COLUMNS = {"seconds": 0, "first_batch_s": 0, "prompts_per_s": 1}
"""Figures of a run, and how many digits of them are shown."""


def table(report: dict[str, Any]) -> Iterator[list[str]]:
    """Medians, and ranges, of one and two workers with an empty and a full cache."""
    for name, runs in report["runs"].items():
        workers, state = name.split()
        cells = [workers, {"cold": "empty", "warm": "full"}[state]]
        for key, digits in COLUMNS.items():
            values = [run[key] for run in runs]
            figures = (report["median"][name][key], min(values), max(values))
            cells.append("{} ({}-{})".format(*(f"{figure:.{digits}f}" for figure in figures)))
        yield cells


def text() -> str:
    """The page.

    Raises:
        ValueError: the runs did not write the same answers.
    """
    report = json.loads((DOCS / "scale.json").read_text())
    if not report["equal"]:
        raise ValueError("the runs wrote different answers")
    middle = report["median"]
    source = (DOCS / "scale.md.j2").read_text()
    template = Environment(
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    ).from_string(source)
    return template.render(
        report=report,
        table=table(report),
        cost=report["cost"],
        steady=middle["2 warm"]["prompts_per_s"] / middle["1 warm"]["prompts_per_s"],
        whole=middle["1 warm"]["seconds"] / middle["2 warm"]["seconds"],
        percent="{:.0%}".format,
    )
