"""Positions and numbers that a model looks up in the values of its arguments -> inputs.

index = where.nonzero(as_tuple=True)[1]          index: an input, int64 [T]
table[:, :, end.item() - t : end.item()]    ->   end: an input, a number

Dynamo captures such a look-up where it is told to; how many positions there are, and which number
it is, is then unknown to the graph. What is looked up in arguments alone is looked up before the
programs run, once where every layer does the same. Positions must be as many as the block has
tokens, and numbers that come of what was looked up must not be negative: both are checked in every
call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from focus_compile.capture.returned_sizes import size_symbols
from focus_compile.errors import Unsupported, source_line
from focus_compile.graph.nodes import expr_of, graph_inputs
from focus_compile.refusals import LOOKED_UP_IN_TOKENS, LOOKED_UP_IN_WRITTEN, LOOKED_UP_SLICE
from focus_compile.torch_private import FakeTensor, read_expr, tree_leaves, unknown_symbols

__all__ = ["LookUps", "look_up"]

_CHECK = torch.ops.aten._assert_scalar.default


@dataclass(frozen=True)
class LookUps:
    """What is looked up before the programs run.

    Attributes:
        program: of the arguments of Dynamo's graph; it returns the values.
        lengths: for each value, the dims that are as long as the block.
        conditions: of numbers that are looked up, and of sizes, by their symbols; numbers: which
            value is which symbol; sizes: which argument, or which of its dims, is.
        sources: arguments, by position, that are read.
        places: where the model looks them up.
    """

    program: GraphModule
    lengths: tuple[tuple[int, ...], ...]
    conditions: tuple[sympy.Basic, ...]
    numbers: dict[sympy.Symbol, int]
    sizes: dict[sympy.Symbol, tuple[int, int | None]]
    sources: frozenset[int]
    places: tuple[str, ...]

    def of(self, args: Sequence[Any], tokens: int) -> tuple[Any, ...] | None:
        """The values, for a call of a block of ``tokens``; None where they do not fit the graph."""
        values: Sequence[Any] = Interpreter(self.program).run(*args)
        fit = all(
            value.shape[dim] == tokens
            for value, dims in zip(values, self.lengths, strict=True)
            for dim in dims
        )
        known = {symbol: values[at] for symbol, at in self.numbers.items()}
        for symbol, (at, dim) in self.sizes.items():
            known[symbol] = args[at] if dim is None else args[at].shape[dim]
        fit = fit and _hold(self.conditions, tuple(known.items()))
        return tuple(values) if fit else None


@lru_cache(maxsize=64)  # within a block they are the same in every call
def _hold(conditions: tuple[sympy.Basic, ...], known: tuple[tuple[sympy.Symbol, int], ...]) -> bool:
    numbers = {symbol: sympy.Integer(value) for symbol, value in known}
    return all(condition.xreplace(numbers) == True for condition in conditions)  # noqa: E712


def look_up(gm: GraphModule) -> tuple[GraphModule, LookUps | None]:
    """Give a Dynamo graph, behind its own inputs, those values that it looks up in arguments.

    A graph without any comes back as it is.

    Raises:
        Unsupported: a value is looked up in what was computed of tokens, or in an argument that the
            model writes into; or what it does with one is not understood.
    """
    found = [node for node in gm.graph.nodes if _looks_up(node)]
    if not found:
        return gm, None
    given = _given(gm)
    for node in found:
        if node not in given or isinstance(node.meta["example_value"], torch.SymFloat):
            raise Unsupported(LOOKED_UP_IN_TOKENS, node)
    wanted = [node for node in gm.graph.nodes if node in given and _is_wanted(node)]
    inside = _ancestors(wanted)
    for node in gm.graph.nodes:
        if _writes(node) and inside & _written(node):
            raise Unsupported(LOOKED_UP_IN_WRITTEN, node)
    taken = [node for node in wanted if _is_number(node) or _is_used(node, inside)]
    program, values = _program(gm, taken)
    firsts: dict[int, Node] = {}
    for node, at in zip(taken, values, strict=True):
        firsts.setdefault(at, node)
    made = _replaced(gm, {node: firsts[at] for node, at in zip(taken, values, strict=True)})
    numbers = {
        _symbol(node): at for node, at in zip(taken, values, strict=True) if _is_number(node)
    }
    same = {symbol: _symbol(firsts[at]) for symbol, at in numbers.items()}
    conditions = _conditions(gm, same, _counts(gm, taken))
    used = frozenset[Any]().union(*(each.free_symbols for each in conditions))
    where = {symbol: place for symbol, place in size_symbols(gm).items() if symbol in used}
    inputs = graph_inputs(gm)
    return made, LookUps(
        program,
        tuple(_lengths(firsts[at]) for at in sorted(firsts)),
        tuple(conditions),
        {symbol: at for symbol, at in numbers.items() if symbol in used},
        where,
        frozenset(at for at, node in enumerate(inputs) if node in inside),
        tuple(dict.fromkeys(source_line(node) for node in found)),
    )


# -- what is looked up -----------------------------------------------------------------------------


def _unknown(value: Any) -> set[sympy.Symbol]:
    """Symbols of a value, of its sizes or of where it lies, that no argument's size tells."""
    found: set[sympy.Symbol] = set()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            for number in (*leaf.shape, *leaf.stride(), leaf.storage_offset()):
                found |= unknown_symbols(number)
        else:
            found |= unknown_symbols(leaf)
    return found


def _looks_up(node: Node) -> bool:
    """Whether a node makes a tensor of unknown length, or a number of a tensor."""
    value = node.meta.get("example_value")
    if node.op not in ("call_function", "call_method") or not _is_whole(value):
        return False
    known = set().union(*(_unknown(source.meta.get("example_value")) for source in _sources(node)))
    return bool(_unknown(value) - known)


def _is_whole(value: Any) -> bool:
    """Whether a value is a number, or tensors of integers and booleans alone."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) or (
        bool(tensors) and not any(leaf.is_floating_point() for leaf in tensors)
    )


def _is_wanted(node: Node) -> bool:
    """Whether a node's value cannot be left to the graph: its length is unknown, or it is read."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor | tuple | list):
        return _looks_up(node)
    return _is_whole(value) and bool(_unknown(value))


def _is_used(node: Node, inside: set[Node]) -> bool:
    """Whether anything but look-ups reads more than a size of it."""
    values = (user.meta.get("example_value") for user in node.users if user not in inside)
    return any(not isinstance(value, torch.SymInt | torch.SymBool) for value in values)


def _sources(node: Node) -> list[Node]:
    return list(node.all_input_nodes)


def _given(gm: GraphModule) -> set[Node]:
    """Nodes that follow from the arguments alone, ids and caches among them, and no weight."""
    given: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("example_value")
            if not isinstance(value, torch.nn.Parameter):
                given.add(node)
        elif node.op in ("call_function", "call_method", "get_attr") and not _writes(node):
            if all(source in given for source in _sources(node)):
                given.add(node)
    return given


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    found, queue = set[Node](), list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += _sources(node)
    return found


def _lengths(node: Node) -> tuple[int, ...]:
    value = node.meta["example_value"]
    if not isinstance(value, Tensor):
        return ()
    return tuple(at for at, size in enumerate(value.shape) if unknown_symbols(size))


# -- writes ----------------------------------------------------------------------------------------


def _writes(node: Node) -> bool:
    """Whether a node may write into an operand."""
    if "out" in node.kwargs:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    in_place = node.target is operator.setitem or name in _IN_PLACE
    return in_place or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = {name for name in dir(operator) if name.startswith("i") and hasattr(operator, name[1:])}


def _written(node: Node) -> set[Node]:
    """What a write may change: its operand, and what that may be a view of."""
    found: set[Node] = set()
    first = [node.kwargs.get("out"), *node.args[:1], node.kwargs.get("input")]
    queue = [each for each in first if isinstance(each, Node)]
    while queue:
        each = queue.pop()
        if each not in found:
            found.add(each)
            queue += _sources(each)
    return found


# -- the graphs ------------------------------------------------------------------------------------


def _counts(gm: GraphModule, taken: Sequence[Node]) -> dict[Any, Any]:
    """Symbols of how many positions there are: as many as tokens."""
    tokens = _tokens(gm)
    sizes = (value.shape[at] for node in taken for value, at in _long(node))
    found = {read_expr(size) for size in sizes}
    return {} if tokens is None else {each: expr_of(tokens) for each in found if each.is_Symbol}


def _long(node: Node) -> list[tuple[Tensor, int]]:
    return [(node.meta["example_value"], at) for at in _lengths(node)]


def _conditions(gm: GraphModule, same: dict[Any, Any], counts: dict[Any, Any]) -> list[sympy.Basic]:
    """What must hold of numbers that were looked up, so that the graph means what it says.

    What Dynamo asserts of them; none is negative, nor any that comes of them; and a slice between
    such numbers lies in what is sliced, and is as long as Dynamo found it to be. ``same``: of
    numbers with one value, the symbol of the first; ``counts``: symbols of how many there are.
    """
    strict: list[sympy.Basic] = []
    others: list[sympy.Basic] = []
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.target is _CHECK and isinstance(node.args[0], Node):
            asserted: Any = node.args[0].meta.get("example_value")
            others += [read_expr(asserted)] if isinstance(asserted, torch.SymBool) else []
        elif isinstance(value, torch.SymInt) and _unknown(value):
            others.append(sympy.Ge(read_expr(value), 0))
        elif node.target in (operator.getitem, operator.setitem):
            strict += _of_slices(node)
    known = {*same.values(), *size_symbols(gm)}
    made = []
    for each in dict.fromkeys((*strict, *others)):
        condition = each.xreplace({**same, **counts})
        if condition.free_symbols <= known:
            made.append(condition)
        elif each in strict:
            raise Unsupported(LOOKED_UP_SLICE)
    return [each for each in dict.fromkeys(made) if each != sympy.true]


def _is_number(node: Node) -> bool:
    return isinstance(node.meta["example_value"], torch.SymInt)


def _symbol(node: Node) -> sympy.Symbol:
    symbol: sympy.Symbol = read_expr(node.meta["example_value"])
    return symbol


def _of_slices(node: Node) -> list[sympy.Basic]:
    source, index = node.args[:2]
    places = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(place, slice) and _is_unknown(place) for place in places):
        return []
    assert isinstance(source, Node)
    shape = source.meta["example_value"].shape
    other: Any = node.args[2] if node.target is operator.setitem else node
    value = other.meta["example_value"] if isinstance(other, Node) else other
    if not isinstance(value, Tensor):
        raise Unsupported(LOOKED_UP_SLICE, node)
    if Ellipsis in places:
        at, missing = places.index(Ellipsis), len(shape) + 1 - len(places) + places.count(None)
        places = (*places[:at], *[slice(None)] * missing, *places[at + 1 :])
    found: list[sympy.Basic] = []
    wholes, parts = iter(shape), iter(value.shape)
    for place in places:
        if place is None:
            next(parts, None)
            continue
        whole = next(wholes)
        if not isinstance(place, slice):
            if not isinstance(place, int):
                raise Unsupported(LOOKED_UP_SLICE, node)
            continue
        part = next(parts, None)
        if _is_unknown(place):
            start, stop = _bound(place.start, 0), _bound(place.stop, whole)
            if place.step not in (None, 1) or part is None:
                raise Unsupported(LOOKED_UP_SLICE, node)
            found += [sympy.Ge(start, 0), sympy.Le(stop, expr_of(whole))]
            found.append(sympy.Eq(stop - start, expr_of(part)))
    return found


def _bound(value: Any, default: Any) -> sympy.Expr:
    if value is None:
        value = default
    number = value.meta["example_value"] if isinstance(value, Node) else value
    return read_expr(number) if isinstance(number, torch.SymInt) else sympy.Integer(number)


def _is_unknown(place: slice) -> bool:
    bounds = (place.start, place.stop, place.step)
    return any(
        isinstance(bound, Node) and bool(_unknown(bound.meta["example_value"])) for bound in bounds
    )


def _program(gm: GraphModule, taken: Sequence[Node]) -> tuple[GraphModule, list[int]]:
    """What computes these nodes of the arguments, and for each which of its results it is.

    Nodes that do the same, as those of every layer do, are one.
    """
    graph, known = Graph(), dict[Any, Node]()
    env = {node: graph.placeholder(str(node.target)) for node in graph_inputs(gm)}
    inside = _ancestors(taken)
    for node in gm.graph.nodes:
        if node in inside and node not in env:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            key = (node.op, node.target, repr(args), repr(kwargs))
            if key not in known:
                known[key] = graph.node_copy(node, env.__getitem__)
                known[key].meta = {}
            env[node] = known[key]
    results = list(dict.fromkeys(env[node] for node in taken))
    graph.output(tuple(results))
    return GraphModule(gm, graph), [results.index(env[node]) for node in taken]


def _replaced(gm: GraphModule, firsts: dict[Node, Node]) -> GraphModule:
    """The graph that is given what was looked up; ``firsts``: of nodes with one value, the first.

    Lengths that were unknown are the block's.
    """
    tokens, graph, env = _tokens(gm), Graph(), dict[Node, Node]()
    places: dict[Node, Node] = {}
    inputs = graph_inputs(gm)
    for node in inputs:
        env[node] = graph.node_copy(node)
    for first in dict.fromkeys(firsts.values()):
        places[first] = graph.placeholder(first.name)
        places[first].meta["example_value"] = _as_long(first.meta["example_value"], tokens)
    for node in gm.graph.nodes:
        if node in firsts:
            env[node] = places[firsts[node]]
        elif node not in env and node.target is not _CHECK:
            env[node] = graph.node_copy(node, env.__getitem__)
    made = GraphModule(gm, graph)
    _drop_unread(made)
    return made


def _tokens(gm: GraphModule) -> Any:
    """How many tokens the block has: as long as the ids that are embedded."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "embedding" and isinstance(node.args[0], Node):
            value = node.args[0].meta["example_value"]
            if isinstance(value, Tensor) and value.dim():
                return value.shape[-1]
    return None


def _as_long(value: Any, tokens: Any) -> Any:
    if not isinstance(value, FakeTensor) or tokens is None:
        return value
    with value.fake_mode:
        shape = [tokens if unknown_symbols(size) else size for size in value.shape]
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _drop_unread(gm: GraphModule) -> None:
    """Sizes and look-ups that nobody reads any more."""
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or _writes(node):
            continue
        if isinstance(
            node.meta.get("example_value"), Tensor | torch.SymInt | torch.SymBool | tuple
        ):
            gm.graph.erase_node(node)
    gm.recompile()
