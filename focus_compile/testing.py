"""Assertions for the test suites of those who compile a model with FOCUS."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from focus_compile.models.compiled import original
from focus_compile.models.mask_token import find_mask_token
from focus_compile.reports.measure import with_fresh_code
from focus_compile.reports.play import output_tensors
from focus_compile.rounding import TOLERANCE
from focus_compile.runtime.session import session

__all__ = ["assert_matches_eager"]


@torch.no_grad()
def assert_matches_eager(
    model: Callable[..., Any],
    *,
    mask_token_id: int | None = None,
    steps: int = 4,
    tolerance: float | None = None,
    eager: Callable[..., Any] | None = None,
    ids: str = "input_ids",
    seed: int = 0,
    **call: Any,
) -> None:
    """Play a block with nothing evicted and nothing delayed: every output must be eager's.

    The block is denoised in ``steps`` calls and committed by one more, all in one
    ``session(exact=True)``: FOCUS's rewritten programs run, and everything that they return must be
    what the model returns without them. ::

        assert_matches_eager(model, input_ids=ids, attention_mask=mask, mask_token_id=151669)

    Args:
        model: a module, which is compiled here (backend ``"focus"``, Inductor, strict), or one that
            ``torch.compile`` returned. eager: the same without FOCUS, where it cannot be told: of a
            module that was compiled in place.
        mask_token_id: looked up as :func:`focus_compile.compile` does where it is None.
        steps: denoising calls. In each of them, some masks of every row have become tokens:
            eager's most likely ones, at positions drawn with ``seed``.
        tolerance: the largest absolute difference; by default what rounding may do, relative to the
            largest value or 1 (fp32: 1e-5, bf16: 3e-2).
        ids: what the model calls its token ids.
        call: keyword arguments of the first denoising call, copied for every call: a cache as it is
            before the block, a mask (:func:`focus_compile.block_mask`), ids ``[B, T]`` with masks.

    Raises:
        AssertionError: it names step, row, position and difference; or a denoising call ran the
            dense program, so that nothing was tested.
        Unsupported: a module was given, and FOCUS cannot be applied to it.
        ValueError: no mask token is known, or none is among the ids.
    """
    eager_model: Any = eager or (original(model) if isinstance(model, nn.Module) else model)
    mask_token = find_mask_token(eager_model) if mask_token_id is None else mask_token_id
    compiled = model
    if eager_model is model:
        compiled = torch.compile(with_fresh_code(model), backend="focus", options={"strict": True})
    tokens: Tensor = call[ids]
    if not bool((tokens == mask_token).any()):
        raise ValueError(
            f"no token of {ids} is the mask token {mask_token}: nothing is to be denoised"
        )
    generator = torch.Generator().manual_seed(seed)
    with session(mask_token, exact=True) as focus:
        for step in range(steps + 1):
            name = f"step {step + 1} of {steps}" if step < steps else "the commit"
            masked = tokens == mask_token
            arguments = call | {ids: tokens}
            expected = eager_model(**copy.deepcopy(arguments))
            actual = compiled(**copy.deepcopy(arguments))
            if focus.stats.steps != min(step + 1, steps):
                raise AssertionError(
                    f"{name}: the dense program ran, and nothing was tested; "
                    "focus_compile.explain(model, ...) tells why FOCUS is not applied"
                )
            _compare(name, actual, expected, tolerance)
            likeliest = _most_likely(expected, mask_token, tokens)
            decoded = _draw_masked(masked, steps - step, generator) if step < steps else masked
            tokens = torch.where(decoded, likeliest, tokens)


def _draw_masked(masked: Tensor, steps_left: int, generator: torch.Generator) -> Tensor:
    """Draw one in ``steps_left`` of the masks of each row; the batch keeps one to the last step."""
    order = torch.rand(masked.shape, generator=generator, device="cpu", dtype=torch.float32)
    rank = order.to(masked.device).masked_fill(~masked, 2.0).argsort(1).argsort(1)
    count = (masked.sum(1, keepdim=True) + steps_left - 1) // steps_left
    chosen = masked & (rank < count)
    if steps_left > 1 and bool((chosen == masked).all()):
        chosen = chosen.flatten()
        chosen[chosen.nonzero()[-1]] = False
        chosen = chosen.view(masked.shape)
    return chosen


def _most_likely(outputs: Any, mask_token: int, tokens: Tensor) -> Tensor:
    """The most likely token at every position, never the mask token."""
    for value in [getattr(outputs, "logits", None), *reversed(output_tensors(outputs))]:
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == tokens.shape:
            scores = value.float().clone()
            scores[..., mask_token : mask_token + 1] = -torch.inf
            return scores.argmax(2)
    raise ValueError("the model returns no logits [batch, token, vocabulary]")


def _compare(name: str, actual: Any, expected: Any, tolerance: float | None) -> None:
    ours, theirs = output_tensors(actual), output_tensors(expected)
    if [value.shape for value in ours] != [value.shape for value in theirs]:
        raise AssertionError(
            f"{name}: FOCUS returns shapes {[tuple(value.shape) for value in ours]}, eager "
            f"{[tuple(value.shape) for value in theirs]}"
        )
    logits = getattr(expected, "logits", None)
    for index, (value, reference) in enumerate(zip(ours, theirs, strict=True)):
        if not reference.numel():
            continue
        allowed = tolerance
        if allowed is None:
            allowed = TOLERANCE[reference.dtype] * max(1.0, reference.abs().max().item())
        difference = (value.double() - reference.double()).abs()
        difference = difference.masked_fill(
            value.isnan() & reference.isnan() | (value == reference), 0.0
        )
        difference = difference.nan_to_num(torch.inf, torch.inf)
        largest = difference.max().item()
        if largest > allowed:
            position = (difference == largest).nonzero()[0].tolist()
            output_name = "logits" if reference is logits else f"output {index}"
            axes = zip(("row", "position"), position, strict=False)
            location = ", ".join([name, *(f"{axis} {coordinate}" for axis, coordinate in axes)])
            ours_there, theirs_there = (x[tuple(position)].item() for x in (value, reference))
            values = f"FOCUS {ours_there:.6g}, eager {theirs_there:.6g}"
            raise AssertionError(
                f"{location}: {output_name} differ by {largest:.3g} "
                f"({values}; allowed {allowed:.3g})"
            )
