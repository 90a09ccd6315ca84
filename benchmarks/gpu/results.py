"""The JSON of a stage: there in full after every cell, whatever happens next."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Results"]


class Results:
    """Cells by key, and what holds for all of them; written whenever one is added.

    Attributes:
        path: of the file; report: what is in it.
    """

    def __init__(self, path: Path, stage: str, *, again: bool = False) -> None:
        self.path = path
        self.report: dict[str, Any] = {"stage": stage, "machine": {}, "cells": {}, "left": []}
        if path.exists() and not again:
            self.report = json.loads(path.read_text())

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.report["cells"]
        return found

    def __contains__(self, key: object) -> bool:
        return key in self.cells

    def put(self, key: str, found: Mapping[str, Any]) -> None:
        self.cells[key] = dict(found)
        self.write()

    def note(self, **values: Any) -> None:
        """Set what holds for all cells, such as the machine, or which cells are left."""
        self.report |= values
        self.write()

    def write(self) -> None:
        """Replace the file by one that is whole: nobody ever sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        whole.write_text(json.dumps(self.report, indent=1) + "\n")
        whole.replace(self.path)
