"""What commands print beside explanations: comparisons, costs, answers.

Importing the package does not load this module, nor typer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from focus_compile.generation.generated import Generated
from focus_compile.reports.terminal import evicting
from focus_compile.views.cost import Cost

__all__ = ["cost_data", "print_answers", "print_comparison", "print_cost", "print_figures"]


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
        "FOCUS evicting, compiled and operator by operator": evicting(measured),
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
