"""Through Inductor: twelve named shapes, each with random masks, budgets and states of a block.

Shapes of one setup share their programs; tests/programs/test_compiles.py counts the compiles, and
benchmarks/inductor_grid.py runs the whole grid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from focus_compile.ops.tables import feed
from tests.reference.state import Config
from tests.reference.system import standalone_batch
from tests.support.harness import (
    MASK,
    Call,
    Recorded,
    Run,
    Sizes,
    bound,
    build_model,
    eager_logits,
    random_call,
    retained,
)

SIZES = Sizes(layers=3)
NO_EVICTION, EVICTION, STATES = 3, 5, 9
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Setup:
    """What the programs are compiled for."""

    attention: str
    mask: str | None
    dynamic: bool | None = True
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Shape:
    setup: Setup
    batch: int
    tokens: int
    history: int | None


SDPA, EAGER = Setup("sdpa", "bool"), Setup("eager", "float")
HALF = Setup("sdpa", "float", dtype=torch.bfloat16)
SHAPES = {
    "sdpa": Shape(SDPA, 3, 9, 17),
    "sdpa large batch": Shape(SDPA, 8, 9, 33),
    "sdpa long block": Shape(SDPA, 2, 26, 5),
    "sdpa static": Shape(Setup("sdpa", "bool", dynamic=None), 3, 9, 17),
    "sdpa one row": Shape(SDPA, 1, 9, 17),
    "sdpa no history yet": Shape(SDPA, 3, 9, 0),
    "sdpa whole sequence, no mask": Shape(Setup("sdpa", None), 3, 14, None),
    "eager": Shape(EAGER, 3, 9, 17),
    "eager large batch": Shape(EAGER, 8, 11, 33),
    "eager whole sequence": Shape(EAGER, 3, 14, None),
    "bf16": Shape(HALF, 3, 9, 17),
    "bf16 large batch": Shape(HALF, 8, 11, 33),
}
DRAWS = len(SHAPES) * (NO_EVICTION + EVICTION + STATES)


@functools.cache
def compiled(setup: Setup) -> Run:
    model = build_model(SIZES, setup.attention, setup.dtype)
    return Run(model, inner=None, dynamic=setup.dynamic)


def draw(shape: Shape, seed: int) -> Call:
    setup = shape.setup
    model = compiled(setup).model
    call = random_call(seed, model, shape.batch, shape.tokens, shape.history, setup.mask)
    return call.to(setup.dtype)


@torch.no_grad()
def dense_logits(run: Run, call: Call) -> Tensor:
    """Plain Inductor's logits: the dense program is what it compiles."""
    run.configure(mask_token_id=None)
    before = run.counts()[0]
    logits = run.compiled(**call.kwargs(run.model)).logits
    run.configure(mask_token_id=MASK)
    assert run.counts()[0] == before + 1
    return logits


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


def test_there_are_enough_draws() -> None:
    assert len(SHAPES) >= 12 and DRAWS >= 200


def test_no_eviction(shape: Shape) -> None:
    """Within 1e-5 of eager, and no worse than twice plain Inductor; bf16: 1.25 times eager."""
    run = compiled(shape.setup)
    run.configure(alpha=1e9, visibility="written")
    for seed in range(NO_EVICTION):
        call = draw(shape, seed)
        actual, eager = run.logits(call), eager_logits(run.model, call)
        assert retained(actual).all()
        if shape.setup.dtype == torch.float32:
            error = (actual - eager).abs().max().item()
            plain = (dense_logits(run, call) - eager).abs().max().item()
            assert error <= min(bound(eager), 2 * max(plain, 1e-6))
        else:
            exact = eager_logits(exact_model(shape.setup), call.to(torch.float32))
            allowed = 1.25 * (eager.float() - exact).norm().item()
            assert 0 < (actual.float() - exact).norm().item() <= allowed


@functools.cache
def exact_model(setup: Setup) -> torch.nn.Module:
    """The fp32 model whose weights are those of a half precision one."""
    wide = build_model(SIZES, setup.attention)
    with torch.no_grad():
        for target, source in zip(
            wide.parameters(), compiled(setup).model.parameters(), strict=True
        ):
            target.copy_(source)
    return wide


def test_eviction(shape: Shape) -> None:
    """Retained tokens equal the reference; in bf16 something is evicted, and that is all."""
    run = compiled(shape.setup)
    evicting = 0
    for seed in range(EVICTION):
        visibility = ("written", "prefix")[seed % 2]
        config = Config(alpha=1.0 + 0.2 * seed, visibility=visibility)
        run.configure(alpha=config.alpha, visibility=visibility)
        call = draw(shape, 100 + seed)
        logits = run.logits(call)
        kept = retained(logits)
        evicting += int(not kept.all())
        if shape.setup.dtype != torch.float32:
            continue
        visible = call.visible
        results = standalone_batch(
            run.model, call.ids, call.masked, call.past, call.positions, visible, config
        )
        for row, expected in enumerate(results):
            assert expected.margin >= 1e-5  # none of these draws is a near tie
            assert kept[row].tolist() == expected.retain_mask
            error = (logits[row, expected.retained] - expected.logits).abs().max().item()
            assert error <= TOLERANCE
    assert evicting >= EVICTION - 1


def random_state(values: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same inputs in the middle of a block: averages, progress, slots and fed tokens."""
    generator = torch.Generator().manual_seed(seed)
    masked = values["masked"]
    batch, tokens = masked.shape

    def flags(share: float) -> Tensor:
        return torch.rand(batch, tokens, generator=generator) < share

    tables = feed(masked | flags(0.6))
    other = torch.Generator().manual_seed(seed)  # how many slots there are changes no other draw
    slots = {
        name: torch.randn(value.shape, generator=other).to(value.dtype)
        for name, value in values.items()
        if name.startswith("slots")
    }
    return (
        values
        | slots
        | {
            "fed": tables.fed,
            "fed_tokens": tables.tokens,
            "fed_inverse": tables.inverse,
            "fed_rows": tables.rows,
            "written01": flags(0.7),
            "written": flags(0.5),
            "progress": torch.randint(-1, tokens, (batch,), generator=generator),
            "average": 1 + 3 * torch.rand(batch, generator=generator),
            "alpha": 1 + torch.rand((), generator=generator),
            "prefix_visibility": torch.tensor(bool(seed % 2)),
        }
    )


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(actual[name], value), name
            continue
        error = (actual[name].float() - value.float()).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), name


@torch.no_grad()
def test_states_of_a_block(shape: Shape) -> None:
    """Both programs against their own graphs run eagerly, on random averages, progress, slots."""
    run = compiled(shape.setup)
    program = run.program_of(draw(shape, 7))
    half = shape.setup.dtype != torch.float32
    tolerance = 4 * torch.finfo(torch.bfloat16).eps if half else 1e-5
    fewer = 0
    for seed in range(STATES):
        prefix = Recorded(program.prefix)
        program.prefix = prefix  # type: ignore[assignment]
        try:
            run.logits(draw(shape, 200 + seed))
        finally:
            program.prefix = prefix.program
        values = random_state(prefix.values, seed)
        made = program.prefix(values)
        graph = program.prefix.half
        plain = graph.gm(*[values[name] for name in graph.inputs])
        expected = dict(zip(graph.outputs, plain, strict=True))
        if not half:
            compare(made, expected, tolerance)
        values |= made
        count, most = values["sizes"].tolist()
        values["tokens"] = values["order"][:count]
        values["rows"] = values["places"][:, :most].contiguous()
        fewer += count < int(values["fed"].sum())
        made = program.suffix(values)
        graph = program.suffix.half
        plain = graph.gm(*[values[name] for name in graph.inputs])
        compare(made, dict(zip(graph.outputs, plain, strict=True)), tolerance)
    assert fewer >= STATES // 2
