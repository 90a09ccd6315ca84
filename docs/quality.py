"""docs/quality.json, docs/safeguards.json -> docs/quality.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent

HEAD = """# Quality on the tiny models

Written by `python -m docs.build` from `quality.json` and `safeguards.json`; measured by
`python -m benchmarks.quality`.

{n} prompts per task, batch {batch}, confidence threshold {threshold} for every contestant,
{dtype}, {threads} thread(s), torch {torch}, transformers {transformers}, CPU, Inductor. "Dense" is
the eager model. Fed and retained are shares of the block's tokens over all denoising forwards, rows
that wait for others included. The paper's setting is alpha 1.5, visibility prefix; ours is alpha
1.5, visibility written. FOCUS runs in the paper's way, `first_step="evict"`, `rescue=None`, but for
*What `generate` does by default*.

Two checkpoints ([model card](../examples/tiny_dllm/README.md)). `checkpoint` was trained to answer
and nothing else; on it the importance delta does not point at the tokens that can be decoded.
`aligned_checkpoint` is the same model after 50 more steps with a loss on the delta. It shows that
the implementation does what the method says **where the method's premise holds**; it is no evidence
that the premise holds for a model that nobody aligned.
"""

DEFAULTS = """
## What `generate` does by default

With rescue and an open first step ([calibration.md](calibration.md)), beside dense and the paper's
way, at alpha 1.5. {n} prompts per task, batch {batch}, commit {commit}, {cpu}, {threads} threads,
torch {torch}, transformers {transformers}. Row-steps: steps of rows that were not complete.
Rescued: of these, those in which evicted tokens were computed after all.

| checkpoint | task | contestant | exact match | row-steps | fed | retained | rescued |
|---|---|---|---|---|---|---|---|
"""

TABLE = """
## {checkpoint}

![exact match against retained tokens]({picture})

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


def _defaults() -> str:
    """What the safeguards do, from a record of their own."""
    report: dict[str, Any] = json.loads((DOCS / "safeguards.json").read_text())
    rows = sorted(report["rows"], key=lambda row: (row["checkpoint"], row["task"]))
    lines = [
        f"| {row['checkpoint']} | {row['task']} | {row['contestant']} | {row['exact_match']:.3f} "
        f"| {row['row_steps']} | {row['fed_fraction']:.1%} | {row['retained_fraction']:.1%} "
        f"| {row['rescued_rows']} |\n"
        for row in rows
    ]
    return DEFAULTS.format(**report) + "".join(lines)


def text() -> str:
    """The page."""
    report: dict[str, Any] = json.loads((DOCS / "quality.json").read_text())
    tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
    page = HEAD.format(**report) + _defaults()
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["checkpoint"] == checkpoint]
        rows.sort(key=lambda row: tasks.index(row["task"]))
        page += TABLE.format(checkpoint=checkpoint, picture=f"quality_{checkpoint}.png")
        page += "\n".join(_line(row) for row in rows)
        page += (
            "\n\nWithin one point of dense's exact match and 1.15 times its steps per block:\n\n"
        )
        page += "\n".join(_goal(rows, task) for task in tasks) + "\n"
    return page
