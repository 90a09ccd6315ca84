"""The suffix padded to a few sizes, and programs without the host's scalars: what CUDA graphs need.

Numbers on a CPU, where nothing is recorded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import FocusConfig
from focus_compile.ops.library import focus
from focus_compile.ops.tables import retained_tables, tables
from focus_compile.programs.lower import drop_unread, lower
from tests.support.dialects import DIALECTS, Subject, draw_call
from tests.support.harness import (
    MASK,
    VOCAB,
    Recorded,
    Run,
    Sizes,
    bound,
    build_model,
    eager_inner,
    random_call,
    retained,
)  # fmt: skip

BUCKETS = (12, 16, 22)


def test_tables_are_padded_with_the_last_token() -> None:
    keep = torch.tensor([[0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    order, _, places, sizes = tables(keep)
    assert sizes.tolist() == [4, 3]
    tokens, rows = retained_tables(order, places, 4, 3, (3, 6, 9))
    assert tokens.tolist() == [1, 3, 4, 12, 12, 12]
    assert rows.tolist() == [[1, 3, 4, 0], [5, 0, 0, 0]]
    for buckets in ((), (3,)):
        tokens, rows = retained_tables(order, places, 4, 3, buckets)
        assert tokens.tolist() == [1, 3, 4, 12] and rows.tolist() == [[1, 3, 4], [5, 0, 0]]


def test_a_padded_suffix_returns_the_same() -> None:
    model = build_model()
    plain, padded = Run(model), Run(model, {"buckets": list(BUCKETS)})
    seen: set[int] = set()
    filled = 0
    for seed in range(20):
        call = random_call(seed, model, 3, 9, 17)
        expected, actual = plain.logits(call), padded.logits(call)
        program = padded.program_of(call)
        count = int(retained(expected).sum())
        if not isinstance(program.suffix, Recorded):
            program.suffix = Recorded(program.suffix)  # type: ignore[assignment]
            padded.logits(call)
        given = program.suffix.values["tokens"].numel()
        assert given == next((size for size in BUCKETS if size >= count), count)
        assert retained(expected).equal(retained(actual))
        torch.testing.assert_close(actual, expected, atol=bound(expected), rtol=0)
        seen.add(given)
        filled += given > count
    assert seen >= set(BUCKETS) and filled >= 10


@pytest.mark.parametrize("dialect", ["sdar-moe-grouped", "llada-canvas", "sdar-static"])
def test_dialects(dialect: str) -> None:
    """Experts get the repeated rows too, canvases have no cache, fixed caches replace slots."""
    subject = Subject(DIALECTS[dialect])
    draws = [draw_call(subject.dialect, seed) for seed in range(10)]
    with focus_compile.session(alpha=1.0) as focus:
        expected = [(focus.reset(), subject.focus(draw))[1] for draw in draws]
    for program in subject.executables:
        program.config = dataclasses.replace(program.config, buckets=(16, 32, 48, 64))
        program.suffix = Recorded(program.suffix)  # type: ignore[assignment]
    padded = 0
    with focus_compile.session(alpha=1.0) as focus:
        for draw, logits in zip(draws, expected, strict=True):
            focus.reset()
            torch.testing.assert_close(subject.focus(draw), logits, atol=1e-5, rtol=1e-5)
            padded += any(_padded(program.suffix) for program in subject.executables)
    assert padded >= 5


def _padded(program: Any) -> bool:
    """Whether the program was last called with a token that is repeated."""
    tokens = program.values.get("tokens", torch.zeros(0))
    return tokens.unique().numel() < tokens.numel()


def generated(options: dict[str, Any], inner: Any = eager_inner) -> Tensor:
    """Tokens of two blocks; packed logits, and slots that are written in place where they may."""
    run = Run(build_model(Sizes(layers=3)), options, inner, dynamic=True)
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        made = focus_compile.generate(
            run.compiled, ids, max_new_tokens=22, block_length=11, mask_token_id=MASK,
            confidence_threshold=0.2,
        )  # fmt: skip
    assert isinstance(made, Tensor) and made.max() < VOCAB
    dense, prefix, suffix = run.counts()
    assert prefix == suffix > 4 and dense == 3
    return made


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return generated({})


def test_generation_pads_and_decodes_the_same(plain: Tensor) -> None:
    assert torch.equal(generated({"buckets": list(BUCKETS)}), plain)


@pytest.mark.usefixtures("dense_without_inductor")
def test_programs_to_be_captured(plain: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor compiles them without the host's scalar; slots are copied; tokens are the same."""
    monkeypatch.setattr(FocusConfig, "captures", lambda *_: True)
    assert torch.equal(generated({"mode": "reduce-overhead", "buckets": [16, 33]}, None), plain)


def test_captured_joins_never_write_into_their_slots() -> None:
    model = build_model(Sizes(layers=3))
    program = Run(model).program_of(random_call(3, model, 3, 9, 17))
    half = program.suffix.half
    assert "reuse" in half.inputs
    for captured in (False, True):
        lowered = lower(half.gm, captured=captured)
        joins = lowered.graph.find_nodes(op="call_function", target=focus.join.default)
        assert joins and all((node.args[5] is None) == captured for node in joins)
        left = [half.inputs[index] for index in drop_unread(lowered, half.gm)]
        assert left == [name for name in half.inputs if name != "reuse" or not captured]


@pytest.mark.parametrize(("mode", "captures"), [(None, False), ("reduce-overhead", True)])
def test_which_modes_capture(mode: str | None, captures: bool) -> None:
    devices = [torch.device("cpu"), torch.device("cuda")]
    assert FocusConfig(mode=mode).captures(devices) is captures
    patched = {"triton.cudagraphs": not captures}
    assert FocusConfig(mode=mode, inductor=patched).captures(devices) is not captures
    assert not FocusConfig(mode="reduce-overhead").captures(devices[:1])
