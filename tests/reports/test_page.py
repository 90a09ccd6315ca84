"""The HTML report: what it says, and what it escapes. What a browser shows: test_page_browser.py"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import sympy
import torch

import focus_compile
from focus_compile.reports import page as report
from focus_compile.reports.explanation import Explanation
from focus_compile.reports.page import page
from focus_compile.views.describe import difference
from tests.support.models.dream import Attention, Dream
from tests.support.stories import MARKUP, SIZES, Twice, analysis, marked, story, told, trace

ASSETS = Path(focus_compile.__file__).parent / "reports" / "assets"


def part(html: str, name: str) -> str:
    """The section of the report with an id."""
    found = re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)
    assert found is not None, name
    return found.group()


def test_summary_funnel_and_cost() -> None:
    """60 tokens, 33 fed, 15 retained: every layer's number; FLOPs and ratio as the cost says."""
    html = page(story(5), "a title", **SIZES)
    cost = story(5).graphs[0].cost
    assert cost is not None
    dense, focus = cost.flops(3, 20, 7, 33, 15)
    summary = part(html, "summary")
    for number in (f"{dense / 1e9:.4g}", f"{focus / 1e9:.4g}", f"{dense / focus:.2f}", "applied"):
        assert f">{number}</td>" in summary
    for count in (33, 15):
        assert f">{count} <small>of 60, given</small>" in summary
    funnel = part(html, "funnel")
    assert "dense: 60 tokens in every layer" in funnel
    assert re.findall(r"<title>(.*?): (\d+) of 60 tokens \((\w+)\)</title>", funnel) == [
        ("layer 0", "33", "fed"),
        ("layer 1: q, k, v", "33", "fed"),
        ("layer 1: the rest", "15", "retained"),
        ("layer 2", "15", "retained"),
        ("layer 3", "15", "retained"),
        ("layer 4", "15", "retained"),
        ("logits", "15", "retained"),
    ]
    widths = re.findall(r'<rect class="(?:fed|retained)".* width="([\d.]+)"', funnel)
    assert widths == ["264.0"] * 2 + ["120.0"] * 5  # of 480
    assert f"{dense / focus:.2f}</text>" in part(html, "cost")  # next to the marked point
    assert ">None.<" in part(html, "refusals") and 'id="heatmap"' not in html


def test_cost_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with the same numbers, the report's own among them."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cost = story(5).graphs[0].cost
    assert cost is not None
    table = part(page(story(5), "a title", **SIZES), "cost")
    assert "<svg" not in table
    own = re.findall(r'<tr class="own"><td>([\d.]+)</td><td>([\d.]+)</td>', table)
    dense, focus = cost.flops(3, 20, 7, 33, 15)
    assert own == [("0.25", f"{dense / focus:.2f}"), ("20", f"{dense / focus:.2f}")]
    rows = dict(re.findall(r"<td>([\d.]+)</td><td>([\d.]+)</td>", table))
    assert len(rows) > 25 and rows["64"] == f"{cost.speedup(3, 64, 7, 105.6, 48.0):.2f}"


def test_cost_of_other_sizes() -> None:
    """A second history: its length is none of the report's sizes, so that no number is told."""
    (graph,) = story(5).graphs
    assert graph.cost is not None
    cost = replace(graph.cost, dense=graph.cost.dense + sympy.Symbol("history1"))
    html = page(Explanation([replace(graph, cost=cost)]), "a title", **SIZES)
    assert "depend on sizes that this page was not told" in part(html, "cost")
    assert "history1" in html and 'id="graph-after"' in html


def test_difference() -> None:
    """Every line of the unified diff, with its class."""
    section = part(page(story(5), "a title", **SIZES), "diff")
    found = re.findall(r'<span class="(\w+)">(.*)</span>', section)
    assert [unescape(line) for _, line in found] == difference(analysis(story(5))).splitlines()
    assert {kind for kind, _ in found} == {"added", "removed", "hunk", "same"}
    for kind, line in found[2:]:
        assert kind == {"+": "added", "-": "removed", "@": "hunk"}.get(line[:1], "same")


def test_markup_is_text() -> None:
    """Names of modules and the title are escaped wherever they appear."""
    html = page(marked(), MARKUP, trace(), **SIZES)
    assert marked().applied and MARKUP not in html and "<img" not in html
    assert unescape(html).count(MARKUP) > 5
    assert html.count("<script") == html.count("</script>") == len(report.SCRIPTS)


def test_scripts_can_stand_in_a_page() -> None:
    """Nothing in them ends a script; what is vendored comes with its licence."""
    for name in report.SCRIPTS:
        text = (ASSETS / name).read_text(encoding="utf-8").lower()
        assert "</script" not in text and "<!--" not in text
    licences = sorted(path.name for path in (ASSETS / "vendor").glob("*.LICENSE.txt"))
    assert licences == ["svg-pan-zoom.LICENSE.txt", "viz.LICENSE.txt"]


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph breaks and refusals with reason, operator, module, line and remedy; nothing drawn."""
    monkeypatch.setattr(Attention, "branches", True)
    found = told(Dream())
    assert not found.applied and found.refusals and found.breaks
    html = page(found, "a title", **SIZES)
    assert "FOCUS was not applied" in html and 'class="drawing"' not in html
    section = unescape(part(html, "refusals"))
    for refusal in found.refusals:
        assert refusal.reason in section and refusal.op in section and refusal.module in section
        assert refusal.cure in section
    for broke in found.breaks:
        assert broke.line in section and broke.reason in section and str(broke.remedy) in section


def test_nothing_captured() -> None:
    html = page(Explanation(), "a title", **SIZES)
    assert "FOCUS was not applied" in html and ">None.<" in part(html, "refusals")


def test_several_graphs() -> None:
    """A section for each that FOCUS was applied to; ids stay apart."""
    torch._dynamo.reset()
    found = focus_compile.explain(Twice().eval(), input_ids=torch.zeros(3, 7, dtype=torch.int64))
    applied = [index for index, graph in enumerate(found.graphs) if graph.analysis is not None]
    assert len(applied) == 2 and len(found.breaks) == 1
    html = page(found, "a title", **SIZES)
    ids = re.findall(r'<section id="([\w-]+)"', html)
    assert len(set(ids)) == len(ids)
    for name in ("funnel", "graph-before", "graph-after", "diff", "cost"):
        assert {name, f"{name}-{applied[1]}"} <= set(ids)
    assert set(re.findall(r'<a href="#([\w-]+)"', html)) <= set(ids)


def test_shares() -> None:
    with pytest.raises(ValueError, match="expected 0 <= retained <= fed <= 1"):
        page(story(5), "a title", **SIZES | {"retained": 0.6})
