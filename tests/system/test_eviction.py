"""With eviction: 200 random configurations against the eager reference, and nothing else read."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import focus_compile
from focus_compile.ops.library import focus
from focus_compile.programs.program import Program
from tests.reference.state import Config, StepResult, Visibility
from tests.reference.system import standalone_batch
from tests.support.harness import (
    Call,
    Recorded,
    Run,
    Sizes,
    build_model,
    eager_logits,
    random_call,
    random_masked,
    retained,
)

DRAWS = 25
TOLERANCE = 1e-4
NEAR_TIE = 1e-5


@dataclass(frozen=True)
class Setup:
    """A model, and what its calls have in common; batch and lengths vary if they are dynamic."""

    attention: str
    mask: str | None
    cache: bool
    sizes: Sizes = field(default_factory=Sizes)
    batch: int | None = None


SETUPS = {
    "sdpa-cache-bool": Setup("sdpa", "bool", True),
    "sdpa-cache-float": Setup("sdpa", "float", True, Sizes(layers=3, heads=4, groups=4)),
    "sdpa-cache-none": Setup("sdpa", None, True, Sizes(layers=5)),
    "sdpa-whole-bool": Setup("sdpa", "bool", False, Sizes(heads=5, groups=1, head_dim=14)),
    "sdpa-one-row": Setup("sdpa", "bool shared", True, batch=1),
    "eager-cache-float": Setup("eager", "float", True, Sizes(heads=8)),
    "eager-cache-none": Setup("eager", None, True, Sizes(layers=3)),
    "eager-whole-shared": Setup("eager", "float shared", False, Sizes(head_dim=10)),
}


@dataclass
class Tally:
    """Rows and near ties among them; draws, and those where eviction moved a retained logit."""

    rows: int = 0
    near_ties: int = 0
    draws: int = 0
    moved: int = 0


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    assert tally.near_ties <= tally.rows // 100
    assert tally.moved >= 0.9 * tally.draws


@pytest.fixture(scope="module", params=SETUPS, ids=list(SETUPS))
def case(request: pytest.FixtureRequest) -> tuple[Setup, Run]:
    setup = SETUPS[request.param]
    return setup, Run(build_model(setup.sizes, setup.attention), dynamic=True)


def draw_masked(generator: torch.Generator, batch: int, tokens: int) -> Tensor:
    """Different numbers of masked tokens; now and then decoded tokens right of them, or none."""
    masked = random_masked(generator, batch, tokens)
    if batch > 1 and torch.rand((), generator=generator) < 0.4:
        masked[-1] = False
    masked[0, : 2 * tokens // 3] = True
    masked[0, -1] = bool(torch.rand((), generator=generator) < 0.5)
    return masked


def draw_call(setup: Setup, run: Run, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    batch, tokens, history = setup.batch or pick(2, 6), pick(5, 14), pick(2, 20)
    run.configure(
        alpha=1.0 + 1.5 * float(torch.rand((), generator=generator)),
        visibility=("written", "prefix")[pick(0, 2)],
    )
    masked = draw_masked(generator, batch, tokens)
    length = history if setup.cache else None
    return random_call(seed, run.model, batch, tokens, length, setup.mask, masked)


def evicting_call(setup: Setup, run: Run, draw: int) -> tuple[Call, Tensor]:
    """The first call from this draw on that evicts something, with its logits."""
    for attempt in range(20):
        call = draw_call(setup, run, seed=1000 * attempt + draw)
        with focus_compile.session():
            logits = run.logits(call)
        if not retained(logits).all():
            return call, logits
    raise AssertionError("twenty calls evicted nothing")


def reference(run: Run, call: Call, model: Qwen3ForCausalLM | None = None) -> list[StepResult]:
    visibility: Visibility = run.options["visibility"]
    config = Config(alpha=run.options["alpha"], visibility=visibility)
    visible = call.visible
    if visible is not None:
        visible = visible.expand(len(call.ids), *visible.shape[1:])
    return standalone_batch(
        model or run.model, call.ids, call.masked, call.past, call.positions, visible, config
    )


def is_near_tie(run: Run, call: Call, row: int) -> bool:
    """Whether an fp64 recomputation finds the row's selection within NEAR_TIE of another one."""
    wide = call.to(torch.float64)
    model = copy.deepcopy(run.model).double()
    return reference(run, wide, model)[row].margin < NEAR_TIE


@pytest.mark.parametrize("draw", range(DRAWS))
def test_equals_the_reference(case: tuple[Setup, Run], draw: int, tally: Tally) -> None:
    setup, run = case
    call, logits = evicting_call(setup, run, draw)
    kept = retained(logits)
    assert 0 < int(kept.sum()) < kept.numel()
    for row, expected in enumerate(reference(run, call)):
        tally.rows += 1
        if kept[row].tolist() != expected.retain_mask:
            assert is_near_tie(run, call, row)
            tally.near_ties += 1
            continue
        error = (logits[row, expected.retained] - expected.logits).abs().max().item()
        assert error <= TOLERANCE
    dense = eager_logits(run.model, call)
    tally.draws += 1
    tally.moved += bool((logits - dense)[kept].abs().max() > TOLERANCE)


def fed_inputs(program: Program) -> dict[str, int]:
    """Inputs of a suffix that hold one row per fed token, with their token dim."""
    found: dict[str, int] = {}
    for node in program.half.gm.graph.nodes:
        if node.op == "placeholder":
            for user in node.users:
                if user.target is focus.repack.default and user.args[0] is node:
                    found[node.name] = user.args[3]
                if user.target is focus.attend.default and user.args[0] is node:
                    found[node.name] = 2
    return found


def poisoned(values: dict[str, Tensor], dims: dict[str, int], rows: Tensor) -> dict[str, Tensor]:
    """The same inputs with NaN in some rows of the packed ones."""
    out = dict(values)
    for name, dim in dims.items():
        out[name] = values[name].index_fill(dim, rows, float("nan"))
    return out


@pytest.mark.parametrize("visibility", ["written", "prefix"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_evicted_tokens_are_not_read(attention: str, visibility: str) -> None:
    """NaN in every evicted row of the cut, and in every unwritten slot, changes no bit."""
    run = Run(build_model(attention=attention), {"visibility": visibility, "alpha": 1.2})
    batch, tokens, history = 3, 11, 7
    call = random_call(5, run.model, batch, tokens, history, "float")
    run.logits(call)
    (program,) = run.executables
    suffix = Recorded(program.suffix)
    program.suffix = suffix  # type: ignore[assignment]
    kept = retained(run.logits(call))
    values, dims = suffix.values, fed_inputs(suffix.program)
    assert len(dims) >= 2  # the residual and the queries, at least
    assert all(values[name].shape[dim] == batch * tokens for name, dim in dims.items())
    slots = {name for name in values if name.startswith("slots")}
    assert len(slots & set(suffix.program.half.inputs)) == 2 * (
        run.model.config.num_hidden_layers - 2
    )
    expected = suffix.program(values)

    rows = (~kept).flatten().nonzero().flatten()
    assert len(rows) > 0
    changed = poisoned(values, dims, rows)
    changed |= {name: torch.full_like(values[name], float("nan")) for name in slots}
    actual = suffix.program(changed)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name

    one = kept.flatten().nonzero().flatten()[:1]
    spoiled = suffix.program(poisoned(values, dims, one))
    own = [value.name for value in program.halves.own if value is not None]
    assert any(spoiled[name].isnan().any() for name in own if name in spoiled)
