"""Pictures of graphs: what is drawn, how it is classed, how it is folded and escaped."""

from __future__ import annotations

import warnings

import networkx as nx
import pydot
import pytest
from pyparsing.warnings import PyparsingDeprecationWarning

from focus_compile.views.dot import dot
from tests.support.stories import analysis, marked, story

FOLDED = "folded layers"


def read(text: str) -> tuple[nx.MultiDiGraph, dict[str, pydot.Node]]:
    """DOT text, read back: the graph, and its nodes by name, without the defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyparsingDeprecationWarning)  # pydot's
        (graph,) = pydot.graph_from_dot_data(text)
    nodes = graph.get_nodes() + [n for part in graph.get_subgraphs() for n in part.get_nodes()]
    found = {node.get_name().strip('"'): node for node in nodes if node.get("class")}
    edges = nx.nx_pydot.from_pydot(graph)
    return nx.relabel_nodes(edges, {name: name.strip('"') for name in edges}), found


@pytest.mark.parametrize("after", [False, True])
def test_pictures(after: bool) -> None:
    """What pydot and networkx read: no cycle, no weights or sizes, no larger with depth."""
    numbers = {}
    for layers in (4, 6, 12):
        part = analysis(story(layers))
        flow, nodes = read(dot(part, after=after))
        assert nx.is_directed_acyclic_graph(flow) and set(flow) == set(nodes)
        weights = {given.name for given in part.canonical.inputs if not given.symbolic}
        assert len(weights) > 20 and not weights & set(nodes)
        assert not [name for name in nodes if name.startswith(("sym_size", "getitem"))]
        assert ("importance0" in nodes) == after
        assert FOLDED in nodes
        numbers[layers] = len(nodes)
        if layers > 4:
            assert f"layers 3 to {layers - 1}" in nodes[FOLDED].get("label")
    assert 40 < numbers[4] == numbers[6] == numbers[12]


def test_edges_pass_through_what_is_left_out() -> None:
    """The parts of focus.tables reach their readers; sizes make no edges."""
    flow, nodes = read(dot(analysis(story(3)), after=True))
    assert FOLDED not in nodes
    assert "inverse" not in nodes and "places" not in nodes
    assert nx.has_path(flow, "retain_mask", "tables")
    assert any(flow.has_edge("tables", name) for name in nodes if name.startswith("site_index"))
    sources = {source for source, _ in flow.in_edges("delta")}
    assert sources == {"importance0", "importance1", "signal_weights", "signal_bias"}


def test_classes_before() -> None:
    """By labels: of the block's tokens, along the history, neither."""
    part = analysis(story(5))
    _, nodes = read(dot(part, after=False))
    kinds = {name: node.get("class").strip('"') for name, node in nodes.items()}
    site = part.plan.sites[0]
    assert kinds[part.plan.ids] == kinds[site.query] == "token"
    assert kinds[part.plan.embedding] == "token entry"
    assert kinds[str(site.writes[0].cat)] == kinds[str(site.writes[0].past)] == "history"
    assert {kind.split()[0] for kind in kinds.values()} == {"token", "history", "other", "folded"}
    assert "[batch, token, 40]" in nodes[part.plan.embedding].get("label")


def test_classes_after() -> None:
    """By the plan's domains; sizes by name; operators of the passes apart."""
    part = analysis(story(5))
    _, nodes = read(dot(part, after=True))
    kinds = {name: node.get("class").strip('"') for name, node in nodes.items()}
    packed = {name: place.domain.value for name, place in part.plan.packed.items()}
    shown = {name: kind.split()[0] for name, kind in kinds.items() if name in packed}
    assert len(shown) > 50 and shown == {name: packed[name] for name in shown}
    assert kinds["importance0"] == kinds["joined2_k"] == "canvas focus"
    assert kinds["tokens"] == "retained" and kinds["fed_tokens"] == "fed"
    assert "[batch, history+token, 32]" in nodes["joined2_k"].get("label")
    assert "[1, fed, 40]" in nodes[part.plan.embedding].get("label")
    assert "focus::attend" in nodes[f"{part.plan.sites[1].out}_rows"].get("label")
    assert all("focus::" in nodes[name].get("label") for name in kinds if "focus" in kinds[name])


def test_returned_values_have_a_double_outline() -> None:
    for after in (False, True):
        part = analysis(story(3))
        gm = part.stages[-1][1] if after else part.canonical.gm
        _, nodes = read(dot(part, after=after))
        double = {name for name, node in nodes.items() if node.get("peripheries")}
        returned = {node.name for node in gm.graph.output_node().all_input_nodes}
        assert double and double >= returned & set(nodes)


def test_markup_is_text() -> None:
    """A module whose name is markup, an entity and a quote."""
    for after in (False, True):
        text = dot(analysis(marked()), after=after)
        flow, nodes = read(text)
        assert nx.is_directed_acyclic_graph(flow)
        tips = [node.get("tooltip") or "" for node in nodes.values()]
        assert any('<img src=x onerror=alert(1)>&amp;amp;\\"' in tip for tip in tips)
        assert all(tip[:1] in ("", '"') for tip in tips)  # never an HTML-like label
