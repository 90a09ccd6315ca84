"""Positions and numbers that a model looks up in its arguments: read before the graph.

As in Fast-dLLM's dual cache: a mask says over which slots of a cache of the whole canvas the block
is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile.adapters.looks_up import looked_up
from focus_compile.adapters.source import read
from focus_compile.errors import UncommittedHistory
from tests.support.models.llada import Block, LLaDA, Past, Places, Rotary

MASK, PROMPT, LENGTH, BLOCKS = 60, 11, 7, 2

pytestmark = pytest.mark.usefixtures("no_inductor")


class Ending(Rotary):
    """Turns queries by the rows of the table that end at the last place, a number."""

    def turn(self, x: Tensor, places: Places) -> Tensor:
        if isinstance(places, Tensor):
            end = places.max() + 1
            places = slice(end.item() - x.shape[2], end.item())
        return super().turn(x, places)


class Marked(Block):
    """As Fast-dLLM's: the places of all rows in one list, so that there is one row."""

    def attention(self, q, k, v, past, replace_position):  # type: ignore[no-untyped-def]
        if replace_position is not None:
            replace_position = replace_position.nonzero(as_tuple=True)[1]
        return super().attention(q, k, v, past, replace_position)


class First(Block):
    """The places of the first row, which are those of all rows."""

    def attention(self, q, k, v, past, replace_position):  # type: ignore[no-untyped-def]
        if replace_position is not None:
            replace_position = torch.where(replace_position[0])[0]
        return super().attention(q, k, v, past, replace_position)


class Listed(Block):
    """Rows have places of their own, as many each."""

    def attention(self, q, k, v, past, replace_position):  # type: ignore[no-untyped-def]
        if replace_position is not None:
            places = replace_position.nonzero()[:, 1]
            replace_position = places.view(replace_position.shape[0], -1)
        return super().attention(q, k, v, past, replace_position)


def by_row(past: Tensor, new: Tensor, places: Any) -> Tensor:
    rows = torch.arange(past.shape[0], device=past.device)[:, None]
    past[rows, :, places] = new.transpose(1, 2)
    return past


def model(kind: type[Block], rotary: type[Rotary] = Rotary) -> LLaDA:
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = LLaDA(**({"put": by_row} if kind is Listed else {})).eval()
    for block in made.blocks:
        assert isinstance(block, Block)
        block.__class__, block.rotary_emb.__class__ = kind, rotary
    return made


def marked(x: Tensor, start: int, stop: int) -> Tensor:
    places = torch.zeros_like(x, dtype=torch.bool)
    places[:, start:stop] = True
    return places


Call = Callable[..., Any]


def decode(call: Call, rows: int, refill: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Two blocks of masks, two tokens a step; the cache is filled by a call of the whole canvas."""
    x = torch.arange(PROMPT)[None].repeat(rows, 1) * 3 % 50
    x = torch.cat((x, torch.full((rows, LENGTH * BLOCKS), MASK)), 1)
    seen: list[Tensor] = []
    past: Past | None = None
    for start in range(PROMPT, x.shape[1], LENGTH):
        stop = start + LENGTH
        if past is None or refill:
            past = call(x, use_cache=True).attn_key_values
        while (x[:, start:stop] == MASK).any():
            block = x[:, start:stop]
            where = marked(x, start, stop)
            made = call(block, past_key_values=past, use_cache=True, replace_position=where)
            seen.append(made.logits.clone())
            logits = made.logits.clone()
            logits[..., MASK] = -torch.inf
            sure, token = logits.max(-1)
            sure = sure.masked_fill(block != MASK, -torch.inf)
            for row in range(rows):
                for at in sure[row].topk(2).indices.tolist():
                    if block[row, at] == MASK and made.logits[row, at].any():
                        block[row, at] = token[row, at]
    return x, seen


KINDS = [(Marked, 1), (First, 3), (Listed, 3)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "rows", "rotary"),
    [*((kind, rows, Rotary) for kind, rows in KINDS), (Marked, 1, Ending), (First, 3, Ending)],
)
def test_numbers(
    kind: type[Block], rows: int, rotary: type[Rotary], caplog: pytest.LogCaptureFixture
) -> None:
    """One graph that fills the cache and one that steps; FOCUS in every call."""
    expected, logits = decode(model(kind, rotary), rows)
    plain = model(kind, rotary)
    caplog.set_level(logging.INFO, logger="focus_compile")
    compiled = focus_compile.compile(plain, mask_token_id=MASK, strict=True, exact=True)
    (said,) = [text for text in caplog.messages if "looked up before the graph" in text]
    assert f"{kind.__name__}.attention" in said and "`replace_position`" in said
    with focus_compile.session() as focus:
        found, made = decode(compiled, rows)
    status = focus_compile.status(compiled)
    assert focus.stats.steps == len(made) + BLOCKS and focus.stats.dense_calls == 0
    assert status.graphs == status.applied == 2
    assert torch.equal(found, expected)
    torch.testing.assert_close(made, logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "rows"), KINDS)
def test_evicting(kind: type[Block], rows: int) -> None:
    compiled = focus_compile.compile(model(kind), mask_token_id=MASK, strict=True, alpha=1.2)
    with focus_compile.session() as focus:
        found, made = decode(compiled, rows)
    assert not (found == MASK).any() and focus.stats.steps == len(made) + BLOCKS
    assert sum(focus.stats.retained_per_step) < sum(focus.stats.fed_per_step)


@torch.no_grad()
def test_a_cache_that_is_kept() -> None:
    """The next block attends to slots of the last one, which hold nothing: never in silence."""
    compiled = focus_compile.compile(model(Marked), mask_token_id=MASK, strict=True, alpha=1.01)
    with pytest.raises(UncommittedHistory):
        decode(compiled, 1, refill=False)


@torch.no_grad()
def test_it_can_be_forbidden(caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = decode(model(Marked, Ending), 1)
    caplog.set_level(logging.INFO, logger="focus_compile")
    compiled = focus_compile.compile(
        model(Marked, Ending), mask_token_id=MASK, exact=True, adapt=False
    )
    with focus_compile.session() as focus:
        found, _ = decode(compiled, 1)
    assert torch.equal(found, expected) and focus.stats.steps <= BLOCKS
    assert not [text for text in caplog.messages if "looked up before" in text]


@torch.no_grad()
def test_for_a_while() -> None:
    """The bare line, inside ``adapt``."""
    expected, _ = decode(model(First, Ending), 2)
    plain = model(First, Ending)
    options = {"mask_token_id": MASK, "strict": True, "exact": True}
    with focus_compile.adapt(plain), focus_compile.session() as focus:
        found, made = decode(torch.compile(plain, backend="focus", options=options), 2)
    assert torch.equal(found, expected) and focus.stats.steps == len(made) + BLOCKS


@torch.no_grad()
@pytest.mark.parametrize("places", [LENGTH - 1, LENGTH + 1])
def test_places_that_do_not_fit(places: int) -> None:
    """More or fewer of them than tokens: as the eager model, an error."""
    plain = model(First)
    compiled: Any = focus_compile.compile(plain, mask_token_id=MASK, strict=True, exact=True)
    decode(compiled, 1)
    x = torch.full((1, PROMPT + LENGTH), MASK)
    for call in (plain, compiled):
        past = call(x, use_cache=True).attn_key_values
        where = marked(x, 3, 3 + places)
        with pytest.raises((RuntimeError, IndexError)):
            call(x[:, :LENGTH], past, True, replace_position=where)


class Turned(LLaDA):
    """Whose rotary table begins at a number that it is called with."""

    def forward(self, input_ids: Tensor, first: Tensor | None = None) -> Tensor:  # type: ignore[override]
        assert first is not None
        at = first[0].item()
        sin = self.blocks[0].rotary_emb.sin[0, 0, at : at + input_ids.shape[1]]  # type: ignore
        x = self.wte(input_ids) + sin.repeat(1, 4)
        for block in self.blocks:
            x, _ = block(x, None, None)
        return self.ff_out(self.ln_f(x))  # type: ignore[misc]


@torch.no_grad()
def test_numbers_out_of_range(caplog: pytest.LogCaptureFixture) -> None:
    """Negative, a slice counts from the end: the dense program runs, and says so."""
    torch._dynamo.reset()
    plain = Turned().eval()
    compiled: Any = focus_compile.compile(plain, mask_token_id=MASK, strict=True, exact=True)
    ids = torch.full((2, LENGTH), MASK)
    for first, steps in ((5, 1), (9, 1), (-20, 0)):
        with focus_compile.session() as focus:
            made = compiled(ids, torch.tensor([first]))
        assert focus.stats.steps == steps
        torch.testing.assert_close(made, plain(ids, torch.tensor([first])), rtol=0, atol=1e-5)
    assert any("looks up in an argument" in text for text in caplog.messages)


class Counts(LLaDA):
    """What it looks up was computed of tokens, or is written before."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, first: Tensor | None = None, how: str = "tokens"
    ) -> Tensor:
        assert first is not None
        x = self.wte(input_ids)
        if how == "tokens":
            first = (x[0, :, 0] > 0).int() + first
        else:
            first.add_(1)
        x = x * first.max().item()
        for block in self.blocks:
            x, _ = block(x, None, None)
        return self.ff_out(self.ln_f(x))  # type: ignore[misc]


@torch.no_grad()
@pytest.mark.parametrize(
    ("how", "reason"),
    [("tokens", "looked up in what was computed of tokens"), ("write", "that the model writes")],
)
def test_refusals(how: str, reason: str) -> None:
    torch._dynamo.reset()
    plain = Counts().eval()
    ids, first = torch.full((2, LENGTH), MASK), torch.tensor([3])
    with focus_compile.adapt(plain):
        story = focus_compile.explain(plain, ids, first, how)
    (refusal,) = story.refusals
    assert reason in str(refusal) and "nonzero" in refusal.cure


# -- what is taken for a look-up -------------------------------------------------------------------


def row(where: Any) -> Any:
    return where[0].nonzero().flatten()


def compared(where: Any) -> Any:
    return torch.argwhere(where == 1)[:, 1]


def number(where: Any) -> Any:
    return where.max().item()


@pytest.mark.parametrize("function", [row, compared, number])
def test_what_is_found(function: Callable[..., Any]) -> None:
    method = read(function)
    assert method is not None and looked_up(method, ["where"]) == {"where"}
    assert not looked_up(method, ["ids"])


def chosen(where: Any) -> Any:
    return torch.where(where, 1, 0)


def local(where: Any) -> Any:
    made = torch.zeros(3)
    return made.nonzero(), where


def experts(self: nn.Module, x: Any, where: Any) -> Any:
    hit = torch.nn.functional.one_hot(where).sum(0)
    return [x[int(expert)] for expert in hit.nonzero()]


@pytest.mark.parametrize("function", [chosen, local, experts])
def test_what_is_left_alone(function: Callable[..., Any]) -> None:
    method = read(function)
    assert method is not None and not looked_up(method, ["where"])
