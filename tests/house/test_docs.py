"""Pages that a program writes are not stale, links lead somewhere, nothing is left out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from docs.build import PAGES
from focus_compile import FocusConfig
from focus_compile.cli import app
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
WRITTEN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
NARROW = [DOCS / f"{name}.md" for name in "README method options commands sessions limits".split()]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_module_writes(name: str) -> None:
    """Else: ``python -m docs.build``."""
    assert (DOCS / name).read_text() == PAGES[name]()


def test_no_page_that_a_program_writes_is_forgotten() -> None:
    """A page that says it is written by ``docs.build`` is one of its pages, and they say so."""
    told = {page.name for page in DOCS.glob("*.md") if "Written by `python " in page.read_text()}
    assert told == set(PAGES)


def test_the_contents_list_every_page_once() -> None:
    text = (DOCS / "README.md").read_text()
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    linked = re.findall(r"^\| \[[\w.-]+\]\(([\w.-]+)\)", text, re.MULTILINE)
    assert sorted(linked) == sorted(pages)
    _, _, written = text.partition("## Pages that are written by a program")
    assert set(re.findall(r"^\| `([\w-]+\.md)`", written, re.MULTILINE)) == set(PAGES)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*WRITTEN, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*WRITTEN, *NARROW], ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > 120] == []


def test_every_option_is_explained() -> None:
    """With its default, and README counts them."""
    text = (DOCS / "options.md").read_text()
    told = dict(re.findall(r"^\*\*`(\w+)`\*\*, default `([^`]+)`", text, re.MULTILINE))
    config = FocusConfig()
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    shown = {"inductor": "{}"} | {
        name: f'"{value}"' if isinstance(value, str) else str(value)
        for name, value in options.items()
        if name != "inductor"
    }
    assert told == shown
    assert f"{len(options)} options" in (ROOT / "README.md").read_text()


def test_every_command_is_explained() -> None:
    text, readme = (DOCS / "commands.md").read_text(), (ROOT / "README.md").read_text()
    (line,) = re.findall(r"`focus-compile (\w+(?: \| \w+)+)`", readme)
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names == set(line.split(" | "))
    assert [name for name in names if f"**`focus-compile {name}" not in text] == []


def test_contributing_names_files_that_exist() -> None:
    """Each path in backticks, from the root or from ``focus_compile/``, and ``path::name``."""
    text = (ROOT / "CONTRIBUTING.md").read_text().replace("/FAMILY.py", "/__init__.py")
    names = re.findall(r"`([\w./-]*(?:\.py|/)[\w./-]*)(?:::(\w+))?`", text)
    assert len(names) > 60
    roots = (ROOT, ROOT / "focus_compile")
    found = {name: [root / name for root in roots if (root / name).exists()] for name, _ in names}
    assert [name for name, paths in found.items() if not paths] == []
    assert [
        (name, part) for name, part in names if part and part not in found[name][0].read_text()
    ] == []
