"""docs/protocol.json -> docs/protocol.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from focus_compile.intervals import wilson

DOCS = Path(__file__).resolve().parent
Row = dict[str, Any]

HEAD = """# Answers lost and won, one factor at a time

Written by `python -m docs.build` from `protocol.json`; measured by `python -m benchmarks.protocol`.

Around the defaults of `generate`: delta, alpha 1.5, rescue at the threshold, `first_step="auto"`.
{n} prompts per task, batch {batch}, threshold {threshold}, block {block}, fp32, torch {torch},
transformers {transformers}, {cpu}, {threads} thread(s), commits {commits}. bf16: a quarter of the
prompts.
Both [toys](../examples/tiny_dllm/README.md): `natural` is `checkpoint`, `aligned` is
`aligned_checkpoint`.

- **exact**: answers that are right, with its 95 % interval (Wilson).
- **lost**, **won**: dense was right and this wrong, and the other way round. Dense has the same
  logits and dtype.
- **evicting**: steps of rows in which a masked token was evicted. **rescued**: those in which
  evicted tokens were computed after all.
- **steps**, **cost**: over dense's. Cost counts token-layers of denoising,
  `2 fed + (L - 2) retained`; rows that are complete and commits are left out.

![answers lost against cost](protocol.png)

By `python -m docs.pictures`; fp32, undivided logits. Contestants that no other beats in both have
their names.
"""

SUMMARY = """
## Every signal, with rescue

Answers lost of all {answers} that dense had right ({where}); lost on pairs of model and task
with at least 200 evicting steps; the range of cost on these.

| signal | first step | lost | upper bound (95 %) | lost where it evicts | cost where it evicts |
|---|---|---|---|---|---|
"""

FIT = """
## What `calibrate` picks

Of {fit} prompts that are not among those measured. "Best": the cheapest contestant above that lost
nothing, its cost over dense's.

| model | task | picked | predicted | measured | lost | best |
|---|---|---|---|---|---|---|
"""

SPEED = """
## What it costs in time

Times faster than plain Inductor, median (least to most) of {pairs} turns; batch {batch},
{threads} threads, {dtype}, {cpu}, torch {torch}, commits {commits}, by
`python -m benchmarks.protocol_speed`. These models have eight layers of width 128: what FOCUS saves
is little, and the time of small operators counts ([performance.md](performance.md) has larger
sizes). The machine is shared: a difference of a tenth is none.

| model | task | {names} |
|---|---|{rules}
"""

TABLE = """
## {model}, {task}

| varied | contestant | exact | lost | won | evicting | rescued | steps | cost |
|---|---|---|---|---|---|---|---|---|
"""
EVICTING = 200
"""Steps of rows below which a pair says little of a signal."""


def text() -> str:
    """The page."""
    report: Row = json.loads((DOCS / "protocol.json").read_text())
    rows: list[Row] = report["rows"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    page = HEAD.format(**report, commits=commits) + _summary(rows) + _fits(rows) + _speed()
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        page += TABLE.format(model=model, task=task)
        mine = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        page += "".join(map(_line, mine, [dense_of(row, rows) for row in mine]))
    return page


def _speed() -> str:
    """The table of times, from a record of its own."""
    report: Row = json.loads((DOCS / "protocol_speed.json").read_text())
    rows: list[Row] = report["rows"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    names = [name for name, found in rows[0].items() if isinstance(found, dict)][1:]
    told = {"names": " | ".join(names), "rules": "---|" * len(names), "commits": commits}
    page = SPEED.format(**report, **told)
    for row in rows:
        cells = [
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**row[name]["ratio"]) for name in names
        ]
        page += "| " + " | ".join([row["model"], row["task"], *cells]) + " |\n"
    return page


def dense_of(row: Row, rows: Iterable[Row]) -> Row:
    """What a contestant is compared with: dense, of the same logits and dtype."""
    _, _, kind = row["name"].partition(", ")
    name = f"dense, {kind}" if kind in ("logits / 2", "bf16") else "dense"
    same = (row["model"], row["task"], name)
    (found,) = (each for each in rows if (each["model"], each["task"], each["name"]) == same)
    return found


def lost(row: Row, dense: Row) -> int:
    """Answers that dense had right and this contestant had not."""
    return len({*row["wrong"]} - {*dense["wrong"]})


def cost(row: Row, dense: Row) -> float:
    """Token-layers over dense's."""
    return float(row["cost"] / dense["cost"])


def _line(row: Row, dense: Row) -> str:
    right = row["n"] - len(row["wrong"])
    low, high = wilson(right, row["n"])
    cells = [
        row["factor"], row["name"], f"{right / row['n']:.3f} ({low:.3f} to {high:.3f})",
        lost(row, dense), len({*dense["wrong"]} - {*row["wrong"]}),
        f"{row['evicting'] / row['row_steps']:.0%}", row["rescued_rows"],
        f"{row['row_steps'] / dense['row_steps']:.2f}", f"{cost(row, dense):.3f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _summary(rows: list[Row]) -> str:
    """Lines of signals, with an open first step and with that of the defaults."""
    plain = [row for row in rows if row["name"] == "dense"]
    answers = sum(row["n"] - len(row["wrong"]) for row in plain)
    lines = ""
    for factor, first in (("signal, open", "open"), ("signal", "auto")):
        names = dict.fromkeys(row["name"] for row in rows if row["factor"] == factor)
        if first == "auto":
            names = {"defaults": None, **names}
        for name in names:
            mine = [(row, dense_of(row, rows)) for row in rows if row["name"] == name]
            gone = sum(lost(*pair) for pair in mine)
            earnest = [pair for pair in mine if pair[0]["evicting"] >= EVICTING]
            costs = [cost(*pair) for pair in earnest]
            signal = "delta" if name == "defaults" else name.removesuffix(", open")
            between = f"{min(costs):.2f} to {max(costs):.2f}" if costs else "-"
            lines += (
                f"| {signal} | {first} | {gone} | {wilson(gone, answers)[1]:.2%} | "
                f"{sum(lost(*pair) for pair in earnest)} of {len(earnest)} pairs | {between} |\n"
            )
    tasks = dict.fromkeys(row["task"] for row in plain)
    models = dict.fromkeys(row["model"] for row in plain)
    where = f"{', '.join(models)}: {', '.join(tasks)}"
    return SUMMARY.format(answers=answers, where=where) + lines


def _fits(rows: list[Row]) -> str:
    """Lines of the contestants that ``calibrate`` chose."""
    lines = ""
    for row in (row for row in rows if row["name"] == "calibrated"):
        dense = dense_of(row, rows)
        same = [each for each in rows if all(each[key] == row[key] for key in ("model", "task"))]
        usual = [each for each in same if dense_of(each, rows) is dense and each is not row]
        best = min((each for each in usual if not lost(each, dense)), key=lambda e: e["cost"])
        fit = row["fit"]
        picked, predicted = "do not evict", "-"
        if fit["options"] is not None:
            options = fit["options"]
            layers = " and ".join(map(str, options["layers"]))
            picked = f"{options['signal']}, layers {layers}, {options['first_step']}, "
            picked += f"gate {options['rescue']:.2f}"
            predicted = f"{fit['predicted']:.2f}"
        lines += (
            f"| {row['model']} | {row['task']} | {picked} | {predicted} | {cost(row, dense):.2f} | "
            f"{lost(row, dense)} | {best['name']}: {cost(best, dense):.2f} |\n"
        )
    return FIT.format(fit=32) + lines if lines else ""
