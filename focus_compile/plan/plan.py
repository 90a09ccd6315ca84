"""The plan: what the passes will do to a canonical graph, or why they will not.

The cut lies inside the second layer that is scored, after its q, k and v: what they need is fed,
what follows is retained (:mod:`focus_compile.plan.domains`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from focus_compile.capture.breaks import refuse_fragment
from focus_compile.capture.canonical import Canonical
from focus_compile.errors import NothingToEvict, Unsupported
from focus_compile.graph.inputs import Input
from focus_compile.graph.nodes import data_flow, tensor_of
from focus_compile.graph.sharding import Group
from focus_compile.graph.sizes import Extent
from focus_compile.plan.controls import Controls, Tables, declare, slot_name
from focus_compile.plan.domains import Domain, Place, packed_values
from focus_compile.plan.heads import sharded_heads
from focus_compile.plan.sites import Site, find_sites
from focus_compile.refusals import (
    FEW_SITES,
    LATE_QUERIES,
    NO_ATTENTION,
    ONE_LAYER,
    ONE_TOKEN,
    SITE_NOT_PACKED,
    SITE_ORDER,
    TWO_EMBEDDINGS,
    WRITES_INPUT,
)
from focus_compile.torch_private import OpOverload

__all__ = ["SCORED", "Domain", "Place", "Plan", "make_plan", "refuse_mutation"]

SCORED = (0, 1)
"""The paper's two layers, of whose importances the ranking signal is the difference."""


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
    prefix = _prefix_nodes(gm, sites[scored[1]], nodes)
    packed = packed_values(gm, axes, entry.embedding, sites, prefix)
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
    inputs = {spec.name: spec for spec in canonical.inputs}

    def slot(part: int) -> Input:
        write = site.writes[part]
        value = tensor_of(nodes[write.new])
        shape: list[Extent] = [int(size) for size in value.shape]
        shape[write.token_dim] = "token"
        if write.batch_dim is not None:
            shape[write.batch_dim] = "batch"
        if write.past is not None:
            history = inputs[write.past].shape[write.token_dim]
            shape[write.token_dim] = (history, "token") if history != 0 else "token"
        name = slot_name(site.layer, part)
        held = write.past is not None and inputs[write.past].held
        return Input(name, tuple(shape), value.dtype, value.device, strided=True, held=held)

    return slot(0), slot(1)


def refuse_mutation(gm: GraphModule) -> None:
    """Refuse a graph that writes into a value.

    Raises:
        Unsupported: with the operator at fault.
    """
    for node in gm.graph.nodes:
        target = node.target
        if not isinstance(target, OpOverload) or target is torch.ops.aten.detach_.default:
            continue
        if target._schema.is_mutable:
            raise Unsupported(WRITES_INPUT, node)


def _prefix_nodes(gm: GraphModule, last: Site, nodes: Mapping[str, Node]) -> set[Node]:
    """All up to a site's q, k and v; also what else stands there, such as outputs."""
    flow = data_flow(gm)
    ends = [nodes[last.query], *(nodes[write.new] for write in last.writes)]
    prefix: set[Node] = set(ends)
    for end in ends:
        prefix |= nx.ancestors(flow, end)
    return prefix | set(takewhile(lambda node: node.name != last.region[0], gm.graph.nodes))
