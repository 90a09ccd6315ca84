"""A calibration as a table and pictures: how each signal ranks what dense decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from focus_compile.calibration.choice import number
from focus_compile.calibration.replay import LETTERS

__all__ = ["Ranking", "rankings"]

CELL_OF = {letter: name for letter, (name, _) in LETTERS.items()}


@dataclass(frozen=True)
class Ranking:
    """A signal in figures, and the first block of the first prompt under it.

    Attributes:
        figures: as text, in the order of :data:`HEADS`.
        steps: the class of every position, step by step.
    """

    name: str
    first_step: str
    chosen: bool
    figures: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...]


HEADS = ("cost", "hit", "95 %", "rescued", "AUC", "recall", "kept")


def rankings(calibration: Mapping[str, Any]) -> list[Ranking]:
    """What a calibration's file tells of each candidate, cheapest first.

    Raises:
        ValueError: it is none, or one of an older release without pictures.
    """
    try:
        chosen = (calibration["chosen"] or {}).get("candidate")
        return [
            Ranking(
                str(each["candidate"]["name"]),
                str(each["candidate"]["first_step"]),
                each["candidate"] == chosen,
                tuple(_figures(each)),
                tuple(tuple(CELL_OF[letter] for letter in step) for step in each["picture"]),
            )
            for each in calibration["judged"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"calibration: {error}: expected the file of focus-compile calibrate, of this release"
        ) from error


def _figures(judged: Mapping[str, Any]) -> list[str]:
    hit, bounds = judged["hit"], judged["hit_range"]
    return [
        f"{judged['predicted']:.2f}",
        number(hit, 3),
        "-" if bounds is None else "{:.3f} to {:.3f}".format(*bounds),
        f"{judged['missed']:.1%}",
        number(judged["auc"], 2),
        number(judged["recall"], 2),
        f"{judged['kept']:.0%}",
    ]
