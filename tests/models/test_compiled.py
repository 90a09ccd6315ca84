"""A model's own methods run its compiled forward: a twin's, or the model's own, for a while."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile.entry import LIMIT
from focus_compile.models.compiled import backend_of, original
from focus_compile.runtime.session import BYPASSED
from tests.support.toy import VOCAB, Toy

MASK = VOCAB - 1
IDS = torch.arange(11)[None] % 7

pytestmark = pytest.mark.usefixtures("no_inductor")


class Author(Toy):
    """A model that brings its own generation, in which ``call`` says how it calls itself."""

    call = "self()"

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)

    @torch.no_grad()
    def generate(self, ids: Tensor) -> Tensor:
        forward: Callable[[Tensor], Tensor] = self if self.call == "self()" else self.forward
        text = torch.cat([ids, torch.full((1, 8), MASK)], 1)
        while bool((text == MASK).any()):
            best, token = forward(text)[..., :MASK].max(-1)
            at = best.masked_fill(text != MASK, -torch.inf).argmax()
            text[0, at] = token[0, at]
        return text

    def stream(self, ids: Tensor) -> Any:
        yield self.forward(ids)


class Relative(Author):
    """Whose method goes on to that of its parent."""

    @torch.no_grad()
    def generate(self, ids: Tensor) -> Tensor:
        return super().generate(ids)


class Whole(nn.Module):
    """A model that the other one is a part of."""

    def __init__(self, part: Author) -> None:
        super().__init__()
        self.part = part

    def answer(self, ids: Tensor) -> Tensor:
        return self.part.generate(ids)


def build(kind: type[Author] = Author, call: str = "self()") -> Author:
    torch.manual_seed(0)
    model = kind().eval()
    kind.call = call
    return model


def steps(function: Callable[[], Any], exact: bool = True) -> tuple[int, Any]:
    """Steps of FOCUS while a function ran, and what it returned."""
    with focus_compile.session(exact=exact) as focus:
        result = function()
    return focus.stats.steps, result


@pytest.mark.parametrize("kind", [Author, Relative])
@pytest.mark.parametrize("call", ["self()", "self.forward()"])
def test_methods_of_a_twin(kind: type[Author], call: str) -> None:
    """They run FOCUS; the model's own do not, and nothing of the model has changed."""
    model = build(kind, call)
    before, expected = dict(vars(model)), model.generate(IDS)
    compiled = focus_compile.compile(model, mask_token_id=MASK, strict=True)
    count, made = steps(lambda: compiled.generate(IDS))
    assert count == 8 and torch.equal(made, expected)
    assert focus_compile.status(compiled).focus_calls == 8
    assert steps(lambda: model.generate(IDS))[0] == 0
    assert vars(model) == before and type(model) is kind and isinstance(compiled, kind)


@pytest.mark.parametrize("call", ["self()", "self.forward()"])
def test_in_place(call: str) -> None:
    model = build(call=call)
    before, expected = dict(vars(model)), model.generate(IDS)
    with focus_compile.in_place(model, mask_token_id=MASK, strict=True) as compiled:
        assert compiled is model and isinstance(model, Author) and vars(model) == before
        count, made = steps(lambda: model.generate(IDS))
        assert count == 8 and torch.equal(made, expected)
    assert type(model) is Author and vars(model) == before
    assert steps(lambda: model.generate(IDS))[0] == 0


def test_an_error_restores() -> None:
    model = build()
    with pytest.raises(ArithmeticError), focus_compile.in_place(model, mask_token_id=MASK):
        raise ArithmeticError
    assert type(model) is Author


def test_a_part_in_place() -> None:
    """The module around it runs it compiled, without knowing."""
    whole = Whole(build())
    focus_compile.compile(whole.part, mask_token_id=MASK, in_place=True)
    assert steps(lambda: whole.answer(IDS))[0] == 8
    focus_compile.restore(whole.part)
    assert steps(lambda: whole.answer(IDS))[0] == 0


def test_a_generator_of_the_model() -> None:
    compiled = focus_compile.compile(build(), mask_token_id=MASK)
    text = torch.cat([IDS, torch.full((1, 8), MASK)], 1)
    with torch.no_grad():
        assert steps(lambda: list(compiled.stream(text)))[0] == 1


def test_what_a_twin_shares() -> None:
    """Weights, buffers, modules and settings are the same ones, whoever sets them."""
    model = build()
    compiled = focus_compile.compile(model, mask_token_id=MASK)
    assert [*compiled.state_dict()] == [*model.state_dict()]
    assert compiled.head is model.head
    compiled.train()
    assert model.training
    compiled.extra = nn.Linear(2, 3)
    assert model.extra.weight is compiled.extra.weight  # type: ignore[union-attr]
    model.eval().to(torch.float64)
    assert not compiled.training and compiled.head.weight.dtype == torch.float64
    assert compiled._orig_mod is model
    assert focus_compile.compile(compiled, mask_token_id=MASK)._orig_mod is model
    assert focus_compile.compile(torch.compile(model), mask_token_id=MASK)._orig_mod is model


def remade(model: Any) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def test_copies_in_place_are_plain() -> None:
    model = build()
    expected = model.generate(IDS)
    with focus_compile.in_place(model, mask_token_id=MASK):
        made = remade(model)
    for other in made:
        assert type(other) is Author and "forward" not in vars(other)
        assert other.head.weight is not model.head.weight
        count, text = steps(lambda other=other: other.generate(IDS))  # type: ignore[misc]
        assert count == 0 and torch.equal(text, expected)


def test_copies_of_a_twin_are_compiled_anew() -> None:
    model = build()
    expected = model.generate(IDS)
    compiled = focus_compile.compile(model, mask_token_id=MASK, alpha=2.0)
    assert steps(lambda: compiled.generate(IDS))[0] == 8
    for other in remade(compiled):
        assert focus_compile.status(other).graphs == 0
        assert other.head.weight is not model.head.weight
        count, text = steps(lambda other=other: other.generate(IDS))  # type: ignore[misc]
        assert count == 8 and torch.equal(text, expected)
        assert focus_compile.status(other).focus_calls == 8


def test_refused_uses() -> None:
    model = build()
    with pytest.raises(ValueError, match="not compiled in place"):
        focus_compile.restore(model)
    compiled = focus_compile.compile(model, mask_token_id=MASK)
    with pytest.raises(ValueError, match="not compiled in place"):
        focus_compile.restore(compiled)
    with focus_compile.in_place(model, mask_token_id=MASK):
        with pytest.raises(ValueError, match="compiled already"):
            focus_compile.compile(model, mask_token_id=MASK, in_place=True)
        for change in (lambda: setattr(model, "forward", print), lambda: delattr(model, "forward")):
            with pytest.raises(RuntimeError, match=r"forward .* was replaced"):
                change()
    model.forward = lambda ids: ids  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match=r"forward .* was replaced"):
        compiled(IDS)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [("Dream", {}, True), ("llada", {}, False), ("Dream", {"shifted_logits": False}, False)],
)
def test_whose_logits_predict_the_next_token(
    kind: str, given: dict[str, bool], expected: bool
) -> None:
    """By the model's type; an option says otherwise."""
    model: Any = build()
    model.config = SimpleNamespace(model_type=kind)
    compiled = focus_compile.compile(model, mask_token_id=MASK, **given)
    assert compiled._focus.again.keywords["shifted_logits"] is expected


class Timed:
    """Anybody's wrapper: it does something at every call, and hands all else on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@pytest.mark.parametrize("wrap", [lambda model: model, Timed])
def test_the_model_that_was_compiled(wrap: Callable[[nn.Module], Any]) -> None:
    """Its forward's arguments and its weights are asked for, whoever stands before it."""
    model = build()
    for compiled in (
        torch.compile(model, backend="focus"),
        focus_compile.compile(model, mask_token_id=MASK),
    ):
        assert original(wrap(compiled)) is model
    with focus_compile.in_place(model, mask_token_id=MASK):
        assert type(original(wrap(model))) is Author
    plain = wrap(model)
    assert original(plain) is plain


def test_the_bare_line_is_bypassed(caplog: pytest.LogCaptureFixture) -> None:
    """``torch.compile``'s wrapper runs the eager model in its methods: its session says so."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of limits that other tests have reached
    model = build()
    assert steps(lambda: model.generate(IDS))[0] == 0 and not caplog.messages  # nothing compiled
    compiled: Any = torch.compile(model, backend="focus", options={"mask_token_id": MASK})
    with torch.no_grad():
        text = torch.cat([IDS, torch.full((1, 8), MASK)], 1)
        assert steps(lambda: compiled(text))[0] == 1
        with focus_compile.session():  # what happens in the one inside counts
            assert steps(lambda: compiled(text))[0] == 1
    with focus_compile.session(enabled=False):
        compiled.generate(IDS)
    assert BYPASSED not in caplog.messages
    assert steps(lambda: compiled.generate(IDS))[0] == 0
    assert caplog.messages.count(BYPASSED) == 1


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_the_recompile_limit(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing stops silently: the call that meets the limit says so."""
    torch._dynamo.reset()
    model = build()
    limit = torch._dynamo.config.patch(fail_on_recompile_limit_hit=False, recompile_limit=2)
    accumulated = torch._dynamo.config.patch(accumulated_recompile_limit=2)
    with limit, accumulated, caplog.at_level(logging.WARNING, logger="focus_compile"):
        compiled = focus_compile.compile(model, mask_token_id=MASK, dynamic=False, strict=strict)
        for length in (9, 10):
            compiled(torch.full((1, length), MASK))
        assert LIMIT not in caplog.messages
        last = torch.full((1, 12), MASK)
        if strict:
            with pytest.raises(RuntimeError, match="recompile limit"):
                compiled(last)
        else:
            compiled(last)
            assert caplog.messages.count(LIMIT) == 1
    assert focus_compile.status(compiled).focus_calls == 2
    torch._dynamo.reset()


def test_compilation_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then ``torch.compile`` gives back what it got, and a twin is no compiled model."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    compiled = focus_compile.compile(Toy().eval(), mask_token_id=MASK)
    assert backend_of(compiled) is None
    with pytest.raises(ValueError, match="no status"):
        focus_compile.status(compiled)
