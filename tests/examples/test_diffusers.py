"""examples/diffusers_pipelines.py: the pipelines of diffusers, whose loops are not ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from tests.support.harness import without_inductor
from tests.support.paths import EXAMPLES

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = EXAMPLES / "diffusers_pipelines.py"
    spec = importlib.util.spec_from_file_location("diffusers_pipelines", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch._dynamo.reset()
    with without_inductor():
        yield


def masked(example: ModuleType) -> tuple[Any, Callable[..., Tensor]]:
    return example.masked_pipeline(), example.answer_masked


def noised(example: ModuleType) -> tuple[Any, Callable[..., Tensor]]:
    return example.noised_pipeline(), example.answer_noised


def whole(pipe: Any, **options: Any) -> None:
    """As a user writes it."""
    pipe.model = torch.compile(pipe.model, backend="focus", dynamic=True, options=options)


def decoder(pipe: Any, **options: Any) -> None:
    part = pipe.model.model
    part.decoder = torch.compile(part.decoder, backend="focus", dynamic=True, options=options)


@pytest.mark.parametrize(
    ("made", "compile_it", "options"),
    [(masked, whole, {"mask_token_id": 60}), (noised, whole, {}), (noised, decoder, {})],
    ids=["llada2", "gemma", "gemma-decoder"],
)
def test_tokens(
    made: Callable[..., Any], compile_it: Callable[..., None], options: Any, example: ModuleType
) -> None:
    """With nothing evicted the eager pipeline's; else fewer tokens computed, all decoded ones
    among them."""
    pipe, answer = made(example)
    expected = answer(pipe)
    assert len(expected.unique()) > 10
    compile_it(pipe, strict=True, **options)
    with focus_compile.session(exact=True) as focus:
        assert torch.equal(answer(pipe, focus), expected)
    assert focus.stats.steps >= 12
    with focus_compile.session(first_step="open", rescue=None) as focus:
        evicting = answer(pipe, focus)
    assert focus.stats.retained_fraction < 0.9
    assert evicting.shape == expected.shape
    assert not options or not (evicting == example.MASK).any()


def test_edits(example: ModuleType) -> None:
    """Decoded tokens that change: the eager pipeline's with nothing evicted."""
    pipe, _ = masked(example)
    given = {
        "input_ids": example.prompts(2), "gen_length": 16, "block_length": 16,
        "num_inference_steps": 8, "sampling_method": "greedy", "mask_token_id": example.MASK,
        "eos_early_stop": False, "output_type": "seq",
    }  # fmt: skip
    edited: list[bool] = []

    def count(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        edits = tensors["editing_transfer_index"] & ~tensors["active_block"]
        edited.append(bool(edits.any() and tensors["active_block"].any()))
        return {}

    watched = {
        "callback_on_step_end": count,
        "callback_on_step_end_tensor_inputs": ["editing_transfer_index", "active_block"],
    }
    plain = pipe(**given, editing_threshold=None).sequences
    expected = pipe(**given, editing_threshold=0.2, **watched).sequences
    assert any(edited) and not torch.equal(expected, plain)
    whole(pipe, strict=True, mask_token_id=example.MASK)
    with focus_compile.session(exact=True):
        assert torch.equal(pipe(**given, editing_threshold=0.2).sequences, expected)


@torch.no_grad()
def test_an_evicted_token_is_no_answer(example: ModuleType) -> None:
    """A scheduler that has to decode more than was computed leaves masks, and no other token.

    Told how many it decodes in a step, as many are computed.
    """
    pipe, _ = masked(example)
    whole(pipe, strict=True, mask_token_id=example.MASK)
    given = {
        "input_ids": example.prompts(2), "gen_length": 32, "block_length": 16,
        "num_inference_steps": 3, "threshold": 2.0, "sampling_method": "greedy",
        "mask_token_id": example.MASK, "eos_early_stop": False, "output_type": "seq",
    }  # fmt: skip
    with focus_compile.session(first_step="evict", rescue=None) as focus:
        left = pipe(**given).sequences == example.MASK
        assert focus.stats.retained < focus.stats.canvas and left.any()
    for settings in ({"exact": True}, {"first_step": "evict", "tokens_per_step": 6}):
        with focus_compile.session(rescue=None, **settings):
            assert not (pipe(**given).sequences == example.MASK).any()
