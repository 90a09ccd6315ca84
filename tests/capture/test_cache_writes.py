"""Models that write keys and values over a part of their cache, in all the ways that there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import focus_compile
from focus_compile import focus_backend
from tests.reference.emulation import Emulation
from tests.reference.state import Config
from tests.support.dialects import DIALECTS, Subject, draw_call
from tests.support.harness import MASK, PAPER, eager_inner, retained
from tests.support.models.llada import LLaDA, Places, Put, setitem

TOLERANCE = 1e-4
BLOCK, SLOTS, START, GROUPS, HEAD, LAYERS = 8, 27, 11, 2, 12, 3


def span(places: Places) -> tuple[Any, Any]:
    assert isinstance(places, slice)
    return places.start, places.stop


def slice_scatter(past: Tensor, new: Tensor, places: Places) -> Tensor:
    return past.slice_scatter(new, 2, *span(places))


def narrow(past: Tensor, new: Tensor, places: Places) -> Tensor:
    past.narrow(2, span(places)[0], new.shape[2]).copy_(new)
    return past


def transposed(past: Tensor, new: Tensor, places: Places) -> Tensor:
    past.transpose(1, 2)[:, slice(*span(places))] = new.transpose(1, 2)
    return past


def what_is_left(past: Tensor, new: Tensor, places: Places) -> Tensor:
    start, end = span(places)
    return torch.cat([past[:, :, :start], new, past[:, :, end:]], 2)


def counted(past: Tensor, new: Tensor, places: Places) -> Tensor:
    """Places that the model counts itself, in every layer anew."""
    past[:, :, torch.arange(*span(places))] = new
    return past


def index_copy(past: Tensor, new: Tensor, places: Places) -> Tensor:
    return past.index_copy_(2, places, new)


def scatter(past: Tensor, new: Tensor, places: Places) -> Tensor:
    assert isinstance(places, Tensor)
    return past.scatter_(2, places[None, None, :, None].expand_as(new), new)


def by_rows(past: Tensor, new: Tensor, places: Places) -> Tensor:
    """The same places in every row, by row."""
    assert isinstance(places, Tensor)
    rows = torch.arange(new.shape[0])[:, None]
    past[rows, :, places.expand(new.shape[0], -1)] = new.transpose(1, 2)
    return past


SPANS: list[Put] = [setitem, slice_scatter, narrow, transposed, what_is_left, counted]
INDEXED: list[Put] = [setitem, index_copy, scatter, by_rows]
WAYS = [*((put, START) for put in SPANS), *((put, START + torch.arange(BLOCK)) for put in INDEXED)]
Past = list[tuple[Tensor, Tensor]]


class Pair:
    """A model, and itself compiled: it must be restricted."""

    def __init__(self, build: Callable[[], nn.Module], dynamic: bool | None) -> None:
        options = {"mask_token_id": MASK, "strict": True, **PAPER}
        torch.manual_seed(0)
        self.model = build().eval()
        self.compiled = torch.compile(
            self.model,
            backend=lambda gm, given: focus_backend(gm, given, options=options, inner=eager_inner),
            dynamic=dynamic,
            fullgraph=True,
        )


def past_of(batch: int, seed: int = 0) -> Past:
    source = torch.Generator().manual_seed(seed)
    shape = (batch, GROUPS, SLOTS, HEAD)
    pairs = range(LAYERS)
    return [tuple(torch.randn(shape, generator=source) for _ in range(2)) for _ in pairs]  # type: ignore


def ids_of(batch: int) -> Tensor:
    ids = torch.full((batch, BLOCK), MASK)
    ids[:, 2] = torch.arange(batch)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("returned", [True, False], ids=["returned", "dropped"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dynamic", [True, False], ids=["symbols", "numbers"])
@pytest.mark.parametrize(("put", "places"), WAYS)
def test_applied(put: Put, places: Tensor | int, dynamic: bool, batch: int, returned: bool) -> None:
    """Nothing evicted: logits and cache as eager execution leaves them, for another start too.

    Evicted: no slot outside the block changes.
    """
    pair = Pair(lambda: LLaDA(groups=GROUPS, put=put), dynamic)
    ids = ids_of(batch)
    for shift in (0, 3):
        expected, actual, evicted = (past_of(batch) for _ in range(3))
        arguments = {"use_cache": returned, "replace_position": places + shift}
        wanted = pair.model(ids, expected, **arguments)
        with focus_compile.session(alpha=1e9) as focus:
            found = pair.compiled(ids, actual, **arguments)
            assert focus.stats.steps == 1
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
        with focus_compile.session(alpha=1.0) as focus:
            kept = pair.compiled(ids, evicted, **arguments).attn_key_values
            assert focus.stats.retained < focus.stats.fed
        inside = slice(START + shift, START + shift + BLOCK)
        for left in (evicted, kept) if returned else (evicted,):
            for parts, pasts in zip(left, past_of(batch), strict=True):
                for part, before in zip(parts, pasts, strict=True):
                    part[:, :, inside] = before[:, :, inside]
                    assert torch.equal(part, before)


@torch.no_grad()
@pytest.mark.parametrize("put", [*SPANS, *INDEXED])
def test_evicting_equals_the_emulation(put: Put) -> None:
    name = "llada-span" if put in SPANS else "llada-dual"
    dialect = dataclasses.replace(DIALECTS[name], build=lambda: LLaDA(groups=GROUPS, put=put))
    subject, evicting = Subject(dialect), 0
    for seed in range(6):
        draw = draw_call(dialect, seed)
        config = Config(1.0 + (seed % 3) / 2)
        found = Emulation(config).step(
            lambda d=draw: subject.eager(d), draw.ids, draw.masked, draw.history
        )
        with focus_compile.session(alpha=config.alpha):
            actual = subject.focus(draw)
        assert torch.equal(retained(actual), found.retained)
        expected = found.logits * found.retained.unsqueeze(-1)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
        evicting += bool((~found.retained).any())
    assert evicting > 3


# -- rows with slots of their own ------------------------------------------------------------------


def rows_by_index(past: Tensor, new: Tensor, places: Places) -> Tensor:
    past[torch.arange(new.shape[0])[:, None], :, places] = new.transpose(1, 2)
    return past


def rows_by_scatter(past: Tensor, new: Tensor, places: Places) -> Tensor:
    assert isinstance(places, Tensor)
    return past.scatter_(2, places[:, None, :, None].expand(new.shape), new)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False], ids=["symbols", "numbers"])
@pytest.mark.parametrize("put", [rows_by_index, rows_by_scatter])
def test_rows_with_slots_of_their_own(put: Put, dynamic: bool) -> None:
    """Steps of a block, and of the next one: every row as if it were alone."""
    pair = Pair(lambda: LLaDA(groups=GROUPS, put=put), dynamic)
    alone = Pair(lambda: LLaDA(groups=GROUPS), True)
    starts = torch.tensor([11, 3, 0])
    past, ids, evicted = past_of(3), ids_of(3), 0
    singles = [[(k[b : b + 1].clone(), v[b : b + 1].clone()) for k, v in past] for b in range(3)]
    with focus_compile.session(alpha=1.0) as focus:
        turns: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        for step in range(9):
            if step == 5:  # the block is stored, and another one begins
                ids = ids.masked_fill(ids == MASK, 9)
            masked = bool((ids == MASK).any())
            places = starts[:, None] + torch.arange(BLOCK)
            logits = pair.compiled(ids, past, replace_position=places).logits
            turns.append((ids, places, logits, focus.retain_mask if masked else None))
            if not masked:
                ids, starts = ids_of(3), starts + BLOCK
                continue
            assert focus.retain_mask is not None
            evicted += int((~focus.retain_mask).sum())
            chosen = (ids == MASK) & focus.retain_mask
            ids = ids.masked_fill(chosen & (chosen.cumsum(1) <= 1), 7)
    assert evicted > 9
    for row, single in enumerate(singles):
        with focus_compile.session(alpha=1.0) as focus:
            for given, places, logits, kept in turns:
                mine = slice(row, row + 1)
                expected = alone.compiled(given[mine], single, replace_position=places[row]).logits
                torch.testing.assert_close(logits[mine], expected, atol=TOLERANCE, rtol=TOLERANCE)
                if kept is not None:
                    assert torch.equal(focus.retain_mask, kept[mine])
        for left, wanted in zip(past, single, strict=True):
            for part, one in zip(left, wanted, strict=True):
                torch.testing.assert_close(part[row], one[0], atol=TOLERANCE, rtol=TOLERANCE)


# -- caches of other shapes ------------------------------------------------------------------------


class Stacked(nn.Module):
    """One tensor ``[layers, 2, B, G, M, D]`` for all layers."""

    def __init__(self, unbind: bool) -> None:
        super().__init__()
        self.model, self.unbind = LLaDA(groups=GROUPS), unbind

    def forward(self, ids: Tensor, cache: Tensor, place: int) -> Tensor:
        layers = cache.unbind() if self.unbind else [cache[layer] for layer in range(LAYERS)]
        pasts = [(layer[0], layer[-1]) for layer in layers]
        logits: Tensor = self.model(ids, pasts, replace_position=place).logits
        return logits


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dynamic", [True, False], ids=["symbols", "numbers"])
@pytest.mark.parametrize("unbind", [True, False])
def test_one_tensor_for_all_layers(unbind: bool, dynamic: bool, batch: int) -> None:
    pair, pasts = Pair(lambda: Stacked(unbind), dynamic), past_of(batch)
    whole = torch.stack([torch.stack(past) for past in pasts])
    expected, actual = whole.clone(), whole.clone()
    wanted = pair.model(ids_of(batch), expected, START)
    with focus_compile.session(alpha=1e9):
        found = pair.compiled(ids_of(batch), actual, START)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
    plain = Pair(lambda: LLaDA(groups=GROUPS), dynamic)
    with focus_compile.session(alpha=1.0) as focus:
        evicted = pair.compiled(ids_of(batch), whole, START)
        assert focus.stats.retained < focus.stats.fed
    with focus_compile.session(alpha=1.0):
        same = plain.compiled(ids_of(batch), pasts, replace_position=START).logits
    assert torch.equal(evicted, same)
    assert torch.equal(whole, torch.stack([torch.stack(past) for past in pasts]))


def token_first(past: Tensor, new: Tensor, places: Places) -> Tensor:
    """A cache ``[B, M, G, D]``."""
    past[:, places] = new.transpose(1, 2)
    return past.transpose(1, 2)


def folded(past: Tensor, new: Tensor, places: Places) -> Tensor:
    """A cache ``[B, M, G * D]``."""
    past[:, places] = new.transpose(1, 2).flatten(2)
    return past.view(past.shape[0], -1, GROUPS, HEAD).transpose(1, 2)


SHAPES: dict[str, tuple[Put, Callable[[Tensor], Tensor]]] = {
    "[B, M, G, D]": (token_first, lambda past: past.transpose(1, 2).contiguous()),
    "[B, M, G * D]": (folded, lambda past: past.transpose(1, 2).flatten(2)),
}


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dynamic", [True, False], ids=["symbols", "numbers"])
@pytest.mark.parametrize("places", [START, START + torch.arange(BLOCK)], ids=["span", "index"])
@pytest.mark.parametrize("shape", SHAPES)
def test_caches_of_other_shapes(
    shape: str, places: Tensor | int, dynamic: bool, batch: int
) -> None:
    """As the same cache in the usual shape, evicting; nothing evicted, as eager."""
    put, change = SHAPES[shape]
    pair = Pair(lambda: LLaDA(groups=GROUPS, put=put), dynamic)
    plain = Pair(lambda: LLaDA(groups=GROUPS), dynamic)
    for alpha in (1.0, 1e9):
        pasts = past_of(batch)
        changed = [(change(key), change(value)) for key, value in pasts]
        with focus_compile.session(alpha=alpha) as focus:
            found = pair.compiled(ids_of(batch), changed, replace_position=places).logits
            assert (focus.stats.retained < focus.stats.fed) == (alpha == 1.0)
        with focus_compile.session(alpha=alpha):
            wanted = plain.compiled(ids_of(batch), pasts, replace_position=places).logits
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
        for left, right in zip(changed, pasts, strict=True):
            torch.testing.assert_close(left, tuple(map(change, right)))


# -- what is refused -------------------------------------------------------------------------------


def row_by_row(past: Tensor, new: Tensor, places: Places) -> Tensor:
    for row in range(new.shape[0]):
        past[row, :, places] = new[row]
    return past


def cut_off(past: Tensor, new: Tensor, places: Places) -> Tensor:
    past[:, :, places] = new
    return past[:, :, : span(places)[1]]


REFUSED: list[tuple[Put, str, str]] = [
    (row_by_row, "an operator writes into its input", "of all rows and heads at once"),
    (cut_off, "the model cuts off a part of a cache", "attend to all slots of the cache"),
]


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False], ids=["symbols", "numbers"])
@pytest.mark.parametrize(("put", "reason", "cure"), REFUSED)
def test_refused(put: Put, reason: str, cure: str, dynamic: bool) -> None:
    pair = Pair(lambda: LLaDA(groups=GROUPS, put=put), dynamic)
    with pytest.raises(BackendCompilerFailed, match=reason) as error:
        pair.compiled(ids_of(2), past_of(2), replace_position=START)
    assert isinstance(error.value.inner_exception, focus_compile.Unsupported)
    assert cure in error.value.inner_exception.cure
