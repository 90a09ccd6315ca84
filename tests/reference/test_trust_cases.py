"""Every worked case of sections 10 to 13 of the specification, against the reference."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import calibration, trust
from tests.reference.calibration import Candidate, DenseStep, Prediction, Replayed
from tests.reference.state import Config, RowState
from tests.reference.trust import Judge, Memory, Remembered, Signal
from tests.support.paths import TRUST

CASES: list[dict[str, Any]] = json.loads(TRUST.read_text())["cases"]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _signal(value: str | list[float]) -> Signal:
    return tuple(value) if isinstance(value, list) else value  # type: ignore[return-value]


def _flags(values: list[int]) -> list[bool]:
    return [bool(value) for value in values]


def _memory(i: dict[str, Any]) -> Memory:
    pairs = zip(i.get("confidence", []), i.get("last", []), strict=True)
    return {p: Remembered(c, last) for p, (c, last) in enumerate(pairs) if last >= 0}


def _bias(i: dict[str, Any]) -> Tensor | None:
    return torch.tensor(i["bias"]) if "bias" in i else None


def _row(tokens: int) -> RowState:
    return RowState([], [False] * tokens, [False] * tokens, [False] * tokens)


def _opens(i: dict[str, Any]) -> dict[str, Any]:
    row = _row(4)
    if i["event"] == "commit":
        row.opens, row.had_masks = bool(i["opens"]), bool(i["had_masks"])
        row.steps = 1
        row.record(i["n1"])
        row.steps = 2
        row.record(1)
        return {"opens": row.opens_next(i["alpha"])}
    return {"opens": row.opens}


def _decide(i: dict[str, Any]) -> dict[str, Any]:
    fed, tokens = i["positions"], i["positions"][-1] + 1
    row = _row(tokens)
    row.warm, row.opens, row.progress = bool(i["warm"]), bool(i["opens"]), i["progress"]
    row.memory = _memory(i)
    for decoded in i["decoded"]:
        row.record(decoded)
    masked = [False] * tokens
    for p, flag in zip(fed, i["mask_flags"], strict=True):
        masked[p] = bool(flag)
    config = Config(i["alpha"], first_step=i["first_step"], signal=_signal(i["signal"]))
    importances = (torch.tensor(i["imp0"]), torch.tensor(i["imp1"]))
    score, made = row.decide(
        config, fed, masked, importances, bias=_bias(i), session=bool(i["session"])
    )
    return {
        "score": score.tolist(),
        "k": made.k,
        "kept": made.kept,
        "rightmost": made.rightmost,
        "new_progress": made.progress,
    }


def _score(i: dict[str, Any]) -> dict[str, Any]:
    bias = _bias(i)
    found = trust.score(
        _signal(i["signal"]),
        i["positions"],
        torch.tensor(i["imp0"]),
        torch.tensor(i["imp1"]),
        _memory(i),
        None if bias is None else bias[i["positions"]],
    )
    return {"score": found.tolist()}


def _remember(i: dict[str, Any]) -> dict[str, Any]:
    memory: Memory = {}
    for step, computed in enumerate(i["computed"]):
        memory = trust.remember(memory, step, dict(computed), i["tokens"], bool(i["shifted"]))
    positions = range(i["tokens"])
    none = torch.zeros(i["tokens"])
    found = trust.score("confidence", positions, none, none, memory)
    return {"confidence": found.tolist(), "last": trust.last_computed(memory, positions)}


def _need(i: dict[str, Any]) -> dict[str, Any]:
    confidence = dict(zip(i["kept"], map(_number, i["confidence"]), strict=True))
    judge = Judge(None, i["strategy"], i["count"], bool(i["shifted"]))
    found = trust.need(i["masked"], i["kept"], confidence, i["tau"], judge, i["before"])
    return {"evicted": found.evicted, "c_star": found.c_star, "in_need": found.flag}


def _rescue(i: dict[str, Any]) -> dict[str, Any]:
    kept, fed, tokens = i["kept"], i["positions"], len(i["written"])
    evicted = [p for p in i["masked"] if p not in kept]
    before = [flag or p in kept for p, flag in enumerate(_flags(i["written"]))]
    # Not fed = final, hence fed earlier: every position holds K/V in layers 0 and 1.
    bounds = {"written": (None, None), "prefix": (kept[-1], fed[-1])}[i["visibility"]]
    found = {
        "retained": kept,
        "written": before,
        "new_progress": i["progress"],
        "kept_see_1": trust.visible_slots([True] * tokens, bounds[0]),
        "kept_see": trust.visible_slots(before, bounds[0]),
    }
    if i["in_need"]:
        after = trust.rescue(kept, evicted, before, i["progress"])
        found |= {
            "retained": after.retained,
            "written": after.written,
            "new_progress": after.progress,
            "rescued_see_1": trust.visible_slots([True] * tokens, bounds[1]),
            "rescued_see": trust.visible_slots(after.written, bounds[1]),
        }
    return found


def _replay(i: dict[str, Any]) -> dict[str, Any]:
    block = [
        DenseStep(
            _flags(step["mask_flags"]),
            step["decoded"],
            dict(enumerate(step["confidence"])),
            (torch.tensor(step["imp0"]), torch.tensor(step["imp1"])),
        )
        for step in i["steps"]
    ]
    candidate = Candidate(_signal(i["signal"]), i["first_step"])
    steps = calibration.replay(block, candidate, i["alpha"], i["threshold"], i["layers"])
    found = calibration.predict(steps, i["layers"], len(block[0].masked))
    return {
        "fed": [len(step.fed) for step in steps],
        "kept": [step.kept for step in steps],
        "evicts": [step.evicts for step in steps],
        "missed": [step.missed for step in steps],
        "cost": [step.cost for step in steps],
        "gain": [step.gain for step in steps],
        "predicted": found.predicted,
        "hit": found.hit,
        "evicting": found.evicting,
    }


def _advise(i: dict[str, Any]) -> dict[str, Any]:
    predictions = {
        Candidate(_signal(c["signal"]), c["first_step"]): Prediction(
            c["predicted"], None, c["evicting"]
        )
        for c in i["candidates"]
    }
    found = calibration.advise(predictions)
    advice: dict[str, Any] = {"evict": found.candidate is not None, "judged": found.judged}
    if found.candidate is not None:
        advice |= {"signal": found.candidate.signal, "first_step": found.candidate.first_step}
    return advice


def _gate_of_steps(i: dict[str, Any]) -> dict[str, Any]:
    steps = [
        Replayed(
            list(range(fed)), list(range(kept)), [], [], kept < fed, False, 0, 0, margin=math.inf
        )
        for fed, kept in zip(i["fed"], i["kept"], strict=True)
    ]
    tau = calibration.gate(i["threshold"], i["row_steps"], i["forced"], steps, i["layers"])
    return {"tau": tau}


def _run(kind: str, i: dict[str, Any]) -> dict[str, Any]:
    match kind:
        case "opens":
            return _opens(i)
        case "decide":
            return _decide(i)
        case "score":
            return _score(i)
        case "select":
            choice = trust.select(i["signal"], torch.tensor(i["score"]), i["k"], i["last"])
            return {"selected": choice.indices}
        case "memory":
            return _remember(i)
        case "sureness":
            logits = torch.tensor([_number(value) for value in i["logits"]])
            return {"c": trust.sureness(logits, i["mask_id"])}
        case "need":
            return _need(i)
        case "rescue":
            return _rescue(i)
        case "replay":
            return _replay(i)
        case "advise":
            return _advise(i)
        case "gate":
            return {"tau": calibration.quantile(i["threshold"], i["phi"], i["rho"], i["forced"])}
        case "gate_of_steps":
            return _gate_of_steps(i)
    raise AssertionError(f"no such kind of case: {kind}")


def test_all_cases_are_collected() -> None:
    assert len({case["id"] for case in CASES}) == len(CASES) == 119


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case: dict[str, Any]) -> None:
    actual = _run(case["kind"], case["inputs"])
    assert case["outputs"]
    for name, expected in case["outputs"].items():
        found = actual[name]
        numbers = expected if isinstance(expected, list) else [expected]
        if expected is None:
            assert found is None or math.isnan(found), name
        elif any(isinstance(number, float) for number in numbers):
            assert found == pytest.approx(expected, abs=case["tol"], rel=0), name
        else:
            assert found == expected, name
