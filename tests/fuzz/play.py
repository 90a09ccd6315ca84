"""Play one sequence on the compiled model and on the oracle, and hold one against the other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from focus_compile.runtime.implicit import session_here
from focus_compile.runtime.session import Session
from tests.fuzz import events
from tests.fuzz.caller import Caller
from tests.fuzz.faults import Accident
from tests.fuzz.level import Level
from tests.fuzz.oracle import TOLERANCE, Oracle, quick_importance
from tests.fuzz.plan import Plan
from tests.fuzz.subjects import RowDraw, Subject
from tests.reference import algorithm
from tests.reference.emulation import Emulated
from tests.reference.state import Config
from tests.support.harness import retained

NEAR_TIE = 1e-5
NOTHING_EVICTED = 1e9


class _Bare(threading.local):
    """What each thread's calls in no session owe, by model."""

    def __init__(self) -> None:
        self.oracles: dict[int, Oracle] = {}


_BARE = _Bare()


class NearTie(Exception):
    """Rounding may select other tokens: nothing can be said of what follows."""


@dataclass
class Player:
    """A sequence being played; ``tally`` counts what happened."""

    subject: Subject
    plan: Plan
    tally: Counter[str]
    levels: list[Level] = field(default_factory=list)

    def run(self) -> None:
        with patch.object(algorithm, "importance", quick_importance):
            for _ in self.stream():
                pass

    @torch.no_grad()
    def stream(self) -> Iterator[None]:
        """One event at every turn; the session is entered in here, as in a request's generator."""
        plan = self.plan
        session_here().reset()
        _BARE.oracles.clear()
        self.config = Config(plan.alpha, plan.visibility, plan.delayed, plan.stale)
        options: dict[str, Any] = {"delayed_cache": plan.delayed, "stale_kv": plan.stale}
        if plan.exact:
            self.config = Config(NOTHING_EVICTED, plan.visibility, False, plan.stale)
        if not plan.named:
            options |= {"alpha": plan.alpha, "visibility": plan.visibility, "exact": plan.exact}
        else:
            options |= {"alpha": 3.0, "visibility": "written", "exact": False}
        self.subject.configure(**options)
        caller = Caller(plan.seed, plan.batch, plan.tokens, plan.history, given=False)
        self.levels.append(Level(caller, Oracle(self.config), None))
        try:
            events.enter(self, plan.seed)
            for name, number in plan.events:
                self.tally[name] += 1
                getattr(events, name)(self, number)
                yield
        finally:
            while self.here.scope is not None:
                events.leave(self, 0)

    @property
    def here(self) -> Level:
        level = self.levels[-1]
        if level.focus is None:
            level.oracle = _BARE.oracles.setdefault(id(self.subject), Oracle(Config(), alone=True))
            level.oracle.config = self._standalone()
        return level

    def masked(self, fault: Callable[[], Any] | None = None) -> None:
        """A masked call; ``fault``: what is in its way."""
        level, draw = self.here, self.here.caller.draw()
        focus, oracle = level.focus, level.oracle
        if not draw.masked.any():
            return self.unmasked()
        error = oracle.expected_error(draw)
        if error is not None or fault is not None:
            try:
                with (fault or nullcontext)():
                    self._compiled(draw)
            except (Accident, error or Accident) as caught:  # noqa: B030  a class
                if error is not None:
                    assert type(caught) is error, f"{caught!r}: expected {error}"
                if error is None or focus is None:
                    oracle.forget()
                self.tally[type(caught).__name__] += 1
                return None
            raise AssertionError(f"expected {error or Accident}")
        before = self.subject.suffixes()
        logits = self._compiled(draw)
        if self.subject.refusable and self.subject.suffixes() == before:
            return self._dense(draw, logits)
        found = oracle.step(lambda: self.subject.logits(self.subject.model, draw), draw)
        assert self.subject.suffixes() == before + 1 + bool(found.rescued.any())
        if min(found.margin, found.need_margin) < NEAR_TIE:
            raise NearTie
        self._compare(found, logits, draw, focus)
        return None

    def unmasked(self) -> None:
        """A call without masks: the dense program, the same as eager."""
        draw = self.here.caller.draw()
        before = self.subject.suffixes()
        actual = self._compiled(draw)
        assert self.subject.suffixes() == before
        self._dense(draw, actual)

    def _dense(self, draw: RowDraw, actual: Tensor) -> None:
        """What the dense program gave, or the model as it is where its graph was refused."""
        expected = self.subject.logits(self.subject.model, draw)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
        self.here.oracle.ended = True
        self.tally["dense calls"] += 1

    def _compiled(self, draw: RowDraw) -> Tensor:
        focus, caller = self.here.focus, self.here.caller
        if focus is not None:
            focus.block = caller.window
        if focus is not None and caller.given:
            focus.masked = caller.masked.clone()
        return self.subject.logits(self.subject.compiled, draw)

    def _compare(
        self, found: Emulated, logits: Tensor, draw: RowDraw, focus: Session | None
    ) -> None:
        kept = found.retained
        if focus is not None:
            assert focus.retain_mask is not None
            assert torch.equal(focus.retain_mask, kept)
            assert focus.stats.fed_per_step[-1] == int(found.fed.sum())
            assert focus.stats.retained_per_step[-1] == int(kept.sum())
            assert focus.stats.rescued_per_step[-1] == int(found.rescued.sum())
            self.tally["rescued"] += bool(found.rescued.any())
        if focus is not None and focus.logits is not None:
            packed = focus.logits
            assert focus.packed and not logits.any()
            self.tally["packed"] += 1
            assert torch.equal(torch.stack([packed.rows, packed.positions], 1), kept.nonzero())
            logits = torch.zeros_like(found.logits)
            logits[packed.rows, packed.positions] = packed.values
        if not self.subject.biased:
            assert torch.equal(retained(logits), kept)
        logits = logits * kept.unsqueeze(-1)
        expected = found.logits * kept.unsqueeze(-1)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
        self.tally["calls"] += 1
        self.tally["fewer fed"] += bool((~found.fed).any())
        self.tally["fewer retained"] += bool((found.fed & ~kept).any())
        if kept.all() and not found.rescued.any():  # else those retained saw less
            dense = self.subject.logits(self.subject.model, draw)
            torch.testing.assert_close(logits, dense, atol=TOLERANCE, rtol=TOLERANCE)
            self.tally["nothing evicted"] += 1

    def _standalone(self) -> Config:
        """Without a session the backend's options hold."""
        alpha, visibility = self.config.alpha, self.config.visibility
        if self.plan.named:
            alpha, visibility = 3.0, "written"
            if self.plan.exact:
                return Config(alpha, visibility, self.plan.delayed, self.plan.stale)
        return Config(alpha, visibility, self.config.delayed_cache, self.config.stale_kv)


def attempt(subject: Subject, plan: Plan, tally: Counter[str]) -> None:
    """Play a sequence to its end, or to a near tie."""
    tally["sequences"] += 1
    try:
        Player(subject, plan, tally).run()
    except NearTie:
        tally["ties"] += 1
