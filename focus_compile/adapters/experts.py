"""Loops over experts: their tokens are counted on the host, where no graph can go on.

Two forms are known. A method of rows, ids and shares does it all (``moe_infer`` of LLaDA2)::

    for expert, count in zip(experts, counts.tolist()): ...  ->  experts of rows, ids, shares

And a loop in the middle of a method adds up, expert by expert (OLMoE, Mixtral, RND1)::

    for e in range(n):                                       ->  total = total + experts of
        choice, token = torch.where(mask[e])                         x, ids, weights
        total.index_add_(0, token, experts[e](x[token]) * weights[token, choice, None])

in which ``mask`` is a ``one_hot`` of the ids; or it asks where ``ids == e``. Either way all of it
becomes one operator, ``focus::experts``. What is found by its form is then tried: with experts of
other kinds in place of the model's, the method as it was and as it is now must give the same.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from focus_compile.adapters.source import Method, read, rebuilt
from focus_compile.ops.experts import ACTIVATIONS
from focus_compile.ops.library import focus

__all__ = ["METHOD", "Experts", "experts_of", "without_loop"]

METHOD = "_focus_experts"
"""What a method calls instead of its loop: ``self._focus_experts(x, ids, weights)``."""
_ROWS, _CHOICES = 5, 2
CHANGED = (
    "the layers of experts were replaced after their loop was adapted, by LoRA or quantisation, "
    "say: compile the model anew"
)
_TOLERANCE = 1e-5
_HOST = {"numpy", "item", "tolist"}
"""By which a method reads on the host how many tokens an expert has."""


@dataclass(frozen=True)
class Experts:
    """A list of experts of one kind, and how such an expert computes.

    Attributes:
        name: of the module's attribute that holds the list.
        up, down, gate: names of an expert's linear layers; no gate: None.
        activation: a key of :data:`~focus_compile.ops.experts.ACTIVATIONS`.
    """

    name: str
    up: str
    down: str
    gate: str | None
    activation: str

    def method(self) -> Callable[..., Tensor]:
        """The operator over the experts of a module, as a method of it."""
        name, activation = self.name, self.activation
        parts = (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)

        def run(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            layers = [[getattr(each, part) for each in getattr(module, name)] for part in parts]
            if any(type(layer) is not nn.Linear for each in layers for layer in each):
                raise RuntimeError(CHANGED)
            up, down, *gates = ([layer.weight for layer in each] for each in layers)
            gate = gates[0] if gates else []
            made: Tensor = focus.experts(x, ids, weights, up, down, gate, activation)
            return made

        return run


def experts_of(module: nn.Module, known: dict[tuple[str, str], Experts | None]) -> Experts | None:
    """The experts that a module holds, if they are two or more perceptrons of one kind.

    ``known``: what was found before, by the list's name and how an expert is shown.
    """
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList) or len(child) <= 1:
            continue
        kinds = {f"{type(expert)} {expert}" for expert in child}
        if len(kinds) > 1 or not all(_is_plain(part) for part in child.modules()):
            continue
        key = name, kinds.pop()
        if key not in known:
            known[key] = _perceptron(name, child[0])
        if known[key] is not None:
            return known[key]
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether the operator may read a module's weights without calling it."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return not hooked and all(type(weight.data) is Tensor for weight in weights)


def _perceptron(name: str, expert: nn.Module) -> Experts | None:
    """How an expert computes: of the ways in which its layers fit, the one that gives the same."""
    layers = {part: layer for part, layer in expert.named_children() if type(layer) is nn.Linear}
    others = [part for part in expert.children() if any(True for _ in part.parameters())]
    if len(layers) != len(others) or len(layers) not in (2, 3):
        return None
    if any(layer.bias is not None or layer.weight.is_meta for layer in layers.values()):
        return None
    tried = copy.deepcopy(expert).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in layers:
            weight = getattr(tried, part).weight
            values = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
            weight.copy_(values)
        tried = tried.to("cpu", torch.float64)
        for up, down, *gate in permutations(layers):
            width, features = layers[up].weight.shape
            fits = [layers[part].weight.shape == (width, features) for part in gate]
            if layers[down].weight.shape != (features, width) or not all(fits):
                continue
            x = torch.randn(_ROWS, features, generator=generator, dtype=torch.float64)
            expected = _attempt(lambda: tried(x))  # noqa: B023
            for activation in ACTIVATIONS:
                found = Experts(name, up, down, gate[0] if gate else None, activation)
                if _same(expected, _alone(found, tried, x)):
                    return found
    return None


def _alone(found: Experts, expert: nn.Module, x: Tensor) -> Tensor:
    """One expert of all rows, by the operator."""
    weights = [[getattr(expert, part).weight] for part in (found.up, found.down)]
    gate = [] if found.gate is None else [getattr(expert, found.gate).weight]
    ids = torch.zeros(len(x), 1, dtype=torch.int64)
    made: Tensor = focus.experts(
        x, ids, torch.ones_like(x[:, :1]), *weights, gate, found.activation
    )
    return made


def without_loop(module: nn.Module, found: Experts, function: Any) -> FunctionType | None:
    """A method of the module's class with its loop over the experts replaced.

    None where there is no such loop, or where the method is not found to compute the same, with
    other experts in place of the module's.
    """
    inner = getattr(function, "__wrapped__", function)
    if not isinstance(inner, FunctionType) or found.name not in inner.__code__.co_names:
        return None
    x, ids, weights = _example(module, found)
    if inner.__code__.co_argcount == 4 and _HOST & {*inner.__code__.co_names}:
        whole: Any = _everything
        return whole if _is_the_same(module, found, function, whole, x[0], ids, weights) else None
    changed = _inner_loops(function, found)
    if changed is None or not _is_the_same(module, found, function, changed, x):
        return None
    return changed


def _everything(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
    """In place of a method of rows, ids and shares."""
    return self._focus_experts(x, ids, weights)


def _inner_loops(function: Any, found: Experts) -> FunctionType | None:
    """A method with a loop that adds up expert by expert; the loop replaced."""
    method = read(function)
    if method is None:
        return None
    tree = copy.deepcopy(method.tree)
    change = _Loops(tree, found.name)
    tree = change.visit(tree)
    if not change.changed:
        return None
    _drop_unread(tree, change.unread)
    return rebuilt(Method(method.function, tree), tree)


class _Loops(ast.NodeTransformer):
    """Replaces loops over experts by a call."""

    def __init__(self, tree: ast.FunctionDef, experts: str) -> None:
        self.tree, self.experts = tree, experts
        self.changed = False
        self.unread: set[str] = set()

    def visit_For(self, node: ast.For) -> Any:
        call = self._call(node)
        if call is None:
            return self.generic_visit(node)
        self.changed = True
        return ast.copy_location(call, node)

    def _call(self, loop: ast.For) -> ast.stmt | None:
        parts = list(ast.walk(loop))
        if not any(isinstance(part, ast.Attribute) and part.attr == self.experts for part in parts):
            return None
        places = _places(parts)
        total = _total(parts)
        if places is None or total is None:
            return None
        choice, token, mask = places
        rows, weights = _rows(parts, token, choice)
        if rows is None or weights is None:
            return None
        ranges = {part.id for part in ast.walk(loop.iter) if isinstance(part, ast.Name)}
        self.unread |= ranges | {mask}
        call = f"self.{METHOD}({rows}, {self._ids(mask)}, {weights})"
        return ast.parse(f"{total} = {total} + {call}.to({total}.dtype)").body[0]

    def _ids(self, mask: str) -> str:
        """Of what a mask is a ``one_hot``; itself where it is none."""
        for target, value in _assigned(self.tree):
            for call in ast.walk(value) if ast.unparse(target) == mask else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("one_hot"):
                    return ast.unparse(call.args[0])
        return mask


def _assigned(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is assigned to what; also ``a, b = c, d``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            yield from zip(target.elts, value.elts, strict=False)
        else:
            yield target, value


def _places(parts: Sequence[ast.AST]) -> tuple[str, str, str] | None:
    """Names in ``choice, token = torch.where(mask[e])``, ``token, choice = ...where(ids == e)``."""
    for part in parts:
        if not isinstance(part, ast.Assign) or not isinstance(part.targets[0], ast.Tuple):
            continue
        names = [ast.unparse(name) for name in part.targets[0].elts]
        call = part.value
        where = isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("where", "nonzero"))
        if not where or len(names) != 2:
            continue
        for each in ast.walk(call):
            if isinstance(each, ast.Compare) and isinstance(each.left, ast.Name):
                return names[1], names[0], each.left.id
            if isinstance(each, ast.Subscript) and isinstance(each.value, ast.Name):
                return names[0], names[1], each.value.id
    return None


def _total(parts: Sequence[ast.AST]) -> str | None:
    """The name in ``total.index_add_(...)`` or ``total[...] += ...``."""
    for part in parts:
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            if part.func.attr == "index_add_" and isinstance(part.func.value, ast.Name):
                return part.func.value.id
        elif isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Subscript):
            return ast.unparse(part.target.value)
    return None


def _rows(parts: Sequence[ast.AST], token: str, choice: str) -> tuple[str | None, str | None]:
    """Names in ``x[token]`` and ``weights[token, choice, None]``."""
    rows = weights = None
    for part in parts:
        if not isinstance(part, ast.Subscript) or not isinstance(part.value, ast.Name):
            continue
        index = {name.id for name in ast.walk(part.slice) if isinstance(name, ast.Name)}
        if isinstance(part.ctx, ast.Load) and index == {token, choice}:
            weights = part.value.id
        elif isinstance(part.ctx, ast.Load) and index == {token}:
            rows = part.value.id
    return rows, weights


def _drop_unread(tree: ast.FunctionDef, names: set[str]) -> None:
    """Take out what was assigned for the loop alone: it may be as long as values say."""
    dropped = -1
    change = _Drop()
    while len(change.dropped) > dropped:
        dropped = len(change.dropped)
        every = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        change.names = names - {node.id for node in every if isinstance(node.ctx, ast.Load)}
        change.visit(tree)


class _Drop(ast.NodeTransformer):
    """Takes out assignments to names."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.dropped: list[str] = []

    def visit_Assign(self, node: ast.Assign) -> Any:
        target = ast.unparse(node.targets[0])
        if len(node.targets) > 1 or target not in self.names:
            return node
        self.dropped.append(target)
        return ast.copy_location(ast.Pass(), node)


class _Tried:
    """A module with other experts in place of its own: what is found must not know them."""

    def __init__(self, module: nn.Module, name: str) -> None:
        count = len(getattr(module, name))
        self._module = module
        vars(self)[name] = [self._expert(index) for index in range(count)]
        self._experts = vars(self)[name]
        self.training = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @staticmethod
    def _expert(index: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(x * (1 + index)) + x.roll(1, -1) / (2 + index)

    def _focus_experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = [
            torch.stack([self._experts[expert](row[None])[0] for expert in choices])
            for row, choices in zip(x, ids.tolist(), strict=True)
        ]
        return (torch.stack(chosen) * weights[..., None]).sum(1).to(x.dtype)


def _example(module: nn.Module, found: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """States ``[1, N, H]``, ids ``[N, K]`` and shares ``[N, K]``, as the module would be given."""
    experts: Any = getattr(module, found.name)
    like = getattr(experts[0], found.up).weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _ROWS, like.shape[1], generator=generator).to(like)
    drawn = [torch.randperm(len(experts), generator=generator)[:_CHOICES] for _ in range(_ROWS)]
    ids = torch.stack(drawn).to(like.device)
    return x, ids, torch.rand(ids.shape, generator=generator).to(like)


def _is_the_same(
    module: nn.Module, found: Experts, function: Any, changed: Callable[..., Any], *given: Tensor
) -> bool:
    tried = _Tried(module, found.name)
    with torch.no_grad():
        expected = _attempt(lambda: function(tried, *given))
        return _same(expected, _attempt(lambda: changed(tried, *given)))


def _attempt(function: Callable[[], Any]) -> Any:
    """What a function returns; None where it fails: it is not of the form that was sought."""
    try:
        return function()
    except Exception:  # noqa: BLE001  whatever a model's code raises
        return None


def _same(expected: Any, made: Any) -> bool:
    """Whether two results are tensors, or tuples of them, that are equal to rounding."""
    if isinstance(expected, tuple) and isinstance(made, tuple) and len(expected) == len(made):
        return all(_same(*pair) for pair in zip(expected, made, strict=True))
    if not isinstance(expected, Tensor) or not isinstance(made, Tensor):
        return False
    if expected.shape != made.shape or expected.dtype != made.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, made)
    bound = _TOLERANCE if expected.dtype in (torch.float32, torch.float64) else 0.03
    most = expected.abs().max().item() if expected.numel() else 0.0
    return bool((expected - made).abs().max() <= bound * max(most, 1.0))
