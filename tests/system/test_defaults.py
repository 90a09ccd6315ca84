"""What a process sets as default dtype, device or precision changes nothing that FOCUS computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import focus_compile
from focus_compile.generation.decoding import propose
from focus_compile.ops.selection import target
from focus_compile.runtime.block import BlockState, History
from tests.support.defaults import DEFAULTS, DTYPES, default
from tests.support.harness import MASK, Run, Sizes, build_model

BLOCK = 12


@pytest.fixture(scope="module")
def run() -> Run:
    model = build_model(Sizes(layers=3, heads=4, head_dim=8, hidden=24, intermediate=20))
    return Run(model, {"alpha": 1.2}, dynamic=True)


def generated(model: object, *, sample: bool = False, cached: bool = True) -> list[Tensor]:
    """Tokens of two padded prompts and, for FOCUS, what every step retained."""
    ids = torch.randint(0, MASK, (2, 7), generator=torch.Generator().manual_seed(3), device="cpu")
    valid = torch.ones_like(ids)
    valid[0, :3] = 0
    drawn = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5} if sample else {}
    out = focus_compile.generate(
        model,  # type: ignore[arg-type]
        ids,
        valid,
        max_new_tokens=2 * BLOCK,
        block_length=BLOCK,
        mask_token_id=MASK,
        confidence_threshold=0.05,
        use_cache=cached,
        return_dict=True,
        **drawn,  # type: ignore[arg-type]
    )
    return [out.sequences, *out.decode_masks, *out.retain_masks]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["fp64", "meta"])
def test_generations(run: Run, name: str) -> None:
    """The tokens, steps and retained tokens of a process with torch's own defaults.

    Dynamo captures the model anew, so that the analysis runs under them, too.
    """
    expected = generated(run.compiled, cached=False)
    assert any(not mask.all() for mask in expected[1 + len(expected) // 2 :])
    with default(name):
        assert_same(generated(run.compiled, cached=False), expected)


@pytest.mark.parametrize("arguments", [{"sample": True}, {}])
@pytest.mark.parametrize("name", DEFAULTS)
def test_eager_generations(run: Run, name: str, arguments: dict[str, bool]) -> None:
    expected = generated(run.model, **arguments)
    with default(name):
        assert_same(generated(run.model, **arguments), expected)


@pytest.mark.parametrize("name", DTYPES)
def test_the_budget_is_computed_in_fp32(name: str) -> None:
    """5 decoded per step, alpha 1.2: 6 in fp32, as the specification has it; 7 in fp64."""
    masked = torch.ones(1, 32, dtype=torch.bool)
    ids = torch.full((1, 32), MASK)
    with default(name):
        state = BlockState(ids, masked, History(0, None))
        for step in range(1, 3):
            masked = masked.clone()
            masked[:, : 5 * step] = False
            state.retained = torch.ones_like(masked)
            state.observe(torch.where(masked, MASK, 1), masked, History(0, None))
        assert state.average.dtype == torch.float32 and state.average.tolist() == [5.0]
        alpha = torch.tensor(1.2, dtype=torch.float32)
        assert target(masked.sum(1), state.average, alpha).tolist() == [6]


@pytest.mark.parametrize("name", DTYPES)
def test_confidence_is_fp32(name: str) -> None:
    """The most confident of two tokens that no half precision tells apart."""
    scores = torch.tensor([[2.0, 0.0], [2.0001, 0.0]], dtype=torch.float32)
    where = torch.ones(1, 2, dtype=torch.bool)
    with default(name):
        found = propose(scores, where, scores, LogitsProcessorList())
    assert found.confidence.dtype == torch.float32
    assert found.confidence[0, 1] > found.confidence[0, 0]
