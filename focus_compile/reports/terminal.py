"""An explanation, as plain data, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from focus_compile.runtime.executable import CAUSAL

__all__ = ["evicting", "render"]


def render(console: Console, data: Mapping[str, Any]) -> None:
    """Print what :meth:`~focus_compile.Explanation.to_dict` returns."""
    console.print(f"FOCUS applied: {'yes' if data['applied'] else 'no'}", markup=False)
    console.print(f"Dynamo captured {len(data['graphs'])} graph(s)", markup=False)
    for broke in data["skipped"]:
        console.print(f"Dynamo ran a function eagerly: {_told(broke)}", markup=False)
    for index, graph in enumerate(data["graphs"]):
        console.rule(f"graph {index}: {graph['nodes']} nodes")
        if graph["refusal"] is not None:
            _print_refusal(console, graph["refusal"])
        elif graph["analysis"] is None:
            console.print("no attention over tokens: compiled unchanged")
        else:
            _print_analysis(console, graph["analysis"])
            _print_cost(console, graph)
        if graph["break"] is not None:
            console.print(f"ended by a graph break: {_told(graph['break'])}", markup=False)
    if data["measured"] is not None:
        console.rule("run for real")
        _print_measured(console, data["measured"])


def _told(broke: Mapping[str, Any]) -> str:
    cure = "" if broke["remedy"] is None else f"; {broke['remedy']}"
    return f"{broke['line']}: {broke['reason']}{cure}"


def _print_refusal(console: Console, refusal: Mapping[str, str]) -> None:
    location = f" [op {refusal['op']}" if refusal["op"] else ""
    location += f" in module {refusal['module']}]" if refusal["module"] else "]" if location else ""
    console.print(f"refused, compiled unchanged: {refusal['reason']}{location}", markup=False)
    if refusal["line"]:
        console.print(f"the line: {refusal['line']}", markup=False, soft_wrap=True)
    if refusal["cure"]:
        console.print(f"what to do: {refusal['cure']}", markup=False)


def _print_analysis(console: Console, analysis: Mapping[str, Any]) -> None:
    sites = Table("layer", title="attention sites")
    for name in ("module", "queries", "mask", "K/V write"):
        sites.add_column(name, overflow="fold")  # a path that is cut cannot be looked up
    for site in analysis["sites"]:
        mask = "causal" if site["causal"] else "yes" if site["mask"] else "none"
        cells = (str(site["layer"]), site["module"], site["query"], mask, site["write"])
        sites.add_row(*map(escape, cells))
    console.print(sites)
    if any(site["causal"] for site in analysis["sites"]):
        console.print(CAUSAL, markup=False)
    inputs = Table("input", Column("labels", overflow="fold"), title="labelled inputs")
    for name, labels in analysis["inputs"].items():
        inputs.add_row(escape(name), escape(labels))
    console.print(inputs)
    live = ", ".join(f"{name} ({domain})" for name, domain in analysis["live"].items())
    console.print(
        f"the cut: inside layer 1, after its q, k and v; live values: {live}", markup=False
    )
    if analysis["ranks"] > 1:
        console.print(
            f"heads shared out among {analysis['ranks']} processes: importances are summed"
        )
    passes = Table("pass", "nodes", "focus operators", title="passes")
    for stage in analysis["passes"]:
        passes.add_row(stage["name"], str(stage["nodes"]), str(stage["focus_operators"]))
    console.print(passes)


def _print_cost(console: Console, graph: Mapping[str, Any]) -> None:
    flops, moved = graph["flops"], graph["bytes"]
    console.print(
        "per step (B rows, T block, S history, F fed and N retained tokens of the batch)\n"
        f"  dense: {flops['dense']} FLOPs\n  focus: {flops['focus']} FLOPs\n"
        f"  dense: {moved['dense']} bytes\n  focus: {moved['focus']} bytes",
        markup=False,
    )


def evicting(measured: Mapping[str, Any]) -> str:
    """What a run says of evicting, from :meth:`focus_compile.reports.measure.Measured.to_dict`."""
    if measured["evicting"] is None:
        return "other tokens retained"
    return (
        f"{measured['evicting']:.1e}" if measured["tested"] else "not tested: nothing was evicted"
    )


def _print_measured(console: Console, measured: Mapping[str, Any]) -> None:
    table = Table("compared", "largest difference", "within", title="equality")
    limit = f"{measured['tolerance']:.1e}"
    table.add_row("eager, Inductor's dense program", f"{measured['dense']:.1e}", "")
    table.add_row("eager, FOCUS with nothing evicted", f"{measured['nothing_evicted']:.1e}", limit)
    table.add_row("FOCUS evicting: compiled, operator by operator", evicting(measured), limit)
    console.print(table)
    console.print(
        f"the call itself: fed {measured['fed']} tokens, retained {measured['retained']}, at most "
        f"{measured['retained_row']} of one row"
    )
    console.print(
        f"{measured['steps']} steps compared, in which {measured['evicted']} tokens were evicted"
    )
    for name, files in measured["code"].items():
        for path in files:
            console.print(f"{name}: {path}", markup=False, soft_wrap=True)
