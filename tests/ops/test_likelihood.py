"""The most probable token of each row, whatever is looked at together."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from focus_compile.ops import likelihood
from focus_compile.ops.likelihood import most_probable


def logits(rows: int = 5, vocabulary: int = 11) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))


def test_the_largest_of_a_softmax() -> None:
    """Without a token, its probability is left out before the softmax."""
    given = logits()
    given[2, 4] = 9.0
    kept = given.clone()
    probability, token = most_probable(given)
    torch.testing.assert_close(probability, given.softmax(1).amax(1))
    assert token.tolist() == given.argmax(1).tolist() and token[2] == 4
    rest = torch.cat([given[:, :4], given[:, 5:]], 1)
    without, other = most_probable(given.double(), 4)
    assert without.dtype == torch.float32
    torch.testing.assert_close(without, rest.softmax(1).amax(1))
    places = [place + (place >= 4) for place in rest.argmax(1).tolist()]
    assert other.tolist() == places and abs(float(probability[2] - without[2])) > 0.1
    assert torch.equal(given, kept)  # nothing is written into what was given


@pytest.mark.parametrize("part", [1, 11, 25, 10**6])
def test_parts_are_the_whole(part: int) -> None:
    """Some rows at a time, as many as a part holds, one at least."""
    with mock.patch.object(likelihood, "_PART", part):
        found = most_probable(logits(), 3)
    for mine, theirs in zip(found, most_probable(logits(), 3), strict=True):
        assert torch.equal(mine, theirs)


def test_edges() -> None:
    """NaN, ties, no rows, and a mask token that the head does not reach."""
    assert most_probable(torch.tensor([[1.0, torch.nan]]))[0].isnan().all()
    assert most_probable(torch.tensor([[0.0, 2.0, 2.0]]))[1].tolist() == [1]
    assert [len(value) for value in most_probable(torch.zeros(0, 4), 2)] == [0, 0]
    assert most_probable(torch.tensor([[0.0, 2.0]]), 7)[1].tolist() == [1]
