"""Axis labels: which dimension of every value is batch, token, or history plus block.

Every dimension is a product of :class:`Axis` objects. Transfer rules
(:mod:`focus_compile.axes.rules`) say which axes of an operator's operands are the same axis, and
which axes of the operands appear in its result; a union-find merges them. Labels start at the token
ids. A size never decides what an axis is: sizes only tell how a ``view`` splits and joins
dimensions, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import sympy
from torch.fx import Node

from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import Size, expr_of, is_count
from focus_compile.refusals import AXES_MEET, UNEVEN_VIEW, VIEW_OF_OTHER_SIZE

__all__ = ["Axis", "AxisMap", "Dim", "Dims", "Entry", "Meaning", "Quantity", "Role", "Transfer"]


class Role(Enum):
    """What an axis stands for."""

    BATCH = "batch"
    TOKEN = "token"


@dataclass(eq=False, slots=True)
class Axis:
    """One axis; compared by identity. ``product`` or ``sum`` says how it is made of others.

    ``order``: it lists the elements of these axes, sorted by something.
    """

    size: sympy.Expr
    role: Role | None = None
    parent: Axis | None = None
    product: Dim | None = None
    sum: tuple[Dim, ...] | None = None
    order: Dim | None = None


Dim = tuple[Axis, ...]
"""A dimension: a product of axes; the empty product has size 1."""
Dims = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """What an operator does to axes.

    ``out``: dims of each result (one entry per tensor). ``mixed``: dims along which the operator
    combines or reorders elements; gathering along any other axis commutes with it.
    """

    out: tuple[Dims, ...]
    mixed: Dims = ()


class Quantity(Enum):
    """What integers stand for: positions along a dim; or, of a dim that is a sorted list, its ids
    in order, how often each id occurs, or where the rows of each id end.
    """

    POSITION = "position"
    SORTED_ID = "sorted id"
    COUNT = "count"
    END = "end"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the integers of a value stand for, and in which dim."""

    quantity: Quantity
    dim: Dim


@dataclass(frozen=True, slots=True)
class Entry:
    """The graph input of token ids, and the first node that embeds it.

    ``alone``: no other input is embedded.
    """

    embedding: Node
    ids: Node
    alone: bool


@dataclass
class AxisMap:
    """Axis labels of a graph, filled by :func:`focus_compile.axes.propagate.propagate`.

    ``entry``: where the labels start; None if the graph embeds no input.
    """

    entry: Entry | None = None
    dims: dict[Node, tuple[Dims, ...]] = field(default_factory=dict)
    mixed: dict[Node, Dims] = field(default_factory=dict)
    meaning: dict[Node, Meaning] = field(default_factory=dict)
    unruled: set[Node] = field(default_factory=set)
    conflicts: list[tuple[Node, Axis, Axis]] = field(default_factory=list)
    equal: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    current: Node | None = None

    # -- reading ---------------------------------------------------------------------------------

    def of(self, node: Node) -> Dims:
        """Resolved dims of a node with one tensor result."""
        return tuple(self.resolve(dim) for dim in self.dims[node][0])

    def find(self, axis: Axis) -> Axis:
        while axis.parent is not None:
            axis = axis.parent
        return axis

    def resolve(self, dim: Dim) -> Dim:
        factors: list[Axis] = []
        for axis in dim:
            root = self.find(axis)
            factors.extend(self.resolve(root.product) if root.product is not None else (root,))
        return tuple(factors)

    def holds(self, dim: Dim, role: Role) -> bool:
        """Whether an axis of ``role`` is a factor of ``dim``, a term of one, or listed by one."""
        return any(
            axis.role is role
            or (axis.sum is not None and any(self.holds(term, role) for term in axis.sum))
            or (axis.order is not None and self.holds(axis.order, role))
            for axis in self.resolve(dim)
        )

    def position(self, dims: Dims, role: Role) -> int | None:
        """Index of the dim that is exactly the axis of ``role``; None if there is none."""
        for index, dim in enumerate(dims):
            axes = self.resolve(dim)
            if len(axes) == 1 and axes[0].role is role:
                return index
        return None

    def listed(self, dim: Dim) -> bool:
        """Whether ``dim`` is a list of tokens in another order."""
        return any(axis.order is not None for axis in self.resolve(dim))

    def history(self, dim: Dim) -> Dim | None:
        """The history part of a key axis (history + block), or None if ``dim`` is no key axis."""
        axes = self.resolve(dim)
        if len(axes) != 1 or axes[0].sum is None or len(axes[0].sum) != 2:
            return None
        past, block = axes[0].sum
        return past if self.position((block,), Role.TOKEN) == 0 else None

    # -- building --------------------------------------------------------------------------------

    def fresh(self, size: Size) -> Dim:
        expr = expr_of(size)
        return () if expr == 1 else (Axis(expr),)

    def expr(self, size: Size | sympy.Expr) -> sympy.Expr:
        """A size, with symbols that stand for the same axis replaced by one of them."""
        expr = size if isinstance(size, sympy.Expr) else expr_of(size)
        while (free := expr.free_symbols & self.equal.keys()) != set():
            expr = expr.subs({symbol: self.equal[symbol] for symbol in free})
        return expr

    def size(self, dim: Dim) -> sympy.Expr:
        return self.expr(sympy.Mul(*(axis.size for axis in self.resolve(dim))))

    def unify(self, left: Dim, right: Dim) -> Dim:
        """State that two dims of equal size are the same; a dim of size 1 broadcasts."""
        left, right = self.resolve(left), self.resolve(right)
        if not left or not right:
            return left or right
        if len(left) == len(right) == 1:
            self._merge(left[0], right[0])
        else:
            groups = self.regroup(left, [self.expr(axis.size) for axis in right])
            for group, axis in zip(groups, right, strict=True):
                factors = self.resolve(group)
                if len(factors) == 1:
                    self._merge(factors[0], axis)
                else:
                    self._define_product(axis, factors)
        return left

    def regroup(self, factors: Dim, sizes: Sequence[sympy.Expr]) -> list[Dim]:
        """Distribute ``factors``, in order, over dims of ``sizes``, splitting axes where needed."""
        queue = list(self.resolve(factors))
        dims: list[Dim] = []
        for size in sizes:
            remaining, group = self.expr(size), list[Axis]()
            while remaining != 1:
                if not queue:
                    raise Unsupported(VIEW_OF_OTHER_SIZE, self.current)
                axis = queue.pop(0)
                length = self.expr(axis.size)
                quotient = sympy.cancel(remaining / length)
                if is_count(quotient):
                    group.append(axis)
                    remaining = quotient
                    continue
                outer_size = sympy.cancel(length / remaining)
                if not is_count(outer_size):
                    raise Unsupported(UNEVEN_VIEW, self.current)
                inner, outer = Axis(remaining), Axis(outer_size)
                self._define_product(axis, (inner, outer))
                group.append(inner)
                queue.insert(0, outer)
                remaining = sympy.Integer(1)
            dims.append(tuple(group))
        if queue:
            raise Unsupported(VIEW_OF_OTHER_SIZE, self.current)
        return dims

    def label(self, dim: Dim, role: Role) -> None:
        for axis in self.resolve(dim):
            axis.role = role

    def check(self) -> None:
        """Raise if two axes that were merged stand for different things."""
        for node, left, right in self.conflicts:
            if any(self.holds((axis,), role) for axis in (left, right) for role in Role):
                raise Unsupported(AXES_MEET, node)

    def _merge(self, left: Axis, right: Axis) -> None:
        left, right = self.find(left), self.find(right)
        if left is right:
            return
        if left.sum is not None and right.sum is not None:
            if len(left.sum) != len(right.sum):
                self._conflict(left, right)
                return
            pairs = list(zip(left.sum, right.sum, strict=True))
            left.parent = right
            for left_term, right_term in pairs:
                self.unify(left_term, right_term)
            return
        self._equate(left, right)
        if left.order is not None:
            left, right = right, left
        if right.order is not None and _is_more_than_a_size(left):
            self._conflict(left, right)
            return
        if left.sum is not None:
            left, right = right, left
        if left.role is not None and (right.sum is not None or right.role not in (None, left.role)):
            self._conflict(left, right)
            return
        left.parent = right
        right.role = right.role or left.role

    def _equate(self, left: Axis, right: Axis) -> None:
        """Note that two sizes are equal, as eager execution would insist."""
        left_size, right_size = self.expr(left.size), self.expr(right.size)
        if left_size == right_size:
            return
        if left_size.is_Symbol and left_size not in right_size.free_symbols:
            self.equal[left_size] = right_size
        elif right_size.is_Symbol and right_size not in left_size.free_symbols:
            self.equal[right_size] = left_size
        else:
            self._conflict(left, right)

    def _define_product(self, axis: Axis, factors: Dim) -> None:
        axis = self.find(axis)
        if _is_more_than_a_size(axis):
            self._conflict(axis, axis)
        axis.product = factors

    def _conflict(self, left: Axis, right: Axis) -> None:
        assert self.current is not None
        self.conflicts.append((self.current, left, right))


def _is_more_than_a_size(axis: Axis) -> bool:
    return axis.role is not None or axis.sum is not None or axis.order is not None
