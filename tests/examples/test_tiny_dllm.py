"""The tiny diffusion LLM in examples/: its checkpoints, tasks, decoder, refusals and signal."""

from __future__ import annotations

import importlib
import json
import random
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from focus_compile.ops.importance import importance
from tests.support.paths import TINY

FOLDER = TINY
CHECKPOINTS = ("checkpoint", "aligned_checkpoint")
MODULES = ("tasks", "decode", "batches", "delta")
RECORDED = json.loads((FOLDER / "recorded.json").read_text())


@pytest.fixture(scope="module")
def example() -> dict[str, ModuleType]:
    """The example's modules, which import each other as scripts of one folder do."""
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Qwen3ForCausalLM, object]]:
    return {
        name: (
            Qwen3ForCausalLM.from_pretrained(FOLDER / name).eval(),
            AutoTokenizer.from_pretrained(FOLDER / name),
        )
        for name in CHECKPOINTS
    }


@pytest.fixture(scope="module")
def loaded(models) -> tuple[Qwen3ForCausalLM, object]:
    return models["checkpoint"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_what_the_model_card_says(name, models):
    model, tokenizer = models[name]
    assert model.config.num_hidden_layers >= 8
    assert model.config.block_length == 32
    assert tokenizer.mask_token_id == model.config.mask_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    size = sum(p.stat().st_size for name in CHECKPOINTS for p in (FOLDER / name).iterdir())
    assert size <= 20_000_000


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


@pytest.mark.parametrize("recorded", sorted(RECORDED))
def test_decodes_as_recorded(recorded, models, example):
    name, task = recorded.split()
    model, tokenizer = models[name]
    cases = RECORDED[recorded]
    assert len(cases) == 20
    decoded = example["decode"].decode(model, tokenizer, [case["prompt"] for case in cases])
    assert [d.text for d in decoded] == [case["text"] for case in cases]
    assert [d.blocks for d in decoded] == [case["blocks"] for case in cases]
    right = [c["text"] == example["tasks"].TASK_BY_NAME[task].solve(c["prompt"]) for c in cases]
    assert sum(right) >= 17


def test_a_row_does_not_depend_on_the_batch(loaded, example):
    model, tokenizer = loaded
    tasks = example["tasks"].TASK_BY_NAME
    for case in (RECORDED[f"checkpoint {task}"][0] for task in tasks):
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
        ("order:" + "a11" * 40 + "=", "the prompt has 122 tokens, the most is 112"),
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
        ("chain", "chain:j|fe;a7;ja;nf;=", "ja7"),
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


@pytest.mark.parametrize(("size", "shortest", "longest"), [(0.0, 17, 34), (1.0, 18, 36)])
def test_the_length_of_a_chain_is_not_in_its_prompt(size, shortest, longest, example):
    task, rng = example["tasks"].TASK_BY_NAME["chain"], random.Random(0)
    drawn = [task.example(rng, size) for _ in range(500)]
    lengths = [len(item.answer) for item in drawn]
    assert (min(lengths), max(lengths)) == (shortest, longest)
    # position 31 is not EOS in so many prompts that it could be decoded before the path is walked
    assert sum(length <= 31 for length in lengths) < 0.9 * len(lengths)
    assert len({len(item.prompt) for item in drawn}) == 1


def test_delta_scores_as_the_package_does(example):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(7, 4, 11, 8, generator=generator), torch.randn(7, 2, 11, 8)
    masked = torch.rand(7, 11, generator=generator) < 0.6
    masked[0], masked[1] = torch.arange(11) == 3, False
    expected = importance(3 * q, k, masked, 0.35)
    assert expected.sum().item() == pytest.approx(4 * int(masked.sum()))
    torch.testing.assert_close(example["delta"].importance(3 * q, k, masked, 0.35), expected)


def test_alignment_counts_pairs_of_a_decoded_and_another_masked_token(example):
    delta = torch.tensor([[2.0, 0.0, 5.0, -1.0], [1.0, 2.0, 3.0, 4.0]])
    masked = torch.tensor([[True, True, False, True], [True, True, True, True]])
    decoded = torch.tensor([[True, False, False, False], [True, True, True, True]])
    loss = example["delta"].alignment(delta, masked, decoded)
    expected = torch.nn.functional.softplus(torch.tensor([1.0 - 2.0, 1.0 - 3.0])).mean()
    torch.testing.assert_close(loss, expected)
