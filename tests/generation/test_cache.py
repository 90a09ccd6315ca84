"""Keys and values of a generation stay where they are: nothing as large as the history is copied.

Counted by operator, of whatever a call computes or writes that is as large as one layer's keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen3ForCausalLM
from transformers.cache_utils import DynamicLayer

import focus_compile
from focus_compile import Generated
from focus_compile.generation import batch
from focus_compile.generation.batch import CachedBatch
from focus_compile.generation.cache import HeldLayer, hold
from focus_compile.ops import packing
from focus_compile.runtime.executable import Executable
from tests.support.harness import CACHE, MASK, Run, Sizes, build_model

BATCH, BLOCK, PROMPT = 3, 4, 64
SIZES = Sizes(layers=4)
ONE = BATCH * SIZES.groups * PROMPT * SIZES.head_dim
"""Numbers in one layer's keys of the prompt."""
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view")
KERNELS = {"join": packing.join, "store": packing.store}
"""Operators of ours that may move the history; what they call is counted."""


class Traffic(TorchDispatchMode):
    """Numbers that each operator writes into results as large as the history, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Counter[str]]] = []
        self.on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "focus" and func._opname in KERNELS:
            with self:
                return KERNELS[func._opname](*args)
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if not func.is_view and name not in FREE and self.calls:
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor) and value.numel() >= ONE:
                    self.calls[-1][1][name] += value.numel()
        return out


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    """What the programs of a generation write, one entry per call of the model.

    Dynamo compiles nothing under such a mode: it holds within the programs alone.
    """
    mode, stack = Traffic(), ExitStack()

    def call(kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            mode.calls.append((kind, Counter()))
            return inner(*args)

        return counted

    run = Executable._run

    def counted(*args: Any) -> Any:
        if not mode.on:  # programs are compiled
            return run(*args)
        with mode:
            return run(*args)

    with stack:
        for kind in ("peek", "commit"):
            own = getattr(CachedBatch, kind)
            stack.enter_context(mock.patch.object(CachedBatch, kind, call(kind, own)))
        stack.enter_context(mock.patch.object(Executable, "_run", counted))
        yield mode


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return build_model(SIZES)


@pytest.fixture(scope="module")
def run(model: Qwen3ForCausalLM) -> Run:
    return Run(model, dynamic=True)


def generate(model: Any, **given: Any) -> Generated:
    ids = torch.randint(0, MASK, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    out = focus_compile.generate(
        model, ids, max_new_tokens=2 * BLOCK, block_length=BLOCK, mask_token_id=MASK,
        remasking_strategy="fixed", return_dict=True, **given,
    )  # fmt: skip
    assert isinstance(out, Generated)
    return out


def grown() -> Any:
    """Generations over a cache that grows, as of models that are not transformers'."""
    return mock.patch.object(batch, "hold", lambda *_: False)


def counted(run: Run, traffic: Traffic) -> Generated:
    """A generation whose programs are compiled already."""
    traffic.on = False
    generate(run.compiled)
    traffic.on = True
    traffic.calls.clear()
    return generate(run.compiled)


def moved(calls: list[tuple[str, Counter[str]]], kind: str) -> list[float]:
    """History that joins copied in the calls of a kind, in units of all layers' keys and values.

    ``clone`` is how an eager Qwen3 expands its heads, in the dense program.
    """
    layers = 2 * SIZES.layers * ONE
    counted = [counts for name, counts in calls if name == kind]
    assert all(counts.keys() <= {"cat", "clone", "copy_"} for counts in counted)
    return [(counts["cat"] + counts["copy_"]) / layers for counts in counted]


def test_nothing_is_copied(run: Run, traffic: Traffic) -> None:
    """Neither at a block's first step nor when it is stored; over a growing cache, in both."""
    out = counted(run, traffic)
    assert out.focus_steps == 2 * BLOCK
    assert moved(traffic.calls, "peek") == [0] * 2 * BLOCK
    assert moved(traffic.calls, "commit") == [0] * 2
    with grown():
        counted(run, traffic)
    first, second = (moved(traffic.calls, kind) for kind in ("peek", "commit"))
    assert [copied >= 1 for copied in first] == ([True] + [False] * (BLOCK - 1)) * 2
    assert all(copied > 1 for copied in second)


@pytest.mark.parametrize("alpha", [1.1, 1.5])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "focus"])
def test_tokens_are_those_of_a_growing_cache(
    model: Qwen3ForCausalLM, run: Run, compiled: bool, alpha: float
) -> None:
    """The same tokens, retained and decoded in the same steps, with padding and without."""
    used = run.compiled if compiled else model
    mask = torch.ones(BATCH, PROMPT, dtype=torch.int64)
    mask[1, :5] = 0
    calls: list[dict[str, Any]] = [{}, {"attention_mask": mask, "confidence_threshold": 0.1}]
    for given in calls:
        with focus_compile.session(alpha=alpha):
            with grown():
                expected = generate_of(used, **given)
            actual = generate_of(used, **given)
        assert torch.equal(actual.sequences, expected.sequences)
        assert actual.retained_fraction == expected.retained_fraction
        assert actual.focus_steps == expected.focus_steps == compiled * actual.forwards
        for mine, theirs in zip(actual.retain_masks, expected.retain_masks, strict=True):
            assert torch.equal(mine, theirs)
        assert not compiled or actual.retained_fraction < 1


def generate_of(model: Any, **given: Any) -> Generated:
    """Blocks of 9 tokens, more than one retained in a step."""
    ids = torch.randint(0, MASK, (BATCH, PROMPT), generator=torch.Generator().manual_seed(3))
    out = focus_compile.generate(
        model, ids, max_new_tokens=27, block_length=9, mask_token_id=MASK, return_dict=True,
        **given,
    )  # fmt: skip
    assert isinstance(out, Generated)
    return out


def test_what_lies_in_memory_is_not_read(run: Run) -> None:
    """Memory of another request, NaN among it: blocks begin with 0, which nobody sees."""
    expected = generate_of(run.compiled)
    empty = Tensor.new_empty

    def dirty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = empty(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with mock.patch.object(Tensor, "new_empty", dirty):
        layer = HeldLayer(filled(2), 20)
        assert layer.key_slots[:, :, 5:].isnan().all()
        actual = generate_of(run.compiled)
    assert torch.equal(actual.sequences, expected.sequences)


def test_one_graph_serves_all_blocks(model: Qwen3ForCausalLM) -> None:
    """A capture for the prompt, one for blocks of every generation, whatever its length."""
    run = Run(model, dynamic=True)
    for blocks in (1, 3, 2):
        focus_compile.generate(
            run.compiled, torch.full((BATCH, 7 + blocks), 3), max_new_tokens=blocks * BLOCK,
            block_length=BLOCK, mask_token_id=MASK,
        )  # fmt: skip
    assert len(run.executables) == 2
    assert [bool(program.layout.held) for program in run.executables] == [False, True]


def test_as_long_as_a_head_is_wide(model: Qwen3ForCausalLM) -> None:
    """History and block as many as a head has numbers: to Dynamo a number, another graph."""
    torch._dynamo.reset()  # it knows which sizes of a model change, whoever captured it before
    run = Run(model, dynamic=True)
    ids = torch.full((BATCH, SIZES.head_dim - BLOCK), 3)
    with focus_compile.session(exact=True):
        compiled, eager = (
            focus_compile.generate(
                used, ids, max_new_tokens=2 * BLOCK, block_length=BLOCK, mask_token_id=MASK
            )
            for used in (run.compiled, model)
        )
    assert torch.equal(compiled, eager) and run.counts()[1] > 0
    assert [bool(program.layout.held) for program in run.executables] == [False, True, True]


def filled(seed: int, history: int = 5) -> DynamicLayer:
    layer = DynamicLayer()
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, 2, history, 16)
    layer.update(*(torch.randn(shape, generator=generator) for _ in range(2)))
    return layer


def test_a_layer_is_a_growing_one_until_the_next_block() -> None:
    """Sizes, keys and values as ``DynamicLayer`` has them; a block may be written again."""
    plain, held = filled(1), HeldLayer(filled(1), 20)
    new = [torch.randn(BATCH, 2, 4, 16) for _ in range(2)]
    held.open(5, 4)
    assert held.get_seq_length() == plain.get_seq_length() == 5
    assert held.get_mask_sizes(4) == plain.get_mask_sizes(4)
    held.update(*(torch.zeros_like(x) for x in new))
    for mine, theirs in zip(held.update(*new), plain.update(*new), strict=True):
        assert torch.equal(mine, theirs)
    assert held.keys is not None and held.keys.data_ptr() == held.key_slots.data_ptr()
    held.open(9, 4)
    assert held.get_seq_length() == plain.get_seq_length() == 9
    assert held.keys.shape[2] == 13 < held.key_slots.shape[2]


def test_other_layers_are_left_alone() -> None:
    """A cache with a layer of another kind stays what it is, the whole of it."""

    class Other(DynamicLayer):
        pass

    layers = [filled(1), Other()]
    assert not hold(layers, 20) and type(layers[0]) is DynamicLayer
    assert hold(layers[:1], 20)
    assert not hold([DynamicLayer()], 20)  # nothing was stored in it


def test_a_model_that_stores_nothing(model: Qwen3ForCausalLM) -> None:
    """It is told what such a model needs."""
    forward = model.forward

    def without_cache(*args: Any, **kwargs: Any) -> Any:
        stored = ("cache", "past_key_values", "use_cache")
        given = {name: value for name, value in kwargs.items() if name not in stored}
        return forward(*args, **given, use_cache=False)

    with mock.patch.object(model, "forward", without_cache):
        with pytest.raises(ValueError, match=r"left the cache.*generate\(use_cache=False\)"):
            generate(model)


def test_an_own_loop_runs_dense(
    model: Qwen3ForCausalLM, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a cache outside of generate: the caller may write into it between steps."""
    cache = DynamicCache(config=model.config)
    cache.layers = [filled(seed, 5) for seed in range(SIZES.layers)]
    assert hold(cache.layers, 20)
    for layer in cache.layers:
        layer.open(5, BLOCK)  # type: ignore[attr-defined]
    given: dict[str, Any] = {
        "input_ids": torch.full((BATCH, BLOCK), MASK),
        "attention_mask": torch.ones(BATCH, 1, BLOCK, 5 + BLOCK, dtype=torch.bool),
        "position_ids": torch.arange(5, 5 + BLOCK).expand(BATCH, -1).clone(),
        "use_cache": True,
        CACHE: cache,
    }
    before = run.counts()
    with torch.no_grad(), focus_compile.session(alpha=1.1) as focus:
        logits = run.compiled(**given).logits
        expected = model(**given).logits
    assert torch.equal(logits, expected)
    assert run.counts()[1:] == before[1:]
    assert focus.stats.masked_dense == 1
    assert "writes keys and values into a part of a cache" in caplog.text
