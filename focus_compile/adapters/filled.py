"""Whether a mask has a zero: read of an argument once, before the graph, and not in it.

``if torch.all(mask):``, ``if 0.0 in mask:`` and their like read a tensor's values in the middle of
a model, where no graph can go on. Here such a test of a parameter asks the tensor itself::

    torch.all(mask)  ->  torch.all(mask) if mask._focus_filled is None else mask._focus_filled

The attribute is set on the arguments of a call, for the time of that call (:func:`told`), and
Dynamo guards it. It is the tensor's own: what the model made of an argument has none, and is tested
as before. Nor has an argument in a call that nobody told of.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from focus_compile.adapters.source import Method

__all__ = ["filled_tests", "may_test", "told"]

_ATTRIBUTE = "_focus_filled"
_LOOPS = (ast.For, ast.While, ast.AsyncFor)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)

WRITTEN = (
    "the model wrote into a mask whose values it tests, which an adapter had read before: what it "
    "returned may be wrong. Compile with adapt=False"
)


def _state(mask: Tensor) -> Any:
    """What changes where a tensor is written to."""
    return bool(torch.all(mask)) if mask.is_inference() else mask._version


@contextmanager
def told(arguments: Mapping[str, Any], names: frozenset[str]) -> Iterator[None]:
    """For a call with these arguments: the masks of these names know whether they have no zero.

    Raises:
        RuntimeError: the call wrote into one of them.
    """
    masks = [value for name, value in arguments.items() if name in names]
    masks = [mask for mask in masks if isinstance(mask, Tensor) and not mask.is_complex()]
    before = [_state(mask) for mask in masks]
    for mask in masks:
        setattr(mask, _ATTRIBUTE, bool(torch.all(mask)))
    try:
        yield
        if [_state(mask) for mask in masks] != before:
            raise RuntimeError(WRITTEN)
    finally:
        for mask in masks:
            with suppress(AttributeError):  # given twice
                delattr(mask, _ATTRIBUTE)


def may_test(function: Any) -> bool:
    """Whether it is worth while to read a function's source."""
    code = function.__code__
    return bool({"all", "any"} & {*code.co_names}) or any(
        isinstance(value, int | float) and value == 0 for value in code.co_consts
    )


def filled_tests(method: Method) -> tuple[ast.FunctionDef, frozenset[str]] | None:
    """The tree with every such test of a parameter replaced, and these parameters; None: none."""
    tree = copy.deepcopy(method.tree)
    arguments = (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)
    parameters = {argument.arg for argument in arguments}
    knows_torch = method.function.__globals__.get("torch") is torch
    change = _Tests(tree, parameters, knows_torch)
    tree.body = [change.visit(statement) for statement in tree.body]
    if not change.names:
        return None
    where = 1 if ast.get_docstring(tree) is not None else 0
    tree.body[where:where] = [
        ast.copy_location(ast.parse(f"{_given(name)} = {name}").body[0], tree.body[where])
        for name in sorted(change.names)
    ]
    return tree, frozenset(change.names)


class _Tests(ast.NodeTransformer):
    """Replaces tests in the function's own scope."""

    def __init__(self, tree: ast.FunctionDef, parameters: set[str], knows_torch: bool) -> None:
        self.parameters, self.knows_torch = parameters, knows_torch
        self.names: set[str] = set()
        self.loops = [node for node in ast.walk(tree) if isinstance(node, _LOOPS)]
        self.bound = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        ]
        self.kept = {id(target) for node in ast.walk(tree) for target in _kept(node)}
        shadows = (ast.Global, ast.Nonlocal)
        if any(isinstance(node, shadows) for node in ast.walk(tree)):
            self.parameters = set()

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, _COMPREHENSIONS + _FUNCTIONS):
            return node
        if isinstance(node, ast.If | ast.IfExp | ast.Assert | ast.While):
            node.test = self._test(node.test)
        return self.generic_visit(node)

    def _test(self, test: ast.expr) -> ast.expr:
        if isinstance(test, ast.BoolOp):
            test.values = [self._test(value) for value in test.values]
            return test
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test.operand = self._test(test.operand)
            return test
        found = _tested(test, self.knows_torch)
        if found is None or not self._is_argument(found[0], test):
            return test
        name, filled = found
        self.names.add(name)
        known = f"getattr({_given(name)}, {_ATTRIBUTE!r}, None)"
        template = f"(0 if {known} is None else {'' if filled else 'not '}{known})"
        made = ast.parse(template, mode="eval").body
        assert isinstance(made, ast.IfExp)
        for part in ast.walk(made):
            ast.copy_location(part, test)
        made.body = test
        return made

    def _is_argument(self, name: str, test: ast.expr) -> bool:
        """Whether a name holds, where it is tested, the parameter or what has the same zeros."""
        others = [node for node in self.bound if node.id == name and id(node) not in self.kept]
        after = all(
            (node.lineno, node.col_offset) > (test.lineno, test.col_offset) for node in others
        )
        again = any(
            _within(test, loop) and any(_within(node, loop) for node in others)
            for loop in self.loops
        )
        return name in self.parameters and after and not again


def _given(name: str) -> str:
    return f"_focus_given_{name}"


def _within(node: Any, loop: ast.AST) -> bool:
    return any(part is node for part in ast.walk(loop))


def _kept(node: ast.AST) -> list[ast.expr]:
    """Targets of ``mask = mask.bool()``, also ``... if mask is not None else None``."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return []
    target, value = node.targets[0], node.value
    if isinstance(value, ast.IfExp) and isinstance(value.orelse, ast.Constant | ast.Name):
        same = ast.unparse(value.orelse) in ("None", ast.unparse(target))
        value = value.body if same else value
    kept = isinstance(target, ast.Name) and ast.unparse(value) == f"{target.id}.bool()"
    return [target] if kept else []


def _tested(test: ast.expr, knows_torch: bool) -> tuple[str, bool] | None:
    """Which name is tested, and whether the test is true where it has no zero; or None."""
    call = test
    while isinstance(call, ast.Call):  # bool(...), ....item()
        inner: Any = call.func.value if isinstance(call.func, ast.Attribute) else None
        if ast.unparse(call.func) == "bool" and len(call.args) == 1 and not call.keywords:
            call = call.args[0]
        elif inner is not None and call.func.attr == "item" and not call.args:  # type: ignore[attr-defined]
            call = inner
        else:
            break
    if isinstance(call, ast.Compare) and len(call.ops) == 1:
        operator, right = call.ops[0], call.comparators[0]
        contains = isinstance(operator, ast.In | ast.NotIn) and isinstance(right, ast.Name)
        if contains and _is_zero(call.left):
            assert isinstance(right, ast.Name)
            return right.id, isinstance(operator, ast.NotIn)
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.keywords:
        return None
    of_torch = knows_torch and ast.unparse(call.func.value) == "torch"
    operands = call.args if of_torch else [call.func.value, *call.args]
    if len(operands) != 1:
        return None
    (operand,), name = operands, call.func.attr
    if name == "all" and (mask := _mask(operand)) is not None:
        return mask, True
    if name == "any" and isinstance(operand, ast.Compare) and len(operand.ops) == 1:
        zeros = isinstance(operand.ops[0], ast.Eq) and _is_zero(operand.comparators[0])
        mask = _mask(operand.left)
        return (mask, False) if zeros and mask is not None else None
    return None


def _mask(node: ast.expr) -> str | None:
    """The name of ``mask`` or ``mask.bool()``."""
    if isinstance(node, ast.Call) and ast.unparse(node).endswith(".bool()"):
        node = node.func.value  # type: ignore[attr-defined]
    return node.id if isinstance(node, ast.Name) else None


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not node.value
