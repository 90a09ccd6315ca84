"""Dialects of each kind through Inductor: two shapes, the same programs for both."""

from __future__ import annotations

import pytest
import torch

import focus_compile
from tests.reference.emulation import Emulation
from tests.reference.state import Config
from tests.support.dialects import DIALECTS, DISTINCT, Subject, draw_call
from tests.support.harness import retained
from tests.system.test_dialects import NEAR_TIE, TOLERANCE


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.usefixtures("dense_without_inductor")
def test_through_inductor(name: str) -> None:
    """Nothing evicted: eager's logits. Evicting: those of the emulation, at the same tokens."""
    subject = Subject(DIALECTS[name], inner=None)
    evicted = 0
    for seed in range(4):
        draw = draw_call(subject.dialect, seed)
        expected = subject.eager(draw)
        with focus_compile.session(alpha=1e9):
            actual = subject.focus(draw)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
        found = Emulation(Config(1.2)).step(
            lambda d=draw: subject.eager(d), draw.ids, draw.masked, draw.history
        )
        with focus_compile.session(alpha=1.2):
            actual = subject.focus(draw)
        assert found.margin > NEAR_TIE
        assert torch.equal(retained(actual), found.retained)
        kept = found.logits * found.retained.unsqueeze(-1)
        torch.testing.assert_close(actual, kept, atol=TOLERANCE, rtol=TOLERANCE)
        evicted += int((~found.retained).sum())
    assert evicted
    assert len(subject.executables) <= 2
