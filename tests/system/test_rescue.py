"""Rescue in every dialect: the steps of a block, against the emulation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import focus_compile
from tests.reference.emulation import Emulation
from tests.reference.state import Config, Visibility
from tests.reference.trust import Judge
from tests.support.dialects import DIALECTS, Subject, draw_call
from tests.support.harness import MASK, retained
from tests.system.test_families import NEAR_TIE, TOLERANCE, decoded


@pytest.mark.parametrize("visibility", ["written", "prefix"])
@pytest.mark.parametrize("name", DIALECTS)
@torch.no_grad()
def test_a_block_equals_the_emulation(name: str, visibility: Visibility) -> None:
    """Which tokens are retained and rescued, their logits, and what later steps see of them."""
    subject = Subject(DIALECTS[name])
    draw = draw_call(subject.dialect, 3)
    draw = dataclasses.replace(draw, ids=torch.full_like(draw.ids, MASK))
    emulation = Emulation(Config(1.0, visibility, rescue=0.12), Judge(MASK))
    rescued = kept = 0
    with focus_compile.session(alpha=1.0, visibility=visibility, rescue=0.12) as focus:
        for _ in range(6):
            masked = draw.ids == MASK
            if not masked.any():
                break
            found = emulation.step(lambda d=draw: subject.eager(d), draw.ids, masked, draw.history)
            before = subject.suffixes()
            arguments = subject.dialect.arguments(subject.model, draw)
            actual = subject.dialect.logits(subject.compiled(**arguments))
            assert min(found.margin, found.need_margin) > NEAR_TIE
            assert subject.suffixes() == before + 1 + bool(found.rescued.any())
            assert torch.equal(retained(actual), found.retained)
            mask = focus.rescue_mask
            assert torch.equal(torch.zeros_like(masked) if mask is None else mask, found.rescued)
            expected = found.logits * found.retained.unsqueeze(-1)
            torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
            rescued += int(found.rescued.any(1).sum())
            kept += int((masked & ~found.retained).any(1).sum())
            draw = decoded(draw, found.retained, emulation)
        assert focus.stats.rescued_rows == rescued > 0
    print(f"{rescued} rows rescued, {kept} left as they were")
