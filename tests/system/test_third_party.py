"""A third party's generation loop, unchanged, around a compiled model inside a session."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import focus_compile
from tests.reference.state import Config, Visibility
from tests.support import third_party
from tests.support.harness import MASK, Run, Sizes
from tests.support.third_party import BLOCK, Reference

BATCH = 4


@pytest.fixture(scope="module")
def run() -> Run:
    """The mask token comes from the session."""
    model = third_party.polite_model(sizes=Sizes(layers=4))
    return Run(model, {"mask_token_id": None}, dynamic=True)


def prompts(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, MASK, (BATCH, length), generator=generator)


@pytest.mark.parametrize(
    ("delayed_cache", "stale_kv"),
    [(True, True), (False, True), (True, False), (False, False)],
    ids=["delayed", "undelayed", "delayed-exact", "undelayed-exact"],
)
@pytest.mark.parametrize("visibility", ["written", "prefix"])
@pytest.mark.parametrize("length", [BLOCK, BLOCK + 4])
def test_equals_the_reference(
    run: Run, length: int, visibility: Visibility, delayed_cache: bool, stale_kv: bool
) -> None:
    """Tokens, and what every row of every step fed and retained, idle rows included.

    The longer prompts end inside the first block, which then starts with decoded tokens.
    """
    run.configure(delayed_cache=delayed_cache, stale_kv=stale_kv)
    reference = Reference(run.model, Config(1.5, visibility, delayed_cache, stale_kv))
    expected = reference.generate(prompts(length), blocks=2)
    retained: list[list[list[bool]]] = []
    with focus_compile.session(mask_token_id=MASK, visibility=visibility) as focus:

        def watch() -> None:
            assert focus.retain_mask is not None
            retained.append(focus.retain_mask.tolist())

        actual = third_party.generate(run.compiled, run.model.config, prompts(length), 2, watch)
    assert retained == [[row.retain_mask for row in step] for step in reference.steps]
    assert torch.equal(actual, expected)
    assert not (actual == MASK).any()

    stats = focus.stats
    assert stats.steps == len(reference.steps) > 4
    assert stats.dense_calls == 3  # the prompt and two commits
    assert stats.canvas == BATCH * BLOCK * stats.steps
    assert stats.fed_per_step == [sum(len(r.fed) for r in step) for step in reference.steps]
    assert stats.retained_per_step == [
        sum(len(r.retained) for r in step) for step in reference.steps
    ]
    assert stats.fed == sum(stats.fed_per_step)
    assert stats.retained_fraction == stats.retained / stats.canvas < stats.fed_fraction
    assert (stats.fed_fraction < 1) == delayed_cache


def test_a_row_without_masks_is_fed_once(run: Run) -> None:
    """Whole, so that its keys and values are exact; then not at all until the block is stored."""
    run.configure(delayed_cache=True, stale_kv=True)
    reference = Reference(run.model)
    reference.generate(prompts(BLOCK), blocks=2)
    idle = {len(row.fed) for step in reference.steps for row in step if not row.masked}
    assert idle == {BLOCK, 0}
    with focus_compile.session(mask_token_id=MASK) as focus:
        third_party.generate(run.compiled, run.model.config, prompts(BLOCK), 2)
    assert focus.stats.fed_per_step == [sum(len(r.fed) for r in s) for s in reference.steps]


def test_the_history_is_what_dense_calls_store(run: Run) -> None:
    """After its commit a block's keys and values are bit-equal to those of dense calls alone."""
    config = run.model.config
    with focus_compile.session(mask_token_id=MASK), torch.no_grad():
        x = third_party.generate(run.compiled, config, prompts(BLOCK), 1)
        decoding, dense = (third_party.Denoiser(run.compiled, config) for _ in range(2))
        for denoiser in (decoding, dense):
            denoiser.logits(x[:, :BLOCK], store_kv=True)
        decoding.logits(torch.full((BATCH, BLOCK), MASK), store_kv=False)
        for denoiser in (decoding, dense):
            denoiser.logits(x[:, BLOCK:], store_kv=True)
    for ours, plain in zip(decoding.cache.layers, dense.cache.layers, strict=True):
        assert ours.keys.shape[2] == 2 * BLOCK
        assert torch.equal(ours.keys, plain.keys)
        assert torch.equal(ours.values, plain.values)
