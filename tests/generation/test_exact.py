"""``exact``: a generation in which every confidence of every step is the eager model's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile import Candidates, FocusConfig
from focus_compile.generation.decoding import choose
from tests.generation.test_canvas import Named
from tests.support.harness import MASK, Run, Sizes, build_model
from tests.support.models.llada import LLaDA

PROMPT, BLOCK = 6, 9
SIZES = Sizes(layers=3, heads=4, head_dim=8, hidden=24, intermediate=20)
MODELS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "cached": (build_model(SIZES), {}),
    "canvas": (LLaDA(groups=2, layers=3), {"use_cache": False}),
    "shifted": (Named(), {"use_cache": False, "shifted_logits": True}),
    "fp64": (build_model(SIZES, dtype=torch.float64), {"use_cache": False}),
}


@functools.cache
def compiled(name: str) -> Run:
    """Its own settings evict as much as they can."""
    return Run(MODELS[name][0].eval(), {"alpha": 1.0}, dynamic=True)  # type: ignore[arg-type]


def steps_of(model: Any, **arguments: Any) -> tuple[list[Tensor], focus_compile.Generated]:
    """Confidences of every step of two blocks of three prompts, and what was generated."""
    seen: list[Tensor] = []

    def strategy(found: Candidates, where: Tensor) -> Tensor:
        seen.append(found.confidence)
        return choose(found, where, "fixed", threshold=0.9, count=2)

    ids = torch.randint(0, MASK, (3, PROMPT), generator=torch.Generator().manual_seed(5))
    made = focus_compile.generate(
        model,
        ids,
        max_new_tokens=2 * BLOCK,
        block_length=BLOCK,
        mask_token_id=MASK,
        remasking_strategy=strategy,
        return_dict=True,
        **arguments,
    )
    return seen, made


@pytest.mark.parametrize("name", MODELS)
def test_generations_are_eager_at_every_step(name: str) -> None:
    run, arguments = compiled(name), MODELS[name][1]
    expected, plain = steps_of(run.model, **arguments)
    with focus_compile.session(exact=True):
        actual, made = steps_of(run.compiled, **arguments)
    assert made.focus_steps == made.forwards == len(expected) == len(actual) == 10
    assert made.fed_fraction == made.retained_fraction == 1
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert torch.equal(made.sequences, plain.sequences)


@pytest.mark.parametrize("name", ["cached", "canvas"])
def test_a_large_alpha_is_not_exact(name: str) -> None:
    """The delayed cache keeps keys of final tokens: equal at first, and not later."""
    run, arguments = compiled(name), MODELS[name][1]
    expected, _ = steps_of(run.model, **arguments)
    with focus_compile.session(alpha=1e9):
        actual, made = steps_of(run.compiled, **arguments)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=0)
    assert made.retained_fraction == made.fed_fraction < 1
    moved = max((one - two).abs().max().item() for one, two in zip(actual, expected, strict=True))
    assert moved > 1e-3


def test_the_option_and_the_session() -> None:
    """A session's setting goes before the model's; without any, the model evicts."""
    run = compiled("cached")
    shares = {}
    for option in (False, True):
        run.configure(exact=option)
        for setting in (None, False, True):
            with focus_compile.session(exact=setting):
                shares[option, setting] = steps_of(run.compiled)[1].retained_fraction
    run.configure(exact=False)
    exact = {key for key, share in shares.items() if share == 1}
    assert exact == {(True, None), (True, True), (False, True)}


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_the_option_is_a_flag(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"option exact=.*: expected True or False"):
        FocusConfig.from_options({"exact": wrong})
