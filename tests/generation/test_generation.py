"""Whole generations against the eager reference, row by row and step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import Generated, Signal, Step
from tests.reference import generation
from tests.reference.generation import Decoding, Strategy, generate_row
from tests.reference.state import Config, Visibility
from tests.reference.system import Signal as ReferenceSignal
from tests.support.harness import MASK, Run, Sizes, build_model

NEAR_TIE = 1e-5
BLOCKS = 2
FOCUS = Signal()
STRATEGIES: tuple[Strategy, ...] = ("fixed", "sequential", "threshold")
VISIBILITIES: tuple[Visibility, ...] = ("written", "prefix")


@dataclass
class Tally:
    rows: int = 0
    near_ties: int = 0


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    assert tally.near_ties <= tally.rows // 100


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(build_model(Sizes(layers=4)), dynamic=True)


@dataclass(frozen=True)
class Setting:
    """One batch of prompts of different lengths, padded on the left, and how it is decoded."""

    seed: int
    batch: int
    config: Config
    decoding: Decoding

    @property
    def tokens(self) -> int:
        return 8 + self.seed % 5

    def prompts(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        lengths = torch.randint(1, 12, (self.batch,), generator=generator).tolist()
        return [torch.randint(0, MASK, (n,), generator=generator) for n in lengths]


def settings() -> list[Setting]:
    """Batches of 1 to 8 rows, under every combination of visibility, delayed cache and strategy.

    Then models whose logits at p predict the token at p + 1.
    """
    out = []
    for seed, (visibility, delayed, strategy) in enumerate(
        product(VISIBILITIES, (True, False), STRATEGIES)
    ):
        config = Config((1.5, 1.2, 2.0, 1.0)[seed % 4], visibility, delayed)
        decoding = Decoding(strategy, 0.05, 1 + seed % 2, ban_mask_token=True)
        batch = (1, 8, 5, 6, 2, 7, 3, 8, 4, 7, 8, 6)[seed]
        out.append(Setting(seed, batch, config, decoding))
    for seed, strategy in enumerate(STRATEGIES, start=len(out)):
        decoding = Decoding(strategy, 0.05, 2, ban_mask_token=True, shifted=True)
        out.append(Setting(seed, 6, Config(1.2), decoding))
    return out


def pad_left(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[B, P]``."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def compiled_generation(
    run: Run, setting: Setting, prompts: list[Tensor], signal: Signal = FOCUS
) -> tuple[Generated, list[Step]]:
    """What ``generate`` returns, and what each step was fed."""
    config, decoding = setting.config, setting.decoding
    steps: list[Step] = []

    def watch(step: Step) -> Signal:
        steps.append(step)
        return signal

    run.configure(
        alpha=config.alpha, visibility=config.visibility, delayed_cache=config.delayed_cache
    )
    ids, mask = pad_left(prompts)
    with focus_compile.session(signal=watch):
        out = focus_compile.generate(
            run.compiled,
            ids,
            mask,
            max_new_tokens=BLOCKS * setting.tokens,
            block_length=setting.tokens,
            mask_token_id=MASK,
            remasking_strategy=decoding.strategy,
            confidence_threshold=decoding.confidence_threshold,
            tokens_per_step=decoding.tokens_per_step,
            shifted_logits=decoding.shifted,
            return_dict=True,
        )
    assert len(steps) == out.forwards == out.focus_steps
    return out, steps


def reference_row(
    run: Run, setting: Setting, prompt: Tensor, signal: ReferenceSignal | None = None
) -> generation.Generated:
    return generate_row(
        run.model,
        prompt,
        blocks=BLOCKS,
        block_length=setting.tokens,
        mask_id=MASK,
        config=setting.config,
        decoding=setting.decoding,
        signal=signal,
    )


Trace = list[tuple[list[bool], list[bool]]]
"""Which tokens each step of one row fed, and which it retained."""


def row_trace(out: Generated, steps: list[Step], row: int) -> Trace:
    """The steps of one row, which idles (fed nothing) until all rows have finished a block."""
    forwards = zip(steps, out.retain_masks, strict=True)
    trace: Trace = []
    for counts in out.steps_per_block:
        for index in range(int(counts.max())):
            step, retained = next(forwards)
            if index < counts[row]:
                trace.append((step.fed[row].tolist(), retained[row].tolist()))
            else:
                assert not step.fed[row].any()
                assert not retained[row].any()
    return trace


def reference_trace(expected: generation.Generated) -> Trace:
    width = range(len(expected.steps[0].retain_mask))
    return [([p in step.fed for p in width], step.retain_mask) for step in expected.steps]


def margin_before(expected: generation.Generated, difference: int) -> float:
    """How near to another outcome the reference came up to the step that differs."""
    return min(step.margin for step in expected.steps[: difference + 1])


@pytest.mark.parametrize("setting", settings(), ids=lambda s: f"{s.seed}-{s.decoding.strategy}")
def test_equals_the_reference(run: Run, setting: Setting, tally: Tally) -> None:
    """Same tokens, same fed and retained tokens at every step, same numbers of steps."""
    prompts = setting.prompts()
    out, steps = compiled_generation(run, setting, prompts)
    answers = out.sequences[:, -BLOCKS * setting.tokens :]
    for row, prompt in enumerate(prompts):
        tally.rows += 1
        expected = reference_row(run, setting, prompt)
        actual, wanted = row_trace(out, steps, row), reference_trace(expected)
        if answers[row].tolist() == expected.tokens and actual == wanted:
            assert [int(counts[row]) for counts in out.steps_per_block] == expected.steps_per_block
            continue
        pairs = enumerate(zip(actual, wanted, strict=False))
        difference = next((i for i, (a, b) in pairs if a != b), len(wanted))
        assert margin_before(expected, difference) < NEAR_TIE
        tally.near_ties += 1
    rows = torch.stack([mask.any(1) for mask in out.retain_masks])
    assert 0 < out.retained_fraction < 1
    assert torch.stack(out.retain_masks).sum() < setting.tokens * rows.sum()
    if setting.config.delayed_cache:
        assert out.retained_fraction < out.fed_fraction < 1
        assert torch.stack([step.fed for step in steps]).sum() < setting.tokens * rows.sum()


def test_rows_are_independent(run: Run, tally: Tally) -> None:
    """Tokens and steps of a row alone are those of the row in a batch of eight."""
    setting = settings()[1]
    prompts = [prompt.repeat(2) for prompt in setting.prompts()]
    assert len(prompts) == 8
    assert len({len(prompt) for prompt in prompts}) > 3
    out, steps = compiled_generation(run, setting, prompts)
    answers = out.sequences[:, -BLOCKS * setting.tokens :]
    for row, prompt in enumerate(prompts):
        tally.rows += 1
        single, single_steps = compiled_generation(run, setting, [prompt])
        together, alone = row_trace(out, steps, row), row_trace(single, single_steps, 0)
        if together == alone and torch.equal(answers[row], single.sequences[0, len(prompt) :]):
            continue
        pairs = enumerate(zip(together, alone, strict=False))
        difference = next((i for i, (a, b) in pairs if a != b), len(alone))
        assert margin_before(reference_row(run, setting, prompt), difference) < NEAR_TIE
        tally.near_ties += 1


@pytest.mark.parametrize("name", ["layer 0", "random"])
def test_another_signal_ranks(run: Run, name: str) -> None:
    """Ablations: importance at layer 0 alone, and numbers that have nothing to do with it."""
    setting = settings()[2]
    prompts = setting.prompts()
    noise = torch.rand(setting.tokens, generator=torch.Generator().manual_seed(0))
    signal, expected = {
        "layer 0": (Signal((1.0, 0.0)), lambda first, second, masked: first),
        "random": (
            Signal((0.0, 0.0), noise.expand(len(prompts), -1)),
            lambda first, second, masked: noise[masked],
        ),
    }[name]
    out, steps = compiled_generation(run, setting, prompts, signal)
    for row, prompt in enumerate(prompts):
        trace = reference_trace(reference_row(run, setting, prompt, expected))
        assert row_trace(out, steps, row) == trace
        assert trace != reference_trace(reference_row(run, setting, prompt))


def test_settings_differ() -> None:
    """At least fifty rows; batches from 1 to 8; several steps decode more than one token."""
    batches = [setting.batch for setting in settings()]
    assert sum(batches) >= 50
    assert set(batches) == set(range(1, 9))


def test_threshold_decodes_several_tokens_and_single_ones(run: Run) -> None:
    """The threshold of these tests is one that some steps pass more than once, and some never."""
    setting = next(s for s in settings() if s.decoding.strategy == "threshold")
    counts, low = set(), set()
    for prompt in setting.prompts():
        for step in reference_row(run, setting, prompt).steps:
            counts.add(len(step.decoded))
            low.add(max(step.confidence.values()) < setting.decoding.confidence_threshold)
    assert len(counts) > 1
    assert low == {True, False}
