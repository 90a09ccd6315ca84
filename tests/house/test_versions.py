"""docs/versions.md is what its script makes of docs/versions.json, and reports are read right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import DOCS

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[2]"/>
<testcase classname="tests.test_a" name="test_two"><failure message="no"/></testcase>
<testcase classname="tests.fused.test_b" name="test_three"><skipped/></testcase>
<testcase classname="tests.fused.test_b" name="test_four"><error/></testcase>
</testsuite></testsuites>"""
WHERE = {"torch": "2.11.0+cpu", "transformers": "5", "triton": "none", "python": "3", "commit": "c"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", DOCS / "versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_not_stale(script: ModuleType) -> None:
    runs = json.loads((DOCS / "versions.json").read_text())
    assert script.text(runs) == (DOCS / "versions.md").read_text()
    assert {run["torch"].split(".")[1] for run in runs} >= {"11", "13", "14", "15"}


def test_a_report_is_counted_by_file(script: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    (run,) = script.add([], report, WHERE)
    assert run["files"] == {"tests/fused/test_b": [0, 1, 1], "tests/test_a": [1, 1, 0]}
    assert run["failed"] == ["tests/test_a::test_two", "tests/fused/test_b::test_four"]
    page = script.text([run])
    assert "| 2.11.0+cpu | 5 | none | 3 | c | fused/test_b, test_a | 1 | 2 | 1 |" in page
    assert "## torch 2.11.0+cpu, c: 2 failed\n\n- `tests/test_a::test_two`\n" in page


def test_a_note_stands_before_the_failures(script: ModuleType, tmp_path: Path) -> None:
    """Of the run that it was given for; another one is added to it."""
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    (run,) = script.add(script.add([], report, WHERE, "No GPU."), report, WHERE, "No ruff.")
    assert "c: 2 failed\n\nNo GPU. No ruff.\n\n- `tests/test_a::test_two`" in script.text([run])


def test_a_later_report_replaces_its_files_only(script: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    runs = script.add([], report, WHERE)
    report.write_text('<t><testcase classname="tests.test_a" name="test_two"/></t>')
    (run,) = script.add(runs, report, WHERE)
    assert run["files"] == {"tests/fused/test_b": [0, 1, 1], "tests/test_a": [1, 0, 0]}
    assert run["failed"] == ["tests/fused/test_b::test_four"]
    assert len(script.add(runs, report, WHERE | {"commit": "d"})) == 2
