"""The tiny diffusion LLM in examples/: its checkpoint, its tasks, its decoder, its refusals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

FOLDER = Path(__file__).parent.parent / "examples" / "tiny_dllm"
CHECKPOINT = FOLDER / "checkpoint"
RECORDED = json.loads((FOLDER / "recorded.json").read_text())


@pytest.fixture(scope="module")
def example() -> dict[str, ModuleType]:
    """The example's modules, which import each other as scripts of one folder do."""
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in ("tasks", "decode", "batches")}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def loaded() -> tuple[Qwen3ForCausalLM, object]:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM.from_pretrained(CHECKPOINT).eval()
    return model, AutoTokenizer.from_pretrained(CHECKPOINT)


def test_checkpoint_is_what_the_model_card_says(loaded):
    model, tokenizer = loaded
    assert model.config.num_hidden_layers >= 8
    assert model.config.block_length == 32
    assert tokenizer.mask_token_id == model.config.mask_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) <= 20_000_000


def test_tokenizer_gives_text_back(loaded, example):
    _, tokenizer = loaded
    for task in example["tasks"].TASKS:
        drawn = example["tasks"].examples(task.name, 20, seed=9)
        for item in drawn:
            ids = tokenizer.encode(item.prompt)
            assert tokenizer.unk_token_id not in ids
            assert len(ids) <= example["tasks"].MAX_PROMPT
            assert len(item.answer) < example["tasks"].MAX_ANSWER
            assert tokenizer.decode(ids) == item.prompt


@pytest.mark.parametrize("task", sorted(RECORDED))
def test_decodes_as_recorded(task, loaded, example):
    model, tokenizer = loaded
    cases = RECORDED[task]
    assert len(cases) == 20
    decoded = example["decode"].decode(model, tokenizer, [case["prompt"] for case in cases])
    assert [d.text for d in decoded] == [case["text"] for case in cases]
    assert [d.blocks for d in decoded] == [case["blocks"] for case in cases]
    right = [c["text"] == example["tasks"].TASK_BY_NAME[task].solve(c["prompt"]) for c in cases]
    assert sum(right) >= 18


def test_a_row_does_not_depend_on_the_batch(loaded, example):
    model, tokenizer = loaded
    cases = [RECORDED[task][0] for task in sorted(RECORDED)]
    for case in cases:
        (alone,) = example["decode"].decode(model, tokenizer, [case["prompt"]])
        assert (alone.text, alone.blocks) == (case["text"], case["blocks"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("  ", "the prompt is empty"),
        ("total:a1B2=", "unknown words in the prompt 'total:a1B2=': 'B'"),
        ("sum:a1=", "unknown words in the prompt 'sum:a1=': ':'"),
        ("total:a1<mask>=", "unknown words in the prompt 'total:a1<mask>=': '<mask>'"),
        ("order:" + "a11" * 40 + "=", "the prompt has 122 tokens, the most is 66"),
    ],
)
def test_refuses_a_bad_prompt(prompt, message, loaded, example):
    model, tokenizer = loaded
    with pytest.raises(example["decode"].PromptError, match=f"^{message}$"):
        example["decode"].decode(model, tokenizer, ["total:a1b2=", prompt])


def test_refuses_a_missing_checkpoint(tmp_path, example):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*train\.py --out"):
        example["decode"].load(tmp_path)


def test_refuses_no_prompts(loaded, example):
    model, tokenizer = loaded
    with pytest.raises(example["decode"].PromptError, match=r"^there are no prompts$"):
        example["decode"].decode(model, tokenizer, [])


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        ("total", "total:a9b4c5d8=", "a99b43c58d86"),
        ("chain", "chain:j;n|fe;al;ja;nf;=", "jal;nfe;"),
        ("order", "order:b32c15a63=", "a63b32c15"),
    ],
)
def test_judges_know_the_answer(task, prompt, answer, example):
    assert example["tasks"].TASK_BY_NAME[task].solve(prompt) == answer


def test_equal_logits_and_confidences_go_to_the_first(example):
    logits, masked = torch.zeros(1, 5, 7), torch.tensor([[False] + [True] * 4])
    tokens, decoded = example["decode"].choose(logits, masked, 0.9, mask_id=0)
    assert tokens.tolist() == [[1] * 5]  # the mask itself is never an answer
    assert decoded.tolist() == [[False, True, False, False, False]]


def test_a_noised_copy_sees_history_and_itself_only(loaded, example):
    _, tokenizer = loaded
    drawn = example["tasks"].examples("total", 5, seed=3)
    batch = example["batches"].diffusion(drawn, tokenizer, torch.Generator().manual_seed(0), 2)
    history = batch.ids.shape[1] - 64
    masked = batch.ids == tokenizer.mask_token_id
    assert masked[:, history:].any(1).all()
    assert not masked[:, :history].any()
    assert torch.equal(batch.weights > 0, masked)
    first, second = batch.visible[:, 0, history:-32], batch.visible[:, 0, -32:]
    assert first[:, :, history:-32].all() and not first[:, :, -32:].any()
    assert second[:, :, -32:].all() and not second[:, :, history:-32].any()
    assert not batch.visible[:, 0, :history, history:].any()
    assert torch.equal(first[:, 0, :history], batch.ids[:, :history] != tokenizer.pad_token_id)
