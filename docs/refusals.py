"""Write docs/refusals.md: what the backend refuses, and what to do about it.

python docs/refusals.py
"""

from __future__ import annotations

from pathlib import Path

from focus_compile.refusals import catalogue

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Refusals: what they say, and what to do

A graph that FOCUS cannot be applied to soundly is compiled unchanged, with one warning that gives
the reason, the operator, the module and what to do; `options={"strict": True}` raises `Unsupported`
instead, whose `reason`, `op`, `module` and `cure` they are. `focus_compile.explain(model, ...)`
tells the same of every graph, and `explain(...).save(folder)` writes a script that is refused for
the same reason: the graph's nodes up to the one at fault, without the model and its weights. A
block of one token alone is left unchanged in silence, strict or not: there is nothing to evict.

Written by `python -m docs.build` from the catalogue, `focus_compile/refusals.py`; `...` stands
for what is filled in.

| Reason | What to do |
| --- | --- |
"""


def text() -> str:
    """The page."""
    rows = []
    for refusal in catalogue().values():
        reason = refusal.filled(dict.fromkeys(refusal.fields, "..."))
        rows.append(f"| {reason} | {refusal.cure} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(text())
