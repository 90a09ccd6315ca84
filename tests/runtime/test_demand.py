"""Who is rescued: rows in which nothing that was retained is sure, judged by plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.runtime.demand import Demand, Rescue, demand_of, in_need, rescue_of


def slow(sure: list[float], masked: list[bool], retained: list[bool], demand: Demand) -> bool:
    """One row, by docs/algorithm.md section 11.2."""
    marks = [p for p, flag in enumerate(masked) if flag]
    if all(retained[p] for p in marks):
        return False
    able = [p for p in marks if math.isnan(sure[p]) or sure[p] >= 0]
    if demand.strategy == "sequential":
        return any(p not in able for p in marks[: demand.count])
    count = demand.count if demand.strategy == "fixed" else 1
    values = [sure[p] for p in able]
    if any(map(math.isnan, values)) or len(values) < count:
        return True
    return not sorted(values)[-count] >= demand.threshold


@pytest.mark.parametrize(
    "demand",
    [
        Demand(0.5), Demand(0.0), Demand(1.0), Demand(0.5, "fixed", 2), Demand(0.2, "fixed", 9),
        Demand(0.5, "sequential", 1), Demand(0.5, "sequential", 3),
    ],
    ids=repr,
)  # fmt: skip
def test_in_need(demand: Demand) -> None:
    generator = torch.Generator().manual_seed(0)

    def flags(share: float) -> Tensor:
        return torch.rand(400, 7, generator=generator) < share

    masked, retained = flags(0.6), flags(0.6)
    sure = (torch.rand(400, 7, generator=generator) * 4).round() / 4  # with ties at the threshold
    sure[flags(0.03)] = torch.nan
    sure[~retained] = -1
    rows = zip(sure.tolist(), masked.tolist(), retained.tolist(), strict=True)
    expected = [slow(*row, demand) for row in rows]
    assert in_need(sure, masked, retained, demand).tolist() == expected
    assert any(expected) and not all(expected)
    rescued = rescue_of(sure, masked, retained, demand)
    assert rescued is not None
    assert torch.equal(rescued, masked & ~retained & torch.tensor(expected).unsqueeze(1))


def test_nobody_is_rescued() -> None:
    """Nothing was evicted, or nothing is known."""
    masked = torch.ones(2, 3, dtype=torch.bool)
    assert rescue_of(torch.zeros(2, 3), masked, masked, Demand(0.9)) is None
    assert rescue_of(None, masked, ~masked, Demand(0.9)) is None


THRESHOLD, FIXED = Demand(0.9), Demand(0.9, "fixed", 2)


@pytest.mark.parametrize(
    ("option", "session", "decoding", "expected"),
    [
        ("auto", "auto", None, None),  # a loop of one's own
        ("auto", "auto", THRESHOLD, THRESHOLD),
        ("auto", "auto", FIXED, None),
        (None, "auto", THRESHOLD, None),
        (0.3, "auto", None, Demand(0.3)),
        (0.3, "auto", THRESHOLD, Demand(0.3)),
        (0.3, "auto", FIXED, Demand(0.3, "fixed", 2)),
        (0.3, None, THRESHOLD, None),
        (0.3, 0.6, None, Demand(0.6)),
        (None, 0.6, FIXED, Demand(0.6, "fixed", 2)),
    ],
)
def test_whose_setting_counts(
    option: Rescue,
    session: Rescue,
    decoding: Demand | None,
    expected: Demand | None,
) -> None:
    """The session's, then the option, then how ``generate`` decodes."""
    assert demand_of(option, session, decoding) == expected


@pytest.mark.parametrize("rescue", [-0.1, 1.5, float("nan"), True, "0.9"])
def test_out_of_range(rescue: float) -> None:
    with pytest.raises(ValueError, match=r"rescue=.*expected a probability from 0 to 1"):
        with focus_compile.session(rescue=rescue):
            pass
    with pytest.raises(ValueError, match=r"rescue=.*expected a probability from 0 to 1"):
        focus_compile.FocusConfig(rescue=rescue)
