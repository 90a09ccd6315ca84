"""What is chosen at the borders of 2 %, 5 %, 0.95 and 200 steps, and the gate's quantile."""

from __future__ import annotations

from typing import Any

import pytest

from focus_compile.calibration.choice import Judged, choose, gate
from focus_compile.calibration.replay import Candidate, Tally
from focus_compile.intervals import wilson


def judged(signal: Any, predicted: float, first_step: str = "open", evicting: int = 500) -> Judged:
    candidate = Candidate(signal, (0, 1), first_step)
    return Judged(candidate, predicted, evicting, 1.0, (0.9, 1.0), 0.0, 0.9, 0.9, 0.2)


@pytest.mark.parametrize(
    ("rivals", "chosen"),
    [
        ([("importance", 0.400, "open"), ("delta", 0.407, "open")], ("delta", "open")),
        ([("importance", 0.400, "open"), ("delta", 0.409, "open")], ("importance", "open")),
        ([("delta", 0.400, "evict"), ("delta", 0.419, "open")], ("delta", "open")),
        ([("delta", 0.400, "evict"), ("delta", 0.421, "open")], ("delta", "evict")),
        ([("random", 0.100, "open"), ("position", 0.300, "open")], ("position", "open")),
        ([("delta", 0.949, "open")], ("delta", "open")),
        ([("delta", 0.950, "open"), ("random", 0.2, "open")], None),
    ],
)
def test_choice(rivals: list[tuple[str, float, str]], chosen: tuple[str, str] | None) -> None:
    found, why = choose([judged(*rival) for rival in rivals])
    if chosen is None:
        assert found is None and why.startswith("do not evict: the cheapest signal (delta 1-0)")
        return
    assert found is not None and (found.candidate.signal, found.candidate.first_step) == chosen
    assert f"first step {chosen[1]}: predicted to cost" in why


def test_too_few_steps() -> None:
    """The paper's signal, whatever looks cheaper."""
    rivals = [
        judged("position", 0.2, evicting=199),
        judged("delta", 0.4, "evict", 150),
        judged("delta", 0.419, "open", 140),
    ]
    found, why = choose(rivals)
    assert found is rivals[2] and why.startswith("fewer than 200 steps evict, too few to judge")
    assert choose([judged("delta", 0.96, evicting=10)])[0] is None


def test_gate() -> None:
    """As many of the forced steps are rescued in vain as cost 3 %."""
    tally = Tally(steps=1000, evicting=500, saved=50.0, spent=100.0)
    forced = [number / 100 for number in range(100)]  # a tenth of all steps
    # 0.03 / (0.1 * 0.5) = 0.6 of the forced steps
    assert gate(tally, forced, 0.9) == 0.6
    assert gate(tally, forced, 0.5) == 0.5
    assert gate(tally, forced[:19], 0.9) == 0.9  # too few to tell
    assert gate(tally, [], 0.9) == 0.9
    assert gate(Tally(steps=1000, saved=5.0, spent=100.0), forced, 0.9) == 0.9  # all may be rescued
    assert gate(Tally(steps=1000), forced, 0.9) == 0.9  # nothing evicted


def test_interval() -> None:
    low, high = wilson(0, 400)
    assert low == 0 and high == pytest.approx(0.0095, abs=1e-4)
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.404, abs=1e-3), pytest.approx(0.596, abs=1e-3))
