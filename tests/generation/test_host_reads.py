"""How often the host waits for a device in a denoising step: five times, six, or ten with a rescue.

Counted on the CPU by what would wait on a GPU: a number that is read, a tensor made of numbers, the
positions of a mask. ``tests/gpu/test_waits.py`` asks a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import Qwen3ForCausalLM

import focus_compile
from focus_compile.generation.batch import CachedBatch
from focus_compile.runtime.executable import Executable
from tests.support.harness import MASK, Run, build_model, random_call

WAITS = {"_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "masked_select"}


class Waits(TorchDispatchMode):
    """Counts what waits, where it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in WAITS or masks:
            self.seen["bool index" if masks else name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def everywhere(self, stack: ExitStack) -> Iterator[None]:
        """Around a loop; off where Dynamo looks for a graph, on again in its program."""
        run, forward, listed = Executable._run, CachedBatch.forward, Tensor.tolist

        def inside(*args: Any) -> Any:
            with self:
                return run(*args)

        def outside(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return forward(*args, **kwargs)

        def tolist(x: Tensor) -> Any:
            self.seen["tolist"] += 1
            with _disable_current_modes():
                return listed(x)

        stack.enter_context(mock.patch.object(Executable, "_run", inside))
        stack.enter_context(mock.patch.object(CachedBatch, "forward", outside))
        stack.enter_context(mock.patch.object(Tensor, "tolist", tolist))
        with self:
            yield


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return build_model()


@pytest.fixture(scope="module")
def run(model: Qwen3ForCausalLM) -> Run:
    return Run(model, dynamic=True)


def generate(model: Any, steps: int, **settings: Any) -> focus_compile.Generated:
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(0))
    out = focus_compile.generate(
        model, ids, max_new_tokens=12, block_length=12, mask_token_id=MASK,
        remasking_strategy="fixed", denoising_steps=steps, return_dict=True, **settings,
    )  # fmt: skip
    assert isinstance(out, focus_compile.Generated) and out.forwards >= steps
    return out


def of_a_generation(model: Any, steps: int, **settings: Any) -> tuple[int, Counter[str]]:
    waits = Waits()
    with ExitStack() as stack, waits.everywhere(stack):
        out = generate(model, steps, **settings)
    return out.forwards, waits.seen


def test_a_step_of_generate(run: Run) -> None:
    """By the difference between a generation of few steps and one of many.

    The loop: whether masks are left, where they are. A call: whether a block is new and whether
    what was decoded had been retained; the fed tokens; N and R.
    """
    with focus_compile.session(exact=True):  # every mask may be decoded
        generate(run.compiled, 3)
        few, before = of_a_generation(run.compiled, 3)
        many, after = of_a_generation(run.compiled, 12)
    assert run.counts()[1] > 12 and many == few + 9 == 12
    steps = {name: (after[name] - before[name]) / (many - few) for name in after}
    assert {name: count for name, count in steps.items() if count} == {
        "_local_scalar_dense": 1, "nonzero": 1, "tolist": 3,
    }  # fmt: skip


@pytest.mark.parametrize(("gate", "most"), [(None, 5), (0.0, 6), (1.0, 10)])
def test_a_step_that_may_rescue(run: Run, gate: float | None, most: int) -> None:
    """One more: whether a row is in need. Where one is: which, N and R of the second call, counts.

    A generation's last steps evict nothing, and ask for less.
    """
    waits = []
    for steps in (6, 12):
        generate(run.compiled, steps, rescue=gate)
        forwards, seen = of_a_generation(run.compiled, steps, rescue=gate)
        waits.append(seen.total())
        assert forwards == steps
    assert most - 1 < (waits[1] - waits[0]) / 6 <= most


def test_a_step_of_an_own_loop(run: Run) -> None:
    """A call whose masks the caller does not know asks for them: four reads."""
    call = random_call(1, run.model, 3, 9, 17)
    with torch.no_grad(), focus_compile.session():
        run.logits(call)  # compiled, and what settings are as tensors
        waits = Waits()
        run_inside = Executable._run

        def counted(*args: Any) -> Any:
            with waits:
                return run_inside(*args)

        with mock.patch.object(Executable, "_run", counted):
            run.logits(call)
    # tolist reads numbers one by one on a CPU: 2 for the block, 2 for the fed, 2 for the retained
    assert set(waits.seen) <= {"_local_scalar_dense", "lift_fresh"}
    assert waits.seen["lift_fresh"] == 0


def test_settings_that_change_are_noticed(run: Run) -> None:
    """Numbers are kept as tensors until they are others: alpha, weights, visibility."""
    call = random_call(2, run.model, 3, 9, 17)
    found = []
    for alpha in (1.1, 3.0, 1.1):
        with focus_compile.session(alpha=alpha) as focus:
            run.logits(call)
            assert focus.retain_mask is not None
            found.append(focus.retain_mask)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
