"""Files for other tools: code and its difference, DOT, ``.pt2`` programs, a refusal's script."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.fx import GraphModule

from focus_compile.analysis import Analysis
from focus_compile.errors import Unsupported
from focus_compile.programs.program import make_programs
from focus_compile.views.describe import code, difference, legend
from focus_compile.views.dot import dot
from focus_compile.views.export import exported
from focus_compile.views.reproduce import script

__all__ = ["save_analysis", "save_refusal"]


def save_analysis(analysis: Analysis, folder: Path, name: str) -> None:
    """Write a graph before and after the passes, the difference, and the two programs.

    ``<name>_before.py``, ``<name>_after.py``, ``<name>.diff``, each with a legend of the numbers
    that stand for sizes; ``<name>_before.dot`` and
    ``<name>_after.dot`` for Graphviz; ``<name>_prefix.pt2`` and ``<name>_suffix.pt2``, which hold
    no weights, for viewers of exported programs (netron, Model Explorer).
    """
    texts = {
        f"{name}_before.py": code(analysis.canonical.gm),
        f"{name}_after.py": code(analysis.stages[-1][1]),
        f"{name}.diff": difference(analysis),
    }
    for file, text in texts.items():
        (folder / file).write_text(legend(text) + text)
    for label, after in (("before", False), ("after", True)):
        (folder / f"{name}_{label}.dot").write_text(dot(analysis, after))
    programs = make_programs(analysis.halves, analysis.inputs, lambda graph, _: graph)
    for label, program in zip(("prefix", "suffix"), programs, strict=True):
        torch.export.save(exported(program), folder / f"{name}_{label}.pt2")


def save_refusal(graph: GraphModule, refusal: Unsupported, folder: Path, name: str) -> None:
    """Write ``<name>_refused.py``, a script that is refused for the same reason: no model, no
    weights, the graph's nodes from its inputs to the operator at fault.

    Nothing is written for a graph that text cannot carry.
    """
    file = f"{name}_refused.py"
    text = script(graph, refusal, file)
    if text is not None:
        (folder / file).write_text(text)
