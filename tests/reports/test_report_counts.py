"""The numbers of a report: given, read off a trace, or assumed and said so; none where refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from focus_compile.cli import app
from focus_compile.reports.counts import ASSUMED, counts_of
from focus_compile.reports.page import page
from tests.reports.test_page import part
from tests.support.models.dream import Attention, Dream
from tests.support.paths import TESTS
from tests.support.stories import story, told, trace

NOTHING: dict[str, Any] = dict.fromkeys(ASSUMED)


def test_assumed() -> None:
    """Nobody has told anything: the page says so, next to every number."""
    html = page(story(5), "a title")
    summary = part(html, "summary")
    assert ">77 <small>of 512, assumed</small>" in summary
    assert ">16 <small>assumed</small>" in summary
    assert "Assumed, not measured: batch, block, history, fed, retained." in summary
    assert "retained tokens: assumed" in part(html, "funnel")
    assert "(retained tokens: assumed)" in part(html, "cost")


def test_from_the_trace() -> None:
    """Two rows of five tokens, three steps: counted by hand."""
    seen = trace()
    html = page(story(5), "a title", seen)
    summary = part(html, "summary")
    masked_or_retained = 5 + 5 + 4 + 5  # of the first row's three steps, and the second's last
    retained = 2 + 4 + 2 + 5
    counts = counts_of(NOTHING, seen)
    assert counts.fed == round(masked_or_retained / 30 * 10)
    assert counts.retained == round(retained / 30 * 10)
    assert f">{counts.retained} <small>of 10, from the trace</small>" in summary
    assert f">{counts.fed} <small>of 10, from the trace</small>" in summary
    assert ">2 <small>from the trace</small>" in summary
    assert "Assumed, not measured: history." in summary  # this trace does not tell its prompt
    # blocks 0, 0 and 1 of five tokens, after a prompt of eleven
    assert counts_of(NOTHING, seen | {"history": 11}).history == round(11 + 5 / 3)
    assert counts_of(NOTHING, seen | {"history": 0}).history == 0  # without a cache


def test_what_is_given_comes_first() -> None:
    counts = counts_of(NOTHING | {"retained": 0.1, "history": 9}, trace())
    assert (counts.retained, counts.history) == (1, 9)
    assert counts.origins["retained"] == counts.origins["history"] == "given"
    assert counts.origins["fed"] == "from the trace" and not counts.assumed
    small = counts_of(NOTHING | {"fed": 0.05}, None)
    assert small.retained == small.fed  # what is assumed bends to what is given
    with pytest.raises(ValueError, match="expected 0 <= retained <= fed <= 1"):
        counts_of(NOTHING | {"fed": 0.1, "retained": 0.2}, None)


def test_none_where_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is compiled unchanged retains nothing: no count is told."""
    monkeypatch.setattr(Attention, "branches", True)
    summary = part(page(told(Dream()), "a title"), "summary")
    assert "retained tokens" not in summary and "assumed" not in summary.lower()


def test_the_line_of_a_refusal(tmp_path: Path) -> None:
    """File and line of the model's own code, in the page, the text, and the data."""
    output = tmp_path / "page.html"
    torch._dynamo.reset()
    made = CliRunner().invoke(
        app, ["report", "tests.commands.test_cli:refused_factory", "-o", str(output), "--json"]
    )
    assert made.exit_code == 1, made.output
    data = json.loads(made.stdout)
    assert data["file"] == str(output) and not data["explanation"]["applied"]
    (graph,) = data["explanation"]["graphs"]
    source = (TESTS / "commands" / "test_cli.py").read_text().splitlines()
    (number,) = [at for at, line in enumerate(source, 1) if "x.cumsum(1)" in line]
    assert f"test_cli.py:{number} `" in graph["refusal"]["line"]
    assert "x.cumsum(1)" in graph["refusal"]["line"]
    assert f"test_cli.py:{number} `" in part(output.read_text(), "refusals")
