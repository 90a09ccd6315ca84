"""Tests of a mask's values in the middle of a model: read before the graph, numbers as before."""

from __future__ import annotations

import ast
import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile.adapters.adaptation import adaptation
from focus_compile.adapters.filled import filled_tests
from focus_compile.adapters.source import read
from tests.support.toy import VOCAB, Toy

MASK = VOCAB - 1
IDS = torch.arange(19)[None].expand(2, -1).contiguous() % 7
IDS[:, 9:] = MASK

pytestmark = pytest.mark.usefixtures("no_inductor")


class Contains(Toy):
    """As LLaDA asks after the embedding whether a row is padded."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        if attention_mask is not None and 0.0 in attention_mask:
            attention_mask = attention_mask.to(x.dtype)
            x = x * attention_mask.unsqueeze(-1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Inner(nn.Module):
    """A layer that asks, as SDAR's do, whether anything is hidden at all."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        attention_mask = attention_mask.bool() if attention_mask is not None else None
        if torch.all(attention_mask):
            return self.layer(x)
        else:
            return self.layer(x.masked_fill(~attention_mask.unsqueeze(-1), 0.5))  # type: ignore


class Layered(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inner(layer) for layer in self.layers)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask=attention_mask)
        return self.head(x)


class Counted(Toy):
    """Whose method goes on to that of its parent, and asks in another way."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        scale = 1.0 if not (attention_mask == 0).any() else 0.5  # type: ignore[union-attr]
        return super().forward(ids) * scale


class _Private(Toy):
    """As LLaDA's model does, it keeps tables under a name that Python changes, and names itself."""

    def __init__(self) -> None:
        super().__init__()
        self.__tables: dict[str, float] = {}

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None and 0.0 in attention_mask:
            scale = self.__tables.setdefault("half", 0.5)
        else:
            scale = _Private.__whole()
        return super().forward(ids) * scale

    @staticmethod
    def __whole() -> float:
        return 1.0


def masks() -> list[Tensor]:
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    return [torch.ones_like(IDS), padded, padded.bool(), torch.ones_like(IDS).float()]


@torch.no_grad()
@pytest.mark.parametrize("kind", [Contains, Layered, Counted, _Private])
@pytest.mark.parametrize("in_place", [False, True])
def test_numbers(kind: type[Toy], in_place: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One graph for each answer, FOCUS in both, the numbers of the untouched model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = kind().eval()
    eager = copy.deepcopy(model)
    caplog.set_level(logging.INFO, logger="focus_compile")
    options = {"mask_token_id": MASK, "strict": True, "in_place": in_place}
    compiled = focus_compile.compile(model, **options)
    said = [text for text in caplog.messages if text.startswith("adapted ")]
    assert said and all("`attention_mask`" in text and "test_filled.py:" in text for text in said)
    for mask in masks():
        with focus_compile.session(exact=True) as focus:
            made = compiled(IDS, attention_mask=mask)
        assert focus.stats.steps == 1
        torch.testing.assert_close(made, eager(IDS, attention_mask=mask), rtol=0, atol=1e-6)
        assert not vars(mask)
    if not in_place:
        assert type(model) is kind
    assert {type(layer) for layer in model.layers} == {type(layer) for layer in eager.layers}


@torch.no_grad()
@pytest.mark.parametrize("kind", [Contains, Layered])
def test_it_can_be_forbidden(kind: type[Toy], caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = kind().eval()
    caplog.set_level(logging.INFO, logger="focus_compile")
    compiled = focus_compile.compile(model, mask_token_id=MASK, adapt=False)
    with focus_compile.session(exact=True) as focus:
        made = compiled(IDS, attention_mask=masks()[0])
    assert focus.stats.steps == 0 and torch.equal(made, model(IDS, masks()[0]))
    assert not [text for text in caplog.messages if text.startswith("adapted ")]


@torch.no_grad()
def test_explain_names_the_cure() -> None:
    """Dynamo runs the function eagerly, and no graph ends there: the line is told all the same."""
    torch._dynamo.reset()
    story = focus_compile.explain(Contains().eval(), IDS, attention_mask=masks()[0])
    (broke,) = story.skipped
    assert story.breaks == [broke] and not story.applied and broke.reason
    assert "0.0 in attention_mask" in broke.line
    assert "focus_compile.compile(model)" in (broke.remedy or "")
    text = " ".join(str(story).split())
    assert "Dynamo ran a function eagerly" in text and "focus_compile.compile(model)" in text
    assert story.to_dict()["skipped"][0]["line"] == broke.line


@torch.no_grad()
def test_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """The bare line, inside ``adapt``; behind it the model is as it was."""
    torch._dynamo.reset()
    model = Layered().eval()
    before = [type(module) for module in model.modules()]
    hooks = len(model._forward_pre_hooks)
    for mask in masks()[:2]:
        expected = model(IDS, attention_mask=mask)
        with focus_compile.adapt(model) as adapted:
            assert adapted is model and isinstance(model.layers[0], Inner)
            assert type(model.layers[0]) is not Inner
            compiled: Any = torch.compile(
                model, backend="focus", options={"mask_token_id": MASK, "strict": True}
            )
            with focus_compile.session(exact=True) as focus:
                made = compiled(IDS, attention_mask=mask)
            assert focus.stats.steps == 1
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.layers[0]))):
                assert Inner in {type(module) for module in other.modules()}
            assert torch.equal(model(IDS, mask), expected)  # eager
        assert [type(module) for module in model.modules()] == before
        assert len(model._forward_pre_hooks) == hooks and not vars(mask)


@torch.no_grad()
def test_a_mask_that_is_written() -> None:
    """Its values were read before the model wrote it: an error, and no wrong number in silence."""

    class Writes(Contains):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            attention_mask[:, 0] = 1
            if torch.all(attention_mask):
                ids = ids + 1
            return super().forward(ids)

    torch._dynamo.reset()
    compiled = focus_compile.compile(Writes().eval(), mask_token_id=MASK)
    with pytest.raises(
        RuntimeError, match=r"the model wrote into a mask whose values it tests.*adapt=False"
    ):
        compiled(IDS, attention_mask=masks()[1].clone())


def assigned(mask: Any, x: Any) -> Any:
    mask = x > 0
    return 1 if torch.all(mask) else 2


def looped(mask: Any, x: Any) -> Any:
    for _ in range(3):
        if mask.all():
            x = x + 1
        mask = mask[1:]
    return x


def local(x: Any) -> Any:
    mask = x > 0
    return 1 if mask.all() else 2


def value(mask: Any) -> Any:
    return mask.all()


def along(mask: Any) -> Any:
    return 1 if mask.all(-1) else 2


def nested(mask: Any) -> Any:
    return [1 if mask.all() else 2 for mask in mask]


def other(mask: Any) -> Any:
    return 1 if 1.0 in mask else 2


@pytest.mark.parametrize("function", [assigned, looped, local, value, along, nested, other])
def test_what_is_left_alone(function: Callable[..., Any]) -> None:
    method = read(function)
    assert method is not None and filled_tests(method) is None


def contained(mask: Any) -> Any:
    return 1 if 0 in mask else 2


def absent(mask: Any) -> Any:
    assert 0.0 not in mask and mask is not None
    return mask


def item(mask: Any) -> Any:
    return 1 if not bool(mask.bool().all().item()) else 2


def zeros(mask: Any) -> Any:
    if torch.any(mask == 0):
        return 1
    return 2


@pytest.mark.parametrize("function", [contained, absent, item, zeros])
def test_what_is_replaced(function: Callable[..., Any]) -> None:
    method = read(function)
    assert method is not None
    found = filled_tests(method)
    assert found is not None and found[1] == {"mask"}
    assert "_focus_filled" in ast.unparse(found[0])


def test_a_private_name_of_another_class() -> None:
    """A function that says it stands in a class where it does not: its names would be others."""

    def forward(self: Any, mask: Any) -> Any:
        return self.__tables if mask.all() else 2

    assert read(forward) is not None
    forward.__qualname__ = "Other.forward"
    assert read(forward) is None


def test_nothing_to_adapt() -> None:
    assert adaptation(Toy()).classes == []
