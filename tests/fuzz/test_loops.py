"""Bare loops, one request or two in turn: every call equals the oracle's, or says what is wrong."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile import EvictedTokenDecoded
from focus_compile.runtime.implicit import session_here
from focus_compile.runtime.outputs import ITSELF
from tests.fuzz.loops import LOOPS, Knobs, Loop
from tests.fuzz.oracle import TOLERANCE, Oracle, quick_importance
from tests.fuzz.play import NEAR_TIE
from tests.fuzz.subjects import SUBJECTS, RowDraw, Subject
from tests.reference import algorithm
from tests.reference.state import Config
from tests.support.harness import MASK, retained

CANVASES = ("llada-canvas", "qwen3-uncached", "gemma", "dream-canvas")
SHIFTED = ("dream-canvas",)
"""Models whose loops read the logits of a token's left neighbour."""
PER_SUBJECT = 24


@dataclass(frozen=True)
class Request:
    """A canvas: a prompt, and masks; and what decodes it."""

    loop: str
    batch: int
    prompt: int
    tokens: int
    knobs: Knobs

    @property
    def canvas(self) -> Tensor:
        source = torch.Generator().manual_seed(self.knobs.seed)
        ids = torch.randint(0, MASK, (self.batch, self.prompt + self.tokens), generator=source)
        ids[:, self.prompt :] = MASK
        return ids

    def start(self) -> Loop:
        return LOOPS[self.loop](self.canvas, self.knobs)


REQUESTS = st.builds(
    Request,
    loop=st.sampled_from(sorted(LOOPS)),
    batch=st.integers(2, 3),
    prompt=st.integers(1, 4),
    tokens=st.integers(4, 16),
    knobs=st.builds(
        Knobs,
        count=st.integers(1, 4),
        threshold=st.sampled_from((0.05, 0.2, 0.9)),
        window=st.integers(2, 8),
        temperature=st.sampled_from((0.0, 0.0, 1.0)),
        seed=st.integers(0, 2**20),
    ),
)


@functools.cache
def subject(name: str) -> Subject:
    return Subject(SUBJECTS[name])


@dataclass
class Running:
    """Requests that take turns on one thread, and what their calls must give."""

    subject: Subject
    oracle: Oracle
    tally: Counter[str]
    ties: bool = field(default=False)

    def call(self, ids: Tensor) -> Tensor | None:
        """Logits of one call; None: it was refused, as it had to be."""
        masked = ids == MASK
        visible = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool)
        draw = RowDraw(ids, masked, visible, 0, 0, rows=tuple(range(len(ids))))
        if not bool(masked.any()):
            logits = self.subject.logits(self.subject.compiled, draw)
            torch.testing.assert_close(
                logits,
                self.subject.logits(self.subject.model, draw),
                atol=TOLERANCE,
                rtol=TOLERANCE,
            )
            self.oracle.ended = True
            return logits
        error = self.oracle.expected_error(draw)
        if error is not None:
            with pytest.raises(error):
                self.subject.logits(self.subject.compiled, draw)
            self.oracle.forget()
            self.tally[error.__name__] += 1
            return None
        logits = self.subject.logits(self.subject.compiled, draw)
        found = self.oracle.step(lambda: self.subject.logits(self.subject.model, draw), draw)
        self.ties = self.ties or found.margin < NEAR_TIE
        if self.ties:
            return None
        kept = found.retained
        assert torch.equal(retained(logits), kept)
        at = kept.unsqueeze(-1)
        torch.testing.assert_close(logits * at, found.logits * at, atol=TOLERANCE, rtol=TOLERANCE)
        own = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        assert bool((own[~kept] == ITSELF).all())
        self.tally["calls"] += 1
        self.tally["evicted"] += int((masked & ~kept).sum())
        self.tally["masked"] += int(masked.sum())
        return logits


def play(name: str, requests: list[Request], alpha: float, tally: Counter[str]) -> None:
    """Run requests in turn to their ends, a refusal's being one; none runs on for ever."""
    with patch.object(algorithm, "importance", quick_importance), torch.no_grad():
        made = subject(name)
        shifted = name in SHIFTED
        made.configure(
            alpha=alpha,
            first_step="auto",
            delayed_cache=True,
            stale_kv=True,
            shifted_logits=shifted,
        )
        session_here().reset()
        config = Config(alpha, first_step="auto")
        running = Running(made, Oracle(config, shifted, alone=True, looks=True), tally)
        loops = [(request, loop, next(loop)) for request in requests if (loop := request.start())]
        tally["sequences"] += 1
        for _ in range(60):
            going = []
            for request, loop, ids in loops:
                logits = running.call(ids)
                if running.ties:
                    tally["ties"] += 1
                    return
                if logits is None:
                    continue
                if shifted:
                    logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
                try:
                    going.append((request, loop, loop.send(logits)))
                except StopIteration as end:
                    tally[f"{request.loop} ended"] += 1
                    assert torch.equal(
                        end.value[:, : request.prompt], request.canvas[:, : request.prompt]
                    )
            loops = going


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Counts over all models: loops of every kind ended, and were refused, and saved something."""
    tally: Counter[str] = Counter()
    yield tally
    print(f"\n{dict(tally)}")
    if tally["subjects"] == len(CANVASES):
        assert not [loop for loop in LOOPS if not tally[f"{loop} ended"]]
        assert tally["calls"] > 5 * tally["sequences"]
        assert tally["evicted"] > tally["masked"] / 50
        assert tally[EvictedTokenDecoded.__name__]
        assert tally["ties"] < tally["sequences"] / 5


@pytest.mark.parametrize("name", CANVASES)
def test_bare_loops(name: str, tally: Counter[str], pytestconfig: pytest.Config) -> None:
    wanted = pytestconfig.getoption("--fuzz")

    @seed(zlib.crc32(name.encode()))
    @settings(
        max_examples=PER_SUBJECT if wanted is None else -(-wanted // len(CANVASES)),
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(st.lists(REQUESTS, min_size=1, max_size=2), st.sampled_from((1.0, 1.5, 3.0)))
    def holds(requests: list[Request], alpha: float) -> None:
        play(name, requests, alpha, tally)

    holds()
    tally["subjects"] += 1
