"""How many times fewer FLOPs FOCUS needs, as curves: an SVG where there is matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from focus_compile.views.cost import Cost

__all__ = ["Curve", "curves", "svg"]

_LENGTHS = (4, 8, 16, 32, 64, 128, 256)
_STEPS = 20
_COLORS = {"#010203": "currentColor", "#040506": "var(--retained-line)", "#070809": "var(--grid)"}
"""What matplotlib is told, and what the SVG says: the page decides, by light or dark mode."""
_INK, _LINE, _GRID = _COLORS


@dataclass(frozen=True)
class Curve:
    """Ratio of dense over focus FLOPs against ``x``; points in order of x.

    ``marked``: the one among them that the page is about.
    """

    x: str
    points: tuple[tuple[float, float], ...]
    marked: tuple[float, float]
    doubling: bool = False
    """Whether x goes by powers of two."""


def curves(
    cost: Cost, batch: int, block: int, history: int, fed: float, retained: float
) -> tuple[Curve, Curve]:
    """Against the retained share, from 0 to the fed one, and against the block length."""

    def ratio(length: float, share: float) -> float:
        tokens = batch * length
        return float(cost.speedup(batch, length, history, fed * tokens, share * tokens))

    shares = sorted({fed * step / _STEPS for step in range(_STEPS + 1)} | {retained})
    lengths = sorted({*_LENGTHS, block})
    marked = ratio(block, retained)
    return (
        Curve(
            "share of the block that is retained",
            tuple((share, ratio(block, share)) for share in shares),
            (retained, marked),
        ),
        Curve(
            "tokens of a block",
            tuple((length, ratio(length, retained)) for length in lengths),
            (block, marked),
            doubling=True,
        ),
    )


def svg(drawn: Sequence[Curve]) -> str | None:
    """The curves side by side as an SVG element, or None without matplotlib (extra ``plots``)."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(inked, _INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "focus", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6 * len(drawn), 3.0), layout="constrained")
        for axes, curve in zip(
            figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True
        ):
            x, y = zip(*curve.points, strict=True)
            axes.plot(x, y, color=_LINE, linewidth=2)
            axes.plot(*curve.marked, "o", color=_LINE)
            axes.annotate(
                f"{curve.marked[1]:.2f}", curve.marked, xytext=(6, 6), textcoords="offset points"
            )
            axes.axhline(1, color=_GRID, linewidth=1)
            if curve.doubling:
                axes.set_xscale("log", base=2)
                axes.set_xticks(x, [f"{tick:g}" for tick in x])
                axes.minorticks_off()
            axes.set(xlabel=curve.x, ylabel="dense / focus FLOPs", ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    for placeholder, css in _COLORS.items():
        drawing = drawing.replace(placeholder, css)
    return drawing[drawing.index("<svg") :]
