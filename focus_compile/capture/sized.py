"""Operators that are told how long their result is, or take it from another value: from labels.

torch.ones(s, s), torch.zeros_like(x)  ->  aten.full([size, size], 1)
x.expand_as(y)                         ->  aten.expand(x, [size, ...])
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from focus_compile.axes.rules.makers import FILLS
from focus_compile.axes.rules.table import AS_OTHERS, RESHAPES
from focus_compile.capture.names import Sizes
from focus_compile.graph.nodes import aten, tensor_of

__all__ = ["is_sized", "sized"]

_EYES = (aten.eye.default, aten.eye.m)
_TOLD = (*RESHAPES, *AS_OTHERS, *_EYES, aten.expand.default, aten.repeat.default)


def is_sized(node: Node) -> bool:
    return node.target in _TOLD or node.target in FILLS


def sized(node: Node, env: dict[Node, Any], sizes: Sizes) -> tuple[Any, tuple[Any, ...], Any]:
    """The call that makes a value as long as its labels say: target, arguments, keywords.

    Raises:
        Unsupported: a size cannot be told from the labels.
    """
    dims = sizes.axes.of(node)
    if node.target is aten.repeat.default:
        return node.target, (env[node.args[0]], _times(node, sizes)), {}  # type: ignore[index]
    shape = [sizes.size(dim) for dim in dims]
    if node.target in FILLS:
        value = tensor_of(node)
        number = FILLS[node.target](node)
        if isinstance(number, Node):
            number = sizes.number_of(number, node)
        return aten.full.default, (shape, number), {"dtype": value.dtype, "device": value.device}
    if node.target in _EYES:
        value = tensor_of(node)
        return aten.eye.m, tuple(shape), {"dtype": value.dtype, "device": value.device}
    target = AS_OTHERS.get(node.target, node.target)  # type: ignore[call-overload]
    return target, (env[node.args[0]], shape), {}  # type: ignore[index]


def _times(node: Node, sizes: Sizes) -> list[Node | int]:
    """How often ``repeat`` puts each dim behind itself."""
    (outer,), (source,) = sizes.axes.dims[node], sizes.axes.dims[node.args[0]]  # type: ignore[index]
    lead = len(outer) - len(source)
    times = []
    for at, dim in enumerate(outer):
        repeated = 0 if at < lead else len(source[at - lead])
        times.append(sizes.size(dim[: len(dim) - repeated]))
    return times
