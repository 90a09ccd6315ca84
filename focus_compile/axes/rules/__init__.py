"""The table of transfer rules; importing any of it imports all, so that the table is whole."""

from __future__ import annotations

from focus_compile.axes.rules import (
    experts,
    fixed_cache,
    indexing,
    makers,
    pointwise,
    products,
    reductions,
    views,
)

__all__ = [
    "experts",
    "fixed_cache",
    "indexing",
    "makers",
    "pointwise",
    "products",
    "reductions",
    "views",
]
