"""Every worked case of the specification, against the reference implementation."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.reference import algorithm
from tests.support.paths import SPEC

CASES: list[dict[str, Any]] = json.loads(SPEC.read_text())["cases"]


def _importance(q: Any, k: Any, scale: float | None = None) -> list[float]:
    query, key = torch.tensor(q), torch.tensor(k)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return algorithm.importance(query, key, scale).tolist()


def _evict(inputs: dict[str, Any], imp0: list[float], imp1: list[float]) -> dict[str, Any]:
    flags = [bool(f) for f in inputs.get("mask_flags", [1] * len(inputs["positions"]))]
    delta = torch.tensor(imp1) - torch.tensor(imp0)
    result = algorithm.evict(
        inputs["positions"], flags, delta, inputs["avg"], inputs["alpha"], inputs["progress"]
    )
    return {
        "k": result.k,
        "kept": result.kept,
        "rightmost": result.rightmost,
        "kv_block_len": result.rightmost + 1,
        "new_progress": result.progress,
    }


def _run(kind: str, i: dict[str, Any]) -> dict[str, Any]:
    match kind:
        case "importance":
            values = _importance(i["q"], i["k"], i.get("scale"))
            return {"importance": values, "sum": sum(values)}
        case "target":
            return {"k": algorithm.target(i["mask_len"], i["avg"], i["alpha"])}
        case "average":
            return {"avg": algorithm.average(*algorithm.count_productive(i["decoded"]))}
        case "select":
            return {"selected": algorithm.select(torch.tensor(i["delta"]), i["k"]).indices}
        case "enforce":
            return {"kept": algorithm.enforce(i["positions"], set(i["keep"]), i["progress"])}
        case "evict":
            return _evict(i, i["imp0"], i["imp1"])
        case "pipeline":
            imp0, imp1 = (_importance(i[f"q{n}"], i[f"k{n}"]) for n in (0, 1))
            return {"imp0": imp0, "imp1": imp1, **_evict(i, imp0, imp1)}
        case "delayed_cache":
            final = [not flag for flag in i["uncached"]]
            fed = [p for p, done in enumerate(final) if not done]
            after = algorithm.finalise([bool(f) for f in i["was_mask"]], fed, final)
            return {"uncached": [int(not done) for done in after]}
        case "unmask":
            candidates = [bool(f) for f in i["masked_and_processed"]]
            choice = algorithm.unmask(i["conf"], candidates, i["threshold"], bool(i["strict"]))
            return {"unmask": choice.indices}
    raise AssertionError(f"no such kind of case: {kind}")


def test_all_cases_are_collected() -> None:
    assert len(CASES) == 52
    assert len({case["id"] for case in CASES}) == 52


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


@pytest.mark.parametrize(
    ("delta", "k", "margin"),
    [
        ([0.0, 0.0, 10.0, 10.0], 1, 0.0),  # |A| > K, members exactly on the threshold
        ([0.0, 0.0, 0.0, 8.0], 1, 5.464102),  # |A| = K: only an outsider can change the set
        ([0.0, 1.0, 2.0, 3.5], 2, 1.0),  # |A| < K: second minus third largest
        ([1.0, 2.0], 2, float("inf")),  # nothing to decide
    ],
)
def test_margin_of_selection(delta: list[float], k: int, margin: float) -> None:
    assert algorithm.select(torch.tensor(delta), k).margin == pytest.approx(margin, abs=1e-5)


@pytest.mark.parametrize(
    ("confidence", "indices", "margin"),
    [
        ([0.95, 0.7, 0.85], [0, 2], 0.05),  # several pass: whoever is nearest to the threshold
        ([0.81, 0.7, 0.1], [0], 0.1),  # one passes: the runner-up may join it
        ([0.5, 0.7, 0.6], [1], 0.1),  # none passes: the runner-up may take its place
        ([0.5], [0], float("inf")),
    ],
)
def test_margin_of_unmasking(confidence: list[float], indices: list[int], margin: float) -> None:
    choice = algorithm.unmask(confidence, [True] * len(confidence), 0.8)
    assert choice.indices == indices
    assert choice.margin == pytest.approx(margin)
