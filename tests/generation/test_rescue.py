"""Rescue, first steps and signals in whole generations, against the eager reference row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile import Generated
from tests.generation.test_generation import BLOCKS, pad_left
from tests.reference.generation import Decoding, Strategy, generate_row
from tests.reference.state import Config, Visibility
from tests.support.harness import MASK, Run, Sizes, build_model

NEAR_TIE = 1e-5
TOKENS = 9
STRATEGIES: tuple[Strategy, ...] = ("threshold", "fixed", "sequential")
SIGNALS: tuple[Any, ...] = ("delta", "importance", "position", "confidence", (0.5, 1.0))
FIRST_STEPS = ("evict", "open", "auto")
VISIBILITIES: tuple[Visibility, ...] = ("written", "prefix")


@dataclass
class Tally:
    rows: int = 0
    near_ties: int = 0
    rescued: int = 0
    opened: int = 0


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print(f"\n{tally}")
    assert tally.near_ties <= tally.rows // 50


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(build_model(Sizes(layers=3)), dynamic=True)


@dataclass(frozen=True)
class Setting:
    seed: int
    config: Config
    decoding: Decoding

    def __str__(self) -> str:
        config = self.config
        return f"{self.seed}-{self.decoding.strategy}-{config.first_step}-{config.signal}"


def settings() -> list[Setting]:
    """Every strategy with every first step and either visibility; signals and gates in turns."""
    out = []
    for seed, (strategy, first_step, visibility) in enumerate(
        product(STRATEGIES, FIRST_STEPS, VISIBILITIES)
    ):
        config = Config(
            (1.2, 1.0, 1.5)[seed % 3], visibility, rescue=(0.08, 0.2, 0.12, 1.0)[seed % 4],
            first_step=first_step, signal=SIGNALS[seed % len(SIGNALS)],
        )  # fmt: skip
        decoding = Decoding(
            strategy, 0.08, 1 + seed % 2, ban_mask_token=True, shifted=seed % 7 == 3
        )
        out.append(Setting(seed, config, decoding))
    return out


def generated(run: Run, setting: Setting, prompts: list[torch.Tensor]) -> Generated:
    config, decoding = setting.config, setting.decoding
    run.configure(alpha=config.alpha, visibility=config.visibility)
    ids, mask = pad_left(prompts)
    with focus_compile.session(signal=config.signal, first_step=config.first_step):
        return focus_compile.generate(
            run.compiled,
            ids,
            mask,
            max_new_tokens=BLOCKS * TOKENS,
            block_length=TOKENS,
            mask_token_id=MASK,
            remasking_strategy=decoding.strategy,
            confidence_threshold=decoding.confidence_threshold,
            tokens_per_step=decoding.tokens_per_step,
            shifted_logits=decoding.shifted,
            rescue=config.rescue,
            return_dict=True,
        )


Trace = list[tuple[list[bool], list[bool]]]


def row_trace(out: Generated, row: int) -> Trace:
    """What each step of one row retained and rescued."""
    forwards = zip(out.retain_masks, out.rescue_masks, strict=True)
    trace: Trace = []
    for counts in out.steps_per_block:
        for index in range(int(counts.max())):
            retained, rescued = next(forwards)
            if index < counts[row]:
                trace.append((retained[row].tolist(), rescued[row].tolist()))
            else:
                assert not retained[row].any() and not rescued[row].any()
    return trace


@pytest.mark.parametrize("setting", settings(), ids=str)
def test_equals_the_reference(run: Run, setting: Setting, tally: Tally) -> None:
    """Tokens, steps, retained and rescued tokens of every row."""
    generator = torch.Generator().manual_seed(setting.seed)
    lengths = torch.randint(1, 12, (4,), generator=generator).tolist()
    prompts = [torch.randint(0, MASK, (count,), generator=generator) for count in lengths]
    before = (run.counts(), len(run.executables))
    out = generated(run, setting, prompts)
    assert out.rescued_and_decoded <= out.rescued
    rescues = sum(bool(mask.any()) for mask in out.rescue_masks)
    _, prefix, suffix = (now - then for now, then in zip(run.counts(), before[0], strict=True))
    assert (prefix, suffix) == (out.forwards, out.forwards + rescues)
    assert before[1] == 0 or len(run.executables) == before[1]  # nothing is compiled for it
    for row, prompt in enumerate(prompts):
        expected = generate_row(
            run.model, prompt, blocks=BLOCKS, block_length=TOKENS, mask_id=MASK,
            config=setting.config, decoding=setting.decoding,
        )  # fmt: skip
        tally.rows += 1
        made = row_trace(out, row)
        told = [
            (step.retain_mask, [p in step.rescued for p in range(TOKENS)])
            for step in expected.steps
        ]
        tokens = out.sequences[row, -BLOCKS * TOKENS :].tolist()
        if (made, tokens) != (told, expected.tokens):
            at = next((n for n, (a, b) in enumerate(zip(made, told, strict=False)) if a != b), -1)
            margin = min(step.margin for step in expected.steps[: at + 1 or None])
            assert margin < NEAR_TIE, f"row {row}, step {at}: margin {margin}"
            tally.near_ties += 1
        tally.rescued += sum(any(rescued) for _, rescued in told)
        tally.opened += all(told[0][0])


def test_something_is_rescued(tally: Tally) -> None:
    """Over all of the settings above; alone there is nothing to count."""
    if tally.rows < len(settings()):
        pytest.skip("alone: the settings above did not run")
    assert tally.rescued > 100 and 10 < tally.opened < tally.rows
