"""The worked cases of sections 1-4 against the functions that the passes put into graphs."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_compile.ops.importance import importance
from focus_compile.ops.selection import enforce, retain, select, target
from focus_compile.ops.tables import last_position
from tests.support.paths import SPEC

KINDS = {"importance": 9, "target": 9, "select": 7, "enforce": 8, "evict": 7, "pipeline": 1}
CASES: list[dict[str, Any]] = [
    case for case in json.loads(SPEC.read_text())["cases"] if case["kind"] in KINDS
]


def _fp32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _indices(keep_1T: Tensor) -> list[int]:
    return keep_1T[0].nonzero().flatten().tolist()


def _flags(positions: list[int], chosen: list[int] | None = None) -> Tensor:
    """bool ``[1, T]`` that is true at ``chosen`` positions, on a canvas with a spare last slot."""
    flags = torch.zeros(1, max(positions) + 2, dtype=torch.bool)
    flags[0, positions if chosen is None else chosen] = True
    return flags


def _importance(q: Any, k: Any, scale: float | None = None) -> list[float]:
    """All tokens given are masked: ``[m, H, D]`` and ``[m, G, D]``."""
    query, key = torch.tensor(q), torch.tensor(k)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    masked = torch.ones(1, len(query), dtype=torch.bool)
    out = importance(query.transpose(0, 1)[None], key.transpose(0, 1)[None], masked, scale)
    return out[0].tolist()


def _target(count: int, average: float, alpha: float) -> int:
    return int(target(torch.tensor([count]), _fp32(average)[None], _fp32(alpha)))


def _evict(i: dict[str, Any], imp0: list[float], imp1: list[float]) -> dict[str, Any]:
    """The importances are those of the masked among the fed positions, in their order."""
    positions = i["positions"]
    flags = [bool(flag) for flag in i.get("mask_flags", [1] * len(positions))]
    chosen = [p for p, flag in zip(positions, flags, strict=True) if flag]
    fed, masked = _flags(positions), _flags(positions, chosen)
    delta = torch.zeros(masked.shape)
    delta[masked] = torch.tensor(imp1) - torch.tensor(imp0)
    progress = torch.tensor([i["progress"]])
    kept = retain(delta, masked, fed, progress, _fp32(i["avg"])[None], _fp32(i["alpha"]))
    rightmost = int(last_position(kept))
    return {
        "k": _target(len(chosen), i["avg"], i["alpha"]),
        "kept": _indices(kept),
        "rightmost": rightmost,
        "kv_block_len": rightmost + 1,
        "new_progress": max(i["progress"], rightmost),
    }


def _run(kind: str, i: dict[str, Any]) -> dict[str, Any]:
    match kind:
        case "importance":
            values = _importance(i["q"], i["k"], i.get("scale"))
            return {"importance": values, "sum": sum(values)}
        case "target":
            return {"k": _target(i["mask_len"], i["avg"], i["alpha"])}
        case "select":
            delta = torch.tensor(i["delta"], dtype=torch.float32)[None]
            masked = torch.ones(delta.shape, dtype=torch.bool)
            return {"selected": _indices(select(delta, masked, torch.tensor([i["k"]])))}
        case "enforce":
            masked, kept = _flags(i["positions"]), _flags(i["positions"], i["keep"])
            return {"kept": _indices(enforce(kept, masked, torch.tensor([i["progress"]])))}
        case "evict":
            return _evict(i, i["imp0"], i["imp1"])
        case "pipeline":
            imp0, imp1 = (_importance(i[f"q{n}"], i[f"k{n}"]) for n in (0, 1))
            return {"imp0": imp0, "imp1": imp1, **_evict(i, imp0, imp1)}
    raise AssertionError(f"no such kind of case: {kind}")


def test_all_cases_are_collected() -> None:
    assert Counter(case["kind"] for case in CASES) == KINDS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case: dict[str, Any]) -> None:
    actual = _run(case["kind"], case["inputs"])
    assert case["outputs"]
    for name, expected in case["outputs"].items():
        numbers = expected if isinstance(expected, list) else [expected]
        if any(isinstance(number, float) for number in numbers):
            assert actual[name] == pytest.approx(expected, abs=case["tol"], rel=0), name
        else:
            assert actual[name] == expected, name
