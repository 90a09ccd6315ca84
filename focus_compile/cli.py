"""The command line: ``focus-compile explain PATH``, ``focus-compile cost PATH``.

PATH is a folder that ``AutoModelForCausalLM`` reads, or ``module:function``, a function that
returns a model. Nothing is computed with the model's weights.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from focus_compile.cost import Cost
from focus_compile.explain import Explanation
from focus_compile.explain import explain as explain_call
from focus_compile.rows import attention_mask, cache_keyword

__all__ = ["app"]

app = typer.Typer(help="FOCUS as a compiler pass: see what it makes of a model.")

Source = Annotated[str, typer.Argument(metavar="PATH", help="model folder, or module:function")]
Batch = Annotated[int, typer.Option(min=1, help="rows")]
Block = Annotated[int, typer.Option(min=2, help="tokens of a block")]
History = Annotated[int, typer.Option(min=0, help="tokens in the cache")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]
WithTrace = Annotated[bool, typer.Option("--traceback", help="show where an error came from")]


class BadInput(Exception):
    """What the user gave is no model; one line that says why."""


@app.command()
def explain(
    path: Source,
    *,
    batch: Batch = 2,
    block: Block = 32,
    history: History = 64,
    save: Annotated[Path | None, typer.Option(help="folder for text, JSON and graphs")] = None,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """Capture a denoising call, and tell what FOCUS makes of it. Exit code 1 if it is refused."""
    with _one_line(traceback):
        story = _story(path, batch, block, history)
        if save is not None:
            story.save(save)
    if as_json:
        typer.echo(story.to_json())
    else:
        story.print()
    raise typer.Exit(0 if story.applied else 1)


@app.command()
def cost(
    path: Source,
    *,
    batch: Batch = 16,
    block: Block = 32,
    history: History = 64,
    fed: Annotated[float, typer.Option(min=0, max=1, help="share of the block that is fed")] = 1.0,
    retained: Annotated[float, typer.Option(min=0, max=1, help="share that is retained")] = 0.15,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """FLOPs of a denoising step, dense and with FOCUS, read off the model's own graph."""
    with _one_line(traceback):
        story = _story(path, 2, block, history)
        costs = [graph.cost for graph in story.graphs if graph.cost is not None]
        if len(costs) != 1:
            raise BadInput(f"FOCUS was not applied: {'; '.join(map(str, story.refusals))}")
        if not fed >= retained:
            raise BadInput(f"--fed {fed} is less than --retained {retained}")
    tokens = batch * block
    counts = (batch, block, history, round(fed * tokens), round(retained * tokens))
    dense, focus = costs[0].flops(*counts)
    if as_json:
        names = ("batch", "block", "history", "fed", "retained")
        data = dict(zip(names, counts, strict=True)) | {"dense": dense, "focus": focus}
        formulas = {"dense": str(costs[0].dense), "focus": str(costs[0].focus)}
        typer.echo(json.dumps(data | {"ratio": dense / focus, "formulas": formulas}, indent=1))
        return
    _print(costs[0], dense, focus, counts)


def _print(formulas: Cost, dense: int, focus: int, counts: tuple[int, ...]) -> None:
    console = Console()
    table = Table("", "GFLOP per step", "formula", title="B {} T {} S {} F {} N {}".format(*counts))
    table.add_row("dense", f"{dense / 1e9:.3f}", str(formulas.dense))
    table.add_row("focus", f"{focus / 1e9:.3f}", str(formulas.focus))
    console.print(table)
    console.print(f"ratio: {dense / focus:.2f}, a limit unless kernels differ")


def _story(path: str, batch: int, block: int, history: int) -> Explanation:
    model = load(path)
    arguments: dict[str, Any] = {"input_ids": torch.zeros(batch, block, dtype=torch.int64)}
    visible = torch.ones(batch, 1, block, history + block, dtype=torch.bool)
    arguments["attention_mask"] = attention_mask(model, visible)
    if history:
        arguments |= {cache_keyword(model): _cache(model, batch, history), "use_cache": True}
    return explain_call(model, **arguments)


def _cache(model: Any, batch: int, history: int) -> DynamicCache:
    """Zeros in the shapes that a model's config tells."""
    config = model.config
    cache = DynamicCache(config=config)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = (batch, getattr(config, "num_key_value_heads", None) or heads, history, size)
    zeros = torch.zeros(shape, dtype=next(model.parameters()).dtype)
    for layer in range(config.num_hidden_layers):
        cache.update(zeros.clone(), zeros.clone(), layer)
    return cache


def load(path: str) -> Any:
    """The model of a folder, or of ``module:function``.

    Raises:
        BadInput: there is none.
    """
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise BadInput(f"{path} is not a model: it has no config.json")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path)
            return model.eval()
        except (ValueError, OSError) as error:
            raise BadInput(f"{path}: {' '.join(str(error).split())}") from error
    module, colon, function = path.partition(":")
    if not colon:
        raise BadInput(f"no such folder: {path}; give a model's folder, or module:function")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"{path}: {error}") from error
    if not isinstance(made, nn.Module):
        raise BadInput(f"{path} returned a {type(made).__name__}, not a torch.nn.Module")
    return made.eval()


@contextmanager
def _one_line(traceback: bool) -> Iterator[None]:
    """Bad input: one line and exit code 2; with ``traceback`` the error as it is."""
    try:
        yield
    except BadInput as error:
        if traceback:
            raise
        typer.echo(f"focus-compile: {error}", err=True)
        raise typer.Exit(2) from error
