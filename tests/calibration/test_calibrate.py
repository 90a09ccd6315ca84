"""Calibrated on a model whose premise fails, and one whose holds; files of another are refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import AutoTokenizer, Qwen3ForCausalLM
from typer.testing import CliRunner

import focus_compile
from focus_compile import Calibration, focus_backend
from focus_compile.calibrated import fingerprint, read
from focus_compile.cli import app
from tests.support.harness import MASK, Sizes, build_model, eager_inner, random_call
from tests.support.paths import TINY


def prompts(count: int) -> list[str]:
    sys.path.insert(0, str(TINY))
    try:
        from tasks import examples
    finally:
        sys.path.remove(str(TINY))
    return [each.prompt for each in examples("chain", count, 5)]


def measured(folder: str, count: int) -> Calibration:
    words = AutoTokenizer.from_pretrained(TINY / folder)
    model = Qwen3ForCausalLM.from_pretrained(TINY / folder).eval()
    return focus_compile.calibrate(
        model, prompts(count), words, early_layers=2, batch=count, progress=False
    )


def named(found: Calibration, first_step: str = "evict") -> dict[str, Any]:
    return {
        each.candidate.name: each
        for each in found.judged
        if each.candidate.first_step == first_step
    }


def test_a_signal_that_fails(tmp_path: Path) -> None:
    """On this model the delta misses, and both importances and the position hit."""
    found = measured("checkpoint", 12)
    by_name = named(found)
    assert by_name["delta 1-0"].hit < 0.9 < 0.98 < by_name["importance 1"].hit
    assert by_name["confidence"].hit < by_name["random"].hit < by_name["delta 1-0"].hit
    assert by_name["position"].auc > 0.95 > by_name["delta 1-0"].auc
    assert found.options is not None and found.options["signal"] in ("position", "importance")
    assert found.options["rescue"] == 0.9 and found.steps > 200 and found.layers == 8
    assert "delta 1-0" in str(found) and found.why in str(found)
    assert found.chosen in found.judged and found.chosen.candidate.signal == found.options["signal"]
    found.save(tmp_path / "calibration.json")  # what an audit is held against
    for taken in (read(found), read(tmp_path / "calibration.json")):
        assert taken.hit_range == found.chosen.hit_range is not None
    # every masked step of dense is replayed, and predicted costs are of dense
    assert all(0.2 < each.predicted < 1 for each in found.judged)
    open_, evict = named(found, "open"), by_name
    assert open_["delta 1-0"].evicting < evict["delta 1-0"].evicting
    _check_pictures(found)


def _check_pictures(found: Calibration) -> None:
    """A step each, of the same block; dense's tokens are the same whatever is kept."""
    decoded = set()
    for each in found.judged:
        steps = each.picture
        masked = [[letter not in "ao" for letter in step] for step in steps]
        assert all(masked[0]) and len({len(step) for step in steps}) == 1 and len(steps) > 2
        decoded.add(tuple(tuple(step) for step in masked))
        if each.candidate.name == "position":
            for step in steps:  # what is kept is the leftmost
                assert re.fullmatch(r"[dr]*[mes]*", re.sub("[ao]", "", step)), step
        if each.candidate.first_step == "open":
            assert set(steps[0]) <= {"d", "r"}
    assert len(decoded) == 1
    assert {"d", "r", "e"} <= {letter for each in found.judged for letter in "".join(each.picture)}


def test_too_few_prompts() -> None:
    found = measured("aligned_checkpoint", 2)
    assert "too few to judge signals" in found.why
    assert found.options == {
        "signal": "delta", "layers": (0, 1), "first_step": "open", "rescue": 0.9,
    }  # fmt: skip


def calibration(model: torch.nn.Module, options: Any) -> dict[str, Any]:
    """A file's contents, made by hand."""
    weights = [fingerprint(each) for each in model.parameters()]
    return {"model": "mine", "weights": weights, "options": options}


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    def backend(gm: GraphModule, inputs: Any) -> Any:
        given = {"mask_token_id": MASK, "strict": True, **options}
        return focus_backend(gm, inputs, options=given, inner=eager_inner)

    return torch.compile(model, backend=backend, dynamic=True)


@pytest.fixture
def model() -> Any:
    return build_model(Sizes(layers=3))


@torch.no_grad()
def test_a_file_as_an_option(model: Any, tmp_path: Path) -> None:
    """It sets what is not given, and another model's is refused at the first masked call."""
    file = tmp_path / "calibration.json"
    options = {"signal": "position", "layers": [0, 1], "first_step": "open", "rescue": 0.25}
    file.write_text(json.dumps(calibration(model, options)))
    config = focus_compile.FocusConfig.from_options({"calibration": str(file), "rescue": 0.5})
    assert (config.signal, config.layers, config.first_step) == ("position", (0, 1), "open")
    assert config.rescue == 0.5 and config.evict
    call = random_call(1, model, 3, 9, 7, masked=torch.ones(3, 9) > 0)
    with focus_compile.session(rescue=0.0, first_step="evict") as focus:
        compiled(model, calibration=file)(**call.kwargs(model))
        assert focus.retain_mask is not None
        assert torch.equal(focus.retain_mask, torch.arange(9).expand(3, 9) < 2)  # the leftmost two
    torch._dynamo.reset()
    other = build_model(Sizes(layers=3), seed=1)
    with pytest.raises(ValueError, match=r"of another model than this one.*it names mine"):
        compiled(other, calibration=file)(**call.kwargs(other))


def options_of(**given: Any) -> focus_compile.FocusConfig:
    return focus_compile.FocusConfig.from_options(given)


@pytest.mark.parametrize("inside", [False, True])
def test_a_signal_that_is_asked_for(inside: bool, model: Any, tmp_path: Path) -> None:
    """``signal="auto"`` is the calibration's, and nothing else."""
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(calibration(model, {"signal": "importance", "layers": [0, 1]})))
    make: Any = focus_compile.Session if inside else options_of
    assert make(signal="auto", calibration=file).signal == "importance"
    assert make(signal="delta", calibration=file).signal == "delta"
    with pytest.raises(ValueError, match=r"signal='auto': the signal is that of a calibration"):
        make(signal="auto")


@torch.no_grad()
def test_do_not_evict(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(calibration(model, None)))
    call = random_call(1, model, 3, 9, 7)
    for inside in (False, True):
        torch._dynamo.reset()
        found = {} if inside else {"calibration": file}
        settings = {"calibration": file} if inside else {}
        with focus_compile.session(**settings) as focus:
            logits = compiled(model, **found)(**call.kwargs(model)).logits
        assert (focus.stats.steps, focus.stats.dense_calls) == (0, 1)
        torch.testing.assert_close(logits, model(**call.kwargs(model)).logits)
    torch._dynamo.reset()
    other = build_model(Sizes(layers=3), seed=1)  # nor does it run another model densely
    with focus_compile.session(calibration=file), pytest.raises(ValueError, match="names mine"):
        compiled(other)(**call.kwargs(other))


@torch.no_grad()
def test_a_session_needs_its_layers(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(calibration(model, {"signal": "delta", "layers": [0, 2]})))
    call = random_call(1, model, 3, 9, 7)
    told = r"the calibration ranks by layers \(0, 2\), and the model is compiled for \(0, 1\)"
    with focus_compile.session(calibration=file), pytest.raises(ValueError, match=told):
        compiled(model)(**call.kwargs(model))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 1, "weights": 3, "options": 4}'])
def test_no_calibration(text: str, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    for value in (file, tmp_path / "nowhere.json", 3):
        with pytest.raises(ValueError, match=r"calibration=.*: expected the file of focus-compile"):
            read(value)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The command calls this, and nothing is decoded."""
    calls: list[dict[str, Any]] = []

    def found(model: Any, texts: list[str], _: Any, **options: Any) -> Calibration:
        calls.append({"texts": texts, **options})
        return Calibration(
            "mine", "float32", 8, len(texts), 32, 0.9, 1.5, 40, 0, (), ("a",), None, "do not evict"
        )

    monkeypatch.setattr("focus_compile.cli.calibrate_model", found)
    return calls


def test_command(cheap: list[dict[str, Any]], tmp_path: Path) -> None:
    """What it is told reaches the function; the file is what `calibration=` takes."""
    file, output = tmp_path / "prompts.txt", tmp_path / "calibration.json"
    file.write_text("chain:a=1\nchain:b=2\n")
    words = ["calibrate", str(TINY / "checkpoint"), "--prompts", str(file), "-o", str(output)]
    made = CliRunner().invoke(app, [*words, "--threshold", "0.8", "--early-layers", "4"])
    assert made.exit_code == 0, made.output
    assert made.stdout.splitlines()[-1] == "do not evict"
    (call,) = cheap
    assert call["texts"] == ["chain:a=1", "chain:b=2"]
    assert (call["confidence_threshold"], call["early_layers"], call["batch"]) == (0.8, 4, 8)
    assert not focus_compile.FocusConfig.from_options({"calibration": output}).evict
    told = CliRunner().invoke(app, [*words[:4], "--json"])
    assert json.loads(told.stdout)["why"] == "do not evict"
    missing = CliRunner().invoke(app, ["calibrate", *words[1:3], str(tmp_path / "nothing.txt")])
    assert missing.exit_code == 2 and "holds no prompts" in missing.stderr
