"""Rescue: the evicted tokens of some rows are computed in the same step (docs/algorithm.md, 11).

The prefix left the residual stream, queries, keys and values of every
fed token at the cut, so this is a second call of the suffix program, over other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from focus_compile.ops.tables import retained_tables, tables
from focus_compile.plan.controls import Tables
from focus_compile.plan.plan import Domain
from focus_compile.programs.halves import Halves, Returned
from focus_compile.runtime.outputs import Packed

__all__ = ["recompute"]


def recompute(
    suffix: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    halves: Halves,
    values: Mapping[str, Tensor],
    fed: Tensor,
    retained: Packed,
    rescued: Tensor,
    buckets: Sequence[int] = (),
    *,
    stored: Collection[str] = (),
    overwrites: bool = False,
) -> tuple[dict[str, Tensor], Packed]:
    """Run the suffix again over the rescued tokens, from what the prefix left.

    Args:
        values: what both programs were given and returned in the first pass.
        fed, rescued: bool ``[B, T]``; rescued tokens were fed and are not retained.
        retained: tokens of the first pass.
        stored: names of keys and values that are written where they stay, in the caller's cache.
        overwrites: a run of the suffix overwrites what the last one returned, as a CUDA graph does.

    Returns:
        values that take the place of the first pass's: keys and values of history and block, and
        packed outputs of retained and rescued tokens together, in row-major order; and which tokens
        these are.
    """
    order, inverse, places, sizes = tables(rescued)
    count, most = sizes.tolist()
    tokens, rows = retained_tables(order, places, count, most, buckets)
    both = _packed_outputs(halves)
    first = {value.name: retained.rows(values[value.name], value.token_dim) for value in both}
    slots = {slot: values[name] for slot, name in halves.slots.items() if name not in stored}
    if overwrites:
        first = {name: value.clone() for name, value in first.items()}
        slots = {slot: value.clone() for slot, value in slots.items()}
    # the bound of visibility="prefix" is the last fed token; of each row in need all are stored now
    selection = {halves.selection.retain_mask: fed, halves.selection.inverse: inverse}
    controls = {"written": values["written"] | retained.keep, "reuse": torch.tensor(True)}
    given = {**values, **slots, **selection, **controls}
    made = suffix(given | vars(Tables(tokens=tokens, rows=rows)))
    extra = Packed(tokens[:count], rescued)
    union = torch.cat([retained.tokens, extra.tokens])
    place = union.argsort()
    for value in both:
        second = extra.rows(made[value.name], value.token_dim)
        joined = torch.cat([first[value.name], second], value.token_dim)
        made[value.name] = joined.index_select(value.token_dim, place)
    return made, Packed(union[place], retained.keep | rescued)


def _packed_outputs(halves: Halves) -> list[Returned]:
    """What the suffix returns with a row per retained token, each value once."""
    found = (own for own in halves.own if own is not None and own.domain is Domain.RETAINED)
    return list({own.name: own for own in found}.values())
