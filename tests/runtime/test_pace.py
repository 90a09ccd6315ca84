"""``evict="auto"``: blocks run both programs by turns, and then the one that is sooner."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile.log import text_once
from focus_compile.runtime import pace as pace_module
from focus_compile.runtime.executable import Executable
from focus_compile.runtime.pace import HELD, TRIALS, Laps, Pace, Paces
from tests.support.harness import MASK, Sizes, build_model

pytestmark = pytest.mark.usefixtures("no_inductor")

BLOCK = 8
BOTH = 2 * TRIALS
PROMPT = torch.arange(7)[None] % 5


class Clock:
    """Time that passes only where a program runs, as much as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cost = 0.0, {"_focus": 1.0, "_dense": 1.0}
        self.ran: list[str] = []
        monkeypatch.setattr(pace_module, "_now", lambda _: self.now)
        for name in self.cost:
            self._watch(name, monkeypatch)

    def _watch(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        program = getattr(Executable, name)

        def run(executable: Executable, *args: Any, **kwargs: Any) -> Any:
            self.now += self.cost[name]
            if name == "_focus" or kwargs.get("masked"):
                self.ran.append(name)
            return program(executable, *args, **kwargs)

        monkeypatch.setattr(Executable, name, run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model(Sizes(layers=4))


@pytest.fixture
def compiled(model: nn.Module) -> Iterator[nn.Module]:
    torch._dynamo.reset()
    yield focus_compile.compile(model, mask_token_id=MASK, strict=True, evict="auto")


def generate(model: nn.Module, blocks: int, **given: Any) -> focus_compile.Generated:
    made = focus_compile.generate(
        model, PROMPT, mask_token_id=MASK, max_new_tokens=blocks * BLOCK, block_length=BLOCK,
        remasking_strategy="fixed", tokens_per_step=2, rescue=None, first_step="evict",
        return_dict=True, **given,
    )  # fmt: skip
    assert isinstance(made, focus_compile.Generated)
    return made


@pytest.mark.parametrize("sooner", ["_focus", "_dense"])
def test_the_sooner_program_is_kept(compiled: nn.Module, clock: Clock, sooner: str) -> None:
    """By turns first, a block each; then the sooner one alone. Nothing is lost at a change."""
    clock.cost[sooner] = 0.5
    made = generate(compiled, BOTH + 3)
    steps = BLOCK // 2
    turns = ["_focus" if block % 2 == 0 else "_dense" for block in range(BOTH)]
    assert clock.ran[::steps] == turns + 3 * [sooner]
    assert not bool((made.sequences == MASK).any())
    status = focus_compile.status(compiled)
    chosen = {"_focus": "evicts", "_dense": "dense"}[sooner]
    (told,) = status.paces.values()
    assert list(status.paces) == ["batch 1, 8 tokens"] and told.startswith(chosen)
    times = {"_focus": "500 ms a token", "_dense": "250 ms a token"}  # of four steps, eight tokens
    if sooner == "_focus":
        times = {"_focus": "250 ms a token", "_dense": "500 ms a token"}
    assert told == f"{chosen}, FOCUS {times['_focus']}, dense {times['_dense']}"
    dense = clock.ran.count("_dense")
    assert status.masked_dense == {"evict='auto'": dense} and told in repr(status)


def test_what_a_generation_tells(compiled: nn.Module, clock: Clock) -> None:
    """A step of the dense program retains everything, in masks, shares and trace."""
    made = generate(compiled, BOTH)
    assert made.focus_steps == clock.ran.count("_focus") == made.forwards // 2
    for ran, kept, step in zip(clock.ran, made.retain_masks, made.trace()["steps"], strict=True):
        assert bool(kept.all()) == (ran == "_dense")
        assert step["retained"] == kept.tolist()
    kept = torch.stack(made.retain_masks)
    assert made.retained_fraction == pytest.approx(kept.double().mean().item())
    assert made.retained_fraction < made.fed_fraction < 1


def test_tokens_are_those_of_the_programs(
    model: nn.Module, compiled: nn.Module, clock: Clock
) -> None:
    """With nothing evicted; and a first block is as FOCUS alone makes it."""
    expected = generate(model, 2)
    assert torch.equal(generate(compiled, 2, evict=False).sequences, expected.sequences)
    with focus_compile.session(exact=True):
        made = generate(compiled, 2)
    assert torch.equal(made.sequences, expected.sequences) and made.focus_steps == made.forwards
    alone = generate(compiled, 1, evict=True)
    assert torch.equal(generate(compiled, 1).sequences, alone.sequences)
    assert set(clock.ran) == {"_focus", "_dense"}


def test_a_session_decides(model: nn.Module, clock: Clock) -> None:
    """Over the model's option; a generation, over the session around it."""
    torch._dynamo.reset()
    evicting = focus_compile.compile(model, mask_token_id=MASK, strict=True)
    with focus_compile.session(evict="auto") as focus:
        generate(evicting, 2)
    assert clock.ran == 4 * ["_focus"] + 4 * ["_dense"] and focus.reached
    clock.ran.clear()
    with focus_compile.session(evict="auto"):
        generate(evicting, 2, evict=False)
    assert set(clock.ran) == {"_dense"}
    with pytest.raises(ValueError, match="evict='never': expected True, False or 'auto'"):
        focus_compile.session(evict="never").__enter__()


def test_a_loop_of_ones_own(compiled: nn.Module, clock: Clock) -> None:
    """Blocks are told apart by their masks; what a dense step says of evicted tokens is: none."""
    with torch.no_grad(), focus_compile.session() as focus:
        for block in range(3):
            text = torch.full((1, BLOCK), MASK)
            for position in range(BLOCK):
                compiled(input_ids=text, position_ids=torch.arange(BLOCK)[None])
                assert (focus.retain_mask is None) == (block == 1)
                kept = torch.ones_like(text, dtype=bool)
                kept = kept if focus.retain_mask is None else focus.retain_mask
                text[0, ((text == MASK) & kept)[0].nonzero()[0]] = position % 5
    steps = [run for run in ("_focus", "_dense", "_focus") for _ in range(BLOCK)]
    assert clock.ran == steps


def test_processes_that_share_a_model(
    compiled: nn.Module, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would choose differently, and wait for each other: refused before anything runs."""
    monkeypatch.setattr("focus_compile.runtime.executable.DTensor", Tensor)
    with pytest.raises(ValueError, match="processes share this model"):
        generate(compiled, 1)
    assert clock.ran == []


@pytest.mark.parametrize("evict", ["auto", False])
def test_no_warning_of_a_choice(
    compiled: nn.Module, clock: Clock, evict: bool | str, caplog: pytest.LogCaptureFixture
) -> None:
    """A session in which the dense program was chosen had masked calls."""
    clock.cost["_dense"] = 0.5
    generate(compiled, BOTH)
    clock.ran.clear()
    caplog.clear()
    text_once.cache_clear()
    with torch.no_grad(), focus_compile.session(evict=evict):
        compiled(input_ids=torch.full((1, BLOCK), MASK), position_ids=torch.arange(BLOCK)[None])
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert clock.ran == ["_dense"] and warnings == []


def test_turns() -> None:
    """Three blocks of each; then the sooner one for long, twice as long every time."""
    pace = Pace()
    for trial in range(2):
        for turn in range(BOTH):
            evict, timed = pace.next()
            assert timed and evict == (turn % 2 == 0)
            pace.note(evict, 2.0 if evict else 1.0 + trial * 5)
        kept = [pace.next() for _ in range(HELD * 2**trial)]
        assert kept == HELD * 2**trial * [(trial == 1, False)]
    assert pace.next() == (True, True)


def test_a_slow_first_block_decides_nothing() -> None:
    pace = Pace()
    for seconds in (900.0, 1.0, 1.1):
        pace.note(True, seconds)
        pace.note(False, 2.0)
    assert (
        pace.evict is True
        and str(pace) == "evicts, FOCUS 1.1e+03 ms a token, dense 2e+03 ms a token"
    )


def test_laps() -> None:
    """A block begins where masks are not fewer, or another class is called."""
    laps, one, other = Laps(), Pace(), Pace()
    first = laps.of(one, 8)
    assert laps.of(one, 5) is first and laps.of(one, 2) is first
    second = laps.of(one, 8)
    assert second is not first and one.seconds == {True: [0.0], False: []}
    assert laps.of(other, 4).pace is other and len(one.seconds[False]) == 1
    laps.end()
    laps.end()
    assert len(other.seconds[True]) == 1


def test_classes() -> None:
    """Batches and lengths that are alike share what was measured."""
    paces = Paces()
    kept: list[Tensor] = [torch.ones(3, 30), torch.ones(4, 32), torch.ones(1, 1), torch.ones(5, 32)]
    found = [paces.get(mask) for mask in kept]
    assert found[0] is found[1] and len({id(pace) for pace in found}) == 3
    assert list(paces.of) == [(4, 32), (1, 1), (8, 32)]
