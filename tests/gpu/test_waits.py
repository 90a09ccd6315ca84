"""How often the host waits for a GPU in a denoising step, as the GPU counts it.

On a CPU nothing waits: tests/generation/test_host_reads.py counts there.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import focus_compile
from tests.gpu.where import Where
from tests.support.harness import MASK, Run, Sizes, build_model

WAITS = 5
"""In a step of ``generate``: masks left, their places; new blocks, fed tokens, N and R."""


def test_waits(where: Where) -> None:
    if not where.gpu:
        pytest.skip("nothing waits on a CPU")
    run = Run(build_model(Sizes(layers=3)).to(where.device), {}, where.inner, dynamic=True)
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(5))

    def forwards(steps: int) -> int:
        with focus_compile.session(exact=True):
            out = focus_compile.generate(
                run.compiled, ids.to(where.device), max_new_tokens=12, block_length=12,
                mask_token_id=MASK, remasking_strategy="fixed", denoising_steps=steps,
                return_dict=True,
            )  # fmt: skip
        return out.forwards

    forwards(3), forwards(12)  # everything is compiled
    found = []
    for steps in (3, 12):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                taken = forwards(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((taken, sum("synchroniz" in str(warning.message) for warning in caught)))
    (few, before), (many, after) = found
    assert (after - before) / (many - few) <= WAITS, found
