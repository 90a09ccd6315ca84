"""Compute packed rows: fed tokens up to the second scored layer's q, k and v, retained after.

embedding(ids)          ->  embedding(focus.pack(ids))                      [B, T, E] -> [1, N, E]
cat([past, k])          ->  focus.join(past, k, ..., slots)      the block: stale where not computed
                            focus.store(slots, k, ...)      where the slots are the cache
sdpa(q, K, V, mask)     ->  focus.attend(q, K, V, focus.site_mask(mask, ...), ...)
linear, norm, MLP, ...  ->  the same operator on packed rows
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx import GraphModule, Node

from focus_compile.axes.axes import AxisMap, Dim, Role
from focus_compile.axes.propagate import propagate
from focus_compile.axes.rules.pointwise import POINTWISE
from focus_compile.axes.rules.table import ARANGES, RESHAPES
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import aten, fake_mode_of, graph_outputs, tensor_of
from focus_compile.graph.replay import Replay
from focus_compile.graph.sizes import Extent, is_generic
from focus_compile.ops.library import focus
from focus_compile.plan.controls import Selection
from focus_compile.plan.domains import Domain, Place
from focus_compile.plan.plan import Plan
from focus_compile.plan.sites import Site
from focus_compile.plan.writes import Write
from focus_compile.refusals import ANOTHER_ORDER, FOLDED_TOKENS, UNKNOWN_SIZE, VALUE_PER_ROW

__all__ = ["narrow"]


def narrow(gm: GraphModule, plan: Plan) -> GraphModule:
    """Restrict the graph to fed and retained tokens; the output gains the K/V of every layer.

    ``(model outputs, selection)`` becomes ``(model outputs, selection, ((k, v) of layer 0, ...))``;
    model outputs that carry the token axis are packed. Adds the inputs of :class:`_Narrow`.
    """
    return _Narrow(gm, plan).run()


class _Narrow:
    """One run of the pass.

    It adds the inputs ``fed_tokens``, ``fed_inverse`` and ``fed_rows``; ``tokens`` and ``rows``;
    ``written01``, ``written``, ``prefix_visibility`` and ``reuse``; and what every layer's K/V were
    in the step before.
    """

    def __init__(self, gm: GraphModule, plan: Plan) -> None:
        self.gm = gm
        self.plan = plan
        self.axes: AxisMap = propagate(gm)
        self.replay = Replay(gm, fake_mode_of(gm))
        self.env: dict[Node, Node] = {}
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.sites = {name: site for site in plan.sites for name in site.region}
        self.writes: dict[str, tuple[int, int, Write]] = {}
        for site in plan.sites:
            for part, write in enumerate(site.writes):
                self.writes[write.new if write.cat is None else write.cat] = (
                    site.layer,
                    part,
                    write,
                )
        self.kv: dict[tuple[int, int], Node] = {}
        self.histories: dict[Extent, Node | int] = {}

    def run(self) -> GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.replay.placeholder(node.name, node.meta["val"], node)
        self._add_inputs()
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                self.env[node] = self.replay.attribute(node)
            elif node.op == "call_function":
                self._emit(node)
        outputs, selection = fx.map_arg(graph_outputs(self.gm), lambda arg: self.env[arg])
        kv = tuple((self.kv[site.layer, 0], self.kv[site.layer, 1]) for site in self.plan.sites)
        gm = self.replay.finish((outputs, selection, kv))
        gm.graph.eliminate_dead_code()  # expanded key heads: nobody reads them any more
        gm.recompile()
        return gm

    # -- inputs ----------------------------------------------------------------------------------

    def _add_inputs(self) -> None:
        add, controls, tables = self.replay.add_input, self.plan.controls, self.plan.tables
        self.masked, self.fed = (
            self.env[self.nodes[control.name]] for control in (controls.masked, controls.fed)
        )
        fed_tokens, self.fed_inverse = add(controls.fed_tokens), add(controls.fed_inverse)
        fed_rows = add(controls.fed_rows)
        self.tokens = {Domain.FED: fed_tokens, Domain.RETAINED: add(tables.tokens)}
        self.rows = {Domain.FED: fed_rows, Domain.RETAINED: add(tables.rows)}
        self.written = (add(controls.written01), add(controls.written))
        self.prefix = add(controls.prefix_visibility)
        self.reuse = add(controls.reuse)
        self.slots = [tuple(map(add, pair)) for pair in self.plan.slots]
        self.selection: Selection[Node] = Selection(*graph_outputs(self.gm)[1])

    def _tables(self, domain: Domain) -> tuple[Node, Node, Node]:
        """(tokens, inverse, keep) of a domain."""
        if domain is Domain.FED:
            return self.tokens[domain], self.fed_inverse, self.fed
        return self.tokens[domain], self.env[self.selection.inverse], self._retain_mask()

    def _retain_mask(self) -> Node:
        return self.env[self.selection.retain_mask]

    def _is_late(self, layer: int) -> bool:
        """Whether a layer computes keys and values of retained tokens alone."""
        return layer > self.plan.scored[1]

    # -- nodes -----------------------------------------------------------------------------------

    def _emit(self, node: Node) -> None:
        if node.name in self.sites:
            site = self.sites[node.name]
            if node.name == site.out:
                self._attend(node, site)
        elif node.name in self.writes and self.writes[node.name][2].cat is not None:
            self._write(node, self.env[self.nodes[self.writes[node.name][2].new]])
        elif node.name in self.plan.packed:
            self._packed(node, self.plan.packed[node.name])
            if node.name in self.writes:
                self._write(node, self.env[node])
        else:
            args = fx.map_arg(node.args, self._on_canvas)
            kwargs = fx.map_arg(node.kwargs, self._on_canvas)
            self.env[node] = self.replay.call(node.target, args, kwargs, like=node)

    def _packed(self, node: Node, place: Place) -> None:
        """A token-wise operator: every operand packed to the operator's domain."""

        def operand(arg: Node) -> Node:
            if not isinstance(arg.meta["val"], torch.Tensor):
                return self.env[arg]
            return self._in_domain(arg, place, node)

        if node is self.nodes[self.plan.embedding]:
            weight, ids, *options = node.args
            args = (self.env[weight], self._in_domain(ids, place, node), *options)
        else:
            args = fx.map_arg(node.args, operand)
        dims = self.axes.of(node) if isinstance(node.meta["val"], torch.Tensor) else ()
        if node.target in RESHAPES or node.target is aten.expand.default:
            args = (args[0], [self._packed_size(dim, place.domain, node) for dim in dims])
        if node.target in ARANGES:
            args = (self._packed_size(dims[0], place.domain, node),)
        kwargs = fx.map_arg(node.kwargs, operand)
        self.env[node] = self.replay.call(node.target, args, kwargs, like=node)

    def _packed_size(self, dim: Dim, domain: Domain, node: Node) -> Node | int:
        sizes: list[Node | int] = []
        for axis in self.axes.resolve(dim):
            if axis.role is Role.TOKEN:
                sizes.append(self._count(domain))
            elif axis.order is not None:
                sizes.append(self._packed_size(axis.order, domain, node))
            elif axis.role is None:
                size = int(self.axes.expr(axis.size))
                if is_generic(size):
                    raise Unsupported(UNKNOWN_SIZE, node)
                sizes.append(size)
        return self.replay.product(*sizes)

    def _count(self, domain: Domain) -> Node:
        return self.replay.size(self.tokens[domain], 0)

    def _attend(self, node: Node, site: Site) -> None:
        """The retained queries, as packed rows, attend to history and visible slots."""
        place = self.plan.packed[node.name]
        tokens, inverse, _ = self._tables(place.domain)
        rows = self.rows[place.domain]
        query = self.nodes[site.query]
        fed = self.plan.packed[site.query].domain is Domain.FED
        source = self.fed_inverse if fed else inverse
        index = self.replay.once(focus.site_index.default, (source, rows))
        key, value = (self._on_canvas(self.nodes[name]) for name in (site.key, site.value))
        mask = self._site_mask(site, rows, key)
        lines = self.replay.once(focus.line_index.default, (tokens, inverse, rows))
        args = (self.env[query], key, value, mask, index, lines, site.scale)
        packed = self.replay.call(focus.attend.default, args, like=node, name=f"{node.name}_rows")
        self.env[node] = self.replay.call(aten.transpose.int, (packed, 1, 2), like=node)

    def _site_mask(self, site: Site, rows: Node, key: Node) -> Node:
        """The mask of retained queries; one for all layers that share the model's own."""
        past = site.writes[0].past
        history: Node | int = 0
        if past is not None:
            extent = self.plan.slots[site.layer][0].shape[site.writes[0].token_dim]
            if extent not in self.histories:
                length = self.replay.size(self.env[self.nodes[past]], site.writes[0].token_dim)
                self.histories[extent] = length
            history = self.histories[extent]
        mask: Node | None = None
        if site.mask is not None:
            mask = self.env[self.nodes[site.mask]]
            while tensor_of(mask).dim() < 4:
                mask = self.replay.once(aten.unsqueeze.default, (mask, 0))
        if site.causal:
            mask = self.replay.once(focus.causal.default, (self.masked, key))
        visible = self._visible_slots(site.layer)
        query = tensor_of(self.nodes[site.query])
        share = query.shape[1] // tensor_of(key).shape[1]
        args = (mask, rows, visible, history, share, query.dtype)
        return self.replay.once(focus.site_mask.default, args)

    def _visible_slots(self, layer: int) -> Node:
        """Visible slots: up to the second scored layer those of every fed token are new.

        Before that layer every fed token asks, and from it on every retained one.
        """
        queries = self.fed if layer < self.plan.scored[1] else self._retain_mask()
        stored = queries if self._is_late(layer) else self.fed
        written = self.written[self._is_late(layer)]
        return self.replay.once(focus.visible.default, (written, stored, queries, self.prefix))

    def _write(self, node: Node, new: Node) -> None:
        """Join history and block: the block's part is new where computed, stale elsewhere."""
        layer, part, write = self.writes[node.name]
        tokens, _, _ = self._tables(self.plan.packed[write.new].domain)
        past = None if write.history is None else self.env[self.nodes[write.history]]
        stale, name = self.slots[layer][part], f"joined{layer}_{'kv'[part]}"
        if self.plan.slots[layer][part].held:
            length = self.replay.size(self.masked, 1)
            stored = (stale, new, tokens, length, write.token_dim)
            joined = self.replay.call(focus.store.default, stored, like=node, name=name)
        else:
            written = self.written[self._is_late(layer)]
            args = (past, new, tokens, stale, written, self.reuse, write.token_dim)
            joined = self.replay.call(focus.join.default, args, like=node, name=name)
        self.env[node] = self.kv[layer, part] = joined

    # -- operands --------------------------------------------------------------------------------

    def _is_packed(self, node: Node) -> bool:
        write = self.writes.get(node.name)
        return node.name in self.plan.packed and (write is None or write[2].cat is not None)

    def _in_domain(self, arg: Node, place: Place, user: Node) -> Node:
        """An operand as packed rows of the user's domain."""
        tokens, inverse, _ = self._tables(place.domain)
        value = self.env[arg]
        token_dim: int | None
        if self._is_packed(arg):
            source = self.plan.packed[arg.name]
            if source.domain is place.domain:
                return value
            if source.token_dim is None:
                raise Unsupported(ANOTHER_ORDER, user)
            return self.replay.once(
                focus.repack.default, (value, self.fed_inverse, tokens, source.token_dim)
            )
        dims = self.axes.of(arg)
        if arg.target is aten.full.default:  # the same number everywhere: made as long as needed
            shape = [self._packed_size(dim, place.domain, user) for dim in dims]
            return self.replay.once(aten.full.default, (shape, *arg.args[1:]), arg.kwargs)
        batch_dim = self.axes.position(dims, Role.BATCH)
        token_dim = self.axes.position(dims, Role.TOKEN)
        if token_dim is not None:
            return self.replay.once(
                focus.pack.default, (value, tokens, inverse, batch_dim, token_dim)
            )
        if any(self.axes.holds(dim, Role.TOKEN) for dim in dims):
            raise Unsupported(FOLDED_TOKENS, user)
        if batch_dim is None:
            return value
        if place.token_dim is None:
            raise Unsupported(VALUE_PER_ROW, user)
        token_dim = len(dims) - (tensor_of(user).dim() - place.token_dim)
        if user.target not in POINTWISE or token_dim < 0 or dims[token_dim]:
            raise Unsupported(VALUE_PER_ROW, user)
        return self.replay.once(
            focus.pack_rows.default, (value, tokens, inverse, batch_dim, token_dim)
        )

    def _on_canvas(self, arg: Node) -> Node:
        """An operand on the canvas; only the importance reads packed values so."""
        if not self._is_packed(arg):
            return self.env[arg]
        place = self.plan.packed[arg.name]
        _, inverse, _ = self._tables(place.domain)
        return self.replay.once(
            focus.unpack.default, (self.env[arg], inverse, place.batch_dim, place.token_dim)
        )
