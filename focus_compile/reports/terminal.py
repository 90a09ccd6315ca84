"""What commands print: an explanation as plain data, a comparison, a cost, answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from focus_compile.generation.generated import Generated
from focus_compile.runtime.executable import CAUSAL
from focus_compile.views.cost import Cost

__all__ = [
    "cost_data",
    "print_answers",
    "print_comparison",
    "print_cost",
    "print_figures",
    "render",
]


def cost_data(cost: Cost, counts: tuple[int, int, int, int, int]) -> dict[str, Any]:
    dense, focus = cost.flops(*counts)
    names = ("batch", "block", "history", "fed", "retained")
    return dict(zip(names, counts, strict=True)) | {
        "dense": dense,
        "focus": focus,
        "ratio": dense / focus,
        "bytes": dict(zip(("dense", "focus"), cost.bytes(*counts), strict=True)),
        "formulas": {"dense": str(cost.dense), "focus": str(cost.focus)},
    }


def print_cost(cost: Cost, counts: tuple[int, int, int, int, int]) -> None:
    console = Console()
    title = "B {} T {} S {} F {} N {}".format(*counts)
    table = Table("", "GFLOP per step", "MB per step", "formula of FLOPs", title=title)
    rows = zip(cost.flops(*counts), cost.bytes(*counts), strict=True)
    for (work, moved), formula in zip(rows, (cost.dense, cost.focus), strict=True):
        name = "dense" if formula is cost.dense else "focus"
        table.add_row(name, f"{work / 1e9:.3f}", f"{moved / 1e6:.1f}", str(formula))
    console.print(table)
    ratio = cost.speedup(*counts)
    console.print(f"ratio of FLOPs: {ratio:.2f}, a limit unless kernels differ")


def print_comparison(measured: Mapping[str, Any]) -> None:
    """Print :meth:`focus_compile.reports.measure.Measured.to_dict`, and whether all is equal."""
    differences = {
        "FOCUS with nothing evicted and eager": f"{measured['nothing_evicted']:.1e}",
        "FOCUS evicting, compiled and operator by operator": _evicting(measured),
        "for comparison: Inductor's dense program and eager": f"{measured['dense']:.1e}",
    }
    for compared, difference in differences.items():
        typer.echo(f"{compared}: {difference}")
    typer.echo(f"the call itself: fed {measured['fed']} tokens, retained {measured['retained']}")
    typer.echo(
        f"{measured['steps']} steps compared, in which {measured['evicted']} tokens were evicted"
    )
    verdict = "equal" if measured["equal"] else "NOT EQUAL"
    verdict += "" if measured["tested"] else ", as far as tested,"
    typer.echo(f"{verdict} within {measured['tolerance']:.1e}")


def print_answers(texts: Sequence[str], generated: Generated, as_json: bool) -> None:
    """Print the texts of a generation; its figures are part of the JSON."""
    if not as_json:
        for text in texts:
            typer.echo(text)
        return
    data = {
        "answers": texts,
        "forwards": generated.forwards,
        "tokens_per_forward": generated.tokens_per_forward,
        "fed_fraction": generated.fed_fraction,
        "retained_fraction": generated.retained_fraction,
    }
    typer.echo(json.dumps(data, indent=1))


def print_figures(generated: Generated) -> None:
    """Print how much work a generation was, on stderr."""
    typer.echo(
        f"{generated.forwards} forwards, {generated.tokens_per_forward:.2f} tokens each; "
        f"fed {generated.fed_fraction:.0%}, retained {generated.retained_fraction:.0%}",
        err=True,
    )


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
            message = f"{broke['line']}: {broke['reason']}{cure}"
            console.print(f"ended by a graph break: {message}", markup=False)
    if data["measured"] is not None:
        console.rule("run for real")
        _measured(console, data["measured"])


def _refusal(console: Console, refusal: Mapping[str, str]) -> None:
    location = f" [op {refusal['op']}" if refusal["op"] else ""
    location += f" in module {refusal['module']}]" if refusal["module"] else "]" if location else ""
    console.print(f"refused, compiled unchanged: {refusal['reason']}{location}", markup=False)
    if refusal["line"]:
        console.print(f"the line: {refusal['line']}", markup=False, soft_wrap=True)
    if refusal["cure"]:
        console.print(f"what to do: {refusal['cure']}", markup=False)


def _analysis(console: Console, analysis: Mapping[str, Any]) -> None:
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


def _cost(console: Console, graph: Mapping[str, Any]) -> None:
    flops, moved = graph["flops"], graph["bytes"]
    console.print(
        "per step (B rows, T block, S history, F fed and N retained tokens of the batch)\n"
        f"  dense: {flops['dense']} FLOPs\n  focus: {flops['focus']} FLOPs\n"
        f"  dense: {moved['dense']} bytes\n  focus: {moved['focus']} bytes",
        markup=False,
    )


def _evicting(measured: Mapping[str, Any]) -> str:
    """What a run says of evicting, from :meth:`focus_compile.reports.measure.Measured.to_dict`."""
    if measured["evicting"] is None:
        return "other tokens retained"
    return (
        f"{measured['evicting']:.1e}" if measured["tested"] else "not tested: nothing was evicted"
    )


def _measured(console: Console, measured: Mapping[str, Any]) -> None:
    table = Table("compared", "largest difference", "within", title="equality")
    limit = f"{measured['tolerance']:.1e}"
    table.add_row("eager, Inductor's dense program", f"{measured['dense']:.1e}", "")
    table.add_row("eager, FOCUS with nothing evicted", f"{measured['nothing_evicted']:.1e}", limit)
    table.add_row("FOCUS evicting: compiled, operator by operator", _evicting(measured), limit)
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
