"""The HTML report in Chromium, from a file, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

from focus_compile.reports.page import page
from focus_compile.views.dot import dot
from tests.support.stories import CELLS, MARKUP, SIZES, analysis, marked, story, trace
from tests.views.test_draw import read

LUMINANCE = """
(color) => {
  const canvas = document.createElement("canvas").getContext("2d");
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass
class Opened:
    """A report that is open, what it asked for, and what it complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def luminance(self, color: str) -> float:
        """Relative luminance of a CSS colour, as WCAG has it."""
        return float(self.page.evaluate(LUMINANCE, color))

    def contrast(self, one: str, two: str) -> float:
        low, high = sorted((self.luminance(one), self.luminance(two)))
        return (high + 0.05) / (low + 0.05)

    def style(self, selector: str, name: str) -> str:
        found = self.page.locator(selector).first
        return str(found.evaluate("(e, name) => getComputedStyle(e)[name]", name))


def show(browser: Browser, html: str, path: Path, scheme: Any = "light") -> Opened:
    """Open a report whose graphs are drawn."""
    path.write_text(html, encoding="utf-8")
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1400, "height": 900})
    context.set_offline(True)
    opened = Opened(context.new_page())

    def allow(route: Route) -> None:
        opened.requests.append(route.request.url)
        if route.request.url == path.as_uri():
            route.continue_()
        else:
            route.abort()

    context.route("**/*", allow)
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.goto(path.as_uri())
    for name in ("graph-before", "graph-after"):
        opened.page.wait_for_selector(f"#{name} .drawing[data-drawn]")
    return opened


def test_offline(browser: Browser, tmp_path: Path) -> None:
    """Both graphs are drawn, every node of them; no complaint; no request but for the file."""
    path = tmp_path / "report.html"
    opened = show(browser, page(story(5), "a title", trace(), **SIZES), path)
    for name, after in (("graph-before", False), ("graph-after", True)):
        _, nodes = read(dot(analysis(story(5)), after=after))
        titles = opened.page.locator(f"#{name} svg .node > title").all_text_contents()
        assert sorted(titles) == sorted(nodes)
        box = opened.page.locator(f"#{name} svg").bounding_box()
        assert box is not None and box["width"] > 300 and box["height"] > 300
    assert opened.requests == [path.as_uri()] and opened.complaints == []
    opened.page.context.close()


def test_zoom_and_pan(browser: Browser, tmp_path: Path) -> None:
    """The wheel zooms, dragging pans, the buttons do as they say."""
    opened = show(browser, page(story(5), "a title", **SIZES), tmp_path / "report.html")
    view = opened.page
    view.locator("#graph-after").scroll_into_view_if_needed()
    box = view.locator("#graph-after svg").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def matrix() -> list[float]:
        """Scale, x and y."""
        script = """(e) => { const m = e.transform.baseVal.consolidate().matrix;
                             return [m.a, m.e, m.f]; }"""
        found: list[float] = view.locator("#graph-after .svg-pan-zoom_viewport").evaluate(script)
        return found

    def when(fits: Callable[[list[float]], bool]) -> list[float]:
        for _ in range(100):
            if fits(now := matrix()):
                return now
            view.wait_for_timeout(20)
        raise AssertionError(matrix())

    start = matrix()
    view.mouse.move(x, y)
    view.mouse.wheel(0, -300)
    near = when(lambda now: now[0] > start[0])
    view.mouse.down()
    view.mouse.move(x + 40, y + 30)
    view.mouse.up()
    moved = pytest.approx([near[0], near[1] + 40, near[2] + 30], abs=0.01)
    when(lambda now: now == moved)
    view.locator("#graph-after button", has_text="whole graph").click()
    when(lambda now: now[0] < start[0])
    view.locator("#graph-after button", has_text="where tokens come in").click()
    again = pytest.approx(start, abs=0.01)
    when(lambda now: now == again)
    assert opened.complaints == []
    view.context.close()


def test_heat_map(browser: Browser, tmp_path: Path) -> None:
    """Every cell's class is the trace's; its colour is the legend's; it says what it is."""
    opened = show(browser, page(story(5), "a title", trace(), **SIZES), tmp_path / "report.html")
    found = opened.page.eval_on_selector_all(
        "#heatmap table",
        """(tables) => tables.map((table) => [
             [Number(table.dataset.row), Number(table.dataset.block)],
             [...table.rows].map((row) => [...row.cells].slice(1).map((cell) => cell.className)),
           ])""",
    )
    assert {tuple(key): cells for key, cells in found} == CELLS
    colors = set()
    for kind in ("decoded", "retained", "evicted", "again", "done"):
        color = opened.style(f"#heatmap td.{kind}", "backgroundColor")
        assert color == opened.style(f"#heatmap .swatch.{kind}", "backgroundColor")
        title = opened.page.locator(f"#heatmap td.{kind}").first.get_attribute("title")
        assert title is not None and title.startswith("step ")
        colors.add(color)
    assert len(colors) == 5
    opened.page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_modes(browser: Browser, tmp_path: Path, scheme: str) -> None:
    """Text can be read on whatever it stands on."""
    html = page(story(5), "a title", trace(), **SIZES)
    opened = show(browser, html, tmp_path / "report.html", scheme)
    back = opened.style("body", "backgroundColor")
    assert (opened.luminance(back) < 0.05) == (scheme == "dark")
    assert opened.contrast(opened.style("body", "color"), back) > 7
    for text in ("h1", "#summary td", "#summary dt", ".legend li", "a", "#refusals p", ".verdict"):
        assert opened.contrast(opened.style(text, "color"), back) > 4.5, text
    for line in ("added", "removed", "hunk"):
        below = opened.style(f".diff .{line}", "backgroundColor")
        below = opened.style(".diff", "backgroundColor") if below == "rgba(0, 0, 0, 0)" else below
        assert opened.contrast(opened.style(f".diff .{line}", "color"), below) > 4.5, line
    for name, kinds in (
        ("graph-before", ("token", "history", "other", "folded")),
        ("graph-after", ("canvas", "fed", "retained", "focus")),
    ):
        for kind in kinds:
            node = f"#{name} .node.{kind}"
            shape = opened.style(f"{node} :is(polygon, ellipse)", "fill")
            assert opened.contrast(opened.style(f"{node} text", "fill"), shape) > 4.5, kind
    assert opened.contrast(opened.style("#cost svg text", "fill"), back) > 4.5
    opened.page.context.close()


@pytest.mark.parametrize("width", [360, 420])
def test_narrow(browser: Browser, tmp_path: Path, width: int) -> None:
    """On a telephone nothing is wider than the page: what is, scrolls by itself."""
    wide = trace()
    wide["block_length"] = 60  # a block of many positions
    for step in wide["steps"]:
        for part in ("masked", "retained", "decoded"):
            step[part] = [row * 12 for row in step[part]]
    html = page(story(5), "a/very/long/path/of/a/model/that/nobody/breaks/anywhere", wide, **SIZES)
    opened = show(browser, html, tmp_path / "report.html")
    opened.page.set_viewport_size({"width": width, "height": 800})
    opened.page.eval_on_selector_all("details", "(all) => all.forEach((e) => { e.open = true; })")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.page.locator("#summary table").evaluate("(e) => e.offsetWidth") > width
    opened.page.context.close()


def test_markup_is_text(browser: Browser, tmp_path: Path) -> None:
    """Names that are markup are shown as they are, and nothing of them runs."""
    html = page(marked(), MARKUP, trace(), **SIZES)
    opened = show(browser, html, tmp_path / "report.html")
    assert opened.complaints == [] and opened.page.locator("img").count() == 0
    assert opened.page.locator("h1").inner_text() == MARKUP == opened.page.title()
    tips = opened.page.locator("#graph-before .node a").evaluate_all(
        "(links) => links.map((a) => a.getAttribute('xlink:title') ?? a.getAttribute('title'))"
    )
    assert any(MARKUP in tip for tip in tips)
    opened.page.context.close()
