"""What needs a GPU: kernels are launched, programs run and are recorded as CUDA graphs.

None of this has run yet (docs/gpu.md). ``python -m benchmarks.gpu`` starts it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.importance import importance
from focus_compile.packing import tables
from focus_compile.selection import retain
from tests.harness import (
    MASK,
    Call,
    Run,
    Sizes,
    bound,
    build_model,
    eager_logits,
    random_call,
)  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: PyTorch finds none"),
]
CASES = 100


def on_gpu(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.cuda() if isinstance(value, Tensor) else value for value in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_importance(dtype: torch.dtype) -> None:
    """Products of 16-bit numbers are exact: the same bound as in fp32 holds."""
    from focus_compile.fused import launch_importance
    from tests.fused.interpret import importance_case

    draw = random.Random(0)
    for _ in range(CASES):
        (query, key, masked, scale), _ = importance_case(draw)
        given = on_gpu((query.to(dtype), key.to(dtype), masked, scale))
        made = launch_importance(*given)
        torch.testing.assert_close(made, importance(*given), atol=1e-4, rtol=1e-4)
        assert torch.equal(made, launch_importance(*given))


def test_choose() -> None:
    from focus_compile.fused import launch_choose
    from tests.fused.interpret import choose_case

    draw = random.Random(0)
    for _ in range(CASES):
        given = on_gpu(choose_case(draw)[0])
        made = launch_choose(*given)
        mask = retain(made[0], *given[4:])
        for actual, expected in zip(made[1:], (mask, *tables(mask)), strict=True):
            assert torch.equal(actual, expected)


def test_nothing_evicted_equals_eager() -> None:
    model = build_model(Sizes(layers=3)).cuda()
    run = Run(model, {"alpha": 1e9}, None, dynamic=True)
    for seed in range(5):
        call = random_call(seed, model, 3, 9, 17)
        assert call.visible is not None and call.past is not None
        past = [(key.cuda(), value.cuda()) for key, value in call.past]
        call = Call(call.ids.cuda(), call.masked.cuda(), None, call.visible.cuda(), past)
        expected = eager_logits(model, call)
        torch.testing.assert_close(run.logits(call), expected, atol=10 * bound(expected), rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"buckets": [16, 33]}, {"mode": "reduce-overhead", "buckets": [16, 33]}],
    ids=["default", "buckets", "captured"],
)
def test_generates_as_without_a_compiler(options: dict[str, Any]) -> None:
    """Inductor's programs, with the fused kernels, and the same graphs run as they are."""
    model = build_model(Sizes(layers=3)).cuda()
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(5)).cuda()
    made = []
    for run in (Run(model, dynamic=True), Run(model, options, None, dynamic=True)):
        with torch.no_grad():
            out = focus_compile.generate(
                run.compiled, ids, max_new_tokens=22, block_length=11, mask_token_id=MASK
            )
        assert run.counts()[1] > 4
        made.append(out)
    assert torch.equal(*made)
