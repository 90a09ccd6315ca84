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
from focus_compile.torch_private import OpOverload, OpOverloadPacket, is_made_of_tensors

__all__ = ["LocalRank", "local_value", "shard_of"]


@dataclass(frozen=True)
class PlacedTensor:
    """A DTensor: its local tensor, how it is placed, and its size along the sharded dim."""

    value: Tensor
    placement: Placement
    size: int
    mesh: DeviceMesh


def local_value(value: Any) -> Any:
    """What the graph of one rank has for a fake value of Dynamo's.

    A mesh is no value there, nor is a tensor that is made of others, which are inputs themselves.
    """
    if isinstance(value, DTensor):
        local = value._local_tensor
        return torch.nn.Parameter(local, False) if isinstance(value, torch.nn.Parameter) else local
    mesh = isinstance(_real_object(value), DeviceMesh)
    return 0 if mesh or is_made_of_tensors(value) else value


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
        value, local = next(self.values), super().placeholder(target, args, kwargs)
        if isinstance(value, DTensor):
            return self._placed(local, value.device_mesh, value.placements, value.shape)
        return value if isinstance(_real_object(value), DeviceMesh) else local

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is DTensor.from_local:
            value, mesh, placements = args[:3]
            return self._placed(value, mesh, placements, kwargs.get("shape", value.shape))
        if (
            target is torch.nn.functional.embedding
            and len(args) > 1
            and isinstance(args[1], PlacedTensor)
        ):
            return self._embedding(*args, **kwargs)
        if isinstance(target, OpOverload | OpOverloadPacket):
            if "_c10d_functional" in str(target):
                self._check_collective(str(target), args)
        self._refuse_placed(args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        placed = args[0]
        if isinstance(placed, PlacedTensor):
            if target == "to_local":
                return placed.value
            if target == "redistribute":
                return self._replicated(placed, *args[1:], **kwargs)
        self._refuse_placed(args, kwargs)
        return super().call_method(target, args, kwargs)

    def _placed(self, value: Tensor, mesh: Any, placements: Any, shape: Any) -> PlacedTensor:
        mesh, (placement, *more_placements) = _mesh(mesh), placements
        if more_placements:
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        size = shape[placement.dim] if placement.is_shard() else 0
        return PlacedTensor(value, placement, size, mesh)

    def _embedding(
        self, ids: Any, weight: PlacedTensor, *options: Any, **named: Any
    ) -> PlacedTensor:
        """Some rows of the table: a term of a sum over ranks; or some features of all rows.

        ``padding_idx`` matters to gradients only.
        """
        ids = ids.value if isinstance(ids, PlacedTensor) else ids
        limit = named.get("max_norm", options[1] if len(options) > 1 else None)
        if limit is not None or not weight.placement.is_shard():
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        if weight.placement.is_shard(1):
            features = torch.nn.functional.embedding(ids, weight.value)
            return PlacedTensor(features, Shard(ids.dim()), weight.size, weight.mesh)
        rank, ranks = weight.mesh.get_local_rank(), weight.mesh.size()
        start = min(weight.size, rank * -(-weight.size // ranks))
        rows = focus.embedding_shard(weight.value, ids, start)
        return PlacedTensor(rows, Partial(), 0, weight.mesh)

    def _replicated(self, placed: PlacedTensor, **options: Any) -> PlacedTensor:
        """``redistribute(placements=[Replicate()])``."""
        value, placement, group = placed.value, placed.placement, _group(placed.mesh)
        if list(options) != ["placements"] or list(options["placements"]) != [Replicate()]:
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        if placement.is_partial("sum"):
            reduced = collectives.all_reduce(value, "sum", group.name)
            value = collectives.wait_tensor(reduced)
        elif placement.is_shard() and placement.dim in (-1, value.dim() - 1):  # type: ignore[attr-defined]
            value = focus.gather_ranks(value, placed.size, group.ranks, group.name)
        elif not placement.is_replicate():
            raise Unsupported(UNKNOWN_SHARDS, self.node)
        return PlacedTensor(value, Replicate(), 0, placed.mesh)

    def _check_collective(self, name: str, args: Any) -> None:
        """Sums over the group of the weights are understood, and nothing else."""
        if "wait_tensor" in name:
            return
        if not ("all_reduce" in name and args[1] == "sum" and args[2] in self.groups):
            raise Unsupported(OWN_COLLECTIVES, self.node)

    def _refuse_placed(self, *values: Any) -> None:
        def check(value: Any) -> None:
            if isinstance(value, PlacedTensor):
                raise Unsupported(UNKNOWN_SHARDS, self.node)

        map_aggregate(values, check)


def _real_object(value: Any) -> Any:
    """What a fake script object stands for."""
    return getattr(value, "real_obj", value)


def _mesh(value: Any) -> DeviceMesh:
    mesh: DeviceMesh = _real_object(value)
    if mesh.ndim != 1:
        raise Unsupported(UNKNOWN_SHARDS)
    return mesh


def _group(mesh: DeviceMesh) -> Group:
    return Group(mesh.size(), mesh.get_group().group_name)
