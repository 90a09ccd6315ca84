"""The command line: ``focus-compile explain PATH`` and its siblings.

PATH is a folder that ``AutoModelForCausalLM`` reads, the id of one on the Hugging Face hub, or
``module:function``, a function that returns a model, or a model and the keyword arguments of a
denoising call. Exit codes: 0; 1 where FOCUS is refused, or ``verify`` finds a difference or could
evict nothing; 2 for bad input and all that goes wrong, with one line that says why.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils.logging import disable_progress_bar
from typer.core import TyperCommand

from focus_compile import __version__
from focus_compile.calibration.calibrate import calibrate as calibrate_model
from focus_compile.compiling import watching
from focus_compile.entry import compile as compile_model
from focus_compile.generation.loop import generate as generate_blocks
from focus_compile.generation.text import answers, end_tokens, left_padded, prompt_ids
from focus_compile.models.load import BadInput, denoising_call, load, mask_token, tokenizer
from focus_compile.reports.commands import (
    cost_data,
    print_answers,
    print_comparison,
    print_cost,
    print_figures,
)
from focus_compile.reports.contest import Plan, contest, read_prompts
from focus_compile.reports.counts import ASSUMED, counts_of
from focus_compile.reports.explanation import Explanation
from focus_compile.reports.explanation import explain as explain_call
from focus_compile.reports.failure import one_line
from focus_compile.reports.page import page
from focus_compile.runtime.session import session

__all__ = ["app"]

app = typer.Typer()

Source = Annotated[
    str, typer.Argument(metavar="PATH", help="model folder, hub id, or module:function")
]
Batch = Annotated[int, typer.Option(min=1, help="rows")]
Block = Annotated[int, typer.Option(min=2, help="tokens of a block")]
History = Annotated[int, typer.Option(min=0, help="tokens in the cache")]
Fed = Annotated[float, typer.Option(min=0, max=1, help="share of the block that is fed")]
Retained = Annotated[float, typer.Option(min=0, max=1, help="share that is retained")]
NewTokens = Annotated[int, typer.Option(min=1, help="rounded up to whole blocks")]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="confidence to decode at")]
Alpha = Annotated[float, typer.Option(min=1, help="budget factor")]
MaskToken = Annotated[int | None, typer.Option(help="id of the mask token, if nothing tells it")]
Trusted = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="run the Python files that come with the model"),
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]
WithTrace = Annotated[bool, typer.Option("--traceback", help="show where an error came from")]


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"focus-compile {__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """FOCUS as a compiler pass: see what it makes of a model."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know few characters
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]  # a log is to hold lines
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # module:function of the working folder


@app.command()
def explain(
    path: Source,
    *,
    batch: Batch = 2,
    block: Block = 32,
    history: History = 64,
    save: Annotated[Path | None, typer.Option(help="folder for text, JSON and graphs")] = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """Capture a denoising call, and tell what FOCUS makes of it."""
    with one_line(traceback):
        story = _story(path, batch, block, history, trust_remote_code)
        _print_story(story, as_json)
        if save is not None:
            story.save(save)
    raise typer.Exit(0 if story.applied else 1)


@app.command()
def verify(
    path: Source,
    *,
    batch: Batch = 2,
    block: Block = 32,
    history: History = 64,
    mask_token_id: MaskToken = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """Run a denoising call, eager and compiled, evicting and not, and compare the outputs."""
    with one_line(traceback), _spinner("compiling and running"):
        model, call = load(path, trust_remote_code)
        mask_id = mask_token(model, None, mask_token_id)
        arguments = call or denoising_call(model, batch, block, history, mask_id)
        story = explain_call(model, run=True, mask_token_id=mask_id, **arguments)
    measured = story.measured
    if as_json:
        typer.echo(json.dumps(story.to_dict()["measured"], indent=1))
    elif measured is None:
        story.print()
    else:
        print_comparison(measured.to_dict())
    raise typer.Exit(0 if measured is not None and measured.equal and measured.tested else 1)


@app.command()
def cost(
    path: Source,
    *,
    batch: Batch = 16,
    block: Block = 32,
    history: History = 64,
    fed: Fed = 1.0,
    retained: Retained = 0.15,
    layers: Annotated[int | None, typer.Option(min=2, help="as if there were so many")] = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """FLOPs and bytes of a denoising step, dense and with FOCUS, read off the model's graph."""
    with one_line(traceback):
        story = _story(path, 2, block, history, trust_remote_code)
        costs = [graph.cost for graph in story.graphs if graph.cost is not None]
        if len(costs) != 1:
            raise BadInput(f"FOCUS was not applied: {'; '.join(map(str, story.refusals))}")
        _check_shares(fed, retained)
        try:
            total = costs[0] if layers is None else costs[0].of_layers(layers)
        except ValueError as error:
            raise BadInput(str(error)) from error
        tokens = batch * block
        counts = (batch, block, history, round(fed * tokens), round(retained * tokens))
        if as_json:
            typer.echo(json.dumps(cost_data(total, counts), indent=1))
        else:
            print_cost(total, counts)


@app.command()
def report(
    path: Source,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="the file")] = Path("report.html"),
    batch: Annotated[int | None, typer.Option(min=1, help="rows; 16 where no trace tells")] = None,
    block: Annotated[int | None, typer.Option(min=2, help="tokens of a block; 32 likewise")] = None,
    history: Annotated[int | None, typer.Option(min=0, help="cached tokens; 64 likewise")] = None,
    fed: Annotated[
        float | None, typer.Option(min=0, max=1, help="share of the block that is fed; 1 likewise")
    ] = None,
    retained: Annotated[
        float | None, typer.Option(min=0, max=1, help="share that is retained; 0.15 likewise")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="a generation, from `generate --trace`", exists=True)
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="how signals rank, from `calibrate -o`", exists=True)
    ] = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """Write one HTML file: graphs, funnel, difference, refusals, cost, a generation, signals."""
    options = {"batch": batch, "block": block, "history": history, "fed": fed, "retained": retained}
    with one_line(traceback):
        if fed is not None and retained is not None:
            _check_shares(fed, retained)
        steps = None if trace is None else _read_json(trace, "trace")
        signals = None if calibration is None else _read_json(calibration, "calibration")
        sizes = (int(block or ASSUMED["block"]), int(ASSUMED["history"]))
        story = _story(
            path, 2, sizes[0], sizes[1] if history is None else history, trust_remote_code
        )
        try:
            html = page(
                story,
                path,
                steps,
                batch=batch,
                block=block,
                history=history,
                fed=fed,
                retained=retained,
                calibration=signals,
            )
            counts = counts_of(options, steps)
        except ValueError as error:
            raise BadInput(str(error)) from error
        output.write_text(html)
    if as_json:
        data = {"file": str(output), "sizes": counts.to_dict(), "explanation": story.to_dict()}
        typer.echo(json.dumps(data, indent=1))
    else:
        typer.echo(f"wrote {output}")
    raise typer.Exit(0 if story.applied else 1)


@app.command()
def generate(
    path: Source,
    *,
    prompt: Annotated[list[str], typer.Option(help="text to go on from; give several for a batch")],
    max_new_tokens: NewTokens = 64,
    block: Block = 32,
    threshold: Threshold = 0.9,
    alpha: Alpha = 1.5,
    dense: Annotated[bool, typer.Option("--dense", help="without FOCUS")] = False,
    trace: Annotated[Path | None, typer.Option(help="file for `report --trace`")] = None,
    mask_token_id: MaskToken = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """Generate text block by block, compiled with FOCUS."""
    with one_line(traceback):
        if not all(prompt):
            raise BadInput("--prompt is empty: give a text to go on from")
        text_tokenizer = tokenizer(path, trust_remote_code)
        model, _ = load(path, trust_remote_code)
        mask_id = mask_token(model, text_tokenizer, mask_token_id)
        ids, attention_mask = left_padded([prompt_ids(text_tokenizer, text) for text in prompt])
        compiled = compile_model(model, mask_token_id=mask_id, dynamic=True, strict=True)
        with session(mask_id, alpha=alpha, enabled=not dense):
            generated = generate_blocks(
                compiled,
                ids,
                attention_mask,
                max_new_tokens=max_new_tokens,
                block_length=block,
                confidence_threshold=threshold,
                mask_token_id=mask_id,
                eos_token_id=end_tokens(text_tokenizer, model),
                progress=not as_json and sys.stdout.isatty(),
                return_dict=True,
            )
        texts = answers(text_tokenizer, generated.sequences[:, ids.shape[1] :])
        print_answers(texts, generated, as_json)
        if trace is not None:  # last: if it cannot be written, the answers are there
            trace.write_text(json.dumps(generated.trace()))
        if not as_json:
            print_figures(generated)


@app.command()
def calibrate(
    path: Source,
    *,
    prompts: Annotated[Path, typer.Option(help='one a line; in a .jsonl file {"prompt": text}')],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="file for `calibration=`")
    ] = None,
    batch: Batch = 8,
    block: Block = 32,
    max_new_tokens: NewTokens = 64,
    threshold: Threshold = 0.9,
    alpha: Alpha = 1.5,
    early_layers: Annotated[int, typer.Option(min=2, help="whose attention is looked at")] = 3,
    use_cache: Annotated[bool, typer.Option(help="off: the model gets the whole canvas")] = True,
    mask_token_id: MaskToken = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """Find which signal points at what a model decodes: prompts are decoded densely."""
    with one_line(traceback):
        texts = read_prompts(prompts)
        text_tokenizer = tokenizer(path, trust_remote_code)
        model, _ = load(path, trust_remote_code)
        calibration = calibrate_model(
            model,
            texts,
            text_tokenizer,
            mask_token_id=mask_token(model, text_tokenizer, mask_token_id),
            block_length=block,
            max_new_tokens=max_new_tokens,
            confidence_threshold=threshold,
            alpha=alpha,
            batch=batch,
            use_cache=use_cache,
            early_layers=early_layers,
            progress=not as_json and sys.stdout.isatty(),
        )
        data = json.dumps(calibration.to_dict(), indent=1)
        typer.echo(data if as_json else str(calibration))
        if output is not None:  # last: if it cannot be written, the table is there
            calibration.save(output)


class _PathFirst(TyperCommand):
    """Words that do not begin with PATH are those of another program, and kept as they are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        path_first = not args[:1] or not args[0].startswith("-")
        if path_first or "--help" in args or any(arg.startswith("--prompts") for arg in args):
            return super().parse_args(ctx, args)
        traceback = [arg for arg in args if arg == "--traceback"]
        super().parse_args(ctx, traceback)
        forwarded = [arg for arg in args if arg not in traceback]
        ctx.args = forwarded
        return forwarded


@app.command(cls=_PathFirst)
def bench(
    context: typer.Context,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="model folder, hub id, module:function")
    ] = None,
    *,
    prompts: Annotated[
        Path | None, typer.Option(help='one a line; in a .jsonl file {"prompt": text}')
    ] = None,
    batch: Batch = 8,
    block: Block = 32,
    max_new_tokens: NewTokens = 64,
    threshold: Threshold = 0.9,
    alpha: Alpha = 1.5,
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each, in turns")] = 3,
    mask_token_id: MaskToken = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
    traceback: WithTrace = False,
) -> None:
    """With PATH and --prompts: dense against FOCUS on a model of yours, speed and answers.

    Without PATH: Throughput of eager, Inductor and FOCUS on this repository's shapes; options of
    `python -m benchmarks.throughput` (in a checkout; `--quick` is the shortest).
    """
    if path is not None:
        with one_line(traceback):
            if prompts is None:
                raise BadInput(f"bench {path} needs --prompts FILE: one prompt a line")
            texts = read_prompts(prompts)
            text_tokenizer = tokenizer(path, trust_remote_code)
            model, _ = load(path, trust_remote_code)
            mask_id = mask_token(model, text_tokenizer, mask_token_id)
            plan = Plan(batch, block, max_new_tokens, threshold, alpha, rounds)
            result = contest(model, text_tokenizer, mask_id, texts, plan, quiet=as_json)
        typer.echo(json.dumps(result.to_dict(), indent=1) if as_json else str(result))
        raise typer.Exit(0)
    with one_line(traceback):
        if prompts is not None:
            raise BadInput("--prompts needs a model: focus-compile bench PATH --prompts FILE")
        if importlib.util.find_spec("benchmarks") is None:
            raise BadInput("no benchmarks here: run `focus-compile bench` in a checkout")
    command = [sys.executable, "-m", "benchmarks.throughput", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _story(path: str, batch: int, block: int, history: int, trusted: bool) -> Explanation:
    with _spinner("capturing a call"):
        model, call = load(path, trusted)
        return explain_call(model, **(call or denoising_call(model, batch, block, history)))


def _print_story(story: Explanation, as_json: bool) -> None:
    if as_json:
        typer.echo(story.to_json())
    else:
        story.print()


def _check_shares(fed: float, retained: float) -> None:
    if not fed >= retained:
        raise BadInput(f"--fed {fed} is less than --retained {retained}")


def _read_json(path: Path, kind: str) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path} is no {kind}: {error}") from error


@contextmanager
def _spinner(activity: str) -> Iterator[None]:
    """A sign of life on a terminal: the activity, or what is being compiled in it."""
    with Console(stderr=True).status(activity) as status:

        def show(what: str | None) -> None:
            status.update(activity if what is None else f"compiling {what}")

        with watching(show):
            yield
