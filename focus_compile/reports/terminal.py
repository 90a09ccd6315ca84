"""An explanation, as plain data, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from focus_compile.runtime.executable import CAUSAL
from focus_compile.views.cost import Cost

__all__ = ["cost_data", "evicting", "print_cost", "render"]


def cost_data(found: Cost, counts: tuple[int, int, int, int, int]) -> dict[str, Any]:
    dense, focus = found.flops(*counts)
    names = ("batch", "block", "history", "fed", "retained")
    return dict(zip(names, counts, strict=True)) | {
        "dense": dense,
        "focus": focus,
        "ratio": dense / focus,
        "bytes": dict(zip(("dense", "focus"), found.bytes(*counts), strict=True)),
        "formulas": {"dense": str(found.dense), "focus": str(found.focus)},
    }


def print_cost(found: Cost, counts: tuple[int, int, int, int, int]) -> None:
    console = Console()
    title = "B {} T {} S {} F {} N {}".format(*counts)
    table = Table("", "GFLOP per step", "MB per step", "formula of FLOPs", title=title)
    rows = zip(found.flops(*counts), found.bytes(*counts), strict=True)
    for (work, moved), formula in zip(rows, (found.dense, found.focus), strict=True):
        name = "dense" if formula is found.dense else "focus"
        table.add_row(name, f"{work / 1e9:.3f}", f"{moved / 1e6:.1f}", str(formula))
    console.print(table)
    ratio = found.speedup(*counts)
    console.print(f"ratio of FLOPs: {ratio:.2f}, a limit unless kernels differ")


def render(console: Console, data: Mapping[str, Any]) -> None:
    """Print what :meth:`~focus_compile.Explanation.to_dict` returns."""
    console.print(f"FOCUS applied: {'yes' if data['applied'] else 'no'}", markup=False)
    console.print(f"Dynamo captured {len(data['graphs'])} graph(s)", markup=False)
    for index, graph in enumerate(data["graphs"]):
        console.rule(f"graph {index}: {graph['nodes']} nodes")
        if graph["refusal"] is not None:
            _refusal(console, graph["refusal"])
        elif graph["analysis"] is None:
            console.print("no attention over tokens: compiled unchanged")
        else:
            _analysis(console, graph["analysis"])
            _cost(console, graph)
        if graph["break"] is not None:
            broke = graph["break"]
            cure = "" if broke["remedy"] is None else f"; {broke['remedy']}"
            told = f"{broke['line']}: {broke['reason']}{cure}"
            console.print(f"ended by a graph break: {told}", markup=False)
    if data["measured"] is not None:
        console.rule("run for real")
        _measured(console, data["measured"])


def _refusal(console: Console, refusal: Mapping[str, str]) -> None:
    where = f" [op {refusal['op']}" if refusal["op"] else ""
    where += f" in module {refusal['module']}]" if refusal["module"] else "]" if where else ""
    console.print(f"refused, compiled unchanged: {refusal['reason']}{where}", markup=False)
    if refusal["line"]:
        console.print(f"the line: {refusal['line']}", markup=False, soft_wrap=True)
    if refusal["cure"]:
        console.print(f"what to do: {refusal['cure']}", markup=False)


def _analysis(console: Console, found: Mapping[str, Any]) -> None:
    sites = Table("layer", title="attention sites")
    for name in ("module", "queries", "mask", "K/V write"):
        sites.add_column(name, overflow="fold")  # a path that is cut cannot be looked up
    for site in found["sites"]:
        mask = "causal" if site["causal"] else "yes" if site["mask"] else "none"
        words = (str(site["layer"]), site["module"], site["query"], mask, site["write"])
        sites.add_row(*map(escape, words))
    console.print(sites)
    if any(site["causal"] for site in found["sites"]):
        console.print(CAUSAL, markup=False)
    inputs = Table("input", Column("labels", overflow="fold"), title="labelled inputs")
    for name, text in found["inputs"].items():
        inputs.add_row(escape(name), escape(text))
    console.print(inputs)
    places = ", ".join(f"{name} ({place})" for name, place in found["live"].items())
    console.print(
        f"the cut: inside layer 1, after its q, k and v; live values: {places}", markup=False
    )
    if found["ranks"] > 1:
        console.print(f"heads shared out among {found['ranks']} processes: importances are summed")
    passes = Table("pass", "nodes", "focus operators", title="passes")
    for stage in found["passes"]:
        passes.add_row(stage["name"], str(stage["nodes"]), str(stage["focus_operators"]))
    console.print(passes)


def _cost(console: Console, graph: Mapping[str, Any]) -> None:
    flops, moved = graph["flops"], graph["bytes"]
    console.print(
        "per step (B rows, T block, S history, F fed and N retained tokens of the batch)\n"
        f"  dense: {flops['dense']} FLOPs\n  focus: {flops['focus']} FLOPs\n"
        f"  dense: {moved['dense']} bytes\n  focus: {moved['focus']} bytes",
        markup=False,
    )


def evicting(made: Mapping[str, Any]) -> str:
    """What a run says of evicting, from :meth:`focus_compile.reports.measure.Measured.to_dict`."""
    if made["evicting"] is None:
        return "other tokens retained"
    return f"{made['evicting']:.1e}" if made["tested"] else "not tested: nothing was evicted"


def _measured(console: Console, made: Mapping[str, Any]) -> None:
    table = Table("compared", "largest difference", "within", title="equality")
    limit = f"{made['tolerance']:.1e}"
    table.add_row("eager, Inductor's dense program", f"{made['dense']:.1e}", "")
    table.add_row("eager, FOCUS with nothing evicted", f"{made['nothing_evicted']:.1e}", limit)
    table.add_row("FOCUS evicting: compiled, operator by operator", evicting(made), limit)
    console.print(table)
    console.print(
        f"the call itself: fed {made['fed']} tokens, retained {made['retained']}, at most "
        f"{made['retained_row']} of one row"
    )
    console.print(f"{made['steps']} steps compared, in which {made['evicted']} tokens were evicted")
    for name, files in made["code"].items():
        for path in files:
            console.print(f"{name}: {path}", markup=False, soft_wrap=True)
