"""Whether a method looks positions or numbers up in an argument of the model.

``replace_position.nonzero(as_tuple=True)[1]``, ``torch.where(mask[0])``, ``position[0].item()`` and
their like break a graph by Dynamo's defaults. Such a model is captured with these look-ups in
its graph, from where the backend takes them out (:mod:`focus_compile.capture.looked_up`). Nothing
of the method is replaced. Other models are captured as ever: what is looked up in values that were
computed of tokens, as experts do, is better left to a break.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from typing import Any

from focus_compile.adapters.source import Method

__all__ = ["looked_up", "may_look_up"]

_POSITIONS = ("nonzero", "argwhere", "where", "flatnonzero")
_WORDS = {*_POSITIONS, "item", "tolist"}


def may_look_up(function: Any) -> bool:
    """Whether it is worth while to read a function's source."""
    return bool(_WORDS & {*function.__code__.co_names})


def looked_up(method: Method, arguments: Collection[str]) -> frozenset[str]:
    """Parameters, among the model's ``arguments``, in whose values a method looks something up."""
    tree = method.tree.args
    parameters = {each.arg for each in (*tree.posonlyargs, *tree.args, *tree.kwonlyargs)}
    names = (_read(node) for node in ast.walk(method.tree) if isinstance(node, ast.Call))
    return frozenset(name for name in names if name in parameters and name in arguments)


def _read(call: ast.Call) -> str | None:
    """The name that a look-up begins with; None: it is none."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in _WORDS:
        return None
    of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
    if not of_torch:
        return None if call.func.attr == "where" else _root(call.func.value)
    return _root(call.args[0]) if len(call.args) == 1 else None


def _root(node: ast.expr) -> str | None:
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Compare):
            node = node.left
        elif isinstance(node, ast.UnaryOp):
            node = node.operand
        elif isinstance(node, ast.BinOp):
            node = node.left
        else:
            return None
    return node.id
