"""Every dialect of public diffusion LLMs: equal to eager, and with eviction to eager FOCUS."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import focus_compile
from focus_compile.axes.rules.table import RULES
from tests.reference.emulation import Emulation
from tests.reference.state import Config, Visibility
from tests.reference.trust import Judge
from tests.support.dialects import DIALECTS, DISTINCT, Draw, Subject, SubjectOf, draw_call
from tests.support.harness import MASK, computed, retained

DRAWS = 30
TOLERANCE = 1e-4
NEAR_TIE = 1e-5


@pytest.fixture(params=DIALECTS)
def subject(request: pytest.FixtureRequest, subject_of: SubjectOf) -> Subject:
    """A dialect's model, compiled once for all tests of this file."""
    return subject_of(DIALECTS[request.param])


def test_nothing_evicted_equals_eager(subject: Subject) -> None:
    for seed in range(DRAWS):
        draw = draw_call(subject.dialect, seed)
        with focus_compile.session(alpha=1e9):
            actual = subject.focus(draw)
        torch.testing.assert_close(actual, subject.eager(draw), atol=TOLERANCE, rtol=TOLERANCE)


def test_evicting_equals_the_emulation(subject: Subject) -> None:
    """Which tokens are retained, and their logits; most calls compute fewer than were fed."""
    evicting = ties = 0
    for seed in range(DRAWS):
        draw = draw_call(subject.dialect, seed)
        config = Config(1.0 + (seed % 4) / 2, ("written", "prefix")[seed % 2])
        found = Emulation(config).step(
            lambda d=draw: subject.eager(d), draw.ids, draw.masked, draw.history
        )
        with focus_compile.session(alpha=config.alpha, visibility=config.visibility):
            actual = subject.focus(draw)
        if found.margin < NEAR_TIE:
            ties += 1
            continue
        assert torch.equal(retained(actual), found.retained)
        expected = found.logits * found.retained.unsqueeze(-1)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
        evicting += bool((~found.retained).any())
    print(f"{evicting} of {DRAWS} calls retained fewer tokens than were fed, {ties} near ties")
    assert evicting >= DRAWS // 2
    assert ties <= 1


def test_a_block_equals_the_emulation(subject: Subject) -> None:
    """Steps of one block, with what a session carries: fed tokens, stale keys, averages."""
    draw = draw_call(subject.dialect, 3)
    draw = dataclasses.replace(draw, ids=torch.full_like(draw.ids, MASK))
    emulation = Emulation(Config(1.2))
    fed = evicted = 0
    with focus_compile.session(alpha=1.2) as focus:
        for _ in range(6):
            masked = draw.ids == MASK
            if not masked.any():
                break
            found = emulation.step(lambda d=draw: subject.eager(d), draw.ids, masked, draw.history)
            actual = subject.focus(draw)
            assert found.margin > NEAR_TIE
            assert torch.equal(retained(actual), found.retained)
            assert focus.stats.fed_per_step[-1] == int(found.fed.sum())
            expected = found.logits * found.retained.unsqueeze(-1)
            torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
            fed += int((~found.fed).sum())
            evicted += int((found.fed & ~found.retained).sum())
            draw = decoded(draw, found.retained, emulation)
    assert fed and evicted


def test_exact_is_eager_at_every_step(subject: Subject) -> None:
    """Two blocks to their ends, rows at their own pace, and the commits: nothing is left out."""
    with focus_compile.session(alpha=1.0, exact=True) as focus, torch.no_grad():
        for block in range(2):
            draw = draw_call(subject.dialect, 3)
            draw = dataclasses.replace(draw, ids=torch.full_like(draw.ids, MASK), seed=block)
            for turn in itertools.count():
                expected = subject.eager(draw)
                torch.testing.assert_close(subject.focus(draw), expected, atol=1e-4, rtol=1e-5)
                assert focus.stats.fed == focus.stats.retained == focus.stats.canvas
                draw = at_random(draw, turn)
                if not (draw.ids == MASK).any():
                    break
            assert turn > 3
            arguments = subject.dialect.arguments(subject.model, draw)
            committed = subject.dialect.logits(subject.compiled(**arguments))
            torch.testing.assert_close(committed, subject.eager(draw), atol=1e-4, rtol=1e-5)


def at_random(draw: Draw, turn: int) -> Draw:
    """Some masks of every row become tokens, in one row more of them."""
    source = torch.Generator().manual_seed(turn)
    chosen = torch.rand(draw.ids.shape, generator=source) < 0.25
    chosen[turn % 2] |= torch.rand(draw.ids.shape[1], generator=source) < 0.4
    tokens = torch.randint(0, MASK, draw.ids.shape, generator=source)
    return dataclasses.replace(draw, ids=torch.where(chosen & (draw.ids == MASK), tokens, draw.ids))


@pytest.mark.parametrize("visibility", ["written", "prefix"])
@torch.no_grad()
def test_a_block_with_rescue(subject: Subject, visibility: Visibility) -> None:
    """Which tokens are retained and rescued, their logits, and what later steps see of them."""
    draw = draw_call(subject.dialect, 3)
    draw = dataclasses.replace(draw, ids=torch.full_like(draw.ids, MASK))
    emulation = Emulation(Config(1.0, visibility, rescue=0.12), Judge(MASK))
    rescued = kept = 0
    with focus_compile.session(alpha=1.0, visibility=visibility, rescue=0.12) as focus:
        for _ in range(6):
            masked = draw.ids == MASK
            if not masked.any():
                break
            found = emulation.step(lambda d=draw: subject.eager(d), draw.ids, masked, draw.history)
            before = subject.suffixes()
            arguments = subject.dialect.arguments(subject.model, draw)
            actual = computed(subject.dialect.logits(subject.compiled(**arguments)))
            assert min(found.margin, found.need_margin) > NEAR_TIE
            assert subject.suffixes() == before + 1 + bool(found.rescued.any())
            assert torch.equal(retained(actual), found.retained)
            mask = focus.rescue_mask
            assert torch.equal(torch.zeros_like(masked) if mask is None else mask, found.rescued)
            expected = found.logits * found.retained.unsqueeze(-1)
            torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
            rescued += int(found.rescued.any(1).sum())
            kept += int((masked & ~found.retained).any(1).sum())
            draw = decoded(draw, found.retained, emulation)
        assert focus.stats.rescued_rows == rescued > 0
    print(f"{rescued} rows rescued, {kept} left as they were")


@torch.no_grad()
@pytest.mark.parametrize("subject", ["dream-canvas", "dream"], indirect=True)
def test_logits_of_the_last_tokens(subject: Subject) -> None:
    """The model is asked for fewer logits; which tokens are retained stays the same."""
    for seed, last in ((0, 3), (1, 3), (2, 5), (3, 40)):
        draw = draw_call(subject.dialect, seed)
        with focus_compile.session(alpha=1.2):
            whole = subject.focus(draw)
        arguments = subject.dialect.arguments(subject.model, draw)
        with focus_compile.session(alpha=1.2):
            out = subject.compiled(**arguments, num_logits_to_keep=last)
        torch.testing.assert_close(computed(subject.dialect.logits(out)), whole[:, -last:])


@torch.no_grad()
@pytest.mark.parametrize("subject", ["llada-canvas", "dream-canvas", "gemma"], indirect=True)
def test_blocks_of_a_canvas(subject: Subject) -> None:
    """Prompt and all blocks in one call: only masks of the block at hand are candidates.

    Everything else is fed in the first step of a block, and its keys stay as they were then.
    """
    draw = draw_call(subject.dialect, 2)
    batch, tokens = 3, 18
    ids = torch.randint(0, MASK, (batch, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 6:] = MASK
    visible = torch.ones(batch, tokens, tokens, dtype=torch.bool)
    draw = dataclasses.replace(draw, ids=ids, visible=visible)
    with focus_compile.session(alpha=1.2) as focus:
        for block in ((6, 12), (12, 18)):
            focus.block = block
            emulation = Emulation(Config(1.2))
            inside = torch.zeros(batch, tokens, dtype=torch.bool)
            inside[:, slice(*block)] = True
            fed = []
            while (masked := (draw.ids == MASK) & inside).any():
                found = emulation.step(
                    lambda d=draw: subject.eager(d), draw.ids, masked, draw.history
                )
                actual = subject.focus(draw)
                assert found.margin > NEAR_TIE
                assert torch.equal(retained(actual), found.retained)
                expected = found.logits * found.retained.unsqueeze(-1)
                torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
                fed.append(focus.stats.fed_per_step[-1])
                draw = decoded(draw, found.retained & masked, emulation)
            assert fed[0] == batch * tokens
            assert max(fed[1:]) <= batch * 8
        focus.block = (12, 19)
        with pytest.raises(ValueError, match=r"session.block=\(12, 19\): the call has 18 tokens"):
            subject.focus(draw)


@pytest.mark.parametrize("subject", ["sdar-moe-grouped", "llada", "sdar-static"], indirect=True)
def test_inference_mode(subject: Subject) -> None:
    """As under ``no_grad``, also on tensors that were made in inference mode."""
    for seed in range(3):
        draw = draw_call(subject.dialect, seed)
        with focus_compile.session(alpha=1.2):
            expected = subject.focus(draw)
        arguments = subject.dialect.arguments
        with torch.inference_mode(), focus_compile.session(alpha=1.2) as focus:
            out = subject.compiled(**arguments(subject.model, draw))
            assert focus.stats.steps == 1
            torch.testing.assert_close(computed(subject.dialect.logits(out)), expected)


@torch.no_grad()
@pytest.mark.parametrize("subject", ["llada", "dream", "dream-heads"], indirect=True)
def test_a_history_that_another_path_has_made(subject: Subject) -> None:
    """Its length is found wherever the cache has its tokens, and its block starts anew."""
    draw = draw_call(subject.dialect, 1)
    tokens, keys = draw.ids.shape[1], draw.history + 2
    visible = torch.ones(len(draw.ids), tokens, keys + tokens, dtype=torch.bool)
    longer = dataclasses.replace(draw, history=keys, visible=visible)
    with focus_compile.session():
        alone = subject.focus(longer)
    with focus_compile.session():
        subject.focus(draw)
        torch.testing.assert_close(subject.focus(longer), alone)


def decoded(draw: Draw, kept: torch.Tensor, emulation: Emulation) -> Draw:
    """The leftmost two retained masks of every row become tokens."""
    chosen = kept & (draw.ids == MASK)
    chosen &= chosen.cumsum(1) <= 2
    for row, count in zip(emulation.rows, chosen.sum(1).tolist(), strict=True):
        row.record(count)
    return dataclasses.replace(draw, ids=draw.ids.masked_fill(chosen, 7))


def test_every_operator_has_a_rule(subject: Subject) -> None:
    """Overloads that no rule knows are those that never carry tokens."""
    subject.focus(draw_call(subject.dialect, 0))
    seen = {
        str(node.target)
        for analysis in subject.analyses
        for node in analysis.captured.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target not in RULES
    }
    numbers = {"aten.item.default", "aten.sym_size.int"}
    numbers |= {"aten.scalar_tensor.default"}  # in graphs of torch 2.11
    assert seen <= numbers


def test_the_distinct_ones_have_the_operators_of_nearly_all(
    subject_of: SubjectOf,
) -> None:
    """Of what their programs call, prefix and suffix apart: what goes through Inductor."""
    found: dict[str, set[tuple[str, str]]] = {}
    for name, dialect in DIALECTS.items():
        subject = subject_of(dialect)
        subject.focus(draw_call(dialect, 0))
        found[name] = {
            (half, str(node.target))
            for analysis in subject.analyses
            for half in ("prefix", "suffix")
            for node in getattr(analysis.halves, half).gm.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
        }
    missing = set[tuple[str, str]]().union(*found.values())
    missing -= set[tuple[str, str]]().union(*(found[name] for name in DISTINCT))
    assert {operator for _, operator in missing} == {
        "aten.bmm.default", "aten.repeat_interleave.self_int", "aten.squeeze.dim",  # as grouped_mm
        "focus.causal.default",
    }  # fmt: skip
