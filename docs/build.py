"""Write every page that a record, a catalogue or a template holds; nothing is measured.

    python -m docs.build            write them
    python -m docs.build --check    write nothing; name the stale ones, exit code 1

A page ``docs/X.md`` is what ``text()`` of a module returns. Benchmarks write records
(``docs/*.json``), never pages. Not among them: ``how-it-works.md``, for which
``docs/how_it_works.py`` captures and compiles a model, and the pictures of ``docs/pictures.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu import page as gpu
from docs import (
    inductor_grid,
    messages,
    performance,
    protocol,
    quality,
    refusals,
    reliability,
    scale,
    versions,
)

__all__ = ["DOCS", "PAGES", "stale"]

DOCS = Path(__file__).resolve().parent

PAGES: Mapping[str, Callable[[], str]] = {
    "gpu.md": lambda: gpu.text(DOCS / "gpu"),  # gpu.md.j2, gpu/*.json
    "inductor_grid.md": inductor_grid.text,  # inductor_grid.json
    "messages.md": messages.text,  # the package's sources, and the table in messages.py
    "performance.md": performance.text,  # throughput, profile, scaling, compile_time: .json
    "protocol.md": protocol.text,  # protocol, protocol_speed: .json
    "quality.md": quality.text,  # quality.json
    "refusals.md": refusals.text,  # the package's catalogue of refusals
    "reliability.md": reliability.text,  # fuzz, fuzz_edges, soak: .json
    "scale.md": scale.text,  # scale.md.j2, scale.json
    "versions.md": lambda: versions.text(versions.record()),  # versions.json
}
"""Page -> what it has to hold, and from which files of this folder that comes."""


def stale() -> list[str]:
    """Pages that are not what their modules write."""
    return [name for name, text in PAGES.items() if (DOCS / name).read_text() != text()]


def main(
    *,
    check: Annotated[bool, typer.Option("--check", help="write nothing, name stale pages")] = False,
) -> None:
    """Write the pages that differ."""
    changed = stale()
    for name in changed:
        if not check:
            (DOCS / name).write_text(PAGES[name]())
        typer.echo(f"docs/{name}: {'stale' if check else 'written'}")
    raise typer.Exit(int(check and bool(changed)))


if __name__ == "__main__":
    typer.run(main)
