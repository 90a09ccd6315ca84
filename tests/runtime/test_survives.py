"""What outlives a call: errors and explanations that travel, warnings that hold no model."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph

import focus_compile
from focus_compile import Explanation, Status, focus_backend
from focus_compile.errors import (
    EmptyCall,
    EvictedTokenDecoded,
    NotCompiled,
    NothingToEvict,
    UncommittedHistory,
    Unsupported,
)
from focus_compile.refusals import DROPOUT, MIXES_TOKENS, NO_SIZE, ONE_TOKEN
from focus_compile.runtime.session import session
from tests.support.toy import VOCAB, Toy

MASK = 20


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Ours: torch logs its traces, too."""
    ours = [record for record in caplog.records if record.name.startswith("focus_compile")]
    return [record for record in ours if record.levelno >= logging.WARNING]


def errors() -> list[Exception]:
    node = Graph().placeholder("x")
    return [
        Unsupported("why {not}"),
        Unsupported(DROPOUT),
        Unsupported(NO_SIZE, node, extent="{7}"),
        NothingToEvict(ONE_TOKEN, node),
        NotCompiled("prefix", RuntimeError("x")),
        EmptyCall((0, 3)),
        UncommittedHistory(3),
        EvictedTokenDecoded(1, 2),
    ]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("way", [pickled, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_errors(error: Exception, way: Callable[[Any], Any]) -> None:
    again = way(error)
    assert type(again) is type(error) and str(again) == str(error) and again.args == error.args
    assert vars(again) == vars(error)
    if isinstance(error, Unsupported):
        assert again.cure == error.cure and bool(error.cure) == (error.reason != "why {not}")


def quick(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
    return graph


def compiled(model: torch.nn.Module, mask: int = MASK, strict: bool = True) -> Any:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        options = {"mask_token_id": mask, "strict": strict}
        return focus_backend(gm, inputs, options=options, inner=quick)

    return torch.compile(model, backend=backend)


@torch.no_grad()
def test_a_refusal_is_told_once_and_holds_no_model(caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for _ in range(2):
        model = Toy(lambda x: x - x.mean(1, keepdim=True))
        found.append(weakref.ref(model))
        compiled(model, strict=False)(torch.full((2, 7), MASK))
        del model
        torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in found] == [None, None]
    (record,) = warnings_of(caplog)
    told = f"leaves this graph as it is: {MIXES_TOKENS.reason} [op aten.mean.dim]. What to do: "
    assert record.getMessage().endswith(told + MIXES_TOKENS.cure)


@pytest.mark.parametrize("way", [pickled, copy.copy, copy.deepcopy])
def test_explanations(way: Callable[[Any], Any], tmp_path: Any) -> None:
    story = focus_compile.explain(Toy(), torch.full((2, 7), MASK))
    assert story.applied
    cost = story.graphs[0].cost
    assert cost is not None
    cost.speedup(2, 7, 0, 9.0, 5.0)  # makes a function, which cannot be pickled
    again: Explanation = way(way(story))
    assert again.to_dict() == story.to_dict() and str(again) == str(story)
    assert again.applied and again.graphs[0].nodes == story.graphs[0].nodes
    assert (again.save(tmp_path) / "explanation.json").read_text() == story.to_json() + "\n"


@torch.no_grad()
def test_a_mask_token_beyond_the_embedding() -> None:
    ids = torch.full((2, 7), MASK)
    told = f"mask_token_id=151669: the model's embedding has {VOCAB} rows"
    model = compiled(Toy(), mask=151669)
    with pytest.raises(ValueError, match=told):
        model(ids)
    with session(mask_token_id=VOCAB), pytest.raises(ValueError, match="mask_token_id=23: "):
        model(ids)


@torch.no_grad()
def test_a_session_without_a_masked_call(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(Toy(), mask=19)
    ids = torch.full((2, 7), MASK)
    for _ in range(2):
        with session():
            model(ids)
    (record,) = warnings_of(caplog)
    assert record.levelno == logging.WARNING
    told = "a session ends without one masked call, after 1 dense ones: no token was 19"
    assert told in record.getMessage()


def test_status_needs_a_record() -> None:
    with pytest.raises(ValueError, match="no status: compile the model with"):
        focus_compile.status(Toy())


def test_a_status_is_short() -> None:
    status = Status(2, 1, {"no rule": 1}, 7, {"FOCUS was off": 3}, 1.25)
    assert repr(status) == (
        "FOCUS applied to 1 of 2 graphs, 7 masked calls; 3 dense: FOCUS was off; refused: no rule; "
        "compiled for 1.2 s"
    )
    assert status.to_dict()["masked_dense"] == {"FOCUS was off": 3}


@torch.no_grad()
def test_a_changed_number_or_buffer_starts_the_block_anew() -> None:
    class Model(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0
            self.register_buffer("shift", torch.zeros(12))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.between = lambda x: torch.relu(x) * self.factor + self.shift + given
            return super().forward(ids)

    def number(model: Model, on: bool) -> None:
        model.factor = 3.0 if on else 1.0

    def written(model: Model, on: bool) -> None:
        model.shift.fill_(float(on))

    def replaced(model: Model, on: bool) -> None:
        model.shift = torch.full((12,), float(on))

    given = torch.rand(2, 7, 12, generator=torch.Generator().manual_seed(1))
    ids = torch.full((2, 7), MASK)
    ids[:, ::3] = torch.arange(6).view(2, 3)
    for change in (number, written, replaced):
        torch.manual_seed(0)
        model = Model().eval()
        run = compiled(model)
        change(model, True)
        with session():
            fresh = run(ids)
            kept = run(ids)
        change(model, False)
        with session():
            run(ids)
            change(model, True)
            assert torch.equal(run(ids), fresh), change.__name__
        assert not torch.equal(kept, fresh)
