"""The plan: what the passes will do to a canonical graph, or why they will not.

Every value lives in one of three domains. *Canvas*: as the caller sees it. *Fed*: packed rows of
the tokens that are fed in this step. *Retained*: packed rows of the tokens that later layers
compute. A value is packed if packed tokens reach it: from the embedding of the token ids, through
token-wise operators and attention sites. K/V writes return to the canvas. The cut lies inside the
second layer that is scored, after its q, k and v: what they need is fed, what follows is retained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from types import MappingProxyType

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from focus_compile.axes.axes import AxisMap, Dims, Quantity, Role
from focus_compile.axes.rules.experts import GROUPED
from focus_compile.axes.rules.table import ARANGES
from focus_compile.capture.breaks import refuse_fragment
from focus_compile.capture.canonical import Canonical
from focus_compile.errors import NothingToEvict, Unsupported
from focus_compile.graph.inputs import Input
from focus_compile.graph.nodes import data_flow, operands, tensor_of
from focus_compile.graph.sharding import Group
from focus_compile.graph.sizes import Extent
from focus_compile.plan.controls import Controls, Tables, declare, slot_name
from focus_compile.plan.heads import sharded_heads
from focus_compile.plan.sites import Site, find_sites
from focus_compile.refusals import (
    EXPERT_COUNTS,
    FEW_SITES,
    LATE_QUERIES,
    MIXES_TOKENS,
    NO_ATTENTION,
    NO_RULE,
    ONE_LAYER,
    ONE_TOKEN,
    READS_HISTORY,
    REMOVES_TOKENS,
    SITE_NOT_PACKED,
    SITE_ORDER,
    TWO_EMBEDDINGS,
    WRITES_INPUT,
)
from focus_compile.torch_private import OpOverload

__all__ = ["SCORED", "Domain", "Place", "Plan", "make_plan"]

SCORED = (0, 1)
"""The paper's two layers, of whose importances the ranking signal is the difference."""

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


@dataclass(frozen=True)
class Plan:
    """What the passes need to know about a canonical graph. Frozen; nodes are given by name.

    Attributes:
        ids: graph input of token ids, ``[B, T]`` or ``[T]``.
        embedding: the node that embeds them: packed tokens enter here.
        sites: attention sites in layer order, at least two.
        packed: packed values by name. Everything else is on the canvas.
        controls, tables: what the runtime and the host give to the programs.
        slots: inputs for the K/V of the step before, layer by layer, keys first.
        heads: the processes among which heads are shared out; None if this one has all of them.
        scored: the two layers of which importances are taken; the second is cut in two.
    """

    ids: str
    embedding: str
    sites: tuple[Site, ...]
    packed: Mapping[str, Place]
    controls: Controls[Input]
    tables: Tables[Input]
    slots: tuple[tuple[Input, Input], ...]
    heads: Group | None = None
    scored: tuple[int, int] = SCORED

    def __post_init__(self) -> None:
        _check_sites(self.sites, self.packed, self.scored, {})

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All that the passes add to the graph's inputs."""
        declared = (*vars(self.controls).values(), *vars(self.tables).values())
        return (*declared, *(slot for pair in self.slots for slot in pair))

    @property
    def scored_sites(self) -> tuple[Site, Site]:
        first, second = self.scored
        return self.sites[first], self.sites[second]


def make_plan(canonical: Canonical, scored: tuple[int, int] = SCORED) -> Plan:
    """Decide what to restrict in a canonical graph.

    ``scored``: the two layers, in order, whose attention ranks tokens.

    Raises:
        Unsupported: with the reason and the operator at fault.
    """
    gm, axes = canonical.gm, canonical.axes
    _refuse_mutation(gm)
    entry = axes.entry
    if entry is None:
        refuse_fragment(gm)
    if not entry.alone:
        raise Unsupported(TWO_EMBEDDINGS, entry.embedding)
    if not axes.of(entry.ids)[-1]:
        raise NothingToEvict(ONE_TOKEN, entry.embedding)
    sites = find_sites(gm, axes)
    if not sites:
        raise Unsupported(NO_ATTENTION)
    if len(sites) == 1:
        raise Unsupported(ONE_LAYER)
    if len(sites) <= scored[1]:
        raise Unsupported(FEW_SITES, layer=scored[1])
    nodes = {node.name: node for node in gm.graph.nodes}
    prefix = _early(gm, sites[scored[1]], nodes)
    packed = _packed(gm, axes, entry.embedding, sites, prefix)
    shape = {spec.name: spec.shape for spec in canonical.inputs}[entry.ids.name]
    batch = shape[0] if len(shape) == 2 else 1
    controls, tables = declare(tensor_of(entry.ids).device, batch)
    _check_sites(sites, packed, scored, nodes)
    return Plan(
        ids=entry.ids.name,
        embedding=entry.embedding.name,
        sites=sites,
        packed=MappingProxyType(packed),
        controls=controls,
        tables=tables,
        slots=tuple(_slots(canonical, site, nodes) for site in sites),
        heads=sharded_heads(gm, [nodes[site.query] for site in sites]),
        scored=scored,
    )


def _check_sites(
    sites: tuple[Site, ...],
    packed: Mapping[str, Place],
    scored: tuple[int, int],
    nodes: Mapping[str, Node],
) -> None:
    """Refuse sites that the passes could not restrict; ``nodes``: those to name as at fault."""
    if len(sites) <= scored[1]:
        raise Unsupported(FEW_SITES, layer=scored[1])
    for layer, site in enumerate(sites):
        if site.layer != layer:
            raise Unsupported(SITE_ORDER, nodes.get(site.out))
        for name in (site.query, site.out, *(write.new for write in site.writes)):
            if name not in packed:
                raise Unsupported(SITE_NOT_PACKED, nodes.get(site.out), layer=layer, name=name)
    last = sites[scored[1]]
    if packed[last.query].domain is not Domain.FED:
        raise Unsupported(LATE_QUERIES, nodes.get(last.out), layer=last.layer)


def _slots(canonical: Canonical, site: Site, nodes: Mapping[str, Node]) -> tuple[Input, Input]:
    """Inputs for the K/V that a layer had in the step before, history included."""
    shapes = {spec.name: spec.shape for spec in canonical.inputs}

    def slot(part: int) -> Input:
        write = site.writes[part]
        value = tensor_of(nodes[write.new])
        shape: list[Extent] = [int(size) for size in value.shape]
        shape[write.token_dim] = "token"
        if write.batch_dim is not None:
            shape[write.batch_dim] = "batch"
        if write.past is not None:
            history = shapes[write.past][write.token_dim]
            shape[write.token_dim] = (history, "token") if history != 0 else "token"
        name = slot_name(site.layer, part)
        return Input(name, tuple(shape), value.dtype, value.device, strided=True)

    return slot(0), slot(1)


def _refuse_mutation(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        target = node.target
        if not isinstance(target, OpOverload) or target is torch.ops.aten.detach_.default:
            continue
        if target._schema.is_mutable:
            raise Unsupported(WRITES_INPUT, node)


def _early(gm: GraphModule, last: Site, nodes: Mapping[str, Node]) -> set[Node]:
    """All up to a site's q, k and v; also what else stands there, such as outputs."""
    flow = data_flow(gm)
    ends = [nodes[last.query], *(nodes[write.new] for write in last.writes)]
    early: set[Node] = set(ends)
    for end in ends:
        early |= nx.ancestors(flow, end)
    return early | set(takewhile(lambda node: node.name != last.region[0], gm.graph.nodes))


def _packed(
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
