"""Every way of putting values into a part of a tensor has one of two forms, with equal numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from focus_compile.capture.functional import functionalize
from focus_compile.capture.plain import say_plainly
from focus_compile.capture.put import put_of
from focus_compile.capture.puts import name_puts

SLOTS, START, TOKENS, HEADS, SIZE = 11, 3, 5, 2, 4
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def into_a_slice(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :, START : START + TOKENS] = new
    return x * 2


def from_the_end(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :, -7:-2] = new
    return x * 2


def into_narrow(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x.narrow(2, START, TOKENS).copy_(new)
    return x * 2


def into_a_view(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x.permute(2, 0, 3, 1)[START : START + TOKENS] = new.permute(2, 0, 3, 1)
    return x * 2


def into_a_folded_view(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x.view(-1, SLOTS, SIZE)[:, START : START + TOKENS] = new.flatten(0, 1)
    return x * 2


def a_view_of_a_slice(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """The slice is read after it was written through another view."""
    part = x[:, :, START : START + TOKENS]
    part.transpose(1, 2).copy_(new.transpose(1, 2))
    return x.sum() + part


def of_another_dtype(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :, START : START + TOKENS] = new.double()
    return x * 2


def one_for_all(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :, START : START + TOKENS] = new[:, :1]
    return x * 2


def slice_scatter(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    return x.slice_scatter(new, 2, START, START + TOKENS)


def what_is_left(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    return torch.cat([x[:, :, :START], new, x[:, :, START + TOKENS :]], 2)


def what_follows(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    return torch.cat([new, x[:, :, TOKENS:]], 2)


def by_index(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :, places] = new
    return x * 2


def by_index_of_a_view(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x.transpose(1, 2)[:, places] = new.transpose(1, 2)
    return x * 2


def by_a_row_of_places(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :, places[None].int()] = new[:, :, None]
    return x * 2


def index_copy(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    return x.transpose(1, 2).index_copy(1, places, new.transpose(1, 2))


def scatter(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    return x.scatter(2, places[:, None].expand(new.shape), new)


def scatter_in_place(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    return x.scatter_(2, places.view(1, 1, -1, 1).repeat(len(x), HEADS, 1, SIZE), new)


def rows_of_all(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """Places of their own by form alone."""
    rows = torch.arange(len(x))[:, None]
    x[rows, :, places.expand(len(x), -1)] = new.transpose(1, 2)
    return x * 2


ALIKE = [
    into_a_slice, from_the_end, into_narrow, into_a_view, into_a_folded_view, a_view_of_a_slice,
    of_another_dtype, one_for_all, slice_scatter, what_is_left, what_follows, by_index,
    by_index_of_a_view, by_a_row_of_places, index_copy, scatter, scatter_in_place, rows_of_all,
]  # fmt: skip


def rows_by_index(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[torch.arange(len(x))[:, None], :, places] = new.transpose(1, 2)
    return x * 2


def rows_of_a_view(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x.transpose(1, 2)[torch.arange(len(x)).view(-1, 1), places] = new.transpose(1, 2)
    return x * 2


def rows_by_scatter(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    return x.scatter(2, places[:, None, :, None].expand_as(new), new)


def rows_last(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """A cache whose second dim is the rows."""
    x.transpose(0, 1).scatter_(
        2, places[None, :, :, None].expand(HEADS, -1, -1, SIZE), new.transpose(0, 1)
    )
    return x * 2


PER_ROW = [rows_by_index, rows_of_a_view, rows_by_scatter, rows_last]


def taken(model: Write, batch: int) -> tuple[GraphModule, list[Tensor]]:
    """The graph of a model in its plainest words, and what it was made for: ``x`` and others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, HEADS, SLOTS, SIZE, generator=generator)
    new = torch.randn(batch, HEADS, TOKENS, SIZE, generator=generator)
    places = torch.tensor([7, 0, 9, 1, 4])
    if model not in ALIKE:
        places = torch.stack([places.roll(row) for row in range(batch)])
    given = [x, new, places]
    gm = make_fx(model, pre_dispatch=True, tracing_mode="fake")(*given)
    gm.graph.eliminate_dead_code()
    say_plainly(gm)
    name_puts(gm)
    return gm, given


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", [*ALIKE, *PER_ROW])
def test_one_form(model: Write, batch: int) -> None:
    gm, (x, *others) = taken(model, batch)
    written = functionalize(gm)
    puts = [put for node in gm.graph.nodes if (put := put_of(node)) is not None]
    assert len(puts) == 1
    assert (puts[0].row is not None) == (model in PER_ROW and batch > 1)
    assert puts[0].x.op == "placeholder" and puts[0].dim == 2
    gm.graph.output_node().args = ((*gm.graph.output_node().args, *written.values()),)
    gm.recompile()
    kept = x.clone()
    result, *last = gm(x, *others)
    assert torch.equal(x, kept)
    assert torch.equal(result, model(kept, *others))
    assert bool(last) == (not torch.equal(x, kept))
    assert all(torch.equal(value, kept) for value in last)


def a_step(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :, : 2 * TOKENS : 2] = new
    return x * 2


def row_by_row(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    for row in range(len(x)):
        x[row, :, START : START + TOKENS] = new[row]
    return x * 2


def some_heads(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    x[:, :1, START : START + TOKENS] = new[:, :1]
    return x * 2


def other_rows(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """Rows that are not counted: they may be any."""
    x[torch.arange(len(x)).flip(0)[:, None], :, places] = new.transpose(1, 2)
    return x * 2


def added_up(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    torch.ops.aten.index_put_(x, [None, None, places[0]], new, True)
    return x * 2


def of_features(x: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """Places that differ from feature to feature."""
    return x.scatter(2, places[0, None, None, :, None] + torch.arange(SIZE).expand_as(new) % 2, new)


@pytest.mark.parametrize(
    "model", [a_step, row_by_row, some_heads, other_rows, added_up, of_features]
)
def test_left_alone(model: Write) -> None:
    """Nothing that would say less than the model wrote."""
    gm, (x, *others) = taken(model, 3)
    functionalize(gm)
    puts = [put for node in gm.graph.nodes if (put := put_of(node)) is not None]
    assert not any(put.x.op == "placeholder" for put in puts)
    assert torch.equal(gm(x.clone(), *others), model(x.clone(), *others))
