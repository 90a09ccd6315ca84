"""What a stage is asked to do, and the cells that it is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "SHAPES", "Cell", "Plan", "caches"]

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"0.6B": "sdar-0.6b", "1.7B": "sdar-1.7b", "8B": "sdar-8b"}
"""Sizes of Qwen3 by the names that ``--models`` takes; other names are shapes themselves."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        key: its name in the JSON.
        lane: cells of one lane share a process, with what it has compiled.
        what: arguments of the stage's ``measure``.
        environment: variables of the lane's process.
    """

    key: str
    lane: str
    what: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What all cells of a stage share; plain data, so that a process can be told.

    Attributes:
        models, batches, contestants: in the order in which they are measured.
        task: whose decode order is replayed; history: tokens before the block.
        repeats: timed generations of a cell, at most.
        inductor: False runs captured graphs as they are: quick, for tests of this script.
        commit: of the code, where there is no git to ask.
    """

    stage: str
    device: str = "cuda"
    models: tuple[str, ...] = ("0.6B",)
    batches: tuple[int, ...] = (1, 32, 256)
    contestants: tuple[str, ...] = ()
    task: str = "chain"
    history: int = 64
    repeats: int = 5
    inductor: bool = True
    cache: str = str(ROOT / ".cache" / "gpu")
    commit: str = ""

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Plan:
        given = json.loads(text)
        lists = ("models", "batches", "contestants")
        return cls(**given | {name: tuple(given[name]) for name in lists})


def caches(folder: str | Path) -> dict[str, str]:
    """Variables that put all that is compiled under one folder."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
    }
