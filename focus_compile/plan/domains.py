"""Which values of a canonical graph are packed, and to which tokens.

Every value lives in one of three domains. *Canvas*: as the caller sees it. *Fed*: packed rows of
the tokens that are fed in this step. *Retained*: packed rows of the tokens that later layers
compute. A value is packed if packed tokens reach it: from the embedding of the token ids, through
token-wise operators and attention sites. K/V writes return to the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import GraphModule, Node

from focus_compile.axes.axes import AxisMap, Dims, Quantity, Role
from focus_compile.axes.rules.experts import GROUPED
from focus_compile.axes.rules.table import ARANGES
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import operands
from focus_compile.plan.sites import Site
from focus_compile.refusals import (
    EXPERT_COUNTS,
    MIXES_TOKENS,
    NO_RULE,
    READS_HISTORY,
    REMOVES_TOKENS,
)

__all__ = ["Domain", "Place", "packed_values"]

_COUNTS = (Quantity.COUNT, Quantity.END)


class Domain(Enum):
    """Where a packed value lives."""

    FED = "fed"
    RETAINED = "retained"


@dataclass(frozen=True)
class Place:
    """A packed value: its domain, and where its batch and token axes stand.

    ``token_dim`` is None where no dim is the tokens alone: choices of experts, lists sorted by
    expert, counts per expert. Such a value is only read by others of its domain. ``folded``: the
    token dim holds the batch axis too; its packed form is the same, but not that on the canvas.
    """

    domain: Domain
    batch_dim: int | None
    token_dim: int | None
    folded: bool = False


def packed_values(
    gm: GraphModule, axes: AxisMap, embedding: Node, sites: tuple[Site, ...], prefix: set[Node]
) -> dict[str, Place]:
    """Packed values by name, each checked: the operator must commute with gathering tokens."""
    packed: dict[str, Place] = {}
    regions = {name: site for site in sites for name in site.region}
    writes = {write.cat for site in sites for write in site.writes if write.cat is not None}
    merged = {
        write.new for site in sites for write in site.writes if write.cat is None
    }  # packed where computed, canvas for whoever reads them
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(
            node.meta["val"], torch.Tensor | tuple | list
        ):
            continue
        if node.name in regions and node.name != regions[node.name].out:
            continue
        if node.name in writes:
            continue
        reads = any(arg.name in packed and arg.name not in merged for arg in value_operands(node))
        lists = node.target in ARANGES and any(axes.listed(dim) for dim in axes.of(node))
        if not (reads or lists or node is embedding or node.name in regions):
            continue
        dims = axes.of(node) if isinstance(node.meta["val"], torch.Tensor) else axes.dims[node][0]
        if node.name not in regions:
            _check(node, axes)
        token_dim = _token_dim(axes, dims)
        if token_dim is None and not any(axes.holds(dim, Role.TOKEN) for dim in dims):
            _check_count(node, axes)
        domain = Domain.FED if node in prefix else Domain.RETAINED
        folded = token_dim is not None and len(axes.resolve(dims[token_dim])) > 1
        packed[node.name] = Place(domain, axes.position(dims, Role.BATCH), token_dim, folded)
    return packed


def value_operands(node: Node) -> list[Node]:
    """Operands that hold tensors, tuples of tensors included."""
    return [
        arg
        for arg in node.all_input_nodes
        if isinstance(arg.meta["val"], torch.Tensor | tuple | list)
    ]


def _token_dim(axes: AxisMap, dims: Dims) -> int | None:
    """Index of the dim that holds the token axis, alone or folded with the batch axis."""
    for index, dim in enumerate(dims):
        roles = [axis.role for axis in axes.resolve(dim)]
        if Role.TOKEN in roles and set(roles) <= {Role.TOKEN, Role.BATCH}:
            return index
    return None


def _check_count(node: Node, axes: AxisMap) -> None:
    """Refuse a value of all tokens together, but for counts that only tell experts their rows."""
    meaning = axes.meaning.get(node)
    if meaning is None or meaning.quantity not in _COUNTS:
        raise Unsupported(REMOVES_TOKENS, node)
    for user in node.users:
        user_meaning = axes.meaning.get(user)
        is_offsets = (
            user.target in GROUPED and operands(user)[2] is node and node not in user.args[:2]
        )
        if not is_offsets and (user_meaning is None or user_meaning.quantity not in _COUNTS):
            raise Unsupported(EXPERT_COUNTS, user)


def _check(node: Node, axes: AxisMap) -> None:
    """Refuse an operator that gathering tokens does not commute with."""
    if node in axes.unruled:
        raise Unsupported(NO_RULE, node)
    for dim in axes.mixed.get(node, ()):
        if axes.holds(dim, Role.TOKEN) or axes.holds(dim, Role.BATCH):
            raise Unsupported(MIXES_TOKENS, node)
    for operand in operands(node):
        for dim in axes.of(operand):
            if axes.resolve(dim) and any(axis.sum is not None for axis in axes.resolve(dim)):
                if axes.holds(dim, Role.TOKEN):
                    raise Unsupported(READS_HISTORY, node)
