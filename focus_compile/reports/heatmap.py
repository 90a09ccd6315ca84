"""A recorded generation as a heat map: what became of every position of a block, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CELLS", "Grid", "grids"]

CELLS = {
    "decoded": "decoded in this step",
    "retained": "masked and retained: every layer computes it",
    "rescued": "masked, evicted at first, and computed in the same step after all",
    "evicted": "masked and evicted: layers 0 and 1 only",
    "again": "decoded before, fed once more",
    "done": "decoded before, not fed",
}
"""Classes of cells, with their meaning."""

_PARTS = ("masked", "retained", "decoded")


@dataclass(frozen=True)
class Grid:
    """One block of one row: ``steps[s][t]`` is the class of position t in step s."""

    row: int
    block: int
    steps: tuple[tuple[str, ...], ...]


def grids(trace: Mapping[str, Any]) -> list[Grid]:
    """The grids of a trace, row by row, blocks in order.

    Args:
        trace: plain data: ``block_length`` T, ``rows`` B, and ``steps``, a list of mappings with
            ``block``, an index, and ``masked``, ``retained``, ``decoded``, bool ``[B][T]``; and
            ``rescued``, if any token was.

    Raises:
        ValueError: it is none; one sentence that says where.
    """
    rows, length, steps = _header(trace)
    for number, step in enumerate(steps):
        _check_step(number, step, rows, length)
    blocks = dict.fromkeys(step["block"] for step in steps)
    return [
        Grid(
            row,
            block,
            tuple(
                tuple(map(_cell, *(lines[row] for lines in _canvases(step, rows, length))))
                for step in steps
                if step["block"] == block
            ),
        )
        for row in range(rows)
        for block in sorted(blocks)
    ]


def _canvases(step: Mapping[str, Any], rows: int, length: int) -> list[Any]:
    none = [[False] * length] * rows
    return [*(step[part] for part in _PARTS), step.get("rescued", none)]


def _cell(masked: bool, retained: bool, decoded: bool, rescued: bool) -> str:
    if decoded:
        return "decoded"
    if masked:
        return "rescued" if rescued else "retained" if retained else "evicted"
    return "again" if retained else "done"


def _header(trace: Mapping[str, Any]) -> tuple[int, int, list[Any]]:
    if not isinstance(trace, Mapping):
        raise ValueError(f"trace: expected an object, got {type(trace).__name__}")
    for name in ("block_length", "rows", "steps"):
        if name not in trace:
            raise ValueError(f"trace: {name} is missing")
    rows, length, steps = trace["rows"], trace["block_length"], trace["steps"]
    for name, count in (("block_length", length), ("rows", rows)):
        if type(count) is not int or count < 1:
            raise ValueError(f"trace: {name} is {count!r}, expected a whole number from 1 on")
    if not isinstance(steps, list):
        raise ValueError(f"trace: steps is a {type(steps).__name__}, expected a list")
    return rows, length, steps


def _check_step(number: int, step: Any, rows: int, length: int) -> None:
    location = f"trace: step {number}"
    if not isinstance(step, Mapping):
        raise ValueError(f"{location} is a {type(step).__name__}, expected an object")
    for name in ("block", *_PARTS):
        if name not in step:
            raise ValueError(f"{location}: {name} is missing")
    if type(step["block"]) is not int or step["block"] < 0:
        raise ValueError(f"{location}: block is {step['block']!r}, expected an index")
    for name in (*_PARTS, *(["rescued"] if "rescued" in step else [])):
        if not _is_canvas(step[name], rows, length):
            raise ValueError(f"{location}: {name} is not {rows} lists of {length} booleans")
    for row, position in _unmasked_decodes(step):
        raise ValueError(f"{location}: row {row} decodes position {position}, which is not masked")


def _is_canvas(value: Any, rows: int, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and len(row) == length for row in value)
        and all(isinstance(cell, bool) for row in value for cell in row)
    )


def _unmasked_decodes(step: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for row, (masked, decoded) in enumerate(zip(step["masked"], step["decoded"], strict=True)):
        for position, (was_masked, is_decoded) in enumerate(zip(masked, decoded, strict=True)):
            if is_decoded and not was_masked:
                yield row, position
