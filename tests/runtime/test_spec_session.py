"""The worked cases of sections 2, 6 and 7 against the state of a session and the decoding step."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_compile.generation.decoding import Candidates, choose
from focus_compile.runtime.block import BlockState, History
from tests.support.paths import SPEC

KINDS = {"delayed_cache": 4, "unmask": 5, "average": 2}
CASES: list[dict[str, Any]] = [
    case for case in json.loads(SPEC.read_text())["cases"] if case["kind"] in KINDS
]
EMPTY = History(0, None)


def _row(flags: list[int]) -> Tensor:
    return torch.tensor([flags], dtype=torch.bool)


def _average(decoded: list[int]) -> float:
    """Steps that retain everything, and decode so many of the leftmost masks each."""
    masked = torch.ones(1, sum(decoded) + 1, dtype=torch.bool)
    ids = torch.zeros(masked.shape, dtype=torch.int64)
    state = BlockState(ids, masked, EMPTY)
    done = 0
    for count in decoded:
        everything = torch.ones_like(masked)
        state.advance(everything, everything, {}, delayed_cache=True)
        done += count
        state.observe(ids, torch.arange(masked.shape[1])[None] >= done, EMPTY)
    return state.average.item()


def _delayed_cache(was_mask: list[int], uncached: list[int]) -> list[int]:
    masked, fed = _row(was_mask), _row(uncached)
    state = BlockState(torch.zeros(masked.shape, dtype=torch.int64), masked, EMPTY)
    state.final = ~fed
    state.advance(fed, fed, {}, delayed_cache=True)
    return (~state.final)[0].int().tolist()


def _unmask(confidence: list[float], flags: list[int], threshold: float, strict: int) -> list[int]:
    where = _row(flags)
    values = torch.tensor([confidence]).masked_fill(~where, -1.0)
    candidates = Candidates(torch.zeros(where.shape, dtype=torch.int64), values)
    chosen = choose(
        candidates, where, "threshold", threshold=threshold, count=1, strict=bool(strict)
    )
    return chosen[0].nonzero().flatten().tolist()


def _run(kind: str, i: dict[str, Any]) -> dict[str, Any]:
    match kind:
        case "average":
            return {"avg": _average(i["decoded"])}
        case "delayed_cache":
            return {"uncached": _delayed_cache(i["was_mask"], i["uncached"])}
        case "unmask":
            flags = i["masked_and_processed"]
            return {"unmask": _unmask(i["conf"], flags, i["threshold"], i["strict"])}
    raise AssertionError(f"no such kind of case: {kind}")


def test_all_cases_are_collected() -> None:
    assert Counter(case["kind"] for case in CASES) == KINDS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case: dict[str, Any]) -> None:
    actual = _run(case["kind"], case["inputs"])
    assert case["outputs"]
    for name, expected in case["outputs"].items():
        assert actual[name] == pytest.approx(expected, abs=case["tol"], rel=0), name


def test_without_delayed_cache_nothing_becomes_final() -> None:
    everything = torch.ones(1, 4, dtype=torch.bool)
    state = BlockState(torch.zeros(1, 4, dtype=torch.int64), ~everything, EMPTY)
    state.advance(everything, everything, {}, delayed_cache=False)
    assert not state.final.any()
