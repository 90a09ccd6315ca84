"""What the tests of the HTML report share: explanations of small models, a trace."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import focus_compile
from focus_compile.analysis import Analysis
from focus_compile.reports.explanation import Explanation
from tests.support.dialects import DIALECTS, draw_call
from tests.support.models.dream import Dream

SIZES: dict[str, Any] = {"batch": 3, "block": 20, "history": 7, "fed": 0.55, "retained": 0.25}
"""Arguments of a report: 60 tokens, 33 fed, 15 retained."""
MARKUP = '<img src=x onerror=alert(1)>&amp;"'


class Marked(nn.Module):
    """A model whose modules have names that are markup."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(MARKUP, Dream(layers=4))

    def forward(self, **kwargs: Any) -> tuple[Any, ...]:
        out: tuple[Any, ...] = getattr(self, MARKUP)(**kwargs)
        return out


class Twice(nn.Module):
    """Two whole models, a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Dream(layers=2), Dream(layers=3)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.first(input_ids)[0]
        torch._dynamo.graph_break()
        return out + self.second(input_ids)[0]


def told(model: nn.Module, layers: int = 4) -> Explanation:
    """What explain tells of a call in Dream's dialect."""
    torch._dynamo.reset()
    dialect = DIALECTS["dream"]
    arguments = dialect.arguments(Dream(layers=layers), draw_call(dialect, 1))
    return focus_compile.explain(model.eval(), **arguments)


@cache
def story(layers: int) -> Explanation:
    return told(Dream(layers=layers), layers)


@cache
def marked() -> Explanation:
    return told(Marked())


def analysis(found: Explanation) -> Analysis:
    """Of the only graph."""
    (graph,) = found.graphs
    assert graph.analysis is not None
    return graph.analysis


def trace() -> dict[str, Any]:
    """Two rows, two blocks of five, every kind of cell; the second row skips the first block."""
    yes, no = True, False
    done = [no] * 5
    return {
        "block_length": 5,
        "rows": 2,
        "steps": [
            {
                "block": 0,
                "masked": [[yes] * 5, done],
                "retained": [[yes, yes, no, no, no], done],
                "decoded": [[yes, no, no, no, no], done],
            },
            {
                "block": 0,
                "masked": [[no, yes, yes, yes, yes], done],
                "retained": [[yes, yes, yes, no, yes], done],
                "decoded": [[no, yes, yes, no, no], done],
            },
            {
                "block": 1,
                "masked": [[no, no, yes, yes, yes], [yes] * 5],
                "retained": [[no, yes, yes, no, no], [yes] * 5],
                "decoded": [[no, no, yes, no, no], [no, no, no, no, yes]],
            },
        ],
    }


CELLS = {
    (0, 0): [
        ["decoded", "retained", "evicted", "evicted", "evicted"],
        ["again", "decoded", "decoded", "evicted", "retained"],
    ],
    (0, 1): [["done", "again", "decoded", "evicted", "evicted"]],
    (1, 0): [["done"] * 5, ["done"] * 5],
    (1, 1): [["retained", "retained", "retained", "retained", "decoded"]],
}
"""Cells of :func:`trace`, written by hand: (row, block) -> class of every position, by step."""
