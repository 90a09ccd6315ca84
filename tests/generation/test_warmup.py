"""What compiles says so, and ``warmup`` compiles before traffic comes."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import focus_compile
from focus_compile.compiling import compiling, shown, watching
from tests.support.harness import MASK, Sizes, build_model

pytestmark = pytest.mark.usefixtures("no_inductor")


@pytest.fixture
def compiled() -> nn.Module:
    torch._dynamo.reset()
    model: nn.Module = focus_compile.compile(
        build_model(Sizes(layers=4)), mask_token_id=MASK, strict=True
    )
    return model


def generate(model: nn.Module, rows: int, prompt: int, **given: int) -> focus_compile.Generated:
    made = focus_compile.generate(
        model, torch.ones(rows, prompt, dtype=torch.long), mask_token_id=MASK, return_dict=True,
        **{"max_new_tokens": 24, "block_length": 8} | given,
    )  # fmt: skip
    assert isinstance(made, focus_compile.Generated)
    return made


def compilations(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was compiled since the last time, as the log says."""
    lines = [text for text in caplog.messages if text.startswith("compiled ")]
    caplog.clear()
    return [line.split(" (", maxsplit=1)[0].removeprefix("compiled ") for line in lines]


def test_nothing_is_compiled_afterwards(
    compiled: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """For other lengths of prompts and blocks and other batches, those of one row included."""
    caplog.set_level(logging.INFO, "focus_compile")
    assert focus_compile.warmup(
        compiled, batch=(1, 2), block_length=8, history=5, mask_token_id=MASK
    ) > 0  # fmt: skip
    warm = compilations(caplog)
    assert {"the dense program", "the analysis", "the prefix", "the suffix"} == set(warm)
    for rows, prompt, block in ((1, 5, 8), (2, 9, 8), (5, 17, 16), (1, 31, 16)):
        made = generate(compiled, rows, prompt, block_length=block)
        assert made.focus_steps == made.forwards
    assert compilations(caplog) == []


def test_what_was_not_warmed_up_is_compiled(
    compiled: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "focus_compile")
    focus_compile.warmup(compiled, batch=2, block_length=8, history=5, mask_token_id=MASK)
    assert compilations(caplog)
    generate(compiled, 1, 5)
    assert compilations(caplog)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "warmup: batch=0: expected 1 or more"),
        ({"batch": ()}, "warmup: batch=0: expected 1 or more"),
        ({"history": 0}, "warmup: history=0: expected 1 or more"),
    ],
)
def test_refused(compiled: nn.Module, given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        focus_compile.warmup(compiled, mask_token_id=MASK, **given)


def test_who_watches_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """What and when it ends, errors included; of an error there is no line that it was compiled."""
    caplog.set_level(logging.INFO, "focus_compile")
    told: list[str | None] = []
    with watching(told.append):
        with compiling("the prefix", 12):
            assert told == ["the prefix (12 operators)"]
        with pytest.raises(ArithmeticError), compiling("the suffix", 3):
            raise ArithmeticError
    with compiling("the prefix", 12):
        pass
    assert told == ["the prefix (12 operators)", None, "the suffix (3 operators)", None]
    assert compilations(caplog) == 2 * ["the prefix"]


def test_a_bar_says_what_is_compiled() -> None:
    with (
        Progress(console=Console(file=io.StringIO(), force_terminal=True)) as bar,
        shown(bar, task := bar.add_task("blocks", total=2)),
    ):
        with compiling("the prefix", 12):
            assert bar.tasks[task].description == "compiling the prefix (12 operators)"
        assert bar.tasks[task].description == "blocks"
