"""Every benchmark has a short form: does the script still run?"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import scaling, shapes
from tests.support.harness import Run

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if "typer.run(main)" in path.read_text()
)


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 10


@pytest.mark.parametrize("name", SCRIPTS)
def test_quick(name: str) -> None:
    """It is an option, off by default."""
    module = importlib.import_module(name)
    assert inspect.signature(module.main).parameters["quick"].default is False
    app = typer.Typer()
    app.command()(module.main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0 and "--quick" in shown.output


def test_a_step_of_scaling() -> None:
    """It evicts: the script itself raises if another number of tokens was retained."""
    model = shapes.build("bench-3l")
    mask = model.config.vocab_size - 1
    run = Run(model, {"mask_token_id": mask}, dynamic=True)
    with torch.no_grad():
        step = scaling._Step(run.compiled, mask, scaling.Point(batch=2, block=8, history=7, kept=3))
        assert all(step(enabled=enabled) > 0 for enabled in (True, True, False))
