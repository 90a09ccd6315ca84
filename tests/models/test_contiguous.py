"""Slices of one mask, ids or positions: one graph for all of them, and writes are kept."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import focus_compile
from focus_compile import backend
from focus_compile.models.contiguous import contiguous
from tests.support.dialects import qwen3
from tests.support.harness import MASK, eager_inner


def both(tensor: Tensor, **kwargs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with contiguous((tensor,), kwargs) as ((given,), named):
        return given, named


@pytest.mark.parametrize("rows", [1, 2])
def test_layouts(rows: int) -> None:
    """Gaps are copied away, strides of one row are the usual ones; nothing else is touched."""
    wide = torch.randn(rows, 12, 12)
    for part in (wide[:, 4:8, :8], wide[:, 8:, :], wide[:, :4, :4], wide.transpose(1, 2)):
        given, _ = both(part)
        assert torch.equal(given, part)
        assert given.stride() == torch.empty(part.shape).stride()
    assert both(wide)[0] is wide


def test_what_is_left_as_it_is() -> None:
    """What is deep, needs a gradient, is shared, or is no plain tensor."""
    wide = torch.randn(2, 12, 12)
    deep = torch.randn(2, 2, 2, 6, 4)[..., :3]
    learned = torch.randn(4, 6, requires_grad=True)[:, :3]
    for value in (deep, learned, nn.Parameter(wide).detach().to_sparse()):
        assert both(value)[0] is value
    given, named = both(wide[:, :4, :4], other=wide[:, 2:6, :4])
    assert given.stride() == (144, 12, 1) and named["other"].stride() == (144, 12, 1)
    with torch.inference_mode():
        fixed = torch.randn(3, 5)[:, :2]
    assert both(fixed)[0] is fixed
    with contiguous((3, None, [wide]), {"flag": True}) as (args, kwargs):
        assert args[:2] == (3, None) and args[2][0] is wide and kwargs == {"flag": True}


@pytest.mark.parametrize("rows", [1, 3])
def test_writes(rows: int) -> None:
    """Into a copy or an alias, they are the caller's."""
    wide = torch.zeros(rows, 12, 12)
    with contiguous((wide[:, 4:8, :8],), {}) as ((given,), _):
        given[:, 1] = 7
    assert bool((wide[:, 5, :8] == 7).all()) and wide.sum() == rows * 8 * 7


@torch.no_grad()
def test_graphs_of_a_loop_with_one_wide_mask() -> None:
    """SDAR's way: denoising calls and commits of all blocks by slices of one block mask."""
    torch._dynamo.reset()
    block, blocks = 4, 5
    model = qwen3("sdpa").eval()
    with patch.object(backend, "compile_fx", lambda gm, inputs, **_: eager_inner(gm, inputs)):
        compiled = focus_compile.compile(model, mask_token_id=MASK)
        order = torch.arange(block * blocks) // block
        wide = (order[:, None] >= order)[None, None]
        cache = DynamicCache()
        for number in range(blocks):
            at = slice(number * block, (number + 1) * block)
            place = torch.arange(block * blocks)[None]
            given = {
                "attention_mask": wide[:, :, at, : at.stop],
                "position_ids": place[:, at],
                "past_key_values": cache,
                "use_cache": True,
            }
            ids = torch.full((1, block), MASK)
            if number:
                compiled(ids, **given)
                cache.crop(-block)
            compiled(ids.fill_(number + 1), **given)
    assert focus_compile.status(compiled).graphs <= 3
