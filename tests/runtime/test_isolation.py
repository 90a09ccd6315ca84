"""Sessions do not see one another: nested, in threads, over several models, after an accident."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import Generated
from focus_compile.runtime.ambient import current_session
from focus_compile.runtime.block import BlockState
from tests.support import third_party
from tests.support.harness import MASK, Run, Sizes
from tests.support.third_party import BLOCK

BATCH = 3
ONE_BY_ONE = 2.0
"""No confidence is that high: every step decodes the most confident token of each row."""


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(third_party.polite_model(sizes=Sizes(layers=3)), {"alpha": 1.2}, dynamic=True)


def prompts(seed: int) -> Tensor:
    return torch.randint(0, MASK, (BATCH, BLOCK), generator=torch.Generator().manual_seed(seed))


class Accident(Exception):
    """What ends a request in the middle of a block."""


def decode(run: Run, seed: int, fail_at: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """Tokens and retain masks of the third party's loop in the current session."""
    masks: list[Tensor] = []

    def watch() -> None:
        if len(masks) + 1 == fail_at:
            raise Accident
        current = current_session()
        assert current is not None
        assert current.retain_mask is not None
        masks.append(current.retain_mask)

    tokens = third_party.generate(
        run.compiled, run.model.config, prompts(seed), 1, watch, ONE_BY_ONE
    )
    return tokens, masks


def alone(run: Run, seed: int) -> tuple[Tensor, list[Tensor]]:
    """What the same request gives in a session of its own."""
    with focus_compile.session():
        return decode(run, seed)


def assert_same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(torch.stack(actual[1]), torch.stack(expected[1]))
    assert len(expected[1]) == BLOCK
    assert not torch.stack(expected[1]).all()


@pytest.mark.parametrize("step", [1, 3])
def test_after_an_accident(run: Run, step: int) -> None:
    """The next request of the same shapes, in the same session, finds nothing of the first."""
    with focus_compile.session():
        with pytest.raises(Accident):
            decode(run, seed=1, fail_at=step)
        assert_same(decode(run, seed=2), alone(run, seed=2))
    with focus_compile.session():
        with pytest.raises(Accident):
            decode(run, seed=1, fail_at=step)
        assert_same(decode(run, seed=1), alone(run, seed=1))


def test_an_accident_ends_its_session(run: Run) -> None:
    outer = current_session()
    with pytest.raises(Accident), focus_compile.session():
        decode(run, seed=1, fail_at=2)
    assert current_session() is outer is None


def test_nested_sessions(run: Run) -> None:
    """A request inside a session that is in mid-block leaves it as it was."""
    expected = alone(run, seed=1)
    inner: list[tuple[Tensor, list[Tensor]]] = []
    masks: list[Tensor] = []
    with focus_compile.session() as outer:

        def watch() -> None:
            assert outer.retain_mask is not None
            masks.append(outer.retain_mask)
            if len(masks) == 2:
                inner.append(alone(run, seed=2))

        tokens = third_party.generate(
            run.compiled, run.model.config, prompts(1), 1, watch, ONE_BY_ONE
        )
    assert_same((tokens, masks), expected)
    assert_same(inner[0], alone(run, seed=2))
    assert outer.stats.steps == len(expected[1])


def test_threads(run: Run) -> None:
    """Four threads, each with a session and two requests of the same shapes."""
    seeds = [(1, 2), (3, 4), (5, 6), (2, 1)]
    expected = {seed: alone(run, seed) for seed in range(1, 7)}

    def work(pair: tuple[int, int]) -> list[tuple[Tensor, list[Tensor]]]:
        with focus_compile.session():
            return [decode(run, seed) for seed in pair]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, seeds))
    for pair, outcomes in zip(seeds, results, strict=True):
        for seed, outcome in zip(pair, outcomes, strict=True):
            assert_same(outcome, expected[seed])
    assert len({str(tokens.tolist()) for tokens, _ in expected.values()}) == 6


def test_two_models_in_one_session(run: Run) -> None:
    """A request on one model in the middle of a block of another one."""
    other = Run(third_party.polite_model(sizes=Sizes(layers=3), seed=1), run.options, dynamic=True)
    expected = alone(run, seed=1)
    separate = alone(other, seed=1)
    assert not torch.equal(expected[0], separate[0])
    masks: list[Tensor] = []
    second: list[tuple[Tensor, list[Tensor]]] = []
    with focus_compile.session() as focus:

        def watch() -> None:
            assert focus.retain_mask is not None
            masks.append(focus.retain_mask)
            if len(masks) == 2:
                second.append(decode(other, seed=1))

        tokens = third_party.generate(
            run.compiled, run.model.config, prompts(1), 1, watch, ONE_BY_ONE
        )
    assert_same((tokens, masks), expected)
    assert_same(second[0], separate)


def test_generate_in_a_session_in_mid_block(run: Run) -> None:
    """``generate`` opens a session of its own."""

    def generated() -> Generated:
        out = focus_compile.generate(
            run.compiled,
            prompts(3),
            max_new_tokens=BLOCK,
            block_length=BLOCK,
            mask_token_id=MASK,
            return_dict=True,
        )
        return out

    expected = generated()
    with focus_compile.session() as focus:
        with pytest.raises(Accident):
            decode(run, seed=1, fail_at=3)
        steps = focus.stats.steps
        actual = generated()
        assert focus.stats.steps == steps == 3
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.retain_masks), torch.stack(expected.retain_masks))


def states() -> list[BlockState]:
    """Those alive."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is BlockState]


def test_nothing_outlives_a_session(run: Run) -> None:
    """States and slots are alive in mid-block, all but one in the cache; then they die."""
    before = {id(state) for state in states()}  # of other tests that keep an error, with its frames
    layers = run.model.config.num_hidden_layers
    with focus_compile.session() as focus, torch.no_grad():
        denoiser = third_party.Denoiser(run.compiled, run.model.config)
        denoiser.logits(prompts(1), store_kv=True)
        denoiser.logits(torch.full((BATCH, BLOCK), MASK), store_kv=False)
        (state,) = [state for state in states() if id(state) not in before]
        assert len(state.slots) == 2 * layers
        cached = {
            tensor.untyped_storage().data_ptr()
            for layer in denoiser.cache.layers
            for tensor in (layer.keys, layer.values)
        }
        slots = {slot.untyped_storage().data_ptr() for slot in state.slots.values()}
        assert len(slots & cached) == 2 * layers - 1  # the last values: a copy, with marks
        alive = [weakref.ref(state), *(weakref.ref(slot) for slot in state.slots.values())]
        del state, denoiser
        assert all(ref() is not None for ref in alive)
    gc.collect()
    assert all(ref() is None for ref in alive)
    assert focus.stats.steps == 1
    assert focus.retain_mask is None
