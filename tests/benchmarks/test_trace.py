"""The benchmarks' replay: random weights feed, retain and decode what the trained model did."""

from __future__ import annotations

import pytest
import torch

import focus_compile
from benchmarks.trace import BLOCK, Replay, record
from tests.support.harness import MASK, Run, Sizes, build_model


@pytest.mark.parametrize("task", ["chain", "total"])
def test_replay_is_the_trace(task: str) -> None:
    trace = record(task, 2)
    assert sum(int(step.decoded.sum()) for step in trace.steps) == 2 * BLOCK
    assert trace.retained_fraction <= trace.fed_fraction < 1
    run = Run(build_model(Sizes(layers=3)), dynamic=True)
    replay = Replay(trace)
    with focus_compile.session(signal=replay.signal):
        out = focus_compile.generate(
            run.compiled,
            torch.randint(0, MASK, (2, 5), generator=torch.Generator().manual_seed(1)),
            max_new_tokens=BLOCK,
            block_length=BLOCK,
            mask_token_id=MASK,
            remasking_strategy=replay.choose,
            return_dict=True,
        )
    assert out.forwards == out.focus_steps == len(trace.steps)
    assert out.fed_per_step == [step.fed for step in trace.steps]
    for mask, step in zip(out.retain_masks, trace.steps, strict=True):
        assert torch.equal(mask, step.retained)
