"""A model, or the process around it, changes between two calls."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import register_backend
from torch.fx import GraphModule
from transformers import Qwen3ForCausalLM

import focus_compile
from focus_compile import NotCompiled, focus_backend
from tests.faults.steps import ALPHA, Steps, first_call, new_run, same
from tests.reference.state import Config
from tests.reference.system import standalone_batch
from tests.support.harness import (
    MASK,
    PAPER,
    Call,
    Run,
    Sizes,
    bound,
    build_model,
    eager_inner,
    eager_logits,
    retained,
)

Change = Callable[[Run], None]


def check_reference(model: Qwen3ForCausalLM, call: Call, logits: Tensor) -> None:
    """What the reference retains and computes, with something evicted."""
    kept = retained(logits)
    assert not kept.all()
    results = standalone_batch(
        model, call.ids, call.masked, call.past, call.positions, call.visible, Config(alpha=ALPHA)
    )
    for row, result in enumerate(results):
        assert kept[row].tolist() == result.retain_mask
        assert (logits[row, result.retained] - result.logits).abs().max() <= bound(result.logits)


def check_eager(run: Run, call: Call) -> None:
    """Eager's logits where nothing is evicted."""
    run.configure(alpha=1e9)
    expected = eager_logits(run.model, call)
    assert (run.logits(call) - expected).abs().max() <= bound(expected)
    run.configure(alpha=ALPHA)


def check(run: Run, call: Call) -> None:
    """A call without a session: eager's logits if nothing is evicted, else the reference's."""
    check_eager(run, call)
    check_reference(run.model, call, run.logits(call))


def write_weights(run: Run) -> None:
    """In place: an optimiser's step, ``load_state_dict``."""
    for parameter in run.model.parameters():
        parameter.mul_(1.05)


def replace_data(run: Run) -> None:
    """The same parameters in other memory: what ``module.to`` does."""
    for parameter in run.model.parameters():
        parameter.data = parameter.data * 1.05


def replace_parameters(run: Run) -> None:
    """Other parameters: ``setattr``, or ``load_state_dict(assign=True)``."""
    state = {name: value * 1.05 for name, value in run.model.state_dict().items()}
    run.model.load_state_dict(state, assign=True)


CHANGES: list[Change] = [write_weights, replace_data, replace_parameters]


class Inner:
    """An inner compiler: graphs as they are, but with an error the next one raises it."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return graph


@pytest.fixture(scope="module")
def inner() -> Inner:
    return Inner()


@pytest.fixture(scope="module")
def run(inner: Inner) -> Run:
    return new_run(inner=inner)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights(run: Run, change: Change) -> None:
    """The next call has the new ones; nothing is captured anew."""
    call = first_call(run)
    before = run.logits(call)
    graphs = len(run.executables)
    change(run)
    check(run, call)
    assert len(run.executables) == graphs
    assert not same(run.logits(call), before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_in_mid_block(run: Run, change: Change) -> None:
    """Keys and values of the old weights are not mixed with new ones: the block starts anew."""
    steps = Steps.of(run)
    with focus_compile.session():
        run.logits(steps.calls[0])
        change(run)
        after = run.logits(steps.calls[1])
    with focus_compile.session():
        fresh = run.logits(steps.calls[1])
    assert same(after, fresh)


def test_another_dtype_in_mid_block(run: Run) -> None:
    """Slots of another dtype are nobody's; the first programs serve again afterwards."""
    steps, graphs = Steps.of(run), len(run.executables)
    with focus_compile.session():
        run.logits(steps.calls[0])
        run.model.to(torch.float64)
        after = run.logits(steps.calls[1].to(torch.float64))
    assert after.dtype == torch.float64 and len(run.executables) == graphs + 1
    assert torch.equal(retained(after), retained(steps.fresh))
    assert (after - steps.fresh).abs().max() <= bound(steps.fresh)
    run.model.to(torch.float32)
    assert torch.equal(run.logits(steps.calls[0]), steps.first)
    assert len(run.executables) == graphs + 1


def test_reset_in_mid_block(run: Run, inner: Inner) -> None:
    """Programs are made anew, at the second attempt; the session's block goes on."""
    steps, graphs = Steps.of(run), len(run.executables)
    with focus_compile.session():
        run.logits(steps.calls[0])
        torch.compiler.reset()
        inner.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run.logits(steps.calls[1])
        assert same(run.logits(steps.calls[1]), steps.second)
    assert len(run.executables) == graphs + 1


@pytest.mark.parametrize(
    ("half", "kind", "args"),
    [("prefix", RuntimeError, ("no",)), ("suffix", OSError, (28, "No space left on device"))],
)
def test_a_half_that_does_not_compile(
    run: Run, inner: Inner, half: str, kind: type[Exception], args: tuple[Any, ...]
) -> None:
    """One error that names it; the dense program does not stand in for it."""
    call, error = first_call(run), kind(*args)
    program = getattr(run.program_of(call), half)
    program.compiled, inner.error = None, error
    dense = run.counts()[0]
    with pytest.raises(NotCompiled, match=f"^the {half} was not compiled, ") as caught:
        run.logits(call)
    assert str(caught.value).endswith(f": {kind.__name__}: {error}")
    assert caught.value.__cause__ is error and caught.value.program == half
    assert run.counts()[0] == dense and program.compiled is None
    check(run, call)


@pytest.mark.parametrize(
    ("half", "kind"), [("prefix", KeyboardInterrupt), ("suffix", torch.OutOfMemoryError)]
)
def test_a_compiler_is_interrupted(
    run: Run, inner: Inner, half: str, kind: type[BaseException]
) -> None:
    """The error is the caller's own; the next call compiles."""
    call, error = first_call(run), kind("out of memory")
    program = getattr(run.program_of(call), half)
    program.compiled, inner.error = None, error
    with pytest.raises(kind) as caught:
        run.logits(call)
    assert caught.value is error
    check(run, call)


def halve(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out * 0.5


def mix(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out - out.mean(1, keepdim=True)


def test_hooks(run: Run) -> None:
    """Traced as part of the model; what they keep is on the canvas, 0 where evicted.

    Dynamo looks for hooks that come later if it is told to, else at the next capture, as with
    every backend.
    """
    call = first_call(run)
    mlp = run.model.model.layers[2].mlp
    before = run.logits(call)
    seen: list[Tensor] = []
    hooks = [mlp.register_forward_hook(halve)]
    assert torch.equal(run.logits(call), before)
    hooks.append(mlp.register_forward_hook(lambda _, args, out: seen.append(out)))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        torch.compiler.reset()
        check_eager(run, call)
        seen.clear()
        logits = run.logits(call)
        (hidden,) = seen
        assert hidden.shape[:2] == call.ids.shape
        assert torch.equal(retained(hidden), retained(logits)) and not retained(logits).all()
        for hook in hooks:
            hook.remove()
        assert same(run.logits(call), before) and not same(logits, before)


def test_a_hook_that_mixes_tokens(run: Run) -> None:
    """Evicted tokens would be missing in its mean: refused, with the module's name."""
    call = first_call(run)
    hook = run.model.model.layers[2].mlp.register_forward_hook(mix)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"mixes tokens outside attention .*model\.layers\.2\.mlp"):
        run.logits(call)
    hook.remove()
    check_eager(run, call)


def in_child(work: Callable[[], bool]) -> bool:
    """What the work gives in a fork of this process."""
    child = os.fork()
    if child == 0:
        done = False
        try:
            done = work()
        finally:
            os._exit(0 if done else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("anew", [False, True])
def test_fork_in_mid_block(run: Run, anew: bool) -> None:
    """Child and parent each go on with the block; the child may compile the suffix itself."""
    steps = Steps.of(run)
    program = run.program_of(steps.calls[0])
    with focus_compile.session():
        run.logits(steps.calls[0])

        def work() -> bool:
            if anew:
                program.suffix.compiled = None
            return same(run.logits(steps.calls[1]), steps.second)

        assert in_child(work)
        assert not in_child(lambda: False)
        assert same(run.logits(steps.calls[1]), steps.second)


@register_backend
def focus_without_inductor(gm: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """By name, since that is what can be pickled."""
    return focus_backend(gm, inputs, inner=eager_inner, **options)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_of_a_compiled_model(how: str) -> None:
    """Weights and options are copied, programs are not; blocks of the two are separate."""
    options = {"mask_token_id": MASK, "alpha": ALPHA, "strict": True, **PAPER}
    model = build_model(Sizes(layers=3))
    compiled = torch.compile(model, backend="focus_without_inductor", options=options)
    other = pickle.loads(pickle.dumps(compiled)) if how == "pickle" else copy.deepcopy(compiled)
    call = first_call(Run(model))
    check_reference(model, call, other(**call.kwargs(model)).logits)
    for parameter in model.parameters():
        parameter.zero_()
    assert other(**call.kwargs(model)).logits.any()
    assert not compiled(**call.kwargs(model)).logits.any()
