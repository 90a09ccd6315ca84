"""``focus_compile.testing``: what passes, and what a failure says."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from focus_compile import focus_backend, testing
from focus_compile.testing import assert_matches_eager
from tests.support.harness import MASK, Run, Sizes, build_model, random_call

BATCH, TOKENS = 3, 7


@pytest.fixture(scope="module")
def run() -> Run:
    """A budget that would evict: the exact setting is the assertion's, not the model's."""
    model = build_model(Sizes(layers=3, heads=4, head_dim=8, hidden=24, intermediate=20))
    return Run(model, {"alpha": 1.0}, dynamic=True)


def call(run: Run) -> dict[str, Any]:
    return random_call(2, run.model, BATCH, TOKENS, 5).kwargs(run.model)


def wrong_at(run: Run, number: int, row: int, position: int) -> Any:
    """The eager model, but for one logit of its n-th call."""
    calls = iter(range(100))

    def forward(**kwargs: Any) -> Any:
        out = run.model(**kwargs)
        if next(calls) == number:
            out.logits[row, position, 3] += 0.25
        return out

    return forward


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_what_is_equal(run: Run, steps: int) -> None:
    """Every step runs FOCUS's programs, nothing is evicted, and the commit is dense."""
    dense, prefix, suffix = run.counts()
    assert_matches_eager(run.compiled, mask_token_id=MASK, steps=steps, **call(run))
    assert run.counts() == (dense + 1, prefix + steps, suffix + steps)


@pytest.mark.parametrize(
    ("number", "told"), [(0, "step 1 of 4"), (2, "step 3 of 4"), (4, "the commit")]
)
def test_a_difference_is_named(run: Run, number: int, told: str) -> None:
    message = rf"{told}, row 1, position 4: logits differ by 0\.25 \(FOCUS .*, eager .*; allowed"
    with pytest.raises(AssertionError, match=message):
        assert_matches_eager(
            run.compiled, mask_token_id=MASK, eager=wrong_at(run, number, 1, 4), **call(run)
        )
    assert_matches_eager(
        run.compiled, mask_token_id=MASK, eager=wrong_at(run, number, 1, 4), tolerance=0.3,
        **call(run),
    )  # fmt: skip


def test_logits_that_are_no_numbers_differ(run: Run) -> None:
    def forward(**kwargs: Any) -> Any:
        out = run.model(**kwargs)
        out.logits[2, 6] = torch.nan
        return out

    with pytest.raises(
        AssertionError, match="step 1 of 4, row 2, position 6: logits differ by inf"
    ):
        assert_matches_eager(run.compiled, mask_token_id=MASK, eager=forward, **call(run))


def test_outputs_of_other_shapes(run: Run) -> None:
    with pytest.raises(AssertionError, match="step 1 of 4: FOCUS returns shapes"):
        assert_matches_eager(
            run.compiled, mask_token_id=MASK, eager=lambda **_: torch.zeros(1), **call(run)
        )


def test_nothing_was_tested(run: Run) -> None:
    """A model that runs densely is equal to itself."""
    dense = torch.compile(run.model, backend="eager")
    with pytest.raises(AssertionError, match="the dense program ran, and nothing was tested"):
        assert_matches_eager(dense, mask_token_id=MASK, **call(run))


def test_nothing_is_masked(run: Run) -> None:
    decoded = call(run) | {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.int64)}
    with pytest.raises(ValueError, match="nothing is to be denoised"):
        assert_matches_eager(run.compiled, mask_token_id=MASK, **decoded)


def test_no_logits(run: Run) -> None:
    def forward(**kwargs: Any) -> Any:
        return SimpleNamespace(loss=run.model(**kwargs).logits)

    with pytest.raises(ValueError, match=r"the model returns no logits \[batch, token"):
        testing._most_likely(forward(**call(run)), MASK, call(run)["input_ids"])


def test_a_module_is_compiled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strictly, so that a refusal is raised; ids of another name; steps that draw from a seed."""
    compile, seen = torch.compile, []

    def spy(model: Any, backend: str, options: dict[str, Any]) -> Any:
        seen.append((backend, options))
        inner = functools.partial(focus_backend, options=options, inner=lambda graph, _: graph)
        return compile(model, backend=inner)

    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def forward(self, canvas_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(
                input_ids=canvas_ids, attention_mask={"full_attention": None}, use_cache=False
            ).logits
            return logits

    monkeypatch.setattr(torch, "compile", spy)
    ids = call(run)["input_ids"]
    assert_matches_eager(
        Renamed().eval(), mask_token_id=MASK, ids="canvas_ids", seed=3, canvas_ids=ids
    )
    assert seen == [("focus", {"strict": True})]
