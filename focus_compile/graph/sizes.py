"""The numbers that stand for sizes while a graph is analysed: unmistakable, and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "GENERIC",
    "HINTS",
    "Extent",
    "Numbers",
    "generic",
    "is_generic",
    "is_stand_in",
    "length",
    "name_of",
]

Extent = int | str | tuple[Any, ...]
"""A size: a number, a name, or the sum of the extents of a tuple."""

GENERIC = {
    "batch": 10_007,
    "token": 20_011,
    "history": 40_009,
    "fed": 30_011,
    "fed_row": 15_013,
    "retained": 12_007,
    "retained_row": 11_003,
    "extra": 50_021,
}
"""One number per name: pairwise distinct primes that are no size of a model."""
_COMBINED = {
    number
    for first in GENERIC.values()
    for second in GENERIC.values()
    for number in (first + second, first * second)
}
HINTS = {
    "batch": 13,
    "token": 29,
    "history": 257,
    "fed": 211,
    "fed_row": 23,
    "retained": 89,
    "retained_row": 11,
    "extra": 101,
}
"""Sizes that the compiler tunes for.

Equalities with them are refused after compiling (``programs.SpecializedSize``); inequalities, such
as a choice of 32-bit indexing on a GPU, are not evaluated.
"""


def length(extent: Extent, sizes: Mapping[str, Any]) -> Any:
    """An extent as a number (or a symbol), given those of the names."""
    if isinstance(extent, int):
        return extent
    if isinstance(extent, str):
        return sizes[extent]
    total: Any = 0
    for term in extent:
        total = total + length(term, sizes)
    return total


class Numbers(dict[str, int]):
    """The number of every name; ``history1``, ``history2``, ... get numbers of their own."""

    def __missing__(self, name: str) -> int:
        stem = name.rstrip("0123456789")
        return self[stem] + 18 * int(name[len(stem) :])


def generic(extent: Extent) -> int:
    """The number that stands for an extent."""
    return int(length(extent, Numbers(GENERIC)))


def name_of(number: int) -> str | None:
    """The name (or the sum ``history + token``) that a number stands for, or None."""
    names = {prime: name for name, prime in GENERIC.items()}
    names[GENERIC["history"] + GENERIC["token"]] = "history + token"
    if number in names or not is_generic(number):
        return names.get(number)
    stem = "extra" if number > GENERIC["extra"] else "history"
    return f"{stem}{(number - GENERIC[stem]) // 18}"


def is_generic(number: int) -> bool:
    """Whether a number stands for a name: then it must not appear in a graph as a literal."""
    return number in GENERIC.values() or any(
        0 < number - GENERIC[stem] < 18 * 1000 and (number - GENERIC[stem]) % 18 == 0
        for stem in ("history", "extra")
    )


def is_stand_in(number: int) -> bool:
    """Whether a number stands for a name, or for the sum or product of two."""
    return number in _COMBINED or is_generic(number) or is_generic(number - GENERIC["token"])
