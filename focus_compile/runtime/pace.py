"""``evict="auto"``: which of two programs decodes a batch class sooner, measured as it works.

Of each class, blocks run FOCUS's programs and the dense one by turns, and what a decoded token took
is noted. The sooner one is then kept for many blocks, and both are tried again. A choice holds for
a block: where it begins, nothing is lost by a change.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["TRIALS", "Lap", "Laps", "Pace", "Paces"]

TRIALS = 3
"""Blocks by which each program is judged, by their median: the first one may warm up caches."""
HELD = 100
"""Blocks that the sooner program runs, before both are tried again; twice as many every time."""


def _now(device: torch.device) -> float:
    """Seconds, behind all that the device has been given so far."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@dataclass
class Pace:
    """Of one batch class.

    Attributes:
        evict: the program that is kept, True: FOCUS's; None: both are being tried.
        seconds: per decoded token, of the blocks of the last trial; those of FOCUS's programs under
            True, those of the dense one under False.
        trials: how often both have been tried; left: blocks until they are tried again.
    """

    evict: bool | None = None
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    trials: int = 0
    left: int = 0

    def next(self) -> tuple[bool, bool]:
        """Of a block that begins: whether FOCUS's programs run it, and whether it is timed."""
        if self.evict is not None:
            self.left -= 1
            if self.left >= 0:
                return self.evict, False
            self.evict, self.seconds = None, {True: [], False: []}
        return len(self.seconds[True]) <= len(self.seconds[False]), True

    def note(self, evict: bool, seconds: float) -> None:
        """A timed block has ended; ``seconds``: per decoded token."""
        if self.evict is not None:
            return  # another thread's block has decided
        self.seconds[evict].append(seconds)
        if min(map(len, self.seconds.values())) >= TRIALS:
            focus, dense = (statistics.median(self.seconds[which]) for which in (True, False))
            self.evict = focus <= dense
            self.left = HELD * 2**self.trials
            self.trials += 1

    def __str__(self) -> str:
        chosen = {None: "both are tried", True: "evicts", False: "dense"}[self.evict]
        took = [
            f"{name} {1e3 * statistics.median(tried):.3g} ms a token"
            for name, tried in (("FOCUS", self.seconds[True]), ("dense", self.seconds[False]))
            if tried
        ]
        return ", ".join([chosen, *took])


@dataclass
class Lap:
    """A block that is being decoded, by one program.

    Attributes:
        masks: masked tokens of the batch where it began; last: in its last call so far.
    """

    pace: Pace
    evict: bool
    timed: bool
    masks: int
    last: int
    seconds: float = 0.0

    @contextmanager
    def call(self, device: torch.device) -> Iterator[None]:
        """Around a masked call of the block."""
        if not self.timed:
            yield
            return
        start = _now(device)
        yield
        self.seconds += _now(device) - start

    def end(self) -> None:
        if self.timed:
            self.pace.note(self.evict, self.seconds / self.masks)


class Laps:
    """The block that a session's calls are decoding."""

    def __init__(self) -> None:
        self.lap: Lap | None = None

    def of(self, pace: Pace, masks: int) -> Lap:
        """That of a call with so many masked tokens: a new one where they are not fewer."""
        if self.lap is None or self.lap.pace is not pace or masks >= self.lap.last:
            self.end()
            self.lap = Lap(pace, *pace.next(), masks, masks)
        self.lap.last = masks
        return self.lap

    def end(self) -> None:
        """The block is decoded: a mask-free call, another block, or the session's end says so."""
        lap, self.lap = self.lap, None
        if lap is not None:
            lap.end()


class Paces:
    """Those of a compiled model: batch and tokens of a call, rounded up to powers of two."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, int], Pace] = {}

    def get(self, masked: Tensor) -> Pace:
        batch, tokens = (1 << (size - 1).bit_length() for size in masked.shape)
        return self.of.setdefault((batch, tokens), Pace())

    def told(self) -> dict[str, str]:
        """Per class, what was chosen and seen, in words."""
        return {
            f"batch {batch}, {tokens} tokens": str(pace)
            for (batch, tokens), pace in self.of.items()
        }
