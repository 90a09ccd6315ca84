"""Importance of other layers than the first two: the cut moves to the second of them."""

from __future__ import annotations

import pytest
import torch

from focus_compile.errors import Unsupported
from focus_compile.passes import PASSES
from focus_compile.programs.cut import cut
from tests.passes.reading import subject
from tests.passes.step import RETAINED, Step, controls
from tests.passes.tiny import call, model
from tests.support.harness import bound

LAYERS = 4


@torch.no_grad()
@pytest.mark.parametrize("scored", [(0, 1), (0, 2), (1, 2), (2, 3)], ids=str)
def test_numbers(scored: tuple[int, int]) -> None:
    """Every layer up to the second scored one computes the fed tokens, later ones the retained."""
    first, last = scored
    own = call(layers=LAYERS)
    values = {**own, **controls(layers=LAYERS, last=last)}
    changed = subject(own, scored=scored)
    gm = changed.canonical.gm
    for apply in PASSES:
        gm = apply(gm, changed.plan)
    lines = changed.lines(gm)
    made = [line.split()[0] for line in lines if "focus.importance" in line]
    assert made == [f"importance{first}", f"importance{last}"]
    assert f"delta = focus.signal({made[0]}, {made[1]}, signal_weights, signal_bias)" in lines
    (logits, *kept), (mask, *_), _ = changed.run(gm, values)["output"]
    expected, *slots = model(values, Step(values, last=last).attend)
    assert torch.equal(mask, RETAINED)
    # sums of another order: by the largest logit, 28, as everywhere
    torch.testing.assert_close(logits[RETAINED], expected[RETAINED], atol=bound(expected), rtol=0)
    torch.testing.assert_close(kept, slots, atol=5e-5, rtol=1e-5)
    halves = cut(gm, changed.plan)
    for layer in range(LAYERS):
        half = halves.prefix if layer <= last else halves.suffix
        assert {halves.slots[f"slots{layer}_{part}"] for part in "kv"} <= {*half.outputs}


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(Unsupported, match="a plan that scores layer 3 needs its attention site"):
        subject(call(layers=3), scored=(0, 3))
