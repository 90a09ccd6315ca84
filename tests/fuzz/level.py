"""One open session of a sequence, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from focus_compile.runtime.session import Session
from tests.fuzz.caller import Caller
from tests.fuzz.oracle import Oracle


@dataclass
class Level:
    """A session, its caller, and what is expected of it."""

    caller: Caller
    oracle: Oracle
    focus: Session | None
    scope: Any = None
