"""Audits: what they count is what an eager model says, and they change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import Generated, Session
from focus_compile.calibrated import Calibrated, fingerprint
from focus_compile.runtime.audit import Audit
from focus_compile.runtime.demand import Demand
from tests.support.dialects import DIALECTS, Draw, Subject, SubjectOf
from tests.support.harness import MASK, PAPER, Run, Sizes, build_model, retained

THRESHOLDS = {"llada": 0.12, "sdar-static": 0.1, "dream-canvas": 0.075}
"""Caches that grow and that are written into, and none; each model is sure of some tokens."""
WRONG: dict[str, Any] = {"alpha": 1.0, "signal": (1.0, -1.0)}


def by_hand(
    dense: Tensor, focus: Tensor, masked: Tensor, kept: Tensor, threshold: float, shifted: bool
) -> tuple[int, int, int, int]:
    """Row by row: rows that are judged, missed ones, tokens decided, those that differ."""
    dense, focus = dense.clone(), focus.clone()
    if shifted:  # the first token has no logits
        dense, focus = dense.roll(1, 1), focus.roll(1, 1)
        kept = kept.roll(1, 1)
        kept[:, 0] = False
    dense[..., MASK] = focus[..., MASK] = -torch.inf
    rows = missed = decided = differ = 0
    for b in range(len(masked)):
        places = masked[b].nonzero().flatten().tolist()
        probabilities, tokens = dense[b].softmax(-1).max(-1)
        if shifted:
            probabilities[0] = -1
        sure = {t for t in places if probabilities[t] >= threshold}
        here = [t for t in places if kept[b, t]]
        if sure and len(here) < len(places):
            rows += 1
            missed += not sure & set(here)
        mine, makes = focus[b].softmax(-1).max(-1)
        chosen = [t for t in here if mine[t] >= threshold]
        if not chosen and here:
            chosen = [max(here, key=lambda t: mine[t].item())]
        decided += len(chosen)
        differ += sum(int(tokens[t] != makes[t]) for t in chosen)
    return rows, missed, decided, differ


def opened(subject: Subject, tokens: int = 15) -> Draw:
    """Four rows of three tokens and masks, a history where there is one."""
    history = 5 if subject.dialect.history else 0
    ids = torch.full((4, tokens), MASK)
    ids[:, :3] = torch.randint(0, MASK, (4, 3), generator=torch.Generator().manual_seed(0))
    visible = torch.ones(4, tokens, history + tokens, dtype=torch.bool)
    return Draw(ids, ids == MASK, visible, history, 3)


def decoded(draw: Draw, kept: Tensor, shifted: bool) -> Draw:
    """The leftmost mask of every row that can be decoded becomes a token."""
    able = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, :-1]], 1) if shifted else kept
    chosen = able & (draw.ids == MASK)
    chosen &= chosen.cumsum(1) <= 1
    return dataclasses.replace(draw, ids=draw.ids.masked_fill(chosen, 7))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_counts_are_those_of_the_eager_model(
    name: str, shifted: bool, subject_of: SubjectOf
) -> None:
    """Steps of a block whose tokens are ranked the wrong way round; nothing else is changed."""
    subject, threshold = subject_of(DIALECTS[name]), THRESHOLDS[name]
    settings = WRONG | {"shifted_logits": shifted}
    draw, plain = opened(subject), list[Tensor]()
    with focus_compile.session(**settings, **PAPER):
        for _ in range(8):
            plain.append(subject.focus(draw))
            draw = decoded(draw, retained(plain[-1]), shifted)
    draw, totals = opened(subject), torch.zeros(4, dtype=torch.int64)
    with focus_compile.session(**settings, **PAPER, audit=2) as focus:
        focus.decoding = Demand(threshold)
        for step, expected in enumerate(plain):
            dense, actual = subject.eager(draw), subject.focus(draw)
            assert torch.equal(actual, expected)
            if step % 2:
                masked, kept = draw.ids == MASK, retained(actual)
                totals += torch.tensor(by_hand(dense, actual, masked, kept, threshold, shifted))
            audit = focus.stats.audit
            assert audit is not None and audit.steps == (step + 1) // 2
            assert [audit.rows, audit.missed, audit.decided, audit.differ] == totals.tolist()
            assert audit.unrescued == audit.missed
            draw = decoded(draw, retained(actual), shifted)
    rows, missed, decided, differ = totals.tolist()
    assert rows > missed > 0 and decided > differ > 0
    assert focus.stats.dense_calls == 0 and "4 steps audited" in str(audit)


def steps(subject: Subject, count: int = 6) -> None:
    """Of a block, in the session that is open."""
    draw = opened(subject)
    for _ in range(count):
        arguments = subject.dialect.arguments(subject.model, draw)
        with torch.no_grad():
            made = subject.dialect.logits(subject.compiled(**arguments))
        draw = decoded(draw, retained(made), shifted=False)


def test_rescue_is_told_apart(subject_of: SubjectOf) -> None:
    """Most of what was missed at first is there after rescue; not where FOCUS is sure of a token
    of which dense is not."""
    subject = subject_of(DIALECTS["llada"])
    paper = PAPER | {"rescue": THRESHOLDS["llada"]}
    with focus_compile.session(**WRONG, **paper, audit=1) as focus:
        steps(subject)
    audit = focus.stats.audit
    assert audit is not None and audit.steps == 6 and focus.stats.rescued_rows
    assert audit.missed > 2 * audit.unrescued


def test_without_a_threshold_no_token_is_sure(subject_of: SubjectOf) -> None:
    """In a loop of one's own, without rescue: the surest tokens are compared."""
    with focus_compile.session(**WRONG, **PAPER, audit=3) as focus:
        steps(subject_of(DIALECTS["llada"]))
    audit = focus.stats.audit
    assert audit is not None and (audit.steps, audit.rows, audit.decided) == (2, 0, 8)
    assert audit.hit_range is None and audit.differ_range is not None


@pytest.mark.parametrize(("kept", "option"), [(0.99, False), (0.99, True), (0.1, False)])
def test_more_is_missed_than_the_calibration_saw(
    kept: float,
    option: bool,
    subject_of: SubjectOf,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A warning at the end of a session, where the intervals do not meet; the calibration is the
    session's, or an option of the model."""
    subject = subject_of(DIALECTS["llada"])
    options = {"signal": (1.0, -1.0), "first_step": "evict", "layers": (0, 1)}
    weights = frozenset(map(fingerprint, subject.model.parameters()))
    calibrated = Calibrated("toy", weights, options, (kept, 1.0))
    settings: dict[str, Any] = {"alpha": 1.0, "rescue": THRESHOLDS["llada"], "audit": 1}
    if option:
        steps(subject)  # there is a program
        for program in subject.executables:
            config = dataclasses.replace(program.config, calibration=calibrated)
            monkeypatch.setattr(program, "config", config)
        settings |= WRONG | {"first_step": "evict"}
    else:
        settings["calibration"] = calibrated
    with focus_compile.session(**settings):
        steps(subject)
    told = [line for line in caplog.messages if line.startswith("eviction misses more than")]
    assert len(told) == (kept == 0.99)
    assert all("99.0 % to 100.0 % of such rows: calibrate anew" in line for line in told)


@pytest.mark.parametrize("exact", [False, True])
def test_generate(exact: bool, generating: Run) -> None:
    """The cache is the caller's, which dense must not write into: tokens and steps are those
    without an audit. Exactly computed, no token is another one."""

    def generated(audit: int | None) -> tuple[Generated, Audit | None]:
        ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(0))
        settings = PAPER | {"alpha": 1.0, "exact": exact, "audit": audit}
        with focus_compile.session(**settings) as focus:
            out = focus_compile.generate(
                generating.compiled, ids, max_new_tokens=22, block_length=11, mask_token_id=MASK,
                confidence_threshold=0.2, rescue=None, return_dict=True,
            )  # fmt: skip
        return out, focus.stats.audit

    (plain, _), (out, audit) = generated(None), generated(1)
    assert torch.equal(out.sequences, plain.sequences) and out.forwards == plain.forwards
    assert all(map(torch.equal, out.retain_masks, plain.retain_masks))
    assert generating.executables[-1].layout.held  # the cache is written where it lies
    assert audit is not None and audit.steps == out.focus_steps == out.forwards > 8
    assert audit.decided > 0 and (audit.differ == 0) == exact
    assert audit.rows == 0  # nothing is sure at this threshold, or nothing was evicted


def test_every_so_many_steps_of_all_generations(generating: Run) -> None:
    """Short generations are counted on, and what the session around them reports is theirs."""
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(0))
    steps = 0
    with focus_compile.session(**PAPER, alpha=1.0, audit=5) as focus:
        for _ in range(3):
            out = focus_compile.generate(
                generating.compiled, ids, max_new_tokens=11, block_length=11, mask_token_id=MASK,
                remasking_strategy="fixed", tokens_per_step=4, return_dict=True,
            )  # fmt: skip
            steps += out.focus_steps
            assert out.focus_steps < 5
    audit = focus.stats.audit
    assert audit is not None and audit.calls == steps and audit.steps == steps // 5 > 0


@pytest.fixture(scope="module")
def generating() -> Run:
    return Run(build_model(Sizes(layers=3)), dynamic=True)


@pytest.mark.parametrize("audit", [0, -3, 0.5, "all"])
def test_numbers_of_steps(audit: Any) -> None:
    with pytest.raises(
        ValueError, match=r"audit=.*: expected None, or a number of steps from 1 on"
    ):
        Session(audit=audit)
