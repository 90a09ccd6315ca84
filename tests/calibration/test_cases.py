"""The worked cases of docs/algorithm.md sections 11 and 13, against the package."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_compile.calibration.choice import Judged, choose, gate
from focus_compile.calibration.record import DenseStep
from focus_compile.calibration.replay import Candidate, Tally, replay
from focus_compile.ops.likelihood import most_probable
from focus_compile.runtime.demand import Demand, in_need
from tests.support.paths import TRUST

CASES: list[dict[str, Any]] = json.loads(TRUST.read_text())["cases"]


def cases(kind: str) -> Any:
    found = [case for case in CASES if case["kind"] == kind]
    assert found
    return pytest.mark.parametrize("case", found, ids=lambda case: case["id"])


def signal_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@cases("replay")
def test_replay(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["outputs"]
    steps = []
    for step in given["steps"]:
        masked = torch.tensor([step["mask_flags"]], dtype=torch.bool)
        length = masked.shape[1]
        decoded = torch.zeros_like(masked)
        decoded[0, step["decoded"]] = True
        sure = torch.tensor([step["confidence"]]).masked_fill(~masked, -1)

        def canvas(values: list[float], masked: Tensor = masked, n: int = length) -> Tensor:
            return torch.zeros(1, n).masked_scatter(masked, torch.tensor(values))

        importances = {0: canvas(step["imp0"]), 1: canvas(step["imp1"])}
        steps.append(DenseStep(masked, decoded, sure, importances))
    candidate = Candidate(signal_of(given["signal"]), (0, 1), given["first_step"])
    tally = Tally()
    replay(
        steps, candidate, tally, alpha=given["alpha"], threshold=given["threshold"],
        layers=given["layers"],
    )  # fmt: skip
    assert tally.cost == sum(expected["cost"]) and tally.gain == sum(expected["gain"])
    assert tally.evicting == expected["evicting"]
    assert tally.rescued == sum(expected["missed"])
    predicted = tally.predicted(given["layers"], steps[0].masked.shape[1])
    assert predicted == pytest.approx(expected["predicted"], abs=case["tol"])
    hit = tally.hits / tally.sure if tally.sure else None
    assert hit == (None if expected["hit"] is None else pytest.approx(expected["hit"]))


@cases("advise")
def test_choice(case: dict[str, Any]) -> None:
    judged = [
        Judged(
            Candidate(signal_of(each["signal"]), (0, 1), each["first_step"]), each["predicted"],
            each["evicting"], None, None, 0.0, None, None, 0.0,
        )
        for each in case["inputs"]["candidates"]
    ]  # fmt: skip
    expected = case["outputs"]
    chosen, why = choose(judged)
    assert (chosen is not None) == bool(expected["evict"])
    assert ("too few" not in why) == bool(expected["judged"])
    if chosen is not None:
        found = chosen.candidate
        assert (found.signal, found.first_step) == (expected["signal"], expected["first_step"])


@cases("gate")
def test_gate(case: dict[str, Any]) -> None:
    """phi and rho are given: a tally that has them."""
    given = case["inputs"]
    forced = given["forced"]
    if given["phi"] == 0 or not forced:
        tally = Tally(steps=10, saved=given["rho"], spent=1.0)
        forced = []
    else:
        tally = Tally(steps=1, saved=given["rho"] * given["phi"] / len(forced), spent=1.0)
    assert gate(tally, forced, given["threshold"]) == pytest.approx(case["outputs"]["tau"])


@cases("gate_of_steps")
def test_gate_of_steps(case: dict[str, Any]) -> None:
    given = case["inputs"]
    pairs = [(f, k) for f, k in zip(given["fed"], given["kept"], strict=True) if k < f]
    late = given["layers"] - 2
    tally = Tally(
        steps=given["row_steps"],
        saved=sum(late * (f - k) for f, k in pairs),
        spent=sum(2 * f + late * k for f, k in pairs),
    )
    assert gate(tally, given["forced"], given["threshold"]) == case["outputs"]["tau"]


@cases("sureness")
def test_sureness(case: dict[str, Any]) -> None:
    given = case["inputs"]
    values = [math.nan if value is None else value for value in given["logits"]]
    found = float(most_probable(torch.tensor([values]), given["mask_id"])[0])
    expected = case["outputs"]["c"]
    assert found == pytest.approx(math.nan if expected is None else expected, nan_ok=True, abs=1e-6)


@cases("need")
def test_need(case: dict[str, Any]) -> None:
    given = case["inputs"]
    length = 1 + max(*given["masked"], *given["kept"], 1)
    masked = torch.zeros(1, length, dtype=torch.bool)
    kept, sure = torch.zeros_like(masked), torch.full(masked.shape, -1.0)
    masked[0, given["masked"]] = kept[0, given["kept"]] = True
    for position, value in zip(given["kept"], given["confidence"], strict=True):
        sure[0, position] = math.nan if value is None else value
    if given["shifted"]:
        before = given["before"]
        if given["strategy"] == "sequential":  # what it is decoded with does not matter there
            before = 0.0
        first = torch.tensor([[-1.0 if before is None else before]])
        sure = torch.cat([first, sure[:, :-1]], 1)
    demand = Demand(given["tau"], given["strategy"], given["count"])
    assert in_need(sure, masked, kept, demand).tolist() == [bool(case["outputs"]["in_need"])]
