"""Traces: their cells, and one sentence for each way in which they can be malformed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from focus_compile.reports.heatmap import grids
from focus_compile.reports.page import page
from tests.support.stories import CELLS, SIZES, story, trace


def test_cells() -> None:
    """By row and block, step by step."""
    found = {(grid.row, grid.block): [list(step) for step in grid.steps] for grid in grids(trace())}
    assert found == CELLS and list(found) == sorted(CELLS)
    assert {cell for steps in CELLS.values() for step in steps for cell in step} == {
        "decoded", "retained", "evicted", "again", "done"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("rows"), "trace: rows is missing"),
        (lambda t: t.update(rows=True), "trace: rows is True, expected a whole number from 1 on"),
        (
            lambda t: t.update(block_length=0),
            "trace: block_length is 0, expected a whole number from 1 on",
        ),
        (lambda t: t.update(steps={}), "trace: steps is a dict, expected a list"),
        (lambda t: t["steps"].append(3), "trace: step 3 is a int, expected an object"),
        (lambda t: t["steps"][1].pop("masked"), "trace: step 1: masked is missing"),
        (
            lambda t: t["steps"][0].update(block="a"),
            "trace: step 0: block is 'a', expected an index",
        ),
        (lambda t: t["steps"][0].update(block=-1), "trace: step 0: block is -1, expected an index"),
        (
            lambda t: t["steps"][2]["retained"][1].pop(),
            "trace: step 2: retained is not 2 lists of 5 booleans",
        ),
        (
            lambda t: t["steps"][2]["decoded"].pop(),
            "trace: step 2: decoded is not 2 lists of 5 booleans",
        ),
        (
            lambda t: t["steps"][0]["masked"][0].__setitem__(0, 1),
            "trace: step 0: masked is not 2 lists of 5 booleans",
        ),
        (
            lambda t: t["steps"][0].update(decoded=[[False] * 5, [False] * 4 + [True]]),
            "trace: step 0: row 1 decodes position 4, which is not masked",
        ),
    ],
)
def test_malformed(change: Any, sentence: str) -> None:
    """The report of a malformed trace is refused."""
    given = trace()
    change(given)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        page(story(5), "a title", given, **SIZES)


def test_no_object() -> None:
    with pytest.raises(ValueError, match=r"^trace: expected an object, got list$"):
        grids([])  # type: ignore[arg-type]
