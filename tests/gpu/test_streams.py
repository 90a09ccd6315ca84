"""Sessions side by side: two threads, each on a stream of its own, and two taking turns."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import focus_compile
from tests.gpu.where import Where
from tests.support.harness import MASK, Run, Sizes, build_model, random_call, retained

ALPHAS = (1.1, 2.5)


@pytest.fixture(scope="module")
def run(where: Where) -> Run:
    """One compiled model for all sessions."""
    return Run(build_model(Sizes(layers=3)).to(where.device), {}, where.inner, dynamic=True)


def generated(run: Run, where: Where, seed: int) -> Tensor:
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(seed))
    with focus_compile.session(alpha=ALPHAS[seed % 2]):
        out = focus_compile.generate(
            run.compiled, ids.to(where.device), max_new_tokens=22, block_length=11,
            mask_token_id=MASK, confidence_threshold=0.2,
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.cpu()


def test_two_threads_on_two_streams(run: Run, where: Where) -> None:
    seeds = range(where.draws(8, 2))
    expected = [generated(run, where, seed) for seed in seeds]

    def on_stream(seed: int) -> Tensor:
        with where.stream():
            return generated(run, where, seed)

    where.wait()
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(on_stream, seeds))
    assert all(map(torch.equal, made, expected))


def test_two_sessions_in_turns_on_two_streams(run: Run, where: Where) -> None:
    """Steps of two blocks alternate in one thread; each session keeps to its own."""
    steps = 3
    calls = [random_call(seed, run.model, 3, 9, 17) for seed in range(2)]

    def sessions(turns: bool) -> list[list[Tensor]]:
        contexts = [contextvars.copy_context() for _ in calls]
        opened = [focus_compile.session(alpha=alpha) for alpha in ALPHAS]
        streams = [where.stream() for _ in calls]
        out: list[list[Tensor]] = [[], []]
        for context, scope in zip(contexts, opened, strict=True):
            context.run(scope.__enter__)
        order = [0, 1] * steps if turns else [0] * steps + [1] * steps
        where.wait()
        for which in order:
            with streams[which]:
                logits = contexts[which].run(step, which, len(out[which]))
                out[which].append(logits.clone())
        where.wait()
        for context, scope in zip(contexts, opened, strict=True):
            context.run(scope.__exit__, None, None, None)
        return out

    @torch.no_grad()
    def step(which: int, index: int) -> Tensor:
        """The next step of a block: a retained token of each row is decoded before it."""
        call = calls[which]
        arguments = {name: moved(x, where.device) for name, x in call.kwargs(run.model).items()}
        ids = arguments.pop("input_ids")
        for before, decoded in enumerate(picked[which][:index]):
            ids = torch.where(decoded, 1 + before, ids)
        logits: Tensor = run.compiled(input_ids=ids, **arguments).logits
        if index == len(picked[which]):
            free = retained(logits) & (ids == MASK)
            picked[which].append(free & (free.cumsum(1) == 1))
        return logits

    picked: list[list[Tensor]] = [[], []]
    apart, mixed = sessions(turns=False), sessions(turns=True)
    for left, right in zip(apart, mixed, strict=True):
        for actual, expected in zip(right, left, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
            assert not retained(expected).all()


def moved(value: Any, device: str) -> Any:
    """An argument of a call on a device, its cache included."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, DynamicCache):
        layers: list[Any] = value.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
    return value
