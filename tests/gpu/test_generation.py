"""Whole generations of the trained model: tokens, steps and retained tokens are the reference's.

The reference decodes on the CPU; where a device decodes otherwise, it must have been a near tie.
"""

from __future__ import annotations

import copy

import pytest
import torch

import focus_compile
from benchmarks.trace import BLOCK, prompts, trained
from tests.gpu.where import Where
from tests.reference.generation import Decoding, generate_row
from tests.support.harness import MASK, Run, Sizes, build_model, eager_inner

NEAR_TIE = 1e-4


@pytest.mark.parametrize("inductor", [False, True], ids=["as-captured", "inductor"])
def test_equals_the_reference(where: Where, inductor: bool) -> None:
    if inductor and not where.gpu:
        pytest.skip("tests/system/test_inductor.py has it")
    model, tokenizer = trained()
    count = where.draws(4, 1)
    texts = [e.prompt for task in ("chain", "total", "order") for e in prompts(task, count)]
    given = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    mask = tokenizer.mask_token_id
    moved = copy.deepcopy(model).to(where.device)
    run = Run(moved, {"mask_token_id": mask}, None if inductor else eager_inner, dynamic=True)
    out = focus_compile.generate(
        run.compiled,
        given["input_ids"].to(where.device),
        given["attention_mask"].to(where.device),
        max_new_tokens=BLOCK,
        block_length=BLOCK,
        mask_token_id=mask,
        return_dict=True,
    )
    assert out.focus_steps == out.forwards and out.retained_fraction < 0.6
    (counts,) = out.steps_per_block
    ties = 0
    for row, text in enumerate(texts):
        expected = generate_row(
            model,
            tokenizer.encode(text),
            blocks=1,
            block_length=BLOCK,
            mask_id=mask,
            decoding=Decoding(confidence_threshold=0.9, ban_mask_token=True),
        )
        made = out.sequences[row, -BLOCK:].tolist(), [int(counts[row])]
        if made == (expected.tokens, expected.steps_per_block):
            steps = [kept[row].tolist() for kept in out.retain_masks if kept[row].any()]
            assert steps == [step.retain_mask for step in expected.steps]
        else:
            assert expected.margin < NEAR_TIE, f"row {row}: margin {expected.margin}"
            ties += 1
    assert ties <= 1 + len(texts) // 10


def test_tokens_on_the_device_are_those_on_the_cpu(where: Where) -> None:
    """Random weights, several blocks, left padding, sampling's absence: bit by bit the same ids."""
    model = build_model(Sizes(layers=3))
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(ids)
    valid[1, :3] = 0
    made = []
    for device in ("cpu", where.device):
        run = Run(copy.deepcopy(model).to(device), dynamic=True)
        out = focus_compile.generate(
            run.compiled, ids.to(device), valid.to(device), max_new_tokens=22, block_length=11,
            mask_token_id=MASK, confidence_threshold=0.2,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor) and run.counts()[1] > 4
        made.append(out.cpu())
    assert torch.equal(*made)
