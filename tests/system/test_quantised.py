"""Models with quantised weights: FOCUS applies, and computes what the eager quantised model does.

A tensor of our own, a module that packs weights into buffers, and torchao's tensors. The latter are
looked at where torchao is installed: ``.ci/run`` puts it beside the environment for this file, for
transformers imports it wherever it finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing._internal.two_tensor import TwoTensor

import focus_compile
from focus_compile.calibrated import fingerprint
from focus_compile.refusals import RETURNS_TENSOR_OF_TENSORS
from tests.reference.emulation import Emulation
from tests.reference.state import Config
from tests.support.dialects import DIALECTS, Draw, Subject, draw_call
from tests.support.harness import MASK, PAPER, retained
from tests.support.quantised import Convert, PackedLinear, Scaled, packed, scaled, small, torchao

QWEN = DIALECTS["sdar-moe-grouped"]
HALF = {"int4"}
OWN: dict[str, Convert] = {
    "scaled": scaled(1),
    "scaled-scales": scaled(2),
    "packed": packed,
}
TORCHAO: dict[str, Convert] = {
    "int8": torchao("Int8WeightOnlyConfig"),
    "int4": torchao("Int4OnCPU", group_size=32, set_inductor_config=False),
    "int4-groups": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "float8": torchao("Float8WeightOnlyConfig"),
}
"""Weights alone: what is computed of tokens stays as precise as it was."""
ROUNDING: dict[str, Convert] = {
    "int8-both": torchao("Int8DynamicActivationInt8WeightConfig"),
    "int4-int8": torchao("Int8DynamicActivationIntxWeightConfig"),
}
"""Each token's features are rounded, too: the last bit of a sum may become a step of 1/127."""
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
pytestmark = pytest.mark.filterwarnings(  # Dynamo makes one to trace an autograd Function
    "ignore:.*should not be instantiated:DeprecationWarning"
)


def ways(*names: str) -> pytest.MarkDecorator:
    """A test of these, each skipped where its package is missing."""
    marks = {name: [] if name in OWN else [needs_torchao] for name in names}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name], id=name) for name in names]
    )


@functools.cache
def subject(name: str, inner: bool = True) -> Subject:
    convert = {**OWN, **TORCHAO, **ROUNDING}[name]
    dtype = torch.bfloat16 if name in HALF else torch.float32

    def build() -> nn.Module:
        model = small(dtype)
        convert(model)
        return model

    dialect = dataclasses.replace(QWEN, build=build)
    return Subject(dialect, dtype=dtype, **({} if inner else {"inner": None}))


def draws(model: Subject, count: int) -> list[Draw]:
    return [
        dataclasses.replace(draw_call(model.dialect, seed), dtype=model.dtype)
        for seed in range(count)
    ]


@ways(*OWN, *TORCHAO, *ROUNDING)
def test_nothing_evicted(name: str) -> None:
    """Operator by operator the same as eager: to the last bit, where sums have one order."""
    model = subject(name)
    plain = Subject(dataclasses.replace(QWEN, build=lambda: small(model.dtype)), dtype=model.dtype)
    for draw in draws(model, 3):
        expected = model.eager(draw)
        assert (plain.eager(draw) - expected).abs().max() > 1e-3  # it is quantised
        with focus_compile.session(alpha=1e9):
            actual = model.focus(draw)
        tolerance = 1e-5 if model.dtype == torch.float32 else 0.02
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@ways(*OWN, *TORCHAO, *ROUNDING)
def test_evicting(name: str) -> None:
    """The tokens that an emulation on the eager quantised model retains, and their logits."""
    model, evicted = subject(name), 0
    for draw in draws(model, 4):
        found = Emulation(Config(1.2)).step(
            lambda d=draw: model.eager(d),  # type: ignore[misc]
            draw.ids,
            draw.masked,
            draw.history,
        )
        with focus_compile.session(alpha=1.2):
            actual = model.focus(draw)
        kept = retained(actual)
        evicted += int((~kept).sum())
        assert torch.equal(kept, found.retained)
        error = (actual - found.logits)[kept].abs()
        if name in ROUNDING:
            assert error.median() < 0.03 and error.max() < 0.3
        else:
            assert error.max() < (1e-4 if model.dtype == torch.float32 else 0.1)
    assert evicted > 10


@ways("scaled", "int8", "int4")
def test_inductor(name: str) -> None:
    """Prefix and suffix compiled, as the dense program is by plain Inductor."""
    model = subject(name, inner=False)
    for draw in draws(model, 2):
        expected = model.eager(draw)
        with focus_compile.session(alpha=1e9):
            actual = model.focus(draw)
        tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
        with focus_compile.session(alpha=1.0):
            assert not retained(model.focus(draw)).all()


@pytest.mark.usefixtures("no_inductor")
@ways("scaled", "int8")
def test_generation(name: str) -> None:
    """Whole answers: with nothing evicted those of the eager model."""
    model = small()
    {**OWN, **TORCHAO}[name](model)
    compiled = focus_compile.compile(model, mask_token_id=MASK, **PAPER)
    ids = torch.randint(0, MASK, (2, 5), generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"max_new_tokens": 12, "mask_token_id": MASK, "block_length": 6}
    expected = focus_compile.generate(model, ids, **given)
    whole = focus_compile.compile(model, mask_token_id=MASK, exact=True)
    assert torch.equal(focus_compile.generate(whole, ids, **given), expected)
    out = focus_compile.generate(compiled, ids, **given, return_dict=True)
    assert out.retained_fraction < 1


@ways("scaled-scales", "packed", "int8", "int4")
def test_bytes(name: str) -> None:
    """Weights count as what is stored: codes, scales and zero points that are read."""
    model = subject(name)
    model.focus(draws(model, 1)[0])
    (cost, plain) = (
        focus_compile.explain(each, **QWEN.arguments(each, draws(model, 1)[0])).graphs[0].cost
        for each in (model.model, small(model.dtype))
    )
    assert cost is not None and plain is not None
    assert cost.dense == plain.dense
    weights = cost.dense_bytes.as_coefficients_dict()[1]
    stored = 0
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            held, _ = _plain(module.weight)
            stored += sum(each.nbytes for each in held)
        elif isinstance(module, PackedLinear):
            stored += sum(each.nbytes for each in module.buffers())
    assert 0 <= stored - weights <= 0.15 * stored  # what is applied behind the product, or unread
    assert weights < 0.75 * plain.dense_bytes.as_coefficients_dict()[1]


def _plain(weight: Tensor) -> tuple[list[Tensor], None]:
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight], None
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(weight, name))[0]], None


@pytest.mark.usefixtures("no_inductor")
def test_a_weight_that_changes() -> None:
    """Its codes are written in mid-block: what was computed with the others is forgotten."""
    model = small()
    scaled(1)(model)
    compiled = torch.compile(model, backend="focus", options={"mask_token_id": MASK, **PAPER})
    draw = draw_call(QWEN, 0)
    with torch.no_grad(), focus_compile.session(alpha=1.0) as focus:
        for step in range(3):
            if step == 2:
                model.model.layers[0].mlp.up_proj.weight.codes.neg_()
            compiled(**QWEN.arguments(model, draw))
        first, second, third = focus.stats.fed_per_step
    assert second < first == third


def test_a_calibration_knows_a_quantised_weight() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    one, two, other = Scaled.of(weight, 2), Scaled.of(weight, 2), Scaled.of(weight + 1, 2)
    assert fingerprint(one) == fingerprint(two)
    assert len({fingerprint(each) for each in (one, other, weight)}) == 3


def test_what_is_refused(tmp_path: Path) -> None:
    """Tensors made of others that are no weights, or that come back."""

    def returning(model: nn.Module) -> None:
        weight = model.lm_head.weight.detach()
        model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)

    def build() -> nn.Module:
        model = small()
        returning(model)
        return model

    draw = draw_call(QWEN, 0)
    with pytest.raises(BackendCompilerFailed, match="the model returns a tensor made of others"):
        Subject(dataclasses.replace(QWEN, build=build)).focus(draw)
    made = build()
    story = focus_compile.explain(made, **QWEN.arguments(made, draw))
    assert [refusal.reason for refusal in story.refusals] == [RETURNS_TENSOR_OF_TENSORS.reason]
    assert not list(story.save(tmp_path).glob("**/*.py"))  # text cannot carry such weights
    scaled(1)(made := small())
    whole = focus_compile.explain(made, **QWEN.arguments(made, draw)).save(tmp_path / "whole")
    assert list(whole.glob("**/*.pt2"))

    def wrapped(model: Any, draw: Draw) -> dict[str, Any]:
        given = QWEN.arguments(model, draw)
        table = torch.eye(64)
        return {**given, "scale": TwoTensor(table, table)}

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        @property
        def config(self) -> Any:
            return self.inner.config

        def forward(self, scale: Tensor, **given: Any) -> Any:
            out = self.inner(**given)
            return out.logits * scale.sum(), scale

    dialect = dataclasses.replace(QWEN, build=Scaling, arguments=wrapped, logits=lambda out: out[0])
    with pytest.raises(BackendCompilerFailed, match="TwoTensor, a tensor made of others, and no"):
        Subject(dialect).focus(draw)
