"""Models that transformers' ``tp_plan`` shards over processes: the graph of one rank.

In Dynamo's graph sharded weights are DTensors, and calls pass between these and local tensors. Run
by :class:`LocalRank` it is a graph of local tensors and collectives. Whether heads are sharded is
read off it: then the queries come from a sharded weight, with no collective on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from focus_compile.errors import Unsupported
from focus_compile.graph.sharding import Group, collectives
from focus_compile.ops.library import focus
from focus_compile.refusals import OWN_COLLECTIVES, UNKNOWN_SHARDS
from focus_compile.torch_private import OpOverload, OpOverloadPacket

__all__ = ["LocalRank", "local_value", "shard_of"]


@dataclass(frozen=True)
class Part:
    """A DTensor: its local tensor, how it is placed, and its size along the sharded dim."""

    value: Tensor
    placement: Placement
    size: int
    mesh: DeviceMesh


def local_value(value: Any) -> Any:
    """What the graph of one rank has for a fake value of Dynamo's: a mesh is no value there."""
    if isinstance(value, DTensor):
        own = value._local_tensor
        return torch.nn.Parameter(own, False) if isinstance(value, torch.nn.Parameter) else own
    return 0 if isinstance(_real(value), DeviceMesh) else value


def shard_of(value: Any) -> Group | None:
    """The processes that a fake value of Dynamo's is sharded over."""
    if isinstance(value, DTensor) and any(placed.is_shard() for placed in value.placements):
        return _group(_mesh(value.device_mesh))
    return None


class LocalRank(fx.Interpreter):
    """Runs Dynamo's graph on local tensors, its inputs of :func:`local_value`.

    Raises:
        Unsupported: a call that sharded values reach is not known, or a collective is of others.
    """

    def __init__(self, gm: GraphModule, values: Sequence[Any]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.values = iter(values)
        self.groups = {group.name for value in values if (group := shard_of(value)) is not None}
        self.node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value, own = next(self.values), super().placeholder(target, args, kwargs)
        if isinstance(value, DTensor):
            return self._part(own, value.device_mesh, value.placements, value.shape)
        return value if isinstance(_real(value), DeviceMesh) else own

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is DTensor.from_local:
            value, mesh, placements = args[:3]
            return self._part(value, mesh, placements, kwargs.get("shape", value.shape))
        if target is torch.nn.functional.embedding and len(args) > 1 and isinstance(args[1], Part):
            return self._embedding(*args, **kwargs)
        if isinstance(target, OpOverload | OpOverloadPacket):
            if "_c10d_functional" in str(target):
                self._check_collective(str(target), args)
        self._refuse_parts(args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        part = args[0]
        if isinstance(part, Part):
            if target == "to_local":
                return part.value
            if target == "redistribute":
                return self._replicated(part, *args[1:], **kwargs)
        self._refuse_parts(args, kwargs)
        return super().call_method(target, args, kwargs)

    def _part(self, value: Tensor, mesh: Any, placements: Any, shape: Any) -> Part:
        mesh, (placement, *others) = _mesh(mesh), placements
        if others:
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        size = shape[placement.dim] if placement.is_shard() else 0
        return Part(value, placement, size, mesh)

    def _embedding(self, ids: Any, weight: Part, *options: Any, **named: Any) -> Part:
        """Some rows of the table: a term of a sum over ranks; or some features of all rows.

        ``padding_idx`` matters to gradients only.
        """
        ids = ids.value if isinstance(ids, Part) else ids
        limit = named.get("max_norm", options[1] if len(options) > 1 else None)
        if limit is not None or not weight.placement.is_shard():
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        if weight.placement.is_shard(1):
            features = torch.nn.functional.embedding(ids, weight.value)
            return Part(features, Shard(ids.dim()), weight.size, weight.mesh)
        rank, ranks = weight.mesh.get_local_rank(), weight.mesh.size()
        start = min(weight.size, rank * -(-weight.size // ranks))
        rows = focus.embedding_shard(weight.value, ids, start)
        return Part(rows, Partial(), 0, weight.mesh)

    def _replicated(self, part: Part, **how: Any) -> Part:
        """``redistribute(placements=[Replicate()])``."""
        value, placement, group = part.value, part.placement, _group(part.mesh)
        if list(how) != ["placements"] or list(how["placements"]) != [Replicate()]:
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        if placement.is_partial("sum"):
            reduced = collectives.all_reduce(value, "sum", group.name)
            value = collectives.wait_tensor(reduced)
        elif placement.is_shard() and placement.dim in (-1, value.dim() - 1):  # type: ignore[attr-defined]
            value = focus.gather_ranks(value, part.size, group.ranks, group.name)
        elif not placement.is_replicate():
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        return Part(value, Replicate(), 0, part.mesh)

    def _check_collective(self, name: str, args: Any) -> None:
        """Sums over the group of the weights are understood, and nothing else."""
        if "wait_tensor" in name:
            return
        if not ("all_reduce" in name and args[1] == "sum" and args[2] in self.groups):
            raise Unsupported(OWN_COLLECTIVES, self.node)

    def _refuse_parts(self, *values: Any) -> None:
        def check(value: Any) -> None:
            if isinstance(value, Part):
                raise Unsupported(UNKNOWN_SHARDS, self.node)

        map_aggregate(values, check)


def _real(value: Any) -> Any:
    """What a fake script object stands for."""
    return getattr(value, "real_obj", value)


def _mesh(value: Any) -> DeviceMesh:
    mesh: DeviceMesh = _real(value)
    if mesh.ndim != 1:
        raise Unsupported(UNKNOWN_SHARDS)
    return mesh


def _group(mesh: DeviceMesh) -> Group:
    return Group(mesh.size(), mesh.get_group().group_name)
