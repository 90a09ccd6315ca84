"""lm-evaluation-harness, offline: the compiled model against TINY-MODEL's own evaluation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, Qwen3ForCausalLM

import focus_compile
from focus_compile.lm_eval import FocusLM
from focus_compile.models.load import BadInput
from tests.support.harness import PAPER, without_inductor
from tests.support.paths import TINY

FOLDER = TINY
ALIGNED = FOLDER / "aligned_checkpoint"
ITEMS, BLOCK, NEW, TASK = 50, 32, 96, "order"
Own = tuple[list[Any], list[Any], dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def programs_are_graphs() -> Iterator[None]:
    with without_inductor():
        yield


@pytest.fixture(scope="module")
def own() -> Own:
    """Examples, what the eager decoder makes of them, and its score."""
    # not by its name: `evaluate` is also what the harness imports
    spec = importlib.util.spec_from_file_location("tiny_evaluate", FOLDER / "evaluate.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(tiny)
    finally:
        sys.path.remove(str(FOLDER))
    drawn = tiny.examples(TASK, ITEMS, 3)
    decoded = tiny.decode(*tiny.load(ALIGNED), [example.prompt for example in drawn])
    return drawn, decoded, tiny.score(drawn, decoded)


@pytest.fixture(scope="module")
def task(own: Own, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("task")
    lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in own[0]]
    (folder / "test.jsonl").write_text("\n".join(lines))
    return {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "test.jsonl")},
            "cache_dir": str(folder),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def evaluate(task: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    report = simple_evaluate(
        model="focus",
        model_args={"pretrained": str(ALIGNED), "block_length": BLOCK, **arguments},
        tasks=[task],
        batch_size=ITEMS,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert report is not None
    return report


def answers(report: dict[str, Any]) -> list[str]:
    samples = sorted(report["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def test_dense(own: Own, task: dict[str, Any]) -> None:
    """The harness with FOCUS off sees the answers of the eager decoder, and its exact match."""
    _, decoded, score = own
    report = evaluate(task, focus=False)
    assert answers(report) == [each.text for each in decoded]
    assert report["results"]["tiny"]["exact_match,none"] == pytest.approx(score["exact_match"])
    assert report["config"]["focus_forwards"] == 0 < report["config"]["forwards"]


def test_focus(own: Own, task: dict[str, Any]) -> None:
    """With FOCUS: what ``generate`` makes of the same batch, and within two items of dense.

    In the paper's way: an open first step decodes so much here that nothing is left to evict.
    """
    drawn, _, score = own
    paper = partial(focus_compile.session, **PAPER)
    with mock.patch("focus_compile.lm_eval.session", paper):
        report = evaluate(task)
    config = report["config"]
    assert config["focus_forwards"] == config["forwards"] > 0
    assert config["retained_fraction"] < config["fed_fraction"] < 1
    model = Qwen3ForCausalLM.from_pretrained(ALIGNED).eval()
    words = AutoTokenizer.from_pretrained(ALIGNED)
    compiled = focus_compile.compile(model, words, dynamic=True, strict=True)
    fed = words(
        [each.prompt for each in drawn], padding=True, padding_side="left", return_tensors="pt"
    )
    with paper():
        made = focus_compile.generate(
            compiled,
            fed["input_ids"],
            fed["attention_mask"],
            max_new_tokens=NEW,
            block_length=BLOCK,
            mask_token_id=words.mask_token_id,
            eos_token_id=words.eos_token_id,
        )
    texts = words.batch_decode(made[:, fed["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers(report) == texts
    right = fmean(text == each.answer for text, each in zip(texts, drawn, strict=True))
    assert report["results"]["tiny"]["exact_match,none"] == pytest.approx(right)
    assert abs(right - score["exact_match"]) <= 2 / ITEMS


@pytest.fixture(scope="module")
def lm() -> FocusLM:
    return FocusLM(str(ALIGNED), batch_size=3, block_length=BLOCK, max_gen_toks=NEW)


@pytest.fixture(scope="module")
def whole(lm: FocusLM, own: Own) -> list[str]:
    """Six answers of several blocks, in two batches."""
    return ask(lm, own, {})


def ask(lm: FocusLM, own: Own, kwargs: dict[str, Any], *others: dict[str, Any]) -> list[str]:
    """Answers to six prompts, whose kwargs take turns."""
    every = [kwargs, *others]
    prompts = [each.prompt for each in own[0] if len(each.answer) > BLOCK][:6]
    return lm.generate_until(
        [
            Instance("generate_until", {}, (prompt, every[number % len(every)]), number)
            for number, prompt in enumerate(prompts)
        ]
    )


def test_stop_strings(lm: FocusLM, own: Own, whole: list[str]) -> None:
    """Answers end before the string, and their batch after the block that holds it."""
    before = dict(lm.ran)
    stopped = ask(lm, own, {"until": ["b", "nowhere"]})
    used = lm.ran["forwards"] - before["forwards"]
    assert stopped == [text.split("b")[0] for text in whole] != whole
    assert used < before["forwards"]


def test_lengths(lm: FocusLM, own: Own, whole: list[str]) -> None:
    """At most so many tokens, not whole blocks; requests of two kinds come back in order."""
    short = ask(lm, own, {"max_gen_toks": 7}, {"max_new_tokens": 5, "do_sample": False})
    ids = [lm.tok_encode(text, add_special_tokens=False) for text in whole]
    cut = [lm.tokenizer.decode(row[: (7, 5)[n % 2]]) for n, row in enumerate(ids)]
    assert short == cut


def test_long_prompts(
    lm: FocusLM, own: Own, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = own[0][0].prompt
    ids, real = lm._encode([prompt, "total:a1="], NEW)
    assert bool(real[0].all()) and not bool(real[1].all()) and bool(real[1, -1])
    monkeypatch.setattr(lm, "max_length", NEW + 5)
    cut, _ = lm._encode([prompt, "total:a1="], NEW)
    assert torch.equal(cut, ids[:, -5:])
    assert "prompts of more than 5 tokens lose their beginning" in caplog.text
    rounded, _ = lm._encode([prompt], NEW - BLOCK + 1)  # answers are made in whole blocks
    assert torch.equal(rounded, cut[:1])
    with pytest.raises(ValueError, match=f"max_gen_toks={NEW + 1}: the model has {NEW + 5} pos"):
        lm._encode([prompt], NEW + 1)


def test_empty_context(lm: FocusLM) -> None:
    """It starts with a special token, as the harness's own models do."""
    ids, real = lm._encode([""], NEW)
    assert ids.tolist() == [[lm.tokenizer.eos_token_id]] and real.tolist() == [[1]]


def test_chat_template(lm: FocusLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    monkeypatch.setattr(lm.tokenizer, "chat_template", template, raising=False)
    talk = [{"role": "user", "content": "a1"}]
    assert lm.apply_chat_template(talk) == "<user>a1<answer>"
    assert lm.chat_template(True) == template
    assert lm.tokenizer_name.endswith("aligned_checkpoint") and "/" not in lm.tokenizer_name


def test_likelihoods_are_refused(lm: FocusLM) -> None:
    request = Instance("loglikelihood", {}, ("a", "b"), 0)
    for call in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match="a text has no likelihood token by token"):
            call([request])


def test_bad_arguments() -> None:
    words = AutoTokenizer.from_pretrained(ALIGNED)
    model = Qwen3ForCausalLM.from_pretrained(ALIGNED)
    with pytest.raises(ValueError, match="pretrained is a model: give its tokenizer, too"):
        FocusLM(model)
    with pytest.raises(ValueError, match="batch_size='auto': expected at least 1"):
        FocusLM(model, words, batch_size="auto")
    with pytest.raises(ValueError, match="max_length=0: expected at least 1"):
        FocusLM(model, words, max_length=0)
    assert FocusLM(model, words).mask_token_id == words.mask_token_id


def test_a_function_that_returns_a_model() -> None:
    """For checkpoints with code of their own, which is never run for its name."""
    made = FocusLM("tests.commands.test_lm_eval:function", str(ALIGNED), max_length=9)
    assert made.model._orig_mod.training is False and made.max_length == 9
    with pytest.raises(ValueError, match="give its tokenizer, too"):
        FocusLM("tests.commands.test_lm_eval:function")
    with pytest.raises(BadInput, match="has no attribute 'nothing'"):
        FocusLM("tests.commands.test_lm_eval:nothing", str(ALIGNED))


def function() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(ALIGNED)


def test_dense_steps_are_no_evaluation_of_focus(
    own: Own,
) -> None:
    plain = FocusLM(str(ALIGNED), block_length=BLOCK, max_gen_toks=BLOCK)
    plain.model = plain.model._orig_mod  # not compiled: every step is dense
    with pytest.raises(RuntimeError, match="FOCUS did not run, every step was dense"):
        ask(plain, own, {})


def test_command_line(task: dict[str, Any], tmp_path: Path) -> None:
    """The harness's own, which finds our model and asks it for a folder that is not there."""
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML
    made = subprocess.run(
        [
            *(sys.executable, "-m", "focus_compile.lm_eval", "run", "--model", "focus"),
            *("--tasks", "tiny", "--include_path", str(tmp_path)),
            *("--model_args", "pretrained=nowhere/at-all"),
        ],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert made.returncode == 1
    assert "focus_compile/lm_eval.py" in made.stderr and "nowhere/at-all" in made.stderr
