"""Write docs/refusals.md: what the backend refuses, and what to do about it.

python docs/refusals.py
"""

from __future__ import annotations

from pathlib import Path

from focus_compile.cures import CURES

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Refusals: what they say, and what to do

A graph that FOCUS cannot be applied to soundly is compiled unchanged, with one warning that gives
the reason, the operator and the module; `options={"strict": True}` raises `Unsupported` instead.
`focus_compile.explain(model, ...)` prints reason and cure, and `explain(...).save(folder)` writes a
script that is refused for the same reason: the graph's nodes up to the one at fault, without the
model and its weights. Written by `python docs/refusals.py`.

| The reason begins with | What to do |
| --- | --- |
"""


def text() -> str:
    """The page."""
    return HEAD + "".join(f"| {start.strip()} ... | {cure} |\n" for start, cure in CURES)


if __name__ == "__main__":
    PAGE.write_text(text())
