"""NaN as a dye: what a request must not see is filled with it, and no output changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import Generated, Session
from tests.fuzz.caller import Caller
from tests.fuzz.subjects import RowDraw
from tests.support.dialects import DIALECTS, Subject
from tests.support.harness import MASK, Run, Sizes, retained
from tests.support.third_party import polite_model

NAMES = ("llada", "dream", "sdar-static", "llada2-sorted")
"""Dialects whose calls have a history; caches of every kind, and experts."""
STEPS, HISTORY, ALPHA = 5, 6, 1.2
TOLERANCE = 1e-5
Between = Callable[[Session, Subject, int], None]
"""What happens after the n-th step of a block."""


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield Subject(DIALECTS[request.param])


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def logits_of(subject: Subject, draw: RowDraw) -> Tensor:
    """The draw's numbers start anew at every call."""
    return subject.focus(dataclasses.replace(draw))


def decode(
    subject: Subject, focus: Session, caller: Caller, between: Between = lambda *_: None
) -> list[Tensor]:
    """Logits of the steps of one block; ``between`` runs after each of them."""
    made = []
    for step in range(STEPS):
        draw = caller.draw()
        made.append(logits_of(subject, draw))
        assert focus.retain_mask is not None
        where = caller.masked & focus.retain_mask
        caller.masked = caller.masked & ~(where & (where.cumsum(1) <= 1))
        between(focus, subject, step)
    return made


def caller(seed: int = 3, kind: type[Caller] = Caller) -> Caller:
    """Three rows, all masks."""
    made = kind(seed, 3, tokens=7, history=HISTORY, given=False)
    made.masked = torch.ones_like(made.masked)
    return made


def parts(focus: Session, subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Every slot's block ``[T, B, ...]``, and which of its positions hold something."""
    (state,) = focus._states.values()
    (program,) = {program.layout for program in subject.executables}
    tokens = state.masked.shape[1]
    for index, given in enumerate(program.slots):
        slot = state.slots[given.name]
        written = state.written01 if index < 4 else state.written
        (at,) = [dim for dim, extent in enumerate(given.shape) if isinstance(extent, tuple)]
        start = slot.shape[at] - tokens
        yield slot.narrow(at, start, tokens).movedim(at, 0), written.T


def dye(focus: Session, subject: Subject, what: str) -> int:
    """NaN where nothing is stored, or where something is; in how many slots of how many layers."""
    total = 0
    for block, written in parts(focus, subject):
        where = ~written if what == "unwritten" else written
        block[where] = torch.nan
        total += int(where.sum())
    return total


def test_slots_that_hold_nothing_are_not_read(subject: Subject) -> None:
    dyed = 0

    def between(focus: Session, subject: Subject, _: int) -> None:
        nonlocal dyed
        dyed += dye(focus, subject, "unwritten")

    with focus_compile.session(alpha=ALPHA) as focus:
        expected = decode(subject, focus, caller())
    with focus_compile.session(alpha=ALPHA) as focus:
        actual = decode(subject, focus, caller(), between)
    assert all(map(torch.equal, actual, expected)) and dyed


def dye_all(focus: Session, subject: Subject, _: int) -> None:
    dye(focus, subject, "written")


def test_slots_that_hold_something_are_read(subject: Subject) -> None:
    """The dye is visible where it should be: else these tests would show nothing."""
    with focus_compile.session(alpha=ALPHA) as focus:
        actual = decode(subject, focus, caller(), dye_all)
    assert not actual[0].isnan().any()
    assert any(logits.isnan().any() for logits in actual[1:])


def test_slots_of_a_finished_request_are_not_read(subject: Subject) -> None:
    """Neither those of a session that has ended, nor those of rows that start anew."""
    with focus_compile.session(alpha=ALPHA) as focus:
        expected = decode(subject, focus, caller(seed=5))
    with focus_compile.session(alpha=ALPHA) as focus:
        focus.owns_kv = True
        decode(subject, focus, caller(seed=4))
        (state,) = focus._states.values()
        for slot in state.slots.values():
            slot.fill_(torch.nan)
        actual = decode(subject, focus, caller(seed=5))
    assert all(map(torch.equal, actual, expected))
    assert not actual[0].isnan().any()


def test_two_requests_in_turns(subject: Subject) -> None:
    """One of them is NaN throughout; their sessions alternate, of the same sizes."""
    with focus_compile.session(alpha=ALPHA) as focus:
        expected = decode(subject, focus, caller(seed=5))
    dyed = caller(seed=4)

    def other(*_: object) -> None:
        with focus_compile.session(alpha=ALPHA) as inner:
            decode(subject, inner, dyed, dye_all)
        dyed.masked = torch.ones_like(dyed.masked)

    with focus_compile.session(alpha=ALPHA) as focus:
        actual = decode(subject, focus, caller(seed=5), other)
    assert all(map(torch.equal, actual, expected))


@dataclasses.dataclass(frozen=True)
class Dyed(RowDraw):
    """Row 1 has a history of another value throughout."""

    value: float = torch.nan

    def random(self, *shape: int) -> Tensor:
        made = super().random(*shape)
        made[1] = self.value
        return made


class Dyeing(Caller):
    """A caller whose row 1 is dyed."""

    value = torch.nan

    def draw(self) -> RowDraw:
        plain = super().draw()
        values = {name: getattr(plain, name) for name in ("ids", "masked", "visible", "rows")}
        return Dyed(history=plain.history, seed=0, value=self.value, **values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_in_one_row_stays_there(subject: Subject, value: float) -> None:
    with focus_compile.session(alpha=ALPHA) as focus:
        expected = decode(subject, focus, caller())
    dyeing = caller(kind=Dyeing)
    dyeing.value = value  # type: ignore[attr-defined]
    with focus_compile.session(alpha=ALPHA) as focus:
        actual = decode(subject, focus, dyeing)
    assert not actual[0][1][retained(actual[0][1])].isfinite().all()
    for one, other in zip(actual, expected, strict=True):
        for row in (0, 2):
            assert torch.equal(retained(one[row]), retained(other[row]))
            torch.testing.assert_close(one[row], other[row], atol=TOLERANCE, rtol=TOLERANCE)


def test_generate_with_nan_in_one_row() -> None:
    """An embedding is NaN, and one prompt has its token: the other rows are decoded as ever."""
    model = polite_model(sizes=Sizes(layers=3))
    run = Run(model, {"alpha": ALPHA}, dynamic=True)
    prompts = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))

    def generated() -> Generated:
        out = focus_compile.generate(
            run.compiled, prompts, max_new_tokens=14, block_length=7, mask_token_id=MASK,
            confidence_threshold=0.05, return_dict=True,
        )  # fmt: skip
        return out

    expected = generated()
    model.model.embed_tokens.weight[55] = torch.nan
    prompts[1, 2] = 55
    actual = generated()
    assert actual.retained_fraction < 1
    assert not torch.equal(actual.sequences[1, 6:], expected.sequences[1, 6:])
    for row in (0, 2):
        assert torch.equal(actual.sequences[row, 6:], expected.sequences[row, 6:])
